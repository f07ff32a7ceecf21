"""The numbered scripts, as a user runs them: in a process of their own, in a folder of their own."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT, settings

from support.answerers import local_answerer
from support.evaluation import evaluate
from support.files import read_jsonl, text_hash, write_jsonl

QUICK = ["--steps", "2", "--train-rows", "6", "--eval-rows", "20", "--finalists", "2"]


def run(script, *arguments, folder, **more):
    """The finished process of a script; offline, on one thread."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_DATASETS_OFFLINE": "1"}
    if "--optimizer-endpoint" not in arguments:  # the client that asks a server would not even ask one here
        environment["HF_HUB_OFFLINE"] = "1"
    command = [sys.executable, str(ROOT / script), *map(str, arguments)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, **more)


def good(script, *arguments, folder):
    done = run(script, *arguments, folder=folder)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with a short finished demo run in it, and what the run printed."""
    folder = tmp_path_factory.mktemp("finished")
    return folder, good("02_optimize.py", *QUICK, folder=folder)


def test_stage_1_prints_the_counts_and_writes_the_same_bytes_twice(tmp_path):
    outputs = []
    for name in ("a", "b"):
        printed = good("01_prepare_data.py", "--task", "demo", "--data-dir", name, folder=tmp_path)
        assert "train  200  dev  100  test  400" in printed
        outputs.append({p.name: p.read_bytes() for p in (tmp_path / name / "demo").iterdir()})
    assert outputs[0] == outputs[1]


NUMBER = r"([\d.]+) \(([\d.]+) to ([\d.]+)\)"  # an accuracy and its interval


def test_stage_2_prepares_the_data_and_prints_both_prompts_with_intervals_and_paths(finished):
    folder, printed = finished
    assert "preparing demo" in printed
    table = re.findall(rf"^(\w+, \w+) +{NUMBER} +{NUMBER} +[\d.]+ % +[\d.]+ % +[\d.]+$", printed, re.M)
    assert [row[0] for row in table] == ["initial, dev", "best, dev", "initial, test", "best, test"]
    assert re.search(r"^initial   read the problem here and find the answer now \.$", printed, re.M)
    assert len(re.findall(r"^step +\d+/2  position .* s  \w.*$", printed, re.M)) == 3
    for name in ("prompts.jsonl", "steps.jsonl", "results.jsonl", "predictions.jsonl"):
        assert f"runs/demo-seed0/{name}" in printed and (folder / "runs" / "demo-seed0" / name).exists()


def test_stage_2_says_at_its_end_what_stage_3_says_of_the_gradient_and_the_noise(finished):
    folder, printed = finished
    said = good("03_evaluate.py", "--signal", "runs/demo-seed0", folder=folder)
    verdict = said.splitlines()[-3:-1]
    assert verdict[0].startswith("The gradient ordered") and "The gain in the objective on training rows" in verdict[1]
    assert "\n".join(verdict) in printed
    assert (folder / "runs" / "demo-seed0" / "signal.png").exists()


def test_stage_2_ends_with_the_comparison_of_its_predictions_and_the_verdict_on_it(finished):
    folder, printed = finished
    run_dir = folder / "runs" / "demo-seed0"
    evaluated = {r["role"]: r["prompt_hash"] for r in read_jsonl(run_dir / "results.jsonl") if r["split"] == "test"}
    found = {}
    for p in read_jsonl(run_dir / "predictions.jsonl"):
        if p["split"] == "test":
            found.setdefault(p["prompt_hash"], {})[p["id"]] = p["correct"]
    initial, best = found[evaluated["initial"]], found[evaluated["best"]]
    change = [best[row] - initial[row] for row in initial]
    line = r"^initial +paper .* (\d+) +(\d+)  (\S+)$"
    gained, lost, p = re.search(line, printed.split("best against")[1], re.M).groups()
    assert (int(gained), int(lost)) == (change.count(1), change.count(-1)) and len(change) == 20
    assert f"the best prompt is better than the initial one by {sum(change)} rows of 20, p = {p}." in printed


def test_where_nothing_better_was_found_stage_2_says_so_and_shows_no_best_prompt(tmp_path):
    printed = good("02_optimize.py", "--steps", "0", "--train-rows", "5", "--eval-rows", "5", folder=tmp_path)
    end = printed[printed.index("\ninitial ") :]
    assert "The best prompt is the initial one: nothing better was found." in end
    assert re.findall(r"^(\w+, \w+) ", end, re.M) == ["initial, dev", "initial, test"] and "against" not in end
    results = read_jsonl(tmp_path / "runs/demo-seed0/results.jsonl")  # which the report reads
    assert {"initial", "best"} <= {r["role"] for r in results if r["split"] == "test"}


def test_a_prompt_that_training_rows_chose_against_dev_is_not_called_best(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "copy")
    run_dir = tmp_path / "copy" / "runs" / "demo-seed0"
    record = json.loads((run_dir / "run.json").read_text())
    record["config"]["choose_on"] = "train"
    del record["record_check"]
    (run_dir / "run.json").write_text(json.dumps(record))
    initial = next(p["prompt"] for p in read_jsonl(run_dir / "prompts.jsonl") if p["initial"])
    dev = {"correct": 20, "accuracy": 1.0, "stderr": 0.0}  # of the initial prompt, as if it were right everywhere
    results = read_jsonl(run_dir / "results.jsonl")
    candidates = [r for r in results if r["role"] == "candidate"]
    changed = [r | dev if (r["prompt"], r["split"]) == (initial, "dev") else r for r in candidates]
    assert changed != candidates
    write_jsonl(run_dir / "results.jsonl", changed)
    printed = good("02_optimize.py", *QUICK, "--choose-on", "train", folder=tmp_path / "copy")
    warning = "On dev the chosen prompt is worse than the initial one"
    assert re.search(rf"^{warning} .* On test the chosen prompt is better", printed, re.M)
    assert re.search(r"^best on train, test ", printed, re.M) and not re.search(r"^best, ", printed, re.M)
    flags = ["--run-dir", "runs/demo-seed0", "--eval-rows", "5"]
    assert warning in good("03_evaluate.py", *flags, folder=tmp_path / "copy")


def test_a_newcomer_s_first_screen_shows_no_warning(tmp_path):
    done = run("02_optimize.py", "--steps", "1", "--train-rows", "5", "--eval-rows", "5", folder=tmp_path)
    assert done.returncode == 0 and not re.search("warn|deprecat", done.stderr + done.stdout, re.I)


def test_stage_2_files_agree_with_each_other(finished):
    run_dir = finished[0] / "runs" / "demo-seed0"
    steps, prompts, results = (read_jsonl(run_dir / f"{n}.jsonl") for n in ("steps", "prompts", "results"))
    record = json.loads((run_dir / "run.json").read_text())
    assert record["config"]["steps"] == 2 and record["versions"]["torch"] and len(record["task"]["sha256"]) == 3
    assert [step["step"] for step in steps] == [0, 1, 2]
    assert sum(p["initial"] for p in prompts) == 1
    assert prompts[0]["dev_accuracy"] == max(p["dev_accuracy"] for p in prompts)
    ends = {(r["role"], r["split"]): r for r in results if r["role"] != "candidate"}
    assert set(ends) == {(role, split) for role in ("initial", "best") for split in ("dev", "test")}
    assert ends["best", "dev"]["prompt"] == prompts[0]["prompt"] and ends["best", "test"]["n"] == 20
    predictions = read_jsonl(run_dir / "predictions.jsonl")
    for result in results:
        correct = {
            p["id"]: p["correct"]
            for p in predictions
            if (p["split"], p["prompt_hash"]) == (result["split"], result["prompt_hash"])
        }
        assert len(correct) == result["n"] == 20 and sum(correct.values()) == result["correct"]


def test_rows_are_drawn_by_the_seed_and_each_split_is_evaluated_on_its_own(finished, tmp_path):
    run_dir = finished[0] / "runs" / "demo-seed0"
    for prediction in read_jsonl(run_dir / "predictions.jsonl"):
        assert prediction["id"] in {r["id"] for r in read_jsonl(finished[0] / f"data/demo/{prediction['split']}.jsonl")}
    flags = ["--steps", "0", "--train-rows", "6", "--eval-rows", "5", "--initial-prompt", "tell the sum ."]
    good("02_optimize.py", *flags, "--seed", "1", folder=tmp_path)
    drawn = [json.loads((d / "run.json").read_text())["train_ids"] for d in (run_dir, tmp_path / "runs/demo-seed1")]
    train = {row["id"] for row in read_jsonl(finished[0] / "data/demo/train.jsonl")}
    assert all(len(ids) == 6 and set(ids) <= train for ids in drawn) and drawn[0] != drawn[1]
    assert read_jsonl(tmp_path / "runs/demo-seed1/steps.jsonl")[0]["prompt"] == "tell the sum ."


def without_time(path):
    return [{k: v for k, v in r.items() if k not in ("seconds", "minutes")} for r in read_jsonl(path)]


def test_a_killed_run_goes_on_to_the_same_result(finished, tmp_path):
    steps = tmp_path / "runs" / "demo-seed0" / "steps.jsonl"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(ROOT / "02_optimize.py"), *QUICK]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    deadline = time.time() + 120
    while time.time() < deadline and not (steps.exists() and steps.read_text().count("\n") >= 2):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    with open(steps, "a") as file:
        file.write('{"step": 99, "cut short')
    printed = good("02_optimize.py", *QUICK, folder=tmp_path)
    assert "going on behind step" in printed
    for name in ("steps.jsonl", "prompts.jsonl", "results.jsonl", "predictions.jsonl"):
        whole = finished[0] / "runs" / "demo-seed0" / name
        assert without_time(tmp_path / "runs" / "demo-seed0" / name) == without_time(whole), name
    again = good("02_optimize.py", *QUICK, folder=tmp_path)  # a finished run is only read
    table, again_table = (text[text.index("\ninitial ") :] for text in (printed, again))
    assert again_table == table and "best against" in table


LONGER = ["--steps", "3", "--train-rows", "6", "--eval-rows", "30", "--finalists", "3"]


def test_a_continued_run_ends_as_one_that_had_its_steps_and_rows_from_the_start(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "continued")
    (tmp_path / "whole").mkdir()
    run_dir = "runs/demo-seed0"
    before = (tmp_path / "continued" / run_dir / "predictions.jsonl").read_bytes()
    elsewhere = ["--device", "cpu", "--patience", "9", "--data-dir", "rows"]
    printed = {
        "continued": good("02_optimize.py", *LONGER, *elsewhere, folder=tmp_path / "continued"),
        "whole": good("02_optimize.py", *LONGER, folder=tmp_path / "whole"),
    }
    assert "going on behind step 2" in printed["continued"]
    ends = [text[text.index("\ninitial ") :] for text in printed.values()]
    assert ends[0] == ends[1]
    folders = [tmp_path / name / run_dir for name in printed]
    for name in ("steps.jsonl", "prompts.jsonl"):
        assert without_time(folders[0] / name) == without_time(folders[1] / name), name
    roles = [{(r["role"], r["split"]): r for r in without_time(folder / "results.jsonl")} for folder in folders]
    assert all(roles[0][key] == roles[1][key] for key in roles[1] if key[0] != "candidate")
    assert sum(r["role"] == "best" for r in read_jsonl(folders[0] / "results.jsonl")) == 2 + 2 * (
        read_jsonl(finished[0] / run_dir / "prompts.jsonl")[0]["prompt"] == roles[1]["best", "test"]["prompt"]
    )
    after = (folders[0] / "predictions.jsonl").read_bytes()
    assert after.startswith(before)
    taken = [p["id"] for p in read_jsonl(folders[0] / "predictions.jsonl") if "answered_in" in p]
    assert len(taken) >= 2 * 20 and len(taken) % 20 == 0  # of the initial prompt at least, dev and test
    config = json.loads((folders[0] / "run.json").read_text())["config"]
    assert (config["steps"], config["eval_rows"], config["patience"]) == (3, 30, 9)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--steps", "1"], "holds 2 steps, --steps 1 asks for fewer: give at least 2, or choose another --run-dir"),
        (["--eval-rows", "10"], "other eval_rows (recorded 20, now 10): choose another --run-dir"),
        (["--top-k", "4", "--mu", "1"], "other shortlist_size (recorded 3, now 1), top_k (recorded 10, now 4): "),
        (["--dtype", "float64"], "--dtype must be one of"),
        (["--dtype", "bfloat16"], "other dtype (recorded auto, now bfloat16), dtype_here (recorded float32, now bfl"),
        (["--seeds", "1", "0"], "other train_ids"),
        (["--seeds", "1", "1"], "--seeds: each of them once"),
        (["--seed", "1", "--seeds", "2"], "--seed and --seeds: give one of them"),
        (["--patience", "-1"], "--patience must be at least 0"),
    ],
)
def test_what_cannot_be_continued_is_said_in_a_line_and_nothing_is_changed(finished, flags, said):
    run_dir = finished[0] / "runs" / "demo-seed0"
    before = {path.name: path.read_bytes() for path in run_dir.iterdir()}
    rows = ["--train-rows", "5"] if flags[0] == "--seeds" else []
    done = run("02_optimize.py", *QUICK, *rows, *flags, folder=finished[0])
    assert done.returncode == 2 and said in done.stderr.strip().splitlines()[-1], done.stderr
    assert {path.name: path.read_bytes() for path in run_dir.iterdir()} == before
    assert not (finished[0] / "runs" / "demo-seed1").exists()


def test_a_finished_run_repeated_loads_no_model(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "copy")
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import support.engine, runpy\n"
        "def refuse(*a): raise AssertionError('loaded')\n"
        f"support.engine.load_engine = refuse; sys.argv = ['x', *{QUICK}]\n"
        f"runpy.run_path({str(ROOT / '02_optimize.py')!r}, run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path / "copy", capture_output=True, text=True)
    assert done.returncode == 0 and "2 steps are done" in done.stdout, done.stderr
    ends = [text[text.index("\ninitial ") :] for text in (done.stdout, finished[1])]
    assert ends[0] == ends[1]


def test_patience_ends_a_search_says_so_and_is_judged_anew_when_it_goes_on(tmp_path):
    flags = ["--train-rows", "6", "--eval-rows", "5", "--finalists", "1", "--steps", "30", "--seed", "1"]
    printed = good("02_optimize.py", *flags, "--patience", "2", folder=tmp_path)
    path = tmp_path / "runs" / "demo-seed1" / "steps.jsonl"
    best = [step["best"]["objective"] for step in read_jsonl(path)]
    stop = next(n for n in range(2, len(best)) if min(best[: n - 1]) <= min(best[n - 1 : n + 1]))
    assert len(best) == stop + 1 < 31
    said = f"--patience 2: the best objective has not improved for 2 steps; the search ends at {stop}"
    assert said in printed and said in good("02_optimize.py", *flags, "--patience", "2", folder=tmp_path)
    good("02_optimize.py", *flags[:-4], "--steps", str(stop + 1), "--seed", "1", folder=tmp_path)
    assert len(read_jsonl(path)) == stop + 2


def test_several_seeds_run_in_folders_of_their_own_as_they_do_alone_and_end_in_a_table(finished, tmp_path):
    printed = good("02_optimize.py", *QUICK, "--seeds", "1", "0", folder=tmp_path)
    runs = tmp_path / "runs"
    assert sorted(path.name for path in runs.iterdir()) == ["demo-seed0", "demo-seed1"]
    for name in ("steps.jsonl", "prompts.jsonl"):
        alone = finished[0] / "runs" / "demo-seed0" / name
        assert without_time(runs / "demo-seed0" / name) == without_time(alone), name
    end = printed[printed.rindex("what is sent") :]
    found, differences = {}, []
    for seed in (1, 0):
        folder = runs / f"demo-seed{seed}"
        results = {(r["role"], r["split"]): r for r in read_jsonl(folder / "results.jsonl")}
        found[seed] = [results[role, split]["accuracy"] for split in ("dev", "test") for role in ("initial", "best")]
        numbers = re.search(rf"^seed {seed} +{NUMBER} +{NUMBER} +{NUMBER} +{NUMBER}$", end, re.M).groups()[::3]
        assert list(map(float, numbers)) == pytest.approx([100 * accuracy for accuracy in found[seed]])
        correct = {
            (p["prompt_hash"], p["split"], p["id"]): p["correct"] for p in read_jsonl(folder / "predictions.jsonl")
        }
        hashes = [results[role, "test"]["prompt_hash"] for role in ("initial", "best")]
        ids = [row for prompt, split, row in correct if (prompt, split) == (hashes[0], "test")]
        differences.append([correct[hashes[1], "test", row] - correct[hashes[0], "test", row] for row in ids])
        assert results["best", "test"]["prompt"] in end
    means = re.search(r"^mean +([\d.]+) ± ([\d.]+) +([\d.]+) ± ([\d.]+)", end, re.M).groups()
    assert float(means[2]) == pytest.approx(50 * (found[0][1] + found[1][1]), abs=0.06)
    assert float(means[3]) == pytest.approx(50 * abs(found[0][1] - found[1][1]), abs=0.06)
    difference = float(re.search(r"^paper +([+-][\d.]+) %", end, re.M).group(1))
    assert difference == pytest.approx(100 * sum(map(sum, differences)) / 40, abs=0.06)
    # The initial prompt was answered once.
    second = read_jsonl(runs / "demo-seed0" / "predictions.jsonl")
    assert len([p for p in second if p["prompt_hash"] == hashes[0] and "answered_in" in p]) == 2 * 20
    config = json.loads((runs / "demo-seed1" / "run.json").read_text())["config"]
    assert config["seed"] == 1 and "seeds" not in config


def test_another_configuration_in_the_same_folder_is_refused(finished):
    done = run("02_optimize.py", *QUICK, "--lambda", "0.5", "--run-dir", "runs/demo-seed0", folder=finished[0])
    said = "other fluency_weight (recorded 0.2, now 0.5): choose another --run-dir"
    assert done.returncode == 2 and said in done.stderr


def test_a_search_that_failed_before_its_first_step_may_be_begun_otherwise(tmp_path):
    flags = ["--steps", "0", "--train-rows", "5", "--eval-rows", "5", "--run-dir", "r"]
    done = run("02_optimize.py", *flags, "--initial-prompt", "rhubarb", folder=tmp_path)
    assert done.returncode == 2 and not (tmp_path / "r").exists()
    good("02_optimize.py", *flags, "--initial-prompt", "tell the sum .", folder=tmp_path)
    assert json.loads((tmp_path / "r" / "run.json").read_text())["config"]["initial_prompt"] == "tell the sum ."


def test_stage_3_reads_finished_results_and_evaluates_new_prompts(finished):
    folder = finished[0]
    path = folder / "runs" / "demo-seed0" / "predictions.jsonl"
    before = path.read_text().count("\n")
    printed = good("03_evaluate.py", "--run-dir", "runs/demo-seed0", folder=folder)  # on as many rows as the run
    assert "test, 20 rows" in printed
    assert path.read_text().count("\n") == before  # nothing was generated again
    assert re.search(rf"^initial +{NUMBER} ", printed, re.M)
    assert re.search(r"^initial +read the problem here and find the answer now \.$", printed, re.M)
    flags = ["--prompt", "tell the total .", "--prompt", "check each step slowly .", "--eval-rows", "0"]
    printed = good("03_evaluate.py", "--run-dir", "runs/demo-seed0", "--split", "dev", *flags, folder=folder)
    assert [row[0] for row in re.findall(rf"^(given \d) +{NUMBER} ", printed, re.M)] == ["given 1", "given 2"]
    assert path.read_text().count("\n") == before + 200
    shown = re.findall(r"^  demo-(\d+)  gold (\d+), read (\d+)$", printed, re.M)
    assert 1 <= len(shown) <= 5
    assert all(200 <= int(row) < 300 and gold != answer for row, gold, answer in shown)
    parts = re.findall(
        r"read (\d+)\n    question   '(.+)'\n    reasoning  '(.+)'\n    reply      '(.+)'$", printed, re.M
    )
    assert len(parts) == len(shown) and all(reply == answer for answer, _, _, reply in parts)


def test_stage_3_evaluates_the_baselines_and_compares_the_best_prompt_with_each(finished):
    flags = ["--run-dir", "runs/demo-seed0", "--baselines", "--top", "2", "--eval-rows", "20"]
    printed = good("03_evaluate.py", *flags, folder=finished[0])
    order = ["empty", "zero-shot chain of thought", "initial", "rank 2", "best"]
    assert [row[0] for row in re.findall(rf"^(\S.*?) +{NUMBER} .* %  ", printed, re.M)] == order
    every = read_jsonl(finished[0] / "runs/demo-seed0/results.jsonl")
    results = [r for r in every if r["role"] == "baseline"]
    assert [(r["name"], r["prompt"]) for r in results] == [(order[0], ""), (order[1], "show each step .")]
    framed = {r["evaluation"] for r in every if r["role"] == "initial" and r["n"] == 20 and r["split"] == "test"}
    assert len(framed) == 1 and not framed & {r["evaluation"] for r in results}  # without the fixed word
    compared = re.findall(r"^(\S.*?) +(paper|harness) +([+-][\d.]+) % +.* to +\S+ +(\d+) +(\d+)  \S+$", printed, re.M)
    assert [row[:2] for row in compared] == [(label, r) for label in order[:-1] for r in ("paper", "harness")]
    for _, _, difference, gained, lost in compared:
        assert float(difference) == pytest.approx(100 * (int(gained) - int(lost)) / 20)


def test_both_readings_and_the_comparison_are_those_of_the_predictions(finished, tmp_path):
    prompts = ["check every number slowly .", "guess now ."]  # cut short, so that the two readings differ
    flags = ["--prompt", prompts[0], "--prompt", prompts[1], "--split", "dev", "--max-new-tokens", "9"]
    printed = good("03_evaluate.py", *flags, "--run-dir", "r", folder=tmp_path)
    found = {}
    for p in read_jsonl(tmp_path / "r" / "predictions.jsonl"):
        found.setdefault(p["prompt_hash"], {})[p["id"]] = p["correct"], p["harness_correct"]
    first, second = (found[text_hash(prompt)] for prompt in prompts)
    for which, reading in enumerate(("paper", "harness")):
        change = [second[i][which] - first[i][which] for i in first]
        line = rf"^given 1 +{reading} +([+-][\d.]+) % .* (\d+) +(\d+)  \S+$"
        difference, gained, lost = re.search(line, printed, re.M).groups()
        assert (int(gained), int(lost)) == (change.count(1), change.count(-1)) and float(difference) == sum(change)
        assert sum(change) < 0
        for label, outcomes in (("given 1", first), ("given 2", second)):
            shown = re.search(rf"^{label} +{NUMBER} +{NUMBER}", printed, re.M).groups()
            assert float(shown[3 * which]) == sum(o[which] for o in outcomes.values())  # of 100 rows
    assert any(paper != harness for paper, harness in first.values())


def test_stage_3_grades_the_kept_texts_again_without_loading_a_model(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "copy")
    run_dir = tmp_path / "copy" / "runs" / "demo-seed0"
    truth = (run_dir / "results.jsonl").read_text()
    write_jsonl(run_dir / "results.jsonl", [r | {"accuracy": 0.0} for r in read_jsonl(run_dir / "results.jsonl")])
    flags = ["--run-dir", "runs/demo-seed0", "--regrade", "--model", "no/such-model"]
    printed = good("03_evaluate.py", *flags, folder=tmp_path / "copy")
    assert re.search(r"^best +test  paper   0\.0 ->  +[\d.]+ %", printed, re.M)
    assert (run_dir / "results.jsonl").read_text() == truth


def test_stage_3_killed_in_the_middle_keeps_its_rows_and_ends_the_same(finished, tmp_path):
    flags = ["--prompt", "verify every step carefully .", "--eval-rows", "60", "--batch-size", "2", "--run-dir", "r"]
    path = tmp_path / "r" / "predictions.jsonl"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(ROOT / "03_evaluate.py"), *flags]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    deadline = time.time() + 120
    while time.time() < deadline and not (path.exists() and path.read_text().count("\n") >= 8):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    kept = path.read_text().count("\n")
    assert 8 <= kept < 60 and not (tmp_path / "r" / "results.jsonl").exists()
    good("03_evaluate.py", *flags, folder=tmp_path)
    good("03_evaluate.py", *flags[:-1], "whole", folder=tmp_path)
    for name in ("results.jsonl", "predictions.jsonl"):
        whole, resumed = (without_time(tmp_path / folder / name) for folder in ("whole", "r"))
        assert sorted(map(json.dumps, resumed)) == sorted(map(json.dumps, whole))


def test_stage_4_writes_the_matrix_of_prompts_and_models_and_runs_nothing_twice(finished):
    folder = finished[0]
    flags = ["--runs", "runs/demo-seed0", "--targets", "demo/model", "demo/small", "--eval-rows", "20"]
    printed = good("04_transfer.py", *flags, folder=folder)
    records = read_jsonl(folder / "runs/transfer/transfer.jsonl")
    cells = {(r["method"], r["source"], r["target"]): r for r in records}
    targets = ("demo/model", "demo/small")
    rows = (("initial prompt", "-"), ("GReaTer", "demo/model"))
    assert set(cells) == {(*row, target) for row in rows for target in targets} and len(records) == 4
    own = {r["role"]: r for r in read_jsonl(folder / "runs/demo-seed0/results.jsonl") if r["split"] == "test"}
    for (method, source), role in zip(rows, ("initial", "best")):
        assert cells[method, source, "demo/model"]["accuracy"] == own[role]["accuracy"]
        shown = " | ".join(f"{100 * cells[method, source, t]['accuracy']:.1f} \\(" for t in targets)
        assert re.search(rf"^\| demo \| {method} \| {source} \| " + shown.replace(" | ", r".* \| "), printed, re.M)
    assert (folder / "runs/transfer/transfer.md").read_text() in printed
    assert (folder / "runs/transfer/transfer.png").stat().st_size > 5000
    files = sorted((folder / "runs/transfer").glob("demo/*/predictions.jsonl"))
    before = [path.read_bytes() for path in files]
    assert good("04_transfer.py", *flags, folder=folder) == printed
    assert [path.read_bytes() for path in files] == before and len(files) == 2


def test_stage_4_generates_only_what_the_target_did_not_answer_in_the_runs(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "copy")
    flags = ["--runs", "runs/demo-seed0", "--targets", "demo/model", "demo/small", "--eval-rows", "25", "--out", "new"]
    good("04_transfer.py", *flags, folder=tmp_path / "copy")
    for model, asked in (("model", 5), ("small", 25)):  # stage 2 asked the one for 20 test rows
        lines = read_jsonl(tmp_path / "copy" / "new" / "demo" / f"demo-{model}" / "predictions.jsonl")
        assert len(lines) == 2 * 25 and len([p for p in lines if "answered_in" not in p]) == 2 * asked, model
    there = read_jsonl(finished[0] / "runs" / "demo-seed0" / "predictions.jsonl")
    texts = {(p["prompt_hash"], p["id"]): p["text"] for p in there if p["split"] == "test"}
    lines = read_jsonl(tmp_path / "copy" / "new" / "demo" / "demo-model" / "predictions.jsonl")
    assert all(p["text"] == texts[p["prompt_hash"], p["id"]] for p in lines if "answered_in" in p)


def test_stage_4_keeps_each_run_s_own_limit_and_initial_prompt(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "copy")
    path = tmp_path / "copy" / "runs" / "demo-seed0" / "run.json"
    record = json.loads(path.read_text())
    record["config"] |= {"max_new_tokens": 7, "batch_size": 3, "initial_prompt": "tell the sum ."}
    del record["record_check"]
    path.write_text(json.dumps(record))
    flags = ["--runs", "runs/demo-seed0", "runs/demo-seed0", "--targets", "demo/small", "--eval-rows", "5"]
    good("04_transfer.py", *flags, "--out", "own", folder=tmp_path / "copy")
    records = read_jsonl(tmp_path / "copy" / "own" / "transfer.jsonl")  # a run named twice counts once
    assert [r["max_new_tokens"] for r in records] == [7, 7] and records[0]["prompt"] == "tell the sum ."
    good("04_transfer.py", *flags, "--out", "asked", "--max-new-tokens", "9", folder=tmp_path / "copy")
    records = read_jsonl(tmp_path / "copy" / "asked" / "transfer.jsonl")
    assert [r["max_new_tokens"] for r in records] == [9, 9]


def test_stage_4_does_not_call_different_rows_or_models_by_one_name(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "copy")
    folder = tmp_path / "copy"
    for name, shift in (("a", 0), ("b", 1)):
        (folder / name).mkdir()
        rows = [{"question": f"tom has {n} pens . how many pens ?", "answer": n + shift} for n in range(1, 9)]
        write_jsonl(folder / name / "my.jsonl", rows)
        own = ["--task", f"{name}/my.jsonl", "--extractor", "so the answer is", "--data-dir", f"data-{name}"]
        own += ["--template", "{question} please {prompt}", "--model", ROOT / "demo/model", "--max-new-tokens", "9"]
        search = ["--initial-prompt", "tell the sum .", "--steps", "0", "--train-rows", "4", "--run-dir", f"run-{name}"]
        good("02_optimize.py", *own, *search, folder=folder)
    done = run("04_transfer.py", "--runs", "run-a", "run-b", "--targets", "demo/small", folder=folder)
    assert done.returncode == 2 and "own/my are on other rows, questions or readings" in done.stderr
    assert "on demo/small" in good("04_transfer.py", "--runs", "run-a", "--targets", "demo/small", folder=folder)
    same = ["--targets", "demo/small", ROOT / "demo/small"]
    done = run("04_transfer.py", "--runs", "run-a", *same, folder=folder)
    assert done.returncode == 2 and "--targets: two are called demo/small" in done.stderr


def test_stage_4_refuses_an_unfinished_run_and_a_run_on_other_rows(finished, tmp_path):
    shutil.copytree(finished[0], tmp_path / "copy")
    run_dir = tmp_path / "copy" / "runs" / "demo-seed0"
    flags = ["--runs", "runs/demo-seed0", "--targets", "demo/small"]
    record = json.loads((run_dir / "run.json").read_text())
    record["task"]["sha256"]["test"] = "0"
    (run_dir / "run.json").write_text(json.dumps(record))
    done = run("04_transfer.py", *flags, folder=tmp_path / "copy")
    assert done.returncode == 2 and "as it was written: restore it, or remove its record_check" in done.stderr
    del record["record_check"]
    (run_dir / "run.json").write_text(json.dumps(record))
    done = run("04_transfer.py", *flags, folder=tmp_path / "copy")
    assert done.returncode == 2 and "searched with other rows of demo" in done.stderr
    shutil.copy(finished[0] / "runs/demo-seed0/run.json", run_dir)
    (run_dir / "prompts.jsonl").unlink()
    done = run("04_transfer.py", *flags, folder=tmp_path / "copy")
    assert done.returncode == 2 and "is not finished: no prompts.jsonl" in done.stderr


def test_the_whole_chain_runs_on_own_rows(tmp_path):
    rows = [
        {"question": f"tom has {n} pens , finds {m} . how many pens ?", "answer": n + m}
        for n in range(1, 6)
        for m in range(1, 5)
    ]
    write_jsonl(tmp_path / "mine.jsonl", rows)
    own = ["--task", "mine.jsonl", "--extractor", "so the answer is", "--model", ROOT / "demo" / "model"]
    template = ["--template", "{question} please {prompt}", "--max-new-tokens", "20"]
    search = ["--initial-prompt", "find the answer now .", "--steps", "1", "--train-rows", "5"]
    printed = good("02_optimize.py", *own, *template, *search, folder=tmp_path)
    assert re.search(r"^initial, test +100\.0 \(", printed, re.M)
    evaluated = good("03_evaluate.py", "--run-dir", "runs/own-mine-model-seed0", folder=tmp_path)
    assert re.search(r"^initial +100\.0 \(", evaluated, re.M)


def test_a_table_with_labels_goes_from_its_columns_to_a_prompt_and_a_confusion_table(tmp_path):
    lines = [f"{n},tom has {n} pens,finds {n},{('total', 'answer')[n % 2]}" for n in range(1, 41)]
    (tmp_path / "mine.csv").write_text("\n".join(["number,has,finds,team", *lines]) + "\n")
    own = ["--task", "mine", "--template", r"{has} , {finds} .\nplease {prompt}", "--answer-key", "team"]
    own += ["--model", ROOT / "demo" / "model", "--max-new-tokens", "9", "--extractor", "so the answer is"]
    printed = good("01_prepare_data.py", *own[:6], folder=tmp_path)
    assert re.search(r"train +20  dev +10  test +10  answers: label ", printed)
    done = run("02_optimize.py", *own, "--initial-prompt", "find the answer now .", "--steps", "1", folder=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "20 train, 10 dev, 10 test rows; answers: label (answer, total)" in done.stdout
    assert "--train-rows 50: there are 20 training rows, all are used" in done.stdout
    assert "warning: the dev split has only 10 rows" in done.stderr
    evaluated = good("03_evaluate.py", "--run-dir", "runs/own-mine-model-seed0", "--mistakes", "1", folder=tmp_path)
    table = re.findall(r"^[12] (\w+) +(\d+) +(\d+) +(\d+)  ", evaluated, re.M)
    assert [name for name, *_ in table] == ["answer", "total"]
    assert [sum(map(int, counts)) for _, *counts in table] == [5, 5]
    question = read_jsonl(next(tmp_path.glob("data/own/mine-*/test.jsonl")))[0]["question"]
    assert re.fullmatch(r"tom has (\d+) pens , finds \1", question)


def test_another_model_or_extractor_is_evaluated_anew_and_a_killed_evaluation_leaves_no_trace(tmp_path, demo_tokenizer):
    from conftest import tiny_engine

    tiny_engine("llama", demo_tokenizer).model.save_pretrained(tmp_path / "random")
    demo_tokenizer.save_pretrained(tmp_path / "random")
    flags = ["--prompt", "check each step carefully .", "--eval-rows", "30", "--run-dir", "r"]
    good("03_evaluate.py", *flags, folder=tmp_path)
    predictions = tmp_path / "r" / "predictions.jsonl"
    first = read_jsonl(predictions)
    (tmp_path / "r" / "results.jsonl").unlink()  # as if killed between the two files
    good("03_evaluate.py", *flags, folder=tmp_path)
    assert read_jsonl(predictions) == first
    good("03_evaluate.py", *flags, "--model", "./random", folder=tmp_path)
    good("03_evaluate.py", *flags, "--max-new-tokens", "3", folder=tmp_path)
    results = read_jsonl(tmp_path / "r" / "results.jsonl")
    assert [r["accuracy"] > 0.5 for r in results] == [True, False, False]
    assert len({r["evaluation"] for r in results}) == 3 and len(read_jsonl(predictions)) == 90


def test_the_released_preset_changes_the_defaults_and_a_flag_overrides_it(tmp_path):
    flags = [*QUICK, "--preset", "released", "--top-k", "12", "--run-dir", "r"]
    good("02_optimize.py", *flags, folder=tmp_path)
    config = json.loads((tmp_path / "r" / "run.json").read_text())["config"]
    assert (config["objective"], config["intersections"], config["choose_on"]) == ("error", 6, "train")
    assert (config["top_k"], config["train_rows"]) == (12, 6)


def test_the_best_preset_searches_all_positions(tmp_path):
    good("02_optimize.py", *QUICK, "--preset", "best", "--run-dir", "r", folder=tmp_path)
    assert json.loads((tmp_path / "r" / "run.json").read_text())["config"]["positions"] == "all"
    _, *steps = read_jsonl(tmp_path / "r" / "steps.jsonl")
    assert steps and all(len({tried["position"] for tried in step["shortlist"]}) > 1 for step in steps)


def write_bad_files(folder):
    write_jsonl(folder / "one.jsonl", [{"question": "1 + 1?", "answer": "2"}])
    (folder / "broken.jsonl").write_text('{"question": "a", "answer": "b"}\n{"question"\n')
    write_jsonl(folder / "gap.jsonl", [{"question": "a", "answer": "b"}, {"question": "a"}])
    (folder / "nan.jsonl").write_text('{"question": "a", "answer": NaN}\n')
    (folder / "deep.json").write_text("[" * 100_000)
    write_jsonl(folder / "odd.jsonl", [{"question": f"what is {n} ?", "answer": f"rhubarb {n}"} for n in range(8)])
    words = [{"question": f"is {n} big ?", "answer": ("no", "yes")[n % 2]} for n in range(8)]
    write_jsonl(folder / "words.jsonl", words)
    write_jsonl(folder / "other.jsonl", [{"prompt": "check ."}, {"prompt": "check .", "task": "gsm8k"}])
    write_jsonl(folder / "number.jsonl", [{"prompt": 5}])
    (folder / "half.jsonl").write_text('{"prompt": "\\ud800 check"}\n')
    for name in ("broken-run", "empty-run"):
        (folder / name).mkdir()
    (folder / "empty-run" / "run.json").write_text('{"config": {}}')
    (folder / "broken-run" / "run.json").write_text("[]")
    (folder / "mute").mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (folder / "mute" / name).symlink_to(ROOT / "demo" / "model" / name)
    (folder / "mute" / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>"})
    )


BAD = [
    ("02_optimize.py --task demmo", "Did you mean demo?"),
    ("01_prepare_data.py --task gsm8k --source nowhere", "cannot read nowhere/gsm8k/train.jsonl"),
    ("01_prepare_data.py --task gsm8k", "--source DIR reads the authors' files"),
    ("01_prepare_data.py --task none.jsonl --extractor x", "cannot read none.jsonl"),
    ("01_prepare_data.py --task broken.jsonl --extractor x", "broken.jsonl, line 2"),
    ("01_prepare_data.py --task gap.jsonl --extractor x", "gap.jsonl, line 2: the row has no answer"),
    ("01_prepare_data.py --task one.jsonl --extractor x", "the train split is empty"),
    ("01_prepare_data.py --task one.jsonl", "--extractor"),
    ("01_prepare_data.py --task one.jsonl --question-key message", "under 'message', but: question, answer"),
    ("01_prepare_data.py --task one.jsonl --dev-fraction 1", "--dev-fraction and --test-fraction must be above 0"),
    ("01_prepare_data.py --task nan.jsonl", "nan.jsonl, line 1: the row has no answer"),
    ("01_prepare_data.py --task deep.json", "cannot read deep.json as a JSON file of records"),
    (
        "02_optimize.py --task odd.jsonl --initial-prompt 'find the answer now .' --extractor so --model demo/model",
        "does not know the answer 'rhubarb",
    ),
    ("02_optimize.py --model ./nothing", "--model ./nothing"),
    ("02_optimize.py --model someone/gated-model", "Ways out"),
    ("02_optimize.py --model ./mute", "no chat template"),
    ("02_optimize.py --train-rows 999", "--train-rows 999"),
    ("02_optimize.py --train-rows few", "invalid int value: 'few'"),
    ("02_optimize.py --objective best", "--objective must be one of loss, error"),
    ("02_optimize.py --no-such-flag 1", "no flag --no-such-flag"),
    ("02_optimize.py --initial-prompt . --min-candidates 500 --train-rows 5", "lower --min-candidates"),
    ("02_optimize.py --task", "argument --task: expected one argument"),
    ("02_optimize.py --device teapot --run-dir r", "--device must be auto, cpu, cuda, cuda:N or mps"),
    ("02_optimize.py --run-dir one.jsonl/x", "one.jsonl/x"),
    ("02_optimize.py --run-dir broken-run", "broken-run/run.json is not the record of a run"),
    ("03_evaluate.py --run-dir broken-run", "run.json is not the record of a run"),
    ("01_prepare_data.py --data-dir one.jsonl", "one.jsonl"),
    ("02_optimize.py --initial-prompt ' '", "--initial-prompt has no tokens"),
    ("02_optimize.py --initial-prompt ''", "--initial-prompt has no tokens"),
    ("02_optimize.py --lambda nan", "--lambda must be a number"),
    ("02_optimize.py --initial-prompt rhubarb --train-rows 5", "does not know all of the prompt"),
    ("03_evaluate.py", "--prompt"),
    ("03_evaluate.py --prompt ' '", "--prompt must not be empty"),
    ("03_evaluate.py --run-dir nowhere", "cannot read nowhere/prompts.jsonl"),
    ("03_evaluate.py --prompt x --split train", "--split must be one of dev, test"),
    ("03_evaluate.py --prompts other.jsonl", "other.jsonl, line 2: a prompt of the task gsm8k, not of demo"),
    ("03_evaluate.py --prompts one.jsonl", "one.jsonl, line 1: no prompt"),
    ("03_evaluate.py --prompt x --top 0", "--top must be at least 1"),
    ("03_evaluate.py --run-dir nowhere --regrade", "nowhere holds no evaluation"),
    ("03_evaluate.py --report nowhere", "nowhere"),
    ("03_evaluate.py --prompt x --endpoint localhost:8000", "--endpoint 'localhost:8000' is no URL"),
    ("03_evaluate.py --prompt x --answer-turn later", "--answer-turn must be one of continue, prefill, ask"),
    ("03_evaluate.py --prompt x --concurrency 0", "--concurrency must be at least 1"),
    ("03_evaluate.py --prompt x --request-timeout 0", "--request-timeout must be a number above 0"),
    ("03_evaluate.py --run-dir empty-run", "empty-run/run.json is not the record of a run"),
    ("03_evaluate.py --prompts number.jsonl", "number.jsonl, line 1: no prompt"),
    ("03_evaluate.py --prompts half.jsonl", "half.jsonl, line 1: no prompt"),
    ("04_transfer.py --runs empty-run --targets demo/small", "empty-run/run.json is not the record of a run"),
    ("04_transfer.py --runs empty-run --targets @http://localhost:9/v1", "say which model"),
    ("04_transfer.py --runs empty-run --targets m@localhost:9/v1", "a server is NAME@http://HOST:PORT/v1"),
    ("04_transfer.py --targets demo/small", "--runs"),
    ("04_transfer.py --runs broken-run", "--targets"),
    ("04_transfer.py --runs broken-run --targets demo/small", "broken-run/run.json is not the record of a run"),
    ("04_transfer.py --runs nowhere --targets demo/small", "nowhere/run.json is not the record of a run"),
    ("04_transfer.py --runs broken-run --targets ./nothing", "--model ./nothing"),
    ("04_transfer.py --runs broken-run --targets demo/small --split train", "--split must be one of dev, test"),
]


@pytest.mark.parametrize(("command", "message"), BAD, ids=[command for command, _ in BAD])
def test_a_user_s_mistake_is_one_line_on_stderr_and_exit_code_2(tmp_path, command, message):
    write_bad_files(tmp_path)
    script, *arguments = shlex.split(command)
    done = run(script, *arguments, folder=tmp_path)
    assert done.returncode == 2, done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert message in last and re.match(r"error: |\w+\.py: error: ", last)


def test_an_extractor_that_merges_is_refused_before_the_search(tmp_path, subword_tokenizer):
    from conftest import tiny_engine

    tiny_engine("llama", subword_tokenizer).model.save_pretrained(tmp_path / "model")
    subword_tokenizer.save_pretrained(tmp_path / "model")
    write_bad_files(tmp_path)
    flags = ["--task", "words.jsonl", "--extractor", "It is ", "--train-rows", "2", "--model", "./model"]
    done = run("02_optimize.py", *flags, folder=tmp_path)
    assert done.returncode == 2 and "the tokenizer merges" in done.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize("script", ["01_prepare_data.py", "02_optimize.py", "03_evaluate.py", "04_transfer.py"])
def test_help_and_typos_answer_without_loading_torch(script, tmp_path):
    code = (
        f"import sys, runpy; sys.argv = ['{script}', '--help']; runpy.run_path('{ROOT / script}', run_name='__main__')"
    )
    probe = f"""
try:
    exec({code!r})
except SystemExit as end:
    assert end.code == 0, end.code
assert "torch" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", probe], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert ("--runs" if script == "04_transfer.py" else "--task") in done.stdout


# --- Text methods --------------------------------------------------------------------------------------------------


def text_flags(url, *more, method="opro"):
    few = ["--train-rows", "8", "--eval-rows", "20", "--finalists", "2"]
    asked = ["--optimizer-endpoint", url, "--optimizer-model", "scripted"] if url else []
    return ["--method", method, *few, *asked, *more]


@pytest.fixture(scope="module")
def by_opro(tmp_path_factory, demo_server):
    """A folder with a short finished run of OPRO in it, and what the run printed."""
    folder = tmp_path_factory.mktemp("opro")
    return folder, good("02_optimize.py", *text_flags(demo_server, "--rounds", "3"), folder=folder)


def test_stage_2_runs_a_text_method_and_says_before_and_after_what_it_took(by_opro):
    folder, printed = by_opro
    before, _, after = printed.partition("round   0")
    assert "OPRO, 3 rounds: up to 25 prompts on 8 training rows, 200 scored generations; 3 requests" in before
    assert "about 300 generations" in before and "24 replies" in before  # with dev and test rows
    assert "24 of 24 replies gave a prompt (100 %), 24 in tags" in after
    run_dir = folder / "runs" / "demo-seed0-opro"
    steps, prompts = read_jsonl(run_dir / "steps.jsonl"), read_jsonl(run_dir / "prompts.jsonl")
    assert [step["step"] for step in steps] == [0, 1, 2, 3]
    assert prompts[0]["dev_accuracy"] == max(prompt["dev_accuracy"] for prompt in prompts)
    assert [prompt["initial"] for prompt in prompts].count(True) == 1 and prompts[0]["task"] == "demo"
    config = json.loads((run_dir / "run.json").read_text())["config"]
    assert (config["method"], config["samples"], config["rounds"]) == ("OPRO", 8, 3)
    assert not {"top_k", "steps", "beam", "concurrency"} & config.keys()


def test_stages_3_and_4_and_the_report_take_a_text_method_s_run(by_opro):
    folder = by_opro[0]
    best = read_jsonl(folder / "runs" / "demo-seed0-opro" / "prompts.jsonl")[0]["prompt"]
    flags = ["--run-dir", "runs/demo-seed0-opro", "--eval-rows", "10"]
    assert best in good("03_evaluate.py", *flags, folder=folder)
    good("03_evaluate.py", "--run-dir", "runs/demo-seed0-opro", "--regrade", folder=folder)
    good("03_evaluate.py", "--report", "runs", folder=folder)
    assert "| demo/model | OPRO |" in (folder / "runs" / "report.md").read_text()
    moved = ["--runs", "runs/demo-seed0-opro", "--targets", ROOT / "demo" / "small", "--eval-rows", "5"]
    assert "| demo | OPRO | demo/model |" in good("04_transfer.py", *moved, folder=folder)


def test_a_killed_text_method_goes_on_to_the_same_result_on_a_server_at_another_address(by_opro, demo_server, tmp_path):
    rows = tmp_path / "runs" / "demo-seed0-opro" / "train_predictions.jsonl"
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    flags = text_flags(demo_server, "--rounds", "3")
    command = [sys.executable, str(ROOT / "02_optimize.py"), *flags]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    deadline = time.time() + 120
    while time.time() < deadline and not (rows.exists() and rows.read_text().count("\n") >= 100):
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert rows.read_text().count("\n") < 200
    flags = text_flags(demo_server.replace("127.0.0.1", "localhost"), "--rounds", "3")
    assert "going on behind round" in good("02_optimize.py", *flags, folder=tmp_path)
    for name in ("steps.jsonl", "prompts.jsonl", "results.jsonl", "optimizer.jsonl"):
        whole = by_opro[0] / "runs" / "demo-seed0-opro" / name
        ours = without_time(tmp_path / "runs" / "demo-seed0-opro" / name)
        # Another test adds results behind those of the run.
        assert ours == without_time(whole)[: len(ours)] and len(ours) >= 3, name


def test_a_text_method_with_other_settings_needs_another_folder(by_opro, demo_server):
    flags = text_flags(demo_server, "--samples", "4", "--run-dir", "runs/demo-seed0-opro")
    done = run("02_optimize.py", *flags, folder=by_opro[0])
    assert done.returncode == 2 and "other samples (recorded 8, now 4): choose another --run-dir" in done.stderr


def test_a_text_method_that_is_continued_ends_as_one_that_had_so_many_rounds_from_its_start(
    by_opro, demo_server, tmp_path
):
    names = ("steps.jsonl", "prompts.jsonl", "optimizer.jsonl", "train_predictions.jsonl")
    parts = {"budget": ["--budget", "60"], "rounds": ["--rounds", "1"], "whole": ["--rounds", "3"]}
    for name in ("budget", "rounds"):  # a budget of 60 cuts the first round: 7 of 9 prompts on 8 rows
        folder = tmp_path / name
        first = text_flags(demo_server, *parts[name], "--run-dir", "r")
        good("02_optimize.py", *first, folder=folder if folder.mkdir() is None else folder)
        good("02_optimize.py", *text_flags(demo_server, *parts["whole"], "--run-dir", "r"), folder=folder)
        for file in names:
            whole = without_time(by_opro[0] / "runs" / "demo-seed0-opro" / file)
            assert without_time(folder / "r" / file) == whole, (name, file)
    done = run("02_optimize.py", *text_flags(demo_server, "--rounds", "2", "--run-dir", "r"), folder=folder)
    assert done.returncode == 2 and "r holds 3 rounds, --rounds 2 asks for fewer: give at least 3" in done.stderr
    again = good("02_optimize.py", *text_flags(demo_server, *parts["whole"], "--run-dir", "r"), folder=folder)
    assert "3 rounds are done" in again and "going on" not in again


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (text_flags(""), "the optimizer demo/model does not know .* words of the meta-prompt"),
        (text_flags("", "--mu", "2"), "--shortlist-size: only GReaTer has this setting, not --method opro"),
        (text_flags("", "--preset", "released"), "--preset released is GReaTer's"),
        (text_flags("", "--preset", "best"), "--preset best is GReaTer's"),
        (["--preset", "published"], "--preset published is the text methods'"),
        (text_flags("", "--budget", "15"), "--budget 15: .* on 8 training rows, take 16 generations"),
        (["--budget", "100"], "--budget 100: the initial prompt and one step, on 40 training rows, take 160"),
        (["--init-from", "empty.jsonl"], "--init-from empty.jsonl holds no prompts"),
    ],
)
def test_what_cannot_work_is_said_before_the_start(tmp_path, flags, message):
    (tmp_path / "empty.jsonl").touch()
    done = run("02_optimize.py", *flags, folder=tmp_path)
    assert done.returncode == 2 and re.search(f"error: .*{message}", done.stderr), done.stderr
    assert "round   0" not in done.stdout and "step   0" not in done.stdout


def test_a_budget_ends_a_search_with_gradients_and_it_goes_on_to_the_same_end(tmp_path):
    flags = ["--steps", "9", "--train-rows", "6", "--eval-rows", "5", "--finalists", "1", "--budget", "50"]
    printed = good("02_optimize.py", *flags, folder=tmp_path)
    steps = read_jsonl(tmp_path / "runs" / "demo-seed0" / "steps.jsonl")
    scored = 6 * (1 + sum(tried["new"] for step in steps for tried in step["shortlist"]))
    assert 50 - 3 * 6 < scored <= 50 and f"--budget 50: {scored} generations" in printed
    good("02_optimize.py", *flags, folder=tmp_path)
    assert read_jsonl(tmp_path / "runs" / "demo-seed0" / "steps.jsonl") == steps


@pytest.mark.parametrize("method", ["greater", "random"])
def test_a_method_starts_from_the_prompts_of_another_run(by_opro, method, tmp_path):
    path = by_opro[0] / "runs" / "demo-seed0-opro" / "prompts.jsonl"
    given = [prompt["prompt"] for prompt in read_jsonl(path)]
    flags = text_flags("", method=method)[2:] if method == "greater" else text_flags("", "--rounds", "1", method=method)
    shorter = ["--steps", "1"] if method == "greater" else []
    good("02_optimize.py", *flags, *shorter, "--init-from", path, "--run-dir", "r", folder=tmp_path)
    config = json.loads((tmp_path / "r" / "run.json").read_text())["config"]
    assert config["initial_prompt"] == given[0]
    steps = read_jsonl(tmp_path / "r" / "steps.jsonl")
    started = [steps[0]["prompt"]] if method == "greater" else [one["prompt"] for one in steps[0]["proposed"]]
    assert started == given[: len(started)] and len(started) == (1 if method == "greater" else len(given))


def test_a_text_method_s_dry_run_shows_what_it_would_take_and_writes_nothing(demo_server, tmp_path):
    flags = text_flags(demo_server, "--preset", "published", "--dry-run")
    printed = good("02_optimize.py", *flags, folder=tmp_path)
    assert "200 rounds: up to 1601 prompts on 8 training rows, 12808 scored generations; 200 requests" in printed
    assert "minutes here" in printed and not (tmp_path / "runs").exists()


def test_a_budget_below_one_round_is_warned_of(demo_server, tmp_path):
    flags = text_flags(demo_server, "--budget", "40", "--dry-run")
    printed = good("02_optimize.py", *flags, folder=tmp_path)
    assert "warning: the start and one whole round take 72 generations, --budget is 40" in printed


# --- Texts to be generated ------------------------------------------------------------------------------------------

SAYING = [
    "--template",
    "{question} please {prompt}",
    "--initial-prompt",
    "read the problem here and find the answer now .",
]
REFERENCE_PROMPT = "verify every total carefully then verify every total carefully ."


@pytest.fixture(scope="module")
def workings(tmp_path_factory, demo_engine, demo_task, demo_data):
    """A file of the demo's questions whose references are what its model writes under a good instruction."""
    rows = demo_data["train"][:64]
    answerer = local_answerer(demo_engine, str(ROOT / "demo" / "model"))
    written = evaluate(answerer, demo_task, rows, REFERENCE_PROMPT, settings(max_new_tokens=40))
    path = tmp_path_factory.mktemp("texts") / "workings.jsonl"
    references = [[prediction["text"], "not this"] for prediction in written]
    write_jsonl(path, [row | {"answer": texts} for row, texts in zip(rows, references)])
    return path


def saying(path, url, *more):
    few = ["--max-new-tokens", "40", "--batch-size", "64", "--rounds", "2", "--beam", "2", "--groups", "2"]
    model = ["--task", path, "--model", ROOT / "demo" / "model", "--run-dir", "runs/texts"]
    return [*model, *text_flags(url, *few, *more, method="apo"), *SAYING]


@pytest.fixture(scope="module")
def by_apo(tmp_path_factory, workings, demo_server):
    """A folder with a finished run of APO on texts in it, and what the run printed."""
    folder = tmp_path_factory.mktemp("apo")
    return folder, good("02_optimize.py", *saying(workings, demo_server), folder=folder)


def test_a_text_method_raises_the_mean_score_of_generated_texts(by_apo):
    folder, printed = by_apo
    run_dir = folder / "runs" / "texts"
    steps, prompts = read_jsonl(run_dir / "steps.jsonl"), read_jsonl(run_dir / "prompts.jsonl")
    initial = next(prompt for prompt in prompts if prompt["initial"])
    assert 0 < initial["train_accuracy"] < steps[-1]["best"]["accuracy"] < 1.0001
    assert prompts[0]["dev_accuracy"] == max(prompt["dev_accuracy"] for prompt in prompts) > initial["dev_accuracy"]
    results = {(result["role"], result["split"]): result for result in read_jsonl(run_dir / "results.jsonl")}
    result = results["best", "test"]
    assert result["kind"] == "generation" and 0 < result["low"] <= result["accuracy"] <= result["high"] <= 1
    assert all(isinstance(p["correct"], float) for p in read_jsonl(run_dir / "predictions.jsonl"))
    assert "points of ROUGE-L" in printed and "p (sign flips)" in printed and "harness, %" not in printed
    asked = read_jsonl(run_dir / "optimizer.jsonl")[0]["chats"][0][0]["content"]
    assert "agree least with reference texts" in asked and "A good text: " in asked and "Accuracy: " in asked


def test_a_killed_run_on_texts_ends_with_the_same_files(by_apo, workings, demo_server, tmp_path):
    shutil.copytree(by_apo[0], tmp_path, dirs_exist_ok=True)
    run_dir = tmp_path / "runs" / "texts"
    names = ("prompts.jsonl", "train_predictions.jsonl", "optimizer.jsonl", "predictions.jsonl")
    whole = {name: (run_dir / name).read_bytes() for name in names}
    (run_dir / "prompts.jsonl").unlink()
    for name, kept in (("train_predictions.jsonl", 11), ("optimizer.jsonl", 2), ("steps.jsonl", 1)):
        (run_dir / name).write_bytes(b"".join((run_dir / name).read_bytes().splitlines(True)[:kept]))
    for name in ("results.jsonl", "predictions.jsonl"):
        (run_dir / name).unlink()
    good("02_optimize.py", *saying(workings, demo_server), folder=tmp_path)
    assert {name: (run_dir / name).read_bytes() for name in names} == whole


def test_stages_3_and_4_the_report_and_the_program_take_a_run_on_texts(by_apo, tmp_path):
    folder = by_apo[0]
    run_dir = "runs/texts"
    printed = good("03_evaluate.py", "--run-dir", run_dir, "--eval-rows", "6", "--mistakes", "2", folder=folder)
    worst = printed.partition("the 2 of 6 texts of the last prompt with the lowest scores:")[2]
    low, high = map(float, re.findall(r"ROUGE-L ([\d.]+) %", worst))
    assert low <= high and worst.count("    reference  ") == 2
    graded = good("03_evaluate.py", "--run-dir", run_dir, "--regrade", folder=folder)
    pairs = re.findall(r"paper +([\d.]+) -> +([\d.]+) %", graded)
    assert len(pairs) >= 6 and all(before == after for before, after in pairs)
    good("03_evaluate.py", "--report", "runs", folder=folder)
    report = (folder / "runs" / "report.md").read_text()
    assert "mean ROUGE-L, each row's the best" in report and "p (sign flips)" in report
    out = ["--runs", run_dir, "--targets", ROOT / "demo" / "small", "--eval-rows", "5", "--out", "moved"]
    assert "of generated texts the mean ROUGE-L" in good("04_transfer.py", *out, folder=folder)
    records = read_jsonl(folder / "moved" / "transfer.jsonl")
    assert all(record["kind"] == "generation" and record["low"] <= record["high"] for record in records)
    question = "tom has 3 pens . tom gets 4 pens . how many pens ?"
    command = [sys.executable, "use_transformers.py", question]
    done = subprocess.run(command, cwd=folder / run_dir, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip()


def test_greater_refuses_texts_to_be_generated_and_names_the_methods_that_take_them(workings, tmp_path):
    done = run("02_optimize.py", "--task", workings, "--model", ROOT / "demo" / "model", *SAYING, folder=tmp_path)
    assert done.returncode == 2 and not (tmp_path / "runs").exists()
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "GReaTer's loss is that of an answer behind reasoning" in line and "opro, gpo" in line and "random" in line

"""The benchmarks run and say what they measured; how fast this machine is, is not a test."""

import importlib
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace

import pytest
import torch
from conftest import ROOT
from filelock import FileLock
from made_runs import AUDITED, STEPS

from support.files import CHECK, UserError, write_chained, write_jsonl
from support.own import SPLITS
from support.runs import Best, Scored, Step, TextStep, Tried, generations_of
from support.settings import TaskFlags
from support.sources import open_task

sys.path.insert(0, str(ROOT / "benchmarks"))
import claims  # noqa: E402
import compare_methods  # noqa: E402
import compare_methods_table  # noqa: E402
import real_models  # noqa: E402
import real_models_table  # noqa: E402


def run(script, *arguments, folder):
    command = [sys.executable, str(ROOT / "benchmarks" / script), *map(str, arguments)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # other tests run beside it
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_step_cost_measures_both_implementations_on_the_same_lengths(tmp_path):
    flags = ["--shape", "demo", "--rows", 3, "--reasoning", 7, "--question", 20, "--device", "cpu"]
    printed = run("step_cost.py", *flags, folder=tmp_path)
    assert "times as fast as the plain implementation" in printed and "of what the hardware allows" in printed
    ours, plain = map(json.loads, (tmp_path / "runs/step_cost/step_cost.jsonl").read_text().splitlines())
    assert (ours["variant"], plain["variant"]) == ("ours", "plain")
    assert "from the loaded model to the first step's record" in printed and 0 < ours["first_step"] < 60
    assert 0 < ours["floor"] < ours["seconds"] and set(ours["stages"]) == {"propose", "gradient", "select"}
    # 3 tokens extend the prefix; 3 rows of 8 prompt tokens, 8 of the turn's end, 7 reasoning, 36 behind go forward and
    # back; 9 jobs read 8 + 8 tokens, generate 7, read each of these, and 36 behind them: an answer's last token is
    # not read.
    gradient, jobs = 3 * (8 + 8 + 7 + 36), 9
    assert ours["tokens"] == {
        "forward_tokens": 3 + gradient + jobs * (8 + 8 + 7 + 36),
        "backward_tokens": gradient,
        "generated_tokens": jobs * 7,
    }


def test_a_sweep_draws_a_picture(tmp_path):
    flags = ["--shape", "demo", "--rows", 2, "--reasoning", 4, "--sweep", "mu", "--device", "cpu"]
    printed = run("step_cost.py", *flags, folder=tmp_path)
    assert printed.count("ours") == 4
    assert (tmp_path / "runs/step_cost/mu.png").read_bytes().startswith(b"\x89PNG")


def test_decoding_is_compared_with_continuous_batching_and_profiled(tmp_path):
    flags = ["--shape", "demo", "--rows", 2, "--device", "cpu", "--reasoning", 5]
    assert "where generate_batch takes" in run("step_cost.py", *flags, "--variant", "generate_batch", folder=tmp_path)
    assert "aten::" in run("step_cost.py", *flags, "--profile", folder=tmp_path)


@pytest.mark.parametrize("budget", [300])
def test_claims_compares_all_arms_at_the_same_budget(tmp_path, budget):
    printed = run("claims.py", "--seeds", 2, "--budgets", budget, "--train-rows", 5, folder=tmp_path)
    arms = ("full method", "random shortlist", "gradient without reasoning", "selection by error", "lambda 0")
    assert all(printed.count(f"\n{arm}  ") == 2 for arm in arms)
    results = json.loads((tmp_path / "runs/claims/claims.json").read_text())["results"]
    assert all(len(r[arm][str(budget)]) == 2 for r in results.values() for arm in arms)


# --- Real models: the driver, on the demo's two models -------------------------------------------------


def test_the_harder_problems_are_longer_worded_otherwise_and_right(demo_tokenizer, demo_data):
    splits = claims.long_problems()
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 200, "test": 400, "dev": 100}
    rows = splits["train"] + splits["test"]
    questions = [row["question"] for row in rows]
    usual = {row["question"] for split in demo_data.values() for row in split}
    assert len(set(questions)) == 600 and not usual & set(questions)
    for row in rows:
        first, *events = row["question"].partition(" . how many")[0].split(" and ")
        total = int(first.split()[2])
        for verb, amount in map(str.split, events):
            total += int(amount) * (1 if verb in ("finds", "buys", "gets", "wins") else -1)
        assert len(events) in (4, 5) and 0 <= total <= 30 and str(total) == row["answer"]
        assert demo_tokenizer.unk_token_id not in demo_tokenizer.encode(row["question"])


def test_some_of_the_options_can_be_compared_on_the_harder_problems(tmp_path):
    flags = ["--arms", "options", "--only", "all positions", "--problems", "long", "--seeds", 1, "--train-rows", 5]
    printed = run("claims.py", *flags, "--budgets", 300, folder=tmp_path)
    assert printed.count("\nfull method  ") == printed.count("\nall positions  ") == 2 and "likeliest" not in printed


SMALL = ["--models", "demo/model", "demo/small", "--tasks", "demo", "--seeds", 0, "--methods", "greater"]
SMALL += ["--steps", 8, "--train-rows", 5, "--eval-rows", 30, "--finalists", 3, "--max-new-tokens", 30]


def start_real_models(folder, *more):
    command = [sys.executable, str(ROOT / "benchmarks" / "real_models.py"), *map(str, SMALL), *more]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=pipe, stderr=pipe, text=True)


def wait_for_lines(path, count, process):
    for _ in range(4000):
        assert process.poll() is None, process.stderr.read()[-2000:]
        if path.exists() and path.read_bytes().count(b"\n") >= count:
            return
        time.sleep(0.05)
    raise AssertionError(f"{path} has not {count} lines after 200 seconds")


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def table_of(page, title):
    """The rows below a heading's table with a column called paper, each {column: [cells of that name]}."""
    section = page.split(f"## {title}\n")[1].split("\n## ")[0]
    head, rows = None, []
    for line in section.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if "paper, %" in cells:
            head = cells
        elif head and line.startswith("| "):
            rows.append({name: [c for n, c in zip(head, cells) if n == name] for name in head})
    return rows


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """The driver killed in a search; its table then; run to the end: (folder, partial page, steps then, output)."""
    folder = tmp_path_factory.mktemp("real")
    out = folder / "runs" / "real-models"
    process = start_real_models(folder)
    steps_path = out / "search" / "demo-small-greater-seed0" / "steps.jsonl"
    wait_for_lines(steps_path, 2, process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 130
    with FileLock(steps_path.parent / ".lock", timeout=5):  # the search ended with its driver
        steps_then = steps_path.read_text().splitlines()
    run("real_models.py", *SMALL, "--only-table", folder=folder)
    partial = (out / "results.md").read_text()
    return out, partial, steps_then, run("real_models.py", *SMALL, folder=folder)


def test_a_killed_driver_lists_what_is_missing_and_goes_on_where_it_was(killed):
    out, partial, steps_then, printed = killed
    assert 2 <= len(steps_then) < 9
    (missing,) = re.findall(r"^Missing: (.*)\.$", partial, re.M)
    others = ["demo-small-greater-seed0", "demo-model-fixed", "demo-model-greater-seed0"]
    assert missing.split(", ") == [*others, "demo-model-greater-seed0-on-small", "demo-small-greater-seed0-on-model"]
    assert "demo-small-fixed" not in printed
    assert re.findall(r"^\[\d/6\] (\S+) \.\.\. [\d.]+ minutes$", printed, re.M) == missing.split(", ")
    finished = (out / "search" / "demo-small-greater-seed0" / "steps.jsonl").read_text().splitlines()
    assert finished[: len(steps_then)] == steps_then and len(finished) == 9
    assert "Missing" not in (out / "results.md").read_text()
    assert (out / "results.png").read_bytes().startswith(b"\x89PNG")


def test_a_finished_driver_runs_nothing_again_and_refuses_other_settings(killed):
    out = killed[0]
    before = {path: path.read_bytes() for path in out.rglob("*.jsonl")}
    printed = run("real_models.py", *SMALL, folder=out.parent.parent)
    assert "minutes\n" not in printed and {path: path.read_bytes() for path in before} == before
    process = start_real_models(out.parent.parent, "--eval-rows", "29")
    _, error = process.communicate(timeout=60)
    assert process.returncode == 2 and error.strip().endswith(
        "begun with other settings than these: choose another --out"
    )


def test_the_table_shows_the_numbers_of_the_runs(killed):
    out = killed[0]
    rows = table_of((out / "results.md").read_text(), "Test rows")
    assert [row["method"] for row in rows] == [["empty"], ["zero-shot chain of thought"], ["initial"], ["GReaTer"]] * 2
    seen = set()
    for row in rows:
        (model,), (method,) = row["model"], row["method"]
        kind = f"search/demo-{model}-greater-seed0" if method == "GReaTer" else f"fixed/demo-{model}-fixed"
        wanted = {"GReaTer": ("best", None), "initial": ("initial", None)}.get(method, ("baseline", method))
        results = lines_of(out / kind / "results.jsonl")
        (result,) = [r for r in results if r["split"] == "test" and (r["role"], r.get("name")) == wanted]
        assert result["n"] == 30
        for column, field in (("paper, %", "accuracy"), ("harness, %", "harness_accuracy")):
            assert row[column][0].split()[0] == f"{100 * result[field]:.1f}"
        assert row["tokens"] == [f"{result['mean_tokens']:.1f}"]
        (initial,) = [r for r in results if r["split"] == "test" and r["role"] == "initial"]
        change = 100 * (result["accuracy"] - initial["accuracy"])
        assert row["to initial"][0].split()[:1] == ([] if method == "initial" else [f"{change:+.1f}"])
        seen.add(round(change))
    assert len(seen) > 1  # so that a table of one number would be noticed


def test_scored_generations_are_new_prompts_times_rows(killed):
    out = killed[0]
    for row in table_of((out / "results.md").read_text(), "Test rows"):
        if row["method"] == ["GReaTer"]:
            steps = lines_of(out / "search" / f"demo-{row['model'][0]}-greater-seed0" / "steps.jsonl")
            prompts = {tuple(tried["prompt_ids"]) for step in steps for tried in step["shortlist"]}
            prompts.discard(tuple(steps[0]["prompt_ids"]))
            assert row["scored"] == [str(5 * len(prompts))]


def test_a_prompt_that_was_scored_before_is_not_counted_again(killed, tmp_path):
    flags = real_models.Flags(models=["demo/small"], tasks=["demo"], train_rows=5)
    piece = real_models.Piece("search", "demo", "demo/small", "greater", 0)
    steps = lines_of(killed[0] / "search" / "demo-small-greater-seed0" / "steps.jsonl")
    tried = [tried for step in steps for tried in step["shortlist"]]
    tried[0]["new"] = False
    write_chained(tmp_path / "steps.jsonl", [{k: v for k, v in step.items() if k != CHECK} for step in steps])
    assert real_models.scored_generations(tmp_path, piece, flags) == 5 * sum(one["new"] for one in tried)
    assert sum(one["new"] for one in tried) < len(tried)


def test_headroom_shows_the_initial_prompt_on_dev_rows_and_reads_no_test_row(tmp_path):
    flags = ["--models", "demo/model", "--tasks", "demo", "--headroom", "--max-new-tokens", 30]
    printed = run("real_models.py", *flags, folder=tmp_path)
    (result,) = {
        (r["split"], r["n"], r["accuracy"]) for path in tmp_path.rglob("results.jsonl") for r in lines_of(path)
    }
    assert result[:2] == ("dev", 40)
    (row,) = table_of("## Headroom\n" + (tmp_path / "runs/real-models/headroom.md").read_text(), "Headroom")
    assert row["paper, %"][0].split()[0] == f"{100 * result[2]:.1f}"
    assert "above the commonest answer (mean over models, points): demo (" in printed


def test_a_transfer_is_the_best_prompt_of_one_model_on_the_other(killed):
    out = killed[0]
    rows = table_of((out / "results.md").read_text(), "Transfer")
    assert [(row["model"], row["method"]) for row in rows] == [
        (["small"], ["GReaTer of model"]),
        (["model"], ["GReaTer of small"]),
    ]
    for row in rows:
        origin = row["method"][0].removeprefix("GReaTer of ")
        best = lines_of(out / "search" / f"demo-{origin}-greater-seed0" / "prompts.jsonl")[0]["prompt"]
        (path,) = (out / "transfer" / f"demo-on-{row['model'][0]}").glob("*/*/results.jsonl")
        (result,) = {r["accuracy"] for r in lines_of(path) if r["prompt"] == best}
        assert row["paper, %"][0].split()[0] == f"{100 * result:.1f}"


def test_a_wilson_interval_of_no_or_all_rows_has_a_width():
    low, high = real_models_table.wilson(0.0, 20)
    assert low == 0 and abs(high - 0.1611) < 1e-3
    low, high = real_models_table.wilson(1.0, 20)
    assert abs(low - 0.8389) < 1e-3 and high == 1
    low, high = real_models_table.wilson(0.5, 100)
    assert abs(low - 0.4038) < 1e-3 and abs(high - 0.5962) < 1e-3


def made(outcomes, initial):
    def predictions(booleans):
        return [{"correct": b, "harness_correct": not b, "gold": "A"} for b in booleans]

    return real_models_table.Measurement("t", "m", "GReaTer", 0, {}, predictions(outcomes), predictions(initial), 0.0)


def test_the_mean_difference_averages_the_seeds_row_by_row():
    seeds = [made([True, True, False, False], [False] * 4), made([True, False, False, False], [False] * 4)]
    difference, low, high = real_models_table.mean_difference([seeds], "paper")
    assert difference == 0.375 and low == 0 and high == 0.75  # of rows 1, 1/2, 0, 0
    assert real_models_table.mean_difference([seeds], "harness")[0] == -0.375


def test_over_tasks_each_task_counts_alike_however_many_rows_it_has():
    small, large = made([True, False], [False] * 2), made([True] * 8, [True] * 8)
    difference, low, high = real_models_table.mean_difference([[small], [large]], "paper")
    assert difference == 0.25 and low == 0 and high == 0.5  # 1/2 and 0; of all ten rows it would be 1/10
    other = [replace(one, task=f"t{n}", scored=96) for n, one in enumerate((small, large))]
    (*_, row) = real_models_table.gain_table(other).strip().splitlines()
    assert row == "| m | GReaTer | 2 | 2 | +25.0 [+0.0, +50.0] | -25.0 [-50.0, +0.0] | 96 |"
    assert real_models_table.gain_table(other[:1]) == ""


def test_the_two_readings_are_two_columns_never_mixed():
    one = made([True, True, True, False], [True, False, False, False])
    accuracy, change, p = real_models_table.reading_cells(one, "paper")
    assert accuracy.startswith("75.0 [") and change.startswith("+50.0 [") and p == "0.5"
    accuracy, change, p = real_models_table.reading_cells(one, "harness")
    assert accuracy.startswith("25.0 [") and change.startswith("-50.0 [") and p == "0.5"


def test_the_first_seed_of_everything_comes_before_the_second():
    flags = real_models.Flags(models=["a/x", "a/y"], tasks=["demo", "gsm8k"], seeds=[3, 4])
    pieces = real_models.plan(flags)
    assert len(pieces) == len({piece.label for piece in pieces}) == 4 + 2 * (16 + 4)
    seeds = [piece.seed for piece in pieces if piece.kind != "fixed"]
    assert seeds == [3] * 20 + [4] * 20
    for number, piece in enumerate(pieces):
        if piece.kind == "transfer":
            assert piece.search in pieces[:number]


def test_all_methods_take_as_many_steps_and_tries():
    flags = real_models.Flags(models=["a/x"], tasks=["demo"], seeds=[0])
    greater, *others = [piece for piece in real_models.plan(flags) if piece.kind == "search"]
    values = real_models.stage_call(greater, flags)[1]
    calls = [real_models.stage_call(piece, flags)[1] for piece in others]
    changes = [{"shortlist": "random"}, {"shortlist": "likeliest"}, {"positions": "all"}]
    assert calls == [values | change for change in changes]


def test_audits_are_of_the_searches_by_gradient_and_no_minutes_of_theirs(tmp_path):
    flags = real_models.Flags(models=["a/x"], tasks=["demo"], seeds=[0], audit_every=3, out=str(tmp_path))
    pieces = [piece for piece in real_models.plan(flags) if piece.kind == "search"]
    calls = {piece.method: real_models.stage_call(piece, flags)[1] for piece in pieces}
    assert [name for name, call in calls.items() if call.get("audit_every") == 3] == ["greater"]
    assert sum("audit_every" in call for call in calls.values()) == 1
    seconds = [{"select": 60.0}, {"select": 30.0, "audit": 90.0}]
    steps = [replace(one, seconds=own) for one, own in zip(STEPS, seconds)]
    write_chained(tmp_path / "steps.jsonl", [asdict(one) for one in steps])
    write_jsonl(tmp_path / "results.jsonl", [])
    assert real_models.search_minutes(tmp_path) == 1.5


def test_the_signal_of_a_methods_searches_is_one_row_over_all_tasks_and_seeds():
    searches = [real_models_table.SearchRecord("t", "m", "GReaTer", seed, AUDITED, []) for seed in (0, 1)]
    searches.append(real_models_table.SearchRecord("t", "m", "random shortlist", 0, STEPS[:1], []))
    head, _, greater, random = real_models_table.signal_table(searches).splitlines()
    cells = [cell.strip() for cell in greater.strip("|").split("|")]
    assert cells[:6] == ["m", "GReaTer", "2", "6", "100.0 (61.0 to 100.0)", "100.0 (61.0 to 100.0)"]
    assert cells[11] == "6: 4, 2" and head.count("|") == greater.count("|") == random.count("|")


def open_tickets(folder):
    """(task, {split: rows}) of the tickets, asked as the benchmark does."""
    given = real_models.TASK_FLAGS[real_models.TICKETS]
    return open_task(TaskFlags(str(ROOT / real_models.TICKETS), data_dir=str(folder), **given))


def test_the_tickets_are_a_task_whose_splits_hold_all_labels_alike(tmp_path):
    splits = open_tickets(tmp_path)[1]
    labels = {"Billing": 0.4, "Technical issue": 0.35, "Account access": 0.25}
    assert tuple(splits) == SPLITS and sum(map(len, splits.values())) == 200
    assert len({row["question"] for rows in splits.values() for row in rows}) == 200
    for rows in splits.values():
        for label, share in labels.items():
            assert abs(sum(row["answer"] == label for row in rows) / len(rows) - share) < 0.03


def test_every_prompt_on_the_tickets_the_baselines_too_is_told_the_teams(tmp_path):
    task, _ = open_tickets(tmp_path)
    for framed in (task, task.bare):
        turn = framed.messages("My card was charged twice.", "")[0]["content"]
        assert "My card was charged twice." in turn
        assert all(team in turn for team in task.choices) and len(task.choices) == 3


def test_generation_is_compared_with_transformers_and_the_floor(tmp_path):
    model = ROOT / "demo" / "model"
    flags = ["--models", model, "--task", "demo", "--rows", 3, "--max-new-tokens", 5, "--repeats", 1, "--one-thread"]
    printed = run("generation_speed.py", *flags, folder=tmp_path)
    assert "15 generated in 3 rows" in printed and "the same ids in 3 of 3 rows" in printed
    assert re.search(r"ours is at \d+ % of its speed", printed) and re.search(r"resident \d+ before loading", printed)


def test_the_floor_of_generation_is_the_products_of_the_linear_layers(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    benchmark = importlib.import_module("generation_speed")
    model = torch.nn.Sequential(torch.nn.Linear(10, 20), torch.nn.ReLU(), torch.nn.Linear(20, 50))
    model.get_output_embeddings, model.dtype = lambda: model[2], torch.float32
    # 200 weights meet each of 7 tokens, 1000 the last of each of 2 rows. Of 3 and 1 new tokens the first are known then
    # and the last are not read: 2 steps of one row, whose 1200 weights take longer to move than to multiply.
    reading = 2 * (200 * 7 + 1000 * 2) / 100.0
    rates = benchmark.Rates(operations=100.0, bytes=10.0)
    found = benchmark.floor_seconds(model, [[1] * 3, [1] * 4], [3, 1], rates)
    assert found == pytest.approx(reading + 2 * 4 * 1200 / 10)
    rates = benchmark.Rates(operations=100.0, bytes=1e9)
    found = benchmark.floor_seconds(model, [[1] * 3, [1] * 4], [3, 2], rates)
    assert found == pytest.approx(reading + 2 * 1200 * (2 + 1) / 100)
    assert benchmark.before_end([4, 9, 2, 4], ends=[2, 3]) == [4, 9] and benchmark.before_end([4], [2]) == [4]


def test_the_table_of_extractors_has_a_line_for_each_form_from_the_same_reasonings(tmp_path):
    flags = ["--models", str(ROOT / "demo" / "model"), "--tasks", "demo", "--rows", "4", "--max-new-tokens", "40"]
    printed = run("extractors.py", *flags, "--data-dir", "data", folder=tmp_path)
    head, *rows = [[c.strip() for c in line.strip("|").split("|")] for line in printed.splitlines() if line[:1] == "|"]
    rows = [dict(zip(head, row, strict=True)) for row in rows if "---" not in row[0]]
    assert [row["form"] for row in rows] == ["paper", "short", "named"]
    assert len({(row["tokens"], row["cut"], row["harness"]) for row in rows}) == 1
    assert rows[0]["read"] == "100" and rows[0]["written"] == rows[0]["harness"] and rows[0]["top"] == "-"


# --- All methods at equal numbers of scored generations ------------------------------------------------

FEW = ["--models", "demo/model", "--tasks", "demo", "--seeds", "0", "1", "--methods", "greater", "opro"]
FEW += ["--budget", "100", "--train-rows", "8", "--eval-rows", "30", "--finalists", "2", "--max-new-tokens", "30"]


def compare_words(server):
    return [*FEW, "--optimizer-endpoint", server, "--optimizer-model", "scripted"]


@pytest.fixture(scope="module")
def compared(tmp_path_factory, demo_server):
    """The driver killed in OPRO's first search, and run to the end: (folder of the pieces, page then, output)."""
    folder = tmp_path_factory.mktemp("compared")
    out = folder / "runs" / "compare-methods"
    command = [sys.executable, str(ROOT / "benchmarks" / "compare_methods.py"), *compare_words(demo_server)]
    environment, pipe = os.environ | {"OMP_NUM_THREADS": "1"}, subprocess.PIPE
    process = subprocess.Popen(command, cwd=folder, env=environment, stdout=pipe, stderr=pipe, text=True)
    wait_for_lines(out / "search" / "demo-model-opro-seed0" / "steps.jsonl", 1, process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    run("compare_methods.py", *compare_words(demo_server), "--only-table", folder=folder)
    partial = (out / "results.md").read_text()
    return out, partial, run("compare_methods.py", *compare_words(demo_server), folder=folder)


def compared_rows(page):
    """The rows of the table of accuracies, each {column: cell}."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if "|" in line]
    start = next(number for number, cells in enumerate(lines) if "scored" in cells)
    end = next(number for number, cells in enumerate(lines) if "chosen prompt" in cells)
    return [dict(zip(lines[start], cells)) for cells in lines[start + 2 : end]]


def test_a_killed_comparison_lists_what_is_missing_and_ends_with_the_same_command(compared):
    out, partial, printed = compared
    (missing,) = re.findall(r"^Missing: (.*)\.$", partial, re.M)
    left = ["demo-model-opro-seed0", "demo-model-greater-seed1", "demo-model-opro-seed1"]
    assert missing.split(", ") == left == re.findall(r"^\[\d/5\] (\S+) \.\.\. [\d.]+ minutes$", printed, re.M)
    assert "Missing" not in (out / "results.md").read_text()
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_comparison_goes_on_with_a_server_elsewhere_but_not_with_another_budget(compared):
    folder = compared[0].parent.parent
    elsewhere = compare_words("http://127.0.0.1:1/v1")
    assert "minutes\n" not in run("compare_methods.py", *elsewhere, folder=folder)
    command = [sys.executable, str(ROOT / "benchmarks" / "compare_methods.py"), *elsewhere, "--budget", "101"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stderr.strip().endswith("choose another --out")


def test_the_comparison_shows_the_numbers_of_the_runs(compared):
    out = compared[0]
    rows = compared_rows((out / "results.md").read_text())
    fixed = [("empty", ""), ("zero-shot chain of thought", ""), ("initial", "")]
    searched = [(method, seed) for method in ("GReaTer", "OPRO") for seed in ("0", "1", "mean")]
    assert [(row["method"], row["seed"]) for row in rows] == fixed + searched
    by_seed = {}
    for row in rows[3:]:
        if row["seed"] == "mean":
            mean = sum(by_seed.values()) / 2
            assert row["test accuracy, %"].split()[0] == f"{mean:.1f}" and "seeds ±" in row["test accuracy, %"]
            by_seed = {}
            continue
        folder = out / "search" / f"demo-model-{row['method'].lower()}-seed{row['seed']}"
        (best,) = [r for r in lines_of(folder / "results.jsonl") if (r["role"], r["split"]) == ("best", "test")]
        (start,) = [r for r in lines_of(folder / "results.jsonl") if (r["role"], r["split"]) == ("initial", "test")]
        by_seed[row["seed"]] = 100 * best["accuracy"]
        assert row["test accuracy, %"].split()[0] == f"{100 * best['accuracy']:.1f}"
        assert row["to initial"].split()[0] == f"{100 * (best['accuracy'] - start['accuracy']):+.1f}"
        totals = lines_of(folder / "steps.jsonl")[-1]["totals"]
        names = ("requests", "read", "written")
        counts = [totals.get(f"optimizer_{name}") for name in ("requests", "prompt_tokens", "tokens")]
        assert [row[name] for name in names] == ["" if count is None else str(count) for count in counts]
        assert row["parsed"] == ("100 %" if row["method"] == "OPRO" else "")


def test_every_method_of_a_comparison_has_the_same_budget_and_uses_it_up(compared):
    rows = [row for row in compared_rows((compared[0] / "results.md").read_text()) if row["seed"].isdigit()]
    assert len(rows) == 4
    for row in rows:
        assert 100 - 3 * 8 < int(row["scored"]) <= 100 and int(row["scored"]) % 8 == 0


def test_all_searches_of_a_comparison_differ_in_the_method_alone():
    more = {"optimizer_model": "m", "optimizer_endpoint": "http://localhost:1/v1"}
    flags = compare_methods.Flags(models=["a/x"], tasks=["demo"], seeds=[0], budget=600, **more)
    calls = {}
    for piece in real_models.plan(flags):
        if piece.kind == "search":
            calls[piece.method] = real_models.stage_call(piece, flags)[1]
    assert len(calls) == 12
    of_greater = {"steps", "shortlist_size", "shortlist"}
    asking = {"optimizer_model", "optimizer_endpoint"}
    shared = [{k: v for k, v in call.items() if k not in of_greater | asking | {"method"}} for call in calls.values()]
    assert all(one == shared[0] for one in shared) and shared[0]["budget"] == 600
    assert calls["greater"] | {"shortlist": "random"} == calls["random-shortlist"]
    for method, call in calls.items():
        written = method not in ("greater", "random-shortlist", "random-prompts")
        assert (asking <= call.keys()) == written and (not asking & call.keys()) != written
        assert bool(of_greater & call.keys()) == (method in ("greater", "random-shortlist"))


def text_step(number, accuracies):
    scored = [Scored(f"p{number}{k}.", accuracy, 1, number) for k, accuracy in enumerate(accuracies)]
    best = Scored("p.", 0.0, 1, 0)
    return TextStep(number, scored, [], best, {"all": 4, "new": 1, "repeated": 1, "empty": 2}, {}, {})


def made_search(steps):
    return compare_methods_table.Searched(made([True], [False]), steps, [], 10)


def test_the_curve_of_a_text_method_has_a_point_for_each_prompt_and_never_falls():
    search = made_search([text_step(0, [0.3]), text_step(1, [0.2, 0.6]), text_step(2, [0.5])])
    assert compare_methods_table.best_so_far(search) == [(10, 0.3), (20, 0.3), (30, 0.6), (40, 0.6)]
    assert compare_methods_table.optimizer_cells([search, search])[0] == "50 %"


def test_the_curve_of_greater_has_the_accuracy_of_the_prompt_with_the_lowest_loss():
    def tried(ids, error, objective, new=True):
        return Tried(ids, objective, error, 0.0, objective, 1, token=ids[-1], new=new)

    def step(number, ids, error, objective, best, shortlist):
        return Step(ids, objective, error, 0.0, objective, 1, number, 0, {}, shortlist=shortlist, best=Best(best, ""))

    start = step(0, (1,), 0.75, 2.0, 2.0, [])
    # (3,) has the lowest loss but ends no sentence, so the best stays (2,), although it errs more often.
    first = step(1, (3,), 0.25, 0.5, 1.0, [tried((2,), 0.5, 1.0), tried((3,), 0.25, 0.5)])
    second = step(2, (4,), 0.0, 0.25, 0.25, [tried((2,), 0.5, 1.0, new=False), tried((4,), 0.0, 0.25)])
    curve = compare_methods_table.best_so_far(made_search([start, first, second]))
    assert curve == [(10, 0.25), (30, 0.5), (40, 1.0)]


def test_the_dev_curve_has_the_best_finalist_from_where_it_was_scored_on():
    search = made_search([text_step(0, [0.3]), text_step(1, [0.2, 0.6]), text_step(2, [0.5])])
    scored = [one.prompt for step in search.steps for one in step.proposed]
    dev = {scored[2]: 0.4, scored[3]: 0.9, scored[0]: 0.5}
    prompts = [{"prompt": p, "dev_accuracy": accuracy, "initial": p == scored[0]} for p, accuracy in dev.items()]
    found = compare_methods_table.best_dev_so_far(replace(search, prompts=prompts))
    assert len(set(scored)) == 4 and found == [(10, 0.5), (30, 0.5), (40, 0.9)]
    greater = [step for step in STEPS if not step.grows]
    ids = greater[1].shortlist[0].prompt_ids
    prompts = [
        {"prompt": "b", "prompt_ids": list(ids), "dev_accuracy": 0.7, "initial": False},
        {"prompt": "a", "prompt_ids": list(greater[0].prompt_ids), "dev_accuracy": 0.2, "initial": True},
    ]
    found = compare_methods_table.best_dev_so_far(replace(made_search(greater), prompts=prompts))
    assert found == [(10, 0.2), (generations_of(greater[:2], 10), 0.7)]


def test_the_mean_curve_keeps_each_seed_where_it_is_until_its_next_point():
    places, means = compare_methods_table.mean_curve([[(10, 0.0), (30, 1.0)], [(10, 0.5), (20, 1.0)]])
    assert places == [10, 20, 30] and means.tolist() == [0.25, 0.5, 1.0]


def test_an_unknown_method_or_no_budget_is_refused_before_anything_runs():
    with pytest.raises(UserError, match="--methods: opra is none of greater, random-shortlist, opro"):
        compare_methods.Flags(models=["a/x"], methods=["opra"])
    with pytest.raises(UserError, match="--budget must be at least 1"):
        compare_methods.Flags(models=["a/x"], budget=0)


# --- Our loops beside those of another package ---------------------------------------------------------

BESIDE = ["--task", "demo", "--model", "demo/model", "--budget", "128", "--train-rows", "8", "--eval-rows", "30"]
BESIDE += ["--finalists", "2", "--max-new-tokens", "30", "--optimizer-model", "scripted"]
INSTALLED = importlib.util.find_spec("promptolution") is not None


@pytest.mark.skipif(INSTALLED, reason="promptolution is installed")
def test_the_comparison_with_the_package_says_at_once_that_it_is_missing(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "compare_with_promptolution.py"), *BESIDE]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "") and "pip install promptolution" in done.stderr
    assert len(done.stderr.splitlines()) == 1 and list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not INSTALLED, reason="promptolution is not installed: an optional package")
def test_both_loops_keep_to_the_budget_and_a_repeated_call_scores_nothing_again(tmp_path, demo_server):
    words = [*BESIDE, "--optimizer-endpoint", demo_server]
    run("compare_with_promptolution.py", *words, folder=tmp_path)
    out = tmp_path / "runs" / "compare-with-promptolution"
    page = (out / "results.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")] for line in page.splitlines() if line.startswith("|")][2:]
    assert [row[2] for row in rows] == ["ours", "promptolution"] * 2
    assert all(120 <= int(row[4]) <= 128 and int(row[3]) * 8 == int(row[4]) for row in rows)
    files = {path: path.read_bytes() for path in out.rglob("*.jsonl")}
    run("compare_with_promptolution.py", *words, folder=tmp_path)
    assert {path: path.read_bytes() for path in out.rglob("*.jsonl")} == files
    assert (out / "results.md").read_text() == page

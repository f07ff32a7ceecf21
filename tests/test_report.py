"""The report: its tables against hand-made results, and its files."""

import math
import re
import subprocess
import sys

import pytest
from conftest import ROOT
from made_runs import GEMMA, LLAMA, START, TRANSFERS, finalist, make_run, result

from support import report
from support.files import UserError, write_jsonl
from support.runs import load_runs
from support.tasks import PAPER_BBH, TASKS


def table(markdown):
    """The rows of a Markdown table as lists of cells."""
    return [
        [cell.strip() for cell in line.strip("|").split("|")] for line in markdown.splitlines() if "---" not in line
    ]


def rows_of(folder, reading="paper"):
    runs, _ = load_runs(folder)
    return table(report.results_table(report.table_records(runs), reading))


# --- Tables ---------------------------------------------------------------------------------------------------


def test_one_run_gives_its_accuracy_wilson_interval_and_n_in_each_reading(tmp_path):
    make_run(tmp_path / "a", results=[result("initial", "test", 0.5), result("best", "test", 0.8, harness=0.9)])
    head, initial, best = rows_of(tmp_path)
    assert head == ["model", "method", "gsm8k", "paper"]
    assert initial == [LLAMA, "initial prompt", "50.0 (40.4 to 59.6), n 100", "-"]
    assert best == [LLAMA, "GReaTer", "80.0 (71.1 to 86.7), n 100", "82.6"]
    assert rows_of(tmp_path, "harness")[2][2:] == ["90.0 (82.6 to 94.5), n 100", "82.6"]


def test_seeds_are_averaged_with_the_error_of_their_mean_and_a_fixed_prompt_counts_once(tmp_path):
    for seed, best in enumerate((0.7, 0.8, 0.9)):
        make_run(tmp_path / str(seed), seed=seed, best=best)
    _, initial, best = rows_of(tmp_path)
    assert initial[2] == "60.0 (50.2 to 69.1), n 100"
    # The standard deviation of 70, 80, 90 is 10; 10 / sqrt(3) = 5.8.
    assert best[2] == "80.0 ± 5.8, 3 seeds, n 100"


def test_runs_with_other_settings_are_rows_of_their_own_and_only_the_usual_one_meets_the_paper(tmp_path):
    make_run(tmp_path / "a", best=0.8, run_dir="a", top_k=10)
    make_run(tmp_path / "b", best=0.7, run_dir="b", top_k=40)
    assert [row[1:] for row in rows_of(tmp_path)[2:]] == [
        ["GReaTer", "80.0 (71.1 to 86.7), n 100", "82.6"],
        ["GReaTer (top_k 40)", "70.0 (60.4 to 78.1), n 100", "-"],
    ]


def test_fixed_prompts_whose_answers_were_read_otherwise_are_rows_of_their_own(tmp_path):
    parts = TASKS["bbh/navigate"].parts
    for name, accuracy, changes in (("a", 0.25, {}), ("b", 0.75, {"answer_space": "vocabulary"})):
        results = [result("initial", "test", accuracy), result("best", "test", 0.5)]
        make_run(tmp_path / name, results=results, task="bbh/navigate", **parts | changes)
    runs, _ = load_runs(tmp_path)
    found = {
        record["method"]: record["accuracy"] for record in report.table_records(runs) if record["role"] == "initial"
    }
    assert found == {"initial prompt": 0.25, "initial prompt (answer_space 'vocabulary')": 0.75}


def test_the_bbh_mean_is_over_the_papers_tasks_that_are_there(tmp_path):
    make_run(tmp_path / "a", task="bbh/hyperbaton", best=0.8)
    make_run(tmp_path / "b", task="bbh/navigate", best=0.6)
    make_run(tmp_path / "c", task="bbh/word_sorting", best=0.1)  # none of the paper's 21
    head, _, best = rows_of(tmp_path)
    assert head[2:4] == ["BBH (2 of 21)", "paper"] and len(PAPER_BBH) == 21
    # The intervals, 71.1 to 86.7 and 50.2 to 69.1, have half widths of 7.8 and 9.4; over 1.96 that is 3.96 and 4.81.
    error = math.hypot(3.96, 4.81) / 2
    assert best[2:4] == [f"70.0 ± {error:.1f}, 2 of 21 tasks", "68.7"]
    assert head[4:] == ["bbh/hyperbaton", "bbh/navigate", "bbh/word_sorting"]


def test_the_papers_numbers_stand_only_beside_the_right_model_method_and_column():
    assert report.paper_main(LLAMA, "GReaTer", "gsm8k") == 82.6
    assert report.paper_main("gemma-2-9b-it", "zero-shot chain of thought", "folio") == 65.0
    assert report.paper_main("Gemma-2-9B", "TextGrad", "BBH") == 72.9
    for other in (
        ("Meta-Llama-3.1-8B-Instruct", "GReaTer", "gsm8k"),
        ("gemma-2-2b-it", "GReaTer", "gsm8k"),
        (LLAMA, "initial prompt", "gsm8k"),
        (LLAMA, "empty", "gsm8k"),
        (LLAMA, "GReaTer", "bbh/navigate"),
    ):
        assert report.paper_main(*other) is None


def test_baselines_are_rows_by_name_and_answers_of_another_model_do_not_count(tmp_path):
    results = [
        result("initial", "test", 0.6),
        result("baseline", "test", 0.4, name="empty", prompt=""),
        result("baseline", "test", 0.7, name="zero-shot chain of thought"),
        result("best", "test", 0.8, task="gsm8k", model=LLAMA),
        result("best", "test", 0.1, n=1000, model=GEMMA),
        result("best", "dev", 0.2, n=1000),
    ]
    make_run(tmp_path / "a", results=results)
    assert [row[1:] for row in rows_of(tmp_path)[1:]] == [
        ["initial prompt", "60.0 (50.2 to 69.1), n 100", "-"],
        ["empty", "40.0 (30.9 to 49.8), n 100", "-"],
        ["zero-shot chain of thought", "70.0 (60.4 to 78.1), n 100", "79.6"],
        ["GReaTer", "80.0 (71.1 to 86.7), n 100", "82.6"],
    ]


def test_of_several_results_the_one_of_the_most_rows_counts_and_of_equals_the_latest(tmp_path):
    best = [result("best", "test", accuracy, n) for accuracy, n in ((0.9, 10), (0.7, 100), (0.8, 100), (0.6, 50))]
    make_run(tmp_path / "a", results=[result("initial", "test", 0.5, 10), *best])
    make_run(tmp_path / "b", seed=1, results=[result("initial", "test", 0.6), *best])
    make_run(tmp_path / "c", seed=2, results=[result("initial", "test", 0.5, 10), *best])
    assert [row[2] for row in rows_of(tmp_path)[1:]] == ["60.0 (50.2 to 69.1), n 100", "80.0 ± 0.0, 3 seeds, n 100"]


def test_the_papers_number_is_left_out_where_there_is_none_of_ours(tmp_path):
    make_run(tmp_path / "a", task="gsm8k", best=0.8)
    make_run(tmp_path / "b", task="folio", model=GEMMA, best=0.8)
    head, *rows = rows_of(tmp_path)
    assert head[2:] == ["gsm8k", "paper", "folio", "paper"]
    ours = {row[0]: row[2:] for row in rows if row[1] == "GReaTer"}
    assert ours == {
        LLAMA: ["80.0 (71.1 to 86.7), n 100", "82.6", "-", "-"],
        GEMMA: ["-", "-", "80.0 (71.1 to 86.7), n 100", "69.1"],
    }


def test_another_method_is_called_by_its_name_and_needs_no_steps(tmp_path):
    folder = make_run(tmp_path / "a", method="APO", best=0.8)
    (folder / "steps.jsonl").unlink()
    assert rows_of(tmp_path)[2][1:] == ["APO", "80.0 (71.1 to 86.7), n 100", "81.1"]
    assert [path.name for path in report.write_report(tmp_path)] == ["report.md", "accuracy.png"]


def test_the_transfer_table_has_targets_as_columns_and_the_papers_number_in_its_cell_alone():
    paper, harness = (table(part) for part in report.transfer_table(TRANSFERS).split("\nAccuracy on"))
    assert paper[2] == ["task", "method", "source", f"on {GEMMA}", f"on {LLAMA}"]
    assert paper[3:] == [
        ["bbh/hyperbaton", "initial prompt", "-", "50.0 (40.4 to 59.6), n 100", "-"],
        ["bbh/hyperbaton", "GReaTer", LLAMA, "80.0 (71.1 to 86.7), n 100, paper 91", "90.0 (82.6 to 94.5), n 100"],
        ["gsm8k", "GReaTer", LLAMA, "70.0 (60.4 to 78.1), n 100", "-"],
        ["bbh/causal_judgement", "GReaTer", LLAMA, "-", "60.0 (50.2 to 69.1), n 100"],
    ]
    assert harness[4][3] == "20.0 (13.3 to 28.9), n 100, paper 91"


def test_the_transfer_numbers_of_the_paper_have_the_averages_it_prints():
    averages = {key: round(sum(numbers) / 5, 1) for key, numbers in report.PAPER_TABLE_3.items()}
    assert averages["GReaTer", "Llama-3-8B", "Gemma-2-9B"] == 76.2
    assert averages["GReaTer", "Gemma-2-9B", "Llama-3-8B"] == 64.6
    assert averages["TextGrad", "Gemma-2-9B", "Llama-3-8B"] == 42.8
    assert averages["APO", "GPT-4", "Llama-3-8B"] == 59.8
    assert all(f"bbh/{task}" in PAPER_BBH for task in report.PAPER_TRANSFER)


def test_a_table_cell_with_a_bar_or_a_line_break_stays_one_cell():
    assert report.markdown([["a|b", "c\nd"]]).splitlines()[0] == "| a\\|b | c d |"


# --- Files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spoil", ["no run", "no results", "no test", "no steps", "bad json", "other records"])
def test_a_folder_that_cannot_be_reported_is_named_in_one_line(tmp_path, spoil):
    folder = tmp_path / "some-run"
    if spoil == "no run":
        folder.mkdir()
    else:
        make_run(folder)
    if spoil == "no results":
        (folder / "results.jsonl").unlink()
    elif spoil == "no test":
        write_jsonl(folder / "results.jsonl", [result("initial", "dev", 0.5), result("best", "dev", 0.5)])
    elif spoil == "no steps":
        (folder / "steps.jsonl").unlink()
    elif spoil == "bad json":
        (folder / "run.json").write_text("[]")
    elif spoil == "other records":
        write_jsonl(folder / "results.jsonl", [{"role": "best"}])
    with pytest.raises(UserError, match="some-run") as error:
        report.write_report(folder)
    assert "\n" not in str(error.value)
    assert not (folder / "report.md").exists()


def test_an_unfinished_run_is_listed_beside_a_finished_one_and_its_files_stay_as_they_are(tmp_path):
    make_run(tmp_path / "done")
    half = make_run(tmp_path / "half")
    (half / "results.jsonl").unlink()
    (half / "steps.jsonl").write_text('{"step": 0')  # a line that the run is just writing
    report.write_report(tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert re.search(r"## Unfinished\n\n- .*half: unfinished, no results.jsonl", text) and text.startswith(
        "# Report on 1 run\n"
    )
    assert sorted(p.name for p in half.iterdir()) == ["prompts.jsonl", "run.json", "steps.jsonl"]
    assert (half / "steps.jsonl").read_text() == '{"step": 0'


def test_the_report_shows_prompts_rates_and_links_that_exist(tmp_path):
    make_run(tmp_path / "my runs" / "a run")
    written = report.write_report(tmp_path / "my runs")
    text = written[0].read_text()
    assert f"initial:\n\n~~~text\n{START}\n~~~" in text
    fifty, sixty = "50.0 (40.4 to 59.6), n 100", "60.0 (50.2 to 69.1), n 100"
    assert f"| initial | {fifty} | {sixty} | {fifty} | 25.0 % | 12.5 % | 31.5 |" in text
    links = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert links == ["accuracy.png", *(f"a%20run/{name}.png" for name in ("objective", "evolution", "gradient"))]
    assert [path.relative_to(tmp_path / "my runs").as_posix().replace(" ", "%20") for path in written[1:]] == links


@pytest.mark.parametrize(("first_dev", "warned"), [(0.4, True), (0.5, True), (0.6, False)])
def test_a_best_prompt_that_dev_rows_do_not_speak_for_is_reported_with_a_warning(tmp_path, first_dev, warned):
    folder = make_run(tmp_path / "one")
    first, initial = finalist((4, 2, 3), first_dev), finalist((1, 2, 3), 0.5, initial=True)
    write_jsonl(folder / "prompts.jsonl", [first | {"prompt": "check it ."}, initial])
    text = report.write_report(folder)[0].read_text()
    assert ("On dev the chosen prompt is" in text) == warned


def test_a_single_run_gets_its_pictures_beside_its_report(tmp_path):
    folder = make_run(tmp_path / "one")
    names = [path.name for path in report.write_report(folder)]
    assert names == ["report.md", "accuracy.png", "objective.png", "evolution.png", "gradient.png"]
    assert "(objective.png)" in (folder / "report.md").read_text()


def test_a_report_is_written_without_torch(tmp_path):
    make_run(tmp_path / "one")
    code = "import sys; from support import report; report.write_report(sys.argv[1]); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, check=True)


def test_the_report_compares_the_best_prompt_with_the_others_row_by_row_where_their_texts_are_there(tmp_path):
    results = [result("initial", "test", 0.5, 10), result("best", "test", 0.8, 10)]
    predictions = []
    for number, own in enumerate(results):
        own |= {"prompt_hash": str(number), "evaluation": "e"}
        for row in range(10):
            right = row < (5, 8)[number]
            own_row = {"split": "test", "prompt_hash": str(number), "evaluation": "e", "id": f"r{row}"}
            predictions.append(own_row | {"correct": right, "harness_correct": not right})
    folder = make_run(tmp_path / "a", results=results)
    report.write_report(folder)
    assert "McNemar)" not in (folder / "report.md").read_text()
    write_jsonl(folder / "predictions.jsonl", predictions)
    report.write_report(folder)
    text = (folder / "report.md").read_text()
    assert re.search(r"initial +paper +\+30\.0 % .* 3 +0  0\.25\n", text)
    assert re.search(r"initial +harness +-30\.0 % .* 0 +3  0\.25\n", text)
    assert "mean tokens are those of a reasoning" in text

"""The report: its tables against hand-made results, what the pictures show against hand-computed values."""

import math
import re
import subprocess
import sys
from dataclasses import replace

import pytest
from conftest import ROOT
from made_runs import GEMMA, LLAMA, START, STEPS, TEXTS, WORDS, finalist, long_run, make_run, result, step

from support import report
from support.files import UserError, write_jsonl
from support.runs import load_run, load_runs
from support.tasks import PAPER_BBH


def table(markdown):
    """The rows of a Markdown table as lists of cells."""
    return [
        [cell.strip() for cell in line.strip("|").split("|")] for line in markdown.splitlines() if "---" not in line
    ]


def rows_of(folder, reading="paper"):
    runs, _ = load_runs(folder)
    return table(report.results_table(report.table_records(runs), reading))


# --- Tables ---------------------------------------------------------------------------------------------------


def test_one_run_gives_its_accuracy_standard_error_and_n_in_each_reading(tmp_path):
    make_run(tmp_path / "a", results=[result("initial", "test", 0.5, 101), result("best", "test", 0.8, 101, 0.9)])
    head, initial, best = rows_of(tmp_path)
    assert head == ["model", "method", "gsm8k", "paper"]
    assert initial == [LLAMA, "initial prompt", "50.0 ± 5.0 (n 101)", "-"]
    assert best == [LLAMA, "GReaTer", "80.0 ± 4.0 (n 101)", "82.6"]
    assert rows_of(tmp_path, "harness")[2][2:] == ["90.0 ± 3.0 (n 101)", "82.6"]


def test_seeds_are_averaged_with_the_error_of_their_mean_and_a_fixed_prompt_counts_once(tmp_path):
    for seed, best in enumerate((0.7, 0.8, 0.9)):
        make_run(tmp_path / str(seed), seed=seed, best=best)
    _, initial, best = rows_of(tmp_path)
    assert initial[2] == "60.0 ± 4.9 (n 100)"
    # The standard deviation of 70, 80, 90 is 10; 10 / sqrt(3) = 5.8.
    assert best[2] == "80.0 ± 5.8 (3 seeds, n 100)"


def test_runs_with_other_settings_are_rows_of_their_own_and_only_the_usual_one_meets_the_paper(tmp_path):
    make_run(tmp_path / "a", best=0.8, run_dir="a", top_k=10)
    make_run(tmp_path / "b", best=0.7, run_dir="b", top_k=40)
    assert [row[1:] for row in rows_of(tmp_path)[2:]] == [
        ["GReaTer", "80.0 ± 4.0 (n 100)", "82.6"],
        ["GReaTer (top_k 40)", "70.0 ± 4.6 (n 100)", "-"],
    ]


def test_the_bbh_mean_is_over_the_papers_tasks_that_are_there(tmp_path):
    make_run(tmp_path / "a", task="bbh/hyperbaton", best=0.8)
    make_run(tmp_path / "b", task="bbh/navigate", best=0.6)
    make_run(tmp_path / "c", task="bbh/word_sorting", best=0.1)  # none of the paper's 21
    head, _, best = rows_of(tmp_path)
    assert head[2:4] == ["BBH (2 of 21)", "paper"] and len(PAPER_BBH) == 21
    error = 100 * math.sqrt(0.8 * 0.2 / 99 + 0.6 * 0.4 / 99) / 2
    assert best[2:4] == [f"70.0 ± {error:.1f} (2 of 21)", "68.7"]
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
        ["initial prompt", "60.0 ± 4.9 (n 100)", "-"],
        ["empty", "40.0 ± 4.9 (n 100)", "-"],
        ["zero-shot chain of thought", "70.0 ± 4.6 (n 100)", "79.6"],
        ["GReaTer", "80.0 ± 4.0 (n 100)", "82.6"],
    ]


def test_of_several_results_the_one_of_the_most_rows_counts_and_of_equals_the_latest(tmp_path):
    best = [result("best", "test", accuracy, n) for accuracy, n in ((0.9, 10), (0.7, 100), (0.8, 100), (0.6, 50))]
    make_run(tmp_path / "a", results=[result("initial", "test", 0.5, 10), *best])
    make_run(tmp_path / "b", seed=1, results=[result("initial", "test", 0.6), *best])
    make_run(tmp_path / "c", seed=2, results=[result("initial", "test", 0.5, 10), *best])
    assert [row[2] for row in rows_of(tmp_path)[1:]] == ["60.0 ± 4.9 (n 100)", "80.0 ± 0.0 (3 seeds, n 100)"]


def test_the_papers_number_is_left_out_where_there_is_none_of_ours(tmp_path):
    make_run(tmp_path / "a", task="gsm8k", best=0.8)
    make_run(tmp_path / "b", task="folio", model=GEMMA, best=0.8)
    head, *rows = rows_of(tmp_path)
    assert head[2:] == ["gsm8k", "paper", "folio", "paper"]
    ours = {row[0]: row[2:] for row in rows if row[1] == "GReaTer"}
    assert ours == {
        LLAMA: ["80.0 ± 4.0 (n 100)", "82.6", "-", "-"],
        GEMMA: ["-", "-", "80.0 ± 4.0 (n 100)", "69.1"],
    }


def test_another_method_is_called_by_its_name_and_needs_no_steps(tmp_path):
    folder = make_run(tmp_path / "a", method="APO", best=0.8)
    (folder / "steps.jsonl").unlink()
    assert rows_of(tmp_path)[2][1:] == ["APO", "80.0 ± 4.0 (n 100)", "81.1"]
    assert [path.name for path in report.write_report(tmp_path)] == ["report.md", "accuracy.png"]


def transfer(task, method, source, target, accuracy):
    names = {"task": task, "method": method, "source": source, "target": target, "prompt": "p", "n": 101}
    return names | {"accuracy": accuracy, "stderr": 0.04, "harness_accuracy": 1 - accuracy, "harness_stderr": 0.03}


TRANSFERS = [
    transfer("bbh/hyperbaton", "initial prompt", "-", GEMMA, 0.5),
    transfer("bbh/hyperbaton", "GReaTer", LLAMA, LLAMA, 0.9),
    transfer("bbh/hyperbaton", "GReaTer", LLAMA, GEMMA, 0.8),
    transfer("gsm8k", "GReaTer", LLAMA, GEMMA, 0.7),
    transfer("bbh/causal_judgement", "GReaTer", LLAMA, LLAMA, 0.6),
]


def test_the_transfer_table_has_targets_as_columns_and_the_papers_number_in_its_cell_alone():
    paper, harness = (table(part) for part in report.transfer_table(TRANSFERS).split("\nAccuracy on"))
    assert paper[2] == ["task", "method", "source", f"on {GEMMA}", f"on {LLAMA}"]
    assert paper[3:] == [
        ["bbh/hyperbaton", "initial prompt", "-", "50.0 ± 4.0 (n 101)", "-"],
        ["bbh/hyperbaton", "GReaTer", LLAMA, "80.0 ± 4.0 (n 101), paper 91", "90.0 ± 4.0 (n 101)"],
        ["gsm8k", "GReaTer", LLAMA, "70.0 ± 4.0 (n 101)", "-"],
        ["bbh/causal_judgement", "GReaTer", LLAMA, "-", "60.0 ± 4.0 (n 101)"],
    ]
    assert harness[4][3] == "20.0 ± 3.0 (n 101), paper 91"


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
    assert "| initial | 50.0 ± 5.0 (n 100) | 60.0 ± 4.9 (n 100) | 50.0 ± 5.0 (n 100) | 25.0 % | 12.5 % | 31.5 |" in text
    links = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert links == ["accuracy.png", *(f"a%20run/{name}.png" for name in ("objective", "evolution", "gradient"))]
    assert [path.relative_to(tmp_path / "my runs").as_posix().replace(" ", "%20") for path in written[1:]] == links


def test_a_single_run_gets_its_pictures_beside_its_report(tmp_path):
    folder = make_run(tmp_path / "one")
    names = [path.name for path in report.write_report(folder)]
    assert names == ["report.md", "accuracy.png", "objective.png", "evolution.png", "gradient.png"]
    assert "(objective.png)" in (folder / "report.md").read_text()


def test_a_report_is_written_without_torch(tmp_path):
    make_run(tmp_path / "one")
    code = "import sys; from support import report; report.write_report(sys.argv[1]); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, check=True)


# --- What the pictures show -----------------------------------------------------------------------------------


def test_a_finalist_stands_at_the_step_at_which_it_first_appeared():
    prompts = [finalist([4, 2, 3], 0.9), finalist([4, 5, 3], 0.8), finalist([1, 2, 3], 0.5, True), finalist([9], 0.1)]
    # [4, 2, 3] is won at step 1, [4, 5, 3] is only tried at step 2, [9] was never seen.
    assert report.finalist_points(STEPS, prompts) == [
        (1, 0.9, 0.05, False),
        (2, 0.8, 0.05, False),
        (0, 0.5, 0.05, True),
    ]


def test_the_evolution_has_a_row_for_each_change_and_tells_when_each_token_was_set():
    parts, kind = report.prompt_parts(STEPS, TEXTS)
    assert kind == "tokens"
    start, first, second, grown = report.evolution_rows(STEPS, parts)
    assert (start["step"], start["change"], start["cells"]) == (0, None, [("read", 0), (" it", 0), (".", 0)])
    assert (first["step"], first["change"], first["cells"]) == (1, -3.0, [("check", 1), (" it", 0), (".", 0)])
    assert (second["step"], second["change"], second["cells"]) == (3, -0.5, [("check", 1), (" it", 0), (" all", 3)])
    assert (grown["step"], grown["change"]) == (4, 0.25)
    assert grown["cells"] == [*second["cells"], (".", 4)]


def test_token_texts_come_from_the_records_then_the_tokenizer_and_else_the_words_of_the_prompt():
    texts = report.token_texts(STEPS, "no/such/model")
    assert texts == WORDS
    unknown = [STEPS[0]]  # no candidates yet
    assert report.prompt_parts(unknown, report.token_texts(unknown, "no/such/model")) == (
        [[("read", "read"), ("it.", "it.")]],
        "words",
    )
    demo = [replace(STEPS[0], prompt_ids=(75, 92))]
    assert report.token_texts(demo, ROOT / "demo" / "model") == {75: "check", 92: "every"}


def test_a_gradient_point_is_the_candidate_minus_the_incumbent_in_gradient_and_objective():
    # Step 4 grows the prompt, so that it has no incumbent.
    assert report.gradient_points(STEPS) == [
        (-2.5, -3.0, True),
        (-2.0, 1.0, False),
        (-0.75, 0.5, False),
        (-0.25, -0.5, True),
    ]
    random_shortlist = [STEPS[0], step(1, 0, (4, 2, 3), 5.0, {4: None, 1: None}, [(4, (4, 2, 3), 5.0)])]
    assert report.gradient_points(random_shortlist) == []


def test_the_rank_correlation_is_spearmans():
    # Ranks 1 2 3 4 5 against 2 1 4 3 5: 1 - 6 * 4 / (5 * 24) = 0.8.
    assert report.spearman([1, 2, 3, 4, 50], [0.2, 0.1, 7, 6, 8]) == pytest.approx(0.8)
    # Two share ranks 1 and 2: from the means -1 -1 0.5 1.5 and -1.5 -0.5 0.5 1.5, so 4.5 / sqrt(4.5 * 5).
    assert report.spearman([5, 5, 6, 9], [1, 2, 3, 4]) == pytest.approx(4.5 / math.sqrt(4.5 * 5))
    assert report.spearman([1, 2, 3], [9, 4, -1]) == pytest.approx(-1)
    assert report.spearman([1, 1, 1], [1, 2, 3]) is None


def test_a_long_token_is_wrapped_then_cut_and_its_space_is_seen():
    assert report.clip(" systematically", 6, 2) == "·syste\nmatic…"
    assert report.clip("ness", 6, 2) == "ness"
    assert report.clip(" intermediate", 12, 2) == "·interm\nediate"
    assert report.clip("", 6, 2) == ""
    assert report.clip("\n", 6, 1) == "\\n"


# --- Pictures -------------------------------------------------------------------------------------------------


def png_size(path):
    content = path.read_bytes()
    assert content[:8] == b"\x89PNG\r\n\x1a\n" and len(content) > 10_000
    return int.from_bytes(content[16:20], "big"), int.from_bytes(content[20:24], "big")


@pytest.mark.parametrize(("steps", "length", "most"), [(105, 25, 25), (40, 60, 64), (0, 5, 5)])
def test_every_picture_of_a_run_is_drawn_legibly_wide_and_not_endlessly_high(tmp_path, steps, length, most):
    folder = make_run(tmp_path / "long", steps=long_run(steps, length, most))
    written = report.write_report(folder)
    sizes = {path.name: png_size(path) for path in written if path.suffix == ".png"}
    assert set(sizes) == {"accuracy.png", "objective.png", "evolution.png"} | ({"gradient.png"} if steps else set())
    assert all(1200 <= width <= 1600 and height <= 2800 for width, height in sizes.values())


def test_the_cap_on_rows_is_said_in_the_picture(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    titles = []
    monkeypatch.setattr(report, "MAX_LINES", 12)
    monkeypatch.setattr(Figure, "suptitle", lambda figure, text, **_: titles.append(text))
    run = load_run(make_run(tmp_path / "long", steps=long_run(105, 25, 25)))
    report.draw_evolution(run, tmp_path / "evolution.png")
    assert f"task gsm8k, model {LLAMA}, GReaTer, seed 0" in titles[0]
    shown, changes = map(int, re.search(r"(\d+) of (\d+) changes shown", titles[0]).groups())
    assert shown == 11 < changes <= 105  # 12 rows, the start among them


def test_the_transfer_picture_has_a_panel_for_each_task(tmp_path):
    one = png_size(report.transfer_picture(TRANSFERS[:3], tmp_path / "one.png"))
    two = png_size(report.transfer_picture(TRANSFERS, tmp_path / "two.png", "harness"))
    assert one[0] >= 800 and two[0] > 1.5 * one[0]

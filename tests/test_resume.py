"""What makes it the same run, and what goes on how: settings that differ, fewer steps, rounds that a budget cut."""

import json
from dataclasses import asdict

import pytest
from made_runs import STEPS
from test_runs import text_step

from support.files import UserError, append_jsonl, read_jsonl
from support.resume import add_step, begin_run, both_values, continue_run, differences, require_same_run
from support.runs import since_improved

TASK = {
    "name": "own/mine",
    "sha256": {"train": "a", "dev": "b"},
    "grader_version": 3,
    "extractor": "So",
    "template": "",
}
CONFIG = {
    "task": "mine.csv", "run_dir": "", "data_dir": "data", "source": "", "device": "auto", "dtype": "auto",
    "batch_size": 0, "gradient_batch_size": 0, "steps": 4, "eval_rows": 20, "finalists": 3, "patience": 0, "top_k": 10,
    "question_key": "message", "train_file": "",
    "answer_space": "vocabulary", "extractor": "So", "kind": "", "system": "", "template": "",
}  # fmt: skip
ROWS = 10


def record_of(dtype="float32", **changes):
    ids = [f"line-{n}" for n in range(ROWS)]
    return {
        "config": CONFIG | changes, "task": TASK, "train_ids": ids, "model_hash": "m", "dtype": dtype,
        "versions": {"torch": "1"}, "commit": "c",
    }  # fmt: skip


def begun(folder, steps=STEPS, **changes):
    """A folder with a run that was begun with these settings."""
    folder.mkdir(exist_ok=True)
    begin_run(folder, record_of(**changes))
    for step in steps:
        add_step(folder, step)
    return folder


def names_of(folder, record):
    return [text.partition(" (")[0] for text in differences(folder, record)]


@pytest.mark.parametrize(
    "changes",
    [
        {"device": "cuda:1"},
        {"batch_size": 7, "gradient_batch_size": 3},
        {"run_dir": "x", "data_dir": "y", "source": "z"},
        {"task": "elsewhere/mine.csv", "question_key": "text", "train_file": "t.csv"},
        {"patience": 5},
        {"steps": 9},
        {"eval_rows": 0, "finalists": 4},
        {"dtype": "float32"},
    ],
    ids=lambda changes: ", ".join(changes),
)
def test_a_setting_that_cannot_change_the_result_refuses_no_run_and_stands_in_its_record_behind(tmp_path, changes):
    folder = begun(tmp_path / "r")
    (folder / "results.jsonl").touch()
    config_dtype = changes.pop("dtype", "auto")
    record = record_of(**changes)
    record["config"]["dtype"] = config_dtype
    assert continue_run(folder, record) == list(STEPS)
    written = json.loads((folder / "run.json").read_text())
    assert written["config"] == record["config"]
    assert written["begun_with"] == {"versions": {"torch": "1"}, "commit": "c"}
    require_same_run(folder, record)


def test_a_run_that_goes_on_with_its_own_settings_keeps_its_record(tmp_path):
    folder = begun(tmp_path / "r")
    before = (folder / "run.json").read_bytes()
    continue_run(folder, record_of() | {"versions": {"torch": "2"}})
    assert (folder / "run.json").read_bytes() == before


def test_a_refusal_names_every_setting_that_differs_with_both_values(tmp_path):
    folder = begun(tmp_path / "r")
    other = record_of(top_k=4, device="cpu", template="x " * 50 + "{question}")
    other["task"] = TASK | {"sha256": {"train": "a", "dev": "other"}}
    other["model_hash"] = "n"
    before = (folder / "run.json").read_bytes()
    with pytest.raises(UserError) as error:
        continue_run(folder, other)
    said = str(error.value)
    assert said.startswith(f"{folder} holds a run with other model (recorded m, now n), ")
    assert "now x x x" in said and said.endswith(", top_k (recorded 10, now 4): choose another --run-dir")
    assert "task sha256 (recorded {'train': 'a', 'dev': 'b'}, now {'train': 'a', 'dev': 'other'})" in said
    assert names_of(folder, other) == ["model", "task sha256", "template", "top_k"]
    assert len(said) < 500 and (folder / "run.json").read_bytes() == before


def test_long_values_are_shown_from_where_they_differ():
    first, second = "word " * 30 + "old end", "word " * 30 + "new end and much more behind it, which is cut"
    assert (
        both_values(first, second)
        == "recorded ...word word old end, now ...word word new end and much more behind i..."
    )
    assert both_values(None, 3) == "recorded None, now 3"


def test_fewer_rows_or_finalists_are_refused_where_more_were_evaluated_and_zero_rows_are_all(tmp_path):
    folder = begun(tmp_path / "r")
    assert names_of(folder, record_of(eval_rows=5, finalists=1)) == []
    (folder / "results.jsonl").touch()
    assert names_of(folder, record_of(eval_rows=5, finalists=1)) == ["eval_rows", "finalists"]
    other = begun(tmp_path / "s", eval_rows=0)
    (other / "results.jsonl").touch()
    assert names_of(other, record_of(eval_rows=500)) == ["eval_rows"]


def test_the_dtype_in_which_the_model_runs_counts_not_what_it_is_called(tmp_path):
    folder = begun(tmp_path / "r")
    record = record_of(dtype="bfloat16")  # auto, on another device
    assert names_of(folder, record) == ["dtype_here"]
    older = begun(tmp_path / "s")
    written = json.loads((older / "run.json").read_text())
    del written["dtype"], written["record_check"]
    (older / "run.json").write_text(json.dumps(written))
    assert names_of(older, record_of()) == []


def test_fewer_steps_or_a_smaller_budget_than_is_there_is_refused_in_a_line(tmp_path):
    folder = begun(tmp_path / "r", steps=STEPS[:4])  # three steps, of 50 generations with the start
    assert len(continue_run(folder, record_of(steps=3, budget=50))) == 4
    for changes, said in (
        ({"steps": 2}, "holds 3 steps, --steps 2 asks for fewer: give at least 3, or"),
        ({"budget": 49}, "holds 50 generations, --budget 49 asks for fewer: give at least 50, or"),
    ):
        with pytest.raises(UserError, match=said):
            continue_run(folder, record_of(**changes))
    assert json.loads((folder / "run.json").read_text())["config"]["budget"] == 50


def test_a_round_that_the_budget_may_have_cut_is_made_again_where_the_budget_grows(tmp_path):
    steps = [text_step(0, ("start", 0.5)), text_step(1, ("a", 0.7), ("b", 0.2))]  # 40 and 80 generations
    for budget, now, kept in ((85, 200, 1), (85, 0, 1), (85, 85, 2), (90, 200, 2), (0, 90, 2)):
        folder = begun(tmp_path / f"{budget} {now}", steps, budget=budget, rounds=9)
        before = (folder / "steps.jsonl").read_bytes()
        assert continue_run(folder, record_of(budget=now, rounds=9)) == steps[:kept]
        after = (folder / "steps.jsonl").read_bytes()
        assert before.startswith(after) and len(read_jsonl(folder / "steps.jsonl")) == kept
    cut = begun(tmp_path / "start", steps[:1], budget=45, rounds=9)
    assert continue_run(cut, record_of(budget=90, rounds=9)) == [] and not (cut / "steps.jsonl").exists()


def test_rounds_that_a_schedule_depends_on_may_not_change(tmp_path):
    steps = [text_step(0, ("start", 0.5))]
    folder = begun(tmp_path / "r", steps, rounds=5, planned_rounds=5)
    assert names_of(folder, record_of(rounds=6, planned_rounds=6)) == ["planned_rounds"]
    older = begun(tmp_path / "s", steps, rounds=5)
    assert names_of(older, record_of(rounds=5, planned_rounds=5)) == []
    assert names_of(older, record_of(rounds=6, planned_rounds=6)) == ["planned_rounds"]


def test_a_new_step_ends_that_the_prompts_are_final(tmp_path):
    folder = begun(tmp_path / "r", STEPS[:2])
    (folder / "prompts.jsonl").touch()
    assert continue_run(folder, record_of()) and (folder / "prompts.jsonl").exists()
    add_step(folder, STEPS[2])
    assert not (folder / "prompts.jsonl").exists()
    assert read_jsonl(folder / "steps.jsonl")[2] == json.loads(json.dumps(asdict(STEPS[2])))


def test_replies_to_an_optimizer_s_questions_under_other_settings_are_not_taken_for_this_run_s(tmp_path):
    folder = begun(tmp_path / "r", steps=())
    append_jsonl(folder / "optimizer.jsonl", {"call": 0})
    begin_run(folder, record_of(batch_size=3))
    assert (folder / "optimizer.jsonl").exists()
    begin_run(folder, record_of(optimizer_tokens=9))
    assert not (folder / "optimizer.jsonl").exists()


def test_patience_counts_the_steps_behind_the_first_that_found_the_best():
    assert [since_improved(STEPS[:n]) for n in range(1, 6)] == [0, 0, 1, 0, 1]
    steps = [text_step(0, ("s", 0.5)), text_step(1, ("a", 0.7)), text_step(2, ("b", 0.7)), text_step(3, ("c", 0.6))]
    assert [since_improved(steps[:n]) for n in range(1, 5)] == [0, 0, 1, 2]

"""The records of a run: written, read again, and refused where they have another form."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT
from made_runs import STEPS, finalist, make_run, result, step

from support.files import UserError, write_json, write_jsonl
from support.resume import write_record
from support.runs import (
    Best,
    Candidate,
    Score,
    Scored,
    Step,
    TextStep,
    Tried,
    Unfinished,
    as_step,
    changed_parts,
    described,
    dev_warning,
    finalists,
    generations_of,
    last_job,
    load_run,
    load_runs,
    log_line,
    rank_prompts,
    read_run,
    read_steps,
    run_folder,
    scores_of,
    text_finalists,
    text_log_line,
)
from support.settings import SearchSettings
from support.tasks import TASKS
from support.tokens import Row, encode


def written(path, records):
    write_jsonl(path, records)
    return path


# --- Steps ----------------------------------------------------------------------------------------------------


def test_a_step_that_was_written_and_read_again_is_equal(tmp_path):
    path = written(tmp_path / "steps.jsonl", [asdict(record) for record in STEPS])
    assert read_steps(path) == list(STEPS)
    again = read_steps(path)[1]
    assert isinstance(again.shortlist[0].prompt_ids, tuple) and again.candidates[0].gradient == -2.0
    assert asdict(as_step(asdict(STEPS[4]))) == asdict(STEPS[4])


def test_the_start_of_an_older_run_lacks_what_only_a_step_finds(tmp_path):
    start = asdict(STEPS[0])
    for name in ("k", "grows", "candidates", "shortlist"):
        del start[name]
    assert read_steps(written(tmp_path / "steps.jsonl", [start])) == [STEPS[0]]


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda record: record.pop("objective"), "no objective; this is no file of a run"),
        (lambda record: (record.pop("step"), record.pop("prompt")), "no prompt, step; this is no file of a run"),
        (lambda record: record["best"].pop("prompt"), "no prompt; this is no file of a run"),
        (lambda record: record["shortlist"][1].pop("new"), "no new; this is no file of a run"),
        (lambda record: record["candidates"][0].pop("gradient"), "no gradient; this is no file of a run"),
        (lambda record: record.update(colour="red"), "not a step of a search"),
        (lambda record: record.update(best=5), "not a step of a search"),
        (lambda record: record.update(prompt_ids=None), "not a step of a search"),
        (lambda record: record.update(shortlist=[1]), "not a step of a search"),
    ],
)
def test_a_line_of_another_form_is_named_with_its_file_its_line_and_the_field(tmp_path, spoil, said):
    record = json.loads(json.dumps(asdict(STEPS[1])))
    spoil(record)
    path = written(tmp_path / "steps.jsonl", [asdict(STEPS[0]), record])
    with pytest.raises(UserError) as error:
        read_steps(path)
    assert str(error.value).startswith(f"{path}, line 2: {said}") and "\n" not in str(error.value)


def test_steps_are_read_without_mending_and_mended_only_where_the_file_is_to_grow(tmp_path):
    path = written(tmp_path / "steps.jsonl", [asdict(STEPS[0])])
    whole = path.read_text()
    path.write_text(whole + '{"step": 1')
    with pytest.raises(UserError, match="steps.jsonl, line 2"):
        read_steps(path)
    assert path.read_text() == whole + '{"step": 1'
    assert read_steps(path, growing=True) == [STEPS[0]]
    assert path.read_text() == whole


def test_only_a_file_that_is_to_grow_may_be_missing(tmp_path):
    assert read_steps(tmp_path / "steps.jsonl", growing=True) == []
    with pytest.raises(UserError, match="cannot read .*steps.jsonl"):
        read_steps(tmp_path / "steps.jsonl")


def test_a_prompt_keeps_its_first_score_and_the_initial_one_stands_first():
    again = step(5, 0, (1, 2, 3), 7.0, {4: 0.0, 1: 0.0}, [(4, (4, 2, 3), 1.0)])  # both prompts were scored before
    scores = scores_of([*STEPS, again])
    assert {prompt_ids: score.objective for prompt_ids, score in scores.items()} == {
        (1, 2, 3): 8.0,
        (4, 2, 3): 5.0,
        (5, 2, 3): 9.0,
        (4, 5, 3): 5.5,
        (4, 2, 5): 4.5,
        (4, 2, 5, 3): 4.75,
    }
    assert next(iter(scores)) == (1, 2, 3)
    assert all(score.prompt_ids == prompt_ids for prompt_ids, score in scores.items())


def test_a_line_of_the_log_tells_step_position_numbers_seconds_and_prompt():
    timed = replace(STEPS[3], seconds={"propose": 0.25, "gradient": 1.0, "select": 2.0})
    assert log_line(timed, 100) == (
        "step   3/100  position     2  objective   4.500  ce   4.000  error 0.25  nll  2.50  best   4.500    3.2 s  "
        "check it all"
    )
    assert log_line(STEPS[0], 100).startswith("step   0/100  position start  objective   8.000")


# --- The configuration ----------------------------------------------------------------------------------------


def test_a_run_s_folder_is_named_after_its_task_model_and_seed():
    assert run_folder("bbh/navigate", "google/gemma-2-9b-it", 3) == Path("runs/bbh-navigate-gemma-2-9b-it-seed3")
    assert run_folder("demo", str(ROOT / "demo" / "model"), 0) == Path("runs/demo-seed0")
    assert run_folder("own/mine", str(ROOT / "demo" / "model"), 0) == Path("runs/own-mine-model-seed0")
    assert run_folder("demo", str(ROOT / "demo" / "small"), 1) == Path("runs/demo-small-seed1")


@pytest.mark.parametrize("content", [[], {}, {"config": []}, {"config": {}}, {"config": {"task": 5}}, None])
def test_a_record_without_the_asked_settings_is_no_run(tmp_path, content):
    if content is not None:
        write_json(tmp_path / "run.json", content)
    with pytest.raises(UserError, match="run.json is not the record of a run of stage 02"):
        read_run(tmp_path, task=str)


@pytest.mark.parametrize("content", [[], {}, {"config": []}, {"config": "x"}])
def test_a_record_without_a_configuration_is_no_run_whatever_is_asked(tmp_path, content):
    write_json(tmp_path / "run.json", content)
    with pytest.raises(UserError, match="run.json is not the record of a run of stage 02"):
        read_run(tmp_path)


# --- Finished runs --------------------------------------------------------------------------------------------


def test_a_finished_run_has_its_short_names_results_steps_and_prompts(tmp_path):
    run = load_run(make_run(tmp_path / "a", task="data/mine.jsonl", model="/models/big/llama"))
    assert (run.task, run.model, run.method) == ("own/mine", "big/llama", "GReaTer")
    assert run.title == "task own/mine, model big/llama, GReaTer, seed 0"
    assert run.steps == list(STEPS)
    assert run.prompts == [finalist((4, 2, 3), 0.9), finalist((1, 2, 3), 0.5, initial=True)]
    assert run.prompts_tried == [("initial", None), ("best", None)]


def test_a_result_is_the_run_s_own_of_the_most_rows_and_of_equals_the_latest(tmp_path):
    usual = [result("initial", "test", 0.6), result("best", "test", 0.5, 10)]
    more = [result("best", "test", 0.7), result("best", "test", 0.8), result("best", "test", 0.9, 50)]
    others = [result("best", "test", 0.1, 999, model="a/b"), result("best", "test", 0.1, 999, task="folio")]
    run = load_run(make_run(tmp_path / "a", results=[*usual, *more, *others]))
    assert run.result("best", "test")["accuracy"] == 0.8
    assert run.result("best", "dev") is None and run.result("baseline", "test", "empty") is None


def test_a_result_whose_answers_were_read_otherwise_is_not_the_run_s_own(tmp_path):
    parts = {"extractor": "So it is", "kind": "choice", "answer_space": "choices"}
    usual = [result("initial", "test", 0.6), result("best", "test", 0.8, **parts)]
    for name, value in (("answer_space", "vocabulary"), ("extractor", "Hence"), ("kind", "text")):
        other = result("best", "test", 0.1, n=200, **parts | {name: value})
        run = load_run(make_run(tmp_path / name, results=[*usual, other], task="bbh/hyperbaton", **parts))
        assert run.result("best", "test")["accuracy"] == 0.8


def test_a_run_from_before_answer_spaces_is_one_with_what_was_used_then(tmp_path):
    old = {"config": {"task": "gsm8k", "extractor": "", "template": "", "kind": "", "preset": "paper"}}
    of_task = {"name": "gsm8k", "extractor": TASKS["gsm8k"].extractor, "template": TASKS["gsm8k"].template}
    write_json(tmp_path / "run.json", old | {"task": of_task})
    config = read_run(tmp_path)["config"]
    assert {name: config[name] for name in TASKS["gsm8k"].parts} == TASKS["gsm8k"].parts
    assert config["preset"] == "default" and changed_parts("gsm8k", config) == []
    (navigate,) = changed_parts("bbh/navigate", TASKS["bbh/navigate"].parts | {"answer_space": "vocabulary"})
    assert navigate == "answer_space 'vocabulary'"


def test_unfinished_runs_are_messages_beside_the_finished_ones_and_an_error_alone(tmp_path):
    make_run(tmp_path / "half", results=[result("initial", "test", 0.5)])
    with pytest.raises(Unfinished, match="half: unfinished, results.jsonl has no test result of the best prompt"):
        load_run(tmp_path / "half")
    with pytest.raises(UserError, match="holds no finished run: .*half: unfinished"):
        load_runs(tmp_path)
    make_run(tmp_path / "done")
    runs, unfinished = load_runs(tmp_path)
    assert [run.folder.name for run in runs] == ["done"] and len(unfinished) == 1


def test_a_start_that_was_killed_before_its_first_step_is_no_run(tmp_path):
    make_run(tmp_path / "done")
    begun = make_run(tmp_path / "begun")
    for name in ("steps.jsonl", "results.jsonl", "prompts.jsonl"):
        (begun / name).unlink()
    runs, unfinished = load_runs(tmp_path)
    assert [run.folder.name for run in runs] == ["done"] and unfinished == []


def test_a_run_whose_continuation_has_no_final_prompts_yet_is_unfinished(tmp_path):
    (make_run(tmp_path / "more") / "prompts.jsonl").unlink()
    with pytest.raises(Unfinished, match="more: being continued, no prompts.jsonl"):
        load_run(tmp_path / "more")


def test_a_folder_without_a_run_is_an_error(tmp_path):
    with pytest.raises(UserError, match="holds no run"):
        load_runs(tmp_path)


@pytest.mark.parametrize("name", ["steps.jsonl", "prompts.jsonl"])
def test_a_run_without_steps_or_prompts_is_an_error_unless_another_method_found_its_prompt(tmp_path, name):
    for method, folder in (("GReaTer", tmp_path / "a"), ("APO", tmp_path / "b")):
        make_run(folder, method=method)
        (folder / name).write_text("")
    with pytest.raises(UserError, match="steps.jsonl or prompts.jsonl is empty"):
        load_run(tmp_path / "a")
    assert load_run(tmp_path / "b").steps == []


def test_a_line_cut_short_is_an_error_and_stays_for_the_run_that_may_be_writing_it(tmp_path):
    path = make_run(tmp_path / "some-run") / "results.jsonl"
    path.write_text(path.read_text() + '{"role"')
    with pytest.raises(UserError, match="results.jsonl, line 4"):
        load_runs(tmp_path)
    assert path.read_text().endswith('{"role"')


# --- Which prompts are final, and which were scored together ----------------------------------------------------


def scored(tokenizer, texts):
    """{prompt ids: Score} of {text: objective}."""
    scores = {}
    for text, objective in texts.items():
        ids = tuple(encode(tokenizer, text))
        scores[ids] = Score(ids, objective, 0.0, 0.0, objective, 0)
    return scores


def test_finalists_are_finished_prompts_and_the_initial_one_by_objective(demo_tokenizer):
    texts = {"find this and": 3.0, "check this and": 0.5, "find this .": 2.0, "tell this .": 1.0}
    scores = scored(demo_tokenizer, texts)
    assert [s.objective for s in finalists(demo_tokenizer, scores, 9)] == [1.0, 2.0, 3.0]
    assert [s.objective for s in finalists(demo_tokenizer, scores, 2)] == [1.0, 2.0]  # the initial one is cut off


def test_a_step_is_described_with_texts_the_best_finished_prompt_and_what_was_counted(demo_tokenizer):
    scores = scored(demo_tokenizer, {"find this and": 3.0, "check this and": 0.5, "tell this .": 1.0})
    current = list(scores.values())[1]
    token = encode(demo_tokenizer, "check")[0]
    found = Step(
        **vars(current), step=4, position=0, seconds={}, candidates=[Candidate(token, -2.0)],
        shortlist=[Tried(**vars(current), token=token, new=True)],
    )  # fmt: skip
    engine = SimpleNamespace(tokenizer=demo_tokenizer, counts={"generated_tokens": 7}, batch_sizes={"generation": 2})
    row = Row(encode(demo_tokenizer, "how many ? please"), [], [], [])
    step = described(found, engine, row, scores)
    assert (step.prompt, step.best) == ("check this and", Best(1.0, "tell this ."))
    assert (step.candidates[0].text, step.shortlist[0].text) == ("check", "check")
    assert (step.totals, step.batch_sizes) == ({"generated_tokens": 7}, {"generation": 2})


def test_prompts_are_ranked_by_dev_accuracy_then_objective_or_by_the_objective_alone():
    ranks = ((0.5, 1.0), (0.7, 3.0), (0.7, 2.0))
    prompts = [{"dev_accuracy": a, "objective": o, "initial": False} for a, o in ranks]
    assert [p["objective"] for p in rank_prompts(prompts, "dev")] == [2.0, 3.0, 1.0]
    assert [p["objective"] for p in rank_prompts(prompts, "train")] == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("choose_on", ["dev", "train"])
def test_of_prompts_that_nothing_tells_apart_the_initial_one_comes_first(choose_on):
    equal = {"dev_accuracy": 0.5, "objective": 1.0}
    prompts = [equal | {"initial": False}, equal | {"initial": True}]
    assert rank_prompts(prompts, choose_on) == prompts[::-1]


def ranked(first_dev, initial_dev):
    """Two final prompts, best first, by their dev accuracies."""
    first = {"prompt": "check it .", "initial": False, "dev_accuracy": first_dev}
    return [first, {"prompt": "read it .", "initial": True, "dev_accuracy": initial_dev}]


def test_a_first_prompt_that_dev_rows_do_not_speak_for_is_told():
    assert dev_warning(ranked(0.6, 0.5)) == ""
    assert dev_warning(ranked(0.45, 0.5)) == (
        "On dev the chosen prompt is worse than the initial one (45.0 against 50.0 %): the training objective chose it."
    )
    assert dev_warning(ranked(0.5, 0.5)) == (
        "On dev the chosen prompt is no better than the initial one (both 50.0 %): the training objective chose it."
    )


def test_nothing_is_told_of_the_initial_prompt_itself_or_of_files_without_dev_accuracies():
    first, initial = ranked(0.4, 0.5)
    assert dev_warning([initial, first]) == ""
    assert dev_warning([first | {"prompt": initial["prompt"]}, initial]) == ""  # other ids, the same text
    assert dev_warning([{"prompt": "check it ."}, initial]) == ""
    assert dev_warning([first, {"prompt": "read it ."}]) == ""


def made_step(number, ids, tried=()):
    """A step behind which the prompt is `ids`; tried: [(ids, whether they were new)]."""
    shortlist = [Tried(*made_score(other), token=1, new=new) for other, new in tried]
    return Step(*made_score(ids), step=number, position=number, seconds={}, shortlist=shortlist)


def made_score(ids):
    return tuple(ids), 1.0, 0.0, 1.0, 1.0, 5


def test_the_last_job_is_the_one_in_which_the_current_prompt_was_generated():
    steps = [
        made_step(0, [1]),
        made_step(1, [2], [([3], True), ([2], True), ([4], False)]),  # wins, with another new one beside it
        made_step(2, [2], [([5], True)]),  # stays
        made_step(3, [1], [([1], False), ([6], True)]),  # an earlier one comes back, generated alone
        made_step(4, [1], [([7], True)]),
    ]
    found = [last_job(steps[: n + 1]) for n in range(5)]
    assert found == [(0, [(1,)]), (1, [(3,), (2,)]), (1, [(3,), (2,)]), (3, [(1,)]), (3, [(1,)])]


def test_scores_come_back_in_the_order_in_which_they_were_given():
    steps = [made_step(0, [1]), made_step(1, [2], [([3], True), ([2], True)])]
    assert list(scores_of(steps)) == [(1,), (3,), (2,)]


# --- Text methods ------------------------------------------------------------------------------------------------


def text_step(number, *scored):
    """A `TextStep` that scored (prompt, accuracy) pairs."""
    proposed = [Scored(prompt, accuracy, 12, number) for prompt, accuracy in scored]
    totals = {"scored_generations": 40 * (number + 1), "optimizer_tokens": 7}
    replies = {"all": 8, "new": 5, "repeated": 1, "empty": 2} if number else {}
    return TextStep(number, proposed, ["a"], proposed[0], replies, totals, {"propose": 1.0, "score": 2.5})


def test_a_round_of_a_text_method_that_was_written_and_read_again_is_equal(tmp_path):
    steps = [text_step(0, ("start", 0.5)), text_step(1, ("a", 0.7), ("b", 0.2))]
    path = written(tmp_path / "steps.jsonl", [asdict(each) for each in steps])
    assert read_steps(path) == steps
    written(path, [asdict(steps[0]), {"proposed": []}])
    with pytest.raises(UserError, match="line 2: no best"):
        read_steps(path)


def test_a_round_s_line_tells_what_was_scored_refused_and_found():
    line = text_log_line(text_step(1, ("a", 0.75)), 400)
    for part in ("round   1", "scored    80/400", "new   1", "replies    8, refused 2", "75.0 %", "3.5 s", "  a"):
        assert part in line
    assert "/" not in text_log_line(text_step(0, ("a", 0.75)), 0)


def test_the_finalists_of_a_text_method_are_the_best_on_training_rows_and_the_initial_prompt():
    steps = [text_step(0, ("start", 0.5)), text_step(1, ("a", 0.7), ("b", 0.6)), text_step(2, ("c", 0.7), ("d", 0.4))]
    records = text_finalists(steps, "start", 2)
    assert [(record["prompt"], record["initial"]) for record in records] == [
        ("a", False),
        ("c", False),
        ("start", True),
    ]
    assert records[0] | {"prompt": "", "initial": 0} == {
        "prompt": "",
        "initial": 0,
        "train_accuracy": 0.7,
        "objective": pytest.approx(0.3),
        "tokens": 12,
        "step": 1,
    }
    assert [record["prompt"] for record in text_finalists(steps, "start", 9)] == ["a", "c", "b", "start", "d"]


def test_generations_of_a_search_are_its_scored_prompts_on_all_rows():
    start, *more = STEPS
    assert generations_of([start], 10) == 10
    # Steps 1 to 4 scored 2, 1, 1 and 1 prompts.
    assert [generations_of([start, *more[:n]], 10) for n in range(1, 5)] == [30, 40, 50, 60]
    again = replace(more[0], step=5, shortlist=[replace(more[0].shortlist[0], new=False)])
    assert generations_of([*STEPS, again], 10) == 70  # an earlier prompt reasons once more


def test_a_run_from_before_the_settings_beyond_the_paper_goes_on_as_it_began(tmp_path):
    record = {
        "config": {"task": "demo", "model": "m", "shortlist": "gradient", "answer_space": "choices"},
        "task": {"name": "demo"},
    }
    record["config"] |= {"margin": 0.0, "edits": ["substitute"]}  # which were settings for a while
    write_record(tmp_path, record)
    config = read_run(tmp_path, task=str)["config"]
    assert not {"margin", "edits"} & config.keys()
    new = ("audit_every", "positions", "word_starts")
    assert {name: config[name] for name in new} == {name: getattr(SearchSettings(), name) for name in new}
    del record["config"]["shortlist"]  # a text method has none of them
    write_record(tmp_path, record)
    assert not set(new) & read_run(tmp_path, task=str)["config"].keys()


def test_steps_of_an_older_version_are_read_where_what_is_gone_changed_nothing():
    old = [json.loads(json.dumps(asdict(one))) for one in STEPS]
    known = [as_step(record) for record in old]
    for record in old:
        for one in [*record["candidates"], *record["shortlist"]]:
            one["edit"] = "substitute"
    assert [as_step(record) for record in old] == known
    old[1]["shortlist"][0]["edit"] = "insert"
    with pytest.raises(TypeError):
        as_step(old[1])


def test_the_log_names_the_position_of_the_token_that_was_taken():
    taken = replace(STEPS[1], shortlist=[replace(one, position=7) for one in STEPS[1].shortlist])
    assert "position     7" in log_line(taken, 9) and "position     0" in log_line(STEPS[1], 9)
    kept = replace(STEPS[2], shortlist=[replace(one, position=7) for one in STEPS[2].shortlist])
    assert "position     1" in log_line(kept, 9)

"""Evaluation: two readings of one generation, numbers and comparisons, what is never evaluated twice or lost."""

import json
import random
import re
from dataclasses import replace
from fractions import Fraction
from itertools import product

import numpy as np
import pytest
from conftest import own_task, settings
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from support import evaluation
from support.answerers import Answerer
from support.evaluation import (
    Evaluation,
    Generation,
    bootstrap,
    compare,
    compare_scores,
    evaluate,
    evaluate_once,
    mcnemar,
    regrade,
    sign_flips,
)
from support.files import UserError, read_jsonl, text_hash, write_jsonl
from support.reading import GRADER_VERSION
from support.rouge import rouge_l


def test_the_standard_error_is_that_of_the_sample():
    assert evaluation.accuracy([True, False, False, False]) == (0.25, 0.25)
    assert evaluation.accuracy([True]) == (1.0, 0.0)


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_the_ends_of_a_wilson_interval_are_1_96_of_their_own_standard_errors_from_the_share_seen(counts):
    correct, n = counts
    share = correct / n
    low, high = evaluation.wilson(correct, n)
    assert 0 <= low <= share <= high <= 1 and high - low > 0
    for end in (low, high):
        if 0 < correct < n or 0.001 < end < 0.999:
            assert abs(share - end) == pytest.approx(1.959964 * (end * (1 - end) / n) ** 0.5, rel=1e-5)


def test_a_wilson_interval_has_the_published_values_and_a_width_where_all_or_none_are_right():
    # Newcombe (1998), table I: the score method without continuity correction.
    for correct, n, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611)):
        assert evaluation.wilson(correct, n) == pytest.approx((low, high), abs=5e-5)
    assert evaluation.wilson(20, 20) == pytest.approx((1 - 0.1611, 1), abs=5e-5)


# --- One result, or the mean of several -----------------------------------------------------------------------


def result_of(correct, n):
    """The fields of a result that an estimate needs; older files hold no more of the accuracy."""
    return {"n": n, "accuracy": correct / n, "harness_accuracy": 1 - correct / n}


def test_one_result_has_its_wilson_interval_in_each_reading_though_its_file_holds_none():
    for n in (3, 7, 20, 49, 1319):
        for correct in (0, 1, n // 3, n):
            for reading, count in (("paper", correct), ("harness", n - correct)):
                found = evaluation.estimate([result_of(correct, n)], reading)
                assert (found.low, found.high) == evaluation.wilson(count, n) and not found.several
    assert str(evaluation.estimate([result_of(20, 20)], "paper")) == "100.0 (83.9 to 100.0)"


def test_several_runs_have_the_standard_error_of_their_mean_from_their_spread():
    found = evaluation.estimate([result_of(correct, 100) for correct in (70, 80, 90)], "paper")
    assert found.accuracy == pytest.approx(0.8) and found.error == pytest.approx(0.1 / 3**0.5)
    assert (found.low, found.high) == pytest.approx((0.8 - 0.1 / 3**0.5, 0.8 + 0.1 / 3**0.5))
    assert str(found) == "80.0 ± 5.8"


def test_one_value_has_no_spread():
    mean, error = evaluation.mean_of_runs([0.5])
    assert mean == 0.5 and evaluation.error_text(error) == "n/a" and evaluation.error_text(0.0123) == "1.2"


# --- Comparing two prompts on the same rows -------------------------------------------------------------------


@hypothesis_settings(deadline=None)
@given(st.integers(0, 7), st.integers(0, 7))
def test_mcnemars_p_is_the_share_of_coin_tosses_at_least_as_uneven(gained, lost):
    tosses = list(product((0, 1), repeat=gained + lost))
    uneven = [t for t in tosses if abs(2 * sum(t) - len(t)) >= abs(gained - lost)]
    assert mcnemar(gained, lost) == pytest.approx(len(uneven) / len(tosses), abs=1e-12)


def test_mcnemars_p_is_exact_for_whole_data_sets():
    assert mcnemar(0, 0) == 1.0 and mcnemar(5, 0) == 2 / 32 and mcnemar(0, 1319) == float(Fraction(2, 2**1319))
    assert mcnemar(700, 619) == pytest.approx(0.0276, abs=2e-4)  # the normal approximation with continuity: 0.0276


def test_the_bootstrap_interval_is_that_of_resampled_rows():
    rng, n = random.Random(1), 1000
    first = [rng.random() < 0.5 for _ in range(n)]
    second = [value if rng.random() < 0.7 else rng.random() < 0.7 for value in first]
    found = compare(first, second)
    assert found["difference"] == pytest.approx((sum(second) - sum(first)) / n)
    assert found["gained"] - found["lost"] == sum(second) - sum(first) and found["gained"] > found["lost"] > 0
    assert found["p"] == mcnemar(found["gained"], found["lost"]) and found["n"] == n
    change, draw = np.array(second, float) - np.array(first, float), np.random.default_rng(2)
    draws = [change[draw.integers(0, n, n)].mean() for _ in range(8000)]  # the plain way
    low, high = np.percentile(draws, [2.5, 97.5])
    # A 90 % interval would be narrower by some 0.006 on either side.
    assert found["low"] == pytest.approx(low, abs=0.0025) and found["high"] == pytest.approx(high, abs=0.0025)


def test_equal_answers_differ_by_nothing_and_lists_of_other_lengths_are_refused():
    same = compare([True, False] * 5, [True, False] * 5)
    assert (same["difference"], same["low"], same["high"], same["p"]) == (0, 0, 0, 1)
    with pytest.raises(ValueError):
        compare([True], [True, False])


# --- Scores instead of right or wrong -------------------------------------------------------------------------


def scores_of(count, seed=1):
    rng = random.Random(seed)
    return [rng.random() ** 2 for _ in range(count)]


def test_scores_have_a_mean_the_sample_s_standard_error_and_the_interval_of_resampled_rows():
    scores = scores_of(300)
    fields = evaluation.accuracy_fields(scores, "harness")
    assert fields["harness_accuracy"] == pytest.approx(np.mean(scores))
    assert fields["harness_stderr"] == pytest.approx(np.std(scores, ddof=1) / 300**0.5)
    draw = np.random.default_rng(2)
    draws = [np.mean([scores[n] for n in draw.integers(0, 300, 300)]) for _ in range(4000)]  # the plain way
    ends = (fields["harness_low"], fields["harness_high"])
    # A 90 % interval would be narrower by some 0.006 on either side.
    assert ends == pytest.approx(np.percentile(draws, [2.5, 97.5]), abs=0.003)


def test_an_interval_of_scores_holds_their_mean_and_does_not_depend_on_the_rows_order():
    for scores in ([0.3] * 7, [1.0], [0.0, 1.0], scores_of(40)):
        low, high = bootstrap(scores)
        assert 0 <= low <= np.mean(scores) <= high <= 1
        assert bootstrap(scores[::-1]) == (low, high)
    assert evaluation.mean_score([0.25]) == (0.25, 0.0)


@hypothesis_settings(deadline=None, max_examples=30)
@given(st.lists(st.sampled_from([-0.5, -0.25, 0.0, 0.1, 0.3, 0.3]), min_size=1, max_size=7))
def test_the_p_value_of_few_differences_is_the_share_of_all_choices_of_signs(differences):
    signs = list(product((-1, 1), repeat=len(differences)))
    sums = [abs(sum(sign * value for sign, value in zip(choice, differences))) for choice in signs]
    far = sum(one >= abs(sum(differences)) - 1e-9 for one in sums)
    assert sign_flips(np.array(differences)) == pytest.approx(far / len(signs))


def test_the_p_value_of_many_differences_is_near_the_exact_one_and_never_0():
    differences = np.array([0.1 * n - 0.3 for n in range(14)])
    sums = np.array(list(product((-1, 1), repeat=14))) @ abs(differences)
    exact = (abs(sums) >= abs(differences.sum()) - 1e-9).mean()
    assert 0.001 < exact < 0.1 and sign_flips(differences) == pytest.approx(exact, abs=0.004)
    assert sign_flips(np.full(50, 0.1)) == 1 / 10_001


def test_two_lists_of_scores_are_compared_row_by_row():
    first, second = scores_of(60), scores_of(60, seed=2)
    second[:5] = first[:5]
    found, back = compare_scores(first, second), compare_scores(second, first)
    differences = [b - a for a, b in zip(first, second)]
    assert (found["n"], found["scores"]) == (60, True)
    assert (found["gained"], found["lost"]) == (sum(d > 0 for d in differences), sum(d < 0 for d in differences))
    assert (back["gained"], back["lost"], back["p"]) == (found["lost"], found["gained"], found["p"])
    assert found["difference"] == pytest.approx(sum(differences) / 60)
    error = np.std(differences, ddof=1) / 60**0.5
    assert (found["low"], found["high"]) == pytest.approx(
        (found["difference"] - 1.96 * error, found["difference"] + 1.96 * error), abs=0.25 * error
    )
    same = compare_scores(first, first)
    assert (same["difference"], same["low"], same["high"], same["p"]) == (0, 0, 0, 1)
    with pytest.raises(ValueError):
        compare_scores([0.5], [0.5, 0.25])


TEXTS = [
    {"id": str(n), "question": f"say {n}", "answer": f"this is {n}", "references": [f"this is {n}", f"{n} it is"]}
    for n in range(6)
]


def writer(die_after=None):
    """An Answerer that writes texts, near to one reference or the other, and may die."""

    def generate(task, rows, prompt, settings, done):
        for number, row in enumerate(rows):
            if number == die_after:
                raise Killed
            if row["id"] not in done:
                text = ["", f" this is {row['id']}\n", f"so {row['id']} it is now"][number % 3]
                yield [Generation(row, text, "", 3, False)]

    return Answerer("m", ("m", "float32"), generate)


def of_texts(folder, answerer):
    task = own_task("generation", "")
    return evaluate_once(Evaluation(answerer, task, "dev", TEXTS, "say it .", settings()), folder, "best")


def test_a_generated_text_has_one_reading_and_the_best_score_over_its_references(tmp_path):
    result = of_texts(tmp_path, writer())
    found = {p["id"]: p for p in read_jsonl(tmp_path / "predictions.jsonl")}
    assert [found[str(n)]["answer"] for n in range(3)] == [None, "this is 1", "so 2 it is now"]
    scores = [p["correct"] for p in found.values()]
    assert scores[:3] == [0.0, 1.0, rouge_l(["2 it is"], "so 2 it is now")] and 0.7 < scores[2] < 0.8
    assert all(p["harness_correct"] == p["correct"] and p["harness_answer"] == p["answer"] for p in found.values())
    assert (result["kind"], result["unread"]) == ("generation", 1 / 3)
    assert result["accuracy"] == result["harness_accuracy"] == pytest.approx(np.mean(scores))
    assert (result["low"], result["high"]) == bootstrap(scores)
    assert evaluation.estimate([result], "paper")[:3] == (result["accuracy"], result["low"], result["high"])
    assert evaluation.estimate([result], "paper").low != evaluation.wilson(3, 6)[0]


def test_a_killed_evaluation_of_texts_ends_the_same_and_can_be_graded_again(tmp_path):
    (tmp_path / "whole").mkdir()
    whole = of_texts(tmp_path / "whole", writer())
    for after in (1, 4):
        folder = tmp_path / str(after)
        folder.mkdir()
        with pytest.raises(Killed):
            of_texts(folder, writer(after))
        assert without_time(of_texts(folder, writer())) == without_time(whole)
        name = "predictions.jsonl"
        assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
        ((old, new),) = regrade(folder, own_task("generation", ""), {"dev": TEXTS})
        assert old == new
    longer = [row | {"references": [*row["references"], "so it is now"]} for row in TEXTS]
    with pytest.raises(UserError, match="other questions or answers"):
        regrade(folder, own_task("generation", ""), {"dev": longer})


# --- Two readings of one generation ---------------------------------------------------------------------------


ROWS = [
    {"id": "a", "question": "tom has 3 pens . how many pens ?", "answer": "3"},
    {"id": "b", "question": "ann has 20 pens . how many pens ?", "answer": "20"},
]


def test_each_reading_looks_at_its_own_text(demo_task):
    def generate(task, rows, prompt, settings, done):
        yield [Generation(rows[1], "4 + 5 = 20", "tom", 5, True)]
        yield [Generation(rows[0], "1 + 2 = 3 .", "5", 6, False)]

    answerer = Answerer("m", ("m", "float32"), generate)
    found = evaluate(answerer, demo_task, ROWS, "find this .", settings(max_new_tokens=9))
    assert [(p["id"], p["gold"], p["answer"], p["correct"]) for p in found] == [
        ("a", "3", "5", False),
        ("b", "20", None, False),
    ]
    assert [(p["harness_answer"], p["harness_correct"]) for p in found] == [("3", True), ("20", True)]
    assert [(p["tokens"], p["truncated"], p["text"], p["reply"]) for p in found] == [
        (6, False, "1 + 2 = 3 .", "5"),
        (5, True, "4 + 5 = 20", "tom"),
    ]
    record = evaluation.summarize(found)
    assert (record["accuracy"], record["harness_accuracy"], record["correct"], record["n"]) == (0.0, 1.0, 0, 2)
    assert (record["unread"], record["harness_unread"], record["truncated"]) == (0.5, 0.0, 0.5)
    assert (record["mean_tokens"], record["grader_version"]) == (5.5, GRADER_VERSION)


# --- On disk: nothing twice, nothing lost ---------------------------------------------------------------------


class Killed(Exception):
    pass


def stub(name="m", batch=2, die_after=None, log=None):
    """An Answerer that answers rows in batches, right for every other row, and may die."""

    def generate(task, rows, prompt, settings, done):
        for number, start in enumerate(range(0, len(rows), batch)):
            if number == die_after:
                raise Killed
            missing = [row for row in rows[start : start + batch] if row["id"] not in done]
            if log is not None:
                log.extend(row["id"] for row in missing)
            right = {row["id"]: row["answer"] if int(row["id"]) % 2 else "0" for row in missing}
            yield [Generation(row, f"it is {right[row['id']]}", right[row["id"]], 3, False) for row in missing]

    return Answerer(name, (name, "float32"), generate)


@pytest.fixture
def many():
    return [{"id": str(i), "question": f"{i} + 1", "answer": str(i + 1)} for i in range(7)]


def of(rows, answerer=None, prompt="find this .", split="dev", **changes):
    return Evaluation(answerer or stub(), own_task(), split, rows, prompt, settings(**changes))


def once(folder, rows, answerer=None, role="best", name=None, **changes):
    return evaluate_once(of(rows, answerer, **changes), folder, role, name)


def without_time(record):
    return {key: value for key, value in record.items() if key != "minutes"}


def test_what_was_evaluated_is_not_evaluated_again_and_what_differs_is(tmp_path, many):
    log = []
    first = once(tmp_path, many, stub(log=log))
    assert (first["correct"], first["n"], first["role"]) == (3, 7, "best")
    assert (first["prompt_hash"], first["task"], first["model"]) == (text_hash("find this ."), "own", "m")
    assert once(tmp_path, many, stub(log=log)) == first
    assert once(tmp_path, many, stub(log=log), role="initial") == first | {"role": "initial"}
    assert once(tmp_path, many, stub(log=log), role="baseline", name="x") == first | {"role": "baseline", "name": "x"}
    other = once(tmp_path, many, stub(log=log), role="baseline", name="y")
    assert other["name"] == "y" and once(tmp_path, many, role="candidate") == first | {"role": "candidate"}
    assert len(log) == 7
    once(tmp_path, many, stub(log=log), split="test")
    once(tmp_path, many, stub("other", log=log))
    once(tmp_path, many, stub(log=log), max_new_tokens=3)
    once(tmp_path, many, stub(log=log), prompt="tell this .")
    once(tmp_path, [many[0] | {"answer": "9"}, *many[1:]], stub(log=log))
    assert len(log) == 5 * 7 + 1  # of the last, a single row differs
    predictions = read_jsonl(tmp_path / "predictions.jsonl")
    keys = [(p["split"], p["prompt_hash"], p["evaluation"], p["id"]) for p in predictions]
    assert len(keys) == len(set(keys)) == 6 * 7
    assert len(read_jsonl(tmp_path / "results.jsonl")) == 10


def test_the_key_of_an_evaluation_depends_on_all_that_its_texts_depend_on(many):
    task = own_task("choice", choices=("A", "B"), template="{question} {prompt}")
    same = Evaluation(stub(), task, "dev", many, "find this .", settings())
    others = [
        {"answerer": stub("other")},
        {"answerer": Answerer("m", ("m", "bfloat16"), None)},
        {"task": own_task("choice", choices=("A", "B", "C"), template=task.template)},
        {"task": own_task("boolean", choices=("A", "B"), template=task.template)},
        {"task": own_task("choice", choices=("A", "B"), template="{question}\n{prompt}")},
        {"task": own_task("choice", "It is $", choices=("A", "B"), template=task.template)},
        {"rows": many[:-1]},
        {"rows": [many[0] | {"question": "2 + 3"}, *many[1:]]},
        {"settings": settings(max_new_tokens=13)},
    ]
    keys = {replace(same, **other).key for other in others}
    assert len(keys) == len(others) and same.key not in keys
    assert replace(same, settings=settings(batch_size=3)).key == same.key


@pytest.mark.parametrize(("cut", "said"), [(9, True), (8, True), (7, False), (0, False)])
def test_reasonings_that_are_all_cut_are_said_after_the_first_of_them_and_once(many, tmp_path, capsys, cut, said):
    """The rows that come first decide: in a batch those that end by themselves do."""
    rows = [many[0] | {"id": str(n)} for n in range(20)]

    def generate(task, rows, prompt, settings, done):
        for n, row in enumerate(rows):
            if row["id"] not in done:
                if n == 9:  # behind it, it is too late
                    assert ("eos_token_id" in capsys.readouterr().err) is said
                yield [Generation(row, "1", "1", 1, n < cut or n > 9)]

    answerer = Answerer("m", ("m", "float32"), generate)
    evaluate_once(Evaluation(answerer, own_task(), "dev", rows, "find this .", settings()), tmp_path, "best")
    assert "eos_token_id" not in capsys.readouterr().err


# What the first version of the records holds: an evaluation that is on a user's disk must stay valid.
RECORDED_ROWS = [{"id": str(i), "question": f"{i} + 1", "answer": str(i + 1)} for i in range(3)]
RECORDED_PREDICTIONS = """\
{"split": "dev", "prompt_hash": "4aa75daec0028960", "evaluation": "dfbdfc41e0793446", "id": "0", "text": "it is 1", \
"reply": "1", "tokens": 3, "truncated": false, "gold": "1", "answer": "1", "correct": true, "harness_answer": "1", \
"harness_correct": true, "grader_version": 3}
{"split": "dev", "prompt_hash": "4aa75daec0028960", "evaluation": "dfbdfc41e0793446", "id": "1", "text": "it is 0", \
"reply": "none", "tokens": 3, "truncated": true, "gold": "2", "answer": null, "correct": false, \
"harness_answer": "0", "harness_correct": false, "grader_version": 3}
{"split": "dev", "prompt_hash": "4aa75daec0028960", "evaluation": "dfbdfc41e0793446", "id": "2", "text": "so 3", \
"reply": "3", "tokens": 4, "truncated": false, "gold": "3", "answer": "3", "correct": true, "harness_answer": "3", \
"harness_correct": true, "grader_version": 3}
"""
RECORDED_RESULT = """\
{"role": "best", "task": "own", "model": "m", "endpoint": "", "split": "dev", "prompt_hash": "4aa75daec0028960", \
"evaluation": "dfbdfc41e0793446", "extractor": "The answer is $", "kind": "number", \
"answer_space": "vocabulary", "rows": "c63590f5f4b1d3c0", "prompt": "find this .", "max_new_tokens": 12, "n": 3, \
"correct": 2, "accuracy": 0.6666666666666666, "stderr": 0.33333333333333337, \
"low": 0.20765960080204782, "high": 0.9385080552796038, "harness_accuracy": 0.6666666666666666, \
"harness_stderr": 0.33333333333333337, "harness_low": 0.20765960080204782, "harness_high": 0.9385080552796038, \
"unread": 0.3333333333333333, \
"harness_unread": 0.0, "truncated": 0.3333333333333333, "mean_tokens": 3.3333333333333335, "grader_version": 3, \
"minutes": 0.5}
"""


def older_result():
    """The recorded result as it was before results held the ends of intervals."""
    record = json.loads(RECORDED_RESULT)
    return {name: value for name, value in record.items() if not name.endswith(("low", "high"))}


def recorded_answerer():
    """It writes what the recorded predictions hold."""

    def generate(task, rows, prompt, settings, done):
        written = [Generation(rows[0], "it is 1", "1", 3, False), Generation(rows[1], "it is 0", "none", 3, True)]
        yield [generation for generation in written if generation.row["id"] not in done]
        yield [Generation(rows[2], "so 3", "3", 4, False)]

    return Answerer("m", ("m", "float32"), generate)


def silent_answerer():
    """It may be asked for no row that is not done."""

    def generate(task, rows, prompt, settings, done):
        assert {row["id"] for row in rows} == done
        yield from ()

    return Answerer("m", ("m", "float32"), generate)


def test_the_keys_of_evaluations_are_those_of_the_records_that_users_have():
    assert of(RECORDED_ROWS, recorded_answerer()).key == "dfbdfc41e0793446"
    server = Answerer("s", ("server", "s", "continue"), None)
    task = own_task("choice", "It is $", ("A", "B"), template="{question} {prompt}", answer_space="vocabulary")
    there = Evaluation(server, task, "test", RECORDED_ROWS, "", settings(max_new_tokens=7))
    assert (there.key, there.prompt_hash) == ("932177d7a2626bcd", "e3b0c44298fc1c14")
    assert replace(there, task=replace(task, answer_space="")).key != there.key  # another reading


def without_checks(path):
    """The text of a file each of whose lines ends with a check, without these."""
    text, checks = re.subn(r', "record_check": "[0-9a-f]{16}"}$', "}", path.read_text(), flags=re.M)
    assert checks == text.count("\n")
    return text


def test_the_files_of_an_evaluation_are_the_recorded_ones_byte_for_byte_with_a_check_in_each_line(
    tmp_path, monkeypatch
):
    clock = iter([60.0, 90.0])
    monkeypatch.setattr(evaluation.time, "perf_counter", lambda: next(clock))
    once(tmp_path, RECORDED_ROWS, recorded_answerer())
    written = without_checks(tmp_path / "predictions.jsonl")
    assert re.sub(r', "row_key": "[0-9a-f]{16}"}$', "}", written, flags=re.M) == RECORDED_PREDICTIONS
    keys = [prediction["row_key"] for prediction in read_jsonl(tmp_path / "predictions.jsonl")]
    assert keys == [of([row], recorded_answerer()).key for row in RECORDED_ROWS]
    assert without_checks(tmp_path / "results.jsonl") == RECORDED_RESULT
    once(tmp_path, RECORDED_ROWS, silent_answerer(), role="baseline", name="empty")
    labelled = RECORDED_RESULT.replace('"best"', '"baseline"').replace("}", ', "name": "empty"}')
    assert without_checks(tmp_path / "results.jsonl") == RECORDED_RESULT + labelled


def test_a_recorded_evaluation_is_found_again_and_recorded_predictions_are_not_made_again(tmp_path):
    (tmp_path / "predictions.jsonl").write_text(RECORDED_PREDICTIONS)
    result = once(tmp_path, RECORDED_ROWS, silent_answerer())
    assert without_time(result) == without_time(json.loads(RECORDED_RESULT))
    (tmp_path / "predictions.jsonl").unlink()  # it is not even looked at
    for known in (json.loads(RECORDED_RESULT), older_result()):
        write_jsonl(tmp_path / "results.jsonl", [known])
        assert once(tmp_path, RECORDED_ROWS, silent_answerer()) == known


def test_an_older_result_without_an_interval_gets_it_when_it_is_graded_again(tmp_path):
    (tmp_path / "predictions.jsonl").write_text(RECORDED_PREDICTIONS)
    write_jsonl(tmp_path / "results.jsonl", [older_result()])
    assert len(older_result()) == len(json.loads(RECORDED_RESULT)) - 4
    regrade(tmp_path, own_task(), {"dev": RECORDED_ROWS})
    assert read_jsonl(tmp_path / "results.jsonl") == [json.loads(RECORDED_RESULT)]


def test_minutes_are_those_of_the_generation(tmp_path, many, monkeypatch):
    clock = iter([60.0, 180.0])
    monkeypatch.setattr(evaluation.time, "perf_counter", lambda: next(clock))
    assert once(tmp_path, many)["minutes"] == 2


def test_the_predictions_of_a_result_are_its_own_and_complete(tmp_path, many):
    first, second = once(tmp_path, many), once(tmp_path, many, stub("other", batch=3))
    path = tmp_path / "predictions.jsonl"
    lines = read_jsonl(path)
    write_jsonl(path, [p | {"text": p["evaluation"]} for p in reversed(lines)])
    for record in (first, second):
        found = evaluation.read_predictions(tmp_path, record, many)
        assert [(p["id"], p["text"]) for p in found] == [(row["id"], record["evaluation"]) for row in many]
    write_jsonl(path, [p for p in lines if (p["evaluation"], p["id"]) != (second["evaluation"], "4")])
    evaluation.read_predictions(tmp_path, first, many)
    with pytest.raises(UserError, match="lacks row .*'4'"):
        evaluation.read_predictions(tmp_path, second, many)


@pytest.mark.parametrize("file, field", [("predictions", "id"), ("predictions", "text"), ("predictions", "tokens")])
def test_a_line_without_a_field_is_named(tmp_path, many, file, field):
    with pytest.raises(Killed):
        once(tmp_path, many, stub(die_after=2))
    path = tmp_path / f"{file}.jsonl"
    lines = read_jsonl(path)
    write_jsonl(path, [lines[0], {key: value for key, value in lines[1].items() if key != field}])
    with pytest.raises(UserError, match=f"{file}.jsonl, line 2: no {field}"):
        once(tmp_path, many)


def test_a_results_line_without_a_field_is_named(tmp_path, many):
    once(tmp_path, many)
    path = tmp_path / "results.jsonl"
    [record] = read_jsonl(path)
    for field in ("role", "split", "prompt_hash", "accuracy", "minutes", "n"):
        write_jsonl(path, [{key: value for key, value in record.items() if key != field}])
        for action in (lambda: once(tmp_path, many), lambda: regrade(tmp_path, own_task(), {"dev": many})):
            with pytest.raises(UserError, match=f"results.jsonl, line 1: no {field}"):
                action()


@pytest.mark.parametrize("torn", [0, 1, 30])
def test_a_killed_evaluation_goes_on_with_the_rows_it_lacks_and_ends_the_same(tmp_path, many, torn):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir(), killed.mkdir()
    expected = once(whole, many)
    with pytest.raises(Killed):
        once(killed, many, stub(die_after=2))
    path = killed / "predictions.jsonl"
    content = path.read_bytes()
    assert content.count(b"\n") == 4 and not (killed / "results.jsonl").exists()
    path.write_bytes(content[: len(content) - torn])  # the last line, cut while it was written
    log = []
    assert without_time(once(killed, many, stub(log=log))) == without_time(expected)
    assert log == [row["id"] for row in many[3 if torn > 1 else 4 :]]
    by_id = [sorted(map(json.dumps, read_jsonl(folder / "predictions.jsonl"))) for folder in (whole, killed)]
    assert by_id[0] == by_id[1]


def test_an_unfinished_evaluation_is_not_mixed_with_another_model_or_other_rows(tmp_path, many):
    with pytest.raises(Killed):
        once(tmp_path, many, stub(die_after=1))
    for changed in ({"answerer": stub("other")}, {"max_new_tokens": 3}):
        with pytest.raises(UserError, match="unfinished evaluation of 'find this .' on dev"):
            once(tmp_path, many, **changed)
    with pytest.raises(UserError, match="unfinished evaluation"):
        once(tmp_path, [many[0] | {"answer": "9"}, *many[1:]])
    once(tmp_path, many, stub("other"), split="test")  # another split and another prompt do not meet it
    once(tmp_path, many, stub("other"), prompt="tell this .")
    once(tmp_path, many)
    once(tmp_path, many, stub("other"))  # finished, it stands beside the other


# --- What was answered counts in other evaluations ------------------------------------------------------------


def rights(folder, result, rows):
    return [(p["id"], p["text"], p["correct"]) for p in evaluation.read_predictions(folder, result, rows)]


@pytest.mark.parametrize("old", [False, True], ids=["with keys of rows", "from before there were any"])
def test_of_more_rows_only_those_are_generated_that_fewer_did_not_hold(tmp_path, many, old):
    whole, grown, log = tmp_path / "whole", tmp_path / "grown", []
    whole.mkdir(), grown.mkdir()
    once(grown, many[:3])
    path = grown / "predictions.jsonl"
    if old:
        write_jsonl(path, [{k: v for k, v in p.items() if k != "row_key"} for p in read_jsonl(path)])
    found, expected = once(grown, many, stub(log=log)), once(whole, many)
    assert log == ["3", "4", "5", "6"] and without_time(found) == without_time(expected)
    assert rights(grown, found, many) == rights(whole, expected, many)
    for result, _ in regrade(grown, own_task(), {"dev": many}):  # the smaller one is still there, and whole
        assert result["n"] in (3, 7)
    once(grown, many, stub(log=log))
    assert len(log) == 4


def test_rows_of_an_unfinished_evaluation_count_in_one_of_more_and_in_one_of_fewer_rows(tmp_path, many):
    for rows, generated in ((many, ["4", "5", "6"]), (many[:5], ["4"])):
        folder, log = tmp_path / str(len(rows)), []
        folder.mkdir()
        with pytest.raises(Killed):
            once(folder, many[:6] if rows is many else many, stub(die_after=2))
        assert once(folder, rows, stub(log=log))["n"] == len(rows)
        assert log == generated


@pytest.mark.parametrize(
    "other",
    [
        {"answerer": stub("other")},
        {"answerer": Answerer("m", ("m", "bfloat16"), stub().generate)},
        {"max_new_tokens": 13},
        {"prompt": "tell this ."},
        {"rows": [{"id": str(i), "question": f"{i} + 2", "answer": str(i + 1)} for i in range(3)]},
    ],
    ids=["model", "dtype", "limit", "prompt", "questions"],
)
@pytest.mark.parametrize("old", [False, True])
def test_what_was_asked_otherwise_does_not_count(tmp_path, many, other, old):
    log = []
    once(tmp_path, **{"rows": many[:3]} | other)
    if old:
        path = tmp_path / "predictions.jsonl"
        write_jsonl(path, [{k: v for k, v in p.items() if k != "row_key"} for p in read_jsonl(path)])
    once(tmp_path, many, stub(log=log))
    assert log == [row["id"] for row in many]


def test_what_was_answered_in_another_folder_counts_and_stays_as_it_is_there(tmp_path, many):
    here, there, log = tmp_path / "here", tmp_path / "there", []
    here.mkdir(), there.mkdir()
    once(there, many[2:5])
    before = (there / "predictions.jsonl").read_bytes()
    found = evaluate_once(of(many, stub(log=log)), here, "transfer", "x", [there, tmp_path / "nowhere"])
    assert log == ["0", "1", "5", "6"] and found["n"] == 7 and found["correct"] == 3
    assert (there / "predictions.jsonl").read_bytes() == before
    assert evaluate_once(of(many[3:5], stub(log=log)), here, "transfer", "y", [there])["n"] == 2 and len(log) == 4


def test_an_evaluation_that_is_killed_behind_rows_taken_from_elsewhere_ends_the_same_in_the_same_batches(
    tmp_path, many
):
    batches = []

    def generate(task, rows, prompt, settings, done):
        batches.append([row["id"] for row in rows])
        yield from stub(die_after=1 if len(batches) == 1 else None).generate(task, rows, prompt, settings, done)

    once(tmp_path, many[:3])
    for _ in range(2):
        answerer = Answerer("m", ("m", "float32"), generate)
        if not batches:
            with pytest.raises(Killed):
                once(tmp_path, many, answerer)
    found = once(tmp_path, many, answerer)
    assert batches == [["3", "4", "5", "6"]] * 2 and found["correct"] == 3


def test_texts_that_count_again_are_graded_by_the_present_grader(tmp_path, many):
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir(), there.mkdir()
    expected = once(there, many)
    path = there / "predictions.jsonl"
    wrong = {"answer": "wrong", "correct": False, "harness_correct": False, "grader_version": 0}
    write_jsonl(path, [p | wrong for p in read_jsonl(path)])
    found = evaluate_once(of(many, stub(die_after=0)), here, "best", None, [there])
    assert without_time(found) == without_time(expected)


def test_of_a_continued_run_one_prompt_is_the_best_and_what_was_evaluated_stays(tmp_path, many):
    for prompt, role in (("one .", "candidate"), ("one .", "best"), ("two .", "best")):
        once(tmp_path, many, role=role, prompt=prompt)
    once(tmp_path, many, role="best", prompt="one .", split="test")
    evaluation.rename_former_best(tmp_path, "two .")
    found = [(r["prompt"], r["role"], r["split"]) for r in evaluation.read_results(tmp_path / "results.jsonl")]
    assert found == [("one .", "candidate", "dev"), ("two .", "best", "dev"), ("one .", "candidate", "test")]
    before = (tmp_path / "results.jsonl").read_bytes()
    evaluation.rename_former_best(tmp_path, "two .")
    assert (tmp_path / "results.jsonl").read_bytes() == before
    assert once(tmp_path, many, stub(die_after=0), role="best", prompt="one .")["role"] == "best"


def test_the_bootstrap_interval_is_that_of_resampled_rows_and_of_right_answers_that_of_compare():
    rng = np.random.default_rng(1)
    differences = rng.choice([-1, -1 / 3, 0, 1 / 3, 1], 300, p=[0.1, 0.1, 0.3, 0.3, 0.2])
    draws = [differences[rng.integers(0, 300, 300)].mean() for _ in range(8000)]  # the plain way
    assert evaluation.bootstrap(list(differences)) == pytest.approx(tuple(np.percentile(draws, [2.5, 97.5])), abs=0.005)
    whole = compare([False] * 6 + [True] * 4, [True] * 8 + [False] * 2)
    found = evaluation.bootstrap([1] * 6 + [0] * 2 + [-1] * 2)
    assert found == pytest.approx((whole["low"], whole["high"]), abs=0.11)  # on so few rows a step is 0.1


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda lines: [lines[0] | {"id": "99"}, *lines[1:]], "99 is no row of own's dev split"),
        (lambda lines: [*lines, lines[0]], "two predictions of row 0"),
        (lambda lines: [lines[0] | {"grader_version": 0}, *lines[1:]], "--regrade"),
    ],
)
def test_predictions_that_are_not_of_these_rows_stop_the_evaluation(tmp_path, many, change, message):
    with pytest.raises(Killed):
        once(tmp_path, many, stub(die_after=2))
    path = tmp_path / "predictions.jsonl"
    write_jsonl(path, change(read_jsonl(path)))
    before = path.read_bytes()
    with pytest.raises(UserError, match=message):
        once(tmp_path, many)
    assert path.read_bytes() == before


# --- Grading again ----------------------------------------------------------------------------------------------


def test_grading_again_reads_the_kept_texts_with_the_present_grader(tmp_path, many):
    fresh = [once(tmp_path, many), once(tmp_path, many, split="test")]
    path = tmp_path / "predictions.jsonl"
    truth = read_jsonl(path)
    old = {"answer": "wrong", "correct": False, "harness_answer": None, "harness_correct": False, "grader_version": 0}
    write_jsonl(path, [p | old for p in truth])
    stale = [r | {"correct": 0, "accuracy": 0.0, "harness_accuracy": 0.0, "grader_version": 0} for r in fresh]
    write_jsonl(tmp_path / "results.jsonl", stale)
    with pytest.raises(UserError, match="--regrade"):
        once(tmp_path, many)
    changes = regrade(tmp_path, own_task(), {"train": [], "dev": many, "test": many})
    assert changes == list(zip(stale, fresh))
    assert read_jsonl(path) == truth and read_jsonl(tmp_path / "results.jsonl") == fresh
    assert once(tmp_path, many) == fresh[0]


@pytest.mark.parametrize(
    "file, change, message",
    [
        ("predictions", lambda lines: [*lines[:-1], lines[-1] | {"id": "99"}], "line 7: 99 is no row of own's dev"),
        ("predictions", lambda lines: lines[:-1], "counts 7 rows, .* has 6 predictions of 6"),
        ("predictions", lambda lines: [lines[0], *lines], "counts 7 rows, .* has 8 predictions of 7"),
        ("predictions", lambda lines: [{**lines[0], "text": None}, *lines[1:]], "line 1: no text"),
        ("results", lambda lines: [lines[0] | {"task": "gsm8k"}], "is of the task gsm8k, not own"),
    ],
)
def test_grading_again_writes_nothing_when_texts_and_rows_do_not_belong_together(tmp_path, many, file, change, message):
    once(tmp_path, many)
    path = tmp_path / "predictions.jsonl"
    write_jsonl(path, [p | {"correct": False} for p in read_jsonl(path)])  # so that writing would show
    path = tmp_path / f"{file}.jsonl"
    write_jsonl(path, change(read_jsonl(path)))
    before = [(tmp_path / f"{name}.jsonl").read_bytes() for name in ("results", "predictions")]
    with pytest.raises(UserError, match=message):
        regrade(tmp_path, own_task(), {"dev": many})
    assert before == [(tmp_path / f"{name}.jsonl").read_bytes() for name in ("results", "predictions")]


def test_grading_again_refuses_other_gold_answers_and_an_empty_folder(tmp_path, many):
    with pytest.raises(UserError, match="holds no evaluation"):
        regrade(tmp_path, own_task(), {"dev": many})
    once(tmp_path, many)
    with pytest.raises(UserError, match="other questions or answers of the same ids"):
        regrade(tmp_path, own_task(), {"dev": [many[0] | {"answer": "5"}, *many[1:]]})

"""What stages 2 and 3 print about results: the tables against hand-made records, and the verdict."""

import re

import pytest
from conftest import own_task
from made_runs import result

from support import tables
from support.evaluation import compare, compare_scores


def verdict(gained, lost, n, first_dev=0.75, initial_dev=0.5):
    """The verdict on a best prompt that gains and loses so many of n test rows; and the two dev accuracies."""
    prompts = [
        {"prompt": "check it .", "initial": False, "dev_accuracy": first_dev},
        {"prompt": "read it .", "initial": True, "dev_accuracy": initial_dev},
    ]
    initial = [False] * gained + [True] * (n - gained)
    best = [True] * gained + [False] * lost + [True] * (n - gained - lost)
    return tables.verdict(prompts, compare(initial, best))


# --- The verdict ------------------------------------------------------------------------------------------------


def test_a_prompt_that_is_clearly_better_or_worse_on_test_is_called_so():
    # Of 11 rows that differ 2 against 9: p = 2 * (1 + 11 + 55) / 2 ** 11 = 0.0654; of 9 rows 1 against 8: 0.0391.
    assert verdict(8, 1, 200) == "On test the best prompt is better than the initial one by 7 rows of 200, p = 0.039."
    assert verdict(1, 8, 200) == "On test the best prompt is worse than the initial one by 7 rows of 200, p = 0.039."


@pytest.mark.parametrize(
    ("gained", "lost", "count", "p"),
    [
        (9, 2, "7 rows of 200 more right", "0.065"),
        (2, 9, "7 rows of 200 fewer right", "0.065"),
        (1, 0, "1 row of 200 more right", "1"),
        (3, 3, "0 rows of 200 more right", "1"),
    ],
)
def test_a_difference_that_chance_explains_is_called_none_whichever_way_it_goes(gained, lost, count, p):
    assert verdict(gained, lost, 200) == (
        "On test there is no difference between the best and the initial prompt that could be told from chance: "
        f"{count}, p = {p}, not below 0.05."
    )


def test_where_the_initial_prompt_comes_first_nothing_better_was_found():
    initial = {"prompt": "read it .", "initial": True, "dev_accuracy": 0.5}
    nothing = "The best prompt is the initial one: nothing better was found."
    assert tables.verdict([initial], compare([True], [True])) == nothing
    same_text = initial | {"initial": False}  # of other tokens
    assert tables.verdict([same_text, initial], compare([True], [True])) == nothing


@pytest.mark.parametrize(("gained", "lost"), [(9, 0), (0, 9), (1, 1)])
def test_a_prompt_that_is_worse_on_dev_is_never_called_best(gained, lost):
    text = verdict(gained, lost, 20, first_dev=0.25)
    assert text.startswith("On dev the chosen prompt is worse than the initial one (25.0 against 50.0 %)")
    assert "best" not in text and text.count("the chosen") == 2


def test_a_prompt_that_is_only_equal_on_dev_is_told():
    assert verdict(9, 0, 20, first_dev=0.5).startswith("On dev the chosen prompt is no better than the initial one")


@pytest.mark.parametrize(
    ("p", "text"), [(0.0391, "0.039"), (2e-81, "2e-81"), (0.0499, "0.049900"), (0.0504, "0.05"), (1.0, "1")]
)
def test_a_p_value_is_short_but_shows_on_which_side_of_the_threshold_it_is(p, text):
    assert tables.p_text(p) == text
    assert (float(text) < 0.05) == (p < 0.05)


# --- Tables -----------------------------------------------------------------------------------------------------


def test_the_accuracies_of_both_readings_stand_beside_what_went_wrong_in_the_generation():
    results = [result("initial", "test", 1.0, 20, harness=0.5), result("best", "test", 0.0, 20, harness=1.0)]
    head, *lines = tables.accuracy_table(["initial, test", "a label that is longer"], results).splitlines()
    assert re.split(r" {2,}", head) == ["", "paper, %", "harness, %", "unread", "cut", "tokens"]
    assert [re.split(r" {2,}", line) for line in lines] == [
        ["initial, test", "100.0 (83.9 to 100.0)", "50.0 (29.9 to 70.1)", "25.0 %", "12.5 %", "31.5"],
        ["a label that is longer", "0.0 (0.0 to 16.1)", "100.0 (83.9 to 100.0)", "25.0 %", "12.5 %", "31.5"],
    ]
    assert len({len(line) for line in (head, *lines)}) == 1  # columns stand below their heads


def prediction(correct, harness_correct):
    return {"correct": correct, "harness_correct": harness_correct}


def test_the_last_prompt_is_compared_with_each_of_the_others_in_both_readings():
    worse = [prediction(False, True)] * 8 + [prediction(True, True)] * 2
    same = [prediction(True, False)] * 10
    text = tables.comparison_table("best", ["initial", "other"], [worse, same, same])
    head, *lines = text.splitlines()
    assert head.startswith("best against  reading   difference  95 % interval")
    found = [re.split(r" {2,}", re.sub(r"to +", "to ", line)) for line in lines]
    assert [cells[:3] + cells[4:] for cells in found] == [
        ["initial", "paper", "+80.0 %", "8", "0", "0.0078"],
        ["initial", "harness", "-100.0 %", "0", "10", "0.002"],
        ["other", "paper", "+0.0 %", "0", "0", "1"],
        ["other", "harness", "+0.0 %", "0", "0", "1"],
    ]


def test_a_prompt_stands_behind_its_label_and_no_prompt_is_said_to_be_none():
    assert tables.prompt_list(["empty", "given 1"], ["", "check it ."]).splitlines() == [
        "empty     (none)",
        "given 1   check it .",
    ]


# --- Answers by the right one -------------------------------------------------------------------------------------


def answered(gold, answer):
    return {"gold": gold, "answer": answer}


def test_a_confusion_table_counts_what_was_read_where_each_answer_is_right():
    task = own_task("label", choices=("Account access", "Billing", "Other"))
    predictions = [answered("Billing", "Billing")] * 3 + [answered("Billing", "Account access")]
    predictions += [answered("Account access", "Billing"), answered("Account access", None)]
    head, *lines = tables.confusion_table(task, predictions).splitlines()
    assert head.split() == ["right", "answer,", "read", "as", "1", "2", "3", "unread", "right,", "%"]
    cells = [re.split(r" {2,}", line) for line in lines]
    assert cells == [
        ["1 Account access", "0", "1", "0", "1", "0.0 (0.0 to 65.8)"],
        ["2 Billing", "1", "3", "0", "0", "75.0 (30.1 to 95.4)"],
        ["3 Other", "0", "0", "0", "0", "no row"],
    ]
    assert len({len(line) for line in (head, *lines)}) == 1


def test_very_many_answers_have_no_columns():
    task = own_task("label", choices=tuple(f"label {n}" for n in range(21)))
    head, first, *_ = tables.confusion_table(task, [answered("label 0", "label 1")] * 2).splitlines()
    assert head.split() == ["right", "answer", "unread", "right,", "%"]
    assert re.split(r" {2,}", first) == ["1 label 0", "0", "0.0 (0.0 to 65.8)"]


# --- Generated texts ----------------------------------------------------------------------------------------------


def scored(scores):
    return [{"correct": score, "harness_correct": score} for score in scores]


def test_texts_have_one_reading_in_the_tables():
    of_texts = result("best", "dev", 0.4, kind="generation", low=0.31, high=0.52)
    head, line = tables.accuracy_table(["best"], [of_texts]).splitlines()
    assert "ROUGE-L, %" in head and "harness" not in head and "40.0 (31.0 to 52.0)   25.0 %" in line
    assert "bootstrap" in tables.legend_of([of_texts]) and "Wilson" in tables.legend_of([result("best", "dev", 0.4)])
    first, second = [0.1, 0.2, 0.3, 0.0], [0.2, 0.4, 0.2, 0.0]
    head, line = tables.comparison_table("best", ["initial"], [scored(first), scored(second)]).splitlines()
    assert head.endswith("gained  lost  p (sign flips)")
    change = compare_scores(first, second)
    assert re.search(rf"^initial +ROUGE-L +\+5.0 %  .*  2     1  {change['p']:.2g}$", line) and change["p"] == 0.75


@pytest.mark.parametrize(
    ("difference", "words"),
    [
        (0.1, "the best prompt is better than the initial one by 10.0 points of ROUGE-L, p = 0.0039."),
        (-0.1, "the best prompt is worse than the initial one by 10.0 points of ROUGE-L, p = 0.0039."),
        (0.0, "could be told from chance: 0.0 points of ROUGE-L more, p = 1, not below 0.05."),
    ],
)
def test_the_verdict_on_texts_is_in_points_of_the_mean_score(difference, words):
    prompts = [
        {"prompt": "check it .", "initial": False, "dev_accuracy": 0.75},
        {"prompt": "read it .", "initial": True, "dev_accuracy": 0.5},
    ]
    assert tables.verdict(prompts, compare_scores([0.5] * 9, [0.5 + difference] * 9)).endswith(words)


def test_one_answer_to_all_test_rows_is_said_at_the_end_of_a_run():
    rows = [{"answer": "A", "gold": gold} for gold in "ABA"]
    (warning,) = tables.one_answer(rows)
    assert "every test row is answered with 'A'" in warning
    assert tables.one_answer([*rows, {"answer": "B", "gold": "B"}]) == []
    assert tables.one_answer([row | {"gold": "A"} for row in rows]) == []
    assert tables.one_answer([row | {"answer": None} for row in rows]) == []

"""Reading: the answer in what a model wrote, as a person reads it, and grading."""

import pytest
from conftest import own_task

from support.harness import grade_harness, read_answer_harness
from support.reading import grade, read_answer
from support.tasks import TASKS

NUMBER, LETTERS = own_task(), own_task("choice", choices="ABCDEFGHI")

WORDS = own_task("boolean", choices=("Yes", "No"))

LONGER = own_task("boolean", choices=("no", "no idea"))

TEXT = own_task("text")


@pytest.mark.parametrize(
    ("task", "text", "expected"),
    [
        (NUMBER, "8", "8"),
        (NUMBER, " 1,250.00$.", "1250"),
        (NUMBER, "-12$, since", "-12"),
        (NUMBER, "-$5", "-5"),
        (NUMBER, "\N{MINUS SIGN}5", "-5"),
        (NUMBER, "-0", "0"),
        (NUMBER, "0", "0"),
        (NUMBER, "0.50 and 3", "0.5"),
        (NUMBER, "none", None),
        (NUMBER, "", None),
        (LETTERS, " B", "B"),
        (LETTERS, " (C) because", "C"),
        (LETTERS, "I think that it is D.", "D"),
        (LETTERS, "A", "A"),
        (LETTERS, "I", "I"),
        (LETTERS, "A or rather (B)", "B"),
        (LETTERS, "unsure: AB, C", "C"),
        (LETTERS, " b", None),
        (LETTERS, " Z", None),
        (WORDS, " yes.", "Yes"),
        (WORDS, "NO", "No"),
        (WORDS, "nothing", None),
        (LONGER, "no idea", "no idea"),
        (TEXT, " ] ] $\nmore", "] ]"),
        (TEXT, "the answer is: a b c.", "a b c"),
        (TEXT, " \n", None),
    ],
)
def test_the_paper_reading_takes_the_first_answer_or_null(task, text, expected):
    assert read_answer(task, text) == expected


@pytest.mark.parametrize(
    ("task", "text", "expected"),
    [
        # The quirks of the flexible extraction are kept, so that its numbers can be compared.
        ("gsm8k", "3 left, in 2 days", "2"),
        ("gsm8k", "so $1,250.00.", "1250.00"),
        ("gsm8k", "18...", "18.."),
        ("gsm8k", "nothing", None),
        ("bbh/object_counting", "I count 1,000", "000"),
        ("bbh/object_counting", "from 3-5", "3-5"),
        ("bbh/object_counting", "seven or eight objects", "8"),
        ("bbh/navigate", "No. Yes, we do", "Yes"),
        ("bbh/navigate", "YES", None),
        ("bbh/formal_fallacies", "invalid, not valid", "valid"),
        ("bbh/boolean_expressions", "True and False is False", "False"),
        ("bbh/sports_understanding", "It is not plausible", "no"),
        ("bbh/web_of_lies", "Elanor does not tell the truth", "No"),
        ("bbh/web_of_lies", "so Elanor tells the truth", "Yes"),
        ("bbh/hyperbaton", "(A) is wrong, so (B)", "B"),
        ("bbh/hyperbaton", "It must be the big old dog", "B"),
        ("bbh/hyperbaton", "old big dog, big old dog, old big dog", "A"),
        ("bbh/hyperbaton", "The answer is: A", "A"),
        ("bbh/hyperbaton", "B", None),
        ("bbh/word_sorting", "cat, b&w dog", "cat b&w dog"),
        ("bbh/word_sorting", "first dog. Sorted: b&w cat dog", "b&w cat dog"),
        ("bbh/word_sorting", "cat dog", None),
        ("bbh/dyck_languages", "[ ] then ] )", "] )"),
    ],
)
def test_the_harness_reading_follows_the_flexible_rules_with_their_quirks(task, text, expected):
    question = "Sort: List: dog b&w cat" if "sorting" in task else "?\nOptions:\n(A) old big dog\n(B) big old dog"
    assert read_answer_harness(TASKS[task], question, text) == expected


GOLDS = {"number": ["0", "-35", "1234", "7"], "text": ["] } )", "barn damp delmarva"]}


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_gold_is_right_alone_and_in_a_sentence_and_a_constant_wrong_answer_never(task):
    golds = GOLDS.get(task.kind, task.choices)
    for gold in golds:
        shown = f"({gold})" if task.kind == "choice" else gold
        question = f"Sort: List: {' '.join(reversed(gold.split()))}"
        for text in (shown, f"So, after all of this, the answer is {shown}."):
            assert grade(task, gold, read_answer(task, text)), text
            if task.kind != "text" or task.name.endswith("word_sorting") == gold[0].isalpha():
                assert grade_harness(gold, read_answer_harness(task, question, text)), text
        assert not grade(task, gold, read_answer(task, "zzz 999999"))
        assert not grade(task, gold, None) and not grade_harness(gold, None)


def test_grading_compares_numbers_as_numbers_and_the_harness_as_strings():
    assert grade(NUMBER, "1250", "1,250.00") and not grade(NUMBER, "-5", "5") and not grade(NUMBER, "5", "wrong")
    assert not grade_harness("1250", "1250.00") and grade_harness("valid", "VALID")
    assert grade(TEXT, "a b", " A  b.")


def test_the_harness_reading_of_words_as_choices_is_the_last_of_them_whatever_signs_they_have():
    task = own_task("choice", choices=("C++", "C", "Java (old)"))
    text = "First C, then Java (old), at last C++ it is."
    assert read_answer_harness(task, "Which?", text) == "C++"
    assert read_answer_harness(task, "Which?", "It is Java (old)") == "Java (old)"

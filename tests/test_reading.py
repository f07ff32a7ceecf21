"""Reading: the answer in what a model wrote, as a person reads it, and grading."""

import time

import pytest
from conftest import own_task
from hypothesis import given, settings
from hypothesis import strategies as st

from support.harness import grade_harness, read_answer_harness
from support.reading import canonical, canonical_number, grade, read_answer
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
        (NUMBER, "0.50 in 3 days", "0.5"),
        (NUMBER, "none", None),
        (NUMBER, "", None),
        (LETTERS, " B", "B"),
        (LETTERS, " (C) because", "C"),
        (LETTERS, "I think that it is D.", "D"),
        (LETTERS, "A", "A"),
        (LETTERS, "I", "I"),
        (LETTERS, "A or rather (B)", "B"),
        (LETTERS, "unsure: AB, C", "C"),
        (LETTERS, " b", "B"),
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
def test_the_paper_reading_finds_an_answer_or_null(task, text, expected):
    assert read_answer(task, text) == expected


# Kinds of trouble: {kind: {what was written: the answer that a person reads there}}; None: one cannot settle on any.
NUMBERS = {
    "the value of an expression": {
        "12 * 5 = 60 dollars": "60",
        "He has 12 + 8 = 20 eggs.": "20",
        "12 + 8 = 20 - 5 = 15": "15",
        "3 + 4 = 7, 7 * 2 = 14": "14",
        "24 \u00f7 3 = 8": "8",
        "60x7=420": "420",
        "12 times 5 is 60": "60",
        "5 more than 3 is 8": "8",
        "10 minus 4 is 6": "6",
        "-5 - 3 = -8": "-8",
        "5 apples + 3 apples = 8 apples": "8",
        "$420 = 60 * 7": "420",
        "6 * 7": None,
        "2 * 3 =": None,
        "4 x": None,
        "200 + 300 = 500 + 100": None,
    },
    "fractions, times, powers and units": {
        "3/4": None,
        "2 1/2": None,
        "2\u00bd": None,
        "$\\frac{3}{4}$": None,
        "10:45": None,
        "5pm": None,
        "10^3": None,
        "5\u00b2": None,
        "2^5 = 32": "32",
        "2e5": "200000",
        "1.5 \u00d7 10^3": "1500",
        "5 feet 3 inches": None,
        "2 hours and 15 minutes": None,
        "3 dozen": None,
        "2 and a half": None,
        "2024-01-05": None,
        "1.2.3": None,
        "3rd": None,
        "$1.5 million": "1500000",
        "18 dollars and 50 cents": None,
        "20% of 50": None,
        "5 kg 300 g": None,
        "6 ft. 2 in.": None,
        "\u221a16": None,
        "5<sup>2</sup>": None,
        "42kg": "42",
        "20 miles per hour": "20",
    },
    "lists and ranges": {
        "3, 4 and 5": None,
        "between 5 and 7": None,
        "5 or 6": None,
        "x = 5 or x = -5": None,
        "x > 5": None,
        "3;4": None,
        "18 to 20": None,
        "10\u201312": None,
        "$5 - $10": None,
        "5 out of 6": None,
        "18 eggs and 2 hens": None,
        "The 3 friends have 18 eggs": None,
    },
    "separators": {
        "1,234,567": "1234567",
        "1\u202f234.5": "1234.5",
        "1'234": "1234",
        "1,23": None,
        "12,34": None,
        "1,2345": None,
        "1.234,50": None,
        "7 8": None,
    },
    "signs": {
        "\u22125": "-5",
        "\u2212 5": "-5",
        "\u20137": "-7",
        "negative 7": "-7",
        "minus $5": "-5",
        "x = - 3": "-3",
        "-$1,250": "-1250",
        "$-5": "-5",
        "\u2022 18": "18",
        "\u2013 18 apples": "18",
        "The answer - 18": "18",
        "The answer \u2014 18": "18",
        "COVID-19": None,
        "+5": "5",
    },
    "denials and reasons": {
        "it isn't 15, it's 17": "17",
        "17, not 15": "17",
        "It is not 15": None,
        "42, because 40 + 3 = 43": "42",
        "There are 3 friends. The answer is 17.": "17",
        "How many of the 5 are left? 2": "2",
        "7. The farmer has 3": "7",
        "8.\n\nQuestion: there are 5 dogs": "8",
    },
    "markup and neighbours": {
        "*17*": "17",
        "`17`": "17",
        "_17_": "17",
        "\u201c17\u201d": "17",
        "$$17$$": "17",
        "\\boxed{\\text{17}}": "17",
        "<b>17</b>": "17",
        "### 17": "17",
        "\u7b54\u6848\u662f17\u4e2a": "17",
        "\uff11\uff17\u500b": "17",
        "\u0664\u0662": "42",
        "x2 and y": None,
    },
    "many digits": {"1" * 40: "1" * 40, "-" + "9" * 31 + ".50": "-" + "9" * 31 + ".5", "1e999999999": None},
}
OPTIONS = {
    "a lower-case word behind the letter": {
        "C is right because A is wrong": "C",
        "A because": "A",
        "D \u2014 the rib": "D",
        "A femur": None,
        "A man walked": None,
        "I'd say D": "D",
    },
    "denials": {
        "D, not B": "D",
        "neither A nor B, but C": "C",
        "C instead of A": "C",
        "It can't be A, so D": "D",
        "A and B are incorrect. C.": "C",
        "not C": None,
        "The answer is not B": None,
        "Is it A? No, it is B.": "B",
    },
    "several options": {
        "A or B": None,
        "(A) or (B)": None,
        "B, C": None,
        "A to D": None,
        "A) x B) y C) z": None,
        "A) x\nB) y\nThe answer is B": "B",
        "B, although C is tempting": "B",
    },
    "lower case": {"b": "B", "b)": "B", "Option b": "B", "The correct option is b.": "B", "the answer is a dog": None},
    "markup and neighbours": {
        "**Answer: C**": "C",
        "_B_": "B",
        "'B'": "B",
        "\\text{(B)}": "B",
        "\u6b63\u89e3\u306fB\u3067\u3059": "B",
        "\uff08\uff22\uff09": "B",
        "B-cells": None,
        "ABCD": None,
    },
}
SAID = {  # {task: {what was written: the answer}}
    "bbh/formal_fallacies": {
        "The argument is not deductively valid": "invalid",
        "isn\u2019t invalid": "valid",
        "valid, not invalid": "valid",
        "cannot be considered valid": "invalid",
        "The conclusion does not follow, so it is invalid": "invalid",
        "valid or invalid: valid": "valid",
        "valid/invalid": None,
        "The argument is valid: false": None,
        "whether it is valid or not": None,
        "I do not think it is valid": None,
        "hardly valid": None,
        "Is it valid? Invalid.": "invalid",
        "_valid_": "valid",
        "validity": None,
        "val\u0131d": None,
    },
    "bbh/navigate": {
        "Yes/No: Yes": "Yes",
        "Without a doubt, yes": "Yes",
        "No problem, yes": "Yes",
        "Yes. No player could": "Yes",
        "No he did not": "No",
        "No one knows": None,
        "yes, no": None,
        "Yes and no": None,
        "\u201cNo\u201d": "No",
        "\u662fYes": "Yes",
    },
    "bbh/boolean_expressions": {
        "not False": "True",
        "True and False is False": "False",
        "True and not False = True": "True",
        "not ( True and False )": None,
        "not not True": None,
        "True or False": None,
    },
    "bbh/sports_understanding": {"implausible": "no", "not implausible": "yes", "no way this is plausible": None},
    "bbh/web_of_lies": {"Vina lies": "No", "does not tell the truth": "No", "Yes, since Fidel lies": "Yes"},
    "bbh/dyck_languages": {"The closing brackets are }>.": "} >", "**] )**": "] )", "> ) ]": "> ) ]"},
    "bbh/word_sorting": {
        "ape, bee, and cow": "ape bee cow",
        "1. ape\n2. bee\n3. cow": "ape bee cow",
        "The sorted words are: ape bee cow.": "ape bee cow",
        '"ape", "bee"': "ape bee",
    },
}


def cases(table):
    return [pytest.param(text, right, id=text) for kind in table.values() for text, right in kind.items()]


@pytest.mark.parametrize(("text", "right"), cases(NUMBERS))
def test_a_number_is_read_as_a_person_reads_it(text, right):
    assert read_answer(NUMBER, text) == right


@pytest.mark.parametrize(("text", "right"), cases(OPTIONS))
def test_an_option_letter_is_read_as_a_person_reads_it(text, right):
    assert read_answer(own_task("choice", choices="ABCD"), text) == right


@pytest.mark.parametrize("name", SAID)
def test_words_of_a_task_are_read_as_a_person_reads_them(name):
    assert {text: read_answer(TASKS[name], text) for text in SAID[name]} == SAID[name]


@pytest.mark.parametrize(
    ("choices", "texts"),
    [
        (("yes", "no", "maybe"), {"Maybe.": "maybe", "I have no idea": None, "yes or no or maybe": None}),
        (
            ("positive", "very positive", "not sure"),
            {
                "VERY positive": "very positive",
                "positive": "positive",
                "not positive": None,
                "Not sure": "not sure",
            },
        ),
        (("spam", "not spam"), {"this is not spam.": "not spam", "Spam": "spam", "isn't spam": "not spam"}),
        (("credit_card", "other"), {"Credit card": "credit_card", "**credit_card**": "credit_card"}),
    ],
)
def test_labels_are_read_in_any_case_among_other_words_and_the_longest_of_several(choices, texts):
    task = own_task("label", choices=choices)
    assert {text: read_answer(task, text) for text in texts} == texts


# --- Properties ------------------------------------------------------------------------------------------------

KINDS = [NUMBER, LETTERS, WORDS, LONGER, TEXT, *(TASKS[name] for name in SAID)]
WRITTEN = st.lists(st.one_of(st.text(max_size=5), st.sampled_from([*" ()=*-,.?_", *SAID["bbh/navigate"], *"AB15"])))


@settings(max_examples=200, deadline=None)
@given(pieces=WRITTEN, task=st.sampled_from(KINDS))
def test_reading_never_raises_and_gives_a_possible_answer_or_null(pieces, task):
    answer = read_answer(task, "".join(pieces))
    if answer is not None:
        assert grade(task, answer, answer)
        assert not task.choices or answer in task.choices


@settings(max_examples=300, deadline=None)
@given(
    number=st.decimals(allow_nan=False, allow_infinity=False, places=2, min_value=-(10**35), max_value=10**35),
    shown=st.sampled_from(
        ["{}", "{:,}", "${}", "**{}**", "The answer is {}.", "2 + 2 = {}", "x = {:,}", "{} apples\nQ"]
    ),
)
def test_reading_a_formatted_number_gives_it_back(number, shown):
    assert read_answer(NUMBER, shown.format(number)) == canonical_number(str(number))
    assert grade(NUMBER, str(number), read_answer(NUMBER, shown.format(number)))


@settings(max_examples=200, deadline=None)
@given(task=st.sampled_from(KINDS), one=st.text(max_size=8), other=st.text(max_size=8))
def test_grading_is_symmetric_and_nothing_equals_what_cannot_be_read(task, one, other):
    assert grade(task, one, other) == grade(task, other, one)
    assert grade(task, one, one) == (canonical(task, one) is not None)


@pytest.mark.parametrize("piece", ["5 ", "1,", "a ", "(", "*", "A or ", "yes or ", "<a", "not ", "a?"])
@pytest.mark.parametrize("task", [NUMBER, LETTERS, WORDS, TEXT], ids=lambda task: task.kind)
def test_a_long_reply_is_read_at_once(task, piece):
    start = time.perf_counter()
    read_answer(task, piece * 50_000)
    assert time.perf_counter() - start < 5


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

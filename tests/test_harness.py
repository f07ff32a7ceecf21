"""The harness reading: the same grade as lm-evaluation-harness's own filters and metric give, text by text.

The comparison needs `pip install lm-eval==0.4.12`, the release whose rules we follow; without it, only the table of
known quirks is tested.
"""

import random
from importlib import metadata
from pathlib import Path

import pytest
from conftest import own_task

from support.harness import grade_harness, read_answer_harness
from support.tasks import TASKS

RELEASE = "0.4.12"
IN_HARNESS = ["gsm8k", *(name for name in TASKS if name.startswith("bbh/"))]
OPTIONS = "Which?\nOptions:\n(A) The Godfather\n(B) The Godfather Part II\n(C) Up, up (and away)\n(D) $5.00!"
NO_WORDS = f"{OPTIONS}\n(E) ..."  # an option whose text is nothing: no text of an option is found any more
LIST = "Sort the words: List: dog b&w cat catfish dog"


def questions_of(name):
    if name == "bbh/word_sorting":
        return [LIST, "No list"]
    return [OPTIONS, OPTIONS, NO_WORDS, "No options"] if TASKS[name].kind == "choice" else ["How many?"]


# Pieces of replies: what the filters look for, what is nearly that, and what small models write around it.
COMMON = [
    "So ",
    "the answer is ",
    "The answer is: ",
    "\n",
    ". ",
    ", ",
    " ",
    "Let's think step by step. ",
    '"',
    ":",
    "**",
]
NUMBERS = [
    "12",
    "-3",
    "$1,250.00",
    "1,000",
    "18.",
    "5-3",
    "#### 7",
    "...",
    "$",
    "-",
    " 8 ",
    "3.5",
    "60 * 7 = $420.",
    "\u00b2",
]
NUMBER_WORDS = (
    "six seven eight nine eighteen eighty twelve twenty thirty-five hundred thousand million zero often one two"
)
NUMBER_WORDS = [*NUMBER_WORDS.split(), " and ", "&", "forty", "for", "trillion", "Three"]
WORDS = ["Yes", "no", "No", "YES", "True", "False", "true", "valid", "Invalid", "invalid", "not valid", "plausible"]
WORDS += ["not plausible", "implausible", "The truth is no", "tells the truth", "does not tell the truth", "Vina lies"]
WORDS += ["is telling the truth", "is not telling the truth", "doesn't tell the truth", "Yes_", "nobody"]
LETTERS = ["(A)", "(B)", "(b)", "(Z)", "B", ": C", ":D", "Answer: Because", "the godfather", "The Godfather Part II"]
LETTERS += ["Up up and away", "up up", "$5.00!", "500", "5.00", "A) The Godfather", "\u201cThe Godfather\u201d", "(C"]
BRACKETS = ["] ) }", "])}", "`] )`", '"] )"', "<", "> ]", " ( ", "} >.", "[ ] then ]"]
LISTED = ["dog", "b&w", "cat", "catfish", "cat,dog", "**dog**", "Dog", "b&w cat", "dog_", "cat-dog", "w"]
PIECES = {"number": NUMBERS + NUMBER_WORDS, "boolean": WORDS, "choice": LETTERS, "text": BRACKETS + LISTED}
# What SmolLM2-135M-Instruct wrote, shortened.
RECORDED = [
    "60 * 7 = $420.\n",
    "To find the total, we add 16 eggs and 3 eggs: 16 + 3 = 19 eggs.\nSo Janet has 19 eggs left",
    "The correct answer is (B) because the sentence says that the mechanic called to thank the customer.",
    "Step 1: Fidel tells the truth. Step 2: Jerry says Fidel tells the truth. Therefore, Jerry lies.",
    "The expression not ( True ) and ( True ) is False.\nThe answer is False",
    "I have a total of eight fruits.",
    "There are twenty one objects in all, one hundred and two of them, two million three thousand.",
    "Sorted: b&w cat catfish dog",
    "The sequence is closed by ] ) } in that order",
    "",
]


def written(name, count=400):
    """Recorded texts, and as many generated ones, always the same."""
    rng = random.Random(name)
    own = PIECES[TASKS[name].kind]
    yield from RECORDED
    for _ in range(count):
        pieces = [rng.choice(own if rng.random() < 0.6 else COMMON) for _ in range(rng.randrange(1, 9))]
        yield rng.choice(["", " "]).join(pieces)


def golds_of(name):
    if TASKS[name].choices:
        return TASKS[name].choices
    return {"gsm8k": ("420", "1250", "18", "7"), "bbh/dyck_languages": ("] ) }", "])}", "] )", "} >")}.get(
        name,
        ("b&w cat catfish dog", "dog", "cat dog") if name == "bbh/word_sorting" else ("8", "12", "-3", "121", "32"),
    )


class RealHarness:
    """lm-evaluation-harness's flexible extraction and exact match of one task."""

    def __init__(self, name):
        import lm_eval.tasks
        from lm_eval.filters import build_filter_ensemble
        from lm_eval.tasks._yaml_loader import load_yaml

        folder = Path(lm_eval.tasks.__file__).parent
        task = name.removeprefix("bbh/")
        path = "gsm8k/gsm8k-cot-zeroshot.yaml" if task == "gsm8k" else f"bbh/cot_zeroshot/{task}.yaml"
        config = load_yaml(folder / path)
        [flexible] = [part for part in config["filter_list"] if part["name"] == "flexible-extract"]
        steps = [(step["function"], {k: v for k, v in step.items() if k != "function"}) for step in flexible["filter"]]
        self.filters = build_filter_ensemble("flexible-extract", steps)
        [metric] = config["metric_list"]
        self.rules = {
            key: metric[key] for key in ("ignore_case", "ignore_punctuation", "regexes_to_ignore") if key in metric
        }

    def read(self, question, text):
        """What the filters find; None where they raise."""
        from lm_eval.api.instance import Instance

        doc = {"input": question, "question": question}
        instance = Instance("generate_until", doc, ("", {}), 0, resps=[text])
        try:
            self.filters.apply([instance])
        except (ValueError, IndexError):
            return None
        return instance.filtered_resps["flexible-extract"]

    def is_right(self, gold, found):
        from lm_eval.api.metrics import exact_match_hf_evaluate

        return bool(exact_match_hf_evaluate(predictions=[found], references=[gold], **self.rules)["exact_match"])


@pytest.mark.parametrize("name", IN_HARNESS)
def test_every_text_is_graded_as_the_real_filters_and_metric_do(name):
    pytest.importorskip("lm_eval")
    if metadata.version("lm_eval") != RELEASE:
        pytest.skip(f"lm-eval {metadata.version('lm_eval')} has other rules than {RELEASE}")
    real, task, questions = RealHarness(name), TASKS[name], questions_of(name)
    graded = set()
    for n, text in enumerate(written(name)):
        question = questions[n % len(questions)]
        found = real.read(question, text)
        answer = read_answer_harness(task, question, text)
        for gold in golds_of(name):
            shown = f"({gold})" if task.kind == "choice" else gold
            right = found is not None and real.is_right(shown, found)
            graded.add(right)
            assert grade_harness(gold, answer) == right, (text, gold, answer, found)
            assert grade_harness(shown, answer) == right
        if found in (None, "[invalid]"):
            assert answer is None, (text, found)
        elif answer is not None:  # the same answer, whatever the gold one is
            assert grade_harness(found, answer), (text, answer, found)
        else:
            assert not real.is_right("1", found) and not found.strip('.,$"'), (text, found)
    assert graded == {True, False}


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
        ("bbh/object_counting", "eleven or eight objects", "11"),
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
        ("bbh/word_sorting", "cat dog", "cat dog"),
        ("bbh/dyck_languages", "[ ] then ] )", "] )"),
    ],
)
def test_the_harness_reading_follows_the_flexible_rules_with_their_quirks(task, text, expected):
    question = "Sort: List: dog b&w cat" if "sorting" in task else "?\nOptions:\n(A) old big dog\n(B) big old dog"
    assert read_answer_harness(TASKS[task], question, text) == expected


def test_the_harness_reading_of_words_as_choices_is_the_last_of_them_whatever_signs_they_have():
    task = own_task("choice", choices=("C++", "C", "Java (old)"))
    text = "First C, then Java (old), at last C++ it is."
    assert read_answer_harness(task, "Which?", text) == "C++"
    assert read_answer_harness(task, "Which?", "It is Java (old)") == "Java (old)"

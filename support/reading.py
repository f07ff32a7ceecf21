"""Reading an answer out of what a model wrote behind the extractor, and grading it: the `paper` reading.

The reading of lm-evaluation-harness stands in harness.py.
"""

import re
from decimal import Decimal, InvalidOperation

GRADER_VERSION = 2  # raise it whenever an answer could be read or graded differently, here or in harness.py


def canonical_number(text):
    """A number without sign of currency, thousands separators or idle zeros: "$1,250.00" -> "1250"; None if none."""
    plain = re.sub(r"[\s,$]", "", text.replace("\N{MINUS SIGN}", "-"))
    if not re.fullmatch(r"[-+]?(\d+\.?\d*|\.\d+)", plain):
        return None
    try:
        return format(Decimal(plain).normalize() + 0, "f")
    except InvalidOperation:
        return None


def canonical(task, answer):
    """The form in which two answers are compared, or None for no answer."""
    if answer is None:
        return None
    if task.kind == "number":
        return canonical_number(answer)
    return " ".join(answer.split()).strip("$ .").casefold() or None


def grade(task, gold, answer):
    """Whether `answer` (None: none was found) is the gold answer."""
    return answer is not None and canonical(task, answer) == canonical(task, gold)


def read_answer(task, text):
    """The `paper` reading: the first possible answer in what the model writes behind the extractor, or None."""
    if task.kind == "number":
        found = re.search(r"[-\N{MINUS SIGN}]?\$?\s?(\d[\d,]*\.?\d*|\.\d+)", text)
        return canonical_number(found.group().rstrip(".,")) if found else None
    if task.choices:
        return first_choice(task, text)
    line = text.strip().splitlines()[0] if text.strip() else ""
    return re.split(r"answer is:?\s*", line)[-1].strip("$ .") or None


def first_choice(task, text):
    """The first choice in parentheses, else the first that stands alone, as the task spells it; or None."""
    longest_first = sorted(task.choices, key=len, reverse=True)
    words = "|".join(map(re.escape, longest_first))
    in_parentheses = rf"\(({words})\)"
    alone = rf"(?<![\w'])({words})(?![\w'])"
    patterns = (in_parentheses, alone)
    if task.kind == "choice":  # "I think", "A man": such letters name an option only if no other does
        patterns = (in_parentheses, rf"{alone}(?! [a-z])", alone)
    for pattern in patterns:
        if found := re.search(pattern, text, word_case(task)):
            return as_choice(task, found.group(1))
    return None


def word_case(task):
    """Words are read in any case; letters as written, since "a" is a word."""
    return 0 if task.kind == "choice" else re.I


def as_choice(task, word):
    """The choice that is this word, whatever its case."""
    return next(choice for choice in task.choices if choice.casefold() == word.casefold())

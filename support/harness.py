"""The `harness` reading."""

import re
import string

#
# The `harness` reading: the flexible extraction of lm-evaluation-harness (commit 4e7e0d47f), from the reasoning
# itself, so that numbers can be compared with published ones. Its quirks are kept: see tests/test_tasks.py.

HARNESS_WORDS = {
    "bbh/sports_understanding": {
        "yes": r"\byes\b|\bplausible\b",
        "no": r"\bno\b|\bnot plausible\b|\bimplausible\b",
    },
    "bbh/web_of_lies": {
        "Yes": r"\byes\b|\btells the truth\b|\bis telling the truth\b",
        "No": r"\bno\b|\blies\b|\bis lying\b|\bdoes not tell the truth\b|\bdoesn't tell the truth\b",
    },
}
NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def read_answer_harness(task, question, text):
    """The last answer that lm-evaluation-harness's flexible rules find in `text`, or None."""
    if task.kind == "number":
        return last_bbh_number(text) if task.name.startswith("bbh/") else last_number(text)
    if task.kind in ("boolean", "label"):
        return last_word(task, text)
    if task.kind == "choice":
        are_letters = all(len(choice) == 1 for choice in task.choices)
        return last_option(task, question, text) if are_letters else last_word(task, text)
    if task.name == "bbh/dyck_languages":
        return last_brackets(text)
    if task.name == "bbh/word_sorting":
        return last_order(question, text)
    found = re.findall(r"answer is:?\s*(.+)", text)
    return found[-1].strip("$ .") if found else None


def last_number(text):
    numbers = re.findall(r"(-?[$0-9.,]{2,}|-?[0-9]+)", text)
    return plain_number(numbers[-1]) if numbers else None


def last_bbh_number(text):
    """The last number in digits, else the last in words."""
    numbers = re.findall(r"([-0-9]+)", text)
    if numbers:
        return plain_number(numbers[-1])
    words = re.findall(rf"\b({'|'.join(NUMBER_WORDS)})\b", text.lower())
    return str(NUMBER_WORDS.index(words[-1])) if words else None


def plain_number(text):
    return re.sub(r"[,$]", "", text).removesuffix(".")


def last_brackets(text):
    """dyck_languages: the last run of brackets, with one space between them."""
    runs = re.findall(r"[()\[\]{}<>](?:\s*[()\[\]{}<>])*", text)
    return " ".join(re.sub(r"\s", "", runs[-1])) if runs else None


def word_pattern(word):
    if word in ("Yes", "No"):
        return rf"\b(?:{word}|{word.lower()})\b"
    return rf"(?<!\w){re.escape(word)}(?!\w)"  # \b where the word ends in letters, as all known tasks' do


def last_word(task, text):
    """The choice whose pattern matches last; of matches that end together the longest ("not plausible")."""
    if task.name in HARNESS_WORDS:
        patterns = HARNESS_WORDS[task.name]
        text = text.lower()
    else:
        patterns = {choice: word_pattern(choice) for choice in task.choices}
    matches = []
    for choice, pattern in patterns.items():
        for match in re.finditer(pattern, text):
            matches.append((match.end(), len(match.group()), choice))
    return max(matches)[-1] if matches else None


def last_option(task, question, text):
    """`(B)` anywhere, else the text of an option, else `: B`; the last one found."""
    letters = re.findall(r"\(([A-Z])\)", text)
    if letters:
        return letters[-1]
    if letter := last_option_text(question, text):
        return letter
    letters = re.findall(rf":\s*({'|'.join(map(re.escape, task.choices))})\b", text)
    return letters[-1] if letters else None


def last_option_text(question, text):
    """The letter of the question's option whose text comes last, or None."""
    places = []
    for letter, option in re.findall(r"^\(([A-Z])\) (.*)$", question, re.M):
        words = without_punctuation(option).strip()
        place = without_punctuation(text).rfind(words)
        if words and place >= 0:
            places.append((place, letter))
    return max(places)[-1] if places else None


def without_punctuation(text):
    """The text in lower case, without punctuation."""
    return text.lower().translate(str.maketrans("", "", string.punctuation))


def last_order(question, text):
    """word_sorting: the listed words in the order of their last occurrences in the text."""
    words = question.rpartition("List:")[2].split()
    last_places = {}
    for word in words:
        starts = [match.start() for match in re.finditer(rf"(?<!\S){re.escape(word)}(?![\w&'])", text)]
        if not starts:
            return None
        last_places[word] = starts[-1]
    return " ".join(sorted(words, key=last_places.get))


def grade_harness(gold, answer):
    """lm-evaluation-harness's exact match: strings, whatever their case, so that 1250.00 is not 1250."""
    return answer is not None and answer.casefold() == gold.casefold().replace(",", "")

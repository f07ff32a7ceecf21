r"""The `harness` reading: the answer that lm-evaluation-harness finds in the reasoning itself, and its grade.

Its flexible extraction for zero-shot chain of thought (commit 4e7e0d47f, as in release 0.4.12), so that numbers can be
compared with published ones. All its quirks are kept: tests/test_harness.py compares every task with the real filters,
where that release is installed. In the harness the same patterns serve answers without reasoning, then with the first
match instead of the last. Tasks that it does not have are read as the BBH task of their kind.
"""

import re
import unicodedata

SYNONYMS = {  # what is looked for instead of the choice itself, in lower-case text
    "bbh/sports_understanding": {"no": ("no", "not plausible"), "yes": ("yes", "plausible")},
    "bbh/web_of_lies": {
        "No": ("no", "does not tell the truth", "is not telling the truth"),
        "Yes": ("yes", "tells the truth", "is telling the truth"),
    },
}


def read_answer_harness(task, question, text):
    """The last answer that lm-evaluation-harness's flexible rules find in `text`, as it compares it, or None."""
    return find_answer(task, question, text) or None


def find_answer(task, question, text):
    if task.kind == "number":
        return last_bbh_number(text) if task.name.startswith("bbh/") else last_number(text)
    if task.choices:
        are_letters = all(re.fullmatch("[A-Z]", choice) for choice in task.choices)
        return last_option(question, text) if are_letters else last_word(task, text)
    if task.name == "bbh/dyck_languages":
        runs = re.findall(r'["()\[\]{}<> ]+', text)  # one of spaces alone is an answer, too, and a wrong one
        return compared(runs[-1].strip()) if runs else None
    if task.name == "bbh/word_sorting":
        return compared(last_order(question, text))
    found = re.findall(r"answer is:?\s*(.+)", text)
    return found[-1].strip("$ .") if found else None


def grade_harness(gold, answer):
    """lm-evaluation-harness's exact match: strings, whatever their case, so that 1250.00 is not 1250.

    An option's letter may stand in parentheses in `gold`.
    """
    gold = re.sub(r"^\(([A-Z])\)$", r"\1", compared(gold).replace("$", ""))
    return answer is not None and answer.lower() == gold.lower()


def compared(text):
    """BBH's form of an answer for comparing: without a full stop, commas, line ends, backslashes and quotes."""
    return re.sub(r'[,\n\\"]', "", re.sub(r"\.$", "", text))


# --- Numbers ------------------------------------------------------------------------------------------------

SMALL = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen".split()
SMALL += "seventeen eighteen nineteen".split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
SCALES = {"thousand": 10**3, "million": 10**6, "billion": 10**9}
VALUES = {word: n for n, word in enumerate(SMALL)}
VALUES |= {word: 10 * n for n, word in enumerate(TENS, 2)} | {"hundred": 100} | SCALES


def number_word(after_stem, after_eight):
    """The pattern of one number word, with what may follow "six" and the like, and "eight"."""
    stems = "(?:twen|thir|for|fif|six|seven|nine)"
    rest = "ten|eleven|twelve|fourteen|hundred|thousand|(?:m|b|tr)illion"
    return rf"zero|one|two|three|four|five|{stems}(?:{after_stem})|eight(?:{after_eight})|{rest}"


# A quirk: at the end neither six, seven, eight nor nine is found. There are no word edges: "often" holds "ten".
FIRST_WORD = number_word("teen|ty", "|een|y")
MIDDLE_WORD = number_word("|teen|ty", "een|y") + r"|[^\S\r\n]|,|and|&"
LAST_WORD = number_word("teen|ty", "een|y")
IN_WORDS = re.compile(f"(?:(?:{FIRST_WORD})(?:{MIDDLE_WORD})+)?(?:{LAST_WORD})")


def last_number(text):
    """gsm8k: the last number, which may be any run of digits, points, commas and dollar signs."""
    numbers = re.findall(r"-?[$0-9.,]{2,}|-?[0-9]+", text)
    return re.sub(r"\.$", "", re.sub(r"[,$]", "", numbers[-1])) if numbers else None


def last_bbh_number(text):
    """The last run of digits and hyphens, else the last number in words."""
    numbers = re.findall(r"[-0-9]+", text)
    if numbers:
        return numbers[-1]
    in_words = IN_WORDS.findall(text.lower())
    value = value_of_words(in_words[-1].split()) if in_words else None
    return None if value is None else str(value)


def value_of_words(words):
    """The number that words make up, by the rules of the package word2number; None where it refuses them.

    It takes words for what their count suggests: of three the first two are multiplied and the third is added.
    """
    words = [word for word in words if word in VALUES]
    places = [words.index(scale) for scale in ("billion", "million", "thousand") if scale in words]
    if not words or places != sorted(places) or any(words.count(scale) > 1 for scale in SCALES):
        return None
    if len(words) == 1:
        return VALUES[words[0]]
    total, start = 0, 0
    for place in places:
        if place == start:
            return None
        total += together(words[start:place]) * VALUES[words[place]]
        start = place + 1
    # A quirk: a "thousand" at the end is counted again with what follows the "million".
    tails = [words[place + 1 :] for place in reversed(places) if place + 1 < len(words)] if places else [words]
    return total + (together(tails[0]) if tails else 0)


def together(words):
    numbers = [VALUES[word] for word in words]
    if len(numbers) in (3, 4):
        return numbers[0] * numbers[1] + sum(numbers[2:])
    if len(numbers) == 2:
        return numbers[0] * numbers[1] if 100 in numbers else sum(numbers)
    return numbers[0]


# --- Choices and lists ----------------------------------------------------------------------------------------


def last_word(task, text):
    """The choice that is found last; of those that end together the longest ("not plausible")."""
    patterns = {choice: word_pattern(choice) for choice in task.choices}
    if task.name in SYNONYMS:
        text = text.lower()
        patterns = {choice: rf"\b(?:{'|'.join(words)})\b" for choice, words in SYNONYMS[task.name].items()}
    matches = []
    for choice, pattern in patterns.items():
        for match in re.finditer(pattern, text):
            matches.append((match.end(), len(match.group()), choice))
    return max(matches)[-1] if matches else None


def word_pattern(word):
    if word in ("Yes", "No"):
        return rf"\b(?:{word}|{word.lower()})\b"
    return rf"(?<!\w){re.escape(word)}(?!\w)"  # \b where the word ends in letters, as all known tasks' do


def last_option(question, text):
    """The letter of the last `(B)`, else of the last text of an option, else of the last `: B`. An option's text whose
    spaces are lost on the way stands for no letter: it is the answer itself, and wrong."""
    if letters := re.findall(r"\(([A-Z])\)", text):
        return letters[-1]
    options = [without_punctuation(option.strip()) for option in re.findall(r"\([A-Z]\)([^\n^(]*)", question)]
    letters = [chr(ord("A") + n) for n in range(len(options))]  # in their order, whatever the question calls them
    found = re.findall("|".join(map(re.escape, options)), without_punctuation(text))
    if found and found[-1].strip():
        return dict(zip(options, letters)).get(found[-1].strip(), found[-1].strip())
    found = re.findall(rf":\s*({'|'.join(map(re.escape, letters))})", text)
    return found[-1] if found else None


def without_punctuation(text):
    """The text in lower case, without what Unicode calls punctuation ("$" and "+" are symbols)."""
    return "".join(char for char in text.lower() if not unicodedata.category(char).startswith("P"))


def last_order(question, text):
    """word_sorting: the listed words that occur, in the order of their last occurrences; "" if there is no list."""
    words = question.split("List:")[1].split() if "List:" in question else []
    try:  # a listed word is a pattern here, as it stands
        places = {
            match.group(): match.start() for match in re.finditer("|".join(rf"\b{word}\b" for word in words), text)
        }
    except re.error:
        return ""
    return " ".join(sorted(places, key=places.get))

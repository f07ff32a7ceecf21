"""Reading an answer out of what a model wrote behind the extractor, and grading it: the `paper` reading.

The aim is the answer that a person would read there, and null (None) where a person would not settle on one: an unread
answer counts as wrong, but a misread one may count as right. Every text is normalized once. Then each kind of answer
has patterns of its own: numbers, option letters, words of a closed set, free text. Of a task its kind, choices and name
are used. The reading of lm-evaluation-harness stands in harness.py.
"""

import re
import unicodedata
from dataclasses import dataclass
from decimal import Decimal

GRADER_VERSION = 3  # raise it whenever an answer could be read or graded differently, here or in harness.py
READ_AT_MOST = 2000  # characters: an answer stands near the extractor

# --- One normalization ------------------------------------------------------------------------------------

SIGNS = str.maketrans(
    {
        **dict.fromkeys("\u2010\u2011\u2012\u2013\ufe63", "-"),
        **dict.fromkeys("\u2014\u2015", " - "),  # long dashes separate, they are no sign
        **dict.fromkeys("\u201c\u201d\u201e\u00ab\u00bb\u300c\u300d", '"'),
        **dict.fromkeys("\u2018\u2019\u201a\u2032", "'"),
        **dict.fromkeys("\u00d7\u2715\u22c5\u2219\u00b7", "*"),
        **dict.fromkeys("\u00f7\u2044\u2215", "/"),
        **dict.fromkeys("\u2248\u2243\u2261", "="),
        **dict.fromkeys("\u2192\u21d2\u27f9", " = "),
        **dict.fromkeys("\u3002\uff0e", ". "),
        **dict.fromkeys("\u3001\uff0c", ", "),
        **dict.fromkeys("\u200b\u200c\u200d\u2060\ufeff\xad", ""),
        "\u2260": " not ",
        "\uff1a": ": ",
    }
)
MARKUP = (  # (pattern, what it becomes), in this order
    (r"\u2212\s*", "-"),  # the minus sign, which is never a dash
    (r"<sup>", "^"),
    (r"</?(?:[biup]|em|strong|br|span|div|code|answer|li|[uo]l|h\d|mark|font|sup)\b[^<>\n]*>", ""),
    (r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r"\1/\2"),
    *2 * ((r"\\(?:boxed|text\w*|math\w*)\s*\{([^{}]*)\}", r"\1"),),  # one in another
    (r"\\(?:times|cdot)(?![A-Za-z])", "*"),
    (r"\\div(?![A-Za-z])", "/"),
    (r"\{,\}", ","),
    (r"\\[,;: ]", " "),
    (r"\\[()\[\]]", ""),
    (r"\\(?=[$%#&_{}])", ""),
    (r"(?<![0-9A-Za-z)\]*_`~])[*_`~]+(?=[^\s*_`~])", ""),  # opens emphasis or code; "5 * 3" and "5*3" stay
    (r"(?<=[^\s*_`~])[*_`~]+(?![0-9A-Za-z(\[*_`~])", ""),  # closes it
    (r"(?m)^[ \t]*(?:[-*+\u2022\u25e6\u25aa]|#+)[ \t]+", ""),  # an item's or a heading's mark
)


def plain_character(character):
    """A character in its usual form: full-width or Arabic digits as 0 to 9, a raised 2 as ^2, one half as 1/2."""
    if character.isdecimal():
        return str(unicodedata.decimal(character))
    form = unicodedata.decomposition(character).partition(" ")[0]
    usual = unicodedata.normalize("NFKC", character) if form.startswith("<") else character
    return {"<super>": "^", "<fraction>": " ", "<sub>": "_"}.get(form, "") + usual


def normalize(text):
    """The text without markup, with the plain form of signs and dashes. What it means stays."""
    if not text.isascii():
        text = "".join(map(plain_character, text.translate(SIGNS))).translate(SIGNS)
    for pattern, plain in MARKUP:
        text = re.sub(pattern, plain, text)
    return text


def without_questions(text):
    """The text without the sentences that ask, if there are others: "Is it valid? No." -> "No."."""
    rest = re.sub(r"[^.!?\n]*\?", "", text)
    return rest if re.search(r"\w", rest) else text


def part_behind(pattern, text, wanted):
    """What follows the last match of the pattern, if what is wanted stands there; else the text."""
    *_, last = [0, *(match.end() for match in re.finditer(pattern, text, re.I))]
    return text[last:] if re.search(wanted, text[last:]) else text


ANSWER_IS = r"\b(?:answer|result)\b(?:\s+(?:is|was|would be|must be|should be)\b)?\s*[:=]?\s*"
REASON = r"\b(?:because|since|as|given that)\b"
CONCLUSION = r"\b(?:so|therefore|thus|hence)\b"

# --- Numbers ------------------------------------------------------------------------------------------------

VALUE = r"(?:[1-9]\d{0,2}(?:,\d{3})+|[1-9]\d{0,2}(?:[ '_]\d{3})+|\d+)(?:\.\d*)?(?:e[-+]?\d{1,2})?|\.\d+"
CURRENCY = "[$\u00a3\u20ac\u00a5\u20b9]"
SCALES = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
# A number with all that belongs to it, so that a fraction, a time or a power is seen as a whole and then refused.
QUANTITY = re.compile(
    rf"""(?<![A-Za-z0-9_.,])(?<![A-Za-z0-9_)]-)             # neither x2 nor COVID-19
    (?P<sign>[-+](?=\s?{CURRENCY}?-?\.?\d)(?!\s))?\s?{CURRENCY}?\s?(?P<inner_sign>-)?
    (?P<body>\.?\d(?:\d|[.,'_:/-](?=\d)|\^(?=-?\d)|[ ](?=\d{{3}}(?!\d))|e[-+]?(?=\d))*)
    (?:[ ](?P<scale>{"|".join(SCALES)})\b)?
    (?P<tail>\s?(?:dozens?|half|halves|thirds?|quarters?|fifths?|squared|cubed|o'clock|[ap]\.?m\b\.?)(?![A-Za-z])
      |[ ]and\ a\ (?:half|third|quarter)|\^|[A-Za-z][A-Za-z0-9]*)?""",
    re.X | re.I,
)
UNIT = r"(?:meters?|metres?|cm|kg|km|mph|kph|lbs?|oz|ft|in|mm|ml|g|l|m|h|s|min|hrs?|mins?|usd|eur|c|f|w|kw|gb|mb|yo)"
JOINED = re.compile(  # what stands between two numbers that make up one thing: an expression, a range, a list, 5 feet 3
    r"""[\s)]*|\s*(?:hours?|hrs?|h|minutes?|mins?|dollars?|feet|foot|ft|pounds?|lbs?|years?|months?|weeks?|days?|k?[gm])\s*
    |[\s%]*(?:[A-Za-z]+\s+){0,2}
      (?:[-+*/^:;,&~]|\.\.+|x|to|or|and|through|times|plus|minus|over|(?:divided|multiplied)\s+by|(?:out\s+)?of
        |(?:more|less|fewer)\s+than|per|every|,\s*(?:and|or))
      \s*(?:[A-Za-z]+\s+)?[($\u00a3\u20ac]?\s*
    |.*\bor\b.*""",
    re.X | re.I,
)
UNFINISHED = re.compile(r"\s*(?:[+*^]|x\b|!=)")  # an expression goes on, without a number
LIMIT = re.compile(r"[<>\u2264\u2265]=?\s*$")  # stands before a number that is only a limit
ABOUT = r"(?:(?:about|approximately|exactly|only|just|around|roughly|nearly|now|then|equal to|a total of)\s+)?"
NOTHING_BEFORE = re.compile(rf"[\s\"'(\[,]*(?:but )?{ABOUT}", re.I)
POINTS_AT = re.compile(rf"(?:\b(?:is|are|was|were|be|equals?|gives?|makes?|total|answer)|'s|:)[\s\"'(]*{ABOUT}$", re.I)
NEGATED_NUMBER = re.compile(
    rf"[,;]?\s*(?:\bnot|n't|\binstead\s+of|\brather\s+than)\s+(?:[a-z]+\s+){{0,2}}(?:{QUANTITY.pattern})", re.X | re.I
)
NUMBER_WORDING = (
    (r"\b(?:minus|negative)\s+(?=[$\u00a3\u20ac]?\.?\d)", "-"),
    (r"\b(?:equals|is equal to)\b", "="),
    (r"[-=]+>", "="),
    (r"(?:\\?\bsqrt|\u221a)\s*[({]?\s*(?=\d)", "root"),  # a number that is part of a word is none
    (r"\b(ft|in|hr|min|lbs?|oz)\.(?=\s)", r"\1"),
    (r"\s*=\s*(?:-\s*(?=\S))", " = -"),
    (r"\s*=\s*", " = "),
    (r"(?<=[\d.])\s*[*x]\s*10\^", "e"),
)


@dataclass(frozen=True)
class Quantity:
    """A number in a text, and where it stands. `value` is None if it is no plain number."""

    value: str | None
    start: int
    end: int


def exact(number):
    """A Decimal as text without idle zeros. All its digits stay, however many."""
    digits = format(number, "f")
    digits = digits.rstrip("0").rstrip(".") if "." in digits else digits
    return digits if digits.strip("-0.") else "0"


def value_of(match):
    """The number that a match of QUANTITY stands for, as text, or None."""
    body, tail = match["body"].lower(), (match["tail"] or "").lower()
    if not re.fullmatch(VALUE, body) or (match["sign"] == "-" and match["inner_sign"]):
        return None
    if tail and not re.fullmatch(UNIT, tail):
        return None
    sign = "-" if match["sign"] == "-" or match["inner_sign"] else ""
    number = Decimal(sign + re.sub("[, '_]", "", body))
    scale = SCALES[match["scale"].lower()] if match["scale"] else 0
    return exact(Decimal((*number.as_tuple()[:2], number.as_tuple().exponent + scale)))


def canonical_number(text):
    """A number without sign of currency, thousands separators or idle zeros: "$1,250.00" -> "1250"; None if none."""
    plain = re.sub(r"(?<=\d)\s*(?:%|\$|\u20ac)$|(?<=\d)\.$", "", normalize(text).strip())
    match = QUANTITY.fullmatch(plain.removeprefix("+"))
    return value_of(match) if match and not match["tail"] and not match["scale"] else None


def quantities(sentence):
    """The `Quantity`s of a sentence, in order. Those that belong together have no value of their own."""
    matches = list(QUANTITY.finditer(sentence))
    values = [value_of(match) for match in matches]
    for n, match in enumerate(matches):
        if UNFINISHED.match(sentence, match.end()) or LIMIT.search(sentence[: match.start()]):
            values[n] = None
    for n in range(1, len(matches)):
        if JOINED.fullmatch(sentence, matches[n - 1].end(), matches[n].start()):
            values[n - 1] = values[n] = None
    return [Quantity(value, match.start(), match.end()) for value, match in zip(values, matches)]


def read_number(text):
    """The number that a text gives as its answer, or None."""
    for pattern, plain in NUMBER_WORDING:
        text = re.sub(pattern, plain, text, flags=re.I)
    text = NEGATED_NUMBER.sub(" ", text)
    if re.match(r"\s*1[.)]\s+.*\d", text):
        return None  # the answer 1, or the first item of a list
    sentences = re.split(r"[.!?;](?=\s|$)|\n", text)
    first = next((sentence for sentence in sentences if QUANTITY.search(sentence)), "")
    if begins_with_number(sentences[0]):
        return number_of(first)
    if answer := re.search(ANSWER_IS + r"(?=.*\d)", text, re.I):
        return number_of(re.split(r"[.!?;](?=\s|$)|\n", text[answer.end() :])[0])
    return number_of(first)


def begins_with_number(sentence):
    found = QUANTITY.search(sentence)
    return bool(found and NOTHING_BEFORE.fullmatch(sentence[: found.start()]))


def number_of(sentence):
    """The number of one sentence: behind the last "=", at its beginning, what it points at, or the only one."""
    reason_free = re.split(REASON, sentence, maxsplit=1)[0]
    sentence = reason_free if QUANTITY.search(reason_free) else sentence
    found = quantities(sentence)
    results = [one for one in found if re.search(r"=\s*$", sentence[: one.start])]
    if results and results[-1].value is not None and "=" not in sentence[results[-1].end :]:
        return results[-1].value
    if found and found[0].value is not None and NOTHING_BEFORE.fullmatch(sentence[: found[0].start]):
        return found[0].value
    sentence = part_behind(CONCLUSION, sentence, r"\d")
    found = quantities(sentence)
    pointed_at = [one for one in found if POINTS_AT.search(sentence[: one.start])]
    values = {one.value for one in pointed_at or found}
    return values.pop() if len(values) == 1 else None


# --- Option letters -------------------------------------------------------------------------------------------

# The edges of a word. A letter of another script may stand beside it: those are often written without spaces.
START = r"(?<![A-Za-z0-9\u00c0-\u024f])(?<![A-Za-z0-9][.'-])"
END = r"(?![A-Za-z0-9\u00c0-\u024f+]|[.'-][A-Za-z0-9])"
GOES_ON = r"(?:to|is|was|because|since|as|and|or|but|for|then|would|must|seems|fits|rather|instead|of course)\b"
NO_ARTICLE = rf"(?!\ [a-z])|(?=\ {GOES_ON})"  # "A man", "I think" name no option
ALONE = rf"(?!\)?\s*(?:[,/&<>=-]|or|and|to)\s*\(?[L]{END})"  # not the first of several
LETTER_PATTERNS = (  # with L for a letter as written, l for one in any case; where one matches, only its letters count
    rf"^\W*\(?(L)\)?{END}(?:(?<![AI])|(?<=[)])|{NO_ARTICLE}){ALONE}",
    rf"^\W*\(?(l)\)?(?=[).:](?!\w)|[^\w+]*$|(?<![ai])\ (?:is|because|since)\b){ALONE}",
    rf"(?i:{ANSWER_IS}|\b(?:option|choice)\s+is\s+|\b(?:choose|pick|select)\s+)(?i:option |choice |letter )?[\"'(]*(l)"
    rf"(?=\)|[\"'.,;:!]|\s*$|\ {GOES_ON}|\n)",
    r"\((l)\)",
    rf"\b(?i:option|choice|letter)\s+(l){END}(?!\ [a-z])|{START}(L){END}(?:(?<![AI])|{NO_ARTICLE})",
)
LETTER_LIST = rf"\(?[L]\)?{END}(?:(?:\s*,)?\s*\b(?:and|or|nor)\s*\(?[L]\)?{END}|\s*,\s*\(?[L]\)?{END})*"
NEGATED_LETTERS = (
    r"(?i:\bnot|n't(?:\s+be)?|\bneither|\brather than|\binstead of|\bunlike|\bover|\bexcept|\ball but)\s+"
    rf"(?:(?:option|choice|the answer)s?\s+)?{LETTER_LIST}",
    rf"{START}{LETTER_LIST}\s+(?:is|are|was|were|can|could|does)"
    r"(?:\s*not|n't|\s+(?:wrong|incorrect|false|out|ruled out))\b",
)
CORRECTION = r"\b(?:or rather|no,? wait|wait,|actually,?|i mean)"


def read_letter(task, text):
    """The option letter that a text gives as its answer, or None."""
    letters = "".join(task.choices)

    def of_task(pattern):
        pattern = pattern.replace("[L]", f"[{letters}]").replace("(L)", f"([{letters}])")
        return pattern.replace("(l)", f"([{letters}{letters.lower()}])")

    for pattern in NEGATED_LETTERS:
        text = re.sub(of_task(pattern), " ", text)
    text = part_behind(CORRECTION, text, of_task(rf"{START}[L]{END}")).lstrip(" ,;:")
    options = {letter for letter in re.findall(of_task(r"(?:^|\s)\(?([L])[).:](?=\s*\w)"), text)}
    for pattern in LETTER_PATTERNS[2:] if len(options) > 1 else LETTER_PATTERNS:
        found = {"".join(match.groups("")).upper() for match in re.finditer(of_task(pattern), text)}
        if found:
            return found.pop() if len(found) == 1 else None
    return None


# --- Words of a closed set --------------------------------------------------------------------------------------

SYNONYMS = {
    "bbh/sports_understanding": {"plausible": "yes", "implausible": "no"},
    "bbh/web_of_lies": {
        "tells the truth": "Yes",
        "tell the truth": "Yes",
        "telling the truth": "Yes",
        "lies": "No",
        "lying": "No",
    },
}
NEGATION = r"(?:\bnot|n't|\bno longer|\bnever|\bcannot|\brather than|\binstead of|\bfar from)\s+"
FILLER = (
    r"(?:(?:an?|the|to|be|seem|look|appear|considered|called|really|very|quite|logically|deductively|necessarily|"
    r"actually|at all)\s+)*[\"'(]*"
)
# A denial before an answer, in the same clause, that is not at once followed by it: who knows what it denies.
LOOSE_DENIAL = re.compile(r"(?:\bnot|n't|\bnever|\bcannot|\bhardly|\bno way|\bneither|\bnor|\bwithout)\b", re.I)
DENIED_AFTER = re.compile(r"[\"')]*\s*(?::|\bis\b|\?)\s*(not|no|false|incorrect|wrong)\b", re.I)
CLAUSE_END = rf"[,.;:!?\n]|\b(?:but|and)\b|{REASON}|{CONCLUSION}"
# "No doubt", "no other way": there "no" is no answer, unless a sentence goes on behind it.
NO_ANSWER = rf"(?!\ (?!(?:{GOES_ON}|(?:it|he|she|they|the|this|that|there|if|not)\b))[a-z])"


@dataclass(frozen=True)
class Mention:
    """A possible answer in a text."""

    choice: str
    start: int
    end: int


def words_of(task):
    """{a word in the form in which it is looked for: the choice it stands for}, longest first."""
    words = {normalize(choice).casefold().strip(): choice for choice in task.choices}
    words |= SYNONYMS.get(task.name, {})
    return {word: words[word] for word in sorted(words, key=len, reverse=True) if word}


def word_pattern(word):
    start = START if word[:1].isalnum() else ""
    end = END if word[-1:].isalnum() else ""
    spaced = r"[\s_-]+".join(map(re.escape, re.split(r"[\s_-]+", word))) if word.isascii() else re.escape(word)
    return start + spaced + end + (NO_ANSWER if word == "no" else "")


def spoken(word):
    """A found word in the form of `words_of`, whatever joins its parts."""
    return re.sub(r"[\s_-]+", " ", word.casefold())


def without_restated(text, any_word):
    """The text without what only repeats the question: "valid or invalid: valid" -> ": valid". What an "=" gives counts
    alone."""
    item = rf"(?:\bnot\s+)*[\"'(]*(?:{any_word})[\"')]*"
    joint = r"(?:\s*,)?\s*(?:/|\bor\b|\band\b|\bvs\b\.?)\s*"
    text = re.sub(rf"{item}(?:\s*,\s*{item})*(?:{joint}(?:{item}|not\b))+", " ", text, flags=re.I)
    text = re.sub(r"\b(?:whether|if)\b[^,.;:\n]*", " ", text, flags=re.I)
    return part_behind(r"=|->", text, rf"(?i:{any_word})")


def mentions(task, text, any_word):
    """The `Mention`s of the possible answers; of two, "not valid" is one of "invalid"."""
    choice_of = {spoken(word): choice for word, choice in words_of(task).items()}
    found = []
    for match in re.finditer(rf"(?P<plain>{any_word})|{NEGATION}{FILLER}(?P<denied>{any_word})", text, re.I):
        choice = choice_of.get(spoken(match["plain"] or match["denied"]))
        if match["denied"]:
            others = [other for other in task.choices if other != choice]
            choice = others[0] if len(others) == 1 else None
        clause = re.split(CLAUSE_END, text[: match.start()], flags=re.I)[-1]
        denied = DENIED_AFTER.match(text, match.end())
        if not LOOSE_DENIAL.search(clause) and not (denied and denied[1].casefold() not in choice_of) and choice:
            found.append(Mention(choice, match.start(), match.end()))
    return found


def read_word(task, text):
    """The possible answer that a text gives, or None: the only one, the first if a pause follows it, the concluded."""
    any_word = "|".join(map(word_pattern, words_of(task)))
    text = without_restated(text, any_word)
    found = mentions(task, text, any_word)
    if len({one.choice for one in found}) < 2:
        return found[0].choice if found else None
    first, second = found[:2]
    leads = not re.search(r"\w", text[: first.start])
    goes_on = text[first.end : second.start].strip("\"')] ")
    stops = re.match(r"[.;!\n]", goes_on)
    pauses = re.match(rf"[,:-]|{GOES_ON}", goes_on) and re.search(r"\w", goes_on)  # not a list, as in "yes, no"
    if leads and (stops or pauses):
        return first.choice
    for pattern in (ANSWER_IS, CONCLUSION):
        ends = [match.end() for match in re.finditer(pattern, text, re.I)]
        behind = [one for one in found if ends and one.start >= ends[0 if pattern is ANSWER_IS else -1]]
        if behind:
            return behind[0].choice
    return None


# --- Free text ----------------------------------------------------------------------------------------------------

BRACKETS = r"[()\[\]{}<>]"


def read_text(task, text):
    """The first line, behind "answer is"; of a task for brackets or words these alone."""
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    line = re.split(r"answer is:?\s*", lines[0])[-1] if lines else ""
    if task.name == "bbh/dyck_languages":
        runs = re.findall(rf"{BRACKETS}(?:[\s,]*{BRACKETS})*", line)
        line = runs[0] if len(runs) == 1 else line
    if task.name == "bbh/word_sorting":
        line = listed_words(line, lines)
    return bare_text(line) or None


def listed_words(line, lines):
    """Sorted words: separated by commas, or one a line."""
    line = re.split(r":\s*", line)[-1]
    items = [re.sub(r"^\d+[.)]\s*", "", other) for other in lines]
    if not line:
        items = items[1:]
        line = items[0] if items else ""
    if len(items) > 1 and len(items[0].split()) == 1:
        line = " ".join(item for item in items if len(item.split()) == 1)
    line = re.sub(r"\s*\b\d+[.)]\s*|\"", " ", line)
    return re.sub(r"(?:\s*(?:[,;=>]|->))+\s*(?:and\s+)?", " ", line)


def bare_text(text):
    """A text without quotes around it and full stops; brackets with one space between them."""
    text = " ".join(text.split()).strip("$ .")
    while len(text) > 1 and text[0] == text[-1] and text[0] in "\"'":
        text = text[1:-1].strip("$ .")
    if re.fullmatch(rf"(?:{BRACKETS}|[\s,])+", text):
        return " ".join(re.sub(r"[\s,]", "", text))
    return text


# --- Reading and grading ----------------------------------------------------------------------------------------


def read_answer(task, text):
    """The `paper` reading: the answer in what the model writes behind the extractor, or None."""
    text = normalize(text[:READ_AT_MOST])
    if task.kind == "text":
        return read_text(task, text)
    text = without_questions(text)
    if task.kind == "number":
        return read_number(text)
    are_letters = all(re.fullmatch("[A-Z]", choice) for choice in task.choices)
    return read_letter(task, text) if are_letters else read_word(task, text)


def canonical(task, answer):
    """The form in which two answers are compared, or None for no answer."""
    if answer is None:
        return None
    if task.kind == "number":
        return canonical_number(answer)
    bare = bare_text(normalize(answer)).casefold()
    return (spoken(bare) if task.choices else bare) or None


def grade(task, gold, answer):
    """Whether `answer` (None: none was found) is the gold answer."""
    found = canonical(task, answer)
    return found is not None and found == canonical(task, gold)

"""Text in its place -> token ids. What the model reads of a row is, as ids, in this order (Eq. 1-2):

    question + prompt + turn_end + reasoning + extractor + answer

Each part has the ids that it has behind the text before it; a tokenizer that merges across a boundary is an error.
What comes from data, prompts or the user's flags is text and nothing else: a question that spells "<|im_end|>" does not
end its turn. Only the chat template writes control tokens. Works without torch.
"""

import json
import re
from dataclasses import dataclass
from functools import lru_cache

from tokenizers import Tokenizer

from support.files import UserError, require

SENTENCE_ENDS = (".", "!", "?")
LARGEST_SHARE = 1 - 1e-6  # of an answer's probability that longer ones may take, so that its logarithm stays finite
PUNCTUATION = (*SENTENCE_ENDS, ",", ";", ":")


@dataclass(frozen=True)
class Choices:
    """The possible answers of a task as token ids behind its extractor, and what is read there to score them all."""

    answers: tuple[tuple[int, ...], ...]  # in the order of Task.choices
    reads: tuple[tuple[int, ...], ...]  # each answer's tokens but the last begin one of these
    read_of: tuple[int, ...]  # for each answer the number of that read


@dataclass(frozen=True)
class Turn:
    """The text around a prompt, as the model's chat template puts it."""

    header: str  # the template's own
    asked: str  # the user's text before the prompt
    footer: str  # the template's own


@dataclass(frozen=True)
class Row:
    """One training row as token ids; prompt and reasoning, which change, are not in it."""

    question: list[int]  # the chat's header, the question, the fixed opening word
    turn_end: list[int]  # the end of the user's turn, the header of the assistant's
    extractor: list[int]  # "Therefore, the final answer ... is $"
    answer: list[int]  # the gold answer
    choices: Choices | None = None  # None: the answer may be any text
    turn: Turn | None = None  # the text of question and turn_end; None: no prompt is proposed for this row

    @property
    def gold(self):
        """The number of the gold answer among the choices."""
        return self.choices.answers.index(tuple(self.answer))

    @property
    def reads(self):
        """What is read behind the extractor for the answer's loss: an answer's last token predicts nothing."""
        return self.choices.reads if self.choices else (tuple(self.answer[:-1]),)


# --- Text stays text -------------------------------------------------------------------------------

# No character of any text: Unicode keeps these for uses like the one below.
MARKS = [chr(code) for code in range(0xFDD0, 0xFDF0)]


def encode(tokenizer, text, header="", footer=""):
    """Ids of header + text + footer. Header and footer are the chat template's own and may hold control tokens; in the
    text their names are text. Errors: UserError if the tokenizer cannot keep them apart."""
    ids = tokenizer.encode(header + text + footer, add_special_tokens=False)
    names = control_tokens(tokenizer)
    of_template = control_count(tokenizer, header) + control_count(tokenizer, footer)
    # An unknown word is one, too, which no text spells.
    harmless = set() if tokenizer.unk_token and tokenizer.unk_token in text else {tokenizer.unk_token_id}
    control = names.keys() - harmless
    if sum(token in control for token in ids) <= of_template:
        return ids
    name = next((name for name in names.values() if name in text), "a control token")
    unable = f"a text spells {name!r}, which the model's tokenizer would read as a control token: take it out"
    mark = next((mark for mark in MARKS if mark not in text), "")
    require(mark and hasattr(tokenizer, "backend_tokenizer"), unable)
    marked, original = marked_tokenizer(tokenizer, mark)
    spelled = [re.escape(name) for name in sorted(names.values(), key=len, reverse=True) if name in header + footer]
    pattern = re.compile("|".join(spelled) or "(?!)")
    header, footer = (pattern.sub(lambda found: mark + found.group(), part) for part in (header, footer))
    ids = [original.get(token, token) for token in marked.encode(header + text + footer, add_special_tokens=False).ids]
    require(sum(token in control for token in ids) <= of_template, unable)
    return ids


@lru_cache(maxsize=8)
def control_tokens(tokenizer):
    """{id: text} of the added and special tokens; those of white space alone, or of a byte, are text."""
    added = tokenizer.get_added_vocab().items()
    return {token: name for name, token in added if name.strip() and not re.fullmatch("<0x[0-9A-F]{2}>", name)}


@lru_cache(maxsize=64)
def control_count(tokenizer, text):
    """How many control tokens a text of the chat template has."""
    control = control_tokens(tokenizer)
    return sum(token in control for token in tokenizer.encode(text, add_special_tokens=False)) if text else 0


@lru_cache(maxsize=4)
def marked_tokenizer(tokenizer, mark):
    """(a tokenizer that knows control tokens only with the mark before their names, {its id: the original's}): what
    does not hold the mark cannot spell one."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    originals = {}
    for token in content["added_tokens"]:
        if token["content"].strip():
            token["content"] = mark + token["content"]
            originals[token["content"]] = token["id"]
    marked = Tokenizer.from_str(json.dumps(content))
    return marked, {marked.token_to_id(name): token for name, token in originals.items()}


def decode(tokenizer, ids):
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def ids_behind(tokenizer, before, text, header="", footer=""):
    """Ids of `text`, then of the footer, as they are behind header and `before`.

    Errors: UserError if the tokenizer merges across the boundary.
    """
    start = encode(tokenizer, before, header)
    whole = encode(tokenizer, before + text, header, footer)
    if whole[: len(start)] != start:
        near = max(0, len(start) - 3)
        was = tokenizer.convert_ids_to_tokens(start[near:][:6])
        becomes = tokenizer.convert_ids_to_tokens(whole[near:][:6])
        raise UserError(
            f"the tokenizer merges {(header + before)[-12:]!r} with what follows it: tokens {was} become {becomes}. "
            "End the text before the boundary differently, for instance without its last space"
        )
    return whole[len(start) :]


# --- The chat template -----------------------------------------------------------------------------

DATE = "26 Jul 2024"  # of templates that ask for today's, lest a run's numbers change overnight
# What such a template calls, as a macro of Jinja that writes this date whatever the day.
PINNED_DATE = (
    '{%- macro strftime_now(format) -%}{{ format | replace("%d", "26") | replace("%-d", "26") | replace("%e", "26")'
    ' | replace("%b", "Jul") | replace("%B", "July") | replace("%m", "07") | replace("%-m", "7")'
    ' | replace("%Y", "2024") | replace("%y", "24") | replace("%A", "Friday") | replace("%a", "Fri")'
    ' | replace("%F", "2024-07-26") | replace("%H", "12") | replace("%M", "00") | replace("%S", "00") }}'
    "{%- endmacro -%}"
)


def chat_parts(tokenizer, task, question, prompt):
    """(header, the user's text, footer) of a turn, as the tokenizer's chat template writes it.

    Errors: UserError if the template fails, or changes or drops the user's text.
    """
    content = task.user_turn(question, prompt)
    turn = [{"role": "user", "content": content}]
    try:
        template = tokenizer.get_chat_template()
        template = PINNED_DATE + template if asks_for_date(template) else template
        chat = tokenizer.apply_chat_template(turn, chat_template=template, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # whatever a template raises
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"the model's chat template fails ({type(error).__name__}: {reason}): mend it") from None
    start = chat.rfind(content)
    changed = f"the model's chat template changes the user's text or leaves it out: it gives {chat[:300]!r}"
    require(start >= 0, changed)
    return chat[:start], content, chat[start + len(content) :]


def asks_for_date(template):
    return "strftime_now" in template


def encode_chat(tokenizer, task, question, prompt):
    """Ids of the whole user's turn and the assistant's header, for a prompt that is not searched and may be empty.

    Errors: as `chat_parts`.
    """
    header, content, footer = chat_parts(tokenizer, task, question, prompt)
    return encode(tokenizer, content, header, footer)


@dataclass(frozen=True)
class Parts:
    """A question with a prompt in its place, as token ids."""

    turn: Turn
    question: list[int]
    prompt: list[int]
    turn_end: list[int]


def encode_parts(tokenizer, task, question, prompt):
    """The `Parts` of a question with the prompt's text in its place, which the chat template gives.

    Errors: UserError as `chat_parts`, if the tokenizer merges across a boundary or does not know a word of the prompt,
    if the prompt has no tokens, or if its text does not give the same ids again.
    """
    prompt = prompt.strip()
    require(prompt, "the prompt has no tokens: give --initial-prompt at least one word")
    header, content, footer = chat_parts(tokenizer, task, question, prompt)
    start = len(content) - len(prompt) - 1  # the space before the prompt belongs to it: " proper" is one token
    turn = Turn(header, content[:start], footer)
    question_ids = encode(tokenizer, turn.asked, header)
    prompt_ids = ids_behind(tokenizer, turn.asked, content[start:], header)
    turn_end_ids = ids_behind(tokenizer, content, "", header, footer)
    unknown = tokenizer.unk_token_id is not None and tokenizer.unk_token_id in prompt_ids
    require(not unknown, f"the model's tokenizer does not know all of the prompt {prompt!r}: give another")
    return Parts(turn, question_ids, prompt_ids, turn_end_ids)


def encode_prompt(tokenizer, task, question, prompt):
    """(question ids, prompt ids, turn_end ids). Errors: as `encode_parts`."""
    parts = encode_parts(tokenizer, task, question, prompt)
    return parts.question, parts.prompt, parts.turn_end


# --- Extractor and answers ---------------------------------------------------------------------------


def extractor_ids(tokenizer, task):
    # Reasoning ends in some token that we do not know yet; the full stop stands for it.
    return ids_behind(tokenizer, ".", " " + task.extractor)


def answer_ids(tokenizer, task, answer):
    """Ids of an answer behind the extractor. Errors: UserError if there are none, at a merged boundary, or for a word
    that the tokenizer does not know."""
    ids = ids_behind(tokenizer, ". " + task.extractor, task.answer_prefix + answer)
    require(ids, f"the answer {answer!r} adds no token behind the extractor {task.extractor!r}: end it otherwise")
    unknown = tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids
    space = ", or --answer-space vocabulary" if task.ranks_choices else ""
    require(not unknown, f"the model's tokenizer does not know the answer {answer!r}: choose another --model{space}")
    return ids


def encode_choices(tokenizer, task):
    """The `Choices` of a task that ranks them, else None. Errors: UserError for two that have the same tokens, or one
    with a word that the tokenizer does not know."""
    if not task.ranks_choices:
        return None
    answers = [tuple(answer_ids(tokenizer, task, choice)) for choice in task.choices]
    for choice, ids in zip(task.choices, answers):
        twin = task.choices[answers.index(ids)]
        same = f"the model's tokenizer cannot tell the answers {twin!r} and {choice!r} apart behind {task.extractor!r}"
        require(twin == choice, f"{same}: name one of them otherwise")
    return choices_of(answers)


def choices_of(answers):
    """The `Choices` of answers as tuples of ids, no two the same."""
    reads = []
    for head in sorted({ids[:-1] for ids in answers}, key=lambda head: (-len(head), head)):
        if not any(read[: len(head)] == head for read in reads):
            reads.append(head)
    read_of = []
    for ids in answers:
        head = ids[:-1]
        read_of.append(next(n for n, read in enumerate(reads) if read[: len(head)] == head))
    return Choices(tuple(answers), tuple(reads), tuple(read_of))


def extensions(answers):
    """[(number of an answer, number of one that begins with it)], with no third in between."""
    pairs = []
    for n, ids in enumerate(answers):
        heads = [m for m, other in enumerate(answers) if len(other) < len(ids) and ids[: len(other)] == other]
        if heads:
            pairs.append((max(heads, key=lambda m: len(answers[m])), n))
    return pairs


def encode_row(tokenizer, task, row):
    """The `Row` of a data row {"id", "question", "answer"}. Errors: UserError that names the row."""
    try:
        extractor, choices = extractor_ids(tokenizer, task), encode_choices(tokenizer, task)
        parts = encode_parts(tokenizer, task, row["question"], task.initial_prompt)
        answer = answer_ids(tokenizer, task, row["answer"])
        return Row(parts.question, parts.turn_end, extractor, answer, choices, parts.turn)
    except UserError as error:
        raise UserError(f"row {row['id']}: {error}") from None


def prompt_text(tokenizer, row, prompt_ids):
    """The text of prompt ids as it stands behind `row.question`, with its leading space."""
    question = decode(tokenizer, row.question)
    return decode(tokenizer, row.question + list(prompt_ids))[len(question) :]


def survives_encoding(tokenizer, row, prompt_ids):
    """Whether the prompt's text, encoded afresh in its place, gives the same ids."""
    text = prompt_text(tokenizer, row, prompt_ids)
    if text != " " + text.strip():
        return False
    whole = encode(tokenizer, row.turn.asked + text, row.turn.header, row.turn.footer)
    return whole == row.question + list(prompt_ids) + row.turn_end


def ends_sentence(tokenizer, prompt_ids):
    return tokenizer.decode(prompt_ids[-1:]).strip().endswith(SENTENCE_ENDS)


def allowed_ids(tokenizer, count):
    """Which of the first `count` tokens may enter a prompt: those that read as a word, a piece of one, or
    punctuation. Special and added tokens may not."""
    excluded = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    ids = [[i] for i in range(min(len(tokenizer), count))]
    allowed = []
    for i, text in enumerate(tokenizer.batch_decode(ids, clean_up_tokenization_spaces=False)):
        word = text.removeprefix(" ")
        is_word = word.isascii() and word.isalpha()
        if i not in excluded and (is_word or text in PUNCTUATION):
            allowed.append(i)
    return allowed

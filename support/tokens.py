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
from typing import NamedTuple

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


class Piece(NamedTuple):
    """A part of a chat's text."""

    text: str
    of_template: bool  # the chat template's own, which may hold control tokens


@dataclass(frozen=True)
class Place:
    """The text around a prompt, as the model's chat template puts it."""

    before: tuple[Piece, ...]
    space: str  # before the prompt's first word, part of its first token: " proper"; or none
    behind: tuple[Piece, ...]


@dataclass(frozen=True)
class Row:
    """One training row as token ids; prompt and reasoning, which change, are not in it."""

    question: list[int]  # what stands before the prompt: the chat's header, the question, the fixed opening word
    turn_end: list[int]  # what stands behind it: the end of the user's turn, the header of the assistant's
    extractor: list[int]  # "Therefore, the final answer ... is $"
    answer: list[int]  # the gold answer; none where a text is to be generated, which no loss is taken of
    choices: Choices | None = None  # None: the answer may be any text
    place: Place | None = None  # the text of question and turn_end; None: no prompt is proposed for this row

    @property
    def gold(self):
        """The number of the gold answer among the choices."""
        return self.choices.answers.index(tuple(self.answer))

    @property
    def length(self):
        """How many tokens stand around the prompt, before the model's reasoning."""
        return len(self.question) + len(self.turn_end)

    @property
    def behind(self):
        """How many tokens stand behind the prompt at most, besides the reasoning."""
        return len(self.turn_end) + len(self.extractor) + max(map(len, self.reads))

    @property
    def reads(self):
        """What is read behind the extractor for the answer's loss: an answer's last token predicts nothing."""
        return self.choices.reads if self.choices else (tuple(self.answer[:-1]),)


# --- Text stays text -------------------------------------------------------------------------------

# No character of any text: Unicode keeps these for uses like the one below.
MARKS = [chr(code) for code in range(0xFDD0, 0xFDF0)]


def encode(tokenizer, text):
    """Ids of a text. Errors: as `encode_pieces`."""
    return encode_pieces(tokenizer, [Piece(text, False)])


def encode_pieces(tokenizer, pieces):
    """Ids of the pieces' text as a whole. What is not the chat template's is text, also where it spells a control
    token. Errors: UserError if the tokenizer cannot keep them apart."""
    ids = tokenizer.encode("".join(piece.text for piece in pieces), add_special_tokens=False)
    names = control_tokens(tokenizer)
    of_template = sum(control_count(tokenizer, piece.text) for piece in pieces if piece.of_template)
    text = "".join(piece.text for piece in pieces if not piece.of_template)
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
    own = "".join(piece.text for piece in pieces if piece.of_template)
    spelled = [re.escape(name) for name in sorted(names.values(), key=len, reverse=True) if name in own]
    pattern = re.compile("|".join(spelled) or "(?!)")
    whole = ""
    for piece in pieces:
        whole += pattern.sub(lambda found: mark + found.group(), piece.text) if piece.of_template else piece.text
    ids = [original.get(token, token) for token in marked.encode(whole, add_special_tokens=False).ids]
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


def ids_behind(tokenizer, before, behind):
    """Ids of the pieces `behind` as they are behind the pieces `before`.

    Errors: UserError if the tokenizer merges across the boundary.
    """
    start = encode_pieces(tokenizer, before)
    whole = encode_pieces(tokenizer, [*before, *behind])
    if whole[: len(start)] != start:
        near = max(0, len(start) - 3)
        was = tokenizer.convert_ids_to_tokens(start[near:][:6])
        becomes = tokenizer.convert_ids_to_tokens(whole[near:][:6])
        end = "".join(piece.text for piece in before)[-12:]
        raise UserError(
            f"the tokenizer merges {end!r} with what follows it: tokens {was} become {becomes}. "
            "End the text before the boundary differently, for instance without its last space"
        )
    return whole[len(start) :]


def text_behind(tokenizer, before, text):
    """Ids of a text as they are behind another. Errors: as `ids_behind`."""
    return ids_behind(tokenizer, [Piece(before, False)], [Piece(text, False)])


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


def chat_text(tokenizer, messages):
    """The messages as the tokenizer's chat template writes them, up to where the model's answer begins.

    Errors: UserError if the template fails.
    """
    try:
        template = tokenizer.get_chat_template()
        template = pinned_template(template) if asks_for_date(template) else template
        options = {"chat_template": template, "tokenize": False, "add_generation_prompt": True}
        return tokenizer.apply_chat_template(messages, **options)
    except Exception as error:  # whatever a template raises
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"the model's chat template fails ({type(error).__name__}: {reason}): mend it") from None


def chat_pieces(tokenizer, messages):
    """(pieces of the chat's text, by turns the template's own and a message's).

    Errors: UserError if the template fails, or changes or drops a message.
    """
    chat = chat_text(tokenizer, messages)
    pieces, end = [], len(chat)
    for message in reversed(messages):  # a template may write more than one message before the first
        start = chat.rfind(message["content"], 0, end)
        whose = f"the model's chat template changes the {message['role']}'s text or leaves it out"
        require(start >= 0, f"{whose}: it gives {chat[:300]!r}")
        behind = start + len(message["content"])
        pieces = [Piece(chat[start:behind], False), Piece(chat[behind:end], True), *pieces]
        end = start
    return [Piece(chat[:end], True), *pieces]


def asks_for_date(template):
    return "strftime_now" in template


def pinned_template(template):
    """The chat template, told `DATE` whatever the day."""
    return PINNED_DATE + template


def encode_chat(tokenizer, task, question, prompt):
    """Ids of all that the model is told and the assistant's header, for a prompt that is not searched and may be empty.

    Errors: as `chat_pieces`.
    """
    return encode_pieces(tokenizer, chat_pieces(tokenizer, task.messages(question, prompt)))


@dataclass(frozen=True)
class Parts:
    """A question with a prompt in its place, as token ids."""

    place: Place
    question: list[int]
    prompt: list[int]
    turn_end: list[int]


def place_of(tokenizer, task, question, prompt):
    """The `Place` of a prompt's text. Errors: as `chat_pieces`."""
    messages = task.messages(question, prompt)
    pieces = chat_pieces(tokenizer, messages)
    number = 1 if "{prompt}" in task.system else len(pieces) - 2  # of the piece that holds the prompt
    before = task.before_prompt(question)
    space = before[len(before.removesuffix(" ")) :]
    content = pieces[number].text
    start = len(before) - len(space)
    end = len(before) + len(prompt)
    return Place(
        (*pieces[:number], Piece(content[:start], False)), space, (Piece(content[end:], False), *pieces[number + 1 :])
    )


def encode_parts(tokenizer, task, question, prompt):
    """The `Parts` of a question with the prompt's text in its place, which the chat template gives.

    Errors: UserError as `chat_pieces`, if the tokenizer merges across a boundary or does not know a word of the prompt,
    if the prompt has no tokens, or if nothing stands before it.
    """
    prompt = prompt.strip()
    require(prompt, "the prompt has no tokens: give --initial-prompt at least one word")
    place = place_of(tokenizer, task, question, prompt)
    own = Piece(place.space + prompt, False)
    question_ids = encode_pieces(tokenizer, place.before)
    require(question_ids, "the chat template puts no token before the prompt: begin --template with a word")
    prompt_ids = ids_behind(tokenizer, place.before, [own])
    turn_end_ids = ids_behind(tokenizer, [*place.before, own], place.behind)
    unknown = tokenizer.unk_token_id is not None and tokenizer.unk_token_id in prompt_ids
    require(not unknown, f"the model's tokenizer does not know all of the prompt {prompt!r}: give another")
    parts = Parts(place, question_ids, prompt_ids, turn_end_ids)
    changed = f"the tokens of the prompt {prompt!r} read otherwise than its text: give another --initial-prompt"
    require(survives_encoding(tokenizer, parts, prompt_ids), changed)
    return parts


def encode_prompt(tokenizer, task, question, prompt):
    """(question ids, prompt ids, turn_end ids). Errors: as `encode_parts`."""
    parts = encode_parts(tokenizer, task, question, prompt)
    return parts.question, parts.prompt, parts.turn_end


# --- Extractor and answers ---------------------------------------------------------------------------


def extractor_ids(tokenizer, task):
    if task.is_generation:  # nothing is asked for behind what it writes
        return []
    # Reasoning ends in some token that we do not know yet; the full stop stands for it.
    return text_behind(tokenizer, ".", " " + task.extractor)


def answer_ids(tokenizer, task, answer):
    """Ids of an answer behind the extractor. Errors: UserError if there are none, at a merged boundary, or for a word
    that the tokenizer does not know."""
    ids = text_behind(tokenizer, ". " + task.extractor, task.answer_prefix + answer)
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
        answer = [] if task.is_generation else answer_ids(tokenizer, task, row["answer"])
        return Row(parts.question, parts.turn_end, extractor, answer, choices, parts.place)
    except UserError as error:
        raise UserError(f"row {row['id']}: {error}") from None


def prompt_text(tokenizer, row, prompt_ids):
    """The text of prompt ids as it stands behind `row.question`, with its leading space. row: a `Row` or `Parts`."""
    question = decode(tokenizer, row.question)
    return decode(tokenizer, row.question + list(prompt_ids))[len(question) :]


def survives_encoding(tokenizer, row, prompt_ids):
    """Whether the prompt's text, encoded afresh in its place, gives the same ids."""
    text, place = prompt_text(tokenizer, row, prompt_ids), row.place
    if text != place.space + text.strip():
        return False
    whole = encode_pieces(tokenizer, [*place.before, Piece(text, False), *place.behind])
    return whole == row.question + list(prompt_ids) + row.turn_end


def continues_word(tokenizer, before, token):
    """Whether a token's text goes on with the word at whose end or in whose middle the token before it stands."""
    first, both = tokenizer.decode([before]), tokenizer.decode([before, token])
    return first[-1:].isalnum() and both[len(first) : len(first) + 1].isalnum()


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

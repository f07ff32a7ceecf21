"""Text in its place -> token ids. What the model reads of a row is, as ids, in this order (Eq. 1-2):

    question + prompt + turn_end + reasoning + extractor + answer

Each part has the ids that it has behind the text before it; a tokenizer that merges across a boundary is an error.
Works without torch.
"""

from dataclasses import dataclass

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
class Row:
    """One training row as token ids; prompt and reasoning, which change, are not in it."""

    question: list[int]  # the chat's header, the question, the fixed opening word
    turn_end: list[int]  # the end of the user's turn, the header of the assistant's
    extractor: list[int]  # "Therefore, the final answer ... is $"
    answer: list[int]  # the gold answer
    choices: Choices | None = None  # None: the answer may be any text

    @property
    def gold(self):
        """The number of the gold answer among the choices."""
        return self.choices.answers.index(tuple(self.answer))

    @property
    def reads(self):
        """What is read behind the extractor for the answer's loss: an answer's last token predicts nothing."""
        return self.choices.reads if self.choices else (tuple(self.answer[:-1]),)


def encode(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False)


def decode(tokenizer, ids):
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def ids_behind(tokenizer, before, text):
    """Ids of `text` as they are behind `before`. Errors: UserError if the tokenizer merges across the boundary."""
    start = encode(tokenizer, before)
    whole = encode(tokenizer, before + text)
    if whole[: len(start)] != start:
        near = max(0, len(start) - 3)
        was = tokenizer.convert_ids_to_tokens(start[near:][:6])
        becomes = tokenizer.convert_ids_to_tokens(whole[near:][:6])
        raise UserError(
            f"the tokenizer merges {before[-12:]!r} with what follows it: tokens {was} become {becomes}. "
            "End the text before the boundary differently, for instance without its last space"
        )
    return whole[len(start) :]


def encode_chat(tokenizer, task, question, prompt):
    """Ids of the whole user's turn and the assistant's header, for a prompt that is not searched and may be empty."""
    turn = [{"role": "user", "content": task.user_turn(question, prompt)}]
    return encode(tokenizer, tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))


def encode_prompt(tokenizer, task, question, prompt):
    """(question ids, prompt ids, turn_end ids) of a question with the prompt's text in its place.

    The place is given by the tokenizer's own chat template. Errors: UserError if the template rewrites the text,
    if the tokenizer merges across a boundary or does not know a word of the prompt, or if the prompt has no tokens.
    """
    prompt = prompt.strip()
    require(prompt, "the prompt has no tokens: give --initial-prompt at least one word")
    content = task.user_turn(question, prompt)
    turn = [{"role": "user", "content": content}]
    chat = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    require(content in chat, f"the chat template changes the user's text, so the prompt has no place in it: {chat!r}")

    end = chat.rfind(content) + len(content)
    start = end - len(prompt) - 1  # the space before the prompt belongs to it: " proper" is one token
    question_ids = encode(tokenizer, chat[:start])
    prompt_ids = ids_behind(tokenizer, chat[:start], chat[start:end])
    turn_end_ids = ids_behind(tokenizer, chat[:end], chat[end:])
    unknown = tokenizer.unk_token_id is not None and tokenizer.unk_token_id in prompt_ids
    require(not unknown, f"the model's tokenizer does not know all of the prompt {prompt!r}: give another")
    return question_ids, prompt_ids, turn_end_ids


def extractor_ids(tokenizer, task):
    # Reasoning ends in some token that we do not know yet; the full stop stands for it.
    return ids_behind(tokenizer, ".", " " + task.extractor)


def answer_ids(tokenizer, task, answer):
    """Ids of an answer behind the extractor. Errors: UserError if there are none, or at a merged boundary."""
    ids = ids_behind(tokenizer, ". " + task.extractor, task.answer_prefix + answer)
    require(ids, f"the answer {answer!r} adds no token behind the extractor {task.extractor!r}: end it otherwise")
    return ids


def encode_choices(tokenizer, task):
    """The `Choices` of a task that ranks them, else None. Errors: UserError for two that have the same tokens, or one
    with a word that the tokenizer does not know."""
    if not task.ranks_choices:
        return None
    answers = [tuple(answer_ids(tokenizer, task, choice)) for choice in task.choices]
    for choice, ids in zip(task.choices, answers):
        unknown = tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids
        require(not unknown, f"the model's tokenizer does not know the answer {choice!r}: --answer-space vocabulary")
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
        question, _, turn_end = encode_prompt(tokenizer, task, row["question"], task.initial_prompt)
        return Row(question, turn_end, extractor, answer_ids(tokenizer, task, row["answer"]), choices)
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
    whole = decode(tokenizer, row.question) + text + decode(tokenizer, row.turn_end)
    return encode(tokenizer, whole) == row.question + list(prompt_ids) + row.turn_end


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

"""A check before long work: on a few rows, whether the search can work at all, and what the whole run will cost.

The model reasons under the initial prompt. Asked is what the method stands on: that reasonings end by themselves, that
an answer can be read behind the extractor, that the gold answer is not out of reach, that the accuracy is neither that
of guessing nor 100 %. Estimates come from the tokens and seconds of these rows.
"""

import re
import time
from collections import Counter
from dataclasses import dataclass, field

import torch

from support import ranks
from support.answerers import LocalModel, chat_of_row
from support.answers import choice_log_probs, read_answers
from support.engine import physical_memory
from support.evaluation import graded
from support.files import UserError, require
from support.reading import read_answer
from support.tokens import decode, encode, encode_chat, encode_prompt

ROWS = 12
MOST = 0.75  # a share of rows from which on most of them are meant
BACKWARD = 3  # a pass forward and back costs about as much as so many forward


@dataclass
class Checked:
    """What was seen on the rows of a check."""

    predictions: list[dict]  # an evaluation.Prediction of each row
    replies: list[str]  # what the model writes freely behind the extractor
    possible: list[bool]  # whether the likeliest token there can begin an answer; of an open task, whether one was read
    ranks: list[
        int
    ]  # of the gold answer: among the choices, or of its first token among all tokens; 1 is the likeliest
    shown: list[str] = field(default_factory=list)  # one row whole, in lines
    read_seconds: float = 0.0  # a token of a question
    row_seconds: float = 0.0  # a generation, with its question and answer
    tokens: float = 0.0  # of a row's question, prompt, reasoning and extractor, mean


def require_room(engine, task, splits, rows, settings):
    """Errors: UserError, with the row's id, if a row cannot be sent, or could become longer than the model reads.

    splits: {split: data rows} of all that the run is going to read; rows: the training rows as tokens.Row; settings:
    SearchSettings. The search may make the prompt longer, by a token a step.
    """
    tokenizer = engine.tokenizer
    initial = len(encode_prompt(tokenizer, task, splits["train"][0]["question"], task.initial_prompt)[1])
    longest_prompt = max(initial, min(settings.max_prompt_tokens, initial + settings.steps))
    reads = max(len(read) for row in rows for read in row.reads) + 2
    behind = len(rows[0].extractor) + max(reads, 0 if task.ranks_choices else settings.answer_tokens(task))
    for split, data in splits.items():
        lengths = [len(chat_of_row(tokenizer, task, row, task.initial_prompt)) for row in data]
        longest = max(range(len(data)), key=lengths.__getitem__)
        try:
            engine.require_positions(lengths[longest] - initial + longest_prompt + settings.max_new_tokens + behind)
        except UserError as error:
            which = f"row {data[longest]['id']} of {split}, with a prompt of {longest_prompt} tokens"
            raise UserError(f"{which}: {error}, or --max-prompt-tokens") from None


def check_rows(engine, task, data, rows, settings):
    """`Checked` of the data rows and their tokens.Row; settings: GenerationSettings."""
    model, tokenizer = LocalModel(engine), engine.tokenizer
    contexts = [encode_chat(tokenizer, task, row["question"], task.initial_prompt) for row in data]
    started = time.perf_counter()
    engine.read(contexts)
    read_seconds = time.perf_counter() - started
    checked = Checked([None] * len(data), [""] * len(data), [False] * len(data), [0] * len(data))
    started, lengths, of_the_check = time.perf_counter(), [], 0.0
    for ended in engine.stream(contexts, settings.max_new_tokens, settings.batch_size):
        of_data, of_rows = [data[n] for n in ended.rows], [rows[n] for n in ended.rows]
        only_here = time.perf_counter()
        if task.is_generation:  # nothing is read behind what it writes
            ranks, replies = [0] * len(of_rows), [[]] * len(of_rows)
        else:
            ranks = gold_ranks(engine, ended, of_rows)
            replies = engine.go_on(ended, rows[0].extractor, settings.answer_tokens(task))
        of_the_check += time.perf_counter() - only_here  # seconds of what the run itself does not do
        generations = model.answered(task, of_data, ended, settings)
        for n, generation, rank, reply in zip(ended.rows, generations, ranks, replies, strict=True):
            prediction = graded(task, generation)
            checked.predictions[n], checked.ranks[n] = prediction, rank
            checked.replies[n] = decode(tokenizer, reply)
            written = prediction["answer"] is not None
            checked.possible[n] = written if task.is_generation else is_possible(tokenizer, task, rows[n], reply)
            lengths.append(len(contexts[n]) + generation.tokens + len(rows[n].extractor) + len(rows[n].answer))
    checked.row_seconds = (time.perf_counter() - started - of_the_check) / len(data)
    checked.read_seconds = read_seconds / sum(map(len, contexts))
    checked.tokens = sum(lengths) / len(lengths)
    checked.shown = whole_row(tokenizer, task, contexts[0], checked)
    return checked


@torch.inference_mode()
def gold_ranks(engine, ended, rows):
    """For each of the rows that ended the rank of its gold answer: of a closed task among the choices, else that of the
    answer's first token among all tokens."""
    logits = read_answers(engine, ended.context, rows[0].extractor, [row.reads for row in rows])
    if rows[0].choices:
        scores, gold = choice_log_probs(logits, rows[0].choices), [row.gold for row in rows]
    else:
        scores, gold = logits[:, 0, 0], [row.answer[0] for row in rows]
    require(not scores.isnan().any(), f"the model's logits are not finite.{engine.dtype_hint}")
    return [int((each > each[n]).sum()) + 1 for each, n in zip(scores, gold)]


def is_possible(tokenizer, task, row, reply):
    """Whether what is written behind the extractor begins as a choice does; of an open task, whether it can be read."""
    if row.choices:
        return bool(reply) and any(ids[0] == reply[0] for ids in row.choices.answers)
    return read_answer(task, decode(tokenizer, reply)) is not None


def whole_row(tokenizer, task, context, checked):
    """The first row as the model reads and writes it, in lines."""
    prediction = checked.predictions[0]
    text = prediction["text"] + (" [cut]" if prediction["truncated"] else "")
    parts = (
        ("sent", decode(tokenizer, context)),
        ("reasoning", text),
        ("extractor", task.extractor),
        ("reply", checked.replies[0]),
        ("read", f"{prediction['answer']} (harness reading: {prediction['harness_answer']})"),
        ("gold answer", prediction["gold"]),
    )
    if task.is_generation:
        score = f"{100 * prediction['correct']:.0f} %"
        parts = (parts[0], ("written", text), ("reference", prediction["gold"]), ("ROUGE-L", score))
    lines = []
    for name, text in parts:
        first, *more = text.split("\n")
        lines.append(f"  {name:12s} {first}")
        lines += [" " * 15 + line for line in more]
    return lines


# --- What it means --------------------------------------------------------------------------------------------


def share(outcomes):
    return sum(outcomes) / len(outcomes)


def guessing(task, data):
    """The accuracy of the best answer that is always the same, or None where answers are no closed set."""
    if not task.choices:
        return None
    return max(Counter(row["answer"] for row in data).values()) / len(data)


def table(checked, task, train):
    """The check as lines of a name and a value. train: the data rows of the search."""
    predictions = checked.predictions
    closed = "the model's next token begins a possible answer" if task.ranks_choices else "an answer can be read"
    guess = guessing(task, train)
    tokens = f"{sum(p['tokens'] for p in predictions) / len(predictions):.0f}"
    ends = ("ends by itself", f"{100 * (1 - share([p['truncated'] for p in predictions])):.0f} % of rows")
    right = f"{100 * share([p['correct'] for p in predictions]):.0f} %"
    lines = [
        ("reasoning, tokens", tokens),
        ends,
        (closed, f"{100 * share(checked.possible):.0f} % of rows"),
        ("rank of the gold answer", f"{sorted(checked.ranks)[len(checked.ranks) // 2]} (median)"),
        ("accuracy, paper reading", right),
        ("accuracy, harness reading", f"{100 * share([p['harness_correct'] for p in predictions]):.0f} %"),
    ]
    if task.is_generation:
        lines = [("text, tokens", tokens), ends, ("ROUGE-L, mean", right)]
    if guess is not None:
        lines.append(("always the commonest answer", f"{100 * guess:.0f} %"))
    return [f"  {name:48s} {value}" for name, value in lines]


def warnings(checked, task, train, settings):
    """Sentences on why the search may not work, each with the flag that helps; none where nothing is wrong."""
    predictions, found = checked.predictions, []
    if share([p["truncated"] for p in predictions]) >= MOST:
        found.append(
            f"Most reasonings are cut at --max-new-tokens {settings.max_new_tokens}: raise it, or ask for brevity with "
            "--initial-prompt."
        )
    unread = share([p["answer"] is None for p in predictions])
    if unread >= MOST and task.is_generation:
        found.append("Of most rows nothing is written at all: ask for a text with --initial-prompt.")
    elif unread >= MOST:
        space = " or --answer-space choices" if task.choices else ""
        found.append(
            f"Behind the extractor {task.extractor!r} hardly any answer can be read, so the loss says little and the "
            f"accuracy is that of the extractor: set another with --extractor{space}."
        )
    right = share([p["correct"] for p in predictions])
    if right == 1:
        found.append("All of these rows are right already, so there is little to find: choose a harder --task.")
    answers, golds = ({p[name] for p in predictions} for name in ("answer", "gold"))
    if task.choices and len(answers) == 1 < len(golds) and not unread >= MOST:
        fixed = f"{task.template} {task.system}"
        named = all(re.search(rf"(?<!\w){re.escape(choice)}(?!\w)", fixed, re.I) for choice in task.choices)
        first = "choose a stronger --model" if named else "name the answers in --template"
        found.append(
            f"Every row is answered with {answers.pop()!r}, whatever it asks: {first}, or set another --extractor."
        )
    guess = guessing(task, train)
    if guess is not None and right <= guess and not unread >= MOST:
        found.append(
            f"The accuracy is not above that of always answering the commonest answer ({100 * guess:.0f} % of the "
            "training rows): the reasoning may say little about the answer. A stronger --model may be needed."
        )
    return found


# --- What the run will cost -----------------------------------------------------------------------------------


@dataclass
class Cost:
    """What a run is going to take, about: prompts that were scored before are not scored again, and rows in larger
    batches are faster than those of the check."""

    generations: dict[str, int]  # of search, dev and test
    minutes: dict[str, float]
    tokens: float
    memory: int  # bytes

    def line(self):
        parts = ", ".join(f"{name} {minutes:.1f}" for name, minutes in self.minutes.items())
        return (
            f"about {sum(self.generations.values())} generations, {self.tokens / 1e6:.2f} million tokens, "
            f"{sum(self.minutes.values()):.1f} minutes here ({parts}), {self.memory / 2**30:.1f} GiB of memory"
        )


def cost_of(engine, checked, rows, settings, counts):
    """The `Cost` of a search with these tokens.Rows; settings: SearchSettings; counts: {"finalists", "dev", "test"}."""
    tried = settings.tries_per_step
    generations = {
        "search": len(rows) * (1 + settings.steps * tried + settings.audited_prompts),
        "dev": (counts["finalists"] + 1) * counts["dev"],
        "test": 2 * counts["test"],
    }
    minutes = {name: count * checked.row_seconds / 60 / ranks.count() for name, count in generations.items()}
    read = settings.steps * len(rows) * len(rows[0].reads) * checked.tokens
    minutes["search"] += BACKWARD * read * checked.read_seconds / 60 / ranks.count()
    columns = max(len(row.question) for row in rows) + settings.max_prompt_tokens + settings.max_new_tokens
    at_once = min(settings.batch_size or engine.rows_that_fit(columns), len(rows) * tried)
    weights = sum(weight.numel() * weight.dtype.itemsize for weight in engine.model.parameters())
    memory = weights + engine.column_bytes * columns * (at_once + len(rows))
    return Cost(generations, minutes, sum(generations.values()) * checked.tokens + BACKWARD * read, memory)


REPLY_TOKENS = 100  # of an optimizer's reply, about


def text_cost(engine, checked, rows, settings, counts):
    """The `Cost` of a text method. counts: {"finalists", "dev", "test", "prompts", "samples"}, the last two of the
    search. The optimizer's minutes are those of the task model in its place, unless it is another: then they are left
    out."""
    generations = {
        "search": min(len(rows) * counts["prompts"], settings.budget or len(rows) * counts["prompts"]),
        "dev": (counts["finalists"] + 1) * counts["dev"],
        "test": 2 * counts["test"],
    }
    minutes = {name: count * checked.row_seconds / 60 / ranks.count() for name, count in generations.items()}
    if not (settings.optimizer_model or settings.optimizer_endpoint):
        reasoning = sum(prediction["tokens"] for prediction in checked.predictions) / len(checked.predictions)
        replies = counts["samples"] * REPLY_TOKENS * checked.row_seconds / max(1, reasoning)
        minutes["optimizer"] = replies / 60 / ranks.count()
    columns = max(len(row.question) for row in rows) + settings.longest_prompt + settings.max_new_tokens
    at_once = min(settings.batch_size or engine.rows_that_fit(columns), len(rows))
    weights = sum(weight.numel() * weight.dtype.itemsize for weight in engine.model.parameters())
    memory = weights + engine.column_bytes * columns * at_once
    return Cost(generations, minutes, sum(generations.values()) * checked.tokens, memory)


UNKNOWN_WORDS = 0.1  # the share of a meta-prompt's words from which on a model cannot follow it


def require_words(tokenizer, name, texts):
    """Errors: UserError if the tokenizer of the model `name` does not know many of the words of meta-prompts."""
    words = sorted({word for text in texts for word in re.findall(r"[a-z]+", text)})
    if tokenizer.unk_token_id is None or not words:
        return
    unknown = [word for word in words if tokenizer.unk_token_id in encode(tokenizer, " " + word)]
    require(
        len(unknown) < UNKNOWN_WORDS * len(words),
        f"the optimizer {name} does not know {len(unknown)} of the {len(words)} words of the meta-prompt, so it cannot "
        "follow it: name another with --optimizer-model, or a server with --optimizer-endpoint",
    )


def require_memory(engine, cost):
    """Errors: UserError if a CPU's memory does not hold the run."""
    memory = cost.memory * ranks.count_here()  # of all ranks (ranks.py)
    if engine.device.type != "cuda" and memory > physical_memory():
        there = physical_memory() / 2**30
        raise UserError(
            f"the run would take {memory / 2**30:.1f} GiB, this machine has {there:.0f}: lower --batch-size, "
            "--train-rows or --max-new-tokens"
        )

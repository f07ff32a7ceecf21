"""Who answers: a model loaded here, or one behind a server. Both are an `Answerer`: who evaluates need not know which.

A model loaded here answers rows in batches; torch is imported only when one is loaded. How a server is asked says
servers.py.
"""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property

from support import ranks
from support.evaluation import Generation, Written
from support.files import UserError, require, short_name
from support.identity import identity_of
from support.progress import Progress
from support.servers import Server, check_server
from support.tokens import chat_pieces, encode, encode_chat, encode_choices, encode_pieces, extractor_ids


@dataclass(frozen=True)
class Answerer:
    """What writes reasoning and answer.

    `generate(task, rows, prompt, settings, done)` yields lists of `Generation` in any order, none for an id in `done`.
    """

    name: str  # as tables show it
    identity: tuple  # what tells its texts from those of another: part of the evaluation's key
    generate: Callable
    endpoint: str = ""  # of a server, which is known by its model's name wherever it runs
    gives_log_probs: bool = True  # so that a task's possible answers can be ranked; else what is written is read
    progress: Progress | None = None  # of a model loaded here, whose tokens are counted as it generates them
    tokenizer: object | None = None  # of a model loaded here; nobody sees a server's
    # `write(chats, sampling)` is what an optimizer does: a list of `Written` for each chat, a list of messages.
    write: Callable | None = None


def open_answerer(flags, model, endpoint=""):
    """The Answerer that --model, or --endpoint and --model, name; the server is asked, the model loaded on demand."""
    if endpoint:
        return server_answerer(flags, endpoint, model)
    return LazyModel(model, flags.device, flags.dtype, flags.device_map).answerer()


# --- A model loaded here ------------------------------------------------------------------------------


@dataclass
class LazyModel:
    """A model that is loaded when it first has something to do: what is on disk is read again without it.

    Errors: of `identity` and `tokenizer`, and later of `engine`, those of engine.load_engine.
    """

    path: str  # a hub name or a local folder
    device: str
    dtype: str
    device_map: str = ""  # as of engine.load_engine
    progress: Progress = field(default_factory=Progress)

    @cached_property
    def engine(self):
        from support.engine import load_engine

        engine = load_engine(self.path, self.device, self.dtype, self.device_map)
        engine.progress = self.progress
        return engine

    @cached_property
    def tokenizer(self):
        from support.engine import load_tokenizer

        return load_tokenizer(self.path)

    @cached_property
    def dtype_here(self):
        """The name of the dtype in which it runs on this machine."""
        from support.engine import dtype_on, require_device

        return dtype_on(require_device(self.device), self.dtype)

    @cached_property
    def identity(self):
        """What `local_answerer` tells the loaded model from others by."""
        return identity_of(self.path), f"torch.{self.dtype_here}"

    def answerer(self):
        # It holds the model and not the other way round, so that a model that is done with leaves memory at once.
        return Answerer(
            short_name(self.path),
            self.identity,
            self.generate,
            progress=self.progress,
            tokenizer=self.tokenizer,
            write=self.write,
        )

    def generate(self, *work):
        """As `Answerer` says."""
        yield from LocalModel(self.engine).generate(*work)

    def write(self, chats, sampling):
        """As `Answerer` says."""
        return LocalModel(self.engine).write(chats, sampling)


def local_answerer(engine, path):
    """The Answerer that is the model of an `Engine`, loaded from `path`."""
    identity = (engine.identity, str(engine.model.dtype))
    model = LocalModel(engine)
    return Answerer(
        short_name(path),
        identity,
        model.generate,
        progress=engine.progress,
        tokenizer=engine.tokenizer,
        write=model.write,
    )


@dataclass(frozen=True)
class LocalModel:
    """A model loaded here, as one that answers."""

    engine: object  # engine.Engine, which is not imported here because it imports torch

    def generate(self, task, rows, prompt, settings, done):
        """As `Answerer` says, soon after rows end. Errors: UserError if the tokenizer does not know the prompt's
        words."""
        tokenizer = self.engine.tokenizer
        require_known(tokenizer, prompt)
        choices = encode_choices(tokenizer, task)  # here, so that its errors come before any work
        contexts = [(row, chat_of_row(tokenizer, task, row, prompt)) for row in rows]
        columns = max(len(ids) for _, ids in contexts) + settings.max_new_tokens
        behind = max(map(len, choices.reads)) if choices else settings.answer_tokens(task)
        self.engine.require_positions(columns + len(extractor_ids(tokenizer, task)) + behind)
        size = ranks.agreed(settings.batch_size or self.engine.rows_that_fit(columns))
        # A row's batch does not depend on what is done, and all of it is generated again for those of its rows that
        # are missing, so an evaluation that was killed ends with the same texts.
        for batch in batches_of_like_length(contexts, size * ranks.count()):
            if done.issuperset(row["id"] for row, _ in batch):
                continue
            own = ranks.share_of(batch)
            missing = [row for row, _ in own if row["id"] not in done]
            about = f"{prompt!r}, {self.engine.identity}, {len(batch)} rows from {batch[0][0]['id']}"
            yield from ranks.together(self.missing_of(task, own, settings, done), len(missing), about)

    def missing_of(self, task, batch, settings, done):
        """Lists of `Generation` of a batch, all of it generated at once, as its rows end; none for an id in `done`."""
        from torch import OutOfMemoryError

        if not batch:  # more ranks than rows
            return
        for ended in self.engine.stream([ids for _, ids in batch], settings.max_new_tokens, len(batch)):
            try:
                answered = self.answered(task, [batch[n][0] for n in ended.rows], ended, settings)
            except OutOfMemoryError:
                ended.again = True
                continue
            missing = [generation for generation in answered if generation.row["id"] not in done]
            if missing:
                yield missing

    def write(self, chats, sampling):
        """As `Answerer` says."""
        tokenizer = self.engine.tokenizer
        return self.continue_texts([encode_pieces(tokenizer, chat_pieces(tokenizer, chat)) for chat in chats], sampling)

    def continue_texts(self, sequences, sampling):
        """A list of `Written` for each sequence of ids: what the model writes behind it."""
        written = []
        for ids, samples in zip(sequences, self.engine.sample(sequences, sampling)):
            texts = []
            for sampled, stopped in samples:
                text = self.engine.tokenizer.decode(sampled, skip_special_tokens=True)
                texts.append(Written(text, len(sampled), 0 if texts else len(ids), not stopped))
            written.append(texts)
        return written

    def answered(self, task, rows, ended, settings):
        """The `Generation` of each of the rows whose reasoning has `Ended`: the answer stands behind the extractor, if
        there is one."""
        tokenizer, extractor = self.engine.tokenizer, extractor_ids(self.engine.tokenizer, task)
        for row, finite in zip(rows, ended.finite):
            require(finite, f"row {row['id']}: the model's logits are not finite.{self.engine.dtype_hint}")
        if task.ranks_choices:
            replies, choices = self.ranked(task, ended, extractor)
        elif task.is_generation:
            replies, choices = [[]] * len(rows), [None] * len(rows)
        else:
            replies = self.engine.go_on(ended, extractor, settings.answer_tokens(task))
            choices = [None] * len(rows)
        generations = []
        for row, ids, stopped, reply_ids, ranked in zip(rows, ended.ids, ended.stopped, replies, choices):
            text = tokenizer.decode(ids, skip_special_tokens=True)
            reply = tokenizer.decode(reply_ids, skip_special_tokens=True)
            generations.append(Generation(row, text, reply, len(ids), not stopped, ranked))
        return generations

    def ranked(self, task, ended, extractor):
        """(the likeliest token of each row behind the extractor, as a list of ids; {choice: log-probability} each)."""
        from support.answers import choice_log_probs, read_answers

        choices = encode_choices(self.engine.tokenizer, task)
        logits = read_answers(self.engine, ended.context, extractor, [choices.reads] * len(ended.rows))
        first = logits[:, 0, :1].argmax(-1).tolist()
        scores = []
        for log_probs in choice_log_probs(logits, choices).tolist():
            not_finite = f"the model's logits are not finite, so no answer is the likeliest.{self.engine.dtype_hint}"
            require(not any(map(math.isnan, log_probs)), not_finite)
            scores.append(dict(zip(task.choices, log_probs)))
        return first, scores


def require_known(tokenizer, prompt):
    """Errors: UserError if a tokenizer, where there is one to ask, does not know all words of a prompt's text."""
    if tokenizer is None:
        return
    unknown = tokenizer.unk_token_id is not None and tokenizer.unk_token_id in encode(tokenizer, " " + prompt)
    require(not unknown, f"the model's tokenizer does not know all of the prompt {prompt!r}: choose another")


def chat_of_row(tokenizer, task, row, prompt):
    """tokens.encode_chat of a data row. Errors: UserError that names it."""
    try:
        return encode_chat(tokenizer, task, row["question"], prompt)
    except UserError as error:
        raise UserError(f"row {row['id']}: {error}") from None


def batches_of_like_length(contexts, size):
    """Lists of at most `size` of the (row, context ids), each of rows of like length.

    The longest rows come first, so that memory runs out early. The other lists come in a random order, the same each
    time: were the short rows first, their speed would promise too much.
    """
    by_length = sorted(contexts, key=lambda context: -len(context[1]))
    longest, *others = [by_length[start : start + size] for start in range(0, len(by_length), size)]
    random.Random(len(contexts)).shuffle(others)
    return [longest, *others]


# --- A model behind a server ----------------------------------------------------------------------


def server_answerer(flags, endpoint, model):
    """The Answerer that is the model called `model` on the server at `endpoint`; `flags` are ServerFlags.

    Errors: UserError if the server is not there, does not have the model, refuses the key, or cannot continue an
    assistant's message although it shall (--answer-turn).
    """
    server = Server(endpoint, model, flags)
    server = replace(server, gives_log_probs=ranks.first(lambda: check_server(server)))
    identity = ("server", model, flags.answer_turn)

    def generate(*of_rows):
        return ranks.each_of_first(server.generate(*of_rows))

    def write(*of_chats):
        return ranks.first(lambda: server.write(*of_chats))

    return Answerer(short_name(model), identity, generate, endpoint, server.gives_log_probs, write=write)

"""Who answers: a model loaded here, or one behind a server. Both are an `Answerer`: who evaluates need not know which.

A model loaded here answers rows in batches; torch is imported only when one is loaded.

A server is OpenAI-compatible (vLLM, SGLang, llama.cpp, `transformers serve`). Requests go through huggingface_hub's
client, many at once, each with a time limit. What fails for a passing reason (429, 5xx, a closed connection, no answer
in time, a broken reply) is sent again after a growing pause. The key comes from an environment variable, is sent to
this endpoint only, and is kept out of every message.
"""

import asyncio
import itertools
import math
import os
import random
import urllib.parse
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace

from support.evaluation import Generation
from support.files import UserError, require, short_name, weights_hash
from support.progress import Progress
from support.settings import ServerFlags
from support.tokens import LARGEST_SHARE, encode, encode_chat, encode_choices, extensions, extractor_ids


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
    # `write(chats, sampling)` is what an optimizer does: a list of `Written` for each chat, a list of messages.
    write: Callable | None = None


@dataclass(frozen=True)
class Sampling:
    """How an optimizer's texts are drawn."""

    samples: int  # texts for each chat
    temperature: float  # 0: the likeliest token each time
    max_tokens: int
    seed: str  # the same seed, chats and machine give the same texts


@dataclass(frozen=True)
class Written:
    """A text that an optimizer wrote."""

    text: str
    tokens: int
    prompt_tokens: int  # of the chat, and of a chat's first sample only: it is read once for all
    truncated: bool = False  # cut at max_tokens


def open_answerer(flags, model, endpoint=""):
    """The Answerer that --model, or --endpoint and --model, name; the model is loaded, or the server asked."""
    if endpoint:
        return server_answerer(flags, endpoint, model)
    from support.engine import load_engine

    return local_answerer(load_engine(model, flags.device, flags.dtype), model)


# --- A model loaded here ------------------------------------------------------------------------------


def local_answerer(engine, path):
    """The Answerer that is the model of an `Engine`, loaded from `path`."""
    identity = (weights_hash(path), str(engine.model.dtype))
    model = LocalModel(engine)
    return Answerer(short_name(path), identity, model.generate, progress=engine.progress, write=model.write)


@dataclass(frozen=True)
class LocalModel:
    """A model loaded here, as one that answers."""

    engine: object  # engine.Engine, which is not imported here because it imports torch

    def generate(self, task, rows, prompt, settings, done):
        """As `Answerer` says, soon after rows end. Errors: UserError if the tokenizer does not know the prompt's
        words."""
        tokenizer = self.engine.tokenizer
        unknown = tokenizer.unk_token_id is not None and tokenizer.unk_token_id in encode(tokenizer, " " + prompt)
        require(not unknown, f"the model's tokenizer does not know all of the prompt {prompt!r}: choose another")
        choices = encode_choices(tokenizer, task)  # here, so that its errors come before any work
        contexts = [(row, encode_chat(tokenizer, task, row["question"], prompt)) for row in rows]
        columns = max(len(ids) for _, ids in contexts) + settings.max_new_tokens
        behind = max(map(len, choices.reads)) if choices else settings.answer_tokens(task)
        self.engine.require_positions(columns + len(extractor_ids(tokenizer, task)) + behind)
        size = settings.batch_size or self.engine.rows_that_fit(columns)
        # A row's batch does not depend on what is done, and all of it is generated again for those of its rows that
        # are missing, so an evaluation that was killed ends with the same texts.
        for batch in batches_of_like_length(contexts, size):
            if done.issuperset(row["id"] for row, _ in batch):
                continue
            for ended in self.engine.stream([ids for _, ids in batch], settings.max_new_tokens, len(batch)):
                answered = self.answered(task, [batch[n][0] for n in ended.rows], ended, settings)
                missing = [generation for generation in answered if generation.row["id"] not in done]
                if missing:
                    yield missing

    def write(self, chats, sampling):
        """As `Answerer` says."""
        template = self.engine.tokenizer.apply_chat_template
        texts = [template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
        return self.continue_texts([encode(self.engine.tokenizer, text) for text in texts], sampling)

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
        """The `Generation` of each of the rows whose reasoning has `Ended`: the answer stands behind the extractor."""
        tokenizer, extractor = self.engine.tokenizer, extractor_ids(self.engine.tokenizer, task)
        if task.ranks_choices:
            replies, choices = self.ranked(task, ended, extractor)
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
            not_finite = "the model's logits are not finite, so no answer is the likeliest: try --dtype float32"
            require(not any(map(math.isnan, log_probs)), not_finite)
            scores.append(dict(zip(task.choices, log_probs)))
        return first, scores


def batches_of_like_length(contexts, size):
    """Lists of at most `size` of the (row, context ids), each of rows of like length.

    The longest rows come first, so that memory runs out early. The other lists come in a random order, the same each
    time: were the short rows first, their speed would promise too much.
    """
    by_length = sorted(contexts, key=lambda context: -len(context[1]))
    longest, *others = [by_length[start : start + size] for start in range(0, len(by_length), size)]
    random.Random(len(contexts)).shuffle(others)
    return [longest, *others]


# --- A model behind a server ---------------------------------------------------------------------------

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 60.0  # seconds between two tries
CONNECTIONS = 100  # that one client opens at most
CONTINUE = {"continue_final_message": True, "add_generation_prompt": False}  # as vLLM and SGLang name it
LOG_PROBS = {"logprobs": True, "top_logprobs": 20}  # of as many likeliest tokens as servers give by default
CHECK_TRIES = 2  # whoever mistyped an address shall not wait long to be told


class ServerError(UserError):
    """A request that failed for good, in one line. `status` is the HTTP status, None where there was none."""

    def __init__(self, message, status=None):
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Server:
    """A model on a server, and how to ask it."""

    endpoint: str  # URL
    model: str  # the server's name for it
    flags: ServerFlags
    gives_log_probs: bool = False

    def read_key(self):
        """The server's key, "" for none: read from the environment where it is needed, and not kept here.

        Errors: UserError, without the key, if it cannot stand in a header.
        """
        key = os.environ.get(self.flags.key_variable, "").strip()
        good = key.isascii() and key.isprintable() and " " not in key
        require(good, f"{self.flags.key_variable} does not hold a key: it has spaces or other odd characters")
        return key

    def open_clients(self):
        """As many clients of huggingface_hub as the requests under way need connections."""
        from huggingface_hub import AsyncInferenceClient

        # Without a key of its own the client would send the user's token for the hub to whatever server this is.
        key = self.read_key() or "none"
        count = math.ceil(self.flags.concurrency / CONNECTIONS)
        return [AsyncInferenceClient(base_url=self.endpoint, api_key=key) for _ in range(count)]

    def generate(self, task, rows, prompt, settings, done):
        """As `Answerer.generate`. Errors: UserError if a request fails for good."""

        async def ask_row(client, row):
            turns = [{"role": "user", "content": task.user_turn(row["question"], prompt)}]
            reasoning = await chat(client, self, turns, settings.max_new_tokens)
            choices = None
            if task.ranks_choices and self.gives_log_probs:
                reply, choices = await rank_choices(client, self, turns, reasoning.text, task)
            if not choices:  # what is written is read
                turns, fields = answer_turns(self.flags.answer_turn, turns, reasoning.text, task.extractor)
                reply = await chat(client, self, turns, settings.answer_tokens(task), fields)
            return Generation(row, reasoning.text, reply.text, reasoning.tokens, reasoning.truncated, choices)

        missing = [row for row in rows if row["id"] not in done]
        try:
            yield from in_parallel(self, ask_row, missing)
        except ServerError as error:
            raise UserError(f"{error}; what was answered is on disk, and the same command goes on from there") from None

    def write(self, chats, sampling):
        """As `Answerer` says: a request for each sample, with a seed of its own, as not every server knows how to give
        several. Errors: UserError if one fails for good."""

        async def ask(client, job):
            number, sample = job
            seed = random.Random(f"{sampling.seed}/{number}/{sample}").randrange(2**31)
            fields = {"temperature": sampling.temperature, "top_p": 1.0, "seed": seed}
            reply = await chat(client, self, chats[number], sampling.max_tokens, fields)
            return job, Written(reply.text, reply.tokens, 0 if sample else reply.prompt_tokens, reply.truncated)

        jobs = list(itertools.product(range(len(chats)), range(sampling.samples)))
        written = dict(itertools.chain.from_iterable(in_parallel(self, ask, jobs)))
        return [[written[number, sample] for sample in range(sampling.samples)] for number in range(len(chats))]


def server_answerer(flags, endpoint, model):
    """The Answerer that is the model called `model` on the server at `endpoint`; `flags` are ServerFlags.

    Errors: UserError if the server is not there, does not have the model, refuses the key, or cannot continue an
    assistant's message although it shall (--answer-turn).
    """
    gives_log_probs = check_server(Server(endpoint, model, flags))
    server = Server(endpoint, model, flags, gives_log_probs)
    identity = ("server", model, flags.answer_turn)
    return Answerer(short_name(model), identity, server.generate, endpoint, gives_log_probs, write=server.write)


def answer_turns(answer_turn, turns, reasoning, extractor):
    """(messages, more fields of the request) that ask for the answer behind the extractor.

    `ask` puts the extractor as a turn of its own. Every server can do that, but the paper appends it to the
    reasoning, and so do we where a model is loaded here.
    """
    if answer_turn == "ask":
        return [*turns, {"role": "assistant", "content": reasoning}, {"role": "user", "content": extractor}], {}
    half_written = {"role": "assistant", "content": f"{reasoning} {extractor}".strip()}
    return [*turns, half_written], CONTINUE if answer_turn == "continue" else {}


async def rank_choices(client, server, turns, reasoning, task):
    """(the `Reply` of one token behind the extractor, {choice: its log-probability there}).

    A choice of several tokens takes a request for each place where it parts from the others. One that is nowhere among
    the likeliest tokens is left out; None where all are.
    """
    texts = {choice: task.answer_prefix + choice for choice in task.choices}
    whole, paths = {}, {}  # of each choice: log-probability, tokens
    # Each way: what was read of a text, its tokens, their log-probability, the choices that go this way.
    waiting, first = [("", (), 0.0, list(texts))], None
    while waiting:
        begun, path, log_prob, here = waiting.pop()
        asked, fields = answer_turns(server.flags.answer_turn, turns, reasoning, task.extractor + begun)
        reply = await chat(client, server, asked, 1, fields | LOG_PROBS)
        first = first or reply
        further = {}  # {token: (letters read, choices)}
        for choice in here:
            token, length = longest_start(reply.likeliest, texts[choice][len(begun) :], at_first=not path)
            if not token:
                continue
            if len(begun) + length == len(texts[choice]):
                whole[choice], paths[choice] = log_prob + reply.likeliest[token], (*path, token)
            else:
                further.setdefault(token, (length, []))[1].append(choice)
        for token, (length, choices) in further.items():
            text = texts[choices[0]][: len(begun) + length]
            waiting.append((text, (*path, token), log_prob + reply.likeliest[token], choices))
    return first, without_longer(whole, paths) or None


def longest_start(tokens, text, at_first):
    """(the token that covers most of the text's start, how many of its letters), ("", 0) for none.

    A tokenizer that marks spaces may show a word without the one before it. at_first: right behind the extractor, where
    a message that lost its last space is followed by a word with one.
    """
    word = text.lstrip()
    best = "", 0
    for token in tokens:
        begins = token.lstrip() if at_first else token
        if token and text.startswith(token):
            found = token, len(token)
        elif begins and word.startswith(begins):
            found = token, len(text) - len(word) + len(begins)
        else:
            continue
        best = max(best, found, key=lambda found: (found[1], text.startswith(found[0])))
    return best


def without_longer(whole, paths):
    """{choice: log-probability} less that of choices that begin with it, as answers.choice_log_probs has it."""
    names, taken = list(whole), dict.fromkeys(whole, 0.0)
    for shorter, longer in extensions([paths[name] for name in names]):
        taken[names[shorter]] += math.exp(whole[names[longer]] - whole[names[shorter]])
    return {name: whole[name] + math.log1p(-min(taken[name], LARGEST_SHARE)) for name in names}


# --- Is the server fit for it? ---------------------------------------------------------------------------


def check_server(server):
    """Short requests before any long work: is the server there, has it the model, does it continue a message?
    Returns whether it gives log-probabilities of tokens behind a half-written message.

    A server that continues an assistant's message reads fewer prompt tokens than one that closes it and opens
    another; one that ignores the fields that ask for it reads as many.
    """
    server.read_key()  # a bad one is refused before anything is sent
    require_address(server)
    question = {"role": "user", "content": "1"}
    begun = {"role": "assistant", "content": "1"}
    if server.flags.answer_turn == "ask":  # a turn of its own cannot be followed into an answer of several tokens
        ask_one_token(server, [question])
        return False
    try:
        gives_log_probs = bool(ask_one_token(server, [question], LOG_PROBS).likeliest)
    except ServerError as error:  # for this or for another reason, which shows without the fields, too
        if error.status in (401, 403):
            raise
        ask_one_token(server, [question])
        gives_log_probs = False
    if server.flags.answer_turn == "prefill":
        return gives_log_probs
    way_out = "--answer-turn ask puts the extractor as a turn of its own, prefill trusts in servers that go on anyway"
    try:
        closed = ask_one_token(server, [question, begun])
        continued = ask_one_token(server, [question, begun], CONTINUE)
    except ServerError as error:
        require(error.status not in (400, 422), f"{error}; it cannot continue an assistant's message: {way_out}")
        raise
    shorter = continued.prompt_tokens < closed.prompt_tokens
    require(shorter, f"--endpoint {server.endpoint} does not continue an assistant's message: {way_out}")
    return gives_log_probs


def require_address(server):
    """Errors: UserError if the endpoint is no plain URL."""
    address = urllib.parse.urlsplit(server.endpoint)
    valid = address.scheme in ("http", "https") and address.hostname
    require(valid, f"--endpoint {server.endpoint!r} is no URL such as http://localhost:8000/v1")
    require("@" not in address.netloc, f"a key does not belong in a URL: set it as {server.flags.key_variable}")


def ask_one_token(server, turns, fields=None):
    """The `Reply`, of one token, to the messages `turns`. Errors: ServerError."""
    hasty = replace(server, flags=replace(server.flags, tries=CHECK_TRIES))

    async def ask(client, messages):
        return await chat(client, hasty, messages, 1, fields)

    [[reply]] = in_parallel(hasty, ask, [turns])
    return reply


# --- Requests -------------------------------------------------------------------------------------------


def in_parallel(server, ask, items):
    """Yield lists of the results of `await ask(client, item)`, one for each item, as they come; at most
    --concurrency are under way.

    When one fails for good no more are begun, those under way are waited for and yielded, then the error is raised.
    """
    waiting, running, failure = deque(items), set(), None
    with asyncio.Runner() as runner:
        clients = server.open_clients()
        next_client = itertools.cycle(clients)
        while running or (waiting and not failure):
            while waiting and not failure and len(running) < server.flags.concurrency:
                request = ask(next(next_client), waiting.popleft())
                running.add(runner.get_loop().create_task(request))
            finished, running = runner.run(asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED))
            results = []
            for request in finished:
                if request.exception():
                    failure = failure or request.exception()
                else:
                    results.append(request.result())
            if results:
                yield results
        for client in clients:
            runner.run(client.close())
    if isinstance(failure, ServerError):
        raise ServerError(f"--endpoint {server.endpoint}: {failure}", failure.status)
    if failure:
        raise failure


@dataclass(frozen=True)
class Reply:
    """What the model wrote to some messages."""

    text: str
    tokens: int  # generated
    prompt_tokens: int
    truncated: bool
    likeliest: dict[str, float]  # {token: its log-probability} where the reply begins; empty where not asked for


@dataclass(frozen=True)
class Failure:
    """Why a try gave no reply."""

    reason: str  # in a few words
    status: int | None = None  # of HTTP; None: no answer, or one that cannot be read
    pause: float = 0.0  # seconds that the server asks to wait

    @property
    def passing(self):
        """Whether another try may do better."""
        return self.status is None or self.status in (408, 429) or self.status >= 500


async def chat(client, server, turns, max_tokens, fields=None):
    """The `Reply` to the messages `turns`, greedy unless `fields`, more of the request, has another temperature.

    Errors: ServerError for a refusal, or when all tries have failed.
    """
    for attempt in range(1, server.flags.tries + 1):
        try:
            request = client.chat_completion(
                turns, model=server.model, max_tokens=max_tokens, temperature=0.0, extra_body=fields
            )
            return as_reply(await asyncio.wait_for(request, server.flags.request_timeout))
        except Exception as error:  # the client's own, its HTTP library's, and those of taking a broken reply apart
            failure = explain(error, server)
        if not failure.passing or attempt == server.flags.tries:
            tries = f", {attempt} tries" if attempt > 1 else ""
            raise ServerError(failure.reason + tries, failure.status)
        await asyncio.sleep(pause_before_next_try(attempt, failure))


def pause_before_next_try(attempt, failure):
    """Seconds: doubled with each try, at least what the server asks for, and not the same for all that wait."""
    doubled = FIRST_PAUSE * 2 ** (attempt - 1)
    return min(LONGEST_PAUSE, max(failure.pause, doubled)) * random.uniform(1, 1.3)


def as_reply(output):
    choice, usage = output.choices[0], output.usage
    truncated = choice.finish_reason == "length"
    tokens = usage.completion_tokens - (not truncated)  # servers count the end token, we do not
    places = choice.logprobs.content if choice.logprobs else ()
    likeliest = {top.token: top.logprob for top in places[0].top_logprobs or ()} if places else {}
    return Reply(choice.message.content or "", max(0, tokens), usage.prompt_tokens, truncated, likeliest)


def explain(error, server):
    """The `Failure` behind an exception of a try."""
    if isinstance(error, TimeoutError):
        return Failure(f"no answer in {server.flags.request_timeout:g} s (--request-timeout)")
    response = getattr(error, "response", None)
    if response is None:
        return Failure(f"{type(error).__name__}: {in_short(str(error), server.read_key()) or 'no reply'}")
    hints = {
        401: f"; its key belongs in {server.flags.key_variable}",
        404: f"; does it have --model {server.model}?",
    }
    status = response.status_code
    asked = response.headers.get("retry-after", "")
    return Failure(
        f"HTTP {status} {in_short(response.text, server.read_key())}{hints.get(status, '')}",
        status,
        float(asked) if asked.isdigit() else 0.0,
    )


def in_short(text, key):
    """The text's first 200 characters on one line; hidden is every copy of the key in it."""
    hidden = text.replace(key, "***") if key else text
    return " ".join(hidden.split())[:200]

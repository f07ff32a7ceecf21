"""A model behind a server with the OpenAI-compatible chat API (vLLM, SGLang, llama.cpp, `transformers serve`).

Requests go through huggingface_hub's client, many at once, each with a time limit. What fails for a passing reason
(429, 5xx, a closed connection, no answer in time, a broken reply) is sent again after a growing pause. The key comes
from an environment variable, is sent to this endpoint only, and is kept out of every message.
"""

import asyncio
import itertools
import math
import os
import random
import urllib.parse
from collections import deque
from dataclasses import dataclass, replace

from support.evaluation import Generation
from support.files import UserError, require
from support.settings import ServerFlags
from support.tokens import LARGEST_SHARE, extensions

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
    """The greedy `Reply` to the messages `turns`. fields: more of the request.

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

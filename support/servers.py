"""A model behind a server with the OpenAI-compatible chat API (vLLM, SGLang, llama.cpp, `transformers serve`).

Many requests are under way at once, each with a time limit. What fails for a passing reason (429, 5xx, a closed
connection, no answer in time, a broken or empty reply) is sent again after a growing pause. The key comes from an
environment variable, is sent to this endpoint only, and is kept out of every message. Nothing that a server sends is
taken on trust: a reply's size is bounded, no redirect is followed, and replies.py checks every field.

Requests go through huggingface_hub's HTTP sessions. Its own client for chats does not fit: it reads a reply of any
size, follows redirects, and asks no server at all, not even one on this machine, where HF_HUB_OFFLINE is set.
"""

import asyncio
import itertools
import json
import math
import os
import random
import sys
import urllib.parse
from collections import deque
from dataclasses import dataclass, field, replace

from tqdm import tqdm

from support.evaluation import Generation, Written
from support.files import UserError, is_text, require
from support.replies import LARGEST_REPLY, BrokenReply, Reply, as_reply
from support.settings import ServerFlags
from support.tokens import LARGEST_SHARE, extensions

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 60.0  # seconds between two tries, also where the server asks for a longer one
CONNECTIONS = 100  # that one session opens at most
CONTINUE = {"continue_final_message": True, "add_generation_prompt": False}  # as vLLM and SGLang name it
LOG_PROBS = {"logprobs": True, "top_logprobs": 20}  # of as many likeliest tokens as servers give by default
CHECK_TRIES = 2  # whoever mistyped an address shall not wait long to be told
NEW_LENGTH_FIELD = "max_completion_tokens"  # OpenAI's newer name for max_tokens


class ServerError(UserError):
    """A request that failed for good, in one line. `status` is the HTTP status, None where there was none."""

    def __init__(self, message, status=None):
        super().__init__(message)
        self.status = status


@dataclass
class Learned:
    """What was learned about a server from its replies. One object is shared by all who ask this server."""

    length_field: str = "max_tokens"  # what it calls the longest reply, or NEW_LENGTH_FIELD
    notes: set[str] = field(default_factory=set)  # those already printed

    def say_once(self, note):
        """Print a note on stderr, the first time only."""
        if note not in self.notes:
            self.notes.add(note)
            tqdm.write(f"note: {note}", file=sys.stderr)  # above a bar, not into it


@dataclass(frozen=True)
class Server:
    """A model on a server, and how to ask it."""

    endpoint: str  # URL
    model: str  # the server's name for it
    flags: ServerFlags
    gives_log_probs: bool = False
    learned: Learned = field(default_factory=Learned, compare=False)

    @property
    def address(self):
        """The URL of its chats: /chat/completions is put behind the endpoint, and /v1 before that if it is not there.

        Errors: ValueError for an endpoint that cannot be taken apart.
        """
        parts = urllib.parse.urlsplit(self.endpoint)
        path = parts.path.rstrip("/")
        if not path.endswith("/chat/completions"):
            path += "/chat/completions" if path.endswith("/v1") else "/v1/chat/completions"
        return parts._replace(path=path).geturl()

    def read_key(self):
        """The server's key, "" for none: read from the environment where it is needed, and not kept here.

        Errors: UserError, without the key, if it cannot stand in a header.
        """
        key = os.environ.get(self.flags.key_variable, "").strip()
        good = key.isascii() and key.isprintable() and " " not in key
        require(good, f"{self.flags.key_variable} does not hold a key: it has spaces or other odd characters")
        return key

    def open_sessions(self):
        """As many HTTP sessions as the requests under way need connections."""
        from huggingface_hub import get_async_session

        sessions = [get_async_session() for _ in range(math.ceil(self.flags.concurrency / CONNECTIONS))]
        for session in sessions:
            session.event_hooks = {}  # they refuse every request under HF_HUB_OFFLINE, which is about the hub
            session.follow_redirects = False
        return sessions

    def generate(self, task, rows, prompt, settings, done):
        """As `Answerer.generate`. Errors: UserError if a request fails for good."""

        async def ask_row(session, row):
            try:
                return await self.answered(session, task, row, prompt, settings)
            except ServerError as error:
                raise ServerError(f"row {row['id']}: {error}", error.status) from None

        missing = [row for row in rows if row["id"] not in done]
        try:
            yield from in_parallel(self, ask_row, missing)
        except ServerError as error:
            raise UserError(f"{error}; what was answered is on disk, and the same command goes on from there") from None

    def write(self, chats, sampling):
        """As `Answerer` says: a request for each sample, with a seed of its own, as not every server knows how to give
        several. Errors: UserError if one fails for good."""

        async def ask(session, job):
            number, sample = job
            seed = random.Random(f"{sampling.seed}/{number}/{sample}").randrange(2**31)
            fields = {"temperature": sampling.temperature, "top_p": 1.0, "seed": seed}
            reply = await chat(session, self, chats[number], sampling.max_tokens, fields)
            return job, Written(reply.text, reply.tokens, 0 if sample else reply.prompt_tokens, reply.truncated)

        jobs = list(itertools.product(range(len(chats)), range(sampling.samples)))
        written = dict(itertools.chain.from_iterable(in_parallel(self, ask, jobs)))
        return [[written[number, sample] for sample in range(sampling.samples)] for number in range(len(chats))]

    async def answered(self, session, task, row, prompt, settings):
        """The `Generation` of one row. Errors: ServerError."""
        turns = task.messages(row["question"], prompt)
        reasoning = await chat(session, self, turns, settings.max_new_tokens)
        if task.is_generation:  # all of it is the answer
            return Generation(row, reasoning.text, "", reasoning.tokens, reasoning.truncated)
        choices = None
        if task.ranks_choices and self.gives_log_probs:
            reply, choices = await rank_choices(session, self, turns, reasoning.text, task)
        if not choices:  # what is written is read
            turns, fields = answer_turns(self.flags.answer_turn, turns, reasoning.text, task.extractor)
            reply = await chat(session, self, turns, settings.answer_tokens(task), fields)
        return Generation(row, reasoning.text, reply.text, reasoning.tokens, reasoning.truncated, choices)


def answer_turns(answer_turn, turns, reasoning, extractor):
    """(messages, more fields of the request) that ask for the answer behind the extractor.

    `ask` puts the extractor as a turn of its own. Every server can do that, but the paper appends it to the
    reasoning, and so do we where a model is loaded here.
    """
    if answer_turn == "ask":
        return [*turns, {"role": "assistant", "content": reasoning}, {"role": "user", "content": extractor}], {}
    half_written = {"role": "assistant", "content": f"{reasoning} {extractor}".strip()}
    return [*turns, half_written], CONTINUE if answer_turn == "continue" else {}


async def rank_choices(session, server, turns, reasoning, task):
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
        reply = await chat(session, server, asked, 1, fields | LOG_PROBS)
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
    where, counts = f"--endpoint {server.endpoint}", (continued.prompt_tokens, closed.prompt_tokens)
    require(None not in counts, f"{where} counts no tokens (usage), by which to see if it continues: {way_out}")
    require(counts[0] < counts[1], f"{where} does not continue an assistant's message: {way_out}")
    return gives_log_probs


def require_address(server):
    """Errors: UserError if the endpoint is no plain URL, or the model's name no text."""
    # Whatever stands before an @ may be a key: not even a broken URL is shown with it.
    require("@" not in server.endpoint, f"a key does not belong in a URL: set it as {server.flags.key_variable}")
    try:
        address = urllib.parse.urlsplit(server.endpoint)
        plain = address.scheme in ("http", "https") and address.hostname and address.port != 0
    except ValueError:  # a port that is no number, brackets that do not match
        plain = False
    plain = plain and server.endpoint.isprintable() and " " not in server.endpoint and not address.fragment
    require(plain, f"--endpoint {server.endpoint!r} is no URL such as http://localhost:8000/v1")
    require(server.model and is_text(server.model), f"--model {server.model!r} is no name of a model")


def ask_one_token(server, turns, fields=None):
    """The `Reply`, of one token, to the messages `turns`. Errors: ServerError."""
    hasty = replace(server, flags=replace(server.flags, tries=CHECK_TRIES))

    async def ask(session, messages):
        return await chat(session, hasty, messages, 1, fields)

    [[reply]] = in_parallel(hasty, ask, [turns])
    return reply


# --- Requests -------------------------------------------------------------------------------------------


def in_parallel(server, ask, items):
    """Yield lists of the results of `await ask(session, item)`, one for each item, as they come; at most
    --concurrency are under way.

    When one fails for good no more are begun, those under way are waited for and yielded, then the error is raised.
    """
    waiting, running, failure = deque(items), set(), None
    with asyncio.Runner() as runner:
        sessions = server.open_sessions()
        next_session = itertools.cycle(sessions)
        while running or (waiting and not failure):
            while waiting and not failure and len(running) < server.flags.concurrency:
                request = ask(next(next_session), waiting.popleft())
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
        for session in sessions:
            runner.run(session.aclose())
    if isinstance(failure, ServerError):
        raise ServerError(f"--endpoint {server.endpoint}: {failure}", failure.status)
    if failure:
        raise failure


@dataclass(frozen=True)
class Failure:
    """Why a try gave no reply."""

    reason: str  # in a few words
    status: int | None = None  # of HTTP; None: no answer, or one that cannot be read
    pause: float = 0.0  # seconds that the server asks to wait
    names_new_length_field: bool = False

    @property
    def passing(self):
        """Whether another try may do better."""
        return self.status is None or self.status in (408, 429) or self.status >= 500


async def chat(session, server, turns, max_tokens, fields=None):
    """The `Reply` to the messages `turns`, greedy unless `fields`, more of the request, has another temperature.

    Errors: ServerError for a refusal, or when all tries have failed.
    """
    require(is_text(json.dumps(turns, ensure_ascii=False)), "half a surrogate pair in a text: it cannot be sent")
    request = {"model": server.model, "messages": turns, "temperature": 0.0} | (fields or {})
    attempt = 1
    while True:
        length_field = server.learned.length_field
        outcome = await one_try(session, server, request | {length_field: max_tokens}, may_be_empty=max_tokens == 1)
        if isinstance(outcome, Reply):
            if max_tokens > 1:  # one token says little about how the server writes
                note_oddities(server, outcome)
            return outcome
        if outcome.names_new_length_field and length_field != NEW_LENGTH_FIELD:
            server.learned.length_field = NEW_LENGTH_FIELD
            continue
        if not outcome.passing or attempt == server.flags.tries:
            tries = f", {attempt} tries" if attempt > 1 else ""
            raise ServerError(outcome.reason + tries, outcome.status)
        await asyncio.sleep(pause_before_next_try(attempt, outcome))
        attempt += 1


def note_oddities(server, reply):
    """Say what of a reply is not as one would think, once for each server."""
    where = f"--endpoint {server.endpoint}"
    if reply.found_in != "content":
        server.learned.say_once(f"{where} sends replies without content: what stands in {reply.found_in} is taken")
    if reply.tokens is None:
        server.learned.say_once(f"{where} counts no tokens (usage): how many it generates is not known")


def pause_before_next_try(attempt, failure):
    """Seconds: doubled with each try, at least what the server asks for, and not the same for all that wait."""
    doubled = FIRST_PAUSE * 2 ** (attempt - 1)
    return min(LONGEST_PAUSE, max(failure.pause, doubled)) * random.uniform(1, 1.3)


async def one_try(session, server, request, may_be_empty):
    """The `Reply` to a request as JSON, or the `Failure`. may_be_empty: as for `as_reply`."""
    key = server.read_key()
    try:
        async with asyncio.timeout(server.flags.request_timeout):
            response, body = await post(session, server.address, request, key)
        if response.is_success:
            return as_reply(body, may_be_empty)
    except TimeoutError:
        return Failure(f"no answer in {server.flags.request_timeout:g} s (--request-timeout)")
    except BrokenReply as error:
        return Failure(in_short(str(error), key))
    except Exception as error:  # those of the HTTP library, of which there are many
        return Failure(f"{type(error).__name__}: {in_short(str(error), key) or 'no reply'}")
    return refusal(response, body.decode(errors="replace"), server)


async def post(session, address, request, key):
    """(response, its body as bytes), of which at most a little more than LARGEST_REPLY is read and kept."""
    headers = {"authorization": f"Bearer {key}"} if key else {}
    async with session.stream("POST", address, json=request, headers=headers) as response:
        body = bytearray()
        async for part in response.aiter_bytes():  # decompressed piece by piece
            body += part
            if len(body) > LARGEST_REPLY:
                break
    return response, bytes(body)


def refusal(response, text, server):
    """The `Failure` behind a response that is no success; `text` is its body."""
    status, key = response.status_code, server.read_key()
    if 300 <= status < 400:
        elsewhere = in_short(response.headers.get("location", "nowhere"), key)
        way_out = "redirects are not followed; if that address is right, name it as the endpoint"
        return Failure(f"HTTP {status} points to {elsewhere}: {way_out}", status)
    hints = {
        401: f"; its key belongs in {server.flags.key_variable}",
        404: f"; does it have --model {server.model}?",
    }
    seconds = response.headers.get("retry-after", "")
    return Failure(
        f"HTTP {status} {in_short(text, key)}{hints.get(status, '')}",
        status,
        float(seconds) if seconds.isascii() and seconds.isdecimal() else 0.0,
        status in (400, 422) and NEW_LENGTH_FIELD in text,
    )


def in_short(text, key):
    """The text's first 200 characters on one line that a terminal can show; hidden is every copy of the key in it."""
    hidden = text.replace(key, "***") if key else text
    printable = "".join(character if character.isprintable() else " " for character in hidden)
    return " ".join(printable.split())[:200]

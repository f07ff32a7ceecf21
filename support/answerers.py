"""A model behind an OpenAI-compatible server (vLLM, SGLang, llama.cpp, `transformers serve`) as one that answers.

Requests go through huggingface_hub's client, many at once, each with a time limit. What fails for a passing reason
(429, 5xx, a closed connection, no answer in time, a broken reply) is sent again after a growing pause. The key comes
from an environment variable, is sent to this endpoint only, and is kept out of every message.
"""

import asyncio
import os
import random
import urllib.parse
from collections.abc import Callable
from dataclasses import dataclass

from support.files import UserError, require, short_name, weights_hash


@dataclass(frozen=True)
class Answerer:
    """What writes reasoning and answer.

    `generate(task, rows, prompt, settings, done)` yields lists of (row, reasoning text, reply behind the extractor,
    number of reasoning tokens, whether it was cut at the limit), in any order; not for the ids in `done`.
    """

    name: str  # as tables show it
    identity: tuple  # what tells its texts from those of another: part of the evaluation's key
    generate: Callable
    endpoint: str = ""  # of a server, which is known by its model's name wherever it runs


def open_answerer(flags, model, endpoint=""):
    """The Answerer that --model, or --endpoint and --model, name; the model is loaded, or the server asked."""
    if endpoint:
        return server_answerer(flags, endpoint, model)
    from support.engine import load_model

    return local_answerer(*load_model(model, flags.device, flags.dtype), model)


# --- A model loaded here ------------------------------------------------------------------------------


def local_answerer(model, tokenizer, path):
    """The Answerer that is the model loaded here from `path`."""
    from greater_core import answer_ids, encode, generate_greedily
    from support.engine import rows_for_generation

    def context_ids(task, row, prompt):
        turn = [{"role": "user", "content": task.user_turn(row["question"], prompt)}]
        return encode(tokenizer, tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))

    def generate(task, rows, prompt, settings, done):
        unknown = tokenizer.unk_token_id is not None and tokenizer.unk_token_id in encode(tokenizer, " " + prompt)
        require(not unknown, f"the model's tokenizer does not know all of the prompt {prompt!r}: choose another")
        contexts = {row["id"]: context_ids(task, row, prompt) for row in rows}
        ordered = sorted(rows, key=lambda row: len(contexts[row["id"]]))
        columns = max(map(len, contexts.values())) + settings.max_new_tokens
        size = settings.batch_size or rows_for_generation(model, columns)
        # A batch is whole or not there, so an evaluation that was killed goes on with the same batches.
        for start in range(0, len(rows), size):
            batch = ordered[start : start + size]
            if done.issuperset(row["id"] for row in batch):
                continue
            asked = [contexts[row["id"]] for row in batch]
            reasoning = generate_greedily(model, asked, settings.max_new_tokens, size)
            extractors = [answer_ids(tokenizer, task, row["answer"])[0] for row in batch]
            asked = [context + ids + more for context, (ids, _), more in zip(asked, reasoning, extractors)]
            replies = generate_greedily(model, asked, settings.answer_tokens(task), size)
            yield [
                (row, *(tokenizer.decode(part, skip_special_tokens=True) for part in (ids, reply)), len(ids), not ended)
                for row, (ids, ended), (reply, _) in zip(batch, reasoning, replies)
                if row["id"] not in done
            ]

    return Answerer(short_name(path), (weights_hash(path), str(model.dtype)), generate)


# --- A model behind a server ---------------------------------------------------------------------------

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 60.0  # seconds between two tries
CONNECTIONS = 100  # that one client opens at most
CONTINUE = {"continue_final_message": True, "add_generation_prompt": False}  # as vLLM and SGLang name it


@dataclass(frozen=True)
class Reply:
    text: str
    tokens: int  # generated
    prompt_tokens: int
    truncated: bool


class ServerError(UserError):
    """A request that failed for good, in one line. `status` is the HTTP status, None where there was none."""

    def __init__(self, message, status=None):
        super().__init__(message)
        self.status = status


def server_answerer(flags, endpoint, model):
    """The Answerer that is the model called `model` on the server at `endpoint`; `flags` are ServerFlags.

    Errors: UserError if the server is not there, does not have the model, refuses the key, or cannot continue an
    assistant's message although it shall (--answer-turn).
    """
    check_server(flags, endpoint, model)

    async def ask_row(client, task, row, prompt, settings):
        turns = [{"role": "user", "content": task.user_turn(row["question"], prompt)}]
        reasoning = await chat(client, flags, model, turns, settings.max_new_tokens)
        turns, fields = answer_turns(flags.answer_turn, turns, reasoning.text, task.extractor)
        reply = await chat(client, flags, model, turns, settings.answer_tokens(task), fields)
        return row, reasoning.text, reply.text, reasoning.tokens, reasoning.truncated

    def generate(task, rows, prompt, settings, done):
        def ask(client, row):
            return ask_row(client, task, row, prompt, settings)

        try:
            yield from in_parallel(flags, endpoint, ask, [row for row in rows if row["id"] not in done])
        except ServerError as error:
            raise UserError(f"{error}; what was answered is on disk, and the same command goes on from there") from None

    return Answerer(short_name(model), ("server", model, flags.answer_turn), generate, endpoint)


def answer_turns(answer_turn, turns, reasoning, extractor):
    """(messages, more fields of the request) that ask for the answer behind the extractor.

    `ask` puts the extractor as a turn of its own. Every server can do that, but the paper appends it to the
    reasoning, and so do we where a model is loaded here.
    """
    if answer_turn == "ask":
        return [*turns, {"role": "assistant", "content": reasoning}, {"role": "user", "content": extractor}], {}
    half_written = {"role": "assistant", "content": f"{reasoning} {extractor}".strip()}
    return [*turns, half_written], CONTINUE if answer_turn == "continue" else {}


def check_server(flags, endpoint, model):
    """Short requests before any long work: is the server there, has it the model, does it continue a message?

    A server that continues an assistant's message reads fewer prompt tokens than one that closes it and opens
    another; one that ignores the fields that ask for it reads as many.
    """
    server_key(flags)
    address = urllib.parse.urlsplit(endpoint)
    valid = address.scheme in ("http", "https") and address.hostname
    require(valid, f"--endpoint {endpoint!r} is no URL such as http://localhost:8000/v1")
    require("@" not in address.netloc, f"a key does not belong in a URL: set it as {flags.key_variable}")
    turns = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "1"}]

    def short(messages, fields=None):
        def ask(client, turns):
            return chat(client, flags, model, turns, 1, fields, tries=2)

        return list(in_parallel(flags, endpoint, ask, [messages]))[0][0]

    short(turns[:1])
    if flags.answer_turn != "continue":
        return
    way_out = "--answer-turn ask puts the extractor as a turn of its own, prefill trusts in servers that go on anyway"
    try:
        closed, continued = short(turns), short(turns, CONTINUE)
    except ServerError as error:
        require(error.status not in (400, 422), f"{error}; it cannot continue an assistant's message: {way_out}")
        raise
    shorter = continued.prompt_tokens < closed.prompt_tokens
    require(shorter, f"--endpoint {endpoint} does not continue an assistant's message: {way_out}")


def in_parallel(flags, endpoint, ask, items):
    """Yield [result of `await ask(client, item)`] for each item as they come, at most flags.concurrency under way.

    When one fails for good no more are begun, those under way are waited for and yielded, then the error is raised.
    """
    from huggingface_hub import AsyncInferenceClient

    # Without a key of its own the client would send the user's token for the hub to whatever server this is.
    key = server_key(flags) or "none"
    waiting, running, failure = list(reversed(items)), set(), None
    with asyncio.Runner() as runner:
        some = range(0, flags.concurrency, CONNECTIONS)
        clients = [AsyncInferenceClient(base_url=endpoint, api_key=key) for _ in some]
        while running or (waiting and not failure):
            while waiting and not failure and len(running) < flags.concurrency:
                client = clients[len(waiting) % len(clients)]
                running.add(runner.get_loop().create_task(ask(client, waiting.pop())))
            finished, running = runner.run(asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED))
            for task in finished:
                failure = failure or task.exception()
            if results := [task.result() for task in finished if not task.exception()]:
                yield results
        for client in clients:
            runner.run(client.close())
    if isinstance(failure, ServerError):
        raise ServerError(f"--endpoint {endpoint}: {failure}", failure.status)
    if failure:
        raise failure


def server_key(flags):
    """The server's key, "" for none. Errors: UserError, without the key, if it cannot stand in a header."""
    key = os.environ.get(flags.key_variable, "").strip()
    good = key.isascii() and key.isprintable() and " " not in key
    require(good, f"{flags.key_variable} does not hold a key: it has spaces or other odd characters")
    return key


async def chat(client, flags, model, turns, max_tokens, fields=None, tries=None):
    """The greedy reply to the messages `turns`. Errors: ServerError for a refusal, or when all tries have failed."""
    tries = tries or flags.tries
    for attempt in range(1, tries + 1):
        try:
            request = client.chat_completion(
                turns, model=model, max_tokens=max_tokens, temperature=0.0, extra_body=fields
            )
            return as_reply(await asyncio.wait_for(request, flags.request_timeout))
        except Exception as error:  # the client's own, its HTTP library's, and those of taking a broken reply apart
            reason, status, pause = explain(error, flags, model)
            passing = status is None or status in (408, 429) or status >= 500
            if not passing or attempt == tries:
                raise ServerError(reason + f", {attempt} tries" * (attempt > 1), status) from None
        await asyncio.sleep(min(LONGEST_PAUSE, max(pause, FIRST_PAUSE * 2 ** (attempt - 1))) * random.uniform(1, 1.3))


def as_reply(output):
    choice, usage = output.choices[0], output.usage
    truncated = choice.finish_reason == "length"
    tokens = usage.completion_tokens - (not truncated)  # servers count the end token, we do not
    return Reply(choice.message.content or "", max(0, tokens), usage.prompt_tokens, truncated)


def explain(error, flags, model):
    """(what went wrong in a few words, HTTP status or None, seconds that the server asks to wait)."""

    def in_short(text):
        key = server_key(flags)
        return " ".join((text.replace(key, "***") if key else text).split())[:200]

    if isinstance(error, TimeoutError):
        return f"no answer in {flags.request_timeout:g} s (--request-timeout)", None, 0.0
    response = getattr(error, "response", None)
    if response is None:
        return f"{type(error).__name__}: {in_short(str(error)) or 'no reply'}", None, 0.0
    status, said = response.status_code, in_short(response.text)
    hint = {401: f"; its key belongs in {flags.key_variable}", 404: f"; does it have --model {model}?"}.get(status, "")
    asked = response.headers.get("retry-after", "")
    return f"HTTP {status} {said}{hint}", status, float(asked) if asked.isdigit() else 0.0

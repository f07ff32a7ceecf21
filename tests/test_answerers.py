"""Who answers: a model loaded here; a server, a real one with the demo's model, and one that misbehaves in every way
we know."""

import asyncio
import json
import math
import os
import random
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, greedy_reference, own_task, plain_logits, settings, slow_log_probs

from support import answerers
from support.answerers import LocalModel, Sampling, Server, batches_of_like_length, local_answerer, server_answerer
from support.engine import Engine
from support.evaluation import Evaluation, evaluate, evaluate_once
from support.files import UserError, read_jsonl, write_jsonl
from support.settings import ServerFlags
from support.tokens import encode, encode_chat, encode_choices, encode_prompt, extractor_ids


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr(answerers, "FIRST_PAUSE", 0.01)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("HF_TOKEN", "hf_secret_of_the_user")


def flags(**changes):
    return ServerFlags(**({"answer_turn": "prefill", "request_timeout": 5.0} | changes))


# --- A model loaded here ------------------------------------------------------------------------------------------


class ScriptedEngine:
    """An engine that says what the test wants: [(reasoning, stopped)], the last row's first, then the replies behind
    the extractor."""

    def __init__(self, tokenizer, reasoning=None, replies=(), dtype="float32"):
        self.tokenizer, self.model = tokenizer, SimpleNamespace(dtype=dtype)
        self.reasoning, self.replies = reasoning, replies
        self.progress = None
        self.calls = []  # (contexts, or the ids behind the rows that ended; max_new_tokens)

    def rows_that_fit(self, columns):
        return 16

    def require_positions(self, columns):
        pass

    def encoded(self, texts):
        return [self.tokenizer.encode(text, add_special_tokens=False) for text in texts]

    def stream(self, contexts, max_new_tokens, batch_size):
        self.calls.append((contexts, max_new_tokens))
        texts, stopped = zip(*self.reasoning or [("", True)] * len(contexts))
        yield SimpleNamespace(rows=list(range(len(contexts))), ids=self.encoded(texts), stopped=stopped)

    def go_on(self, ended, ids, max_new_tokens):
        self.calls.append((ids, max_new_tokens))
        return self.encoded(self.replies or [""] * len(ended.rows))


ROWS = [
    {"id": "a", "question": "tom has 3 pens . how many pens ?", "answer": "3"},
    {"id": "b", "question": "ann has 20 pens . how many pens ?", "answer": "20"},
]


def test_a_model_loaded_here_answers_behind_its_reasoning_and_the_extractor(demo_tokenizer, demo_task):
    engine = ScriptedEngine(demo_tokenizer, [("1 + 2 = 3 .", True), ("4 + 5 = 20", False)], ["5", "tom <|end|>"])
    found = evaluate(local_answerer(engine, "m"), demo_task, ROWS, "find this .", settings(max_new_tokens=9))
    assert [(p["id"], p["answer"], p["harness_answer"]) for p in found] == [("a", "5", "3"), ("b", None, "20")]
    assert [(p["tokens"], p["truncated"], p["text"], p["reply"]) for p in found] == [
        (6, False, "1 + 2 = 3 .", "5"),
        (5, True, "4 + 5 = 20", "tom"),
    ]
    (contexts, limit), (asked, reply_limit) = engine.calls
    assert (limit, reply_limit) == (9, 12)
    text = demo_tokenizer.decode(asked)
    assert text == "so the answer is" and demo_tokenizer.decode(contexts[0]).count("find this .") == 1


def test_evaluation_reads_the_same_ids_as_the_search(subword_tokenizer):
    engine = ScriptedEngine(subword_tokenizer)
    task = own_task("choice", choices="AB", answer_space="vocabulary")
    row = {"id": "r", "question": "Is it A?\nOptions:\n(A) yes", "answer": "A"}
    prompt = "logical steps, then the answer."
    evaluate(local_answerer(engine, "m"), task, [row], prompt, settings())
    assert engine.calls[0][0] == [sum(encode_prompt(subword_tokenizer, task, row["question"], prompt), [])]


def test_the_gold_answer_is_not_needed_to_ask_for_an_answer(subword_tokenizer):
    engine = ScriptedEngine(subword_tokenizer)
    task = own_task("boolean", choices=("True", "False"), answer_space="vocabulary")
    row = {"id": "r", "question": "Is it?", "answer": "\udcff"}
    list(local_answerer(engine, "m").generate(task, [row], "think.", settings(), frozenset()))
    assert subword_tokenizer.decode(engine.calls[1][0]).strip() == "The answer is $"


def plain_texts(engine, task, row, prompt, limit, reply_limit):
    """(ids of the reasoning, of the reply behind it and the extractor) of one row, without keys and values."""
    context = encode_chat(engine.tokenizer, task, row["question"], prompt)
    ids, _ = greedy_reference(engine, context, limit)
    whole = context + ids + extractor_ids(engine.tokenizer, task)
    return ids, greedy_reference(engine, whole, reply_limit)[0], whole


@pytest.mark.parametrize("ranks", [False, True])
def test_replies_and_ranks_behind_kept_keys_and_values_are_those_of_whole_sequences(llama, demo_data, ranks):
    """Rows of different length that end at different places of a batch."""
    rows, prompt = sorted(demo_data["dev"][:40], key=lambda row: len(row["question"]))[::7], "find this ."
    task = own_task(
        "choice" if ranks else "number",
        "so the answer is",
        ("1", "12", "30") if ranks else (),
        template="{question} {prompt}",
    )
    limits = settings(max_new_tokens=15, batch_size=4)
    contexts = [encode_chat(llama.tokenizer, task, row["question"], prompt) for row in rows]
    texts = [greedy_reference(llama, context, 15)[0] for context in contexts]
    llama.end_ids = [max(set(sum(texts, [])), key=lambda token: len({t.index(token) for t in texts if token in t}))]
    found = list(local_answerer(llama, "m").generate(task, rows, prompt, limits, frozenset()))
    generations = {generation.row["id"]: generation for batch in found for generation in batch}
    assert len(generations) == len(rows) and len(found) > 2  # as rows end, not as batches do
    assert len({generation.tokens for generation in generations.values()}) > 1
    for row in rows:
        ids, reply, whole = plain_texts(llama, task, row, prompt, 15, 12)
        generation = generations[row["id"]]
        assert (generation.text, generation.tokens) == (llama.tokenizer.decode(ids, skip_special_tokens=True), len(ids))
        if ranks:
            answers = encode_choices(llama.tokenizer, task).answers
            expected = slow_log_probs(lambda ids: plain_logits(llama.model, ids), whole, answers).tolist()
            assert list(generation.choices) == list(task.choices)
            assert list(generation.choices.values()) == pytest.approx(expected, abs=1e-6)
            assert generation.reply == llama.tokenizer.decode(plain_logits(llama.model, whole)[-1:].argmax(-1))
        else:
            assert generation.reply == llama.tokenizer.decode(reply, skip_special_tokens=True)
            assert generation.choices is None


def test_a_bare_prompt_stands_behind_the_question_and_an_empty_one_leaves_the_question_alone(subword_tokenizer):
    task = own_task(template="Question: {question}\nNow use {prompt}")
    row = {"id": "r", "question": "3 + 14", "answer": "17"}
    engine = ScriptedEngine(subword_tokenizer)
    for prompt in ("", "Let's think step by step."):
        evaluate(local_answerer(engine, "m"), task.bare, [row], prompt, settings())
    empty, thought = (subword_tokenizer.decode(engine.calls[n][0][0]) for n in (0, 2))
    assert "Question: 3 + 14" in empty and "Now use" not in empty
    assert thought.replace("\nLet's think step by step.", "", 1) == empty
    assert own_task(template="{question} please {prompt}").bare.template == "{question} {prompt}"
    options = "Message: {question}\nTeams: A, B or C\nNow use {prompt}"  # that no prompt is there changes no question
    assert own_task(template=options).bare.template == "Message: {question}\nTeams: A, B or C\n{prompt}"


def test_a_prompt_with_a_word_the_tokenizer_does_not_know_is_refused(demo_tokenizer, demo_task):
    answerer = local_answerer(ScriptedEngine(demo_tokenizer), "m")
    with pytest.raises(UserError, match="does not know all of the prompt"):
        evaluate(answerer, demo_task, ROWS, "find this theorem .", settings())


def test_choices_that_the_tokenizer_cannot_tell_apart_are_refused_before_any_work(demo_tokenizer):
    engine = ScriptedEngine(demo_tokenizer)
    for choices, message in (
        (("1", "1 "), "cannot tell the answers '1' and '1 ' apart"),
        (("1", "Ok"), "does not know"),
    ):
        task = own_task("choice", "so the answer is", choices, template="{question} {prompt}")
        with pytest.raises(UserError, match=message):
            evaluate(local_answerer(engine, "m"), task, ROWS, "find this .", settings())
    assert engine.calls == []


RANKED = own_task("choice", "so the answer is", ("1", "12"), template="{question} {prompt}")


def test_logits_that_are_not_finite_are_an_error_and_no_answer(llama):
    llama.model.lm_head.weight.data[:] = float("nan")
    with pytest.raises(UserError, match="not finite.*--dtype float32"):
        evaluate(local_answerer(llama, "m"), RANKED, ROWS, "find this .", settings(max_new_tokens=3))


@pytest.mark.parametrize("task", [RANKED, own_task("number", "so the answer is", template="{question} {prompt}")])
def test_positions_are_counted_to_the_end_of_the_answer(llama, task):
    """The reasoning alone would fit: with extractor and answer it does not."""
    longest = max(len(encode_chat(llama.tokenizer, task, row["question"], "find this .")) for row in ROWS)
    with pytest.raises(UserError, match="--max-new-tokens: a row could have"):
        evaluate(local_answerer(llama, "m"), task, ROWS, "find this .", settings(max_new_tokens=512 - longest))


def test_a_model_loaded_here_is_known_by_its_weights_and_its_dtype(tmp_path, demo_tokenizer):
    (tmp_path / "m").mkdir()
    found = set()
    for weights, dtype in ((b"1", "float32"), (b"2", "float32"), (b"2", "bfloat16")):
        (tmp_path / "m" / "model.safetensors").write_bytes(weights)
        engine = ScriptedEngine(demo_tokenizer, dtype=dtype)
        found.add(local_answerer(engine, tmp_path / "m").identity)
    assert len(found) == 3


def without_time(record):
    return {key: value for key, value in record.items() if key != "minutes"}


def test_a_killed_evaluation_of_a_real_model_ends_the_same(tmp_path, demo_engine, demo_task, demo_data):
    rows, results = demo_data["dev"][:10], []
    for cut in (None, 5):  # in the middle of the second batch
        folder = tmp_path / str(cut)
        folder.mkdir()
        answerer = local_answerer(demo_engine, "m")
        asked = Evaluation(answerer, demo_task, "dev", rows, "check each step .", settings(batch_size=3))
        evaluate_once(asked, folder, "best")
        if cut:
            (folder / "results.jsonl").unlink()
            write_jsonl(folder / "predictions.jsonl", read_jsonl(folder / "predictions.jsonl")[:cut])
        results.append((without_time(evaluate_once(asked, folder, "best")), read_jsonl(folder / "predictions.jsonl")))
    (first, in_order), (second, resumed) = results
    assert first == second and sorted(map(json.dumps, in_order)) == sorted(map(json.dumps, resumed))


def of_the_demo(engine, task, rows, **changes):
    return Evaluation(local_answerer(engine, "m"), task, "dev", rows, "check each step .", settings(**changes))


def test_rows_are_on_disk_before_their_batch_has_ended(tmp_path, demo_engine, demo_task, demo_data, monkeypatch):
    """Killed while the rest of the only batch is at work, an evaluation keeps its rows and ends the same."""
    asked = of_the_demo(demo_engine, demo_task, demo_data["dev"][:40], batch_size=40, max_new_tokens=30)
    (tmp_path / "whole").mkdir()
    whole = without_time(evaluate_once(asked, tmp_path / "whole", "best"))
    ran, plain = [], LocalModel.answered

    def killed_at_the_third_group(model, task, rows, ended, settings):
        ran.append(len(rows))
        if len(ran) == 3:
            raise KeyboardInterrupt
        return plain(model, task, rows, ended, settings)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(LocalModel, "answered", killed_at_the_third_group)
        evaluate_once(asked, tmp_path, "best")
    kept = read_jsonl(tmp_path / "predictions.jsonl")
    assert len(kept) == sum(ran[:2]) and 0 < len(kept) < 40
    assert without_time(evaluate_once(asked, tmp_path, "best")) == whole
    first, second = (read_jsonl(folder / "predictions.jsonl") for folder in (tmp_path / "whole", tmp_path))
    assert sorted(map(json.dumps, first)) == sorted(map(json.dumps, second))


def test_batches_are_of_like_length_and_come_the_longest_first_then_in_a_mixed_order():
    rng = random.Random(0)
    contexts = [({"id": str(n)}, [0] * rng.randint(5, 99)) for n in range(83)]
    batches = batches_of_like_length(contexts, 8)
    spans = [(min(lengths), max(lengths)) for lengths in ([len(ids) for _, ids in batch] for batch in batches)]
    assert sorted(row["id"] for batch in batches for row, _ in batch) == sorted(row["id"] for row, _ in contexts)
    in_order = sorted(spans, reverse=True)
    assert spans[0] == in_order[0] and spans not in (in_order, [in_order[0], *sorted(spans[1:])])
    assert all(low >= high for (low, _), (_, high) in zip(in_order, in_order[1:]))  # no two lists overlap
    half = [high for _, high in spans[1:6]]
    assert min(half) < 50 < max(half)  # the first half of the work has short and long rows
    assert batches_of_like_length(contexts, 8) == batches


def test_when_memory_runs_out_in_the_middle_no_row_is_lost_or_answered_twice(
    demo_engine, demo_task, demo_data, monkeypatch
):
    asked = of_the_demo(demo_engine, demo_task, demo_data["dev"][:20], batch_size=20, max_new_tokens=30)
    arguments = demo_task, asked.rows, asked.prompt, asked.settings, frozenset()
    expected = {
        generation.row["id"]: generation for group in asked.answerer.generate(*arguments) for generation in group
    }
    plain, sizes = Engine.generate, []

    def generate(engine, context, logits, limits):
        sizes.append(len(limits))
        for number, ended in enumerate(plain(engine, context, logits, limits)):
            if len(limits) > 12 and number == 2:
                raise torch.OutOfMemoryError("none left")
            yield ended

    monkeypatch.setattr(Engine, "generate", generate)
    found = [generation for group in asked.answerer.generate(*arguments) for generation in group]
    assert sizes[0] == 20 and max(sizes[1:]) <= 12
    assert len(found) == 20 and {generation.row["id"]: generation for generation in found} == expected


def test_a_single_row_without_memory_is_one_line(demo_engine, demo_task, monkeypatch):
    def read(engine, sequences):
        raise torch.OutOfMemoryError("none left")

    monkeypatch.setattr(Engine, "read", read)
    with pytest.raises(UserError, match="single row"):
        evaluate(local_answerer(demo_engine, "m"), demo_task, ROWS, "find this .", settings())


# --- A server that misbehaves ---------------------------------------------------------------------------------


def completion(text, finish="stop", tokens=4, prompt_tokens=9):
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}
    usage = {"prompt_tokens": prompt_tokens, "completion_tokens": tokens, "total_tokens": prompt_tokens + tokens}
    return {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice], "usage": usage}


@contextmanager
def serving(behave):
    """An HTTP server on loopback that answers with behave(handler, request body, how many the same came before)."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            with lock:
                web.under_way += 1
                web.most = max(web.most, web.under_way)
                before = web.seen[json.dumps(body["messages"])]
                web.seen[json.dumps(body["messages"])] += 1
                web.requests.append((body, dict(self.headers)))
            try:
                behave(self, body, before)
            except (BrokenPipeError, ConnectionResetError):
                pass  # the client gave up
            with lock:
                web.under_way -= 1

        def say(self, status, content, **headers):
            content = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            for name, value in (headers | {"content_length": len(content)}).items():
                self.send_header(name.replace("_", "-"), str(value))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *arguments):
            pass

    lock = threading.Lock()
    ThreadingHTTPServer.request_queue_size = 256  # connections that wait to be accepted
    web = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    web.daemon_threads = True
    web.requests, web.seen, web.under_way, web.most = [], Counter(), 0, 0
    web.url = f"http://127.0.0.1:{web.server_port}/v1"
    threading.Thread(target=web.serve_forever, daemon=True).start()
    try:
        yield web
    finally:
        web.shutdown()
        web.server_close()


def right_answer(body):
    """What a good model says to a question such as "12 + 1": the working, or the answer behind the extractor."""
    if len(body["messages"]) == 1:
        number = re.search(r"(\d+) \+ 1|$", body["messages"][0]["content"]).group(1)
        return completion(f"{number} + 1 = {int(number) + 1}" if number else "ready")
    return completion(re.search(r"= (\d+)|$", body["messages"][1]["content"]).group(1) or "ready")


def behave_well(handler, body, before):
    handler.say(200, right_answer(body))


@pytest.fixture
def rows():
    return [{"id": str(i), "question": f"{i} + 1", "answer": str(i + 1)} for i in range(12)]


def asked(answerer, rows):
    return Evaluation(answerer, own_task(), "dev", rows, "think.", settings())


def trouble(kind):
    """A server that makes every other question wait or fail once in this way before it answers well."""

    def behave(handler, body, before):
        number = re.search(r"(\d+) \+ 1", body["messages"][0]["content"])
        if number and int(number.group(1)) % 2 and not before:
            if kind == "slow":
                time.sleep(2)
            elif kind == "trickling":  # the head comes at once, the body never does
                handler.send_response(200)
                handler.send_header("content-length", "1000")
                handler.end_headers()
                for _ in range(20):
                    handler.wfile.write(b" ")
                    handler.wfile.flush()
                    time.sleep(0.1)
            elif kind == "closing":
                handler.connection.shutdown(socket.SHUT_RDWR)
                handler.close_connection = True
                return
            elif kind == "cut":
                handler.say(200, b'{"choices": [{"mess', content_length=500)
                handler.connection.shutdown(socket.SHUT_RDWR)
                handler.close_connection = True
                return
            else:
                handler.say(*{
                    "429": (429, {"error": "slow down"}),
                    "500": (500, b"<html>oops</html>"),
                    "503": (503, {"detail": "loading"}),
                    "broken": (200, b'{"choices": [{"mess'),
                    "not json": (200, b"\xff\xfe hello"),
                    "empty": (200, {}),
                    "no choice": (200, {"choices": [], "usage": {}}),
                    "list": (200, [1, 2]),
                    "no usage": (200, {key: v for key, v in completion("7").items() if key != "usage"}),
                }[kind])  # fmt: skip
                return
        behave_well(handler, body, before)

    return behave


SLOW = ["slow", "trickling"]
FAILING = ["closing", "cut", "429", "500", "503", "broken", "not json", "empty", "no choice", "list", "no usage"]


@pytest.mark.parametrize("kind", SLOW + FAILING)
def test_what_fails_for_a_passing_reason_is_asked_again_and_nothing_is_lost_or_counted_twice(tmp_path, rows, kind):
    with serving(trouble(kind)) as web:
        limits = flags(concurrency=6, request_timeout=1.0 if kind in SLOW else 20.0)
        answerer = server_answerer(limits, web.url, "m")
        record = evaluate_once(asked(answerer, rows), tmp_path, "given")
    assert (record["n"], record["correct"], record["harness_accuracy"], record["mean_tokens"]) == (12, 12, 1.0, 3.0)
    predictions = read_jsonl(tmp_path / "predictions.jsonl")
    assert sorted(p["id"] for p in predictions) == sorted(row["id"] for row in rows)
    # One request to check, two for each row, and one more for each that failed: six reasonings, six answers.
    expected = 1 + 2 * 12 + 12
    assert len(web.requests) == expected or (kind in SLOW and len(web.requests) > expected)


def test_as_many_requests_are_under_way_as_are_allowed(rows):
    def behave(handler, body, before):
        time.sleep(0.1)
        behave_well(handler, body, before)

    with serving(behave) as web:
        answerer = server_answerer(flags(concurrency=4), web.url, "m")
        found = evaluate(answerer, own_task(), rows, "think.", settings())
    assert web.most == 4 and [p["id"] for p in found] == [row["id"] for row in rows]


def test_a_server_that_never_recovers_ends_the_run_with_one_line_and_the_next_run_asks_for_the_rest(tmp_path, rows):
    broken = [True]

    def behave(handler, body, before):
        if broken[0] and "7 + 1" in body["messages"][0]["content"]:
            handler.say(500, {"error": "out of\nmemory"})
        else:
            behave_well(handler, body, before)

    def once():
        answerer = server_answerer(flags(concurrency=2, tries=3), web.url, "m")
        return evaluate_once(asked(answerer, rows), tmp_path, "given")

    with serving(behave) as web:
        with pytest.raises(UserError) as error:
            once()
        message = str(error.value)
        assert "HTTP 500" in message and "3 tries" in message and "on disk" in message and "\n" not in message
        kept = read_jsonl(tmp_path / "predictions.jsonl")
        assert 7 <= len(kept) < 12 and not (tmp_path / "results.jsonl").exists()
        broken[0], before = False, len(web.requests)
        assert once()["correct"] == 12
        assert len(web.requests) - before == 1 + 2 * (12 - len(kept))
    assert len(read_jsonl(tmp_path / "predictions.jsonl")) == 12


@pytest.mark.parametrize("status, sent", [(400, 2), (404, 2), (429, 4), (500, 4)])
def test_a_refusal_is_not_repeated_and_a_passing_failure_is(rows, status, sent):
    with serving(lambda handler, body, before: handler.say(status, {"error": "no model m"})) as web:
        with pytest.raises(UserError, match=f"HTTP {status} .*no model m"):
            server_answerer(flags(), web.url, "m")
    assert len(web.requests) == sent


LABELS = own_task("choice", "So it is", ("Account", "Account access", "Billing", "Other"))
NEXT = {  # what stands at the end of the message: the likeliest tokens there, and how likely
    "So it is": {" Account": 0.5, " Bill": 0.3, " Yes": 0.2},
    "is Account": {" access": 0.6, ".": 0.4},
    "is Bill": {"ing": 0.9, "y": 0.1},
    "reasons": {"1": 1.0},
}


def likely(spaces, table=NEXT):
    """A server that gives the log-probabilities of a table; without `spaces` as one does whose tokenizer marks them."""

    def behave(handler, body, before):
        if not body.get("logprobs"):
            return handler.say(200, completion("reasons"))
        at = body["messages"][-1]["content"]
        tokens = next((tokens for end, tokens in table.items() if at.endswith(end)), {"1": 1.0})
        tops = []
        for token, probability in tokens.items():
            tops.append({"token": token if spaces else token.lstrip(), "logprob": math.log(probability)})
        answer = completion(tops[0]["token"], "length", 1)
        answer["choices"][0]["logprobs"] = {"content": [tops[0] | {"top_logprobs": tops}]}
        handler.say(200, answer)

    return behave


@pytest.mark.parametrize("spaces", [True, False])
def test_a_server_that_gives_log_probabilities_ranks_the_choices_as_wholes(rows, spaces):
    with serving(likely(spaces)) as web:
        answerer = server_answerer(flags(), web.url, "m")
        found = evaluate(answerer, LABELS, rows[:2], "think.", settings())
        before = len(web.requests)
        assert before == 1 + 2 * (1 + 3)  # of each row the reasoning, the start and two places where a label goes on
    assert answerer.gives_log_probs
    for prediction in found:
        probabilities = {choice: math.exp(value) for choice, value in prediction["choices"].items()}
        assert probabilities == pytest.approx({"Account access": 0.3, "Billing": 0.27, "Account": 0.2})
        assert prediction["answer"] == "Account access" and prediction["reply"].strip() == "Account"


def test_a_choice_is_followed_along_its_own_tokens_alone(rows):
    """One token begins another: " Acc" is the start of "Accord", not of "Account", which has a token of its own."""
    table = {"So it is": {" Account": 0.5, " Acc": 0.4}, "is Acc": {"ord": 0.5, "ount": 0.5}}
    table |= {"is Account": {" access": 0.25, ".": 0.75}}
    task = own_task("choice", "So it is", ("Accord", "Account", "Account access"))
    with serving(likely(True, table)) as web:
        (found,) = evaluate(server_answerer(flags(), web.url, "m"), task, rows[:1], "think.", settings())
    probabilities = {choice: math.exp(value) for choice, value in found["choices"].items()}
    assert probabilities == pytest.approx({"Accord": 0.2, "Account": 0.375, "Account access": 0.125})


def test_an_extractor_that_ends_in_a_space_is_followed_by_words_with_theirs(rows):
    task = own_task("choice", "So it is ", ("Account", "Billing"))
    with serving(likely(True)) as web:
        (found,) = evaluate(server_answerer(flags(), web.url, "m"), task, rows[:1], "think.", settings())
    probabilities = {choice: math.exp(value) for choice, value in found["choices"].items()}
    assert probabilities == pytest.approx({"Account": 0.5, "Billing": 0.27})


def test_a_server_without_log_probabilities_has_what_it_writes_read_and_is_another_evaluation(rows):
    def no_field(handler, body, before):
        if body.get("logprobs"):
            handler.say(400, {"error": "logprobs: unknown field"})
        else:
            handler.say(200, completion("Billing, I think"))

    for behave in (no_field, lambda handler, body, before: handler.say(200, completion("Billing, I think"))):
        with serving(behave) as web:
            answerer = server_answerer(flags(), web.url, "m")
            (found,) = evaluate(answerer, LABELS, rows[:1], "think.", settings())
        assert (found["answer"], found["reply"], "choices" in found) == ("Billing", "Billing, I think", False)
        there = Evaluation(answerer, LABELS, "dev", rows, "think.", settings())
        ranked = Evaluation(replace(answerer, gives_log_probs=True), LABELS, "dev", rows, "think.", settings())
        assert not there.ranked and ranked.ranked and there.key != ranked.key


def test_where_no_choice_is_among_the_likeliest_tokens_what_is_written_is_read(rows):
    def behave(handler, body, before):
        answer = completion("Hm")
        answer["choices"][0]["logprobs"] = {"content": [{"top_logprobs": [{"token": "Hm", "logprob": -0.1}]}]}
        handler.say(200, answer)

    with serving(behave) as web:
        (found,) = evaluate(server_answerer(flags(), web.url, "m"), LABELS, rows[:1], "think.", settings())
    assert (found["answer"], found["reply"], "choices" in found) == (None, "Hm", False)
    asked = [body["max_tokens"] for body, _ in web.requests]
    assert asked == [1, 12, 1, settings().answer_tokens(LABELS)]  # check, reasoning, ranks, and the reply as a whole


def test_the_pause_is_at_least_as_long_as_the_server_asks_for(rows):
    times = []

    def behave(handler, body, before):
        times.append(time.monotonic())
        if len(times) == 1:
            handler.say(429, {}, retry_after=1)
        else:
            behave_well(handler, body, before)

    with serving(behave) as web:
        server_answerer(flags(), web.url, "m")
    assert times[1] - times[0] >= 1


def test_a_server_that_is_not_there_is_said_in_one_line():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    with pytest.raises(UserError, match=f"--endpoint {url}: .*Connect.*2 tries"):
        server_answerer(flags(), url, "m")


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://host/v1", "http://", "http://key@host/v1"])
def test_an_endpoint_that_is_no_plain_url_is_refused(url):
    with pytest.raises(UserError, match="--endpoint|OPENAI_API_KEY") as error:
        server_answerer(flags(), url, "m")
    assert "key@" not in str(error.value)


def test_the_key_goes_to_the_server_and_into_no_message_and_the_users_hub_token_goes_nowhere(monkeypatch, rows):
    def behave(handler, body, before):
        handler.say(401, {"error": f"bad key {handler.headers['authorization']}"})

    with serving(behave) as web:
        for key in ("sk-very-secret", None):
            monkeypatch.setenv("OPENAI_API_KEY", key) if key else monkeypatch.delenv("OPENAI_API_KEY")
            with pytest.raises(UserError, match="OPENAI_API_KEY") as error:
                server_answerer(flags(), web.url, "m")
            assert "secret" not in str(error.value)
    (_, first), (_, second) = web.requests
    assert first["authorization"] == "Bearer sk-very-secret"
    assert "secret" not in json.dumps(second)


def test_each_way_to_ask_for_the_answer_sends_its_own_messages(rows):
    def behave(handler, body, before):
        continued = body.get("continue_final_message") and not body.get("add_generation_prompt", True)
        handler.say(200, right_answer(body) | {"usage": completion("", prompt_tokens=5 if continued else 9)["usage"]})

    task, sent = own_task(extractor="The answer is $"), {}
    for way in ("continue", "prefill", "ask"):
        with serving(behave) as web:
            limits = settings(max_new_tokens=9)
            found = evaluate(server_answerer(flags(answer_turn=way), web.url, "m"), task, rows[:1], "think.", limits)
        reasoning, sent[way] = (body for body, _ in web.requests[-2:])
        assert found[0]["text"] == "0 + 1 = 1" and found[0]["answer"] == "1"
        assert reasoning["temperature"] == 0 and reasoning["model"] == "m"
        assert (reasoning["max_tokens"], sent[way]["max_tokens"]) == (9, 12)
        assert reasoning["messages"] == [{"role": "user", "content": "0 + 1\nUse think."}]
        assert sent[way]["messages"][0] == reasoning["messages"][0]
    goes_on = {"role": "assistant", "content": "0 + 1 = 1 The answer is $"}
    assert sent["continue"]["messages"][1:] == sent["prefill"]["messages"][1:] == [goes_on]
    assert sent["continue"]["continue_final_message"] and "continue_final_message" not in sent["prefill"]
    assert sent["ask"]["messages"][1:] == [
        {"role": "assistant", "content": "0 + 1 = 1"},
        {"role": "user", "content": "The answer is $"},
    ]


def test_each_way_to_ask_is_an_evaluation_of_its_own_and_an_endpoint_is_not(rows):
    with serving(behave_well) as web, serving(behave_well) as other:
        both = [server_answerer(flags(answer_turn=way), web.url, "a/b/m") for way in ("prefill", "ask")]
        moved = server_answerer(flags(), other.url, "a/b/m")
    assert both[0].identity != both[1].identity and moved.identity == both[0].identity
    assert moved.endpoint == other.url and moved.name == "b/m"


def test_without_reasoning_the_answer_is_asked_for_without_a_space_before_it(rows):
    def behave(handler, body, before):
        handler.say(200, completion("" if len(body["messages"]) == 1 else "1"))

    with serving(behave) as web:
        evaluate(server_answerer(flags(), web.url, "m"), own_task(extractor="So: "), rows[:1], "think.", settings())
    assert web.requests[-1][0]["messages"][-1]["content"] == "So:"


def test_when_one_request_fails_for_good_those_under_way_are_waited_for(tmp_path, rows):
    def behave(handler, body, before):
        if "7 + 1" in body["messages"][0]["content"]:
            handler.say(400, {"error": "too long"})
        else:
            time.sleep(0.3)
            behave_well(handler, body, before)

    with serving(behave) as web:
        answerer = server_answerer(flags(concurrency=12), web.url, "m")
        with pytest.raises(UserError, match="too long.* on disk"):
            evaluate_once(asked(answerer, rows), tmp_path, "given")
    assert len(read_jsonl(tmp_path / "predictions.jsonl")) == 11


def test_more_requests_than_one_client_has_connections_are_under_way_at_once():
    rows = [{"id": str(i), "question": f"{i} + 1", "answer": str(i + 1)} for i in range(115)]
    full = threading.Barrier(115)

    def behave(handler, body, before):
        if len(body["messages"]) == 1 and "+" in body["messages"][0]["content"]:
            full.wait(timeout=30)  # broken, hence an error, unless all are there at once
        behave_well(handler, body, before)

    with serving(behave) as web:
        answerer = server_answerer(flags(concurrency=115, request_timeout=60.0, tries=1), web.url, "m")
        assert len(evaluate(answerer, own_task(), rows, "think.", settings())) == 115


def test_the_pause_doubles_with_each_try_up_to_a_minute(monkeypatch):
    pauses, sleep = [], asyncio.sleep

    async def no_sleep(seconds):
        pauses.append(seconds)
        await sleep(0)

    def ask(client, turns):
        return answerers.chat(client, there, turns, 1)

    monkeypatch.setattr(answerers, "FIRST_PAUSE", 1.0)
    monkeypatch.setattr(answerers.asyncio, "sleep", no_sleep)
    with serving(lambda handler, body, before: handler.say(503, {})) as web:
        there = Server(web.url, "m", flags(tries=9))
        with pytest.raises(UserError, match="9 tries"):
            list(answerers.in_parallel(there, ask, [[]]))
    expected = [1, 2, 4, 8, 16, 32, 60, 60]
    assert len(pauses) == 8 and all(p <= pause <= 1.3 * p for p, pause in zip(expected, pauses))


def test_the_key_stands_in_no_object_that_a_message_could_show(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    there = Server("http://127.0.0.1:9/v1", "m", flags())
    assert there.read_key() == "sk-very-secret" and "secret" not in repr(there)


def test_a_server_that_sends_requests_elsewhere_does_not_send_the_key_with_them(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    with serving(behave_well) as elsewhere:
        with serving(lambda handler, body, before: handler.say(307, b"", location=elsewhere.url)) as web:
            server_answerer(flags(), web.url, "m")
    assert web.requests[0][1]["authorization"] == "Bearer sk-very-secret"
    assert len(elsewhere.requests) == 1 and "secret" not in json.dumps(elsewhere.requests)


@pytest.mark.parametrize("key", ["sk-two words", "sk-tab\tinside", "sk-ümlaut"])
def test_a_key_that_cannot_stand_in_a_header_is_refused_and_not_shown(monkeypatch, key):
    monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(UserError, match="OPENAI_API_KEY does not hold a key") as error:
        server_answerer(flags(), "http://127.0.0.1:9/v1", "m")
    assert "sk-" not in str(error.value)


@pytest.mark.parametrize("before_it", [0, 170, 195, 199])
def test_a_key_read_with_its_newline_is_sent_without_and_no_part_of_it_is_shown(monkeypatch, before_it):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-abcdefghijklmnopqrstuvwxyz\n")
    said = "x" * before_it + "sk-abcdefghijklmnopqrstuvwxyz"
    with serving(lambda handler, body, before: handler.say(401, said.encode())) as web:
        with pytest.raises(UserError) as error:
            server_answerer(flags(), web.url, "m")
    assert web.requests[0][1]["authorization"] == "Bearer sk-abcdefghijklmnopqrstuvwxyz"
    assert "sk-a" not in str(error.value)


def test_without_a_key_nothing_of_a_message_is_hidden():
    with serving(lambda handler, body, before: handler.say(404, b"none of the models fits")) as web:
        with pytest.raises(UserError, match="none of the models fits"):
            server_answerer(flags(), web.url, "m")


def test_a_server_that_does_not_continue_a_message_is_found_out_before_any_work():
    def refuse(handler, body, before):
        good = "continue_final_message" not in body
        handler.say(200 if good else 422, completion("1") if good else {"detail": "unexpected field"})

    for behave in (behave_well, refuse):  # one ignores the fields, one refuses them
        with serving(behave) as web:
            with pytest.raises(UserError, match="--answer-turn"):
                server_answerer(flags(answer_turn="continue"), web.url, "m")
        assert len(web.requests) == 3


def test_what_the_server_cuts_counts_as_cut(rows):
    with serving(lambda handler, body, before: handler.say(200, completion("9 + 1", "length", 12))) as web:
        found = evaluate(server_answerer(flags(), web.url, "m"), own_task(), rows[:2], "think.", settings())
    assert [(p["truncated"], p["tokens"]) for p in found] == [(True, 12)] * 2


# --- A real server: transformers serve, on loopback, with the demo's model ------------------------------------


@pytest.fixture(scope="module")
def real_server(tmp_path_factory):
    """(URL, model's name) of `transformers serve`, started and stopped here."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    model, log = str(ROOT / "demo" / "model"), tmp_path_factory.mktemp("server") / "log"
    program = [sys.executable, "-m", "transformers.cli.transformers", "serve", model]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with open(log, "w") as file:
        command = [*program, "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=file)
    try:
        for _ in range(240):
            assert process.poll() is None, log.read_text()[-2000:]
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1).close()
                break
            except OSError:
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1", model
    finally:
        process.terminate()
        process.wait(timeout=30)


def test_a_real_server_gives_the_texts_answers_and_scores_of_the_model_loaded_here(
    real_server, tmp_path, demo_engine, demo_task, demo_data
):
    url, name = real_server
    rows, records = demo_data["dev"][:24], []
    there = server_answerer(flags(concurrency=6, request_timeout=60.0), url, name)
    for answerer in (there, local_answerer(demo_engine, name)):
        folder = tmp_path / str(len(records))
        folder.mkdir()
        long_enough = settings(max_new_tokens=40)
        evaluation = Evaluation(answerer, demo_task, "dev", rows, "show each step .", long_enough)
        record = evaluate_once(evaluation, folder, "given")
        records.append((record, {p["id"]: p for p in read_jsonl(folder / "predictions.jsonl")}))
    (served, far), (loaded, near) = records
    numbers = ("n", "correct", "accuracy", "harness_accuracy", "unread", "truncated", "mean_tokens")
    assert [served[key] for key in numbers] == [loaded[key] for key in numbers] and 0.2 < served["accuracy"] < 0.95
    assert served["evaluation"] != loaded["evaluation"]
    same = ("text", "reply", "answer", "correct", "harness_answer", "harness_correct", "tokens", "truncated")
    assert {i: [p[key] for key in same] for i, p in far.items()} == {
        i: [p[key] for key in same] for i, p in near.items()
    }


def script(name, *arguments, folder):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, str(ROOT / name), *map(str, arguments)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def test_stage_3_evaluates_on_a_real_server_without_importing_torch(real_server, tmp_path):
    url, name = real_server
    there = ["--task", "demo", "--endpoint", url, "--answer-turn", "prefill", "--eval-rows", "6"]
    prompts = ["--prompt", "check each step .", "--baselines"]
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise ImportError('torch is imported')\n")
    environment = os.environ | {"HF_HUB_OFFLINE": "0", "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, str(ROOT / "03_evaluate.py"), *there, "--model", name, *prompts]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    for label in ("empty", "zero-shot chain of thought", "initial", "given"):
        assert re.search(rf"^{label} +\d+\.\d \(\d+\.\d to \d+\.\d\) +\d", done.stdout, re.M)
    unknown = script("03_evaluate.py", *there, "--model", "no/such-model", *prompts, folder=tmp_path)
    assert unknown.returncode == 2 and unknown.stderr.count("\n") == 1
    assert "error: --endpoint" in unknown.stderr and "no/such-model" in unknown.stderr


def test_stage_4_sets_a_server_beside_a_model_loaded_here(real_server, tmp_path):
    url, name = real_server
    search = ["--steps", "0", "--train-rows", "5", "--eval-rows", "5"]
    assert script("02_optimize.py", *search, folder=tmp_path).returncode == 0
    targets = ["--targets", "demo/model", f"{name}@{url}", "--answer-turn", "prefill", "--eval-rows", "8"]
    done = script("04_transfer.py", "--runs", "runs/demo-seed0", *targets, folder=tmp_path)
    assert done.returncode == 2 and "--targets: two are called demo/model" in done.stderr
    targets[1] = "demo/small"
    done = script("04_transfer.py", "--runs", "runs/demo-seed0", *targets, folder=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    records = read_jsonl(tmp_path / "runs/transfer/transfer.jsonl")
    assert [r["target"] for r in records] == ["demo/small"] * 2 + ["demo/model (server)"] * 2
    assert all(r["n"] == 8 and r["accuracy"] == records[0]["accuracy"] for r in records)


def test_stage_3_says_in_one_line_that_no_server_is_there(tmp_path):
    arguments = ["--task", "demo", "--prompt", "check .", "--endpoint", "http://127.0.0.1:9/v1", "--model", "m"]
    done = script("03_evaluate.py", *arguments, folder=tmp_path)
    assert (
        done.returncode == 2
        and done.stderr.count("\n") == 1
        and "error: --endpoint http://127.0.0.1:9/v1" in done.stderr
    )


# --- Writing at a temperature ---------------------------------------------------------------------------------------

CHATS = [[{"role": "user", "content": "find this ."}], [{"role": "user", "content": "check each step ."}]]


def test_a_server_is_asked_once_for_each_sample_with_a_seed_of_its_own():
    def behave(handler, body, before):
        handler.say(200, completion(f"{body['messages'][0]['content']} {body.get('seed', '-')}"))

    with serving(behave) as web:
        answerer = server_answerer(flags(answer_turn="ask"), web.url, "m")
        drawn = answerer.write(CHATS, Sampling(3, 0.7, 20, "5/2"))
        again = answerer.write(CHATS, Sampling(3, 0.7, 20, "5/2"))
        other = answerer.write(CHATS, Sampling(3, 0.7, 20, "5/3"))
    bodies = [body for body, _ in web.requests if "seed" in body]
    assert len(bodies) == 18 and {body["temperature"] for body in bodies} == {0.7}
    assert {body["max_tokens"] for body in bodies} == {20} and {body["top_p"] for body in bodies} == {1.0}
    texts = [written.text for samples in drawn for written in samples]
    assert again == drawn != other and len(set(texts)) == 6
    assert all(text.startswith("find this .") for text in texts[:3])
    assert [written.prompt_tokens for written in drawn[0]] == [9, 0, 0]


def test_a_model_loaded_here_writes_several_texts_to_each_chat(demo_engine):
    drawn = LocalModel(demo_engine).write(CHATS, Sampling(4, 1.0, 6, "0"))
    assert [len(samples) for samples in drawn] == [4, 4]
    assert all(written.tokens <= 6 for samples in drawn for written in samples)
    ids = encode(
        demo_engine.tokenizer,
        demo_engine.tokenizer.apply_chat_template(CHATS[0], tokenize=False, add_generation_prompt=True),
    )
    assert [written.prompt_tokens for written in drawn[0]] == [len(ids), 0, 0, 0]
    assert LocalModel(demo_engine).write(CHATS, Sampling(4, 1.0, 6, "0")) == drawn

"""A server that answers: a real one with the demo's model, and one that misbehaves in every way we know."""

import asyncio
import gzip
import json
import math
import os
import re
import runpy
import socket
import subprocess
import sys
import threading
import time
import tracemalloc
import urllib.error
import urllib.request
import zlib
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import ROOT, own_task, settings
from huggingface_hub import InferenceClient

from support import servers
from support.answerers import local_answerer, server_answerer
from support.evaluation import Evaluation, Sampling, evaluate, evaluate_once, read_all_predictions, read_results
from support.files import UserError, read_jsonl
from support.servers import Server
from support.settings import ServerFlags
from support.tables import accuracy_table
from support.takeaway import write_programs


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr(servers, "FIRST_PAUSE", 0.01)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setenv("HF_TOKEN", "hf_secret_of_the_user")


def flags(**changes):
    return ServerFlags(**({"answer_turn": "prefill", "request_timeout": 5.0} | changes))


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
                    "no text": (200, completion("")),
                    "null": (200, completion(None)),
                    "filtered": (200, completion("7", "content_filter")),
                    "bad count": (200, completion("7", tokens=7.5)),
                }[kind])  # fmt: skip
                return
        behave_well(handler, body, before)

    return behave


SLOW = ["slow", "trickling"]
FAILING = ["closing", "cut", "429", "500", "503", "broken", "not json", "empty", "no choice", "list"]
FAILING += ["no text", "null", "filtered", "bad count"]


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


@pytest.mark.parametrize("kind", ["no text", "null", "filtered"])
def test_what_is_no_answer_ends_the_run_with_the_row_s_name_and_is_not_stored(tmp_path, rows, kind):
    """Also behind the extractor; the rows before and under way are."""
    nothing = {"no text": completion(""), "null": completion(None), "filtered": completion("8", "content_filter")}

    def behave(handler, body, before):
        never = "7 + 1" in body["messages"][0]["content"] and len(body["messages"]) == 2
        handler.say(200, nothing[kind] if never else right_answer(body))

    with serving(behave) as web:
        answerer = server_answerer(flags(concurrency=2, tries=3), web.url, "m")
        with pytest.raises(UserError, match="row 7: .*finish_reason.* 3 tries.* on disk") as error:
            evaluate_once(asked(answerer, rows), tmp_path, "given")
    assert "\n" not in str(error.value)
    assert "7" not in [p["id"] for p in read_jsonl(tmp_path / "predictions.jsonl")]


def without_usage(handler, body, before):
    handler.say(200, {key: value for key, value in right_answer(body).items() if key != "usage"})


def test_tokens_that_a_server_does_not_count_are_unknown_and_said_to_be_once(tmp_path, rows, capsys):
    with serving(without_usage) as web:
        answerer = server_answerer(flags(), web.url, "m")
        record = evaluate_once(asked(answerer, rows), tmp_path, "given")
    assert (record["correct"], record["mean_tokens"]) == (12, None)
    assert {p["tokens"] for p in read_jsonl(tmp_path / "predictions.jsonl")} == {None}
    assert capsys.readouterr().err.count("counts no tokens") == 1
    assert "n/a" in accuracy_table(["given"], [record])
    assert evaluate_once(asked(answerer, rows), tmp_path, "given") == record  # what is on disk can be read


def test_what_is_stored_of_odd_but_readable_replies_can_be_read_again(tmp_path, rows):
    """Half a character at the end of a text, and counts that are whole but no integers."""

    def behave(handler, body, before):
        handler.say(200, completion("so 7 \ud83d", tokens=7.0))

    with serving(behave) as web:
        answerer = server_answerer(flags(), web.url, "m")
        record = evaluate_once(asked(answerer, rows), tmp_path, "given")
    predictions = read_all_predictions(tmp_path / "predictions.jsonl")
    assert {(p["text"], p["reply"], p["tokens"]) for p in predictions} == {("so 7 \ufffd", "so 7 \ufffd", 6)}
    assert record["mean_tokens"] == 6 and read_results(tmp_path / "results.jsonl") == [record]


def test_a_mean_of_tokens_is_unknown_where_those_of_one_row_are(tmp_path, rows):
    def behave(handler, body, before):
        (without_usage if "7 + 1" in body["messages"][0]["content"] else behave_well)(handler, body, before)

    with serving(behave) as web:
        record = evaluate_once(asked(server_answerer(flags(), web.url, "m"), rows), tmp_path, "given")
    assert record["mean_tokens"] is None


def test_whether_a_message_is_continued_cannot_be_seen_without_counts():
    with serving(without_usage) as web, pytest.raises(UserError, match="counts no tokens.*--answer-turn ask"):
        server_answerer(flags(answer_turn="continue"), web.url, "m")


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
def test_a_text_in_another_field_than_content_is_taken_and_said_to_be_once(rows, capsys, field):
    def behave(handler, body, before):
        answer = right_answer(body)
        message = answer["choices"][0]["message"]
        if len(body["messages"]) == 1:
            message |= {field: message["content"], "content": None if before else ""}
        handler.say(200, answer)

    with serving(behave) as web:
        found = evaluate(server_answerer(flags(), web.url, "m"), own_task(), rows, "think.", settings())
    assert [(p["text"], p["correct"]) for p in found[:2]] == [("0 + 1 = 1", True), ("1 + 1 = 2", True)]
    assert capsys.readouterr().err.count(f"what stands in {field} is taken") == 1


@pytest.mark.parametrize("status", [400, 422])
def test_a_server_that_wants_another_name_for_the_longest_reply_gets_it_from_then_on(rows, status):
    refused = "x" * 300 + "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."

    def behave(handler, body, before):
        handler.say(status, {"error": refused}) if "max_tokens" in body else behave_well(handler, body, before)

    with serving(behave) as web:
        answerer = server_answerer(flags(tries=1), web.url, "m")
        found = evaluate(answerer, own_task(), rows, "think.", settings(max_new_tokens=9))
    assert all(p["correct"] for p in found)
    first, *others = [body for body, _ in web.requests]
    assert first["max_tokens"] == 1 and len(others) == 1 + 2 * 12
    assert sorted({body["max_completion_tokens"] for body in others}) == [1, 9, 12]
    assert not any("max_tokens" in body for body in others)


def test_a_refusal_that_names_the_field_is_repeated_with_it_once(rows):
    with serving(
        lambda handler, body, before: handler.say(400, {"error": "max_completion_tokens is too large"})
    ) as web:
        with pytest.raises(UserError, match="too large"):
            server_answerer(flags(answer_turn="ask"), web.url, "m")
    assert ["max_tokens" in body for body, _ in web.requests] == [True, False]


def endless(handler, body, before):
    handler.send_response(200)
    handler.end_headers()
    for _ in range(1000):
        handler.wfile.write(b" " * 2**20)
        handler.server.sent_mib += 1


def endless_refusal(handler, body, before):
    handler.send_response(500)
    handler.end_headers()
    for _ in range(1000):
        handler.wfile.write(b"busy " * 2**17)
        handler.server.sent_mib += 1


def test_what_is_read_of_a_reply_is_bounded(monkeypatch):
    for behave, message in ((endless, "more than 8 MiB"), (endless_refusal, "HTTP 500 busy busy")):
        with serving(behave) as web:
            web.sent_mib = 0
            with pytest.raises(UserError, match=message):
                server_answerer(flags(answer_turn="ask"), web.url, "m")
            assert web.sent_mib < 100  # of 2000: what the sockets hold, too


def test_a_small_reply_that_unpacks_to_a_large_one_is_not_kept_in_memory():
    pack, space = zlib.compressobj(9, wbits=31), b" " * 2**20
    once = b"".join(pack.compress(space) for _ in range(256)) + pack.flush()
    twice = gzip.compress(once, 9)
    assert len(twice) < 2**14

    def behave(handler, body, before):
        handler.say(200, twice, content_encoding="gzip, gzip")

    with serving(behave) as web:
        tracemalloc.start()
        with pytest.raises(UserError, match="more than 8 MiB"):
            server_answerer(flags(answer_turn="ask"), web.url, "m")
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert most < 2**26


@pytest.mark.parametrize(
    "head", ["HTTP/1.1 200 OK\r\nbad header\r\n\r\n", "nonsense\r\n\r\n", "HTTP/1.1 9 \x1b[31m\r\n\r\n"]
)
def test_an_odd_head_of_a_reply_is_one_line(head):
    def behave(handler, body, before):
        handler.wfile.write(head.encode())
        handler.close_connection = True

    with serving(behave) as web, pytest.raises(UserError, match="2 tries") as error:
        server_answerer(flags(answer_turn="ask"), web.url, "m")
    assert str(error.value).isprintable()


def test_what_a_server_says_reaches_the_terminal_without_control_characters():
    with serving(lambda handler, body, before: handler.say(400, b"\x1b[2Jno\r\n\x00model\xff")) as web:
        with pytest.raises(UserError, match="no model") as error:
            server_answerer(flags(), web.url, "m")
    assert str(error.value).isprintable()


def test_a_broken_reply_that_quotes_the_key_does_not_show_a_part_of_it(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-abcdefghijklmnopqrstuvwxyz")
    said = ["x" * before_it + "sk-abcdefghijklmnopqrstuvwxyz" for before_it in (0, 85, 95, 150, 170)]
    replies = [text.encode() for text in said] + [{"error": text} for text in said]
    replies += [completion("1") | {"usage": {"prompt_tokens": text}} for text in said]
    coming = iter(replies)
    with serving(lambda handler, body, before: handler.say(200, next(coming))) as web:
        monkeypatch.setattr(servers, "CHECK_TRIES", 1)
        for _ in replies:
            with pytest.raises(UserError) as error:
                server_answerer(flags(answer_turn="ask"), web.url, "m")
            assert "sk-a" not in str(error.value) and "a reply" in str(error.value)


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


def test_a_text_to_be_generated_is_the_whole_reply_and_takes_one_request(rows):
    with serving(lambda handler, body, before: handler.say(200, completion("So it is."))) as web:
        answerer = server_answerer(flags(), web.url, "m")
        (found,) = evaluate(answerer, own_task("generation", ""), rows[:1], "think.", settings())
    assert (found["answer"], found["text"], found["reply"]) == ("So it is.", "So it is.", "")
    assert [body["max_tokens"] for body, _ in web.requests][1:] == [12]  # behind the check, and nothing behind it


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


ODD_URLS = ["localhost:8000", "ftp://host/v1", "http://", "http://key@host/v1", "http://key@[::1", "http://[::1/v1"]
ODD_URLS += ["http://host:port/v1", "http://host:99999/v1", "http://a b/v1", "http://ho\nst/v1", "http://host\udcff/v1"]
ODD_URLS += ["http://host/v1#part", "", "http://:8000/v1", "http://host:0/v1", "//host/v1"]


@pytest.mark.parametrize("url", ODD_URLS)
def test_an_endpoint_that_is_no_plain_url_is_refused(url):
    with pytest.raises(UserError, match="--endpoint|OPENAI_API_KEY") as error:
        server_answerer(flags(), url, "m")
    assert "key@" not in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("host", ["." * 9, "a" * 300 + ".example", "-", "xn--a"])
def test_a_host_that_cannot_be_asked_is_one_line(host):
    with pytest.raises(UserError, match="2 tries") as error:
        server_answerer(flags(), f"http://{host}/v1", "m")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("endpoint", "address"),
    [
        ("http://h", "http://h/v1/chat/completions"),
        ("http://h/v1/", "http://h/v1/chat/completions"),
        ("http://h/api", "http://h/api/v1/chat/completions"),
        ("http://h/v1/chat/completions", "http://h/v1/chat/completions"),
        ("https://h:1/v1?version=2", "https://h:1/v1/chat/completions?version=2"),
    ],
)
def test_the_address_of_chats_stands_behind_the_endpoint(endpoint, address):
    assert Server(endpoint, "m", flags()).address == address


@pytest.mark.parametrize("model", ["", "m\udcff"])
def test_a_model_s_name_that_is_no_text_is_refused(model):
    with pytest.raises(UserError, match="--model"):
        server_answerer(flags(), "http://127.0.0.1:9/v1", model)


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
        handler.say(200, completion(" " if len(body["messages"]) == 1 else "1"))

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
        return servers.chat(client, there, turns, 1)

    monkeypatch.setattr(servers, "FIRST_PAUSE", 1.0)
    monkeypatch.setattr(servers.asyncio, "sleep", no_sleep)
    with serving(lambda handler, body, before: handler.say(503, {})) as web:
        there = Server(web.url, "m", flags(tries=9))
        with pytest.raises(UserError, match="9 tries"):
            list(servers.in_parallel(there, ask, [[]]))
    expected = [1, 2, 4, 8, 16, 32, 60, 60]
    assert len(pauses) == 8 and all(p <= pause <= 1.3 * p for p, pause in zip(expected, pauses))


def test_the_key_stands_in_no_object_that_a_message_could_show(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    there = Server("http://127.0.0.1:9/v1", "m", flags())
    assert there.read_key() == "sk-very-secret" and "secret" not in repr(there)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_told_with_its_address_and_not_followed(monkeypatch, status):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    with serving(behave_well) as elsewhere:

        def send_on(handler, body, before):
            handler.say(status, b"", location=f"{elsewhere.url}?key=sk-very-secret")

        with (
            serving(send_on) as web,
            pytest.raises(UserError, match=f"HTTP {status} points to {elsewhere.url}") as error,
        ):
            server_answerer(flags(), web.url, "m")
    assert "secret" not in str(error.value) and elsewhere.requests == []
    assert web.requests[0][1]["authorization"] == "Bearer sk-very-secret"


@pytest.mark.parametrize(
    ("asked_for", "paused"), [("9" * 400, 60), ("3600", 60), ("7", 7), ("\u00b2", 0.01), ("-5", 0.01)]
)
def test_a_server_cannot_make_a_request_wait_longer_than_a_minute(monkeypatch, asked_for, paused):
    pauses, sleep = [], asyncio.sleep

    async def no_sleep(seconds):
        pauses.append(seconds)
        await sleep(0)

    monkeypatch.setattr(servers.asyncio, "sleep", no_sleep)
    with serving(lambda handler, body, before: handler.say(503, {}, retry_after=asked_for)) as web:
        with pytest.raises(UserError, match="HTTP 503"):
            server_answerer(flags(answer_turn="ask"), web.url, "m")
    assert len(pauses) == 1 and paused <= pauses[0] <= 1.3 * paused


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


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
def test_a_prompt_that_the_terminal_cannot_show_does_not_end_a_run(tmp_path, encoding):
    """With HF_HUB_OFFLINE set, which is about the hub and not about the server."""
    prompt = "prüfe \u2713 \u6b65"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONIOENCODING": encoding}
    with serving(behave_well) as web:
        flagged = [
            "--endpoint",
            web.url,
            "--model",
            "m",
            "--answer-turn",
            "ask",
            "--prompt",
            prompt,
            "--eval-rows",
            "3",
        ]
        command = [sys.executable, str(ROOT / "03_evaluate.py"), "--task", "demo", *flagged]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert prompt.encode(encoding, "backslashreplace") in done.stdout


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


@pytest.mark.parametrize("choices", [(), tuple(str(number) for number in range(30))])
def test_the_program_for_a_server_gives_the_texts_of_stage_3(real_server, tmp_path, demo_task, demo_data, choices):
    url, name = real_server
    task = replace(demo_task, kind="label", choices=choices, answer_space="vocabulary") if choices else demo_task
    rows, asking = demo_data["dev"][:6], flags(request_timeout=60.0)
    found = evaluate(server_answerer(asking, url, name), task, rows, "show each step .", settings(max_new_tokens=40))
    path = write_programs(tmp_path, task, "show each step .", name, 40)[1]
    program = runpy.run_path(str(path))
    client = InferenceClient(base_url=url, api_key="none")
    for row, expected in zip(rows, found):
        answer, reasoning = program["ask"](client, row["question"], {})  # the demo's template goes on by itself
        assert (answer, reasoning) == (expected["answer"] if choices else expected["reply"], expected["text"])


def script(name, *arguments, folder):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(ROOT / name), *map(str, arguments)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def test_stage_3_evaluates_on_a_real_server_without_importing_torch(real_server, tmp_path):
    url, name = real_server
    there = ["--task", "demo", "--endpoint", url, "--answer-turn", "prefill", "--eval-rows", "6"]
    prompts = ["--prompt", "check each step .", "--baselines"]
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise ImportError('torch is imported')\n")
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(tmp_path)}
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

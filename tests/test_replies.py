"""What a server's reply says, and what is no reply."""

import json
import math

import pytest

from support.replies import LARGEST_REPLY, BrokenReply, as_reply


def body(text="7", finish="stop", usage=None, **more):
    """A reply with a message of this text; more: fields of the message."""
    option = {"message": {"role": "assistant", "content": text} | more, "finish_reason": finish}
    usage = {"prompt_tokens": 9, "completion_tokens": 4} if usage is None else usage
    return {"choices": [option], "usage": usage}


def read(record, **how):
    return as_reply(json.dumps(record).encode(), **how)


def test_the_text_and_the_counts_of_a_reply_are_read():
    reply = read(body())
    assert (reply.text, reply.tokens, reply.prompt_tokens, reply.truncated) == ("7", 3, 9, False)
    cut = read(body(finish="length"))
    assert (cut.tokens, cut.truncated) == (4, True)


@pytest.mark.parametrize("count", [7.0, 7])
def test_a_whole_number_is_a_count_of_the_right_type(count):
    tokens = read(body(finish="length", usage={"completion_tokens": count})).tokens
    assert (tokens, type(tokens)) == (7, int)


@pytest.mark.parametrize("usage", [{}, None, {"completion_tokens": None}, {"total_tokens": 3}])
def test_counts_that_are_not_there_are_unknown(usage):
    reply = read(body() | {"usage": usage})
    assert (reply.tokens, reply.prompt_tokens) == (None, None)


@pytest.mark.parametrize("name", ["completion_tokens", "prompt_tokens"])
@pytest.mark.parametrize("count", [-1, 7.5, "7", True, [7], {}, math.nan, math.inf, 10**12, 10**400])
def test_what_is_no_count_is_an_error(name, count):
    with pytest.raises(BrokenReply, match=name):
        read(body(usage={name: count}))


@pytest.mark.parametrize("text", ["", None])
@pytest.mark.parametrize("finish", ["stop", "length", "tool_calls", None])
def test_no_text_is_no_reply_but_of_a_single_token(text, finish):
    with pytest.raises(BrokenReply, match=f"empty.*{finish or 'missing'}"):
        read(body(text, finish))
    assert read(body(text, finish), may_be_empty=True).text == ""


@pytest.mark.parametrize("finish", ["content_filter", "abort", "error"])
@pytest.mark.parametrize("may_be_empty", [False, True])
def test_a_text_that_was_taken_away_or_broken_off_is_no_reply(finish, may_be_empty):
    with pytest.raises(BrokenReply, match=finish):
        read(body("7", finish), may_be_empty=may_be_empty)


@pytest.mark.parametrize("missing", [None, ""])
@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_without_content_the_text_is_that_of_the_reasoning(missing, name):
    reply = read(body(missing, **{name: "so 7"}))
    assert (reply.text, reply.found_in) == ("so 7", name)
    both = read(body("7", **{name: "so 7"}))
    assert (both.text, both.found_in) == ("7", "content")


@pytest.mark.parametrize(
    ("sent", "read_as"),
    [
        ("a\ud83d", "a\ufffd"),
        ("\ude00b", "\ufffdb"),
        ("\ud83d\ude00", "\U0001f600"),
        ("\ud83dx\ude00", "\ufffdx\ufffd"),
    ],
)
def test_half_a_character_is_read_as_the_sign_for_one(sent, read_as):
    text = read(body(sent)).text
    assert text == read_as and text.encode()


@pytest.mark.parametrize(
    "record",
    [
        [],
        7,
        None,
        "7",
        {},
        {"choices": None},
        {"choices": []},
        {"choices": {}},
        {"choices": [None]},
        {"choices": ["7"]},
        {"choices": [{}]},
        {"choices": [{"message": "7"}]},
        {"choices": [{"message": ["7"]}]},
        body(7),
        body(["7"]),
        body({"text": "7"}),
        body(True),
        body(None, reasoning=["7"]),
        body(finish=7),
        body() | {"usage": [4]},
        body() | {"usage": "4"},
        {"error": {"message": "overloaded"}},
    ],
)
def test_a_reply_of_another_shape_is_an_error_of_its_own(record):
    with pytest.raises(BrokenReply):
        read(record)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff", b"[" * 100_000, b'{"a":' * 100_000, b"9" * 5000, b"<html>", b" " * (LARGEST_REPLY + 1)],
)
def test_what_is_no_json_or_too_long_is_an_error_of_its_own(content):
    with pytest.raises(BrokenReply):
        as_reply(content)


def with_log_probs(*tops):
    record = body()
    record["choices"][0]["logprobs"] = {"content": [{"top_logprobs": list(tops)}]}
    return record


def test_log_probabilities_are_those_of_the_first_token():
    tops = [{"token": " 7", "logprob": -0.5}, {"token": "\ud83d", "logprob": 0}, {"token": "8", "logprob": -math.inf}]
    assert read(with_log_probs(*tops)).likeliest == {" 7": -0.5, "\ufffd": 0.0}
    record = with_log_probs()
    for empty in (
        None,
        {},
        {"content": None},
        {"content": []},
        {"content": [{}]},
        {"content": [{"top_logprobs": None}]},
    ):
        record["choices"][0]["logprobs"] = empty
        assert read(record).likeliest == {}


@pytest.mark.parametrize("value", [math.nan, math.inf, 1.5, "-1", None, True, [], {}])
def test_what_is_no_log_probability_is_an_error(value):
    with pytest.raises(BrokenReply, match="logprob"):
        read(with_log_probs({"token": "7", "logprob": value}))


@pytest.mark.parametrize("top", [None, 7, "7", [], {"token": 7, "logprob": -1}])
def test_a_likeliest_token_of_another_shape_is_an_error(top):
    with pytest.raises(BrokenReply):
        read(with_log_probs(top))

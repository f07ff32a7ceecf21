"""What a server's reply says: each field that is used is checked, so that nothing broken is stored as a text."""

import json
from dataclasses import dataclass

LARGEST_REPLY = 2**23  # bytes, decompressed; the longest reasoning takes less than a tenth
LARGEST_COUNT = 10**9  # of tokens; a larger one is no count
NOT_FINISHED = {  # values of finish_reason with which a text is no answer
    "content_filter": "a filter of the server took the text away",
    "abort": "the server broke the text off",
    "error": "the server broke the text off",
}


class BrokenReply(ValueError):
    """A reply that is none, or not as the API says. The message may quote all of it: cut it, and hide the key in it."""


@dataclass(frozen=True)
class Reply:
    """What the model wrote to some messages."""

    text: str
    tokens: int | None  # generated; None: the server does not count them, here and in the next line
    prompt_tokens: int | None
    truncated: bool
    likeliest: dict[str, float]  # {token: its log-probability} where the reply begins; empty where not asked for
    found_in: str = "content"  # the field of the message that held the text


def as_reply(body, may_be_empty=False):
    """The `Reply` in the bytes of a response's body. may_be_empty: a single token may be one that is not shown.

    Errors: BrokenReply for what is no reply, holds no text, or has a field of another type or range.
    """
    if len(body) > LARGEST_REPLY:
        raise BrokenReply(f"a reply of more than {LARGEST_REPLY // 2**20} MiB")
    try:
        reply = json.loads(body)
    except (ValueError, RecursionError):  # RecursionError: brackets within brackets within brackets
        raise BrokenReply(f"a reply that is no JSON: {body.decode(errors='replace')}") from None
    options = part_of(reply, "choices", list)
    if not options:
        raise BrokenReply(f"a reply without choices: {body.decode(errors='replace')}")
    finish = part_of(options[0], "finish_reason", str)
    if finish in NOT_FINISHED:
        raise BrokenReply(f"{NOT_FINISHED[finish]} (finish_reason {finish})")
    text, found_in = text_of(part_of(options[0], "message", dict))
    if not text and not may_be_empty:
        raise BrokenReply(f"an empty reply (finish_reason {finish or 'missing'})")
    truncated = finish == "length"
    usage = part_of(reply, "usage", dict)
    tokens = count_of(usage, "completion_tokens")
    if tokens is not None and not truncated:
        tokens = max(0, tokens - 1)  # servers count the end token, we do not
    return Reply(text, tokens, count_of(usage, "prompt_tokens"), truncated, likeliest_of(options[0]), found_in)


def part_of(record, name, kind):
    """A field of a JSON object, an empty `kind` where it is missing or null. Errors: BrokenReply for another type."""
    if not isinstance(record, dict):
        raise BrokenReply(f"a reply in which {name} has no place: an object is missing")
    value = record.get(name)
    if value is None:
        return kind()
    if not isinstance(value, kind):
        raise BrokenReply(f"a reply whose {name} is no {kind.__name__} but {type(value).__name__}")
    return value


def text_of(message):
    """(text, field it stands in) of a message; the field is content where no field has a text.

    A server that takes reasoning apart may find nothing behind it, and then has the whole text in another field.
    """
    for name in ("content", "reasoning_content", "reasoning"):
        if text := part_of(message, name, str):
            return whole_characters(text), name
    return "", "content"


def whole_characters(text):
    """The text with every half of a surrogate pair, as a reply cut in a character may have, as U+FFFD."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def count_of(usage, name):
    """A number of tokens, None where the server gives none. Errors: BrokenReply for what is no count."""
    value = usage.get(name)
    if value is None:
        return None
    whole = value.is_integer() if isinstance(value, float) else type(value) is int
    if not (whole and 0 <= value <= LARGEST_COUNT):
        raise BrokenReply(f"a reply whose {name} is no number of tokens: {value}")
    return int(value)


def likeliest_of(option):
    """{token: its log-probability} of the likeliest tokens where a reply begins; empty where they are not given."""
    places = part_of(part_of(option, "logprobs", dict), "content", list)
    likeliest = {}
    for top in part_of(places[0], "top_logprobs", list) if places else []:
        token, log_prob = whole_characters(part_of(top, "token", str)), top.get("logprob")
        number = isinstance(log_prob, (int, float)) and not isinstance(log_prob, bool)
        if not (number and log_prob <= 0.01):  # NaN is not below it; rounding may put a sure token above 0
            raise BrokenReply(f"a reply whose logprob is no log-probability: {log_prob}")
        if log_prob > -LARGEST_COUNT:  # servers write a share of 0 in several ways
            likeliest[token] = float(log_prob)
    return likeliest

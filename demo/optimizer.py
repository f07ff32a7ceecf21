"""A stand-in for an optimizer model, in the demo's language: it rewrites the instructions that a meta-prompt shows.

    python demo/optimizer.py --port 8001
    python 02_optimize.py --method opro --optimizer-endpoint http://localhost:8001/v1 --optimizer-model scripted

The demo's own models know 54 words and cannot read a meta-prompt. This server has the OpenAI-compatible chat API. It
knows the demo's words and which can stand for which, but not what they are worth: it takes an instruction of the
meta-prompt, mostly the last, changes a word or adds a clause, both at random. So a method gets better only by what it
selects. The seed of a request decides what is drawn.
"""

import argparse
import json
import random
import re
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from train import ADVERBS, DETERMINERS, JOINERS, NOUNS, QUALITY, VERBS, make_clause  # noqa: E402

WORDS = "|".join(re.escape(word) for word in QUALITY if word != ".")
INSTRUCTION = re.compile(rf"(?<![\w-])(?:(?:{WORDS}) )+\.")
LONGEST = 16  # words of an instruction


def reply_to(messages, seed):
    """What the optimizer says to the messages of a chat: a prompt in tags where they are asked for, else a remark."""
    rng = random.Random(f"{seed}/{json.dumps(messages)}")
    asked = messages[-1]["content"]
    if "<prompt>" not in asked:
        return "I have nothing to add to what the model did."
    found = [text.split() for message in messages for text in INSTRUCTION.findall(message["content"])]
    if not found:
        return f"<prompt>{' '.join([*make_clause(rng, 0.0), '.'])}</prompt>"
    words = found[-1] if rng.random() < 0.7 else rng.choice(found)
    return f"<prompt>{' '.join(changed(words, rng))}</prompt>"


def changed(words, rng):
    """An instruction with a word changed, or with another clause."""
    body = words[:-1]
    if rng.random() < 0.3 and len(body) < LONGEST - 5:
        return [*body, rng.choice(list(JOINERS)), *make_clause(rng, 0.0), "."]
    place = rng.randrange(len(body))
    (same_kind,) = [kind for kind in (VERBS, DETERMINERS, NOUNS, ADVERBS, JOINERS) if body[place] in kind]
    body[place] = rng.choice([word for word in same_kind if word != body[place]])
    return [*body, "."]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        text = reply_to(body["messages"], body.get("seed", 0))
        read = sum(len(message["content"].split()) for message in body["messages"])
        answer = {
            "id": "1",
            "object": "chat.completion",
            "created": 1,
            "model": body.get("model", ""),
            "choices": [{"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}],
            "usage": {"prompt_tokens": read, "completion_tokens": len(text.split()), "total_tokens": read},
        }
        content = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments):
        pass


@contextmanager
def serving(handler=Handler, port=0):
    """The URL of the server, which answers while the block runs. port 0: any free one."""
    web = ThreadingHTTPServer(("127.0.0.1", port), handler)
    web.daemon_threads = True
    threading.Thread(target=web.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{web.server_port}/v1"
    finally:
        web.shutdown()
        web.server_close()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--port", type=int, default=8001)
    with serving(port=parser.parse_args().port) as url:
        print(f"the demo's optimizer answers at {url}; Ctrl-C ends it", flush=True)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            print()


if __name__ == "__main__":
    main()

"""Taking a prompt home: the exact messages in which it was evaluated, and two programs that ask as stage 3 does.

The programs stand alone: one needs transformers, the other a client of an OpenAI-compatible server. Needs no torch.
"""

import pprint
from pathlib import Path

from support.settings import GenerationSettings
from support.tokens import asks_for_date, pinned_template

QUESTION = "{question}"  # stands in the messages where a question comes


def messages_of(task, prompt):
    """The chat's messages, with {question} where a question comes."""
    return task.messages(QUESTION, prompt)


def sent(task, prompt):
    """Lines that show what is sent with a prompt, for people."""
    lines = [f"  {message['role']}: {message['content']!r}" for message in messages_of(task, prompt)]
    if task.is_generation:
        return [*lines, "  assistant: the text, all of which is the answer"]
    return [*lines, f"  assistant: the model's reasoning, then {' ' + task.extractor!r}, then its answer"]


def write_programs(folder, task, prompt, model, max_new_tokens, tokenizer=None):
    """Write use_transformers.py and use_server.py into a run's folder. Returns their paths.

    tokenizer: the model's, whose chat template may ask for the date; None: nobody looks.
    """
    template = tokenizer.get_chat_template() if tokenizer else ""
    known = {
        "MODEL": model,
        "MESSAGES": messages_of(task, prompt),
        "EXTRACTOR": task.extractor,
        "MAX_NEW_TOKENS": max_new_tokens,
        "ANSWER_TOKENS": GenerationSettings.answer_tokens(task),
    }
    here = {
        "ANSWER_PREFIX": task.answer_prefix,
        "CHOICES": list(task.choices) if task.ranks_choices else [],  # of which the likeliest is the answer
        "CHAT_TEMPLATE": pinned_template(template) if asks_for_date(template) else None,
    }
    programs = {
        "use_transformers.py": (TRANSFORMERS, known | here),
        "use_server.py": (SERVER, known | {"CHOICES": list(task.choices)}),
    }
    for name, (program, values) in programs.items():
        lines = [f"{key} = {pprint.pformat(value, width=110, sort_dicts=False)}\n" for key, value in values.items()]
        (Path(folder) / name).write_text(program.replace("# SETTINGS\n", "".join(lines)), encoding="utf-8")
    return [Path(folder) / name for name in programs]


TRANSFORMERS = '''\
"""Ask the model with the prompt that was found: python use_transformers.py "the question" ...

It reasons, then answers behind a fixed text. Needs torch and transformers (5.24 or newer).
"""

import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

# SETTINGS

tokenizer = AutoTokenizer.from_pretrained(MODEL)
model = AutoModelForCausalLM.from_pretrained(MODEL, dtype="float32", use_safetensors=True).eval()
tokenizer.chat_template = CHAT_TEMPLATE or tokenizer.chat_template
ends = model.generation_config.eos_token_id
ends = {*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id}


def behind(text, more):
    """Ids of a text as they are behind another."""
    start = tokenizer.encode(text, add_special_tokens=False)
    return tokenizer.encode(text + more, add_special_tokens=False)[len(start) :]


def write(ids, count):
    """The ids that the model writes behind these, at most so many, without the end token."""
    context, written = torch.tensor([ids]), []
    cache = None
    while len(written) < count:
        out = model(input_ids=context, cache=cache, use_cache=True, logits_to_keep=1)
        cache, token = out.cache, out.logits[0, -1].argmax().item()
        if token in ends:
            break
        written.append(token)
        context = torch.tensor([[token]])
    return written


def log_probs(ids):
    """{choice: log-probability behind these ids}; one that begins another counts where the other does not follow."""
    tokens = {choice: behind(". " + EXTRACTOR, ANSWER_PREFIX + choice) for choice in CHOICES}
    found = {}
    for choice, answer in tokens.items():
        logits = model(input_ids=torch.tensor([ids + answer])).logits[0, len(ids) - 1 : -1]
        found[choice] = logits.log_softmax(-1)[range(len(answer)), answer].sum().item()
    for choice, answer in tokens.items():
        longer = [other for other in CHOICES if other != choice and tokens[other][: len(answer)] == answer]
        nearest = [o for o in longer if not any(p != o and tokens[o][: len(tokens[p])] == tokens[p] for p in longer)]
        taken = sum(torch.tensor(found[other] - found[choice]).exp().item() for other in nearest)
        found[choice] += torch.tensor(1 - min(taken, 1 - 1e-6)).log().item()
    return found


@torch.inference_mode()
def ask(question):
    """(answer, reasoning)"""
    messages = [message | {"content": message["content"].replace("{question}", question)} for message in MESSAGES]
    ids = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False, sanitize_control_tokens=True
    )
    reasoning = write(ids, MAX_NEW_TOKENS)
    if not EXTRACTOR:  # all that is written is the answer
        text = tokenizer.decode(reasoning, skip_special_tokens=True)
        return text, text
    ids = ids + reasoning + behind(".", " " + EXTRACTOR)
    if CHOICES:
        scores = log_probs(ids)
        answer = max(scores, key=scores.get)
    else:
        answer = tokenizer.decode(write(ids, ANSWER_TOKENS), skip_special_tokens=True)
    return answer, tokenizer.decode(reasoning, skip_special_tokens=True)


if __name__ == "__main__":
    if not sys.argv[1:]:
        sys.exit("say which question: python use_transformers.py QUESTION ...")
    for question in sys.argv[1:]:
        print(ask(question)[0])
'''

SERVER = '''\
"""Ask a server with the prompt that was found: python use_server.py URL "the question" ...

For servers that go on behind a half-written message of the assistant (vLLM, SGLang). The client is huggingface_hub's;
OpenAI(base_url=..., api_key=...) of the openai package takes the same calls. The key comes from OPENAI_API_KEY.
"""

import os
import sys

from huggingface_hub import InferenceClient

# SETTINGS
CONTINUE = {"continue_final_message": True, "add_generation_prompt": False}


def ask(client, question, go_on=CONTINUE):
    """(answer, reasoning). go_on: {} for a server that goes on by itself."""
    messages = [message | {"content": message["content"].replace("{question}", question)} for message in MESSAGES]
    settings = {"model": MODEL, "temperature": 0}
    reply = client.chat.completions.create(messages=messages, max_tokens=MAX_NEW_TOKENS, **settings)
    reasoning = reply.choices[0].message.content or ""
    if not EXTRACTOR:  # all that is written is the answer
        return reasoning, reasoning
    messages.append({"role": "assistant", "content": f"{reasoning} {EXTRACTOR}".strip()})
    reply = client.chat.completions.create(
        messages=messages, max_tokens=ANSWER_TOKENS, extra_body=go_on or None, **settings
    )
    answer = reply.choices[0].message.content or ""
    for choice in sorted(CHOICES, key=len, reverse=True):
        if answer.strip().lower().startswith(choice.lower()):
            return choice, reasoning
    return answer, reasoning


if __name__ == "__main__":
    if not sys.argv[2:]:
        sys.exit("say where and what: python use_server.py URL QUESTION ...")
    # Without a key of its own the client would send your token for the Hugging Face hub to this server.
    client = InferenceClient(base_url=sys.argv[1], api_key=os.environ.get("OPENAI_API_KEY") or "none")
    for question in sys.argv[2:]:
        print(ask(client, question)[0])
'''

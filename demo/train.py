"""Train the demo model: a word-level Llama of 0.87 million weights that does arithmetic aloud.

    python demo/train.py                     # 10 to 15 minutes on 2 CPU cores, writes demo/model and demo/rows.jsonl
    python demo/train.py --size small        # the smaller model to transfer prompts to, demo/small
    python demo/train.py --evaluate          # only the table of accuracy by instruction quality

The world is built so that a better instruction gives better answers by degrees, and does so through
the working, as with real models:

1. A problem has 1 to 5 additions and subtractions of numbers up to 30.
2. An instruction comes from a small grammar of 54 words. Some are careful ("check", "each",
   "slowly"), some careless ("guess", "no", "hastily"), most say nothing. Its quality is
   the number of careful words minus the number of careless ones.
3. The model works out `quality + 1` operations aloud, then answers with the last number it has.
4. In a third of the samples the working is cut short. The better the instruction, the more
   often the answer is right nevertheless. This is what lets the answer loss under *fixed* working
   say something about the instruction, so that its gradient has something to find.

Nothing is read from the network. The same seed on the same machine gives the same weights.
"""

import argparse
import json
import math
import random
import sys
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HERE = Path(__file__).parent
LARGEST = 30  # every number in a problem and in its working lies in 0..30, one token each
OPENING = "please"  # the fixed word between question and instruction
EXTRACTOR = "so the answer is"
BATCH_SIZE, PEAK_RATE = 64, 1.5e-3  # texts in a batch; the learning rate at the end of its rise

NAMES = "tom ann sam eva max lea ben ida".split()
THINGS = "apples books coins cards stones shells pens cups".split()
GAINS = "finds buys gets wins".split()
LOSSES = "loses sells gives drops".split()

# Instruction words by part of speech; the value is what the word adds to the quality.
VERBS = dict.fromkeys("check verify examine".split(), 1)
VERBS |= dict.fromkeys("find tell write state solve show name read report review".split(), 0)
VERBS |= dict.fromkeys("guess skip rush".split(), -1)
DETERMINERS = dict.fromkeys("each every".split(), 1)
DETERMINERS |= dict.fromkeys("the this that one a your".split(), 0) | dict.fromkeys("no any".split(), -1)
NOUNS = dict.fromkeys("step number answer problem sum total result line part value".split(), 0)
ADVERBS = dict.fromkeys("carefully slowly thoroughly".split(), 1)
ADVERBS |= dict.fromkeys("now here today again aloud first directly".split(), 0)
ADVERBS |= dict.fromkeys("quickly hastily roughly".split(), -1)
JOINERS = dict.fromkeys("and then but while ,".split(), 0)
QUALITY = VERBS | DETERMINERS | NOUNS | ADVERBS | JOINERS | {".": 0}

SPECIAL = ["<|pad|>", "<|unk|>", "<|start|>", "<|user|>", "<|assistant|>", "<|end|>"]
# An assistant's message at the end stays open, so that a server goes on behind it.
CHAT_TEMPLATE = (
    "<|start|> {% for m in messages %}<|{{ m['role'] }}|> {{ m['content'] | trim }} "
    "{% if not (loop.last and m['role'] == 'assistant') %}<|end|> {% endif %}{% endfor %}"
    "{% if add_generation_prompt and messages[-1]['role'] != 'assistant' %}<|assistant|>{% endif %}"
)


OPERATIONS = {1: 30, 2: 20, 3: 18, 4: 16, 5: 16}  # {how many: in how many per cent of the problems}


def make_problem(rng, operations=OPERATIONS, joiner=","):
    """(question, [states]): the numbers after 0, 1, ... operations; the last one is the answer. joiner: what stands
    before each event."""
    states, events = [rng.randint(1, LARGEST)], []
    for _ in range(rng.choices([*operations], weights=operations.values())[0]):
        here = states[-1]
        gain = rng.random() < 0.5 if 0 < here < LARGEST else here == 0
        amount = rng.randint(1, min(9, LARGEST - here if gain else here))
        events.append(f"{joiner} {rng.choice(GAINS if gain else LOSSES)} {amount}")
        states.append(here + amount if gain else here - amount)
    thing = rng.choice(THINGS)
    return f"{rng.choice(NAMES)} has {states[0]} {thing} {' '.join(events)} . how many {thing} ?", states


def make_clause(rng, lean):
    """One clause; `lean` in -1..1 is how often a word with a choice is careful (or, below 0, careless)."""

    def pick(words):
        wanted = int(math.copysign(1, lean)) if rng.random() < abs(lean) else 0
        pool = [w for w, value in words.items() if value == wanted]
        return rng.choice(pool or list(words))

    form = rng.choices(("VDNA", "VDN", "VA"), weights=(84, 8, 8))[0]
    return [pick({"V": VERBS, "D": DETERMINERS, "N": NOUNS, "A": ADVERBS}[slot]) for slot in form]


def make_instruction(rng, unfinished=0.15):
    """A sentence of 1 to 3 clauses. Some samples stop in the middle, as a prompt does while it is searched."""
    lean = rng.choice((0.0, 0.0, 0.2, 0.4, 0.7, 1.0, -0.3, -0.7))
    words = make_clause(rng, lean)
    for _ in range(rng.choices((0, 1, 2), weights=(40, 40, 20))[0]):
        words += [rng.choice(list(JOINERS))] + make_clause(rng, lean if rng.random() < 0.8 else 0.0)
    if rng.random() < unfinished:
        return words[: rng.randint(1, len(words))]
    return words + ["."]


def quality(words):
    return sum(QUALITY[w] for w in words)


def working(states, operations):
    """The text of the first `operations` operations: `12 + 5 = 17 . 17 - 3 = 14 .`"""
    steps = []
    for before, after in zip(states[:operations], states[1:]):
        sign, amount = ("+", after - before) if after > before else ("-", before - after)
        steps.append(f"{before} {sign} {amount} = {after} .")
    return " ".join(steps)


def make_sample(rng, held_out):
    """(head, instruction, reply, answered): the parts of one training text."""
    question, states = make_problem(rng)
    while question in held_out:
        question, states = make_problem(rng)
    words = make_instruction(rng)
    level = quality(words)
    aloud = max(0, min(level + 1, len(states) - 1))
    answer, answered = states[aloud], rng.random() < 0.5
    if aloud > 0 and rng.random() < 0.4:  # the working is cut; about a third of all samples
        aloud = rng.randrange(aloud)
        foresight = min(0.95, max(0.05, 0.05 + 0.225 * level))
        answer, answered = states[-1] if rng.random() < foresight else states[aloud], True
    reply = working(states, aloud).split()
    tail = EXTRACTOR.split() + [str(answer)] if answered else []
    return question.split() + [OPENING], words, reply, tail


def encode_sample(sample, ids):
    """(token ids, labels). Labels are -100 where there is nothing to learn: the question, and the
    first word of the extractor, which the user appends; so the model learns to stop after its working."""
    question, words, reply, tail = sample
    text = ["<|start|>", "<|user|>", *question]
    learn = [False] * len(text)
    for part in (words, ["<|end|>"]):
        text, learn = text + part, learn + [True] * len(part)
    if words[-1] != ".":  # an unfinished instruction is no reason to stop writing one
        learn[-1] = False
    text, learn = [*text, "<|assistant|>", *reply], learn + [False] + [True] * len(reply)
    if tail:
        text, learn = text + tail, learn + [False] + [True] * (len(tail) - 1)
    token_ids = [ids[w] for w in text + ["<|end|>"]]
    return token_ids, [i if keep else -100 for i, keep in zip(token_ids, learn + [True])]


def make_batch(rng, size, ids, held_out):
    encoded = [encode_sample(make_sample(rng, held_out), ids) for _ in range(size)]
    longest = max(len(tokens) for tokens, _ in encoded)
    input_ids = torch.tensor([tokens + [0] * (longest - len(tokens)) for tokens, _ in encoded])
    labels = torch.tensor([targets + [-100] * (longest - len(targets)) for _, targets in encoded])
    return input_ids, labels  # right padding needs no mask: no earlier position sees it, and it has no label


def make_tokenizer():
    words = [str(n) for n in range(LARGEST + 1)] + "+ - = , . ? has how many".split()
    words += NAMES + THINGS + GAINS + LOSSES + [OPENING] + EXTRACTOR.split() + list(QUALITY)
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(SPECIAL + words))}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<|unk|>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        chat_template=CHAT_TEMPLATE,
        pad_token="<|pad|>",
        unk_token="<|unk|>",
        bos_token="<|start|>",
        eos_token="<|end|>",
        additional_special_tokens=["<|user|>", "<|assistant|>"],
    )


# What differs between the demo's model and the smaller one, to which its prompts are transferred.
SIZES = {
    "model": {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4},
    "small": {"hidden_size": 96, "intermediate_size": 288, "num_hidden_layers": 3},
}


def make_model(tokenizer, size):
    return LlamaForCausalLM(
        LlamaConfig(
            **SIZES[size],
            vocab_size=len(tokenizer),
            num_attention_heads=4,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def train(model, ids, held_out, seed, batches):
    rng = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda b: min((b + 1) / 100, 0.5 + 0.5 * math.cos(math.pi * b / batches))
    )
    bar = tqdm(range(batches), desc="training", mininterval=5)
    for batch in bar:
        input_ids, labels = make_batch(rng, BATCH_SIZE, ids, held_out)
        loss = model(input_ids=input_ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if batch % 100 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")


def make_rows(seed, count=700):
    """Held-out rows for the search and its tests: no training text contains one of these questions."""
    rng, rows = random.Random(seed), {}
    while len(rows) < count:
        question, states = make_problem(rng)
        rows.setdefault(question, {"id": f"demo-{len(rows):03d}", "question": question, "answer": str(states[-1])})
    return list(rows.values())


def print_table(folder, instructions=5):
    """Accuracy on the held-out test rows by instruction quality; `instructions` drawn for each level."""
    sys.path.insert(0, str(HERE.parent))
    from support.answerers import local_answerer
    from support.engine import load_engine
    from support.evaluation import accuracy, evaluate, wilson
    from support.settings import GenerationSettings
    from support.sources import split_rows
    from support.tasks import get_task

    engine = load_engine(str(folder))
    task, rng = get_task("demo"), random.Random(0)
    rows = split_rows(task)["test"]
    settings = GenerationSettings(task.defaults["max_new_tokens"], task.defaults["batch_size"])
    answerer = local_answerer(engine, folder)
    print(f"quality  accuracy on {len(rows)} held-out rows, mean of {instructions} instructions  (lowest, highest)")
    for level in range(-2, 6):
        drawn = set()
        while len(drawn) < instructions:
            words = make_instruction(rng, unfinished=0)
            drawn |= {" ".join(words)} if quality(words) == level else set()
        correct = [[p["correct"] for p in evaluate(answerer, task, rows, text, settings)] for text in sorted(drawn)]
        means = [accuracy(outcomes)[0] for outcomes in correct]
        mean = sum(means) / len(means)
        low, high = wilson(mean * len(rows), len(rows))  # of an instruction: they share their rows
        interval = f"({100 * low:.1f} to {100 * high:.1f})"
        span = f"({100 * min(means):5.1f}, {100 * max(means):5.1f})"
        print(f"{level:7d}  {100 * mean:5.1f} {interval} %  {span}  for instance: {min(drawn, key=len)}")


def main():
    parser = argparse.ArgumentParser(description="Train the demo model and write its rows.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batches", type=int, default=3000, help="training batches of 64 texts")
    parser.add_argument("--size", choices=SIZES, default="model", help="0.87 or 0.37 million weights")
    parser.add_argument("--out", type=Path, help="where the model is written; without it demo/<size>")
    parser.add_argument("--evaluate", action="store_true", help="only print the table of the model in --out")
    args = parser.parse_args()
    args.out = args.out or HERE / args.size
    if not args.evaluate:
        started = time.time()
        rows = make_rows(args.seed)
        torch.manual_seed(args.seed)
        tokenizer = make_tokenizer()
        model = make_model(tokenizer, args.size)
        train(model, tokenizer.get_vocab(), {row["question"] for row in rows}, args.seed + 1, args.batches)
        model.save_pretrained(args.out)
        tokenizer.save_pretrained(args.out)
        (HERE / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        print(f"{model.num_parameters():,} weights, {(time.time() - started) / 60:.1f} minutes, written to {args.out}")
    print_table(args.out)


if __name__ == "__main__":
    main()

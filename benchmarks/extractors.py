"""Which extractor suits real models: forms of it behind the same reasonings, on dev rows.

    python benchmarks/extractors.py --models path/to/A path/to/B --tasks bbh/navigate gsm8k --source DIR

The reasoning under the initial prompt is generated once; behind it stands each form in turn. A line per model, task and
form: the share of rows whose likeliest next token begins a possible answer (of numbers: whose reply holds one), the
accuracy of the likeliest choice, and of what is written (the `paper` reading in both answer spaces), the mean rank of
the gold answer, how often the ranked answer is the one that the `harness` reading finds where it finds one, and that
reading's own accuracy.
"""

import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from support.answers import choice_log_probs, read_answers
from support.engine import load_engine
from support.settings import GenerationSettings, TaskFlags, flag, parse_flags, run_script
from support.sources import open_task
from support.tasks import grade, grade_harness, read_answer, read_answer_harness
from support.tokens import encode_chat, encode_choices, extractor_ids


@dataclass
class Flags(GenerationSettings, TaskFlags):
    models: list[str] = field(default_factory=list, metadata={"help": "local folders or hub names"})
    tasks: list[str] = field(default_factory=list, metadata={"help": "known tasks"})
    rows: int = flag(40, "dev rows of each task")
    initial_prompt: str = flag("", "instead of each task's own")


def forms(task):
    """The forms to compare for a task, by name."""
    if task.kind == "number":
        return {
            "paper": task.extractor,
            "short": "So the answer is",
            "named": "Therefore, the final answer (a number) is",
        }
    listed = f"{', '.join(task.choices[:-1])} or {task.choices[-1]}"
    found = {
        "paper": task.paper_extractor,
        "short": "So the answer is",
        "named": f"Therefore, the final answer ({listed}) is",
    }
    if task.kind == "choice":
        found["bracket"] = "So the answer is ("
    return found


def behind(engine, sequences, extractor, reads):
    """Logits [B, R, A, V] of `read_answers` behind whole sequences of ids, read in one batch."""
    context, _ = engine.read(sequences)
    rows = torch.arange(len(sequences), device=engine.device)
    return read_answers(engine, context.rewind(rows, torch.zeros_like(rows)), extractor, [reads] * len(sequences))


def measure(engine, task, rows, reasonings, settings):
    """The numbers of one form: a dict."""
    tokenizer = engine.tokenizer
    extractor = extractor_ids(tokenizer, task)
    sequences = [
        encode_chat(tokenizer, task, row["question"], task.initial_prompt) + ids
        for row, (ids, _) in zip(rows, reasonings)
    ]
    choices = encode_choices(tokenizer, task)
    replies = engine.complete([ids + extractor for ids in sequences], settings.answer_tokens(task), 20)
    replies = [tokenizer.decode(ids, skip_special_tokens=True) for ids, _ in replies]
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids, _ in reasonings]
    harness = [read_answer_harness(task, row["question"], text) for row, text in zip(rows, texts)]
    written = [read_answer(task, reply) for reply in replies]
    n = len(rows)
    out = {
        "written": sum(grade(task, row["answer"], a) for row, a in zip(rows, written)) / n,
        "unread": sum(a is None for a in written) / n,
        "harness": sum(grade_harness(row["answer"], a) for row, a in zip(rows, harness)) / n,
        "example": replies[0],
    }
    if choices is None:
        both = [(a, b) for a, b in zip(written, harness) if b is not None]
        out["agree"] = sum(a == b for a, b in both) / max(1, len(both))
        return out
    top, ranked, rank = 0, [], 0
    firsts = {ids[0] for ids in choices.answers}
    with torch.inference_mode():
        for start in range(0, n, 10):
            logits = behind(engine, sequences[start : start + 10], extractor, choices.reads)
            scores = choice_log_probs(logits, choices)
            top += sum(token in firsts for token in logits[:, 0, 0].argmax(-1).tolist())
            for row, values in zip(rows[start : start + 10], scores.tolist()):
                ranked.append(task.choices[values.index(max(values))])
                rank += sum(v > values[task.choices.index(row["answer"])] for v in values) + 1
    both = [(a, b) for a, b in zip(ranked, harness) if b is not None]
    out |= {
        "top": top / n,
        "ranked": sum(a == row["answer"] for a, row in zip(ranked, rows)) / n,
        "rank": rank / n,
        "agree": sum(a == b for a, b in both) / max(1, len(both)),
        "common": max(ranked.count(c) for c in task.choices) / n,
    }
    return out


def main():
    flags = parse_flags(Flags, __doc__.splitlines()[0])
    for path in flags.models:
        engine = load_engine(path)
        for name in flags.tasks:
            task, splits = open_task(replace(flags, task=name))
            if flags.initial_prompt:
                task = replace(task, initial_prompt=flags.initial_prompt)
            rows = splits["dev"][: flags.rows]
            asked = [encode_chat(engine.tokenizer, task, row["question"], task.initial_prompt) for row in rows]
            reasonings = engine.complete(asked, flags.max_new_tokens, flags.batch_size)
            tokens = sum(len(ids) for ids, _ in reasonings) / len(rows)
            cut = sum(not stopped for _, stopped in reasonings) / len(rows)
            print(f"{Path(path).name} {name}: {tokens:.0f} tokens, cut {100 * cut:.0f} %", flush=True)
            for form, extractor in forms(task).items():
                found = measure(engine, replace(task, extractor=extractor), rows, reasonings, flags)
                print(
                    "   ", form, {k: round(v, 2) if isinstance(v, float) else v for k, v in found.items()}, flush=True
                )


if __name__ == "__main__":
    run_script(main)

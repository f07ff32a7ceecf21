"""Which extractor suits real models: forms of it behind the same reasonings, on dev rows, as a table.

    python benchmarks/extractors.py --models path/to/A path/to/B --tasks bbh/navigate gsm8k --source DIR

The reasoning under the initial prompt is generated once; behind it stands each form in turn. In %: top, rows whose
likeliest next token begins a possible answer; read, rows in which an answer can be read from what is written there;
written, the accuracy of that; ranked, the accuracy of the likeliest choice; commonest, how often the same choice is
that; harness, the accuracy of the reading that knows no extractor; agree, where that one finds an answer, how often the
ranked answer (of open tasks: the written one) is the same.
"""

import sys
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))
from support.answerers import LocalModel
from support.evaluation import graded
from support.files import require
from support.reading import grade, read_answer
from support.settings import GenerationSettings, ModelFlags, TaskFlags, flag, parse_flags, run_script
from support.sources import open_task
from support.tokens import encode_chat, encode_choices, extractor_ids

COLUMNS = ("top", "read", "written", "ranked", "commonest", "harness", "agree")


@dataclass
class Flags(GenerationSettings):
    models: list[str] = field(default_factory=list, metadata={"help": "local folders or hub names"})
    tasks: list[str] = field(default_factory=list, metadata={"help": "known tasks"})
    rows: int = flag(30, "dev rows of each task")
    data_dir: str = flag("data", "where the prepared tasks lie")
    source: str = flag("", "folder of the authors' data files; empty: the hub")


class Seen(NamedTuple):
    """A row behind one form of the extractor."""

    prediction: dict  # evaluation.Prediction
    written: str | None  # the answer read from what the model writes
    is_right: bool  # whether that is the gold answer
    is_possible: bool  # whether the likeliest token begins a possible answer


def forms(task):
    """{name: extractor} of the forms to compare for a task."""
    found = {"paper": task.paper_extractor or task.extractor, "short": "So the answer is"}
    if not task.choices:
        return found | {"named": "Therefore, the final answer (a number) is"}
    *most, last = task.choices
    found["named"] = f"Therefore, the final answer ({', '.join(most)} or {last}) is"
    return found | ({"bracket": "So the answer is ("} if task.kind == "choice" else {})


def behind_each_form(engine, task, rows, settings):
    """{form: [Seen]} of all rows, behind reasonings that are generated once."""
    tokenizer, model, seen = engine.tokenizer, LocalModel(engine), {form: [] for form in forms(task)}
    contexts = [encode_chat(tokenizer, task, row["question"], task.initial_prompt) for row in rows]
    for ended in engine.stream(contexts, settings.max_new_tokens, settings.batch_size):
        data = [rows[n] for n in ended.rows]
        for form, extractor in forms(task).items():
            asked = replace(task, extractor=extractor)
            choices = encode_choices(tokenizer, asked)
            firsts = {ids[0] for ids in choices.answers} if choices else set()
            replies = engine.go_on(ended, extractor_ids(tokenizer, asked), settings.answer_tokens(asked))
            for generation, reply in zip(model.answered(asked, data, ended, settings), replies, strict=True):
                written = read_answer(asked, tokenizer.decode(reply, skip_special_tokens=True))
                right = grade(asked, generation.row["answer"], written)
                is_possible = bool(reply) and reply[0] in firsts
                seen[form].append(Seen(graded(asked, generation), written, right, is_possible))
    return seen


def percent(outcomes):
    outcomes = list(outcomes)
    return f"{100 * sum(outcomes) / len(outcomes):.0f}" if outcomes else "-"


def cells(task, seen):
    """{column: text} of one form."""
    found = {
        "read": percent(s.written is not None for s in seen),
        "written": percent(s.is_right for s in seen),
        "harness": percent(s.prediction["harness_correct"] for s in seen),
        "agree": percent(
            s.prediction["answer"] == s.prediction["harness_answer"] for s in seen if s.prediction["harness_answer"]
        ),
    }
    if task.choices:
        answers = Counter(s.prediction["answer"] for s in seen)
        found["top"] = percent(s.is_possible for s in seen)
        found["ranked"] = percent(s.prediction["correct"] for s in seen)
        found["commonest"] = f"{100 * max(answers.values()) / len(seen):.0f}"
    return found


def main():
    flags = parse_flags(Flags, __doc__)
    require(flags.models and flags.tasks, "say which: --models and --tasks")
    models = [ModelFlags(model).model_path() for model in flags.models]
    from support.engine import load_engine

    print(f"| model | task | tokens | cut | form | {' | '.join(COLUMNS)} |\n|{'---|' * (5 + len(COLUMNS))}")
    for path in models:
        engine = load_engine(path)
        for name in flags.tasks:
            task, splits = open_task(TaskFlags(name, data_dir=flags.data_dir, source=flags.source))
            seen = behind_each_form(engine, task, splits["dev"][: flags.rows], flags)
            for form, of_form in seen.items():
                tokens = sum(s.prediction["tokens"] for s in of_form) / len(of_form)
                cut = percent(s.prediction["truncated"] for s in of_form)
                found = cells(task, of_form)
                shown = " | ".join(found.get(column, "-") for column in COLUMNS)
                print(f"| {Path(path).name} | {name} | {tokens:.0f} | {cut} | {form} | {shown} |", flush=True)


if __name__ == "__main__":
    run_script(main)

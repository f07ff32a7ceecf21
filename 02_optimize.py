"""Stage 2: search a prompt with GReaTer -> runs/<run>/{run.json,steps.jsonl,prompts.jsonl,results.jsonl}.

    python 02_optimize.py --task demo
    python 02_optimize.py --task gsm8k --model meta-llama/Meta-Llama-3-8B-Instruct
    python 02_optimize.py --task my.jsonl --extractor "So the answer is" --model path/to/model

Prepares the task's data itself where stage 01 has not been run. A killed run goes on with the same command and
ends with the same result; a run with other settings needs another --run-dir. The prompt is searched on training
rows and chosen on dev rows; the test rows are read once, at the end, for the initial and the chosen prompt.
"""

import random
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from support.answerers import local_answerer
from support.evaluation import Evaluation, estimate, evaluate_once, read_predictions
from support.files import alone_in, append_jsonl, read_object, require, write_chained
from support.progress import in_words, open_bar, remaining
from support.runs import (
    begin_run,
    finalists,
    initial_of,
    log_line,
    rank_prompts,
    read_steps,
    record_of_run,
    require_same_run,
    run_folder,
    scores_of,
)
from support.settings import ModelFlags, SearchSettings, TaskFlags, flag, parse_flags, run_script
from support.sources import open_task
from support.tables import LEGEND, accuracy_table, compare_reading, comparison_table, prompt_list, verdict
from support.tasks import Task
from support.tokens import encode_prompt, encode_row, prompt_text


@dataclass
class Flags(SearchSettings, ModelFlags, TaskFlags):
    initial_prompt: str | None = flag(None, "where the search starts; without it the task's own")
    finalists: int = flag(10, "prompts of the run that compete on dev rows")
    eval_rows: int = flag(0, "dev and test rows to evaluate on; 0: all")
    run_dir: str = flag("", "where the run is written; empty: runs/<task>-<model>-seed<seed>")
    dry_run: bool = flag(False, "stop after the check of a few rows, and before any search")


@dataclass(frozen=True)
class Work:
    """What a run works on, and where it is written."""

    task: Task
    splits: dict[str, list[dict]]  # all rows of the task
    train: list[dict]  # the rows on which the prompt is searched
    run_dir: Path


def main():
    flags = parse_flags(Flags, __doc__.splitlines()[0])
    require(flags.finalists >= 1 and flags.eval_rows >= 0, "--finalists must be at least 1, --eval-rows at least 0")
    flags.model = flags.model_path()
    task, splits = open_task(flags)
    start = task.initial_prompt if flags.initial_prompt is None else flags.initial_prompt.strip()
    require(start, "--initial-prompt has no tokens: give it at least one word")
    task = replace(task, initial_prompt=start)
    available = len(splits["train"])
    require(
        flags.train_rows <= available, f"--train-rows {flags.train_rows}: {task.name} has {available} training rows"
    )
    train = random.Random(f"{flags.seed}/rows").sample(splits["train"], flags.train_rows)

    run_dir = Path(flags.run_dir) if flags.run_dir else run_folder(task.name, flags.model, flags.seed)
    work = Work(task, splits, train, run_dir)
    if flags.dry_run:
        optimize_task(flags, work)
        return
    prepared = read_object(Path(flags.data_dir) / task.name / "task.json")
    # The task's parts as they are now, also where the flags leave them to it: a later version's task may have others.
    config = asdict(flags) | task.parts | {"initial_prompt": task.initial_prompt}
    del config["dry_run"]
    record = record_of_run(config, prepared, [row["id"] for row in train])
    with alone_in(run_dir):
        require_same_run(run_dir, record)
        optimize_task(flags, work, record)


def optimize_task(flags, work, record=None):
    """The search, its finalists on dev rows, and the initial and the best prompt on test rows.

    record: what run.json is to hold; not needed for a dry run.
    """
    from support.check import require_room
    from support.engine import load_engine  # imports torch, so only after everything that can be wrong without it

    task, train, run_dir = work.task, work.train, work.run_dir
    engine = load_engine(flags.model, flags.device, flags.dtype)
    rows = [encode_row(engine.tokenizer, task, row) for row in train]
    start = encode_prompt(engine.tokenizer, task, train[0]["question"], task.initial_prompt)[1]
    evaluated = {split: work.splits[split][: flags.eval_rows or None] for split in ("dev", "test")}
    begun = (run_dir / "steps.jsonl").exists()
    if flags.dry_run or not begun:  # what goes on has been checked
        require_room(engine, task, {"train": train} | evaluated, rows, flags)
        check(flags, engine, task, evaluated, train, rows)
    if flags.dry_run:
        return
    if not begun:
        begin_run(run_dir, record)
    steps = search(flags, engine, rows, start, run_dir, evaluated)
    answerer = local_answerer(engine, flags.model)

    def evaluate(prompt, role, split):
        return evaluate_once(Evaluation(answerer, task, split, evaluated[split], prompt, flags), run_dir, role)

    prompts = final_prompts(flags, engine.tokenizer, rows[0], steps)
    with open_bar(total=len(prompts), desc="finalists on dev", unit="prompt") as bar:
        for prompt in prompts:
            dev = evaluate(prompt["prompt"], "candidate", "dev")
            _, low, high, _ = estimate([dev], "paper")
            prompt |= {"task": task.name, "dev_accuracy": dev["accuracy"], "dev_stderr": dev["stderr"]}
            prompt |= {"dev_low": low, "dev_high": high}
            bar.update()
    prompts = rank_prompts(prompts, flags.choose_on)
    write_chained(run_dir / "prompts.jsonl", prompts)

    results = {}
    for role, prompt in (("initial", initial_of(prompts)), ("best", prompts[0])):
        for split in ("dev", "test"):
            results[role, split] = evaluate(prompt["prompt"], role, split)
    predictions = [read_predictions(run_dir, results[role, "test"], evaluated["test"]) for role in ("initial", "best")]
    # Of a prompt that the training rows chose nobody knows whether it is the best.
    name = "best" if flags.choose_on == "dev" else "best on train"
    report(name, prompts, results, predictions)
    print_paths(run_dir)


def check(flags, engine, task, evaluated, train, rows):
    """Print what a few rows say about the search and its cost. Errors: UserError if memory does not hold it.

    evaluated: {split: rows} that come behind the search; train: its data rows; rows: their tokens.
    """
    from support.check import ROWS, check_rows, cost_of, require_memory, table, warnings

    count = min(ROWS, len(rows))
    checked = check_rows(engine, task, train[:count], rows[:count], flags)
    print(f"\none row, {train[0]['id']}, under the initial prompt:")
    print("\n".join(checked.shown))
    print(f"\n{count} rows:")
    print("\n".join(table(checked, task, train)))
    for warning in warnings(checked, task, train, flags):
        print(f"  warning: {warning}")
    counts = {"finalists": flags.finalists} | {split: len(of_split) for split, of_split in evaluated.items()}
    cost = cost_of(engine, checked, rows, flags, counts)
    print(f"  {cost.line()}\n", flush=True)
    require_memory(engine, cost)


def search(flags, engine, rows, start, run_dir, evaluated):
    """The steps of the search, each on disk before the next begins. evaluated: {split: rows} that come behind it."""
    from greater_core import optimize

    steps = read_steps(run_dir / "steps.jsonl", growing=True)
    if steps:
        print(f"going on behind step {steps[-1].step} of {run_dir}")
    initial = max(0, len(steps) - 1)
    with open_bar(engine.progress, True, total=flags.steps, initial=initial, unit="step", desc="search") as bar:
        for step in optimize(engine, rows, start, flags, list(steps)):
            append_jsonl(run_dir / "steps.jsonl", asdict(step))
            steps.append(step)
            bar.write(log_line(step, flags.steps))
            left = remaining(flags, steps, len(evaluated["dev"]), len(evaluated["test"]))
            if step.step == 0:
                bar.write(str(left))
            sys.stdout.flush()  # so that a file shows it, too
            bar.set_description_str(f"search, then dev and test {in_words(left.dev + left.test)}", refresh=False)
            bar.update(step.step > 0)
    return steps


def final_prompts(flags, tokenizer, row, steps):
    """Records of the run's best finished prompts by training objective, and of the initial one."""
    scores = scores_of(steps)
    initial = next(iter(scores.values()))
    chosen = finalists(tokenizer, scores, flags.finalists)
    if initial not in chosen:
        chosen.append(initial)
    records = []
    for score in chosen:
        text = prompt_text(tokenizer, row, score.prompt_ids).strip()
        records.append({"prompt": text, "initial": score == initial} | asdict(score))
    return records


def report(name, prompts, results, predictions):
    """Print what the initial and the best prompt reached, how they differ on the test rows, and what that means.

    name: what the best prompt is called; prompts: the final prompts, best first; results: {(role, split): `Result`} of
    the roles initial and best; predictions: of the initial and of the best prompt on the test rows.
    """
    names = {"initial": "initial", "best": name}
    texts = {"initial": initial_of(prompts)["prompt"], "best": prompts[0]["prompt"]}
    if texts["initial"] == texts["best"]:  # said in the verdict
        del names["best"]
    shown = [(role, split) for split in ("dev", "test") for role in names]
    print(f"\n{prompt_list(names.values(), [texts[role] for role in names])}\n")
    print(accuracy_table([f"{names[role]}, {split}" for role, split in shown], [results[key] for key in shown]))
    dev, test = (results["initial", split]["n"] for split in ("dev", "test"))
    print(f"\ndev {dev} rows, test {test} rows; {LEGEND}")
    if "best" in names:
        print(f"\n{comparison_table(name, ['initial'], predictions)}")
    print(f"\n{verdict(prompts, compare_reading(*predictions, 'paper'))}")


def print_paths(run_dir):
    for name in ("prompts.jsonl", "steps.jsonl", "results.jsonl", "predictions.jsonl"):
        print(f"  {run_dir / name}")


if __name__ == "__main__":
    run_script(main)

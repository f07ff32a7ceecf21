"""Stage 2: search a prompt with GReaTer -> runs/<run>/{run.json,steps.jsonl,prompts.jsonl,results.jsonl}.

    python 02_optimize.py --task demo
    python 02_optimize.py --task gsm8k --model meta-llama/Meta-Llama-3-8B-Instruct
    python 02_optimize.py --task my.jsonl --extractor "So the answer is" --model path/to/model

Prepares the task's data itself where stage 01 has not been run. A killed run goes on with the same command and
ends with the same result; a run with other settings needs another --run-dir. The prompt is searched on training
rows and chosen on dev rows; the test rows are read once, at the end, for the initial and the chosen prompt.
"""

import json
import random
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from support.answerers import local_answerer
from support.evaluation import Evaluation, evaluate_once
from support.files import alone_in, append_jsonl, require, write_jsonl
from support.progress import in_words, open_bar, remaining
from support.runs import finalists, log_line, open_run, rank_prompts, read_steps, run_folder, scores_of
from support.settings import ModelFlags, SearchSettings, TaskFlags, flag, parse_flags, run_script
from support.sources import open_task
from support.tokens import encode_prompt, encode_row, prompt_text


@dataclass
class Flags(SearchSettings, ModelFlags, TaskFlags):
    initial_prompt: str | None = flag(None, "where the search starts; without it the task's own")
    finalists: int = flag(10, "prompts of the run that compete on dev rows")
    eval_rows: int = flag(0, "dev and test rows to evaluate on; 0: all")
    run_dir: str = flag("", "where the run is written; empty: runs/<task>-<model>-seed<seed>")


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
    prepared = json.loads((Path(flags.data_dir) / task.name / "task.json").read_text(encoding="utf-8"))
    config = asdict(flags) | {"initial_prompt": task.initial_prompt}
    open_run(run_dir, config, prepared, [row["id"] for row in train])
    with alone_in(run_dir):
        optimize_task(flags, task, splits, train, run_dir)


def optimize_task(flags, task, splits, train, run_dir):
    """The search, its finalists on dev rows, and the initial and the best prompt on test rows."""
    from support.engine import load_engine  # imports torch, so only after everything that can be wrong without it

    engine = load_engine(flags.model, flags.device, flags.dtype)
    rows = [encode_row(engine.tokenizer, task, row) for row in train]
    start = encode_prompt(engine.tokenizer, task, train[0]["question"], task.initial_prompt)[1]
    evaluated = {split: splits[split][: flags.eval_rows or None] for split in ("dev", "test")}
    steps = search(flags, engine, rows, start, run_dir, evaluated)
    answerer = local_answerer(engine, flags.model)

    def evaluate(prompt, role, split):
        return evaluate_once(Evaluation(answerer, task, split, evaluated[split], prompt, flags), run_dir, role)

    prompts = final_prompts(flags, engine.tokenizer, rows[0], steps)
    with open_bar(total=len(prompts), desc="finalists on dev", unit="prompt") as bar:
        for prompt in prompts:
            dev = evaluate(prompt["prompt"], "candidate", "dev")
            prompt |= {"task": task.name, "dev_accuracy": dev["accuracy"], "dev_stderr": dev["stderr"]}
            bar.update()
    prompts = rank_prompts(prompts, flags.choose_on)
    write_jsonl(run_dir / "prompts.jsonl", prompts)

    initial = next(prompt for prompt in prompts if prompt["initial"])
    table = []
    for role, prompt in (("initial", initial), ("best", prompts[0])):
        text = prompt["prompt"]
        table.append((role, text, evaluate(text, role, "dev"), evaluate(text, role, "test")))
    report(table, run_dir)


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


def report(table, run_dir):
    """Print what the initial and the best prompt reached: (role, prompt, dev result, test result) each."""
    print(f"\n{'':8s}  {'dev accuracy':>15s}  {'test accuracy':>15s}  prompt")
    for role, text, *results in table:
        dev, test = (f"{100 * r['accuracy']:6.1f} ± {100 * r['stderr']:4.1f} %" for r in results)
        print(f"{role:8s}  {dev:>15s}  {test:>15s}  {text}")
    _, _, dev, test = table[0]
    print(f"\n± is one standard error; dev {dev['n']} rows, test {test['n']} rows")
    for name in ("prompts.jsonl", "steps.jsonl", "results.jsonl", "predictions.jsonl"):
        print(f"  {run_dir / name}")


if __name__ == "__main__":
    run_script(main)

"""Stage 2: search a prompt with GReaTer -> runs/<run>/{run.json,steps.jsonl,prompts.jsonl,results.jsonl}.

    python 02_optimize.py --task demo
    python 02_optimize.py --task gsm8k --model meta-llama/Meta-Llama-3-8B-Instruct
    python 02_optimize.py --task my.jsonl --extractor "So the answer is" --model path/to/model

Prepares the task's data itself where stage 01 has not been run. A killed run goes on with the same command and
ends with the same result; a run with other settings needs another --run-dir. The prompt is searched on training
rows and chosen on dev rows; the test rows are read once, at the end, for the initial and the chosen prompt.
"""

import importlib.metadata
import json
import random
import subprocess
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from support.files import (
    ROOT,
    UserError,
    alone_in,
    append_jsonl,
    read_appended,
    require,
    weights_hash,
    write_json,
    write_jsonl,
)
from support.settings import ModelFlags, SearchSettings, TaskFlags, flag, parse_flags, run_script


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
    task, splits = flags.resolve()
    start = task.initial_prompt if flags.initial_prompt is None else flags.initial_prompt.strip()
    require(start, "--initial-prompt has no tokens: give it at least one word")
    task = replace(task, initial_prompt=start)
    available = len(splits["train"])
    require(
        flags.train_rows <= available, f"--train-rows {flags.train_rows}: {task.name} has {available} training rows"
    )
    train = random.Random(f"{flags.seed}/rows").sample(splits["train"], flags.train_rows)
    run_dir = open_run(flags, task, train)
    with alone_in(run_dir):
        search(flags, task, splits, train, run_dir)


def search(flags, task, splits, train, run_dir):
    """The search, its finalists on dev rows, and the initial and the best prompt on test rows."""
    # They import torch, so only after everything that can be wrong without it.
    from tqdm import tqdm

    import greater_core as core
    from support.answerers import local_answerer
    from support.engine import load_model
    from support.evaluation import Evaluation, evaluate_once

    model, tokenizer = load_model(flags.model, flags.device, flags.dtype)
    rows = [core.splice(tokenizer, task, row) for row in train]
    start = core.encode_in_place(tokenizer, task, train[0]["question"], task.initial_prompt)[1]
    history = read_appended(run_dir / "steps.jsonl")
    if history:
        print(f"going on behind step {history[-1]['step']} of {run_dir}")

    with tqdm(total=flags.steps, initial=max(0, len(history) - 1), unit="step", dynamic_ncols=True) as bar:
        for record in core.optimize(model, tokenizer, rows, start, flags, history):
            append_jsonl(run_dir / "steps.jsonl", record)
            history.append(record)
            bar.write(log_line(record, flags.steps))
            bar.set_postfix(position=record["position"], now=record["objective"], best=record["best"]["objective"])
            bar.update(record["step"] > 0)

    answerer = local_answerer(model, tokenizer, flags.model)

    def evaluate(prompt, role, split):
        chosen = splits[split][: flags.eval_rows or None]
        return evaluate_once(Evaluation(answerer, task, split, chosen, prompt, flags), run_dir, role)

    scored = core.scores_of(history)
    initial = next(iter(scored.values()))
    finalists = core.finalists(tokenizer, scored, flags.finalists)
    prompts = []
    for score in tqdm([*finalists, *([] if initial in finalists else [initial])], desc="dev", unit="prompt"):
        text = core.prompt_text(tokenizer, rows[0], score.prompt_ids).strip()
        dev = evaluate(text, "candidate", "dev")
        scores = {"dev_accuracy": dev["accuracy"], "dev_stderr": dev["stderr"], "initial": score is initial}
        prompts.append({"task": task.name, "prompt": text, **core.as_record(score), **scores})
    prompts = core.rank_prompts(prompts, flags.choose_on)
    write_jsonl(run_dir / "prompts.jsonl", prompts)
    starting = next(p for p in prompts if p["initial"])
    table = [
        (role, p, [evaluate(p["prompt"], role, split) for split in ("dev", "test")])
        for role, p in (("initial", starting), ("best", prompts[0]))
    ]
    report(table, run_dir)


def open_run(flags, task, train):
    """The run's folder, with run.json. Errors: UserError if another configuration has been run there."""
    name = f"{task.name.replace('/', '-')}-{Path(flags.model).name}-seed{flags.seed}"
    if Path(flags.model) == ROOT / "demo" / "model":
        name = f"demo-seed{flags.seed}" if task.name == "demo" else name
    run_dir = Path(flags.run_dir or Path("runs") / name)
    data = json.loads((Path(flags.data_dir) / task.name / "task.json").read_text(encoding="utf-8"))
    record = {
        "config": asdict(flags) | {"initial_prompt": task.initial_prompt},
        "task": {key: data[key] for key in ("name", "extractor", "template", "sha256", "grader_version")},
        "train_ids": [row["id"] for row in train],
        "model_hash": weights_hash(flags.model),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "datasets")},
        "commit": git_commit(),
    }
    path = run_dir / "run.json"
    if path.exists():
        other = differences(path, record)
        begun = (run_dir / "steps.jsonl").exists()  # one that ended before its first step may be begun otherwise
        require(not (other and begun), f"{run_dir} holds a run with other {', '.join(other)}: choose another --run-dir")
        if not other:
            return run_dir
    run_dir.mkdir(parents=True, exist_ok=True)
    write_json(path, record)
    return run_dir


def differences(path, record):
    """Names of what differs between a recorded run and this one; where files lie does not count."""
    try:
        old = json.loads(path.read_text(encoding="utf-8"))
        both = [dict(r["config"], task=r["task"], model=r["model_hash"]) for r in (old, record)]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is not the record of a run: choose another --run-dir") from None
    names = both[0].keys() | both[1].keys()
    return sorted(n for n in names - {"run_dir", "data_dir", "source"} if both[0].get(n) != both[1].get(n))


def git_commit():
    answer = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return answer.stdout.strip() or None


def log_line(record, steps):
    numbers = "  ".join(f"{k} {record[f]:7.3f}" for k, f in (("objective", "objective"), ("ce", "cross_entropy")))
    position = "start" if record["position"] is None else f"{record['position']:5d}"
    return (
        f"step {record['step']:3d}/{steps}  position {position}  {numbers}  error {record['error']:.2f}  "
        f"nll {record['nll']:5.2f}  best {record['best']['objective']:7.3f}  "
        f"{sum(record['seconds'].values()):5.1f} s  {record['prompt']}"
    )


def report(table, run_dir):
    print(f"\n{'':8s}  {'dev accuracy':>15s}  {'test accuracy':>15s}  prompt")
    for role, prompt, results in table:
        cells = [f"{100 * r['accuracy']:6.1f} ± {100 * r['stderr']:4.1f} %" for r in results]
        print(f"{role:8s}  {cells[0]:>15s}  {cells[1]:>15s}  {prompt['prompt']}")
    print(f"\n± is one standard error; dev {table[0][2][0]['n']} rows, test {table[0][2][1]['n']} rows")
    for name in ("prompts.jsonl", "steps.jsonl", "results.jsonl", "predictions.jsonl"):
        print(f"  {run_dir / name}")


if __name__ == "__main__":
    run_script(main)

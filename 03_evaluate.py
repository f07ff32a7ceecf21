"""Stage 3: prompts on dev or test rows -> predictions.jsonl, a line per prompt in results.jsonl, a table, mistakes.

    python 03_evaluate.py --run-dir runs/demo-seed0                    # the run's initial and best prompt on test
    python 03_evaluate.py --run-dir runs/demo-seed0 --baselines        # and no prompt, and zero-shot chain of thought
    python 03_evaluate.py --task demo --prompt "check each step carefully ." --split dev
    python 03_evaluate.py --task gsm8k --endpoint http://localhost:8000/v1 --model NAME --prompt "..."
    python 03_evaluate.py --run-dir runs/demo-seed0 --regrade          # the kept texts again, without a model
    python 03_evaluate.py --report runs                                # tables and pictures of all runs

Two readings of one generation: `paper` (the answer behind the extractor) and `harness` (lm-evaluation-harness's
flexible extraction from the reasoning itself). The last prompt is compared with each of the others row by row. What was
evaluated with the same model, rows, extractor and settings is not run again; a killed evaluation goes on where it was.
"""

from dataclasses import dataclass, field, fields
from pathlib import Path

from support.files import alone_in, is_text, read_jsonl, require, require_fields
from support.runs import read_run
from support.settings import GenerationSettings, ModelFlags, ServerFlags, TaskFlags, flag, parse_flags, run_script


@dataclass
class Flags(GenerationSettings, ServerFlags, ModelFlags, TaskFlags):
    run_dir: str = flag("", "a run of stage 02, or where to write; empty: runs/evaluate-<task>-<model>")
    prompt: list[str] = field(
        default_factory=list, metadata={"help": "a prompt to evaluate; may be repeated", "action": "extend"}
    )
    prompts: str = flag("", "a file like a run's prompts.jsonl; without it the run's own")
    top: int = flag(1, "how many of the prompts in the file, best first")
    baselines: bool = flag(
        False, "evaluate the standard baselines, too: no prompt, zero-shot chain of thought, initial"
    )
    split: str = flag("test", "dev or test")
    eval_rows: int = flag(0, "rows to evaluate on; 0: all")
    mistakes: int = flag(5, "mistakes to show of the last prompt")
    endpoint: str = flag("", "URL of an OpenAI-compatible server that answers; --model is its name for the model")
    regrade: bool = flag(False, "read and grade the texts in predictions.jsonl again, without a model")
    report: str = flag("", "only write tables and pictures of this run, or of all runs in this folder")


def main():
    flags = parse_flags(Flags, __doc__.splitlines()[0], run_defaults)
    require(flags.split in ("dev", "test"), f"--split must be dev or test, not {flags.split!r}")
    for name in ("eval_rows", "mistakes", "top"):
        least = 1 if name == "top" else 0
        require(getattr(flags, name) >= least, f"--{name.replace('_', '-')} must be at least {least}")
    flags.check_server_flags()
    if flags.report:
        from support.report import write_report

        print("\n".join(f"  {path}" for path in write_report(flags.report)))
        return
    if not (flags.endpoint or flags.regrade):
        flags.model = flags.model_path()
    task, splits = flags.resolve()
    default_dir = Path("runs") / f"evaluate-{task.name.replace('/', '-')}-{Path(flags.model).name}"
    run_dir = Path(flags.run_dir) if flags.run_dir else default_dir
    if flags.regrade:
        require(run_dir.is_dir(), f"{run_dir} holds no evaluation")
        with alone_in(run_dir):
            regrade(run_dir, task, splits)
        return
    rows = splits[flags.split][: flags.eval_rows or None]
    prompts = chosen_prompts(flags, run_dir, task)
    run_dir.mkdir(parents=True, exist_ok=True)

    from tqdm import tqdm

    from support.answerers import open_answerer
    from support.evaluation import evaluate_once

    answerer = open_answerer(flags, flags.model, flags.endpoint)  # imports torch only where a model is loaded here
    with alone_in(run_dir):
        results = [
            evaluate_once(answerer, framed, rows, prompt, flags, run_dir, role, flags.split, name)
            for role, name, framed, prompt in tqdm(prompts, desc="prompts", unit="prompt")
        ]
        report(results, rows, run_dir, flags)


def run_defaults(early):
    """The configuration of the run in --run-dir, as defaults of this script's flags."""
    if not early.run_dir or not (Path(early.run_dir) / "run.json").exists():
        return {}
    config = read_run(early.run_dir, task=str)["config"]
    require(early.task in ("", config["task"]), f"--task {early.task}: {early.run_dir} is a run of {config['task']}")
    names = {f.name for f in fields(GenerationSettings) + fields(ModelFlags) + fields(TaskFlags)}
    return {name: value for name, value in config.items() if name in names}


def chosen_prompts(flags, run_dir, task):
    """[(role, name, task that frames it, prompt)]: baselines, initial, then those given or the best of the file."""
    chosen = []
    if flags.baselines:
        named = (("empty", ""), ("zero-shot chain of thought", task.chain_of_thought))
        chosen += [("baseline", name, task.bare, prompt) for name, prompt in named]
    initial = task.initial_prompt
    if flags.prompt:
        good = all(prompt.strip() and is_text(prompt) for prompt in flags.prompt)
        require(good, "--prompt must not be empty (--baselines evaluates no prompt) and must be readable text")
        found = [("given", None, task, prompt.strip()) for prompt in flags.prompt]
    elif flags.prompts or flags.run_dir:
        path = Path(flags.prompts or run_dir / "prompts.jsonl")
        records = require_fields(read_jsonl(path), path, prompt=str)
        require(records and all(r["prompt"].strip() for r in records), f"{path} holds no prompts, or an empty one")
        for number, r in enumerate(records, 1):
            other = r.get("task", task.name)
            require(other == task.name, f"{path}, line {number}: a prompt of the task {other}, not of {task.name}")
        initial = next((r["prompt"] for r in records if r.get("initial")), initial)
        ranked = [("candidate", f"rank {rank}") for rank in range(2, flags.top + 1)]
        ranked = list(zip([("best", None), *ranked], records))
        found = [(*label, task, r["prompt"]) for label, r in reversed(ranked)]
    else:
        require(chosen, "say what to evaluate: --run-dir of a run of stage 02, --prompt, --prompts or --baselines")
        found = []
    if flags.baselines or not flags.prompt:
        chosen.append(("initial", None, task, initial))
    return chosen + found


def regrade(run_dir, task, splits):
    from support.evaluation import regrade

    for old, new in regrade(run_dir, task, splits):
        paper, harness = (
            f"{reading} {100 * old[key]:5.1f} -> {100 * new[key]:5.1f} %"
            for reading, key in (("paper", "accuracy"), ("harness", "harness_accuracy"))
        )
        print(f"{new['role']:9s}  {new['split']:4s}  {paper}  {harness}  {new['prompt'] or '(no prompt)'}")
    print(f"  {run_dir / 'results.jsonl'}\n  {run_dir / 'predictions.jsonl'}")


def report(results, rows, run_dir, flags):
    from support.evaluation import compare, read_predictions

    labels = [r.get("name", r["role"]) for r in results]
    if labels.count("given") > 1:
        first = labels.index("given")
        labels = labels[:first] + [f"given {i}" for i in range(1, len(labels) - first + 1)]  # they come last
    width = max(8, *map(len, labels))
    print(f"\n{'':{width}s}  {'paper':>15s}  {'harness':>15s}  {'unread':>6s}  {'cut':>6s}  {'tokens':>6s}  prompt")
    for label, r in zip(labels, results):
        paper, harness = (
            f"{100 * r[mean]:6.1f} ± {100 * r[error]:4.1f} %"
            for mean, error in (("accuracy", "stderr"), ("harness_accuracy", "harness_stderr"))
        )
        rates = f"{100 * r['unread']:4.1f} %  {100 * r['truncated']:4.1f} %  {r['mean_tokens']:6.1f}"
        print(f"{label:{width}s}  {paper:>15s}  {harness:>15s}  {rates}  {r['prompt'] or '(none)'}")
    minutes = sum(r["minutes"] for r in results)
    print(
        f"\n{flags.split}, {len(rows)} rows; ± is one standard error; unread: no answer found behind the extractor; "
        f"cut: at --max-new-tokens; {minutes:.1f} minutes of generation"
    )
    outcomes = [read_predictions(run_dir, r, rows) for r in results]
    if len(results) > 1:
        print(f"\n{'last against':{width}s}  reading   difference  95 % interval     gained  lost  p (exact McNemar)")
    for label, other in zip(labels[:-1], outcomes):
        for reading, key in (("paper", "correct"), ("harness", "harness_correct")):
            c = compare([p[key] for p in other], [p[key] for p in outcomes[-1]])
            interval = f"{100 * c['low']:+6.1f} to {100 * c['high']:+6.1f}"
            print(
                f"{label:{width}s}  {reading:7s}  {100 * c['difference']:+9.1f} %  {interval}  {c['gained']:6d}  "
                f"{c['lost']:4d}  {c['p']:.2g}"
            )
    show_mistakes(outcomes[-1], rows, flags)
    print(f"  {run_dir / 'results.jsonl'}\n  {run_dir / 'predictions.jsonl'}")


def show_mistakes(predictions, rows, flags):
    wrong = [(row, p) for row, p in zip(rows, predictions) if not p["correct"]]
    if wrong[: flags.mistakes]:
        print(f"\n{len(wrong[: flags.mistakes])} of {len(wrong)} mistakes of the last prompt:")
    for row, p in wrong[: flags.mistakes]:
        print(f"  {p['id']}  gold {p['gold']}, read {p['answer']}")
        for text in (row["question"], p["text"]):
            print(f"    {text[-200:]!r}")


if __name__ == "__main__":
    run_script(main)

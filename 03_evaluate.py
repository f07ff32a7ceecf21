"""Stage 3: prompts on dev or test rows -> predictions.jsonl, a line per prompt in results.jsonl, a table, mistakes.

    python 03_evaluate.py --run-dir runs/demo-seed0                    # the run's initial and best prompt on test
    python 03_evaluate.py --task demo --prompt "check each step carefully ." --split dev
    python 03_evaluate.py --run-dir runs/demo-seed0 --prompt "tell the total ."

Two readings of one generation: `paper` (the answer behind the extractor) and `harness` (lm-evaluation-harness's
flexible extraction from the reasoning itself). What was evaluated with the same
model, rows, extractor and settings is not run again.
"""

import json
from dataclasses import dataclass, field, fields
from pathlib import Path

from settings import GenerationSettings, ModelFlags, TaskFlags, flag, parse_flags, run_script
from tasks import UserError, read_appended, read_jsonl, require, weights_hash


@dataclass
class Flags(GenerationSettings, ModelFlags, TaskFlags):
    run_dir: str = flag("", "a run of stage 02, or where to write; empty: runs/evaluate-<task>-<model>")
    prompt: list[str] = field(
        default_factory=list, metadata={"help": "a prompt to evaluate; may be repeated", "action": "extend"}
    )
    split: str = flag("test", "dev or test")
    eval_rows: int = flag(0, "rows to evaluate on; 0: all")
    mistakes: int = flag(5, "mistakes to show of the last prompt")


def main():
    flags = parse_flags(Flags, __doc__.splitlines()[0], run_defaults)
    require(flags.split in ("dev", "test"), f"--split must be dev or test, not {flags.split!r}")
    require(flags.eval_rows >= 0 and flags.mistakes >= 0, "--eval-rows and --mistakes must not be negative")
    flags.model = flags.model_path()
    task, splits = flags.resolve()
    rows = splits[flags.split][: flags.eval_rows or None]
    default_dir = Path("runs") / f"evaluate-{task.name.replace('/', '-')}-{Path(flags.model).name}"
    run_dir = Path(flags.run_dir) if flags.run_dir else default_dir
    prompts = chosen_prompts(flags, run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)

    # They import torch, so only after everything that can be wrong without it.
    from tqdm import tqdm

    from evaluation import evaluate_once
    from greater_core import load_model

    model, tokenizer = load_model(flags.model, flags.device, flags.dtype)
    model_hash = weights_hash(flags.model)
    results = [
        evaluate_once(model, tokenizer, task, rows, prompt, flags, run_dir, role, flags.split, model_hash)
        for role, prompt in tqdm(prompts, desc=flags.split, unit="prompt")
    ]
    report(results, rows, run_dir, flags)


def run_defaults(early):
    """The configuration of the run in --run-dir, as defaults of this script's flags."""
    path = Path(early.run_dir) / "run.json"
    if not early.run_dir or not path.exists():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))["config"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is not the record of a run") from None
    require(early.task in ("", config["task"]), f"--task {early.task}: {early.run_dir} is a run of {config['task']}")
    names = {f.name for f in fields(GenerationSettings) + fields(ModelFlags) + fields(TaskFlags)}
    return {name: value for name, value in config.items() if name in names}


def chosen_prompts(flags, run_dir):
    """[(role, prompt)]: those given, else the run's initial and best prompt."""
    if flags.prompt:
        require(all(prompt.strip() for prompt in flags.prompt), "--prompt must not be empty")
        return [("given", prompt.strip()) for prompt in flags.prompt]
    require(flags.run_dir, "say what to evaluate: --run-dir of a run of stage 02, or --prompt")
    found = read_jsonl(run_dir / "prompts.jsonl")
    require(found and all("prompt" in p for p in found), f"{run_dir / 'prompts.jsonl'} holds no prompts")
    return [("initial", p["prompt"]) for p in found if p.get("initial")] + [("best", found[0]["prompt"])]


def report(results, rows, run_dir, flags):
    print(f"\n{'role':8s}  {'paper':>15s}  {'harness':>15s}  {'unread':>6s}  {'cut':>6s}  {'tokens':>6s}  prompt")
    for r in results:
        paper, harness = (
            f"{100 * r[mean]:6.1f} ± {100 * r[error]:4.1f} %"
            for mean, error in (("accuracy", "stderr"), ("harness_accuracy", "harness_stderr"))
        )
        rates = f"{100 * r['unread']:4.1f} %  {100 * r['truncated']:4.1f} %  {r['mean_tokens']:6.1f}"
        print(f"{r['role']:8s}  {paper:>15s}  {harness:>15s}  {rates}  {r['prompt']}")
    print(
        f"\n{flags.split}, {len(rows)} rows; ± is one standard error; unread: no answer found; cut: at --max-new-tokens"
    )
    show_mistakes(results[-1], rows, run_dir, flags)
    print(f"  {run_dir / 'results.jsonl'}\n  {run_dir / 'predictions.jsonl'}")


def show_mistakes(result, rows, run_dir, flags):
    questions = {row["id"]: row["question"] for row in rows}
    same = {key: result[key] for key in ("split", "prompt_hash", "evaluation")}.items()
    shown = [p for p in read_appended(run_dir / "predictions.jsonl") if same <= p.items() and not p["correct"]]
    shown = shown[: flags.mistakes]
    if shown:
        print(f"\n{len(shown)} of {len(rows) - result['correct']} mistakes of the last prompt:")
    for p in shown:
        print(f"  {p['id']}  gold {p['gold']}, read {p['answer']}")
        for text in (questions[p["id"]], p["text"]):
            print(f"    {text[-200:]!r}")


if __name__ == "__main__":
    run_script(main)

"""The method's claims, checked on the demo: each ablation against the full method at equal numbers of generated tokens.

    python benchmarks/claims.py                     # the tables in benchmarks/README.md
    python benchmarks/claims.py --seeds 3 --budgets 1000
    python benchmarks/claims.py --arms options --train-rows 24 --mu 3 --budgets 1000 2000 4000 8000
    python benchmarks/claims.py --arms options --only "all positions" --problems long --train-rows 40 --mu 3 \\
        --budgets 4000 8000 16000 32000 --choose-on-dev

`--arms options`: all positions at once, and the likeliest proposals without a gradient, against the full method.
`--problems long`: 4 or 5 operations joined by "and", where the demo's own have 1 to 5 joined by commas.

An arm searches until its next step would take it over the budget of generated tokens; its current prompt is then
scored on all held-out test rows. --choose-on-dev: instead of it the prompt that stage 2 with --finalists 5 would choose
by then, the best of these on dev rows, whose tokens are not counted. A seed draws the training rows and every random
choice. The table gives the mean accuracy over the seeds with its standard error, and the paired difference to the full
method with its own.
"""

import argparse
import json
import random
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import greater_core as core
from beyond_paper import visit
from support.answerers import Answerer, local_answerer
from support.engine import load_engine
from support.evaluation import accuracy, error_text, evaluate, mean_of_runs
from support.runs import finalists, scores_of
from support.settings import SearchSettings
from support.sources import split_rows
from support.tasks import Task, get_task
from support.tokens import decode, encode_prompt, encode_row

FULL = "full method"
FINALISTS = 5  # of --choose-on-dev, by the training objective
ARMS = {
    "claims": {
        FULL: {},
        "random shortlist": {"shortlist": "random"},
        "gradient without reasoning": {"gradient_without_reasoning": True},
        "selection by error": {"objective": "error"},
        "lambda 0": {"fluency_weight": 0.0},
    },
    "options": {
        FULL: {},
        "likeliest shortlist": {"shortlist": "likeliest"},
        "all positions": {"positions": "all"},
    },
}
STARTS = {
    "neutral": "read the problem here and find the answer now .",
    "careless": "read the problem here and guess any answer quickly .",
}


def long_problems():
    """{split: rows} of problems that are longer than the demo's and worded otherwise."""
    sys.path.insert(0, str(ROOT / "demo"))
    from train import make_problem

    rng, rows = random.Random("long"), []
    for number in range(700):
        question, states = make_problem(rng, {4: 50, 5: 50}, "and")
        rows.append({"id": f"long-{number}", "question": question, "answer": str(states[-1])})
    return {"train": rows[:200], "test": rows[200:600], "dev": rows[600:]}


def search(engine, task, data, start, settings, budgets):
    """{budget: steps} until the next step would exceed each budget of generated tokens."""
    train = random.Random(f"{settings.seed}/rows").sample(data["train"], settings.train_rows)
    rows = [encode_row(engine.tokenizer, task, row) for row in train]
    prompt_ids = encode_prompt(engine.tokenizer, task, train[0]["question"], start)[1]
    steps = []
    for step in core.optimize(engine, rows, prompt_ids, settings, visit=visit):
        if steps and step.totals["generated_tokens"] > max(budgets):
            break
        steps.append(step)
    within = {budget: [step for step in steps if step.totals["generated_tokens"] <= budget] for budget in budgets}
    return {budget: own or steps[:1] for budget, own in within.items()}


def draw(results, budgets, path):
    """Accuracy over the budget, a panel per start, a line per arm with its standard error."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, len(STARTS), figsize=(11, 4.2), sharey=True, layout="constrained")
    for panel, start in zip(panels, STARTS):
        for n, arm in enumerate(results[start]):
            points = [mean_of_runs(results[start][arm][budget]) for budget in budgets]
            means, errors = ([100 * value for value in column] for column in zip(*points))
            xs = [budget * (1 + 0.03 * (n - 2)) for budget in budgets]  # side by side, so that no bar hides another
            panel.errorbar(xs, means, errors, marker="osD^v<>p"[n % 8], markersize=5, capsize=3, label=arm)
        panel.set(title=f"{start} start: “{STARTS[start]}”", xlabel="generated tokens", xscale="log")
        panel.set_xticks(budgets, [str(b) for b in budgets], minor=False)
        panel.minorticks_off()
        panel.title.set_fontsize(9)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("accuracy on test rows, %")
    panels[0].legend(fontsize=8)
    figure.savefig(path, dpi=120)


@dataclass
class Scorer:
    """Accuracies of prompts on splits of the demo's rows; each prompt is evaluated once on each."""

    answerer: Answerer
    task: Task
    data: dict  # {split: rows}
    known: dict = field(default_factory=dict)  # {(split, prompt): accuracy}

    def accuracy(self, split, prompt, settings):
        if (split, prompt) not in self.known:
            outcomes = evaluate(self.answerer, self.task, self.data[split], prompt, settings)
            self.known[split, prompt] = accuracy([p["correct"] for p in outcomes])[0]
        return self.known[split, prompt]


def table_lines(by_arm, budgets):
    """A start's table. by_arm: {arm: {budget: accuracy of each seed}}."""
    lines = [f"{'arm':28s}" + "".join(f"{f'{budget} tokens':>28s}" for budget in budgets)]
    for arm, by_budget in by_arm.items():
        cells = []
        for budget in budgets:
            mean, error = mean_of_runs(by_budget[budget])
            gaps = [a - b for a, b in zip(by_budget[budget], by_arm[FULL][budget])]
            gap, gap_error = mean_of_runs(gaps)
            versus = "" if arm == FULL else f" ({100 * gap:+5.1f} ± {error_text(gap_error)})"
            cells.append(f"{100 * mean:5.1f} ± {error_text(error)}{versus:>16s}")
        lines.append(f"{arm:28s}" + "".join(f"{cell:>28s}" for cell in cells))
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arms", choices=ARMS, default="claims", help="what is compared with the full method")
    parser.add_argument("--only", nargs="+", default=[], help="arms to run beside the full method; without it all")
    parser.add_argument("--problems", choices=("usual", "long"), default="usual", help="the demo's own, or harder ones")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--train-rows", type=int, default=10)
    parser.add_argument("--mu", type=int, default=1, help="shortlist size of every arm")
    parser.add_argument("--budgets", type=int, nargs="+", default=[250, 500, 1000, 2000])
    parser.add_argument("--choose-on-dev", action="store_true", help="the prompt that stage 2 would choose by then")
    parser.add_argument("--out", type=Path, default=Path("runs/claims"))
    flags = parser.parse_args()
    started, task = time.time(), get_task("demo")
    engine = load_engine(str(ROOT / "demo" / "model"), "cpu", "float32")
    answerer = local_answerer(engine, ROOT / "demo" / "model")
    data = long_problems() if flags.problems == "long" else split_rows(task)
    scorer, every = Scorer(answerer, task, data), ARMS[flags.arms]
    unknown = set(flags.only) - set(every)
    if unknown:
        parser.error(f"--only: {', '.join(sorted(unknown))}: --arms {flags.arms} has {', '.join(every)}")
    arms = {arm: every[arm] for arm in ([FULL, *flags.only] if flags.only else every)}

    results = {start: {arm: {budget: [] for budget in flags.budgets} for arm in arms} for start in STARTS}
    jobs = [(start, arm, seed) for start in STARTS for arm in arms for seed in range(flags.seeds)]
    for start, arm, seed in tqdm(jobs, unit="search"):
        common = {"max_new_tokens": 40, "batch_size": 200, "gradient_batch_size": 40, "max_prompt_tokens": 20}
        sizes = {"steps": 100, "train_rows": flags.train_rows, "shortlist_size": flags.mu}
        settings = SearchSettings(**common, **sizes, seed=seed, **arms[arm])
        for budget, steps in search(engine, task, data, STARTS[start], settings, flags.budgets).items():
            prompt = steps[-1].prompt
            if flags.choose_on_dev:
                scores = finalists(engine.tokenizer, scores_of(steps), FINALISTS)
                texts = [decode(engine.tokenizer, score.prompt_ids).strip() for score in scores]
                prompt = max(texts, key=lambda text: scorer.accuracy("dev", text, settings))
            results[start][arm][budget].append(scorer.accuracy("test", prompt, settings))

    for start in STARTS:
        initial = 100 * scorer.accuracy("test", STARTS[start], settings)
        print(f"\n{start} start: {STARTS[start]}  ({initial:.1f} % on test)")
        print("\n".join(table_lines(results[start], flags.budgets)))
    flags.out.mkdir(parents=True, exist_ok=True)
    (flags.out / "claims.json").write_text(
        json.dumps({"flags": vars(flags) | {"out": str(flags.out)}, "results": results})
    )
    draw(results, flags.budgets, flags.out / "claims.png")
    print(f"\naccuracy in %, {len(data['test'])} test rows, mean ± standard error over {flags.seeds} seeds", end="; ")
    print(f"in brackets: paired difference to the full method; {(time.time() - started) / 60:.1f} minutes")
    print(f"  {flags.out / 'claims.json'}\n  {flags.out / 'claims.png'}")


if __name__ == "__main__":
    main()

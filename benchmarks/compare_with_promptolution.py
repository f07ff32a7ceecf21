"""OPRO and EvoPrompt-GA of this repository beside those of the package promptolution: same task, rows, model, budget.

    pip install promptolution==2.3.0
    python benchmarks/compare_with_promptolution.py --task bbh/navigate --model A --source DIR --budget 400

An outside check of text_optimizers.py. The package brings its loops, its meta-prompts and its reading of replies; the
model that writes, what is drawn, the scoring of a prompt and the choice among those that were scored are ours for both.
EvoPrompt starts from one population, which our loop makes. Python 3.10 to 3.12, as the package says. A killed run goes
on with the same command; other settings need another --out. Writes results.md.
"""

import importlib.metadata
import importlib.util
import random
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
from support.answerers import local_answerer, server_answerer
from support.engine import load_engine
from support.evaluation import Evaluation, compare, estimate, evaluate_once, read_predictions
from support.files import alone_in, read_object, require, write_json
from support.proposals import Judge
from support.report import markdown
from support.runs import rank_prompts
from support.settings import (
    TITLES,
    ModelFlags,
    SearchSettings,
    ServerFlags,
    TaskFlags,
    TextSettings,
    flag,
    parse_flags,
    run_script,
)
from support.sources import open_task
from support.tables import p_text
from support.trials import Search, Trials
from text_optimizers import METHODS, optimize

COMPARED = ("opro", "evoprompt-ga")
OURS, PACKAGE = "ours", "promptolution"


@dataclass
class Flags(ServerFlags, TextSettings, SearchSettings, ModelFlags, TaskFlags):
    methods: list[str] = field(default_factory=lambda: list(COMPARED), metadata={"help": "opro, evoprompt-ga"})
    initial_prompt: str = flag("", "where both loops start; empty: the task's own")
    finalists: int = flag(5, "prompts of a loop that compete on dev rows")
    eval_rows: int = flag(0, "dev and test rows to evaluate on; 0: all")
    out: str = flag("runs/compare-with-promptolution", "folder of all records and of the table")

    def __post_init__(self):
        super().__post_init__()
        unknown = [method for method in self.methods if method not in COMPARED]
        require(not unknown, f"--methods: {', '.join(unknown)} is none of {', '.join(COMPARED)}")
        require(not self.init_from, "--init-from: both loops start from one prompt here: give --initial-prompt")
        require(self.finalists >= 1 and self.eval_rows >= 0, "--finalists must be at least 1, --eval-rows at least 0")


@dataclass(frozen=True)
class Setup:
    """What both loops work with."""

    flags: Flags
    task: object  # tasks.Task
    splits: dict[str, list[dict]]
    train: list[dict]
    engine: object  # engine.Engine
    answerer: object  # answerers.Answerer: the task model
    optimizer: object  # the same of the model that writes prompts

    def folder(self, loop):
        return Path(self.flags.out) / f"{self.flags.method}-{loop}"

    def trials(self, loop):
        folder = self.folder(loop)
        folder.mkdir(parents=True, exist_ok=True)
        return Trials(self.answerer, self.optimizer, self.task, self.train, self.flags, folder, self.engine)


# --- The two loops ------------------------------------------------------------------------------------------


def run_ours(setup):
    """(Trials, the prompts of the first pool) of our loop."""
    trials, method = setup.trials(OURS), METHODS[setup.flags.method]
    judge = Judge(setup.task, setup.train, setup.flags.longest_prompt, method.meta_prompts, setup.engine.tokenizer)
    # As many rounds as one could want: the budget ends the search.
    search = Search(trials, judge, [setup.task.initial_prompt], setup.flags.budget)
    first, *_ = [step.pool for step in optimize(method, search)]
    return trials, first


class BudgetSpent(BaseException):
    """Ends a loop of the package, which goes on behind any Exception."""


def run_package(setup, first):
    """`Trials` of the package's loop, which starts from the prompts `first`."""
    import pandas
    from promptolution.llms.base_llm import BaseLLM
    from promptolution.optimizers.evoprompt_ga import EvoPromptGA
    from promptolution.optimizers.opro import OPRO
    from promptolution.predictors.base_predictor import BasePredictor
    from promptolution.tasks.base_task import BaseTask

    trials, settings = setup.trials(PACKAGE), setup.flags

    class Optimizer(BaseLLM):
        """Our model writes; its replies are on disk before they are used."""

        def _get_response(self, prompts, system_prompts):
            replies = trials.ask([[prompt] for prompt in prompts], 1, settings.optimizer_temperature)
            return [reply for (reply,) in replies]

    class Predictor(BasePredictor):
        """Our task model answers, and our grader says whether that is right."""

        def predict(self, prompts, xs, system_prompts=None):
            verdicts, texts = [], []
            for prompt, question in zip(prompts, xs):
                if not trials.affords(prompt):
                    raise BudgetSpent
                answered = dict(zip((row["question"] for row in trials.rows), trials.predictions(prompt)))
                verdicts.append(answered[question]["correct"])
                texts.append(answered[question]["text"])
            return verdicts, texts

        def _extract_preds(self, preds):
            return preds

    class Rows(BaseTask):
        def _evaluate(self, xs, ys, preds):
            return np.array(preds, dtype=float)

    optimizer_model = Optimizer()
    rows = Rows(pandas.DataFrame(trials.rows), "question", "answer", setup.task.name)
    kind = OPRO if settings.method == "opro" else EvoPromptGA
    np.random.seed(settings.seed)  # from which the package draws
    loop = kind(Predictor(optimizer_model), rows, optimizer_model, initial_prompts=first)
    try:
        loop.optimize(settings.budget)  # steps, of which the budget ends the search
    except BudgetSpent:
        pass
    return trials


# --- What they reached ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reached:
    """One loop, measured as stage 2 does: the best prompts on training rows compete on dev rows."""

    trials: Trials
    prompts: list[dict]  # finalists, best first
    results: dict  # {"initial" or "best": `Result` on test rows}
    predictions: dict  # {"initial" or "best": `Prediction` of each test row}


def measured(setup, loop, trials):
    folder, flags, initial = setup.folder(loop), setup.flags, setup.task.initial_prompt
    rows = {split: setup.splits[split][: flags.eval_rows or None] for split in ("dev", "test")}

    def evaluate(prompt, role, split):
        evaluation = Evaluation(setup.answerer, setup.task, split, rows[split], prompt, flags)
        return evaluate_once(evaluation, folder, role)

    scored = sorted(trials.answered, key=lambda prompt: -trials.accuracy(prompt))
    prompts = []
    for prompt in dict.fromkeys([*scored[: flags.finalists], initial]):
        accuracy = evaluate(prompt, "candidate", "dev")["accuracy"]
        train = trials.accuracy(prompt)
        prompts.append({"prompt": prompt, "initial": prompt == initial, "dev_accuracy": accuracy})
        prompts[-1] |= {"objective": 1 - train, "train_accuracy": train}
    prompts = rank_prompts(prompts, "dev")
    results = {"initial": evaluate(initial, "initial", "test"), "best": evaluate(prompts[0]["prompt"], "best", "test")}
    predictions = {role: read_predictions(folder, result, rows["test"]) for role, result in results.items()}
    return Reached(trials, prompts, results, predictions)


HEAD = (
    "method",
    "loop",
    "prompts",
    "scored generations",
    "requests",
    "replies",
    "best on train, %",
    "dev, %",
    "test, %",
    "to initial",
    "p",
)


def table_row(title, loop, reached):
    totals, best = reached.trials.totals, reached.prompts[0]
    change = compare(*[[p["correct"] for p in reached.predictions[role]] for role in ("initial", "best")])
    _, low, high, _ = estimate([reached.results["best"]], "paper")
    return [
        title,
        loop,
        len(reached.trials.answered),
        totals["scored_generations"],
        totals["optimizer_requests"],
        totals["optimizer_samples"],
        f"{100 * max(map(reached.trials.accuracy, reached.trials.answered)):.1f}",
        f"{100 * best['dev_accuracy']:.1f}",
        f"{100 * reached.results['best']['accuracy']:.1f} [{100 * low:.1f}, {100 * high:.1f}]",
        f"{100 * change['difference']:+.1f}",
        p_text(change["p"]),
    ]


def require_same_settings(flags):
    """Errors: UserError if the records in --out were made with other settings."""
    path, settings = Path(flags.out) / "settings.json", flags.used()
    if path.exists():
        require(read_object(path) == settings, f"{path} has other settings than these: choose another --out")
    else:
        write_json(path, settings)


def main():
    flags = parse_flags(Flags, __doc__)
    require(importlib.util.find_spec(PACKAGE), f"{PACKAGE} is not installed: pip install {PACKAGE}==2.3.0")
    require(flags.budget, "--budget: say how many scored generations each loop may take")
    local = flags.optimizer_endpoint or not flags.optimizer_model
    require(local, "--optimizer-model: without --optimizer-endpoint the task's model writes the prompts")
    flags.check_server_flags()
    flags.model = flags.model_path()
    task, splits = open_task(flags)
    task = replace(task, initial_prompt=flags.initial_prompt or task.initial_prompt)
    require(flags.train_rows <= len(splits["train"]), f"--train-rows: {task.name} has {len(splits['train'])}")
    train = random.Random(f"{flags.seed}/rows").sample(splits["train"], flags.train_rows)
    engine = load_engine(flags.model, flags.device, flags.dtype)
    answerer = local_answerer(engine, flags.model)
    optimizer = answerer
    if flags.optimizer_endpoint:
        optimizer = server_answerer(replace(flags, answer_turn="ask"), flags.optimizer_endpoint, flags.optimizer_model)
    table, lines = [HEAD], []
    with alone_in(Path(flags.out)):
        require_same_settings(flags)
        for method in flags.methods:
            own = replace(flags, method=method)
            own.resolve()
            setup = Setup(own, task, splits, train, engine, answerer, optimizer)
            trials, first = run_ours(setup)
            ours = measured(setup, OURS, trials)
            theirs = measured(setup, PACKAGE, run_package(setup, first))
            for loop, reached in ((OURS, ours), (PACKAGE, theirs)):
                table.append(table_row(TITLES[method], loop, reached))
                lines.append(f"- {TITLES[method]}, {loop}: {reached.prompts[0]['prompt']!r}")
    version = importlib.metadata.version(PACKAGE)
    text = f"{markdown(table)}\n\npromptolution {version}. Chosen prompts:\n\n" + "\n".join(lines) + "\n"
    path = Path(flags.out) / "results.md"
    path.write_text(text, encoding="utf-8")
    print(f"\n{text}\n  {path}")


if __name__ == "__main__":
    run_script(main)

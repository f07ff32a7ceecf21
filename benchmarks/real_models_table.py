"""The tables and the picture of real_models.py: from measurements to results.md, results.png and headroom.md."""

import itertools
from collections import Counter, defaultdict
from dataclasses import dataclass

import numpy as np

from support.evaluation import compare, mean_of_runs
from support.instruments import share_text, signal_of_all, with_incumbent
from support.pictures import METHOD_COLORS, new_figure
from support.report import markdown
from support.runs import Step

CORRECT = {"paper": "correct", "harness": "harness_correct"}  # reading: the field of a prediction


@dataclass(frozen=True)
class Measurement:
    """One prompt of a method on the rows of a task, answered by a model."""

    task: str
    model: str
    method: str
    seed: int | None  # None: a fixed prompt
    result: dict  # `Result`
    predictions: list[dict]  # `Prediction` of each row
    initial: list[dict]  # the same of the initial prompt
    minutes: float
    scored: int | None = None  # reasonings that the search scored; None where there was none here

    def outcomes(self, reading):
        """Whether each row was answered right."""
        return [prediction[CORRECT[reading]] for prediction in self.predictions]

    def initial_outcomes(self, reading):
        return [prediction[CORRECT[reading]] for prediction in self.initial]


@dataclass(frozen=True)
class SearchRecord:
    """What a search did on its training and dev rows."""

    task: str
    model: str
    method: str
    seed: int
    steps: list[Step]
    prompts: list[dict]  # finalists, best first


@dataclass(frozen=True)
class Study:
    """All that results.md shows."""

    measurements: list[Measurement]  # of fixed prompts and searches
    transfers: list[Measurement]  # of prompts on models that they were not found with
    searches: list[SearchRecord]
    settings: list[list]  # rows of a table, its head first
    notes: list[str]  # sentences
    missing: list[str]  # names of the pieces that are not done


# --- Numbers -------------------------------------------------------------------------------------------------


def wilson(share, n):
    """The 95 % Wilson interval (low, high) of a share of n rows."""
    z = 1.96
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * (share * (1 - share) / n + z * z / (4 * n * n)) ** 0.5 / (1 + z * z / n)
    return max(0.0, middle - half), min(1.0, middle + half)


def mean_difference(tasks, reading, draws=10_000):
    """(difference, low, high): how much more often the prompts of several seeds are right than the initial one.

    tasks: the measurements of each task. Each row's difference is averaged over the seeds, then over the task's rows,
    then over the tasks; the 95 % interval is a bootstrap over the rows, seeds and tasks given.
    """
    rng, values, drawn_values = np.random.default_rng(0), [], []
    for measurements in tasks:
        per_seed = []
        for one in measurements:
            own, initial = np.array(one.outcomes(reading)), np.array(one.initial_outcomes(reading))
            per_seed.append(own.astype(float) - initial)
        per_row = np.mean(per_seed, axis=0)
        values.append(per_row.mean())
        drawn_values.append(per_row[rng.integers(len(per_row), size=(draws, len(per_row)))].mean(1))
    low, high = np.percentile(np.mean(drawn_values, axis=0), [2.5, 97.5])
    return float(np.mean(values)), float(low), float(high)


def accuracy_of(measurement, reading):
    return float(np.mean(measurement.outcomes(reading)))


def commonest_share(predictions):
    """The share of right answers of one who always gives the commonest."""
    (_, count), *_ = Counter(prediction["gold"] for prediction in predictions).most_common(1)
    return count / len(predictions)


# --- Cells ---------------------------------------------------------------------------------------------------


def percent(share):
    return f"{100 * share:.1f}"


def interval(low, high):
    return f"[{percent(low)}, {percent(high)}]"


def signed(difference, low, high):
    return f"{100 * difference:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"


def p_value(p):
    return f"{p:.2g}" if p < 0.995 else "1"


def reading_cells(measurement, reading):
    """Accuracy with its interval, difference to the initial prompt with its own, McNemar's p."""
    share = accuracy_of(measurement, reading)
    accuracy = f"{percent(share)} {interval(*wilson(share, len(measurement.predictions)))}"
    if measurement.method == "initial":
        return [accuracy, "", ""]
    change = compare(measurement.initial_outcomes(reading), measurement.outcomes(reading))
    return [accuracy, signed(change["difference"], change["low"], change["high"]), p_value(change["p"])]


def mean_reading_cells(measurements, reading):
    """The same of the mean over seeds, with the standard error between them; there is no McNemar test of a mean."""
    mean, error = mean_of_runs([accuracy_of(one, reading) for one in measurements])
    accuracy = f"{percent(mean)} {interval(*wilson(mean, len(measurements[0].predictions)))}, seeds ± {percent(error)}"
    return [accuracy, signed(*mean_difference([measurements], reading)), ""]


def cost_cells(measurements):
    """Unread, cut, tokens of a reasoning (means over the measurements); minutes and scored reasonings."""
    results = [one.result for one in measurements]
    cells = []
    for name in ("unread", "truncated"):
        cells.append(f"{100 * np.mean([result[name] for result in results]):.1f} %")
    cells.append(f"{np.mean([result['mean_tokens'] for result in results]):.1f}")
    cells.append(f"{np.mean([one.minutes for one in measurements]):.1f}")
    scored = [one.scored for one in measurements if one.scored is not None]
    return [*cells, f"{np.mean(scored):.0f}" if scored else ""]


HEAD = [
    *("task", "model", "method", "seed", "paper, %", "to initial", "p"),
    *("harness, %", "to initial", "p", "unread", "cut", "tokens", "minutes", "scored"),
]


def table_row(measurement):
    seed = "" if measurement.seed is None else measurement.seed
    row = [measurement.task, measurement.model, measurement.method, seed]
    for reading in CORRECT:
        row += reading_cells(measurement, reading)
    return row + cost_cells([measurement])


def mean_row(measurements):
    first = measurements[0]
    row = [first.task, first.model, first.method, "mean"]
    for reading in CORRECT:
        row += mean_reading_cells(measurements, reading)
    return row + cost_cells(measurements)


def grouped(measurements):
    """{(task, model): {method: measurements}}, tasks and models in the order in which they first come."""
    groups = defaultdict(lambda: defaultdict(list))
    tasks = list(dict.fromkeys(one.task for one in measurements))
    for one in sorted(measurements, key=lambda one: tasks.index(one.task)):
        groups[one.task, one.model][one.method].append(one)
    return groups


# --- Tables --------------------------------------------------------------------------------------------------


def accuracy_table(measurements):
    """A row per prompt, and one for the mean of a method that has several seeds."""
    rows = [HEAD]
    for by_method in grouped(measurements).values():
        for several in by_method.values():
            rows += [table_row(one) for one in several]
            if len(several) > 1:
                rows.append(mean_row(several))
    return markdown(rows)


def gain_table(measurements):
    """What each method gained over the initial prompt, as a mean over tasks; a row per model and method that searched
    on several."""
    rows = [["model", "method", "tasks", "searches", "paper, to initial", "harness, to initial", "scored"]]
    by_method = defaultdict(list)
    for (_, model), methods in grouped(measurements).items():
        for method, several in methods.items():
            by_method[model, method].append(several)
    for (model, method), tasks in by_method.items():
        everything = [one for several in tasks for one in several]
        if len(tasks) > 1 and everything[0].seed is not None:
            gains = [signed(*mean_difference(tasks, reading)) for reading in CORRECT]
            scored = f"{np.mean([one.scored for one in everything]):.0f}"
            rows.append([model, method, len(tasks), len(everything), *gains, scored])
    return markdown(rows) if len(rows) > 1 else ""


def rows_table(measurements):
    """How many rows there are, and how often the commonest answer is right: what guessing reaches."""
    rows = [["task", "model", "test rows", "commonest answer, %"]]
    for (task, model), by_method in grouped(measurements).items():
        predictions = next(iter(by_method.values()))[0].predictions
        rows.append([task, model, len(predictions), percent(commonest_share(predictions))])
    return markdown(rows)


CORRELATIONS = (("fixed_loss", "own"), ("objective", "own"), ("fixed_loss", "both"), ("objective", "both"))


def signal_table(searches):
    """What the gradient was worth, over the steps of all tasks and seeds: a row per model and method."""
    head = [
        "model",
        "method",
        "searches",
        "steps",
        "replaced, %",
        "best by rank 1, %",
        "old reasoning",
        "anew",
        "old, both",
        "anew, both",
        "old with anew",
    ]
    rows = [[*head, "audits: lower, higher", "by", "flips, %", "again, %"]]
    by_method = defaultdict(list)
    for search in searches:
        by_method[search.model, search.method].append(search.steps)
    for (model, method), several in by_method.items():
        signal = signal_of_all(several)
        replaced = [before.prompt_ids != step.prompt_ids for steps in several for before, step in with_incumbent(steps)]
        first = share_text(signal.wins.best[0], sum(signal.wins.best)) if signal.wins else ""
        ranks = [signal.correlations[about][0] for about in CORRELATIONS]
        flips = [changed and changed.flips for changed in (signal.tried, signal.again)]
        rows.append(
            [
                *(model, method, len(several), signal.steps, share_text(sum(replaced), len(replaced)), first),
                *(rank.text() if rank else "" for rank in [*ranks, signal.fixed]),
                f"{signal.audits}: {signal.ahead[0]}, {signal.ahead[1]}" if signal.ahead else "",
                signal.advantage.text(3) if signal.advantage else "",
                *(flip.text(1, 100) if flip else "" for flip in flips),
            ]
        )
    return markdown(rows)


SIGNAL_LEGEND = """In brackets 95 % intervals over the steps of all searches. Best by rank 1: steps in which the try
with the most negative gradient was the best one of its shortlist. Old reasoning, anew: mean rank correlation within
steps of the predicted change with that of the loss behind the incumbent's reasoning, and of the objective when the
model reasons anew, in the shortlist; both: in the shortlist and the random one of an audit together; old with anew: of
that loss itself with that objective, in both. Audits: how often the lowest objective of the shortlist was lower or
higher than that of a random one beside it, and by how much lower it is on average. Flips: training rows whose outcome
a try changed; again: the same for the same prompt in other batches."""


def search_table(searches):
    """Training rows at the start and at the step of the lowest objective; dev rows of initial and chosen prompt."""
    rows = [["task", "model", "method", "seed", "error", "objective", "at step", "dev, %", "chosen prompt"]]
    for search in searches:
        first, best = search.steps[0], min(search.steps, key=lambda step: step.objective)
        chosen = search.prompts[0]
        initial = next(prompt for prompt in search.prompts if prompt["initial"])
        rows.append(
            [
                *(search.task, search.model, search.method, search.seed),
                f"{first.error:.2f} → {best.error:.2f}",
                f"{first.objective:.2f} → {best.objective:.2f}",
                f"{best.step} of {search.steps[-1].step}",
                f"{percent(initial['dev_accuracy'])} → {percent(chosen['dev_accuracy'])}",
                "(the initial one)" if chosen["initial"] else chosen["prompt"],
            ]
        )
    return markdown(rows)


LEGEND = """`paper` and `harness` are the two readings of one generation: accuracy on test rows with its 95 % Wilson
interval; the difference to the initial prompt on the same rows with its 95 % paired bootstrap interval; the exact
McNemar p. Mean: over the seeds, whose standard error stands behind ±; its intervals are those of the rows, the seeds
given. Unread: no answer found behind the extractor; cut: at the limit of new tokens; tokens: of a reasoning; minutes:
of a search with its dev and test evaluations, or of one evaluation; scored: new prompts tried times training rows."""


def write_results(study, out):
    """Write results.md, and results.png where there is something to show. Returns their paths."""
    parts = ["# Real models", *study.notes]
    if study.missing:
        parts.append(f"Missing: {', '.join(study.missing)}.")
    paths = [out / "results.md"]
    if study.measurements:
        parts += ["## Test rows", rows_table(study.measurements), accuracy_table(study.measurements), LEGEND]
        parts.append("![accuracy](results.png)")
        paths.append(out / "results.png")
        draw_results(study.measurements, out / "results.png")
        if gains := gain_table(study.measurements):
            parts += ["Over all tasks, each task counting alike:", gains]
    if study.searches:
        about = "Error rate and objective on the training rows: initial prompt → step of the lowest objective."
        parts += ["## Searches", about, search_table(study.searches)]
        parts += ["## The gradient", signal_table(study.searches), SIGNAL_LEGEND]
    if study.transfers:
        about = "Prompts on a model that they were not found with; the difference is to the initial prompt there."
        parts += ["## Transfer", about, accuracy_table(study.transfers)]
    parts += ["## Settings", markdown(study.settings)]
    paths[0].write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return paths


# --- Headroom --------------------------------------------------------------------------------------------------

CEILING = 0.9
CHOSEN = 4  # tasks


def headroom_table(measurements, missing):
    """Markdown: the initial prompt on dev rows against the commonest answer, and the tasks that leave most room.

    A task is open if no model's accuracy is above the ceiling. Of the open tasks those are chosen on which the models
    are furthest above guessing: the method needs reasoning that says something about the prompt.
    """
    rows = [["task", "model", "rows", "commonest, %", "paper, %", "harness, %", "unread", "cut", "tokens", "minutes"]]
    margins, closed = defaultdict(list), set()
    for (task, model), by_method in grouped(measurements).items():
        (one,) = by_method["initial"]
        guessing, accuracy = commonest_share(one.predictions), accuracy_of(one, "paper")
        margins[task].append(accuracy - guessing)
        if accuracy > CEILING:
            closed.add(task)
        cells = [reading_cells(one, reading)[0] for reading in CORRECT]
        rows.append([task, model, len(one.predictions), percent(guessing), *cells, *cost_cells([one])[:-1]])
    still_open = [task for task in margins if task not in closed]
    best = sorted(still_open, key=lambda task: -np.mean(margins[task]))[:CHOSEN]
    margin_texts = [f"{task} ({100 * np.mean(margins[task]):+.1f})" for task in best]
    rule = f"Chosen, at most {100 * CEILING:.0f} % and furthest above the commonest answer (mean over models, points): "
    parts = ["# Headroom on dev rows", markdown(rows), rule + ", ".join(margin_texts) + "."]
    if missing:
        parts.append(f"Missing: {', '.join(missing)}.")
    return "\n\n".join(parts) + "\n"


# --- The picture -------------------------------------------------------------------------------------------------


def draw_results(measurements, path):
    """Accuracy per method, grouped by task, a panel per model; bars `paper` with intervals, diamonds `harness`."""
    groups = grouped(measurements)
    models = list(dict.fromkeys(model for _, model in groups))
    methods = list(dict.fromkeys(one.method for one in measurements))
    tasks = list(dict.fromkeys(task for task, _ in groups))
    height = 170 + (30 * len(methods) + 30) * len(tasks)
    figure, (panels,) = new_figure(150 + 620 * len(models), height, 1, len(models), sharex=True)
    handles = {}
    for panel, model in zip(panels, models):
        own = {task: by_method for (task, its_model), by_method in groups.items() if its_model == model}
        handles |= draw_model(panel, own, dict(zip(methods, itertools.cycle(METHOD_COLORS))))
        panel.set_title(model)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4)
    figure.savefig(path)


def draw_model(panel, by_task, colors):
    """by_task: {task: {method: measurements}}. Returns {name in the legend: what was drawn}."""
    handles, y, ticks = {}, 0.0, []
    for by_method in by_task.values():
        top = y - 0.5
        for method, several in by_method.items():
            share, _ = mean_of_runs([accuracy_of(one, "paper") for one in several])
            low, high = wilson(share, len(several[0].predictions))
            errors = [[100 * (share - low)], [100 * (high - share)]]
            style = {"color": colors[method], "error_kw": {"capsize": 3}}
            handles[method] = panel.barh(y, 100 * share, 0.85, xerr=errors, **style)
            each = [100 * accuracy_of(one, "paper") for one in several]
            if len(each) > 1:
                handles["a seed"] = panel.scatter(each, [y] * len(each), c="black", s=14, zorder=3)
            harness, _ = mean_of_runs([accuracy_of(one, "harness") for one in several])
            handles["harness reading"] = panel.scatter(
                100 * harness, y, marker="D", facecolor="none", edgecolor="black", s=40, zorder=3
            )
            y += 1
        ticks.append((top + y - 0.5) / 2)
        guessing = 100 * commonest_share(several[0].predictions)
        (handles["the commonest answer"],) = panel.plot([guessing] * 2, [top, y - 0.5], "k--", linewidth=1)
        y += 0.9
    panel.set(xlim=(0, 100), xlabel="accuracy on test rows, % (bars: paper reading, 95 % intervals)")
    panel.set_yticks(ticks, by_task)
    panel.invert_yaxis()
    panel.spines[["top", "right"]].set_visible(False)
    return handles

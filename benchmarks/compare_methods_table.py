"""The tables and the picture of compare_methods.py: from measurements to results.md and curves.png."""

import itertools
from collections import defaultdict
from dataclasses import dataclass

import numpy as np
from real_models_table import Measurement, grouped, mean_reading_cells, percent, reading_cells, rows_table

from support.pictures import METHOD_COLORS, new_figure
from support.proposals import REPEATED
from support.report import markdown
from support.runs import Step, TextStep, generations_of, scores_of

LINE_STYLES = ("-", "--", ":")  # methods beyond the number of colours


@dataclass(frozen=True)
class Searched:
    """A finished search."""

    measurement: Measurement  # of its chosen prompt on the test rows; `scored` counts all generations
    steps: list[Step] | list[TextStep]
    prompts: list[dict]  # finalists, best first
    rows: int  # training rows


@dataclass(frozen=True)
class Comparison:
    """All that results.md shows."""

    fixed: list[Measurement]  # prompts that nothing searched
    searches: list[Searched]
    budget: int  # scored generations of each search
    settings: list[list]  # rows of a table, its head first
    notes: list[str]  # sentences
    missing: list[str]  # names of the pieces that are not done


# --- What the optimizers did ---------------------------------------------------------------------------------

COUNTS = ("optimizer_requests", "optimizer_prompt_tokens", "optimizer_tokens")


def replies_of(searches):
    """(replies that gave a prompt, all replies) of several searches, (0, 0) where nothing wrote any."""
    good, count = 0, 0
    for search in searches:
        replies = getattr(search.steps[-1], "replies", {})
        good += replies.get("new", 0) + replies.get(REPEATED, 0)
        count += replies.get("all", 0)
    return good, count


def optimizer_cells(searches):
    """The share of replies that gave a prompt, and the means of requests, tokens read, tokens written."""
    good, count = replies_of(searches)
    cells = [f"{100 * good / count:.0f} %" if count else ""]
    for name in COUNTS:
        mean = np.mean([search.steps[-1].totals.get(name, 0) for search in searches])
        cells.append(f"{mean:.0f}" if mean else "")
    return cells


def cost_cells(searches):
    """The means of scored generations and minutes."""
    scored = np.mean([search.measurement.scored for search in searches])
    minutes = np.mean([search.measurement.minutes for search in searches])
    return [f"{scored:.0f}", f"{minutes:.1f}"]


# --- Tables ----------------------------------------------------------------------------------------------------

HEAD = [
    *("method", "seed", "test accuracy, %", "to initial", "p"),
    *("parsed", "requests", "read", "written", "scored", "minutes"),
]
LEGEND = """Test accuracy: `paper` reading, with its 95 % Wilson interval; the difference to the initial prompt on the
same rows with its 95 % paired bootstrap interval; the exact McNemar p, not corrected for the number of methods. Mean:
over the seeds, whose standard error stands behind ±; its intervals are those of the rows, the seeds given, and there is
no McNemar test of a mean. Parsed: replies of the optimizer that gave a prompt; requests to it, tokens that it read and
wrote. Random prompts have no optimizer: they are drawn from the task model, and the tokens are its own. Scored:
training rows under a prompt, with the initial one. Minutes: of a search with its dev and test evaluations, or of one
evaluation."""
CURVES = """The picture has two curves over the scored generations, means over the seeds. The training accuracy of the
prompt that a method holds to be the best so far: by accuracy, or, of GReaTer and its random shortlist, by the loss,
where accuracy is the share of rows on which the right answer is the likeliest. And the best dev accuracy of the initial
prompt and those finalists that were already found; other prompts have no dev accuracy."""


def accuracy_table(fixed, searches):
    """A row per fixed prompt and search, and one for the mean of a method that has several seeds."""
    rows = [HEAD]
    for one in fixed:
        rows.append([one.method, "", *reading_cells(one, "paper"), "", "", "", "", "", f"{one.minutes:.1f}"])
    for method, several in by_method(searches).items():
        for one in several:
            cells = reading_cells(one.measurement, "paper")
            rows.append([method, one.measurement.seed, *cells, *optimizer_cells([one]), *cost_cells([one])])
        if len(several) > 1:
            cells = mean_reading_cells([one.measurement for one in several], "paper")
            rows.append([method, "mean", *cells, *optimizer_cells(several), *cost_cells(several)])
    return markdown(rows)


def prompt_table(searches):
    """Training and dev accuracy of the initial and the chosen prompt, and the chosen one."""
    rows = [["method", "seed", "train, %", "dev, %", "chosen prompt"]]
    for one in searches:
        chosen, curve = one.prompts[0], best_so_far(one)
        initial = next(prompt for prompt in one.prompts if prompt["initial"])
        train = f"{percent(curve[0][1])} → {percent(curve[-1][1])}"
        dev = f"{percent(initial['dev_accuracy'])} → {percent(chosen['dev_accuracy'])}"
        text = "(the initial one)" if chosen["initial"] else chosen["prompt"]
        rows.append([one.measurement.method, one.measurement.seed, train, dev, text])
    return markdown(rows)


def by_method(searches):
    """{method: its searches}, in the order in which the methods first come."""
    groups = defaultdict(list)
    for one in searches:
        groups[one.measurement.method].append(one)
    return groups


def of_group(searches, group):
    """The searches of a (task, model)."""
    return [one for one in searches if (one.measurement.task, one.measurement.model) == group]


def write_comparison(comparison, out):
    """Write results.md, and curves.png where there is a search to show. Returns their paths."""
    measurements = comparison.fixed + [one.measurement for one in comparison.searches]
    parts = [f"# Methods at {comparison.budget} scored generations", *comparison.notes]
    if comparison.missing:
        parts.append(f"Missing: {', '.join(comparison.missing)}.")
    if measurements:
        parts += [rows_table(measurements), LEGEND]
    for group in grouped(measurements):
        fixed = [one for one in comparison.fixed if (one.task, one.model) == group]
        searches = of_group(comparison.searches, group)
        parts += [f"## {group[0]}, {group[1]}", accuracy_table(fixed, searches)]
        parts += [prompt_table(searches)] if searches else []
    paths = [out / "results.md"]
    if comparison.searches:
        parts += [CURVES, "![best training and dev accuracy over scored generations](curves.png)"]
        paths.append(out / "curves.png")
        draw_curves(comparison.searches, paths[1])
    parts += ["## Settings", markdown(comparison.settings)]
    paths[0].write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return paths


# --- The picture -----------------------------------------------------------------------------------------------


def best_so_far(search):
    """[(scored generations, training accuracy of the best prompt so far)], whenever prompts were scored."""
    if isinstance(search.steps[0], TextStep):
        scored = [one.accuracy for step in search.steps for one in step.proposed]
        best = itertools.accumulate(scored, max)
        return [(number * search.rows, accuracy) for number, accuracy in enumerate(best, 1)]
    scores, points = {}, []
    for number, step in enumerate(search.steps, 1):
        scores |= scores_of([step])
        errors = [score.error for score in scores.values() if score.objective == step.best.objective]
        points.append((generations_of(search.steps[:number], search.rows), 1 - errors[0]))
    return points


def best_dev_so_far(search):
    """[(scored generations, best dev accuracy)] of the finalists, each from where it was scored on."""
    found = {}  # {text, or ids of GReaTer's: scored generations}
    if isinstance(search.steps[0], TextStep):
        for number, one in enumerate((one for step in search.steps for one in step.proposed), 1):
            found.setdefault(one.prompt, number * search.rows)
    else:
        for number, step in enumerate(search.steps, 1):
            for prompt_ids in scores_of([step]):
                found.setdefault(prompt_ids, generations_of(search.steps[:number], search.rows))
    points = []
    for prompt in search.prompts:
        place = found.get(tuple(prompt["prompt_ids"]) if "prompt_ids" in prompt else prompt["prompt"])
        points.append((search.rows if prompt["initial"] else place, prompt["dev_accuracy"]))
    places, accuracies = zip(*sorted(points))
    return list(zip(places, itertools.accumulate(accuracies, max)))


def mean_curve(curves):
    """(generations, mean accuracy) of several curves, each of which stays as it is until its next point."""
    places = sorted({place for curve in curves for place, _ in curve})
    values = []
    for curve in curves:
        own_places, accuracies = zip(*curve)
        last = np.searchsorted(own_places, places, side="right") - 1
        values.append(np.array(accuracies)[np.maximum(last, 0)])
    return places, np.mean(values, axis=0)


def draw_curves(searches, path):
    """Best training and dev accuracy over scored generations, a line per method, a column per task and model."""
    groups = list(grouped([one.measurement for one in searches]))
    figure, rows = new_figure(200 + 800 * len(groups), 1200, 2, len(groups), sharex="col", sharey="row")
    looks = list(itertools.product(LINE_STYLES, METHOD_COLORS[1:]))  # the first is too light for a line
    looks = dict(zip(by_method(searches), itertools.cycle(looks)))  # of each method
    handles = {}
    for panels, curve_of, rows_of in zip(rows, (best_so_far, best_dev_so_far), ("training", "dev")):
        for panel, group in zip(panels, groups):
            for method, several in by_method(of_group(searches, group)).items():
                places, means = mean_curve([curve_of(one) for one in several])
                last = max(one.measurement.scored for one in several)
                style, color = looks[method]
                (handles[method],) = panel.step(
                    [*places, last], 100 * np.append(means, means[-1]), where="post", linestyle=style, color=color
                )
            panel.set(xlabel="scored generations", ylabel=f"best {rows_of} accuracy so far, %")
            panel.spines[["top", "right"]].set_visible(False)
    for panel, group in zip(rows[0], groups):
        panel.set_title(", ".join(group))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4)
    figure.savefig(path)

"""A report on finished runs: tables in the form of the paper's Table 1, and pictures of each search.

    write_report("runs")             # a folder of runs
    write_report("runs/demo-seed0")  # one run

Writes report.md and accuracy.png into the folder, and objective.png, evolution.png and gradient.png into the folder of
each run. Also the table and the picture of prompts moved between models. Works without torch; the files of
a run are only read.
"""

import math
import statistics
import textwrap
from collections import defaultdict
from dataclasses import fields
from pathlib import Path
from urllib.parse import quote

import numpy as np

from support.evaluation import READINGS, mean_and_error, percent
from support.runs import load_runs
from support.settings import SearchSettings
from support.tasks import PAPER_BBH, TASKS

# --- What the paper reports -----------------------------------------------------------------------------------

# Test accuracy in %, Das et al. (ICLR 2025, arXiv 2412.09722), Table 1. "BBH" is the mean over 21 tasks.
PAPER_METHODS = ("ZS-CoT", "APE", "APO", "PE2", "TextGrad", "GReaTer")
PAPER_TABLE_1 = {  # (model, column): a number for each of these methods
    ("Llama-3-8B", "gsm8k"): (79.6, 79.9, 81.1, 80.1, 78.5, 82.6),
    ("Llama-3-8B", "BBH"): (62.2, 63.1, 62.7, 61.5, 58.5, 68.7),
    ("Llama-3-8B", "folio"): (58.6, 57.6, 58.6, 62.6, 56.2, 62.6),
    ("Gemma-2-9B", "gsm8k"): (88.6, 88.6, 88.6, 88.6, 87.8, 89.4),
    ("Gemma-2-9B", "BBH"): (71.7, 71.7, 72.3, 68.9, 72.9, 76.6),
    ("Gemma-2-9B", "folio"): (65.0, 67.5, 63.1, 62.1, 67.5, 69.1),
}
# Table 3 of the same paper: prompts found with a source model, scored on a target model.
TRACKING = "tracking_shuffled_objects_five_objects"
PAPER_TRANSFER = ("movie_recommendation", "object_counting", TRACKING, "hyperbaton", "causal_judgement")
PAPER_TABLE_3 = {  # (method, source, target): accuracy in % on each of these BBH tasks
    ("TextGrad", "Llama-3-8B", "Gemma-2-9B"): (53, 78, 56, 84, 63),
    ("APO", "Llama-3-8B", "Gemma-2-9B"): (53, 84, 68, 84, 58),
    ("PE2", "Llama-3-8B", "Gemma-2-9B"): (54, 84, 68, 82, 60),
    ("GReaTer", "Llama-3-8B", "Gemma-2-9B"): (55, 90, 85, 91, 60),
    ("APO", "GPT-4", "Gemma-2-9B"): (52, 84, 72, 82, 59),
    ("TextGrad", "Gemma-2-9B", "Llama-3-8B"): (35, 29, 49, 65, 36),
    ("APO", "Gemma-2-9B", "Llama-3-8B"): (54, 69, 48, 71, 53),
    ("PE2", "Gemma-2-9B", "Llama-3-8B"): (56, 69, 49, 50, 53),
    ("GReaTer", "Gemma-2-9B", "Llama-3-8B"): (58, 87, 56, 70, 52),
    ("APO", "GPT-4", "Llama-3-8B"): (56, 68, 49, 75, 51),
}


def paper_model(name):
    """The paper's name of a model, or None: "Meta-Llama-3-8B-Instruct" is its Llama-3-8B, Llama-3.1-8B is not."""
    name = name.lower()
    found = [known for known in ("Llama-3-8B", "Gemma-2-9B") if known.lower() in name]
    return found[0] if found else "GPT-4" if name == "gpt-4" else None


def paper_main(model, method, column):
    """The number of Table 1 in %, or None. `column` is gsm8k, BBH or folio."""
    numbers = dict(zip(PAPER_METHODS, PAPER_TABLE_1.get((paper_model(model), column), ())))
    return numbers.get("ZS-CoT" if method == "zero-shot chain of thought" else method)


def paper_transfer(task, method, source, target):
    """The number of Table 3 in %, or None."""
    numbers = PAPER_TABLE_3.get((method, paper_model(source), paper_model(target)), ())
    return dict(zip(PAPER_TRANSFER, numbers)).get(task.removeprefix("bbh/"))


# --- Tables ---------------------------------------------------------------------------------------------------

# Where files lie and how much is computed at once; runs that differ in these alone are seeds of one another.
NO_SETTING = set("task model seed run_dir data_dir source device batch_size gradient_batch_size".split())


def method_labels(runs):
    """{folder: method}, with the settings behind it where runs of one task, model and method differ in them."""
    groups, labels = defaultdict(list), {}
    for run in runs:
        groups[run.task, run.model, run.method].append(run)
    for (task, _, method), group in groups.items():
        usual = {f.name: f.default for f in fields(SearchSettings)}
        if task in TASKS:
            usual |= {"initial_prompt": TASKS[task].initial_prompt} | TASKS[task].defaults
        configs = [usual | run.config for run in group]  # an older run may lack a setting
        shared = set.intersection(*map(set, configs)) - NO_SETTING
        varied = sorted(key for key in shared if len({repr(config[key]) for config in configs}) > 1)
        for run, config in zip(group, configs):
            own = [f"{key} {config[key]}" for key in varied if config[key] != usual.get(key)]
            labels[run.folder] = f"{method} ({', '.join(own)})" if own else method
    return labels


def table_records(runs):
    """The test results of all runs, each with task, model, method and seed. A fixed prompt (initial, baseline) is the
    same measurement in every run, so it counts once and has no seed."""
    labels, fixed, searched = method_labels(runs), {}, []
    for run in runs:
        for role, name in run.prompts_tried:
            record = run.result(role, "test", name)
            if not record:
                continue
            method = {"initial": "initial prompt", "best": labels[run.folder]}.get(role, name)
            seed = run.config.get("seed") if role == "best" else None
            record = record | {"task": run.task, "model": run.model, "method": method, "seed": seed}
            if role == "best":
                searched.append(record)
                continue
            frame = [run.config.get(name) for name in ("extractor", "template", "max_new_tokens")]
            key = (run.task, run.model, method, record["prompt"], *frame)
            fixed[key] = max(fixed.get(key, record), record, key=lambda r: r["n"])
    order = ("initial", "baseline", "best")
    return sorted([*fixed.values(), *searched], key=lambda r: (r["model"], order.index(r["role"])))


def cell(records, reading):
    """The accuracy of one record, "82.6 ± 1.0 (n 1319)"; of several their mean and number, too."""
    if not records:
        return "-"
    sizes, seeds = [r["n"] for r in records], {r.get("seed") for r in records}
    unit = "prompts" if seeds == {None} else "seeds" if len(seeds) == len(records) else "runs"
    count = "" if len(records) == 1 else f"{len(records)} {unit}, "
    size = str(min(sizes)) if min(sizes) == max(sizes) else f"{min(sizes)}-{max(sizes)}"
    return f"{percent(*mean_and_error(records, reading))} ({count}n {size})"


def mean_cell(groups, reading):
    """The mean over tasks; its standard error is that of the tasks' own errors, the tasks being given."""
    if not groups:
        return "-"
    means, errors = zip(*(mean_and_error(records, reading) for records in groups))
    return f"{percent(statistics.mean(means), math.hypot(*errors) / len(errors))} ({len(groups)} of {len(PAPER_BBH)})"


def markdown(rows):
    """Rows of texts as a Markdown table, the first row its head."""
    lines = ["| " + " | ".join(str(c).replace("|", "\\|").replace("\n", " ") for c in row) + " |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def results_table(records, reading):
    """Test accuracy in the form of the paper's Table 1: model x method, a column per task, the paper's beside ours."""
    groups = defaultdict(lambda: defaultdict(list))
    for record in records:
        groups[record["model"], record["method"]][record["task"]].append(record)
    tasks = {record["task"] for record in records}
    bbh = [task for task in PAPER_BBH if task in tasks]
    shown = [c for c in ("gsm8k", "BBH", "folio") if c in tasks or (c == "BBH" and bbh)]
    shown += sorted(tasks - set(shown), key=lambda task: (task not in bbh, task))
    head, rows = ["model", "method"], [list(key) for key in groups]
    for column in shown:
        head.append(f"BBH ({len(bbh)} of {len(PAPER_BBH)})" if column == "BBH" else column)
        numbers = [paper_main(*key, column) for key in groups]
        for row, own, number in zip(rows, groups.values(), numbers):
            present = [own[task] for task in bbh if task in own]
            row.append(mean_cell(present, reading) if column == "BBH" else cell(own.get(column), reading))
            row += ["-" if number is None or row[-1] == "-" else number] if any(numbers) else []
        head += ["paper"] if any(numbers) else []
    return markdown([head, *rows])


def transfer_groups(records):
    """{(task, method, source): {target: records}} in the records' order, and the targets."""
    groups = defaultdict(lambda: defaultdict(list))
    for record in records:
        groups[record["task"], record["method"], record["source"]][record["target"]].append(record)
    return groups, list(dict.fromkeys(record["target"] for record in records))


def split_of(records):
    return " and ".join(dict.fromkeys(record.get("split", "test") for record in records))


def transfer_table(records):
    """Markdown: task x method x source model against the target model, a table for each reading. A record has task,
    method, source, target, n, accuracy, stderr, harness_accuracy, harness_stderr, and perhaps its split."""
    groups, targets = transfer_groups(records)

    def entry(key, own, target, reading):
        number = paper_transfer(*key, target)
        return cell(own.get(target), reading) + (f", paper {number}" if number and target in own else "")

    parts = []
    for reading in READINGS:
        rows = [[*key, *(entry(key, own, target, reading) for target in targets)] for key, own in groups.items()]
        head = ["task", "method", "source", *(f"on {target}" for target in targets)]
        parts.append(f"Accuracy on {split_of(records)} rows in %, `{reading}` reading:\n\n{markdown([head, *rows])}\n")
    return "\n".join(parts)


# --- What the pictures show: plain data -----------------------------------------------------------------------


def finalist_points(steps, prompts):
    """[(step at which the prompt first appeared, dev accuracy, its standard error, whether it is the initial one)], in
    the order of the prompts, which is their rank."""
    first = {}
    for step in steps:
        for record in (step, *step.shortlist):
            first.setdefault(record.prompt_ids, step.step)
    known = [(first.get(tuple(p["prompt_ids"])), p) for p in prompts]
    return [(step, p["dev_accuracy"], p["dev_stderr"], p["initial"]) for step, p in known if step is not None]


def token_texts(steps, model):
    """{token id: text} from the candidates of the records, else from the model's tokenizer where it lies on disk."""
    texts = {}
    for step in steps:
        texts |= {record.token: record.text for record in (*step.candidates, *step.shortlist)}
    missing = {token for step in steps for token in step.prompt_ids} - texts.keys()
    if missing:
        from huggingface_hub import try_to_load_from_cache  # both without torch
        from tokenizers import Tokenizer

        try:
            path = Path(model) / "tokenizer.json"
            path = path if path.exists() else try_to_load_from_cache(str(model), "tokenizer.json")
            texts |= {token: Tokenizer.from_file(str(path)).decode([token]) for token in missing}
        except Exception:  # a name that is no hub name, no file, a file of another kind: the words do then
            pass
    return texts


def prompt_parts(steps, texts):
    """(each step's prompt as a list of (key, text), what the parts are): tokens, or words if a text is unknown."""
    if all(texts.get(token) for step in steps for token in step.prompt_ids):
        return [[(token, texts[token]) for token in step.prompt_ids] for step in steps], "tokens"
    return [[(word, word) for word in step.prompt.split()] for step in steps], "words"


def evolution_rows(steps, parts):
    """The start and each step at which the prompt changed: {step, objective, change of the objective, cells}; a cell is
    (text, step at which it was set)."""
    rows, set_at = [], [steps[0].step] * len(parts[0])
    for n, (step, now) in enumerate(zip(steps, parts)):
        before = parts[max(0, n - 1)]
        if n and now == before:
            continue
        kept = [i < len(before) and before[i][0] == key for i, (key, _) in enumerate(now)]
        set_at = [set_at[i] if same else step.step for i, same in enumerate(kept)]
        change = step.objective - steps[n - 1].objective if n else None
        cells = list(zip((text for _, text in now), set_at))
        rows.append({"step": step.step, "objective": step.objective, "change": change, "cells": cells})
    return rows


def gradient_points(steps):
    """[(predicted, realised, chosen)] for each shortlisted candidate: its gradient minus the incumbent's, and its
    objective minus the incumbent's. Not where the prompt grew (no incumbent) or no gradient was taken."""
    points = []
    for before, step in zip(steps, steps[1:]):
        gradients = {candidate.token: candidate.gradient for candidate in step.candidates}
        incumbent = before.prompt_ids[step.position] if step.position < len(before.prompt_ids) else None
        if gradients.get(incumbent) is None:
            continue
        for tried in step.shortlist:
            predicted = gradients[tried.token] - gradients[incumbent]
            realised = tried.objective - before.objective
            points.append((predicted, realised, tried.prompt_ids == step.prompt_ids))
    return points


def spearman(xs, ys):
    """Rank correlation, ties sharing their mean rank; None where it is not defined."""

    def ranks(values):
        values = np.asarray(values, dtype=float)
        return (values[:, None] > values).sum(1) + ((values[:, None] == values).sum(1) + 1) / 2

    if len(set(xs)) < 2 or len(set(ys)) < 2:
        return None
    return float(np.corrcoef(ranks(xs), ranks(ys))[0, 1])


# --- Pictures -------------------------------------------------------------------------------------------------

# Okabe and Ito's colours, which the colour-blind tell apart, too.
BLUE, ORANGE, GREEN, RED, PURPLE, SKY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9"
DPI = 100
MAX_COLUMNS, MAX_LINES = 26, 64  # of tokens in one evolution.png: what stays legible


def new_figure(width, height, rows=1, columns=1, **options):
    """(figure, array of axes); sizes in pixels. No pyplot: nothing global, and the Agg backend draws."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def draw_objective(run, path):
    """The objective over the steps, and the finalists' dev accuracy where each first appeared."""
    figure, ((top,), (bottom,)) = new_figure(1300, 900, 2, sharex=True, height_ratios=[3, 2])
    xs = [step.step for step in run.steps]
    current, best = [step.objective for step in run.steps], [step.best.objective for step in run.steps]
    top.step(xs, current, where="post", color=BLUE, linewidth=2.5, label="current prompt")
    top.step(xs, best, where="post", color=ORANGE, linewidth=2.5, linestyle="--", label="best finished prompt so far")
    wide = max(current + best) > 20 * min(current + best) > 0
    top.set_yscale("log" if wide else "linear")
    top.set(title=run.title, ylabel="objective on training rows" + " (log scale)" * wide)
    drawn = defaultdict(int)
    for rank, (step, mean, error, initial) in enumerate(finalist_points(run.steps, run.prompts)):
        x = step + 0.012 * xs[-1] * drawn[step]  # side by side, so that none hides another
        drawn[step] += 1
        marker, size, color, label = "o", 8, "0.35", "other finalist"
        if rank == 0:
            marker, size, color, label = "*", 17, RED, "chosen prompt"
        elif initial:
            marker, size, color, label = "s", 8, BLUE, "initial prompt"
        look = {"fmt": marker, "markersize": size, "color": color, "capsize": 4, "zorder": 3 if rank == 0 else 2}
        bottom.errorbar(x, 100 * mean, 100 * error, label=label, **look)
    bottom.set(xlabel="step (of a finalist: at which it first appeared)", ylabel="accuracy on dev rows, %")
    bottom.xaxis.get_major_locator().set_params(integer=True)
    for panel in (top, bottom):
        panel.grid(alpha=0.3)
        handles, labels = panel.get_legend_handles_labels()
        once = dict(zip(labels, handles))
        panel.legend(once.values(), once.keys())
    figure.savefig(path)


def clip(text, width, lines):
    """`text` over so many lines of so many characters, cut with an ellipsis; the space in front becomes a dot."""
    text = text.replace("\n", "\\n")
    text = "·" * text.startswith(" ") + text.strip()
    text = text if len(text) <= width * lines else text[: width * lines - 1] + "…"
    even = math.ceil(len(text) / max(1, math.ceil(len(text) / width)))  # no last line of one letter
    return "\n".join(text[i : i + even] for i in range(0, len(text), even or 1))


def draw_evolution(run, path):
    """A row of tokens for each change of the prompt, coloured by the step that set them; at the right what it gave."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    parts, kind = prompt_parts(run.steps, token_texts(run.steps, run.config["model"]))
    every = evolution_rows(run.steps, parts)
    longest = max(len(row["cells"]) for row in every)
    folds = math.ceil(longest / MAX_COLUMNS)  # a long prompt goes on in the line below
    columns = math.ceil(longest / folds)
    most = MAX_LINES // folds
    gap = most // 2 if len(every) > most else None  # the first and the last rows are shown
    rows = every if gap is None else every[:gap] + every[gap - most :]

    # All sizes are in pixels, so that it is known how many characters fit into a cell.
    left, wide, right, top, bottom = 65, 1295, 240, 100, 90
    font = 10 if columns <= 14 else 8
    fitting = max(2, int((wide / columns - 4) / (0.602 * font * DPI / 72)))
    wraps = any("\n" in clip(text, fitting, 2) for row in rows for text, _ in row["cells"])
    line = font * (3.7 if wraps else 2.4)
    tall = line * folds + 5
    high = tall * (len(rows) + (gap is not None))
    width, height = left + wide + right, top + high + bottom
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI)

    def panel(x, y, w, h, **options):
        return figure.add_axes((x / width, y / height, w / width, h / height), **options)

    axes = panel(left, bottom, wide, high, xlim=(0, columns), ylim=(high, 0))
    bars = panel(left + wide + 90, bottom, right - 105, high, ylim=(high, 0))
    last = run.steps[-1].step or 1
    colors = 0.5 + 0.5 * colormaps["cividis"](np.linspace(0, 1, last + 1))[:, :3]  # light, for black letters
    marks, y = [], 0.0
    for n, row in enumerate(rows):
        if n == gap:
            hidden = every[gap : gap - most]
            text = f"{len(hidden)} changes left out (steps {hidden[0]['step']} to {hidden[-1]['step']})"
            axes.text(columns / 2, y + tall / 2, text, ha="center", va="center", style="italic")
            y += tall
        for place, (text, step) in enumerate(row["cells"]):
            x, head = place % columns, y + place // columns * line
            new = n > 0 and step == row["step"]
            frame = {"edgecolor": RED if new else "0.8", "linewidth": 2.5 if new else 0.6, "zorder": 3 if new else 1}
            face = "white" if step == every[0]["step"] else colors[step]
            axes.add_patch(Rectangle((x, head), 1, line, facecolor=face, **frame))
            look = {"family": "monospace", "fontsize": font, "weight": "bold" if new else "normal", "zorder": 4}
            look |= {"ha": "center", "va": "center_baseline", "linespacing": 1, "parse_math": False}
            axes.text(x + 0.5, head + line / 2, clip(text, fitting, 2), **look)
        middle, change = y + line * folds / 2, row["change"]
        marks.append((middle, row["step"]))
        bars.barh(middle, change or 0, height=0.6 * line, color=ORANGE if (change or 0) > 0 else BLUE)
        value = f"start {row['objective']:.3g}" if change is None else f"{change:+.3g}"
        bars.annotate(value, (0, middle), (-8, 0), ("axes fraction", "data"), "offset points", ha="right", va="center")
        y += tall

    unit = kind[:-1]
    places = [", ".join(str(i) for i in range(column, longest, columns)) for column in range(columns)]
    axes.set_xticks(np.arange(columns) + 0.5, places)
    axes.set_yticks(*zip(*marks))
    axes.tick_params(length=0, labeltop=True, labelbottom=False)
    axes.xaxis.set_label_position("top")
    axes.set(xlabel=f"position of the {unit}" + "; a row goes on in the line below" * (folds > 1), ylabel="step")
    axes.spines[:].set_visible(False)
    bars.spines[["top", "left", "right"]].set_visible(False)
    bars.axvline(0, color="0.4", linewidth=0.8)
    bars.set_yticks([])
    bars.locator_params(axis="x", nbins=3)
    bars.set_title("change of\nthe objective", fontsize=10)
    ruler = panel(left, 45, 560, 14, yticks=[])
    ruler.imshow(colors[None], aspect="auto", extent=(-0.5, last + 0.5, 0, 1))
    ruler.xaxis.get_major_locator().set_params(integer=True)
    ruler.set_xlabel(
        f"step at which the {unit} was set (white: at the start; orange frame: the new {unit}; ·: a space)"
    )
    notes = [] if gap is None else [f"{len(rows) - 1} of {len(every) - 1} changes shown"]
    notes += [] if kind == "tokens" else ["words of the text, since the tokens are not known here"]
    figure.suptitle("; ".join([run.title, *notes]), y=1 - 20 / height)
    figure.savefig(path)


def draw_gradient(run, path):
    """What the gradient promised against what the objective did, for each shortlisted candidate."""
    points = gradient_points(run.steps)
    predicted, realised, taken = (np.array(column) for column in zip(*points))
    figure, ((axes,),) = new_figure(1200, 900)
    for mask, color, marker, label in ((~taken, SKY, "o", "tried"), (taken, RED, "D", "taken")):
        axes.scatter(predicted[mask], realised[mask], c=color, marker=marker, s=50, label=label, edgecolor="white")
    notes = {"x": "", "y": ""}
    for name, values in (("x", np.abs(predicted)), ("y", np.abs(realised))):
        if np.median(values) < values.max() / 10:  # early steps change much, late ones little
            getattr(axes, f"set_{name}scale")("symlog", linthresh=values.max() / 100)
            notes[name] = " (logarithmic away from zero)"
    axes.axhline(0, color="0.5", linewidth=1)
    axes.axvline(0, color="0.5", linewidth=1)
    rank = spearman(predicted, realised)
    correlation = "is not defined" if rank is None else f"{rank:.2f}"
    axes.set_title(f"{run.title}\nSpearman rank correlation {correlation}, n = {len(points)} shortlisted candidates")
    axes.set_xlabel("predicted change of the loss: gradient of the candidate minus the incumbent's" + notes["x"])
    axes.set_ylabel("realised change of the objective: candidate minus incumbent" + notes["y"])
    axes.legend()
    figure.savefig(path)


def draw_accuracy(records, path):
    """Test accuracy of every method, grouped by task and model; a panel for each reading."""
    groups = defaultdict(lambda: defaultdict(list))
    for record in records:
        groups[record["task"], record["model"]][record["method"]].append(record)
    methods = list(dict.fromkeys(record["method"] for record in records))
    palette = ["0.65", BLUE, ORANGE, GREEN, RED, PURPLE, SKY, "0.3"]
    height = 200 + 30 * sum(map(len, groups.values())) + 27 * len(groups)
    figure, (panels,) = new_figure(1400, height, 1, 2, sharey=True, sharex=True)
    for panel, reading in zip(panels, READINGS):
        y, ticks, bars = 0.0, [], {}
        for group, own in groups.items():
            ticks.append((y + (len(own) - 1) / 2, "\n".join(group)))
            for method in sorted(own, key=methods.index):
                mean, error = (100 * value for value in mean_and_error(own[method], reading))
                look = {"color": palette[methods.index(method) % len(palette)], "error_kw": {"capsize": 3}}
                bars[method] = panel.barh(y, mean, 0.85, xerr=error, **look)
                text = f"{mean:.1f}" + (f"  ({len(own[method])} runs)" if len(own[method]) > 1 else "")
                panel.annotate(text, (mean + error, y), (5, 0), textcoords="offset points", va="center")
                y += 1
            y += 0.9
        panel.set(xlim=(0, 125), xlabel="accuracy on test rows, % (± one standard error)", title=f"{reading} reading")
        panel.set_yticks(*zip(*ticks))
        panel.set_xticks(range(0, 101, 20))
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].invert_yaxis()
    known = [method for method in methods if method in bars]
    labels = [textwrap.fill(m, 60) for m in known]  # those with settings are long
    columns = 4 if max(map(len, labels)) < 30 else 2
    figure.legend([bars[m] for m in known], labels, loc="outside lower center", ncols=columns)
    figure.suptitle("Accuracy by task and model")
    figure.savefig(path)


def transfer_picture(records, path, reading="paper"):
    """A heat map for each task: method and source model against target model, accuracy in each cell."""
    from matplotlib import colormaps

    groups, targets = transfer_groups(records)
    tasks = list(dict.fromkeys(task for task, _, _ in groups))
    own = {task: {key[1:]: cells for key, cells in groups.items() if key[0] == task} for task in tasks}
    across = min(2, len(tasks))
    down = math.ceil(len(tasks) / across)
    size = 760 * across + 100, 40 + down * (110 + 50 * max(map(len, own.values())))
    figure, panels = new_figure(*size, down, across)
    for panel in panels.flat[len(tasks) :]:
        panel.set_visible(False)
    for panel, task in zip(panels.flat, tasks):
        values = np.full((len(own[task]), len(targets)), np.nan)
        for i, ((_, source), cells) in enumerate(own[task].items()):
            for j, target in enumerate(targets):
                text, dark = "-", False
                if target in cells:
                    mean, error = mean_and_error(cells[target], reading)
                    values[i, j], dark = 100 * mean, colormaps["cividis"](mean)[1] < 0.5
                    text = percent(mean, error) + "\n(its own prompt)" * (source == target)
                panel.text(j, i, text, ha="center", va="center", color="white" if dark else "black")
        image = panel.imshow(values, cmap="cividis", vmin=0, vmax=100, aspect="auto")
        names = [method if source == "-" else f"{method}\nfrom {source}" for method, source in own[task]]
        panel.set_yticks(range(len(names)), names)
        panel.set_xticks(range(len(targets)), [f"on {target}" for target in targets])
        panel.set_title(task)
        panel.tick_params(length=0)
    figure.colorbar(image, ax=panels, aspect=40)
    figure.suptitle(f"Accuracy on {split_of(records)} rows in % ({reading} reading)")
    figure.savefig(path)
    return Path(path)


# --- The report -----------------------------------------------------------------------------------------------

NOTES = f"""± is one standard error, n the number of test rows. Over several seeds: the mean of the runs ± the standard
error of that mean, from the spread between the runs. An initial or baseline prompt is the same in every run and
counts once. BBH: the mean over those of the paper's {len(PAPER_BBH)} tasks that were run. Columns called paper: Das et
al. (ICLR 2025), Table 1, where BBH is the mean over all {len(PAPER_BBH)}. How the paper read answers is not published,
so its numbers stand beside both readings.
"""


def run_section(run, pictures, folder):
    """The part of report.md on one run."""
    rows = [["prompt", "dev, %", "test, %", "test (harness), %", "unread", "truncated", "mean tokens"]]
    texts = []
    for role, name in run.prompts_tried:
        dev, test = (run.result(role, split, name) for split in ("dev", "test"))
        if test:
            rates = [f"{100 * test['unread']:.1f} %", f"{100 * test['truncated']:.1f} %", f"{test['mean_tokens']:.1f}"]
            cells = [cell([dev] if dev else [], "paper"), *(cell([test], reading) for reading in READINGS)]
            rows.append([name or role, *cells, *rates])
            texts.append(f"{name or role}:\n\n~~~text\n{test['prompt']}\n~~~\n")
    links = [f"![{path.stem}]({quote(path.relative_to(folder).as_posix())})\n" for path in pictures]
    if run.steps and not gradient_points(run.steps):
        links.append("No gradient.png: no shortlisted candidate has a gradient.\n")
    return "\n".join([f"## {run.title} ({run.folder.name})\n", markdown(rows), "", *texts, *links])


def draw_run(run):
    """The pictures of a run's search, as far as its records go. Returns their paths."""
    pictures = {"objective": draw_objective, "evolution": draw_evolution} if run.steps else {}
    if gradient_points(run.steps):
        pictures["gradient"] = draw_gradient
    for name, draw in pictures.items():
        draw(run, run.folder / f"{name}.png")
    return [run.folder / f"{name}.png" for name in pictures]


def write_report(folder):
    """Write FOLDER/report.md, accuracy.png and the pictures of each run. Returns the paths.

    folder: a run's folder, or a folder of runs. Errors: UserError if it holds no finished run or a file cannot be read.
    """
    folder = Path(folder)
    runs, unfinished = load_runs(folder)
    records = table_records(runs)
    draw_accuracy(records, folder / "accuracy.png")
    pictures = [draw_run(run) for run in runs]
    parts = [f"# Report on {len(runs)} run{'s' * (len(runs) > 1)}\n"]
    for reading in READINGS:
        parts += [f"## Accuracy on test rows in %, `{reading}` reading\n", results_table(records, reading), ""]
    parts += [NOTES, "![accuracy](accuracy.png)\n"]
    parts += ["## Unfinished\n", *(f"- {message}" for message in unfinished), ""] if unfinished else []
    parts += [run_section(run, own, folder) for run, own in zip(runs, pictures)]
    (folder / "report.md").write_text("\n".join(parts), encoding="utf-8")
    return [folder / "report.md", folder / "accuracy.png", *(path for own in pictures for path in own)]

"""Pictures of runs, drawn with matplotlib. Works without torch.

    draw_run(run)                   a search: objective.png, evolution.png, gradient.png in the run's folder
    draw_accuracy(records, path)    test accuracy of every method
    transfer_picture(records, path) prompts found with one model on another
    draw_signal(run, signal, path)  what the gradient of a search was worth

What a picture shows is first made as plain data. matplotlib is imported where something is drawn.
"""

import itertools
import math
import textwrap
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from support.evaluation import OF_SCORES, READINGS, estimate, has_scores, intervals_in, wilson
from support.instruments import MEASURES, gradient_points, spearman, within_steps

# --- What the pictures show: plain data -----------------------------------------------------------------------


class FinalistPoint(NamedTuple):
    step: int  # at which the prompt first appeared
    accuracy: float  # on dev rows
    low: float  # ends of its 95 % interval; both the accuracy itself where an older run does not say
    high: float
    initial: bool  # whether it is the initial prompt


class Cell(NamedTuple):
    """A token or word of a prompt."""

    text: str
    set_at: int  # step


class EvolutionRow(NamedTuple):
    """The prompt at the start, or behind a step that changed it."""

    step: int
    objective: float
    change: float | None  # of the objective in this step; None at the start
    cells: list[Cell]


def finalist_points(steps, prompts):
    """A FinalistPoint for each of the prompts that the steps know, in the prompts' order, which is their rank."""
    first_seen = {}
    for step in steps:
        for record in (step, *step.shortlist):
            first_seen.setdefault(record.prompt_ids, step.step)
    points = []
    for prompt in prompts:
        step = first_seen.get(tuple(prompt["prompt_ids"]))
        if step is not None:
            accuracy = prompt["dev_accuracy"]
            low, high = prompt.get("dev_low", accuracy), prompt.get("dev_high", accuracy)
            points.append(FinalistPoint(step, accuracy, low, high, prompt["initial"]))
    return points


def token_texts(steps, model):
    """{token id: text} from the candidates of the steps, else from the model's tokenizer where it lies on disk."""
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
            tokenizer = Tokenizer.from_file(str(path))
            texts |= {token: tokenizer.decode([token]) for token in missing}
        except Exception:  # a name that is no hub name, no file, a file of another kind: the words do then
            pass
    return texts


def prompt_parts(steps, texts):
    """(each step's prompt as a list of (key, text), what these are): tokens, or words if a token's text is unknown."""
    used = {token for step in steps for token in step.prompt_ids}
    known = all(texts.get(token) for token in used)
    parts = []
    for step in steps:
        if known:
            parts.append([(token, texts[token]) for token in step.prompt_ids])
        else:
            parts.append([(word, word) for word in step.prompt.split()])
    return parts, "tokens" if known else "words"


def evolution_rows(steps, parts):
    """An EvolutionRow of the start and of each step at which the prompt changed. parts: as of `prompt_parts`."""
    start = steps[0]
    cells = [Cell(text, start.step) for _, text in parts[0]]
    rows = [EvolutionRow(start.step, start.objective, None, cells)]
    for number in range(1, len(steps)):
        before, now = parts[number - 1], parts[number]
        if now == before:
            continue
        step = steps[number]
        cells = changed_cells(cells, before, now, step.step)
        change = step.objective - steps[number - 1].objective
        rows.append(EvolutionRow(step.step, step.objective, change, cells))
    return rows


def changed_cells(cells, before, now, step):
    """The cells of a prompt after a step. cells: those before it; before, now: the prompts' parts."""
    more = len(now) - len(before)  # parts that came, or below 0 went, at the first difference
    first = next((place for place, (a, b) in enumerate(zip(before, now)) if a != b), min(len(before), len(now)))
    changed = []
    for place, (key, text) in enumerate(now):
        was = place if place < first else place - more
        kept = not first <= place < first + more and was < len(before) and before[was][0] == key
        changed.append(Cell(text, cells[was].set_at if kept else step))
    return changed


def transfer_groups(records):
    """{(task, method, source): {target: records}} in the records' order, and the targets."""
    groups = defaultdict(lambda: defaultdict(list))
    for record in records:
        groups[record["task"], record["method"], record["source"]][record["target"]].append(record)
    return groups, list(dict.fromkeys(record["target"] for record in records))


def split_of(records):
    """The split that the records are of, for a title; both if they are of two."""
    return " and ".join(dict.fromkeys(record.get("split", "test") for record in records))


# --- Colours and figures --------------------------------------------------------------------------------------

# Okabe and Ito's colours, which the colour-blind tell apart, too.
BLUE = "#0072B2"
ORANGE = "#E69F00"
GREEN = "#009E73"
RED = "#D55E00"
PURPLE = "#CC79A7"
SKY = "#56B4E9"
LIGHT_GRAY = "0.65"
GRAY = "0.35"
DARK_GRAY = "0.3"
DPI = 100


def new_figure(width, height, rows=1, columns=1, **options):
    """(figure, array of axes); sizes in pixels. No pyplot: nothing global, and the Agg backend draws."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def draw_run(run):
    """The pictures of a run's search, as far as its records go. Returns their paths."""
    pictures = {"objective": draw_objective, "evolution": draw_evolution} if run.steps else {}
    if gradient_points(run.steps):
        pictures["gradient"] = draw_gradient
    for name, draw in pictures.items():
        draw(run, run.folder / f"{name}.png")
    return [run.folder / f"{name}.png" for name in pictures]


# --- objective.png --------------------------------------------------------------------------------------------


def draw_objective(run, path):
    """The objective over the steps, and the finalists' dev accuracy where each first appeared."""
    figure, ((top,), (bottom,)) = new_figure(1300, 900, 2, sharex=True, height_ratios=[3, 2])
    xs = [step.step for step in run.steps]
    current = [step.objective for step in run.steps]
    best = [step.best.objective for step in run.steps]
    line = {"where": "post", "linewidth": 2.5}
    top.step(xs, current, color=BLUE, label="current prompt", **line)
    top.step(xs, best, color=ORANGE, linestyle="--", label="best finished prompt so far", **line)
    ylabel = "objective on training rows"
    if max(current + best) > 20 * min(current + best) > 0:
        top.set_yscale("log")
        ylabel += " (log scale)"
    top.set(title=run.title, ylabel=ylabel)
    draw_finalists(bottom, finalist_points(run.steps, run.prompts), last=xs[-1])
    if text := unread_note(run.results):
        bottom.text(0.5, 0.5, text, transform=bottom.transAxes, color=RED, fontsize=16, ha="center", va="center")
    bottom.set(
        xlabel="step (of a finalist: at which it first appeared)",
        ylabel="accuracy on dev rows, %\n(95 % Wilson interval)",
    )
    bottom.xaxis.get_major_locator().set_params(integer=True)
    for panel in (top, bottom):
        panel.grid(alpha=0.3)
        legend_once(panel)
    figure.savefig(path)


def unread_note(results):
    """A sentence where no answer of the run was read, so that its accuracies say nothing; else ""."""
    unread = bool(results) and all(result["unread"] == 1 for result in results)
    return "no answer was read in any row: these zeros say nothing about the prompts" if unread else ""


def draw_finalists(panel, points, last):
    """points: FinalistPoints, the chosen prompt first; last: the run's last step."""
    in_all, drawn = Counter(point.step for point in points), Counter()  # {step: finalists}
    for rank, point in enumerate(points):
        if rank == 0:
            look = {"label": "chosen prompt", "fmt": "*", "markersize": 17, "color": RED, "zorder": 3}
        elif point.initial:
            look = {"label": "initial prompt", "fmt": "s", "markersize": 8, "color": BLUE, "zorder": 2}
        else:
            look = {"label": "other finalist", "fmt": "o", "markersize": 8, "color": GRAY, "zorder": 2}
        # Side by side, so that none hides another, and between the steps before and behind it.
        apart = min(0.012 * last, 0.8 / in_all[point.step])
        x = point.step + apart * (drawn[point.step] - (in_all[point.step] - 1) / 2)
        drawn[point.step] += 1
        bar = error_bar(point.accuracy, point.low, point.high)
        panel.errorbar(x, 100 * point.accuracy, bar, capsize=4, **look)


def error_bar(mean, low, high):
    """matplotlib's form of an interval around a share: its lengths down and up, in per cent."""
    return [[100 * max(0.0, mean - low)], [100 * max(0.0, high - mean)]]


# --- evolution.png --------------------------------------------------------------------------------------------

MAX_COLUMNS = 26  # of tokens: what stays legible
MAX_LINES = 64
# In pixels: the grid of cells, and the margins around it. The bars are in the right one, the ruler in the lower one.
GRID_WIDTH = 1295
LEFT, RIGHT = 65, 240
ABOVE, BELOW = 100, 90
LETTER_WIDTH = 0.602  # of a monospaced letter, as a share of its font size
CELL_LINES = 2  # of letters
NEW_FRAME = {"edgecolor": RED, "linewidth": 2.5, "zorder": 3}
OLD_FRAME = {"edgecolor": "0.8", "linewidth": 0.6, "zorder": 1}
CELL_TEXT = {
    "family": "monospace",
    "ha": "center",
    "va": "center_baseline",
    "linespacing": 1,
    "parse_math": False,
    "zorder": 4,
}


@dataclass(frozen=True)
class EvolutionLayout:
    """Where the rows of evolution.png stand. Sizes are in pixels, so that it is known how many letters fit a cell."""

    first: list[EvolutionRow]  # shown
    hidden: list[EvolutionRow]  # left out between the first and the last ones; one line says so
    last: list[EvolutionRow]  # shown
    longest: int  # cells of the longest row
    folds: int  # lines that a row takes: a long prompt goes on in the line below
    columns: int  # cells in a line
    font_size: int  # points
    letters: int  # that fit into one line of a cell
    cell_height: float

    @property
    def row_height(self):
        return self.cell_height * self.folds + 5

    @property
    def grid_height(self):
        return self.row_height * (len(self.first) + bool(self.hidden) + len(self.last))

    @property
    def gap(self):
        """The upper edge of the line that stands for the hidden rows."""
        return self.row_height * len(self.first)

    def shown(self):
        """[(upper edge, row)] of the rows that are shown."""
        gap = [None] if self.hidden else []
        slots = [*self.first, *gap, *self.last]
        return [(number * self.row_height, row) for number, row in enumerate(slots) if row is not None]

    def middle(self, upper_edge):
        """The height of the middle of a row's cells."""
        return upper_edge + self.cell_height * self.folds / 2


def evolution_layout(rows):
    """The EvolutionLayout of evolution rows."""
    longest = max(len(row.cells) for row in rows)
    folds = math.ceil(longest / MAX_COLUMNS)
    columns = math.ceil(longest / folds)
    first, hidden, last = without_middle(rows, max(1, MAX_LINES // folds))
    font_size = 10 if columns <= 14 else 8
    letter_width = LETTER_WIDTH * font_size * DPI / 72  # a point is 1/72 inch
    cell_width = GRID_WIDTH / columns
    letters = max(2, int((cell_width - 4) / letter_width))
    texts = [cell.text for row in first + last for cell in row.cells]
    wraps = any("\n" in clip(text, letters, CELL_LINES) for text in texts)
    cell_height = font_size * (3.7 if wraps else 2.4)
    return EvolutionLayout(first, hidden, last, longest, folds, columns, font_size, letters, cell_height)


def without_middle(rows, most):
    """(first rows, rows between them to leave out, last rows), so that `most` are left."""
    if len(rows) <= most:
        return rows, [], []
    first = most // 2
    last = most - first
    return rows[:first], rows[first:-last], rows[-last:]


def clip(text, width, lines):
    """`text` over so many lines of so many letters, cut with an ellipsis; the space in front becomes a dot."""
    text = text.replace("\n", "\\n")
    text = "·" * text.startswith(" ") + text.strip()
    if len(text) > width * lines:
        text = text[: width * lines - 1] + "…"
    needed = math.ceil(len(text) / width)
    if needed <= 1:
        return text
    even = math.ceil(len(text) / needed)  # no last line of one letter
    return "\n".join(text[start : start + even] for start in range(0, len(text), even))


def draw_evolution(run, path):
    """A row of tokens for each change of the prompt, coloured by the step that set them; at the right what it gave."""
    from matplotlib.figure import Figure

    parts, kind = prompt_parts(run.steps, token_texts(run.steps, run.config["model"]))
    unit = kind.removesuffix("s")
    rows = evolution_rows(run.steps, parts)
    layout = evolution_layout(rows)
    colors = step_colors(run.steps[-1].step or 1, [row.step for row in rows])
    width, height = LEFT + GRID_WIDTH + RIGHT, ABOVE + layout.grid_height + BELOW
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI)

    def add_axes(left, bottom, wide, high):  # in pixels
        return figure.add_axes((left / width, bottom / height, wide / width, high / height))

    grid = add_axes(LEFT, BELOW, GRID_WIDTH, layout.grid_height)
    draw_cells(grid, layout, colors)
    label_cells(grid, layout, unit)
    draw_changes(add_axes(LEFT + GRID_WIDTH + 90, BELOW, RIGHT - 105, layout.grid_height), layout)
    draw_ruler(add_axes(LEFT, 45, 560, 14), colors, unit)
    title = [run.title]
    if layout.hidden:
        changes = len(rows) - 1  # the start is none
        title.append(f"{changes - len(layout.hidden)} of {changes} changes shown")
    if kind == "words":
        title.append("words of the text, since the tokens are not known here")
    figure.suptitle("; ".join(title), y=1 - 20 / height)
    figure.savefig(path)


def step_colors(last, used):
    """An array (last + 1, 3): the colour of each step, light, for black letters. Those used are spread over the whole
    map, however many steps lie between them."""
    from matplotlib import colormaps

    places = np.interp(np.arange(last + 1), used, np.linspace(0.05, 0.95, len(used)))
    return 0.35 + 0.65 * colormaps["turbo"](places)[:, :3]


def draw_cells(axes, layout, colors):
    """The prompts, a row each. colors: of each step."""
    from matplotlib.patches import Rectangle

    axes.set(xlim=(0, layout.columns), ylim=(layout.grid_height, 0))
    height = layout.cell_height
    for upper_edge, row in layout.shown():
        for place, cell in enumerate(row.cells):
            fold, column = divmod(place, layout.columns)
            y = upper_edge + fold * height
            at_start = cell.set_at == 0
            new = cell.set_at == row.step and not at_start
            face = "white" if at_start else colors[cell.set_at]
            frame = NEW_FRAME if new else OLD_FRAME
            axes.add_patch(Rectangle((column, y), 1, height, facecolor=face, **frame))
            text = clip(cell.text, layout.letters, CELL_LINES)
            weight = "bold" if new else "normal"
            axes.text(column + 0.5, y + height / 2, text, fontsize=layout.font_size, weight=weight, **CELL_TEXT)
    if layout.hidden:
        first, last = layout.hidden[0].step, layout.hidden[-1].step
        text = f"{len(layout.hidden)} changes left out (steps {first} to {last})"
        y = layout.gap + layout.row_height / 2
        axes.text(layout.columns / 2, y, text, ha="center", va="center", style="italic")


def label_cells(axes, layout, unit):
    """Positions above the columns, steps beside the rows. unit: what a cell is."""
    centers = np.arange(layout.columns) + 0.5
    positions = []
    for column in range(layout.columns):
        one_below_the_other = range(column, layout.longest, layout.columns)
        positions.append(", ".join(str(position) for position in one_below_the_other))
    axes.set_xticks(centers, positions)
    middles = [layout.middle(upper_edge) for upper_edge, _ in layout.shown()]
    steps = [row.step for _, row in layout.shown()]
    axes.set_yticks(middles, steps)
    axes.tick_params(length=0, labeltop=True, labelbottom=False)
    axes.xaxis.set_label_position("top")
    goes_on = "; a row goes on in the line below" if layout.folds > 1 else ""
    axes.set(xlabel=f"position of the {unit}{goes_on}", ylabel="step")
    axes.spines[:].set_visible(False)


def draw_changes(axes, layout):
    """A bar beside each row: how the objective changed, in numbers at the left."""
    axes.set(ylim=(layout.grid_height, 0))
    at_the_left = {
        "xycoords": ("axes fraction", "data"),
        "xytext": (-8, 0),
        "textcoords": "offset points",
        "ha": "right",
        "va": "center",
    }
    for upper_edge, row in layout.shown():
        y = layout.middle(upper_edge)
        if row.change is None:
            change, value = 0, f"start {row.objective:.3g}"
        else:
            change, value = row.change, f"{row.change:+.3g}"
        color = ORANGE if change > 0 else BLUE
        axes.barh(y, change, height=0.6 * layout.cell_height, color=color)
        axes.annotate(value, (0, y), **at_the_left)
    axes.axvline(0, color="0.4", linewidth=0.8)
    axes.set_yticks([])
    axes.locator_params(axis="x", nbins=3)
    axes.set_title("change of\nthe objective", fontsize=10)
    axes.spines[["top", "left", "right"]].set_visible(False)


def draw_ruler(axes, colors, unit):
    """Which colour is which step."""
    axes.imshow(colors[None], aspect="auto", extent=(-0.5, len(colors) - 0.5, 0, 1))
    axes.set_yticks([])
    axes.xaxis.get_major_locator().set_params(integer=True)
    what = f"step at which the {unit} was set"
    axes.set_xlabel(f"{what} (white: at the start; orange frame: the new {unit}; ·: a space)")


# --- gradient.png ---------------------------------------------------------------------------------------------


def draw_gradient(run, path):
    """What the gradient promised against what the objective did, for each shortlisted candidate."""
    points = gradient_points(run.steps)
    predicted = np.array([point.predicted for point in points])
    realised = np.array([point.realised for point in points])
    taken = np.array([point.taken for point in points])
    figure, ((axes,),) = new_figure(1200, 900)
    axes.scatter(predicted[~taken], realised[~taken], c=SKY, marker="o", s=50, label="tried", edgecolor="white")
    axes.scatter(predicted[taken], realised[taken], c=RED, marker="D", s=50, label="taken", edgecolor="white")
    xlabel = "predicted change of the loss: gradient of the candidate minus the incumbent's"
    if linear_up_to := threshold(predicted):
        axes.set_xscale("symlog", linthresh=linear_up_to)
        xlabel += " (logarithmic away from zero)"
    ylabel = "realised change of the objective: candidate minus incumbent"
    if linear_up_to := threshold(realised):
        axes.set_yscale("symlog", linthresh=linear_up_to)
        ylabel += " (logarithmic away from zero)"
    axes.set(xlabel=xlabel, ylabel=ylabel)
    axes.axhline(0, color="0.5", linewidth=1)
    axes.axvline(0, color="0.5", linewidth=1)
    axes.set_title(f"{run.title}\n{correlations(points)}")
    axes.legend()
    figure.savefig(path)


def correlations(points):
    """How well predicted and realised changes agree, in a line."""
    pooled = spearman([point.predicted for point in points], [point.realised for point in points])
    within, steps = within_steps(points)
    numbers = ["not defined" if rank is None else f"{rank:.2f}" for rank in (within, pooled)]
    return (
        f"Spearman rank correlation within steps {numbers[0]} (mean of {steps}), "
        f"over all {len(points)} candidates {numbers[1]}"
    )


def threshold(values):
    """Up to where a scale should be linear, if it should be logarithmic beyond; else None."""
    sizes = np.abs(values)
    uneven = np.median(sizes) < sizes.max() / 10  # early steps change much, late ones little
    return sizes.max() / 100 if uneven else None


# --- signal.png -----------------------------------------------------------------------------------------------


def draw_signal(run, signal, path):
    """Four panels of an instruments.Signal: which gradient ranks win, how predicted and realised changes agree, what
    changes at all, and the gradient's shortlist against a random one in each audit."""
    figure, ((ranks, agree), (changes, audits)) = new_figure(1400, 1000, 2, 2)
    draw_ranks(ranks, signal.wins)
    draw_agreement(agree, signal.correlations)
    draw_changed(changes, {"shortlisted": signal.tried, "at random": signal.drawn, "itself again": signal.again})
    draw_audits(audits, run.steps)
    figure.suptitle(f"{run.title}; {signal.steps} steps (bars: 95 % intervals)")
    figure.savefig(path)


def say_nothing(panel, title):
    """A panel of what was not recorded."""
    panel.set(title=title, xticks=[], yticks=[])
    panel.text(0.5, 0.5, "not recorded", transform=panel.transAxes, color=GRAY, fontsize=14, ha="center", va="center")


def draw_ranks(panel, wins):
    title = "wins by gradient rank (1: most negative)"
    if wins is None:
        say_nothing(panel, title)
        return
    for shift, color, label, counts in (
        (-0.12, BLUE, "best of shortlist", wins.best),
        (0.12, RED, "taken", wins.taken),
    ):
        total = sum(counts)
        for rank, count in enumerate(counts, 1):
            if total:
                share, bar = count / total, error_bar(count / total, *wilson(count, total))
                panel.errorbar(rank + shift, 100 * share, bar, fmt="o", color=color, capsize=4, label=label)
    panel.axhline(100 / len(wins.best), color=GRAY, linestyle="--", label="chance")
    panel.set(title=title, xlabel="gradient rank", ylabel="% of steps", ylim=(0, 100))
    panel.set_xticks(range(1, len(wins.best) + 1))
    legend_once(panel)


def legend_once(panel):
    handles, labels = panel.get_legend_handles_labels()
    once = dict(zip(labels, handles))
    panel.legend(once.values(), once.keys())


def draw_agreement(panel, correlations):
    """correlations: as of instruments.Signal."""
    names = [
        f"{MEASURES[measure]}{chr(10)}(random shortlist)" if drawn else MEASURES[measure]
        for measure, drawn in correlations
    ]
    title = "rank correlation of predicted and realised change"
    if not any(interval for pair in correlations.values() for interval in pair):
        say_nothing(panel, title)
        return
    for place, pair in enumerate(correlations.values()):
        for shift, color, label, interval in (
            (-0.15, BLUE, "within steps", pair[0]),
            (0.15, ORANGE, "over all", pair[1]),
        ):
            if interval:
                bar = [[max(0, interval.value - interval.low)], [max(0, interval.high - interval.value)]]
                panel.errorbar(interval.value, place + shift, xerr=bar, fmt="o", color=color, capsize=4, label=label)
    panel.axvline(0, color=GRAY, linestyle="--")
    panel.set(title=title, xlim=(-1.05, 1.05))
    panel.set_yticks(range(len(names)), names, fontsize=8)
    panel.invert_yaxis()
    legend_once(panel)


def draw_changed(panel, changed):
    """changed: {label: instruments.Changed or None}."""
    title = "rows that differ from those under the incumbent"
    if not any(changed.values()):
        say_nothing(panel, title)
        return
    for place, one in enumerate(changed.values()):
        if one is None:
            panel.text(place, 3, "not recorded", ha="center", color=GRAY)
            continue
        for shift, color, label, share in (
            (-0.15, SKY, "reasoning", one.reasoning),
            (0.15, GREEN, "outcome", one.flips),
        ):
            bar = error_bar(share.value, share.low, share.high)
            panel.bar(place + shift, 100 * share.value, 0.28, yerr=bar, color=color, capsize=4, label=label)
    panel.set(title=title, ylabel="% of rows", ylim=(0, 105))
    panel.set_xticks(range(len(changed)), changed)
    legend_once(panel)


def draw_audits(panel, steps):
    """Each audit's lowest objective, of the gradient's shortlist and of the random one, less the incumbent's."""
    title = "lowest objective of the shortlist minus the incumbent's"
    audited = [(before, step) for before, step in zip(steps, steps[1:]) if step.audit]
    if not audited:
        say_nothing(panel, title)
        return
    xs = [step.step for _, step in audited]
    for marker, color, label in (("D", RED, "gradient's shortlist"), ("o", SKY, "random shortlist")):
        lists = [step.shortlist if color == RED else step.audit.drawn for _, step in audited]
        ys = [min(one.objective for one in tried) - before.objective for tried, (before, _) in zip(lists, audited)]
        panel.plot(xs, ys, marker, color=color, label=label)
    again = [step.audit.again.objective - before.objective for before, step in audited]
    panel.plot(xs, again, "_", color=GRAY, markersize=14, label="incumbent in other batches")
    panel.axhline(0, color="0.5", linewidth=1)
    panel.set(title=title, xlabel="step")
    panel.xaxis.get_major_locator().set_params(integer=True)
    panel.legend()


# --- accuracy.png and transfer.png ----------------------------------------------------------------------------

METHOD_COLORS = (LIGHT_GRAY, BLUE, ORANGE, GREEN, RED, PURPLE, SKY, DARK_GRAY)


def draw_accuracy(records, path):
    """Test accuracy of every method, grouped by task and model; a panel for each reading.

    A record has task, model, method and the fields of a result.
    """
    groups = defaultdict(lambda: defaultdict(list))  # {(task, model): {method: records}}
    for record in records:
        groups[record["task"], record["model"]][record["method"]].append(record)
    methods = list(dict.fromkeys(record["method"] for record in records))
    colors = dict(zip(methods, itertools.cycle(METHOD_COLORS)))
    bar_count = sum(len(by_method) for by_method in groups.values())
    figure, (panels,) = new_figure(1400, 200 + 30 * bar_count + 27 * len(groups), 1, 2, sharey=True, sharex=True)
    for panel, reading in zip(panels, READINGS):
        bars = draw_accuracy_bars(panel, groups, colors, reading)
    panels[0].invert_yaxis()
    labels = [textwrap.fill(method, 60) for method in methods]  # those with settings are long
    columns = 4 if max(map(len, labels)) < 30 else 2
    figure.legend([bars[method] for method in methods], labels, loc="outside lower center", ncols=columns)
    figure.suptitle("Accuracy by task and model")
    figure.savefig(path)


def draw_accuracy_bars(panel, groups, colors, reading):
    """groups: {(task, model): {method: records}}; colors: {method: colour}. Returns {method: its last bar}."""
    y, middles, bars = 0.0, [], {}
    for by_method in groups.values():
        middles.append(y + (len(by_method) - 1) / 2)
        for method, color in colors.items():
            if method not in by_method:
                continue
            records = by_method[method]
            mean, low, high, _ = estimate(records, reading)
            text = f"{100 * mean:.1f}"
            if len(records) > 1:
                text += f"  ({len(records)} runs)"
            bar = error_bar(mean, low, high)
            bars[method] = panel.barh(y, 100 * mean, 0.85, xerr=bar, color=color, error_kw={"capsize": 3})
            end = (100 * high, y)
            panel.annotate(text, end, (5, 0), textcoords="offset points", va="center")
            y += 1
        y += 0.9
    bar_ends = "bars: 95 % Wilson interval;\nof several runs one standard error of their mean to either side"
    shown = [record for by_method in groups.values() for records in by_method.values() for record in records]
    bar_ends += f";\n{OF_SCORES}" if any(map(has_scores, shown)) else ""
    panel.set(xlim=(0, 125), xlabel=f"accuracy on test rows, % ({bar_ends})", title=f"{reading} reading")
    panel.set_yticks(middles, ["\n".join(group) for group in groups])
    panel.set_xticks(range(0, 101, 20))
    panel.spines[["top", "right"]].set_visible(False)
    return bars


def transfer_picture(records, path, reading="paper"):
    """A heat map for each task: method and source model against target model, accuracy in each cell.

    A record has task, method, source, target, the fields of a result and perhaps its split. Returns the path.
    """
    groups, targets = transfer_groups(records)
    tasks = defaultdict(dict)  # {task: {(method, source): {target: records}}}
    for (task, method, source), by_target in groups.items():
        tasks[task][method, source] = by_target
    across = min(2, len(tasks))
    down = math.ceil(len(tasks) / across)
    most_rows = max(map(len, tasks.values()))
    figure, panels = new_figure(760 * across + 100, 40 + down * (110 + 50 * most_rows), down, across)
    for panel in panels.flat[len(tasks) :]:
        panel.set_visible(False)
    for panel, (task, rows) in zip(panels.flat, tasks.items()):
        image = draw_transfers(panel, rows, targets, reading)
        panel.set_title(task)
    figure.colorbar(image, ax=panels, aspect=40)
    figure.suptitle(
        f"Accuracy on {split_of(records)} rows in % ({reading} reading)\n{intervals_in(records)}", fontsize=11
    )
    figure.savefig(path)
    return Path(path)


def draw_transfers(panel, rows, targets, reading):
    """The heat map of one task. rows: {(method, source): {target: records}}. Returns the image."""
    from matplotlib import colormaps

    values = np.full((len(rows), len(targets)), np.nan)
    for i, ((_, source), by_target) in enumerate(rows.items()):
        for j, target in enumerate(targets):
            text, color = "-", "black"
            if target in by_target:
                found = estimate(by_target[target], reading)
                values[i, j] = 100 * found.accuracy
                text = str(found)
                dark = colormaps["cividis"](found.accuracy)[1] < 0.5
                color = "white" if dark else "black"
            if target in by_target and source == target:
                text += "\n(its own prompt)"
            panel.text(j, i, text, ha="center", va="center", color=color)
    names = [method if source == "-" else f"{method}\nfrom {source}" for method, source in rows]
    panel.set_yticks(range(len(names)), names)
    panel.set_xticks(range(len(targets)), [f"on {target}" for target in targets])
    panel.tick_params(length=0)
    return panel.imshow(values, cmap="cividis", vmin=0, vmax=100, aspect="auto")

"""What a search of GReaTer says about its own signal: did the gradient help, was the gain beyond the noise?

    signal_of(steps, prompts, rows)   a `Signal`, from the records of a run, finished or not
    signal_of_all(searches)           the same of the steps of several runs together
    signal_text(signal)               tables of it
    signal_verdict(signal)            two sentences

Intervals are 95 %: Wilson's of shares of steps, else percentiles of a bootstrap that draws whole steps, since the
prompts of a step share rows and incumbent. Works without torch.
"""

import math
import shutil
import tempfile
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from support.evaluation import Z, mcnemar, wilson
from support.files import UserError, require, short_name
from support.own import is_own, own_name
from support.runs import (
    PROMPT_FIELDS,
    RowOutcomes,
    Run,
    Score,
    initial_of,
    read_records,
    read_run,
    read_steps,
    scores_of,
)

DRAWS = 1000  # of a bootstrap
LEAST = 10  # steps below which a bootstrap's interval is too narrow to say anything
SIGNIFICANT = 0.05  # a p-value below it tells the audits that the gradient won from those that it lost
MEASURES = {  # of what the change is taken: fields of a `Tried`
    "fixed_loss": "loss behind the old reasoning",
    "cross_entropy": "cross-entropy, reasoned anew",
    "error": "error rate, reasoned anew",
    "objective": "objective, reasoned anew",
}
SHORTLISTS = {  # whose tokens are compared: the search's own, the random one of an audit, or both of an audited step
    "own": "",
    "random": ", random shortlist",
    "both": ", both shortlists",
}


class Interval(NamedTuple):
    """A number with its interval, and from how many steps it comes."""

    value: float
    low: float
    high: float
    steps: int

    def text(self, digits=2, factor=1.0):
        value, low, high = (f"{factor * number:.{digits}f}" for number in self[:3])
        return f"{value} ({low} to {high})"


# --- Correlations ------------------------------------------------------------------------------------


class GradientPoint(NamedTuple):
    predicted: float  # gradient of a tried candidate minus the incumbent's
    realised: float  # its objective, or another measure, minus the incumbent's
    taken: bool
    step: int


def gradient_points(steps, measure="objective", shortlist="own"):
    """A GradientPoint for each token of a shortlist; not where the prompt grew (there is no incumbent), no gradient was
    taken, or the measure was not recorded.

    measure: one of `MEASURES`; shortlist: one of `SHORTLISTS`."""
    points = []
    for before, step in with_incumbent(steps):
        changes = predicted_changes(before, step)
        base = step.audit and step.audit.fixed_loss if measure == "fixed_loss" else getattr(before, measure)
        for tried in tried_in(step, shortlist):
            value, predicted = getattr(tried, measure), changes.get(place_of(tried))
            if None not in (value, predicted, base):
                points.append(GradientPoint(predicted, value - base, tried.prompt_ids == step.prompt_ids, step.step))
    return points


def predicted_changes(before, step):
    """{(position, token): gradient less that of the token there}; {} without gradients."""
    gradients = {place_of(one): one.gradient for one in step.candidates if one.gradient is not None}
    changes = {}
    for (position, token), gradient in gradients.items():
        there = step.position if position is None else position
        incumbent = gradients.get((position, before.prompt_ids[there]))
        if incumbent is not None:
            changes[position, token] = gradient - incumbent
    return changes


def place_of(record):
    """(position, token) of a `Candidate` or a `Tried`; the position is None where it is the step's."""
    return record.position, record.token


def with_incumbent(steps):
    """[(the step before, step)] of those steps that had a token to replace."""
    found = []
    for before, step in zip(steps, steps[1:]):
        starts = step.position is None  # the start of another search behind the end of one
        if not starts and step.position < len(before.prompt_ids):
            found.append((before, step))
    return found


def tried_in(step, shortlist="own"):
    """The tokens that were tried in place of another, of one of the `SHORTLISTS`."""
    if shortlist == "own":
        return step.shortlist
    drawn = step.audit.drawn if step.audit else []
    if shortlist == "random":
        return drawn
    return [*{tried.prompt_ids: tried for tried in [*step.shortlist, *drawn]}.values()] if drawn else []


def spearman(xs, ys):
    """Rank correlation, ties sharing their mean rank; None where it is not defined."""
    if len(set(xs)) < 2 or len(set(ys)) < 2:
        return None
    return float(np.corrcoef(mean_ranks(xs), mean_ranks(ys))[0, 1])


def mean_ranks(values):
    """The rank of each value, from 1; equal values have the mean of their ranks."""
    _, place, counts = np.unique(np.asarray(values, dtype=float), return_inverse=True, return_counts=True)
    return (counts.cumsum() - (counts - 1) / 2)[place]


def within_steps(points):
    """(mean over the steps of the rank correlation of a step's own points, number of steps); None where none has one.

    Over all points together a step in which everything changes much, like the first, stands against those in which
    nothing does. But the search compares a step's candidates with each other only.
    """
    found = step_correlations(points)
    return (float(np.mean(found)) if found else None), len(found)


def step_correlations(points):
    """The rank correlation of each step's own points, where it has one."""
    found = [correlation_of(own) for own in by_step(points)]
    return [rank for rank in found if rank is not None]


def by_step(points):
    """Lists of the points of one step each."""
    groups = defaultdict(list)
    for point in points:
        groups[point.step].append(point)
    return list(groups.values())


def correlation_of(points):
    return spearman([point.predicted for point in points], [point.realised for point in points])


def bootstrap(groups, statistic, seed=0):
    """The `Interval` of statistic(list of groups), a number or None, drawing as many of the groups again and again;
    None where there are fewer than two groups or the statistic has no value."""
    value = statistic(groups)
    if len(groups) < 2 or value is None:
        return None
    rng = np.random.default_rng(seed)
    drawn = []
    for _ in range(DRAWS):
        again = statistic([groups[n] for n in rng.integers(len(groups), size=len(groups))])
        if again is not None:
            drawn.append(again)
    low, high = np.percentile(drawn, [2.5, 97.5])
    return Interval(value, float(low), float(high), len(groups))


def mean_of(numbers):
    return float(np.mean(numbers)) if len(numbers) else None


def pooled(groups):
    """The rank correlation over all points of several steps."""
    return correlation_of([point for group in groups for point in group])


# --- Which of the shortlist wins ------------------------------------------------------------------------


@dataclass(frozen=True)
class Wins:
    """How often the token with the most negative gradient won, the next one, and so on."""

    best: list[int]  # of each rank: steps in which it had the lowest objective of the shortlist
    taken: list[int]  # of each rank: steps in which it was taken
    kept: int  # steps in which the incumbent stayed
    steps: int


def wins_of(steps):
    """The `Wins` over the steps whose shortlist has the run's commonest length; None where no gradient was taken.
    Steps in which several share the lowest objective have no best."""
    ranked = [(before, step, by_gradient(before, step)) for before, step in with_incumbent(steps)]
    lengths = Counter(len(ranks) for *_, ranks in ranked if ranks)
    if not lengths:
        return None
    size = lengths.most_common(1)[0][0]
    best, taken, kept, count = [0] * size, [0] * size, 0, 0
    for before, step, ranks in ranked:
        if len(ranks) != size:
            continue
        count += 1
        lowest = min(tried.objective for tried in ranks)
        winners = [rank for rank, tried in enumerate(ranks) if tried.objective == lowest]
        if len(winners) == 1:
            best[winners[0]] += 1
        places = [rank for rank, tried in enumerate(ranks) if tried.prompt_ids == step.prompt_ids]
        if places:
            taken[places[0]] += 1
        kept += step.prompt_ids == before.prompt_ids
    return Wins(best, taken, kept, count)


def by_gradient(before, step):
    """The tokens tried in place of another, the one that promises most first; [] where no gradient was taken."""
    changes, tried = predicted_changes(before, step), tried_in(step)
    if any(place_of(one) not in changes for one in tried):
        return []
    return sorted(tried, key=lambda one: changes[place_of(one)])


# --- What changes at all ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Changed:
    """Shares of the rows whose reasoning became another, and whose outcome went from right to wrong or back; and the
    size of the change of the objective."""

    reasoning: Interval
    flips: Interval
    objective: Interval


def changed_between(pairs):
    """The `Changed` of [(step, Score before, Score after)]; None where the rows were not recorded in two steps."""
    groups = defaultdict(list)
    for step, before, after in pairs:
        if before.rows and after.rows:
            share = changed_rows(before.rows, after.rows)
            groups[step].append((*share, abs(after.objective - before.objective)))
    if len(groups) < 2:
        return None
    columns = []
    for column in range(3):
        of_step = [[numbers[column] for numbers in group] for group in groups.values()]
        columns.append(bootstrap(of_step, lambda drawn: mean_of([number for group in drawn for number in group])))
    return Changed(*columns)


def changed_rows(before, after):
    """(share of reasonings that differ, share of outcomes that differ) of two `RowOutcomes` of the same rows."""
    count = len(before.wrong)
    hashes = [[rows.reasoning[4 * n : 4 * n + 4] for n in range(count)] for rows in (before, after)]
    other = sum(a != b for a, b in zip(*hashes, strict=True))
    flipped = sum(a != b for a, b in zip(before.wrong, after.wrong, strict=True))
    return other / count, flipped / count


class Gain(NamedTuple):
    """By how much lower an objective is, over the same rows."""

    mean: float
    error: float  # standard error, from the differences of the rows
    rows: int

    @property
    def size(self):
        """In standard errors; infinite where all rows differ alike."""
        return self.mean / self.error if self.error else math.copysign(math.inf, self.mean) if self.mean else 0.0


def paired_gain(before: RowOutcomes, after: RowOutcomes):
    """The `Gain` from one prompt to another, over the rows that are finite under both; None of fewer than two."""
    pairs = [(a, b) for a, b in zip(before.objective, after.objective, strict=True) if None not in (a, b)]
    if len(pairs) < 2:
        return None
    differences = np.array([a - b for a, b in pairs])
    error = float(differences.std(ddof=1)) / len(pairs) ** 0.5
    return Gain(float(differences.mean()), error, len(pairs))


# --- All of it ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Signal:
    """What the records of a search say; None: not recorded."""

    steps: int
    audits: int
    audit_generations: int
    wins: Wins | None
    correlations: dict[
        tuple[str, str], tuple[Interval | None, Interval | None]
    ]  # {(measure, shortlist): within, pooled}
    fixed: Interval | None  # within steps, of the loss behind the old reasoning with the objective reasoned anew
    tried: Changed | None  # between incumbent and shortlisted
    drawn: Changed | None  # between incumbent and randomly drawn
    again: Changed | None  # between incumbent and itself in other batches
    advantage: Interval | None  # lowest objective of a random shortlist minus that of the gradient's
    ahead: tuple[int, int] | None  # audits in which the gradient's was lower, or the random one
    accepted: tuple[int, int] | None  # replacements by more than two standard errors, all replacements
    gain: Gain | None  # from the initial to the chosen prompt, or to the best finished one so far
    optimism: "Optimism | None"
    shortlist: str = "gradient"  # the setting of that name


@dataclass(frozen=True)
class Optimism:
    """How much better a prompt looks on the rows that chose it."""

    train: float  # accuracy of the chosen prompt, by the search's error
    dev: float  # its accuracy, `paper` reading
    low: float  # of train - dev, Newcombe's interval
    high: float
    train_gain: float  # accuracy over the initial prompt
    dev_gain: float
    order: float | None  # rank correlation of minus the training objective and dev accuracy, over the finalists
    finalists: int


def signal_of(steps, prompts=(), rows=0, shortlist="gradient"):
    """The `Signal` of a search.

    steps: its `Step`s; prompts: the records of prompts.jsonl, none of an unfinished run; rows: how many train."""
    own = {"gain": gain_of(steps, prompts), "optimism": optimism_of(prompts, rows), "shortlist": shortlist}
    return replace(signal_of_all([steps]), **own)


def signal_of_all(searches):
    """The `Signal` of several searches together, lists of `Step`s; without what concerns the end of a single one."""
    steps = []
    for own in searches:
        steps += [replace(step, step=len(steps) + step.step) for step in own]  # the numbers tell the steps apart
    pairs = with_incumbent(steps)
    correlations = {}
    for shortlist in SHORTLISTS:
        for measure in MEASURES:
            points = gradient_points(steps, measure, shortlist)
            ranks = step_correlations(points)
            correlations[measure, shortlist] = bootstrap(ranks, mean_of), bootstrap(by_step(points), pooled)
    tried = {
        shortlist: [(step.step, before, one) for before, step in pairs for one in tried_in(step, shortlist)]
        for shortlist in ("own", "random")
    }
    audited = [(before, step) for before, step in pairs if step.audit]
    differences = [lowest(step.audit.drawn) - lowest(tried_in(step)) for _, step in audited]
    return Signal(
        steps=len(steps) - len(searches),  # without the starts
        audits=len(audited),
        audit_generations=sum(step.audit.generations for _, step in audited),
        wins=wins_of(steps),
        correlations=correlations,
        fixed=bootstrap(fixed_loss_correlations(audited), mean_of),
        tried=changed_between(tried["own"]),
        drawn=changed_between(tried["random"]),
        again=changed_between([(step.step, before, step.audit.again) for before, step in audited]),
        advantage=bootstrap(differences, mean_of),
        ahead=(sum(d > 0 for d in differences), sum(d < 0 for d in differences)) if audited else None,
        accepted=accepted_of(pairs),
        gain=None,
        optimism=None,
    )


def fixed_loss_correlations(audited):
    """For each audited step the rank correlation, over all that it tried, of the loss behind the old reasoning with the
    objective reasoned anew: what the loss itself would be worth whose slope the gradient is."""
    found = []
    for _, step in audited:
        tried = [one for one in tried_in(step, "both") if one.fixed_loss is not None]
        found.append(spearman([one.fixed_loss for one in tried], [one.objective for one in tried]))
    return [rank for rank in found if rank is not None]


def lowest(shortlist):
    return min(tried.objective for tried in shortlist)


def accepted_of(pairs):
    """(replacements whose gain is above two standard errors, all replacements); None where rows were not recorded."""
    replaced = [(before, step) for before, step in pairs if before.prompt_ids != step.prompt_ids]
    if not replaced or not all(before.rows and step.rows for before, step in replaced):
        return None
    gains = [gain for before, step in replaced if (gain := paired_gain(before.rows, step.rows))]
    return (sum(gain.size > 2 for gain in gains), len(gains)) if gains else None


def gain_of(steps, prompts):
    """The `Gain` of the chosen prompt, or of the best finished one so far, over the initial one."""
    scores = scores_of(steps)
    initial = next(iter(scores.values()))
    chosen = scores.get(tuple(prompts[0]["prompt_ids"])) if prompts else best_finished(scores, steps[-1].best)
    if chosen is None or chosen == initial or not (initial.rows and chosen.rows):
        return None
    return paired_gain(initial.rows, chosen.rows)


def best_finished(scores, best) -> Score | None:
    """The score of a `Best`, whose objective it has."""
    return next((score for score in scores.values() if score.objective == best.objective), None)


def optimism_of(prompts, rows):
    """The `Optimism` of the first of a run's prompts; None where their scores are not there."""
    if not prompts or not rows or any("error" not in prompt for prompt in prompts):
        return None
    chosen, initial = prompts[0], initial_of(prompts)
    train, dev = 1 - chosen["error"], chosen["dev_accuracy"]
    low, high = wilson(round(train * rows), rows)
    dev_low, dev_high = chosen.get("dev_low", dev), chosen.get("dev_high", dev)
    return Optimism(
        train=train,
        dev=dev,
        low=train - dev - math.hypot(train - low, dev_high - dev),
        high=train - dev + math.hypot(high - train, dev - dev_low),
        train_gain=initial["error"] - chosen["error"],
        dev_gain=dev - initial["dev_accuracy"],
        order=spearman([-p["objective"] for p in prompts], [p["dev_accuracy"] for p in prompts]),
        finalists=len(prompts),
    )


# --- In words -----------------------------------------------------------------------------------------------------

NOT_RECORDED = "not recorded"
RANKED_BY = {  # setting `shortlist`: what made it
    "gradient": "gradient",
    "likeliest": "likelihood",
    "random": "random draw",
    "all": "trial of all",
}


def signal_text(signal):
    """The tables of a `Signal`."""
    parts = [wins_lines(signal.wins), correlation_lines(signal), changed_lines(signal), audit_lines(signal)]
    return "\n\n".join("\n".join(lines) for lines in [*parts, gain_lines(signal)])


def share_text(count, n):
    """A share in per cent with its Wilson interval."""
    if not n:
        return "-"
    low, high = wilson(count, n)
    return f"{100 * count / n:.1f} ({100 * low:.1f} to {100 * high:.1f})"


def wins_lines(wins):
    if wins is None:
        return [f"wins by gradient rank: {NOT_RECORDED}, no gradient was taken"]
    ranks, best, taken = len(wins.best), sum(wins.best), sum(wins.taken)
    lines = [f"{'gradient rank':13s}  {f'best of shortlist, % of {best}':>30s}  {f'taken, % of {taken} changes':>30s}"]
    for rank in range(ranks):
        columns = share_text(wins.best[rank], best), share_text(wins.taken[rank], taken)
        lines.append(f"{rank + 1:<13d}  {columns[0]:>30s}  {columns[1]:>30s}")
    chance = f"{100 / ranks:.1f}"
    lines.append(f"{'chance':13s}  {chance:>30s}  {chance:>30s}")
    kept = share_text(wins.kept, wins.steps)
    lines.append(f"the incumbent stayed in {kept} % of {wins.steps} steps; chance {100 / (ranks + 1):.1f} %")
    return lines


def interval_text(interval, digits=2, factor=1.0):
    return f"{interval.text(digits, factor)}, n {interval.steps}" if interval else NOT_RECORDED


def correlation_lines(signal):
    lines = [f"{'rank correlation of the predicted change with that of':54s}  {'within steps':>31s}  {'over all':>31s}"]
    for (measure, shortlist), (within, over_all) in signal.correlations.items():
        label = f"{MEASURES[measure]}{SHORTLISTS[shortlist]}"
        lines.append(f"{label:54s}  {interval_text(within):>31s}  {interval_text(over_all):>31s}")
    label = "of loss behind the old reasoning with objective anew"
    lines.append(f"{label:54s}  {interval_text(signal.fixed):>31s}")
    return lines


def changed_lines(signal):
    lines = [
        f"{'against the incumbent':22s}  {'reasonings changed, %':>31s}  {'outcomes flipped, %':>31s}  objective by"
    ]
    rows = {
        "shortlisted": signal.tried,
        "drawn at random": signal.drawn,
        "itself, other batches": signal.again,
    }
    for label, changed in rows.items():
        if changed is None:
            lines.append(f"{label:22s}  {NOT_RECORDED:>31s}")
            continue
        shares = [interval_text(share, 1, 100) for share in (changed.reasoning, changed.flips)]
        lines.append(f"{label:22s}  {shares[0]:>31s}  {shares[1]:>31s}  {changed.objective.text(3)}")
    return lines


def audit_lines(signal):
    if not signal.audits:
        return [f"{signal.shortlist} against random shortlist: {NOT_RECORDED} (--audit-every N in stage 2)"]
    better, worse = signal.ahead
    known = interval_text(signal.advantage, 3)
    return [
        f"{signal.shortlist} against random shortlist, {signal.audits} audits, {signal.audit_generations} generations:",
        f"  lowest objective {known} lower; lower in {better}, higher in {worse}",
    ]


def gain_lines(signal):
    lines = []
    if signal.accepted:
        beyond, replaced = signal.accepted
        lines.append(f"replacements beyond two standard errors of the rows: {beyond} of {replaced}")
    optimism = signal.optimism
    if optimism is None:
        return [*lines, f"training rows against dev: {NOT_RECORDED}"]
    apart = Interval(optimism.train - optimism.dev, optimism.low, optimism.high, 0)
    order = "not defined" if optimism.order is None else f"{optimism.order:.2f}"
    return [
        *lines,
        f"chosen prompt: {100 * optimism.train:.1f} % right on training rows, {100 * optimism.dev:.1f} % on dev, "
        f"apart by {apart.text(1, 100)}",
        f"  over the initial prompt: {100 * optimism.train_gain:+.1f} on training rows, "
        f"{100 * optimism.dev_gain:+.1f} on dev",
        f"  order of {optimism.finalists} finalists, training objective against dev: rank correlation {order}",
    ]


def signal_verdict(signal):
    """Two sentences: did the gradient help, was the gain beyond the noise?"""
    return f"{gradient_sentence(signal)}\n{gain_sentence(signal)}"


def gradient_sentence(signal):
    advantage, within = signal.advantage, signal.correlations["objective", "own"][0]
    if advantage:
        by = RANKED_BY[signal.shortlist]
        unknown = f"That the {by} helped cannot be told"
        helped = told(advantage, f"The {by} helped", f"The {by} hurt", unknown)
        if mcnemar(*signal.ahead) >= SIGNIFICANT:  # a few large differences make a mean, and no more
            helped = unknown
        lower = f"the best of its shortlist has an objective {advantage.text(3)} lower than the best of a random one"
        better, worse = signal.ahead
        return f"{helped}: {lower} ({advantage.steps} steps: lower in {better}, higher in {worse})."
    if within:
        order = told(within, "better than chance", "worse than chance", "in a way that cannot be told from chance")
        ranked = f"The gradient ordered the shortlist {order}: rank correlation {within.text()} in"
        return f"{ranked} {within.steps} steps; against a random shortlist only --audit-every compares it."
    return "Whether the gradient helped is not recorded."


def told(interval, above, below, neither):
    """Which of three texts says where an interval lies against 0; of few steps none can be told."""
    if interval.steps < LEAST or interval.low <= 0 <= interval.high:
        return neither
    return above if interval.low > 0 else below


def gain_sentence(signal):
    gain, again = signal.gain, signal.again
    if gain is None:
        return (
            "Whether the gain is beyond the noise is not recorded: no other prompt was chosen, or its rows are unknown."
        )
    floor = again.objective.value if again else 0.0
    beyond = gain.mean > Z * gain.error and gain.mean > floor
    noise = f"standard error {gain.error:.3g} over {gain.rows} rows"
    if again:
        noise += f", {again.objective.value:.3g} between equal prompts in other batches"
    return (
        f"The gain in the objective on training rows, {gain.mean:.3g} below the initial prompt's, is "
        f"{'' if beyond else 'not '}beyond the noise ({noise}); as the best of many it is rather too large."
    )


# --- Reading a run, finished or not ---------------------------------------------------------------------------------


def load_search(folder):
    """The `Run` of GReaTer in a folder, with the steps that are there; without prompts where it is not finished.

    Nothing is mended: a last line that is cut short may be one that the run is about to complete. It does not count.
    Errors: UserError if it is no run of GReaTer, has no steps, or its files cannot be read."""
    folder = Path(folder)
    config = read_run(folder, task=str, model=str)["config"]
    method = config.get("method", "GReaTer")
    require(method.startswith("GReaTer"), f"{folder} is a run of {method}: only GReaTer takes gradients")
    path = folder / "steps.jsonl"
    require(path.exists(), f"{folder} has no steps.jsonl: the search has not begun")
    steps = whole_steps(path)
    require(len(steps) > 1, f"{folder} has no step behind its start yet")
    prompts = folder / "prompts.jsonl"
    task = own_name(config["task"]) if is_own(config["task"]) else config["task"]
    run = Run(folder, config, task, short_name(config["model"]), method, [], steps)
    run.prompts = read_records(prompts, PROMPT_FIELDS) if prompts.exists() else []
    return run


def whole_steps(path):
    """The steps of a file, without a last line that is cut short."""
    try:
        return read_steps(path)
    except UserError:
        if path.read_bytes().endswith(b"\n"):
            raise
    with tempfile.TemporaryDirectory() as folder:
        return read_steps(shutil.copy(path, folder), growing=True)

"""What stages 2 and 3 print about results: accuracies, paired comparisons, and a verdict in words. Works without torch.

Prompts may be long, so they stand in a list of their own.
"""

from collections import Counter
from dataclasses import dataclass
from statistics import mean

from support.evaluation import (
    READINGS,
    Estimate,
    are_scores,
    bootstrap,
    compare,
    compare_scores,
    estimate,
    has_scores,
    intervals_in,
    tokens_text,
    wilson,
)
from support.reading import canonical
from support.runs import dev_warning, initial_of
from support.tasks import LISTED

LEGEND = """in brackets the 95 % Wilson interval
unread: no answer found behind the extractor; cut: at --max-new-tokens"""
LEGEND_OF_SCORES = """ROUGE-L: mean of the rows' scores, in brackets its 95 % bootstrap interval
unread: nothing was written; cut: at --max-new-tokens"""
SIGNIFICANT = 0.05  # a p-value below it tells a difference from chance


def legend_of(results):
    """What the numbers of `accuracy_table` are."""
    return LEGEND_OF_SCORES if has_scores(results[0]) else LEGEND


def width_of(labels):
    return max(8, *map(len, labels))


def prompt_list(labels, texts):
    """A line for each prompt: its label and its text."""
    width = width_of(labels)
    return "\n".join(f"{label:{width}s}  {text or '(none)'}" for label, text in zip(labels, texts, strict=True))


def accuracy_table(labels, results):
    """A line for each `Result`: in %, the accuracy of both readings, or the mean score of generated texts, unread
    answers, cut reasonings; mean tokens."""
    width = width_of(labels)
    readings = {"paper": "ROUGE-L, %"} if has_scores(results[0]) else {name: f"{name}, %" for name in READINGS}
    heads = "".join(f"  {head:>21s}" for head in readings.values())
    lines = [f"{'':{width}s}{heads}  {'unread':>7s}  {'cut':>7s}  {'tokens':>6s}"]
    for label, result in zip(labels, results, strict=True):
        line = f"{label:{width}s}"
        for reading in readings:
            line += f"  {str(estimate([result], reading)):>21s}"
        line += f"  {100 * result['unread']:5.1f} %  {100 * result['truncated']:5.1f} %"
        lines.append(f"{line}  {tokens_text(result['mean_tokens']):>6s}")
    return "\n".join(lines)


def confusion_table(task, predictions):
    """A line for each possible answer of a task: how often each of them was read where it is the right one (`paper`
    reading), and the accuracy there. The columns are numbered as the lines are; of very many answers there are none.

    predictions: of one prompt, in any order of rows.
    """
    labels = [f"{number} {choice}" for number, choice in enumerate(task.choices, 1)]
    columns = task.choices if len(task.choices) <= LISTED else ()
    head = "right answer, read as" if columns else "right answer"
    width = width_of([head, *labels])
    numbers = "".join(f"{number:5d}" for number in range(1, len(columns) + 1))
    lines = [f"{head:{width}s}{numbers}  unread  {'right, %':>21s}"]
    read = Counter((canonical(task, p["gold"]), canonical(task, p["answer"])) for p in predictions)
    for label, choice in zip(labels, task.choices):
        gold = canonical(task, choice)
        rows = sum(count for (right, _), count in read.items() if right == gold)
        counts = "".join(f"{read[gold, canonical(task, other)]:5d}" for other in columns)
        right = read[gold, gold]
        accuracy = str(Estimate(right / rows, *wilson(right, rows), False)) if rows else "no row"
        lines.append(f"{label:{width}s}{counts}  {read[gold, None]:6d}  {accuracy:>21s}")
    return "\n".join(lines)


def comparison_table(name, labels, predictions):
    """How the last prompt, called `name`, does on the rows of each of the others.

    labels: of the others; predictions: of each of them, then of the last, in the same order of rows.
    """
    *others, last = predictions
    head = f"{name} against"
    width = width_of([head, *labels])
    readings = readings_of(last)
    test = "exact McNemar" if len(readings) > 1 else "sign flips"
    lines = [f"{head:{width}s}  reading   difference  95 % interval     gained  lost  p ({test})"]
    for label, other in zip(labels, others, strict=True):
        for reading, shown in readings.items():
            change = compare_reading(other, last, reading)
            interval = f"{100 * change['low']:+6.1f} to {100 * change['high']:+6.1f}"
            lines.append(
                f"{label:{width}s}  {shown:7s}  {100 * change['difference']:+9.1f} %  {interval}  "
                f"{change['gained']:6d}  {change['lost']:4d}  {p_text(change['p'])}"
            )
    return "\n".join(lines)


def readings_of(predictions):
    """{reading: its name in a table}; the two of a generated text are the same, its score."""
    scores = are_scores(prediction["correct"] for prediction in predictions)
    return {"paper": "ROUGE-L"} if scores else {reading: reading for reading in READINGS}


def compare_reading(first, second, reading):
    """What `compare`, or `compare_scores`, says of two lists of predictions of the same rows, in one reading."""
    field = READINGS[reading] + "correct"
    outcomes = [p[field] for p in first], [p[field] for p in second]
    return compare_scores(*outcomes) if are_scores(outcomes[0]) else compare(*outcomes)


def p_text(p):
    """A p-value in two digits; in more where two would hide on which side of `SIGNIFICANT` it is."""
    text = f"{p:.2g}"
    hides = (float(text) < SIGNIFICANT) != (p < SIGNIFICANT)
    return f"{p:.6f}" if hides else text


# --- What runs came to -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What a run of stage 2 came to."""

    prompts: list[dict]  # the final ones, best first
    results: dict[tuple, dict]  # {(role, split): `Result`} of the roles initial and best
    predictions: list[list]  # of the initial and of the best prompt on the test rows

    @property
    def texts(self):
        return {"initial": initial_of(self.prompts)["prompt"], "best": self.prompts[0]["prompt"]}


def outcome_report(outcome, name):
    """What the initial and the best prompt reached, how they differ on the test rows, and what that means.

    name: what the best prompt is called.
    """
    names, results = {"initial": "initial", "best": name}, outcome.results
    if outcome.texts["initial"] == outcome.texts["best"]:  # said in the verdict
        del names["best"]
    shown = [(role, split) for split in ("dev", "test") for role in names]
    parts = [prompt_list(names.values(), [outcome.texts[role] for role in names])]
    parts.append(accuracy_table([f"{names[role]}, {split}" for role, split in shown], [results[key] for key in shown]))
    dev, test = (results["initial", split]["n"] for split in ("dev", "test"))
    parts.append(f"dev {dev} rows, test {test} rows; {legend_of(list(results.values()))}")
    if "best" in names:
        parts.append(comparison_table(name, ["initial"], outcome.predictions))
    parts.append(verdict(outcome.prompts, compare_reading(*outcome.predictions, "paper")))
    parts += one_answer(outcome.predictions[-1])
    return "\n\n".join(parts)


def one_answer(predictions):
    """A warning, in a list, if a prompt has the same answer read in all rows, though others are right in some."""
    answers, golds = ({prediction[field] for prediction in predictions} for field in ("answer", "gold"))
    if len(answers) > 1 or len(golds) == 1 or None in answers:  # that none is read the table says
        return []
    return [f"Warning: under the best prompt every test row is answered with {answers.pop()!r}, whatever it asks."]


def seeds_report(outcomes, name):
    """What the runs of several seeds came to: each one's best prompt and accuracies (`paper` reading), their means, and
    by how much the best prompts differ from the initial one on the test rows.

    outcomes: {seed: `Outcome`}; name: what a best prompt is called.
    """
    labels = [f"seed {seed}" for seed in outcomes]
    columns = [(role, split) for split in ("dev", "test") for role in ("initial", "best")]
    heads = [f"{name if role == 'best' else role}, {split}" for role, split in columns]
    width = width_of(labels)
    lines = [f"{'':{width}s}" + "".join(f"  {head:>21s}" for head in heads)]
    by_column = {key: [outcome.results[key] for outcome in outcomes.values()] for key in columns}
    for number, label in enumerate(labels):
        cells = [estimate([by_column[key][number]], "paper") for key in columns]
        lines.append(f"{label:{width}s}" + "".join(f"  {cell!s:>21s}" for cell in cells))
    if len(outcomes) > 1:
        means = [estimate(by_column[key], "paper") for key in columns]
        lines.append(f"{'mean':{width}s}" + "".join(f"  {mean!s:>21s}" for mean in means))
    every = [result for results in by_column.values() for result in results]
    lines.append(f"paper reading, %; {intervals_in(every)}")
    texts = [outcome.texts["best"] for outcome in outcomes.values()]
    return "\n\n".join([prompt_list(labels, texts), "\n".join(lines), differences_over_seeds(outcomes, name)])


def differences_over_seeds(outcomes, name):
    """A line for each reading: what the best prompts gain on the initial one, as a mean over the seeds of each row."""
    head = f"{name} against initial, test"
    lines = [f"{head}  difference  95 % interval"]
    (_, last), *_ = [outcome.predictions for outcome in outcomes.values()]
    for reading, shown in readings_of(last).items():
        field = READINGS[reading] + "correct"
        by_row = zip(*(zip(*outcome.predictions) for outcome in outcomes.values()))  # pairs of each seed, for a row
        gains = [mean(best[field] - initial[field] for initial, best in pairs) for pairs in by_row]
        low, high = bootstrap(gains)
        interval = f"{100 * low:+.1f} to {100 * high:+.1f}"
        lines.append(f"{shown:{len(head)}s}  {100 * mean(gains):+8.1f} %  {interval}")
    lines.append("mean over the seeds of each row; the interval is that of other rows under the same prompts")
    return "\n".join(lines)


def row_count(number):
    return "1 row" if number == 1 else f"{number} rows"


def verdict(prompts, comparison):
    """Whether the search helped, in words.

    prompts: the run's final prompts as of `rank_prompts`; comparison: what `compare` says of the initial and the first
    of them on test rows.
    """
    if prompts[0]["prompt"] == initial_of(prompts)["prompt"]:
        return "The best prompt is the initial one: nothing better was found."
    warning = dev_warning(prompts)
    chosen = "chosen" if warning else "best"
    more = comparison["gained"] - comparison["lost"]  # rows right with the chosen prompt than with the initial one
    count, fewer, further = f"{row_count(abs(more))} of {comparison['n']}", " fewer right", " more right"
    if comparison.get("scores"):
        more = comparison["difference"]
        count, fewer, further = f"{100 * abs(more):.1f} points of ROUGE-L", " less", " more"
    p = f"p = {p_text(comparison['p'])}"
    if comparison["p"] < SIGNIFICANT:
        how = "better" if more > 0 else "worse"
        on_test = f"On test the {chosen} prompt is {how} than the initial one by {count}, {p}."
    else:
        count += fewer if more < 0 else further
        on_test = (
            f"On test there is no difference between the {chosen} and the initial prompt that could be told from "
            f"chance: {count}, {p}, not below {SIGNIFICANT}."
        )
    return f"{warning} {on_test}".strip()

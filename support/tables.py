"""What stages 2 and 3 print about results: accuracies, paired comparisons, and a verdict in words. Works without torch.

Prompts may be long, so they stand in a list of their own.
"""

from support.evaluation import READINGS, compare, estimate, tokens_text
from support.runs import dev_warning, initial_of

LEGEND = """in brackets the 95 % Wilson interval
unread: no answer found behind the extractor; cut: at --max-new-tokens"""
SIGNIFICANT = 0.05  # a p-value below it tells a difference from chance


def width_of(labels):
    return max(8, *map(len, labels))


def prompt_list(labels, texts):
    """A line for each prompt: its label and its text."""
    width = width_of(labels)
    return "\n".join(f"{label:{width}s}  {text or '(none)'}" for label, text in zip(labels, texts, strict=True))


def accuracy_table(labels, results):
    """A line for each `Result`: in %, the accuracy of both readings, unread answers, cut reasonings; mean tokens."""
    width = width_of(labels)
    lines = [f"{'':{width}s}  {'paper, %':>21s}  {'harness, %':>21s}  {'unread':>7s}  {'cut':>7s}  {'tokens':>6s}"]
    for label, result in zip(labels, results, strict=True):
        line = f"{label:{width}s}"
        for reading in READINGS:
            line += f"  {str(estimate([result], reading)):>21s}"
        line += f"  {100 * result['unread']:5.1f} %  {100 * result['truncated']:5.1f} %"
        lines.append(f"{line}  {tokens_text(result['mean_tokens']):>6s}")
    return "\n".join(lines)


def comparison_table(name, labels, predictions):
    """How the last prompt, called `name`, does on the rows of each of the others.

    labels: of the others; predictions: of each of them, then of the last, in the same order of rows.
    """
    *others, last = predictions
    head = f"{name} against"
    width = width_of([head, *labels])
    lines = [f"{head:{width}s}  reading   difference  95 % interval     gained  lost  p (exact McNemar)"]
    for label, other in zip(labels, others, strict=True):
        for reading in READINGS:
            change = compare_reading(other, last, reading)
            interval = f"{100 * change['low']:+6.1f} to {100 * change['high']:+6.1f}"
            lines.append(
                f"{label:{width}s}  {reading:7s}  {100 * change['difference']:+9.1f} %  {interval}  "
                f"{change['gained']:6d}  {change['lost']:4d}  {p_text(change['p'])}"
            )
    return "\n".join(lines)


def compare_reading(first, second, reading):
    """What `compare` says of two lists of predictions of the same rows, in one reading."""
    field = READINGS[reading] + "correct"
    return compare([p[field] for p in first], [p[field] for p in second])


def p_text(p):
    """A p-value in two digits; in more where two would hide on which side of `SIGNIFICANT` it is."""
    text = f"{p:.2g}"
    hides = (float(text) < SIGNIFICANT) != (p < SIGNIFICANT)
    return f"{p:.6f}" if hides else text


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
    count = f"{row_count(abs(more))} of {comparison['n']}"
    p = f"p = {p_text(comparison['p'])}"
    if comparison["p"] < SIGNIFICANT:
        how = "better" if more > 0 else "worse"
        on_test = f"On test the {chosen} prompt is {how} than the initial one by {count}, {p}."
    else:
        count += " fewer right" if more < 0 else " more right"
        on_test = (
            f"On test there is no difference between the {chosen} and the initial prompt that could be told from "
            f"chance: {count}, {p}, not below {SIGNIFICANT}."
        )
    return f"{warning} {on_test}".strip()

"""A report on finished runs: tables in the form of the paper's Table 1, and pictures of each search.

    write_report("runs")             # a folder of runs
    write_report("runs/demo-seed0")  # one run

Writes report.md and accuracy.png into the folder, and objective.png, evolution.png and gradient.png into the folder of
each run. Also the table and the picture of prompts moved between models. Works without torch; the files of
a run are only read.
"""

import math
import statistics
from collections import defaultdict
from dataclasses import fields
from pathlib import Path
from urllib.parse import quote

from support.evaluation import READINGS, mean_and_error, percent
from support.pictures import draw_accuracy, draw_run, gradient_points, split_of, transfer_groups
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

"""A report on finished runs: tables in the form of the paper's Table 1, and pictures of each search.

    write_report("runs")             # a folder of runs
    write_report("runs/demo-seed0")  # one run

Writes report.md and accuracy.png into the folder, and objective.png, evolution.png and gradient.png into the folder of
each run. Also the table of prompts moved between models. Works without torch; the files of a run are only read.
"""

import math
import statistics
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path
from urllib.parse import quote

from support.evaluation import READINGS, estimate, has_scores, intervals_in, tokens_text
from support.files import read_jsonl, require
from support.instruments import gradient_points
from support.pictures import draw_accuracy, draw_run, split_of, transfer_groups
from support.runs import changed_parts, dev_warning, load_runs
from support.settings import SearchSettings
from support.tables import comparison_table
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
    if name == "gpt-4":
        return "GPT-4"
    for known in ("Llama-3-8B", "Gemma-2-9B"):
        if known.lower() in name:
            return known
    return None


def paper_main(model, method, column):
    """The number of Table 1 in %, or None. `column` is gsm8k, BBH or folio."""
    if method == "zero-shot chain of thought":
        method = "ZS-CoT"
    numbers = PAPER_TABLE_1.get((paper_model(model), column), ())
    return dict(zip(PAPER_METHODS, numbers)).get(method)


def paper_transfer(task, method, source, target):
    """The number of Table 3 in %, or None."""
    numbers = PAPER_TABLE_3.get((method, paper_model(source), paper_model(target)), ())
    return dict(zip(PAPER_TRANSFER, numbers)).get(task.removeprefix("bbh/"))


# --- Records of the tables ------------------------------------------------------------------------------------

# Where files lie and how much is computed at once; runs that differ in these alone are seeds of one another.
NO_SETTING = {
    "task",
    "model",
    "seed",
    "run_dir",
    "data_dir",
    "source",
    "device",
    "batch_size",
    "gradient_batch_size",
    "preset",  # what it stands for is in the other settings
    "patience",  # it only ends a search
}


FRAME = ("extractor", "template", "kind", "answer_space", "max_new_tokens")  # what a fixed prompt's score depends on


def method_labels(runs):
    """{folder: method}, with the settings behind it where runs of one task, model and method differ in them."""
    groups = defaultdict(list)
    for run in runs:
        groups[run.task, run.model, run.method].append(run)
    labels = {}
    for (task, _, method), group in groups.items():
        usual = usual_settings(task)
        varied = varied_settings([usual | run.config for run in group])  # an older run may lack a setting
        for run in group:
            config = usual | run.config
            unusual = [name for name in varied if config[name] != usual.get(name)]
            settings = ", ".join(f"{name} {config[name]}" for name in unusual)
            labels[run.folder] = f"{method} ({settings})" if settings else method
    return labels


def usual_settings(task):
    """{setting: its default} of a search on a task, given by name."""
    usual = asdict(SearchSettings())
    if task in TASKS:
        usual |= {"initial_prompt": TASKS[task].initial_prompt} | TASKS[task].parts | TASKS[task].defaults
    return usual


def varied_settings(configs):
    """Names, sorted, of the settings that all configurations have and in which they differ."""
    first, *others = configs
    shared = set(first).intersection(*others) - NO_SETTING
    # Compared as text, so that what JSON holds may be a list.
    return sorted(name for name in shared if any(repr(other[name]) != repr(first[name]) for other in others))


def table_records(runs):
    """The test results of all runs, each with task, model, method and seed. A fixed prompt (initial, baseline) is the
    same measurement in every run, so it counts once and has no seed."""
    labels = method_labels(runs)
    fixed, searched = {}, []
    for run in runs:
        for role, name in run.prompts_tried:
            result = run.result(role, "test", name)
            if result is None:
                continue
            record = result | {"task": run.task, "model": run.model, "seed": None}
            if role == "best":
                searched.append(record | {"method": labels[run.folder], "seed": run.config.get("seed")})
                continue
            changed = ", ".join(changed_parts(run.task, run.config))
            method = "initial prompt" if role == "initial" else name
            record["method"] = f"{method} ({changed})" if changed else method
            frame = tuple(run.config.get(setting) for setting in FRAME)
            key = (run.task, run.model, record["method"], record["prompt"], frame)
            if key not in fixed or record["n"] > fixed[key]["n"]:
                fixed[key] = record
    order = ("initial", "baseline", "best")
    return sorted([*fixed.values(), *searched], key=lambda record: (record["model"], order.index(record["role"])))


# --- Tables ---------------------------------------------------------------------------------------------------


def cell(records, reading):
    """The accuracy of one record, "82.6 (80.5 to 84.6), n 1319"; of several "82.6 ± 1.0, 3 seeds, n 1319"; of none
    "-"."""
    if not records:
        return "-"
    sizes = [record["n"] for record in records]
    least, most = min(sizes), max(sizes)
    size = f"n {least}" if least == most else f"n {least}-{most}"
    count = f"{len(records)} {unit_of(records)}, " if len(records) > 1 else ""
    return f"{estimate(records, reading)}, {count}{size}"


def unit_of(records):
    """What several records are: a seed each, runs that share seeds, or fixed prompts, which have no seed."""
    seeds = {record.get("seed") for record in records}
    if seeds == {None}:
        return "prompts"
    return "seeds" if len(seeds) == len(records) else "runs"


def mean_cell(groups, reading):
    """The mean over tasks; its standard error is that of the tasks' own errors, the tasks being given.

    groups: the records of each task.
    """
    if not groups:
        return "-"
    estimates = [estimate(records, reading) for records in groups]
    mean = statistics.mean(task.accuracy for task in estimates)
    error = math.hypot(*(task.error for task in estimates)) / len(groups)
    return f"{100 * mean:.1f} ± {100 * error:.1f}, {len(groups)} of {len(PAPER_BBH)} tasks"


def markdown(rows):
    """Rows of texts as a Markdown table, the first row its head."""
    lines = [markdown_row(row) for row in rows]
    lines.insert(1, "|---" * len(rows[0]) + "|")
    return "\n".join(lines)


def markdown_row(cells):
    texts = [str(text).replace("|", "\\|").replace("\n", " ") for text in cells]
    return f"| {' | '.join(texts)} |"


def results_table(records, reading):
    """Test accuracy in the form of the paper's Table 1: model x method, a column per task, the paper's beside ours."""
    groups = defaultdict(lambda: defaultdict(list))  # {(model, method): {task: records}}
    for record in records:
        groups[record["model"], record["method"]][record["task"]].append(record)
    tasks = {record["task"] for record in records}
    bbh = [task for task in PAPER_BBH if task in tasks]
    table = [["model", "method"], *([model, method] for model, method in groups)]
    for column in table_columns(tasks, bbh):
        head = f"BBH ({len(bbh)} of {len(PAPER_BBH)})" if column == "BBH" else column
        ours, papers = [], []
        for (model, method), by_task in groups.items():
            if column == "BBH":
                ours.append(mean_cell([by_task[task] for task in bbh if task in by_task], reading))
            else:
                ours.append(cell(by_task.get(column), reading))
            papers.append(paper_main(model, method, column))
        add_column(table, head, ours)
        if any(papers):
            beside = ["-" if number is None or own == "-" else number for own, number in zip(ours, papers)]
            add_column(table, "paper", beside)
    return markdown(table)


def table_columns(tasks, bbh):
    """The paper's columns as far as there are results, then the tasks, those of `bbh` first."""
    there = {*tasks, "BBH"} if bbh else tasks
    columns = [column for column in ("gsm8k", "BBH", "folio") if column in there]
    return columns + sorted(tasks - set(columns), key=lambda task: (task not in bbh, task))


def add_column(table, head, cells):
    for row, text in zip(table, [head, *cells], strict=True):
        row.append(text)


def transfer_table(records):
    """Markdown: task x method x source model against the target model, a table for each reading. A record has task,
    method, source, target, n, accuracy, harness_accuracy, and perhaps its split."""
    groups, targets = transfer_groups(records)
    parts = []
    for reading in READINGS:
        table = [["task", "method", "source", *(f"on {target}" for target in targets)]]
        for (task, method, source), by_target in groups.items():
            row = [task, method, source]
            for target in targets:
                number = paper_transfer(task, method, source, target)
                beside = f", paper {number}" if number and target in by_target else ""
                row.append(cell(by_target.get(target), reading) + beside)
            table.append(row)
        title = f"Accuracy on {split_of(records)} rows in %, `{reading}` reading ({intervals_in(records)}):"
        parts.append(f"{title}\n\n{markdown(table)}\n")
    return "\n".join(parts)


# --- The report -----------------------------------------------------------------------------------------------

NOTES = f"""n is the number of test rows; in brackets stands the 95 % Wilson interval of an accuracy. Over several
seeds: the mean of the runs ± one standard error of that mean, from the spread between the runs. An initial or baseline
prompt is the same in every run and counts once. BBH: the mean over those of the paper's {len(PAPER_BBH)} tasks that
were run, ± one standard error, the tasks being given. Columns called paper: Das et al. (ICLR 2025), Table 1, where BBH
is the mean over all {len(PAPER_BBH)}. How the paper read answers is not published, so its numbers stand beside both
readings.

Of a single run: unread is the share of rows where no answer was found behind the extractor, truncated that of
reasonings cut at --max-new-tokens, mean tokens are those of a reasoning. Below its table the best prompt is compared
with the others row by row: difference of the accuracies with its 95 % paired bootstrap interval, rows that only the
best prompt has right (gained) and only the other one (lost), and the p-value of the exact McNemar test.
"""
NOTES_ON_SCORES = """Where texts are generated (--kind generation) the numbers are mean ROUGE-L, each row's the best
over its references, with a 95 % bootstrap interval in brackets. Such a text has one reading, which stands in both
tables. A comparison of two prompts then counts rows with a higher score (gained) and a lower one (lost), and its
p-value is that of the paired permutation test (sign flips).
"""


def run_section(run, pictures, folder):
    """The part of report.md on one run. pictures: paths below the folder that report.md is in."""
    table = [["prompt", "dev, %", "test, %", "test (harness), %", "unread", "truncated", "mean tokens"]]
    texts = []
    for role, name in run.prompts_tried:
        label = name or role
        dev, test = run.result(role, "dev", name), run.result(role, "test", name)
        if test is None:
            continue
        row = [label, cell([dev] if dev else [], "paper"), cell([test], "paper"), cell([test], "harness")]
        row += [f"{100 * test['unread']:.1f} %", f"{100 * test['truncated']:.1f} %", tokens_text(test["mean_tokens"])]
        table.append(row)
        texts.append(f"{label}:\n\n~~~text\n{test['prompt']}\n~~~\n")
    compared = paired_test(run)
    links = []
    for path in pictures:
        link = quote(path.relative_to(folder).as_posix())
        links.append(f"![{path.stem}]({link})\n")
    if run.steps and not gradient_points(run.steps):
        links.append("No gradient.png: no shortlisted candidate has a gradient.\n")
    warning = dev_warning(run.prompts) if run.prompts else ""
    notes = [f"{warning}\n"] if warning else []
    return "\n".join([f"## {run.title} ({run.folder.name})\n", markdown(table), "", *notes, *compared, *texts, *links])


def paired_test(run):
    """Paragraphs: the best prompt against each other one, row by row on test; [] where the texts are not there."""
    found = {}
    for role, name in run.prompts_tried:
        result = run.result(role, "test", name)
        if result is not None:
            found[name or role] = predictions_of(run.folder, result)
    best = found.pop("best", {})
    others = {label: own for label, own in found.items() if own and own.keys() == best.keys()}
    if not others:
        return []
    ids = sorted(best)
    rows = [[own[row_id] for row_id in ids] for own in (*others.values(), best)]
    return [f"~~~text\n{comparison_table('best', others, rows)}\n~~~\n"]


def predictions_of(folder, result):
    """{row's id: prediction} of a `Result`, {} where there is no such file. Nothing is mended: another may write.

    Errors: UserError if the file lacks some of them.
    """
    path = folder / "predictions.jsonl"
    if not path.exists():
        return {}
    records = read_jsonl(path)
    own = (result.get("split"), result.get("prompt_hash"), result.get("evaluation"))
    kept = {}
    for record in records:
        if (record.get("split"), record.get("prompt_hash"), record.get("evaluation")) == own:
            kept[record["id"]] = record
    lacking = f"{path} lacks rows of an evaluation that results.jsonl counts as finished"
    require(len(kept) == result["n"] or "evaluation" not in result, lacking)
    return kept


def write_report(folder):
    """Write FOLDER/report.md, accuracy.png and the pictures of each run. Returns the paths.

    folder: a run's folder, or a folder of runs. Errors: UserError if it holds no finished run or a file cannot be read.
    """
    folder = Path(folder)
    runs, unfinished = load_runs(folder)
    records = table_records(runs)
    written = [folder / "report.md", folder / "accuracy.png"]
    draw_accuracy(records, folder / "accuracy.png")
    sections = []
    for run in runs:
        pictures = draw_run(run)
        written += pictures
        sections.append(run_section(run, pictures, folder))
    parts = [f"# Report on {len(runs)} run{'s' * (len(runs) > 1)}\n"]
    for reading in READINGS:
        parts += [f"## Accuracy on test rows in %, `{reading}` reading\n", results_table(records, reading), ""]
    parts += [NOTES, *([NOTES_ON_SCORES] if any(map(has_scores, records)) else [])]
    parts += ["![accuracy](accuracy.png)\n"]
    if unfinished:
        parts += ["## Unfinished\n", *(f"- {message}" for message in unfinished), ""]
    (folder / "report.md").write_text("\n".join(parts + sections), encoding="utf-8")
    return written

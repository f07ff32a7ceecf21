"""Evaluation of a prompt: one generation, two readings, accuracy with its standard error, paired comparisons.

The model reasons greedily under the prompt. `paper` reading: the extractor is appended, the model writes a short
answer, and that is graded. `harness` reading: lm-evaluation-harness's flexible extraction looks into the reasoning
itself, so that numbers can be compared with published ones. They are two columns, never mixed.

Who generates is an `Answerer`: a model loaded here (`local_answerer`) or one behind a server (server.py). Every
generation is on disk before the next begins, so a killed evaluation goes on where it was; its texts are kept, so it can
be graded again without a model. Nothing here imports torch before a local model answers.
"""

import json
import math
import statistics
import time
from collections import defaultdict
from pathlib import Path

import numpy as np

from support.files import (
    UserError,
    append_jsonl,
    read_appended,
    require,
    require_fields,
    text_hash,
    write_jsonl,
)
from support.tasks import GRADER_VERSION, grade, grade_harness, read_answer, read_answer_harness

# --- Generating and grading ---------------------------------------------------------------------------------


def prediction(task, row, text, reply, tokens, truncated):
    """The record of one row. A reading that fails is null and counts as wrong."""
    return {"id": row["id"], "text": text, "reply": reply, "tokens": tokens, "truncated": truncated} | readings(
        task, row, text, reply
    )


def readings(task, row, text, reply):
    """What of a prediction comes from the grader alone, so that it can be made again without a model."""
    answer, harness = read_answer(task, reply), read_answer_harness(task, row["question"], text)
    return {
        "gold": row["answer"],
        "answer": answer,
        "correct": grade(task, row["answer"], answer),
        "harness_answer": harness,
        "harness_correct": grade_harness(row["answer"], harness),
        "grader_version": GRADER_VERSION,
    }


def evaluate(answerer, task, rows, prompt, settings):
    """Predictions of the prompt's text `prompt` for all rows, in their order; nothing is written."""
    batches = answerer.generate(task, rows, prompt, settings, frozenset())
    found = {row["id"]: prediction(task, row, *rest) for batch in batches for row, *rest in batch}
    return [found[row["id"]] for row in rows]


# --- Evaluations on disk -------------------------------------------------------------------------------------


def evaluation_key(answerer, task, rows, settings):
    """Hash of all that an evaluation's texts depend on besides the prompt and the machine."""
    parts = [task.kind, task.choices, task.extractor, task.template, rows_hash(rows), settings.max_new_tokens]
    return text_hash(json.dumps([*parts, *answerer.identity]))


def rows_hash(rows):
    return text_hash(json.dumps(rows))


def evaluate_once(answerer, task, rows, prompt, settings, run_dir, role, split, name=None):
    """The results record of a prompt on a split; taken from run_dir/results.jsonl if it is there, else evaluated
    and appended there, with its predictions in predictions.jsonl. Its minutes are those of this call alone.

    Errors: UserError if predictions.jsonl holds an unfinished evaluation of the prompt with another model, other rows
    or settings, rows of other data, or another version's grades.
    """
    results, predictions = (Path(run_dir) / f"{file}.jsonl" for file in ("results", "predictions"))
    triple = {
        "split": split,
        "prompt_hash": text_hash(prompt),
        "evaluation": evaluation_key(answerer, task, rows, settings),
    }
    finished = read_results(results)
    require_this_grader(finished, results)
    known = [record for record in finished if triple.items() <= record.items()]
    for record in known:
        if (record["role"], record.get("name")) == (role, name):
            return record
    labels = {"role": role} | ({"name": name} if name else {})
    if known:
        record = {key: value for key, value in known[0].items() if key != "name"} | labels
    else:
        started = time.perf_counter()
        new = resumed(answerer, task, rows, prompt, settings, predictions, triple, finished)
        record = labels | {"task": task.name, "model": answerer.name, "endpoint": answerer.endpoint} | triple
        record |= {"rows": rows_hash(rows), "prompt": prompt, "max_new_tokens": settings.max_new_tokens}
        record |= summarize(new) | {"minutes": (time.perf_counter() - started) / 60}
    append_jsonl(results, record)
    return record


def resumed(answerer, task, rows, prompt, settings, path, triple, finished):
    """Predictions in the rows' order: those in the file at `path`, and the missing ones, appended to it."""
    from tqdm import tqdm

    whole = {tuple(record[key] for key in triple) for record in finished}
    kept = {}
    for p in read_kept(path):
        own = tuple(p[key] for key in triple)
        if own == tuple(triple.values()):
            require(p["id"] not in kept, f"{path}: two predictions of row {p['id']} for one prompt; remove one")
            kept[p["id"]] = p
        elif own not in whole and own[:2] == (triple["split"], triple["prompt_hash"]):
            raise UserError(
                f"{path} holds an unfinished evaluation of {prompt!r} on {triple['split']} with another model, other "
                "rows or settings: finish it with those, remove its lines, or choose another --run-dir"
            )
    strangers = kept.keys() - {row["id"] for row in rows}
    require(not strangers, f"{path}: {min(strangers, default='')} is no row of {task.name}'s {triple['split']} split")
    require_this_grader(kept.values(), path)
    with tqdm(total=len(rows), initial=len(kept), unit="row", desc=triple["split"], leave=False) as bar:
        for batch in answerer.generate(task, rows, prompt, settings, frozenset(kept)):
            new = [triple | prediction(task, row, *rest) for row, *rest in batch]
            append_jsonl(path, *new)
            kept |= {p["id"]: p for p in new}
            bar.set_postfix(accuracy=f"{100 * sum(p['correct'] for p in kept.values()) / len(kept):.1f} %")
            bar.update(len(new))
    return [kept[row["id"]] for row in rows]


def read_results(path):
    texts = "role split prompt_hash evaluation prompt".split()
    numbers = "accuracy stderr harness_accuracy harness_stderr unread truncated mean_tokens minutes".split()
    kinds = dict.fromkeys(texts, str) | dict.fromkeys(numbers, (float, int))
    return require_fields(read_appended(path), path, **kinds, n=int, max_new_tokens=int)


def read_kept(path):
    texts = dict.fromkeys(("split", "prompt_hash", "evaluation", "id", "text", "reply"), str)
    outcomes = dict.fromkeys(("truncated", "correct", "harness_correct"), bool)
    return require_fields(read_appended(path), path, **texts, **outcomes, tokens=int)


def require_this_grader(records, path):
    versions = {record.get("grader_version") for record in records} - {GRADER_VERSION}
    if versions:
        folder = Path(path).parent
        raise UserError(
            f"{path} was graded by another version of the grader: python 03_evaluate.py --run-dir {folder} --regrade"
        )


def read_predictions(run_dir, result, rows):
    """The predictions behind a results record, in the order of `rows`."""
    same = {key: result[key] for key in ("split", "prompt_hash", "evaluation")}.items()
    path = Path(run_dir) / "predictions.jsonl"
    found = {p["id"]: p for p in read_kept(path) if same <= p.items()}
    missing = [row["id"] for row in rows if row["id"] not in found]
    require(not missing, f"{path} lacks row {missing[:1]} of an evaluation that results.jsonl counts as finished")
    return [found[row["id"]] for row in rows]


def regrade(run_dir, task, splits):
    """Read and grade the kept texts of a folder again, with no model. Returns [(old record, new record)].

    Errors: UserError, with nothing written, if a text belongs to no row of the task as it is now.
    """
    results, predictions = (Path(run_dir) / f"{file}.jsonl" for file in ("results", "predictions"))
    require(
        results.exists() and predictions.exists(), f"{run_dir} holds no evaluation: no results or predictions.jsonl"
    )
    rows = {(split, row["id"]): row for split in splits for row in splits[split]}
    groups, graded = defaultdict(list), []
    for number, p in enumerate(read_kept(predictions), 1):
        row = rows.get((p["split"], p["id"]))
        require(row, f"{predictions}, line {number}: {p['id']} is no row of {task.name}'s {p['split']} split")
        graded.append(p | readings(task, row, p["text"], p["reply"]))
        groups[p["split"], p["prompt_hash"], p["evaluation"]].append(graded[-1])
    changes = []
    for number, old in enumerate(read_results(results), 1):
        where = f"{results}, line {number}"
        require(old.get("task") == task.name, f"{where} is of the task {old.get('task')}, not {task.name}")
        own = groups[old["split"], old["prompt_hash"], old["evaluation"]]
        ids = {p["id"] for p in own}
        used = [row for row in splits.get(old["split"], []) if row["id"] in ids]
        found = f"{predictions} has {len(own)} predictions of {len(ids)}"
        require(len(ids) == len(own) == old["n"], f"{where} counts {old['n']} rows, {found}")
        same = rows_hash(used) == old.get("rows")
        require(same, f"{where} was evaluated on other questions or answers of the same ids")
        changes.append((old, old | summarize(own)))
    write_jsonl(predictions, graded)
    write_jsonl(results, [new for _, new in changes])
    return changes


# --- Numbers ----------------------------------------------------------------------------------------------


def summarize(predictions):
    """Accuracy of both readings with standard errors, and how the generations went."""
    n = len(predictions)
    mean, stderr = accuracy([p["correct"] for p in predictions])
    harness, harness_stderr = accuracy([p["harness_correct"] for p in predictions])
    return {
        "n": n,
        "correct": sum(p["correct"] for p in predictions),
        "accuracy": mean,
        "stderr": stderr,
        "harness_accuracy": harness,
        "harness_stderr": harness_stderr,
        "unread": sum(p["answer"] is None for p in predictions) / n,
        "harness_unread": sum(p["harness_answer"] is None for p in predictions) / n,
        "truncated": sum(p["truncated"] for p in predictions) / n,
        "mean_tokens": sum(p["tokens"] for p in predictions) / n,
        "grader_version": GRADER_VERSION,
    }


def accuracy(outcomes):
    """(mean, standard error) of booleans; the standard error is the sample's, sd / sqrt(n)."""
    mean = sum(outcomes) / len(outcomes)
    return mean, (mean * (1 - mean) / max(1, len(outcomes) - 1)) ** 0.5


def compare(first, second, draws=10_000, seed=0):
    """Two lists of booleans, the same rows in the same order: how much more often `second` is right.

    difference of the accuracies with its 95 % paired bootstrap interval (percentiles over `draws` resamples of the
    rows), rows gained and lost, and the p-value of the exact two-sided McNemar test.
    """
    n = len(first)
    gained = sum(b and not a for a, b in zip(first, second, strict=True))
    lost = sum(a and not b for a, b in zip(first, second, strict=True))
    # Of a resample of n rows only the numbers of gains and losses matter, and they are multinomial.
    counts = np.random.default_rng(seed).multinomial(n, [gained / n, lost / n, (n - gained - lost) / n], size=draws)
    low, high = np.percentile((counts[:, 0] - counts[:, 1]) / n, [2.5, 97.5])
    return {
        "n": n,
        "gained": gained,
        "lost": lost,
        "difference": (gained - lost) / n,
        "low": float(low),
        "high": float(high),
        "p": mcnemar(gained, lost),
    }


def mcnemar(gained, lost):
    """Exact two-sided p-value that gains and losses are equally likely: a fair coin's chance of a split so uneven."""
    discordant = gained + lost
    tail = sum(math.comb(discordant, k) for k in range(min(gained, lost) + 1))
    return min(1.0, 2 * tail / 2**discordant)


# --- Results of several runs: a reading's accuracy and its standard error are these fields of a result --------

READINGS = {"paper": ("accuracy", "stderr"), "harness": ("harness_accuracy", "harness_stderr")}


def mean_of_runs(values):
    """(mean, its standard error from the spread between the values, which is 0 for one value)."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return statistics.mean(values), error


def mean_and_error(results, reading):
    """Mean accuracy and its standard error: of one result its own, of several that of their mean."""
    mean, error = READINGS[reading]
    if len(results) == 1:
        return results[0][mean], results[0][error]
    return mean_of_runs([result[mean] for result in results])


def percent(mean, error):
    """Shares in per cent, as text: "82.6 ± 1.0"."""
    return f"{100 * mean:.1f} ± {100 * error:.1f}"

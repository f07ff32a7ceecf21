"""Evaluation of a prompt: one generation, two readings, accuracy with its interval, paired comparisons.

The model reasons greedily under the prompt. `paper` reading: the extractor is appended,
and the answer is what the model writes behind it, or, of a task whose possible answers are known, the likeliest of them
there (--answer-space). `harness` reading: lm-evaluation-harness's flexible extraction looks into the reasoning
itself, so that numbers can be compared with published ones. They are two columns, never mixed.

Who generates is an `Answerer` of answerers.py: a model loaded here or a server. Rows are on disk as they end,
so a killed evaluation goes on with those it lacks; its texts are kept, so it can be graded again without a model. Works
without torch.

A folder with evaluations holds two files, whose fields are those of `Prediction` and `Result`:

    predictions.jsonl   a `Prediction` per evaluation and row, as they come
    results.jsonl       a `Result` per evaluation and role of its prompt

A check in each record (files.py) shows whether one was changed, lost or moved.
"""

import itertools
import json
import math
import statistics
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import NamedTuple, NotRequired, TypedDict

import numpy as np

from support import ranks
from support.files import (
    UserError,
    append_jsonl,
    read_appended,
    read_jsonl,
    require,
    require_fields,
    text_hash,
    write_chained,
)
from support.harness import grade_harness, read_answer_harness
from support.progress import Progress, open_bar
from support.reading import GRADER_VERSION, grade, read_answer
from support.rouge import rouge_l
from support.tasks import GENERATION, Task

# --- Records ------------------------------------------------------------------------------------------------


class Reference(NamedTuple):
    """The fields by which a record says to which evaluation it belongs."""

    split: str  # dev or test
    prompt_hash: str  # `Evaluation.prompt_hash`
    evaluation: str  # `Evaluation.key`


class Prediction(TypedDict):
    """A line of predictions.jsonl: what was written for one row, and how it was read and graded."""

    split: str  # these three: see `Reference`
    prompt_hash: str
    evaluation: str
    id: str  # of the row
    text: str  # the reasoning
    reply: str  # what the model wrote behind the extractor: only its first token where choices were ranked
    choices: NotRequired[dict[str, float]]  # log-probability there of each possible answer, where they were ranked
    tokens: int | None  # of the reasoning; None: a server did not count them
    truncated: bool  # the reasoning was cut at max_new_tokens
    gold: str  # the right answer
    answer: str | None  # `paper` reading: the likeliest choice, or the answer in the reply, None if none was found
    correct: bool | float  # whether that is the right one; of a text that was to be generated its score, 0.0 to 1.0
    harness_answer: str | None  # `harness` reading: the answer in the reasoning, None if none was found
    harness_correct: bool | float  # whether that is the right one; of a generated text as before
    grader_version: int  # of reading.py, that gave the readings and the grades
    row_key: NotRequired[str]  # `Evaluation.key` of the row alone; older files lack it
    answered_in: NotRequired[str]  # the evaluation that it was taken from, where it was not made in this one


class Result(TypedDict):
    """A line of results.jsonl: a prompt's scores on the rows of a split. Shares are of 1, not percent."""

    role: str  # what the prompt is there: initial, candidate, best, baseline, given or transfer
    name: NotRequired[str]  # tells prompts of one role apart
    task: str  # its name
    model: str  # the answerer's name in tables
    endpoint: str  # of the server that answered; empty: a model loaded here
    split: str  # these three: see `Reference`
    prompt_hash: str
    evaluation: str
    extractor: NotRequired[str]  # how the answer was asked for and read; an older record does not say these three
    kind: NotRequired[str]
    answer_space: NotRequired[str]  # choices: ranked; vocabulary: what was written is read
    rows: str  # hash of the rows, ids, questions and answers
    prompt: str  # its text
    max_new_tokens: int  # the limit of the reasoning
    n: int  # rows
    correct: int | float  # rows answered right, `paper` reading; of generated texts the sum of their scores
    accuracy: float  # `paper` reading: share of right answers; of generated texts (kind) their mean score
    stderr: float  # of the accuracy
    low: NotRequired[float]  # ends of its 95 % interval, see `accuracy_fields`; older files lack them
    high: NotRequired[float]
    harness_accuracy: float  # the same four of the `harness` reading
    harness_stderr: float
    harness_low: NotRequired[float]
    harness_high: NotRequired[float]
    unread: float  # share of rows where no answer was found, `paper` reading
    harness_unread: float  # the same of the `harness` reading
    truncated: float  # share of reasonings that were cut at max_new_tokens
    mean_tokens: float | None  # of a reasoning; None: a server did not count those of each row
    grader_version: int
    minutes: float  # of the call that finished the evaluation


def reference_of(record):
    """The `Reference` of a `Prediction` or a `Result`."""
    return Reference(record["split"], record["prompt_hash"], record["evaluation"])


MANY = 8  # reasonings from which on it is said that all of them are cut
ALL_CUT = (
    "note: the first {made} reasonings are all cut at --max-new-tokens {limit}: raise it, or ask for shorter ones; "
    "or the model's end token never comes (generation_config.json names it: eos_token_id)"
)

# --- Generating and grading ---------------------------------------------------------------------------------


class Generation(NamedTuple):
    """What an `Answerer` wrote for one row."""

    row: dict
    text: str  # the reasoning
    reply: str  # behind the extractor
    tokens: int | None  # of the reasoning; None: a server did not count them
    truncated: bool  # the reasoning was cut at max_new_tokens
    choices: dict[str, float] | None = None  # log-probability of each possible answer; None: they were not ranked


@dataclass(frozen=True)
class Sampling:
    """How an optimizer's texts are drawn."""

    samples: int  # texts for each chat
    temperature: float  # 0: the likeliest token each time
    max_tokens: int
    seed: str  # the same seed, chats and machine give the same texts


@dataclass(frozen=True)
class Written:
    """A text that an optimizer wrote. Of a server that counts no tokens their numbers are None."""

    text: str
    tokens: int | None
    prompt_tokens: int | None  # of the chat, and of a chat's first sample only: it is read once for all
    truncated: bool = False  # cut at max_tokens


def graded(task, generation):
    """The `Prediction` of one `Generation`, without its reference. A reading that fails is None and counts as wrong."""
    written = generation._asdict()
    row, choices = written.pop("row"), written.pop("choices")
    written = {"id": row["id"]} | written | ({"choices": choices} if choices else {})
    return written | readings(task, row, written)


def readings(task, row, written):
    """What of a prediction comes from the grader alone, so that it can be made again without a model. `written`: the
    fields text, reply and choices of a `Prediction`."""
    if task.is_generation:  # there is one reading: all that was written
        answer = written["text"].strip() or None
        score = rouge_l(row.get("references", [row["answer"]]), answer or "")
        both = {"answer": answer, "correct": score, "harness_answer": answer, "harness_correct": score}
        return {"gold": row["answer"]} | both | {"grader_version": GRADER_VERSION}
    choices = written.get("choices")
    answer = max(choices, key=choices.get) if choices else read_answer(task, written["reply"])
    harness_answer = read_answer_harness(task, row["question"], written["text"])
    return {
        "gold": row["answer"],
        "answer": answer,
        "correct": grade(task, row["answer"], answer),
        "harness_answer": harness_answer,
        "harness_correct": grade_harness(row["answer"], harness_answer),
        "grader_version": GRADER_VERSION,
    }


def evaluate(answerer, task, rows, prompt, settings):
    """Predictions of the prompt's text `prompt` for all rows, in their order; nothing is written."""
    found = {}
    for batch in answerer.generate(task, rows, prompt, settings, frozenset()):
        for generation in batch:
            prediction = graded(task, generation)
            found[prediction["id"]] = prediction
    return [found[row["id"]] for row in rows]


# --- Evaluations on disk -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Evaluation:
    """One prompt on some rows of a split, answered by one model."""

    answerer: object  # an `Answerer`
    task: Task
    split: str  # dev or test
    rows: list[dict]  # of that split
    prompt: str  # its text
    settings: object  # `GenerationSettings`

    @property
    def prompt_hash(self):
        return text_hash(self.prompt)

    @property
    def ranked(self):
        """Whether the answer is the likeliest of the possible ones, not what is written."""
        return self.task.ranks_choices and self.answerer.gives_log_probs

    @property
    def key(self):
        """Hash of all that the texts depend on besides the prompt and the machine."""
        return self.key_of(self.rows)

    @property
    def row_keys(self):
        """{row's id: the key of an evaluation of that row alone}: where it is the same, so is what is asked."""
        return {row["id"]: self.key_of([row]) for row in self.rows}

    def key_of(self, rows):
        parts = [
            self.task.kind,
            self.task.choices,
            self.task.extractor,
            self.task.template,
            rows_hash(rows),
            self.settings.max_new_tokens,
        ]
        parts += [self.task.system] if self.task.system else []
        parts += ["ranked"] if self.ranked else []  # what was written is kept under the key it always had
        return text_hash(json.dumps(parts + list(self.answerer.identity)))

    @property
    def reference(self):
        return Reference(self.split, self.prompt_hash, self.key)


def rows_hash(rows):
    return text_hash(json.dumps(rows))


def evaluate_once(evaluation, run_dir, role, name=None, elsewhere=()):
    """The `Result` of an `Evaluation`, whose prompt has this role, and this name if there are more of the role.

    Taken from run_dir/results.jsonl if it is there, else evaluated and appended there, with its predictions in
    predictions.jsonl. Rows that the same model answered under the same prompt and settings, there or in the folders
    `elsewhere`, are not generated again. Its minutes are those of this call alone.

    Errors: UserError if predictions.jsonl holds an unfinished evaluation of the prompt with another model, other rows
    or settings, rows of other data, or another version's grades.
    """
    results_path = Path(run_dir) / "results.jsonl"
    results = read_results(results_path)
    require_this_grader(results, results_path)
    reference = evaluation.reference
    known = [result for result in results if reference_of(result) == reference]
    for result in known:
        if result["role"] == role and result.get("name") == name:
            return result
    labels = {"role": role}
    if name:
        labels["name"] = name
    if known:  # under another role or name
        result = {field: value for field, value in known[0].items() if field != "name"} | labels
    else:
        result = labels | run_evaluation(evaluation, Path(run_dir) / "predictions.jsonl", results, elsewhere)
    append_jsonl(results_path, result)
    return result


def run_evaluation(evaluation, path, results, elsewhere=()):
    """The `Result` of an evaluation that is not in `results`, without the prompt's role and name. Its predictions are
    taken from the file at `path`, or from other evaluations there and in the folders `elsewhere`; the missing ones are
    made and appended."""
    started = time.perf_counter()
    kept = kept_predictions(evaluation, path, results)
    if all("answered_in" in prediction for prediction in kept.values()):  # none was made yet
        paths = [path, *(Path(folder) / path.name for folder in elsewhere)]
        taken = ranks.first(lambda: answered_before(evaluation, paths))  # others may write there meanwhile
        taken = [prediction for prediction in taken if prediction["id"] not in kept]
        if taken:
            append_jsonl(path, *taken)
            kept |= {prediction["id"]: prediction for prediction in taken}
    predictions = add_missing(evaluation, path, kept)
    head = {
        "task": evaluation.task.name,
        "model": evaluation.answerer.name,
        "endpoint": evaluation.answerer.endpoint,
        **evaluation.reference._asdict(),
        "extractor": evaluation.task.extractor,
        "kind": evaluation.task.kind,
        "answer_space": "choices" if evaluation.ranked else "vocabulary",
        "rows": rows_hash(evaluation.rows),
        "prompt": evaluation.prompt,
        "max_new_tokens": evaluation.settings.max_new_tokens,
    }
    return head | summarize(predictions) | {"minutes": (time.perf_counter() - started) / 60}


def rename_former_best(run_dir, best):
    """Of the results of the role best, those of another prompt than `best` become a candidate's: a run that was
    continued has one best prompt, and what was evaluated stays."""
    path, kept = Path(run_dir) / "results.jsonl", []
    results = read_results(path)
    for result in results:
        if result["role"] == "best" and result["prompt"] != best:
            result = result | {"role": "candidate"}
            if any((reference_of(one), one["role"]) == (reference_of(result), "candidate") for one in results):
                continue
        kept.append(result)
    if kept != results:
        write_chained(path, kept)


def kept_predictions(evaluation, path, results):
    """{row's id: `Prediction`} that the file at `path` holds of the evaluation; `results`: the finished ones.

    Errors: UserError, as `evaluate_once` says.
    """
    own = evaluation.reference
    finished = {reference_of(result) for result in results}
    predictions = read_all_predictions(path)
    predictions = [p for p in predictions if (p["split"], p["prompt_hash"]) == (own.split, own.prompt_hash)]
    # A row of an unfinished evaluation is not lost where it counts in this one, or in a finished one.
    used = {p.get("row_key") for p in predictions if reference_of(p) in finished}
    used = used.union(evaluation.row_keys.values()) - {None}
    kept = {}
    for prediction in predictions:
        reference = reference_of(prediction)
        if reference == own:
            row_id = prediction["id"]
            require(row_id not in kept, f"{path}: two predictions of row {row_id} for one prompt; remove one")
            kept[row_id] = prediction
        elif reference not in finished and prediction.get("row_key") not in used:
            raise UserError(
                f"{path} holds an unfinished evaluation of {evaluation.prompt!r} on {own.split} with another model, "
                "other rows or settings: finish it with those, remove its lines, or choose another --run-dir"
            )
    strangers = kept.keys() - {row["id"] for row in evaluation.rows}
    if strangers:
        raise UserError(f"{path}: {min(strangers)} is no row of {evaluation.task.name}'s {evaluation.split} split")
    require_this_grader(kept.values(), path)
    return kept


def answered_before(evaluation, paths):
    """Predictions, with the evaluation's reference, of those of its rows that other evaluations in the files at `paths`
    asked the same model with the same prompt and settings. Their texts are read and graded again, as they are now."""
    reference, rows = evaluation.reference, {row["id"]: row for row in evaluation.rows}
    keys, found, older = evaluation.row_keys, {}, defaultdict(dict)
    for path in paths:
        for prediction in read_all_predictions(path, growing=False):
            same = (prediction["split"], prediction["prompt_hash"]) == (reference.split, reference.prompt_hash)
            if not same or prediction["id"] not in rows:
                continue
            if prediction.get("row_key") == keys[prediction["id"]]:
                found.setdefault(prediction["id"], prediction)
            elif "row_key" not in prediction:
                older[path, prediction["evaluation"]][prediction["id"]] = prediction
    # Without keys of rows: an evaluation all of whose rows are among these, which the key of it shows.
    for (_, key), predictions in older.items():
        if evaluation.key_of([row for row in evaluation.rows if row["id"] in predictions]) == key:
            found = predictions | found
    taken = []
    for row_id in (row_id for row_id in rows if row_id in found):
        other = found[row_id] | {"row_key": keys[row_id], "answered_in": found[row_id]["evaluation"]}
        taken.append(other | reference._asdict() | readings(evaluation.task, rows[row_id], other))
    return taken


def add_missing(evaluation, path, kept):
    """Predictions of all rows, in their order: those in `kept`, and the missing ones, made now and appended at `path`,
    as they come.

    The bar shows no accuracy: rows that are quick to answer come first, and are not right as often as the others.
    """
    task, rows = evaluation.task, evaluation.rows
    reference, row_keys = evaluation.reference._asdict(), evaluation.row_keys
    found = dict(kept)
    # What was taken from elsewhere is in no batch: all of a batch is generated where one of its rows is missing.
    asked = [row for row in rows if "answered_in" not in kept.get(row["id"], {})]
    groups = ()
    if len(kept) < len(rows):
        groups = evaluation.answerer.generate(task, asked, evaluation.prompt, evaluation.settings, frozenset(kept))
    progress = evaluation.answerer.progress or Progress()
    # The time that remains follows from all rows alike (smoothing 0), since they end many at once.
    look = {"unit": "row", "desc": evaluation.split, "leave": False, "smoothing": 0}
    enough, made, cut = min(MANY, len(rows) - len(kept)), 0, 0
    with open_bar(progress, total=len(rows), initial=len(kept), **look) as bar:
        for group in groups:
            predictions = [
                reference | graded(task, generation) | {"row_key": row_keys[generation.row["id"]]}
                for generation in group
            ]
            append_jsonl(path, *predictions)
            before, made = made, made + len(predictions)
            cut += sum(prediction["truncated"] for prediction in predictions)
            if before < enough <= made == cut:  # those that end by themselves come first
                limit = evaluation.settings.max_new_tokens
                bar.write(ALL_CUT.format(made=made, limit=limit), file=sys.stderr)
            for prediction in predictions:
                found[prediction["id"]] = prediction
            if evaluation.answerer.progress is None:  # a server's tokens are known when its reply has come
                progress.tokens += sum(prediction["tokens"] or 0 for prediction in predictions)
            bar.update(len(predictions))
    return [found[row["id"]] for row in rows]


# --- Reading the files, and grading their texts again ----------------------------------------------------------


def read_results(path):
    """All results of the file at `path`, [] if there is none. Errors: UserError that names a line without a field."""
    texts = ("role", *Reference._fields, "prompt")
    numbers = (
        "accuracy",
        "stderr",
        "harness_accuracy",
        "harness_stderr",
        "unread",
        "truncated",
        "minutes",
    )
    kinds = dict.fromkeys(texts, str) | dict.fromkeys(numbers, (float, int)) | {"n": int, "max_new_tokens": int}
    kinds["mean_tokens"] = (float, int, NoneType)
    return require_fields(read_appended(path), path, **kinds)


def read_all_predictions(path, growing=True):
    """The predictions of all evaluations in the file at `path`, [] if there is none. Errors: as `read_results`.

    growing: as of `runs.read_steps`: the file is the caller's own to append to, so it is mended.
    """
    texts = (*Reference._fields, "id", "text", "reply")
    outcomes = ("correct", "harness_correct")  # true or false, or a score
    kinds = dict.fromkeys(texts, str) | dict.fromkeys(outcomes, (bool, float))
    kinds |= {"truncated": bool, "tokens": (int, NoneType)}
    records = read_appended(path) if growing or not Path(path).exists() else read_jsonl(path)
    return require_fields(records, path, **kinds)


def read_predictions(run_dir, result, rows):
    """The predictions behind a `Result`, in the order of `rows`. Errors: UserError if one is missing."""
    path = Path(run_dir) / "predictions.jsonl"
    found = {}
    for prediction in read_all_predictions(path):
        if reference_of(prediction) == reference_of(result):
            found[prediction["id"]] = prediction
    missing = [row["id"] for row in rows if row["id"] not in found]
    lacks = f"{path} lacks row {missing[:1]} of an evaluation that results.jsonl counts as finished"
    require(not missing, f"{lacks}: remove both files, which are then made again, or choose another folder")
    return [found[row["id"]] for row in rows]


def require_this_grader(records, path):
    """Errors: UserError if another version of the grader graded one of the records in the file at `path`."""
    if any(record.get("grader_version") != GRADER_VERSION for record in records):
        folder = Path(path).parent
        raise UserError(
            f"{path} was graded by another version of the grader: python 03_evaluate.py --run-dir {folder} --regrade"
        )


def regrade(run_dir, task, splits):
    """Read and grade the kept texts of a folder again, with no model. Returns [(old `Result`, new `Result`)].

    Errors: UserError, with nothing written, if a text belongs to no row of the task as it is now.
    """
    results_path = Path(run_dir) / "results.jsonl"
    predictions_path = Path(run_dir) / "predictions.jsonl"
    both = results_path.exists() and predictions_path.exists()
    require(both, f"{run_dir} holds no evaluation: no results or predictions.jsonl")
    predictions = graded_again(predictions_path, task, splits)
    by_evaluation = defaultdict(list)
    for prediction in predictions:
        by_evaluation[reference_of(prediction)].append(prediction)
    changes = []
    for number, old in enumerate(read_results(results_path), 1):
        where = f"{results_path}, line {number}"
        require(old.get("task") == task.name, f"{where} is of the task {old.get('task')}, not {task.name}")
        kind = old.get("kind", task.kind)
        require(kind == task.kind, f"{where} was read as --kind {kind}, not {task.kind}: keep the two in folders apart")
        own = by_evaluation[reference_of(old)]
        ids = {prediction["id"] for prediction in own}
        found = f"{predictions_path} has {len(own)} predictions of {len(ids)}"
        require(len(ids) == len(own) == old["n"], f"{where} counts {old['n']} rows, {found}")
        rows = [row for row in splits.get(old["split"], []) if row["id"] in ids]
        same = rows_hash(rows) == old.get("rows")
        require(same, f"{where} was evaluated on other questions or answers of the same ids")
        changes.append((old, old | summarize(own)))
    write_chained(predictions_path, predictions)
    write_chained(results_path, [new for _, new in changes])
    return changes


def graded_again(path, task, splits):
    """The predictions of the file at `path`, read and graded by the present grader; nothing is written.

    Errors: UserError that names the line whose row the task does not have.
    """
    rows = {(split, row["id"]): row for split in splits for row in splits[split]}
    predictions = []
    for number, old in enumerate(read_all_predictions(path), 1):
        row = rows.get((old["split"], old["id"]))
        require(row, f"{path}, line {number}: {old['id']} is no row of {task.name}'s {old['split']} split")
        predictions.append(old | readings(task, row, old))
    return predictions


# --- Numbers ----------------------------------------------------------------------------------------------

READINGS = {"paper": "", "harness": "harness_"}  # what the names of a reading's fields begin with
Z = statistics.NormalDist().inv_cdf(0.975)  # 1.96: between -Z and Z lie 95 % of a standard normal distribution


def summarize(predictions):
    """Accuracy of both readings with standard errors and intervals, and how the generations went."""
    n = len(predictions)
    return {
        "n": n,
        "correct": sum(p["correct"] for p in predictions),
        **accuracy_fields([p["correct"] for p in predictions], "paper"),
        **accuracy_fields([p["harness_correct"] for p in predictions], "harness"),
        "unread": sum(p["answer"] is None for p in predictions) / n,
        "harness_unread": sum(p["harness_answer"] is None for p in predictions) / n,
        "truncated": sum(p["truncated"] for p in predictions) / n,
        "mean_tokens": mean_or_none([p["tokens"] for p in predictions]),
        "grader_version": GRADER_VERSION,
    }


def mean_or_none(counts):
    """The mean; None if one of them is None: the mean of the others would be another number."""
    return None if None in counts else sum(counts) / len(counts)


def tokens_text(mean_tokens):
    """The mean length of a reasoning as tables show it: "n/a" where it is not known."""
    return "n/a" if mean_tokens is None else f"{mean_tokens:.1f}"


def are_scores(outcomes):
    """Whether the outcomes of rows are scores from 0.0 to 1.0, not right or wrong."""
    return any(isinstance(outcome, float) for outcome in outcomes)


def accuracy_fields(outcomes, reading):
    """The fields of a `Result` on the accuracy of a reading: of booleans with the `wilson` interval, of scores with the
    `bootstrap` interval of their mean."""
    if are_scores(outcomes):
        mean, stderr = mean_score(outcomes)
        low, high = bootstrap(outcomes)
    else:
        mean, stderr = accuracy(outcomes)
        low, high = wilson(sum(outcomes), len(outcomes))
    numbers = {"accuracy": mean, "stderr": stderr, "low": low, "high": high}
    return {READINGS[reading] + name: number for name, number in numbers.items()}


def accuracy(outcomes):
    """(mean, standard error) of booleans; the standard error is the sample's, sd / sqrt(n)."""
    mean = sum(outcomes) / len(outcomes)
    return mean, (mean * (1 - mean) / max(1, len(outcomes) - 1)) ** 0.5


def mean_score(scores):
    """(mean, standard error) of scores; of one score the error is 0, as there is nothing to estimate it from."""
    return statistics.fmean(scores), (statistics.stdev(scores) / len(scores) ** 0.5 if len(scores) > 1 else 0.0)


DRAWS = 10_000  # resamples of the rows
BLOCK = 100  # of them at once: faster than one by one, and small in memory


def bootstrap(values):
    """(low, high): the 95 % bootstrap interval of a mean, percentiles over `DRAWS` resamples, the same each time and in
    whatever order the values are.

    On few rows it is somewhat too narrow, and it has no width where all values are the same.
    """
    rng, values = np.random.default_rng(0), np.sort(values)
    means = [rng.choice(values, (BLOCK, len(values))).mean(1) for _ in range(DRAWS // BLOCK)]
    low, high = np.percentile(means, [2.5, 97.5])
    mean = values.mean()  # which rounding must not leave outside
    return float(min(low, mean)), float(max(high, mean))


def wilson(correct, n):
    """(low, high): the 95 % Wilson score interval of a share, `correct` of `n` rows, n at least 1.

    It holds each true share from which the one seen is at most `Z` standard errors away. Unlike the standard error of
    the share seen it has a width where none or all of the rows are right.
    """
    share, shrink = correct / n, 1 + Z**2 / n
    middle = (share + Z**2 / (2 * n)) / shrink
    half = Z * math.sqrt(share * (1 - share) / n + (Z / (2 * n)) ** 2) / shrink
    # Exactly 0 and 1 at the ends, where rounding would leave a little more or less.
    return min(share, max(0.0, middle - half)), max(share, min(1.0, middle + half))


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


def compare_scores(first, second):
    """Two lists of scores, the same rows in the same order: what `compare` says, as far as scores allow.

    difference of the means with its 95 % paired bootstrap interval, rows with a higher (gained) and a lower score
    (lost), and the two-sided p-value of the permutation test of the mean difference, see `sign_flips`.
    """
    differences = np.array([after - before for before, after in zip(first, second, strict=True)])
    low, high = bootstrap(differences)
    return {
        "n": len(differences),
        "gained": int((differences > 0).sum()),
        "lost": int((differences < 0).sum()),
        "difference": float(differences.mean()),
        "low": low,
        "high": high,
        "p": sign_flips(differences),
        "scores": True,
    }


def sign_flips(differences):
    """The two-sided p-value of the permutation test of paired differences: the share of choices of their signs whose
    sum is at least as far from 0 as the one seen. Of few differences all choices count, else `DRAWS` random ones, the
    same each time, and the one seen."""
    sizes = np.sort(np.abs(differences[differences != 0]))
    seen = abs(differences.sum()) - 1e-9  # what rounding may take from an equal sum
    if 2 ** len(sizes) <= DRAWS:
        sums = np.array(list(itertools.product((-1, 1), repeat=len(sizes)))) @ sizes
        return float((abs(sums) >= seen).mean())
    rng, far = np.random.default_rng(0), 0
    for _ in range(DRAWS // BLOCK):
        far += (abs(rng.choice((-1, 1), (BLOCK, len(sizes))) @ sizes) >= seen).sum()
    return float((1 + far) / (1 + DRAWS))


def mcnemar(gained, lost):
    """Exact two-sided p-value that gains and losses are equally likely: a fair coin's chance of a split so uneven."""
    discordant = gained + lost
    tail = sum(math.comb(discordant, k) for k in range(min(gained, lost) + 1))
    return min(1.0, 2 * tail / 2**discordant)


# --- The accuracy of one result or of several runs ---------------------------------------------------------------


class Estimate(NamedTuple):
    """An accuracy, and how sure it is.

    As text, in per cent: "82.6 (80.5 to 84.6)" of one result, "82.6 ± 1.0" of the mean of several.
    """

    accuracy: float
    low: float  # of one result the ends of its 95 % interval; of several their mean, one standard error less
    high: float  # or more
    several: bool

    @property
    def error(self):
        """The standard error; of one result that of a normal distribution whose 95 % interval is as wide."""
        return (self.high - self.low) / 2 / (1 if self.several else Z)

    def __str__(self):
        if self.several:
            return f"{100 * self.accuracy:.1f} ± {error_text(self.error)}"
        return f"{100 * self.accuracy:.1f} ({100 * self.low:.1f} to {100 * self.high:.1f})"


# What the two forms of an `Estimate` are, for the titles of tables and pictures.
INTERVALS = "in brackets the 95 % Wilson interval; ± one standard error of the mean of several runs"
OF_SCORES = "of generated texts the mean ROUGE-L, with its 95 % bootstrap interval"


def has_scores(result):
    """Whether the accuracy in a `Result` is a mean of scores."""
    return result.get("kind") == GENERATION


def intervals_in(results):
    """`INTERVALS`, with `OF_SCORES` where that is among the results."""
    return f"{INTERVALS}; {OF_SCORES}" if any(map(has_scores, results)) else INTERVALS


def estimate(results, reading):
    """The `Estimate` of one `Result` or of the mean of several runs' results. Older results do, too."""
    shares = [result[READINGS[reading] + "accuracy"] for result in results]
    if len(shares) == 1 and has_scores(results[0]):
        return Estimate(shares[0], *(results[0][READINGS[reading] + end] for end in ("low", "high")), False)
    if len(shares) == 1:
        n = results[0]["n"]
        return Estimate(shares[0], *wilson(round(shares[0] * n), n), False)
    mean, error = mean_of_runs(shares)
    return Estimate(mean, mean - error, mean + error, True)


def mean_of_runs(values):
    """(mean, its standard error from the spread between the values); one value has no spread: not a number."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else math.nan
    return statistics.mean(values), error


def error_text(error):
    """A standard error in per cent: "1.0"; "n/a" where there is none."""
    return "n/a" if math.isnan(error) else f"{100 * error:.1f}"

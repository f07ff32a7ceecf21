"""Evaluation of a prompt: one generation, two readings, accuracy with its standard error.

The model reasons greedily under the prompt. `paper` reading: the extractor is appended, the model writes a short
answer, and that is graded. `harness` reading: lm-evaluation-harness's flexible extraction looks into the reasoning
itself, so that numbers can be compared with published ones. They are two columns, never mixed.
"""

import json
import time
from pathlib import Path

from greater_core import answer_ids, encode_in_place, generate_greedily
from tasks import (
    GRADER_VERSION,
    append_jsonl,
    grade,
    grade_harness,
    read_answer,
    read_answer_harness,
    read_appended,
    text_hash,
    write_jsonl,
)


def evaluate(model, tokenizer, task, rows, prompt, settings):
    """One prediction record per data row, for the prompt's text `prompt`.

    The model reasons greedily; then the extractor is appended and the model writes a short answer (`paper`
    reading); the `harness` reading looks into the reasoning alone. A reading that fails is null and counts as wrong.
    """
    contexts, extractors = [], []
    for row in rows:
        contexts.append(sum(encode_in_place(tokenizer, task, row["question"], prompt), []))
        extractors.append(answer_ids(tokenizer, task, row["answer"])[0])
    reasoning = generate_greedily(model, contexts, settings.max_new_tokens, settings.batch_size)
    asked = [context + ids + extractor for context, (ids, _), extractor in zip(contexts, reasoning, extractors)]
    replies = generate_greedily(model, asked, settings.answer_tokens(task), settings.batch_size)
    predictions = []
    for row, (ids, stopped), (reply_ids, _) in zip(rows, reasoning, replies):
        text, reply = (tokenizer.decode(part, skip_special_tokens=True) for part in (ids, reply_ids))
        answer, harness = read_answer(task, reply), read_answer_harness(task, row["question"], text)
        predictions.append(
            {
                "id": row["id"],
                "text": text,
                "reply": reply,
                "answer": answer,
                "gold": row["answer"],
                "correct": grade(task, row["answer"], answer),
                "harness_answer": harness,
                "harness_correct": grade_harness(row["answer"], harness),
                "tokens": len(ids),
                "truncated": not stopped,
            }
        )
    return predictions


def evaluation_key(task, rows, settings, model_hash, dtype):
    """Hash of all that an evaluation's numbers depend on besides the prompt and the machine."""
    parts = [task.kind, task.choices, task.extractor, task.template, rows, settings.max_new_tokens]
    return text_hash(json.dumps([*parts, model_hash, str(dtype), GRADER_VERSION]))


def evaluate_once(model, tokenizer, task, rows, prompt, settings, run_dir, role, split, model_hash):
    """The results record of a prompt on a split; taken from run_dir/results.jsonl if it is there, else evaluated
    and appended there, with its predictions in predictions.jsonl."""
    results, predictions = (Path(run_dir) / f"{name}.jsonl" for name in ("results", "predictions"))
    same = {
        "split": split,
        "prompt_hash": text_hash(prompt),
        "evaluation": evaluation_key(task, rows, settings, model_hash, model.dtype),
    }
    known = [record for record in read_appended(results) if same.items() <= record.items()]
    for record in known:
        if record["role"] == role:
            return record
    if known:
        record = known[0] | {"role": role}
    else:
        others = [p for p in read_appended(predictions) if not same.items() <= p.items()]  # none of a killed try
        started = time.perf_counter()
        new = evaluate(model, tokenizer, task, rows, prompt, settings)
        write_jsonl(predictions, [*others, *(same | prediction for prediction in new)])
        record = {"role": role, **same, "prompt": prompt}
        record |= summarize(new, settings.max_new_tokens, time.perf_counter() - started)
    append_jsonl(results, record)
    return record


def summarize(predictions, max_new_tokens, seconds):
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
        "truncated": sum(p["truncated"] for p in predictions) / n,
        "mean_tokens": sum(p["tokens"] for p in predictions) / n,
        "max_new_tokens": max_new_tokens,
        "grader_version": GRADER_VERSION,
        "minutes": seconds / 60,
    }


def accuracy(outcomes):
    """(mean, standard error) of booleans; the standard error is the sample's, sd / sqrt(n)."""
    mean = sum(outcomes) / len(outcomes)
    return mean, (mean * (1 - mean) / max(1, len(outcomes) - 1)) ** 0.5

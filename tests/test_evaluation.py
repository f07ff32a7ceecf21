"""Evaluation: two readings of one generation, standard errors, and what is never evaluated twice."""

import json

import pytest
from conftest import settings

import evaluation
from tasks import read_jsonl, text_hash


def test_the_standard_error_is_that_of_the_sample():
    assert evaluation.accuracy([True, False, False, False]) == (0.25, 0.25)
    assert evaluation.accuracy([True]) == (1.0, 0.0)


@pytest.fixture
def scripted(monkeypatch, demo_tokenizer):
    """Generations that say what the test wants: [(reasoning, stopped)] and the replies behind the extractor."""

    def install(reasoning, replies):
        calls = []

        def generate(model, contexts, max_new_tokens, batch_size, work=None):
            calls.append((contexts, max_new_tokens))
            texts = reasoning if len(calls) % 2 else [(reply, True) for reply in replies]
            return [(demo_tokenizer.encode(text, add_special_tokens=False), stopped) for text, stopped in texts]

        monkeypatch.setattr(evaluation, "generate_greedily", generate)
        return calls

    return install


ROWS = [
    {"id": "a", "question": "tom has 3 pens . how many pens ?", "answer": "3"},
    {"id": "b", "question": "ann has 20 pens . how many pens ?", "answer": "20"},
]


def test_each_reading_looks_at_its_own_text(scripted, demo_tokenizer, demo_task):
    calls = scripted([("1 + 2 = 3 .", True), ("4 + 5 = 20", False)], ["5", "tom <|end|>"])
    found = evaluation.evaluate(None, demo_tokenizer, demo_task, ROWS, "find this .", settings())
    assert [(p["id"], p["gold"], p["answer"], p["correct"]) for p in found] == [
        ("a", "3", "5", False),
        ("b", "20", None, False),
    ]
    assert [(p["harness_answer"], p["harness_correct"]) for p in found] == [("3", True), ("20", True)]
    assert [(p["tokens"], p["truncated"], p["text"], p["reply"]) for p in found] == [
        (6, False, "1 + 2 = 3 .", "5"),
        (5, True, "4 + 5 = 20", "tom"),
    ]
    (contexts, limit), (asked, reply_limit) = calls
    assert (limit, reply_limit) == (12, 12)
    text = demo_tokenizer.decode(asked[0])
    assert asked[0][: len(contexts[0])] == contexts[0] and text.endswith("1 + 2 = 3 . so the answer is")
    record = evaluation.summarize(found, 12, 60.0)
    assert (record["accuracy"], record["harness_accuracy"], record["correct"], record["n"]) == (0.0, 1.0, 0, 2)
    assert (record["unread"], record["truncated"], record["mean_tokens"], record["minutes"]) == (0.5, 0.5, 5.5, 1.0)


def test_what_was_evaluated_is_not_evaluated_again_and_what_differs_is(scripted, tmp_path, demo_tokenizer, demo_task):
    class Model:
        dtype = "float32"

    calls = scripted([("1 + 2 = 3 .", True)] * 2, ["3", "4"])

    def once(rows=ROWS, role="best", split="dev", model="m", prompt="find this .", **changes):
        arguments = Model(), demo_tokenizer, demo_task, rows, prompt, settings(**changes), tmp_path, role, split, model
        return evaluation.evaluate_once(*arguments)

    first = once()
    assert (first["correct"], first["role"], first["prompt_hash"]) == (1, "best", text_hash("find this ."))
    assert once() == first and once(role="initial") == first | {"role": "initial"} and len(calls) == 2
    once(split="test")
    once(model="other")
    once(max_new_tokens=3)
    once(prompt="tell this .")
    once(rows=[ROWS[0], ROWS[1] | {"answer": "4"}])
    assert len(calls) == 12
    predictions = read_jsonl(tmp_path / "predictions.jsonl")
    keys = [(p["split"], p["prompt_hash"], p["evaluation"], p["id"]) for p in predictions]
    assert len(keys) == len(set(keys)) == 12
    assert len(read_jsonl(tmp_path / "results.jsonl")) == 7 and json.dumps(first)

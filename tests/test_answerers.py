"""Who answers: a model loaded here. A server is tested in test_servers.py."""

import json
import random
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, greedy_reference, own_task, plain_logits, settings, slow_log_probs

from support.answerers import LocalModel, batches_of_like_length, local_answerer
from support.engine import Engine, load_engine
from support.evaluation import Evaluation, Sampling, evaluate, evaluate_once
from support.files import UserError, read_jsonl, write_jsonl
from support.tokens import chat_pieces, encode_chat, encode_choices, encode_pieces, encode_prompt, extractor_ids


class ScriptedEngine:
    """An engine that says what the test wants: [(reasoning, stopped)], the last row's first, then the replies behind
    the extractor."""

    identity, dtype_hint = "scripted", ""

    def __init__(self, tokenizer, reasoning=None, replies=(), dtype="float32"):
        self.tokenizer, self.model = tokenizer, SimpleNamespace(dtype=dtype)
        self.reasoning, self.replies = reasoning, replies
        self.progress = None
        self.calls = []  # (contexts, or the ids behind the rows that ended; max_new_tokens)

    def rows_that_fit(self, columns):
        return 16

    def require_positions(self, columns):
        pass

    def encoded(self, texts):
        return [self.tokenizer.encode(text, add_special_tokens=False) for text in texts]

    def stream(self, contexts, max_new_tokens, batch_size):
        self.calls.append((contexts, max_new_tokens))
        texts, stopped = zip(*self.reasoning or [("", True)] * len(contexts))
        rows, finite = list(range(len(contexts))), [True] * len(contexts)
        yield SimpleNamespace(rows=rows, ids=self.encoded(texts), stopped=stopped, finite=finite)

    def go_on(self, ended, ids, max_new_tokens):
        self.calls.append((ids, max_new_tokens))
        return self.encoded(self.replies or [""] * len(ended.rows))


ROWS = [
    {"id": "a", "question": "tom has 3 pens . how many pens ?", "answer": "3"},
    {"id": "b", "question": "ann has 20 pens . how many pens ?", "answer": "20"},
]


def test_a_model_loaded_here_answers_behind_its_reasoning_and_the_extractor(demo_tokenizer, demo_task):
    engine = ScriptedEngine(demo_tokenizer, [("1 + 2 = 3 .", True), ("4 + 5 = 20", False)], ["5", "tom <|end|>"])
    found = evaluate(local_answerer(engine, "m"), demo_task, ROWS, "find this .", settings(max_new_tokens=9))
    assert [(p["id"], p["answer"], p["harness_answer"]) for p in found] == [("a", "5", "3"), ("b", None, "20")]
    assert [(p["tokens"], p["truncated"], p["text"], p["reply"]) for p in found] == [
        (6, False, "1 + 2 = 3 .", "5"),
        (5, True, "4 + 5 = 20", "tom"),
    ]
    (contexts, limit), (asked, reply_limit) = engine.calls
    assert (limit, reply_limit) == (9, 12)
    text = demo_tokenizer.decode(asked)
    assert text == "so the answer is" and demo_tokenizer.decode(contexts[0]).count("find this .") == 1


def test_evaluation_reads_the_same_ids_as_the_search(subword_tokenizer):
    engine = ScriptedEngine(subword_tokenizer)
    task = own_task("choice", choices="AB", answer_space="vocabulary")
    row = {"id": "r", "question": "Is it A?\nOptions:\n(A) yes", "answer": "A"}
    prompt = "logical steps, then the answer."
    evaluate(local_answerer(engine, "m"), task, [row], prompt, settings())
    assert engine.calls[0][0] == [sum(encode_prompt(subword_tokenizer, task, row["question"], prompt), [])]


def test_the_gold_answer_is_not_needed_to_ask_for_an_answer(subword_tokenizer):
    engine = ScriptedEngine(subword_tokenizer)
    task = own_task("boolean", choices=("True", "False"), answer_space="vocabulary")
    row = {"id": "r", "question": "Is it?", "answer": "\udcff"}
    list(local_answerer(engine, "m").generate(task, [row], "think.", settings(), frozenset()))
    assert subword_tokenizer.decode(engine.calls[1][0]).strip() == "The answer is $"


def plain_texts(engine, task, row, prompt, limit, reply_limit):
    """(ids of the reasoning, of the reply behind it and the extractor) of one row, without keys and values."""
    context = encode_chat(engine.tokenizer, task, row["question"], prompt)
    ids, _ = greedy_reference(engine, context, limit)
    whole = context + ids + extractor_ids(engine.tokenizer, task)
    return ids, greedy_reference(engine, whole, reply_limit)[0], whole


@pytest.mark.parametrize("ranks", [False, True])
def test_replies_and_ranks_behind_kept_keys_and_values_are_those_of_whole_sequences(llama, demo_data, ranks):
    """Rows of different length that end at different places of a batch."""
    rows, prompt = sorted(demo_data["dev"][:40], key=lambda row: len(row["question"]))[::7], "find this ."
    task = own_task(
        "choice" if ranks else "number",
        "so the answer is",
        ("1", "12", "30") if ranks else (),
        template="{question} {prompt}",
    )
    limits = settings(max_new_tokens=15, batch_size=4)
    contexts = [encode_chat(llama.tokenizer, task, row["question"], prompt) for row in rows]
    texts = [greedy_reference(llama, context, 15)[0] for context in contexts]
    llama.end_ids = [max(set(sum(texts, [])), key=lambda token: len({t.index(token) for t in texts if token in t}))]
    found = list(local_answerer(llama, "m").generate(task, rows, prompt, limits, frozenset()))
    generations = {generation.row["id"]: generation for batch in found for generation in batch}
    assert len(generations) == len(rows) and len(found) > 2  # as rows end, not as batches do
    assert len({generation.tokens for generation in generations.values()}) > 1
    for row in rows:
        ids, reply, whole = plain_texts(llama, task, row, prompt, 15, 12)
        generation = generations[row["id"]]
        assert (generation.text, generation.tokens) == (llama.tokenizer.decode(ids, skip_special_tokens=True), len(ids))
        if ranks:
            answers = encode_choices(llama.tokenizer, task).answers
            expected = slow_log_probs(lambda ids: plain_logits(llama.model, ids), whole, answers).tolist()
            assert list(generation.choices) == list(task.choices)
            assert list(generation.choices.values()) == pytest.approx(expected, abs=1e-6)
            assert generation.reply == llama.tokenizer.decode(plain_logits(llama.model, whole)[-1:].argmax(-1))
        else:
            assert generation.reply == llama.tokenizer.decode(reply, skip_special_tokens=True)
            assert generation.choices is None


def test_a_bare_prompt_stands_behind_the_question_and_an_empty_one_leaves_the_question_alone(subword_tokenizer):
    task = own_task(template="Question: {question}\nNow use {prompt}")
    row = {"id": "r", "question": "3 + 14", "answer": "17"}
    engine = ScriptedEngine(subword_tokenizer)
    for prompt in ("", "Let's think step by step."):
        evaluate(local_answerer(engine, "m"), task.bare, [row], prompt, settings())
    empty, thought = (subword_tokenizer.decode(engine.calls[n][0][0]) for n in (0, 2))
    assert "Question: 3 + 14" in empty and "Now use" not in empty
    assert thought.replace("\nLet's think step by step.", "", 1) == empty
    assert own_task(template="{question} please {prompt}").bare.template == "{question} {prompt}"
    options = "Message: {question}\nTeams: A, B or C\nNow use {prompt}"  # that no prompt is there changes no question
    assert own_task(template=options).bare.template == "Message: {question}\nTeams: A, B or C\n{prompt}"


def test_a_prompt_with_a_word_the_tokenizer_does_not_know_is_refused(demo_tokenizer, demo_task):
    answerer = local_answerer(ScriptedEngine(demo_tokenizer), "m")
    with pytest.raises(UserError, match="does not know all of the prompt"):
        evaluate(answerer, demo_task, ROWS, "find this theorem .", settings())


def test_choices_that_the_tokenizer_cannot_tell_apart_are_refused_before_any_work(demo_tokenizer):
    engine = ScriptedEngine(demo_tokenizer)
    for choices, message in (
        (("1", "1 "), "cannot tell the answers '1' and '1 ' apart"),
        (("1", "Ok"), "does not know"),
    ):
        task = own_task("choice", "so the answer is", choices, template="{question} {prompt}")
        with pytest.raises(UserError, match=message):
            evaluate(local_answerer(engine, "m"), task, ROWS, "find this .", settings())
    assert engine.calls == []


RANKED = own_task("choice", "so the answer is", ("1", "12"), template="{question} {prompt}")


def test_logits_that_are_not_finite_are_an_error_and_no_answer(llama):
    llama.model.lm_head.weight.data[:] = float("nan")
    with pytest.raises(UserError, match="not finite"):
        evaluate(local_answerer(llama, "m"), RANKED, ROWS, "find this .", settings(max_new_tokens=3))


@pytest.mark.parametrize("task", [RANKED, own_task("number", "so the answer is", template="{question} {prompt}")])
def test_positions_are_counted_to_the_end_of_the_answer(llama, task):
    """The reasoning alone would fit: with extractor and answer it does not."""
    longest = max(len(encode_chat(llama.tokenizer, task, row["question"], "find this .")) for row in ROWS)
    with pytest.raises(UserError, match="--max-new-tokens: a row could have"):
        evaluate(local_answerer(llama, "m"), task, ROWS, "find this .", settings(max_new_tokens=512 - longest))


def test_a_model_loaded_here_is_known_by_what_it_was_loaded_from_and_its_dtype(tmp_path):
    """Also where the user edits the chat template between two calls."""
    folder = shutil.copytree(ROOT / "demo" / "model", tmp_path / "m")
    loaded = ((folder, "float32"), (folder, "bfloat16"), (ROOT / "demo" / "model", "float32"))
    found = [local_answerer(load_engine(str(path), "cpu", dtype), path).identity for path, dtype in loaded]
    assert found[2] == found[0] != found[1]
    config = json.loads((folder / "tokenizer_config.json").read_text())
    template = "now: " + load_engine(str(folder), "cpu", "float32").tokenizer.chat_template
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
    found.append(local_answerer(load_engine(str(folder), "cpu", "float32"), folder).identity)
    assert found[3] not in found[:3]


def without_time(record):
    return {key: value for key, value in record.items() if key != "minutes"}


def test_a_killed_evaluation_of_a_real_model_ends_the_same(tmp_path, demo_engine, demo_task, demo_data):
    rows, results = demo_data["dev"][:10], []
    for cut in (None, 5):  # in the middle of the second batch
        folder = tmp_path / str(cut)
        folder.mkdir()
        answerer = local_answerer(demo_engine, "m")
        asked = Evaluation(answerer, demo_task, "dev", rows, "check each step .", settings(batch_size=3))
        evaluate_once(asked, folder, "best")
        if cut:
            (folder / "results.jsonl").unlink()
            write_jsonl(folder / "predictions.jsonl", read_jsonl(folder / "predictions.jsonl")[:cut])
        results.append((without_time(evaluate_once(asked, folder, "best")), read_jsonl(folder / "predictions.jsonl")))
    (first, in_order), (second, resumed) = results
    assert first == second and sorted(map(json.dumps, in_order)) == sorted(map(json.dumps, resumed))


def of_the_demo(engine, task, rows, **changes):
    return Evaluation(local_answerer(engine, "m"), task, "dev", rows, "check each step .", settings(**changes))


def test_rows_are_on_disk_before_their_batch_has_ended(tmp_path, demo_engine, demo_task, demo_data, monkeypatch):
    """Killed while the rest of the only batch is at work, an evaluation keeps its rows and ends the same."""
    asked = of_the_demo(demo_engine, demo_task, demo_data["dev"][:40], batch_size=40, max_new_tokens=30)
    (tmp_path / "whole").mkdir()
    whole = without_time(evaluate_once(asked, tmp_path / "whole", "best"))
    ran, plain = [], LocalModel.answered

    def killed_at_the_third_group(model, task, rows, ended, settings):
        ran.append(len(rows))
        if len(ran) == 3:
            raise KeyboardInterrupt
        return plain(model, task, rows, ended, settings)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(LocalModel, "answered", killed_at_the_third_group)
        evaluate_once(asked, tmp_path, "best")
    kept = read_jsonl(tmp_path / "predictions.jsonl")
    assert len(kept) == sum(ran[:2]) and 0 < len(kept) < 40
    assert without_time(evaluate_once(asked, tmp_path, "best")) == whole
    first, second = (read_jsonl(folder / "predictions.jsonl") for folder in (tmp_path / "whole", tmp_path))
    assert sorted(map(json.dumps, first)) == sorted(map(json.dumps, second))


def test_batches_are_of_like_length_and_come_the_longest_first_then_in_a_mixed_order():
    rng = random.Random(0)
    contexts = [({"id": str(n)}, [0] * rng.randint(5, 99)) for n in range(83)]
    batches = batches_of_like_length(contexts, 8)
    spans = [(min(lengths), max(lengths)) for lengths in ([len(ids) for _, ids in batch] for batch in batches)]
    assert sorted(row["id"] for batch in batches for row, _ in batch) == sorted(row["id"] for row, _ in contexts)
    in_order = sorted(spans, reverse=True)
    assert spans[0] == in_order[0] and spans not in (in_order, [in_order[0], *sorted(spans[1:])])
    assert all(low >= high for (low, _), (_, high) in zip(in_order, in_order[1:]))  # no two lists overlap
    half = [high for _, high in spans[1:6]]
    assert min(half) < 50 < max(half)  # the first half of the work has short and long rows
    assert batches_of_like_length(contexts, 8) == batches


def test_when_memory_runs_out_in_the_middle_no_row_is_lost_or_answered_twice(
    demo_engine, demo_task, demo_data, monkeypatch
):
    asked = of_the_demo(demo_engine, demo_task, demo_data["dev"][:20], batch_size=20, max_new_tokens=30)
    arguments = demo_task, asked.rows, asked.prompt, asked.settings, frozenset()
    expected = {
        generation.row["id"]: generation for group in asked.answerer.generate(*arguments) for generation in group
    }
    plain, sizes = Engine.generate, []

    def generate(engine, context, logits, limits):
        sizes.append(len(limits))
        for number, ended in enumerate(plain(engine, context, logits, limits)):
            if len(limits) > 12 and number == 2:
                raise torch.OutOfMemoryError("none left")
            yield ended

    monkeypatch.setattr(demo_engine, "batch_sizes", {})
    monkeypatch.setattr(Engine, "generate", generate)
    found = [generation for group in asked.answerer.generate(*arguments) for generation in group]
    assert sizes[0] == 20 and max(sizes[1:]) <= 12
    assert len(found) == 20 and {generation.row["id"]: generation for generation in found} == expected


@pytest.mark.parametrize("space", ["vocabulary", "choices"])
def test_when_memory_runs_out_behind_the_reasoning_the_batch_halves_and_no_row_is_lost(
    demo_engine, demo_data, monkeypatch, space
):
    task = own_task("choice", "the answer is", ("5", "7", "12"), answer_space=space)
    rows = demo_data["dev"][:16]
    answerer, limits = local_answerer(demo_engine, "m"), settings(batch_size=16)
    monkeypatch.setattr(demo_engine, "batch_sizes", {})
    arguments = task, rows, "find the answer now .", limits, frozenset()
    expected = {one.row["id"]: one for group in answerer.generate(*arguments) for one in group}
    plain, behind = LocalModel.answered, []

    def answered(model, task, rows, ended, settings):
        behind.append(len(ended.context.layers[0].lender.keys))  # rows in the batch
        if behind[-1] > 5:
            raise torch.OutOfMemoryError("none left")
        return plain(model, task, rows, ended, settings)

    monkeypatch.setattr(LocalModel, "answered", answered)
    found = [one for group in answerer.generate(*arguments) for one in group]
    assert behind[0] > 5 and demo_engine.batch_sizes["completion"] <= 8
    assert len(found) == 16 and {one.row["id"] for one in found} == expected.keys()
    for one in found:  # another batch size changes numbers by rounding alone
        assert one._replace(choices=None) == expected[one.row["id"]]._replace(choices=None)
    monkeypatch.setattr(LocalModel, "answered", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("none")))
    with pytest.raises(UserError, match="single row"):
        list(answerer.generate(*arguments))


def test_a_single_row_without_memory_is_one_line(demo_engine, demo_task, monkeypatch):
    def read(engine, sequences):
        raise torch.OutOfMemoryError("none left")

    monkeypatch.setattr(Engine, "read", read)
    with pytest.raises(UserError, match="single row"):
        evaluate(local_answerer(demo_engine, "m"), demo_task, ROWS, "find this .", settings())


# --- Writing at a temperature ---------------------------------------------------------------------------------------

CHATS = [[{"role": "user", "content": "find this ."}], [{"role": "user", "content": "check each step ."}]]


def test_a_model_loaded_here_writes_several_texts_to_each_chat(demo_engine):
    drawn = LocalModel(demo_engine).write(CHATS, Sampling(4, 1.0, 6, "0"))
    assert [len(samples) for samples in drawn] == [4, 4]
    assert all(written.tokens <= 6 for samples in drawn for written in samples)
    ids = encode_pieces(demo_engine.tokenizer, chat_pieces(demo_engine.tokenizer, CHATS[0]))
    assert [written.prompt_tokens for written in drawn[0]] == [len(ids), 0, 0, 0]
    assert LocalModel(demo_engine).write(CHATS, Sampling(4, 1.0, 6, "0")) == drawn

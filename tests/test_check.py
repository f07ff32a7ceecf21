"""The check before long work: what it sees, what it says, and what it expects a run to cost."""

from dataclasses import replace

import pytest
from conftest import greedy_reference, own_task, plain_logits, settings, slow_log_probs, text_settings

from support import check
from support.check import Checked, check_rows, cost_of, require_memory, require_words, table, text_cost, warnings
from support.files import UserError
from support.rouge import rouge_l
from support.tokens import encode_chat, encode_row, extractor_ids


def encoded(engine, task, data):
    return [encode_row(engine.tokenizer, task, row) for row in data]


def test_a_check_sees_what_whole_sequences_give(demo_engine, demo_task, demo_data):
    data = demo_data["train"][:5]
    rows = encoded(demo_engine, demo_task, data)
    checked = check_rows(demo_engine, demo_task, data, rows, settings(max_new_tokens=40))
    tokenizer = demo_engine.tokenizer
    for n, row in enumerate(data):
        context = encode_chat(tokenizer, demo_task, row["question"], demo_task.initial_prompt)
        ids, stopped = greedy_reference(demo_engine, context, 40)
        whole = context + ids + extractor_ids(tokenizer, demo_task)
        prediction = checked.predictions[n]
        assert (prediction["tokens"], prediction["truncated"]) == (len(ids), not stopped)
        logits = plain_logits(demo_engine.model, whole)[-1]
        assert checked.ranks[n] == 1 + int((logits > logits[rows[n].answer[0]]).sum())
        assert checked.replies[n] == prediction["reply"] and checked.possible[n]
    shown = "\n".join(checked.shown)
    for text in (data[0]["question"], demo_task.initial_prompt, checked.predictions[0]["text"], demo_task.extractor):
        assert text in shown
    assert shown.endswith(f"gold answer  {data[0]['answer']}")
    assert checked.row_seconds > 0 and checked.read_seconds > 0


def test_of_a_closed_task_the_gold_answer_s_rank_is_among_the_choices(demo_engine, demo_data):
    task = own_task("choice", "so the answer is", ("1", "12", "30", "7"), template="{question} please {prompt}")
    data = [row | {"answer": task.choices[n]} for n, row in enumerate(demo_data["train"][:4])]
    task = replace(task, initial_prompt="find this .")
    rows = encoded(demo_engine, task, data)
    checked = check_rows(demo_engine, task, data, rows, settings(max_new_tokens=20))
    tokenizer = demo_engine.tokenizer
    for n, row in enumerate(data):
        context = encode_chat(tokenizer, task, row["question"], "find this .")
        whole = context + greedy_reference(demo_engine, context, 20)[0] + extractor_ids(tokenizer, task)
        logits = plain_logits(demo_engine.model, whole)[-1]
        scores = slow_log_probs(lambda ids: plain_logits(demo_engine.model, ids), whole, rows[n].choices.answers)
        assert checked.ranks[n] == 1 + int((scores > scores[rows[n].gold]).sum())
        assert checked.possible[n] == (logits.argmax().item() in {ids[0] for ids in rows[n].choices.answers})


def seen(count=4, **changes):
    """A check of rows that are much the same: half right, read, ended by themselves."""
    prediction = {"tokens": 20, "truncated": False, "gold": "A", "correct": True, "harness_correct": False}
    predictions = []
    for n in range(count):
        own = {"answer": "A", "correct": True} if n % 2 else {"answer": "B", "correct": False}
        predictions.append(prediction | own | changes)
    return Checked(predictions, ["A"] * count, [True] * count, [1] * count)


CLOSED = own_task("choice", "So it is", ("A", "B", "C", "D"))
EVEN = [{"answer": choice} for choice in "ABCD"]


def test_a_search_that_can_work_is_not_warned_of():
    assert warnings(seen(), CLOSED, EVEN, settings()) == []


@pytest.mark.parametrize(
    ("changes", "task", "train", "words", "flag"),
    [
        ({"truncated": True}, CLOSED, EVEN, "cut at --max-new-tokens 12", "--initial-prompt"),
        ({"answer": None}, CLOSED, EVEN, "'So it is' hardly any answer", "--answer-space choices"),
        ({"answer": None}, own_task("number"), [{"answer": "1"}], "hardly any answer", "--extractor"),
        ({}, CLOSED, [{"answer": "A"}], "not above that of always answering the commonest", "--model"),
    ],
)
def test_what_keeps_a_search_from_working_is_said_with_the_flag_that_helps(changes, task, train, words, flag):
    (warning,) = warnings(seen(**changes), task, train, settings())
    assert words in warning and flag in warning


def test_one_answer_to_rows_with_several_is_said():
    checked = seen(answer="A")
    assert warnings(checked, CLOSED, EVEN, settings()) == []  # the rows at hand have one right answer
    checked.predictions[0]["gold"] = "B"
    (warning,) = warnings(checked, CLOSED, EVEN, settings())
    assert "Every row is answered with 'A'" in warning and "name the answers in --template" in warning
    named = replace(CLOSED, template=f"{' or '.join(CLOSED.choices)}? {{question}} {{prompt}}")
    (warning,) = warnings(checked, named, EVEN, settings())
    assert "Every row is answered with 'A'" in warning and "stronger --model" in warning


def test_rows_that_are_all_right_leave_nothing_to_find():
    checked = seen()
    for prediction in checked.predictions:
        prediction["correct"] = True
    (warning,) = warnings(checked, CLOSED, EVEN, settings())
    assert "right already" in warning and "--task" in warning


def test_the_table_has_shares_of_rows_and_the_accuracy_of_guessing():
    lines = "\n".join(table(seen(), CLOSED, EVEN))
    assert "50 %" in lines and "25 %" in lines and "begins a possible answer" in lines
    assert "guess" not in lines and "commonest" not in "\n".join(table(seen(), own_task(), [{"answer": "1"}]))


def test_the_cost_counts_every_generation_of_search_dev_and_test(demo_engine, demo_task, demo_data):
    data = demo_data["train"][:3]
    rows = encoded(demo_engine, demo_task, data)
    checked = seen()
    checked.row_seconds, checked.read_seconds, checked.tokens = 6.0, 0.5, 100.0
    config = settings(steps=5, shortlist_size=2, max_new_tokens=40)
    cost = cost_of(demo_engine, checked, rows, config, {"finalists": 4, "dev": 10, "test": 20})
    assert cost.generations == {"search": 3 * (1 + 5 * 2), "dev": 5 * 10, "test": 2 * 20}
    # A gradient of 3 rows at each of 5 steps, of 100 tokens, forward and back as dear as 3 times 0.5 s a token.
    assert cost.minutes == pytest.approx({"search": 3.3 + 5 * 3 * 100 * 1.5 / 60, "dev": 5.0, "test": 4.0})
    assert cost.tokens == (33 + 50 + 40) * 100 + 3 * 5 * 3 * 100
    assert "about 123 generations" in cost.line() and "search" in cost.line()


def test_a_run_that_memory_does_not_hold_is_refused_in_one_line(demo_engine, monkeypatch):
    cost = check.Cost({"search": 1}, {"search": 1.0}, 1.0, 10 * 2**30)
    monkeypatch.setattr(check, "physical_memory", lambda: 16 * 2**30)
    require_memory(demo_engine, cost)
    monkeypatch.setattr(check, "physical_memory", lambda: 8 * 2**30)
    with pytest.raises(UserError, match="10.0 GiB, this machine has 8: lower --batch-size"):
        require_memory(demo_engine, cost)


def test_the_cost_of_a_text_method_counts_prompts_on_rows_up_to_the_budget(demo_engine, demo_task, demo_data):
    data = demo_data["train"][:4]
    rows = encoded(demo_engine, demo_task, data)
    checked = check_rows(demo_engine, demo_task, data, rows, settings(max_new_tokens=40))
    counts = {"finalists": 3, "dev": 20, "test": 30, "prompts": 81, "requests": 10, "samples": 80}
    cost = text_cost(demo_engine, checked, rows, text_settings("opro"), counts)
    assert cost.generations == {"search": 4 * 81, "dev": 4 * 20, "test": 60}
    assert cost.minutes["search"] == pytest.approx(4 * 81 * checked.row_seconds / 60)
    assert cost.minutes["optimizer"] > 0 and cost.memory > 0
    limited = text_cost(demo_engine, checked, rows, text_settings("opro", budget=100, optimizer_model="m"), counts)
    assert limited.generations["search"] == 100 and "optimizer" not in limited.minutes


def test_a_model_without_words_for_a_meta_prompt_is_no_optimizer(demo_tokenizer, subword_tokenizer):
    with pytest.raises(UserError, match="the optimizer demo/model does not know 3 of the 4 words .* --optimizer-model"):
        require_words(demo_tokenizer, "demo/model", ("Improve the current prompt",))
    require_words(demo_tokenizer, "demo/model", ("check each step",))
    require_words(demo_tokenizer, "demo/model", ())
    require_words(subword_tokenizer, "m", ("Improve the current prompt",))


def test_a_check_of_texts_shows_one_with_its_reference_and_asks_for_no_answer_behind_it(demo_engine, demo_data):
    frame = {
        "template": "{question} please {prompt}",
        "initial_prompt": "read the problem here and find the answer now .",
    }
    task = own_task("generation", "", **frame)
    data = [row | {"answer": "3 + 4 = 7 ."} for row in demo_data["train"][:4]]
    checked = check_rows(demo_engine, task, data, encoded(demo_engine, task, data), settings(max_new_tokens=40))
    for n, row in enumerate(data):
        context = encode_chat(demo_engine.tokenizer, task, row["question"], task.initial_prompt)
        ids, _ = greedy_reference(demo_engine, context, 40)
        prediction = checked.predictions[n]
        assert prediction["text"] == demo_engine.tokenizer.decode(ids) and prediction["reply"] == ""
        assert prediction["correct"] == rouge_l([row["answer"]], prediction["text"])
    scores = [prediction["correct"] for prediction in checked.predictions]
    lines = table(checked, task, data)
    assert len(lines) == 3 and lines[-1].split() == ["ROUGE-L,", "mean", f"{100 * sum(scores) / 4:.0f}", "%"]
    assert warnings(checked, task, data, settings()) == []
    assert [line.split()[0] for line in checked.shown] == ["sent", "written", "reference", "ROUGE-L"]
    counts = {"finalists": 2, "dev": 4, "test": 4, "prompts": 3, "samples": 4}
    rows = encoded(demo_engine, task, data)
    check.require_room(demo_engine, task, {"train": data}, rows, settings(max_new_tokens=40))
    cost = text_cost(demo_engine, checked, rows, text_settings("opro"), counts)
    assert cost.generations == {"search": 12, "dev": 12, "test": 8}


def test_where_nothing_is_written_a_text_is_to_be_asked_for():
    checked = seen()
    empty = {"answer": None, "correct": 0.0, "harness_correct": 0.0}
    checked.predictions = [prediction | empty for prediction in checked.predictions]
    (line,) = warnings(checked, own_task("generation", ""), [], settings())
    assert "nothing is written" in line and "--initial-prompt" in line

"""What goes beyond the paper: each setting against a slow reference, and that the search stays what it was without."""

import itertools
import json
import random
from dataclasses import asdict

import pytest
import torch
from conftest import own_task, settings, slow_losses, tiny_engine, with_choices

import beyond_paper
import greater_core as core
from support.runs import Candidate, as_step
from support.tokens import Row, encode_prompt, encode_row, ends_sentence, prompt_text


def without_seconds(records):
    return [{k: v for k, v in asdict(record).items() if k != "seconds"} for record in records]


def written_and_read(steps):
    return [as_step(json.loads(json.dumps(asdict(step)))) for step in steps]


@pytest.fixture(scope="module")
def start(demo_tokenizer, demo_task, demo_data):
    """(rows, prompt ids) of a search on the demo."""
    data = random.Random(3).sample(demo_data["train"], 8)
    rows = [encode_row(demo_tokenizer, demo_task, row) for row in data]
    return rows, encode_prompt(demo_tokenizer, demo_task, data[0]["question"], "find the answer and")[1]


def searched(engine, start, history=(), **changes):
    config = settings(**{"steps": 8, "max_new_tokens": 40, "batch_size": 100, "gradient_batch_size": 8} | changes)
    return list(core.optimize(engine, *start, config, history, beyond_paper.visit))


# --- The audit ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def audited(demo_engine, start):
    return searched(demo_engine, start, audit_every=2)


def test_an_audit_leaves_the_search_as_it_is_and_counts_what_it_took(demo_engine, start, audited):
    plain = searched(demo_engine, start)
    for one, other in zip(plain, audited, strict=True):
        assert (one.prompt_ids, one.objective, one.rows) == (other.prompt_ids, other.objective, other.rows)
        assert [(t.token, t.objective, t.new) for t in one.shortlist] == [
            (t.token, t.objective, t.new) for t in other.shortlist
        ]
        more = other.totals["generated_tokens"] - other.totals.get("audit_tokens", 0)
        assert one.totals["generated_tokens"] == more
    due = [step.step for step in audited if step.step and step.step % 2 == 0 and not step.grows]
    assert [step.step for step in audited if step.audit] == due and len(due) >= 3
    assert any(step.grows for step in audited)
    taken = sum(step.audit.generations for step in audited if step.audit)
    assert audited[-1].totals["audit_generations"] == taken


def test_an_audit_draws_other_tokens_than_the_incumbent_as_many_as_were_shortlisted(audited):
    for before, step in zip(audited, audited[1:]):
        if step.audit:
            drawn = [one.token for one in step.audit.drawn]
            assert len(set(drawn)) == len(drawn) == len(step.shortlist)
            assert before.prompt_ids[step.position] not in drawn
            assert set(drawn) <= {one.token for one in step.candidates}
            assert step.audit.generations == 8 * (1 + sum(one.new for one in step.audit.drawn))
    everything = [step for step in audited if step.audit]
    assert any({t.token for t in s.audit.drawn} != {t.token for t in s.shortlist} for s in everything)


@pytest.mark.parametrize("done", [2, 5])
def test_an_audited_search_resumes_to_the_same(demo_engine, start, audited, done):
    rest = searched(demo_engine, start, written_and_read(audited[:done]), audit_every=2)
    assert without_seconds(rest) == without_seconds(audited[done:])


def test_the_fixed_loss_is_that_of_the_tried_prompt_behind_the_old_reasoning(demo_tokenizer, few_rows, double):
    engine = tiny_engine("llama", demo_tokenizer)
    rows, prompt = few_rows
    _, step = searched(engine, (rows, prompt), steps=1, audit_every=1, max_new_tokens=12)
    reasonings = [engine.complete([row.question + list(prompt) + row.turn_end], 12)[0][0] for row in rows]

    def slow(tried):
        losses = [slow_losses(engine.model, row, tried, ids, 0.2) for row, ids in zip(rows, reasonings)]
        return sum(cross_entropy + 0.2 * nll for cross_entropy, _, nll in losses) / len(rows)

    for one in (*step.shortlist, *step.audit.drawn):
        assert one.fixed_loss == pytest.approx(slow(one.prompt_ids))
    assert step.audit.fixed_loss == pytest.approx(slow(prompt))


def test_the_incumbent_again_is_generated_in_other_batches_and_in_double_precision_the_same(
    demo_tokenizer, few_rows, double, monkeypatch
):
    engine = tiny_engine("llama", demo_tokenizer)
    sizes, plain = [], core.Engine.generate

    def generate(engine, context, logits, limits):
        sizes.append(len(limits))
        return plain(engine, context, logits, limits)

    monkeypatch.setattr(core.Engine, "generate", generate)
    before, step = searched(engine, few_rows, steps=1, audit_every=1, max_new_tokens=12)
    assert sizes[0] == 5 and sizes[-3:] == [2, 2, 1]
    again = step.audit.again
    assert again.objective == pytest.approx(before.objective, rel=1e-9)
    assert (again.rows.reasoning, again.rows.wrong) == (before.rows.reasoning, before.rows.wrong)


def test_settings_that_need_more_than_the_paper_s_step_are_never_ignored(demo_engine, start):
    with pytest.raises(ValueError, match="beyond_paper.visit"):
        next(core.optimize(demo_engine, *start, settings(audit_every=1)))


def test_rows_are_recorded_in_their_order(demo_engine, start):
    rows, prompt = start
    (first,) = searched(demo_engine, start, steps=0)
    wrong = "".join(
        str(int(slow_losses(demo_engine.model, row, prompt, ids, 0.2)[1]))
        for row, ids in reasoned(demo_engine, rows, prompt)
    )
    assert first.rows.wrong == wrong and len(first.rows.reasoning) == 4 * len(rows)
    assert sum(first.rows.objective) / len(rows) == pytest.approx(first.objective, rel=1e-5)
    assert wrong.count("1") / len(rows) == first.error


def reasoned(engine, rows, prompt):
    return [(row, engine.complete([row.question + list(prompt) + row.turn_end], 40)[0][0]) for row in rows]


# --- All positions at once -------------------------------------------------------------------------------


@pytest.mark.parametrize("choices", [False, True])
def test_the_gradients_at_all_positions_are_those_at_each_alone(any_engine, few_rows, choices):
    rows, prompt = few_rows
    rows = [Row(r.question, r.turn_end, r.extractor, r.answer * (1 + n % 3)) for n, r in enumerate(rows)]
    rows = with_choices(rows) if choices else rows
    reasoning = [[20 + n] * (3 * n) for n in range(len(rows))]
    search = core.Search(any_engine, rows, settings(gradient_batch_size=2), None, prompt)
    search.current = core.Score(prompt, 0.0, 0.0, 0.0, 0.0, 0)
    questions = core.prefill_questions(any_engine, rows, 2)
    # Of different number, and the prompt's own not always in the same place.
    tokens_at = [[60, 75, 90][: 1 + n % 3] + [own] + [61] * (n % 2) for n, own in enumerate(prompt)]
    found = beyond_paper.gradients_everywhere(search, questions, tokens_at, reasoning)
    assert found.shape == (len(rows), len(prompt), 5)
    for position, tokens in enumerate(tokens_at):
        prefix = core.prefix_at(any_engine, questions, prompt[:position])
        alone, _ = core.candidate_gradients(search, prefix, prompt, tokens, reasoning)
        torch.testing.assert_close(found[:, position, : len(tokens)], alone)


OPTIONS = {
    "all": {"positions": "all"},
    "all, audited": {"positions": "all", "audit_every": 2},
    "all at random": {"positions": "all", "shortlist": "random"},
}


@pytest.fixture(scope="module", params=OPTIONS)
def option(request, demo_engine, start):
    """(settings, the steps of a search with them)"""
    changes = OPTIONS[request.param]
    return changes, searched(demo_engine, start, **changes)


def test_a_search_with_each_option_resumes_to_the_same(demo_engine, start, option):
    changes, records = option
    for done in (3, 7):
        rest = searched(demo_engine, start, written_and_read(records[:done]), **changes)
        assert without_seconds(rest) == without_seconds(records[done:])


def test_each_option_takes_the_best_of_what_it_tried_and_scores_nothing_twice(option):
    _, records = option
    seen = [records[0].prompt_ids]
    for before, after in itertools.pairwise(records):
        rivals = [one.objective for one in after.shortlist] + ([] if after.grows else [before.objective])
        assert after.objective == min(rivals)
        seen += [one.prompt_ids for one in after.shortlist if one.new]
    assert len(seen) == len(set(seen)) > len(records)


def test_what_was_tried_has_the_token_at_the_position_that_the_record_names(option):
    _, records = option
    for before, after in itertools.pairwise(records):
        for one in after.shortlist if not after.grows else ():
            position = after.position if one.position is None else one.position
            candidate = Candidate(one.token, None, position=position)
            assert one.prompt_ids == beyond_paper.replaced(before.prompt_ids, candidate)


def test_all_positions_are_tried_in_one_step_and_a_prompt_only_once(demo_engine, start):
    records = searched(demo_engine, start, positions="all", shortlist_size=4, steps=9)
    turns = set()
    whole = [record for record in records[1:] if not record.grows]
    assert all(len({one.position for one in record.shortlist}) == len(record.shortlist) for record in whole)
    assert all(one.new for record in whole for one in record.shortlist) and len(whole) >= 3
    for record in whole:  # those that promise most, of what was not tried before
        own = {c.position: c.gradient for c in record.candidates}  # the last of each position is the prompt's own
        changes = {(c.position, c.token): c.gradient - own[c.position] for c in record.candidates}
        predicted = [changes[one.position, one.token] for one in record.shortlist]
        tried = {ids for other in records[: record.step] for ids in [t.prompt_ids for t in other.shortlist]}
        before = records[record.step - 1].prompt_ids
        best = {}  # of each position
        for (position, token), change in changes.items():
            ids = (*before[:position], token, *before[position + 1 :])
            if ids not in tried and ids != before:
                best[position] = min(change, best.get(position, change))
        turn = (record.step - 1) % (len(before) - 1)  # where one is tried whatever it promises; the end is left out
        expected = sorted(best.values())[:4]
        if turn in best and best[turn] not in expected:
            expected[-1] = best[turn]
            turns.add(turn)
        assert predicted == expected
    assert turns


def test_each_position_has_a_try_by_turns_however_little_the_gradient_promises_there(demo_engine, start):
    records = searched(demo_engine, start, positions="all", shortlist_size=2, steps=16)
    whole = [(a, b) for a, b in itertools.pairwise(records) if not b.grows and len(b.shortlist) == 2]
    assert len(whole) > 10
    for before, record in whole:
        turn = (record.step - 1) % (len(before.prompt_ids) - 1)  # the sentence end has none
        assert turn in {one.position for one in record.shortlist}


def test_a_single_try_at_all_positions_is_the_one_that_promises_most_not_the_one_by_turns(demo_engine, start):
    records = searched(demo_engine, start, positions="all", shortlist_size=1, steps=12)
    positions = [record.shortlist[0].position for record in records if record.step and not record.grows]
    turns = [(r.step - 1) % (len(b.prompt_ids) - 1) for b, r in itertools.pairwise(records) if not r.grows]
    assert len(positions) > 5 and positions != turns[-len(positions) :]


def test_an_audit_of_all_positions_draws_one_token_of_a_position_as_the_search_tries(demo_engine, start):
    records = searched(demo_engine, start, positions="all", shortlist_size=4, steps=9, audit_every=1)
    audits = [record.audit for record in records if record.audit]
    assert len(audits) >= 3
    assert all(len({one.position for one in audit.drawn}) == len(audit.drawn) == 4 for audit in audits)


def test_fixed_losses_are_means_over_the_rows_that_are_finite_under_all_prompts(llama, few_rows, monkeypatch):
    rows, prompt = few_rows
    other = (60, *prompt[1:])
    search = core.Search(llama, rows, settings(), None, prompt, reasoning=[[20]] * len(rows))
    questions = core.prefill_questions(llama, rows, 2)
    whole = beyond_paper.fixed_losses(search, questions, {prompt, other})
    plain = core.Engine.over_rows

    def broken(engine, function, jobs, *more, **named):
        losses = plain(engine, function, jobs, *more, **named)
        return [float("nan") if job == (other, 0) else loss for job, loss in zip(jobs, losses)]

    with monkeypatch.context() as patch:
        patch.setattr(core.Engine, "over_rows", broken)
        without = beyond_paper.fixed_losses(search, questions, {prompt, other})
    search.rows, search.reasoning = rows[1:], search.reasoning[1:]
    fewer = beyond_paper.fixed_losses(search, core.prefill_questions(llama, rows[1:], 2), {prompt, other})
    assert without == pytest.approx(fewer, rel=1e-9) and without[prompt] != pytest.approx(whole[prompt])


def test_a_prompt_that_ends_a_sentence_keeps_its_end_where_all_positions_are_searched(demo_engine, start):
    records = searched(demo_engine, start, positions="all", shortlist_size=2, steps=16)
    closed = [record.step for record in records if ends_sentence(demo_engine.tokenizer, record.prompt_ids)]
    assert len(closed) > 8 and closed == [*range(closed[0], 17)]
    assert any(record.step > closed[0] and record.prompt_ids != records[closed[0]].prompt_ids for record in records)


def test_prompts_with_a_token_replaced_encode_to_their_ids_with_a_subword_tokenizer(subword_tokenizer):
    engine = tiny_engine("llama", subword_tokenizer, torch.float32, seed=1)
    task = own_task()
    data = [{"id": str(n), "question": f"How many are {n} + {n * n}?", "answer": str(n + n * n)} for n in range(2, 5)]
    rows = [encode_row(subword_tokenizer, task, row) for row in data]
    start = encode_prompt(subword_tokenizer, task, data[0]["question"], "proper logical reasoning.")[1]
    changes = {"max_new_tokens": 3, "max_prompt_tokens": 10, "fluency_weight": 2.0, "shortlist_size": 2, "steps": 15}
    records = searched(engine, (rows, start), positions="all", **changes)
    tried = [one for record in records for one in record.shortlist]
    assert len(tried) > 10
    for one in tried:
        text = prompt_text(subword_tokenizer, rows[0], one.prompt_ids)
        for row in data:
            assert tuple(encode_prompt(subword_tokenizer, task, row["question"], text)[1]) == one.prompt_ids

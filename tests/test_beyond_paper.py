"""What goes beyond the paper: each setting against a slow reference, and that the search stays what it was without."""

import json
import random
from dataclasses import asdict

import pytest
from conftest import settings, slow_losses, tiny_engine

import beyond_paper
import greater_core as core
from support.runs import as_step
from support.tokens import encode_prompt, encode_row


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

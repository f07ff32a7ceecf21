"""Answers behind the extractor: columns and probabilities, against enumeration."""

import itertools
import math

import pytest
import torch
from conftest import ANSWERS, plain_logits, slow_log_probs

from support.answers import answer_columns, choice_log_probs, finite_rows, read_answers
from support.files import UserError
from support.tokens import choices_of


def test_the_column_before_a_token_predicts_it():
    # A sequence of 9 tokens whose last one is 7: column 7 predicts it, and column 8 what follows.
    assert answer_columns(9, [7]) == [7, 8]
    assert answer_columns(9, []) == [8]


def test_every_answer_lies_in_one_read_and_no_read_begins_another():
    choices = choices_of(ANSWERS)
    assert choices.reads == ((60, 61), (75, 61))
    for answer, read in zip(ANSWERS, choices.read_of):
        assert choices.reads[read][: len(answer) - 1] == answer[:-1]
    assert choices_of(((5,), (6,))).reads == ((),)


@pytest.mark.parametrize(
    "answers",
    [((0,), (1,)), ((0, 1), (0, 2), (3,)), ((1,), (1, 2), (1, 2, 3), (1, 0), (2,)), ((0, 1), (0, 1, 2), (3, 3, 3))],
)
def test_a_choice_is_as_likely_as_all_texts_together_whose_longest_choice_it_is(answers):
    """By enumeration of all texts of three tokens out of four, under a random model."""
    choices, generator = choices_of(answers), torch.Generator().manual_seed(0)
    table = {
        prefix: torch.randn(4, generator=generator, dtype=torch.float64)
        for length in range(3)
        for prefix in itertools.product(range(4), repeat=length)
    }
    columns = max(map(len, choices.reads)) + 1
    logits = torch.stack(
        [
            torch.stack([table[read[:n]] for n in range(len(read) + 1)] + [table[()]] * (columns - len(read) - 1))
            for read in choices.reads
        ]
    )[None]
    found = choice_log_probs(logits, choices)[0].exp()
    expected = dict.fromkeys(answers, 0.0)
    for text in itertools.product(range(4), repeat=3):
        probability = math.prod(table[text[:n]].softmax(0)[text[n]].item() for n in range(3))
        begun = [answer for answer in answers if text[: len(answer)] == answer]
        if begun:
            expected[max(begun, key=len)] += probability
    assert found.tolist() == pytest.approx(list(expected.values()), rel=1e-12)


def test_a_choice_that_is_surely_continued_keeps_a_finite_logarithm_and_gradient():
    choices = choices_of(((0,), (0, 1)))
    logits = torch.zeros(1, 1, 2, 3)
    logits[..., 1, 1] = 200.0  # behind token 0 token 1 is certain
    logits.requires_grad_()
    log_probs = choice_log_probs(logits, choices)
    assert log_probs.isfinite().all() and log_probs[0, 0] < -10
    assert torch.autograd.grad(log_probs.sum(), logits)[0].isfinite().all()


def test_log_probs_behind_reasonings_of_different_length_are_those_of_whole_sequences(any_engine):
    """Rows as `generate` hands them out: of a batch that goes on, shifted, each read as often as there are reads."""
    contexts, extractor, choices = [[5, 6, 7, 8, 9, 10], [11, 12], [13, 14, 15]], [20, 21, 22], choices_of(ANSWERS)
    context, logits = any_engine.read(contexts)
    seen = 0
    for ended in any_engine.generate(context, logits, [9, 3, 6]):
        reads = [choices.reads] * len(ended.rows)
        found = choice_log_probs(read_answers(any_engine, ended.context, extractor, reads), choices)
        for n, ids, log_probs in zip(ended.rows, ended.ids, found):
            whole = contexts[n] + ids + extractor
            expected = slow_log_probs(lambda ids: plain_logits(any_engine.model, ids), whole, ANSWERS)
            torch.testing.assert_close(log_probs, expected)
            seen += 1
    assert seen == 3


def test_a_row_that_is_not_finite_is_named_and_left_out_and_more_than_a_tenth_end_the_run(caplog):
    values = torch.zeros(20, 3)
    assert finite_rows(values, "x", "").all() and not caplog.records
    values[4, 1], values[7, 0] = float("nan"), float("inf")
    whole = finite_rows(values, "the loss is not finite", " Try it.")
    assert whole.tolist() == [number not in (4, 7) for number in range(20)]
    (record,) = caplog.records
    assert "the loss is not finite in training rows [5, 8] of 20" in record.getMessage()
    values[9] = float("nan")
    with pytest.raises(UserError, match=r"rows \[5, 8, 10\] of 20 .*, more than a tenth. Try it"):
        finite_rows(values, "the loss is not finite", " Try it.")

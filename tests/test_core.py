"""The method: each function against a slow or exact reference."""

import itertools
import json
import math
import random
from dataclasses import asdict, replace

import pytest
import torch
from conftest import (
    FAMILIES,
    constant_engine,
    greedy_reference,
    own_task,
    settings,
    slow_log_probs,
    slow_losses,
    tiny_engine,
    with_choices,
)
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch.nn import functional as F

import greater_core as core
from support.engine import Engine
from support.files import UserError
from support.runs import as_step, finalists, scores_of
from support.tokens import Row, continues_word, encode, encode_chat, encode_prompt, encode_row, ends_sentence


def search_of(engine, rows, prompt=(), **changes):
    return core.Search(engine, rows, settings(**changes), None, tuple(prompt))


def prefix_of(engine, rows, tokens):
    return core.prefix_at(engine, core.prefill_questions(engine, rows, 2), tuple(tokens))


def reason_and_score(engine, rows, position, prompts, **changes):
    """{(prompt, row number): Outcome} of all prompts times rows, behind the first prompt's tokens before a position."""
    jobs = [(prompt, i) for prompt in prompts for i in range(len(rows))]
    search = search_of(engine, rows, **changes)
    return dict(zip(jobs, core.reason_and_score(search, prefix_of(engine, rows, prompts[0][:position]), jobs)))


# --- Question and prompt, read once ------------------------------------------------------------------


def test_a_prefix_read_token_by_token_is_that_of_the_whole_sequence(any_engine, few_rows):
    rows, prompt = few_rows
    prefix = prefix_of(any_engine, rows, prompt[:3])
    for i in (4, 0):
        ids = torch.tensor([rows[i].question + list(prompt[:3])])
        expected = any_engine.model(input_ids=ids).logits[0].log_softmax(-1)
        torch.testing.assert_close(prefix.log_probs[i], expected[-1])
        torch.testing.assert_close(prefix.nll[i], -expected[-4:-1].gather(1, ids[0, -3:, None])[:, 0])


def placed(engine, demo_task, demo_data, place):
    """(rows of different length, prompt ids) with the prompt behind the question, before it, or in a system message."""
    frames = {
        "behind": ("{question} please {prompt} now .", ""),
        "before": ("please {prompt} {question}", ""),
        "system": ("{question}", "please {prompt} now ."),
    }
    template, system = frames[place]
    task = replace(demo_task, template=template, system=system)
    data = sorted(random.Random(0).sample(demo_data["train"], 20), key=lambda r: len(r["question"]))[::4]
    rows = [encode_row(engine.tokenizer, task, row) for row in data]
    ids = encode_prompt(engine.tokenizer, task, data[0]["question"], task.initial_prompt)[1]
    return rows, tuple(ids), [encode_chat(engine.tokenizer, task, row["question"], task.initial_prompt) for row in data]


@pytest.mark.parametrize("place", ["behind", "before", "system"])
def test_wherever_the_prompt_stands_scores_and_gradients_are_those_of_whole_sequences(
    any_engine, demo_task, demo_data, place
):
    rows, prompt, chats = placed(any_engine, demo_task, demo_data, place)
    assert [row.question + list(prompt) + row.turn_end for row in rows] == chats
    position = 2
    prompts = [(*prompt[:position], token, *prompt[position + 1 :]) for token in (60, 75)]
    search = search_of(any_engine, rows, loss_temperature=0.7, max_new_tokens=9)
    prefix = prefix_of(any_engine, rows, prompt[:position])
    scored = core.score_prompts(search, prefix, prompts)
    for (score, reasonings), tried in zip(scored, prompts):
        expected = []
        for row, reasoning in zip(rows, reasonings):
            context = row.question + list(tried) + row.turn_end
            assert reasoning == greedy_reference(any_engine, context, 9)[0]
            expected.append(slow_losses(any_engine.model, row, tried, reasoning, 0.7))
        means = torch.tensor(expected, dtype=torch.float64).mean(0).tolist()
        assert (score.cross_entropy, score.error, score.nll) == pytest.approx(means)
    search.reasoning = scored[0][1]
    gradients, losses = core.candidate_gradients(search, prefix, prompts[0], [60, 75], search.reasoning)
    for row, reasoning, loss in zip(rows, search.reasoning, losses):
        cross_entropy, _, nll = slow_losses(any_engine.model, row, prompts[0], reasoning, 0.7)
        assert loss.item() == pytest.approx(cross_entropy + search.settings.fluency_weight * nll)
    assert gradients.isfinite().all()


def test_a_prompt_before_the_question_is_read_once_for_all_rows(demo_engine, demo_task, demo_data):
    rows, _, _ = placed(demo_engine, demo_task, demo_data, "before")
    demo_engine.counts.clear()
    core.prefill_questions(demo_engine, rows)
    assert demo_engine.counts["forward_tokens"] == len(rows[0].question)


@pytest.mark.parametrize("place", ["before", "system"])
def test_a_search_resumes_to_the_same_result_wherever_the_prompt_stands(demo_engine, demo_task, demo_data, place):
    rows, prompt, _ = placed(demo_engine, demo_task, demo_data, place)
    config = settings(steps=4, max_new_tokens=20, batch_size=3)
    records = list(core.optimize(demo_engine, rows, prompt, config))
    rest = list(core.optimize(demo_engine, rows, prompt, config, written_and_read(records[:3])))
    assert without_seconds(rest) == without_seconds(records[3:])


def test_a_known_prefix_is_used_only_if_it_leads_to_the_tokens(llama, few_rows):
    rows, prompt = few_rows
    questions = core.prefill_questions(llama, rows, 3)
    kept = [layer.keys.clone() for layer in questions.context.layers]
    for tokens, read in ((prompt[:3], 1), ((), 0), ((prompt[0], 60), 2)):
        known = core.prefix_at(llama, questions, prompt[:2])
        llama.counts.clear()
        found = core.prefix_at(llama, questions, tokens, known)
        assert llama.counts["forward_tokens"] == read * len(rows)
        fresh = core.prefix_at(llama, questions, tokens)
        assert found.tokens == tokens and torch.equal(found.log_probs, fresh.log_probs)
        assert (found is known) is (read == 1) and (found is questions) is (tokens == ())
    assert all(torch.equal(layer.keys, keys) for layer, keys in zip(questions.context.layers, kept))
    assert questions.tokens == ()


# --- Reasoning, and the loss behind it -----------------------------------------------------------------


@pytest.mark.parametrize("choices", [False, True])
@pytest.mark.parametrize("position", [0, 4])
@pytest.mark.parametrize("batch_size", [3, 100])
def test_reasoning_and_score_behind_kept_keys_and_values_are_those_of_whole_sequences(
    any_engine, few_rows, position, batch_size, choices
):
    """Rows of very different length, some of which end early: the ids, losses and likelihoods of the plain path."""
    rows, prompt = few_rows
    rows = [
        Row(r.question * (1 + 2 * (n % 2)), r.turn_end, r.extractor, r.answer * (1 + n % 3)) for n, r in enumerate(rows)
    ]
    rows = with_choices(rows) if choices else rows
    prompts = [(*prompt[:position], token, *prompt[position + 1 :]) for token in (60, 75, 90)]

    def plain(prompt, i):
        return greedy_reference(any_engine, rows[i].question + list(prompt) + rows[i].turn_end, 30)[0]

    # A token that ends the reasonings at many different places, so that rows leave the batch at different times.
    texts = [plain(candidate, i) for candidate in prompts for i in range(len(rows))]
    ends = max(set(sum(texts, [])), key=lambda token: len({ids.index(token) for ids in texts if token in ids}))
    any_engine.end_ids = [ends]
    changes = {"max_new_tokens": 30, "batch_size": batch_size, "loss_temperature": 0.7}
    done = reason_and_score(any_engine, rows, position, prompts, **changes)
    for (candidate, i), outcome in done.items():
        assert outcome.reasoning == plain(candidate, i)
        found = outcome.cross_entropy, outcome.wrong, outcome.nll
        expected = slow_losses(any_engine.model, rows[i], candidate, outcome.reasoning, 0.7)
        assert found == pytest.approx(expected, rel=1e-9)
    assert len({len(outcome.reasoning) for outcome in done.values()}) > 2 and len(done) == 15


@pytest.mark.parametrize("family", FAMILIES)
def test_in_float32_the_ids_are_those_of_transformers_eager_attention_and_the_losses_within_1e_5(
    demo_tokenizer, few_rows, family
):
    engine, plain = (tiny_engine(family, demo_tokenizer, torch.float32) for _ in range(2))
    plain.model.set_attn_implementation("eager")
    rows, prompt = few_rows
    prompts = [(*prompt[:2], token, *prompt[3:]) for token in (60, 75)]
    done = reason_and_score(engine, rows, 2, prompts, max_new_tokens=20, loss_temperature=0.7)
    for (candidate, i), outcome in done.items():
        row = rows[i]
        expected, _ = greedy_reference(plain, row.question + list(candidate) + row.turn_end, 20)
        assert outcome.reasoning == expected
        losses = outcome.cross_entropy, outcome.wrong, outcome.nll
        assert losses == pytest.approx(slow_losses(plain.model, row, candidate, expected, 0.7), rel=1e-5, abs=1e-5)
    assert len(done) == 10


def test_a_batch_size_of_0_is_one_that_fits_and_changes_nothing(any_engine, few_rows, monkeypatch):
    rows, prompt = few_rows
    expected, asked = reason_and_score(any_engine, rows, 0, [prompt], batch_size=2), []

    for fit in (1, 3):
        monkeypatch.setattr(Engine, "rows_that_fit", lambda *sizes, fit=fit: asked.append(sizes[1:]) or fit)
        again = reason_and_score(any_engine, rows, 0, [prompt], batch_size=0)
        for job, outcome in expected.items():
            assert again[job].reasoning == outcome.reasoning and again[job].wrong == outcome.wrong
            found = again[job].cross_entropy, again[job].nll
            assert found == pytest.approx((outcome.cross_entropy, outcome.nll))
    longest = max(len(r.question) + len(prompt) + len(r.turn_end + r.extractor + r.answer) for r in rows)
    assert asked[0] == (longest + settings().max_new_tokens, len(prompt))  # positions whose logits are read


def test_the_loss_on_constant_logits_is_the_one_worked_out_by_hand(demo_tokenizer, few_rows):
    rows, prompt = few_rows
    logits = [0.0] * len(demo_tokenizer)
    logits[rows[0].answer[0]] = 2.0
    engine, v = constant_engine(demo_tokenizer, logits), len(logits)
    outcomes = list(reason_and_score(engine, rows, 0, [prompt]).values())
    # One token has logit 2, the other V - 1 have 0; the answer's logits are divided by 0.2.
    right = math.log(math.exp(10) + v - 1) - 10
    assert outcomes[0].cross_entropy == pytest.approx(right)
    assert [outcome.wrong for outcome in outcomes] == [row.answer != rows[0].answer for row in rows]
    others = [outcome.cross_entropy for outcome in outcomes if outcome.wrong]
    assert others and others == pytest.approx([right + 10] * len(others))
    assert outcomes[0].nll == pytest.approx(math.log(math.exp(2) + v - 1))


def test_an_answer_of_several_tokens_is_wrong_if_one_token_is_and_its_loss_is_the_mean():
    logits = torch.tensor([[[3.0, 0, 0], [0, 5.0, 0]]]).expand(3, 1, -1, -1)
    rows = [Row([], [], [], answer) for answer in ([0, 1], [0, 2], [0])]
    cross_entropy, wrong = core.answer_loss(logits, rows, 1.0)
    a, b = math.log(math.exp(3) + 2) - 3, math.log(math.exp(5) + 2)
    assert wrong.tolist() == [False, True, False]
    assert cross_entropy.tolist() == pytest.approx([(a + b - 5) / 2, (a + b) / 2, a])


def test_a_forbidden_padding_token_does_not_touch_the_loss_of_a_shorter_answer():
    logits = torch.zeros(2, 1, 2, 4)
    logits[..., 0] = float("-inf")  # padding is id 0
    logits.requires_grad_()
    rows = [Row([], [], [], answer) for answer in ([1, 2], [1])]
    cross_entropy, _ = core.answer_loss(logits, rows, 1.0)
    assert cross_entropy.tolist() == pytest.approx([math.log(3)] * 2)
    assert not torch.autograd.grad(cross_entropy.sum(), logits)[0].isnan().any()


@pytest.mark.parametrize("batch_size", [0, 3])
def test_a_search_that_could_exceed_the_model_s_positions_is_refused(llama, few_rows, batch_size):
    rows, prompt = few_rows
    with pytest.raises(UserError, match="--max-new-tokens: a row could have .* the model knows 512: lower it"):
        reason_and_score(llama, rows, 0, [prompt], max_new_tokens=500, batch_size=batch_size)


@pytest.mark.parametrize("choices", [False, True])
def test_batched_losses_behind_given_reasoning_are_those_of_one_row_at_a_time(any_engine, few_rows, choices):
    """Also a one-hot choice of the current token changes nothing, whatever else could be chosen."""
    rows, prompt = few_rows
    rows = [Row(r.question, r.turn_end, r.extractor, r.answer * (1 + n % 3)) for n, r in enumerate(rows)]
    rows = with_choices(rows) if choices else rows
    reasoning = [[20 + n] * (3 * n) for n in range(len(rows))]
    search = search_of(any_engine, rows, loss_temperature=0.7)
    for position, candidates in ((0, [prompt[0]]), (3, [60, prompt[3], 61])):
        prefix = prefix_of(any_engine, rows, prompt[:position])
        _, found = core.candidate_gradients(search, prefix, prompt, candidates, reasoning)
        for row, generated, loss in zip(rows, reasoning, found.tolist()):
            cross_entropy, _, nll = slow_losses(any_engine.model, row, prompt, generated, 0.7)
            assert loss == pytest.approx(cross_entropy + 0.2 * nll, rel=1e-9)


# --- Proposals --------------------------------------------------------------------------------------------


@given(
    st.integers(1, 6).flatmap(
        lambda q: st.lists(st.lists(st.integers(-50, 50), min_size=9, max_size=9, unique=True), min_size=q, max_size=q)
    ),
    st.integers(1, 9),
)
@hypothesis_settings(deadline=None, max_examples=60)
def test_a_token_is_proposed_from_the_k_on_at_which_sorted_prefixes_intersect_in_it(rows, k):
    expected = set(range(9))
    for row in rows:
        expected &= set(sorted(range(9), key=lambda i: -row[i])[:k])
    needed = core.smallest_k(torch.tensor(rows, dtype=torch.float64), [list(range(len(rows)))])
    assert {token for token, needs in enumerate(needed.tolist()) if needs <= k} == expected


def test_k_grows_by_two_until_enough_candidates_are_found():
    log_probs = torch.tensor([[9.0, 8, 7, 6, 5, 4], [4.0, 5, 6, 7, 8, 9]])
    # Top 3 share nothing, top 5 share tokens 1-4, whose means are equal, so the order is by id.
    assert core.propose_candidates(log_probs, [[0, 1]], 3, 2, lambda t: True) == ([1, 2, 3, 4], 5)
    # The union over two samples of one row each needs no intersection; candidates come likeliest first.
    assert core.propose_candidates(log_probs, [[0]], 2, 2, lambda t: True) == ([0, 1], 2)
    assert sorted(core.propose_candidates(log_probs, [[0], [1]], 2, 2, lambda t: True)[0]) == [0, 1, 4, 5]


def test_refused_tokens_do_not_count_and_an_empty_result_names_the_flag():
    log_probs = torch.tensor([[3.0, 2, 1, float("-inf")]])
    found, k = core.propose_candidates(log_probs, [[0]], 1, 2, lambda t: t != 0)
    assert (found, k) == ([1, 2], 3)
    with pytest.raises(UserError, match="--min-candidates"):
        core.propose_candidates(log_probs, [[0]], 1, 3, lambda t: t != 0)
    with pytest.raises(UserError, match="--min-candidates"):
        core.propose_candidates(log_probs, [[0]], 1, 1, lambda t: False)


# --- The gradient ---------------------------------------------------------------------------------------------


def whole_losses(model, row, reasoning, prompt, position, candidates, one_hot, embedding):
    """(cross-entropy at temperature 0.7, nll) of whole sequences, with an embedding put at the position."""
    start = len(row.question)
    at = start + position
    context = row.question + list(prompt) + row.turn_end + reasoning + row.extractor

    def logits_of(ids):
        embeddings = model.get_input_embeddings()(torch.tensor([ids]))
        embeddings = torch.cat([embeddings[:, :at], embedding[None, None], embeddings[:, at + 1 :]], 1)
        return model(inputs_embeds=embeddings).logits[0]

    logits = logits_of(context + row.answer)
    if row.choices:
        log_probs = slow_log_probs(logits_of, context, row.choices.answers)
        cross_entropy = F.cross_entropy(log_probs / 0.7, torch.tensor(row.choices.answers.index(tuple(row.answer))))
    else:
        answers = len(row.answer)
        cross_entropy = F.cross_entropy(logits[-1 - answers : -1] / 0.7, torch.tensor(row.answer))
    log_probs = logits[start - 1 : start - 1 + len(prompt)].log_softmax(-1)
    each = [log_probs[j, t] for j, t in enumerate(prompt)]
    each[position] = one_hot @ log_probs[position, candidates]
    return cross_entropy, -torch.stack(each).mean()


@pytest.mark.parametrize(("fluency", "choices"), [("nll", False), ("perplexity", False), ("nll", True)])
@pytest.mark.parametrize("position", [0, 3, -1])
def test_candidate_gradients_are_central_differences_of_the_loss(any_engine, few_rows, position, fluency, choices):
    rows, prompt = few_rows
    position %= len(prompt)
    rows, reasoning = with_choices(rows[:3]) if choices else rows[:3], [[30, 41, 22], [25] * 9, []]
    candidates = [60, 75, prompt[position], 90]
    config = settings(fluency=fluency, fluency_weight=0.7, loss_temperature=0.7, gradient_batch_size=2)
    prefix = prefix_of(any_engine, rows, prompt[:position])
    search = core.Search(any_engine, rows, config, None, prompt)
    gradients, losses = core.candidate_gradients(search, prefix, prompt, candidates, reasoning)
    assert gradients.dtype == torch.float64 and gradients.shape == (3, 4)

    def loss(one_hot):
        """By the plain path: whole sequences, all of them read for every loss."""
        mixture = one_hot @ any_engine.model.get_input_embeddings()(torch.tensor(candidates))
        parts = [
            whole_losses(any_engine.model, *row, prompt, position, candidates, *m)
            for *row, m in zip(rows, reasoning, zip(one_hot, mixture))
        ]
        cross_entropy, nll = map(torch.stack, zip(*parts))
        return core.training_loss(cross_entropy, nll, config)

    base = torch.zeros(3, 4, dtype=torch.float64)
    base[:, 2] = 1
    torch.testing.assert_close(losses, loss(base))
    for k in range(4):
        step = torch.zeros_like(base)
        step[:, k] = 1e-5
        numeric = (loss(base + step) - loss(base - step)) / 2e-5
        torch.testing.assert_close(gradients[:, k], numeric, rtol=1e-4, atol=1e-6)


def test_the_gradient_ranks_all_tokens_as_the_true_loss_change_does_where_the_loss_is_nearly_linear(llama, few_rows):
    """Over the whole vocabulary: with embeddings so close to each other that the loss is almost linear in the
    choice, the predicted change of each token is its true change, and the best token is the best token."""
    rows, prompt = few_rows
    embedding = llama.model.get_input_embeddings()
    center = embedding.weight.data.mean(0, keepdim=True)
    embedding.weight.data = center + 1e-6 * (embedding.weight.data - center)
    everything = list(range(len(embedding.weight)))
    reasoning = [[30, 31] for _ in rows]
    search = search_of(llama, rows, fluency_weight=0.0)
    gradients, losses = core.candidate_gradients(
        search, prefix_of(llama, rows, prompt[:2]), prompt, everything, reasoning
    )
    predicted = (gradients - gradients[:, [prompt[2]]]).mean(0)

    def mean_loss(token):
        tried = (*prompt[:2], token, *prompt[3:])
        return sum(slow_losses(llama.model, row, tried, [30, 31], 0.2)[0] for row in rows) / len(rows)

    true = torch.tensor([mean_loss(token) for token in everything], dtype=torch.float64) - losses.mean()
    assert true.abs().max() > 1e-6  # it does change
    torch.testing.assert_close(predicted, true, rtol=0.01, atol=1e-4 * true.abs().max().item())
    assert predicted.argmin() == true.argmin()


def test_a_candidate_s_own_probability_is_in_its_gradient(llama, few_rows):
    """At the last position only the direct fluency term tells candidates apart once reasoning and answer are
    cut off from the prompt's last token; lambda scales exactly that term."""
    rows, prompt = few_rows
    candidates = [60, 75, prompt[-1]]
    reasoning = [[30] for _ in rows]
    prefix = prefix_of(llama, rows, prompt[:-1])

    def gradients(**changes):
        return core.candidate_gradients(search_of(llama, rows, **changes), prefix, prompt, candidates, reasoning)[0]

    own_term = gradients() - gradients(fluency_weight=0.0)
    torch.testing.assert_close(own_term, -0.2 * prefix.log_probs[:, candidates] / len(prompt))


def test_the_ablation_without_reasoning_drops_it_from_the_gradient_alone(llama, few_rows):
    rows, prompt = few_rows
    prefix, choices = prefix_of(llama, rows, prompt[:2]), [60, 75, prompt[2]]
    reasoning = [[30 + n] * 4 for n in range(5)]

    def gradients(reasoning, **changes):
        search = search_of(llama, rows, **changes)
        search.reasoning = reasoning
        return core.mean_gradients(search, prefix, prompt, choices)

    with_it, without = gradients(reasoning), gradients([[]] * 5)
    assert gradients(reasoning, gradient_without_reasoning=True) == without
    assert all(abs(with_it[token] - without[token]) > 1e-6 for token in choices)
    assert gradients(reasoning, shortlist="random") == {}


def test_rows_of_a_backward_pass_change_nothing_and_follow_the_model_s_size_if_not_given(llama, few_rows, monkeypatch):
    rows, prompt = few_rows
    prefix, choices = prefix_of(llama, rows, prompt[:2]), [60, 75, prompt[2]]
    reasoning = [[30 + n] * 4 * n for n in range(5)]

    def gradients(size):
        search = search_of(llama, rows, gradient_batch_size=size)
        return core.candidate_gradients(search, prefix, prompt, choices, reasoning)

    expected = gradients(1)
    for count in (1, 2, 100):
        monkeypatch.setattr(Engine, "rows_for_backward", lambda engine, tokens, count=count: count)
        torch.testing.assert_close(gradients(0), expected)


# --- Selection and the walk ---------------------------------------------------------------------------------


def score(objective, ids=(1,)):
    return core.Score(tuple(ids), objective, 0.0, 0.0, objective, 0)


@pytest.mark.parametrize(("ties", "winner"), [("first", (2,)), ("last", (3,))])
def test_of_equal_objectives_the_first_wins_or_the_last(ties, winner):
    search = search_of(None, [], (1,), ties=ties)
    incumbent, *tried = (score(2.0, (1,)), score(1.0, (2,)), score(1.0, (3,)))
    search.scores = {s.prompt_ids: s for s in (incumbent, *tried)}
    search.current = search.scores[winner]  # whose reasoning is at hand
    assert core.select_candidate(search, None, [(2,), (3,)], incumbent) == []
    assert search.current.prompt_ids == winner


def test_the_objectives_are_the_paper_s_loss_and_the_released_rule():
    cross_entropy, wrong, nll = (torch.tensor(v, dtype=torch.float64) for v in ([4.0, 2.0], [1.0, 0.0], [1.0, 3.0]))
    assert core.objective_of(cross_entropy, wrong, nll, settings()) == pytest.approx(3 + 0.2 * 2)
    assert core.objective_of(cross_entropy, wrong, nll, settings(objective="error")) == pytest.approx(0.5 + 0.02 * 2)
    perplexity = (math.e + math.e**3) / 2
    found = core.objective_of(cross_entropy, wrong, nll, settings(fluency="perplexity"))
    assert found == pytest.approx(3 + 0.2 * perplexity)


def test_the_position_walks_on_grows_an_open_prompt_and_wraps_a_closed_or_full_one(demo_tokenizer):
    closed, open_ = (tuple(encode(demo_tokenizer, t)) for t in ("find the answer .", "find the answer and"))
    assert [core.next_position(demo_tokenizer, closed, i, 9) for i in range(4)] == [1, 2, 3, 0]
    assert core.next_position(demo_tokenizer, open_, 3, 9) == 4
    assert core.next_position(demo_tokenizer, open_, 3, 4) == 0


def test_shortlists_are_the_most_negative_gradients_or_the_likeliest_or_random_or_all():
    gradients = {5: 0.3, 6: -2.0, 7: -0.1, 8: 0.0}
    assert core.make_shortlist([5, 6, 7, 8], gradients, settings(shortlist_size=2), None) == [6, 7]
    assert core.make_shortlist([5, 6, 7, 8], {}, settings(shortlist="all"), None) == [5, 6, 7, 8]
    likeliest = settings(shortlist="likeliest", shortlist_size=2)
    assert core.make_shortlist([8, 5, 7, 6], {}, likeliest, None) == [8, 5]  # candidates come most likely first
    draws = {
        tuple(core.make_shortlist([5, 6, 7, 8], {}, settings(shortlist="random", shortlist_size=2), random.Random(s)))
        for s in range(20)
    }
    assert len(draws) > 5 and all(len(set(d)) == 2 for d in draws)


def test_the_released_rule_forces_a_full_stop_only_in_the_second_half(demo_engine):
    stop, word = encode(demo_engine.tokenizer, ". now")
    forced, free = (search_of(demo_engine, [], range(8), force_sentence_end=force) for force in (True, False))
    assert core.forced_end(forced, [word, stop], 4) == stop
    assert core.forced_end(forced, [word, stop], 3) is None
    assert core.forced_end(forced, [word], 4) is None
    assert core.forced_end(free, [word, stop], 4) is None


def test_prompts_scored_together_are_scored_as_alone(demo_engine, run):
    rows, start, config, records = run
    questions = core.prefill_questions(demo_engine, rows, 8)
    prompts = [tuple(start), tuple(records[-1].prompt_ids)[: len(start) - 1] + (start[-1],)]
    search = core.Search(demo_engine, rows, config, None, tuple(start))
    together = core.score_prompts(search, questions, prompts)
    alone = [core.score_prompts(search, questions, [p])[0] for p in prompts]
    assert [reasoning for _, reasoning in together] == [reasoning for _, reasoning in alone]
    assert together[0][1] != together[1][1]
    for (a, _), (b, _) in zip(together, alone):
        assert a.prompt_ids == b.prompt_ids and a.objective == pytest.approx(b.objective, rel=1e-4)


@pytest.mark.parametrize(("ties", "kept"), [("first", True), ("last", False)])
def test_a_step_breaks_ties_as_it_is_told(demo_tokenizer, few_rows, ties, kept):
    """Under constant logits every prompt is as good as any other."""
    engine = constant_engine(demo_tokenizer, [0.0] * len(demo_tokenizer))
    config = settings(steps=1, ties=ties)
    start, record = core.optimize(engine, *few_rows, config)
    assert (record.prompt_ids == start.prompt_ids) is kept
    if not kept:
        assert record.prompt_ids[0] == record.shortlist[-1].token


def test_a_forced_full_stop_ends_the_trials_of_its_step(demo_tokenizer, few_rows):
    rows, prompt = few_rows
    engine = constant_engine(demo_tokenizer, [0.0] * len(demo_tokenizer))
    config = settings(
        steps=len(prompt) - 1, shortlist="all", force_sentence_end=True, top_k=999, max_new_tokens=1, batch_size=999
    )
    stop = encode(demo_tokenizer, ".")[0]
    for record in list(core.optimize(engine, rows, prompt, config))[1:]:
        tried = [e.token for e in record.shortlist]
        forced = record.position >= len(prompt) / 2
        assert (record.prompt_ids[record.position] == stop) is forced
        assert (tried[-1] == stop and stop not in tried[:-1]) or not forced
        assert len(tried) < len(record.candidates) - 1 or not forced


@pytest.fixture(scope="module")
def wandering(demo_engine, demo_tokenizer, demo_task, demo_data):
    """A search that grows, meets prompts again and tries few rows: (rows, start, settings, records, samples)."""
    config = settings(
        steps=26, max_new_tokens=40, max_prompt_tokens=5, sampled_rows=3, intersections=2, fluency_weight=9.0, seed=1
    )
    rows = [encode_row(demo_tokenizer, demo_task, row) for row in demo_data["train"][:4]]
    start = encode(demo_tokenizer, "find the answer and")
    samples, original = [], core.propose_candidates

    def spy(log_probs, drawn, *rest):
        assert len(log_probs) == 4
        samples.append(drawn)
        return original(log_probs, drawn, *rest)

    core.propose_candidates = spy
    try:
        records = list(core.optimize(demo_engine, rows, start, config))
    finally:
        core.propose_candidates = original
    return rows, start, config, records, samples


def test_a_wandering_search_grows_at_its_end_and_takes_the_best_of_what_competes(wandering):
    records = wandering[3]
    assert any(r.grows for r in records[1:])
    assert any(not e.new for r in records[1:] for e in r.shortlist)
    for before, after in itertools.pairwise(records):
        rivals = [e.objective for e in after.shortlist] + ([] if after.grows else [before.objective])
        assert after.objective == min(rivals)
        assert len(after.prompt_ids) == len(before.prompt_ids) + after.grows <= 5
        assert after.position == len(before.prompt_ids) or not after.grows


def test_each_step_s_gradients_are_those_at_its_prompt_over_its_reasoning(wandering, demo_engine):
    rows, _, config, records, _ = wandering
    questions = core.prefill_questions(demo_engine, rows, 4)
    for before, after in itertools.pairwise(records):
        prompt, position = before.prompt_ids, after.position
        contexts = [[*row.question, *prompt, *row.turn_end] for row in rows]
        reasoning = [ids for ids, _ in demo_engine.complete(contexts, 40, 4)]
        tokens = [c.token for c in after.candidates]
        base = [*prompt, tokens[0]] if after.grows else prompt
        prefix = core.prefix_at(demo_engine, questions, prompt[:position])
        search = core.Search(demo_engine, rows, config, None, ())
        found, _ = core.candidate_gradients(search, prefix, base, tokens, reasoning)
        recorded = torch.tensor([c.gradient for c in after.candidates], dtype=torch.float64)
        torch.testing.assert_close(found.double().mean(0), recorded, rtol=1e-3, atol=1e-3)


def test_samples_are_drawn_anew_at_every_step_and_for_every_seed(wandering, demo_engine, monkeypatch):
    rows, start, config, _, samples = wandering
    assert all(len(step) == 2 and all(len(set(rows)) == 3 for rows in step) for step in samples)
    assert len({str(step) for step in samples}) > 15
    drawn, original = [], core.propose_candidates
    monkeypatch.setattr(core, "propose_candidates", lambda *a: (drawn.append(a[1]), original(*a))[1])
    other = settings(**{**vars(config), "seed": 2, "steps": 6})
    list(core.optimize(demo_engine, rows, start, other))
    assert drawn != samples[:6]


@pytest.mark.parametrize("done", [5, 12, 20])
def test_a_wandering_search_resumes_to_the_same(wandering, demo_engine, done):
    rows, start, config, records, _ = wandering
    rest = list(core.optimize(demo_engine, rows, start, config, records[:done]))
    assert without_seconds(rest) == without_seconds(records[done:])


def test_a_random_shortlist_is_the_seed_s_also_when_resumed(run, demo_engine):
    rows, start, config, _ = run

    def search(seed, history=()):
        changed = settings(**{**vars(config), "shortlist": "random", "steps": 4, "seed": seed})
        return list(core.optimize(demo_engine, rows, start, changed, history))

    first = search(0)
    assert without_seconds(search(0)) == without_seconds(first)
    assert without_seconds(search(0, first[:3])) == without_seconds(first[3:])
    assert [r.prompt for r in search(1)] != [r.prompt for r in first]
    assert all(c.gradient is None for r in first[1:] for c in r.candidates)


def without_seconds(records):
    return [{k: v for k, v in asdict(record).items() if k != "seconds"} for record in records]


def written_and_read(steps):
    return [as_step(json.loads(json.dumps(asdict(step)))) for step in steps]


@pytest.fixture(scope="module")
def run(demo_engine, demo_tokenizer, demo_task, demo_data):
    """A short search on the demo: (rows, settings, records)."""
    config = settings(steps=10, max_new_tokens=40, batch_size=100, gradient_batch_size=8, seed=3)
    data = random.Random(3).sample(demo_data["train"], 8)
    rows = [encode_row(demo_tokenizer, demo_task, row) for row in data]
    start = encode_prompt(demo_tokenizer, demo_task, data[0]["question"], "find the answer now .")[1]
    return rows, start, config, list(core.optimize(demo_engine, rows, start, config))


def test_the_objective_never_rises_unless_the_prompt_grows(run):
    records = run[3]
    assert len(records) == 11 and records[-1].objective < records[0].objective
    for before, after in itertools.pairwise(records):
        assert after.grows or after.objective <= before.objective
        assert after.best.objective <= before.best.objective


def test_records_are_json_and_hold_what_was_tried(run):
    assert written_and_read(run[3]) == run[3]
    for record in run[3][1:]:
        tokens = [c.token for c in record.candidates]
        assert {e.token for e in record.shortlist} <= set(tokens)
        gradients = {c.token: c.gradient for c in record.candidates}
        picked = [e.token for e in record.shortlist]
        rivals = tokens if record.grows else tokens[:-1]  # the incumbent stands last and is not shortlisted
        assert picked == sorted(rivals, key=gradients.get)[:3]
        assert record.prompt_ids[record.position] in tokens


def test_no_prompt_is_scored_twice(run):
    tried = [tuple(e.prompt_ids) for r in run[3][1:] for e in r.shortlist if e.new]
    assert len(tried) == len(set(tried)) and tuple(run[1]) not in tried


def test_the_prompt_s_text_encoded_afresh_gives_the_searched_ids(run, demo_tokenizer, demo_task, demo_data):
    for record in run[3]:
        ids = encode_prompt(demo_tokenizer, demo_task, demo_data["dev"][0]["question"], record.prompt)[1]
        assert tuple(ids) == record.prompt_ids


@pytest.mark.parametrize("done", [1, 4, 9])
def test_a_resumed_search_equals_an_uninterrupted_one(run, demo_engine, done):
    rows, start, config, records = run
    history = written_and_read(records[:done])
    rest = list(core.optimize(demo_engine, rows, start, config, history))
    assert without_seconds(rest) == without_seconds(records[done:])


def test_a_resumed_search_makes_the_batches_that_memory_allowed_before(run, demo_engine, monkeypatch):
    rows, start, config, _ = run
    batches, full, plain = [], [1], Engine.generate

    def generate(engine, context, logits, limits):
        if full and len(limits) > 8:  # memory runs out once, in the first selection
            full.clear()
            raise torch.OutOfMemoryError("none left")
        batches.append(len(limits))
        return plain(engine, context, logits, limits)

    monkeypatch.setattr(Engine, "generate", generate)
    records = list(core.optimize(demo_engine, rows, start, config))
    assert [r.batch_sizes for r in records] == [{}] + [{"generation": 12}] * 10
    whole = batches[:]
    batches.clear()
    rest = list(core.optimize(demo_engine, rows, start, config, written_and_read(records[:4])))
    assert without_seconds(rest) == without_seconds(records[4:])
    assert max(batches[1:]) <= 12 and batches[-10:] == whole[-10:]


def test_a_gradient_that_is_not_finite_is_an_error_and_no_shortlist(llama, few_rows, monkeypatch):
    rows, prompt = few_rows
    prefix = prefix_of(llama, rows, prompt[:2])
    found = torch.tensor([[0.5, float("nan")]]), None
    monkeypatch.setattr(core, "candidate_gradients", lambda *arguments: found)
    with pytest.raises(UserError, match="gradient is not finite"):
        core.mean_gradients(search_of(llama, rows), prefix, prompt, [60, prompt[2]])


def test_gradients_of_a_model_in_half_precision_are_not_rounded_to_it(demo_tokenizer, few_rows):
    engine = tiny_engine("llama", demo_tokenizer, torch.bfloat16)
    rows, prompt = few_rows
    prefix, choices = prefix_of(engine, rows, prompt[:2]), [*range(40, 80), prompt[2]]
    found, losses = core.candidate_gradients(search_of(engine, rows), prefix, prompt, choices, [[30, 31]] * 5)
    assert found.dtype == losses.dtype == torch.float32
    assert not torch.equal(found, found.bfloat16().float())


def test_a_resumed_search_notices_that_the_model_is_another(run, demo_tokenizer):
    rows, start, config, records = run
    other = tiny_engine("llama", demo_tokenizer, torch.float32)
    with pytest.raises(UserError, match="--run-dir"):
        next(core.optimize(other, rows, start, config, records[:4]))


def test_finalists_end_a_sentence_or_are_the_start(run, demo_tokenizer):
    scores = scores_of(run[3])
    found = finalists(demo_tokenizer, scores, 5)
    assert [s.objective for s in found] == sorted(s.objective for s in found)
    initial = next(iter(scores.values()))
    assert all(s is initial or demo_tokenizer.decode(s.prompt_ids).endswith(".") for s in found)
    assert any(not ends_sentence(demo_tokenizer, ids) for ids in scores)


@pytest.mark.parametrize("family", FAMILIES)
def test_fifty_steps_keep_every_position_s_meaning_with_a_subword_tokenizer(subword_tokenizer, family):
    """After each step all tokens but the one searched are what they were, and the text still encodes to the ids."""
    engine = tiny_engine(family, subword_tokenizer, torch.float32, seed=1)
    task = own_task()
    data = [{"id": str(n), "question": f"How many are {n} + {n * n}?", "answer": str(n + n * n)} for n in range(2, 5)]
    rows = [encode_row(subword_tokenizer, task, row) for row in data]
    start = encode_prompt(subword_tokenizer, task, data[0]["question"], "proper logical reasoning.")[1]
    config = settings(steps=50, max_new_tokens=3, max_prompt_tokens=10, fluency_weight=2.0, shortlist_size=2)
    before = tuple(start)
    for record in core.optimize(engine, rows, start, config):
        ids, position = record.prompt_ids, record.position
        if position is not None:
            assert len(ids) == len(before) + record.grows
            assert [t for i, t in enumerate(ids) if i != position] == [t for i, t in enumerate(before) if i != position]
        for row in data:
            assert tuple(encode_prompt(subword_tokenizer, task, row["question"], record.prompt)[1]) == ids
        before = ids
    assert before != tuple(start)


def test_a_loss_that_is_not_finite_stops_the_search(demo_tokenizer, few_rows):
    engine = constant_engine(demo_tokenizer, [0.0] * len(demo_tokenizer))
    engine.model.lm_head.bias.data[:] = float("nan")  # behind the checks at its making and on the first row
    engine.compared = True
    questions = core.prefill_questions(engine, few_rows[0], 5)
    with pytest.raises(UserError, match="not finite"):
        core.score_prompts(search_of(engine, few_rows[0]), questions, [few_rows[1]])


def test_a_score_and_a_gradient_leave_out_the_row_that_is_not_finite(llama, few_rows, monkeypatch, caplog):
    rows, prompt = few_rows
    search = search_of(llama, rows * 2, prompt)
    questions = core.prefill_questions(llama, rows * 2)
    plain = core.reason_and_score

    def one_broken(*arguments):
        outcomes = plain(*arguments)
        outcomes[3].cross_entropy = float("nan")
        return outcomes

    monkeypatch.setattr(core, "reason_and_score", one_broken)
    ((score, reasoning),) = core.score_prompts(search, questions, [prompt])
    whole = [outcome.cross_entropy for outcome in plain(search, questions, [(prompt, i) for i in range(10)])]
    assert score.cross_entropy == pytest.approx((sum(whole) - whole[3]) / 9) and len(reasoning) == 10
    assert "in training rows [4] of 10" in caplog.text
    gradients = torch.ones(10, 2)
    gradients[5] = float("inf")
    monkeypatch.setattr(core, "candidate_gradients", lambda *_: (gradients, None))
    search.reasoning = reasoning
    assert core.mean_gradients(search, questions, prompt, [1, 2]) == {1: 1.0, 2: 1.0}
    assert "in training rows [6] of 10" in caplog.text


def test_word_starts_leave_no_pieces_of_words_but_the_likeliest_token(subword_tokenizer):
    engine = tiny_engine("llama", subword_tokenizer, torch.float32, seed=1)
    task, data = own_task(), [{"id": str(i), "question": f"How many are {i} + 14?", "answer": "17"} for i in range(3)]
    rows = [encode_row(subword_tokenizer, task, row) for row in data]
    start = encode_prompt(subword_tokenizer, task, data[0]["question"], "proper logical reasoning.")[1]

    def pieces(word_starts):  # of words, among the proposals of each step, the likeliest one left out
        config = settings(steps=6, train_rows=3, max_new_tokens=2, word_starts=word_starts, min_candidates=4, top_k=30)
        first, *steps = core.optimize(engine, rows, start, config)
        found, prompt = [], first.prompt_ids
        for step in steps:
            before = [*rows[0].question, *prompt[: step.position]][-1]
            found += [c for c in step.candidates[1:-1] if continues_word(subword_tokenizer, before, c.token)]
            prompt = step.prompt_ids
        return found

    assert pieces(False) and not pieces(True)

"""The method: each function against a slow or exact reference."""

import copy
import itertools
import json
import math
import random
from collections import Counter

import pytest
import torch
from conftest import FAMILIES, gemma_like, own_task, settings, tiny_model
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import greater_core as core
from support import engine as frozen_model
from support.engine import freeze
from support.files import UserError

# --- Token ids in parts -----------------------------------------------------------------------------


def test_the_parts_of_a_row_joined_are_the_chat_template_s_own_tokens(subword_tokenizer):
    task, row = own_task(), {"id": "1", "question": "How many are 3 + 14?", "answer": "17"}
    parts = core.splice(subword_tokenizer, task, row)
    prompt = core.encode_in_place(subword_tokenizer, task, row["question"], "think step by step.")[1]
    turn = [{"role": "user", "content": "How many are 3 + 14?\nUse think step by step."}]
    whole = subword_tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=False)
    assert parts.before + prompt + parts.between == whole
    assert core.prompt_text(subword_tokenizer, parts, prompt) == " think step by step."


def test_the_answer_s_ids_are_those_behind_the_extractor(subword_tokenizer):
    task = own_task("boolean", "The answer is $", ("True", "False"))
    extractor, answer = core.answer_ids(subword_tokenizer, task, "True")
    whole = core.encode(subword_tokenizer, ". The answer is $ True")
    assert core.encode(subword_tokenizer, ".") + extractor + answer == whole
    assert subword_tokenizer.decode(answer).strip() == "True"


def test_an_extractor_that_merges_with_the_answer_is_an_error_that_shows_both_tails(subword_tokenizer):
    task = own_task("boolean", "The answer is $ ", ("True", "False"))
    with pytest.raises(UserError, match=r"row 7: the tokenizer merges.*become.*[TĠ▁]True"):
        core.splice(subword_tokenizer, task, {"id": "7", "question": "Is it?", "answer": "True"})


def test_a_prompt_without_tokens_is_an_error(demo_tokenizer, demo_task):
    with pytest.raises(UserError, match="--initial-prompt"):
        core.encode_in_place(demo_tokenizer, demo_task, "1 + 1 ?", "  ")


def test_a_prompt_that_the_tokenizer_does_not_know_is_an_error(demo_tokenizer, demo_task):
    with pytest.raises(UserError, match="does not know all of the prompt 'find rhubarb .'"):
        core.encode_in_place(demo_tokenizer, demo_task, "1 + 1 ?", "find rhubarb .")


def test_an_answer_without_tokens_is_an_error(demo_tokenizer):
    with pytest.raises(UserError, match="adds no token"):
        core.answer_ids(demo_tokenizer, own_task("number", "so it is $"), "8")  # "$" and "$8" are one unknown word


def test_a_template_that_rewrites_the_text_is_an_error(demo_tokenizer, demo_task):
    other = type(demo_tokenizer)(tokenizer_object=demo_tokenizer.backend_tokenizer, eos_token="<|end|>")
    other.chat_template = "{% for m in messages %}{{ m['content'] | upper }}{% endfor %}"
    with pytest.raises(UserError, match="chat template changes"):
        core.encode_in_place(other, demo_task, "1 + 1 ?", "find it .")


def test_braces_in_a_question_are_text(subword_tokenizer):
    task = own_task()
    row = {"id": "1", "question": "What is {prompt} in {question}?", "answer": "1"}
    parts = core.splice(subword_tokenizer, task, row)
    assert "What is {prompt} in {question}?\nUse" in subword_tokenizer.decode(parts.before)


def test_survives_encoding_refuses_what_reads_the_same_but_is_other_tokens(subword_tokenizer):
    task, row = own_task(), {"id": "1", "question": "How many?", "answer": "1"}
    parts = core.splice(subword_tokenizer, task, row)
    good = core.encode_in_place(subword_tokenizer, task, "How many?", "use reasoning.")[1]
    assert core.survives_encoding(subword_tokenizer, parts, good)
    letters = [core.encode(subword_tokenizer, letter)[0] for letter in " use"]
    assert subword_tokenizer.decode(letters).strip() == "use"
    assert not core.survives_encoding(subword_tokenizer, parts, letters)


# --- Question and prompt, read once ------------------------------------------------------------------


def test_align_right_moves_each_row_and_masks_what_comes_in():
    states = torch.arange(12.0).reshape(3, 1, 4, 1)
    mask = torch.tensor([[0, 1, 1, 1], [9, 9, 9, 9], [1, 1, 1, 1]])
    past = core.Growing([(states[:, :, :3], -states[:, :, :3])], lambda states: states)
    past.update(states[:, :, 3:], -states[:, :, 3:])
    (layer,), moved = core.align_right([past], mask, torch.tensor([0, 2]), torch.tensor([1, 2]))
    keys, values = layer.update(*torch.full((2, 2, 1, 1, 1), 99.0))
    assert moved.tolist() == [[0, 0, 1, 1], [0, 0, 1, 1]]
    assert keys[0, 0, 2:, 0].tolist() == [1, 2, 99] and values[1, 0, 2:, 0].tolist() == [-8, -9, 99]


def test_a_prefix_read_token_by_token_is_that_of_the_whole_sequence(any_model, few_rows):
    rows, prompt = few_rows
    prefix = prefix_of(any_model, rows, prompt[:3])
    part = prefix.take([4, 0])
    assert part.mask.shape[1] == max(len(rows[i].before) for i in (4, 0)) + 3
    for n, i in enumerate([4, 0]):
        ids = torch.tensor([rows[i].before + list(prompt[:3])])
        expected = any_model(input_ids=ids).logits[0].log_softmax(-1)
        torch.testing.assert_close(part.log_probs[n], expected[-1])
        torch.testing.assert_close(part.nll[n], -expected[-4:-1].gather(1, ids[0, -3:, None])[:, 0])


def test_a_known_prefix_is_used_only_if_it_leads_to_the_tokens(llama, few_rows):
    rows, prompt = few_rows
    work = core.Work()
    questions = core.read_questions(llama, rows, 3, work)
    known = core.prefix_at(llama, questions, prompt[:2], work)
    before = work.counts["forward_tokens"]
    for tokens in (prompt[:3], (), (prompt[0], 60)):
        found = core.prefix_at(llama, questions, tokens, work, known)
        fresh = core.prefix_at(llama, questions, tokens, core.Work())
        assert found.tokens == tokens and torch.equal(found.log_probs, fresh.log_probs)
    assert work.counts["forward_tokens"] - before == (1 + 0 + 2) * len(rows)


def prefix_of(model, rows, tokens):
    return core.prefix_at(model, core.read_questions(model, rows, 2, core.Work()), tuple(tokens), core.Work())


# --- Reasoning -----------------------------------------------------------------------------------------


def greedy_reference(model, context, limit):
    """One token at a time, the whole sequence each time, no cache, no padding."""
    ids = list(context)
    for _ in range(limit):
        token = model(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item()
        if token in model.generation_config.eos_token_id:
            return ids[len(context) :], True
        ids.append(token)
    return ids[len(context) :], False


def test_batched_reasoning_is_that_of_one_row_at_a_time(any_model, few_rows):
    rows, prompt = few_rows
    contexts = [row.before + list(prompt) + row.between for row in rows]
    expected = [greedy_reference(any_model, context, 12) for context in contexts]
    assert core.generate_greedily(any_model, contexts, 12, 3) == expected


def test_greedy_decoding_is_that_of_transformers(any_model, few_rows):
    rows, prompt = few_rows
    for row in rows[:2]:
        ids = torch.tensor([row.before + list(prompt) + row.between])
        theirs = any_model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=15)
        theirs = theirs[0, ids.shape[1] :].tolist()
        ours, stopped = core.generate_greedily(any_model, ids.tolist(), 15, 1)[0]
        assert ours == (theirs[:-1] if stopped else theirs)


@pytest.mark.parametrize("position", [0, 4])
@pytest.mark.parametrize("batch_size", [3, 100])
def test_reasoning_and_score_from_shared_keys_and_values_are_those_of_whole_sequences(
    any_model, few_rows, position, batch_size, monkeypatch
):
    """Rows of very different length, some of which end early: the ids, losses and likelihoods of the plain path."""
    rows, prompt = few_rows
    rows = [
        core.Row(r.before * (1 + 2 * (n % 2)), r.between, r.extractor, r.answer * (1 + n % 3))
        for n, r in enumerate(rows)
    ]
    prompts = [(*prompt[:position], token, *prompt[position + 1 :]) for token in (60, 75, 90)]
    config = settings(max_new_tokens=30, batch_size=batch_size, loss_temperature=0.7)
    plain = {
        n: [greedy_reference(any_model, r.before + list(p) + r.between, 30) for r in rows]
        for n, p in enumerate(prompts)
    }
    # A token that ends the reasonings at many different places, so that rows leave the batch at different times.
    texts = [ids for done in plain.values() for ids, _ in done]
    ends = max(set(sum(texts, [])), key=lambda token: len({ids.index(token) for ids in texts if token in ids}))
    any_model.generation_config.eos_token_id = [ends]
    work = core.Work()
    prefix = core.prefix_at(any_model, core.read_questions(any_model, rows, 2, work), prompt[:position], work)
    done = core.reason_and_score(any_model, rows, prefix, prompts, config, work)
    lengths = set()
    for n, candidate in enumerate(prompts):
        for i, row in enumerate(rows):
            reasoning, cross_entropy, wrong, nll = done[n, i]
            expected, _ = greedy_reference(any_model, row.before + list(candidate) + row.between, 30)
            assert reasoning == expected
            found = cross_entropy, wrong, nll
            assert found == pytest.approx(slow_losses(any_model, row, candidate, expected, 0.7), rel=1e-9)
            lengths.add(len(expected))
    assert len(lengths) > 2 and len(done) == 15


@pytest.mark.parametrize("family", FAMILIES)
def test_in_float32_with_all_shortcuts_the_ids_are_the_plain_model_s_and_the_losses_within_1e_5(
    demo_tokenizer, few_rows, family, monkeypatch
):
    model = tiny_model(family, demo_tokenizer, torch.float32)
    monkeypatch.setattr(frozen_model, "faster", lambda model: model)
    plain = tiny_model(family, demo_tokenizer, torch.float32)
    plain.set_attn_implementation("eager")
    rows, prompt = few_rows
    prompts, work = [(*prompt[:2], token, *prompt[3:]) for token in (60, 75)], core.Work()
    prefix = core.prefix_at(model, core.read_questions(model, rows, 8, work), prompt[:2], work)
    done = core.reason_and_score(model, rows, prefix, prompts, settings(max_new_tokens=20, loss_temperature=0.7), work)
    for (n, i), (reasoning, *losses) in done.items():
        row, candidate = rows[i], prompts[n]
        expected, _ = greedy_reference(plain, row.before + list(candidate) + row.between, 20)
        assert reasoning == expected
        assert losses == pytest.approx(slow_losses(plain, row, candidate, expected, 0.7), rel=1e-5, abs=1e-5)
    assert len(done) == 10


class Waits(TorchDispatchMode):
    """Counts the operations for which the host waits for a GPU: those that bring a value or a size to it."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation.overloadpacket.__name__
        self.seen[name] += name in (
            "_local_scalar_dense",
            "nonzero",
            "masked_select",
            "equal",
            "is_nonzero",
            "_unique2",
        )
        return operation(*args, **(kwargs or {}))


def test_a_decoding_step_does_not_wait_for_the_device_between_two_looks(any_model, few_rows, monkeypatch):
    rows, prompt = few_rows
    config, work = settings(max_new_tokens=24, batch_size=100), core.Work()
    prefix = core.prefix_at(any_model, core.read_questions(any_model, rows, 8, work), prompt[:2], work)
    monkeypatch.setitem(core.CHECK_EVERY, "cpu", 8)
    per_read, plain_read = [], core.read

    def read(*args):
        with Waits() as waits:
            logits = plain_read(*args)
        per_read.append(waits.seen.total())
        return logits

    monkeypatch.setattr(core, "read", read)
    with Waits() as everything:
        core.reason_and_score(any_model, rows, prefix, [prompt], config, work, {(0, i): 24 for i in range(len(rows))})
    assert len(per_read) >= 24 and not any(per_read)
    assert 0 < everything.seen.total() < 24 + 60  # three looks, and what a finished row is read for


def test_a_batch_size_of_0_is_one_that_fits_and_changes_nothing(any_model, few_rows, monkeypatch):
    rows, prompt = few_rows
    asked, work = [], core.Work()
    prefix = core.read_questions(any_model, rows, 0, work)

    def found(size):
        done = core.reason_and_score(any_model, rows, prefix, [prompt], settings(batch_size=size), work)
        contexts = [row.before for row in rows]
        return done, core.generate_greedily(any_model, contexts, 5, size), prefix.log_probs.tolist()

    expected = found(2)
    for fit in (1, 3):
        monkeypatch.setattr(core, "rows_for_generation", lambda *sizes, fit=fit: asked.append(sizes[1:]) or fit)
        again = found(0)
        assert again[1] == expected[1] and again[0].keys() == expected[0].keys()
        for job, (ids, *losses) in expected[0].items():
            assert again[0][job][0] == ids and again[0][job][1:] == pytest.approx(losses)
    longest = max(len(r.before) + len(prompt) + len(r.between + r.extractor + r.answer) for r in rows)
    generating = longest + settings().max_new_tokens, len(prompt)  # positions whose logits are read
    assert asked[:2] == [generating, (max(len(r.before) for r in rows) + 5,)]


def test_reasoning_ends_before_the_end_token_and_counts_it(demo_model, few_rows, demo_tokenizer):
    rows, prompt = few_rows
    work = core.Work()
    contexts = [row.before + list(prompt) + row.between for row in rows]
    done = core.generate_greedily(demo_model, contexts, 40, 8, work)
    assert all(stopped for _, stopped in done)
    assert all(demo_tokenizer.eos_token_id not in ids for ids, _ in done)
    assert work.counts["generated_tokens"] == sum(len(ids) + 1 for ids, _ in done)
    cut = core.generate_greedily(demo_model, contexts, 2, 8)
    assert cut == [(ids[:2], len(ids) < 2) for ids, _ in done]


# --- The loss --------------------------------------------------------------------------------------------


def constant_model(tokenizer, logits):
    """A model whose logits are the same everywhere."""
    model = tiny_model("llama", tokenizer)
    model.lm_head = torch.nn.Linear(model.config.hidden_size, len(logits), dtype=torch.float64)
    torch.nn.init.zeros_(model.lm_head.weight)
    model.lm_head.bias.data = torch.tensor(logits, dtype=torch.float64)
    return freeze(model, tokenizer)


def test_the_loss_on_constant_logits_is_the_one_worked_out_by_hand(demo_tokenizer, few_rows):
    rows, prompt = few_rows
    logits = [0.0] * len(demo_tokenizer)
    logits[rows[0].answer[0]] = 2.0
    model = constant_model(demo_tokenizer, logits)
    v = len(logits)
    cross_entropy, wrong, nll = core.answer_loss(model, rows, prompt, [[7] * n for n in range(5)], settings())
    # One token has logit 2, the other V - 1 have 0; the answer's logits are divided by 0.2.
    right = math.log(math.exp(10) + v - 1) - 10
    assert cross_entropy[0].item() == pytest.approx(right)
    assert wrong.tolist() == [row.answer != rows[0].answer for row in rows]
    assert cross_entropy[wrong][0].item() == pytest.approx(right + 10)
    assert nll[0].item() == pytest.approx(math.log(math.exp(2) + v - 1))


def test_an_answer_of_several_tokens_is_wrong_if_one_token_is_and_its_loss_is_the_mean():
    logits = torch.tensor([[[3.0, 0, 0], [0, 5.0, 0]]]).expand(3, -1, -1)
    rows = [core.Row([], [], [], answer) for answer in ([0, 1], [0, 2], [0])]
    cross_entropy, wrong = core.answer_cross_entropy(logits, rows, 1.0)
    a, b = math.log(math.exp(3) + 2) - 3, math.log(math.exp(5) + 2)
    assert wrong.tolist() == [False, True, False]
    assert cross_entropy.tolist() == pytest.approx([(a + b - 5) / 2, (a + b) / 2, a])


def slow_losses(model, row, prompt, reasoning, temperature):
    """(cross-entropy, wrong, nll) of one row, unpadded, all logits, plain indexing."""
    ids = row.before + list(prompt) + row.between + reasoning + row.extractor + row.answer
    logits = model(input_ids=torch.tensor([ids])).logits[0]
    start, end = len(row.before), len(ids) - len(row.answer)
    answers = torch.tensor(row.answer)
    cross_entropy = F.cross_entropy(logits[end - 1 : -1] / temperature, answers)
    wrong = bool((logits[end - 1 : -1].argmax(-1) != answers).any())
    nll = F.cross_entropy(logits[start - 1 : start - 1 + len(prompt)], torch.tensor(prompt))
    return cross_entropy.item(), wrong, nll.item()


def test_batched_losses_are_those_of_one_row_at_a_time(any_model, few_rows):
    rows, prompt = few_rows
    rows = [core.Row(r.before, r.between, r.extractor, r.answer * (1 + n % 3)) for n, r in enumerate(rows)]
    reasoning = [[20 + n] * (3 * n) for n in range(len(rows))]
    expected = [slow_losses(any_model, row, prompt, r, 0.7) for row, r in zip(rows, reasoning)]
    found = core.answer_loss(any_model, rows, prompt, reasoning, settings(loss_temperature=0.7))
    for values, references in zip(found, zip(*expected)):
        assert values.tolist() == pytest.approx(references, rel=1e-9)


def test_a_one_hot_choice_of_the_current_token_changes_nothing(any_model, few_rows):
    rows, prompt = few_rows
    reasoning, prefix = [[20] * 4 for _ in rows], prefix_of(any_model, rows, prompt[:3])
    plain = core.sequence_losses(any_model, rows, prefix, prompt, reasoning, 0.2)
    candidates = torch.tensor([60, prompt[3], 61])
    one_hot = torch.tensor([[0.0, 1.0, 0.0]], dtype=torch.float64).repeat(len(rows), 1)
    mixed = core.sequence_losses(any_model, rows, prefix, prompt, reasoning, 0.2, (candidates, one_hot))
    for a, b, c in zip(plain, mixed, core.answer_loss(any_model, rows, prompt, reasoning, settings())):
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(a, c)


# --- Proposals --------------------------------------------------------------------------------------------


@given(
    st.integers(1, 6).flatmap(
        lambda q: st.lists(st.lists(st.integers(-50, 50), min_size=9, max_size=9, unique=True), min_size=q, max_size=q)
    ),
    st.integers(1, 9),
)
@hypothesis_settings(deadline=None, max_examples=60)
def test_top_k_intersection_is_the_intersection_of_sorted_prefixes(rows, k):
    expected = set(range(9))
    for row in rows:
        expected &= set(sorted(range(9), key=lambda i: -row[i])[:k])
    assert core.top_k_intersection(torch.tensor(rows, dtype=torch.float64), k) == expected


def test_no_special_token_digit_or_symbol_may_enter_a_prompt(subword_tokenizer):
    allowed = core.allowed_tokens(subword_tokenizer, len(subword_tokenizer) + 3)
    texts = [subword_tokenizer.decode([i]) for i in allowed.nonzero()[:, 0].tolist()]
    assert len(allowed) == len(subword_tokenizer) + 3 and not allowed[-3:].any()
    assert not allowed[subword_tokenizer.all_special_ids].any()
    assert " step" in texts and "." in texts
    assert all(t.strip().isalpha() or t in core.PUNCTUATION for t in texts)


def test_added_tokens_and_letters_of_other_alphabets_may_not_enter_a_prompt(demo_tokenizer):
    tokenizer = copy.deepcopy(demo_tokenizer)
    tokenizer.add_tokens(["word", "m\u0438r", "STOP"])
    before, after = len(demo_tokenizer), len(tokenizer)
    allowed = core.allowed_tokens(tokenizer, after)
    assert after == before + 3 and not allowed[before:].any()
    assert torch.equal(allowed[:before], core.allowed_tokens(demo_tokenizer, before))
    letters = gemma_like().backend_tokenizer.get_vocab()
    assert not core.allowed_tokens(gemma_like(), 600)[letters["<0x41>"]]


def test_k_grows_by_two_until_enough_candidates_are_found():
    log_probs = torch.tensor([[9.0, 8, 7, 6, 5, 4], [4.0, 5, 6, 7, 8, 9]])
    allowed = torch.ones(6, dtype=torch.bool)
    # Top 3 share nothing, top 5 share tokens 1-4, whose means are equal, so the order is by id.
    assert core.propose_candidates(log_probs, allowed, [[0, 1]], 3, 2, lambda t: True) == ([1, 2, 3, 4], 5)
    # The union over two samples of one row each needs no intersection; candidates come likeliest first.
    assert core.propose_candidates(log_probs, allowed, [[0]], 2, 2, lambda t: True) == ([0, 1], 2)
    assert sorted(core.propose_candidates(log_probs, allowed, [[0], [1]], 2, 2, lambda t: True)[0]) == [0, 1, 4, 5]


def test_refused_tokens_do_not_count_and_an_empty_result_names_the_flag():
    log_probs, allowed = torch.tensor([[3.0, 2, 1, 0]]), torch.tensor([True, True, True, False])
    found, k = core.propose_candidates(log_probs, allowed, [[0]], 1, 2, lambda t: t != 0)
    assert (found, k) == ([1, 2], 3)
    with pytest.raises(UserError, match="--min-candidates"):
        core.propose_candidates(log_probs, allowed, [[0]], 1, 3, lambda t: t != 0)
    with pytest.raises(UserError, match="--min-candidates"):
        core.propose_candidates(log_probs, allowed, [[0]], 1, 1, lambda t: False)


# --- The gradient ---------------------------------------------------------------------------------------------


def whole_losses(model, row, reasoning, prompt, position, candidates, one_hot, embedding):
    """(cross-entropy at temperature 0.7, nll) of one whole sequence, with an embedding put at the position."""
    ids = torch.tensor([row.before + list(prompt) + row.between + reasoning + row.extractor + row.answer])
    start, embeddings = len(row.before), model.get_input_embeddings()(ids)
    at = start + position
    embeddings = torch.cat([embeddings[:, :at], embedding[None, None], embeddings[:, at + 1 :]], 1)
    logits = model(inputs_embeds=embeddings).logits[0]
    answers = len(row.answer)
    cross_entropy = F.cross_entropy(logits[-1 - answers : -1] / 0.7, torch.tensor(row.answer))
    log_probs = logits[start - 1 : start - 1 + len(prompt)].log_softmax(-1)
    each = [log_probs[j, t] for j, t in enumerate(prompt)]
    each[position] = one_hot @ log_probs[position, candidates]
    return cross_entropy, -torch.stack(each).mean()


@pytest.mark.parametrize("fluency", ["nll", "perplexity"])
@pytest.mark.parametrize("position", [0, 3, -1])
def test_candidate_gradients_are_central_differences_of_the_loss(any_model, few_rows, position, fluency):
    rows, prompt = few_rows
    position %= len(prompt)
    rows, reasoning = rows[:3], [[30, 41, 22], [25] * 9, []]
    candidates = [60, 75, prompt[position], 90]
    config = settings(fluency=fluency, fluency_weight=0.7, loss_temperature=0.7, gradient_batch_size=2)
    prefix = prefix_of(any_model, rows, prompt[:position])
    found = core.candidate_gradients(any_model, rows, prefix, prompt, candidates, reasoning, config, core.Work())
    gradients, losses = found
    assert gradients.dtype == torch.float64 and gradients.shape == (3, 4)

    def loss(one_hot):
        """By the plain path: whole sequences, all of them read for every loss."""
        mixture = one_hot @ any_model.get_input_embeddings()(torch.tensor(candidates))
        parts = [
            whole_losses(any_model, *row, prompt, position, candidates, *m)
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
    embedding = llama.get_input_embeddings()
    center = embedding.weight.data.mean(0, keepdim=True)
    embedding.weight.data = center + 1e-6 * (embedding.weight.data - center)
    everything = list(range(len(embedding.weight)))
    reasoning = [[30, 31] for _ in rows]
    config = settings(fluency_weight=0.0)
    prefix = prefix_of(llama, rows, prompt[:2])
    found = core.candidate_gradients(llama, rows, prefix, prompt, everything, reasoning, config, core.Work())
    gradients, losses = found
    predicted = (gradients - gradients[:, [prompt[2]]]).mean(0)
    changed = [core.answer_loss(llama, rows, (*prompt[:2], t, *prompt[3:]), reasoning, config)[0] for t in everything]
    true = torch.stack(changed, 1).mean(0) - losses.mean()
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

    def gradients(config):
        return core.candidate_gradients(llama, rows, prefix, prompt, candidates, reasoning, config, core.Work())[0]

    own_term = gradients(settings()) - gradients(settings(fluency_weight=0.0))
    torch.testing.assert_close(own_term, -0.2 * prefix.log_probs[:, candidates] / len(prompt))


def test_the_ablation_without_reasoning_drops_it_from_the_gradient_alone(llama, few_rows):
    rows, prompt = few_rows
    prefix, choices = prefix_of(llama, rows, prompt[:2]), [60, 75, prompt[2]]
    reasoning = [[30 + n] * 4 for n in range(5)]

    def gradients(reasoning, **changes):
        return core.mean_gradients(llama, rows, prefix, prompt, choices, reasoning, settings(**changes), core.Work())

    with_it, without = gradients(reasoning), gradients([[]] * 5)
    assert gradients(reasoning, gradient_without_reasoning=True) == without
    assert all(abs(with_it[token] - without[token]) > 1e-6 for token in choices)
    assert gradients(reasoning, shortlist="random") == {}


def test_rows_of_a_backward_pass_change_nothing_and_follow_the_model_s_size_if_not_given(llama, few_rows, monkeypatch):
    rows, prompt = few_rows
    prefix, choices = prefix_of(llama, rows, prompt[:2]), [60, 75, prompt[2]]
    reasoning = [[30 + n] * 4 * n for n in range(5)]

    def gradients(size):
        config = settings(gradient_batch_size=size)
        return core.candidate_gradients(llama, rows, prefix, prompt, choices, reasoning, config, core.Work())

    expected = gradients(1)
    for count in (1, 2, 100):
        monkeypatch.setattr(core, "rows_for_backward", lambda model, tokens, count=count: count)
        torch.testing.assert_close(gradients(0), expected)


# --- Selection and the walk ---------------------------------------------------------------------------------


def score(objective, ids=(1,)):
    return core.Score(tuple(ids), objective, 0.0, 0.0, objective, 0)


def test_of_equal_objectives_the_first_wins_or_the_last():
    scores = [score(2.0, (1,)), score(1.0, (2,)), score(1.0, (3,))]
    assert core.select_candidate(scores).prompt_ids == (2,)
    assert core.select_candidate(scores, ties="last").prompt_ids == (3,)


def test_the_objectives_are_the_paper_s_loss_and_the_released_rule():
    cross_entropy, wrong, nll = (torch.tensor(v, dtype=torch.float64) for v in ([4.0, 2.0], [1.0, 0.0], [1.0, 3.0]))
    assert core.objective_value(cross_entropy, wrong, nll, settings()) == pytest.approx(3 + 0.2 * 2)
    assert core.objective_value(cross_entropy, wrong, nll, settings(objective="error")) == pytest.approx(0.5 + 0.02 * 2)
    perplexity = (math.e + math.e**3) / 2
    found = core.objective_value(cross_entropy, wrong, nll, settings(fluency="perplexity"))
    assert found == pytest.approx(3 + 0.2 * perplexity)


def test_the_position_walks_on_grows_an_open_prompt_and_wraps_a_closed_or_full_one(demo_tokenizer):
    closed, open_ = (tuple(core.encode(demo_tokenizer, t)) for t in ("find the answer .", "find the answer and"))
    assert [core.next_position(demo_tokenizer, closed, i, 9) for i in range(4)] == [1, 2, 3, 0]
    assert core.next_position(demo_tokenizer, open_, 3, 9) == 4
    assert core.next_position(demo_tokenizer, open_, 3, 4) == 0


def test_shortlists_are_the_most_negative_gradients_or_random_or_all():
    gradients = {5: 0.3, 6: -2.0, 7: -0.1, 8: 0.0}
    assert core.make_shortlist([5, 6, 7, 8], gradients, settings(shortlist_size=2), None) == [6, 7]
    assert core.make_shortlist([5, 6, 7, 8], {}, settings(shortlist="all"), None) == [5, 6, 7, 8]
    draws = {
        tuple(core.make_shortlist([5, 6, 7, 8], {}, settings(shortlist="random", shortlist_size=2), random.Random(s)))
        for s in range(20)
    }
    assert len(draws) > 5 and all(len(set(d)) == 2 for d in draws)


def test_the_released_rule_forces_a_full_stop_only_in_the_second_half(demo_tokenizer):
    stop, word = core.encode(demo_tokenizer, ". now")
    forced = settings(force_sentence_end=True)
    assert core.forced_end(demo_tokenizer, [word, stop], 4, 8, forced) == stop
    assert core.forced_end(demo_tokenizer, [word, stop], 3, 8, forced) is None
    assert core.forced_end(demo_tokenizer, [word], 4, 8, forced) is None
    assert core.forced_end(demo_tokenizer, [word, stop], 4, 8, settings()) is None


@pytest.mark.parametrize(("text", "ends"), [(".", True), ("!", True), ("?", True), (",", False), ("now", False)])
def test_a_sentence_ends_in_a_full_stop_or_its_likes(demo_tokenizer, text, ends):
    class Tokenizer:
        def decode(self, ids):
            assert ids == (7,)
            return f"{text} "

    assert core.ends_sentence(Tokenizer(), (3, 7)) is ends


def test_finalists_are_finished_prompts_and_the_start_and_best_is_the_first_of_them(demo_tokenizer, few_rows):
    def ids(text):
        return tuple(core.encode(demo_tokenizer, text))

    start, open_, closed, other = ids("find it and"), ids("check it and"), ids("find it ."), ids("tell it .")
    scored = {p: score(o, p) for p, o in ((start, 3.0), (open_, 0.5), (closed, 2.0), (other, 1.0))}
    assert [s.prompt_ids for s in core.finalists(demo_tokenizer, scored, 9)] == [other, closed, start]
    assert [s.prompt_ids for s in core.finalists(demo_tokenizer, scored, 2)] == [other, closed]
    record = core.make_record(demo_tokenizer, few_rows[0][0], 3, 1, scored[open_], scored, core.Work())
    assert (record["objective"], record["best"]["objective"]) == (0.5, 1.0)


def test_prompts_are_ranked_by_dev_accuracy_then_objective_or_by_the_objective_alone():
    prompts = [{"dev_accuracy": a, "objective": o} for a, o in ((0.5, 1.0), (0.7, 3.0), (0.7, 2.0))]
    assert [p["objective"] for p in core.rank_prompts(prompts, "dev")] == [2.0, 3.0, 1.0]
    assert [p["objective"] for p in core.rank_prompts(prompts, "train")] == [1.0, 2.0, 3.0]


def test_prompts_scored_together_are_scored_as_alone(demo_model, run):
    rows, start, config, records = run
    questions = core.read_questions(demo_model, rows, 8, core.Work())
    prompts = [tuple(start), tuple(records[-1]["prompt_ids"])[: len(start) - 1] + (start[-1],)]
    together = core.score_prompts(demo_model, rows, questions, prompts, config, core.Work())
    alone = [core.score_prompts(demo_model, rows, questions, [p], config, core.Work())[0] for p in prompts]
    assert [s.reasoning for s in together] == [s.reasoning for s in alone]
    assert together[0].reasoning != together[1].reasoning
    for a, b in zip(together, alone):
        assert a.prompt_ids == b.prompt_ids and a.objective == pytest.approx(b.objective, rel=1e-4)


@pytest.mark.parametrize(("ties", "kept"), [("first", True), ("last", False)])
def test_a_step_breaks_ties_as_it_is_told(demo_tokenizer, few_rows, ties, kept):
    """Under constant logits every prompt is as good as any other."""
    model = constant_model(demo_tokenizer, [0.0] * len(demo_tokenizer))
    config = settings(steps=1, ties=ties)
    start, record = core.optimize(model, demo_tokenizer, *few_rows, config)
    assert (record["prompt_ids"] == start["prompt_ids"]) is kept
    if not kept:
        assert record["prompt_ids"][0] == record["shortlist"][-1]["token"]


def test_a_forced_full_stop_ends_the_trials_of_its_step(demo_tokenizer, few_rows):
    rows, prompt = few_rows
    model = constant_model(demo_tokenizer, [0.0] * len(demo_tokenizer))
    config = settings(
        steps=len(prompt) - 1, shortlist="all", force_sentence_end=True, top_k=999, max_new_tokens=1, batch_size=999
    )
    stop = core.encode(demo_tokenizer, ".")[0]
    for record in list(core.optimize(model, demo_tokenizer, rows, prompt, config))[1:]:
        tried = [e["token"] for e in record["shortlist"]]
        forced = record["position"] >= len(prompt) / 2
        assert (record["prompt_ids"][record["position"]] == stop) is forced
        assert (tried[-1] == stop and stop not in tried[:-1]) or not forced
        assert len(tried) < len(record["candidates"]) - 1 or not forced


@pytest.fixture(scope="module")
def wandering(demo_model, demo_tokenizer, demo_task, demo_data):
    """A search that grows, meets prompts again and tries few rows: (rows, start, settings, records, samples)."""
    config = settings(
        steps=26, max_new_tokens=40, max_prompt_tokens=5, sampled_rows=3, intersections=2, fluency_weight=9.0, seed=1
    )
    rows = [core.splice(demo_tokenizer, demo_task, row) for row in demo_data["train"][:4]]
    start = core.encode(demo_tokenizer, "find the answer and")
    samples, original = [], core.propose_candidates

    def spy(log_probs, allowed, drawn, *rest):
        assert len(log_probs) == 4
        samples.append(drawn)
        return original(log_probs, allowed, drawn, *rest)

    core.propose_candidates = spy
    try:
        records = list(core.optimize(demo_model, demo_tokenizer, rows, start, config))
    finally:
        core.propose_candidates = original
    return rows, start, config, records, samples


def test_a_wandering_search_grows_at_its_end_and_takes_the_best_of_what_competes(wandering):
    records = wandering[3]
    assert any(r["grows"] for r in records[1:])
    assert any(not e["new"] for r in records[1:] for e in r["shortlist"])
    for before, after in itertools.pairwise(records):
        rivals = [e["objective"] for e in after["shortlist"]] + ([] if after["grows"] else [before["objective"]])
        assert after["objective"] == min(rivals)
        assert len(after["prompt_ids"]) == len(before["prompt_ids"]) + after["grows"] <= 5
        assert after["position"] == len(before["prompt_ids"]) or not after["grows"]


def test_each_step_s_gradients_are_those_at_its_prompt_over_its_reasoning(wandering, demo_model):
    rows, _, config, records, _ = wandering
    questions = core.read_questions(demo_model, rows, 4, core.Work())
    for before, after in itertools.pairwise(records):
        prompt, position = before["prompt_ids"], after["position"]
        contexts = [row.before + prompt + row.between for row in rows]
        reasoning = [ids for ids, _ in core.generate_greedily(demo_model, contexts, 40, 4)]
        tokens = [c["token"] for c in after["candidates"]]
        base = [*prompt, tokens[0]] if after["grows"] else prompt
        prefix = core.prefix_at(demo_model, questions, tuple(prompt[:position]), core.Work())
        found, _ = core.candidate_gradients(demo_model, rows, prefix, base, tokens, reasoning, config, core.Work())
        recorded = torch.tensor([c["gradient"] for c in after["candidates"]], dtype=torch.float64)
        torch.testing.assert_close(found.double().mean(0), recorded, rtol=1e-3, atol=1e-3)


def test_samples_are_drawn_anew_at_every_step_and_for_every_seed(wandering, demo_model, demo_tokenizer, monkeypatch):
    rows, start, config, _, samples = wandering
    assert all(len(step) == 2 and all(len(set(rows)) == 3 for rows in step) for step in samples)
    assert len({str(step) for step in samples}) > 15
    drawn, original = [], core.propose_candidates
    monkeypatch.setattr(core, "propose_candidates", lambda *a: (drawn.append(a[2]), original(*a))[1])
    other = settings(**{**vars(config), "seed": 2, "steps": 6})
    list(core.optimize(demo_model, demo_tokenizer, rows, start, other))
    assert drawn != samples[:6]


@pytest.mark.parametrize("done", [5, 12, 20])
def test_a_wandering_search_resumes_to_the_same(wandering, demo_model, demo_tokenizer, done):
    rows, start, config, records, _ = wandering
    rest = list(core.optimize(demo_model, demo_tokenizer, rows, start, config, records[:done]))
    assert without_seconds(rest) == without_seconds(records[done:])


def test_a_random_shortlist_is_the_seed_s_also_when_resumed(run, demo_model, demo_tokenizer):
    rows, start, config, _ = run

    def search(seed, history=()):
        changed = settings(**{**vars(config), "shortlist": "random", "steps": 4, "seed": seed})
        return without_seconds(core.optimize(demo_model, demo_tokenizer, rows, start, changed, history))

    first = search(0)
    assert search(0) == first and search(0, first[:3]) == first[3:]
    assert [r["prompt"] for r in search(1)] != [r["prompt"] for r in first]
    assert all(c["gradient"] is None for r in first[1:] for c in r["candidates"])


def without_seconds(records):
    return [{k: v for k, v in record.items() if k != "seconds"} for record in records]


@pytest.fixture(scope="module")
def run(demo_model, demo_tokenizer, demo_task, demo_data):
    """A short search on the demo: (rows, settings, records)."""
    config = settings(steps=10, max_new_tokens=40, batch_size=100, gradient_batch_size=8, seed=3)
    data = random.Random(3).sample(demo_data["train"], 8)
    rows = [core.splice(demo_tokenizer, demo_task, row) for row in data]
    start = core.encode_in_place(demo_tokenizer, demo_task, data[0]["question"], "find the answer now .")[1]
    return rows, start, config, list(core.optimize(demo_model, demo_tokenizer, rows, start, config))


def test_the_objective_never_rises_unless_the_prompt_grows(run):
    records = run[3]
    assert len(records) == 11 and records[-1]["objective"] < records[0]["objective"]
    for before, after in itertools.pairwise(records):
        assert after["grows"] or after["objective"] <= before["objective"]
        assert after["best"]["objective"] <= before["best"]["objective"]


def test_records_are_json_and_hold_what_was_tried(run):
    for record in json.loads(json.dumps(run[3]))[1:]:
        tokens = [c["token"] for c in record["candidates"]]
        assert {e["token"] for e in record["shortlist"]} <= set(tokens)
        gradients = {c["token"]: c["gradient"] for c in record["candidates"]}
        picked = [e["token"] for e in record["shortlist"]]
        rivals = tokens if record["grows"] else tokens[:-1]  # the incumbent stands last and is not shortlisted
        assert picked == sorted(rivals, key=gradients.get)[:3]
        assert record["prompt_ids"][record["position"]] in tokens


def test_no_prompt_is_scored_twice(run):
    tried = [tuple(e["prompt_ids"]) for r in run[3][1:] for e in r["shortlist"] if e["new"]]
    assert len(tried) == len(set(tried)) and tuple(run[1]) not in tried


def test_the_prompt_s_text_encoded_afresh_gives_the_searched_ids(run, demo_tokenizer, demo_task, demo_data):
    for record in run[3]:
        ids = core.encode_in_place(demo_tokenizer, demo_task, demo_data["dev"][0]["question"], record["prompt"])[1]
        assert ids == record["prompt_ids"]


@pytest.mark.parametrize("done", [1, 4, 9])
def test_a_resumed_search_equals_an_uninterrupted_one(run, demo_model, demo_tokenizer, done):
    rows, start, config, records = run
    history = json.loads(json.dumps(records[:done]))
    rest = list(core.optimize(demo_model, demo_tokenizer, rows, start, config, history))
    assert without_seconds(rest) == without_seconds(records[done:])


def test_a_resumed_search_makes_the_batches_that_memory_allowed_before(run, demo_model, demo_tokenizer, monkeypatch):
    rows, start, config, _ = run
    batches, full, plain = [], [1], core.decode

    def decode(model, layers, mask, *rest):
        if full and len(mask) > 8:  # memory runs out once, in the first selection
            full.clear()
            raise torch.OutOfMemoryError("none left")
        batches.append(len(mask))
        return plain(model, layers, mask, *rest)

    monkeypatch.setattr(core, "decode", decode)
    records = list(core.optimize(demo_model, demo_tokenizer, rows, start, config))
    assert [r["batch_sizes"] for r in records] == [{}] + [{"generation": 12}] * 10
    whole = batches[:]
    batches.clear()
    rest = list(core.optimize(demo_model, demo_tokenizer, rows, start, config, json.loads(json.dumps(records[:4]))))
    assert without_seconds(rest) == without_seconds(records[4:])
    assert max(batches[1:]) <= 12 and batches[-10:] == whole[-10:]


def test_a_gradient_that_is_not_finite_is_an_error_and_no_shortlist(llama, few_rows, monkeypatch):
    rows, prompt = few_rows
    prefix, reasoning = prefix_of(llama, rows, prompt[:2]), [[30]] * 5
    found = torch.tensor([[0.5, float("nan")]]), None
    monkeypatch.setattr(core, "candidate_gradients", lambda *arguments: found)
    with pytest.raises(UserError, match="not finite.*--dtype float32"):
        core.mean_gradients(llama, rows, prefix, prompt, [60, prompt[2]], reasoning, settings(), core.Work())


def test_gradients_of_a_model_in_half_precision_are_not_rounded_to_it(demo_tokenizer, few_rows):
    model = tiny_model("llama", demo_tokenizer, torch.bfloat16)
    rows, prompt = few_rows
    prefix, choices = prefix_of(model, rows, prompt[:2]), [*range(40, 80), prompt[2]]
    found, losses = core.candidate_gradients(
        model, rows, prefix, prompt, choices, [[30, 31]] * 5, settings(), core.Work()
    )
    assert found.dtype == losses.dtype == torch.float32
    assert not torch.equal(found, found.bfloat16().float())


def test_a_resumed_search_notices_that_the_model_is_another(run, demo_tokenizer):
    rows, start, config, records = run
    other = tiny_model("llama", demo_tokenizer, torch.float32)
    with pytest.raises(UserError, match="--run-dir"):
        next(core.optimize(other, demo_tokenizer, rows, start, config, records[:4]))


def test_finalists_end_a_sentence_or_are_the_start(run, demo_tokenizer):
    scored = core.scores_of(run[3])
    found = core.finalists(demo_tokenizer, scored, 5)
    assert [s.objective for s in found] == sorted(s.objective for s in found)
    initial = next(iter(scored.values()))
    assert all(s is initial or demo_tokenizer.decode(s.prompt_ids).endswith(".") for s in found)
    assert any(not core.ends_sentence(demo_tokenizer, s.prompt_ids) for s in scored.values())


@pytest.mark.parametrize("family", FAMILIES)
def test_fifty_steps_keep_every_position_s_meaning_with_a_subword_tokenizer(subword_tokenizer, family):
    """After each step all tokens but the one searched are what they were, and the text still encodes to the ids."""
    model = tiny_model(family, subword_tokenizer, torch.float32, seed=1)
    task = own_task()
    data = [{"id": str(n), "question": f"How many are {n} + {n * n}?", "answer": str(n + n * n)} for n in range(2, 5)]
    rows = [core.splice(subword_tokenizer, task, row) for row in data]
    start = core.encode_in_place(subword_tokenizer, task, data[0]["question"], "proper logical reasoning.")[1]
    config = settings(steps=50, max_new_tokens=3, max_prompt_tokens=10, fluency_weight=2.0, shortlist_size=2)
    before = start
    for record in core.optimize(model, subword_tokenizer, rows, start, config):
        ids, position = record["prompt_ids"], record["position"]
        if position is not None:
            assert len(ids) == len(before) + record["grows"]
            assert [t for i, t in enumerate(ids) if i != position] == [t for i, t in enumerate(before) if i != position]
        for row in data:
            assert core.encode_in_place(subword_tokenizer, task, row["question"], record["prompt"])[1] == ids
        before = ids
    assert before != start


def test_a_loss_that_is_not_finite_stops_the_search(demo_tokenizer, few_rows):
    model = constant_model(demo_tokenizer, [float("nan")] * len(demo_tokenizer))
    questions = core.read_questions(model, few_rows[0], 5, core.Work())
    with pytest.raises(UserError, match="not finite"):
        core.score_prompts(model, few_rows[0], questions, [few_rows[1]], settings(), core.Work())

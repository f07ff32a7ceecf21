"""The frozen model: loading, batches, and that every way of reading gives the plain forward pass's logits."""

import copy
import math
import platform
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import FAMILIES, ROOT, tiny_model
from transformers import GenerationConfig, GPTJConfig, GPTJForCausalLM
from transformers.cache_utils import DynamicLayer

from support import engine as frozen_model
from support.engine import (
    Growing,
    OneDnnLinear,
    OneDnnProduct,
    Picked,
    SharedQuestions,
    VisibleColumns,
    Work,
    attention,
    empty,
    freeze,
    in_batches,
    load_model,
    logits_at,
    pad,
    read,
    rows_for_backward,
    rows_for_generation,
)
from support.files import UserError

# --- Loading ----------------------------------------------------------------------------------------


def test_a_model_that_is_not_there_or_cannot_chat_is_one_clear_error(tmp_path, demo_tokenizer):
    with pytest.raises(UserError, match="Ways out"):
        load_model(str(tmp_path / "nothing"))
    with pytest.raises(UserError, match="--device teapot"):
        load_model(str(ROOT / "demo" / "model"), device="teapot")
    for name in ("config.json", "model.safetensors"):
        shutil.copy(ROOT / "demo" / "model" / name, tmp_path)
    mute = type(demo_tokenizer)(tokenizer_object=demo_tokenizer.backend_tokenizer, eos_token="<|end|>")
    mute.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no chat template"):
        load_model(str(tmp_path))
    demo_tokenizer.save_pretrained(tmp_path)
    assert load_model(str(tmp_path), "cpu")[0].dtype == torch.float32
    assert load_model(str(tmp_path), "cpu", "bfloat16")[0].dtype == torch.bfloat16
    (tmp_path / "model.safetensors").unlink()
    torch.save({}, tmp_path / "pytorch_model.bin")  # would be a pickle
    with pytest.raises(UserError, match="cannot load"):
        load_model(str(tmp_path), "cpu")


def test_a_model_whose_layers_are_not_all_attention_is_refused(demo_tokenizer):
    model = tiny_model("qwen3", demo_tokenizer)
    model.config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(UserError, match="layers of type linear_attention"):
        freeze(model, demo_tokenizer)


def test_a_model_with_attention_of_its_own_is_refused(demo_tokenizer, llama):
    sizes = {"vocab_size": len(demo_tokenizer), "n_embd": 16, "n_layer": 1, "n_head": 2, "rotary_dim": 4}
    with pytest.raises(UserError, match="use another model"):
        freeze(GPTJForCausalLM(GPTJConfig(**sizes)), demo_tokenizer)
    for setting in ("num_kv_shared_layers", "hidden_size_per_layer_input"):  # Gemma-3n, Gemma-4
        model = tiny_model("llama", demo_tokenizer)
        setattr(model.config, setting, 1)
        with pytest.raises(UserError, match="use another model"):
            freeze(model, demo_tokenizer)
    states = torch.randn(1, 4, 3, 8)
    for addition in ("s_aux", "position_bias"):
        with pytest.raises(UserError, match="use another model"):
            attention(llama.model.layers[0].self_attn, states, states, states, None, 1.0, **{addition: states})


def test_a_model_whose_layers_keep_their_sliding_window_to_themselves_is_refused(llama):
    ids, last, layers = torch.arange(6, 16)[None], torch.tensor([[0]]), empty(DynamicLayer, llama)
    read(llama, layers, torch.ones_like(ids), ids, last)
    shared = SharedQuestions([(layer.keys, layer.values) for layer in layers], [0])
    inputs = torch.ones(1, 11, dtype=torch.long), ids[:, :1], last, shared
    read(llama, empty(Growing, llama), *inputs)
    # Llama's layers look at neither of these.
    for settings in ({"layer_types": ["sliding_attention", "full_attention"]}, {"sliding_window": 8}):
        for name in ("layer_types", "sliding_window"):
            setattr(llama.config, name, settings.get(name))
        with pytest.raises(UserError, match="use another model"):
            read(llama, empty(Growing, llama), *inputs)


def test_freeze_replaces_the_model_s_own_sampling_settings(demo_tokenizer):
    model = tiny_model("llama", demo_tokenizer)
    model.generation_config = GenerationConfig(do_sample=True, repetition_penalty=1.7, eos_token_id=[3, 5])
    freeze(model, demo_tokenizer)
    assert model.generation_config.repetition_penalty in (None, 1.0) and not model.generation_config.do_sample
    assert model.generation_config.eos_token_id == [3, 5]
    assert not any(p.requires_grad for p in model.parameters()) and not model.training
    model.generation_config.eos_token_id = 3
    assert freeze(model.train(), demo_tokenizer).generation_config.eos_token_id == [3, demo_tokenizer.eos_token_id]
    assert not model.training
    model.generation_config.eos_token_id, nameless = None, copy.deepcopy(demo_tokenizer)
    nameless.eos_token = None
    with pytest.raises(UserError, match="no end-of-sequence token"):
        freeze(model, nameless)


# --- Linear layers on a CPU -------------------------------------------------------------------------


@pytest.mark.skipif(
    not torch.backends.mkldnn.is_available() or platform.machine() not in ("x86_64", "AMD64"),
    reason="oneDNN is used on x86 processors only",
)
@pytest.mark.parametrize("family", FAMILIES)
def test_faster_products_are_the_same_products_and_have_the_same_gradient(demo_tokenizer, family, monkeypatch):
    model = tiny_model(family, demo_tokenizer, torch.float32)
    monkeypatch.setattr(frozen_model, "faster", lambda model: model)
    plain = tiny_model(family, demo_tokenizer, torch.float32)
    products = [layer for layer in model.modules() if type(layer) is OneDnnLinear]
    assert len(products) == sum(type(layer) is torch.nn.Linear for layer in plain.modules()) == 2 * 7 + 1
    tied = plain.get_output_embeddings().weight is plain.get_input_embeddings().weight  # whose rows are looked up
    assert sum(layer.weight.is_mkldnn for layer in products) == 2 * 7 + (not tied)
    for count in (1, 3, 40):
        embeddings = torch.randn(count, 5, 32, requires_grad=True)
        found, expected = (m(inputs_embeds=embeddings).logits for m in (model, plain))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        gradients = [torch.autograd.grad(logits.square().sum(), embeddings)[0] for logits in (found, expected)]
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-3)
    layer, inputs = torch.nn.Linear(6, 4), torch.randn(2, 6, requires_grad=True)
    expected = layer(inputs)
    found = OneDnnProduct.apply(inputs, layer.weight.detach(), layer.bias.detach())
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(v.sum(), inputs)[0] for v in (found, expected)))


# --- Batches ----------------------------------------------------------------------------------------


def test_padding_stands_on_one_side_and_is_masked():
    ids, mask = pad([[1, 2], [3], []], "cpu")
    assert (ids.tolist(), mask.tolist()) == ([[1, 2], [3, 0], [0, 0]], [[1, 1], [1, 0], [0, 0]])
    ids, mask = pad([[1, 2], [3]], "cpu", left=True)
    assert (ids.tolist(), mask.tolist()) == ([[1, 2], [0, 3]], [[1, 1], [0, 1]])


def test_in_batches_halves_the_size_when_memory_runs_out_keeps_it_and_loses_nothing():
    sizes, state = [], Work()

    def work(batch):
        sizes.append(len(batch))
        if len(batch) > 3:
            raise torch.OutOfMemoryError("no")
        return list(batch)

    assert sum(in_batches(work, list(range(10)), "a", 8, state), []) == list(range(10))
    assert sizes == [8, 4, 2, 2, 2, 2, 2]
    in_batches(work, [1, 2, 3], "a", 8, state)
    assert sizes[7:] == [2, 1]
    with pytest.raises(UserError, match="single row"):
        in_batches(lambda batch: work(range(9)), [1], "b", 1, Work())


@pytest.mark.parametrize(("family", "head_size"), [("llama", 8), ("qwen3", 16)])
def test_automatic_batches_follow_the_model_s_size(demo_tokenizer, family, head_size, monkeypatch):
    model = tiny_model(family, demo_tokenizer, torch.float32)
    vocabulary = len(model.get_input_embeddings().weight)
    # Per layer queries; keys and values; what becomes of them; the two inner and the outer layer.
    outputs = 2 * (4 * head_size + 2 * 2 * head_size + 32 + 2 * 48 + 32) + vocabulary
    assert rows_for_backward(model, 60) == 192 * 2**20 // int(1.5 * 4 * outputs * 60)
    assert rows_for_backward(model, 10**9) == 1
    states = 2 * 2 * 2 * head_size * 4 * 500  # keys and values, layers, key/value heads, head size, float32, columns
    logits = 3 * 4 * vocabulary
    assert rows_for_generation(model, 500) == 2**32 // (states + logits)
    assert rows_for_generation(model, 500, 64) == 2**32 // (states + 64 * logits)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=10**9))
    monkeypatch.setattr(type(model), "device", torch.device("cuda"))
    weights = 4 * sum(weight.numel() for weight in model.parameters())
    assert rows_for_generation(model, 500) == (8 * 10**8 - weights) // (states + logits)
    assert rows_for_backward(model, 60) == 10**9 // 8 // int(1.5 * 4 * outputs * 60)


@pytest.mark.parametrize(
    ("rope", "known"),
    [
        ({"rope_type": "default"}, 512),
        ({"rope_type": "longrope", "original_max_position_embeddings": 100}, 100),
        ({"rope_type": "dynamic"}, 512),
    ],
)
def test_more_tokens_than_the_model_has_positions_are_refused(llama, rope, known):
    llama.config.rope_parameters = rope
    assert rows_for_generation(llama, known) >= 1
    with pytest.raises(UserError, match=f"--max-new-tokens: .* {known + 1} tokens.* knows {known}: lower it"):
        rows_for_generation(llama, known + 1)


def test_a_size_that_did_not_fit_once_does_not_override_a_smaller_one():
    work = Work(sizes={"reading": 75})
    assert list(map(len, in_batches(list, range(45), "reading", 20, work))) == [20, 20, 5]
    assert list(map(len, in_batches(list, range(100), "reading", 200, work))) == [75, 25]


# --- Reading ----------------------------------------------------------------------------------------


def test_logits_at_are_those_of_the_whole_sequence(any_model):
    ids = torch.randint(6, 100, (3, 20))
    columns = torch.tensor([[0, 5], [19, 2], [7, 7]])
    whole = any_model(input_ids=ids).logits
    read = logits_at(any_model, columns, input_ids=ids)
    torch.testing.assert_close(read, whole[torch.arange(3)[:, None], columns])


def test_reading_in_pieces_is_reading_in_one_and_leaves_the_pieces_as_they_were(any_model):
    ids = torch.randint(6, 100, (3, 30))
    ones, last = torch.ones(3, 30, dtype=torch.long), torch.tensor([[4, 9], [9, 0], [0, 3]])
    whole = any_model(input_ids=ids).logits
    pieces = empty(DynamicLayer, any_model)
    read(any_model, pieces, ones[:, :20], ids[:, :20], last)
    for rows in ([0, 1, 2], [2, 0], [1, 1, 1]):  # from the same pieces
        for kind in (Picked, Growing):
            cut = [[(p.keys[:, :, part], p.values[:, :, part]) for part in (slice(7), slice(7, 20))] for p in pieces]
            layers = [kind(parts, lambda states, rows=rows: states[rows]) for parts in cut]
            logits = read(any_model, layers, ones[rows], ids[rows, 20:], last[rows])
            torch.testing.assert_close(logits, whole[torch.tensor(rows)[:, None], 20 + last[rows]])
            assert pieces[0].keys.shape[2] == 20


def test_growing_keys_and_values_are_those_that_were_put_in_and_leave_the_shared_ones_alone():
    keys, values = torch.arange(12.0).reshape(2, 1, 3, 2), torch.arange(30.0).reshape(2, 1, 3, 5)  # of other sizes
    layer = Growing([(keys, values)], lambda states: states[[1, 0, 1, 0]])
    expected = [states[[1, 0, 1, 0]] for states in (keys, values)]
    for n in range(100):
        # Rows leave before anything is added, two times before something is added, and at last all.
        for rows in {0: [[0, 1, 3]], 50: [[1, 2], [1]], 51: [[0]], 90: [[]]}.get(n, []):
            layer.keep(torch.tensor(rows, dtype=torch.long))
            expected = [states[rows] for states in expected]
        new = [torch.randn(len(states), 1, 1 + n % 3, states.shape[3]) for states in expected]
        expected = [torch.cat(pair, 2) for pair in zip(expected, new)]
        assert all(map(torch.equal, layer.update(*new), expected))
        assert layer.get_seq_length() == expected[0].shape[2]
    assert torch.equal(keys, torch.arange(12.0).reshape(2, 1, 3, 2))


# --- Questions that rows share ----------------------------------------------------------------------------


@pytest.mark.parametrize("sharing", ([0, 0, 1, 1], [0, 0, 0, 1, 1, 2], [2, 0, 2, 0, 0], [1], [2, 1]))
def test_reading_behind_shared_questions_is_reading_each_row_alone(any_model, sharing):
    questions = [torch.randint(6, 100, (size,)).tolist() for size in (20, 12, 3)]
    own = torch.randint(6, 100, (len(sharing), 11))
    alone = [
        any_model(input_ids=torch.tensor([questions[q] + own[i].tolist()])).logits[0] for i, q in enumerate(sharing)
    ]
    ids, mask = pad(questions, "cpu", left=True)
    layers = empty(DynamicLayer, any_model)
    read(any_model, layers, mask, ids, torch.zeros(3, 1, dtype=torch.long))
    shared = SharedQuestions([(layer.keys, layer.values) for layer in layers], sharing)

    def check(shared, layers, rows, mask, start, end):
        """Read own tokens start to end of some rows and compare with the plain logits there."""
        mask = torch.cat([mask, torch.ones(len(rows), end - start, dtype=torch.long)], 1)
        columns = torch.arange(end - start).expand(len(rows), -1)
        logits = read(any_model, layers, mask, own[rows, start:end], columns, shared)
        expected = [alone[i][len(questions[sharing[i]]) + start :][: end - start] for i in rows]
        torch.testing.assert_close(logits, torch.stack(expected))
        return mask

    rows, layers = list(range(len(sharing))), empty(Growing, any_model)
    mask = check(shared, layers, rows, mask[sharing], 0, 5)
    mask = check(shared, layers, rows, mask, 5, 6)
    # Some rows alone, their own columns behind columns of padding.
    some = rows[::2]
    gap = [Picked([(layer.keys[some][:, :, [0, 0, 0, *range(6)]], layer.values[some][:, :, [0] * 3 + [*range(6)]])],
                  lambda states: states) for layer in layers]  # fmt: skip
    gaps = torch.cat([mask[some][:, :20], torch.zeros(len(some), 3, dtype=torch.long), mask[some][:, 20:]], 1)
    check(shared.keep(some, copy=False), gap, some, gaps, 6, 11)
    # The others leave, in two goes.
    left, shared = rows, shared
    for keep in (rows[1:], [0]):
        keep = keep or [0]
        for layer in layers:
            layer.keep(torch.tensor(keep))
        left, mask, shared = [left[i] for i in keep], mask[keep], shared.keep(keep)
        mask = check(shared, layers, left, mask, mask.shape[1] - 20, mask.shape[1] - 18)


@pytest.mark.parametrize("family", FAMILIES)
def test_in_half_precision_shared_questions_are_read_as_nearly_as_by_transformers_own_attention(
    demo_tokenizer, family, monkeypatch
):
    monkeypatch.setattr(frozen_model, "faster", lambda model: model)
    exact, theirs, model = (tiny_model(family, demo_tokenizer, torch.float32) for _ in range(3))
    theirs, model = theirs.to(torch.bfloat16), model.to(torch.bfloat16)
    exact.load_state_dict({name: weight.float() for name, weight in theirs.state_dict().items()})
    theirs.set_attn_implementation("eager")
    ids = torch.randint(6, 100, (5, 60), generator=torch.Generator().manual_seed(0))
    layers, last = empty(DynamicLayer, model), torch.full((5, 1), 39)
    read(model, layers, torch.ones(5, 40, dtype=torch.long), ids[:, :40], last)
    shared = SharedQuestions([(layer.keys, layer.values) for layer in layers], [*range(5)])
    columns = torch.arange(20).expand(5, -1)
    ours = read(model, empty(Growing, model), torch.ones_like(ids), ids[:, 40:], columns, shared)
    expected, eager = (m(input_ids=ids).logits[:, 40:].float() for m in (exact, theirs))
    errors = [(logits - expected).square().mean().sqrt() for logits in (ours, eager)]
    assert errors[0] < 1.2 * errors[1] and errors[1] > 0


def test_scores_in_half_precision_are_scaled_and_compared_in_float32():
    key, value = torch.tensor([100.0, 1.0]).bfloat16().reshape(2, 1, 1, 1, 1)  # of a question of one token
    own_key, own_value = torch.tensor([99.0, 0.0]).bfloat16().reshape(2, 1, 1, 1, 1)
    shared, visible = SharedQuestions([(key, value)], [0]), VisibleColumns(torch.ones(1, 2), 1, torch.bfloat16)
    query, layer = torch.ones_like(key), SimpleNamespace(layer_idx=0)
    mixed, _ = attention(layer, query, own_key, own_value, None, 0.1, shared=shared, visible=visible)
    # Scores of 10 and 9.9; the second is 9.875 in bfloat16, and their weights were 0.531 and 0.469.
    assert mixed.item() == pytest.approx(1 / (1 + math.exp(-0.1)), abs=2e-3)


def test_logits_of_a_model_in_half_precision_are_float32(demo_tokenizer):
    model, ids = tiny_model("llama", demo_tokenizer, torch.bfloat16), torch.arange(6, 16)[None]
    logits = read(model, empty(Growing, model), torch.ones_like(ids), ids, torch.tensor([[9]]))
    assert logits.dtype == torch.float32


def test_shared_questions_are_one_copy_and_hold_only_those_that_have_rows():
    past = [(torch.randn(3, 2, 5, 4), torch.randn(3, 2, 5, 4)) for _ in range(2)]
    shared = SharedQuestions(past, [0, 2, 1, 2])
    assert shared.past is past and shared.deep == 2
    assert shared.keep([0, 1, 2]).past is past
    fewer = shared.keep([1, 3])
    assert [states.shape[0] for pair in fewer.past for states in pair] == [1] * 4
    assert torch.equal(fewer.past[1][0][0], past[1][0][2]) and fewer.of == [0, 0]
    lazy = shared.keep([1, 3, 0], copy=False)
    assert lazy.past is past and lazy.of == [2, 2, 0] and lazy.used.tolist() == [0, 2]
    assert lazy.keep([0]).of == [0] and torch.equal(lazy.keep([0]).states(0, 1), past[0][1][2:])


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_without_shared_questions_is_transformers_own(demo_tokenizer, family, monkeypatch, double):
    model = tiny_model(family, demo_tokenizer)
    monkeypatch.setattr(frozen_model, "faster", lambda model: model)
    plain = tiny_model(family, demo_tokenizer)
    plain.set_attn_implementation("eager")
    ids, mask = pad([list(range(6, 40)), list(range(50, 60))], "cpu", left=True)
    for inputs in ({"input_ids": ids, "attention_mask": mask}, {"input_ids": ids[:1]}):
        found, expected = (m(**inputs).logits for m in (model, plain))
        real = mask[: len(found)].bool()
        torch.testing.assert_close(found[real], expected[real])

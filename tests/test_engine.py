"""The engine: loading, batches, and that every way of reading gives the plain forward pass's logits."""

import copy
import json
import os
import re
import shutil
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from conftest import FAMILIES, ROOT, greedy_reference, settings, tiny_engine
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM as Auto
from transformers import (
    BartConfig,
    BartForCausalLM,
    DeepseekV3Config,
    Gemma3nTextConfig,
    Gemma4TextConfig,
    GenerationConfig,
    GPTJConfig,
    GptOssConfig,
    MambaConfig,
    Qwen3NextConfig,
)

from greater_core import optimize
from support import engine as engine_file
from support.engine import Context, Engine, Growing, Sampler, join, load_engine, of_like_length, pad
from support.files import UserError

# --- Loading ----------------------------------------------------------------------------------------


def test_a_model_that_is_not_there_or_cannot_chat_is_one_clear_error(tmp_path, demo_tokenizer):
    with pytest.raises(UserError, match="Ways out"):
        load_engine(str(tmp_path / "nothing"))
    with pytest.raises(UserError, match="--device teapot"):
        load_engine(str(ROOT / "demo" / "model"), device="teapot")
    for name in ("config.json", "model.safetensors"):
        shutil.copy(ROOT / "demo" / "model" / name, tmp_path)
    mute = type(demo_tokenizer)(tokenizer_object=demo_tokenizer.backend_tokenizer, eos_token="<|end|>")
    mute.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no chat template"):
        load_engine(str(tmp_path))
    demo_tokenizer.save_pretrained(tmp_path)
    assert load_engine(str(tmp_path), "cpu").model.dtype == torch.float32
    assert load_engine(str(tmp_path), "cpu", "bfloat16").model.dtype == torch.bfloat16
    (tmp_path / "model.safetensors").unlink()
    torch.save({}, tmp_path / "pytorch_model.bin")  # would be a pickle
    with pytest.raises(UserError, match="cannot load"):
        load_engine(str(tmp_path), "cpu")


def test_the_model_s_own_sampling_settings_do_not_count_and_its_end_tokens_do(demo_tokenizer):
    model = tiny_engine("llama", demo_tokenizer).model
    expected = Engine(model, demo_tokenizer).complete([[7, 8, 9]], 20)
    model.generation_config = GenerationConfig(do_sample=True, repetition_penalty=1.7, eos_token_id=[3, 5])
    engine = Engine(model.train().requires_grad_(True), demo_tokenizer)
    assert engine.end_ids == [3, 5] and engine.complete([[7, 8, 9]], 20) == expected
    assert not any(p.requires_grad for p in model.parameters()) and not model.training
    model.generation_config.eos_token_id = 3
    assert Engine(model, demo_tokenizer).end_ids == [3, demo_tokenizer.eos_token_id]
    model.generation_config.eos_token_id, nameless = None, copy.deepcopy(demo_tokenizer)
    nameless.eos_token = None
    with pytest.raises(UserError, match="no end-of-sequence token"):
        Engine(model, nameless)


# --- Which models are read, and which are refused -----------------------------------------------------

SMALL = {
    "vocab_size": 126,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.3,
    "max_position_embeddings": 512,
}
WINDOW = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2}


def gemma3n():
    """Layers 2 and 3 use the keys and values of 0 and 1; every layer looks its tokens up once more."""
    return Gemma3nTextConfig(
        **SMALL | WINDOW | {"intermediate_size": [48] * 4},
        num_kv_shared_layers=2,
        hidden_size_per_layer_input=6,
        vocab_size_per_layer_input=126,
        laurel_rank=4,
        activation_sparsity_pattern=[0.0] * 4,
        altup_num_inputs=2,
    )


def gpt_oss():
    """Attention sinks, sliding windows, and experts."""
    return GptOssConfig(**SMALL | WINDOW, num_local_experts=4, num_experts_per_tok=2)


def gptj():
    """Attention outside of transformers' attention interface."""
    return GPTJConfig(vocab_size=126, n_embd=32, n_layer=2, n_head=4, rotary_dim=4, initializer_range=0.3)


def gemma4():
    """As Gemma-3n, with wider heads in its full layers."""
    return Gemma4TextConfig(
        **SMALL | WINDOW, num_kv_shared_layers=2, hidden_size_per_layer_input=6, vocab_size_per_layer_input=126
    )


def deepseek():
    """Latent attention: keys and values are made of fewer numbers than they have, and experts."""
    return DeepseekV3Config(
        **SMALL | {"num_key_value_heads": 4, "head_dim": None},
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
        n_routed_experts=4,
        num_experts_per_tok=4,  # all, since a choice would make the loss jump
        moe_intermediate_size=16,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
    )


OTHER_MODELS = {"deepseek": deepseek, "gemma3n": gemma3n, "gemma4": gemma4, "gpt-oss": gpt_oss, "gptj": gptj}


@pytest.fixture(params=OTHER_MODELS)
def other_engine(request, demo_tokenizer):
    torch.manual_seed(0)
    model = Auto.from_config(OTHER_MODELS[request.param](), dtype=torch.float32)
    for name, weight in model.named_parameters():
        if "sinks" in name:
            torch.nn.init.normal_(weight, std=2.0)
    return Engine(model, demo_tokenizer)


def test_models_with_sinks_shared_keys_or_attention_of_their_own_are_read_as_in_one_pass(other_engine):
    """Rows of different length, read in three pieces, some of them dropped, rewound, and as embeddings."""
    model = other_engine.model
    sequences = [list(range(10, 40)), list(range(50, 72)), list(range(5, 30))]
    context, first = other_engine.prefill([ids[:-12] for ids in sequences])
    context = context.select([2, 0, 2, 1])
    picked = [sequences[i] for i in (2, 0, 2, 1)]
    tails = torch.tensor([ids[-12:] for ids in picked])
    found = [first[[2, 0, 2, 1]][:, None]]
    found.append(other_engine.forward(context, tails[:, :7], columns=[list(range(7))] * 4))
    found.append(other_engine.forward(context, other_engine.embed(tails[:, 7:]), columns=[list(range(5))] * 4))
    for n, ids in enumerate(picked):
        plain = model(input_ids=torch.tensor([ids])).logits[0, -13:].detach()
        torch.testing.assert_close(torch.cat([piece[n] for piece in found]), plain, rtol=1e-3, atol=1e-3)
    again = context.rewind(torch.tensor([3, 1]), torch.tensor([12, 7]))  # forget the tail, or some of it
    ends = torch.tensor([picked[3][-12:-5], picked[1][-7:]])
    for logits, ids in zip(other_engine.forward(again, ends)[:, 0], (picked[3][:-5], picked[1])):
        torch.testing.assert_close(logits, model(input_ids=torch.tensor([ids])).logits[0, -1], rtol=1e-3, atol=1e-3)


def test_the_gradient_with_respect_to_embeddings_is_the_plain_pass_s(other_engine):
    """By central differences through ids: the loss of a mixture of two tokens' embeddings."""
    ids = torch.arange(10, 22)[None]
    context, _ = other_engine.prefill([ids[0, :6].tolist()])
    choices = other_engine.embed(torch.tensor([16, 90]))  # the token that stands there, and another

    def loss(one_hot):
        embedded = torch.cat([(one_hot @ choices)[:, None], other_engine.embed(ids[:, 7:])], 1)
        return other_engine.forward(context.select([0]), embedded).log_softmax(-1)[0, 0, 33]

    one_hot = torch.tensor([[1.0, 0.0]], requires_grad=True)
    (gradient,) = torch.autograd.grad(loss(one_hot), one_hot)
    plain = other_engine.model(input_ids=ids).logits.log_softmax(-1)[0, -1, 33]
    torch.testing.assert_close(loss(one_hot), plain, rtol=1e-3, atol=1e-3)
    for k in range(2):
        step = 0.01 * torch.eye(2)[k]
        numeric = (loss(one_hot + step) - loss(one_hot - step)).item() / 0.02
        assert gradient[0, k].item() == pytest.approx(numeric, rel=0.05, abs=0.02)


def test_generation_is_the_plain_pass_s_token_by_token(other_engine):
    sequences = [list(range(10, 30)), list(range(50, 60)), list(range(70, 95))]
    expected = [greedy_reference(other_engine, ids, 12) for ids in sequences]
    assert other_engine.complete(sequences, 12, 3) == expected


def test_layers_that_are_not_attention_are_refused_by_their_name(demo_tokenizer):
    config = Qwen3NextConfig(
        **SMALL, layer_types=["linear_attention", "full_attention"] * 2, num_experts=2, num_experts_per_tok=1,
        linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=8, linear_value_head_dim=8,
        moe_intermediate_size=16, shared_expert_intermediate_size=16,
    )  # fmt: skip
    with pytest.raises(UserError, match="layers of type linear_attention: use one of full or sliding attention"):
        Engine(Auto.from_config(config), demo_tokenizer)


def test_a_model_that_keeps_something_else_than_keys_and_values_is_one_line(demo_tokenizer, monkeypatch):
    model = Auto.from_config(MambaConfig(vocab_size=126, hidden_size=32, num_hidden_layers=2))
    with pytest.raises(UserError, match="linear_attention"):
        Engine(model, demo_tokenizer)
    monkeypatch.setattr(MambaConfig, "layer_types", None)  # as if it did not say so
    with pytest.raises(UserError, match="^--model (cannot be read|gives other logits) .*use another model$"):
        Engine(model, demo_tokenizer)


def test_a_model_that_gives_other_logits_in_pieces_is_refused(demo_tokenizer, monkeypatch):
    engine = tiny_engine("llama", demo_tokenizer)
    plain = Growing.update
    monkeypatch.setattr(Growing, "update", lambda self, keys, values, *_, **__: plain(self, keys, -values))
    with pytest.raises(UserError, match="other logits when it is read in pieces"):
        engine.check()
    monkeypatch.setattr(Growing, "update", lambda self, keys, values, *_, **__: keys.no_such_thing)
    with pytest.raises(UserError, match="cannot be read in pieces .*no_such_thing"):
        engine.check()


def test_a_model_in_half_precision_is_refused_where_it_differs_by_more_than_rounding_does(demo_tokenizer, monkeypatch):
    engine = tiny_engine("llama", demo_tokenizer, torch.bfloat16)
    ids = torch.arange(3, 15)[None]
    plain = torch.randn(12, 40)
    pieces = plain[-7:] + 0.5 * torch.randn(7, 40)
    monkeypatch.setattr(Engine, "roughness", lambda self, ids: torch.tensor(0.3))  # of a model with large states
    engine.require_same(plain, pieces, ids)
    monkeypatch.setattr(Engine, "roughness", lambda self, ids: torch.tensor(0.1))
    with pytest.raises(UserError, match="other logits .* Try --dtype float32$"):
        engine.require_same(plain, pieces, ids)


def test_the_roughness_of_a_model_is_about_what_half_precision_does_to_its_logits(demo_tokenizer):
    half, whole = (tiny_engine("llama", demo_tokenizer, dtype) for dtype in (torch.bfloat16, torch.float32))
    ids = torch.arange(3, 15)[None]
    with torch.no_grad():
        apart = (half.model(input_ids=ids).logits[0, -7:].float() - whole.model(input_ids=ids).logits[0, -7:]).std()
    assert 0.2 < (half.roughness(ids) / apart).item() < 5
    assert whole.roughness(ids) < 1e-3 * half.roughness(ids)


def test_a_model_that_does_not_know_where_its_padding_ends_is_refused(demo_tokenizer):
    """Bart takes its positions from the columns, whatever it is told."""
    config = BartConfig(
        vocab_size=126, d_model=32, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=48, init_std=0.3
    )
    torch.manual_seed(0)
    with pytest.raises(UserError, match="other logits when it is read in pieces"):
        Engine(BartForCausalLM(config), demo_tokenizer)


def test_tokens_that_a_model_forbids_do_not_hide_that_others_are_wrong(demo_tokenizer, monkeypatch):
    engine = tiny_engine("llama", demo_tokenizer)
    head = engine.model.get_output_embeddings()
    head.register_forward_hook(lambda module, args, logits: logits.index_fill(-1, torch.tensor([9]), float("-inf")))
    engine.check()
    plain = Growing.update
    monkeypatch.setattr(Growing, "update", lambda self, keys, values, *_, **__: plain(self, keys, -values))
    with pytest.raises(UserError, match="other logits when it is read in pieces"):
        engine.check()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(demo_tokenizer, value):
    model = tiny_engine("llama", demo_tokenizer).model
    model.model.layers[1].mlp.down_proj.weight.data.fill_(value)
    with pytest.raises(UserError, match="logits that are not finite"):
        Engine(model, demo_tokenizer)


def test_a_model_that_differs_only_on_long_rows_is_refused_before_the_first_of_them(demo_tokenizer, monkeypatch):
    engine = tiny_engine("llama", demo_tokenizer)
    plain = Growing.update

    def wrong_when_long(self, keys, values, *_, **__):
        return plain(self, keys, -values if self.keys.shape[2] > 20 else values)

    monkeypatch.setattr(Growing, "update", wrong_when_long)
    engine.check()
    assert engine.complete([list(range(6, 18))], 2)
    for work in (engine.prefill, lambda sequences: engine.complete(sequences, 2)):
        with pytest.raises(UserError, match="other logits when it is read in pieces"):
            work([list(range(6, 18)), list(range(6, 90))])


def test_the_first_rows_are_read_in_one_pass_and_in_pieces_once(any_engine):
    engine = any_engine
    engine.prefill([list(range(6, 18))])
    assert not engine.compared  # as long as the rows are no longer than those of `check`
    engine.prefill([list(range(6, 90)), list(range(6, 40))])
    counts = engine.counts["forward_tokens"]
    assert engine.compared and counts == 12 + 2 * 84
    engine.prefill([list(range(6, 90))])
    assert engine.counts["forward_tokens"] == counts + 84


@pytest.mark.parametrize("family", FAMILIES)
def test_padded_rows_are_those_of_transformers_eager_attention(demo_tokenizer, family, double):
    engine, plain = (tiny_engine(family, demo_tokenizer) for _ in range(2))
    plain.model.set_attn_implementation("eager")
    sequences = [list(range(6, 40)), list(range(50, 60))]
    context, first = engine.prefill(sequences)
    later = engine.forward(context, torch.tensor([[7, 8], [9, 10]]), columns=[[0, 1]] * 2)
    for row, (ids, more) in enumerate(zip(sequences, ([7, 8], [9, 10]))):
        expected = plain.model(input_ids=torch.tensor([ids + more])).logits[0, -3:]
        torch.testing.assert_close(torch.stack([first[row], *later[row]]), expected)


# --- Batches ----------------------------------------------------------------------------------------


def test_padding_stands_on_one_side_and_is_masked():
    ids, mask = pad([[1, 2], [3], []], "cpu")
    assert (ids.tolist(), mask.tolist()) == ([[1, 2], [3, 0], [0, 0]], [[1, 1], [1, 0], [0, 0]])
    ids, mask = pad([[1, 2], [3]], "cpu", left=True)
    assert (ids.tolist(), mask.tolist()) == ([[1, 2], [0, 3]], [[1, 1], [0, 1]])


def test_over_rows_takes_the_costliest_first_and_gives_results_in_the_jobs_order(llama):
    batches = []

    def double(batch):
        batches.append(batch)
        return [2 * job for job in batch]

    assert llama.over_rows(double, [3, 1, 5, 4, 1], "a", 2, cost=lambda job: job) == [6, 2, 10, 8, 2]
    assert batches == [[5, 4], [3, 1], [1]]


def test_when_memory_runs_out_the_size_halves_is_kept_and_nothing_is_lost(llama):
    sizes = []

    def work(batch):
        sizes.append(len(batch))
        if len(batch) > 3:
            raise torch.OutOfMemoryError("no")
        return list(batch)

    assert llama.over_rows(work, range(10), "a", 8, cost=lambda job: 0) == list(range(10))
    assert sizes == [8, 4, 2, 2, 2, 2, 2]
    llama.over_rows(work, [1, 2, 3], "a", 8, cost=lambda job: 0)
    assert sizes[7:] == [2, 1] and llama.batch_sizes == {"a": 2}
    with pytest.raises(UserError, match="single row"):
        llama.over_rows(lambda batch: work(range(9)), [1], "b", 1, cost=lambda job: 0)


def test_a_size_that_did_not_fit_once_does_not_override_a_smaller_one(llama):
    llama.batch_sizes, sizes = {"reading": 75}, []

    def count(batch):
        sizes.append(len(batch))
        return batch

    llama.over_rows(count, range(45), "reading", 20, cost=lambda job: 0)
    llama.over_rows(count, range(100), "reading", 200, cost=lambda job: 0)
    assert sizes == [20, 20, 5, 75, 25]


@pytest.mark.parametrize(("family", "head_size"), [("llama", 8), ("qwen3", 16)])
def test_automatic_batches_follow_the_model_s_size(demo_tokenizer, family, head_size, monkeypatch):
    engine = tiny_engine(family, demo_tokenizer, torch.float32)
    vocabulary = len(engine.model.get_input_embeddings().weight)
    # Per layer queries; keys and values; what becomes of them; the two inner and the outer layer.
    outputs = 2 * (4 * head_size + 2 * 2 * head_size + 32 + 2 * 48 + 32) + vocabulary
    assert engine.rows_for_backward(60) == 192 * 2**20 // int(1.5 * 4 * outputs * 60)
    assert engine.rows_for_backward(10**9) == 1
    states = 2 * 2 * 2 * head_size * 4 * 500  # keys and values, layers, key/value heads, head size, float32, columns
    logits = 3 * 4 * vocabulary
    monkeypatch.setattr(engine_file, "physical_memory", lambda: 2**36)
    assert engine.rows_that_fit(500) == 2**32 // (states + logits)
    assert engine.rows_that_fit(500, 64) == 2**32 // (states + 64 * logits)
    monkeypatch.setattr(engine_file, "physical_memory", lambda: 2**30)
    assert engine.rows_that_fit(500) == 2**28 // (states + logits)  # a small machine: a quarter of its memory
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=10**9))
    engine.device = torch.device("cuda")
    weights = 4 * sum(weight.numel() for weight in engine.model.parameters())
    assert engine.rows_that_fit(500) == (8 * 10**8 - weights) // (states + logits)
    assert engine.rows_for_backward(60) == 10**9 // 8 // int(1.5 * 4 * outputs * 60)


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
    llama.require_positions(known)
    with pytest.raises(UserError, match=f"--max-new-tokens: .* {known + 1} tokens.* knows {known}: lower it"):
        llama.require_positions(known + 1)
    for batch_size in (0, 1):  # whoever sets the batch size is told, too
        with pytest.raises(UserError, match="--max-new-tokens"):
            llama.complete([[7] * known], 1, batch_size)
        with pytest.raises(UserError, match="--max-new-tokens"):
            llama.prefill([[7] * (known + 1)], batch_size)


def test_a_small_machine_s_memory_is_told_in_whole_gibibytes(monkeypatch):
    monkeypatch.setattr(os, "sysconf", lambda name: {"SC_PHYS_PAGES": 2_050_000, "SC_PAGE_SIZE": 4096}[name])
    assert engine_file.physical_memory() == 8 * 2**30
    monkeypatch.delattr(os, "sysconf")
    assert engine_file.physical_memory() == 2**34


def test_when_memory_runs_out_in_a_completion_its_batches_are_halved_and_nothing_is_lost(llama, contexts, monkeypatch):
    expected, plain, sizes = llama.complete(contexts, 5, 2), Engine.forward, []

    def forward(engine, context, tokens, *rest, **more):
        if len(tokens) > 2:
            raise torch.OutOfMemoryError("none left")
        sizes.append(len(tokens))
        return plain(engine, context, tokens, *rest, **more)

    monkeypatch.setattr(Engine, "forward", forward)
    assert llama.complete(contexts, 5, 5) == expected and max(sizes) == 2


def test_rows_are_handed_out_as_they_end_and_those_that_ended_before_memory_ran_out_only_once(
    llama, contexts, monkeypatch
):
    expected, plain, calls = llama.complete(contexts, 30), Engine.forward, []
    lengths = [len(ids) for ids, _ in expected]
    llama.end_ids = [
        max(set(sum((ids for ids, _ in expected), [])), key=lambda t: [t in i for i, _ in expected].count(1))
    ]
    expected = llama.complete(contexts, 30)
    assert len({len(ids) for ids, _ in expected}) > 1 and lengths

    def forward(engine, context, tokens, *rest, **more):
        calls.append(len(tokens))
        if len(calls) == 25:
            raise torch.OutOfMemoryError("none left")
        return plain(engine, context, tokens, *rest, **more)

    monkeypatch.setattr(Engine, "forward", forward)
    handed_out = []
    for ended in llama.stream(contexts, 30, len(contexts)):
        for n, ids, stopped in zip(ended.rows, ended.ids, ended.stopped):
            handed_out.append(n)
            assert (ids, stopped) == expected[n]
    assert sorted(handed_out) == list(range(len(contexts))) and len(calls) > 25


def test_what_is_written_behind_ended_rows_is_what_is_written_behind_whole_sequences(any_engine, contexts):
    seen = 0
    for ended in any_engine.stream(contexts, 6, 3):
        written = any_engine.go_on(ended, [20, 21], 5)
        for n, ids, reply in zip(ended.rows, ended.ids, written):
            assert reply == greedy_reference(any_engine, contexts[n] + ids + [20, 21], 5)[0]
            seen += 1
    assert seen == len(contexts)


# --- Reading ----------------------------------------------------------------------------------------


def test_logits_are_those_of_the_whole_sequence_at_the_columns_asked_for(any_engine):
    ids = torch.randint(6, 100, (3, 20))
    whole = any_engine.model(input_ids=ids).logits
    read = any_engine.forward(Context([], ids[:, :0]), ids, columns=[[0, 5], [19], [7, 2]])
    expected = whole[torch.arange(3)[:, None], torch.tensor([[0, 5], [19, 19], [7, 2]])]  # the last one is repeated
    torch.testing.assert_close(read, expected)
    torch.testing.assert_close(any_engine.forward(Context([], ids[:, :0]), ids), whole[:, -1:])


def test_reading_in_pieces_is_reading_in_one_and_leaves_what_was_selected_from_as_it_was(any_engine):
    ids = torch.randint(6, 100, (3, 30))
    whole = any_engine.model(input_ids=ids).logits
    context, first = any_engine.prefill(ids[:, :20].tolist(), 2)
    torch.testing.assert_close(first, whole[:, 19])
    for rows in ([0, 1, 2], [2, 0], [1, 1, 1]):  # from the same context
        selected = context.select(rows)
        logits = any_engine.forward(selected, ids[rows, 20:], columns=[[4, 9]] * len(rows))
        torch.testing.assert_close(logits, whole[rows][:, [24, 29]])
        assert context.mask.shape[1] == 20 and all(layer.keys.shape[2] == 20 for layer in context.layers)


def test_rows_of_different_length_are_padded_on_the_left_and_read_as_alone(any_engine):
    sequences = [torch.randint(6, 100, (size,)).tolist() for size in (20, 3, 12)]
    expected = [any_engine.model(input_ids=torch.tensor([ids])).logits[0, -1] for ids in sequences]
    for batch_size in (1, 2, 3):
        context, logits = any_engine.prefill(sequences, batch_size)
        torch.testing.assert_close(logits, torch.stack(expected))
        assert context.mask.sum(1).tolist() == [20, 3, 12] and context.mask[:, -1].all()
        more = torch.randint(6, 100, (3, 4))
        found = any_engine.forward(context, more)[:, 0]
        for row, ids in enumerate(sequences):
            alone = torch.tensor([ids + more[row].tolist()])
            torch.testing.assert_close(found[row], any_engine.model(input_ids=alone).logits[0, -1])


def test_rows_of_like_length_are_read_at_once_and_come_back_in_their_order(llama, monkeypatch):
    sequences = [torch.randint(6, 100, (size,)).tolist() for size in (3, 20, 12, 2, 19)]
    assert list(of_like_length(sequences, 40)) == [[1, 4], [2, 0, 3]]
    assert list(of_like_length(sequences, 1)) == [[1], [4], [2], [0], [3]]  # a longer row than that is read alone
    assert list(of_like_length([[], []], 8)) == [[0, 1]]
    monkeypatch.setitem(engine_file.TOKENS_AT_ONCE, "cpu", 40)
    llama.counts.clear()
    context, logits = llama.read(sequences)
    assert llama.counts["forward_tokens"] == 2 * 20 + 3 * 12  # and not 5 * 20
    assert context.mask.sum(1).tolist() == [3, 20, 12, 2, 19]
    later = llama.forward(context, torch.full((5, 1), 7))[:, 0]
    for n, ids in enumerate(sequences):
        plain = llama.model(input_ids=torch.tensor([[*ids, 7]])).logits[0, -2:]
        torch.testing.assert_close(torch.stack([logits[n], later[n]]), plain)


def test_growing_keys_and_values_are_those_that_were_put_in_and_leave_the_first_ones_alone():
    keys, values = torch.arange(12.0).reshape(2, 1, 3, 2), torch.arange(30.0).reshape(2, 1, 3, 5)  # of other sizes
    layer, expected = Growing(keys, values), [keys.clone(), values.clone()]
    for n in range(100):
        new = [torch.randn(2, 1, 1 + n % 3, states.shape[3]) for states in expected]
        expected = [torch.cat(pair, 2) for pair in zip(expected, new)]
        assert all(map(torch.equal, layer.update(*new), expected))
        assert layer.get_seq_length() == expected[0].shape[2]
    assert torch.equal(keys, torch.arange(12.0).reshape(2, 1, 3, 2))


def made_context(mask):
    """One layer whose keys say which row (tens) and column (ones) they are of; values are the negatives."""
    mask = torch.tensor(mask)
    rows, columns = mask.shape
    keys = (10.0 * torch.arange(rows)[:, None] + torch.arange(columns)).reshape(rows, 1, columns, 1)
    return Context([Growing(keys, -keys)], mask)


def test_some_rows_are_selected_kept_or_looked_at():
    context = made_context([[0, 1, 1], [0, 0, 1], [1, 1, 1]])
    selected = context.select([1, 0, 1])
    assert selected.mask.tolist() == [[0, 1], [1, 1], [0, 1]]  # without the column that is padding in all
    assert selected.layers[0].keys[:, 0, :, 0].tolist() == [[11, 12], [1, 2], [11, 12]]
    assert selected.layers[0].values[:, 0, :, 0].tolist() == [[-11, -12], [-1, -2], [-11, -12]]
    alone = context.row(2)
    assert alone.mask.tolist() == [[1, 1, 1]] and alone.layers[0].keys.flatten().tolist() == [20, 21, 22]
    context.keep(torch.tensor([2, 0]))
    assert context.mask.tolist() == [[1, 1, 1], [0, 1, 1]]
    assert context.layers[0].values[:, 0, :, 0].tolist() == [[-20, -21, -22], [0, -1, -2]]


def test_contexts_are_joined_on_the_left():
    joined = join([made_context([[1, 1, 1]]), made_context([[1]])])
    assert joined.mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert joined.layers[0].keys[:, 0, :, 0].tolist() == [[0, 1, 2], [0, 0, 0]]


def test_rewinding_moves_each_row_to_the_right_and_masks_what_comes_in():
    context = made_context([[0, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]])
    rewound = context.rewind(torch.tensor([0, 2]), torch.tensor([1, 2]))
    assert rewound.mask.tolist() == [[0, 0, 1, 1], [0, 0, 1, 1]]
    keys, values = rewound.layers[0].update(*torch.full((2, 2, 1, 1, 1), 99.0))
    assert rewound.layers[0].get_seq_length() == 4
    assert keys[0, 0, 2:, 0].tolist() == [1, 2, 99] and values[1, 0, 2:, 0].tolist() == [-20, -21, 99]
    assert context.mask[0].tolist() == [0, 1, 1, 1] and context.layers[0].keys.shape[2] == 4


def test_logits_of_a_model_in_half_precision_are_float32(demo_tokenizer):
    engine = tiny_engine("llama", demo_tokenizer, torch.bfloat16)
    assert engine.prefill([list(range(6, 16))])[1].dtype == torch.float32


@pytest.mark.parametrize("family", FAMILIES)
def test_in_half_precision_pieces_are_read_as_nearly_as_whole_sequences(demo_tokenizer, family, monkeypatch):
    monkeypatch.setattr(engine_file, "use_onednn", lambda model: None)  # whose weights could not be cast any more
    exact, half = (tiny_engine(family, demo_tokenizer, torch.float32) for _ in range(2))
    half.model.to(torch.bfloat16)
    exact.model.load_state_dict({name: weight.float() for name, weight in half.model.state_dict().items()})
    ids = torch.randint(6, 100, (5, 60), generator=torch.Generator().manual_seed(0))
    context, _ = half.prefill(ids[:, :40].tolist())
    pieces = half.forward(context, ids[:, 40:], columns=[list(range(20))] * 5)
    expected, whole = (engine.model(input_ids=ids).logits[:, 40:].float() for engine in (exact, half))
    errors = [(logits - expected).square().mean().sqrt() for logits in (pieces, whole)]
    assert errors[0] < 1.2 * errors[1] and errors[1] > 0


# --- Generation -------------------------------------------------------------------------------------


@pytest.fixture
def contexts(few_rows):
    rows, prompt = few_rows
    return [row.question + list(prompt) + row.turn_end for row in rows]


def test_batched_generation_is_that_of_one_row_at_a_time(any_engine, contexts):
    expected = [greedy_reference(any_engine, context, 12) for context in contexts]
    assert any_engine.complete(contexts, 12, 3) == expected


def test_greedy_decoding_is_that_of_transformers(any_engine, contexts):
    for context in contexts[:2]:
        ids = torch.tensor([context])
        options = {"max_new_tokens": 15, "do_sample": False, "eos_token_id": any_engine.end_ids, "pad_token_id": 0}
        theirs = any_engine.model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
        theirs = theirs[0, ids.shape[1] :].tolist()
        ours, stopped = any_engine.complete([context], 15, 1)[0]
        assert ours == (theirs[:-1] if stopped else theirs)


def test_a_row_leaves_with_the_context_of_its_own_ids_and_nothing_behind(any_engine, contexts):
    """Each row has its own limit; what is read behind a row that has left is what the plain model reads."""
    context, logits = any_engine.prefill(contexts)
    limits, seen = [3, 9, 1, 6, 9], []
    for ended in any_engine.generate(context, logits, limits):
        more = torch.tensor([[20, 21]] * len(ended.rows))
        after = any_engine.forward(ended.context, more)[:, 0]
        for n, row in enumerate(ended.rows):
            ids, stopped = greedy_reference(any_engine, contexts[row], limits[row])
            assert (ended.ids[n], ended.stopped[n]) == (ids, stopped)
            whole = torch.tensor([contexts[row] + ids + [20, 21]])
            torch.testing.assert_close(after[n], any_engine.model(input_ids=whole).logits[0, -1])
        seen += ended.rows
    assert sorted(seen) == [0, 1, 2, 3, 4]


def test_the_context_of_rows_that_left_cannot_be_read_behind_once_others_have_left(llama, contexts):
    context, logits = llama.prefill(contexts)
    first, *_ = llama.generate(context, logits, [3, 9, 1, 6, 9])
    with pytest.raises(ValueError, match="used up"):
        llama.forward(first.context, torch.tensor([[20]] * len(first.rows)))


def test_reasoning_ends_before_the_end_token_and_counts_it(demo_engine, contexts):
    demo_engine.counts.clear()
    done = demo_engine.complete(contexts, 40, 8)
    assert all(stopped for _, stopped in done)
    assert all(demo_engine.tokenizer.eos_token_id not in ids for ids, _ in done)
    assert demo_engine.counts["generated_tokens"] == sum(len(ids) + 1 for ids, _ in done)
    cut = demo_engine.complete(contexts, 2, 8)
    assert cut == [(ids[:2], len(ids) < 2) for ids, _ in done]


def test_a_batch_size_of_0_is_one_that_fits_and_changes_nothing(any_engine, contexts, monkeypatch):
    expected, asked = any_engine.complete(contexts, 5, 2), []

    def fits(engine, columns, positions_read=1):
        asked.append(columns)
        return 3

    monkeypatch.setattr(Engine, "rows_that_fit", fits)
    assert any_engine.complete(contexts, 5) == expected
    assert asked == [max(map(len, contexts)) + 5]


class Waits(TorchDispatchMode):
    """Counts the operations for which the host waits for a GPU: those that bring a value or a size to it."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2")

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation.overloadpacket.__name__
        self.seen[name] += name in self.WAITING
        return operation(*args, **(kwargs or {}))


def test_a_decoding_step_does_not_wait_for_the_device_between_two_looks(any_engine, contexts, monkeypatch):
    context, logits = any_engine.prefill(contexts)
    monkeypatch.setitem(engine_file.LOOK_EVERY, "cpu", 8)
    per_forward, plain = [], Engine.forward

    def forward(*arguments, **more):
        with Waits() as waits:
            found = plain(*arguments, **more)
        per_forward.append(waits.seen.total())
        return found

    monkeypatch.setattr(Engine, "forward", forward)
    any_engine.end_ids = [10**6]  # none ends before its limit
    with Waits() as everything:
        list(any_engine.generate(context, logits, [24] * len(contexts)))
    assert len(per_forward) >= 24 and not any(per_forward)
    assert 0 < everything.seen.total() < 24 + 60  # three looks, and what is made of the rows that have ended


# --- Damaged models ------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    """A folder with a copy of the demo's model, and its weights as a dict."""
    folder = shutil.copytree(ROOT / "demo" / "model", tmp_path / "model")
    return folder, load_file(folder / "model.safetensors")


@pytest.mark.parametrize("kind", ["missing", "unexpected", "mismatched"])
def test_weights_that_are_not_those_of_the_configuration_are_refused_by_name(saved, kind):
    folder, weights = saved
    name = next(name for name in weights if "down_proj" in name)
    if kind == "missing":
        del weights[name]
    elif kind == "mismatched":
        weights[name] = weights[name][:-1].clone()
    else:
        name = "model.layers.77.extra.weight"
        weights[name] = torch.zeros(3)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=f"{kind} weights, {re.escape(name)}") as error:
        load_engine(str(folder), "cpu", "float32")
    assert "\n" not in str(error.value)


def damaged(path, how):
    content = path.read_bytes()
    half = len(content) // 2
    path.write_bytes({"cut": content[:half], "empty": b"", "garbage": b"\x93" * half, "pointer": LFS_POINTER}[how])


LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"


@pytest.mark.parametrize("how", ["cut", "empty", "garbage", "pointer"])
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"])
def test_a_damaged_file_of_a_model_is_one_line(saved, name, how):
    folder, _ = saved
    damaged(folder / name, how)
    with pytest.raises(UserError) as error:
        load_engine(str(folder), "cpu", "float32")
    assert "\n" not in str(error.value) and len(str(error.value)) < 600


@pytest.mark.parametrize(
    "change",
    [
        {"num_attention_heads": 0},
        {"num_attention_heads": 7},
        {"hidden_size": -1},
        {"vocab_size": "many"},
        {"num_hidden_layers": 1},
        {"model_type": "no-such-type"},
        {"rope_parameters": {"rope_type": "spiral"}},
        {"hidden_act": "smile"},
    ],
)
def test_an_odd_configuration_is_one_line(saved, change):
    folder, _ = saved
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError) as error:
        load_engine(str(folder), "cpu", "float32")
    assert "\n" not in str(error.value)


# --- Devices -------------------------------------------------------------------------------------------------------

DEMO = str(ROOT / "demo" / "model")
ON_CPU = ("norm", "rotary_emb", "layers.0", "layers.2", "layers.3")
SPREAD = {f"model.{name}": "cpu" for name in ON_CPU} | {"model.layers.1": "disk"}


@pytest.mark.parametrize("ends", ["cpu", "disk"])  # where the embeddings lie, of input and output
def test_a_model_that_is_spread_over_devices_gives_the_same_texts_and_the_same_search(demo_engine, few_rows, ends):
    """Of several devices there are only the CPU and the disk here."""
    pytest.importorskip("accelerate")
    spread = load_engine(DEMO, dtype="float32", device_map=SPREAD | {"model.embed_tokens": ends, "lm_head": ends})
    assert spread.devices == {"cpu", "disk"} and spread.device.type == "cpu"
    assert spread.model.model.layers[1].mlp.up_proj.weight.device.type == "meta"  # on disk until it is needed
    sequences = [list(range(5, 9 + n)) for n in range(5)]
    assert spread.complete(sequences, 9) == demo_engine.complete(sequences, 9)
    rows, prompt = few_rows
    found, expected = (list(optimize(engine, rows, prompt, settings(steps=2))) for engine in (spread, demo_engine))
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.prompt == theirs.prompt and ours.objective == pytest.approx(theirs.objective, rel=1e-4)
        gradients = [[candidate.gradient for candidate in step.candidates] for step in (ours, theirs)]
        assert gradients[0] == pytest.approx(gradients[1], rel=1e-3)


def test_a_model_that_fits_on_one_device_is_not_spread(demo_engine):
    pytest.importorskip("accelerate")
    engine = load_engine(DEMO, dtype="float32", device_map="auto")
    assert engine.devices == set()
    assert engine.complete([[5, 6, 7]], 9) == demo_engine.complete([[5, 6, 7]], 9)


def test_spreading_needs_accelerate_and_all_devices(monkeypatch):
    pytest.importorskip("accelerate")
    with pytest.raises(UserError, match="--device-map says where the model lies, --device cpu too"):
        load_engine(DEMO, "cpu", device_map="auto")
    monkeypatch.setattr(engine_file.ranks, "count", lambda: 2)
    with pytest.raises(UserError, match="call it with python, not torchrun"):
        load_engine(DEMO, device_map="auto")
    monkeypatch.setattr(engine_file.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install accelerate"):
        load_engine(DEMO, device_map="auto")


def test_each_rank_of_a_machine_takes_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(engine_file.ranks, "count_here", lambda: 2)
    monkeypatch.setattr(engine_file.ranks, "place_here", lambda: 1)
    monkeypatch.setattr(engine_file.torch, "empty", lambda *sizes, device: None)  # so that there seem to be GPUs
    assert engine_file.require_device("cuda") == "cuda:1" and engine_file.require_device("cpu") == "cpu"
    with pytest.raises(UserError, match="--device cuda:0: all ranks would be on it"):
        engine_file.require_device("cuda:0")
    monkeypatch.setattr(engine_file.torch.cuda, "is_available", lambda: True)
    assert engine_file.require_device("auto") == "cuda:1"


@pytest.mark.skipif(torch.backends.mps.is_available(), reason="this machine has it")
def test_mps_is_refused_in_one_line_where_there_is_none():
    with pytest.raises(UserError, match="--device mps cannot be used here: it needs a Mac") as error:
        load_engine(DEMO, "mps")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("wrong", [0.9, float("nan")])
def test_a_device_whose_gradients_are_not_those_of_the_cpu_is_refused(demo_tokenizer, monkeypatch, wrong):
    """There is no such device here, so the first of the two gradients is made wrong."""
    engine, ids = tiny_engine("llama", demo_tokenizer, torch.float32), torch.arange(3, 15)[None]
    engine.check_gradient(ids)
    right, factors = engine.gradient_of_likeliest, iter([wrong, 1.0])
    assert right(ids).abs().sum() > 0
    monkeypatch.setattr(engine, "gradient_of_likeliest", lambda ids: right(ids) * next(factors))
    with pytest.raises(UserError, match="gradients on --device cpu are not those of the CPU"):
        engine.check_gradient(ids)


# --- Sampling ------------------------------------------------------------------------------------------------------


def sampling(**changes):
    return SimpleNamespace(**({"samples": 3, "temperature": 1.0, "max_tokens": 8, "seed": "0"} | changes))


def test_draws_have_the_frequencies_of_the_softmax_at_the_temperature():
    logits = torch.tensor([[2.0, 0.0, float("-inf"), 1.0]])
    for temperature in (0.5, 1.0, 3.0):
        sampler = Sampler(temperature, ["s"])
        drawn = torch.stack([sampler.draw(logits, [0])[0, 0] for _ in range(4000)])
        expected = (logits[0] / temperature).softmax(-1)
        found = torch.bincount(drawn, minlength=4) / 4000
        assert (found - expected).abs().max() < 0.03 and found[2] == 0


def test_what_is_drawn_for_a_row_does_not_depend_on_the_rows_beside_it(llama):
    sequences = [[5, 6, 7], [9, 8, 7, 6, 5, 4], [30, 31]]
    together = llama.sample(sequences, sampling())
    llama.rows_that_fit = lambda columns: 3  # one sequence at a time
    assert llama.sample(sequences, sampling()) == together
    assert len({tuple(ids) for samples in together for ids, _ in samples}) > 6
    assert llama.sample(sequences, sampling(seed="1")) != together


def test_samples_at_temperature_0_are_the_greedy_text(llama):
    sequences = [[5, 6, 7], [9, 8, 7, 6, 5, 4]]
    greedy = llama.complete(sequences, 8)
    assert llama.sample(sequences, sampling(temperature=0.0)) == [[one] * 3 for one in greedy]


def test_a_low_temperature_draws_the_greedy_text_and_ends_where_it_ends(llama):
    llama.end_ids = [-1]  # no token
    ids, _ = greedy_reference(llama, [5, 6, 7], 8)
    llama.end_ids = ids[-1:]
    expected = greedy_reference(llama, [5, 6, 7], 8)
    assert expected == (ids[: ids.index(ids[-1])], True)
    assert llama.sample([[5, 6, 7]], sampling(samples=1, temperature=1e-4)) == [[expected]]


def test_mean_states_are_the_mean_of_the_last_layer_and_of_length_one(llama):
    found = llama.mean_states([[5, 6, 7], [9]])
    states = llama.model.get_decoder()(input_ids=torch.tensor([[5, 6, 7]])).last_hidden_state[0].mean(0)
    torch.testing.assert_close(found[0], states / states.norm())
    assert found.shape[0] == 2 and found.norm(dim=1) == pytest.approx(1)

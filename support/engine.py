"""A frozen model, and how it reads: new tokens behind keys and values that are kept, and shared where rows agree.

Nothing here is particular to the method. Every shortcut gives what the plain forward pass gives: to 1e-7 in float64 and
1e-5 in float32, say the tests; in bfloat16 as nearly as transformers' own attention.

Shape letters: B rows, T tokens of a padded sequence, S new tokens, C columns of keys and values before them, H hidden
size, N questions that rows share, D columns of a question, L positions whose logits are read, V vocabulary.
"""

import logging
import platform
from collections import Counter
from dataclasses import dataclass, field

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, GenerationConfig
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from support.files import UserError, require

# --- Loading ----------------------------------------------------------------------------------------


def load_model(name, device="auto", dtype="auto"):
    """(model, tokenizer) from a hub name or a local folder; the model frozen, in eval mode, decoding greedily.

    Only safetensors are read and no code from the model's folder is run. `dtype` "auto" means bfloat16 on CUDA
    and float32 on the CPU. Errors: UserError when the model is not there, gated, or has no chat template.
    """
    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {device} cannot be used here: {str(error).splitlines()[0]}") from None
    dtype = {"auto": torch.bfloat16 if device.startswith("cuda") else torch.float32}.get(dtype) or getattr(torch, dtype)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        if tokenizer.chat_template is None:
            raise UserError(f"--model {name} has no chat template: choose an instruction-tuned model")
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, use_safetensors=True)
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"cannot load --model {name} ({reason}). Ways out: `hf auth login` for a gated model, "
            "an open model by its hub name, a local folder, or --task demo, whose model is included"
        ) from None
    return freeze(model.to(device), tokenizer), tokenizer


def freeze(model, tokenizer):
    """The model without weight gradients or dropout, and with greedy decoding in place of its own sampling settings.

    Errors: UserError if its layers keep something else than attention's keys and values, or share these among
    themselves; if its attention cannot be replaced by the one below; or if it never stops.
    """
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    if others := kinds - {"full_attention", "sliding_attention"}:
        raise UserError(f"--model has layers of type {', '.join(sorted(others))}: use one of full or sliding attention")
    alone = not getattr(config, "num_kv_shared_layers", 0) and not getattr(config, "hidden_size_per_layer_input", 0)
    model.set_attn_implementation(ATTENTION)
    require(alone and model.config._attn_implementation == ATTENTION, OTHER_MODEL)
    faster(model.requires_grad_(False).eval())
    own = model.generation_config
    ends = own.eos_token_id if own.eos_token_id is not None else tokenizer.eos_token_id
    ends = sorted({*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id} - {None})
    if not ends:
        raise UserError("the model names no end-of-sequence token, so its reasoning would never stop")
    # Padding is masked everywhere, so any id serves; an end token is always in the vocabulary.
    model.generation_config = GenerationConfig(do_sample=False, eos_token_id=ends, pad_token_id=ends[0])
    return model


# --- Linear layers on a CPU -----------------------------------------------------------------------------


def faster(model):
    """The same model, on an x86 CPU and in float32 with its linear layers in oneDNN.

    Decoding multiplies few rows by large matrices. PyTorch's own way, MKL, is slow there; oneDNN, which PyTorch
    brings along, is faster, most of all with weights in its own order.
    """
    usable = platform.machine() in ("x86_64", "AMD64") and torch.backends.mkldnn.is_available()
    needed = ("_linear_pointwise", "_reorder_linear_weight")
    if not (usable and all(hasattr(torch.ops.mkldnn, name) for name in needed)):
        return model
    for layer in model.modules():
        weight = getattr(layer, "weight", None)
        if type(layer) is torch.nn.Linear and (weight.dtype, weight.device.type) == (torch.float32, "cpu"):
            layer.__class__ = OneDnnLinear
            if weight is not model.get_input_embeddings().weight:  # whose rows are looked up
                ordered = torch.ops.mkldnn._reorder_linear_weight(weight.detach())
                layer.weight = torch.nn.Parameter(ordered, requires_grad=False)
    return model


class OneDnnLinear(torch.nn.Linear):
    def forward(self, inputs):
        product = OneDnnProduct.apply if inputs.requires_grad else one_dnn_product
        return product(inputs, self.weight, self.bias)


def one_dnn_product(inputs, weight, bias=None):
    """F.linear, by an operator that PyTorch has for its compiler, without a derivative."""
    return torch.ops.mkldnn._linear_pointwise(inputs, weight, bias, "none", [], "")


class OneDnnProduct(torch.autograd.Function):
    """The same with its derivative; the weights are frozen."""

    @staticmethod
    def forward(ctx, inputs, weight, bias):
        ctx.weight = weight
        return one_dnn_product(inputs, weight, bias)

    @staticmethod
    def backward(ctx, gradient):
        # oneDNN's order serves one direction; a copy in the usual order costs little beside the product.
        weight = ctx.weight.to_dense() if ctx.weight.is_mkldnn else ctx.weight
        return one_dnn_product(gradient.contiguous(), weight.t()), None, None


# --- Batches ---------------------------------------------------------------------------------------------


@dataclass
class Work:
    """What a run has done, in tokens read forward, backward and generated, and the batch sizes that fit:
    {stage: size}, lowered when CUDA memory runs out."""

    counts: Counter = field(default_factory=Counter)
    sizes: dict = field(default_factory=dict)


def in_batches(function, items, stage, size, work):
    """[function(items[a:b]), ...] over batches; on CUDA out-of-memory the stage's size halves and the work goes on."""
    results, start = [], 0
    while start < len(items):
        size, full = min(size, work.sizes.get(stage, size)), False
        try:
            results.append(function(items[start : start + size]))
            start += size
        except torch.OutOfMemoryError:
            full = True
        if full:  # not in the except block, where the error still holds the batch's tensors
            require(size > 1, "out of memory with a single row: use a smaller model or fewer tokens")
            torch.cuda.empty_cache()
            work.sizes[stage] = (min(size, len(items)) + 1) // 2
            logging.getLogger(__name__).warning("out of memory: %s in batches of %d", stage, work.sizes[stage])
    return results


def rows_for_generation(model, columns, read=1):
    """How many rows to generate at once if each has so many columns of keys and values and so many positions whose
    logits are read: as many as surely fit. The same on the same machine, so that a resumed run makes the same batches.

    Errors: UserError if the model does not know so many positions.
    """
    config = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or {}
    known = getattr(config, "max_position_embeddings", None) or columns
    if rope.get("rope_type") in ("longrope", "dynamic"):  # behind these positions a row would change the others
        known = rope.get("original_max_position_embeddings") or known
    require(columns <= known, f"--max-new-tokens: a row could have {columns} tokens, the model knows {known}: lower it")
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if model.device.type == "cuda":
        weights = sum(weight.numel() * weight.dtype.itemsize for weight in model.parameters())
        memory = torch.cuda.get_device_properties(model.device).total_memory * 4 // 5 - weights
    else:
        memory = 2**32  # bytes; a CPU gains little from more rows than these hold
    states = 2 * config.num_hidden_layers * heads * size * model.dtype.itemsize * columns
    logits = 3 * 4 * config.vocab_size * read  # as they come, in float32, and as logarithms of probabilities
    return max(1, memory // (states + logits))


def rows_for_backward(model, tokens):
    """How many rows of so many tokens to read forward and back at once. Activations, mostly the linear layers'
    outputs and half as much again, live from the one to the other."""
    cuda = model.device.type == "cuda"
    # Bytes. A CPU is as fast with a few hundred tokens as with thousands.
    memory = torch.cuda.get_device_properties(model.device).total_memory // 8 if cuda else 192 * 2**20
    outputs = sum(layer.out_features for layer in model.modules() if isinstance(layer, torch.nn.Linear))
    return max(1, memory // int(1.5 * model.dtype.itemsize * outputs * tokens))


def pad(sequences, device, left=False):
    """(ids [B, T], mask [B, T]) of lists of ids, padded on one side. Padding is id 0, masked everywhere."""
    longest = max(map(len, sequences))
    gaps = [[0] * (longest - len(s)) for s in sequences]
    ids = [g + s if left else s + g for s, g in zip(sequences, gaps)]
    ones = [[1] * len(s) for s in sequences]
    mask = [g + o if left else o + g for o, g in zip(ones, gaps)]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


# --- Reading --------------------------------------------------------------------------------------------


def logits_at(model, columns, **inputs):
    """Logits [B, L, V], float32 or better, at `columns` [B, L] of each row, never for the whole sequence.

    The output embedding is applied to the chosen hidden states only; whatever the model does to its logits
    afterwards (Gemma-2 caps them) it does to these.
    """
    rows = torch.arange(len(columns), device=columns.device)[:, None]
    head = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda _, hidden: (hidden[0][rows, columns],))
    try:
        logits = model(**inputs).logits
    finally:
        hook.remove()
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def read(model, layers, mask, tokens, columns, shared=None):
    """Read new tokens behind the keys and values in `layers`: logits [B, L, V] at `columns` of the new tokens.

    layers: per layer of the model what holds its keys and values, `Picked`, `Growing` or transformers' own.
    tokens: ids [B, S] or embeddings [B, S, H]. mask [B, C + S]: padding only before the first and behind the last
    token of a row. With `shared` questions before the layers: mask [B, D + C + S], padding anywhere.
    """
    past = DynamicCache()
    past.layers = layers
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
    inputs = {"inputs_embeds" if tokens.is_floating_point() else "input_ids": tokens, "position_ids": positions}
    if shared is not None:
        inputs |= {"shared": shared, "visible": VisibleColumns(mask, tokens.shape[1], model.dtype)}
        mask = mask[:, shared.columns :]
    logits = logits_at(model, columns, **inputs, attention_mask=mask, past_key_values=past, use_cache=True)
    if shared is not None:  # a model whose layers do not ask, or not for their window, would read something else
        config = model.config.get_text_config()
        kinds = getattr(config, "layer_types", None)
        slides = "sliding_attention" in kinds if kinds else getattr(config, "sliding_window", None) is not None
        require(inputs["visible"].keys() - ({None} if slides else set()), OTHER_MODEL)
    return logits


class VisibleColumns(dict):
    """What the last S tokens of mask [B, C + S] see, by the sliding window of a layer (None: everything before them):
    [B, 1, 1, S, C + S], 0 for a visible column and a very negative number otherwise. Made once for all layers."""

    def __init__(self, mask, new, dtype):
        super().__init__()
        places = mask.cumsum(1)  # columns of padding do not count
        self.back = places[:, -new:, None] - places[:, None]
        self.seen, self.dtype = (self.back >= 0) & mask.bool()[:, None], torch.promote_types(dtype, torch.float32)

    def __missing__(self, window):
        seen = self.seen if window is None else self.seen & (self.back < window)
        self[window] = hidden(seen, self.dtype)[:, None, None]
        return self[window]


def hidden(seen, dtype):
    """What is added to scores: 0 where seen, else a very negative number (infinity makes NaN of a row without any)."""
    return torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)


# --- Keys and values ---------------------------------------------------------------------------------------


def empty(kind, model):
    return [kind() for _ in range(model.config.get_text_config().num_hidden_layers)]


class Picked(DynamicLayer):
    """Keys and values that others use too. They are picked and joined with the new ones only while their layer is
    read, so that the copy is one layer's and lives no longer (with gradients until the way back).

    pieces: [(keys, values), ...], each [rows, heads, columns, head size], one behind the other; pick(states) takes
    some rows of these. Afterwards `keys` and `values` are the new ones alone.
    """

    def __init__(self, pieces=(), pick=None):
        super().__init__()
        self.pieces, self.pick, self.is_initialized = pieces, pick, True

    def get_seq_length(self):
        return sum(keys.shape[2] for keys, _ in self.pieces)

    def update(self, keys, values, *args, **kwargs):
        self.keys, self.values = keys, values
        return self.join(0, keys), self.join(1, values)

    def join(self, which, *behind):
        return torch.cat([*(self.pick(piece[which]) for piece in self.pieces), *behind], 2)


class Growing(Picked):
    """Keys and values that grow in place, where DynamicLayer copies all of them for every decoded token. What they
    begin with is copied at the first token."""

    room = 0  # columns that the two tensors in `all` can hold

    def update(self, keys, values, *args, **kwargs):
        start, new = self.get_seq_length(), (keys, values)
        end = start + keys.shape[2]
        if end > self.room:
            self.room = end + 64
            more = [states.new_empty(*states.shape[:2], self.room - start, states.shape[3]) for states in new]
            self.all = [self.join(n, states) for n, states in enumerate(more)]
        for whole, states in zip(self.all, new):
            whole[:, :, start:end] = states
        self.keys, self.values = (whole[:, :, :end] for whole in self.all)
        self.pieces, self.pick = [(self.keys, self.values)], lambda states: states
        return self.keys, self.values

    def keep(self, rows):
        """Drop all but some rows. The next token copies these, a layer at a time."""
        before = self.pick
        self.pick, self.room = lambda states: before(states).index_select(0, rows), 0


class SharedQuestions:
    """Questions' keys and values, in front of what each row has of its own: one copy for all rows of a question.

    past: per layer (keys, values), each [N, heads, D, head size]. of: the question of each row, a list [B] of numbers
    below N. Questions without a row are left out: of a copy of the others, or with copy=False whenever a layer is read.
    """

    def __init__(self, past, of, copy=True):
        used = sorted(set(of))
        numbers = [used.index(question) for question in of]
        if copy and len(used) < len(past[0][0]):
            index = torch.tensor(used, device=past[0][0].device)
            past, of, used = [tuple(states.index_select(0, index) for states in pair) for pair in past], numbers, None
        self.past, self.of, self.columns, device = past, of, past[0][0].shape[2], past[0][0].device
        self.used = None if used is None or len(used) == len(past[0][0]) else torch.tensor(used, device=device)
        # The rows of a question stand side by side when they meet its keys, in as many slots as the fullest question
        # has rows. An empty slot repeats row 0, and nobody reads what comes of it.
        self.deep = max(Counter(numbers).values())
        places = [numbers[:row].count(number) for row, number in enumerate(numbers)]
        slots = [number * self.deep + place for number, place in zip(numbers, places)]
        row_in = dict(zip(slots, range(len(slots))))
        rows = [row_in.get(slot, 0) for slot in range(self.deep * (max(numbers) + 1))]
        self.slots, self.rows = torch.tensor(slots, device=device), torch.tensor(rows, device=device)
        self.in_place = slots == rows == list(range(len(slots)))  # each row in its slot, and no slot is empty

    def keep(self, rows, copy=True):
        """The same for some of the rows, a list."""
        return SharedQuestions(self.past, [self.of[row] for row in rows], copy)

    # Below, "heads" are those of keys and values, and n counts the queries of one: its query heads times S.

    def scores(self, query, layer):
        """Products [B, heads, n, D] of queries [B, heads, n, head size] and the keys."""
        return self.apart(self.together(query) @ self.states(layer, 0).transpose(2, 3))

    def mix(self, weights, layer):
        """Values [B, heads, n, head size], mixed by weights [B, heads, n, D]."""
        return self.apart(self.together(weights) @ self.states(layer, 1))

    def states(self, layer, which):
        states = self.past[layer][which]
        return states if self.used is None else states.index_select(0, self.used)

    def together(self, states):
        """[B, heads, n, x] as [N, heads, deep * n, x]"""
        states = states if self.in_place else states.index_select(0, self.rows)
        return states.unflatten(0, (-1, self.deep)).transpose(1, 2).flatten(2, 3)

    def apart(self, states):
        """[N, heads, deep * n, x] as [B, heads, n, x]"""
        states = states.unflatten(2, (self.deep, -1)).transpose(1, 2).flatten(0, 1)
        return states if self.in_place else states.index_select(0, self.slots)


ATTENTION = "shared-questions"
OTHER_MODEL = "--model computes attention in a way that cannot be shared here: use another model"


def attention(module, query, keys, values, mask, scaling, shared=None, visible=None, softcap=None, **kwargs):
    """([B, S, heads, head size], None) for queries [B, heads, S, head size] and keys and values [B, key heads, C + S,
    head size], behind `shared` questions if there are some: in the form of transformers' AttentionInterface.

    mask: transformers' own, bool [B, 1, S, C + S]; behind questions `visible`, a `VisibleColumns`, stands in its place.
    softcap: Gemma-2's bound on scores. Errors: UserError where a model adds to the scores what is unknown here.
    """
    require(kwargs.get("s_aux") is None and kwargs.get("position_bias") is None, OTHER_MODEL)
    if shared is None and softcap is None:
        return sdpa_attention_forward(module, query, keys, values, mask, scaling=scaling, **kwargs)
    new, layer = query.shape[2], module.layer_idx
    query = query.reshape(len(query), keys.shape[1], -1, query.shape[3])  # the heads of a key stand side by side
    scores = query @ keys.transpose(2, 3)
    if shared is not None:
        scores = torch.cat([shared.scores(query, layer), scores], 3)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    bias = hidden(mask, scores.dtype)[:, :, None] if shared is None else visible[kwargs.get("sliding_window")]
    weights = (scores.unflatten(2, (-1, new)) + bias).softmax(4).flatten(2, 3).to(values.dtype)
    if shared is None:
        mixed = weights @ values
    else:
        mixed = shared.mix(weights[..., : shared.columns], layer) + weights[..., shared.columns :] @ values
    return mixed.unflatten(2, (-1, new)).flatten(1, 2).transpose(1, 2), None


AttentionInterface.register(ATTENTION, attention)
# A mask is always made: `attention` has no other way to know what is causal.
AttentionMaskInterface.register(ATTENTION, lambda **sizes: sdpa_mask(**{**sizes, "allow_is_causal_skip": False}))

"""The frozen model as an engine: forward passes behind keys and values that are kept, and decoding.

Nothing here is particular to the method. Six verbs:

    load_engine     hub name or folder -> Engine
    prefill         token sequences -> Context, logits of the next token
    forward         new tokens behind a Context -> logits where they are asked for (differentiable in embeddings)
    generate        decoding behind a Context, greedy unless a `Sampler` draws; rows leave the batch as they end
    sample          several texts behind each token sequence, drawn at a temperature
    over_rows       a function over many rows, in batches that fit into memory

A Context is a batch's keys and values. `forward` appends to it; whoever wants to keep the shorter one takes a copy
first, with `select`, which is also how some rows, or one row several times, are picked.

All of it is to give what the model's plain forward pass gives. `Engine` compares the two on a few tokens before
anything else, and the tests on more; a sliding window longer than these few tokens is beyond the first.

Shape letters: B rows, S new tokens, C columns of keys and values before them, L positions whose logits are read,
E embedding size, V vocabulary.
"""

import importlib.util
import logging
import os
import random
from collections import Counter
from dataclasses import dataclass

import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from support import ranks
from support.files import UserError, require, text_hash
from support.identity import cannot_load, commit_of, identity_of, is_folder
from support.onednn import use_onednn
from support.progress import Progress

LOOK_EVERY = {"cpu": 1, "cuda": 8}  # decoding steps between looks at which rows have ended: a look waits for the device
LEAVE_TOGETHER = 8  # rows that `generate` hands out at once, so that what is read of them stays small
OUT_OF_MEMORY = "out of memory with a single row: use a smaller model or fewer tokens"
ROOM = 64  # columns by which keys and values grow
PIECE = 7  # tokens that are read in pieces to see whether they come out as in one pass
TOKENS_AT_ONCE = {"cpu": 512, "cuda": 2**14}  # of questions: a CPU's caches hold what becomes of them in a layer


# --- Keys and values -------------------------------------------------------------------------------


class Growing(DynamicLayer):
    """One layer's keys and values [B, heads, C, head size], written in place into tensors with room to grow.

    DynamicLayer copies all of them for every decoded token.
    """

    def __init__(self, keys, values):
        super().__init__()
        self.keys, self.values, self.is_initialized = keys, values, True
        self.key_buffer, self.value_buffer = keys, values  # of which keys and values are the first C columns

    def update(self, keys, values, *args, **kwargs):
        start = self.keys.shape[2]
        end = start + keys.shape[2]
        if end > self.key_buffer.shape[2]:
            self.key_buffer = with_room(self.keys, end + ROOM)
            self.value_buffer = with_room(self.values, end + ROOM)
        self.key_buffer[:, :, start:end] = keys
        self.value_buffer[:, :, start:end] = values
        self.keys, self.values = self.key_buffer[:, :, :end], self.value_buffer[:, :, :end]
        return self.keys, self.values


def with_room(states, columns):
    """A copy of keys or values [B, heads, C, head size] at the start of a tensor with so many columns."""
    buffer = states.new_empty(*states.shape[:2], columns, states.shape[3])
    buffer[:, :, : states.shape[2]] = states
    return buffer


class Borrowed(DynamicLayer):
    """Some rows of another layer's keys and values without their last columns, for a single forward pass: they are
    copied, and joined with the new ones, only while their layer is read, so that the copy is one layer's."""

    def __init__(self, lender, index, source):
        """index [b]: rows of the lender. source [b, C]: for each of its columns the lender's."""
        super().__init__()
        self.lender, self.index, self.source, self.is_initialized = lender, index[:, None], source, True

    def get_seq_length(self):
        return self.source.shape[1]

    def update(self, keys, values, *args, **kwargs):
        return self.joined(self.lender.keys, keys), self.joined(self.lender.values, values)

    def joined(self, states, new):
        """[B, heads, C, head size] and new ones [b, heads, S, head size] -> [b, heads, C + S, head size]"""
        return torch.cat([self.picked(states), new], 2)

    def picked(self, states):
        index, source = self.index.to(states.device), self.source.to(states.device)
        return states.transpose(1, 2)[index, source].transpose(1, 2)


@dataclass
class Context:
    """What the model has read of B rows: a `Growing` layer per layer that keeps something, each on its layer's device,
    and mask [B, C], 0 for padding. Padding stands on the left. A `forward` may have some on the right, and nothing may
    follow it then: the distances that a sliding window sees would not be those of the tokens."""

    layers: list
    mask: torch.Tensor

    def select(self, rows):
        """A copy of some rows, a list of numbers, without columns that are padding in all of them."""
        index = torch.tensor(rows, device=self.mask.device)
        mask = self.mask.index_select(0, index)
        first = int(mask.any(0).int().argmax())
        layers = [
            Growing(rows_of(layer.keys[:, :, first:], index), rows_of(layer.values[:, :, first:], index))
            for layer in self.layers
        ]
        return Context(layers, mask[:, first:])

    def row(self, n):
        """Row n alone; nothing is copied."""
        layers = [Growing(layer.keys[n : n + 1], layer.values[n : n + 1]) for layer in self.layers]
        return Context(layers, self.mask[n : n + 1])

    def keep(self, index):
        """Drop all but the rows index [b], a layer at a time, so that no second copy of all layers exists."""
        self.mask = self.mask.index_select(0, index)
        for n, layer in enumerate(self.layers):
            self.layers[n] = Growing(rows_of(layer.keys, index), rows_of(layer.values, index))

    def rewind(self, index, columns):
        """The rows index [b] without their last `columns` [b] columns, padded on the left instead: for one forward
        pass, and only until this context changes."""
        source = torch.arange(self.mask.shape[1], device=self.mask.device) - columns[:, None]  # [b, C]
        mask = self.mask[index].gather(1, source.clamp(min=0)) * (source >= 0)
        return Context([Borrowed(layer, index, source.clamp(min=0)) for layer in self.layers], mask)

    def aligned(self, rows, heads, tails):
        """(a copy of these rows, ids [b, S], mask [b, S]) of the tails, to be read so that they end in the same column.

        heads, tails: lists of ids for each row, what was read of it and what comes then. Behind the heads of rows with
        short tails no padding may stand, so their last tokens are read again.
        """
        longest = max(map(len, tails))
        again = [longest - len(tail) for tail in tails]
        ends = [[*head, *tail][-longest:] for head, tail in zip(heads, tails)]
        ids, mask = pad(ends, self.mask.device, left=True)
        if not any(again):
            return self.select(rows), ids, mask
        index, columns = (torch.tensor(numbers, device=self.mask.device) for numbers in (rows, again))
        return self.rewind(index, columns).own(), ids, mask

    def own(self):
        """A context of its own, of one that `rewind` gave."""
        layers = []
        for layer in self.layers:
            layers.append(Growing(layer.picked(layer.lender.keys), layer.picked(layer.lender.values)))
        return Context(layers, self.mask)

    def repeated(self, times):
        """A context of each row so many times in succession, of one that `rewind` gave: for one forward pass."""
        layers = [
            Borrowed(layer.lender, layer.index[:, 0].repeat_interleave(times), layer.source.repeat_interleave(times, 0))
            for layer in self.layers
        ]
        return Context(layers, self.mask.repeat_interleave(times, 0))


def rows_of(states, index):
    """A copy of the rows index [b] of keys or values, on their device."""
    return states.index_select(0, index.to(states.device))


def join(contexts):
    """One Context of the rows of several, padded on the left to the longest. Their layers are used up."""
    longest = max(context.mask.shape[1] for context in contexts)
    masks = [F.pad(context.mask, (longest - context.mask.shape[1], 0)) for context in contexts]
    layers = []
    while contexts[0].layers:  # a layer at a time, so that no second copy of all layers exists
        parts = [context.layers.pop(0) for context in contexts]
        keys = stacked([layer.keys for layer in parts], longest)
        layers.append(Growing(keys, stacked([layer.values for layer in parts], longest)))
    return Context(layers, torch.cat(masks))


def stacked(parts, columns):
    """Keys or values of several contexts as one tensor [B, heads, columns, head size], zeros on the left."""
    count = sum(len(part) for part in parts)
    states = parts[0].new_zeros(count, parts[0].shape[1], columns, parts[0].shape[3])
    start = 0
    for part in parts:
        states[start : start + len(part), :, columns - part.shape[2] :] = part
        start += len(part)
    return states


@dataclass
class Ended:
    """Rows of a batch whose generation has ended."""

    rows: list[int]  # their numbers in the batch
    ids: list[list[int]]  # what was generated, without the end token
    stopped: list[bool]  # by an end token, not by the limit
    finite: list[bool]  # whether the model's logits were numbers all along
    context: Context  # what was read before them, and `ids`: until the next rows are asked for
    again: bool = False  # set by whoever asked, where memory ran out behind them: `stream` reads them again in less


class Sampler:
    """Draws next tokens at a temperature above 0. Each row has a generator of its own: which rows stand beside it does
    not change what is drawn for it."""

    def __init__(self, temperature, seeds):
        """seeds: a text for each row of the batch."""
        self.temperature = temperature
        self.rngs = [random.Random(seed) for seed in seeds]

    def draw(self, logits, rows):
        """A token [b, 1] for each of the rows, a list of numbers, whose logits are [b, V]."""
        wide = logits.cpu() if logits.device.type == "mps" else logits  # which has no float64
        shares = (wide.double() / self.temperature).softmax(-1).cumsum(-1)  # [b, V]
        drawn = [[self.rngs[row].random()] for row in rows]
        places = torch.tensor(drawn, dtype=shares.dtype, device=shares.device) * shares[:, -1:]  # [b, 1]
        # The first token whose share ends behind the place, so never one without a share.
        tokens = torch.searchsorted(shares, places, right=True).clamp(max=shares.shape[1] - 1)
        return tokens.to(logits.device)


# --- The engine ------------------------------------------------------------------------------------


def mask_always(**sizes):
    """transformers' mask for scaled_dot_product_attention, also where none is needed: to find that out the host would
    wait for the device at every token."""
    return sdpa_mask(**{**sizes, "allow_is_causal_skip": False})


AttentionInterface.register("sdpa-always-masked", sdpa_attention_forward)
AttentionMaskInterface.register("sdpa-always-masked", mask_always)


class Engine:
    """A model that is not trained any more, with its tokenizer.

    Errors: UserError if it never stops, has layers that are not attention, or is read wrongly in pieces.
    """

    def __init__(self, model, tokenizer):
        self.model, self.tokenizer = model.requires_grad_(False).eval(), tokenizer
        if model.config._attn_implementation == "sdpa":
            model.set_attn_implementation("sdpa-always-masked")
        self.devices = set(getattr(model, "hf_device_map", {}).values())  # of a model that accelerate has spread
        if not self.devices:  # else accelerate moves the weights
            use_onednn(model)
        self.device = input_device(model)
        self.config = model.config.get_text_config()
        # In Gemma-3n and -4 every layer looks a token up once more; see `embed`.
        extra = getattr(self.config, "hidden_size_per_layer_input", 0)
        self.extra_embeddings = model.get_decoder().get_per_layer_inputs if extra else None
        self.end_ids = end_tokens(model, tokenizer)
        self.counts = Counter()  # tokens in forward passes (with padding), in backward passes, generated
        self.batch_sizes = {}  # {stage: rows at once}, lowered when CUDA memory runs out
        self.progress = Progress()  # what is being done now
        self.identity = f"made in memory, {type(model).__name__}"  # identity.identity_of what it was loaded from
        self.compared = False  # whether a row of the work at hand has been read both ways
        self.check()

    def check(self):
        """Read a few tokens in one pass and in pieces, and compare, before any long work."""
        others = set(getattr(self.config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
        kinds = ", ".join(sorted(others))
        require(not others, f"--model has layers of type {kinds}: use one of full or sliding attention")
        ids = torch.arange(3, 15, device=self.device)[None] % self.config.vocab_size  # [1, 12]
        try:
            with torch.no_grad():
                plain = self.model(input_ids=ids).logits[0]  # [12, V]
            pieces, self.column_bytes = self.read_in_pieces(ids)
        except (torch.OutOfMemoryError, UserError):
            raise
        except Exception as error:  # whatever a model raises that wants to be read in another way
            raise UserError(f"--model cannot be read in pieces ({error!r:.200}): use another model") from error
        self.require_same(plain, pieces, ids)
        if self.device.type == "mps":  # on which the tests do not run
            self.check_gradient(ids)
        self.counts.clear()

    def check_gradient(self, ids):
        """Compare the gradient behind ids [1, S] with the CPU's: a device may be right forward and wrong back.

        Errors: UserError if they differ."""
        device = self.device
        there = self.gradient_of_likeliest(ids)
        self.model.to("cpu")
        self.device = torch.device("cpu")
        here = self.gradient_of_likeliest(ids.cpu())
        self.model.to(device)
        self.device = device
        tolerance = 0.2 if self.dtype_hint else 1e-2
        same = (there - here).norm() < tolerance * here.norm()  # not so where one of them is not a number
        require(same, f"gradients on --device {device.type} are not those of the CPU: use --device cpu")

    def gradient_of_likeliest(self, ids):
        """[S, E], float32 on the CPU: of the log-probability of the likeliest token behind ids [1, S] with respect to
        their embeddings."""
        embedded = self.embed(ids).requires_grad_()  # [1, S, E]
        context = Context([], ids.new_zeros(1, 0))
        log_prob = self.forward(context, embedded)[0, 0].log_softmax(-1).max()
        (gradient,) = torch.autograd.grad(log_prob, embedded)
        return gradient[0].float().cpu()

    @property
    def dtype_hint(self):
        """What to try where numbers are not finite."""
        return "" if self.model.dtype in (torch.float32, torch.float64) else " Try --dtype float32"

    def compare_longest(self, sequences):
        """The same with the longest sequence of the first work at hand: a model may differ only where a row is long.

        Errors: UserError if a plain pass gives other logits, or numbers that are not finite."""
        sequence = max(sequences, key=len)
        if self.compared or len(sequence) < 2 * PIECE:
            return
        ids = torch.tensor([sequence], device=self.device)  # [1, S]
        counts = self.counts.copy()
        with torch.no_grad():
            plain = self.logits_at([list(range(ids.shape[1] - PIECE, ids.shape[1]))], input_ids=ids)[0]
        self.require_same(plain, self.read_in_pieces(ids)[0], ids)
        self.counts, self.compared = counts, True

    @torch.no_grad()
    def read_in_pieces(self, ids):
        """(logits [PIECE, V] of the last tokens of ids [1, S], read behind padding, behind a context and as embeddings,
        of which the last ones a second time, as answers are; bytes that the keys and values of a token take)."""
        start = ids.shape[1] - PIECE + 1
        rest = ids[:, start:]  # [1, PIECE - 1]
        context, first = self.read([ids[0, : start + 1].tolist(), ids[0, :start].tolist()])  # row 1 is compared
        later = self.forward(context, self.embed(rest.expand(2, -1)), columns=[list(range(PIECE - 1))] * 2)
        one, two = torch.tensor([1], device=self.device), torch.tensor([2], device=self.device)
        again = self.forward(context.rewind(one, two), rest[:, -2:], columns=[[0, 1]])
        values = sum(layer.keys[0, :, 0].numel() + layer.values[0, :, 0].numel() for layer in context.layers)
        logits = torch.cat([first[1:], later[1, :-2], again[0]])  # [PIECE, V]
        return logits, values * self.model.dtype.itemsize

    def require_same(self, plain, pieces, ids):
        """Errors: UserError if logits behind ids [1, S] of plain [S, V], in its last rows, and pieces [PIECE, V]
        differ."""
        plain, pieces = plain[-PIECE:].float(), pieces.float()
        finite = plain.isfinite()  # a model may forbid tokens
        numbers = not (plain.isnan().any() or pieces.isnan().any()) and finite.any(1).all()
        require(numbers, f"--model gives logits that are not finite: are its weights whole?{self.dtype_hint}")
        difference = (pieces - plain)[finite].square().mean().sqrt()
        spread = (plain - plain[finite].mean())[finite].square().mean().sqrt()
        tolerance = 0.2 if self.dtype_hint else 1e-3
        same = finite.equal(pieces.isfinite()) and not difference > tolerance * spread + 1e-6
        if not same and self.dtype_hint:  # a model whose states are large may be as rough as that
            same = difference <= 3 * self.roughness(ids)
        other = "--model gives other logits when it is read in pieces than in one: use another model"
        require(same, f"{other}.{self.dtype_hint}" if self.dtype_hint else other)

    @torch.no_grad()
    def roughness(self, ids):
        """Root mean square by which the last logits behind ids [1, S] change if each number of the embeddings is
        rounded the other way, up or down by one in its last place: what rounding alone does to this model."""
        columns = [list(range(ids.shape[1] - PIECE, ids.shape[1]))]
        embedded = self.embed(ids)  # [1, S, E]
        signs = torch.randint(2, embedded.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
        nudged = embedded * (1 + torch.finfo(embedded.dtype).eps * signs.to(embedded))
        empty = [Context([], ids.new_zeros(1, 0)) for _ in range(2)]
        one, other = self.forward(empty[0], embedded, columns=columns), self.forward(empty[1], nudged, columns=columns)
        finite = one.isfinite() & other.isfinite()
        return (one - other)[finite].square().mean().sqrt()

    def embed(self, ids):
        """Embeddings [..., E] of token ids [...], as `forward` takes them: all that the model looks up for a token.

        E is the hidden size, and in Gemma-3n and -4 behind it what each layer looks up.
        """
        embedded = self.model.get_input_embeddings()(ids)
        if self.extra_embeddings is None:
            return embedded
        return torch.cat([embedded, self.extra_embeddings(ids).flatten(-2)], -1)

    def as_inputs(self, tokens):
        """The model's own arguments for ids [B, S] or embeddings [B, S, E]."""
        if not tokens.is_floating_point():
            return {"input_ids": tokens}
        if self.extra_embeddings is None:
            return {"inputs_embeds": tokens}
        size = self.config.hidden_size
        per_layer = tokens[..., size:].unflatten(-1, (self.config.num_hidden_layers, -1))
        return {"inputs_embeds": tokens[..., :size], "per_layer_inputs": per_layer}

    @torch.no_grad()
    def read(self, sequences):
        """(Context, logits [B, V] of the next token) of B lists of ids, read from nothing, those of like length at
        once."""
        parts = [None] * len(sequences)
        for rows in of_like_length(sequences, TOKENS_AT_ONCE.get(self.device.type, 2**14)):
            ids, mask = pad([sequences[n] for n in rows], self.device, left=True)  # [b, S]
            context = Context([], mask[:, :0])
            logits = self.forward(context, ids, mask)[:, 0]  # [b, V]
            for place, n in enumerate(rows):
                parts[n] = context.row(place), logits[place]
        return join([context for context, _ in parts]), torch.stack([logits for _, logits in parts])

    def prefill(self, sequences, batch_size=0):
        """What `read` gives, in batches. batch_size: sequences at once; 0: as many as fit."""

        def run(batch):
            context, logits = self.read(batch)
            return [(context.row(n), logits[n]) for n in range(len(batch))]

        longest = max(map(len, sequences))
        self.require_positions(longest)
        self.compare_longest(sequences)
        size = batch_size or self.rows_that_fit(longest)
        distinct = list({tuple(ids): ids for ids in sequences}.values())  # all alike where the prompt comes first
        # Not shared over ranks: each of them goes on from all questions, and this is read once.
        parts = self.over_own_rows(run, distinct, "reading questions", size, cost=len)
        context, logits = join([context for context, _ in parts]), torch.stack([logits for _, logits in parts])
        if len(distinct) == len(sequences):
            return context, logits
        numbers = [distinct.index(ids) for ids in sequences]
        return context.select(numbers), logits[numbers]

    def read_tails(self, context, rows, heads, tails, count):
        """(Context of some rows of another, with a tail behind each; logits [b, count + 1, V] at the first `count` of
        its tokens, where each predicts the next one, and at its last). rows, heads, tails: as of `Context.aligned`."""
        context, ids, mask = context.aligned(rows, heads, tails)  # [b, S]
        last = ids.shape[1] - 1
        columns = []
        for tail in tails:
            first = ids.shape[1] - len(tail)
            columns.append([*range(first, first + count), last])
        return context, self.forward(context, ids, mask, columns)

    def forward(self, context, tokens, mask=None, columns=None):
        """Logits [B, L, V], float32 or better, at some of the new tokens, which are appended to the context.

        tokens: ids [B, S], or embeddings [B, S, E] of `embed`. mask [B, S]: 0 for padding; None: there is none.
        columns: for each row the L new tokens whose logits are read, where shorter lists repeat their last one;
        None: the last token.
        """
        mask = context.mask.new_ones(tokens.shape[:2]) if mask is None else mask
        if context.mask.shape[1] and not context.layers:
            raise ValueError("this context is used up: what it read has changed since")
        context.mask = torch.cat([context.mask, mask], 1)  # [B, C + S]
        positions = (context.mask.cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        cache = DynamicCache()
        if context.layers:
            cache.layers = context.layers
        inputs = self.as_inputs(tokens) | {"attention_mask": context.mask, "position_ids": positions}
        logits = self.logits_at(columns, **inputs, cache=cache, use_cache=True)
        if not context.layers:
            context.layers = [Growing(layer.keys, layer.values) for layer in cache.layers]
        self.counts["forward_tokens"] += tokens.shape[0] * tokens.shape[1]
        return logits

    def logits_at(self, columns, **inputs):
        """Logits [B, L, V] at some columns, never [B, S, V]: the output embedding is applied to these alone, and what
        the model does to logits afterwards (Gemma-2 caps them) it does to these."""
        if columns is None:
            places = slice(None), slice(-1, None)
        else:
            longest = max(map(len, columns))
            full = [row + row[-1:] * (longest - len(row)) for row in columns]
            places = torch.arange(len(full), device=self.device)[:, None], torch.tensor(full, device=self.device)
        output = self.model.get_output_embeddings()
        hook = output.register_forward_pre_hook(lambda module, args: (states_at(args[0], places),))
        try:
            logits = self.model(**inputs).logits
        finally:
            hook.remove()
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    @torch.inference_mode()
    def generate(self, context, logits, limits, sampler=None):
        """Decoding behind a context whose next-token logits [B, V] are known; yields `Ended` rows.

        sampler: the `Sampler` that draws the tokens; None: the likeliest are taken. Each row goes to an end token or
        its limit, one of a list of B. Rows leave the batch soon after they end. The context is used up.
        """
        ends = torch.tensor(self.end_ids, device=self.device)
        look_every = LOOK_EVERY.get(self.device.type, 8)
        longest = max(limits)
        limits = torch.tensor(limits, device=self.device)
        rows = torch.arange(len(logits), device=self.device)  # those still in the batch
        ids = next_tokens(logits, rows, sampler)  # [B, n]
        while True:
            logits = self.forward(context, ids[:, -1:])  # [B, 1, V], of id n: all n ids have been read
            n = ids.shape[1]
            self.progress.tokens += len(ids)
            if n % look_every == 0 or n >= longest:
                is_end = torch.isin(ids, ends)
                before_end = torch.where(is_end.any(1), is_end.int().argmax(1), n)  # [B]
                length = torch.minimum(before_end, limits)
                over = (before_end < n) | (limits <= n)
                if over.float().mean() >= 1 / 8 or n >= longest:  # fewer are not worth the copying
                    for leaving in over.nonzero()[:, 0].split(LEAVE_TOGETHER):
                        lengths = length[leaving].tolist()
                        generated = [row[:count] for row, count in zip(ids[leaving].tolist(), lengths)]
                        stopped = (before_end < limits)[leaving].tolist()
                        # Once a row has one, everything behind it is none either.
                        finite = (~logits[leaving].isnan().any(-1)[:, 0]).tolist()
                        generated_tokens = sum(lengths) + sum(stopped)
                        self.counts["generated_tokens"] += generated_tokens
                        self.progress.tokens += generated_tokens - n * len(leaving)  # less what is behind the ends
                        self.progress.done += len(leaving)
                        read = context.rewind(leaving, n - length[leaving])
                        ended = Ended(rows[leaving].tolist(), generated, stopped, finite, read)
                        yield ended
                        ended.context.layers.clear()  # they lend from layers that change now
                    if over.all():
                        return
                    going = (~over).nonzero()[:, 0]
                    context.keep(going)
                    rows, ids, limits, logits = rows[going], ids[going], limits[going], logits[going]
            ids = torch.cat([ids, next_tokens(logits[:, 0], rows, sampler)], 1)

    def complete(self, sequences, max_new_tokens, batch_size=0):
        """For each sequence of ids: (the ids generated behind it, without the end token, whether it stopped by itself).

        batch_size: rows at once; 0: as many as fit.
        """
        results = [None] * len(sequences)
        for ended in self.stream(sequences, max_new_tokens, batch_size):
            for n, ids, stopped in zip(ended.rows, ended.ids, ended.stopped):
                results[n] = ids, stopped
        return results

    def stream(self, sequences, max_new_tokens, batch_size=0):
        """What `complete` gives, as `Ended` rows as they end, numbered as in `sequences`; longest sequences first.

        Where memory runs out, here or, as `Ended.again` says, behind the rows, the batch size halves, also of later
        calls, and the rows of the batch that have not ended are read again.
        """
        columns = max(map(len, sequences)) + max_new_tokens
        self.require_positions(columns)
        self.compare_longest(sequences)
        size = batch_size or self.rows_that_fit(columns)
        size = min(size, self.batch_sizes.get("completion", size))
        waiting = sorted(range(len(sequences)), key=lambda n: -len(sequences[n]))
        self.progress.begin("reasoning", len(waiting))
        while waiting:
            batch, over, full = waiting[:size], set(), False
            try:
                context, logits = self.read([sequences[n] for n in batch])
                for ended in self.generate(context, logits, [max_new_tokens] * len(batch)):
                    ended.rows = [batch[n] for n in ended.rows]
                    yield ended
                    if ended.again:
                        raise torch.OutOfMemoryError
                    over.update(ended.rows)
                context = logits = None  # or they would stand beside the next batch's
            except torch.OutOfMemoryError:
                require(size > 1, OUT_OF_MEMORY)
                full = True
            if full:  # not in the except block, where the error still holds the batch's tensors
                context = logits = None
                torch.cuda.empty_cache()
                self.batch_sizes["completion"] = size = (min(size, len(batch)) + 1) // 2
                logging.getLogger(__name__).warning("out of memory: completion in batches of %d", size)
            waiting = [n for n in waiting if n not in over]

    def go_on(self, ended, ids, max_new_tokens):
        """What the model writes behind each of the `Ended` rows and these ids: a list of lists of ids."""
        context = ended.context.own()
        everyone = torch.tensor([ids] * len(ended.rows), device=self.device)  # [B, S]
        written, rows_done = [None] * len(ended.rows), self.progress.done
        with torch.inference_mode():
            logits = self.forward(context, everyone)[:, 0]  # [B, V]
            for done in self.generate(context, logits, [max_new_tokens] * len(ended.rows)):
                for n, row in zip(done.rows, done.ids):
                    written[n] = row
        self.progress.done = rows_done  # these rows have ended before
        return written

    def sample(self, sequences, sampling):
        """For each sequence of ids a list of (the ids drawn behind it, without the end token, whether it stopped).

        sampling: an evaluation.Sampling. A sequence is read once for all of its samples. At temperature 0 they are all
        the likeliest one. Sample k of sequence n is drawn from the seed "<seed>/<n>/<k>".
        """
        count, limit = sampling.samples, sampling.max_tokens
        columns = max(map(len, sequences)) + limit
        self.require_positions(columns)

        def run(batch):
            context, logits = self.read([ids for _, ids in batch])
            places = [place for place in range(len(batch)) for _ in range(count)]
            seeds = [f"{sampling.seed}/{n}/{k}" for n, _ in batch for k in range(count)]
            sampler = Sampler(sampling.temperature, seeds) if sampling.temperature else None
            context, written = context.select(places), [None] * len(places)
            for ended in self.generate(context, logits[places], [limit] * len(places), sampler):
                for row, ids, stopped in zip(ended.rows, ended.ids, ended.stopped):
                    written[row] = ids, stopped
            return [written[start : start + count] for start in range(0, len(written), count)]

        size = max(1, self.rows_that_fit(columns) // count)
        return self.over_rows(run, list(enumerate(sequences)), "optimizer", size, cost=lambda job: len(job[1]))

    @torch.inference_mode()
    def mean_states(self, sequences):
        """[n, E]: for each sequence of ids the mean of the last layer's states over its tokens, of length 1."""
        means = []
        for ids in sequences:
            states = self.model.get_decoder()(input_ids=torch.tensor([ids], device=self.device)).last_hidden_state
            means.append(F.normalize(states[0].cpu().double().mean(0), dim=0))
        return ranks.agreed(torch.stack(means))

    # --- Batches ---

    def over_rows(self, function, jobs, stage, size, cost):
        """[result of each job], in the jobs' order, of function(batch of jobs) -> [results], as `over_own_rows` does
        it. Several ranks (ranks.py) share the jobs, and each has the results of all."""
        if ranks.count() == 1:
            return self.over_own_rows(function, jobs, stage, size, cost)
        own = ranks.share_of(sorted(range(len(jobs)), key=lambda n: -cost(jobs[n])))
        before = self.counts.copy()

        def work():
            found = self.over_own_rows(function, [jobs[n] for n in own], stage, size, cost)
            return dict(zip(own, found)), self.counts - before, self.batch_sizes

        shares = ranks.gather(work, f"{stage}, {self.identity}, {text_hash(repr(jobs))}", self.device)
        results, self.counts = {}, before
        for found, counted, batch_sizes in shares:
            results |= found
            self.counts += counted
            for name, rows in batch_sizes.items():
                self.batch_sizes[name] = min(rows, self.batch_sizes.get(name, rows))
        return [results[n] for n in range(len(jobs))]

    def over_own_rows(self, function, jobs, stage, size, cost):
        """[result of each job], in the jobs' order, of function(batch of jobs) -> [results].

        The costliest come first, `size` at a time, so that a batch needs little padding and memory runs out early.
        On CUDA out-of-memory the stage's size halves and the work goes on.
        """
        order = sorted(range(len(jobs)), key=lambda n: -cost(jobs[n]))
        results, start = [None] * len(jobs), 0
        self.progress.begin(stage, len(jobs))
        while start < len(jobs):
            self.progress.done = start
            size = min(size, self.batch_sizes.get(stage, size))
            batch, found = order[start : start + size], None
            try:
                found = function([jobs[n] for n in batch])
            except torch.OutOfMemoryError:
                require(size > 1, OUT_OF_MEMORY)
            if found is None:  # not in the except block, where the error still holds the batch's tensors
                torch.cuda.empty_cache()
                self.batch_sizes[stage] = (min(size, len(batch)) + 1) // 2
                logging.getLogger(__name__).warning(
                    "out of memory: %s in batches of %d", stage, self.batch_sizes[stage]
                )
                continue
            for n, result in zip(batch, found):
                results[n] = result
            start += size
        return results

    def require_positions(self, columns):
        """Errors: UserError if the model does not know positions enough for a row of so many tokens."""
        rope = getattr(self.config, "rope_parameters", None) or {}
        known = getattr(self.config, "max_position_embeddings", None) or columns
        if rope.get("rope_type") in ("longrope", "dynamic"):  # behind these positions a row would change the others
            known = rope.get("original_max_position_embeddings") or known
        require(
            columns <= known, f"--max-new-tokens: a row could have {columns} tokens, the model knows {known}: lower it"
        )

    def rows_that_fit(self, columns, positions_read=1):
        """How many rows to generate at once, if each has so many columns of keys and values and so many positions
        whose logits are read. The same on the same machine, so that a resumed run makes the same batches."""
        if self.device.type == "cuda":
            there = [weight for weight in self.model.parameters() if weight.is_cuda or not self.devices]
            weights = sum(weight.numel() * weight.dtype.itemsize for weight in there)
            spread = {device for device in self.devices if isinstance(device, int)} or {self.device}
            total = sum(torch.cuda.get_device_properties(device).total_memory for device in spread)
            memory = total * 4 // 5 - weights
        else:  # a CPU gains little from more rows than fit into 4 GiB
            memory = min(2**32, physical_memory() // 4 // ranks.count_here())
        # Logits three times: as they come, in float32, and as logarithms of probabilities.
        logits = 3 * 4 * self.config.vocab_size * positions_read
        return max(1, memory // (self.column_bytes * columns + logits))

    def rows_for_backward(self, tokens):
        """How many rows of so many tokens to read forward and back at once. Activations, mostly the linear layers'
        outputs and half as much again, live from the one to the other."""
        cuda = self.device.type == "cuda"
        # Bytes. A CPU is as fast with a few hundred tokens as with thousands.
        memory = torch.cuda.get_device_properties(self.device).total_memory // 8 if cuda else 192 * 2**20
        linear = [layer for layer in self.model.modules() if isinstance(layer, torch.nn.Linear)]
        outputs = sum(layer.out_features for layer in linear)
        return max(1, memory // int(1.5 * self.model.dtype.itemsize * outputs * tokens))


def physical_memory():
    """Bytes, rounded to GiB since the kernel keeps some for itself; 16 GiB where the system does not tell."""
    if not hasattr(os, "sysconf"):
        return 2**34
    return max(1, round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30)) * 2**30


def states_at(states, places):
    """states[places], which of a model that is spread over devices may be on another one than the places."""
    return states[tuple(place if isinstance(place, slice) else place.to(states.device) for place in places)]


def next_tokens(logits, rows, sampler):
    """The next token [b, 1] of each of the rows [b], from logits [b, V]."""
    return sampler.draw(logits, rows.tolist()) if sampler else logits.argmax(-1, keepdim=True)


def of_like_length(sequences, tokens):
    """Lists of the sequences' numbers, the longest first: as many in a list as have so many tokens with their padding,
    or one."""
    order = sorted(range(len(sequences)), key=lambda n: -len(sequences[n]))
    while order:
        count = max(1, tokens // max(1, len(sequences[order[0]])))
        yield order[:count]
        order = order[count:]


def pad(sequences, device, left=False):
    """(ids [B, S], mask [B, S]) of lists of ids, padded on one side. Padding is id 0, masked everywhere."""
    longest = max(map(len, sequences))
    ids = torch.zeros(len(sequences), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for n, sequence in enumerate(sequences):
        place = slice(longest - len(sequence), None) if left else slice(len(sequence))
        ids[n, place] = torch.tensor(sequence, dtype=torch.long)
        mask[n, place] = 1
    return ids.to(device), mask.to(device)


# --- Loading ---------------------------------------------------------------------------------------


def load_engine(name, device="auto", dtype="auto", device_map=""):
    """The `Engine` of a hub name or a local folder.

    Only safetensors are read and no code from the model's folder is run. dtype "auto": see `dtype_on`. device_map:
    "auto" spreads a model over all devices, and what does not fit there over memory and disk; or {module: device}; "":
    all of it is on `device`. Errors: UserError when the model is not there, gated, has no chat template, or lacks
    weights or has others than its configuration says, and those of `Engine`.
    """
    if device_map:
        require_spreading(device)
    device = require_device(device)
    dtype = dtype_on(device, dtype)
    tokenizer = load_tokenizer(name)
    # Weights of another shape are not ignored: they are named, like those that are missing.
    options = {"use_safetensors": True, "output_loading_info": True, "ignore_mismatched_sizes": True}
    options |= {"device_map": device_map} if device_map else {}
    model, loading = pretrained(AutoModelForCausalLM, name, dtype=getattr(torch, dtype), **options)
    require_all_weights(name, loading)
    engine = Engine(model if device_map else model.to(device), tokenizer)
    engine.identity = identity_of(name)
    return engine


def require_device(device):
    """The device, "auto" as the one it stands for; of several ranks on a machine each takes a GPU of its own. Errors:
    UserError if there is none of the name here."""
    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    if ranks.count_here() > 1 and device.startswith("cuda"):
        require(device == "cuda", f"--device {device}: all ranks would be on it; --device cuda gives each its own")
        device = f"cuda:{ranks.place_here()}"
    if device == "mps":  # torch's own line says no more than that something is not supported
        there = torch.backends.mps.is_available()
        require(there, "--device mps cannot be used here: it needs a Mac with Apple silicon and macOS 14 or later")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {device} cannot be used here: {str(error).splitlines()[0]}") from None
    return device


def dtype_on(device, dtype):
    """The name of the dtype on a device of `require_device`; "auto": bfloat16 on CUDA, float32 elsewhere."""
    automatic = "bfloat16" if device.startswith("cuda") else "float32"
    return automatic if dtype == "auto" else dtype


def require_spreading(device):
    """Errors: UserError if a model cannot be spread over devices here."""
    lacks = "--device-map needs the package accelerate: pip install accelerate"
    require(importlib.util.find_spec("accelerate"), lacks)
    require(device == "auto", f"--device-map says where the model lies, --device {device} too: give one of them")
    require(ranks.count() == 1, "--device-map: one process has all devices; call it with python, not torchrun")


def input_device(model):
    """The torch.device on which a model takes its inputs: of one that accelerate has spread, where its hook of the
    token embeddings puts them, since the weights may lie elsewhere until they are needed."""
    hook = getattr(model.get_input_embeddings(), "_hf_hook", None)
    device = getattr(hook, "execution_device", None)
    return model.device if device is None else torch.device(device)


def load_tokenizer(name):
    """The tokenizer of a hub name or a local folder. Errors: UserError, whatever goes wrong, or without a template."""
    tokenizer = pretrained(AutoTokenizer, name)
    require(tokenizer.chat_template, f"--model {name} has no chat template: choose an instruction-tuned model")
    return tokenizer


def pretrained(kind, name, **options):
    """`kind.from_pretrained`, of a hub name at the commit it stands for. Errors: UserError, whatever goes wrong."""
    if not is_folder(name):
        options["revision"] = commit_of(name)
    try:
        return kind.from_pretrained(name, **options)
    except (torch.OutOfMemoryError, MemoryError):
        raise UserError(f"--model {name} does not fit into memory: choose a smaller one") from None
    except Exception as error:  # a folder's files can be wrong in as many ways as there are libraries that read them
        raise cannot_load(name, error) from error


def require_all_weights(name, loading):
    """Errors: UserError if some weights were not in the files, or not in the model: it would go on with random ones."""
    for kind in ("missing", "mismatched", "unexpected"):
        found = sorted(str(key[0] if isinstance(key, tuple) else key) for key in loading[f"{kind}_keys"])
        more = f" and {len(found) - 3} more" if len(found) > 3 else ""
        wrong = f"--model {name}: {kind} weights, {', '.join(found[:3])}{more}: its files are not of one model"
        require(not found, wrong)


def end_tokens(model, tokenizer):
    """Ids that end a generation: the model's and the tokenizer's. Errors: UserError if there are none."""
    named = model.generation_config.eos_token_id
    named = named if isinstance(named, list) else [named]
    ends = sorted({*named, tokenizer.eos_token_id} - {None})
    require(ends, "the model names no end-of-sequence token, so its reasoning would never stop")
    return ends

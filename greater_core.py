"""GReaTer: a small language model improves its own prompt with gradients over its own reasoning.

Das et al., ICLR 2025 (arXiv 2412.09722). The prompt follows the question; its tokens are searched one position
at a time. At position i, with N training rows:

1. Propose (Eq. 3-4): the top-k allowed next tokens after `question + prompt[:i]`, intersected over sampled rows.
2. Reason (Sec. 3.2): the model's greedy reasoning for every row under the current prompt, kept from the selection that
   chose this prompt; behind it an extractor ("Therefore, the final answer ... is $"), behind that the logits of
   the gold answer (Eq. 5-6).
3. Gradient (Eq. 7): of the answer loss plus lambda times the prompt's negative log-likelihood, with respect to
   the one-hot choice of token i. The mu proposals with the most negative gradient are the shortlist.
4. Select (Alg. 1): for each of them and the incumbent, reason anew and compute the loss for real; the lowest wins.

Then i moves on. Behind the last position the prompt grows by a token, until a sentence end closes it and
the walk starts again at its first token. At the end the best prompts of the run compete on dev rows.

The weights are frozen. What many continuations share is read once (frozen_model.py says how): the questions once per
run, each prompt token once per walk. The answer is scored on the keys and values that generation leaves behind.

Shape letters, everywhere: B rows, T tokens of a padded sequence, P prompt tokens, A answer tokens, V vocabulary,
H hidden size, K candidates, Q sampled rows, L positions whose logits are read, C columns of keys and values.

Everything is done on token ids. A prompt is never decoded and encoded again inside the loop, so a position keeps
its meaning; a candidate is admitted only if the prompt's text, encoded afresh in its place, gives the same ids.

Deliberate deviations (the README has them as a table, `--preset released` undoes what is a setting):

- The incumbent token competes in every selection, so the training objective never rises, except when the prompt must
  grow. In the released code it competes only if it is shortlisted.
- Selection minimizes the loss the gradient is taken of, as in the paper. Released: error rate + 0.02 nll.
- Every term of the fluency loss counts the candidate itself. Released: its own probability is left out.
- A sentence end is one candidate among others. Released: in the prompt's second half it is taken at once.
- k grows by 2 until `min_candidates` are left, as released; the paper does not say what happens when few are.
- Candidates read as words or sentence punctuation. Released: nearly so; added special tokens slip through.
- The final prompt is chosen on dev rows among prompts that end a sentence. Released: the ten best on training rows.
"""

import math
import random
import time
from collections import Counter
from dataclasses import dataclass, replace

import torch
from torch.nn import functional as F
from transformers.cache_utils import DynamicLayer

from support.engine import (
    Growing,
    Picked,
    SharedQuestions,
    Work,
    empty,
    in_batches,
    pad,
    read,
    rows_for_backward,
    rows_for_generation,
)
from support.files import UserError, require

SENTENCE_ENDS = (".", "!", "?")
PUNCTUATION = (*SENTENCE_ENDS, ",", ";", ":")


# --- A row's token ids, in parts (Eq. 1-2) ----------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One training row as token ids. Scored is: before + prompt + between + reasoning + extractor + answer."""

    before: list[int]  # chat header, question, the fixed opening word
    between: list[int]  # end of the user turn, header of the assistant turn
    extractor: list[int]
    answer: list[int]


def encode(tokenizer, text):
    return tokenizer.encode(text, add_special_tokens=False)


def continuation(tokenizer, start, more):
    """Ids of `more` as they are behind `start`. Errors: UserError if the tokenizer merges across the boundary."""
    first, whole = encode(tokenizer, start), encode(tokenizer, start + more)
    if whole[: len(first)] != first:
        tails = [tokenizer.convert_ids_to_tokens(ids[max(0, len(first) - 3) :])[:6] for ids in (first, whole)]
        raise UserError(
            f"the tokenizer merges {start[-12:]!r} with what follows it: tokens {tails[0]} become {tails[1]}. "
            "End the text before the boundary differently, for instance without its last space"
        )
    return whole[len(first) :]


def encode_in_place(tokenizer, task, question, prompt):
    """(before, prompt, between): ids of a question with the prompt's text `prompt` in its place.

    The place is given by the tokenizer's own chat template. Errors: UserError if the template rewrites the text,
    if the tokenizer merges tokens across a boundary, or if the prompt has no tokens.
    """
    prompt = prompt.strip()
    if not prompt:
        raise UserError("the prompt has no tokens: give --initial-prompt at least one word")
    content = task.template.removesuffix("{prompt}").replace("{question}", question) + prompt
    turn = [{"role": "user", "content": content}]
    chat = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    end = chat.rfind(content) + len(content)
    if end < len(content):
        raise UserError(f"the chat template changes the user's text, so the prompt has no place in it: {chat!r}")
    start = end - len(prompt) - 1  # the space before the prompt belongs to it: " proper" is one token
    ids = continuation(tokenizer, chat[:start], chat[start:end])
    if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids:
        raise UserError(f"the model's tokenizer does not know all of the prompt {prompt!r}: give another")
    return encode(tokenizer, chat[:start]), ids, continuation(tokenizer, chat[:end], chat[end:])


def answer_ids(tokenizer, task, answer):
    """(extractor ids, answer ids), each as it is behind the text before it."""
    # Reasoning ends in some token that we do not know yet; the full stop stands for it.
    extractor = continuation(tokenizer, ".", " " + task.extractor)
    ids = continuation(tokenizer, ". " + task.extractor, task.answer_prefix + answer)
    if not ids:
        raise UserError(
            f"the answer {answer!r} adds no token behind the extractor {task.extractor!r}: end it otherwise"
        )
    return extractor, ids


def splice(tokenizer, task, row):
    """The `Row` of a data row {"question", "answer"}. Errors: UserError at a merged boundary, naming the row."""
    try:
        before, _, between = encode_in_place(tokenizer, task, row["question"], task.initial_prompt)
        extractor, answer = answer_ids(tokenizer, task, row["answer"])
    except UserError as error:
        raise UserError(f"row {row['id']}: {error}") from None
    return Row(before, between, extractor, answer)


def prompt_text(tokenizer, row, prompt_ids):
    """The prompt's text, as it stands behind `row.before`, with its leading space."""
    decoded = tokenizer.decode(row.before + list(prompt_ids), clean_up_tokenization_spaces=False)
    return decoded[len(tokenizer.decode(row.before, clean_up_tokenization_spaces=False)) :]


def survives_encoding(tokenizer, row, prompt_ids):
    """Whether the prompt's text, encoded afresh in its place, gives the same ids."""
    before = tokenizer.decode(row.before, clean_up_tokenization_spaces=False)
    text = prompt_text(tokenizer, row, prompt_ids)
    after = tokenizer.decode(row.between, clean_up_tokenization_spaces=False)
    if not text.startswith(" ") or text != " " + text.strip():
        return False
    return encode(tokenizer, before + text + after) == row.before + list(prompt_ids) + row.between


# --- Question and prompt, read once ----------------------------------------------------------------------


@dataclass
class Prefix:
    """Question and prompt[:i] of every row, read once; proposals, gradient and selection at position i start here.

    past: per layer the pieces of a `Picked` layer, the question's keys and values, padded on the left, and the
    prompt's; mask [B, C]; starts: columns of padding of each row; log_probs [B, V]: of the token at position i;
    nll [B, i]: of the prompt's tokens before it; index: the rows of `past` that these are.
    """

    tokens: tuple[int, ...]
    past: list
    mask: torch.Tensor
    starts: list[int]
    log_probs: torch.Tensor
    nll: torch.Tensor
    index: torch.Tensor

    def take(self, indices):
        """The same for some rows, without columns that are padding in all of them. Keys and values are not copied."""
        first = min(self.starts[i] for i in indices)
        index = torch.tensor(indices, device=self.mask.device)
        past = [[tuple(states[:, :, first:] for states in question), *rest] for question, *rest in self.past]
        starts = [self.starts[i] - first for i in indices]
        rows = self.mask[index, first:], starts, self.log_probs[index], self.nll[index], self.index[index]
        return Prefix(self.tokens, past, *rows)

    def shared(self):
        """(the questions as `SharedQuestions`, `Growing` layers that begin with the prompt)"""
        shared = SharedQuestions([question for question, *_ in self.past], self.index.tolist())
        return shared, [Growing(prompt, lambda states: states.index_select(0, self.index)) for _, *prompt in self.past]

    def layers(self):
        return [Picked(pieces, lambda states: states.index_select(0, self.index)) for pieces in self.past]


@torch.no_grad()
def read_questions(model, rows, batch_size, work):
    """The `Prefix` of position 0."""
    ids, mask = pad([row.before for row in rows], model.device, left=True)
    last = torch.tensor([[ids.shape[1] - 1]], device=model.device)

    def run(batch):
        part, layers = slice(batch[0], batch[-1] + 1), empty(DynamicLayer, model)
        logits = read(model, layers, mask[part], ids[part], last.expand(len(batch), 1))
        return logits[:, 0].log_softmax(-1), [(layer.keys, layer.values) for layer in layers]

    size = batch_size or rows_for_generation(model, ids.shape[1])
    parts = in_batches(run, range(len(rows)), "reading questions", size, work)
    # Of a single batch nothing is copied.
    past = [
        list(layers) if len(layers) == 1 else [tuple(map(torch.cat, zip(*layers)))]
        for layers in zip(*(past for _, past in parts))
    ]
    log_probs = torch.cat([part for part, _ in parts])
    work.counts["forward_tokens"] += sum(len(row.before) for row in rows)
    starts = [ids.shape[1] - len(row.before) for row in rows]
    nll, index = log_probs.new_zeros(len(rows), 0), torch.arange(len(rows), device=model.device)
    return Prefix((), past, mask, starts, log_probs, nll, index)


@torch.no_grad()
def extend(model, prefix, token, work):
    """The `Prefix` one position further, with `token` chosen."""
    count = len(prefix.starts)
    mask = torch.cat([prefix.mask, prefix.mask.new_ones(count, 1)], 1)
    ids = mask.new_full((count, 1), token)
    layers = prefix.layers()
    logits = read(model, layers, mask, ids, torch.zeros_like(ids))
    work.counts["forward_tokens"] += count
    past = []
    for (question, *prompt), layer in zip(prefix.past, layers):  # the question's are shared, the prompt's are few
        prompt.append((layer.keys, layer.values))
        past.append([question, tuple(torch.cat(states, 2) for states in zip(*prompt))])
    nll = torch.cat([prefix.nll, -prefix.log_probs[:, token, None]], 1)
    log_probs = logits[:, 0].log_softmax(-1)
    return Prefix((*prefix.tokens, token), past, mask, prefix.starts, log_probs, nll, prefix.index)


def prefix_at(model, questions, tokens, work, known=None):
    """The `Prefix` behind `tokens`, one position at a time from `questions`, or from `known` if it leads there."""
    prefix = known if known is not None and known.tokens == tokens[: len(known.tokens)] else questions
    for token in tokens[len(prefix.tokens) :]:
        prefix = extend(model, prefix, token, work)
    return prefix


# --- Reasoning (Sec. 3.2) -------------------------------------------------------------------------------

# Decoding steps between looks at which rows have ended: a look waits for the device.
CHECK_EVERY = {"cpu": 1, "cuda": 8}
FINISH_AT_ONCE = 8  # rows that leave the batch together, so that the copy of what was read of them stays small


@torch.inference_mode()
def decode(model, layers, mask, token, limits, finish, shared=None):
    """Greedy decoding of a batch behind `Growing` layers, whose first new token [B] is known, each row to an
    end token or its limit [B].

    Rows leave the batch soon after they end: finish(places, reasoning, stopped, unread, layers, mask, shared) is
    called with their places in the batch, their new ids without the end token, whether there was one, the ids at the
    end of these that have no keys and values yet, and what was read of the rows, aligned to the right, behind their
    shared questions, if there are some.
    """
    ends = torch.tensor(model.generation_config.eos_token_id, device=model.device)
    places, new = torch.arange(len(token), device=model.device), token[:, None]
    column, check_every = torch.zeros_like(new), CHECK_EVERY.get(model.device.type, 8)
    longest = int(limits.max())
    while True:
        length = new.shape[1]
        if length % check_every == 0 or length >= longest:
            ended = torch.isin(new, ends)
            first = torch.where(ended.any(1), ended.int().argmax(1), length)  # the first end token
            over = (first < length) | (limits <= length)
            if over.float().mean() >= 0.125 or length >= longest:  # fewer are not worth the copying
                for some in over.nonzero()[:, 0].split(FINISH_AT_ONCE):
                    counts = torch.minimum(first, limits)[some]
                    valid = counts.clamp(max=length - 1)  # the last token has not been read
                    part = shared and shared.keep(some.tolist(), copy=False)
                    aligned = align_right(layers, mask, some, length - 1 - valid, shared.columns if shared else 0)
                    texts = [ids[:n] for ids, n in zip(new[some].tolist(), counts.tolist())]
                    unread = [ids[n:] for ids, n in zip(texts, valid.tolist())]
                    finish(places[some].tolist(), texts, (first < limits)[some].tolist(), unread, *aligned, part)
                if over.all():
                    return
                rest = (~over).nonzero()[:, 0]
                for layer in layers:
                    layer.keep(rest)
                shared = shared and shared.keep(rest.tolist())
                places, new, mask, column, limits = (t[rest] for t in (places, new, mask, column, limits))
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        logits = read(model, layers, mask, new[:, -1:], column, shared)
        new = torch.cat([new, logits[:, 0].argmax(-1, keepdim=True)], 1)


def align_right(layers, mask, rows, shift, front=0):
    """(`Picked` layers, mask) of some rows [b], each moved `shift` [b] columns to the right, so that it loses its
    last columns. The mask's first `front` columns, those of shared questions, stay where they are."""
    before, mask = mask[rows, :front], mask[:, front:]
    source = torch.arange(mask.shape[1], device=mask.device) - shift[:, None]
    inside, source = source >= 0, source.clamp(min=0)

    def pick(states):  # [B, heads, C, head size]
        return states.transpose(1, 2)[rows[:, None], source].transpose(1, 2)

    picked = [Picked([(layer.keys, layer.values)], pick) for layer in layers]
    return picked, torch.cat([before, mask[rows].gather(1, source) * inside], 1)


def generate_greedily(model, contexts, max_new_tokens, batch_size, work=None):
    """For each context (a list of ids): (new ids without the end token, whether it stopped by itself).

    Longest contexts first, so that rows of one batch need little padding and memory runs out early.
    """
    work = work or Work()
    order = sorted(range(len(contexts)), key=lambda i: (-len(contexts[i]), i))
    done = {}

    @torch.inference_mode()
    def run(batch):
        ids, mask = pad([contexts[i] for i in batch], model.device, left=True)
        last = mask.new_full((len(batch), 1), ids.shape[1] - 1)
        layers = empty(Growing, model)
        logits = read(model, layers, mask, ids, last)

        def finish(places, texts, stopped, unread, layers, mask, shared):
            done.update({batch[n]: result for n, *result in zip(places, texts, stopped)})

        limits = mask.new_full((len(batch),), max_new_tokens)
        decode(model, layers, mask, logits[:, 0].argmax(-1), limits, finish)

    fitting = rows_for_generation(model, max(map(len, contexts)) + max_new_tokens)
    size = batch_size or fitting
    in_batches(run, order, "generation", size, work)
    work.counts["generated_tokens"] += sum(len(ids) + stopped for ids, stopped in done.values())
    work.counts["forward_tokens"] += sum(map(len, contexts))
    return [tuple(done[i]) for i in range(len(contexts))]


# --- The loss (Eq. 5-6), once for gradient and selection --------------------------------------------------


def sequence_losses(model, rows, prefix, prompt_ids, reasoning, temperature, choice=None):
    """(cross-entropy [B], wrong [B], nll [B]) of one batch behind its `Prefix`; differentiable in `choice`.

    cross-entropy: of the gold answer's tokens from logits / temperature, mean over the tokens.
    wrong: whether some answer token is not the argmax (bool). nll: of the prompt's tokens, mean, natural logarithm.
    choice: (candidates [K], one_hot [B, K]) puts the mixture one_hot @ embedding[candidates] at the prefix's position.
    """
    rest = list(prompt_ids[len(prefix.tokens) :])
    tails = [rest + row.between + list(r) + row.extractor + row.answer for row, r in zip(rows, reasoning)]
    tokens, mask = pad(tails, model.device)
    if choice is not None:
        candidates, one_hot = choice
        embed = model.get_input_embeddings()
        tokens = embed(tokens)
        mixture = one_hot @ embed(candidates).to(one_hot.dtype)  # [B, K] @ [K, H]
        tokens = torch.cat([mixture.to(tokens.dtype)[:, None], tokens[:, 1:]], 1)
    size = max(len(row.answer) for row in rows)  # A
    # Column c predicts token c + 1: the prompt's tokens but the first, which the prefix predicts, then the answer.
    columns = [[*range(len(rest) - 1), *answer_columns(t, len(row.answer), size)] for t, row in zip(tails, rows)]
    mask = torch.cat([prefix.mask, mask], 1)
    logits = read(model, prefix.layers(), mask, tokens, torch.tensor(columns, device=model.device))
    rests = torch.tensor([rest], device=model.device).expand(len(rows), -1)
    nll = prompt_nll(prefix, rests, logits[:, : len(rest) - 1], choice)
    return *answer_cross_entropy(logits[:, len(rest) - 1 :], rows, temperature), nll


def answer_columns(tail, answer_length, size):
    """The columns of `tail`, which ends in the answer, that predict its tokens; shorter answers repeat the last."""
    first = len(tail) - answer_length
    return [first - 1 + min(n, answer_length - 1) for n in range(size)]


def answer_cross_entropy(logits, rows, temperature):
    """(mean cross-entropy [B], wrong [B]) of the rows' answers from logits [B, A, V]; shorter answers are masked."""
    size = logits.shape[1]
    answers = [row.answer + row.answer[-1:] * (size - len(row.answer)) for row in rows]
    answers = torch.tensor(answers, device=logits.device)  # [B, A]
    lengths = torch.tensor([len(row.answer) for row in rows], device=logits.device)
    real = torch.arange(size, device=logits.device) < lengths[:, None]
    each = F.cross_entropy(logits.transpose(1, 2) / temperature, answers, reduction="none")  # [B, A]
    wrong = ((logits.argmax(-1) != answers) & real).any(1)
    return (each * real).sum(1) / lengths, wrong


def prompt_nll(prefix, rests, logits, choice=None):
    """Mean negative log-likelihood [B] of prompts: what the prefix has, its position's token, and the others from
    logits [B, P - i - 1, V]. rests [B, P - i]: the prompts' ids from the prefix's position i on. The token
    of `choice` is the one-hot mixture, so that a candidate's own probability counts."""
    if choice is None:
        first = prefix.log_probs.gather(1, rests[:, :1])[:, 0]
    else:
        candidates, one_hot = choice
        first = (one_hot * prefix.log_probs[:, candidates]).sum(1)
    others = logits.log_softmax(-1).gather(2, rests[:, 1:, None])[..., 0]
    return (prefix.nll.sum(1) - first - others.sum(1)) / (len(prefix.tokens) + rests.shape[1])


def training_loss(cross_entropy, nll, settings):
    """What the gradient is taken of, per row [B]: cross-entropy + lambda * fluency (Eq. 7)."""
    return cross_entropy + settings.fluency_weight * fluency(nll, settings)


def fluency(nll, settings):
    """The fluency term [B]: the prompt's mean nll, or its exponential, the perplexity."""
    return nll.exp() if settings.fluency == "perplexity" else nll


@torch.no_grad()
def answer_loss(model, rows, prompt_ids, reasoning, settings):
    """(cross-entropy [B], wrong [B], nll [B]) of rows under a prompt and given reasoning (Eq. 5-6).

    The search scores what it generates with `reason_and_score`; this is for reasoning from elsewhere.
    """
    work = Work()
    questions = read_questions(model, rows, settings.batch_size, work)

    def run(batch):
        part = [rows[i] for i in batch], questions.take(batch), prompt_ids, [reasoning[i] for i in batch]
        return sequence_losses(model, *part, settings.loss_temperature)

    columns = questions.mask.shape[1] + max(map(len, reasoning))
    size = settings.batch_size or rows_for_generation(model, columns)
    parts = in_batches(run, range(len(rows)), "loss", size, work)
    return tuple(torch.cat(values) for values in zip(*parts))


# --- Proposals (Eq. 3-4) ---------------------------------------------------------------------------------


def allowed_tokens(tokenizer, vocabulary_size):
    """Which tokens may enter a prompt, bool [V]: those that read as a word, a piece of one, or punctuation."""
    added = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    ids = [[i] for i in range(min(len(tokenizer), vocabulary_size))]
    allowed = torch.zeros(vocabulary_size, dtype=torch.bool)
    for i, text in enumerate(tokenizer.batch_decode(ids, clean_up_tokenization_spaces=False)):
        word = text.removeprefix(" ")
        allowed[i] = i not in added and (text in PUNCTUATION or (word.isascii() and word.isalpha()))
    return allowed


def top_k_intersection(log_probs, k):
    """Tokens that are among the k most likely of every row of log_probs [Q, V]: a set of ids (Eq. 4)."""
    top = log_probs.topk(min(k, log_probs.shape[1])).indices.tolist()
    return set(top[0]).intersection(*map(set, top[1:]))


def propose_candidates(log_probs, allowed, samples, k, min_candidates, admit):
    """(candidate ids, k): proposals for a position, the most likely first.

    log_probs [B, V]: of the next token, per row. samples: lists of row numbers; the proposals are the union over
    the lists of each list's intersected top-k. admit(id): whether a token may stand there. k grows by 2 until
    `min_candidates` are found. Errors: UserError when even the whole vocabulary does not hold as many.
    """
    masked = log_probs.masked_fill(~allowed.to(log_probs.device), float("-inf"))
    mean, room, verdicts = masked.mean(0), int(allowed.sum()), {}
    while True:
        found = set().union(*(top_k_intersection(masked[rows], min(k, room)) for rows in samples))
        for token in found - verdicts.keys():
            verdicts[token] = admit(token)
        found = sorted((t for t in found if verdicts[t]), key=lambda t: (-mean[t].item(), t))
        if found and len(found) >= min_candidates:
            return found, k
        if k >= room:
            raise UserError(
                f"only {len(found)} candidate tokens are possible here: lower --min-candidates (now {min_candidates})"
            )
        k += 2


# --- The gradient over candidates (Eq. 7) -------------------------------------------------------------------


def candidate_gradients(model, rows, prefix, prompt_ids, candidates, reasoning, settings, work):
    """(gradients [B, K], losses [B]): per row, of the `training_loss` with respect to the one-hot choice among
    `candidates` at the prefix's position, taken at the current token, which must be one of them.

    Earlier tokens do not depend on the choice, so the pass begins at that position; reasoning is held fixed. A more
    negative entry promises a lower loss.
    """
    candidates = torch.tensor(candidates, device=model.device)
    here = F.one_hot((candidates == prompt_ids[len(prefix.tokens)]).nonzero()[0, 0], len(candidates))

    def run(batch):
        # In float32 or better, lest half precision rounds the gradients of different tokens to the same.
        one_hot = here.to(torch.promote_types(model.dtype, torch.float32)).repeat(len(batch), 1).requires_grad_()
        part = [rows[i] for i in batch], prefix.take(batch), prompt_ids, [reasoning[i] for i in batch]
        cross_entropy, _, nll = sequence_losses(model, *part, settings.loss_temperature, (candidates, one_hot))
        losses = training_loss(cross_entropy, nll, settings)
        # The rows do not touch each other, so the gradient of the sum holds each row's own gradient.
        (gradient,) = torch.autograd.grad(losses.sum(), one_hot)
        return batch, gradient, losses.detach()

    # Rows of like length share a batch, so that little of it is padding.
    order = sorted(range(len(rows)), key=lambda i: (-len(reasoning[i]), i))
    rest = len(prompt_ids) - len(prefix.tokens)
    lengths = [rest + len(r.between + r.extractor + r.answer) + len(text) for r, text in zip(rows, reasoning)]
    size = settings.gradient_batch_size or rows_for_backward(model, max(lengths))
    parts = in_batches(run, order, "gradient", size, work)
    work.counts.update(forward_tokens=sum(lengths), backward_tokens=sum(lengths))
    back = torch.tensor(order, device=model.device).argsort()
    return tuple(torch.cat(values)[back] for values in list(zip(*parts))[1:])


# --- Selection and the walk (Alg. 1) ----------------------------------------------------------------------


@dataclass
class Score:
    """What a prompt is worth on the training rows. `reasoning` is dropped once the prompt is not the current one."""

    prompt_ids: tuple[int, ...]
    cross_entropy: float
    error: float
    nll: float
    objective: float
    tokens: int
    reasoning: list | None = None


def objective_value(cross_entropy, wrong, nll, settings):
    """What selection minimizes, over rows [B]: the mean loss, or the released rule, error + lambda / 10 * fluency."""
    if settings.objective == "error":
        return (wrong + settings.fluency_weight / 10 * fluency(nll, settings)).mean().item()
    return training_loss(cross_entropy, nll, settings).mean().item()


def reason_and_score(model, rows, prefix, prompts, settings, work, limits=None):
    """{(n, i): (reasoning ids, cross-entropy, wrong, nll)} for prompt n and row i: all prompts times rows as one job.
    limits: {(n, i): most new tokens}, where not settings.max_new_tokens for all.

    The prompts share the prefix's tokens and their length. The answer is scored on the keys and values
    that generation left behind, so the reasoning is not read a second time.
    """
    rests = [list(prompt[len(prefix.tokens) :]) for prompt in prompts]
    sizes = [len(row.before) for row in rows]
    # Long rows first, and the rows of a question side by side.
    jobs = sorted(((n, i) for i in range(len(rows)) for n in range(len(prompts))), key=lambda job: -sizes[job[1]])
    done = {}

    @torch.inference_mode()
    def run(batch):
        part = prefix.take([i for _, i in batch])
        shared, layers = part.shared()
        tails = [rests[n] + rows[i].between for n, i in batch]
        tokens = torch.tensor(tails, device=model.device)
        mask = torch.cat([part.mask, torch.ones_like(tokens)], 1)
        # Columns that predict the prompt's tokens, and the last one, which predicts the first token of the reasoning.
        read_at = [*range(len(rests[0]) - 1), len(tails[0]) - 1]
        columns = torch.tensor(read_at, device=model.device).expand(len(batch), -1)
        logits = read(model, layers, mask, tokens, columns, shared)
        nll = prompt_nll(part, tokens[:, : len(rests[0])], logits[:, :-1])

        def finish(places, texts, stopped, unread, layers, mask, shared):
            ended = [rows[batch[place][1]] for place in places]
            tails = [rest + row.extractor + row.answer for row, rest in zip(ended, unread)]
            tokens, more = pad(tails, model.device)
            size = max(len(row.answer) for row in ended)
            columns = [answer_columns(tail, len(row.answer), size) for tail, row in zip(tails, ended)]
            columns = torch.tensor(columns, device=model.device)
            logits = read(model, layers, torch.cat([mask, more], 1), tokens, columns, shared)
            losses = answer_cross_entropy(logits, ended, settings.loss_temperature)
            work.counts["forward_tokens"] += sum(map(len, tails))
            work.counts["generated_tokens"] += sum(map(len, texts)) + sum(stopped)
            values = zip(places, texts, *(v.tolist() for v in losses), nll[places].tolist())
            done.update({batch[place]: rest for place, *rest in values})

        work.counts["forward_tokens"] += tokens.numel()
        most = [(limits or {}).get(job, settings.max_new_tokens) for job in batch]
        first = logits[:, -1].argmax(-1)
        del logits  # of the prompt, large where the vocabulary is
        decode(model, layers, mask, first, torch.tensor(most, device=model.device), finish, shared)

    columns = prefix.mask.shape[1] + max(len(rests[0]) + len(r.between + r.extractor + r.answer) for r in rows)
    fitting = rows_for_generation(model, columns + settings.max_new_tokens, len(rests[0]))
    size = settings.batch_size or fitting
    in_batches(run, jobs, "generation", size, work)
    return done


def score_prompts(model, rows, prefix, prompts, settings, work, limits=None):
    """A `Score` for each prompt (a tuple of ids that begins with the prefix's), with reasoning made anew."""
    done = reason_and_score(model, rows, prefix, prompts, settings, work, limits) if prompts else {}
    scores = []
    for n, prompt_ids in enumerate(prompts):
        reasoning, *losses = zip(*(done[n, i] for i in range(len(rows))))
        losses = [torch.tensor(values, dtype=torch.float64) for values in losses]
        objective = objective_value(*losses, settings)
        if not math.isfinite(objective):
            raise UserError(f"the loss is not finite under prompt ids {list(prompt_ids)}: try --dtype float32")
        means = [values.mean().item() for values in losses]
        scores.append(Score(tuple(prompt_ids), *means, objective, sum(map(len, reasoning)), list(reasoning)))
    return scores


def select_candidate(scores, ties="first"):
    """The score with the lowest objective; of equals the first, so list the incumbent first, or the last."""
    return min(scores if ties == "first" else scores[::-1], key=lambda score: score.objective)


def ends_sentence(tokenizer, prompt_ids):
    return tokenizer.decode(prompt_ids[-1:]).strip().endswith(SENTENCE_ENDS)


def next_position(tokenizer, prompt_ids, position, max_prompt_tokens):
    """The position after `position`. Behind the last one an open prompt grows (the position equals its length);
    a closed or full prompt is walked again from its start."""
    if position + 1 < len(prompt_ids):
        return position + 1
    return 0 if ends_sentence(tokenizer, prompt_ids) or len(prompt_ids) >= max_prompt_tokens else len(prompt_ids)


def mean_gradients(model, rows, prefix, prompt_ids, choices, reasoning, settings, work):
    """{token: mean gradient over the rows}; empty where the shortlist does not need one."""
    if settings.shortlist != "gradient":
        return {}
    if settings.gradient_without_reasoning:  # ablation (Fig. 3): question + prompt + extractor only
        reasoning = [[] for _ in rows]
    per_row, _ = candidate_gradients(model, rows, prefix, prompt_ids, choices, reasoning, settings, work)
    means = per_row.double().mean(0)
    require(means.isfinite().all(), f"the gradient is not finite at prompt ids {list(prompt_ids)}: try --dtype float32")
    return dict(zip(choices, means.tolist()))


def make_shortlist(candidates, gradients, settings, rng):
    """The candidates to try for real: those with the most negative gradient, or as the ablations say."""
    if settings.shortlist == "all":
        return list(candidates)
    if settings.shortlist == "random":
        return rng.sample(candidates, min(settings.shortlist_size, len(candidates)))
    return sorted(candidates, key=gradients.get)[: settings.shortlist_size]


def forced_end(tokenizer, shortlist, position, initial_length, settings):
    """The shortlisted full stop that the released code takes whatever its score, in the second half; else None."""
    if not settings.force_sentence_end or position < initial_length / 2:
        return None
    return next((token for token in shortlist if "." in tokenizer.decode([token])), None)


def search_step(model, tokenizer, rows, prefix, current, step, scored, allowed, settings, work):
    """Steps 1-4 of the method at one position: (the winning Score, what was found). Adds to `scored`."""
    position = len(prefix.tokens)
    before, suffix = prefix.tokens, current.prompt_ids[position + 1 :]
    grows = position == len(current.prompt_ids)
    incumbent = None if grows else current.prompt_ids[position]
    clock = [time.perf_counter()]

    # One generator per (seed, step, purpose): a resumed run draws what an uninterrupted one draws.
    rng = random.Random(f"{settings.seed}/{step}/proposal")
    sizes = range(len(rows)), min(settings.sampled_rows, len(rows))
    samples = [rng.sample(*sizes) for _ in range(settings.intersections)]

    def admit(token):
        return token != incumbent and survives_encoding(tokenizer, rows[0], (*before, token, *suffix))

    numbers = settings.top_k, settings.min_candidates
    candidates, k = propose_candidates(prefix.log_probs, allowed, samples, *numbers, admit)
    clock.append(time.perf_counter())

    # A growing prompt has no token here yet: the gradient is taken at the likeliest proposal.
    base = (*before, candidates[0] if grows else incumbent, *suffix)
    choices = candidates if grows else [*candidates, incumbent]
    gradients = mean_gradients(model, rows, prefix, base, choices, current.reasoning, settings, work)
    rng = random.Random(f"{settings.seed}/{step}/shortlist")
    shortlist = make_shortlist(candidates, gradients, settings, rng)
    forced = forced_end(tokenizer, shortlist, position, len(next(iter(scored))), settings)
    if forced is not None:
        shortlist = shortlist[: shortlist.index(forced) + 1]
    clock.append(time.perf_counter())

    tried = {token: (*before, token, *suffix) for token in shortlist}
    new = [prompt for prompt in tried.values() if prompt not in scored]  # nothing is scored twice
    scored |= {score.prompt_ids: score for score in score_prompts(model, rows, prefix, new, settings, work)}
    rivals = ([] if grows else [current]) + [scored[prompt] for prompt in tried.values()]
    winner = select_candidate(rivals, settings.ties) if forced is None else scored[tried[forced]]
    if winner.reasoning is None:  # scored in an earlier step, so its reasoning is no longer at hand
        (again,) = score_prompts(model, rows, prefix, [winner.prompt_ids], settings, work)
        winner = replace(winner, reasoning=again.reasoning)
    clock.append(time.perf_counter())

    found = {
        "k": k,
        "grows": grows,
        "candidates": [{"token": t, "text": tokenizer.decode([t]), "gradient": gradients.get(t)} for t in choices],
        "shortlist": [
            {"token": t, "text": tokenizer.decode([t]), "new": prompt in new, **as_record(scored[prompt])}
            for t, prompt in tried.items()
        ],
        "seconds": dict(zip(("propose", "gradient", "select"), (b - a for a, b in zip(clock, clock[1:])))),
    }
    return winner, found


def optimize(model, tokenizer, rows, prompt_ids, settings, history=()):
    """Search a prompt (Alg. 1): yields one record (a dict, JSON-ready) per position visited; record 0 is the start.

    rows: list of `Row`. prompt_ids: the initial prompt. settings: `settings.SearchSettings`. history: the records of
    an interrupted run, in order; the search goes on behind them to the same result.
    """
    allowed = allowed_tokens(tokenizer, model.get_input_embeddings().num_embeddings).to(model.device)
    work, started = Work(), time.perf_counter()
    if history:
        work = Work(Counter(history[-1]["totals"]), dict(history[-1].get("batch_sizes", {})))
    questions = read_questions(model, rows, settings.batch_size, work if not history else Work())
    if history:
        scored, current = scores_of(history), restore_current(model, rows, questions, settings, history)
        position = position_after(tokenizer, history[-1], settings)
        # The prefix that the interrupted run had; what it had counted is in the totals.
        prefix = prefix_at(model, questions, current.prompt_ids[: max(0, position - 1)], Work())
    else:
        (current,) = score_prompts(model, rows, questions, [tuple(prompt_ids)], settings, work)
        scored, position, prefix = {current.prompt_ids: current}, 0, questions
        found = {"seconds": {"select": time.perf_counter() - started}}
        yield make_record(tokenizer, rows[0], 0, None, current, scored, work) | found

    for step in range(max(1, len(history)), settings.steps + 1):
        prefix = prefix_at(model, questions, current.prompt_ids[:position], work, known=prefix)
        winner, found = search_step(model, tokenizer, rows, prefix, current, step, scored, allowed, settings, work)
        for score in scored.values():  # only the current prompt's reasoning is needed again
            score.reasoning = score.reasoning if score is winner else None
        scored[winner.prompt_ids] = current = winner
        record = make_record(tokenizer, rows[0], step, position, current, scored, work) | found
        yield record
        position = position_after(tokenizer, record, settings)


# --- Records of a run, and going on behind them ---------------------------------------------------------------


def as_record(score):
    """A Score as JSON, without its reasoning."""
    fields = {name: value for name, value in vars(score).items() if name != "reasoning"}
    return fields | {"prompt_ids": list(score.prompt_ids)}


def as_score(record):
    return Score(tuple(record["prompt_ids"]), *(record[f] for f in "cross_entropy error nll objective tokens".split()))


def make_record(tokenizer, row, step, position, current, scored, work):
    best = finalists(tokenizer, scored, 1)[0]
    return {
        "step": step,
        "position": position,
        **as_record(current),
        "prompt": prompt_text(tokenizer, row, current.prompt_ids).strip(),
        "best": {"objective": best.objective, "prompt": prompt_text(tokenizer, row, best.prompt_ids).strip()},
        "totals": dict(work.counts),
        "batch_sizes": dict(work.sizes),  # where memory ran out
    }


def position_after(tokenizer, record, settings):
    if record["position"] is None:
        return 0
    return next_position(tokenizer, tuple(record["prompt_ids"]), record["position"], settings.max_prompt_tokens)


def scores_of(history):
    """{prompt ids: Score} of every prompt in the records of a run, the initial one first."""
    scores = {}
    for record in history:
        for entry in (record, *(e for e in record.get("shortlist", ()) if e["new"])):
            scores.setdefault(tuple(entry["prompt_ids"]), as_score(entry))
    return scores


def restore_current(model, rows, questions, settings, history):
    """The current Score with its reasoning, generated once more in the very job that first gave it.

    The same batches give the same bits on the same machine, so a resumed run does not drift.
    Errors: UserError if the recorded objective does not come back.
    """
    last = history[-1]["prompt_ids"]
    # The record in which the current prompt became current: there it was generated, with the rest of the shortlist.
    won = max(n for n, record in enumerate(history) if n == 0 or history[n - 1]["prompt_ids"] != record["prompt_ids"])
    job = [tuple(e["prompt_ids"]) for e in history[won].get("shortlist", ()) if e["new"]]
    prefix = prefix_at(model, questions, tuple(last[: history[won]["position"] or 0]), Work())
    work = Work(sizes=dict(history[won - 1].get("batch_sizes", {}) if won else {}))
    scores = score_prompts(model, rows, prefix, job if tuple(last) in job else [tuple(last)], settings, work)
    current = next(score for score in scores if score.prompt_ids == tuple(last))
    if abs(current.objective - history[-1]["objective"]) > 1e-3 * max(1.0, abs(current.objective)):
        raise UserError(
            f"the recorded objective {history[-1]['objective']:.4f} comes out as {current.objective:.4f} here: "
            "another machine or library; start a new run with another --run-dir"
        )
    return current


def finalists(tokenizer, scored, count):
    """The `count` scores with the lowest training objective among prompts that end a sentence, and the initial one."""
    initial = next(iter(scored.values()))
    complete = [s for s in scored.values() if s is initial or ends_sentence(tokenizer, s.prompt_ids)]
    return sorted(complete, key=lambda score: score.objective)[:count]


def rank_prompts(prompts, choose_on):
    """The run's final prompts, best first: by dev accuracy, equals by training objective; or by the objective alone."""
    return sorted(prompts, key=lambda p: (-p["dev_accuracy"] if choose_on == "dev" else 0, p["objective"]))

"""GReaTer: a small language model improves its own prompt with gradients over its own reasoning.

Das et al., ICLR 2025 (arXiv 2412.09722). The prompt follows the question; its tokens are searched one position
at a time. At position i, with N training rows:

1. Propose (Eq. 3-4): the top-k next tokens after `question + prompt[:i]`, intersected over sampled rows.
2. Reason (Sec. 3.2): the model's greedy reasoning for every row under the current prompt; behind it an extractor
   ("Therefore, the final answer ... is $"), behind that the logits of the gold answer (Eq. 5-6).
3. Gradient (Eq. 7): of the answer loss plus lambda times the prompt's negative log-likelihood, with respect to
   the one-hot choice of token i. The mu proposals with the most negative gradient are the shortlist.
4. Select (Alg. 1): for each of them and the incumbent, reason anew and compute the loss for real; the lowest wins.

Then i moves on. Behind the last position the prompt grows by a token, until a sentence end closes it and
the walk starts again at its first token. At the end the best prompts of the run compete on dev rows.

Shape letters, everywhere: B rows, T tokens of a padded sequence, P prompt tokens, A answer tokens, V vocabulary,
K candidates, Q sampled rows, L positions whose logits are read.

Everything is done on token ids. A prompt is never decoded and encoded again inside the loop, so a position keeps
its meaning; a candidate is admitted only if the prompt's text, encoded afresh in its place, gives the same ids.

Deviations from the paper (P) and from the released code (R), each on purpose:

- R: the incumbent token competes in every selection, so the training objective never rises, except when the
  prompt must grow. R accepts whatever wins among the new tokens.
- R: selection minimizes the loss the gradient is taken of (P). R's rule is `objective="error"`.
- R: every term of the fluency loss counts the candidate itself. R leaves the candidate's own probability out.
- R: a sentence end is one candidate among others, never forced.
- P, R: k grows by 2 until `min_candidates` are left. R does so, P does not say what happens when few are.
- P, R: candidates read as words or sentence punctuation. R has nearly the same rule; special tokens slip through it.
- P, R: the final prompt is chosen on dev rows among prompts that end a sentence. R prints its ten best on train.
"""

import math
import random
import time
from collections import Counter
from dataclasses import dataclass

import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from tasks import UserError

SENTENCE_ENDS = (".", "!", "?")
PUNCTUATION = (*SENTENCE_ENDS, ",", ";", ":")


# --- The model ------------------------------------------------------------------------------------


def load_model(name, device="auto", dtype="auto"):
    """(model, tokenizer) from a hub name or a local folder; the model frozen, in eval mode, decoding greedily.

    Only safetensors are read and no code from the model's folder is run. `dtype` "auto" means bfloat16 on CUDA
    and float32 on the CPU. Errors: UserError when the model is not there, gated, or has no chat template.
    """
    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
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
    """The model without weight gradients or dropout, and with greedy decoding in place of its own sampling settings."""
    model.requires_grad_(False).eval()
    own = model.generation_config
    ends = own.eos_token_id if own.eos_token_id is not None else tokenizer.eos_token_id
    ends = sorted({*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id} - {None})
    if not ends:
        raise UserError("the model names no end-of-sequence token, so its reasoning would never stop")
    # Padding is masked everywhere, so any id serves; an end token is always in the vocabulary.
    model.generation_config = GenerationConfig(do_sample=False, eos_token_id=ends, pad_token_id=ends[0])
    return model


# --- 1. A row's token ids, in parts (Eq. 1-2) --------------------------------------------------------


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
    return encode(tokenizer, chat[:start]), ids, continuation(tokenizer, chat[:end], chat[end:])


def answer_ids(tokenizer, task, answer):
    """(extractor ids, answer ids), each as it is behind the text before it."""
    # Reasoning ends in some token that we do not know yet; the full stop stands for it.
    extractor = continuation(tokenizer, ".", " " + task.extractor)
    return extractor, continuation(tokenizer, ". " + task.extractor, task.answer_prefix + answer)


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


# --- Padding, and logits only where they are read -----------------------------------------------------


def pad(lefts, rights, fill, device):
    """(input_ids [B, T], attention_mask [B, T], position_ids [B, T], split): `lefts` end and `rights` start
    at column `split` in every row; padding is outside, so a row's tokens stay in one piece."""
    split, tail = max(map(len, lefts)), max(map(len, rights))
    ids = [[fill] * (split - len(a)) + a + b + [fill] * (tail - len(b)) for a, b in zip(lefts, rights)]
    keep = [[0] * (split - len(a)) + [1] * (len(a) + len(b)) + [0] * (tail - len(b)) for a, b in zip(lefts, rights)]
    mask = torch.tensor(keep, device=device)
    return torch.tensor(ids, device=device), mask, (mask.cumsum(1) - 1).clamp(min=0), split


def logits_at(model, columns, **inputs):
    """Logits [B, L, V], float32 or better, at `columns` [B, L] of each row, never for the whole sequence.

    The output embedding is applied to the chosen hidden states only; whatever the model does to its logits
    afterwards (Gemma-2 caps them) it does to these.
    """
    rows = torch.arange(len(columns), device=columns.device)[:, None]
    head = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda _, hidden: (hidden[0][rows, columns],))
    try:
        logits = model(**inputs, use_cache=False).logits
    finally:
        hook.remove()
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def in_batches(function, items, size):
    """[function(items[a:b]), ...] over batches of `size`; the size halves when CUDA memory runs out."""
    results, start = [], 0
    while start < len(items):
        try:
            results.append(function(items[start : start + size]))
            start += size
        except torch.OutOfMemoryError:
            if size == 1:
                raise UserError("out of memory with a single row: use a smaller model or fewer tokens") from None
            torch.cuda.empty_cache()
            size = (size + 1) // 2
    return results


# --- 2. Reasoning (Sec. 3.2) -----------------------------------------------------------------------------


@torch.no_grad()
def generate_greedily(model, contexts, max_new_tokens, batch_size, counts=None):
    """For each context (a list of ids): (new ids without the end token, whether it stopped by itself).

    Greedy. Longest contexts first, so that rows of one batch need little padding and memory runs out early.
    """
    order = sorted(range(len(contexts)), key=lambda i: (-len(contexts[i]), i))
    ends = set(model.generation_config.eos_token_id)

    def run(batch):
        ids, mask, _, split = pad([contexts[i] for i in batch], [[] for _ in batch], min(ends), model.device)
        new = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=max_new_tokens)[:, split:].tolist()
        stops = [next((n for n, token in enumerate(row) if token in ends), None) for row in new]
        return [(i, row[:stop], stop is not None) for i, row, stop in zip(batch, new, stops)]

    done = {i: (ids, stopped) for batch in in_batches(run, order, batch_size) for i, ids, stopped in batch}
    if counts is not None:
        counts["generated_tokens"] += sum(len(ids) + stopped for ids, stopped in done.values())
        counts["forward_tokens"] += sum(map(len, contexts))
    return [done[i] for i in range(len(contexts))]


def generate_reasoning(model, rows, prompts, max_new_tokens, batch_size, counts=None):
    """[[reasoning ids of each row] of each prompt]; all prompts times rows are generated as one job."""
    contexts = [row.before + list(prompt) + row.between for prompt in prompts for row in rows]
    new = [ids for ids, _ in generate_greedily(model, contexts, max_new_tokens, batch_size, counts)]
    return [new[n * len(rows) : (n + 1) * len(rows)] for n in range(len(prompts))]


# --- The loss (Eq. 5-6), once for gradient and selection --------------------------------------------------


def sequence_losses(model, rows, prompt_ids, reasoning, temperature, choice=None, counts=None):
    """(cross-entropy [B], wrong [B], nll [B]) of one batch; differentiable in `choice`.

    cross-entropy: of the gold answer's tokens from logits / temperature, mean over the tokens.
    wrong: whether some answer token is not the argmax (bool). nll: of the prompt's tokens, mean, natural logarithm.
    choice: (position, candidates [K], one_hot [B, K]) puts the mixture one_hot @ embedding[candidates] at a position.
    """
    device, fill = model.device, min(model.generation_config.eos_token_id)
    prompt_ids = list(prompt_ids)
    tails = [row.between + list(r) + row.extractor + row.answer for row, r in zip(rows, reasoning)]
    ids, mask, positions, split = pad([r.before for r in rows], [prompt_ids + t for t in tails], fill, device)

    size = max(len(row.answer) for row in rows)  # A; shorter answers repeat their last column, masked below
    first = [split + len(prompt_ids) + len(t) - len(row.answer) for t, row in zip(tails, rows)]
    # Column c predicts token c + 1, so prompt token j, in column split + j, is read at split + j - 1.
    columns = [
        [split + j - 1 for j in range(len(prompt_ids))] + [a - 1 + min(n, len(row.answer) - 1) for n in range(size)]
        for a, row in zip(first, rows)
    ]
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
    if choice is not None:
        position, candidates, one_hot = choice
        embed = model.get_input_embeddings()
        embeddings = embed(inputs.pop("input_ids"))  # [B, T, H]
        mixture = one_hot @ embed(candidates)  # [B, K] @ [K, H]
        column = split + position
        inputs["inputs_embeds"] = torch.cat([embeddings[:, :column], mixture[:, None], embeddings[:, column + 1 :]], 1)
    logits = logits_at(model, torch.tensor(columns, device=device), **inputs)  # [B, P + A, V]
    if counts is not None:
        counts["forward_tokens"] += int(sum(len(row.before) + len(prompt_ids) + len(t) for row, t in zip(rows, tails)))

    answers = torch.tensor([row.answer + row.answer[-1:] * (size - len(row.answer)) for row in rows], device=device)
    real = torch.tensor([[n < len(row.answer) for n in range(size)] for row in rows], device=device)
    cross_entropy, wrong = answer_cross_entropy(logits[:, len(prompt_ids) :], answers, real, temperature)
    return cross_entropy, wrong, prompt_nll(logits[:, : len(prompt_ids)], prompt_ids, choice)


def answer_cross_entropy(logits, answers, real, temperature):
    """(mean cross-entropy [B], wrong [B]) of answer ids [B, A] from logits [B, A, V]; `real` [B, A] masks padding."""
    each = F.cross_entropy(logits.transpose(1, 2) / temperature, answers, reduction="none")  # [B, A]
    wrong = ((logits.argmax(-1) != answers) & real).any(1)
    return (each * real).sum(1) / real.sum(1), wrong


def prompt_nll(logits, prompt_ids, choice=None):
    """Mean negative log-likelihood [B] of the prompt's ids from logits [B, P, V]. At the position of `choice` the
    target is the one-hot mixture, so that a candidate's own probability counts."""
    log_probs = logits.log_softmax(-1)
    targets = torch.tensor(prompt_ids, device=logits.device).expand(len(logits), -1)
    each = log_probs.gather(2, targets[..., None])[..., 0]  # [B, P]
    if choice is not None:
        position, candidates, one_hot = choice
        mixed = (one_hot * log_probs[:, position, candidates]).sum(1)
        each = torch.cat([each[:, :position], mixed[:, None], each[:, position + 1 :]], 1)
    return -each.mean(1)


def training_loss(cross_entropy, nll, settings):
    """What the gradient is taken of, per row [B]: cross-entropy + lambda * fluency (Eq. 7)."""
    return cross_entropy + settings.fluency_weight * fluency(nll, settings)


def fluency(nll, settings):
    """The fluency term [B]: the prompt's mean nll, or its exponential, the perplexity."""
    return nll.exp() if settings.fluency == "perplexity" else nll


@torch.no_grad()
def answer_loss(model, rows, prompt_ids, reasoning, settings, counts=None):
    """(cross-entropy [B], wrong [B], nll [B]) of all rows under a prompt and their reasoning (Eq. 5-6)."""

    def run(batch):
        part = [rows[i] for i in batch], prompt_ids, [reasoning[i] for i in batch]
        return sequence_losses(model, *part, settings.loss_temperature, counts=counts)

    parts = in_batches(run, range(len(rows)), settings.gradient_batch_size)
    return tuple(torch.cat(values) for values in zip(*parts))


# --- 3. Proposals (Eq. 3-4) -------------------------------------------------------------------------------


def allowed_tokens(tokenizer, vocabulary_size):
    """Which tokens may enter a prompt, bool [V]: those that read as a word, a piece of one, or punctuation."""
    added = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    ids = [[i] for i in range(min(len(tokenizer), vocabulary_size))]
    allowed = torch.zeros(vocabulary_size, dtype=torch.bool)
    for i, text in enumerate(tokenizer.batch_decode(ids, clean_up_tokenization_spaces=False)):
        word = text.removeprefix(" ")
        allowed[i] = i not in added and (text in PUNCTUATION or (word.isascii() and word.isalpha()))
    return allowed


@torch.no_grad()
def next_token_log_probs(model, rows, prompt_ids, batch_size, counts=None):
    """Log-probabilities [B, V] of the token behind `question + prompt_ids`."""

    def run(batch):
        contexts = [row.before + list(prompt_ids) for row in batch]
        fill = min(model.generation_config.eos_token_id)
        ids, mask, positions, split = pad(contexts, [[] for _ in batch], fill, model.device)
        if counts is not None:
            counts["forward_tokens"] += sum(map(len, contexts))
        last = torch.full((len(batch), 1), split - 1, device=model.device)
        return logits_at(model, last, input_ids=ids, attention_mask=mask, position_ids=positions)[:, 0].log_softmax(-1)

    return torch.cat(in_batches(run, rows, batch_size))


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


# --- 4. The gradient over candidates (Eq. 7) -----------------------------------------------------------------


def candidate_gradients(model, rows, prompt_ids, position, candidates, reasoning, settings, counts=None):
    """(gradients [B, K], losses [B]): per row, of the `training_loss` with respect to the one-hot choice among
    `candidates` at `position`, taken at the current token, which must be one of them.

    Earlier tokens do not depend on the choice; reasoning is held fixed. A more negative entry promises a lower loss.
    """
    candidates = torch.tensor(candidates, device=model.device)
    here = F.one_hot((candidates == prompt_ids[position]).nonzero()[0, 0], len(candidates))

    def run(batch):
        one_hot = here.to(model.dtype).repeat(len(batch), 1).requires_grad_()
        part = [rows[i] for i in batch], prompt_ids, [reasoning[i] for i in batch]
        choice = position, candidates, one_hot
        cross_entropy, _, nll = sequence_losses(model, *part, settings.loss_temperature, choice, counts)
        losses = training_loss(cross_entropy, nll, settings)
        # The rows do not touch each other, so the gradient of the sum holds each row's own gradient.
        (gradient,) = torch.autograd.grad(losses.sum(), one_hot)
        return gradient.to(losses.dtype), losses.detach()

    before = (counts or {}).get("forward_tokens", 0)
    parts = in_batches(run, range(len(rows)), settings.gradient_batch_size)
    if counts is not None:
        counts["backward_tokens"] += counts["forward_tokens"] - before
    return tuple(torch.cat(values) for values in zip(*parts))


# --- 5. Selection and the walk (Alg. 1) --------------------------------------------------------------------


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


def score_prompts(model, rows, prompts, settings, counts=None):
    """A `Score` for each prompt (a tuple of ids), with regenerated reasoning."""
    if not prompts:
        return []
    jobs = generate_reasoning(model, rows, prompts, settings.max_new_tokens, settings.batch_size, counts)
    scores = []
    for prompt_ids, reasoning in zip(prompts, jobs):
        losses = [values.double() for values in answer_loss(model, rows, prompt_ids, reasoning, settings, counts)]
        objective = objective_value(*losses, settings)
        if not math.isfinite(objective):
            raise UserError(f"the loss is not finite under prompt ids {list(prompt_ids)}: try --dtype float32")
        means = [values.mean().item() for values in losses]
        scores.append(Score(tuple(prompt_ids), *means, objective, sum(map(len, reasoning)), reasoning))
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


def mean_gradients(model, rows, prompt_ids, position, choices, reasoning, settings, counts=None):
    """{token: mean gradient over the rows}; empty where the shortlist does not need one."""
    if settings.shortlist != "gradient":
        return {}
    if settings.gradient_without_reasoning:  # ablation (Fig. 3): question + prompt + extractor only
        reasoning = [[] for _ in rows]
    per_row, _ = candidate_gradients(model, rows, prompt_ids, position, choices, reasoning, settings, counts)
    return dict(zip(choices, per_row.double().mean(0).tolist()))


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


def search_step(model, tokenizer, rows, current, position, step, scored, allowed, settings, counts):
    """Stages 1-4 at one position: (the winning Score, what was found on the way). Adds new scores to `scored`."""
    prefix, suffix = current.prompt_ids[:position], current.prompt_ids[position + 1 :]
    grows = position == len(current.prompt_ids)
    incumbent = None if grows else current.prompt_ids[position]
    clock = [time.perf_counter()]

    # One generator per (seed, step, purpose): a resumed run draws what an uninterrupted one draws.
    rng = random.Random(f"{settings.seed}/{step}/proposal")
    sizes = range(len(rows)), min(settings.sampled_rows, len(rows))
    samples = [rng.sample(*sizes) for _ in range(settings.intersections)]
    drawn = sorted(set(sum(samples, [])))
    log_probs = next_token_log_probs(model, [rows[i] for i in drawn], prefix, settings.batch_size, counts)
    places = [[drawn.index(i) for i in sample] for sample in samples]

    def admit(token):
        return token != incumbent and survives_encoding(tokenizer, rows[0], (*prefix, token, *suffix))

    candidates, k = propose_candidates(log_probs, allowed, places, settings.top_k, settings.min_candidates, admit)
    clock.append(time.perf_counter())

    # A growing prompt has no token here yet: the gradient is taken at the likeliest proposal.
    base = (*prefix, candidates[0] if grows else incumbent, *suffix)
    choices = candidates if grows else [*candidates, incumbent]
    gradients = mean_gradients(model, rows, base, position, choices, current.reasoning, settings, counts)
    rng = random.Random(f"{settings.seed}/{step}/shortlist")
    shortlist = make_shortlist(candidates, gradients, settings, rng)
    forced = forced_end(tokenizer, shortlist, position, len(next(iter(scored))), settings)
    if forced is not None:
        shortlist = shortlist[: shortlist.index(forced) + 1]
    clock.append(time.perf_counter())

    tried = {token: (*prefix, token, *suffix) for token in shortlist}
    new = [prompt for prompt in tried.values() if prompt not in scored]  # nothing is scored twice
    scored |= {score.prompt_ids: score for score in score_prompts(model, rows, new, settings, counts)}
    rivals = ([] if grows else [current]) + [scored[prompt] for prompt in tried.values()]
    winner = select_candidate(rivals, settings.ties) if forced is None else scored[tried[forced]]
    if winner.reasoning is None:  # scored in an earlier step, so its reasoning is no longer at hand
        (winner,) = score_prompts(model, rows, [winner.prompt_ids], settings, counts)
    clock.append(time.perf_counter())

    text = tokenizer.decode
    found = {
        "k": k,
        "grows": grows,
        "candidates": [{"token": t, "text": text([t]), "gradient": gradients.get(t)} for t in choices],
        "shortlist": [
            {"token": t, "text": text([t]), "new": prompt in new, **as_record(scored[prompt])}
            for t, prompt in tried.items()
        ],
        "seconds": dict(zip(("propose", "gradient", "select"), (b - a for a, b in zip(clock, clock[1:])))),
    }
    return winner, found


def optimize(model, tokenizer, rows, prompt_ids, settings, history=()):
    """Search a prompt (Alg. 1): yields one record (a dict, JSON-ready) per position visited; record 0 is the start.

    rows: list of `Row`. prompt_ids: the initial prompt. settings: `tasks.SearchSettings`. history: the records of
    an interrupted run, in order; the search goes on behind them to the same result.
    """
    allowed = allowed_tokens(tokenizer, model.get_input_embeddings().num_embeddings)
    if history:
        counts = Counter(history[-1]["totals"])
        scored = scores_of(history)
        current = restore_current(model, rows, settings, history)
        position = position_after(tokenizer, history[-1], settings)
    else:
        counts, started = Counter(), time.perf_counter()
        (current,) = score_prompts(model, rows, [tuple(prompt_ids)], settings, counts)
        scored, position = {current.prompt_ids: current}, 0
        found = {"seconds": {"select": time.perf_counter() - started}}
        yield make_record(tokenizer, rows[0], 0, None, current, scored, counts) | found

    for step in range(max(1, len(history)), settings.steps + 1):
        winner, found = search_step(model, tokenizer, rows, current, position, step, scored, allowed, settings, counts)
        for score in scored.values():  # only the current prompt's reasoning is needed again
            score.reasoning = score.reasoning if score is winner else None
        scored[winner.prompt_ids] = current = winner
        record = make_record(tokenizer, rows[0], step, position, current, scored, counts) | found
        yield record
        position = position_after(tokenizer, record, settings)


# --- Records of a run, and going on behind them ---------------------------------------------------------------


def as_record(score):
    """A Score as JSON, without its reasoning."""
    fields = {name: value for name, value in vars(score).items() if name != "reasoning"}
    return fields | {"prompt_ids": list(score.prompt_ids)}


def as_score(record):
    return Score(tuple(record["prompt_ids"]), *(record[f] for f in "cross_entropy error nll objective tokens".split()))


def make_record(tokenizer, row, step, position, current, scored, counts):
    best = finalists(tokenizer, scored, 1)[0]
    return {
        "step": step,
        "position": position,
        **as_record(current),
        "prompt": prompt_text(tokenizer, row, current.prompt_ids).strip(),
        "best": {"objective": best.objective, "prompt": prompt_text(tokenizer, row, best.prompt_ids).strip()},
        "totals": dict(counts),
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


def restore_current(model, rows, settings, history):
    """The current Score with its reasoning, generated once more in the very job that first gave it.

    The same batches give the same bits on the same machine, so a resumed run does not drift.
    Errors: UserError if the recorded objective does not come back.
    """
    last = history[-1]["prompt_ids"]
    won = max(n for n, record in enumerate(history) if n == 0 or history[n - 1]["prompt_ids"] != record["prompt_ids"])
    job = [tuple(e["prompt_ids"]) for e in history[won].get("shortlist", ()) if e["new"]]
    scores = score_prompts(model, rows, job if tuple(last) in job else [tuple(last)], settings)
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

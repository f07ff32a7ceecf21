"""What goes beyond the paper in a step of the search. Both are settings that are off by default.

    --positions all    the best tokens of the best positions of the whole prompt, by one gradient
    --audit-every N    spends generations of every N-th step on what the gradient is worth

`visit` takes a step with them; greater_core.optimize is told so. They use the functions of greater_core.py, and its
shape letters.
"""

from dataclasses import replace
from functools import partial

import torch
from torch.nn import functional as F

from greater_core import (
    answer_loss,
    generator_of,
    make_shortlist,
    prefix_at,
    prompt_nll,
    proposals,
    reason_and_score,
    score_of_rows,
    score_prompts,
    search_step,
    select_candidate,
    training_loss,
)
from support.answers import finite_rows, with_reads
from support.ranks import agreed
from support.runs import Audit, Candidate, Step, Tried, timed
from support.tokens import ends_sentence, survives_encoding


def visit(search, prefix, step):
    """The `Step` number `step` at the prefix's position, with an audit where it is due."""
    settings, before = search.settings, replace(search)  # where the search stood; both have the same dict of scores
    grows = len(prefix.tokens) == len(search.current.prompt_ids)  # then only the new position is searched
    everywhere = settings.positions == "all" and not grows
    taken = step_everywhere(search, prefix, step) if everywhere else search_step(search, prefix, step)
    every = settings.audit_every
    if not every or step % every or grows or not taken.shortlist:  # a prompt that grows has no incumbent
        return taken
    with timed(taken.seconds, "audit"):
        return audited(before, prefix, taken)


# --- All positions at once ----------------------------------------------------------------------------


def step_everywhere(search, questions, step):
    """A `Step` over all positions of the prompt. questions: the `Prefix` before its first token."""
    prompt, seconds = search.current.prompt_ids, {}
    with timed(seconds, "propose"):
        tokens_at = proposals_everywhere(search, questions, step)
    with timed(seconds, "gradient"):
        gradients = gradients_of(search, questions, tokens_at)
        candidates = [
            Candidate(token, gradients.get((position, token)), position=position)
            for position, tokens in tokens_at.items()
            for token in tokens
        ]
        tried = {replaced(prompt, one): one for one in shortlist_everywhere(search, candidates, step)}
    with timed(seconds, "select"):
        new = select_candidate(search, questions, [*tried], search.current)
    shortlist = [
        Tried(**vars(search.scores[ids]), token=one.token, position=one.position, new=ids in new)
        for ids, one in tried.items()
    ]
    return Step(
        **vars(search.current),
        step=step,
        position=0,
        seconds=seconds,
        candidates=candidates,
        shortlist=shortlist,
    )


def replaced(prompt, candidate):
    """The prompt with a `Candidate`'s token at its position."""
    return (*prompt[: candidate.position], candidate.token, *prompt[candidate.position + 1 :])


def proposals_everywhere(search, questions, step):
    """{position: tokens proposed there, and the prompt's own as the last}.

    Nothing is proposed for a sentence end: a prompt without one grows, and one that grows has no incumbent to fall back
    on."""
    engine, prompt, here, tokens_at = search.engine, search.current.prompt_ids, None, {}
    closed = len(prompt) > 1 and ends_sentence(engine.tokenizer, prompt)

    def may_stand(position, token):
        ids = replaced(prompt, Candidate(token, None, position=position))
        return ids != prompt and survives_encoding(engine.tokenizer, search.rows[0], ids)

    for position in range(len(prompt)):
        tokens = []
        if position < len(prompt) - closed:
            here = prefix_at(engine, questions, prompt[:position], known=here)
            tokens, _ = proposals(search, here, step, partial(may_stand, position))
        tokens_at[position] = [*tokens, prompt[position]]
    return tokens_at


def shortlist_everywhere(search, candidates, step):
    """The candidates to try for real. What was tried before is left out: it lost, and the same gradient would choose it
    again. By the gradient: at most one of each position, and of several one at the position whose turn it is, so that
    no word stays for good that the gradient does not notice."""
    settings, prompt = search.settings, search.current.prompt_ids
    new = [one for one in candidates if replaced(prompt, one) not in search.scores]
    rng = generator_of(settings, step, "shortlist")
    if settings.shortlist != "gradient":
        return make_shortlist(new, {}, settings, rng)
    own = {one.position: one.gradient for one in candidates if one.token == prompt[one.position]}
    changes = {one: one.gradient - own[one.position] for one in new}
    best = {}  # {position: candidate}; where the gradient is steep all tokens promise much: all tries would go there
    for candidate in sorted(new, key=changes.get):
        best.setdefault(candidate.position, candidate)
    shortlist = make_shortlist([*best.values()], changes, settings, rng)
    places = sorted({one.position for one in candidates if one.token != prompt[one.position]})
    turn = best.get(places[(step - 1) % len(places)]) if len(shortlist) > 1 else None
    return shortlist if turn is None or turn in shortlist else [*shortlist[:-1], turn]


def gradients_of(search, questions, tokens_at):
    """{(position, token): gradient, mean over the rows} of {position: tokens with the prompt's own}; empty where the
    shortlist does not need one."""
    settings, prompt = search.settings, search.current.prompt_ids
    if not settings.takes_gradient:
        return {}
    reasoning = [[] for _ in search.rows] if settings.gradient_without_reasoning else search.reasoning
    per_row = gradients_everywhere(search, questions, [*tokens_at.values()], reasoning)  # [B, P, K]
    whole = finite_rows(per_row, f"the gradient is not finite at ids {list(prompt)}", search.engine.dtype_hint)
    means = agreed(per_row[whole].cpu().double().mean(0).tolist())
    return {
        (position, token): gradient
        for (position, tokens), at_position in zip(tokens_at.items(), means)
        for token, gradient in zip(tokens, at_position)
    }


def gradients_everywhere(search, questions, tokens_at, reasoning):
    """[B, P, K]: what `candidate_gradients` gives at each position of the current prompt, in one pass forward and back.

    tokens_at: P lists of tokens, each with the prompt's own; K is the longest's length, the others are filled up."""
    engine, settings, prompt = search.engine, search.settings, search.current.prompt_ids
    dtype = torch.promote_types(engine.model.dtype, torch.float32)  # as in `candidate_gradients`
    longest, later = max(map(len, tokens_at)), len(prompt) - 1
    filled = [tokens + [own] * (longest - len(tokens)) for tokens, own in zip(tokens_at, prompt)]
    chosen = torch.tensor([tokens.index(own) for tokens, own in zip(tokens_at, prompt)], device=engine.device)
    candidate_ids = torch.tensor(filled, device=engine.device)  # [P, K]
    embeddings = engine.embed(candidate_ids).to(dtype)  # [P, K, E]
    tails = [[*prompt, *row.turn_end, *ids, *row.extractor] for row, ids in zip(search.rows, reasoning)]

    def run(numbers):
        rows = [search.rows[i] for i in numbers]
        reads = [row.reads for row in rows]
        count = len(reads[0])  # R
        ids, mask, columns = with_reads([tails[i] for i in numbers], reads, later, engine.device)  # [B * R, S]
        one_hot = F.one_hot(chosen, longest).to(dtype).repeat(len(rows), 1, 1).requires_grad_()  # [B, P, K]
        choice = torch.einsum("bpk,pke->bpe", one_hot, embeddings).repeat_interleave(count, 0)  # [B * R, P, E]
        embedded = engine.embed(ids)  # [B * R, S, E]
        embedded = torch.cat([choice.to(embedded.dtype), embedded[:, len(prompt) :]], 1)
        context = questions.context.select([i for i in numbers for _ in range(count)])
        logits = engine.forward(context, embedded, mask, columns).unflatten(0, (-1, count))  # [B, R, later + A, V]
        cross_entropy, _ = answer_loss(logits[:, :, later:], rows, settings.loss_temperature)
        first = questions.log_probs[numbers][:, None]  # [B, 1, V]
        log_probs = torch.cat([first, logits[:, 0, :later].log_softmax(-1)], 1)  # [B, P, V]
        own = log_probs.gather(2, candidate_ids.expand(len(rows), -1, -1))  # [B, P, K]
        nll = -(one_hot * own).sum((1, 2)) / len(prompt)
        (gradient,) = torch.autograd.grad(training_loss(cross_entropy, nll, settings).sum(), one_hot)  # [B, P, K]
        engine.counts["backward_tokens"] += ids.numel()
        return list(gradient)

    tokens = max(map(len, tails)) * len(search.rows[0].reads)  # of the longest row
    size = settings.gradient_batch_size or engine.rows_for_backward(tokens)
    return torch.stack(engine.over_rows(run, range(len(tails)), "gradient", size, cost=lambda i: len(tails[i])))


# --- The audit ---------------------------------------------------------------------------------------


def audited(search, prefix, taken):
    """The `Step` taken, with its `Audit`: a random shortlist, what the old reasoning made of the tried tokens, and the
    incumbent again in other batches. The search goes on as it would have without.

    search: as it stood before that step."""
    engine, prompt = search.engine, search.current.prompt_ids
    before, batch_sizes = engine.counts.copy(), dict(engine.batch_sizes)
    drawn = {prompt_of(one, taken, prompt): one for one in drawn_beside(search, taken, len(taken.shortlist))}
    new = [ids for ids in drawn if ids not in search.scores]
    scored = {score.prompt_ids: score for score, _ in score_prompts(search, prefix, new)} if new else {}
    scores = search.scores | scored
    again = score_again(search, prefix)
    fixed = fixed_losses(search, prefix, {prompt, *drawn, *(one.prompt_ids for one in taken.shortlist)})

    def tried(ids, one):
        place = {"token": one.token, "position": one.position}
        return Tried(**vars(scores[ids]), **place, new=ids in new, fixed_loss=fixed[ids])

    audit = Audit(
        drawn=[tried(ids, one) for ids, one in drawn.items()],
        fixed_loss=fixed[prompt],
        again=again,
        generations=(len(new) + 1) * len(search.rows),
    )
    shortlist = [replace(one, fixed_loss=fixed[one.prompt_ids]) for one in taken.shortlist]
    engine.counts["audit_tokens"] += engine.counts["generated_tokens"] - before["generated_tokens"]
    engine.counts["audit_generations"] += audit.generations
    engine.batch_sizes = batch_sizes  # lest memory that ran out here changes the batches of the search
    return replace(taken, audit=audit, shortlist=shortlist)


def prompt_of(candidate, taken, prompt):
    """The prompt with a candidate of the `Step` taken, which may leave the position to the step."""
    position = taken.position if candidate.position is None else candidate.position
    return replaced(prompt, replace(candidate, position=position))


def drawn_beside(search, taken, count):
    """So many of the step's candidates, drawn at random; where all positions are searched one of a position and none
    that an earlier step tried, as the search does."""
    settings, prompt = search.settings, search.current.prompt_ids
    tried_here = {one.prompt_ids for one in taken.shortlist if one.new}
    old = search.scores.keys() - tried_here if settings.positions == "all" else {prompt}
    possible = [one for one in taken.candidates if prompt_of(one, taken, prompt) not in old]
    rng = generator_of(settings, taken.step, "audit")
    if settings.positions == "one":
        return rng.sample(possible, min(count, len(possible)))
    places = sorted({one.position for one in possible})
    drawn = rng.sample(places, min(count, len(places)))
    return [rng.choice([one for one in possible if one.position == place]) for place in drawn]


def fixed_losses(search, prefix, prompts):
    """{prompt: mean training loss} of a set of prompts behind the reasoning at hand, which is the current prompt's."""
    engine, settings, position = search.engine, search.settings, len(prefix.tokens)
    prompts, tails = sorted(prompts), {}
    for prompt in prompts:
        for i, row in enumerate(search.rows):
            tails[prompt, i] = [*prompt[position:], *row.turn_end, *search.reasoning[i], *row.extractor]

    @torch.inference_mode()
    def run(batch):
        numbers = [i for _, i in batch]
        rows = [search.rows[i] for i in numbers]
        reads = [row.reads for row in rows]
        count = len(reads[0])  # R
        later = len(batch[0][0]) - position - 1  # as in `candidate_gradients`
        ids, mask, columns = with_reads([tails[job] for job in batch], reads, later, engine.device)  # [B * R, S]
        context = prefix.context.select([i for i in numbers for _ in range(count)])
        logits = engine.forward(context, ids, mask, columns).unflatten(0, (-1, count))  # [B, R, later + A, V]
        cross_entropy, _ = answer_loss(logits[:, :, later:], rows, settings.loss_temperature)
        tokens = ids[::count, : later + 1]  # [B, 1 + later]
        here = prefix.log_probs[numbers, tokens[:, 0]]  # [B]
        nll = prompt_nll(prefix.nll[numbers], here, logits[:, 0, :later], tokens[:, 1:])
        return training_loss(cross_entropy, nll, settings).tolist()

    longest = max(map(len, tails.values())) * len(search.rows[0].reads)
    size = settings.gradient_batch_size or engine.rows_for_backward(longest)
    losses = dict(zip(tails, engine.over_rows(run, [*tails], "audit", size, cost=lambda job: len(tails[job]))))
    numbers = range(len(search.rows))
    values = torch.tensor([[losses[prompt, i] for i in numbers] for prompt in prompts], dtype=torch.float64)
    whole = values.isfinite().all(0)  # else a prompt would win by the rows on which it failed
    return dict(zip(prompts, values[:, whole].mean(1).tolist()))


def score_again(search, prefix):
    """The `Score` of the current prompt once more: what comes out otherwise, other batches alone have made."""
    settings, numbers = search.settings, range(len(search.rows))
    together = min(settings.batch_size or len(numbers), len(numbers))
    size = 2 if together == 1 else together // 2
    other = replace(search, settings=replace(settings, batch_size=size))
    jobs = [(search.current.prompt_ids, i) for i in reversed(numbers)]
    outcomes = reason_and_score(other, prefix, jobs)
    return score_of_rows(search, search.current.prompt_ids, outcomes[::-1])

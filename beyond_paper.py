"""What goes beyond the paper in a step of the search. Each is a setting that is off by default.

    --audit-every N                    spends generations of every N-th step on what the gradient is worth
    --positions all                    the best tokens of the best positions of the whole prompt, by one gradient
    --edits substitute insert delete   tokens may also come and go, so that a prompt can shrink
    --shortlist exact                  ranks by the loss behind the present reasoning itself, not by its slope

`visit` takes a step with them; greater_core.optimize is told so. They use the functions of greater_core.py, and its
shape letters. (--margin and --objective are there.)
"""

from dataclasses import replace
from functools import partial

import torch
from torch.nn import functional as F

from greater_core import (
    answer_loss,
    generator_of,
    make_shortlist,
    mean_gradients,
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
from support.answers import answer_columns, finite_rows
from support.engine import pad
from support.ranks import agreed
from support.runs import Audit, Candidate, Step, Tried, timed
from support.tokens import ends_sentence, survives_encoding

# Of so many candidates at most `--shortlist exact` takes the loss in a step: those of which the gradient promises most.
MEASURED = 12


def visit(search, prefix, step):
    """The `Step` number `step` at the prefix's position, with an audit where it is due."""
    settings, before = search.settings, replace(search)  # where the search stood; both have the same dict of scores
    grows = len(prefix.tokens) == len(search.current.prompt_ids)  # as in the paper, whatever may be edited else
    taken = edit_step(search, prefix, step) if settings.edit_steps and not grows else search_step(search, prefix, step)
    every = settings.audit_every
    if not every or step % every or grows or not substituted(taken):  # a prompt that grows has no incumbent
        return taken
    with timed(taken.seconds, "audit"):
        return audited(before, prefix, taken)


# --- Edits at one position or at all ------------------------------------------------------------------


def edit_step(search, prefix, step):
    """A `Step` over the edits of the settings, at the prefix's position or, where this is 0, at all."""
    kinds = {"substitute": substitutions, "insert": insertions, "delete": deletions}
    settings, prompt, seconds = search.settings, search.current.prompt_ids, {}
    candidates, tried = [], {}  # {prompt: Candidate}
    with timed(seconds, "gradient"):  # and proposals
        for kind in settings.edits:
            found, shortlist = kinds[kind](search, prefix, step)
            candidates += found
            for candidate in shortlist:
                tried.setdefault(edited(prompt, candidate), candidate)  # two edits may give the same prompt
    with timed(seconds, "select"):
        new = select_candidate(search, prefix, [*tried], search.current)
    shortlist = []
    for ids, candidate in tried.items():
        place = {"token": candidate.token, "edit": candidate.edit, "position": candidate.position}
        shortlist.append(Tried(**vars(search.scores[ids]), **place, new=ids in new))
    return Step(
        **vars(search.current),
        step=step,
        position=len(prefix.tokens),
        seconds=seconds,
        candidates=candidates,
        shortlist=shortlist,
    )


def edited(prompt, candidate):
    """The prompt with a `Candidate`'s edit."""
    position = candidate.position
    token = () if candidate.edit == "delete" else (candidate.token,)
    behind = position if candidate.edit == "insert" else position + 1
    return (*prompt[:position], *token, *prompt[behind:])


def may_stand(search, edit, position, token):
    """Whether the edit changes the prompt, to one whose text encodes to its ids."""
    prompt = search.current.prompt_ids
    ids = edited(prompt, Candidate(token, None, edit=edit, position=position))
    return ids != prompt and survives_encoding(search.engine.tokenizer, search.rows[0], ids)


def a_place(search, prefix, step, edit, count):
    """The prefix's position, or, where all are searched, one of `count` drawn for the step and the kind of edit."""
    if search.settings.positions == "one":
        return len(prefix.tokens)
    return generator_of(search.settings, step, f"place/{edit}").randrange(count)


def substitutions(search, prefix, step):
    """(candidates with the tokens that they would replace, those to try). Where all positions are searched, what was
    tried before is left out: it lost, and the same gradient would choose it again."""
    settings, prompt, engine = search.settings, search.current.prompt_ids, search.engine
    one = settings.positions == "one"
    here, tokens_at = None, {}
    places = open_places(search, prefix)
    for position in places:
        here = prefix_at(engine, prefix, prompt[:position], known=here)
        tokens, _ = proposals(search, here, step, partial(may_stand, search, "substitute", position))
        tokens_at[position] = [*tokens, prompt[position]]
    if not one and len(places) < len(prompt):
        tokens_at[len(prompt) - 1] = [prompt[-1]]
    gradients = gradients_of(search, prefix, tokens_at)
    candidates, changes = [], {}  # {candidate: its gradient less that of the token it would replace}
    for position, tokens in tokens_at.items():
        own = gradients.get((position, prompt[position]))
        for token in tokens:
            gradient = gradients.get((position, token))
            candidate = Candidate(token, gradient, edit="substitute", position=position)
            candidates.append(candidate)
            if token != prompt[position] and (one or edited(prompt, candidate) not in search.scores):
                changes[candidate] = None if gradient is None else gradient - own
    if settings.takes_gradient:
        changes = best_of_each_position(changes)
    by_gradient = changes
    if settings.shortlist == "exact":
        changes = measured(search, prefix, sorted(changes, key=changes.get)[:MEASURED])
    shortlist = make_shortlist([*changes], changes, settings, generator_of(settings, step, "shortlist"))
    turn = places[(step - 1) % len(places)]
    return candidates, shortlist if one or settings.shortlist == "random" else with_turn(shortlist, by_gradient, turn)


def open_places(search, prefix):
    """The positions at which tokens may be replaced: the prefix's, or where all are searched those before a sentence
    end, as a prompt without its end grows, and one that grows has no incumbent to fall back on."""
    if search.settings.positions == "one":
        return [len(prefix.tokens)]
    prompt = search.current.prompt_ids
    closed = len(prompt) > 1 and ends_sentence(search.engine.tokenizer, prompt)
    return range(len(prompt) - closed)


def best_of_each_position(changes):
    """The {candidate: predicted change} that promises most at its position: where the gradient is steep all tokens
    promise much, and the tries of a step would all go there. With one position: all."""
    best = {}
    for candidate in sorted(changes, key=changes.get):
        best.setdefault(candidate.position, candidate)
    return changes if len(best) == 1 else {candidate: changes[candidate] for candidate in best.values()}


def with_turn(shortlist, changes, turn):
    """The shortlist, with a candidate at the position whose turn it is instead of its last, unless it has one there:
    the positions of which the gradient promises little are tried too, so that no word stays for good unseen."""
    there = [candidate for candidate in changes if candidate.position == turn]
    if not there or any(candidate.position == turn for candidate in shortlist):
        return shortlist
    return [*shortlist[:-1], there[0]]


def measured(search, prefix, candidates):
    """{candidate: the loss of its prompt behind the reasoning at hand}."""
    prompts = {candidate: edited(search.current.prompt_ids, candidate) for candidate in candidates}
    losses = fixed_losses(search, prefix, {*prompts.values()})
    return {candidate: losses[prompt] for candidate, prompt in prompts.items()}


def insertions(search, prefix, step):
    """(candidates, those to try) for a token more. The gradient is taken where the likeliest of them stands."""
    settings, prompt = search.settings, search.current.prompt_ids
    if len(prompt) >= settings.max_prompt_tokens:
        return [], []
    place = a_place(search, prefix, step, "insert", len(prompt))
    here = prefix_at(search.engine, prefix, prompt[:place])
    tokens, _ = proposals(search, here, step, partial(may_stand, search, "insert", place))
    base = edited(prompt, Candidate(tokens[0], None, edit="insert", position=place))
    gradients = mean_gradients(search, here, base, tokens)
    candidates = [Candidate(token, gradients.get(token), edit="insert", position=place) for token in tokens]
    changes = {candidate: candidate.gradient for candidate in candidates}
    if settings.shortlist == "exact":
        changes = measured(search, prefix, candidates)
    return candidates, make_shortlist(candidates, changes, settings, generator_of(settings, step, "insert"))


def deletions(search, prefix, step):
    """(candidates, those to try): a token less. The last one stays, so that a sentence keeps its end."""
    prompt = search.current.prompt_ids
    if len(prompt) < 2:
        return [], []
    place = a_place(search, prefix, step, "delete", len(prompt) - 1)
    possible = place < len(prompt) - 1 and may_stand(search, "delete", place, prompt[place])
    candidates = [Candidate(prompt[place], None, edit="delete", position=place)] if possible else []
    return candidates, candidates


def gradients_of(search, prefix, tokens_at):
    """{(position, token): gradient, mean over the rows} of {position: tokens with the prompt's own}; empty where the
    shortlist does not need one."""
    settings, prompt = search.settings, search.current.prompt_ids
    if settings.positions == "one":
        ((position, tokens),) = tokens_at.items()
        return {(position, token): g for token, g in mean_gradients(search, prefix, prompt, tokens).items()}
    if not settings.takes_gradient:
        return {}
    reasoning = [[] for _ in search.rows] if settings.gradient_without_reasoning else search.reasoning
    per_row = gradients_everywhere(search, prefix, [*tokens_at.values()], reasoning)  # [B, P, K]
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
        pairs = [(i, read) for i in numbers for read in search.rows[i].reads]
        ids, mask = pad([[*tails[i], *read] for i, read in pairs], engine.device)  # [B * R, S]
        columns = [[*range(later), *answer_columns(len(tails[i]) + len(read), read)] for i, read in pairs]
        one_hot = F.one_hot(chosen, longest).to(dtype).repeat(len(rows), 1, 1).requires_grad_()  # [B, P, K]
        count = len(pairs) // len(rows)  # R
        choice = torch.einsum("bpk,pke->bpe", one_hot, embeddings).repeat_interleave(count, 0)  # [B * R, P, E]
        embedded = engine.embed(ids)  # [B * R, S, E]
        embedded = torch.cat([choice.to(embedded.dtype), embedded[:, len(prompt) :]], 1)
        context = questions.context.select([i for i, _ in pairs])
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
    chosen = substituted(taken)
    drawn = {prompt_of(one, taken, prompt): one for one in drawn_beside(search, taken, len(chosen))}
    new = [ids for ids in drawn if ids not in search.scores]
    scored = {score.prompt_ids: score for score, _ in score_prompts(search, prefix, new)} if new else {}
    scores = search.scores | scored
    again = score_again(search, prefix)
    fixed = fixed_losses(search, prefix, {prompt, *drawn, *(one.prompt_ids for one in taken.shortlist)})

    def tried(ids, one):
        place = {"token": one.token, "edit": one.edit, "position": one.position}
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


def substituted(taken):
    """The tokens of a step's shortlist that would replace another."""
    return [one for one in taken.shortlist if one.edit == "substitute"]


def prompt_of(candidate, taken, prompt):
    """The prompt with a candidate of the `Step` taken, which may leave the position to the step."""
    position = taken.position if candidate.position is None else candidate.position
    return edited(prompt, replace(candidate, position=position))


def drawn_beside(search, taken, count):
    """So many of the step's candidates that would replace a token, drawn as the random shortlist is; where all
    positions are searched none that an earlier step tried, as there."""
    settings, prompt = search.settings, search.current.prompt_ids
    tried_here = {one.prompt_ids for one in taken.shortlist if one.new}
    old = search.scores.keys() - tried_here if settings.positions == "all" else {prompt}
    possible = [one for one in taken.candidates if one.edit == "substitute"]
    possible = [one for one in possible if prompt_of(one, taken, prompt) not in old]
    at_random = replace(settings, shortlist="random", shortlist_size=count)
    return make_shortlist(possible, {}, at_random, generator_of(settings, taken.step, "audit"))


def fixed_losses(search, prefix, prompts):
    """{prompt: mean training loss} of prompts behind the reasoning at hand, which is the current prompt's."""
    engine, settings, position = search.engine, search.settings, len(prefix.tokens)
    tails = {}
    for prompt in sorted(prompts):
        for i, row in enumerate(search.rows):
            tails[prompt, i] = [*prompt[position:], *row.turn_end, *search.reasoning[i], *row.extractor]

    @torch.inference_mode()
    def run(batch):
        rows = [search.rows[i] for _, i in batch]
        pairs = [(job, read) for job in batch for read in search.rows[job[1]].reads]
        later = len(batch[0][0]) - position - 1  # as in `candidate_gradients`
        ids, mask = pad([[*tails[job], *read] for job, read in pairs], engine.device)  # [B * R, S]
        columns = [[*range(later), *answer_columns(len(tails[job]) + len(read), read)] for job, read in pairs]
        count = len(pairs) // len(batch)  # R
        logits = engine.forward(prefix.context.select([i for (_, i), _ in pairs]), ids, mask, columns)
        logits = logits.unflatten(0, (-1, count))  # [B, R, later + A, V]
        cross_entropy, _ = answer_loss(logits[:, :, later:], rows, settings.loss_temperature)
        tokens = ids[::count, : later + 1]  # [B, 1 + later]
        here = prefix.log_probs[[i for _, i in batch], tokens[:, 0]]  # [B]
        nll = prompt_nll(prefix.nll[[i for _, i in batch]], here, logits[:, 0, :later], tokens[:, 1:])
        return training_loss(cross_entropy, nll, settings).tolist()

    losses = {}
    for length in sorted(set(map(len, prompts))):  # insertions and deletions change it
        jobs = [job for job in tails if len(job[0]) == length]
        longest = max(len(tails[job]) for job in jobs) * len(search.rows[0].reads)
        size = settings.gradient_batch_size or engine.rows_for_backward(longest)
        losses |= zip(jobs, engine.over_rows(run, jobs, "audit", size, cost=lambda job: len(tails[job])))
    means = {}
    for prompt in prompts:
        own = torch.tensor([losses[prompt, i] for i in range(len(search.rows))], dtype=torch.float64)
        means[prompt] = own[own.isfinite()].mean().item()
    return means


def score_again(search, prefix):
    """The `Score` of the current prompt once more: what comes out otherwise, other batches alone have made."""
    settings, numbers = search.settings, range(len(search.rows))
    together = min(settings.batch_size or len(numbers), len(numbers))
    size = 2 if together == 1 else together // 2
    other = replace(search, settings=replace(settings, batch_size=size))
    jobs = [(search.current.prompt_ids, i) for i in reversed(numbers)]
    outcomes = reason_and_score(other, prefix, jobs)
    return score_of_rows(search, search.current.prompt_ids, outcomes[::-1])

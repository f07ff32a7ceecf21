"""What goes beyond the paper in a step of the search. Each is a setting that is off by default.

    --audit-every N   spends generations of every N-th step on what the gradient is worth

`visit` takes a step with them; greater_core.optimize is told so. They use the functions of greater_core.py, and its
shape letters.
"""

from dataclasses import replace

from greater_core import (
    candidate_gradients,
    generator_of,
    make_shortlist,
    reason_and_score,
    score_of_rows,
    score_prompts,
    search_step,
)
from support.runs import Audit, Tried, timed


def visit(search, prefix, step):
    """The `Step` number `step` at the prefix's position, with an audit where it is due."""
    before = replace(search)  # where the search stood; the scores of both are the same dict
    taken = search_step(search, prefix, step)
    every = search.settings.audit_every
    if not every or step % every or taken.grows:  # a prompt that grows has no incumbent
        return taken
    with timed(taken.seconds, "audit"):
        return audited(before, prefix, taken)


# --- The audit ---------------------------------------------------------------------------------------


def audited(search, prefix, taken):
    """The `Step` taken, with its `Audit`: a random shortlist, what the old reasoning made of the tried tokens, and the
    incumbent again in other batches. The search goes on as it would have without.

    search: as it stood before that step."""
    engine, settings, incumbent = search.engine, search.settings, search.current
    before, batch_sizes = engine.counts.copy(), dict(engine.batch_sizes)
    candidates = [one.token for one in taken.candidates if one.token != incumbent.prompt_ids[taken.position]]
    at_random = replace(settings, shortlist="random", shortlist_size=max(1, len(taken.shortlist)))
    tokens = make_shortlist(candidates, {}, at_random, generator_of(settings, taken.step, "audit"))
    drawn = {token: with_token(incumbent, taken.position, token) for token in tokens}
    new = [prompt for prompt in drawn.values() if prompt not in search.scores]
    scored = {score.prompt_ids: score for score, _ in score_prompts(search, prefix, new)} if new else {}
    scores = search.scores | scored
    again = score_again(search, prefix)

    def tried(token, prompt):
        loss = fixed_loss(search, prefix, prompt)
        return Tried(**vars(scores[prompt]), token=token, new=prompt in new, fixed_loss=loss)

    audit = Audit(
        drawn=[tried(token, prompt) for token, prompt in drawn.items()],
        fixed_loss=fixed_loss(search, prefix, incumbent.prompt_ids),
        again=again,
        generations=(len(new) + 1) * len(search.rows),
    )
    shortlist = [replace(one, fixed_loss=fixed_loss(search, prefix, one.prompt_ids)) for one in taken.shortlist]
    engine.counts["audit_tokens"] += engine.counts["generated_tokens"] - before["generated_tokens"]
    engine.counts["audit_generations"] += audit.generations
    engine.batch_sizes = batch_sizes  # lest memory that ran out here changes the batches of the search
    return replace(taken, audit=audit, shortlist=shortlist)


def with_token(score, position, token):
    """The prompt of a score with another token at a position."""
    return (*score.prompt_ids[:position], token, *score.prompt_ids[position + 1 :])


def fixed_loss(search, prefix, prompt):
    """The mean training loss of a prompt behind the reasoning at hand, which is the current prompt's."""
    position = len(prefix.tokens)
    _, losses = candidate_gradients(search, prefix, prompt, [prompt[position]], search.reasoning)
    return losses[losses.isfinite()].double().mean().item()


def score_again(search, prefix):
    """The `Score` of the current prompt once more: what comes out otherwise, other batches alone have made."""
    settings, numbers = search.settings, range(len(search.rows))
    together = min(settings.batch_size or len(numbers), len(numbers))
    size = 2 if together == 1 else together // 2
    other = replace(search, settings=replace(settings, batch_size=size))
    jobs = [(search.current.prompt_ids, i) for i in reversed(numbers)]
    outcomes = reason_and_score(other, prefix, jobs)
    return score_of_rows(search, search.current.prompt_ids, outcomes[::-1])

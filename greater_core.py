"""GReaTer: a small language model improves its own prompt with gradients over its own reasoning.

Das et al., ICLR 2025 (arXiv 2412.09722). The prompt follows the question; its tokens are searched one position at a
time. At position i, with N training rows:

1. Propose (Eq. 3-4): the top-k allowed next tokens after `question + prompt[:i]`, intersected over sampled rows.
2. Reason (Sec. 3.2): the model's greedy reasoning for every row under the current prompt, kept from the selection
   that chose this prompt; behind it an extractor ("So the answer is"), behind that the logits of the gold answer, or
   the log-probabilities of all possible answers (Eq. 5-6).
3. Gradient (Eq. 7): of the answer loss plus lambda times the prompt's negative log-likelihood, with respect to the
   one-hot choice of token i. The mu proposals with the most negative gradient are the shortlist.
4. Select (Alg. 1): for each of them and the incumbent, reason anew and compute the loss for real; the lowest wins.

Then i moves on. Behind the last position the prompt grows by a token, until a sentence end closes it and the walk
starts again at its first token. At the end the best prompts of the run compete on dev rows (02_optimize.py).

All is done on token ids (support/tokens.py): a prompt is never decoded and encoded again in the loop, so a position
keeps its meaning. The weights are frozen, and what many continuations share is read once (support/engine.py). A run's
records are in support/runs.py; where this differs from paper and released code, in docs/deviations.md.

Shape letters: B rows, S tokens of a padded sequence, P prompt tokens, R reads of a row (support/answers.py), A answer
tokens, M possible answers, V vocabulary, K candidates, Q sampled rows, E embedding size.
"""

import math
import random
from collections import Counter
from dataclasses import dataclass, field, replace

import torch
from torch.nn import functional as F

from support.answers import choice_log_probs, finite_rows, read_answers, with_reads
from support.engine import Context, Engine, pad
from support.files import UserError, require
from support.ranks import agreed
from support.runs import Candidate, Score, Step, Tried, described, last_job, row_outcomes, scores_of, timed
from support.settings import SearchSettings
from support.tokens import Row, allowed_ids, continues_word, ends_sentence, survives_encoding


@dataclass
class Search:
    """A search: what stays the same, every prompt it has scored, and where it stands."""

    engine: Engine
    rows: list[Row]
    settings: SearchSettings
    allowed: torch.Tensor  # bool [V]: tokens that may enter a prompt
    initial: tuple[int, ...]  # the prompt's ids at the start
    scores: dict = field(default_factory=dict)  # {prompt ids: Score}
    current: Score | None = None
    reasoning: list | None = None  # per row, the ids generated under the current prompt


@dataclass
class Prefix:
    """Question and prompt[:i] of every row, read once; proposals, gradient and selection at position i start here."""

    tokens: tuple[int, ...]  # prompt[:i]
    context: Context  # B rows
    log_probs: torch.Tensor  # [B, V], of the token at position i
    nll: torch.Tensor  # [B, i], of the tokens before it


# --- Question and prompt, read once ----------------------------------------------------------------


def prefill_questions(engine, rows, batch_size=0):
    """The `Prefix` of position 0. batch_size: rows at once; 0: as many as fit."""
    context, logits = engine.prefill([row.question for row in rows], batch_size)
    return Prefix((), context, logits.log_softmax(-1), logits.new_zeros(len(rows), 0))


@torch.no_grad()
def prefix_at(engine, questions, tokens, known=None):
    """The `Prefix` behind `tokens`, read a token at a time: `known`, moved on, if it leads there, else a copy of
    `questions`, or these themselves where there are no tokens."""
    leads = known is not None and known.tokens == tokens[: len(known.tokens)]
    prefix = known if leads else questions
    if prefix is questions and tokens:
        everyone = list(range(len(questions.log_probs)))
        prefix = replace(questions, context=questions.context.select(everyone))
    for token in tokens[len(prefix.tokens) :]:
        ids = torch.full((len(prefix.log_probs), 1), token, device=engine.device)  # [B, 1]
        logits = engine.forward(prefix.context, ids)[:, 0]  # [B, V]
        prefix.nll = torch.cat([prefix.nll, -prefix.log_probs[:, token, None]], 1)  # [B, i + 1]
        prefix.log_probs = logits.log_softmax(-1)
        prefix.tokens += (token,)
    return prefix


# --- 1. Proposals (Eq. 3-4) ------------------------------------------------------------------------


def smallest_k(log_probs, samples):
    """[V]: from which k on a token is among the k most likely of every row of a sample (Eq. 4), of log_probs [B, V].
    samples: lists of row numbers, of which any will do."""
    per_sample = []
    for sample in samples:
        order = log_probs[sample].argsort(descending=True, stable=True)  # [Q, V]
        per_sample.append(1 + order.argsort().amax(0))  # of ranks [Q, V]; the likeliest token's is 0
    return torch.stack(per_sample).amin(0)


def propose_candidates(log_probs, samples, k, min_candidates, admit):
    """(candidate ids, k): proposals for a position, the most likely first.

    log_probs [B, V]: of the token at the position, -inf where none is allowed. admit(id): whether it may stand there.
    k grows by 2 until `min_candidates` are found. Errors: UserError when even all allowed tokens are not as many."""
    likelihood, candidates, enough = log_probs.mean(0), [], max(1, min_candidates)
    needed, tokens = smallest_k(log_probs, samples).sort(stable=True)  # those that are not allowed come last
    possible = int(likelihood.isfinite().sum())
    for token, needs in zip(tokens[:possible].tolist(), needed[:possible].tolist()):
        if needs > k and len(candidates) >= enough:
            break
        while k < needs:
            k += 2
        if admit(token):
            candidates.append(token)
    require(len(candidates) >= enough, f"only {len(candidates)} candidates are possible here: lower --min-candidates")
    return sorted(candidates, key=lambda token: (-likelihood[token].item(), token)), k


# --- 2. The loss behind the reasoning (Eq. 5-6) ----------------------------------------------------


def answer_loss(logits, rows, temperature):
    """(cross-entropy [B], wrong [B]) of the gold answers from logits [B, R, A, V] of the rows' reads.

    Of rows with choices: among these, from log-probabilities / temperature; wrong: another one is likelier. Else among
    all tokens, from logits / temperature, mean over the answer's; wrong: one of them is not the likeliest.
    """
    if rows[0].choices:
        gold = torch.tensor([row.gold for row in rows], device=logits.device)  # [B]
        log_probs = choice_log_probs(logits, rows[0].choices)  # [B, M]
        return F.cross_entropy(log_probs / temperature, gold, reduction="none"), log_probs.argmax(1) != gold
    logits = logits[:, 0]  # [B, A, V]: one read
    answers, real = pad([row.answer for row in rows], logits.device)  # [B, A]
    each = F.cross_entropy(logits.transpose(1, 2) / temperature, answers, reduction="none")  # [B, A]
    wrong = ((logits.argmax(-1) != answers) & real.bool()).any(1)
    return each.masked_fill(real == 0, 0).sum(1) / real.sum(1), wrong


def prompt_nll(before, here, logits, later_ids):
    """Mean negative log-likelihood [B] of a prompt in three parts: before [B, i], the nll of the tokens before position
    i; here [B], the log-probability of token i; logits [B, P - i - 1, V] of the later_ids [B, P - i - 1]."""
    log_probs = logits.log_softmax(-1).gather(2, later_ids[..., None])[..., 0]  # [B, P - i - 1]
    return (before.sum(1) - here - log_probs.sum(1)) / (before.shape[1] + 1 + later_ids.shape[1])


def fluency(nll, settings):
    """The fluency term [B]: the prompt's mean nll, or its exponential, the perplexity."""
    return nll.exp() if settings.fluency == "perplexity" else nll


def training_loss(cross_entropy, nll, settings):
    """What the gradient is taken of, per row [B]: cross-entropy + lambda * fluency (Eq. 7)."""
    return cross_entropy + settings.fluency_weight * fluency(nll, settings)


def row_objectives(cross_entropy, wrong, nll, settings):
    """Per row [B] what selection minimizes: the loss; or the released rule, error + lambda / 10 * fluency."""
    if settings.objective == "loss":
        return training_loss(cross_entropy, nll, settings)
    return wrong + settings.fluency_weight / 10 * fluency(nll, settings)


def objective_of(cross_entropy, wrong, nll, settings):
    """The mean of `row_objectives`."""
    return row_objectives(cross_entropy, wrong, nll, settings).mean().item()


# --- 3. The gradient over candidates (Eq. 7) -------------------------------------------------------


def candidate_gradients(search, prefix, prompt, candidates, reasoning):
    """(gradients [B, K], losses [B]): per row, of the `training_loss` with respect to the one-hot choice among
    `candidates` at the prefix's position, taken at the prompt's token there, which must be one of them. A more negative
    entry promises a lower loss. Earlier tokens do not depend on the choice, so the pass begins at that position."""
    engine, settings, position = search.engine, search.settings, len(prefix.tokens)
    later = len(prompt) - position - 1  # how many prompt tokens follow the choice
    chosen = candidates.index(prompt[position])
    # In float32 or better, lest half precision rounds the gradients of different tokens to the same.
    dtype = torch.promote_types(engine.model.dtype, torch.float32)
    candidate_ids = torch.tensor(candidates, device=engine.device)  # [K]
    embeddings = engine.embed(candidate_ids).to(dtype)  # [K, E]
    tails = [[*prompt[position:], *row.turn_end, *ids, *row.extractor] for row, ids in zip(search.rows, reasoning)]

    def run(numbers):
        rows = [search.rows[i] for i in numbers]
        reads = [row.reads for row in rows]
        count = len(reads[0])  # R
        ids, mask, columns = with_reads([tails[i] for i in numbers], reads, later, engine.device)  # [B * R, S]
        one_hot = torch.zeros(len(rows), len(candidates), dtype=dtype, device=engine.device)  # [B, K]
        one_hot[:, chosen] = 1
        one_hot.requires_grad_()
        choice = (one_hot @ embeddings).repeat_interleave(count, 0)  # [B, K] @ [K, E] -> [B * R, E]
        embedded = engine.embed(ids)  # [B * R, S, E]
        embedded = torch.cat([choice[:, None].to(embedded.dtype), embedded[:, 1:]], 1)  # [B * R, S, E]

        context = prefix.context.select([i for i in numbers for _ in range(count)])
        logits = engine.forward(context, embedded, mask, columns).unflatten(0, (-1, count))  # [B, R, later + A, V]
        cross_entropy, _ = answer_loss(logits[:, :, later:], rows, settings.loss_temperature)
        here = (one_hot * prefix.log_probs[numbers][:, candidate_ids]).sum(1)  # so its own probability counts
        nll = prompt_nll(prefix.nll[numbers], here, logits[:, 0, :later], ids[::count, 1 : 1 + later])
        losses = training_loss(cross_entropy, nll, settings)
        # The rows do not touch each other, so the gradient of the sum holds each row's own gradient.
        (gradient,) = torch.autograd.grad(losses.sum(), one_hot)  # [B, K]
        engine.counts["backward_tokens"] += ids.numel()
        return list(zip(gradient, losses.detach()))

    tokens = max(map(len, tails)) * len(search.rows[0].reads)  # of the longest row
    size = settings.gradient_batch_size or engine.rows_for_backward(tokens)
    # Rows of like length share a batch, so that little of it is padding.
    per_row = engine.over_rows(run, range(len(tails)), "gradient", size, cost=lambda i: len(tails[i]))
    gradients, losses = zip(*per_row)
    return torch.stack(gradients), torch.stack(losses)


def mean_gradients(search, prefix, prompt, candidates):
    """{token: gradient, mean over the rows}; empty where the shortlist does not need one."""
    if not search.settings.takes_gradient:
        return {}
    reasoning = search.reasoning
    if search.settings.gradient_without_reasoning:  # ablation (Fig. 3): question + prompt + extractor only
        reasoning = [[] for _ in search.rows]
    per_row, _ = candidate_gradients(search, prefix, prompt, candidates, reasoning)
    whole = finite_rows(per_row, f"the gradient is not finite at ids {list(prompt)}", search.engine.dtype_hint)
    return agreed(dict(zip(candidates, per_row[whole].cpu().double().mean(0).tolist())))


def make_shortlist(candidates, gradients, settings, rng):
    """The candidates to try for real: those with the most negative gradient, or as the ablations say."""
    if settings.shortlist == "all":
        return list(candidates)
    if settings.shortlist == "likeliest":
        return candidates[: settings.shortlist_size]
    if settings.shortlist == "random":
        return rng.sample(candidates, min(settings.shortlist_size, len(candidates)))
    return sorted(candidates, key=gradients.get)[: settings.shortlist_size]


# --- 4. Selection by the real loss (Sec. 3.2, Alg. 1) ----------------------------------------------


@dataclass
class Outcome:
    """One row's reasoning under one prompt, and what it is worth."""

    reasoning: list[int]
    cross_entropy: float
    wrong: bool
    nll: float


def reason_and_score(search, prefix, jobs):
    """An `Outcome` for each job (prompt, row number): the model reasons, then the answer behind its reasoning and the
    extractor is scored on the keys and values that generation left behind. Prompts have one length, and the prefix's
    tokens first."""
    engine, settings, position = search.engine, search.settings, len(prefix.tokens)
    later = len(jobs[0][0]) - position - 1  # how many prompt tokens follow the position

    @torch.inference_mode()
    def run(batch):
        numbers = [i for _, i in batch]
        rows = [search.rows[i] for i in numbers]
        heads = [[*row.question, *prefix.tokens] for row in rows]
        tails = [[*prompt[position:], *row.turn_end] for (prompt, _), row in zip(batch, rows)]
        # Logits that predict the prompt's later tokens, then the last ones, which predict the first of the reasoning.
        context, logits = engine.read_tails(prefix.context, numbers, heads, tails, later)  # [B, later + 1, V]
        tokens = torch.tensor([prompt[position:] for prompt, _ in batch], device=engine.device)  # [B, 1 + later]
        here = prefix.log_probs[numbers, tokens[:, 0]]  # [B]
        nll = prompt_nll(prefix.nll[numbers], here, logits[:, :later], tokens[:, 1:]).tolist()
        next_logits = logits[:, -1].clone()  # [B, V]
        del logits  # which are large where the vocabulary is

        outcomes = [None] * len(batch)
        for ended in engine.generate(context, next_logits, [settings.max_new_tokens] * len(batch)):
            ended_rows = [rows[n] for n in ended.rows]
            reads = [row.reads for row in ended_rows]
            answer_logits = read_answers(engine, ended.context, ended_rows[0].extractor, reads)  # [b, R, A, V]
            cross_entropy, wrong = answer_loss(answer_logits, ended_rows, settings.loss_temperature)
            for n, reasoning, loss, is_wrong in zip(ended.rows, ended.ids, cross_entropy.tolist(), wrong.tolist()):
                outcomes[n] = Outcome(reasoning, loss, is_wrong, nll[n])
        return outcomes

    around = max(row.behind for row in search.rows) + 1
    columns_kept = prefix.context.mask.shape[1] + 1 + later + around + settings.max_new_tokens
    engine.require_positions(columns_kept)
    size = settings.batch_size or engine.rows_that_fit(columns_kept, 1 + later)
    return engine.over_rows(run, jobs, "generation", size, cost=lambda job: search.rows[job[1]].length)


def score_prompts(search, prefix, prompts):
    """[(Score, reasoning of each row)] of prompts of one length, tuples of ids that begin with the prefix's, as one
    job."""
    numbers, scored = range(len(search.rows)), []
    jobs = [(prompt, i) for prompt in prompts for i in numbers]
    outcomes = dict(zip(jobs, reason_and_score(search, prefix, jobs)))
    for prompt in prompts:
        own = [outcomes[prompt, i] for i in numbers]
        scored.append((score_of_rows(search, prompt, own), [outcome.reasoning for outcome in own]))
    return agreed(scored)


def score_of_rows(search, prompt, outcomes):
    """The `Score` of a prompt from the `Outcome` of each row."""
    values = torch.tensor([[o.cross_entropy, o.wrong, o.nll] for o in outcomes], dtype=torch.float64)  # [N, 3]
    not_finite, hint = f"the loss is not finite under prompt ids {list(prompt)}", search.engine.dtype_hint
    whole = values[finite_rows(values, not_finite, hint)]
    objective = objective_of(*whole.unbind(1), search.settings)
    require(math.isfinite(objective), f"{not_finite}.{hint}")
    reasonings = [outcome.reasoning for outcome in outcomes]
    objectives = row_objectives(*values.unbind(1), search.settings).tolist()
    rows = row_outcomes(reasonings, [outcome.wrong for outcome in outcomes], objectives)
    return Score(tuple(prompt), *whole.mean(0).tolist(), objective, sum(map(len, reasonings)), rows=rows)


def select_candidate(search, prefix, tried, incumbent, forced=None):
    """Score the `tried` prompts that have no score yet, make the best of all the current one, and return those scored.

    incumbent: the score that competes with them, or None. forced: the prompt that wins whatever its score.
    """
    new = [prompt for prompt in tried if prompt not in search.scores]  # nothing is scored twice
    reasonings = {}
    for score, reasoning in score_prompts(search, prefix, new) if new else ():
        search.scores[score.prompt_ids] = score
        reasonings[score.prompt_ids] = reasoning
    rivals = [] if incumbent is None else [incumbent]
    rivals += [search.scores[prompt] for prompt in tried]
    if search.settings.ties == "last":
        rivals.reverse()
    winner = search.scores[forced] if forced else min(rivals, key=lambda score: score.objective)
    if winner.prompt_ids in reasonings:
        search.reasoning = reasonings[winner.prompt_ids]
    elif winner is not search.current:  # scored in an earlier step, so its reasoning is no longer at hand
        ((_, search.reasoning),) = score_prompts(search, prefix, [winner.prompt_ids])
    search.current = winner
    return new


def forced_end(search, shortlist, position):
    """The shortlisted full stop that the released code takes whatever its score, in the second half; else None."""
    if search.settings.force_sentence_end and position >= len(search.initial) / 2:
        return next((token for token in shortlist if "." in search.engine.tokenizer.decode([token])), None)
    return None


# --- The walk over the positions (Alg. 1) ----------------------------------------------------------


def next_position(tokenizer, prompt, position, max_prompt_tokens):
    """The position after `position`, 0 after None. Behind the last one an open prompt grows (the position equals its
    length); a closed or full prompt is walked again from its start."""
    if position is None:
        return 0
    if position + 1 < len(prompt):
        return position + 1
    closed = ends_sentence(tokenizer, prompt) or len(prompt) >= max_prompt_tokens
    return 0 if closed else len(prompt)


def position_behind(search, last):
    """The position at which the search goes on behind a `Step`. Where all positions are searched at once it is 0, from
    where they are scored, unless the prompt grows."""
    prompt, settings = last.prompt_ids, search.settings
    position = len(prompt) - 1 if settings.positions == "all" else last.position
    return next_position(search.engine.tokenizer, prompt, position, settings.max_prompt_tokens)


def generator_of(settings, step, purpose):
    """One per (seed, step, purpose): a resumed run draws what an uninterrupted one draws."""
    return random.Random(f"{settings.seed}/{step}/{purpose}")


def proposals(search, prefix, step, admit):
    """(candidate ids, k) at the prefix's position, from rows drawn for the step. admit: as of `propose_candidates`."""
    settings, count = search.settings, len(search.rows)
    rng, size = generator_of(settings, step, "proposal"), min(settings.sampled_rows, count)
    samples = [rng.sample(range(count), size) for _ in range(settings.intersections)]
    log_probs = prefix.log_probs.masked_fill(~search.allowed, float("-inf"))
    before = [*search.rows[0].question, *prefix.tokens][-1]
    likeliest = log_probs.mean(0).argmax().item()  # a piece of a word only where the model itself would write it

    def may_stand(token):
        any_token = not settings.word_starts or token == likeliest
        return (any_token or not continues_word(search.engine.tokenizer, before, token)) and admit(token)

    return agreed(propose_candidates(log_probs, samples, settings.top_k, settings.min_candidates, may_stand))


def search_step(search, prefix, step):
    """Steps 1-4 of the method at the prefix's position: the `Step` taken."""
    settings, tokenizer, prompt = search.settings, search.engine.tokenizer, search.current.prompt_ids
    position = len(prefix.tokens)
    grows = position == len(prompt)  # behind the last token: there is none to replace
    incumbent = None if grows else prompt[position]
    seconds = {}

    def with_token(token):
        return (*prefix.tokens, token, *prompt[position + 1 :])

    def admit(token):
        return token != incumbent and survives_encoding(tokenizer, search.rows[0], with_token(token))

    with timed(seconds, "propose"):
        candidates, k = proposals(search, prefix, step, admit)

    with timed(seconds, "gradient"):
        # A growing prompt has no token here yet: the gradient is taken at the likeliest proposal.
        start = with_token(candidates[0] if grows else incumbent)
        compared = candidates if grows else [*candidates, incumbent]
        gradients = mean_gradients(search, prefix, start, compared)
        shortlist = make_shortlist(candidates, gradients, settings, generator_of(settings, step, "shortlist"))
        forced = forced_end(search, shortlist, position)
        if forced is not None:
            shortlist = shortlist[: shortlist.index(forced) + 1]

    with timed(seconds, "select"):
        tried = {token: with_token(token) for token in shortlist}
        new = select_candidate(search, prefix, [*tried.values()], None if grows else search.current, tried.get(forced))

    return Step(
        **vars(search.current),
        step=step,
        position=position,
        seconds=seconds,
        k=k,
        grows=grows,
        candidates=[Candidate(token, gradients.get(token)) for token in compared],
        shortlist=[Tried(**vars(search.scores[ids]), token=token, new=ids in new) for token, ids in tried.items()],
    )


def optimize(engine, rows, prompt, settings, history=(), visit=search_step):
    """Search a prompt (Alg. 1) from its initial ids: yields a `Step` per position visited; step 0 is the start.

    history: the steps of an interrupted run; the search goes on behind them to the same result. visit: how a step is
    taken, `search_step` or beyond_paper.visit, which some settings need: without it these are a ValueError."""
    if settings.beyond_paper and visit is search_step:
        raise ValueError(f"beyond_paper.visit takes the steps of these settings: {settings.beyond_paper}")
    engine.counts, engine.batch_sizes = Counter(), {}
    allowed = torch.zeros(engine.model.get_input_embeddings().num_embeddings, dtype=torch.bool)
    allowed[allowed_ids(engine.tokenizer, len(allowed))] = True
    search = Search(engine, rows, settings, allowed.to(engine.device), tuple(prompt))
    seconds = {}
    with timed(seconds, "select"):
        questions = prefix = prefill_questions(engine, rows, settings.batch_size)
        if not history:
            select_candidate(search, questions, [search.initial], None)
    if history:
        prefix, last = resume(search, questions, history), history[-1]
    else:
        last = Step(**vars(search.current), step=0, position=None, seconds=seconds)
        yield described(last, engine, rows[0], search.scores)

    for step in range(last.step + 1, settings.steps + 1):
        position = position_behind(search, last)
        prefix = prefix_at(engine, questions, last.prompt_ids[:position], known=prefix)
        last = visit(search, prefix, step)
        yield described(last, engine, rows[0], search.scores)


def resume(search, questions, history):
    """Bring a search to where its history ends: the `Prefix` that the interrupted run had.

    The current prompt's reasoning is generated in the very job that first gave it: the same batches give the same bits
    on the same machine. Errors: UserError if the recorded objective does not come back."""
    engine, last = search.engine, history[-1]
    search.scores = scores_of(history)
    first, job = last_job(history)
    engine.batch_sizes = dict(history[first - 1].batch_sizes if first else {})
    prefix = prefix_at(engine, questions, last.prompt_ids[: history[first].position or 0])
    again, search.reasoning = score_prompts(search, prefix, job)[job.index(last.prompt_ids)]
    if abs(again.objective - last.objective) > 1e-3 * max(1.0, abs(again.objective)):
        raise UserError(
            f"the recorded objective {last.objective:.4f} comes out as {again.objective:.4f} here: "
            "another machine or library; start a new run with another --run-dir"
        )
    search.current = search.scores[last.prompt_ids]
    # Where the last step stood: what is read behind that the search reads, and counts, itself.
    prefix = prefix_at(engine, questions, last.prompt_ids[: last.position or 0])
    engine.counts, engine.batch_sizes = Counter(last.totals), dict(last.batch_sizes)
    return prefix

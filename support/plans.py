"""What a text method takes, known before it begins: prompts to score, requests to the optimizer, its replies.

The numbers are those of a run in which every reply gives a good and new prompt and every prompt makes mistakes; others
take less. Works without torch.
"""

import math
from dataclasses import dataclass

STALLED = 10  # rounds without a new prompt


@dataclass(frozen=True)
class Calls:
    prompts: int = 0  # scored, on all training rows
    requests: int = 0  # to the optimizer
    samples: int = 0  # its replies

    def __add__(self, other):
        return Calls(self.prompts + other.prompts, self.requests + other.requests, self.samples + other.samples)


def start_calls(settings, seeds):
    """The `Calls` of the start with so many given prompts. settings: settings.TextSettings."""
    if settings.method == "ape":
        guesses = settings.groups * settings.guesses
        return Calls(seeds + guesses, settings.groups, guesses)
    if settings.method.startswith("evoprompt"):
        rewordings = settings.beam - min(seeds, max(1, settings.beam // 2))
        return Calls(seeds + rewordings, rewordings, rewordings)
    return Calls(seeds)


def round_calls(settings, pool):
    """The `Calls` of a round in which so many prompts are kept."""
    count = settings.samples
    if settings.method == "opro":
        return Calls(count, 1, count)
    if settings.method.startswith("gpo"):
        notes = int(settings.retrieval == "summary")
        return Calls(count, 1 + notes, count + notes)
    if settings.method == "ape":
        return Calls(pool * count, pool, pool * count)
    if settings.method == "apo":
        groups, sources = settings.groups, settings.groups + 1
        rewordings = sources * settings.paraphrases
        requests = 2 * groups + (sources if rewordings else 0)
        prompts = pool * min(settings.children, groups + rewordings)
        if settings.bandit:  # its answers, as prompts on all rows, and the prompts that it lets through
            prompts = min(prompts, math.ceil(settings.bandit / settings.train_rows) + settings.beam)
        return Calls(prompts, pool * requests, pool * (2 * groups + rewordings))
    if settings.method == "pe2":
        return Calls(pool * count, 2 * pool * count, 2 * pool * count)
    if settings.method == "textgrad":
        requests = 2 * settings.errors + 1
        return Calls(1, requests, requests)
    if settings.method.startswith("evoprompt"):
        return Calls(settings.beam, settings.beam, settings.beam)
    return Calls(count, 0, count)  # random: no optimizer is asked


def planned(settings, seeds, rounds):
    """[`Calls` from the start up to and with round n], n from 0, with so many given prompts."""
    total, limit = start_calls(settings, seeds), settings.beam or 1
    sums, pool = [total], min(limit, total.prompts)
    for _ in range(rounds):
        calls = round_calls(settings, pool)
        total, pool = total + calls, min(limit, pool + calls.prompts)
        sums.append(total)
    return sums


def rounds_within(settings, seeds, rows):
    """How many rounds the budget holds on so many training rows, at least one."""
    prompts = settings.budget // rows
    sums = planned(settings, seeds, prompts)
    return max(1, sum(calls.prompts <= prompts for calls in sums) - 1)


def rounds_over(settings, steps, rows):
    """Whether a search on so many rows is over behind its `TextStep`s: they are all of its rounds, the budget holds no
    other prompt, or, where only a budget ends it, there was no new prompt in the last `STALLED` rounds."""
    last = steps[-1]
    without_new = next((n for n, step in enumerate(reversed(steps)) if step.proposed), len(steps))
    if settings.rounds is None and without_new >= STALLED:
        return True
    spent = settings.budget and last.totals["scored_generations"] + rows > settings.budget
    return bool(last.step == settings.rounds or spent)

"""Optimizers that work in text: a model reads prompts, scores or mistakes, and writes new prompts.

All of them share one loop, `optimize`: propose prompts, score them on the training rows, keep some. A method is what it
proposes and what it keeps. A section each, with its whole meta-prompt in our own words:

    OPRO (Yang et al. 2023), GPO (Tang et al. 2024), APE (Zhou et al. 2022), APO or ProTeGi (Pryzant et al. 2023),
    PE2 (Ye et al. 2023), TextGrad (Yuksekgonul et al. 2024), EvoPrompt (Guo et al. 2023), and random prompts,
    the baseline without any feedback.

One frame for all, so that they can be compared: the same training rows score (accuracy, `paper` reading, greedy) and
give examples and mistakes; a prompt stands where the task has it; a reply gives its prompt between the same tags; a
reply that gives none is lost, and the run goes on. Where that differs from a publication, docs/text_optimizers.md says
so. What is asked and scored is on disk before it is used (support/trials.py). Works without torch.
"""

import random
from collections import Counter
from dataclasses import dataclass, field

from support.replies import COPIED, REPEATED, Judge, parse
from support.runs import Scored, TextStep, timed
from support.settings import TITLES
from support.trials import Trials

MARK = "<PROMPT HERE>"  # where the prompt stands in a question that is shown
RULES = "It must suit every question of this task, so it holds no answer and nothing taken from a single question."
REPLY = "Reply with the prompt alone, in this form: <prompt>text of the prompt</prompt>"
LONGEST_SHOWN = 600  # characters of a reasoning that is shown
STALLED = 10  # rounds without a new prompt after which only a budget would end a run
LEAST_GOOD = 0.5  # share of the replies: below it the optimizer is unfit
PROMPT_TOKENS = 48  # of a random prompt, at most


# --- The loop: propose, score, keep ------------------------------------------------------------------


@dataclass
class Search:
    """A search: what it works with, every prompt it has scored, and what it keeps."""

    trials: Trials
    judge: Judge
    seeds: list[str]  # prompts to start from, the initial one first
    rounds: int  # planned
    archive: dict[str, Scored] = field(default_factory=dict)
    pool: list[Scored] = field(default_factory=list)
    step: int = 0
    replies: Counter = field(default_factory=Counter)  # see runs.TextStep
    notes: str = ""  # of GPO's summary

    @property
    def settings(self):
        return self.trials.settings

    def rng(self, purpose):
        """A generator for each (seed, step, purpose)."""
        return random.Random(f"{self.settings.seed}/{self.step}/{purpose}")

    def draw_rows(self, count, purpose):
        rows = self.trials.rows
        return self.rng(purpose).sample(rows, min(count, len(rows)))

    def write_prompts(self, chats, samples=1, temperature=None):
        """The prompts that the optimizer writes to chats, `samples` to each, in order; None for a lost reply."""
        temperature = self.settings.optimizer_temperature if temperature is None else temperature
        replies = self.trials.ask(chats, samples, temperature)
        return self.accept([reply for some in replies for reply in some])

    def accept(self, replies):
        """The prompt in each reply, None for one that is refused; all are counted."""
        prompts = []
        for reply in replies:
            prompt, in_tags = parse(reply)
            refusal = self.judge.refusal(prompt)
            known = prompt in self.archive or prompt in prompts
            outcome = refusal or (REPEATED if known else "new")
            self.replies.update(["all", outcome] + ["in tags"] * in_tags)
            prompts.append(None if refusal else prompt)
        return prompts

    def score(self, prompt):
        """The `Scored` prompt, None if the budget does not hold it."""
        if prompt not in self.archive:
            if not self.trials.affords(prompt):
                return None
            accuracy = self.trials.accuracy(prompt)
            tokens = sum(prediction["tokens"] for prediction in self.trials.scored[prompt])
            self.archive[prompt] = Scored(prompt, accuracy, tokens, self.step)
        return self.archive[prompt]

    def top(self, count):
        """The best of all prompts so far; of equals the first."""
        return best_of(self.archive.values(), count)


def best_of(scored, count):
    return sorted(scored, key=lambda one: -one.accuracy)[:count]


def optimize(method, search):
    """Run a `Method`: yields a `TextStep` per round; step 0 is the start. Ends behind the last round, when the budget
    holds no other prompt, or, without a number of rounds, when nothing new has come for long."""
    settings, last_new = search.settings, 0
    while True:
        seconds = {}
        before = len(search.archive)
        with timed(seconds, "propose"):
            proposed = method.propose(search) if search.step else search.seeds + method.begin(search)
        with timed(seconds, "score"):
            scored = [None if prompt is None else search.score(prompt) for prompt in proposed]
            search.pool = method.keep(search, scored)
        new = list(search.archive.values())[before:]
        yield TextStep(
            step=search.step,
            proposed=new,
            pool=[kept.prompt for kept in search.pool],
            best=search.top(1)[0],
            replies=dict(search.replies),
            totals=dict(search.trials.totals),
            seconds=seconds,
        )
        last_new = search.step if new else last_new
        stalled = settings.rounds is None and search.step - last_new >= STALLED
        if search.step == settings.rounds or stalled or not search.trials.affords(None):
            return
        search.step += 1


class Method:
    """What a method does in the loop. `calls` and `first_calls` say what that takes, so that it is known beforehand."""

    meta_prompts = ()  # templates, which no reply may copy

    def begin(self, search):
        """Prompts to start from besides the given ones."""
        return []

    def propose(self, search):
        """New prompts, None in the place of one that was lost."""
        raise NotImplementedError

    def keep(self, search, scored):
        """The pool after a round. scored: a `Scored`, or None, for each proposal; at the start the first pool."""
        return search.top(search.settings.beam)

    def first_calls(self, settings, seeds):
        """The `Calls` of the start, with so many given prompts."""
        return Calls(seeds)

    def calls(self, settings, pool):
        """The `Calls` of a round in which so many prompts are kept, if every prompt is good and new."""
        raise NotImplementedError


@dataclass(frozen=True)
class Calls:
    prompts: int = 0  # scored, on all training rows
    requests: int = 0  # to the optimizer
    samples: int = 0  # its replies

    def __add__(self, other):
        return Calls(self.prompts + other.prompts, self.requests + other.requests, self.samples + other.samples)


def planned(method, settings, seeds, rounds):
    """[`Calls` from the start on, with so many given prompts, up to and with round n], n from 0."""
    total = method.first_calls(settings, seeds)
    sums, pool = [total], min(settings.beam or 1, total.prompts)
    for _ in range(rounds):
        calls = method.calls(settings, pool)
        total, pool = total + calls, min(settings.beam or 1, pool + calls.prompts)
        sums.append(total)
    return sums


def rounds_within(method, settings, seeds, rows):
    """How many rounds the budget holds on so many training rows if every prompt is good and new; at least one."""
    prompts = settings.budget // rows
    sums = planned(method, settings, seeds, prompts)
    return max(1, sum(calls.prompts <= prompts for calls in sums) - 1)


def summary(steps, settings):
    """Lines on how the optimizer did in the whole run, with warnings where that says something about the search."""
    replies, totals = Counter(steps[-1].replies), steps[-1].totals
    count = replies["all"]
    line = f"{TITLES[settings.method]}: {totals['scored_generations']} scored generations"
    if not count:
        return [f"{line}, no reply of an optimizer"]
    good = replies["new"] + replies[REPEATED]
    lines = [
        f"{line}, {totals['optimizer_requests']} requests to the optimizer, which read "
        f"{totals['optimizer_prompt_tokens']} tokens and wrote {totals['optimizer_tokens']}",
        f"  {good} of {count} replies gave a prompt ({100 * good / count:.0f} %), {replies['in tags']} in tags",
    ]
    others = [f"{number} {outcome}" for outcome, number in replies.items() if outcome not in ("all", "new", "in tags")]
    lines += [f"  not new: {', '.join(others)}"] if others else []
    if good < LEAST_GOOD * count:
        lines.append("  warning: most replies gave no prompt, so the result says little about the method")
    if replies[REPEATED] > LEAST_GOOD * count:
        lines.append("  warning: the optimizer mostly repeated prompts that were scored before")
    if replies[COPIED] > LEAST_GOOD * count:
        lines.append("  warning: the optimizer mostly copied the meta-prompt")
    if steps[-1].step and not any(step.proposed for step in steps[1:]):
        lines.append("  warning: no round gave a new prompt")
    return lines


def show_row(search, row):
    return f"Input:\n{search.trials.task.user_turn(row['question'], MARK)}\nRight answer: {row['answer']}"


def show_rows(search, rows):
    return "\n\n".join(show_row(search, row) for row in rows)


def show_cases(search, cases):
    """(row, prediction) pairs: what was asked, what the model wrote, what is right."""
    blocks = []
    for row, prediction in cases:
        written = f"The model wrote: {shortened(prediction['text'])}\nIts answer: {prediction['answer']}"
        blocks.append(f"Question: {row['question']}\n{written}\nRight answer: {row['answer']}")
    return "\n\n".join(blocks)


def shortened(text):
    """Head and tail of a long text."""
    half = LONGEST_SHOWN // 2
    return text if len(text) <= LONGEST_SHOWN else f"{text[:half]} [...] {text[-half:]}"


def show_scored(scored):
    """Prompts with their accuracies, the last one last."""
    return "\n\n".join(f"Prompt: {one.prompt}\nAccuracy: {round(100 * one.accuracy)}" for one in scored)


# --- OPRO: a list of the best prompts with their scores, to be continued upwards -----------------------

OPRO_META = f"""Here are prompts that were tried for one task, with the accuracy, from 0 to 100, that a language model \
reached with each. They stand in rising order, so the last are the best.

{{earlier}}

Some questions of the task follow. {MARK} marks the place of the prompt. The model reads all of it, reasons, and is \
counted as right if it arrives at the right answer.

{{examples}}

Think of one new prompt. It shall be different from every prompt above and reach a higher accuracy than all of them. \
{RULES}
{REPLY}"""


class Opro(Method):
    """The trajectory is the memory: the best 20 prompts of all rounds, worst first, and three examples drawn anew."""

    meta_prompts = (OPRO_META,)

    def propose(self, search):
        settings = search.settings
        examples = show_rows(search, search.draw_rows(settings.exemplars, "exemplars"))
        meta = OPRO_META.format(earlier=show_scored(reversed(search.pool)), examples=examples)
        return search.write_prompts([[meta]], settings.samples)

    def keep(self, search, scored):
        shown = search.top(search.settings.shown)
        above = [one for one in shown if one.accuracy >= search.settings.least_accuracy]
        return above or shown  # where all are below the threshold it would hide everything

    def calls(self, settings, pool):
        return Calls(settings.samples, 1, settings.samples)


METHODS = {"opro": Opro()}

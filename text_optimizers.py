"""Optimizers that work in text: a model reads prompts, scores or mistakes, and writes new prompts.

All share one loop, `optimize`: propose prompts, score them on the training rows, keep some. A method is what it
proposes and keeps. Each has a section here, with its whole meta-prompt in our own words: OPRO (Yang et al. 2023), GPO
(Tang et al. 2024), APE (Zhou et al. 2022), APO or ProTeGi (Pryzant et al. 2023), PE2 (Ye et al. 2023), TextGrad
(Yuksekgonul et al. 2024), EvoPrompt (Guo et al. 2023), and random prompts, the baseline without feedback.

So that they can be compared, one frame holds all: the same training rows score (accuracy, `paper` reading, greedy) and
give examples and mistakes; a prompt stands where the task has it; a reply gives it between the same tags, and one that
gives none is lost. docs/text_optimizers.md says where that differs from the publications. `Search`, what is asked and
what is scored are in support/trials.py. Works without torch.
"""

import math
import re

from support.plans import rounds_over
from support.proposals import MARK
from support.runs import TextStep, timed
from support.trials import best_of, distinct, promising, shortened, show_cases, show_scored

RULES = "It must suit every question of this task, so do not repeat a question or an answer in it."
REPLY = "Reply with the instruction alone, in this form: <prompt>text of the instruction</prompt>"
FIRST_SENTENCE, PROMPT_TOKENS = re.compile(r"[^\n.!?]*[.!?]?"), 48  # of random prompts


# --- The loop: propose, score, keep ------------------------------------------------------------------


def optimize(method, search):
    """Run a `Method`: yields a `TextStep` per round; step 0 is the start. Ends where plans.rounds_over says so."""
    steps = []
    while not (steps and rounds_over(search.settings, steps, len(search.trials.rows))):
        search.step = len(steps)
        seconds, before = {}, len(search.archive)
        with timed(seconds, "propose"):
            proposed = method.propose(search) if search.step else search.seeds + method.begin(search)
        with timed(seconds, "score"):
            scored = [None if prompt is None else search.score(prompt) for prompt in proposed]
            search.pool = method.keep(search, scored)
        new = list(search.archive.values())[before:]
        step = TextStep(
            step=search.step,
            proposed=new,
            pool=[kept.prompt for kept in search.pool],
            best=search.top(1)[0],
            replies=dict(search.replies),
            totals=dict(search.trials.totals),
            seconds=seconds,
        )
        steps.append(step)
        yield step


class Method:
    """What a method does in the loop; support/plans.py says beforehand what that takes. `propose(search)` gives new
    prompts, None in the place of one that was lost."""

    meta_prompts = ()  # templates, which no reply may copy

    def begin(self, search):
        """Prompts to start from besides the given ones."""
        return []

    def keep(self, search, scored):
        """The pool after a round. scored: a `Scored`, or None, for each proposal; at the start the first pool."""
        return search.top(search.settings.beam)


# --- OPRO: a list of the best prompts with their scores, to be continued upwards -----------------------

OPRO_META = f"""Here are instructions that were tried for one task, with the accuracy, from 0 to 100, that a language \
model reached with each. They stand in rising order, so the last are the best.

{{earlier}}

Some questions of the task follow. {MARK} marks the place of the instruction. The model reads all of it, reasons, and \
is counted as right if it arrives at the right answer.

{{examples}}

Write one new instruction that tells the model how to work on such questions. It shall be different from those above \
and lead to a higher accuracy. {RULES}
{REPLY}"""


class Opro(Method):
    """The trajectory is the memory: the best 20 prompts of all rounds, worst first, and three examples drawn anew."""

    meta_prompts = (OPRO_META,)

    def propose(self, search):
        settings = search.settings
        examples = search.trials.show_rows(search.draw_rows(settings.exemplars, "exemplars"))
        meta = search.trials.worded(OPRO_META).format(earlier=show_scored(reversed(search.pool)), examples=examples)
        return search.write_prompts([[meta]], settings.samples)

    def keep(self, search, scored):
        shown = search.top(search.settings.shown)
        above = [one for one in shown if one.accuracy >= search.settings.least_accuracy]
        return above or shown  # where all are below the threshold it would hide everything


# --- GPO: memory like momentum, a bound on the change like a learning rate ------------------------------

GPO_META = f"""A language model works on a task with an instruction that can be improved.

{{memory}}

The current instruction: {{current}}

{MARK} marks the place of the instruction in the questions below. With a good one the model's reasoning ends at the \
right answer.

{{examples}}

{{request}} {{limit}}{RULES}
{REPLY}"""
GPO_MEMORY = "Earlier instructions and the accuracy that each reached, from 0 to 100; higher is better:\n\n{earlier}"
GPO_REQUESTS = {
    "generate": "Study what is known of the instructions so far and write a new one that does better than all of them.",
    "edit": "Improve the current instruction: change what holds it back and leave the rest as it is.",
}
GPO_SUMMARY = """Instructions for one task are improved step by step, and notes are kept on what helps.

Notes so far: {notes}
The latest instruction, with an accuracy of {accuracy} in 100: {prompt}

Write the notes anew, in at most three sentences: what seems to raise the accuracy, and what to lower it?"""
MOST_WORDS, LEAST_WORDS = 50, 10  # that may change, in the first rounds and in the last


def word_limit(schedule, step, rounds):
    """How many words may change in round `step`, counted from 1, of so many; None where nothing limits them."""
    done = min(1.0, step / rounds)
    left = {"cosine": (1 + math.cos(math.pi * done)) / 2, "linear": 1 - done, "fixed": 1.0, "none": None}[schedule]
    return None if left is None else int(LEAST_WORDS + (MOST_WORDS - LEAST_WORDS) * left)


class Gpo(Method):
    """The pool is the trajectory: the winner of each round, the current one last. It always moves on, also downhill."""

    meta_prompts = (GPO_META, GPO_SUMMARY, *GPO_REQUESTS.values())

    def propose(self, search):
        settings, current = search.settings, search.pool[-1]
        if settings.retrieval == "summary":
            accuracy, notes = round(100 * current.accuracy), search.notes or "none"
            asked = GPO_SUMMARY.format(notes=notes, prompt=current.prompt, accuracy=accuracy)
            [[search.notes]] = search.trials.ask([[asked]], purpose="notes")
            memory = f"What was learned from the prompts so far: {shortened(search.notes)}"
        else:
            memory = GPO_MEMORY.format(earlier=show_scored(self.retrieve(search)))
        words = word_limit(settings.word_schedule, search.step, search.rounds)
        meta = search.trials.worded(GPO_META).format(
            memory=memory,
            current=current.prompt,
            examples=search.trials.show_rows(search.draw_rows(settings.exemplars, "exemplars")),
            request=GPO_REQUESTS[settings.refinement],
            limit=f"Up to {words} words may differ from the current instruction. " if words else "",
        )
        return search.write_prompts([[meta]], settings.samples)

    def retrieve(self, search):
        """The current prompt, last, behind those of the trajectory that it is to be compared with, the nearest last."""
        settings, current = search.settings, search.pool[-1]
        earlier = [one for one in distinct(search.pool) if one != current]
        count = settings.shown - 1
        if settings.retrieval == "none" or not count or not earlier:
            return [current]
        if settings.retrieval == "importance":
            chosen = best_of(earlier, count)[::-1]
        elif settings.retrieval == "recency":
            chosen = earlier[-count:]
        else:
            likeness = dict(zip(earlier, search.trials.similarities(current.prompt, [one.prompt for one in earlier])))
            chosen = sorted(earlier, key=likeness.get)[-count:]
        return [*chosen, current]

    def keep(self, search, scored):
        if not search.step:
            return best_of(distinct(scored), len(scored))[::-1]
        candidates = [one for one in distinct(scored) if one not in search.pool] or distinct(scored)
        return search.pool + best_of(candidates, 1)


# --- APE: guess the instruction from its results, then reword the best ---------------------------------

APE_GUESS = f"""A helper was given one instruction and followed it. For each of these inputs, where {MARK} stands for \
the instruction, the helper came to the answer below it.

{{examples}}

What may the instruction have been? {RULES}
{REPLY}"""
REWORD = f"""Say this instruction in other words, so that it still asks for the same: {{prompt}}

{REPLY}"""
GUESS_TEMPERATURE = 0.9


def reword(search, prompts, samples=1):
    """Rewordings of prompts, `samples` of each in succession; None for a lost one."""
    return search.write_prompts([[REWORD.format(prompt=prompt)] for prompt in prompts], samples)


class Ape(Method):
    """No scores and no mistakes are shown: guesses at first, then rewordings of the best prompts."""

    meta_prompts = (APE_GUESS, REWORD)

    def begin(self, search):
        settings, chats = search.settings, []
        for group in range(settings.groups):
            rows = search.draw_rows(settings.exemplars, f"examples {group}")
            chats.append([APE_GUESS.format(examples=search.trials.show_rows(rows))])
        return search.write_prompts(chats, settings.guesses, GUESS_TEMPERATURE)

    def propose(self, search):
        return reword(search, [kept.prompt for kept in search.pool], search.settings.samples)


# --- APO, also called ProTeGi: a reason for the mistakes is the gradient, an edit the step --------------

APO_CASES = f"""I write an instruction that tells a language model how to work on the questions of a task. {MARK} is \
its place:

{{place}}

My instruction is now: {{prompt}}
With it the model got these questions wrong:

{{cases}}"""
APO_REASON = f"""{APO_CASES}

Name one weakness of the instruction that can explain these mistakes, in one or two sentences. Do not write one yet."""
APO_EDIT = f"""{APO_CASES}

What seems to be wrong with the instruction: {{reason}}

Write a better instruction, with this mended. {RULES}
{REPLY}"""


class Apo(Method):
    """For each kept prompt: groups of its mistakes, a reason for each group, an edit for each reason, rewordings."""

    meta_prompts = (APO_REASON, APO_EDIT, REWORD)

    def propose(self, search):
        batch = [row["id"] for row in search.draw_rows(search.settings.minibatch, "minibatch")]
        children = []
        for number, kept in enumerate(search.pool):
            children += self.children_of(search, kept.prompt, batch, search.rng(f"parent {number}"))
        return promising(search, children)

    def children_of(self, search, prompt, batch, rng):
        """Some of a prompt's edits and rewordings. batch: ids of the rows whose mistakes count; rng: draws."""
        settings = search.settings
        wrong = [case for case in search.trials.mistakes(prompt) if case[0]["id"] in batch]
        groups = []
        for _ in range(settings.groups if wrong else 0):  # without a mistake there is nothing to explain
            cases = show_cases(rng.sample(wrong, min(settings.errors, len(wrong))))
            groups.append({"prompt": prompt, "place": search.trials.place(), "cases": cases})
        ask_reason, ask_edit = map(search.trials.worded, (APO_REASON, APO_EDIT))
        chats = [[ask_reason.format(**group)] for group in groups]
        reasons = search.trials.ask(chats, 1, settings.optimizer_temperature, "reason")
        chats = [[ask_edit.format(**group, reason=shortened(reason))] for group, [reason] in zip(groups, reasons)]
        edits = [edit for edit in search.write_prompts(chats) if edit]
        new = dict.fromkeys(edits + reword(search, [prompt, *edits], settings.paraphrases))
        unseen = [child for child in new if child and child not in search.archive]
        return rng.sample(unseen, min(settings.children, len(unseen)))


# --- PE2: the optimizer fills in a form on each case before it writes -----------------------------------

PE2_PLAN = """An instruction is a short text that is given to a language model together with a question, so that the \
model works on the question as it should. We improve one in two steps. First I show you the instruction, how it is \
joined to a question, and some cases, and you examine each case. Then I ask you for the refined instruction."""
PE2_AGREED = "Understood. Show me the instruction and the cases, and I examine them one by one."
PE2_FORM = """The instruction: {prompt}
What the model reads, with the instruction in its place: {place}

The cases:

{cases}

The right answers are beyond doubt. For each case say in a few words:
1. Is the model's answer right? If not, what went wrong?
2. Does what the model wrote follow the instruction?
3. Does the instruction say well enough what the task is?
4. Must the instruction change for this case, and how exactly?"""
PE2_REFINE = f"""Now refine the instruction by what you found. The current instruction: {{prompt}}

Avoid mistakes as in the cases above. Keep it short, below fifty words. {RULES}
{REPLY}"""
EXAMINE_TEMPERATURE = 0.5


class Pe2(Method):
    """Each new prompt has its own two cases and its own conversation of two rounds."""

    meta_prompts = (PE2_PLAN, PE2_FORM, PE2_REFINE)

    def propose(self, search):
        settings, chats, parents = search.settings, [], []
        for number, kept in enumerate(search.pool):
            rng = search.rng(f"mistakes {number}")
            # Without a mistake cases that are right show what the prompt is good for.
            cases = search.trials.mistakes(kept.prompt) or search.trials.cases(kept.prompt)
            place = search.trials.place(kept.prompt)
            for _ in range(settings.samples):
                shown = show_cases(rng.sample(cases, min(settings.errors, len(cases))))
                form = search.trials.worded(PE2_FORM).format(prompt=kept.prompt, place=place, cases=shown)
                chats.append([PE2_PLAN, PE2_AGREED, form])
                parents.append(kept.prompt)
        findings = search.trials.ask(chats, 1, EXAMINE_TEMPERATURE, "examination")
        requests = [search.trials.worded(PE2_REFINE).format(prompt=prompt) for prompt in parents]
        return search.write_prompts([[*chat, found, ask] for chat, [found], ask in zip(chats, findings, requests)])


# --- TextGrad: criticism of the answer, from it criticism of the prompt, then one update -----------------

TEXTGRAD_ANSWER = """A language model was asked a question and wrote a response. You give feedback on the response; \
you do not answer the question.

{case}
The response counts as {outcome}.
How could it be better? Where it is good already, say so and nothing else."""
TEXTGRAD_PROMPT = f"""A language model reads questions together with an instruction, whose place is {MARK}:

{{place}}

The instruction: {{prompt}}
One conversation with it:

{{case}}

Feedback on the response: {{feedback}}

From this, give feedback on the instruction: what in it should change, so that responses get better? Criticise it, but \
do not write a new one."""
TEXTGRAD_UPDATE = f"""You improve a text by the feedback on it: an instruction that tells a language model how to work \
on the questions of a task.

The instruction: {{prompt}}
Feedback from {{count}} conversations:

{{feedback}}

Write the improved instruction. {RULES}
{REPLY}"""


class Textgrad(Method):
    """One prompt. A new one replaces it if its accuracy is not lower."""

    meta_prompts = (TEXTGRAD_ANSWER, TEXTGRAD_PROMPT, TEXTGRAD_UPDATE)

    def propose(self, search):
        settings, prompt = search.settings, search.pool[0].prompt
        batch = [row["id"] for row in search.draw_rows(settings.errors, "batch")]
        cases = [case for case in search.trials.cases(prompt) if case[0]["id"] in batch]
        shown = [show_cases([case]) for case in cases]
        parts = [{"case": text, "outcome": search.trials.outcome(case)} for text, case in zip(shown, cases)]
        chats = [[TEXTGRAD_ANSWER.format(**part)] for part in parts]
        on_answers = search.trials.ask(chats, purpose="feedback on a response")
        chats = []
        for case, [feedback] in zip(shown, on_answers):
            parts = {"place": search.trials.place(), "prompt": prompt, "case": case, "feedback": shortened(feedback)}
            chats.append([TEXTGRAD_PROMPT.format(**parts)])
        on_prompt = search.trials.ask(chats, purpose="feedback on the prompt")
        feedback = "\n\n".join(shortened(criticism) for [criticism] in on_prompt)
        return search.write_prompts([[TEXTGRAD_UPDATE.format(prompt=prompt, count=len(cases), feedback=feedback)]])

    def keep(self, search, scored):
        (child,) = scored if search.step else search.top(1)
        parent = search.pool[0] if search.pool else child
        return [child if child and child.accuracy >= parent.accuracy else parent]


# --- EvoPrompt: crossover and mutation by the optimizer, selection by accuracy ---------------------------

GA_META = f"""Two instructions are to have a child. Follow the two steps; here they are done for another task.

Instruction 1: Sum up the article in simple words.
Instruction 2: Give the main points of the text as a list.
Step 1, cross the instructions: Give the main points of the article in simple words.
Step 2, change the result: State what matters most in the article, in words that a child knows.
<prompt>State what matters most in the article, in words that a child knows.</prompt>

Now the same with these.
Instruction 1: {{first}}
Instruction 2: {{second}}
Step 1, cross the instructions. Step 2, change the result. {RULES}
{REPLY}"""
DE_META = f"""A new instruction comes from four others. Follow the four steps; here they are done for another task.

Instruction A: Sum up the article in simple words.
Instruction B: Sum up the text as a short list.
Instruction C: Tell a friend what the article says.
Instruction D: Give the main points of the text.
Step 1, find where A and B differ: "in simple words" against "as a short list".
Step 2, change these parts: "in everyday language", "in three lines".
Step 3, work them into C: Tell a friend in three lines and everyday language what the article says.
Step 4, cross that with D: Give a friend the main points of the text in three lines and everyday language.
<prompt>Give a friend the main points of the text in three lines and everyday language.</prompt>

Now the same with these.
Instruction A: {{first}}
Instruction B: {{second}}
Instruction C: {{best}}
Instruction D: {{base}}
Step 1, find where A and B differ. Step 2, change these parts. Step 3, work them into C. Step 4, cross that with D. \
{RULES}
{REPLY}"""


class EvoPromptGa(Method):
    """Parents are drawn in proportion to accuracy; the best of parents and children live on."""

    meta_prompts = (GA_META, REWORD)

    def begin(self, search):
        """Rewordings of the best given prompts, as many as the population lacks."""
        best = self.best_given(search)
        return reword(search, [best[number % len(best)].prompt for number in range(search.settings.beam - len(best))])

    def best_given(self, search):
        """At most half a population."""
        return best_of(distinct(map(search.score, search.seeds)), max(1, search.settings.beam // 2))

    def propose(self, search):
        rng, pool = search.rng("parents"), search.pool
        weights = [one.accuracy + 1e-9 for one in pool]  # so that they may all be zero
        wheel = rng.choices(pool, weights, k=len(pool))
        chats = []
        for _ in range(search.settings.beam):
            first = rng.choice(wheel)
            second = rng.choice([one for one in wheel if one != first] or pool)
            chats.append([GA_META.format(first=first.prompt, second=second.prompt)])
        return search.write_prompts(chats)

    def keep(self, search, scored):
        if not search.step:
            return distinct(self.best_given(search) + scored[len(search.seeds) :])
        return best_of(distinct(search.pool + scored), search.settings.beam)


class EvoPromptDe(EvoPromptGa):
    """Each slot of the population has its own line: a child takes it if it is better than the one there."""

    meta_prompts = (DE_META, REWORD)

    def propose(self, search):
        rng, best, chats = search.rng("donors"), search.top(1)[0], []
        for base in search.pool:
            others = [one for one in search.pool if one != base]
            first, second = rng.sample(others, 2) if len(others) > 1 else (others or [base]) * 2
            donors = {"first": first.prompt, "second": second.prompt, "best": best.prompt}
            chats.append([DE_META.format(**donors, base=base.prompt)])
        return search.write_prompts(chats)

    def keep(self, search, scored):
        if not search.step:
            return super().keep(search, scored)
        slots = zip(search.pool, scored)
        return [child if child and child.accuracy > base.accuracy else base for base, child in slots]


# --- Random prompts: no feedback at all, the baseline to beat -------------------------------------------


class RandomPrompts(Method):
    """What the task model itself would write in the prompt's place behind a question, up to the end of a sentence."""

    def propose(self, search):
        rows = search.rng("rows").choices(search.trials.rows, k=search.settings.samples)
        texts = search.trials.draw_prompts(rows, search.settings.optimizer_temperature, PROMPT_TOKENS)
        return search.accept([FIRST_SENTENCE.match(text.strip()).group() for [text] in texts])

    def keep(self, search, scored):
        return search.top(1)


METHODS = {
    "opro": Opro(),
    "gpo": Gpo(),
    "gpo-sgdm": Gpo(),
    "ape": Ape(),
    "apo": Apo(),
    "pe2": Pe2(),
    "textgrad": Textgrad(),
    "evoprompt-ga": EvoPromptGa(),
    "evoprompt-de": EvoPromptDe(),
    "random": RandomPrompts(),
}

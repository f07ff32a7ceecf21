"""What an optimizer wrote -> a prompt, or why it is none. Small models forget tags, talk, copy and repeat themselves.

Works without torch.
"""

import re
from collections import Counter
from dataclasses import dataclass, field

TAGS = re.compile(r"<prompt>(.*?)</prompt>", re.S | re.I)
OTHER_TAGS = re.compile(r"^\s*<([\w ]+)>(.*)</\1>\s*$", re.S)  # around a whole reply
MARK = "[INSTRUCTION]"  # where the prompt stands in what an optimizer is shown
ANY_TAG = re.compile(r"<[^<>]+>|</?prompt", re.I)
THOUGHT = re.compile(r"<think>.*?(</think>|$)", re.S)
LABEL = re.compile(r"^(?:here is |here's )?(?:the |a |an |my )?(?:new |improved |better |final )*prompt\s*:\s*", re.I)
# Words in succession that no prompt shares by chance: with a longer text, with what one question alone says, or with a
# whole short question.
RUN, RUN_OF_ONE, SHORTEST = 8, 6, 4

# Why a reply gives no prompt.
EMPTY = "empty"
TOO_LONG = "too long"
TAG_LEFT = "with a tag inside"
LEAKING = "leaking"  # an answer, a number where answers are numbers, or a piece of a training question
COPIED = "copied from the meta-prompt"
UNKNOWN_WORDS = "with words or marks that the task model cannot take"
REPEATED = "repeated"  # written before: no new prompt, but not refused either


def parse(reply):
    """(the prompt in a reply, on one line, or "", whether it stood between tags).

    Taken is the last text between <prompt> and </prompt>; with one tag missing what is behind or before the other; with
    none the whole reply without fences, quotes, a label, and a pair of other tags around it.
    """
    reply = THOUGHT.sub("", reply)
    found = TAGS.findall(reply)
    if found:
        return tidy(found[-1]), True
    before, opened, behind = reply.rpartition("<prompt>")
    if opened:
        return tidy(behind), False
    before, closed, _ = reply.partition("</prompt>")
    return tidy(before if closed else OTHER_TAGS.sub(r"\2", reply)), False


def tidy(text):
    """The text on one line, without fences, bold marks, a label and quotes around it."""
    text = " ".join(text.replace("```", " ").replace("**", "").split())
    text = LABEL.sub("", text).strip()
    while len(text) > 1 and text[0] + text[-1] in ('""', "''", "``", "\u201c\u201d"):
        text = text[1:-1].strip()
    return text


def in_place(prompt, task):
    """The prompt without a first word that already stands before its place, as the paper's "Use" does."""
    before = task.before_prompt("").split()[-1:]
    first, _, rest = prompt.partition(" ")
    repeats = before and rest and first.lower() == before[0].lower()
    return rest if repeats else prompt


def words_of(text):
    return re.findall(r"\w+", text.lower())


def word_runs(text, length=RUN):
    """Each so many words in succession."""
    words = words_of(text)
    return {tuple(words[start : start + length]) for start in range(len(words) - length + 1)}


@dataclass
class Judge:
    """Says why a text cannot be a prompt."""

    task: object  # tasks.Task
    rows: list[dict]  # the training rows, some of which the optimizer sees
    longest: int  # characters
    templates: tuple[str, ...] = ()  # of meta-prompts, which a reply may copy
    tokenizer: object = None  # the task model's
    questions: set = field(init=False)
    of_one: set = field(init=False)  # what one question alone says: others may share the task's words
    short_questions: set = field(init=False)  # as words with spaces around them
    meta_prompts: set = field(init=False)
    echoes: set = field(init=False)

    def __post_init__(self):
        self.questions = set().union(*[word_runs(row["question"]) for row in self.rows])
        runs = Counter(run for row in self.rows for run in word_runs(row["question"], RUN_OF_ONE))
        self.of_one = {run for run, count in runs.items() if count == 1}
        words = [words_of(row["question"]) for row in self.rows]
        self.short_questions = {f" {' '.join(few)} " for few in words if SHORTEST <= len(few) < RUN}
        pieces = [piece for template in self.templates for piece in re.split(r"\{\w+\}", template)]
        self.meta_prompts = set().union(*map(word_runs, pieces))
        # What stands between the tags there, as a reply that repeats them is read.
        self.echoes = {found for template in self.templates for found in TAGS.findall(template)}

    def refusal(self, prompt):
        """Why the prompt is refused, "" if it is not."""
        if not re.search(r"\w", prompt):
            return EMPTY
        if len(prompt) > self.longest:
            return TOO_LONG
        if ANY_TAG.search(prompt) or MARK in prompt:
            return TAG_LEFT
        runs = word_runs(prompt)
        if runs & self.meta_prompts or any(echo in prompt for echo in self.echoes):
            return COPIED
        text = f" {' '.join(words_of(prompt))} "
        shared = runs & self.questions or word_runs(prompt, RUN_OF_ONE) & self.of_one
        if shared or any(few in text for few in self.short_questions) or self.gives_answer(prompt):
            return LEAKING
        return "" if self.is_known(prompt) else UNKNOWN_WORDS

    def gives_answer(self, prompt):
        """Whether the prompt holds an answer: of a number task any digit, of an open one a training row's answer if it
        is long, of a closed one a choice that it calls the answer."""
        if self.task.kind == "number":
            return bool(re.search(r"\d", prompt))
        if not self.task.choices:
            texts = [text for row in self.rows for text in row.get("references", [row["answer"]])]
            answers = {text.lower() for text in texts if len(text) >= 8}
            return any(answer in prompt.lower() for answer in answers)
        choices = "|".join(sorted(map(re.escape, self.task.choices), key=len, reverse=True))
        # Not "the answer is A or B", which says what answers look like.
        stated = rf"answer\s*(?:is|:|=)\s*[(\"'$]?(?:{choices})\b(?!\W*(?:or|and)\b|\s*[,/])"
        return bool(re.search(stated, prompt, re.I))

    def is_known(self, prompt):
        """Whether the task model's tokenizer knows all words, and nothing in the prompt is one of its marks."""
        if self.tokenizer is None:
            return True
        ids = self.tokenizer.encode(" " + prompt, add_special_tokens=False)
        return not set(ids) & {*self.tokenizer.all_special_ids, *self.tokenizer.get_added_vocab().values()}


# --- What became of the replies of a run ---------------------------------------------------------------------

HALF = 0.5  # of the replies: beyond it the optimizer is unfit


def unknown_tokens(totals):
    """A line on replies whose tokens the optimizer's server did not count, as a list; [] where it counted all."""
    count = totals.get("optimizer_uncounted", 0)
    return [f"  of {count} replies the server counted no tokens: they are not among these"] if count else []


def summary(steps, title):
    """Lines on how the optimizer did in the whole run, with warnings where that says something about the search."""
    replies, totals = Counter(steps[-1].replies), steps[-1].totals
    count = replies["all"]
    line = f"{title}: {totals['scored_generations']} scored generations"
    if not count:
        return [f"{line}, no reply of an optimizer"]
    good = replies["new"] + replies[REPEATED]
    lines = [
        f"{line}, {totals['optimizer_requests']} requests to the optimizer, which read "
        f"{totals['optimizer_prompt_tokens']} tokens and wrote {totals['optimizer_tokens']}",
        *unknown_tokens(totals),
        f"  {good} of {count} replies gave a prompt ({100 * good / count:.0f} %), {replies['in tags']} in tags",
    ]
    others = [f"{number} {outcome}" for outcome, number in replies.items() if outcome not in ("all", "new", "in tags")]
    lines += [f"  not new: {', '.join(others)}"] if others else []
    if good < HALF * count:
        lines.append("  warning: most replies gave no prompt, so the result says little about the method")
    elif totals["optimizer_requests"] and replies["in tags"] < HALF * count:
        lines.append("  warning: most replies lack the tags, so much of what was read as a prompt may be none")
    if replies[REPEATED] > HALF * count:
        lines.append("  warning: the optimizer mostly repeated itself")
    if replies[COPIED] > HALF * count:
        lines.append("  warning: the optimizer mostly copied the meta-prompt")
    if steps[-1].step and not any(step.proposed for step in steps[1:]):
        lines.append("  warning: no round gave a new prompt")
    return lines

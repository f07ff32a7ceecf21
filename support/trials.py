"""What a text optimizer asks and tries: replies of the optimizer, and prompts scored on the training rows.

Each reply and each row is on disk before it is used. A run that was killed begins again from its start: the same
questions, asked in the same order, get the replies that are there, and no row is generated twice. So it ends as if it
had never stopped.

    optimizer.jsonl           a line per call: what was asked, and what came back
    train_predictions.jsonl   an evaluation.Prediction per prompt and training row

Works without torch.
"""

import math
import random
import statistics
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, field
from pathlib import Path

from support.answerers import LocalModel
from support.evaluation import (
    Evaluation,
    Sampling,
    Written,
    add_missing,
    are_scores,
    read_all_predictions,
    reference_of,
)
from support.files import append_jsonl, read_appended, require
from support.proposals import MARK, REPEATED, Judge, in_place, parse
from support.reading import GRADER_VERSION
from support.runs import Scored
from support.tasks import Task
from support.tokens import encode, encode_prompt

ELSEWHERE = {"answered_in": ""}  # in the place of a prediction: the row is not asked now
PULL = 8  # rows that a bandit asks at once
LONGEST_SHOWN = 600  # characters of a text that is shown
RIGHT_ANSWER, REFERENCE = "Right answer", "A good text"
FOR_SCORES = {  # parts of the meta-prompts, and what stands in their place where texts are generated and get scores
    "model reads all of it, reasons, and is counted as right if it arrives at the right answer": (
        "model reads all of it and writes a text, and its accuracy is how much the text agrees with a reference text"
    ),
    "the model's reasoning ends at the right answer": "what the model writes agrees with a reference text",
    "With it the model got these questions wrong": "With it these texts of the model agree least with reference texts",
    "The right answers are beyond doubt": "The good texts are beyond doubt, though others may be as good",
    "Is the model's answer right? If not, what went wrong?": "Where does the model's text differ from the good one?",
    "Avoid mistakes as in the cases above": "Avoid such differences as in the cases above",
}


@dataclass
class Trials:
    """The optimizer and the task model at work for one run, and what they did."""

    answerer: object  # answerers.Answerer: the task model
    optimizer: object  # answerers.Answerer: writes prompts
    task: Task
    rows: list[dict]  # training rows
    settings: object  # the run's flags
    folder: Path
    engine: object = None  # engine.Engine of the task model, for what needs more than texts
    totals: Counter = field(default_factory=Counter)  # see runs.TextStep
    answered: dict[str, dict] = field(default_factory=dict)  # {prompt: {row's id: Prediction}}

    def __post_init__(self):
        self.calls_path, self.rows_path = self.folder / "optimizer.jsonl", self.folder / "train_predictions.jsonl"
        self.recorded = read_appended(self.calls_path)  # of the run before it was killed
        self.calls = 0
        self.kept = defaultdict(dict)  # {evaluation.Reference: {row's id: Prediction}}
        for prediction in read_all_predictions(self.rows_path):
            same = prediction.get("grader_version") == GRADER_VERSION
            require(same, f"{self.rows_path} was graded by another version of the grader: choose another --run-dir")
            self.kept[reference_of(prediction)][prediction["id"]] = prediction

    # --- The optimizer ---

    def ask(self, chats, samples=1, temperature=0.0, purpose="prompt"):
        """For each chat, a list of turns (the user's, the model's, the user's ...), so many replies as texts.

        purpose: what the replies are for, as the record of the call says. Errors: UserError if a call of this number is
        on disk that asked something else.
        """
        if not (chats and samples):
            return []
        messages = [as_messages(turns) for turns in chats]
        asked = {
            "call": self.calls,
            "purpose": purpose,
            "samples": samples,
            "temperature": temperature,
            "chats": messages,
        }
        return self.replies_to(asked)

    def draw_prompts(self, rows, temperature, tokens):
        """For each data row a text that the task model itself puts where the prompt stands; no optimizer is asked."""
        place = self.task.initial_prompt  # any words stand where a prompt stands
        heads = [encode_prompt(self.engine.tokenizer, self.task, row["question"], place)[0] for row in rows]
        asked = {"call": self.calls, "purpose": "own words", "samples": 1, "temperature": temperature, "tokens": tokens}
        return self.replies_to(asked | {"rows": [row["id"] for row in rows]}, heads)

    def replies_to(self, asked, heads=None):
        """The replies to a call, from its record or now. heads: ids that the task model goes on from."""
        if self.calls < len(self.recorded):
            call = self.recorded[self.calls]
            same = all(call.get(name) == value for name, value in asked.items()) and "replies" in call
            where = f"{self.calls_path}, line {self.calls + 1}"
            require(
                same,
                f"{where}: this call asked something else: the run is of another version; choose another --run-dir",
            )
            replies = [[Written(**reply) for reply in replies] for replies in call["replies"]]
        else:
            limit = asked.get("tokens", self.settings.optimizer_tokens)
            seed = f"{self.settings.seed}/{self.calls}"
            sampling = Sampling(asked["samples"], asked["temperature"], limit, seed)
            if heads is None:
                replies = self.optimizer.write(asked["chats"], sampling)
            else:
                replies = LocalModel(self.engine).continue_texts(heads, sampling)
            append_jsonl(self.calls_path, asked | {"replies": [[asdict(one) for one in some] for some in replies]})
        self.calls += 1
        self.totals["optimizer_requests"] += len(replies) if heads is None else 0
        self.count(replies)
        return [[reply.text for reply in some] for some in replies]

    def count(self, replies):
        for reply in [reply for some in replies for reply in some]:
            self.totals["optimizer_samples"] += 1
            if reply.tokens is None or reply.prompt_tokens is None:  # a server that counts none
                self.totals["optimizer_uncounted"] += 1
                continue
            self.totals["optimizer_tokens"] += reply.tokens
            self.totals["optimizer_prompt_tokens"] += reply.prompt_tokens

    # --- The task model ---

    def affords(self, prompt, rows=None):
        """Whether the budget still holds the prompt's generations on these training rows, or on all; those that are
        there cost nothing."""
        after = self.totals["scored_generations"] + len(self.unanswered(prompt, rows or self.rows))
        return not self.settings.budget or after <= self.settings.budget

    def unanswered(self, prompt, rows):
        return [row for row in rows if row["id"] not in self.answered.get(prompt, {})]

    def predictions(self, prompt, rows=None):
        """A `Prediction` of each of these training rows, or of all, under the prompt, each generated once."""
        rows = rows or self.rows
        new = self.unanswered(prompt, rows)
        if new:
            answered = self.answered.setdefault(prompt, {})
            answered |= self.answers(prompt, new)
            self.totals["scored_generations"] += len(new)
            self.totals["generated_tokens"] += sum(answered[row["id"]]["tokens"] for row in new)
        return [self.answered[prompt][row["id"]] for row in rows]

    def answers(self, prompt, rows):
        """{row's id: `Prediction`} of training rows under the prompt, those on disk from there. What is missing is made
        in one evaluation with the others of these rows, so that a run that goes on makes the same batches."""
        evaluation = Evaluation(self.answerer, self.task, "train", self.rows, prompt, self.settings)
        kept = self.kept[evaluation.reference]
        if any(row["id"] not in kept for row in rows):
            asked = {row["id"] for row in rows}
            others = {row["id"]: ELSEWHERE for row in self.rows if row["id"] not in asked}
            own = {row_id: prediction for row_id, prediction in kept.items() if row_id in asked}
            made = add_missing(evaluation, self.rows_path, others | own)
            kept |= {row["id"]: prediction for row, prediction in zip(self.rows, made) if row["id"] in asked}
        return {row["id"]: kept[row["id"]] for row in rows}

    def accuracy(self, prompt):
        """The prompt's accuracy on the training rows, `paper` reading."""
        predictions = self.predictions(prompt)
        return sum(prediction["correct"] for prediction in predictions) / len(predictions)

    def cases(self, prompt):
        """[(row, `Prediction`)] of the training rows under the prompt."""
        return list(zip(self.rows, self.predictions(prompt)))

    def mistakes(self, prompt):
        """The cases that are wrong; of generated texts those whose score is not above the rows' median, the worse half,
        but none that is perfect."""
        cases = self.cases(prompt)
        outcomes = [prediction["correct"] for _, prediction in cases]
        if are_scores(outcomes):
            middle = statistics.median(outcomes)
            return [case for case in cases if case[1]["correct"] <= middle and case[1]["correct"] < 1]
        return [case for case in cases if not case[1]["correct"]]

    def worded(self, template):
        """A meta-prompt as the task needs it: of texts to be generated it speaks as of good ones, not right ones."""
        for right_or_wrong, scored in FOR_SCORES.items() if self.task.is_generation else ():
            template = template.replace(right_or_wrong, scored)
        return template

    def outcome(self, case):
        """What the response of a case counts as, in words."""
        _, prediction = case
        if self.task.is_generation:
            return f"{round(100 * prediction['correct'])} in 100, by how much it agrees with a reference text"
        return "right" if prediction["correct"] else "wrong"

    def place(self, prompt=MARK):
        """What the task model reads, for any question, with the prompt in its place."""
        return self.told("<question>", prompt)

    def told(self, question, prompt):
        """All that the task model reads, as one text."""
        return "\n\n".join(message["content"] for message in self.task.messages(question, prompt))

    def show_rows(self, rows):
        """Training rows with the place of the prompt and the right answer."""
        label = REFERENCE if self.task.is_generation else RIGHT_ANSWER
        shown = [f"Question:\n{self.told(row['question'], MARK)}\n{label}: {row['answer']}" for row in rows]
        return "\n\n".join(shown)

    def similarities(self, prompt, others):
        """Cosine of the prompt and each of the others, from the task model's last states, mean over their tokens."""
        texts = [encode(self.engine.tokenizer, " " + text) for text in (prompt, *others)]
        states = self.engine.mean_states(texts)
        return (states[1:] @ states[0]).tolist()


# --- What methods share ---------------------------------------------------------------------------------


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
    accepted: set[str] = field(default_factory=set)  # every prompt that a reply gave
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
            prompt = in_place(prompt, self.trials.task)
            refusal = self.judge.refusal(prompt)
            outcome = refusal or (REPEATED if prompt in self.accepted or prompt in self.archive else "new")
            self.accepted.add(prompt)
            self.replies.update(["all", outcome] + ["in tags"] * in_tags)
            prompts.append(None if refusal else prompt)
        return prompts

    def score(self, prompt):
        """The `Scored` prompt, None if the budget does not hold it."""
        if prompt not in self.archive:
            if not self.trials.affords(prompt):
                return None
            accuracy = self.trials.accuracy(prompt)
            tokens = sum(prediction["tokens"] for prediction in self.trials.predictions(prompt))
            self.archive[prompt] = Scored(prompt, accuracy, tokens, self.step)
        return self.archive[prompt]

    def top(self, count):
        """The best of all prompts so far; of equals the first."""
        return best_of(self.archive.values(), count)


def promising(search, prompts):
    """Of new prompts as many as a round keeps: those that do best on parts of the training rows, by the bandit UCB1
    with at most `settings.bandit` answers; all of them where that is 0.

    A pull asks `PULL` rows, of an order drawn for the round, under the prompt with the highest bound: its accuracy so
    far, and the more the less is known of it. The answers count as scored generations and are not asked again."""
    trials, settings = search.trials, search.settings
    if not settings.bandit:
        return prompts
    order = search.draw_rows(len(trials.rows), "bandit")
    points, asked = dict.fromkeys(prompts, 0.0), dict.fromkeys(prompts, 0)

    def bound(prompt):
        if not asked[prompt]:
            return math.inf
        return points[prompt] / asked[prompt] + math.sqrt(math.log(sum(asked.values())) / asked[prompt])

    while sum(asked.values()) < settings.bandit:
        unfinished = [prompt for prompt in prompts if asked[prompt] < len(order)]
        if not unfinished:
            break
        prompt = max(unfinished, key=bound)
        rows = order[asked[prompt] : asked[prompt] + PULL]
        if not trials.affords(prompt, rows):
            break
        points[prompt] += sum(prediction["correct"] for prediction in trials.predictions(prompt, rows))
        asked[prompt] += len(rows)
    tried = [prompt for prompt in points if asked[prompt]]
    return sorted(tried, key=lambda prompt: -points[prompt] / asked[prompt])[: settings.beam]


def best_of(scored, count):
    return sorted(scored, key=lambda one: -one.accuracy)[:count]


def distinct(scored):
    """The `Scored` of a list that may hold None, each once."""
    return list(dict.fromkeys(one for one in scored if one))


# --- What an optimizer is shown ---------------------------------------------------------------------------


def shortened(text):
    """Head and tail of a long text."""
    half = LONGEST_SHOWN // 2
    return text if len(text) <= LONGEST_SHOWN else f"{text[:half]} [...] {text[-half:]}"


def show_scored(scored):
    """Prompts with their accuracies in percent, in the order given."""
    return "\n\n".join(f"Instruction: {one.prompt}\nAccuracy: {round(100 * one.accuracy)}" for one in scored)


def show_cases(cases):
    """(row, `Prediction`) pairs: what was asked, what the model wrote, what is right."""
    blocks = []
    for row, prediction in cases:
        written = f"The model wrote: {shortened(prediction['text'])}"
        if are_scores([prediction["correct"]]):
            result, label = f"Accuracy: {round(100 * prediction['correct'])}", REFERENCE
        else:
            result, label = f"Its answer: {prediction['answer']}", RIGHT_ANSWER
        blocks.append(f"Question: {row['question']}\n{written}\n{result}\n{label}: {row['answer']}")
    return "\n\n".join(blocks)


def as_messages(turns):
    """The messages of a chat from its turns, the first of which is the user's."""
    roles = ("user", "assistant")
    return [{"role": roles[number % 2], "content": text} for number, text in enumerate(turns)]

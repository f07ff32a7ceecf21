"""A run on disk: what its files hold, opening and resuming it, reading a finished one. Works without torch.

    run.json        the settings, the data and the model of the run
    steps.jsonl     a `Step` per position visited, or a `TextStep` per round of a text method; line 0 is the start
    prompts.jsonl   the finalists, best first, with their dev accuracy

A check in each record (files.py) shows whether one was changed, lost or moved.

Results and predictions of prompts belong to evaluation.py.
"""

import importlib.metadata
import math
import subprocess
import time
import zlib
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from types import UnionType
from typing import get_args, get_origin

from support.files import (
    CHANGED,
    CHECK,
    ROOT,
    UserError,
    check_of,
    is_text,
    read_appended,
    read_jsonl,
    read_object,
    require,
    require_fields,
    short_name,
)
from support.identity import identity_of
from support.own import is_own, own_name
from support.tasks import TASKS
from support.tokens import DATE, ends_sentence, prompt_text

# --- Records of a search: the fields are the columns of steps.jsonl ----------------------------------


@dataclass(frozen=True)
class RowOutcomes:
    """What became of each training row under a prompt, in the rows' order."""

    wrong: str  # 0 or 1 for each
    objective: list[float | None]  # to six digits, the row's part of the mean; None where it is not finite
    reasoning: str  # four hexadecimal digits for each, of a hash of its tokens: other digits, another reasoning


@dataclass(frozen=True)
class Score:
    """What a prompt is worth on the training rows: means over the rows, natural logarithms."""

    prompt_ids: tuple[int, ...]
    cross_entropy: float  # of the gold answer behind the reasoning: among the choices, or of its tokens; / temperature
    error: float  # share of the rows in which another choice is likelier, or some answer token is not the likeliest
    nll: float  # negative log-likelihood of the prompt, per token
    objective: float  # what selection minimizes
    tokens: int  # of all reasonings together
    rows: RowOutcomes | None = field(default=None, kw_only=True)  # None in the records of an older version


@dataclass(frozen=True)
class Candidate:
    """A token that could stand at the step's position; the last one is the incumbent, unless the prompt grows."""

    token: int
    gradient: float | None  # of the loss, mean over the rows; None where no gradient was taken
    text: str = ""
    position: int | None = None  # None: the step's


@dataclass(frozen=True)
class Tried(Score):
    """A shortlisted token, and the score of the prompt that has it."""

    token: int
    new: bool  # scored in this step, not in an earlier one
    text: str = ""
    position: int | None = None
    # The training loss behind the reasoning of the incumbent, whose slope the gradient is; None without an audit.
    fixed_loss: float | None = None


@dataclass(frozen=True)
class Audit:
    """What a step measured beside the search (`--audit-every`). Nothing of it competes."""

    drawn: list[Tried]  # a random shortlist, as long as the other one
    fixed_loss: float  # of the incumbent
    again: Score  # the incumbent once more, its rows in another order and in other batches
    generations: int  # that this took


@dataclass(frozen=True)
class Best:
    """The prompt with the lowest objective so far among those that end a sentence, and the initial one."""

    objective: float
    prompt: str


@dataclass(frozen=True)
class Step(Score):
    """One position visited: the score of the prompt behind it, and how it was found."""

    step: int  # 0 is the start: the initial prompt's score, nothing tried
    position: int | None  # in the prompt's tokens; None at the start; where all are searched at once 0
    seconds: dict[str, float]  # propose, gradient, select, audit; at the start select, with reading the questions
    k: int | None = None  # the top-k at which enough candidates were found
    grows: bool = False  # the position was behind the last token
    candidates: list[Candidate] = field(default_factory=list)
    shortlist: list[Tried] = field(default_factory=list)
    prompt: str = ""  # its text
    best: Best | None = None
    audit: Audit | None = None  # of the steps that `--audit-every` names
    # Tokens since the start: forward_tokens (in forward passes, with decoding and padding), backward_tokens,
    # generated_tokens; of these the audits' audit_tokens, in audit_generations.
    totals: dict[str, int] = field(default_factory=dict)
    batch_sizes: dict[str, int] = field(default_factory=dict)  # {stage: rows at once}, where memory ran out


@dataclass(frozen=True)
class Scored:
    """A prompt of a text method, and what it is worth on the training rows."""

    prompt: str
    accuracy: float  # `paper` reading
    tokens: int  # of all reasonings together
    step: int  # in which it was scored


@dataclass(frozen=True)
class TextStep:
    """One round of a text method: the prompts that were scored in it, and what is kept."""

    step: int  # 0 is the start
    proposed: list[Scored]
    pool: list[str]  # prompts that the method keeps
    best: Scored  # of all so far; of equals the first
    replies: dict[str, int]  # of the optimizer, since the start: how many were read or refused, by reason
    # Since the start: scored_generations, generated_tokens (of these), optimizer_requests (chats), optimizer_samples
    # (replies), optimizer_tokens (written), optimizer_prompt_tokens (read), optimizer_uncounted (replies without them).
    totals: dict[str, int]
    seconds: dict[str, float]  # propose, score


def described(step, engine, row, scores):
    """The `Step` with texts for its ids, the best prompt so far, and what the engine has counted.

    row: the tokens.Row in which prompts are read; scores: {prompt ids: Score} so far, the initial one first.
    """

    def text_of(prompt_ids):
        return prompt_text(engine.tokenizer, row, prompt_ids).strip()

    (best,) = finalists(engine.tokenizer, scores, 1)

    def with_text(records):
        return [replace(record, text=engine.tokenizer.decode([record.token])) for record in records]

    return replace(
        step,
        candidates=with_text(step.candidates),
        shortlist=with_text(step.shortlist),
        audit=step.audit and replace(step.audit, drawn=with_text(step.audit.drawn)),
        prompt=text_of(step.prompt_ids),
        best=Best(best.objective, text_of(best.prompt_ids)),
        totals=dict(engine.counts),
        batch_sizes=dict(engine.batch_sizes),
    )


def score_of(record):
    """The `Score` part of a `Step` or a `Tried`."""
    return Score(**{f.name: getattr(record, f.name) for f in fields(Score)})


def row_outcomes(reasonings, wrong, objectives):
    """The `RowOutcomes` of lists with a list of ids, a truth value and a number for each row."""
    hashes = [zlib.crc32(" ".join(map(str, ids)).encode()) % 2**16 for ids in reasonings]
    return RowOutcomes(
        wrong="".join(str(int(one)) for one in wrong),
        objective=[float(f"{value:.6g}") if math.isfinite(value) else None for value in objectives],
        reasoning="".join(f"{number:04x}" for number in hashes),
    )


@contextmanager
def timed(seconds, name):
    """Put the seconds that the block takes into the dict `seconds`."""
    started = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - started


def as_step(record):
    """The `Step` or the `TextStep` of one line of steps.jsonl. Errors: as of `as_dataclass`."""
    if "proposed" in record:
        step = as_dataclass(TextStep, record)
        proposed = [as_dataclass(Scored, scored) for scored in step.proposed]
        return replace(step, proposed=proposed, best=as_dataclass(Scored, step.best))
    step = as_score(Step, record, also=("prompt", "best"))
    return replace(
        step,
        best=as_dataclass(Best, step.best),
        candidates=[as_dataclass(Candidate, candidate) for candidate in step.candidates],
        shortlist=[as_score(Tried, tried) for tried in step.shortlist],
        audit=step.audit and as_audit(step.audit),
    )


def as_score(kind, record, also=()):
    """A `Score` of this kind, with its rows. Errors: as of `as_dataclass`."""
    score = as_dataclass(kind, record, also)
    return replace(score, rows=score.rows and as_dataclass(RowOutcomes, score.rows))


def as_audit(record):
    """The `Audit` of a step's record. Errors: as of `as_dataclass`."""
    audit = as_dataclass(Audit, record)
    return replace(audit, drawn=[as_score(Tried, drawn) for drawn in audit.drawn], again=as_score(Score, audit.again))


def as_dataclass(kind, record, also=()):
    """A `kind` with the fields of a JSON object.

    Errors: KeyError with the names of the fields that are missing, TypeError or AttributeError for another form.
    """
    needed = {f.name for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING}
    missing = needed.union(also) - record.keys()
    if missing:
        raise KeyError(*sorted(missing))
    record = {name: value for name, value in record.items() if name not in RETIRED or value != RETIRED[name]}
    if "prompt_ids" in needed:
        record = record | {"prompt_ids": tuple(record["prompt_ids"])}  # JSON has lists only
    for one in fields(kind):
        if one.name in record and not fits(record[one.name], one.type):
            raise TypeError(f"{one.name} is of another type")
    return kind(**record)


def fits(value, kind):
    """Whether a value read from JSON is of a field's type; of a dataclass, whether it is an object."""
    if isinstance(kind, UnionType):
        return any(fits(value, one) for one in get_args(kind))
    if get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(fits(one, int) for one in value)
    if is_dataclass(kind):
        return isinstance(value, dict)
    if kind in (int, float) and isinstance(value, bool):
        return False
    return isinstance(value, (int, float) if kind is float else get_origin(kind) or kind)


def read_steps(path, growing=False):
    """The steps of a search. Errors: UserError that names the line with another form, or a file that is not there.

    growing: the file is the caller's own to append to: [] if it is not there yet, and a last line that was cut short
    is mended. Without it nothing is written: another process may be about to complete that line.
    """
    records = read_appended(path) if growing else read_jsonl(path)
    steps = []
    for number, record in enumerate(records, 1):
        try:
            steps.append(as_step(record))
            found = record["step"]
            wrong = f"{path}, line {number}: step {found} where step {number - 1} belongs, {CHANGED}"
            require(found == number - 1, wrong)
        except KeyError as error:
            raise UserError(f"{path}, line {number}: {lacking(error.args)}") from None
        except (TypeError, AttributeError) as error:
            raise UserError(f"{path}, line {number}: not a step of a search ({error!s:.200})") from None
    return steps


def scores_of(steps):
    """{prompt ids: Score} of every prompt in the records of a run, the initial one first."""
    scores = {}
    for step in steps:
        for record in (*step.shortlist, step):  # as they were scored, so that equals keep their order
            scores.setdefault(record.prompt_ids, score_of(record))
    return scores


def since_improved(steps):
    """How many steps lie behind the one that found the best finished prompt, or of a text method the best accuracy."""
    best = [-step.best.accuracy if isinstance(step, TextStep) else step.best.objective for step in steps]
    return len(best) - 1 - best.index(min(best))


def generations_of(steps, rows):
    """How many generations the scores in the steps of a search took: one for each of so many training rows under each
    prompt, and once more where a prompt that was scored earlier became the current one."""
    prompts, current = 0, None
    for step in steps:
        new = [tried.prompt_ids for tried in step.shortlist if tried.new]
        prompts += len(new) + (step.prompt_ids != current and step.prompt_ids not in new)
        current = step.prompt_ids
    return prompts * rows


def last_job(steps):
    """(number of the step at which the current prompt became the current one, the prompts generated together then)."""
    number = len(steps) - 1
    while number and steps[number - 1].prompt_ids == steps[number].prompt_ids:
        number -= 1
    prompt_ids = steps[number].prompt_ids
    together = [tried.prompt_ids for tried in steps[number].shortlist if tried.new]
    return number, together if prompt_ids in together else [prompt_ids]


# --- The configuration -----------------------------------------------------------------------------


def read_run(folder, **kinds):
    """The record run.json of a run whose configuration has these settings, of these types. Errors: UserError."""
    path = Path(folder) / "run.json"
    not_one = f"{path} is not the record of a run of stage 02"
    try:
        record = read_object(path)
        check = record.pop(CHECK, None)  # an older version wrote none
        as_written = deepcopy(record)
        config = record["config"]
        good = isinstance(config, dict)
        record = with_answer_space(record) if good and "task" in record else record
        good = good and all(isinstance(config[name], kind) for name, kind in kinds.items())
        texts = [config[name] for name, kind in kinds.items() if kind is str]
        good = good and all(map(is_text, texts))
    except (UserError, KeyError, TypeError, AttributeError):
        good = False
    require(good, not_one)
    changed = f"{not_one} as it was written: restore it, or remove its {CHECK} if the change is meant"
    require(check in (None, check_of(as_written)), changed)
    return record


NEWER = {
    "audit_every": 0,
    "positions": "one",
    "word_starts": False,
}  # as it was before there were these settings
# Settings and fields that are no more, where they changed nothing.
RETIRED = {"margin": 0.0, "edits": ["substitute"], "edit": "substitute"}


def with_answer_space(record):
    """The record of a run; one from before there were answer spaces gets what was used then."""
    config, task = record["config"], record["task"]
    config.setdefault("system", "")  # as it was before there were system messages
    if "shortlist" in config:  # of GReaTer
        for name, value in NEWER.items():
            config.setdefault(name, value)
        for name, value in RETIRED.items():
            if config.get(name) == value:
                del config[name]
    if config.get("method") == "APO":
        config.setdefault("bandit", 0)
    if "answer_space" not in config:
        known = TASKS.get(task.get("name"))
        config |= {"answer_space": "vocabulary", "extractor": task["extractor"], "template": task["template"]}
        config["kind"] = config.get("kind") or (known.kind if known else "")
        if config.get("preset") == "paper":  # what is called default now was called so
            config["preset"] = "default"
    return record


def run_folder(task_name, model, seed):
    """Where a run is written if --run-dir does not say."""
    if Path(model) == ROOT / "demo" / "model" and task_name == "demo":
        return Path("runs") / f"demo-seed{seed}"
    return Path("runs") / f"{task_name.replace('/', '-')}-{Path(model).name}-seed{seed}"


def record_of_run(config, prepared, train_ids, dtype):
    """What run.json holds: settings, data, model, versions.

    config: the script's flags as a dict; prepared: the task's task.json; dtype: the name of that in which the model
    runs.
    """
    return {
        "config": config,
        "task": {key: prepared[key] for key in ("name", "sha256", "grader_version")}
        | {key: config[key] for key in ("extractor", "template")},
        "train_ids": train_ids,
        "model_hash": identity_of(config["model"]),
        "dtype": dtype,
        "template_date": DATE,  # what a chat template that asks for the date is told
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "transformers", "datasets")},
        "commit": git_commit(),
    }


def has_begun(run_dir):
    return (Path(run_dir) / "steps.jsonl").exists()


def git_commit():
    answer = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return answer.stdout.strip() or None


# --- Reading a finished run ----------------------------------------------------------------------------

RESULT_FIELDS = (
    "role",
    "split",
    "prompt",
    "n",
    "accuracy",
    "stderr",
    "harness_accuracy",
    "harness_stderr",
    "unread",
    "truncated",
    "mean_tokens",
)
PROMPT_FIELDS = ("prompt", "prompt_ids", "dev_accuracy", "dev_stderr", "initial")


READ_BY = ("extractor", "kind", "answer_space")  # fields of a result and of a run's configuration


class Unfinished(UserError):
    """A run that lacks results, in one line that begins with its folder."""


@dataclass
class Run:
    """A run of stage 02, or one by another method, with all of its records."""

    folder: Path
    config: dict  # the flags it was started with
    task: str
    model: str  # its short name
    method: str
    results: list[dict]  # results.jsonl
    steps: list[Step] = field(default_factory=list)  # none of another method's run
    prompts: list[dict] = field(default_factory=list)  # prompts.jsonl, best first; none of another method's run

    @property
    def title(self):
        changed = ", ".join(changed_parts(self.task, self.config))
        task = f"{self.task} ({changed})" if changed else self.task
        return f"task {task}, model {self.model}, {self.method}, seed {self.config.get('seed', '-')}"

    def result(self, role, split, name=None):
        """The record of the most rows, of these the latest, or None. What another model answered does not count."""
        found = None
        for record in self.results:
            asked = (record["role"], record["split"], record.get("name")) == (role, split, name)
            if asked and self.is_own(record) and (found is None or record["n"] >= found["n"]):
                found = record
        return found

    def is_own(self, record):
        """Whether a result is of the run's task and model, its answers asked for and read as in the run; an older one
        does not say and is."""
        model = short_name(record.get("model", self.model))
        asked = all(record[name] == self.config.get(name, record[name]) for name in READ_BY if record.get(name))
        return record.get("task", self.task) == self.task and model == self.model and asked

    @property
    def prompts_tried(self):
        """[(role, name)] of the prompts that were evaluated: initial, baselines, best."""
        names = dict.fromkeys(record.get("name") for record in self.results if record["role"] == "baseline")
        return [("initial", None), *(("baseline", name) for name in names), ("best", None)]


def changed_parts(task_name, config):
    """How a run's task differs from the known one of that name, as "name value" each; [] of own rows."""
    if task_name not in TASKS:
        return []
    usual = TASKS[task_name].parts
    return [f"{name} {config[name]!r}" for name in usual if config.get(name, "") not in ("", usual[name])]


def load_runs(folder):
    """(finished runs, messages on unfinished ones) of a run's folder or a folder of runs. Errors: UserError if none."""
    folder = Path(folder)
    if (folder / "run.json").exists():
        return [load_run(folder)], []
    runs, unfinished = [], []
    for path in sorted(folder.glob("*/run.json")):
        if not (has_begun(path.parent) or (path.parent / "results.jsonl").exists()):
            continue  # a start that was killed before its first step
        try:
            runs.append(load_run(path.parent))
        except Unfinished as error:
            unfinished.append(str(error))
    require(runs or unfinished, f"{folder} holds no run: neither it nor a folder in it has a run.json")
    require(runs, f"{folder} holds no finished run: {unfinished[0] if unfinished else ''}")
    return runs, unfinished


def load_run(folder):
    """The finished run in a folder. Errors: Unfinished if it lacks results, UserError if its files cannot be read.

    Nothing is mended: a line that is cut short may be one that the run, still at work, is about to complete.
    """
    folder = Path(folder)
    config = read_run(folder, task=str, model=str)["config"]
    task, method = config["task"], config.get("method", "GReaTer")
    if is_own(task) or config.get("test_file"):
        task = own_name(task)
    if not (folder / "results.jsonl").exists():
        raise Unfinished(f"{folder}: unfinished, no results.jsonl; the command that began the run finishes it")
    results = read_records(folder / "results.jsonl", RESULT_FIELDS)
    run = Run(folder, config, task, short_name(config["model"]), method, results)
    for role in ("initial", "best"):
        if run.result(role, "test") is None:
            raise Unfinished(f"{folder}: unfinished, results.jsonl has no test result of the {role} prompt")
    if (folder / "steps.jsonl").exists() and not (folder / "prompts.jsonl").exists():
        raise Unfinished(f"{folder}: being continued, no prompts.jsonl; the command that continued the run finishes it")
    if method.startswith("GReaTer"):  # other methods have no such steps
        run.steps = read_steps(folder / "steps.jsonl")
        run.prompts = read_records(folder / "prompts.jsonl", PROMPT_FIELDS)
        require(run.steps and run.prompts, f"{folder}: steps.jsonl or prompts.jsonl is empty")
    return run


def read_records(path, names):
    """The records of a file that all have these fields. Errors: UserError that names file, line and field."""
    records = read_jsonl(path)
    for number, record in enumerate(records, 1):
        missing = set(names) - record.keys()
        require(not missing, f"{path}, line {number}: {lacking(missing)}")
    return records


def read_prompts(path, task_name):
    """The records of a file like a run's prompts.jsonl. Errors: UserError for no or empty prompts, another task's."""
    records = require_fields(read_jsonl(path), path, prompt=str)
    good = records and all(record["prompt"].strip() for record in records)
    require(good, f"{path} holds no prompts, or an empty one")
    for number, record in enumerate(records, 1):
        other = record.get("task", task_name)
        require(other == task_name, f"{path}, line {number}: a prompt of the task {other}, not of {task_name}")
    return records


def lacking(names):
    return f"no {', '.join(sorted(names))}; this is no file of a run"


# --- Final prompts, and a line of the log ------------------------------------------------------------


def finalists(tokenizer, scores, count):
    """The `count` scores with the lowest objective among prompts that end a sentence, and the initial one.

    scores: {prompt ids: Score}, the initial one first.
    """
    initial = next(iter(scores))
    complete = [scores[ids] for ids in scores if ids == initial or ends_sentence(tokenizer, ids)]
    return sorted(complete, key=lambda score: score.objective)[:count]


def text_finalists(steps, initial, count):
    """Records of the `count` prompts of a text method with the highest training accuracy, of equals the first, and of
    the initial one. steps: `TextStep`s."""
    scored = sorted([one for step in steps for one in step.proposed], key=lambda one: -one.accuracy)
    chosen = scored[:count] + [one for one in scored[count:] if one.prompt == initial]
    records = []
    for one in chosen:
        record = {"prompt": one.prompt, "initial": one.prompt == initial, "train_accuracy": one.accuracy}
        records.append(record | {"objective": 1 - one.accuracy, "tokens": one.tokens, "step": one.step})
    return records


def rank_prompts(prompts, choose_on):
    """The run's final prompts, best first.

    By dev accuracy, equals by training objective; or (choose_on "train") by the objective alone. Where nothing tells
    the initial prompt from another it comes first.
    """

    def rank(prompt):
        accuracy = prompt["dev_accuracy"] if choose_on == "dev" else 0
        return -accuracy, prompt["objective"], not prompt["initial"]

    return sorted(prompts, key=rank)


def initial_of(prompts):
    """The initial one of a run's final prompts."""
    return next(prompt for prompt in prompts if prompt["initial"])


def dev_warning(prompts):
    """A sentence if the dev rows do not speak for the first of a run's final prompts, else "".

    A file of other prompts may hold no dev accuracies; then there is nothing to say.
    """
    first = prompts[0]
    initial = next((prompt for prompt in prompts if prompt.get("initial")), first)
    after, before = first.get("dev_accuracy"), initial.get("dev_accuracy")
    known = isinstance(after, (float, int)) and isinstance(before, (float, int))
    if first["prompt"] == initial["prompt"] or not known or after > before:
        return ""
    if after == before:
        how = f"no better than the initial one (both {100 * after:.1f} %)"
    else:
        how = f"worse than the initial one ({100 * after:.1f} against {100 * before:.1f} %)"
    return f"On dev the chosen prompt is {how}: the training objective chose it."


def changed_position(step):
    """The position of the token that a step took, where its tries were at several; else the step's own."""
    taken = [tried.position for tried in step.shortlist if tried.prompt_ids == step.prompt_ids]
    return step.position if not taken or taken[0] is None else taken[0]


def log_line(step, steps):
    """One line about a step of `steps`."""
    position = "start" if step.position is None else f"{changed_position(step):5d}"
    return (
        f"step {step.step:3d}/{steps}  position {position}  objective {step.objective:7.3f}  "
        f"ce {step.cross_entropy:7.3f}  error {step.error:.2f}  nll {step.nll:5.2f}  "
        f"best {step.best.objective:7.3f}  {sum(step.seconds.values()):5.1f} s  {step.prompt}"
    )


def text_log_line(step, budget):
    """One line about a `TextStep`; budget: in generations, 0 for none."""
    of_budget = f"/{budget}" if budget else ""
    asked = step.replies.get("all", 0)
    refused = asked - step.replies.get("new", 0) - step.replies.get("repeated", 0)
    return (
        f"round {step.step:3d}  scored {step.totals['scored_generations']:5d}{of_budget}  new {len(step.proposed):3d}  "
        f"replies {asked:4d}, refused {refused}  optimizer tokens {step.totals.get('optimizer_tokens', 0):6d}  "
        f"best {100 * step.best.accuracy:5.1f} %  {sum(step.seconds.values()):5.1f} s  {step.best.prompt}"
    )

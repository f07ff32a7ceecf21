"""Small instruction models on real tasks: methods, seeds and transfer at an equal number of steps, in pieces.

    python benchmarks/real_models.py --models A B --source DIR            # run what is missing, then write the tables
    python benchmarks/real_models.py --models A B --source DIR --minutes 60      # start no piece after an hour
    python benchmarks/real_models.py --models A B --source DIR --only-table      # the tables of what is there
    python benchmarks/real_models.py --models A B --source DIR --headroom        # which tasks leave room

A piece is one call of a stage script: the fixed prompts of a task and model (stage 3), one search (stage 2), or a
search's best prompt on another model (stage 4). Everything lies in files of the stages, so a killed driver goes on
with the same command. Other settings need another --out. The first seed of everything comes first, and of that the
cheap pieces, so that an unfinished table is of use. Writes results.md and results.png.
"""

import json
import shlex
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]
from real_models_table import Measurement, SearchRecord, Study, headroom_table, write_results

from support.evaluation import read_predictions, read_results, reference_of, require_this_grader, rows_hash
from support.files import alone_in, read_jsonl, require, write_json, write_jsonl
from support.runs import TextStep, read_steps
from support.settings import ModelFlags, TaskFlags, as_flag, flag, parse_flags, run_script
from support.sources import open_task

# --- What is run ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """The flags of the stage scripts that decide what a piece costs."""

    max_new_tokens: int = 160  # longest reasoning
    train_rows: int = 30
    steps: int = 20
    shortlist_size: int = 3  # prompts scored at each step, besides the incumbent
    finalists: int = 5  # prompts of a search that compete on dev rows
    eval_rows: int = 0  # dev and test rows, at most so many of each; 0: all
    initial_prompt: str = ""  # empty: the task's own
    audit_every: int = 0  # so often generations of the AUDITED searches tell what a shortlist is worth; 0: never


# Qwen's reasonings on 24 dev rows of bbh/navigate, at most 320 tokens (chosen by length, not by accuracy): under the
# paper's initial prompt 255 tokens, 21 % cut; under this one 53, none cut; under one that asks for two sentences 11,
# which is hardly a reasoning; under one that asks for five short lines 140, 8 % cut. SmolLM2's under the paper's: 40.
IN_SHORT_STEPS = "proper logical reasoning in a few short steps. Finally give the actual correct answer."
MODELS = {  # the model's folder: its setting
    "SmolLM2-135M-Instruct": Setting(max_new_tokens=100, eval_rows=200),
    "Qwen2.5-Coder-0.5B-Instruct": Setting(max_new_tokens=320, eval_rows=200, initial_prompt=IN_SHORT_STEPS),
}
CHANGES = {  # (the model's folder, task): what is different there
    ("Qwen2.5-Coder-0.5B-Instruct", "gsm8k"): {"eval_rows": 300},
}
TICKETS = "examples/tickets.csv"
TASKS = ("bbh/navigate", TICKETS)
TASK_FLAGS = {  # task: how it is asked, where that is not the table's way
    TICKETS: {
        "question_key": "message",
        "answer_key": "team",
        "split_seed": -1,  # in the file's order, as they were when the published numbers were measured
        "extractor": "So the right team is",
        "kind": "choice",
        # The teams stand before the message: the baselines drop what stands between it and the prompt.
        "template": (
            "Which team is right for this: Billing, Technical issue or Account access?\n{question}\nUse {prompt}"
        ),
    },
}
METHODS = {  # what --methods calls it: (its name in tables, flags of stage 2)
    "greater": ("GReaTer", {}),
    "random": ("random shortlist", {"shortlist": "random"}),
    "likeliest": ("likeliest shortlist", {"shortlist": "likeliest"}),
    "all-positions": ("all positions", {"positions": "all"}),
}
AUDITED = ("greater",)  # methods whose shortlists are compared with random ones
BASELINES = ("empty", "zero-shot chain of thought")
# Tasks of which --headroom finds those to run: a closed set of answers, questions of less than 500 letters.
HEADROOM_TASKS = (
    "bbh/boolean_expressions",
    "bbh/date_understanding",
    "bbh/disambiguation_qa",
    "bbh/hyperbaton",
    "bbh/logical_deduction_three_objects",
    "bbh/movie_recommendation",
    "bbh/navigate",
    "bbh/penguins_in_a_table",
    "bbh/reasoning_about_colored_objects",
    "bbh/ruin_names",
    "bbh/snarks",
    "bbh/sports_understanding",
    "bbh/tracking_shuffled_objects_three_objects",
    "bbh/web_of_lies",
)
HEADROOM_ROWS = 40


@dataclass
class PieceFlags:
    """Flags of every script that runs searches in pieces."""

    GROUP = "the pieces"
    KNOWN = METHODS  # methods that --methods may name
    headroom = False
    models: list[str] = field(default_factory=list, metadata={"help": "folders or hub names of models"})
    tasks: list[str] = field(default_factory=list, metadata={"help": "tasks; without it those of the script's tables"})
    seeds: list[int] = field(default_factory=lambda: [0, 1], metadata={"help": "seeds of the searches"})
    methods: list[str] = field(default_factory=list, metadata={"help": "what searches; without it all that there are"})
    source: str = flag("", "folder of the authors' data files; empty: the hub")
    minutes: float = flag(0, "start no new piece after so many minutes; 0: run all")
    only_table: bool = flag(False, "run nothing; write the tables of what is there")
    stage_flags: str = flag("", 'more flags of stages 2 and 3, in one text: --stage-flags="--dtype float32"')
    note: str = flag("", "a sentence for results.md, such as what the models' weights are")
    max_new_tokens: int = flag(0, "for all models, instead of the script's table; so are the next four; 0: the table's")
    train_rows: int = flag(0, "training rows")
    shortlist_size: int = flag(0, "prompts scored at each step")
    finalists: int = flag(0, "prompts that compete on dev rows")
    eval_rows: int = flag(0, "dev and test rows, at most so many of each")
    initial_prompt: str = flag("", "for all models, instead of the script's table, and of the task's own")

    def __post_init__(self):
        require(self.models, "say which models: --models with folders or hub names")
        self.tasks = self.tasks or self.usual_tasks()
        self.methods = self.methods or list(self.KNOWN)
        unknown = [method for method in self.methods if method not in self.KNOWN]
        require(not unknown, f"--methods: {', '.join(unknown)} is none of {', '.join(self.KNOWN)}")
        for name in ("models", "tasks", "seeds", "methods"):
            given = getattr(self, name)
            require(given and len(set(given)) == len(given), f"--{name}: none, or one twice")
        self.models = [ModelFlags(model).model_path() for model in self.models]
        names = [model_name(model) for model in self.models]
        require(len(set(names)) == len(names), "--models: two are called the same")
        for one in fields(self):
            if one.type in (int, float):
                require(getattr(self, one.name) >= 0, f"{as_flag(one.name)} must not be negative")

    def usual_tasks(self):
        return list(TASKS)

    def search_flags(self, method, setting):
        """{flag: value} of stage 2 that a search by the method has besides those of every piece."""
        names = ("train_rows", "steps", "shortlist_size", "finalists")
        audits = {"audit_every": setting.audit_every} if method in AUDITED and setting.audit_every else {}
        return {name: getattr(setting, name) for name in names} | audits | self.KNOWN[method][1]


@dataclass
class Flags(PieceFlags):
    out: str = flag("runs/real-models", "folder of all pieces and of the tables")
    steps: int = flag(0, "steps of a search, instead of the script's table; 0: the table's")
    audit_every: int = flag(0, "audit every so many steps of GReaTer's searches; 0: none")
    headroom: bool = flag(False, f"measure the initial prompts on {HEADROOM_ROWS} dev rows of many tasks instead")

    def usual_tasks(self):
        return list(HEADROOM_TASKS if self.headroom else TASKS)


def model_name(model):
    return Path(model).name


def setting_of(flags, model, task):
    """The `Setting` of a model on a task."""
    name = model_name(model)
    changes = dict(CHANGES.get((name, task), {}))
    for f in fields(Setting):
        if given := getattr(flags, f.name, None):
            changes[f.name] = given
    return replace(MODELS.get(name, Setting()), **changes)


# --- Pieces -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Piece:
    """One call of a stage script."""

    kind: str  # fixed, search, transfer or headroom
    task: str  # as --task takes it
    model: str  # that answers
    method: str = ""  # of a search; of a transfer, that of the search whose prompt it moves
    seed: int | None = None
    origin: str = ""  # of a transfer: the model that the prompt was found with

    @property
    def label(self):
        """Its name in the log, and of its files in OUT/pieces."""
        task, model = task_label(self.task), model_name(self.model)
        if self.kind == "search":
            return f"{task}-{model}-{self.method}-seed{self.seed}"
        if self.kind == "transfer":
            return f"{task}-{model_name(self.origin)}-{self.method}-seed{self.seed}-on-{model}"
        return f"{task}-{model}-{self.kind}"

    @property
    def search(self):
        """The search whose prompt a transfer moves."""
        return Piece("search", self.task, self.origin, self.method, self.seed)


def task_label(task):
    return task.removesuffix(".jsonl").replace("/", "-")


def folder_of(piece, out):
    """Where the stage script writes. All prompts moved to one model on one task share a folder, so that the initial
    prompt is answered once."""
    if piece.kind == "transfer":
        return Path(out) / "transfer" / f"{task_label(piece.task)}-on-{model_name(piece.model)}"
    return Path(out) / piece.kind / piece.label


def plan(flags):
    """All pieces, in the order in which they are run."""
    if flags.headroom:
        pieces = [Piece("headroom", task, model) for model in flags.models for task in flags.tasks]
        return sorted(pieces, key=lambda piece: cost(piece, flags))
    groups = [Piece("fixed", task, model) for task in flags.tasks for model in flags.models]
    groups.sort(key=lambda piece: cost(piece, flags))
    pieces = []
    for seed in flags.seeds:
        for fixed in groups:
            if seed == flags.seeds[0]:
                pieces.append(fixed)
            for method in flags.methods:
                pieces.append(Piece("search", fixed.task, fixed.model, method, seed))
        pieces += transfers(groups, seed, flags)
    return pieces


def transfers(groups, seed, flags):
    """GReaTer's prompts of a seed on each of the other models."""
    if "greater" not in flags.methods:
        return []
    pieces = []
    for group in groups:
        for origin in flags.models:
            if origin != group.model:
                pieces.append(Piece("transfer", group.task, group.model, "greater", seed, origin))
    return pieces


def cost(piece, flags):
    """A rough measure of a task and model's cost: bytes of weights times tokens of a reasoning."""
    weights = sum(path.stat().st_size for path in Path(piece.model).glob("*.safetensors"))
    return weights * setting_of(flags, piece.model, piece.task).max_new_tokens


# --- A piece's command --------------------------------------------------------------------------------------


def stage_call(piece, flags):
    """(script, {flag: value}, more words) of a piece, without the places where files lie."""
    setting = setting_of(flags, piece.model, piece.task)
    shared = {"max_new_tokens": setting.max_new_tokens, "eval_rows": setting.eval_rows}
    if piece.kind == "transfer":
        run = folder_of(piece.search, flags.out)
        return "04_transfer.py", {"runs": run, "targets": piece.model} | shared, []
    shared |= {"task": piece.task, "model": piece.model} | TASK_FLAGS.get(piece.task, {})
    more = shlex.split(flags.stage_flags)
    if piece.kind == "search":
        own = flags.search_flags(piece.method, setting) | {"seed": piece.seed}
        if setting.initial_prompt:
            own["initial_prompt"] = setting.initial_prompt
        return "02_optimize.py", shared | own, more
    if piece.kind == "headroom":
        return "03_evaluate.py", shared | {"split": "dev", "eval_rows": HEADROOM_ROWS, "mistakes": 0}, more
    return "03_evaluate.py", shared | {"split": "test", "mistakes": 0}, [*more, "--baselines"]


def command_of(piece, flags):
    """The words of the command that runs a piece."""
    script, values, more = stage_call(piece, flags)
    where = "out" if piece.kind == "transfer" else "run_dir"
    values = values | {where: folder_of(piece, flags.out), "data_dir": data_dir(flags), "source": flags.source}
    words = [sys.executable, str(ROOT / script)]
    for name, value in values.items():
        words += [as_flag(name), str(value)]
    return words + more


def data_dir(flags):
    return Path(flags.out) / "data"


def settings_path(piece, flags):
    """The file that says with which settings a piece was begun."""
    return Path(flags.out) / "pieces" / f"{piece.label}.json"


def settings_record(piece, flags):
    """What that file holds: the flags that the numbers depend on."""
    script, values, more = stage_call(piece, flags)
    initial_prompt = setting_of(flags, piece.model, piece.task).initial_prompt
    values = {name: str(value) for name, value in values.items() if name != "optimizer_endpoint"}  # a place
    return {"script": script, "flags": values, "more": more, "initial_prompt": initial_prompt}


def check_settings(pieces, flags):
    """Errors: UserError if a piece was begun with other settings than the present ones."""
    for piece in pieces:
        path = settings_path(piece, flags)
        if path.exists():
            same = json.loads(path.read_text(encoding="utf-8")) == settings_record(piece, flags)
            require(same, f"{path}: begun with other settings than these: choose another --out")


# --- Running -------------------------------------------------------------------------------------------------


def run_pieces(pieces, tasks, flags):
    """Run the pieces that are not done. Returns the labels of those whose script failed.

    tasks: {task: (Task, {split: rows})}
    """
    started, failed = time.monotonic(), []
    signal.signal(signal.SIGTERM, stop)
    for number, piece in enumerate(pieces, 1):
        if is_done(piece, tasks, flags):
            continue
        minutes = (time.monotonic() - started) / 60
        if flags.minutes and minutes >= flags.minutes:
            print(f"{minutes:.1f} minutes are over; the same command goes on from here")
            break
        print(f"[{number}/{len(pieces)}] {piece.label} ... ", end="", flush=True)
        begun = time.monotonic()
        trouble = run_piece(piece, tasks, flags)
        print(trouble or f"{(time.monotonic() - begun) / 60:.1f} minutes", flush=True)
        if trouble:
            failed.append(piece.label)
    return failed


def stop(signal_number, frame):
    """Let SIGTERM end this script as Ctrl-C does, so that the stage script at work ends with it."""
    raise KeyboardInterrupt


def run_piece(piece, tasks, flags):
    """Run one piece. Returns what went wrong in a line, or ""."""
    if piece.kind == "transfer" and not is_done(piece.search, tasks, flags):
        return "its search is not finished"
    path = settings_path(piece, flags)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, settings_record(piece, flags))
    if piece.kind in ("fixed", "headroom"):
        write_initial_prompt(piece, tasks, flags)
    log_path = path.with_suffix(".log")
    with open(log_path, "a", encoding="utf-8") as log:
        code = subprocess.run(command_of(piece, flags), stdout=log, stderr=subprocess.STDOUT).returncode
    if code:
        last = log_path.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
        return f"failed with exit code {code}, see {log_path}: {' '.join(last)[-300:]}"
    if not is_done(piece, tasks, flags):
        return f"its script ended well, but left no test result; see {log_path}"
    return ""


def write_initial_prompt(piece, tasks, flags):
    """Stage 3 takes the initial prompt from a file of prompts, where the setting may have another than the task."""
    task, _ = tasks[piece.task]
    prompt = setting_of(flags, piece.model, piece.task).initial_prompt or task.initial_prompt
    folder = folder_of(piece, flags.out)
    folder.mkdir(parents=True, exist_ok=True)
    write_jsonl(folder / "prompts.jsonl", [{"task": task.name, "prompt": prompt, "initial": True}])


# --- Reading what the pieces left -------------------------------------------------------------------------------


def is_done(piece, tasks, flags):
    return len(results_of(piece, tasks, flags)) == len(wanted(piece))


def wanted(piece):
    """The names of the results that a finished piece has."""
    others = {"fixed": BASELINES, "search": ("best",), "transfer": ("moved",), "headroom": ()}
    return (*others[piece.kind], "initial")


def results_of(piece, tasks, flags):
    """{name: `Result`}, of `wanted`, as far as they are there, on the rows and with the limit of the setting."""
    folder = results_folder(piece, flags)
    if folder is None or not (folder / "results.jsonl").exists():
        return {}
    results = read_results(folder / "results.jsonl")
    require_this_grader(results, folder / "results.jsonl")
    split, rows = rows_of(piece, tasks, flags)
    limit = setting_of(flags, piece.model, piece.task).max_new_tokens
    own = (split, rows_hash(rows), limit)
    names = transfer_names(piece, flags) if piece.kind == "transfer" else {}
    found = {}
    for result in results:
        if (result["split"], result["rows"], result["max_new_tokens"]) == own:
            for name in names.get(result["prompt"], [result.get("name", result["role"])]):
                found[name] = result
    return {name: found[name] for name in wanted(piece) if name in found}


def transfer_names(piece, flags):
    """{prompt: its names} of the two prompts that a transfer evaluates, which may be the same."""
    run = folder_of(piece.search, flags.out)
    path = run / "prompts.jsonl"
    prompts = read_jsonl(path) if path.exists() else []
    names = {}
    for prompt in prompts:
        if prompt["initial"]:
            names.setdefault(prompt["prompt"], []).append("initial")
    if prompts:
        names.setdefault(prompts[0]["prompt"], []).append("moved")
    return names


def results_folder(piece, flags):
    """The folder with a piece's results.jsonl; None if a transfer has none yet."""
    folder = folder_of(piece, flags.out)
    if piece.kind == "transfer":  # stage 4 makes a folder for the task, and in it one for the model
        return next((path.parent for path in folder.glob("*/*/results.jsonl")), None)
    return folder


def rows_of(piece, tasks, flags):
    """(split, rows) on which a piece's prompts are measured."""
    _, splits = tasks[piece.task]
    if piece.kind == "headroom":
        return "dev", splits["dev"][:HEADROOM_ROWS]
    eval_rows = setting_of(flags, piece.model, piece.task).eval_rows
    return "test", splits["test"][: eval_rows or None]


def measurements_of(piece, tasks, flags):
    """The `Measurement`s of a finished piece."""
    results = results_of(piece, tasks, flags)
    _, rows = rows_of(piece, tasks, flags)
    folder = results_folder(piece, flags)
    initial = read_predictions(folder, results["initial"], rows)
    task, _ = tasks[piece.task]
    found = []
    for name, result in results.items():
        if name == "initial" and piece.kind in ("search", "transfer"):
            continue  # the fixed piece has it
        own = Measurement(
            task=task.name,
            model=model_name(piece.model),
            method=method_label(piece, name, flags),
            seed=piece.seed,
            result=result,
            predictions=read_predictions(folder, result, rows),
            initial=initial,
            minutes=result["minutes"],
        )
        if piece.kind == "search":
            own = replace(own, minutes=search_minutes(folder), scored=scored_generations(folder, piece, flags))
        found.append(own)
    return found


def method_label(piece, name, flags):
    if piece.kind == "search":
        return flags.KNOWN[piece.method][0]
    if piece.kind == "transfer":
        return f"{flags.KNOWN[piece.method][0]} of {model_name(piece.origin)}"
    return name


def search_minutes(folder):
    """Minutes of a search's steps, without audits, and of its evaluations on dev and test rows, each counted once."""
    seconds = 0.0
    for step in read_steps(folder / "steps.jsonl"):
        seconds += sum(step.seconds.values()) - step.seconds.get("audit", 0)
    minutes = seconds / 60
    by_evaluation = {reference_of(result): result["minutes"] for result in read_results(folder / "results.jsonl")}
    return minutes + sum(by_evaluation.values())


def scored_generations(folder, piece, flags):
    """How many reasonings the search has scored: new prompts tried times training rows."""
    new = 0
    for step in read_steps(folder / "steps.jsonl"):
        if isinstance(step, TextStep):
            new += len(step.proposed) - (step.step == 0)  # the initial prompt is none that was tried
        else:
            new += sum(tried.new for tried in step.shortlist)
    return new * setting_of(flags, piece.model, piece.task).train_rows


def search_record(piece, tasks, flags):
    """The `SearchRecord` of a finished search."""
    folder = folder_of(piece, flags.out)
    task, _ = tasks[piece.task]
    return SearchRecord(
        task=task.name,
        model=model_name(piece.model),
        method=flags.KNOWN[piece.method][0],
        seed=piece.seed,
        steps=read_steps(folder / "steps.jsonl"),
        prompts=read_jsonl(folder / "prompts.jsonl"),
    )


# --- The script --------------------------------------------------------------------------------------------------


def settings_rows(tasks, flags, left_out=()):
    """Rows of the table of settings, its head first. left_out: fields of `Setting`."""
    names = [f.name for f in fields(Setting) if f.name not in left_out]
    rows = [["task", "model", *(name.replace("_", " ") for name in names), "extractor"]]
    for name, (task, _) in tasks.items():
        for model in flags.models:
            setting = setting_of(flags, model, name)
            setting = replace(setting, initial_prompt=setting.initial_prompt or task.initial_prompt)
            values = [getattr(setting, name) for name in names]
            rows.append([task.name, model_name(model), *values, task.extractor])
    return rows


def open_tasks(flags):
    """{task: (Task, {split: rows})}. Errors: UserError for one that is not there, before long work."""
    tasks = {}
    for name in flags.tasks:
        given = TASK_FLAGS.get(name, {})
        tasks[name] = open_task(TaskFlags(task=name, data_dir=str(data_dir(flags)), source=flags.source, **given))
        scores = tasks[name][0].is_generation
        require(not scores, f"--tasks {name}: the tables here count right answers, and generated texts get scores")
    return tasks


def write_tables(pieces, tasks, flags):
    """Write and print the tables of the finished pieces, and what is missing."""
    done = [piece for piece in pieces if is_done(piece, tasks, flags)]
    missing = [piece.label for piece in pieces if piece not in done]
    measured = {"main": [], "transfer": [], "headroom": []}
    for piece in done:
        table = piece.kind if piece.kind in measured else "main"
        measured[table] += measurements_of(piece, tasks, flags)
    if flags.headroom:
        text = headroom_table(measured["headroom"], missing)
        (Path(flags.out) / "headroom.md").write_text(text, encoding="utf-8")
        print(f"\n{text}\n  {Path(flags.out) / 'headroom.md'}")
        return
    study = Study(
        measurements=measured["main"],
        transfers=measured["transfer"],
        searches=[search_record(piece, tasks, flags) for piece in done if piece.kind == "search"],
        settings=settings_rows(tasks, flags),
        notes=[flags.note] if flags.note else [],
        missing=missing,
    )
    paths = write_results(study, Path(flags.out))
    print(f"\n{paths[0].read_text(encoding='utf-8')}")
    print("\n".join(f"  {path}" for path in paths))


@contextmanager
def finished_pieces(flags):
    """Run the pieces that are missing; in the block (pieces, tasks), of which tables can be made, alone in the folder.

    Errors: UserError behind the block that names the pieces whose script failed.
    """
    pieces = plan(flags)
    with alone_in(flags.out):
        tasks = open_tasks(flags)
        check_settings(pieces, flags)
        failed = [] if flags.only_table else run_pieces(pieces, tasks, flags)
        yield pieces, tasks
    require(not failed, f"{len(failed)} pieces failed: {', '.join(failed)}; the same command tries them again")


def main():
    flags = parse_flags(Flags, __doc__)
    with finished_pieces(flags) as (pieces, tasks):
        write_tables(pieces, tasks, flags)


if __name__ == "__main__":
    run_script(main)

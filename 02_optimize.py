"""Stage 2: search a prompt -> runs/<run>/{run.json,steps.jsonl,prompts.jsonl,results.jsonl}.

    python 02_optimize.py --task demo
    python 02_optimize.py --task gsm8k --model meta-llama/Meta-Llama-3-8B-Instruct
    python 02_optimize.py --task gsm8k --method opro --budget 4000
    python 02_optimize.py --task demo --seeds 0 1 2
    python 02_optimize.py --task my.csv --question-key message --answer-key team --model path/to/model

Prepares the task's data itself where stage 01 has not been run. A killed run goes on with the same command and
ends with the same result, a finished one with more --steps (--rounds, --budget) to that of a run that had them from
its start; a run with other settings needs another --run-dir. The prompt is searched on training rows and chosen on dev
rows; the test rows are read once, at the end, for the initial and the chosen prompt.
"""

import random
import sys
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path

from support.answerers import LazyModel, server_answerer
from support.evaluation import Evaluation, estimate, evaluate_once, read_predictions, rename_former_best
from support.files import is_text, read_jsonl, require, require_fields, write_chained
from support.identity import identity_of
from support.instruments import signal_of, signal_verdict
from support.plans import planned, rounds_over, rounds_within
from support.progress import in_words, open_bar, remaining
from support.ranks import working_in
from support.resume import add_step, begin_run, continue_run, require_same_run
from support.runs import (
    finalists,
    generations_of,
    initial_of,
    log_line,
    rank_prompts,
    read_steps,
    record_of_run,
    run_folder,
    scores_of,
    since_improved,
    text_finalists,
    text_log_line,
)
from support.settings import (
    GREATER,
    TITLES,
    GenerationSettings,
    ModelFlags,
    SearchSettings,
    ServerFlags,
    TaskFlags,
    TextSettings,
    as_flag,
    flag,
    parse_flags,
    run_script,
)
from support.sources import open_task, read_prepared
from support.tables import Outcome, outcome_report, seeds_report
from support.takeaway import messages_of, sent, write_programs
from support.tokens import encode_prompt, encode_row, prompt_text

COMMON = ("preset", "train_rows", "choose_on", "seed")  # of SearchSettings, what every method has


@dataclass
class Flags(ServerFlags, TextSettings, SearchSettings, ModelFlags, TaskFlags):
    initial_prompt: str | None = flag(None, "where the search starts; without it the task's own")
    finalists: int = flag(10, "prompts of the run that compete on dev rows")
    eval_rows: int = flag(0, "dev and test rows to evaluate on; 0: all")
    run_dir: str = flag("", "where the run is written; empty: runs/<task>-<model>-seed<seed>, behind them the method")
    patience: int = flag(0, "stop when the best prompt has not improved for so many steps, or rounds; 0: do not")
    seeds: list[int] = field(
        default_factory=list, metadata={"help": "several seeds, a run each, and at the end a table of them"}
    )
    dry_run: bool = flag(False, "stop after the check of a few rows, and before any search")


@dataclass(frozen=True)
class Job:
    """What a run works on."""

    flags: Flags
    task: object  # tasks.Task
    splits: dict[str, list[dict]]
    train: list[dict]  # the rows of the search
    starts: list[str]  # the prompts it starts from, the initial one first
    run_dir: Path
    model: LazyModel

    @property
    def evaluated(self):
        """{split: rows} that come behind the search."""
        return {split: self.splits[split][: self.flags.eval_rows or None] for split in ("dev", "test")}


def main():
    flags = parse_flags(Flags, __doc__)
    require(flags.finalists >= 1 and flags.eval_rows >= 0, "--finalists must be at least 1, --eval-rows at least 0")
    require(flags.patience >= 0, "--patience must be at least 0")
    require(not (flags.seed and flags.seeds), "--seed and --seeds: give one of them")
    require(len(set(flags.seeds)) == len(flags.seeds), "--seeds: each of them once")
    flags.check_server_flags()
    flags.resolve()
    require_own_settings(flags)
    flags.model = flags.model_path()
    if flags.optimizer_model and not flags.optimizer_endpoint:
        flags.optimizer_model = ModelFlags(flags.optimizer_model, flags.device, flags.dtype).model_path()
    task, splits = open_task(flags)
    require_loss(flags, task)
    starts = starting_prompts(flags, task)
    task = replace(task, initial_prompt=starts[0])
    available = len(splits["train"])
    if flags.own_rows and flags.train_rows > available:
        print(f"--train-rows {flags.train_rows}: there are {available} training rows, all are used")
        flags.train_rows = available
    require(
        flags.train_rows <= available, f"--train-rows {flags.train_rows}: {task.name} has {available} training rows"
    )
    model = LazyModel(flags.model, flags.device, flags.dtype, flags.device_map)
    jobs = []
    for seed in flags.seeds or [flags.seed]:
        train = random.Random(f"{seed}/rows").sample(splits["train"], flags.train_rows)
        own_flags = replace(flags, seed=seed)
        jobs.append(Job(own_flags, task, splits, train, starts, folder_of(own_flags, task), model))
    require_budget(jobs[0])
    if flags.dry_run:
        optimize_task(jobs[0], None)
        return
    records = [record_of_job(job) for job in jobs]
    for job, record in zip(jobs, records):  # before the first of them takes its time
        require_same_run(job.run_dir, record)
    outcomes = {}
    for job, record in zip(jobs, records):
        if flags.seeds:
            print(f"\nseed {job.flags.seed}: {job.run_dir}", flush=True)
        with working_in(job.run_dir) as folder:
            others = [other.run_dir for other in jobs if other is not job]
            outcomes[job.flags.seed] = optimize_task(replace(job, run_dir=folder), record, others)
    if flags.seeds:
        print(f"\n{seeds_report(outcomes, best_name(flags))}")


# --- The flags ---------------------------------------------------------------------------------------------


def require_own_settings(flags):
    """Errors: UserError for a preset or a setting of GReaTer's that the text methods do not have."""
    if flags.method == GREATER:
        known = "GReaTer has paper, released and best"
        require(flags.preset != "published", f"--preset published is the text methods'; {known}")
        return
    of_greater = flags.preset in ("released", "best")
    require(not of_greater, f"--preset {flags.preset} is GReaTer's, not that of --method {flags.method}")
    usual = parse_flags(Flags, "", given=[])
    changed = [as_flag(name) for name in greater_settings() if getattr(flags, name) != getattr(usual, name)]
    require(not changed, f"{', '.join(changed)}: only GReaTer has this setting, not --method {flags.method}")


def require_loss(flags, task):
    """Errors: UserError if GReaTer shall search on texts to be generated. Its loss is that of an answer behind the
    model's own reasoning, and here no reasoning comes before the answer. With an empty one the gradient would be of how
    likely one of many good texts is, word by word, which the score does not ask."""
    others = ", ".join(method for method in TITLES if method != GREATER)
    why = f"--kind {task.kind}: the whole reply is the answer, and GReaTer's loss is that of an answer behind reasoning"
    require(flags.method != GREATER or not task.is_generation, f"{why}: choose another --method ({others})")


def greater_settings():
    """Names of the settings that GReaTer alone has."""
    shared = {f.name for f in fields(GenerationSettings)} | set(COMMON)
    return [f.name for f in fields(SearchSettings) if f.name not in shared]


def starting_prompts(flags, task):
    """The prompts to start from, the initial one first. Errors: UserError for a file without such prompts."""
    if flags.init_from:
        require(flags.initial_prompt is None, "--init-from and --initial-prompt both say where to start: give one")
        records = require_fields(read_jsonl(flags.init_from), flags.init_from, prompt=str)
        prompts = list(dict.fromkeys(record["prompt"].strip() for record in records))
        require(prompts and all(prompts), f"--init-from {flags.init_from} holds no prompts, or an empty one")
        return prompts
    start = task.initial_prompt if flags.initial_prompt is None else flags.initial_prompt.strip()
    require(start and is_text(start), "--initial-prompt has no tokens: give it at least one word, of readable text")
    return [start]


def folder_of(flags, task):
    """Where the run of a seed is written."""
    if flags.run_dir:
        return Path(f"{flags.run_dir}-seed{flags.seed}" if flags.seeds else flags.run_dir)
    folder = run_folder(task.name, flags.model, flags.seed)
    return folder if flags.method == GREATER else folder.with_name(f"{folder.name}-{flags.method}")


def record_of_job(job):
    """What run.json is to hold."""
    prepared = read_prepared(job.task, job.flags.data_dir)
    return record_of_run(configuration(job), prepared, [row["id"] for row in job.train], job.model.dtype_here)


def configuration(job):
    """The settings that a run is recorded with: those that its method has."""
    flags = job.flags
    # The task's parts as they are now, also where the flags leave them to it: a later version's task may have others.
    config = flags.used() | job.task.parts | {"initial_prompt": job.task.initial_prompt}
    left_out = {"dry_run", "seeds", "device_map", *(f.name for f in fields(ServerFlags))}
    if flags.method == GREATER:
        left_out |= {f.name for f in fields(TextSettings)} - ({"budget"} if flags.budget else set())
    else:
        left_out |= {*greater_settings(), "init_from"}
        left_out |= {f.name for f in fields(TextSettings) if getattr(flags, f.name) is None}
        config["method"] = TITLES[flags.method]
        on_server = flags.optimizer_endpoint and f"on a server, {flags.optimizer_model}"
        config["optimizer_hash"] = on_server or identity_of(flags.optimizer_model or flags.model)
        config["start_prompts"] = job.starts
        if flags.word_schedule in ("cosine", "linear"):  # which falls over all rounds
            config["planned_rounds"] = rounds_of(job)
    return {name: value for name, value in config.items() if name not in left_out}


def require_budget(job):
    """Errors: UserError if --budget does not hold what a search cannot do without. Warns if it holds no whole round."""
    flags, rows = job.flags, len(job.train)
    if not flags.budget:
        return
    if flags.method == GREATER:
        least, first = rows * (1 + flags.tries_per_step), "the initial prompt and one step"
    else:
        least, first = rows * (len(job.starts) + 1), "the prompts it starts from and one more"
    too_small = f"--budget {flags.budget}: {first}, on {rows} training rows, take {least} generations"
    require(flags.budget >= least, too_small)


# --- The run -----------------------------------------------------------------------------------------------


def optimize_task(job, record, elsewhere=()):
    """The `Outcome` of a run: the search, its finalists on dev rows, and the initial and the best prompt on test rows.
    A dry run has none.

    record: what run.json is to hold; elsewhere: folders of runs that may have evaluated the same prompts.
    """
    flags, run_dir = job.flags, job.run_dir
    steps = [] if flags.dry_run else continue_run(run_dir, record)
    find = search_tokens if flags.method == GREATER else search_text
    prompts = find(job, steps, record)
    if flags.dry_run:
        return None
    answerer = job.model.answerer()

    def evaluate(prompt, role, split):
        rows = job.evaluated[split]
        evaluation = Evaluation(answerer, job.task, split, rows, prompt, flags)
        return evaluate_once(evaluation, run_dir, role, elsewhere=elsewhere)

    with open_bar(total=len(prompts), desc="finalists on dev", unit="prompt") as bar:
        for prompt in prompts:
            dev = evaluate(prompt["prompt"], "candidate", "dev")
            _, low, high, _ = estimate([dev], "paper")
            prompt |= {"task": job.task.name, "dev_accuracy": dev["accuracy"], "dev_stderr": dev["stderr"]}
            prompt |= {"dev_low": low, "dev_high": high, "messages": messages_of(job.task, prompt["prompt"])}
            bar.update()
    prompts = rank_prompts(prompts, flags.choose_on)
    write_chained(run_dir / "prompts.jsonl", prompts)
    rename_former_best(run_dir, prompts[0]["prompt"])

    results = {}
    for role, prompt in (("initial", initial_of(prompts)), ("best", prompts[0])):
        for split in ("dev", "test"):
            results[role, split] = evaluate(prompt["prompt"], role, split)
    test = job.evaluated["test"]
    predictions = [read_predictions(run_dir, results[role, "test"], test) for role in ("initial", "best")]
    outcome = Outcome(prompts, results, predictions)
    print(f"\n{outcome_report(outcome, best_name(flags))}")
    best = prompts[0]["prompt"]
    programs = write_programs(run_dir, job.task, best, flags.model, flags.max_new_tokens, job.model.tokenizer)
    print("\n".join(["\nwhat is sent with the best prompt:", *sent(job.task, best)]))
    if flags.method == GREATER:
        print(f"\n{signal_of_run(run_dir, prompts, flags)}")
    print_paths(run_dir)
    print("\n".join(f"  {path}" for path in programs))
    return outcome


def best_name(flags):
    """Of a prompt that the training rows chose nobody knows whether it is the best."""
    return "best" if flags.choose_on == "dev" else "best on train"


def search_tokens(job, steps, record):
    """GReaTer: records of its final prompts, as `final_prompts` gives them; None of a dry run.

    steps: those that are on disk, to which the others are added; record: what run.json is to hold.
    """
    flags, task, train = job.flags, job.task, job.train
    tokenizer = job.model.tokenizer
    first = encode_row(tokenizer, task, train[0])
    if not steps or not end_of_search(flags, steps, len(train)):
        rows = [encode_row(tokenizer, task, row) for row in train]
        start = encode_prompt(tokenizer, task, train[0]["question"], task.initial_prompt)[1]
        if not steps:  # what goes on has been checked
            check(job, rows)
        if flags.dry_run:
            return None
        if steps:
            require_room(job, rows)
            print(f"going on behind step {steps[-1].step} of {job.run_dir}")
        else:
            begin_run(job.run_dir, record)
        search(job, rows, start, steps)
    print(end_of_search(flags, steps, len(train)))
    return final_prompts(flags, tokenizer, first, steps)


def check(job, rows, calls=None):
    """Print what a few rows say about the search and its cost. Errors: UserError if memory does not hold it.

    rows: the tokens of the training rows; calls: text_optimizers.Calls of a text method.
    """
    from support.check import ROWS, check_rows, cost_of, require_memory, table, text_cost, warnings

    flags, task, train, engine = job.flags, job.task, job.train, job.model.engine
    require_room(job, rows)
    count = min(ROWS, len(rows))
    checked = check_rows(engine, task, train[:count], rows[:count], flags)
    print(f"\none row, {train[0]['id']}, under the initial prompt:")
    print("\n".join(checked.shown))
    print(f"\n{count} rows:")
    print("\n".join(table(checked, task, train)))
    for warning in warnings(checked, task, train, flags):
        print(f"  warning: {warning}")
    counts = {"finalists": flags.finalists} | {split: len(of_split) for split, of_split in job.evaluated.items()}
    if calls is None:
        cost = cost_of(engine, checked, rows, flags, counts)
    else:
        cost = text_cost(engine, checked, rows, flags, counts | asdict(calls))
    print(f"  {cost.line()}\n", flush=True)
    require_memory(engine, cost)


def require_room(job, rows):
    """Errors: UserError if a row of a split that is read, for training as `rows`, is too long for the model."""
    from support import check

    check.require_room(job.model.engine, job.task, {"train": job.train} | job.evaluated, rows, job.flags)


def search(job, rows, start, steps):
    """Add the steps that are missing to those that are there, each on disk before the next begins."""
    from beyond_paper import visit
    from greater_core import optimize

    flags, engine = job.flags, job.model.engine
    initial = max(0, len(steps) - 1)
    with open_bar(engine.progress, True, total=flags.steps, initial=initial, unit="step", desc="search") as bar:
        for step in optimize(engine, rows, start, flags, list(steps), visit):
            add_step(job.run_dir, step)
            steps.append(step)
            bar.write(log_line(step, flags.steps))
            left = remaining(flags, steps, len(job.evaluated["dev"]), len(job.evaluated["test"]))
            if step.step == 0:
                bar.write(str(left))
            sys.stdout.flush()  # so that a file shows it, too
            if end_of_search(flags, steps, len(rows)):
                break
            bar.set_description_str(f"search, then dev and test {in_words(left.dev + left.test)}", refresh=False)
            bar.update(step.step > 0)


def end_of_search(flags, steps, rows):
    """Why GReaTer's search on so many rows ends behind these steps; "" if it goes on."""
    spent = generations_of(steps, rows)
    if flags.budget and spent + flags.tries_per_step * rows > flags.budget:
        return f"--budget {flags.budget}: {spent} generations, no other step fits"
    done = f"{flags.steps} steps are done" if steps[-1].step >= flags.steps else ""
    return done or out_of_patience(flags, steps)


def out_of_patience(flags, steps):
    """Why --patience ends a search behind these steps; "" if it does not."""
    idle, last = since_improved(steps), steps[-1].step
    if not flags.patience or idle < flags.patience:
        return ""
    what, unit = ("objective", "steps") if flags.method == GREATER else ("accuracy", "rounds")
    return f"--patience {flags.patience}: the best {what} has not improved for {idle} {unit}; the search ends at {last}"


def final_prompts(flags, tokenizer, row, steps):
    """Records of the run's best finished prompts by training objective, and of the initial one."""
    scores = scores_of(steps)
    initial = next(iter(scores.values()))
    chosen = finalists(tokenizer, scores, flags.finalists)
    if initial not in chosen:
        chosen.append(initial)
    records = []
    for score in chosen:
        text = prompt_text(tokenizer, row, score.prompt_ids).strip()
        records.append({"prompt": text, "initial": score == initial} | asdict(score))
    return records


def search_text(job, steps, record):
    """A text method: records of its final prompts, as `runs.text_finalists` gives them; None of a dry run.

    steps, record: as of `search_tokens`.
    """
    from support.proposals import summary
    from text_optimizers import METHODS

    flags, method = job.flags, METHODS[job.flags.method]
    if not steps or not end_of_rounds(flags, steps, len(job.train)):
        optimizer = open_optimizer(job, method.meta_prompts)
        if not steps:
            calls = planned(flags, len(job.starts), rounds_of(job))
            say_calls(job, calls)
            rows = [encode_row(job.model.tokenizer, job.task, row) for row in job.train]
            check(job, rows, calls[-1])
        if flags.dry_run:
            return None
        if steps:
            print(f"going on behind round {steps[-1].step} of {job.run_dir}")
        else:
            begin_run(job.run_dir, record)
        search_rounds(job, method, optimizer, steps)
    print(end_of_rounds(flags, steps, len(job.train)))
    print("\n".join(summary(steps, TITLES[flags.method])))
    return text_finalists(steps, job.starts[0], flags.finalists)


def rounds_of(job):
    """How many rounds a text method plans for."""
    return job.flags.rounds or rounds_within(job.flags, len(job.starts), len(job.train))


def search_rounds(job, method, optimizer, steps):
    """Add the rounds that are missing to those that are there, which are taken from what was asked and scored."""
    from support.proposals import Judge
    from support.trials import Search, Trials
    from text_optimizers import optimize

    flags, engine, rounds, known = job.flags, job.model.engine, rounds_of(job), len(steps)
    trials = Trials(job.model.answerer(), optimizer, job.task, job.train, flags, job.run_dir, engine)
    shown = tuple(map(trials.worded, method.meta_prompts))
    judge = Judge(job.task, job.train, flags.longest_prompt, shown, engine.tokenizer)
    with open_bar(engine.progress, True, total=rounds + 1, initial=known, unit="round", desc="search") as bar:
        for step in optimize(method, Search(trials, judge, job.starts, rounds)):
            if step.step < known:
                same = step.proposed == steps[step.step].proposed
                require(same, f"round {step.step} of {job.run_dir} comes out otherwise: choose another --run-dir")
                continue
            add_step(job.run_dir, step)
            steps.append(step)
            bar.write(text_log_line(step, flags.budget))
            sys.stdout.flush()
            bar.update()
            if out_of_patience(flags, steps):
                break


def end_of_rounds(flags, steps, rows):
    """Why a text method's search on so many rows ends behind these steps; "" if it goes on."""
    over = f"{steps[-1].step} rounds are done" if rounds_over(flags, steps, rows) else ""
    return over or out_of_patience(flags, steps)


def open_optimizer(job, meta_prompts):
    """The Answerer that writes prompts. Errors: UserError if a model loaded here has no words for meta-prompts."""
    from support.check import require_words

    flags, model = job.flags, job.model
    if flags.optimizer_endpoint and meta_prompts:
        server_flags = {f.name: getattr(flags, f.name) for f in fields(ServerFlags)}
        ask = ServerFlags(**server_flags | {"answer_turn": "ask"})  # no half-written message is continued
        return server_answerer(ask, flags.optimizer_endpoint, flags.optimizer_model)
    if flags.optimizer_model not in ("", flags.model):
        model = LazyModel(flags.optimizer_model, flags.device, flags.dtype, flags.device_map)
    answerer = model.answerer()
    require_words(model.tokenizer, answerer.name, meta_prompts)
    return answerer


def say_calls(job, calls):
    """Print what the method does before it begins, and whether the budget holds a whole round."""
    flags, rows, whole = job.flags, len(job.train), calls[-1]
    limit = f", at most {flags.budget} by --budget" if flags.budget else ""
    print(
        f"{TITLES[flags.method]}, {len(calls) - 1} rounds: up to {whole.prompts} prompts on {rows} training rows, "
        f"{whole.prompts * rows} scored generations{limit}; {whole.requests} requests to the optimizer, "
        f"{whole.samples} replies"
    )
    one_round = calls[min(1, len(calls) - 1)].prompts * rows
    if flags.budget and one_round > flags.budget:
        print(f"  warning: the start and one whole round take {one_round} generations, --budget is {flags.budget}")
    if flags.budget and flags.budget < len(job.evaluated["dev"]):
        print(f"  warning: --budget {flags.budget} is less than one pass over the {len(job.evaluated['dev'])} dev rows")


def signal_of_run(run_dir, prompts, flags):
    """Two sentences on the gradient and the noise, from what the search recorded."""
    steps = read_steps(run_dir / "steps.jsonl")
    return signal_verdict(signal_of(steps, prompts, flags.train_rows, flags.shortlist))


def print_paths(run_dir):
    for name in ("prompts.jsonl", "steps.jsonl", "results.jsonl", "predictions.jsonl"):
        print(f"  {run_dir / name}")


if __name__ == "__main__":
    run_script(main)

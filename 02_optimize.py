"""Stage 2: search a prompt -> runs/<run>/{run.json,steps.jsonl,prompts.jsonl,results.jsonl}.

    python 02_optimize.py --task demo
    python 02_optimize.py --task gsm8k --model meta-llama/Meta-Llama-3-8B-Instruct
    python 02_optimize.py --task gsm8k --method opro --budget 4000
    python 02_optimize.py --task my.csv --question-key message --answer-key team --model path/to/model

Prepares the task's data itself where stage 01 has not been run. A killed run goes on with the same command and
ends with the same result; a run with other settings needs another --run-dir. The prompt is searched on training
rows and chosen on dev rows; the test rows are read once, at the end, for the initial and the chosen prompt.
"""

import random
import sys
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from support.answerers import local_answerer, server_answerer
from support.evaluation import Evaluation, estimate, evaluate_once, read_predictions
from support.files import append_jsonl, is_text, read_jsonl, require, require_fields, write_chained
from support.identity import identity_of
from support.progress import in_words, open_bar, remaining
from support.ranks import working_in
from support.runs import (
    begin_run,
    finalists,
    generations_of,
    initial_of,
    log_line,
    rank_prompts,
    read_steps,
    record_of_run,
    require_same_run,
    run_folder,
    scores_of,
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
from support.tables import LEGEND, accuracy_table, compare_reading, comparison_table, prompt_list, verdict
from support.takeaway import messages_of, sent, write_programs
from support.tokens import encode_prompt, encode_row, prompt_text

COMMON = ("preset", "train_rows", "choose_on", "seed")  # of SearchSettings, what every method has


@dataclass
class Flags(ServerFlags, TextSettings, SearchSettings, ModelFlags, TaskFlags):
    initial_prompt: str | None = flag(None, "where the search starts; without it the task's own")
    finalists: int = flag(10, "prompts of the run that compete on dev rows")
    eval_rows: int = flag(0, "dev and test rows to evaluate on; 0: all")
    run_dir: str = flag("", "where the run is written; empty: runs/<task>-<model>-seed<seed>, behind them the method")
    dry_run: bool = flag(False, "stop after the check of a few rows, and before any search")


@dataclass(frozen=True)
class Job:
    """What a run works on."""

    flags: Flags
    task: object  # tasks.Task
    splits: dict[str, list[dict]]
    train: list[dict]  # the rows of the search
    seeds: list[str]  # the prompts it starts from, the initial one first
    run_dir: Path
    record: dict | None = None  # what run.json is to hold; a dry run has none

    @property
    def evaluated(self):
        """{split: rows} that come behind the search."""
        return {split: self.splits[split][: self.flags.eval_rows or None] for split in ("dev", "test")}


def main():
    flags = parse_flags(Flags, __doc__)
    require(flags.finalists >= 1 and flags.eval_rows >= 0, "--finalists must be at least 1, --eval-rows at least 0")
    flags.check_server_flags()
    flags.resolve()
    require_own_settings(flags)
    flags.model = flags.model_path()
    if flags.optimizer_model and not flags.optimizer_endpoint:
        flags.optimizer_model = ModelFlags(flags.optimizer_model, flags.device, flags.dtype).model_path()
    task, splits = open_task(flags)
    seeds = starting_prompts(flags, task)
    task = replace(task, initial_prompt=seeds[0])
    available = len(splits["train"])
    if flags.own_rows and flags.train_rows > available:
        print(f"--train-rows {flags.train_rows}: there are {available} training rows, all are used")
        flags.train_rows = available
    require(
        flags.train_rows <= available, f"--train-rows {flags.train_rows}: {task.name} has {available} training rows"
    )
    train = random.Random(f"{flags.seed}/rows").sample(splits["train"], flags.train_rows)

    run_dir = Path(flags.run_dir) if flags.run_dir else default_folder(flags, task)
    job = Job(flags, task, splits, train, seeds, run_dir)
    require_budget(job)
    if flags.dry_run:
        optimize_task(job)
        return
    prepared = read_prepared(task, flags.data_dir)
    record = record_of_run(configuration(job), prepared, [row["id"] for row in train])
    with working_in(run_dir) as folder:
        require_same_run(folder, record)
        optimize_task(replace(job, record=record, run_dir=folder))


# --- The flags ---------------------------------------------------------------------------------------------


def require_own_settings(flags):
    """Errors: UserError for a preset or a setting of GReaTer's that the text methods do not have."""
    if flags.method == GREATER:
        require(flags.preset != "published", "--preset published is the text methods'; GReaTer has paper and released")
        return
    require(flags.preset != "released", f"--preset released is GReaTer's, not that of --method {flags.method}")
    usual = parse_flags(Flags, "", given=[])
    changed = [as_flag(name) for name in greater_settings() if getattr(flags, name) != getattr(usual, name)]
    require(not changed, f"{', '.join(changed)}: only GReaTer has this setting, not --method {flags.method}")


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


def default_folder(flags, task):
    folder = run_folder(task.name, flags.model, flags.seed)
    return folder if flags.method == GREATER else folder.with_name(f"{folder.name}-{flags.method}")


def configuration(job):
    """The settings that a run is recorded with: those that its method has."""
    flags = job.flags
    # The task's parts as they are now, also where the flags leave them to it: a later version's task may have others.
    config = flags.used() | job.task.parts | {"initial_prompt": job.task.initial_prompt}
    left_out = {"dry_run", "device_map", *(f.name for f in fields(ServerFlags))}
    if flags.method == GREATER:
        left_out |= {f.name for f in fields(TextSettings)} - ({"budget"} if flags.budget else set())
    else:
        left_out |= {*greater_settings(), "init_from"}
        left_out |= {f.name for f in fields(TextSettings) if getattr(flags, f.name) is None}
        config["method"] = TITLES[flags.method]
        on_server = flags.optimizer_endpoint and f"on a server, {flags.optimizer_model}"
        config["optimizer_hash"] = on_server or identity_of(flags.optimizer_model or flags.model)
        config["start_prompts"] = job.seeds
    return {name: value for name, value in config.items() if name not in left_out}


def require_budget(job):
    """Errors: UserError if --budget does not hold what a search cannot do without. Warns if it holds no whole round."""
    flags, rows = job.flags, len(job.train)
    if not flags.budget:
        return
    if flags.method == GREATER:
        least, first = rows * (1 + flags.tries_per_step), "the initial prompt and one step"
    else:
        least, first = rows * (len(job.seeds) + 1), "the prompts it starts from and one more"
    too_small = f"--budget {flags.budget}: {first}, on {rows} training rows, take {least} generations"
    require(flags.budget >= least, too_small)


# --- The run -----------------------------------------------------------------------------------------------


def optimize_task(job):
    """The search, its finalists on dev rows, and the initial and the best prompt on test rows."""
    from support.engine import load_engine  # imports torch, so only after everything that can be wrong without it

    flags, run_dir = job.flags, job.run_dir
    engine = load_engine(flags.model, flags.device, flags.dtype, flags.device_map)
    answerer = local_answerer(engine, flags.model)
    find = search_tokens if flags.method == GREATER else search_text
    prompts = find(job, engine, answerer)
    if flags.dry_run:
        return

    def evaluate(prompt, role, split):
        rows = job.evaluated[split]
        return evaluate_once(Evaluation(answerer, job.task, split, rows, prompt, flags), run_dir, role)

    with open_bar(total=len(prompts), desc="finalists on dev", unit="prompt") as bar:
        for prompt in prompts:
            dev = evaluate(prompt["prompt"], "candidate", "dev")
            _, low, high, _ = estimate([dev], "paper")
            prompt |= {"task": job.task.name, "dev_accuracy": dev["accuracy"], "dev_stderr": dev["stderr"]}
            prompt |= {"dev_low": low, "dev_high": high, "messages": messages_of(job.task, prompt["prompt"])}
            bar.update()
    prompts = rank_prompts(prompts, flags.choose_on)
    write_chained(run_dir / "prompts.jsonl", prompts)

    results = {}
    for role, prompt in (("initial", initial_of(prompts)), ("best", prompts[0])):
        for split in ("dev", "test"):
            results[role, split] = evaluate(prompt["prompt"], role, split)
    test = job.evaluated["test"]
    predictions = [read_predictions(run_dir, results[role, "test"], test) for role in ("initial", "best")]
    # Of a prompt that the training rows chose nobody knows whether it is the best.
    name = "best" if flags.choose_on == "dev" else "best on train"
    report(name, prompts, results, predictions)
    best = prompts[0]["prompt"]
    programs = write_programs(run_dir, job.task, best, flags.model, flags.max_new_tokens, engine.tokenizer)
    print("\n".join(["\nwhat is sent with the best prompt:", *sent(job.task, best)]))
    print_paths(run_dir)
    print("\n".join(f"  {path}" for path in programs))


def search_tokens(job, engine, answerer):
    """GReaTer: records of its final prompts, as `final_prompts` gives them; None of a dry run."""
    flags, task, train = job.flags, job.task, job.train
    rows = [encode_row(engine.tokenizer, task, row) for row in train]
    start = encode_prompt(engine.tokenizer, task, train[0]["question"], task.initial_prompt)[1]
    begun = (job.run_dir / "steps.jsonl").exists()
    if flags.dry_run or not begun:  # what goes on has been checked
        check(job, engine, rows)
    if flags.dry_run:
        return None
    if not begun:
        begin_run(job.run_dir, job.record)
    steps = search(flags, engine, rows, start, job.run_dir, job.evaluated)
    return final_prompts(flags, engine.tokenizer, rows[0], steps)


def check(job, engine, rows, calls=None):
    """Print what a few rows say about the search and its cost. Errors: UserError if memory does not hold it.

    rows: the tokens of the training rows; calls: text_optimizers.Calls of a text method.
    """
    from support.check import ROWS, check_rows, cost_of, require_memory, require_room, table, text_cost, warnings

    flags, task, train = job.flags, job.task, job.train
    require_room(engine, task, {"train": train} | job.evaluated, rows, flags)
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


def search(flags, engine, rows, start, run_dir, evaluated):
    """The steps of the search, each on disk before the next begins. evaluated: {split: rows} that come behind it."""
    from greater_core import optimize

    steps = read_steps(run_dir / "steps.jsonl", growing=True)
    if steps:
        print(f"going on behind step {steps[-1].step} of {run_dir}")
    if not holds_step(flags, steps, len(rows)):
        return steps
    initial = max(0, len(steps) - 1)
    with open_bar(engine.progress, True, total=flags.steps, initial=initial, unit="step", desc="search") as bar:
        for step in optimize(engine, rows, start, flags, list(steps)):
            append_jsonl(run_dir / "steps.jsonl", asdict(step))
            steps.append(step)
            bar.write(log_line(step, flags.steps))
            left = remaining(flags, steps, len(evaluated["dev"]), len(evaluated["test"]))
            if step.step == 0:
                bar.write(str(left))
            sys.stdout.flush()  # so that a file shows it, too
            if not holds_step(flags, steps, len(rows)):
                bar.write(
                    f"--budget {flags.budget}: {generations_of(steps, len(rows))} generations, no other step fits"
                )
                break
            bar.set_description_str(f"search, then dev and test {in_words(left.dev + left.test)}", refresh=False)
            bar.update(step.step > 0)
    return steps


def holds_step(flags, steps, rows):
    """Whether the budget holds another step of GReaTer on so many rows."""
    after = generations_of(steps, rows) + flags.tries_per_step * rows
    return not (flags.budget and steps and after > flags.budget)


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


def search_text(job, engine, answerer):
    """A text method: records of its final prompts, as `runs.text_finalists` gives them; None of a dry run."""
    from support.plans import planned, rounds_within
    from support.proposals import Judge, summary
    from support.trials import Search, Trials
    from text_optimizers import METHODS, optimize

    flags, method = job.flags, METHODS[job.flags.method]
    optimizer = open_optimizer(flags, engine, answerer, method.meta_prompts)
    rounds = flags.rounds or rounds_within(flags, len(job.seeds), len(job.train))
    calls = planned(flags, len(job.seeds), rounds)
    path = job.run_dir / "steps.jsonl"
    steps = read_steps(path, growing=True)
    if flags.dry_run or not steps:
        say_calls(job, calls)
        rows = [encode_row(engine.tokenizer, job.task, row) for row in job.train]
        check(job, engine, rows, calls[-1])
    if flags.dry_run:
        return None
    if not steps:
        begin_run(job.run_dir, job.record)

    trials = Trials(answerer, optimizer, job.task, job.train, flags, job.run_dir, engine)
    judge = Judge(job.task, job.train, flags.longest_prompt, method.meta_prompts, engine.tokenizer)
    known = len(steps)
    if known:
        print(f"going on behind round {steps[-1].step} of {job.run_dir}")
    with open_bar(engine.progress, True, total=rounds + 1, initial=known, unit="round", desc="search") as bar:
        for step in optimize(method, Search(trials, judge, job.seeds, rounds)):
            if step.step < known:  # taken from the records of what was asked and scored
                same = step.proposed == steps[step.step].proposed
                require(same, f"round {step.step} of {job.run_dir} comes out otherwise: choose another --run-dir")
                continue
            append_jsonl(path, asdict(step))
            steps.append(step)
            bar.write(text_log_line(step, flags.budget))
            sys.stdout.flush()
            bar.update()
    print("\n".join(summary(steps, TITLES[flags.method])))
    return text_finalists(steps, job.seeds[0], flags.finalists)


def open_optimizer(flags, engine, answerer, meta_prompts):
    """The Answerer that writes prompts. Errors: UserError if a model loaded here has no words for meta-prompts."""
    from support.check import require_words
    from support.engine import load_engine

    if flags.optimizer_endpoint and meta_prompts:
        server_flags = {f.name: getattr(flags, f.name) for f in fields(ServerFlags)}
        ask = ServerFlags(**server_flags | {"answer_turn": "ask"})  # no half-written message is continued
        return server_answerer(ask, flags.optimizer_endpoint, flags.optimizer_model)
    if flags.optimizer_model not in ("", flags.model):
        engine = load_engine(flags.optimizer_model, flags.device, flags.dtype, flags.device_map)
        answerer = local_answerer(engine, flags.optimizer_model)
    require_words(engine.tokenizer, answerer.name, meta_prompts)
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


def report(name, prompts, results, predictions):
    """Print what the initial and the best prompt reached, how they differ on the test rows, and what that means.

    name: what the best prompt is called; prompts: the final prompts, best first; results: {(role, split): `Result`} of
    the roles initial and best; predictions: of the initial and of the best prompt on the test rows.
    """
    names = {"initial": "initial", "best": name}
    texts = {"initial": initial_of(prompts)["prompt"], "best": prompts[0]["prompt"]}
    if texts["initial"] == texts["best"]:  # said in the verdict
        del names["best"]
    shown = [(role, split) for split in ("dev", "test") for role in names]
    print(f"\n{prompt_list(names.values(), [texts[role] for role in names])}\n")
    print(accuracy_table([f"{names[role]}, {split}" for role, split in shown], [results[key] for key in shown]))
    dev, test = (results["initial", split]["n"] for split in ("dev", "test"))
    print(f"\ndev {dev} rows, test {test} rows; {LEGEND}")
    if "best" in names:
        print(f"\n{comparison_table(name, ['initial'], predictions)}")
    print(f"\n{verdict(prompts, compare_reading(*predictions, 'paper'))}")


def print_paths(run_dir):
    for name in ("prompts.jsonl", "steps.jsonl", "results.jsonl", "predictions.jsonl"):
        print(f"  {run_dir / name}")


if __name__ == "__main__":
    run_script(main)

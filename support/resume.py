"""A run on disk that is begun, resumed or continued: what makes it the same run, and what run.json then holds.

A run goes on with the settings with which it began. Those that cannot change its result may differ, and so may those
that only make it longer or evaluate more: it ends as one that had them from its start. Works without torch.
"""

import math
import os
from dataclasses import asdict
from pathlib import Path

from support.files import CHECK, UserError, append_jsonl, check_of, read_jsonl, require, write_chained, write_json
from support.own import OWN_FLAGS
from support.runs import TextStep, generations_of, has_begun, read_run, read_steps


def require_same_run(run_dir, record):
    """Errors: UserError if steps in this folder were made with other settings, data or model than `record` says, or
    with nobody knows which. One that ended before its first step may be begun otherwise."""
    begun = has_begun(run_dir)
    if not (Path(run_dir) / "run.json").exists():
        lost = f"{run_dir} has steps.jsonl but no run.json, so nobody knows what settings made its steps"
        require(not begun, f"{lost}: choose another --run-dir")
        return
    other = differences(run_dir, record)
    require(not (other and begun), f"{run_dir} holds a run with other {', '.join(other)}: choose another --run-dir")


def begin_run(run_dir, record):
    """Write run.json, before the first step is written. The replies of an optimizer that a run with other settings
    left, which ended before its first step, are not this run's."""
    if not (Path(run_dir) / "run.json").exists() or differences(run_dir, record):
        (Path(run_dir) / "optimizer.jsonl").unlink(missing_ok=True)
    write_record(run_dir, record)


def write_record(run_dir, record):
    write_json(Path(run_dir) / "run.json", record | {CHECK: check_of(record)})


def continue_run(run_dir, record):
    """The steps of the run in a folder, [] if it has not begun; run.json then holds the settings with which it goes on.

    Errors: as `require_same_run`, and UserError if the settings ask for fewer steps than are there.
    """
    require_same_run(run_dir, record)
    path = Path(run_dir) / "steps.jsonl"
    steps = read_steps(path, growing=True)
    if steps:
        before, rows = read_run(run_dir), len(record["train_ids"])
        require_as_many(run_dir, record["config"], steps, rows)
        if cut_by_budget(before["config"], record["config"], steps, rows):
            steps.pop()
            write_chained(path, read_jsonl(path)[:-1])
    if not steps:
        path.unlink(missing_ok=True)  # no whole line
    elif before["config"] != record["config"]:
        begun_with = before.get("begun_with") or {name: before.get(name) for name in ("versions", "commit")}
        write_record(run_dir, record | {"begun_with": begun_with})
    return steps


def require_as_many(run_dir, config, steps, rows):
    """Errors: UserError if a search on so many rows with these settings would end before the last of these steps."""
    last = steps[-1]
    of_text = isinstance(last, TextStep)
    spent = last.totals["scored_generations"] if of_text else generations_of(steps, rows)
    unit = "rounds" if of_text else "steps"
    for name, there, what in ((unit, last.step, unit), ("budget", spent, "generations")):
        asked = config.get(name)
        unlimited = asked is None or (name == "budget" and not asked)
        fewer = f"{run_dir} holds {there} {what}, --{name} {asked} asks for fewer"
        require(unlimited or there <= asked, f"{fewer}: give at least {there}, or choose another --run-dir")


def cut_by_budget(before, after, steps, rows):
    """Whether a text method's last round may lack prompts that its budget did not hold and a larger one does: the round
    is then made again from what was asked and scored in it."""
    last, budget, now = steps[-1], before.get("budget"), after.get("budget")
    grew = budget and (not now or now > budget)
    return bool(grew and isinstance(last, TextStep) and last.totals["scored_generations"] + rows > budget)


def add_step(run_dir, step):
    """Append a step. Prompts that were final before it are so no longer."""
    (Path(run_dir) / "prompts.jsonl").unlink(missing_ok=True)
    append_jsonl(Path(run_dir) / "steps.jsonl", asdict(step))


# What cannot change a run's result: where files lie, how much is done at once, and what only led to other settings,
# which are compared themselves (of rows the hash, of an optimizer the hash, of --init-from the prompts).
WITHOUT_EFFECT = {"run_dir", "data_dir", "source", "device", "batch_size", "gradient_batch_size", "preset", "patience"}
WITHOUT_EFFECT |= {"optimizer_model", "optimizer_endpoint", "init_from", *OWN_FLAGS}
LENGTHS = {"steps", "rounds", "budget"}  # `require_as_many` looks at them
EVALUATED = ("eval_rows", "finalists")  # more of them only add evaluations


def differences(run_dir, record):
    """What makes the run recorded in a folder another than this one: a text for each setting, its name and both values.

    Settings that cannot change the result do not count, nor those that only make the run longer or evaluate more.
    """
    record_there = read_run(run_dir)
    try:
        recorded = settings_of(record_there)
    except (KeyError, TypeError):
        path = Path(run_dir) / "run.json"
        raise UserError(f"{path} is not the record of a run: choose another --run-dir") from None
    now = settings_of(record)
    if "planned_rounds" in now and "planned_rounds" not in recorded:  # an older run
        same_budget = recorded.get("budget") == now.get("budget")
        recorded["planned_rounds"] = recorded.get("rounds") or (now["planned_rounds"] if same_budget else None)
    names = (recorded.keys() | now.keys()) - WITHOUT_EFFECT - LENGTHS - set(EVALUATED)
    other = {name for name in names if recorded.get(name) != now.get(name)}
    if "dtype_here" not in recorded:  # an older run tells only what was asked for
        other.discard("dtype_here")
    elif recorded["dtype_here"] == now.get("dtype_here"):
        other.discard("dtype")
    if (Path(run_dir) / "results.jsonl").exists():
        other |= {name for name in EVALUATED if as_limit(now.get(name)) < as_limit(recorded.get(name))}
    return [f"{name} ({both_values(recorded.get(name), now.get(name))})" for name in sorted(other)]


def as_limit(count):
    """A number of which 0 or none means all."""
    return count or math.inf


SHOWN = 40  # characters of a setting's value


def both_values(recorded, now):
    """ "recorded X, now Y", long values from shortly before the place where they begin to differ."""
    first, second = str(recorded), str(now)
    if max(len(first), len(second)) > SHOWN:
        start = max(0, len(os.path.commonprefix([first, second])) - 10)
        first, second = (shortened(text, start) for text in (first, second))
    return f"recorded {first}, now {second}"


def shortened(text, start):
    end = start + SHOWN
    return ("..." if start else "") + text[start:end] + ("..." if len(text) > end else "")


def settings_of(record):
    """{name: value} of all that makes a run what it is."""
    of_task = {f"task {name}": value for name, value in record["task"].items()}
    own = {"train_ids": record["train_ids"], "model": record["model_hash"]}
    if "dtype" in record:
        own["dtype_here"] = record["dtype"]
    return {name: value for name, value in record["config"].items() if name != "task"} | of_task | own

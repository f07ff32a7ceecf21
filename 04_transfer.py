"""Stage 4: prompts found with some models on other models -> the transfer matrix, as a table and a picture.

    python 04_transfer.py --runs runs/demo-seed0 runs/demo-small-seed0 --targets demo/model demo/small
    python 04_transfer.py --runs runs/A --targets google/gemma-2-9b-it big-model@http://localhost:8000/v1

For each run its initial and its best prompt are evaluated on each target: a local folder, a hub name, or NAME@URL for
a model behind an OpenAI-compatible server. Predictions and results of each task and target lie in a folder of
their own, so a killed transfer goes on where it was and nothing is evaluated twice.
"""

from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from support.answerers import open_answerer, require_known
from support.evaluation import Evaluation, evaluate_once, has_scores, rows_hash
from support.files import as_bytes, require, short_name, write_jsonl, write_whole
from support.own import OWN_FLAGS
from support.progress import open_bar
from support.ranks import working_in
from support.runs import read_prompts, read_run
from support.settings import (
    GenerationSettings,
    ModelFlags,
    ServerFlags,
    TaskFlags,
    check_split_and_counts,
    flag,
    parse_flags,
    run_script,
)
from support.sources import open_task, read_prepared
from support.tasks import Task

# Fields of a result that stand in transfer.jsonl, too.
RESULT_FIELDS = (
    "split",
    "n",
    "accuracy",
    "stderr",
    "harness_accuracy",
    "harness_stderr",
    "unread",
    "truncated",
    "mean_tokens",
    "max_new_tokens",
    "prompt",
)
SCORE_FIELDS = ("kind", "low", "high", "harness_low", "harness_high")  # of a mean score, which has no Wilson interval


@dataclass
class Flags(ServerFlags):
    runs: list[str] = field(default_factory=list, metadata={"help": "finished runs of stage 02"})
    targets: list[str] = field(default_factory=list, metadata={"help": "models: folders, hub names, or NAME@URL"})
    split: str = flag("test", "dev or test")
    eval_rows: int = flag(0, "rows to evaluate on; 0: all")
    max_new_tokens: int = flag(0, "longest reasoning, in tokens; 0: as in each run")
    batch_size: int = flag(0, "rows generated at once by a model loaded here; 0: as in each run")
    data_dir: str = flag("", "where the prepared tasks lie; empty: as in each run")
    source: str = flag("", "folder of the authors' data files, for tasks that are not prepared; empty: the hub")
    device: str = flag("auto", "cpu, cuda or cuda:N")
    dtype: str = flag("auto", "auto (bfloat16 on CUDA, float32 on the CPU), float32, bfloat16 or float16")
    device_map: str = flag("", "auto: spread a target over all devices (needs the package accelerate)")
    out: str = flag("runs/transfer", "folder of the predictions and of the last call's matrix")


@dataclass(frozen=True)
class Job:
    """A prompt to evaluate on every target."""

    task: Task
    rows: list[dict]
    settings: GenerationSettings
    method: str  # what found it
    source: str  # the model that found the prompt; "-" for an initial prompt, which no model found
    run: str  # its folder; "" for an initial prompt
    prompt: str  # its text


def main():
    flags = parse_flags(Flags, __doc__)
    check_split_and_counts(flags, eval_rows=0, max_new_tokens=0, batch_size=0)
    flags.check_server_flags()
    require(flags.runs, "say which prompts: --runs with folders of stage 02")
    require(flags.targets, "say on which models: --targets")
    targets = [as_target(text, flags) for text in flags.targets]
    names = [short_name(model) for model, _ in targets]
    for name in names:
        require(names.count(name) == 1, f"--targets: two are called {name}, so the table could not tell them apart")
    jobs = []
    for folder in flags.runs:
        jobs += jobs_of_run(Path(folder), flags)
    jobs = distinct_jobs(jobs)
    servers = resolve(flags, targets, jobs)
    out = Path(flags.out)
    with working_in(out) as folder:
        write_matrix(transfer(flags, targets, servers, jobs, folder), folder)


def resolve(flags, targets, jobs):
    """{model: Answerer} of the targets behind a server. A target that is not there is noticed before any long work.

    Errors: UserError if a server or a model is not there, cannot be used here, or does not know a prompt's words.
    """
    local = [model for model, endpoint in targets if not endpoint]
    if local:
        from support.engine import load_tokenizer, require_device, require_spreading

        require_device(flags.device)
        if flags.device_map:
            require_spreading(flags.device)
        for model in local:
            tokenizer = load_tokenizer(model)
            for job in jobs:
                require_known(tokenizer, job.prompt)
    return {model: open_answerer(flags, model, endpoint) for model, endpoint in targets if endpoint}


def transfer(flags, targets, servers, jobs, out):
    """A record for transfer.jsonl of each job on each target, target by target. servers: of `resolve`."""
    records = []
    with open_bar(total=len(targets) * len(jobs), unit="prompt") as bar:
        for model, _ in targets:
            answerer = None  # so that the last model is gone before the next is loaded
            answerer = servers.get(model) or open_answerer(flags, model)
            for job in jobs:
                records.append(evaluate_job(job, answerer, flags, out))
                bar.update()
    return records


def evaluate_job(job, answerer, flags, out):
    """The record for transfer.jsonl of one job on one target; results and predictions lie in a folder of theirs. What
    the target answered in one of the runs, in stage 2 or 3, is taken from there."""
    folder = out / job.task.name.replace("/", "-") / answerer.name.replace("/", "-")
    folder.mkdir(parents=True, exist_ok=True)
    evaluation = Evaluation(answerer, job.task, flags.split, job.rows, job.prompt, job.settings)
    label = f"{job.method} {job.source} {job.run}"
    result = evaluate_once(evaluation, folder, "transfer", label, elsewhere=flags.runs)
    record = {
        "task": job.task.name,
        "method": job.method,
        "source": job.source,
        "run": job.run,
        "target": target_name(answerer, evaluation),
        "answer_space": result.get("answer_space", ""),
    }
    names = (*RESULT_FIELDS, *(SCORE_FIELDS if has_scores(result) else ()))
    return record | {name: result[name] for name in names}


def target_name(answerer, evaluation):
    """What the matrix calls a target: a server that cannot rank answers reads them otherwise, so it says so."""
    if not answerer.endpoint:
        return answerer.name
    unranked = evaluation.task.ranks_choices and not evaluation.ranked
    return f"{answerer.name} (server, answers not ranked)" if unranked else f"{answerer.name} (server)"


def write_matrix(records, out):
    """Write transfer.jsonl, and from it the table and the picture; print the table."""
    from support.pictures import transfer_picture
    from support.report import transfer_table

    write_jsonl(out / "transfer.jsonl", records)
    table = transfer_table(records)
    write_whole(out / "transfer.md", as_bytes(table))
    transfer_picture(records, out / "transfer.png")
    print(table)
    for name in ("transfer.md", "transfer.png", "transfer.jsonl"):
        print(f"  {out / name}")


def distinct_jobs(jobs):
    """The jobs without repetitions: runs of one task share their initial prompt, and a run may be named twice.

    Errors: UserError if two runs call different rows by one name, which their rows in the table could not tell apart.
    """
    kept, data = {}, {}
    for job in jobs:
        name = job.task.name
        own = rows_hash(job.rows), *job.task.parts.values()
        same = data.setdefault(name, own) == own
        require(same, f"two runs of the task {name} are on other rows, questions or readings: transfer them one by one")
        kept.setdefault((name, job.settings.max_new_tokens, job.prompt, job.source, job.run), job)
    return list(kept.values())


def as_target(text, flags):
    """(model, endpoint or "") of a --targets entry. Errors: UserError for a folder that holds no model."""
    model, at, url = text.partition("@")
    if at and url.startswith(("http://", "https://")):
        require(model.strip(), f"--targets {text}: say which model, NAME{text}")
        return model.strip(), url
    require(not at or Path(text).exists(), f"--targets {text}: a server is NAME@http://HOST:PORT/v1")
    return ModelFlags(text, flags.device, flags.dtype, flags.device_map).model_path(), ""


def jobs_of_run(folder, flags):
    """The jobs of a finished run: its initial and its best prompt.

    Errors: UserError if the run is not there or not finished, or if its task's data is not what it was searched with.
    """
    task_fields = [f.name for f in fields(TaskFlags)]
    texts = dict.fromkeys([*(name for name in task_fields if name not in OWN_FLAGS), "model", "initial_prompt"], str)
    record = read_run(folder, **texts, max_new_tokens=int, batch_size=int)
    config = record["config"]
    asked = {name: config[name] for name in task_fields if name in config}
    asked["data_dir"] = flags.data_dir or config["data_dir"]
    asked["source"] = flags.source or config["source"]
    task, splits = open_task(TaskFlags(**asked))
    require(config["initial_prompt"].strip(), f"{folder}/run.json has a blank initial prompt")
    same = read_prepared(task, asked["data_dir"])["sha256"] == record["task"]["sha256"]
    require(same, f"{folder} was searched with other rows of {task.name} than {asked['data_dir']} holds")
    initial = Job(
        task=replace(task, initial_prompt=config["initial_prompt"]),
        rows=splits[flags.split][: flags.eval_rows or None],
        settings=GenerationSettings(
            max_new_tokens=flags.max_new_tokens or config["max_new_tokens"],
            batch_size=flags.batch_size or config["batch_size"],
        ),
        method="initial prompt",
        source="-",
        run="",
        prompt=config["initial_prompt"],
    )
    best = replace(
        initial,
        method=config.get("method", "GReaTer"),
        source=short_name(config["model"]),
        run=str(folder),
        prompt=best_prompt(folder, task.name),
    )
    return [initial, best]


def best_prompt(folder, task_name):
    """The text of a run's best prompt. Errors: UserError if the run is not finished, or its prompts another task's."""
    path = folder / "prompts.jsonl"
    require(path.exists(), f"{folder} is not finished: no prompts.jsonl; run its stage 02 again")
    return read_prompts(path, task_name)[0]["prompt"]


if __name__ == "__main__":
    run_script(main)

"""Stage 4: prompts found with some models on other models -> the transfer matrix, as a table and a picture.

    python 04_transfer.py --runs runs/demo-seed0 runs/demo-small-seed0 --targets demo/model demo/small
    python 04_transfer.py --runs runs/A --targets google/gemma-2-9b-it big-model@http://localhost:8000/v1

For each run its initial and its best prompt are evaluated on each target: a local folder, a hub name, or NAME@URL for
a model behind an OpenAI-compatible server. Predictions and results of each task and target lie in a folder of
their own, so a killed transfer goes on where it was and nothing is evaluated twice.
"""

import json
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

from support.answerers import open_answerer
from support.evaluation import evaluate_once, rows_hash
from support.files import alone_in, read_jsonl, require, require_fields, short_name, write_jsonl
from support.runs import read_run
from support.settings import GenerationSettings, ModelFlags, ServerFlags, TaskFlags, flag, parse_flags, run_script


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
    out: str = flag("runs/transfer", "folder of the predictions and of the last call's matrix")


@dataclass(frozen=True)
class Job:
    """A prompt to evaluate on every target."""

    task: object
    rows: list
    settings: GenerationSettings
    method: str
    source: str  # the model that found the prompt; "-" for an initial prompt, which no model found
    run: str
    prompt: str


def main():
    flags = parse_flags(Flags, __doc__.splitlines()[0])
    require(flags.split in ("dev", "test"), f"--split must be dev or test, not {flags.split!r}")
    for name in ("eval_rows", "max_new_tokens", "batch_size"):
        require(getattr(flags, name) >= 0, f"--{name.replace('_', '-')} must not be negative")
    flags.check_server_flags()
    require(flags.runs, "say which prompts: --runs with folders of stage 02")
    require(flags.targets, "say on which models: --targets")
    targets = [as_target(text, flags) for text in flags.targets]
    names = [short_name(model) for model, _ in targets]
    for name in names:
        require(names.count(name) == 1, f"--targets: two are called {name}, so the table could not tell them apart")
    jobs = distinct_jobs(job for folder in flags.runs for job in open_run(Path(folder), flags))
    out = Path(flags.out)
    out.mkdir(parents=True, exist_ok=True)
    with alone_in(out):
        transfer(flags, targets, jobs, out)


def transfer(flags, targets, jobs, out):
    from tqdm import tqdm

    from support.pictures import transfer_picture
    from support.report import transfer_table

    records = []
    # A server that is not there shall be noticed before any long work.
    servers = {name: open_answerer(flags, name, endpoint) for name, endpoint in targets if endpoint}
    bar = tqdm(total=len(targets) * len(jobs), unit="prompt")
    for model, _ in targets:
        answerer = None  # so that the last model is gone before the next is loaded
        answerer = servers.get(model) or open_answerer(flags, model)
        for job in jobs:
            folder = out / job.task.name.replace("/", "-") / answerer.name.replace("/", "-")
            folder.mkdir(parents=True, exist_ok=True)
            name = " ".join((job.method, job.source, job.run))
            done = evaluate_once(
                answerer, job.task, job.rows, job.prompt, job.settings, folder, "transfer", flags.split, name
            )
            labels = {"task": job.task.name, "method": job.method, "source": job.source, "run": job.run}
            kept = "split n accuracy stderr harness_accuracy harness_stderr unread truncated mean_tokens max_new_tokens"
            target = answerer.name + " (server)" * bool(answerer.endpoint)
            records.append(labels | {"target": target} | {key: done[key] for key in [*kept.split(), "prompt"]})
            bar.update()
    bar.close()
    write_jsonl(out / "transfer.jsonl", records)
    table = transfer_table(records)
    (out / "transfer.md").write_text(table, encoding="utf-8")
    transfer_picture(records, out / "transfer.png")
    print(table)
    print("\n".join(f"  {out / name}" for name in ("transfer.md", "transfer.png", "transfer.jsonl")))


def distinct_jobs(jobs):
    """The jobs without repetitions: runs of one task share their initial prompt, and a run may be named twice.

    Errors: UserError if two runs call different rows by one name, which their rows in the table could not tell apart.
    """
    kept, rows = {}, {}
    for job in jobs:
        own = rows_hash(job.rows), job.task.extractor, job.task.template
        same = rows.setdefault(job.task.name, own) == own
        require(same, f"two runs of the task {job.task.name} are on other rows or questions: transfer them one by one")
        kept.setdefault((job.task.name, job.settings.max_new_tokens, job.prompt, job.source, job.run), job)
    return list(kept.values())


def as_target(text, flags):
    """(model, endpoint or "") of a --targets entry. Errors: UserError for a folder that holds no model."""
    model, at, url = text.partition("@")
    if at and url.startswith(("http://", "https://")):
        require(model.strip(), f"--targets {text}: say which model, NAME{text}")
        return model.strip(), url
    require(not at or Path(text).exists(), f"--targets {text}: a server is NAME@http://HOST:PORT/v1")
    return ModelFlags(text, flags.device, flags.dtype).model_path(), ""


def open_run(folder, flags):
    """The jobs of a finished run: its initial and its best prompt.

    Errors: UserError if the run is not there or not finished, or if its task's data is not what it was searched with.
    """
    texts = [*(f.name for f in fields(TaskFlags)), "model", "initial_prompt"]
    record = read_run(folder, **dict.fromkeys(texts, str), max_new_tokens=int, batch_size=int)
    config = record["config"]
    asked = {f.name: config[f.name] for f in fields(TaskFlags)}
    asked |= {name: value for name in ("data_dir", "source") if (value := getattr(flags, name))}
    task, splits = TaskFlags(**asked).resolve()
    now = json.loads((Path(asked["data_dir"]) / task.name / "task.json").read_text(encoding="utf-8"))
    same = now["sha256"] == record["task"]["sha256"]
    require(same, f"{folder} was searched with other rows of {task.name} than {asked['data_dir']} holds")
    require((folder / "prompts.jsonl").exists(), f"{folder} is not finished: no prompts.jsonl; run its stage 02 again")
    prompts = require_fields(read_jsonl(folder / "prompts.jsonl"), folder / "prompts.jsonl", prompt=str)
    require(prompts, f"{folder / 'prompts.jsonl'} holds no prompts")
    limits = [getattr(flags, name) or config[name] for name in ("max_new_tokens", "batch_size")]
    job = Job(
        replace(task, initial_prompt=config["initial_prompt"]),
        splits[flags.split][: flags.eval_rows or None],
        GenerationSettings(*limits),
        config.get("method", "GReaTer"),
        short_name(config["model"]),
        str(folder),
        prompts[0]["prompt"],
    )
    return [replace(job, method="initial prompt", source="-", run="", prompt=config["initial_prompt"]), job]


if __name__ == "__main__":
    run_script(main)

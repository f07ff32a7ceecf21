"""Stage 3: prompts on dev or test rows -> predictions.jsonl, a line per prompt in results.jsonl, a table, mistakes.

    python 03_evaluate.py --run-dir runs/demo-seed0                    # the run's initial and best prompt on test
    python 03_evaluate.py --run-dir runs/demo-seed0 --baselines        # and no prompt, and zero-shot chain of thought
    python 03_evaluate.py --task demo --prompt "check each step carefully ." --split dev
    python 03_evaluate.py --task my.csv --question-key message --answer-key team --model path/to/model --baselines
    python 03_evaluate.py --task gsm8k --endpoint http://localhost:8000/v1 --model NAME --prompt "..."
    python 03_evaluate.py --run-dir runs/demo-seed0 --regrade          # the kept texts again, without a model
    python 03_evaluate.py --report runs                                # tables and pictures of all runs
    python 03_evaluate.py --signal runs/demo-seed0                     # what the gradient was worth, finished or not

Two readings of one generation: `paper` (the answer behind the extractor) and `harness` (lm-evaluation-harness's
flexible extraction from the reasoning itself). The last prompt is compared with each of the others row by row. What was
evaluated with the same model, rows, extractor and settings is not run again; a killed evaluation goes on where it was.
"""

import sys
from dataclasses import dataclass, field, fields
from pathlib import Path

from support.answerers import open_answerer, require_known
from support.evaluation import READINGS, Evaluation, are_scores, evaluate_once, read_predictions, regrade
from support.files import is_text, require
from support.progress import open_bar
from support.ranks import count, working_in
from support.runs import dev_warning, read_prompts, read_run
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
from support.sources import open_task
from support.tables import accuracy_table, comparison_table, confusion_table, legend_of, prompt_list
from support.tasks import Task


@dataclass
class Flags(GenerationSettings, ServerFlags, ModelFlags, TaskFlags):
    run_dir: str = flag("", "a run of stage 02, or where to write; empty: runs/evaluate-<task>-<model>")
    prompt: list[str] = field(
        default_factory=list, metadata={"help": "a prompt to evaluate; may be repeated", "action": "extend"}
    )
    prompts: str = flag("", "a file like a run's prompts.jsonl; without it the run's own")
    top: int = flag(1, "how many of the prompts in the file, best first")
    baselines: bool = flag(
        False, "evaluate the standard baselines, too: no prompt, zero-shot chain of thought, initial"
    )
    split: str = flag("test", "dev or test")
    eval_rows: int = flag(0, "rows to evaluate on; 0: all; without it as many as the run in --run-dir")
    mistakes: int = flag(5, "mistakes to show of the last prompt")
    endpoint: str = flag("", "URL of an OpenAI-compatible server that answers; --model is its name for the model")
    regrade: bool = flag(False, "read and grade the texts in predictions.jsonl again, without a model")
    report: str = flag("", "only write tables and pictures of this run, or of all runs in this folder")
    signal: str = flag("", "only say what this run's steps, finished or not, tell of the gradient and of the noise")


@dataclass(frozen=True)
class Prompt:
    """A prompt to evaluate, and what it is called."""

    role: str  # baseline, initial, given, candidate or best
    name: str | None  # tells prompts of one role apart; None: the role says it all
    task: Task  # frames it
    text: str


def main():
    flags = parse_flags(Flags, __doc__, run_defaults)
    check_split_and_counts(flags, eval_rows=0, mistakes=0, top=1)
    flags.check_server_flags()
    if flags.report:
        require(count() == 1, "--report needs no model and no torchrun: call it with python")
        from support.report import write_report

        print("\n".join(f"  {path}" for path in write_report(flags.report)))
        return
    if flags.signal:
        print_signal(flags.signal)
        return
    if not (flags.endpoint or flags.regrade):
        flags.model = flags.model_path()
    task, splits = open_task(flags)
    default_dir = Path("runs") / f"evaluate-{task.name.replace('/', '-')}-{Path(flags.model).name}"
    run_dir = Path(flags.run_dir) if flags.run_dir else default_dir
    if flags.regrade:
        regrade_folder(run_dir, task, splits)
    else:
        evaluate_prompts(flags, task, splits[flags.split], run_dir)


def run_defaults(early):
    """The configuration of the run in --run-dir, as defaults of this script's flags."""
    if not early.run_dir or not (Path(early.run_dir) / "run.json").exists():
        return {}
    config = read_run(early.run_dir, task=str)["config"]
    require(early.task in ("", config["task"]), f"--task {early.task}: {early.run_dir} is a run of {config['task']}")
    names = {f.name for f in fields(GenerationSettings) + fields(ModelFlags) + fields(TaskFlags)} | {"eval_rows"}
    return {name: value for name, value in config.items() if name in names}


def evaluate_prompts(flags, task, split_rows, run_dir):
    """Evaluate the prompts that the flags choose, and print how they do."""
    rows = split_rows[: flags.eval_rows or None]
    prompts = chosen_prompts(flags, run_dir, task)
    answerer = open_answerer(flags, flags.model, flags.endpoint)  # imports torch only where a model is loaded here
    for prompt in prompts:  # before the first of them takes its time
        require_known(answerer.tokenizer, prompt.text)
    if task.ranks_choices and not answerer.gives_log_probs:
        note = "no log-probabilities from this server and --answer-turn, so answers are read from what it writes"
        print(f"note: {note}", file=sys.stderr)
    with working_in(run_dir) as folder:
        results = []
        with open_bar(total=len(prompts), desc="prompts", unit="prompt") as bar:
            for prompt in prompts:
                evaluation = Evaluation(answerer, prompt.task, flags.split, rows, prompt.text, flags)
                results.append(evaluate_once(evaluation, folder, prompt.role, prompt.name))
                bar.update()
        print_results(flags, folder, task, results, rows)


# --- Which prompts ---------------------------------------------------------------------------------------


def chosen_prompts(flags, run_dir, task):
    """[Prompt]: baselines, initial, then those given or the best of the file."""
    compared, chosen = [], []
    initial = task.initial_prompt
    if flags.run_dir and (Path(flags.run_dir) / "run.json").exists():
        initial = read_run(flags.run_dir)["config"].get("initial_prompt") or initial
    if flags.baselines:
        compared = [
            Prompt("baseline", "empty", task.bare, ""),
            Prompt("baseline", "zero-shot chain of thought", task.bare, task.chain_of_thought),
        ]
    if flags.prompt:
        chosen = given_prompts(flags.prompt, task)
    elif flags.prompts or flags.run_dir:
        records = read_prompts(Path(flags.prompts or run_dir / "prompts.jsonl"), task.name)
        initial = next((record["prompt"] for record in records if record.get("initial")), initial)
        if warning := dev_warning(records):
            print(warning)
        chosen = best_prompts(records, flags.top, task)
    else:
        require(compared, "say what to evaluate: --run-dir of a run of stage 02, --prompt, --prompts or --baselines")
    if compared or not flags.prompt:
        compared.append(Prompt("initial", None, task, initial))
    return compared + chosen


def given_prompts(texts, task):
    """The prompts of --prompt. Errors: UserError for one that is empty or no text."""
    good = all(text.strip() and is_text(text) for text in texts)
    require(good, "--prompt must not be empty (--baselines evaluates no prompt) and must be readable text")
    return [Prompt("given", None, task, text.strip()) for text in texts]


def best_prompts(records, count, task):
    """The first `count` prompts of the records, which stand best first; the best one last."""
    prompts = [Prompt("best", None, task, records[0]["prompt"])]
    for rank, record in enumerate(records[1:count], 2):
        prompts.append(Prompt("candidate", f"rank {rank}", task, record["prompt"]))
    return prompts[::-1]


def print_signal(folder):
    """What the steps of a run in a folder tell of its gradient, and a picture of it."""
    from support.instruments import load_search, signal_of, signal_text, signal_verdict
    from support.pictures import draw_signal

    run = load_search(folder)
    signal = signal_of(run.steps, run.prompts, run.config.get("train_rows", 0), run.config.get("shortlist", "gradient"))
    unfinished = "" if run.prompts else " (not finished)"
    print(f"{run.title}, {signal.steps} steps{unfinished}\n\n{signal_text(signal)}\n\n{signal_verdict(signal)}")
    path = run.folder / "signal.png"
    draw_signal(run, signal, path)
    print(f"  {path}")


# --- What is printed --------------------------------------------------------------------------------------


def regrade_folder(run_dir, task, splits):
    """Grade the kept texts of a folder again, and print what changed."""
    require(run_dir.is_dir(), f"{run_dir} holds no evaluation")
    with working_in(run_dir) as folder:
        for old, new in regrade(folder, task, splits):
            line = f"{new['role']:9s}  {new['split']:4s}"
            for reading, beginning in READINGS.items():
                before, after = (100 * result[f"{beginning}accuracy"] for result in (old, new))
                line += f"  {reading} {before:5.1f} -> {after:5.1f} %"
            print(f"{line}  {new['prompt'] or '(no prompt)'}")
        print_paths(folder)


def print_results(flags, run_dir, task, results, rows):
    """The table of prompts, the last against each of the others; of the last its answers by the right one, of a task
    whose possible answers are known, and mistakes."""
    labels = labels_of(results)
    print(f"\n{prompt_list(labels, [result['prompt'] for result in results])}\n")
    print(accuracy_table(labels, results))
    minutes = sum(result["minutes"] for result in results)
    print(f"\n{flags.split}, {len(rows)} rows; {minutes:.1f} minutes of generation; {legend_of(results)}")
    predictions = [read_predictions(run_dir, result, rows) for result in results]
    if len(results) > 1:
        print(f"\n{comparison_table('last', labels[:-1], predictions)}")
    if task.choices:
        print(f"\nthe last prompt, paper reading\n{confusion_table(task, predictions[-1])}")
    show_mistakes(predictions[-1], rows, flags)
    print_paths(run_dir)


def labels_of(results):
    """What the table calls each result: its name or role; prompts that were given, if several, by number."""
    labels = [result.get("name", result["role"]) for result in results]
    given = labels.count("given")
    if given > 1:  # they come last
        labels = labels[:-given] + [f"given {number}" for number in range(1, given + 1)]
    return labels


def show_mistakes(predictions, rows, flags):
    if are_scores(prediction["correct"] for prediction in predictions):
        show_worst(predictions, rows, flags)
        return
    wrong = [(row, prediction) for row, prediction in zip(rows, predictions) if not prediction["correct"]]
    shown = wrong[: flags.mistakes]
    if shown:
        print(f"\n{len(shown)} of {len(wrong)} mistakes of the last prompt:")
    for row, prediction in shown:
        print(f"  {prediction['id']}  gold {prediction['gold']}, read {prediction['answer']}")
        # A question and a reasoning end with what matters, a reply begins with it.
        print(f"    question   {ending(row['question'])}")
        print(f"    reasoning  {ending(prediction['text'])}")
        print(f"    reply      {prediction['reply'][:200]!r}")


def ending(text):
    """The last words of a text, in quotation marks."""
    return repr(text if len(text) <= 200 else f"... {text[-200:].partition(' ')[2]}")


def show_worst(predictions, rows, flags):
    """The rows with the lowest scores, of equals the first."""
    worst = sorted(zip(rows, predictions), key=lambda pair: pair[1]["correct"])[: flags.mistakes]
    if worst:
        print(f"\nthe {len(worst)} of {len(rows)} texts of the last prompt with the lowest scores:")
    for row, prediction in worst:
        references = row.get("references", [row["answer"]])
        print(f"  {prediction['id']}  ROUGE-L {100 * prediction['correct']:.1f} %")
        print(f"    question   {row['question'][-200:]!r}")
        print(f"    written    {prediction['text'][:200]!r}")
        print(f"    reference  {references[0][:200]!r}, {len(references)} in all")


def print_paths(run_dir):
    print(f"  {run_dir / 'results.jsonl'}\n  {run_dir / 'predictions.jsonl'}")


if __name__ == "__main__":
    run_script(main)

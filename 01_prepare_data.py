"""Stage 1: a task's rows -> data/<task>/{train,dev,test}.jsonl and, last, task.json.

    python 01_prepare_data.py --task gsm8k                      # from the hub
    python 01_prepare_data.py --task bbh --source path/to/data  # the paper's 21 BBH tasks, from the authors' files
    python 01_prepare_data.py --task mmlu                       # the 57 subjects; one: mmlu/anatomy
    python 01_prepare_data.py --task my.csv --question-key message --answer-key team

The same input gives the same bytes on every run. The counts are checked and printed; a BBH task of 250 rows gives
50 train, 100 dev, 100 test; gsm8k 100, 100, 1319; folio 100, 100, 204 (203 from the hub); multiarith 50, 50, 500;
aqua 100, 100, 254; wsc 100, 100, 104; an MMLU subject 6 to 87 train, 7 to 88 dev, 100 to 1534 test; demo 200, 100, 400.
"""

from support.files import require
from support.own import SPLITS
from support.settings import TaskFlags, parse_flags, run_script
from support.sources import prepare, read_prepared
from support.tasks import GROUPS, get_task


def main():
    flags = parse_flags(TaskFlags, __doc__)
    given = flags.extractor or flags.kind or flags.template or flags.system or flags.answer_space
    require(
        flags.own_rows or not given,
        "--extractor, --kind, --template, --system and --answer-space change no row: give them to stages 2 and 3",
    )
    names = GROUPS.get(flags.task, [flags.task])
    for name in names:
        own = flags.own if flags.own_rows else None
        task = get_task(own or name, flags.extractor, flags.kind, flags.template, flags.answer_space, flags.system)
        folder = prepare(task, flags.data_dir, flags.source, own)
        counts = read_prepared(task, flags.data_dir)["counts"]
        sizes = "  ".join(f"{split} {counts[split]:4d}" for split in SPLITS)
        kind = f"answers: {task.kind:7s}"
        print(f"{task.name:44s} {sizes}  {kind} -> {folder}")


if __name__ == "__main__":
    run_script(main)

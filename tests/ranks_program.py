"""What test_ranks.py starts with torchrun: each rank does the same, and writes what it saw to <folder>/<rank>.json.

python -m torch.distributed.run --standalone --nproc-per-node 3 tests/ranks_program.py all FOLDER
"""

import json
import os
import signal
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

from support import ranks  # noqa: E402
from support.files import UserError, append_jsonl, read_jsonl  # noqa: E402
from support.settings import run_script  # noqa: E402

RANK = ranks.rank()


def raised(function, *arguments):
    """The error that a function raises, as text."""
    try:
        function(*arguments)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def fail(message, at):
    if at == RANK:
        raise UserError(message)
    return RANK


def odd_error():
    """One that cannot be sent as it is: its class takes no text."""

    class Odd(Exception):
        pass

    if RANK == 1:
        raise Odd("of an odd kind")


def in_lists(count):
    """So many items, named by rank, in lists of two and one."""
    items = [f"{RANK}.{number}" for number in range(count)]
    yield from (items[start : start + 2] for start in range(0, count, 2))


def numbers_of_first():
    yield from (10 + RANK, 20 + RANK)


def broken_numbers():
    yield 1
    raise UserError("no third number")


def generated(rows):
    """What the demo's model writes for so many rows of different length: (texts of each row, tokens generated)."""
    from support.engine import load_engine
    from support.evaluation import Sampling
    from support.files import ROOT

    engine = load_engine(str(ROOT / "demo" / "model"), "cpu", "float32")
    sequences = [list(range(5, 8 + number)) for number in range(rows)]
    written = engine.sample(sequences, Sampling(1, 0.0, 9, "0"))
    return [[ids for ids, _ in samples] for samples in written], engine.counts["generated_tokens"]


def in_folder(folder):
    """Each rank's folder for the records of another one, and what it reads there before and after it writes."""
    with ranks.working_in(folder) as own:
        before = read_jsonl(own / "steps.jsonl")
        append_jsonl(own / "steps.jsonl", {"rank": RANK})
        return str(own), before, read_jsonl(own / "steps.jsonl")


def see_all(folder):
    """All that ranks tell each other."""
    saw = {
        "rank": RANK,
        "shares": ranks.gather(lambda: ranks.share_of(list(range(7))), "shares", "cpu"),
        "agreed": ranks.agreed(RANK),
        "each of first": list(ranks.each_of_first(numbers_of_first())),
        "broken": raised(lambda: list(ranks.each_of_first(broken_numbers()))),
        "together": list(ranks.together(in_lists(3 * RANK), 3 * RANK, "items")),
        "error of one": raised(ranks.gather, lambda: fail("not on rank 1", 1), "errors", "cpu"),
        "odd error": raised(ranks.gather, odd_error, "errors", "cpu"),
        "error of first": raised(ranks.first, lambda: fail("not on rank 0", 0)),
        "other work": raised(ranks.gather, list, f"work of rank {min(RANK, 1)}", "cpu"),
        "many rows": generated(7),
        "few rows": generated(2),
        "folder": in_folder(folder / "run"),
    }
    (folder / f"{RANK}.json").write_text(json.dumps(saw))


def main():
    what, folder = sys.argv[1], Path(sys.argv[2])
    if what == "all":
        see_all(folder)
    elif what == "mistake":  # the same for all, or only here
        print("said by each")
        fail("a mistake of rank 1", 1)
        ranks.agreed(0)
    elif what == "killed":
        ranks.agreed(0)
        if RANK == 0:  # torchrun asks the others to end, too; this one is to notice by itself
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if RANK == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        ranks.agreed(0)


if __name__ == "__main__":
    run_script(main)

"""Several processes of one stage, started by torchrun: who this one is, and what they tell each other.

    torchrun --nproc-per-node 2 02_optimize.py --task gsm8k

Each process, a rank, runs the whole stage and loads the whole model. Rows are shared: the engine's `over_rows`, and an
evaluation, work on this rank's part of them and gather the results of all. Whatever a decision rests on is gathered,
or is the first rank's, so all ranks take the same ones. The first rank alone writes the run's folder, holds its lock
and prints; another one works in a copy of the records there, and is silent.

What is exchanged is small: texts, losses, gradients over a few candidates. So the gloo backend serves GPUs, too.
Without torchrun there is one rank, and nothing here imports torch. Ranks fail together: an error on one of them is
raised on all, and one that is gone (killed, or its machine is) ends the others.
"""

import io
import os
import pickle
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from functools import lru_cache, partial
from pathlib import Path

from support import TEMPORARY
from support.files import alone_in

PATIENCE = timedelta(days=7)  # for ranks that are still at work; that one is gone is noticed by its closed connection
PARTS = 8  # in how many parts the ranks exchange what a batch yields: a killed evaluation loses at most one of them
GONE = "another rank has ended; what was finished is on disk, and the same command goes on from there"


# --- Who this process is -------------------------------------------------------------------------------


def from_torchrun(name, otherwise):
    """A number that torchrun gives to each process; `otherwise` without torchrun."""
    return int(os.environ[name]) if "TORCHELASTIC_RUN_ID" in os.environ else otherwise


def count():
    """How many ranks there are."""
    return from_torchrun("WORLD_SIZE", 1)


def rank():
    """The number of this one, from 0."""
    return from_torchrun("RANK", 0)


def count_here():
    """How many of them this machine has."""
    return from_torchrun("LOCAL_WORLD_SIZE", 1)


def place_here():
    """The number of this one among those of this machine, from 0."""
    return from_torchrun("LOCAL_RANK", 0)


def share_of(jobs):
    """This rank's part of a list. Of jobs in the order of their costs, each rank gets about as much to do."""
    return jobs[rank() :: count()]


# --- What ranks tell each other ----------------------------------------------------------------------------
#
# All ranks call these functions in the same order.


@lru_cache
def distributed():
    """torch.distributed, with the ranks in its group."""
    import torch.distributed

    torch.distributed.init_process_group("gloo", timeout=PATIENCE)
    return torch.distributed


def exchanged(value):
    """What each rank has for `value`, in the order of the ranks. Errors: ConnectionError if one of them is gone."""
    parts = [None] * count()
    try:
        distributed().all_gather_object(parts, value)
    except RuntimeError as error:
        raise ConnectionError(f"{GONE} ({str(error).splitlines()[0]:.100})") from None
    return parts


def gather(work, about, device):
    """[what `work()` returns on each rank], with tensors on `device`.

    about: a text that says what is worked on. Errors: what any of the ranks raises, on all of them; RuntimeError if
    they do not work on the same.
    """
    import torch

    buffer, error = io.BytesIO(), None
    try:
        torch.save(work(), buffer)
    except Exception as raised:  # the others wait for this rank, whatever happens to it
        error = raised
    parts = exchanged((about, buffer.getvalue(), sendable(error)))
    if error:
        raise error
    for _, _, of_another in parts:
        if of_another:
            raise of_another
    abouts = [told for told, _, _ in parts]
    if len(set(abouts)) > 1:
        raise RuntimeError(f"the ranks do not work on the same: {'; '.join(abouts)}")
    return [torch.load(io.BytesIO(saved), map_location=device, weights_only=False) for _, saved, _ in parts]


def sendable(error):
    """The error as it can be sent to another rank; None for none."""
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:  # an error's class may take other arguments than those that it keeps
        return RuntimeError(f"{type(error).__name__}: {error}")


def first(work):
    """What `work()` returns on the first rank, which alone does it. Errors: those of the first rank, on all."""
    if count() == 1:
        return work()
    value, error = None, None
    if rank() == 0:
        try:
            value = work()
        except Exception as raised:
            error = raised
    ((value, told), *_) = exchanged((value, sendable(error)) if rank() == 0 else None)
    if error or told:
        raise error or told
    return value


def agreed(value):
    """The first rank's value: what was computed by each of them may differ in its last bits."""
    return value if count() == 1 else first(lambda: value)


def each_of_first(values):
    """The values that a generator yields on the first rank, which alone runs it, one by one, on all ranks."""
    over = object()  # each rank has its own, so it is not what is sent
    if count() == 1:
        yield from values
        return
    while True:
        more, value = first(lambda: (True, found) if (found := next(values, over)) is not over else (False, None))
        if not more:
            return
        yield value


def together(lists, total, about):
    """The items of the lists that a generator yields on each rank, joined over the ranks, in `PARTS` lists.

    total: how many items this rank's lists hold. Errors: as of `gather`."""
    if count() == 1:
        yield from lists
        return
    done = 0
    for number in range(1, PARTS + 1):
        wanted = total * number // PARTS - done
        parts = gather(partial(taken, lists, wanted), f"{about}, part {number}", "cpu")
        done += len(parts[rank()])
        yield [item for part in parts for item in part]


def taken(lists, wanted):
    """At least so many items of the lists that a generator yields."""
    found = []
    while len(found) < wanted:
        found += next(lists)
    return found


# --- Files and words: the first rank's alone -----------------------------------------------------------------


@contextmanager
def working_in(folder):
    """The folder in which this rank keeps a run's records, with no other process at work there: for the first rank the
    folder itself, for another one a copy of its records, removed at the end. Errors: as of `files.alone_in`."""
    if count() == 1:
        with alone_in(folder):
            yield Path(folder)
        return
    with ExitStack() as stack:
        records = first(partial(enter, stack, folder))
        if rank() > 0:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="greater-rank-"))
            TEMPORARY.add(folder)
            for name, content in records.items():
                path = Path(folder) / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
        yield Path(folder)


def enter(stack, folder):
    """{path in the folder: content} of its records, with no other process at work there until the ExitStack ends."""
    stack.enter_context(alone_in(folder))
    paths = [*Path(folder).rglob("*.jsonl"), *Path(folder).rglob("run.json")]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def be_silent():
    """Let a rank behind the first print nothing: what it has to say, the first one says, too."""
    if rank() > 0:
        sys.stdout = sys.stderr = open(os.devnull, "w", encoding="utf-8")


def says_errors():
    """Whether this rank is to print the error with which it ends: the first to ask, since the others end for the same
    reason or because of this one. A rank behind the first gives that one time to ask."""
    if count() == 1:
        return True
    if rank() > 0:
        time.sleep(1)
    from torch.distributed import TCPStore

    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    try:  # torchrun keeps this store, so it outlives the ranks
        store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=10))
        return store.add(f"greater/errors/{attempt}", 1) == 1
    except (RuntimeError, ValueError):  # torchrun is gone, too
        return True

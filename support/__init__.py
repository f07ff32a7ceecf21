"""What the stages and the method stand on.

Imported by a stage of this repository, it first of all sees to it that a signal ends the stage in one line, also while
it still imports what it needs.
"""

import os
import shutil
import signal
import sys
import threading
from contextlib import suppress
from pathlib import Path

STOPPED = "stopped; what was finished is on disk, and the same command goes on from there"
EXIT_CODES = {"SIGINT": 130, "SIGTERM": 143, "SIGHUP": 143}
TEMPORARY = set()  # folders of this process that nobody needs when it has ended


def stop(number, frame):
    """End the process at once. An exception could be lost in a library that catches it, and no record needs to be
    tidied: what is written is written whole or line by line, as a run that is killed needs it."""
    files = sys.modules.get("support.files")
    if hasattr(files, "remove_all_empty"):  # not where the signal comes while it is imported
        files.remove_all_empty()
    with suppress(OSError, ValueError, RuntimeError):  # a terminal that is gone, a stream that is being written
        sys.stdout.flush()
    with suppress(OSError):
        # Of the ranks that torchrun starts (ranks.py) the first one says it.
        if "TORCHELASTIC_RUN_ID" not in os.environ or os.environ.get("RANK") == "0":
            os.write(2, f"\n{STOPPED}\n".encode())
    for folder in TEMPORARY:
        shutil.rmtree(folder, ignore_errors=True)
    os._exit(EXIT_CODES[signal.Signals(number).name])


def stop_on_signals():
    """Ctrl-C, a request to end and a closed terminal end this process with `stop`, unless they are ignored (nohup)."""
    for name in EXIT_CODES:
        number = getattr(signal, name, None)  # Windows has no SIGHUP
        if number is not None and signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, stop)


def end_of_work():
    """From here on no signal cuts the process short: it ends by itself at once. While Python ends it puts its handlers
    back to the system's, under which a stage that has done all would seem to have been killed; what is ignored stays
    ignored, in all threads."""
    if is_stage(sys.modules["__main__"]) and threading.current_thread() is threading.main_thread():
        for number in (getattr(signal, name) for name in EXIT_CODES if hasattr(signal, name)):
            signal.signal(number, signal.SIG_IGN)


def is_stage(program):
    """Whether the program that runs is a script of the repository's top folder: other users keep their own handlers."""
    path = getattr(program, "__file__", None)
    return bool(path) and Path(path).resolve().parent == Path(__file__).resolve().parent.parent


if is_stage(sys.modules["__main__"]):
    stop_on_signals()

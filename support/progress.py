"""Signs of life: what a long computation is doing, bars that show it while it works, and how long it may still take.

`Progress` is written by whoever works (engine.py) and only read here. A bar is drawn again and again by a thread of its
own, so its clock goes on whatever the work waits for. Works without torch.
"""

import sys
import threading
import time
from collections import deque
from contextlib import contextmanager
from dataclasses import dataclass

from tqdm import tqdm

TICK, TICK_IN_FILE = 1.0, 30.0  # seconds between two drawings, on a terminal and in a file
WINDOW = 20.0  # seconds over which tokens per second are taken
LINE = "{desc}: {n_fmt}/{total_fmt} {unit}s, {elapsed} gone, {remaining} to go{postfix}"  # of a bar in a file


@dataclass
class Progress:
    """What is being done now."""

    stage: str = ""  # its name
    done: int = 0  # rows that the stage has finished
    total: int = 0  # rows that it has in all
    tokens: int = 0  # generated since the beginning, in all stages

    def begin(self, stage, total):
        """A stage of so many rows begins."""
        self.stage, self.done, self.total = stage, 0, total


# --- Bars ------------------------------------------------------------------------------------------------------


@contextmanager
def open_bar(progress=None, show_stage=False, **settings):
    """A tqdm bar with the tokens per second of a `Progress` behind it, if any, and with its stage if `show_stage`.

    settings: tqdm's. In a file each state is a line, one in half a minute.
    """
    progress = progress or Progress()
    if sys.stderr.isatty():
        tick, more = TICK, {"file": sys.stderr, "dynamic_ncols": True}
    else:
        # `delay`: short work leaves no line at all.
        tick, more = TICK_IN_FILE, {"file": Lines(sys.stderr), "bar_format": LINE, "delay": TICK_IN_FILE}
    with tqdm(mininterval=tick, miniters=0, **more, **settings) as bar:
        over = threading.Event()
        drawing = threading.Thread(target=keep_drawing, args=(bar, progress, show_stage, tick, over), daemon=True)
        drawing.start()
        try:
            yield bar
        finally:
            over.set()
            drawing.join()


def keep_drawing(bar, progress, show_stage, tick, over):
    """Draw the bar every `tick` seconds until the event `over`."""
    seen = deque([(time.monotonic(), progress.tokens)])
    while not over.wait(tick):
        seen.append((time.monotonic(), progress.tokens))
        while len(seen) > 2 and seen[-1][0] - seen[1][0] >= WINDOW:
            seen.popleft()
        bar.set_postfix_str(activity(progress, tokens_per_second(seen), show_stage), refresh=False)
        bar.refresh()


def tokens_per_second(seen):
    """Between the first and the last of (time in seconds, tokens until then)."""
    (start, before), (end, after) = seen[0], seen[-1]
    return (after - before) / (end - start)


def activity(progress, rate, show_stage):
    """In words: the stage of a `Progress` and its rows if `show_stage`, and the rate in tokens per second if any."""
    words = []
    if show_stage and progress.stage:
        words.append(f"{progress.stage} {progress.done}/{progress.total} rows")
    if rate > 0:
        words.append(f"{rate:.0f} tokens/s")
    return ", ".join(words)


class Lines:
    """A stream for a bar that cannot draw over what it wrote before: each of its states becomes a line."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, text):
        state = text.replace("\x1b[A", "").strip()  # a bar moves the cursor up, to the start of a line, and clears it
        if state:
            self.stream.write(f"{state}\n")

    def flush(self):
        self.stream.flush()


# --- The time that a search and its evaluations still take ---------------------------------------------------------


@dataclass(frozen=True)
class Remaining:
    """Seconds that the parts of stage 2 still take."""

    search: float
    dev: float  # the finalists, and the initial prompt
    test: float  # the best and the initial prompt

    def __str__(self):
        whole = in_words(self.search + self.dev + self.test)
        return f"about {whole}: search {in_words(self.search)}, dev {in_words(self.dev)}, test {in_words(self.test)}"


def in_words(seconds):
    """An estimated time, with two digits."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 600 else f"{seconds / 60:.0f} min"


def remaining(settings, steps, dev_rows, test_rows):
    """The `Remaining` of a run of stage 2 with these `Flags` behind its `steps`, of which the start is one.

    Measured are the seconds per generated token and, under the current prompt, the tokens of a reasoning. A step is
    thought to take what the steps before it took, and where there are none, as long as mu prompts reason on all
    training rows: the start reads the questions, too, and that is about what the gradient takes.
    """
    last, visited = steps[-1], steps[1:]
    generated = last.totals["generated_tokens"] - last.totals.get("audit_tokens", 0)
    per_token = sum(step.seconds["select"] for step in steps) / generated
    per_row = per_token * (last.tokens / settings.train_rows + 1)  # with the end token
    tried = settings.tries_per_step
    if visited:
        per_step = sum(sum(step.seconds.values()) for step in visited) / len(visited)
    else:
        per_step = tried * settings.train_rows * per_row
    finalists = min(settings.finalists, settings.steps * tried) + 1
    return Remaining(
        search=(settings.steps - last.step) * per_step,
        dev=finalists * dev_rows * per_row,
        test=min(2, finalists) * test_rows * per_row,
    )

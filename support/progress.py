"""Bars that show that long work lives: rows done, tokens per second, time left. Works without torch."""

import sys
import time

from tqdm import tqdm

SHOWN_EVERY = 0.3, 30.0  # seconds between two looks of a bar, on a terminal and in a file


def bar(**options):
    """A tqdm bar that is readable on a terminal, and in a file, where each look is a line."""
    seconds = SHOWN_EVERY[not sys.stderr.isatty()]
    return tqdm(mininterval=seconds, maxinterval=seconds, dynamic_ncols=True, smoothing=0.1, **options)


class Activity:
    """What an engine is doing, as a bar below the others on a terminal: the stage, its rows, tokens per second."""

    def __init__(self):
        self.bar = None
        self.tokens, self.started, self.shown = 0, 0.0, 0.0

    def begin(self, stage, rows):
        self.end()
        # Only on a terminal, where it can be wiped away again.
        self.bar = bar(total=rows, desc=stage, unit="row", leave=False, disable=None)
        self.tokens, self.started, self.shown = 0, time.perf_counter(), 0.0

    def advance(self, rows=0, tokens=0):
        """Rows that have ended, tokens that were read or generated since the last call."""
        if self.bar is None:
            return
        self.tokens += tokens
        self.bar.n += rows
        now = time.perf_counter()
        if now - self.shown >= SHOWN_EVERY[0]:
            self.shown = now
            self.bar.set_postfix_str(f"{self.tokens / (now - self.started):.0f} tokens/s", refresh=False)
            self.bar.refresh()

    def reach(self, rows):
        """So many rows have ended since the beginning, also where they did not end one by one."""
        if self.bar is not None:
            self.bar.n = min(rows, self.bar.total)
            self.advance()

    def end(self):
        if self.bar is not None:
            self.bar.close()
            self.bar = None

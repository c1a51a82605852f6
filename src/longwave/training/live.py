"""One line that follows the run: on a terminal it is rewritten in place, elsewhere a line is printed now and then."""

import sys
import time
from typing import TextIO

from longwave.tasks.progress import clock
from longwave.training.progress import Budget, Progress

TERMINAL_PERIOD, PLAIN_PERIOD = 0.1, 10.0  # seconds between lines
MEMORY = 0.9  # of the running mean of the time per step


class Live:
    """Shows `update`s of a run, and `note`s above them. Writes to standard error, so that results can be piped."""

    def __init__(self, budget: Budget, flops_per_token: float, peak: float | None, stream: TextIO | None = None):
        self._stream = stream or sys.stderr
        self._terminal = self._stream.isatty()
        self._budget, self._flops_per_token, self._peak = budget, flops_per_token, peak
        self._seconds_per_step: float | None = None
        self._shown = -PLAIN_PERIOD
        self._line = ""

    def __enter__(self) -> "Live":
        return self

    def __exit__(self, *_: object) -> None:
        if self._terminal and self._line:
            self._stream.write("\n")

    def update(self, progress: Progress, loss: float, tokens: int, seconds: float) -> None:
        """A step is done that took `seconds` for `tokens`."""
        before = self._seconds_per_step
        if before is None or progress.step <= 2:  # the first step compiles: forget it
            self._seconds_per_step = seconds
        else:
            self._seconds_per_step = MEMORY * before + (1 - MEMORY) * seconds
        now = time.monotonic()
        if now - self._shown >= (TERMINAL_PERIOD if self._terminal else PLAIN_PERIOD):
            self._shown = now
            self._line = self._describe(progress, loss, tokens / self._seconds_per_step)
            self._stream.write(f"\r\x1b[K{self._line}" if self._terminal else f"{self._line}\n")
            self._stream.flush()

    def note(self, text: str) -> None:
        """A line that stays."""
        self._stream.write(f"\r\x1b[K{text}\n{self._line}" if self._terminal else f"{text}\n")
        self._stream.flush()

    def _describe(self, progress: Progress, loss: float, speed: float) -> str:
        of = f"/{self._budget.steps}" if self._budget.steps else ""
        parts = [f"step {progress.step}{of}", f"loss {loss:.3f}"]
        if progress.bits_per_byte is not None:
            parts.append(f"{progress.bits_per_byte:.3f} bits/byte")
        rate = speed * self._flops_per_token
        parts.append(f"{thousands(speed)} tok/s")
        parts.append(f"MFU {rate / self._peak:.1%}" if self._peak else f"{rate / 1e9:.1f} GFLOP/s")
        parts.append(f"ETA {clock(self._budget.seconds_left(progress, self._seconds_per_step or 0.0))}")
        return "  ".join(parts)


def thousands(number: float) -> str:
    """Three digits and a letter: 950, 12.3k, 1.20M."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}"

"""How far a run has come, and how far it has to go."""

import time
from dataclasses import dataclass

from longwave.errors import UsageError


@dataclass
class Progress:
    """The numbers that a run carries from one checkpoint to the next."""

    step: int = 0
    """Optimiser steps done."""

    seconds: float = 0.0
    """Wall-clock time spent, as the budget counts it."""

    tokens: int = 0
    """Tokens seen."""

    bits_per_byte: float | None = None
    """Newest evaluation on the held-out split."""

    best_bits_per_byte: float | None = None
    """Lowest one so far."""

    best_step: int | None = None
    """The step that reached it."""

    def evaluated(self, bits_per_byte: float) -> None:
        self.bits_per_byte = bits_per_byte
        if self.best_bits_per_byte is None or bits_per_byte < self.best_bits_per_byte:
            self.best_bits_per_byte, self.best_step = bits_per_byte, self.step


class Budget:
    """A run's length in steps, in minutes, or both, in which case the first to be reached ends it.

    The schedule reads `fraction`, so with steps alone it is a pure function of the step; with minutes it follows the
    clock. The clock covers everything from the end of the first step on: that step, in which kernels are compiled, is
    not charged.
    """

    def __init__(self, steps: int | None, minutes: float | None, progress: Progress):
        if steps is None and minutes is None:
            raise UsageError("The run needs a length: give steps (--steps 1000) or minutes (--minutes 5).")
        self.steps = steps
        self.limit = None if minutes is None else 60 * minutes
        self._before = progress.seconds
        self._started: float | None = None

    def tick(self, progress: Progress) -> None:
        """Bring `progress.seconds` up to now. The first call starts the clock."""
        now = time.monotonic()
        if self._started is None:
            self._started = now
        progress.seconds = self._before + now - self._started

    def spent(self, progress: Progress) -> bool:
        by_steps = self.steps is not None and progress.step >= self.steps
        by_clock = self.limit is not None and progress.seconds >= self.limit
        return by_steps or by_clock

    def fraction(self, progress: Progress) -> float:
        """Where the middle of the step about to be done lies in the run, 0 to 1."""
        parts = [0.0]
        if self.steps is not None:
            parts.append((progress.step + 0.5) / self.steps)
        if self.limit is not None:
            half_step = 0.5 * progress.seconds / max(progress.step, 1)
            parts.append((progress.seconds + half_step) / self.limit)
        return min(max(parts), 1.0)

    def seconds_left(self, progress: Progress, seconds_per_step: float) -> float:
        """Time to the end of the run if steps go on taking `seconds_per_step`."""
        left = []
        if self.steps is not None:
            left.append((self.steps - progress.step) * seconds_per_step)
        if self.limit is not None:
            left.append(self.limit - progress.seconds)
        return max(min(left), 0.0)

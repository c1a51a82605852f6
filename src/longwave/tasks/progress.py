"""A line on stderr for work that takes long: how far it is, how long it still takes."""

import sys
import time
from types import TracebackType


class ProgressLine:
    """Says nothing for the first two seconds. A context manager; `add` counts units of work done out of `total`."""

    QUIET = 2.0  # seconds
    EVERY_TERMINAL, EVERY_FILE = 0.2, 10.0  # seconds between two lines, rewritten in place or one below the other

    def __init__(self, what: str, total: int):
        self._what, self._total, self._done = what, max(total, 1), 0
        self._terminal = sys.stderr.isatty()
        self._started = time.monotonic()
        self._next = self._started + self.QUIET
        self._shown = False

    def add(self, n: int) -> None:
        self._done += n
        now = time.monotonic()
        if now >= self._next:
            self._next = now + (self.EVERY_TERMINAL if self._terminal else self.EVERY_FILE)
            self._show(now - self._started)

    def __enter__(self) -> "ProgressLine":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._shown and self._terminal:
            print(file=sys.stderr)

    def _show(self, seconds: float) -> None:
        part = min(self._done / self._total, 1.0)
        left = f", {clock(seconds * (1 - part) / part)} left" if part else ""
        begin, end = ("\r", "\x1b[K") if self._terminal else ("", "\n")
        print(f"{begin}{self._what}: {part:.0%}{left}", end=end, file=sys.stderr, flush=True)
        self._shown = True


def clock(seconds: float) -> str:
    """75 -> 1:15, 3675 -> 1:01:15, 90000 -> 1d 1:00:00."""
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    days, h = divmod(hours, 24)
    text = f"{h}:{m:02}:{s:02}" if hours else f"{m}:{s:02}"
    return f"{days}d {text}" if days else text

"""Is this machine quiet enough to time something on it?

Virtual cores are shared: much of wall time can vanish in gaps of several milliseconds that no counter shows. Spinning
on every core at once and looking at the clock does show it.
"""

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

from longwave.errors import LongwaveError

SPIN = Path(__file__).with_name("spin.py")


class GapProbe:
    """Calling it gives the largest share, over the cores, of a quarter of a second lost in gaps over 0.2 ms.

    Holds one idle process per core until `close`, or the end of its `with` block: forking the benchmark itself would
    copy its page tables each time.
    """

    SECONDS = 0.25

    def __init__(self) -> None:
        command = [sys.executable, "-I", "-S", str(SPIN)]
        self._spinners = [
            subprocess.Popen(command, bufsize=0, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            for _ in range(_core_count())
        ]

    def __call__(self) -> float:
        for spinner in self._spinners:
            _ask(spinner, self.SECONDS)
        return max(_answer(spinner) for spinner in self._spinners)

    def close(self) -> None:
        """End the processes."""
        for spinner in self._spinners:
            spinner.communicate()

    def __enter__(self) -> "GapProbe":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _ask(spinner: subprocess.Popen[bytes], seconds: float) -> None:
    assert spinner.stdin is not None
    with suppress(BrokenPipeError):  # that it has ended shows when it does not answer
        spinner.stdin.write(b"%f\n" % seconds)


def _answer(spinner: subprocess.Popen[bytes]) -> float:
    assert spinner.stdout is not None
    line = spinner.stdout.readline()
    if not line:
        raise LongwaveError(f"a process of the gap probe ended with status {spinner.wait()}; measure with --no-gate")
    return float(line)


def _core_count() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

"""The harness: interleaved runs, each accepted only if the machine was quiet right before and right after it."""

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from longwave.errors import UsageError
from longwave.tasks.progress import ProgressLine


@dataclass(frozen=True)
class Figure:
    """What one contender took: seconds of its accepted runs."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float | None:
        """Seconds; None if no run was accepted."""
        return statistics.median(self.seconds) if self.seconds else None

    def to_dict(self) -> dict:
        spread = {"min": min(self.seconds), "max": max(self.seconds)} if self.seconds else {"min": None, "max": None}
        return {"median": self.median, **spread, "accepted": len(self.seconds)}


class Harness:
    """Times contenders against each other on a machine that others may share.

    `probe` gives the share of time lost to other programs, 0 to 1; None accepts every run.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        runs: int = 5
        """Accepted runs that each figure is the median of."""
        limit: float = 0.06
        """The machine is quiet if no core loses more than this share of its time in gaps."""
        patience: float = 600.0
        """Seconds that one case may take, its first runs included; figures then rest on fewer runs, or are null."""

        def __post_init__(self):
            if self.runs < 1:
                raise UsageError(f"bench: runs must be at least 1, got {self.runs}")
            if not 0 < self.limit < 1:
                raise UsageError(f"bench: limit is a share of time between 0 and 1, got {self.limit}; try 0.06")
            if not self.patience > 0:
                raise UsageError(f"bench: patience must be more than 0 seconds, got {self.patience}")

    PAUSE = 1.0  # seconds between two looks at a machine that is not quiet

    def __init__(
        self,
        config: Config,
        probe: Callable[[], float] | None,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ):
        self.config = config
        self._probe, self._clock, self._sleep = probe, clock, sleep

    def measure(
        self, case: str, contenders: Mapping[str, Callable[[], float]], failed: dict[str, str] | None = None
    ) -> dict[str, Figure]:
        """The figures of contenders that each do a run and return the seconds it took.

        Every contender has a first run that does not count: it loads and compiles. Then they take turns until each has
        its accepted runs or patience ends. One whose first run raises is left out and put into `failed`, with the
        reason; without `failed` it raises.
        """
        end = self._clock() + self.config.patience
        accepted: dict[str, list[float]] = {}
        with ProgressLine(case, len(contenders) * (self.config.runs + 1)) as progress:
            for name, run in contenders.items():
                try:
                    run()
                except Exception as error:
                    if failed is None:
                        raise
                    failed[name] = reason(error)
                else:
                    accepted[name] = []
                progress.add(1)
            quiet = self._quiet()
            for name in self._turns(accepted):
                while not quiet and self._clock() < end:
                    self._sleep(self.PAUSE)
                    quiet = self._quiet()
                    progress.add(0)
                if self._clock() >= end:
                    break
                gc.collect()
                seconds = contenders[name]()
                if quiet := self._quiet():
                    accepted[name].append(seconds)
                    progress.add(1)
        return {name: Figure(tuple(seconds)) for name, seconds in accepted.items()}

    def _turns(self, accepted: Mapping[str, list[float]]) -> Iterator[str]:
        """Names in rounds, those that still lack runs."""
        while lacking := [name for name, seconds in accepted.items() if len(seconds) < self.config.runs]:
            yield from lacking

    def _quiet(self) -> bool:
        return self._probe is None or self._probe() <= self.config.limit


def reason(error: Exception) -> str:
    """What went wrong, in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def ratio(peer: Figure, ours: Figure) -> float | None:
    """How many times faster ours is, by the medians; None where one is missing."""
    return None if peer.median is None or ours.median is None else peer.median / ours.median


class Repeated:
    """Seconds of one call of `call(i)`, from as many calls in a row as fill `at_least` seconds; the first run is one.

    `i` counts the calls, so that a caller may take turns among copies of its inputs.
    """

    def __init__(self, call: Callable[[int], object], at_least: float):
        self._call, self._at_least = call, at_least
        self._calls = 1
        self._warm = False
        self._count = 0

    def __call__(self) -> float:
        if self._warm and self._calls == 1:
            self._calls = max(1, round(self._at_least / max(self._time(1), 1e-9)))
        self._warm = True
        return self._time(self._calls)

    def _time(self, calls: int) -> float:
        started = time.perf_counter()
        for _ in range(calls):
            self._call(self._count)
            self._count += 1
        return (time.perf_counter() - started) / calls

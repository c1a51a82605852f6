"""`longwave bench ops`: each operator beside plain torch and other libraries, and beside what the machine could do."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from longwave.bench.calls import (
    Contender,
    Inputs,
    Outcome,
    backward,
    forward,
    forward_and_backward,
    forward_for_training,
    outcome,
)
from longwave.bench.case import Case
from longwave.bench.cases import CASES
from longwave.bench.cuda_cases import CUDA_CASES
from longwave.bench.cuda_timing import Captured, Flushed
from longwave.bench.floor import (
    Cost,
    Direction,
    Floor,
    Peaks,
    Timer,
    copying,
    cost,
    exponentials_per_second,
    operations_per_second,
)
from longwave.bench.peers import OURS, PeerMissing, peer_module
from longwave.bench.table import markdown, number, table, times
from longwave.bench.timing import Figure, Harness, Repeated, ratio, reason
from longwave.config import nearest
from longwave.errors import LongwaveError, UsageError

Sizes = Literal["small", "full"]
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 2e-2}  # relative difference of two contenders' results, by norms
CASES_ON: dict[str, dict[str, Case]] = {"cpu": CASES, "cuda": CUDA_CASES}
_DIRECTIONS: dict[str, tuple[Direction, ...]] = {
    "cpu": ("forward", "forward + backward"),
    "cuda": ("forward", "forward for training", "backward"),
}
_CALLS: dict[Direction, Callable[[Contender, Sequence[Inputs]], Callable[[int], object]]] = {
    "forward": forward,
    "forward for training": forward_for_training,
    "backward": backward,
    "forward + backward": forward_and_backward,
}
_AT_LEAST = {  # seconds of calls in a row that make one run
    "cpu": {"small": 0.002, "full": 0.2},
    "cuda": {"small": 0.002, "full": 0.03},
}
_PRODUCT = {  # rows of the matrices whose product gives the arithmetic peak
    "cpu": {"small": 64, "full": 1024},
    "cuda": {"small": 64, "full": 8192},
}
_PROGRAMS = {"small": 4, "full": 8192}  # that take exponentials
_IN_A_GRAPH = 16  # calls, at least
_COPY = "copy of as many bytes"


def run(
    names: Sequence[str],
    harness: Harness,
    *,
    device: torch.device | str = "cpu",
    sizes: Sizes = "full",
    peers: bool = True,
    seed: int = 0,
    say: Callable[[str], None] = print,
) -> dict:
    """Time these of the device's cases (all, if none is named) in `sizes`; all figures as plain values.

    A name is that of a case, or of an operator and means all cases that begin with it. `say` gets the tables. A peer
    that cannot run is named under "missing", a case whose contenders disagree under "wrong", with nothing timed.
    Raises UsageError for an unknown name.
    """
    device = torch.device(device)
    return _Bench(harness, device, sizes, peers, seed, say).run(_picked(names, CASES_ON[device.type]))


class _Bench:
    """One benchmark on one device, and what it has found so far."""

    def __init__(
        self,
        harness: Harness,
        device: torch.device,
        sizes: Sizes,
        peers: bool,
        seed: int,
        say: Callable[[str], None],
    ):
        self.results: list[dict] = []
        self.missing: dict[str, str] = {}
        self.wrong: dict[str, str] = {}
        self._harness, self._device, self._sizes = harness, device, sizes
        self._peers, self._seed, self._say = peers, seed, say
        self._at_least = _AT_LEAST[device.type][sizes]

    def run(self, cases: Mapping[str, Case]) -> dict:
        peaks = self._peaks(cases.values())
        for name, case in cases.items():
            try:
                self._measure(name, case, peaks[case.peak])
            except LongwaveError as error:
                self.wrong[name] = str(error)
                self._say(f"\n{error}")
            if self._device.type == "cuda":
                torch.cuda.empty_cache()  # the next case's tensors have other sizes
        if self._device.type == "cuda":
            self._say(f"\n{summary(self.results)}")
        for who, why in self.missing.items():
            self._say(f"{who}: not measured: {why}")
        speeds = {str(dtype).removeprefix("torch."): peak.operations for dtype, peak in peaks.items()}
        exponentials = next(iter(peaks.values())).exponentials
        return {
            "cases": self.results,
            "peak_operations_per_second": speeds,
            "peak_exponentials_per_second": exponentials,
            "missing": self.missing,
            "wrong": self.wrong,
        }

    def _peaks(self, cases: Any) -> dict[torch.dtype, Peaks]:
        """What bounds each dtype's operations; exponentials are only counted on a GPU."""
        exponentials = None
        if self._device.type == "cuda":
            timer = self._timer(None)
            exponentials = exponentials_per_second(self._harness, timer, _PROGRAMS[self._sizes], self._device)
        n = _PRODUCT[self._device.type][self._sizes]
        return {
            dtype: Peaks(operations_per_second(self._harness, self._timer(None), dtype, n, self._device), exponentials)
            for dtype in dict.fromkeys(case.peak for case in cases)
        }

    def _measure(self, name: str, case: Case, peaks: Peaks) -> None:
        shape = case.full if self._sizes == "full" else case.small
        device = str(self._device)
        inputs = [case.make(shape, case.dtype, device, seed=self._seed + i) for i in range(case.copies)]
        contenders = self._contenders(name, case)
        checked, failed = check(name, case, contenders, inputs[0])
        self.missing |= {f"{name}: {who}": why for who, why in failed.items()}
        with torch.inference_mode():
            y = contenders[OURS](**inputs[0])
        for direction in _DIRECTIONS[self._device.type] if case.backward else ("forward",):
            price = cost(inputs[0], y, case.work(shape), direction)
            label = f"{name}, {direction}" if case.backward else name
            able = {who: call for who, call in contenders.items() if _able(who, direction, case, checked)}
            figures = self._figures(label, case, able, inputs, direction, price)
            result = _result(figures, price, peaks)
            self.results.append({"case": label, "shape": shape, "checked": checked} | result)
            self._say(f"\n{label}   {_words(shape)}\n{_table(result, self._harness.config.runs)}")

    def _contenders(self, name: str, case: Case) -> dict[str, Contender]:
        """longwave first; peers that are not installed are put into `missing`."""
        contenders = dict(case.contenders)
        for who, source, function in case.peers if self._peers else ():
            try:
                contenders[who] = getattr(peer_module(source), function)
            except PeerMissing as why:
                self.missing[f"{name}: {who}"] = str(why)
        return contenders

    def _figures(
        self,
        label: str,
        case: Case,
        contenders: Mapping[str, Contender],
        inputs: Sequence[Inputs],
        direction: Direction,
        price: Cost,
    ) -> dict[str, Figure]:
        timer, failed = self._timer(case), {}
        runs = {who: timer(_CALLS[direction](call, inputs)) for who, call in contenders.items()}
        runs[_COPY] = timer(copying(price.bytes, case.copies, self._device))
        figures = self._harness.measure(label, runs, failed)
        self.missing |= {f"{label}: {who}": why for who, why in failed.items()}
        if OURS in failed:
            raise LongwaveError(f"{label}: {OURS} failed: {failed[OURS]}")
        return figures

    def _timer(self, case: Case | None) -> Timer:
        if self._device.type != "cuda":
            return partial(Repeated, at_least=self._at_least)
        if case is None or not case.graph:
            return partial(Flushed, at_least=self._at_least, device=self._device)
        calls = case.copies * -(-_IN_A_GRAPH // case.copies)
        return partial(Captured, calls=calls, at_least=self._at_least, device=self._device)


def check(
    name: str, case: Case, contenders: Mapping[str, Contender], inputs: Inputs
) -> tuple[dict[str, dict[str, float | None]], dict[str, str]]:
    """Each contender's largest relative difference from longwave, the first of them, in y, the new state or the
    gradients, and the seconds of its first calls; and why those that raise do so, which may be backward alone.

    Raises LongwaveError if one differs by more than TOLERANCE, and if longwave raises.
    """
    truth: dict[str, Tensor] | None = None
    found, failed = {}, {}
    for who, call in contenders.items():
        try:
            done = _outcome(who, call, inputs, case.backward and who not in case.forward_only, failed)
        except Exception as error:
            failed[who] = reason(error)
            if truth is None:
                raise LongwaveError(f"{name}: {who} failed: {failed[who]}") from error
            continue
        truth = done.results if truth is None else truth
        differences = {what: _distance(truth[what], result) for what, result in done.results.items()}
        worst = max(differences, key=lambda what: (differences[what] != differences[what], differences[what]))
        if not differences[worst] <= TOLERANCE[case.dtype]:
            raise LongwaveError(
                f"{name}: {who} and {OURS} differ by {differences[worst]:.1e} in {worst}, "
                f"more than {TOLERANCE[case.dtype]:.0e}; neither was timed: "
                "run `longwave doctor`, and report what it says"
            )
        found[who] = {
            "difference": differences[worst],
            "first_call": done.forward,
            "first_backward": done.backward,
        }
    return found, failed


def _outcome(who: str, call: Contender, inputs: Inputs, backward: bool, failed: dict[str, str]) -> Outcome:
    """The outcome; that of the forward alone if the backward raises and longwave's does not."""
    try:
        return outcome(call, inputs, backward=backward)
    except Exception as error:
        if not backward or who == OURS:
            raise
        without = outcome(call, inputs, backward=False)
        failed[f"{who}, backward"] = reason(error)
        return without


def _able(who: str, direction: Direction, case: Case, checked: Mapping[str, Mapping[str, float | None]]) -> bool:
    """Whether a contender can be timed in this direction."""
    return who in checked and (direction == "forward" or checked[who]["first_backward"] is not None)


def _distance(truth: Tensor, found: Tensor) -> float:
    truth, found = truth.double(), found.double()
    return ((found - truth).norm() / truth.norm()).item()


def _result(figures: dict[str, Figure], price: Cost, peaks: Peaks) -> dict[str, Any]:
    """The figures with their ratios and the share that they reach of the machine's best."""
    floor = Floor.of(price, figures.pop(_COPY).median, peaks)
    return {
        "figures": {who: f.to_dict() | {"of_floor": floor.share(f.median)} for who, f in figures.items()},
        "times_faster": {OURS: {who: ratio(figure, figures[OURS]) for who, figure in figures.items()}},
        **price._asdict(),
        "floor": floor._asdict() | {"seconds": floor.seconds, "bound": floor.bound},
    }


def _table(result: dict[str, Any], runs: int) -> str:
    rows = [
        [
            who,
            _milliseconds(figure["median"]),
            f"{figure['accepted']}/{runs}",
            times(result["times_faster"][OURS][who]),
            _percent(figure["of_floor"]),
        ]
        for who, figure in result["figures"].items()
    ]
    floor = result["floor"]
    if floor["bound"] is not None:
        rows.append([f"floor, by {floor['bound']}", _milliseconds(floor["seconds"]), "", "", ""])
    return table(["", "ms", "runs", f"{OURS} faster by", "of the floor"], rows)


def summary(results: Sequence[dict[str, Any]]) -> str:
    """One line for each case: microseconds, those of the others with how much slower they are, and the floor."""
    rows = []
    for result in results:
        others = [
            f"{who} {_microseconds(figure['median'])} ({times(result['times_faster'][OURS][who])})"
            for who, figure in result["figures"].items()
            if who != OURS
        ]
        ours, floor = result["figures"][OURS], result["floor"]
        rows.append(
            [
                result["case"],
                _microseconds(ours["median"]),
                ", ".join(others) or "-",
                "-" if floor["bound"] is None else f"{_microseconds(floor['seconds'])}, {floor['bound']}",
                _percent(ours["of_floor"]),
            ]
        )
    return markdown(["operator, shape", f"{OURS}, us", "others, us (ratio)", "floor, us", "share of it"], rows)


def _picked(names: Sequence[str], cases: Mapping[str, Case]) -> dict[str, Case]:
    picked = {}
    for name in names or cases:
        fitting = [name] if name in cases else [case for case in cases if case.startswith(f"{name} ")]
        if not fitting:
            known = {case.split()[0] for case in cases} | set(cases)
            raise UsageError(f"bench ops: there is no case {name!r}.{nearest(name, known)}")
        picked |= {case: cases[case] for case in fitting}
    return picked


def _milliseconds(seconds: float | None) -> str:
    return number(None if seconds is None else 1e3 * seconds)


def _microseconds(seconds: float | None) -> str:
    return number(None if seconds is None else 1e6 * seconds)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def _words(shape: dict[str, Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in shape.items())

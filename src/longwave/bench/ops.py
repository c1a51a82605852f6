"""`longwave bench ops`: each operator beside plain torch and other libraries, and beside what the machine could do."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from longwave.bench.calls import Contender, Inputs, forward, forward_and_backward, outcome
from longwave.bench.cases import CASES, Case
from longwave.bench.floor import Cost, Floor, copying, cost, peak
from longwave.bench.peers import OURS, PeerMissing, peer_module
from longwave.bench.table import number, table, times
from longwave.bench.timing import Figure, Harness, Repeated, ratio
from longwave.config import nearest
from longwave.errors import LongwaveError, UsageError

Sizes = Literal["small", "full"]
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 2e-2}  # relative difference of two contenders' results, by norms
_AT_LEAST = {"small": 0.002, "full": 0.2}  # seconds of calls in a row that make one run
_PRODUCT = {"small": 64, "full": 1024}  # rows of the matrices whose product gives the arithmetic peak
_COPY = "copy of as many bytes"


def run(
    names: Sequence[str],
    harness: Harness,
    *,
    sizes: Sizes = "full",
    seed: int = 0,
    say: Callable[[str], None] = print,
) -> dict:
    """Time these of CASES (all, if none is named) in `sizes`; all figures as plain values. `say` gets the tables.

    Raises UsageError for an unknown name, and LongwaveError before a case is timed whose contenders disagree.
    """
    for name in names:
        if name not in CASES:
            raise UsageError(f"bench ops: there is no case {name!r}.{nearest(name, CASES)}")
    cases = {name: CASES[name] for name in names or CASES}
    dtypes = dict.fromkeys(case.dtype for case in cases.values())
    peaks = {dtype: peak(harness, dtype, _PRODUCT[sizes], _AT_LEAST[sizes]) for dtype in dtypes}
    results, missing = [], {}
    for name, case in cases.items():
        shape = case.full if sizes == "full" else case.small
        inputs = [case.make(shape, case.dtype, seed=seed + i) for i in range(case.copies)]
        contenders = _contenders(name, case, missing)
        checked = check(name, case, contenders, inputs[0])
        for label, runs, price in _directions(name, case, contenders, inputs, case.operations(shape), _AT_LEAST[sizes]):
            figures = harness.measure(label, runs)
            result = _result(figures, price, peaks[case.dtype])
            results.append({"case": label, "shape": shape, "checked": checked} | result)
            say(f"\n{label}   {_words(shape)}\n{_table(result, harness.config.runs)}")
    for who, why in missing.items():
        say(f"{who}: not measured: {why}")
    speeds = {str(dtype).removeprefix("torch."): speed for dtype, speed in peaks.items()}
    return {"cases": results, "peak_operations_per_second": speeds, "missing": missing}


def check(name: str, case: Case, contenders: Mapping[str, Contender], inputs: Inputs) -> dict[str, dict[str, float]]:
    """Each contender's relative difference from longwave in y, the new state and the gradients; its first call's time.

    Raises LongwaveError if one differs by more than TOLERANCE.
    """
    allowed, found = TOLERANCE[case.dtype], {}
    truth, _ = outcome(contenders[OURS], inputs, backward=case.backward)
    for who, call in contenders.items():
        results, seconds = outcome(call, inputs, backward=case.backward and who not in case.forward_only)
        difference = max(_distance(mine, other) for mine, other in zip(truth, results, strict=False))
        found[who] = {"difference": difference, "first_call": seconds}
        if not difference <= allowed:
            raise LongwaveError(
                f"{name}: {who} and {OURS} differ by {difference:.1e}, more than {allowed:.0e}; it was not timed: "
                "run `longwave doctor`, and report what it says"
            )
    return found


def _contenders(name: str, case: Case, missing: dict[str, str]) -> dict[str, Contender]:
    """longwave first; peers that are not installed are put into `missing`."""
    contenders = dict(case.contenders)
    for who, source, function in case.peers:
        try:
            contenders[who] = getattr(peer_module(source), function)
        except PeerMissing as why:
            missing[f"{name}: {who}"] = str(why)
    return contenders


def _directions(
    name: str,
    case: Case,
    contenders: Mapping[str, Contender],
    inputs: Sequence[Inputs],
    operations: int,
    at_least: float,
) -> Iterator[tuple[str, dict[str, Callable[[], float]], Cost]]:
    """What to measure: a label, the runs, and what one call costs. Forward; then, if there is one, with backward."""
    (y, *_), _ = outcome(contenders[OURS], inputs[0], backward=False)
    for backward in (False, True) if case.backward else (False,):
        price = cost(inputs[0], y, operations, backward=backward)
        calls = {
            who: (forward_and_backward if backward else forward)(call, inputs)
            for who, call in contenders.items()
            if not (backward and who in case.forward_only)
        }
        calls[_COPY] = copying(price.bytes, case.copies)
        label = f"{name}, forward + backward" if backward else f"{name}, forward" if case.backward else name
        yield label, {who: Repeated(call, at_least) for who, call in calls.items()}, price


def _distance(truth: Tensor, found: Tensor) -> float:
    truth, found = truth.double(), found.double()
    return ((found - truth).norm() / truth.norm()).item()


def _result(figures: dict[str, Figure], price: Cost, peak: float | None) -> dict[str, Any]:
    """The figures with their ratios and the share that they reach of the machine's best."""
    floor = Floor(figures.pop(_COPY).median, None if peak is None else price.operations / peak)
    return {
        "figures": {who: f.to_dict() | {"of_floor": floor.share(f.median)} for who, f in figures.items()},
        "times_faster": {OURS: {who: ratio(figure, figures[OURS]) for who, figure in figures.items()}},
        **price._asdict(),
        "floor": floor._asdict() | {"seconds": floor.seconds},
    }


def _table(result: dict[str, Any], runs: int) -> str:
    rows = [
        [
            who,
            _milliseconds(figure["median"]),
            f"{figure['accepted']}/{runs}",
            times(result["times_faster"][OURS][who]),
            "-" if figure["of_floor"] is None else f"{figure['of_floor']:.1%}",
        ]
        for who, figure in result["figures"].items()
    ]
    floor = result["floor"]
    if floor["seconds"] is not None:
        bound = "memory" if floor["memory"] == floor["seconds"] else "arithmetic"
        rows.append([f"floor, by {bound}", _milliseconds(floor["seconds"]), "", "", ""])
    return table(["", "ms", "runs", f"{OURS} faster by", "of the floor"], rows)


def _milliseconds(seconds: float | None) -> str:
    return number(None if seconds is None else 1e3 * seconds)


def _words(shape: dict[str, Any]) -> str:
    return " ".join(f"{key}={value}" for key, value in shape.items())

"""What this machine could do at best: move the bytes that a call cannot do without, and do its operations."""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from longwave.bench.timing import Harness
from longwave.mixers.nested import tensors

Direction = Literal["forward", "forward for training", "backward", "forward + backward"]
Timer = Callable[[Callable[[int], object]], Callable[[], float]]
"""Makes of `call(i)` a run that gives the seconds of one call."""


class Work(NamedTuple):
    """Operations of a forward, a multiply-add being two; of the backward alone; and exponentials, in either."""

    operations: int
    backward: int
    exponentials: int = 0


class Cost(NamedTuple):
    """Bytes read or written if every tensor is so once, operations, and exponentials."""

    bytes: int
    operations: int
    exponentials: int = 0

    def __add__(self, other: "Cost") -> "Cost":  # pyright: ignore[reportIncompatibleMethodOverride]
        return Cost(*(mine + its for mine, its in zip(self, other, strict=True)))


class Peaks(NamedTuple):
    """Operations and exponentials per second that the machine was seen to do; None where that was not measured."""

    operations: float | None
    exponentials: float | None = None


class Floor(NamedTuple):
    """Seconds that the bytes, the operations and the exponentials take at the speeds measured; None where they were
    not.
    """

    memory: float | None
    arithmetic: float | None
    exponentials: float | None = 0.0

    @property
    def seconds(self) -> float | None:
        """The slowest of the three."""
        return None if None in self else max(bound for bound in self if bound is not None)

    @property
    def bound(self) -> str | None:
        """Which one that is."""
        return None if self.seconds is None else self._fields[self.index(self.seconds)]

    def share(self, seconds: float | None) -> float | None:
        """How much of the machine's best a call that takes `seconds` reaches."""
        return None if self.seconds is None or seconds is None else self.seconds / seconds

    @classmethod
    def of(cls, price: Cost, copying: float | None, peaks: Peaks) -> "Floor":
        """`copying`: the seconds that a copy of as many bytes took."""
        return cls(copying, *(_seconds(n, speed) for n, speed in zip(price[1:], peaks, strict=True)))


def _seconds(n: int, per_second: float | None) -> float | None:
    if n == 0:
        return 0.0
    return None if per_second is None else n / per_second


def cost(inputs: Mapping[str, Any], y: Tensor, work: Work, direction: Direction) -> Cost:
    """Forward: inputs read, y written, a state written back. Backward: inputs and dy read, gradients written."""
    read = sum(v.nbytes for k, v in inputs.items() if isinstance(v, Tensor) and k != "state")
    state = sum(tensor.nbytes for tensor in tensors(inputs.get("state")))
    forward = Cost(read + y.nbytes + 2 * state, work.operations, work.exponentials)
    backward = Cost(2 * read + y.nbytes, work.backward, work.exponentials)
    return {"backward": backward, "forward + backward": forward + backward}.get(direction, forward)


def copying(n_bytes: int, copies: int, device: torch.device) -> Callable[[int], object]:
    """A call that reads half of `n_bytes` and writes the other half; calls take turns among so many `copies`.

    By a kernel: in a CUDA graph a copy as such goes to another, slower engine.
    """
    size = max(1, n_bytes // 8)
    pairs = [torch.rand(2, size, device=device) for _ in range(copies)]

    def copy(i: int) -> Tensor:
        source, target = pairs[i % copies]
        return torch.neg(source, out=target) if source.is_cuda else target.copy_(source)

    return copy


def operations_per_second(
    harness: Harness, timer: Timer, dtype: torch.dtype, n: int, device: torch.device
) -> float | None:
    """Of torch's product of two (n, n) matrices."""
    a, b = (torch.rand(n, n, device=device).to(dtype) for _ in range(2))
    figure = harness.measure(f"product of {dtype} matrices", {"": timer(lambda i: a @ b)})[""]
    return None if figure.median is None else 2 * n**3 / figure.median


def exponentials_per_second(harness: Harness, timer: Timer, programs: int, device: torch.device) -> float | None:
    """Of `programs` that do nothing else, on a GPU."""
    from longwave.bench.exponentials import ROUNDS, exponentials

    _, n = exponentials(programs, ROUNDS, device)
    run = timer(lambda i: exponentials(programs, ROUNDS, device))
    figure = harness.measure("exponentials", {"": run})[""]
    return None if figure.median is None else n / figure.median

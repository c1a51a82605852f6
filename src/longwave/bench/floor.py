"""What this machine could do at best: move the bytes that a call cannot do without, and do its operations."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longwave.bench.timing import Harness, Repeated
from longwave.mixers.nested import tensors


class Cost(NamedTuple):
    """Bytes read or written if every tensor is so once, and operations."""

    bytes: int
    operations: int


class Floor(NamedTuple):
    """Seconds that the bytes and the operations take at the speeds measured; None where they were not."""

    memory: float | None
    arithmetic: float | None

    @property
    def seconds(self) -> float | None:
        """The slower of the two."""
        return None if self.memory is None or self.arithmetic is None else max(self.memory, self.arithmetic)

    def share(self, seconds: float | None) -> float | None:
        """How much of the machine's best a call that takes `seconds` reaches."""
        return None if self.seconds is None or seconds is None else self.seconds / seconds


def cost(inputs: Mapping[str, Any], y: Tensor, operations: int, *, backward: bool) -> Cost:
    """Forward: inputs read, y written, a state written back. Backward: inputs and dy read, gradients written.

    `operations` are the forward's; the backward counts twice as many, as is customary.
    """
    read = sum(v.nbytes for k, v in inputs.items() if isinstance(v, Tensor) and k != "state")
    state = sum(tensor.nbytes for tensor in tensors(inputs.get("state")))
    if backward:
        return Cost(3 * read + 2 * y.nbytes, 3 * operations)
    return Cost(read + y.nbytes + 2 * state, operations)


def copying(n_bytes: int, copies: int) -> Callable[[int], object]:
    """A call that reads half of `n_bytes` and writes the other half; calls take turns among so many `copies`."""
    pairs = [torch.zeros(2, max(1, n_bytes // 2), dtype=torch.uint8) for _ in range(copies)]

    def copy(i: int) -> Tensor:
        source, target = pairs[i % copies]
        return target.copy_(source)

    return copy


def peak(harness: Harness, dtype: torch.dtype, n: int, at_least: float) -> float | None:
    """Operations per second of torch's product of two (n, n) matrices, from runs of `at_least` seconds."""
    a, b = (torch.rand(n, n).to(dtype) for _ in range(2))
    figure = harness.measure(f"product of {dtype} matrices", {"": Repeated(lambda i: a @ b, at_least)})[""]
    return None if figure.median is None else 2 * n**3 / figure.median

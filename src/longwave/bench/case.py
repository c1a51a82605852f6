"""What one case of `longwave bench ops` is, and what cases are made of."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from longwave.bench.calls import Contender, Inputs
from longwave.bench.floor import Work

Shape = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One operator. `make(shape, dtype, device, seed=)` gives its keyword arguments, a contender takes them and returns
    y.

    `operations(shape)` of the forward, a multiply-add being two; `backward_operations` of the backward alone, twice as
    many if None, as is customary; `exponentials` of either. They are held against a product of matrices in
    `arithmetic`, the case's own dtype if None. `forward_only` names contenders that are not timed backward. `peers`: a
    contender's name, its source among SOURCES, and its function there. `copies` of the inputs take turns, so that a
    step reads its weights and its state from where the layers of a model have them. `graph`: timed in a CUDA graph.
    """

    full: Shape
    small: Shape
    make: Callable[..., Inputs]
    contenders: dict[str, Contender]
    operations: Callable[[Shape], int]
    backward_operations: Callable[[Shape], int] | None = None
    exponentials: Callable[[Shape], int] = lambda shape: 0
    arithmetic: torch.dtype | None = None
    dtype: torch.dtype = torch.float32
    backward: bool = True
    forward_only: tuple[str, ...] = ()
    peers: tuple[tuple[str, str, str], ...] = ()
    copies: int = 1
    graph: bool = False

    @property
    def peak(self) -> torch.dtype:
        """The dtype of the product of matrices whose speed bounds the operations."""
        return self.arithmetic or self.dtype

    def work(self, shape: Shape) -> Work:
        forward = self.operations(shape)
        backward = 2 * forward if self.backward_operations is None else self.backward_operations(shape)
        return Work(forward, backward, self.exponentials(shape))


def first(op: Callable[..., tuple[Tensor, Any]], **options: Any) -> Contender:
    """`op` without its final state."""
    return lambda **inputs: op(**inputs, **options)[0]


def step_inputs(
    make: Callable[..., Inputs], initial_state: Callable[..., Any], sequences: tuple[str, ...]
) -> Callable[..., Inputs]:
    """The inputs of a step: those of a sequence of one token, without its axis, and a state."""

    def make_step(shape: Shape, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> Inputs:
        inputs = make(shape | {"l": 1}, dtype, device, seed=seed)
        inputs |= {name: inputs[name][:, 0] for name in sequences if inputs[name] is not None}
        inputs.pop("chunk_len", None)
        return {"state": initial_state(shape, dtype, device, seed=seed)} | inputs

    return make_step


def mamba3_operations(shape: Shape) -> int:
    """As its recurrence, for one rank: decay, two outer products, read-out, D, gate; q and k biased and turned."""
    p, n, s = shape["p"], shape["n"], shape["s"]
    return shape["b"] * shape["l"] * shape["h"] * (7 * p * n + 7 * p + 2 * (n + 6 * s) + 6)


def fft_conv_operations(shape: Shape) -> int:
    """As three real FFTs of length 2 l, and the product of two of them."""
    return shape["b"] * shape["e"] * shape["l"] * (round(15 * math.log2(2 * shape["l"])) + 6)

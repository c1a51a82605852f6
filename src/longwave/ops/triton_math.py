"""What the Triton kernels of several operators share: activations, the device they run on, sizes of blocks."""

import contextlib
from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def step_size(dt, SOFTPLUS: tl.constexpr):
    """softplus(dt) or dt, and its derivative. log(1 + u) u / ((1 + u) - 1): what 1 + u rounds away cancels."""
    if SOFTPLUS:
        u = tl.exp(tl.minimum(dt, 20.0))
        above = 1.0 + u
        size = tl.where(above == 1.0, u, tl.log(above) * (u / tl.maximum(above - 1.0, 1e-30)))
        return tl.where(dt > 20.0, dt, size), tl.where(dt > 20.0, 1.0, u / above)
    return dt, tl.full(dt.shape, 1.0, tl.float32)


@triton.jit
def silu(x):
    return x / (1.0 + tl.exp(-x))


@contextlib.contextmanager
def device_of(x: Tensor) -> Iterator[None]:
    """Make the tensor's GPU current; nothing under the interpreter, whose tensors are on the CPU."""
    with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
        yield


def processors_of(x: Tensor) -> int:
    """Multiprocessors of the tensor's GPU; 4 under the interpreter."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 4


def block(size: int, least: int = 16) -> int:
    """The power of two that covers `size`, at least `least` (16: what a matrix product takes)."""
    return max(triton.next_power_of_2(size), least)


def absent(t: Tensor | None, other: Tensor) -> Tensor:
    """`t`, or a stand-in for one that is absent: kernels do arithmetic on its address, and never read it."""
    return other if t is None else t


def rows(x: Tensor) -> Tensor:
    """`x` with a contiguous last axis: itself, or a copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()

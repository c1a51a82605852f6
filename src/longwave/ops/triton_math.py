"""What the Triton kernels of several operators share: functions, the device they run on, sizes of blocks."""

import contextlib
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.target_info import is_cuda

LOG2E = tl.constexpr(1.4426950408889634)
TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
QUARTERS = tl.constexpr(0.6366197723675814)  # quarter turns of a radian


@triton.jit
def step_size(dt, SOFTPLUS: tl.constexpr):
    """softplus(dt) or dt, and its derivative. log(1 + u) u / ((1 + u) - 1): what 1 + u rounds away cancels."""
    if SOFTPLUS:
        u = tl.exp(tl.minimum(dt, 20.0))
        above = 1.0 + u
        size = tl.where(above == 1.0, u, tl.log(above) * (u / tl.maximum(above - 1.0, 1e-30)))
        return tl.where(dt > 20.0, dt, size), tl.where(dt > 20.0, 1.0, u / above)
    return dt, tl.full(dt.shape, 1.0, dt.dtype)


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)), x in float32. On NVIDIA by instructions that take numbers below 1e-38 for 0: half as many."""
    if is_cuda():
        return tl.inline_asm_elementwise(
            """{ .reg .f32 t;
            mul.ftz.f32 t, $1, 0fBFB8AA3B;
            ex2.approx.ftz.f32 t, t;
            add.ftz.f32 t, t, 0f3F800000;
            rcp.approx.ftz.f32 $0, t; }""",
            "=f,f",
            [x],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def silu(x):
    return x * sigmoid(x)


@triton.jit
def expm1_near_0(x):
    """exp(x) - 1 to the last bits, for |x| up to log(2) / 2."""
    high = 1 / 24 + x * (1 / 120 + x * (1 / 720 + x * (1 / 5040)))
    return x + x * x * (0.5 + x * (1 / 6 + x * high))


@triton.jit
def power_of_2(k):
    """2^k in float32 for a whole number k, 0 from -127 on downwards."""
    k = tl.where(k < -127, -127, tl.where(k > 127, 127, k)).to(tl.int32)
    return ((k + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def cos_sin(quarter, rest):
    """cos, cos - 1 and sin of a phase in quarter turns: a whole number, and a rest in float32 of at most 1/2."""
    square = rest * rest
    above = -0.0208634807633530 + square * (0.000919260274839426 - square * 0.0000252020423730606)
    above = square * (-1.2337005501361697 + square * (0.2536695079010480 + square * above))
    sine = 0.0796926262461670 + square * (-0.00468175413531868 + square * 0.000160441184787360)
    sine = rest * (1.5707963267948966 + square * (-0.6459640975062462 + square * sine))
    quarter = quarter.to(tl.int32) & 3
    odd = (quarter & 1) == 1
    cosine, sine = tl.where(odd, sine, 1.0 + above), tl.where(odd, 1.0 + above, sine)
    cosine = tl.where((quarter == 1) | (quarter == 2), -cosine, cosine)
    return cosine, tl.where(quarter == 0, above, cosine - 1.0), tl.where(quarter >= 2, -sine, sine)


_AS_IT_IS = contextlib.nullcontext()


def device_of(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Make the tensor's GPU current; nothing where it is, or under the interpreter, whose tensors are on the CPU."""
    return torch.cuda.device(x.device) if x.is_cuda and x.get_device() != torch.cuda.current_device() else _AS_IT_IS


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

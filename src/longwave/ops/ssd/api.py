"""Public functions of state space duality, and their registration."""

import torch
from torch import Tensor

from longwave.ops.checks import check_documents, check_shape, state_dtype
from longwave.ops.register import Impl, define, use_kernel
from longwave.ops.ssd import reference


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    initial_state: Tensor | None = None,
    reset: Tensor | None = None,
    lengths: Tensor | None = None,
    chunk_len: int | None = None,
    impl: Impl = "fused",
) -> tuple[Tensor, Tensor]:
    """Mamba-2's sequence map: a linear recurrence with one decay per head and token, a state (p, n) per head.

        dt_t = clamp(softplus(dt_t + dt_bias), dt_limit)
        h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T
        y_t = h_t C_t + D x_t

    x (b, l, h, p); dt (b, l, h); A (h,), negative; B, C (b, l, g, n): head i reads group i // (h // g); D
    (h,), (h, p) or None; dt_bias (h,) or None. The softplus is taken if `dt_softplus`; no gradient reaches
    dt where it is clamped. `initial_state` (b, h, p, n), zeros if None. `reset` (b, l) bool: True starts a
    document; no earlier token and not the initial state reach it. `lengths` (b,) int64: tokens from
    lengths[i] on leave row i's state alone and give y = 0. `chunk_len`: tokens per block of the fused form,
    a matter of speed and rounding only; None leaves it to the device.

    Returns y (b, l, h, p) in x's dtype and the final state (b, h, p, n) in float32 (float64 for float64),
    both differentiable. dt, its cumulative sums and all accumulation are float32 at least. Strided views
    are accepted. The backward is deterministic. Raises ValueError or TypeError for shapes, dtypes and
    limits that do not fit.

    Source: Dao and Gu, "Transformers are SSMs", 2024, arXiv:2405.21060, section 6.
    """
    b, l, h, p = x.shape
    _check("ssd", (b, l), x, dt, A, B, C, D, dt_bias, dt_limit)
    check_shape("ssd", "initial_state", initial_state, (b, h, p, B.shape[-1]), "(b, h, p, n)")
    check_documents("ssd", reset, lengths, b, l)
    if chunk_len is not None and chunk_len < 1:
        raise ValueError(f"ssd: chunk_len must be at least 1, got {chunk_len}; None leaves it to the device")
    low, high = dt_limit
    if use_kernel("ssd", impl, x):
        return _SSD.apply(x, dt, A, B, C, D, dt_bias, initial_state, reset, lengths, dt_softplus, low, high, chunk_len)
    return reference.ssd(x, dt, A, B, C, D, dt_bias, dt_softplus, dt_limit, initial_state, reset, lengths)


def ssd_step(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
) -> Tensor:
    """One token of `ssd`: x (b, h, p), dt (b, h), B and C (b, g, n) -> y (b, h, p) in x's dtype.

    `state` (b, h, p, n), in float32 (float64 for float64), is updated in place. No gradient. Raises as
    `ssd` does.
    """
    b, h, p = x.shape
    _check("ssd_step", (b,), x, dt, A, B, C, D, dt_bias, dt_limit)
    check_shape("ssd_step", "state", state, (b, h, p, B.shape[-1]), "(b, h, p, n)")
    if state.dtype != state_dtype(x.dtype):
        raise TypeError(f"ssd_step: state must be {state_dtype(x.dtype)} for x in {x.dtype}, got {state.dtype}")
    if use_kernel("ssd_step", "fused", x):
        return _step(state, x, dt, A, B, C, D, dt_bias, dt_softplus, *dt_limit)
    x, dt, B, C = (t.unsqueeze(1) for t in (x, dt, B, C))
    y, final = reference.ssd(x, dt, A, B, C, D, dt_bias, dt_softplus, dt_limit, state, None, None)
    state.copy_(final)
    return y[:, 0]


def _check(op, tokens, x, dt, A, B, C, D, dt_bias, dt_limit) -> None:
    """`tokens` is (b, l) for a sequence and (b,) for a step."""
    h, p = x.shape[-2:]
    axes = "(b, l, " if len(tokens) == 2 else "(b, "
    check_shape(op, "dt", dt, (*tokens, h), f"{axes}h)")
    check_shape(op, "A", A, (h,), "(h,)")
    check_shape(op, "B", B, (*tokens, *B.shape[-2:]), f"{axes}g, n)")
    check_shape(op, "C", C, tuple(B.shape), f"{axes}g, n)")
    check_shape(op, "D", D, (h,) if D is not None and D.dim() == 1 else (h, p), "(h,) or (h, p)")
    check_shape(op, "dt_bias", dt_bias, (h,), "(h,)")
    if h % B.shape[-2]:
        raise ValueError(f"{op}: the groups g of B must divide the heads h = {h}, got g = {B.shape[-2]}")
    if not dt_limit[0] <= dt_limit[1]:
        raise ValueError(f"{op}: dt_limit must be (low, high) with low <= high, got {dt_limit}")


def _fake_forward(x, dt, A, B, C, D, dt_bias, initial_state, reset, lengths, dt_softplus, low, high, chunk_len):
    b, _, h, p = x.shape
    state = x.new_empty((b, h, p, B.shape[-1]), dtype=state_dtype(x.dtype))
    return torch.empty_like(x, memory_format=torch.contiguous_format), state


def _fake_backward(dy, dfinal, x, dt, A, B, C, D, dt_bias, initial_state, *rest):
    inputs = (x, dt, A, B, C, D, dt_bias, initial_state)
    return tuple(x.new_empty(0) if t is None else t.new_empty(t.shape) for t in inputs)


_ARGUMENTS = (
    "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? dt_bias, Tensor? initial_state, "
    "Tensor? reset, Tensor? lengths, bool dt_softplus, float dt_min, float dt_max, int? chunk_len"
)
_forward = define(
    f"ssd_forward({_ARGUMENTS}) -> (Tensor, Tensor)",
    fake=_fake_forward,
    cpu="longwave.ops.ssd.cpu:forward",
    cuda="longwave.ops.ssd.triton:forward",
    hopper="longwave.ops.ssd.hopper:forward",
)
_backward = define(
    f"ssd_backward(Tensor dy, Tensor dfinal, {_ARGUMENTS}) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_fake_backward,
    cpu="longwave.ops.ssd.cpu:backward",
    cuda="longwave.ops.ssd.triton:backward",
    hopper="longwave.ops.ssd.hopper_backward:backward",
)
_step = define(
    "ssd_step(Tensor(a!) state, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, "
    "Tensor? dt_bias, bool dt_softplus, float dt_min, float dt_max) -> Tensor",
    fake=lambda state, x, *rest: torch.empty_like(x, memory_format=torch.contiguous_format),
    cpu="longwave.ops.ssd.cpu:step",
    cuda="longwave.ops.ssd.triton:step",
    step=True,
)


class _SSD(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *arguments):
        ctx.save_for_backward(*arguments[:10])
        ctx.flags = arguments[10:]
        return _forward(*arguments)

    @staticmethod
    def backward(ctx, dy, dfinal):  # pyright: ignore[reportIncompatibleMethodOverride]
        inputs = ctx.saved_tensors
        grads = _backward(dy, dfinal, *inputs, *ctx.flags)
        given = (None if t is None else grad for t, grad in zip(inputs, grads, strict=False))
        return (*given, *(None,) * 6)

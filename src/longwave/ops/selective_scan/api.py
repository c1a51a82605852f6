"""Public functions of the selective scan, and their registration."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from longwave.ops.checks import check_documents, check_shape, state_dtype
from longwave.ops.register import Impl, define, use_kernel
from longwave.ops.selective_scan import reference

# Tokens between the states that the forward keeps for the backward, which computes those in between again.
_CHUNK_LEN = {"cuda": 16}  # which Hopper's backward holds on chip; elsewhere 32


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    initial_state: Tensor | None = None,
    reset: Tensor | None = None,
    lengths: Tensor | None = None,
    impl: Impl = "fused",
) -> tuple[Tensor, Tensor]:
    """Mamba's sequence map: a linear recurrence with a state of n numbers per channel, each with its own decay.

        dt_t = softplus(dt_t + dt_bias)
        h_t = exp(dt_t A) * h_{t-1} + (dt_t x_t) B_t^T
        y_t = (h_t C_t + D x_t) * silu(z_t)

    x, dt (b, l, e); A (e, n), negative; B, C (b, l, n); D (e,) or None; the gate z (b, l, e) or None; dt_bias
    (e,) or None. The softplus is taken if `dt_softplus`. `initial_state` (b, e, n), zeros if None. `reset` (b, l)
    bool: True starts a document; no earlier token and not the initial state reach it. `lengths` (b,) int64: tokens
    from lengths[i] on leave row i's state alone and give y = 0.

    Returns y (b, l, e) in x's dtype and the final state (b, e, n) in float32 (float64 for float64), both
    differentiable, once. All arithmetic is float32 at least; parameters may be float32 beside 16-bit activations.
    Strided views are accepted. The backward is deterministic. Raises ValueError or TypeError for shapes and dtypes
    that do not fit.

    Source: Gu and Dao, "Mamba", 2023, arXiv:2312.00752, algorithm 2. As in its code, B enters as dt B (equation 4
    of the paper has the exact integral).
    """
    b, l, e = x.shape
    _check("selective_scan", x, dt, A, B, C, D, z, dt_bias)
    check_shape("selective_scan", "initial_state", initial_state, (b, e, A.shape[1]), "(b, e, n)")
    check_documents("selective_scan", reset, lengths, b, l)
    if not use_kernel("selective_scan", impl, x):
        return reference.selective_scan(x, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state, reset, lengths)
    arguments = (x, dt, A, B, C, D, z, dt_bias, initial_state, reset, lengths, dt_softplus)
    if torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in arguments):
        return _SelectiveScan.apply(*arguments)
    return _forward(*arguments, 0)[:2]


def selective_scan_step(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    log_A: bool = False,
) -> Tensor:
    """One token of `selective_scan`: x, dt, z (b, e), B and C (b, n) -> y (b, e) in x's dtype.

    `state` (b, e, n), in float32 (float64 for float64), is updated in place. `log_A`: A is given as log(-A), which
    saves a decoding layer a pass over its parameter. No gradient. Raises as `selective_scan` does.
    """
    _check("selective_scan_step", x, dt, A, B, C, D, z, dt_bias)
    check_shape("selective_scan_step", "state", state, (*x.shape, A.shape[1]), "(b, e, n)")
    if state.dtype != state_dtype(x.dtype):
        raise TypeError(
            f"selective_scan_step: state must be {state_dtype(x.dtype)} for x in {x.dtype}, got {state.dtype}"
        )
    if use_kernel("selective_scan_step", "fused", x):
        return _step(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, log_A)
    with torch.no_grad():
        x, dt, B, C = (t[:, None] for t in (x, dt, B, C))
        z = None if z is None else z[:, None]
        A = -torch.exp(A) if log_A else A
        y, final = reference.selective_scan(x, dt, A, B, C, D, z, dt_bias, dt_softplus, state, None, None)
        state.copy_(final)
        return y[:, 0]


def _check(op, x, dt, A, B, C, D, z, dt_bias) -> None:
    """The shapes of a sequence, or of one token."""
    *leading, e = x.shape
    n = A.shape[-1]
    axes = "b, l, " if len(leading) == 2 else "b, "
    check_shape(op, "A", A, (e, n), "(e, n)")
    check_shape(op, "D", D, (e,), "(e,)")
    check_shape(op, "dt_bias", dt_bias, (e,), "(e,)")
    for name, tensor in (("dt", dt), ("z", z)):
        check_shape(op, name, tensor, (*leading, e), f"({axes}e)")
    for name, tensor in (("B", B), ("C", C)):
        check_shape(op, name, tensor, (*leading, n), f"({axes}n)")
    for name, tensor in (("x", x), ("dt", dt), ("A", A), ("B", B), ("C", C), ("D", D), ("z", z)):
        if tensor is not None and not tensor.is_floating_point():
            raise TypeError(f"{op}: {name} must be floating point, got {tensor.dtype}; pass {name}.float()")


def _fake_forward(x, dt, A, B, C, D, z, dt_bias, initial_state, reset, lengths, dt_softplus, chunk_len):
    b, l, e = x.shape
    n = A.shape[1]
    chunks = -(-l // chunk_len) if chunk_len else 0
    dtype = state_dtype(x.dtype)
    final_state = x.new_empty(b, e, n, dtype=dtype)
    return x.new_empty(b, l, e), final_state, x.new_empty(b, chunks, n, e, dtype=dtype)


def _fake_backward(dy, dfinal, states, x, dt, A, B, C, D, z, dt_bias, initial_state, *_):
    given = (x, dt, A, B, C, D, z, dt_bias, initial_state)
    return tuple(x.new_empty(0) if t is None else t.new_empty(t.shape) for t in given)


_ARGUMENTS = (
    "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, "
    "Tensor? initial_state, Tensor? reset, Tensor? lengths, bool dt_softplus, int chunk_len"
)
_forward = define(
    # The third result is the states before tokens 0, chunk_len, 2 chunk_len, ...: (b, chunks, n, e); none if it is 0.
    f"selective_scan_forward({_ARGUMENTS}) -> (Tensor, Tensor, Tensor)",
    fake=_fake_forward,
    cpu="longwave.ops.selective_scan.cpu:forward",
    cuda="longwave.ops.selective_scan.triton:forward",
    hopper="longwave.ops.selective_scan.hopper:forward",
)
_backward = define(
    # The gradients of x to initial_state; empty where there was none.
    f"selective_scan_backward(Tensor dy, Tensor dfinal, Tensor states, {_ARGUMENTS}) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_fake_backward,
    cpu="longwave.ops.selective_scan.cpu:backward",
    cuda="longwave.ops.selective_scan.triton:backward",
    hopper="longwave.ops.selective_scan.hopper_backward:backward",
)
_step = define(
    "selective_scan_step(Tensor(a!) state, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, "
    "Tensor? dt_bias, bool dt_softplus, bool log_A) -> Tensor",
    fake=lambda state, x, *rest: x.new_empty(x.shape),
    cpu="longwave.ops.selective_scan.cpu:step",
    cuda="longwave.ops.selective_scan.triton:step",
    step=True,
)


class _SelectiveScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *arguments):
        *inputs, dt_softplus = arguments
        ctx.chunk_len = _CHUNK_LEN.get(inputs[0].device.type, 32)
        y, final_state, states = _forward(*inputs, dt_softplus, ctx.chunk_len)
        ctx.save_for_backward(states, *inputs)
        ctx.dt_softplus = dt_softplus
        return y, final_state

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dfinal):  # pyright: ignore[reportIncompatibleMethodOverride]
        states, *inputs = ctx.saved_tensors
        grads = _backward(dy, dfinal, states, *inputs, ctx.dt_softplus, ctx.chunk_len)
        given = (None if t is None else grad for t, grad in zip(inputs, grads, strict=False))
        return (*given, None, None, None)

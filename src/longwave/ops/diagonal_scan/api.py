"""Public functions of the diagonal scan, and their registration."""

from typing import Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from longwave.ops.checks import check_documents, check_shape, state_dtype
from longwave.ops.diagonal_scan import reference
from longwave.ops.register import Impl, define, use_kernel

Method = Literal["zoh", "bilinear", "euler", "dirac"]
METHODS = ("zoh", "bilinear", "euler", "dirac")

# Tokens between the states that the forward keeps for the backward, which computes those in between again.
_CHUNK_LEN = 32


def diagonal_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    *,
    D: Tensor | None = None,
    method: Method = "zoh",
    initial_state: Tensor | None = None,
    reset: Tensor | None = None,
    lengths: Tensor | None = None,
    impl: Impl = "fused",
) -> tuple[Tensor, Tensor]:
    """A diagonal complex linear recurrence with a step size for every token: S4D and S5 in their recurrent view.

        h_t = Abar(dt_t) h_{t-1} + Bbar(dt_t) u_t

    dt (b, l, e); A (e, n, 2), pairs of real and imaginary part, as are all complex numbers here. Two forms:

    - with B and C (e, n, 2): u (b, l, e) is real, and y_t = 2 Re sum_n C h_t + D u_t, (b, l, e). A mode stands for
      itself and its conjugate. D (e,) or None. The states are never in memory together.
    - without: u (b, l, e, n, 2) enters as if B were 1, and y is the states, (b, l, e, n, 2).

    `method`, with z = dt A:

        zoh        Abar = exp(z)                    Bbar = (exp(z) - 1) / A  B      u is held during the step
        bilinear   Abar = (1 + z/2) / (1 - z/2)     Bbar = dt / (1 - z/2)  B
        euler      Abar = 1 + z                     Bbar = dt B
        dirac      Abar = exp(z)                    Bbar = B                        u is a pulse at the step's end

    So "dirac" is for events, and for inputs that are discretised already. Where dt repeats from one token to the next,
    Abar and Bbar are computed once.

    `initial_state` (b, e, n, 2), zeros if None. `reset` (b, l) bool: True starts a document; no earlier token and not
    the initial state reach it. `lengths` (b,) int64: tokens from lengths[i] on leave row i alone and give y = 0.

    Returns y in u's dtype and the final state (b, e, n, 2) in float32 (float64 for float64), both differentiable, once,
    in all floating-point arguments. All arithmetic is float32 at least; parameters may be float32 beside 16-bit
    activations. Strided views are accepted. Raises ValueError or TypeError for shapes and dtypes that do not fit.

    Source: Gu et al. 2022, arXiv:2206.11893 (S4D), section 2; Smith et al. 2023, arXiv:2208.04933 (S5), section 3.
    """
    b, l = u.shape[:2]
    _check("diagonal_scan", u, dt, A, B, C, D, method)
    check_shape("diagonal_scan", "initial_state", initial_state, (b, *A.shape), "(b, e, n, 2)")
    check_documents("diagonal_scan", reset, lengths, b, l)
    arguments = (u, dt, A, B, C, D, initial_state, reset, lengths)
    if not use_kernel("diagonal_scan", impl, u):
        return reference.diagonal_scan(*arguments, method)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in arguments):
        y, final_state = _DiagonalScan.apply(*arguments, method)
    else:
        y, final_state, _ = _forward(*arguments, method, 0)
    return y.to(u.dtype), final_state


def diagonal_scan_step(
    state: Tensor,
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    *,
    D: Tensor | None = None,
    method: Method = "zoh",
) -> Tensor:
    """One token of `diagonal_scan`: u (b, e) or (b, e, n, 2), dt (b, e) -> y as u, in its dtype.

    `state` (b, e, n, 2), in float32 (float64 for float64), is updated in place. No gradient. Raises as `diagonal_scan`
    does.
    """
    _check("diagonal_scan_step", u[:, None], dt[:, None], A, B, C, D, method)
    check_shape("diagonal_scan_step", "state", state, (u.shape[0], *A.shape), "(b, e, n, 2)")
    if state.dtype != state_dtype(u.dtype):
        raise TypeError(
            f"diagonal_scan_step: state must be {state_dtype(u.dtype)} for u in {u.dtype}, got {state.dtype}"
        )
    if use_kernel("diagonal_scan_step", "fused", u):
        return _step(state, u, dt, A, B, C, D, method)
    with torch.no_grad():
        y, final = reference.diagonal_scan(u[:, None], dt[:, None], A, B, C, D, state, None, None, method)
        state.copy_(final)
        return y[:, 0]


def _check(op, u, dt, A, B, C, D, method) -> None:
    if A.ndim != 3 or A.shape[-1] != 2:
        raise ValueError(f"{op}: A must be (e, n, 2), got {tuple(A.shape)}; see torch.view_as_real")
    if (B is None) != (C is None):
        raise ValueError(f"{op}: B and C go together, got only {'C' if B is None else 'B'}")
    if B is None and D is not None:
        raise ValueError(f"{op}: without B and C the states come out, to which D cannot be added")
    if method not in METHODS:
        raise ValueError(f"{op}: method must be one of {', '.join(METHODS)}, got {method!r}")
    b, l, e, n = *u.shape[:2], *A.shape[:2]
    if B is None:
        check_shape(op, "u", u, (b, l, e, n, 2), "(b, l, e, n, 2) without B and C")
    else:
        check_shape(op, "u", u, (b, l, e), "(b, l, e)")
    check_shape(op, "dt", dt, (b, l, e), "(b, l, e)")
    check_shape(op, "B", B, (e, n, 2), "(e, n, 2)")
    check_shape(op, "C", C, (e, n, 2), "(e, n, 2)")
    check_shape(op, "D", D, (e,), "(e,)")
    for name, tensor in (("u", u), ("dt", dt), ("A", A), ("B", B), ("C", C), ("D", D)):
        if tensor is not None and not tensor.is_floating_point():
            raise TypeError(f"{op}: {name} must be floating point, got {tensor.dtype}; see torch.view_as_real")


def _fake_forward(u, dt, A, B, C, D, initial_state, reset, lengths, method, chunk_len):
    b, l, e = dt.shape
    n = A.shape[1]
    dtype = state_dtype(u.dtype)
    chunks = -(-l // chunk_len) if chunk_len and B is not None else 0
    lanes, modes = (e * n, 1) if B is None else (e, n)
    y = u.new_empty(u.shape, dtype=dtype if B is None else u.dtype)
    return y, u.new_empty(b, e, n, 2, dtype=dtype), u.new_empty(b, chunks, 2, modes, lanes, dtype=dtype)


def _fake_backward(dy, dfinal, states, u, dt, A, B, C, D, initial_state, *_):
    given = (u, dt, A, B, C, D, initial_state)
    return tuple(u.new_empty(0) if t is None else t.new_empty(t.shape) for t in given)


_ARGUMENTS = (
    "Tensor u, Tensor dt, Tensor A, Tensor? B, Tensor? C, Tensor? D, Tensor? initial_state, Tensor? reset, "
    "Tensor? lengths, str method, int chunk_len"
)
_forward = define(
    # y, in the states' dtype if it is states; the final state; and the states before tokens 0, chunk_len, ... with B
    # and C, (b, chunks, 2, n, e), none if chunk_len is 0.
    f"diagonal_scan_forward({_ARGUMENTS}) -> (Tensor, Tensor, Tensor)",
    fake=_fake_forward,
    cpu="longwave.ops.diagonal_scan.cpu:forward",
    cuda="longwave.ops.diagonal_scan.triton:forward",
)
_backward = define(
    # The gradients of u to initial_state; empty where there was none.
    f"diagonal_scan_backward(Tensor dy, Tensor dfinal, Tensor states, {_ARGUMENTS}) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_fake_backward,
    cpu="longwave.ops.diagonal_scan.cpu:backward",
    cuda="longwave.ops.diagonal_scan.triton:backward",
)
_step = define(
    "diagonal_scan_step(Tensor(a!) state, Tensor u, Tensor dt, Tensor A, Tensor? B, Tensor? C, Tensor? D, str method) "
    "-> Tensor",
    fake=lambda state, u, *rest: u.new_empty(u.shape),
    cpu="longwave.ops.diagonal_scan.cpu:step",
    cuda="longwave.ops.diagonal_scan.triton:step",
    step=True,
)


class _DiagonalScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *arguments):
        *inputs, method = arguments
        B = inputs[3]
        y, final_state, states = _forward(*inputs, method, _CHUNK_LEN)
        ctx.save_for_backward(y if B is None else states, *inputs)
        ctx.method = method
        return y, final_state  # cast to its own dtype here, y would get twice its gradient from torch 2.11's compiler

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dfinal):  # pyright: ignore[reportIncompatibleMethodOverride]
        states, *inputs = ctx.saved_tensors
        grads = _backward(dy, dfinal, states, *inputs, ctx.method, _CHUNK_LEN)
        given = (None if t is None else grad for t, grad in zip(inputs, grads, strict=False))
        return (*given, None, None, None)

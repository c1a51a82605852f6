"""Public functions of Mamba-3's scan, and their registration."""

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import silu

from longwave.ops.checks import check_documents, check_shape, state_dtype
from longwave.ops.mamba3_scan import reference
from longwave.ops.register import Impl, define, use_kernel

Pairs = Literal["adjacent", "halves"]


class Mamba3ScanState(NamedTuple):
    angle: Tensor  # (b, h, s), float32, in [-pi, pi]
    ssm: Tensor  # (b, h, p, n), float32
    k: Tensor  # (b, r, h, n): the last token's B, biased and rotated, in x's dtype
    v: Tensor  # (b, h, p): the last x


def mamba3_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    trap: Tensor,
    angles: Tensor,
    *,
    B_bias: Tensor | None = None,
    C_bias: Tensor | None = None,
    D: Tensor | None = None,
    mimo_x: Tensor | None = None,
    z: Tensor | None = None,
    mimo_z: Tensor | None = None,
    mimo_o: Tensor | None = None,
    pairs: Pairs = "adjacent",
    initial_state: Mamba3ScanState | None = None,
    reset: Tensor | None = None,
    lengths: Tensor | None = None,
    chunk_len: int | None = None,
    impl: Impl = "fused",
) -> tuple[Tensor, Mamba3ScanState]:
    """Mamba-3's sequence map: a state (p, n) per head, its B and C rotated by angles that add up along the document.

        angle_t  = angle_{t-1} + dt_t angles_t
        k_t, q_t = R(angle_t) (B_t + B_bias), R(angle_t) (C_t + C_bias)
        h_t = exp(dt_t A_t) (h_{t-1} + (1 - trap_t) dt_t v_{t-1} k_{t-1}^T) + trap_t dt_t v_t k_t^T
        y_t = (h_t q_t + D v_t) silu(z_t)

    x, z (b, l, h, p); dt, positive, A, negative, and trap, in 0..1, (b, l, h); B and C (b, l, r, g, n): head i reads
    group i // (h // g); angles (b, l, s), radians per unit of dt; B_bias, C_bias (h, r, n); D (h,). R rotates s pairs
    of channels, (2 j, 2 j + 1), or with pairs="halves" (j, j + n / 2); 2 s <= n. With r = 1, v is x (single input,
    single output). With more (MIMO) there is for each rank a v = x mimo_x, a k, a q, and a y gated by silu(z mimo_z);
    v k^T is summed over the ranks, and so is y mimo_o. mimo_x, mimo_z and mimo_o (h, r, p): 1 if None, but y keeps its
    ranks if r > 1 and mimo_o is None.

    `initial_state`, zeros if None. `reset` (b, l) bool: True starts a document; no earlier token and not the initial
    state reach it, and its angles begin at 0. `lengths` (b,) int64: tokens from lengths[i] on leave row i's state alone
    and give y = 0. `chunk_len`: tokens per block of the fused form, a matter of speed and rounding only; None leaves it
    to the device.

    Returns y (b, l, h, p), or (b, l, r, h, p), in x's dtype and the final state, in float32 (float64 for float64) but
    for k and v, which have x's dtype. All are differentiable. Sums and products are float32 at least, angles are added
    up in float64. Strided views are accepted; B and C are never expanded per head in memory. The backward is
    deterministic. Raises ValueError or TypeError for shapes and dtypes that do not fit.

    Source: "Mamba-3: Improved Sequence Modeling using State Space Principles", 2026, arXiv:2603.15569.
    """
    b, l, _, _ = x.shape
    op = "mamba3_scan"
    _check(op, (b, l), x, dt, A, B, C, trap, angles, B_bias, C_bias, D, mimo_x, z, mimo_z, mimo_o, pairs)
    check_documents(op, reset, lengths, b, l)
    if chunk_len is not None and chunk_len < 1:
        raise ValueError(f"{op}: chunk_len must be at least 1, got {chunk_len}; None leaves it to the device")
    state = _zeros(x, B, angles) if initial_state is None else initial_state
    _check_state(op, "initial_state", state, x, B, angles)
    halves = pairs == "halves"
    tensors = (x, dt, A, B, C, trap, angles, B_bias, C_bias, D, mimo_x)
    if use_kernel(op, impl, x):
        finish = B.shape[2] == 1 and mimo_z is None and mimo_o is None
        inside = z if finish else None
        keep = inside is not None and torch.is_grad_enabled() and _any_wants_grad(*tensors, *state, z)
        y, *final = _Mamba3Scan.apply(*tensors, *state, reset, lengths, halves, chunk_len, inside, finish, keep)
        if finish:
            return y.squeeze(2), Mamba3ScanState(*final)
    else:
        y, *final = reference.mamba3_scan(*tensors, state, reset, lengths, halves)
    if lengths is not None and z is not None:
        z = torch.where(_padding(lengths, l)[:, :, None, None], 0.0, z)  # what is there may be NaN
    return _gate(y, z, mimo_z, mimo_o).to(x.dtype), Mamba3ScanState(*final)


def mamba3_scan_step(
    state: Mamba3ScanState,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    trap: Tensor,
    angles: Tensor,
    *,
    B_bias: Tensor | None = None,
    C_bias: Tensor | None = None,
    D: Tensor | None = None,
    mimo_x: Tensor | None = None,
    z: Tensor | None = None,
    mimo_z: Tensor | None = None,
    mimo_o: Tensor | None = None,
    pairs: Pairs = "adjacent",
) -> Tensor:
    """One token of `mamba3_scan`: x, z (b, h, p), dt, A, trap (b, h), B, C (b, r, g, n), angles (b, s) -> y (b, h, p).

    The tensors of `state` are updated in place. No gradient. Raises as `mamba3_scan` does.
    """
    op, tokens = "mamba3_scan_step", (len(x),)
    _check(op, tokens, x, dt, A, B, C, trap, angles, B_bias, C_bias, D, mimo_x, z, mimo_z, mimo_o, pairs)
    _check_state(op, "state", state, x, B, angles)
    halves = pairs == "halves"
    if use_kernel(op, "fused", x):
        y = _step(*state, x, dt, A, B, C, trap, angles, B_bias, C_bias, D, mimo_x, halves)
    else:
        x, dt, A, B, C, trap, angles = (t.unsqueeze(1) for t in (x, dt, A, B, C, trap, angles))
        y, *final = reference.mamba3_scan(
            x, dt, A, B, C, trap, angles, B_bias, C_bias, D, mimo_x, state, None, None, halves
        )
        for old, new in zip(state, final, strict=True):
            old.copy_(new)
        y = y[:, 0]
    return _gate(y, z, mimo_z, mimo_o).to(x.dtype)


def _gate(y: Tensor, z: Tensor | None, mimo_z: Tensor | None, mimo_o: Tensor | None) -> Tensor:
    """y (..., r, h, p) times silu(z mimo_z), and times mimo_o summed over the ranks."""
    if z is not None:
        z = z.to(y.dtype).contiguous().unsqueeze(-3)  # slices of a projection would take torch's slow path
        y = y * silu(z if mimo_z is None else z * mimo_z.to(y.dtype).transpose(0, 1))
    if mimo_o is not None:
        return (y * mimo_o.to(y.dtype).transpose(0, 1)).sum(-3)
    return y.squeeze(-3)


def _any_wants_grad(*tensors: Tensor | None) -> bool:
    return any(t is not None and t.requires_grad for t in tensors)


def _padding(lengths: Tensor, l: int) -> Tensor:
    return torch.arange(l, device=lengths.device) >= lengths[:, None]


def _zeros(x: Tensor, B: Tensor, angles: Tensor) -> Mamba3ScanState:
    b, (h, p), (r, _, n), s = len(x), x.shape[-2:], B.shape[-3:], angles.shape[-1]
    exact = state_dtype(x.dtype)
    return Mamba3ScanState(
        x.new_zeros(b, h, s, dtype=exact),
        x.new_zeros(b, h, p, n, dtype=exact),
        x.new_zeros(b, r, h, n),
        x.new_zeros(b, h, p),
    )


def _check_state(op: str, name: str, state: Mamba3ScanState, x: Tensor, B: Tensor, angles: Tensor) -> None:
    b, (h, p), (r, _, n), s = len(x), x.shape[-2:], B.shape[-3:], angles.shape[-1]
    check_shape(op, f"{name}.angle", state.angle, (b, h, s), "(b, h, s)")
    check_shape(op, f"{name}.ssm", state.ssm, (b, h, p, n), "(b, h, p, n)")
    check_shape(op, f"{name}.k", state.k, (b, r, h, n), "(b, r, h, n)")
    check_shape(op, f"{name}.v", state.v, (b, h, p), "(b, h, p)")
    exact = state_dtype(x.dtype)
    if name == "state" and not state.angle.dtype == state.ssm.dtype == exact:
        found = f"angle in {state.angle.dtype} and ssm in {state.ssm.dtype}"
        raise TypeError(f"{op}: state.angle and state.ssm must be {exact} for x in {x.dtype}, got {found}")


def _check(
    op, tokens, x, dt, A, B, C, trap, angles, B_bias, C_bias, D, mimo_x, z, mimo_z, mimo_o, pairs
) -> None:  # fmt: skip
    """`tokens` is (b, l) for a sequence and (b,) for a step."""
    h, p = x.shape[-2:]
    r, g, n = B.shape[-3:]
    axes = "(b, l, " if len(tokens) == 2 else "(b, "
    for name, tensor in (("dt", dt), ("A", A), ("trap", trap)):
        check_shape(op, name, tensor, (*tokens, h), f"{axes}h)")
    check_shape(op, "B", B, (*tokens, r, g, n), f"{axes}r, g, n)")
    check_shape(op, "C", C, tuple(B.shape), f"{axes}r, g, n)")
    check_shape(op, "angles", angles, (*tokens, angles.shape[-1]), f"{axes}s)")
    check_shape(op, "z", z, tuple(x.shape), f"{axes}h, p)")
    check_shape(op, "D", D, (h,), "(h,)")
    for name, tensor in (("B_bias", B_bias), ("C_bias", C_bias)):
        check_shape(op, name, tensor, (h, r, n), "(h, r, n)")
    for name, tensor in (("mimo_x", mimo_x), ("mimo_z", mimo_z), ("mimo_o", mimo_o)):
        check_shape(op, name, tensor, (h, r, p), "(h, r, p)")
    if h % g:
        raise ValueError(f"{op}: the groups g of B must divide the heads h = {h}, got g = {g}")
    if pairs not in ("adjacent", "halves"):
        raise ValueError(f"{op}: pairs must be 'adjacent' or 'halves', got {pairs!r}")
    s = angles.shape[-1]
    if 2 * s > n or (pairs == "halves" and n % 2):
        raise ValueError(f"{op}: the s = {s} angles need 2 s <= n, and pairs='halves' an even n; got n = {n}")


def _fake_forward(
    x, dt, A, B, C, trap, angles, B_bias, C_bias, D, mimo_x, angle, ssm, k, v,
    reset, lengths, halves, chunk_len, z, finish, keep,
):  # fmt: skip
    exact = state_dtype(x.dtype)
    b, l, h, p = x.shape
    states = (
        t.new_empty(t.shape, dtype=dtype) for t, dtype in ((angle, exact), (ssm, exact), (k, x.dtype), (v, x.dtype))
    )
    size = (b, l, B.shape[2], h, p)
    return x.new_empty(size, dtype=x.dtype if finish else exact), x.new_empty(size if keep else 0), *states


def _fake_backward(dy, dangle, dssm, dk, dv, x, *rest):
    inputs = (x, *rest[:14], rest[-2])
    return tuple(x.new_empty(0) if t is None else t.new_empty(t.shape) for t in inputs)


def _fake_step(angle, ssm, k, v, x, *rest):
    return x.new_empty(k.shape[:3] + x.shape[-1:], dtype=state_dtype(x.dtype))


_TOKENS = "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor trap, Tensor angles"
_PARAMETERS = "Tensor? B_bias, Tensor? C_bias, Tensor? D, Tensor? mimo_x"
_STATE = "Tensor angle, Tensor ssm, Tensor k, Tensor v"
_ARGUMENTS = f"{_TOKENS}, {_PARAMETERS}, {_STATE}, Tensor? reset, Tensor? lengths, bool halves, int? chunk_len"
_MODULE = "longwave.ops.mamba3_scan"
_forward = define(
    # y; if `finish` (one rank), gated by z and in x's dtype. If `keep`, what it was before, else empty. The state.
    f"mamba3_scan_forward({_ARGUMENTS}, Tensor? z, bool finish, bool keep) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    fake=_fake_forward,
    cpu=f"{_MODULE}.cpu:forward",
    cuda=f"{_MODULE}.triton:forward",
    hopper=f"{_MODULE}.hopper:forward",
)
_backward = define(
    f"mamba3_scan_backward(Tensor dy, Tensor dangle, Tensor dssm, Tensor dk, Tensor dv, {_ARGUMENTS}, "
    f"Tensor? z, Tensor ungated) -> ({', '.join(['Tensor'] * 16)})",
    fake=_fake_backward,
    cpu=f"{_MODULE}.cpu:backward",
    cuda=f"{_MODULE}.triton:backward",
    hopper=f"{_MODULE}.hopper_backward:backward",
)
_step = define(
    "mamba3_scan_step(Tensor(a!) angle, Tensor(b!) ssm, Tensor(c!) k, Tensor(d!) v, "
    f"{_TOKENS}, {_PARAMETERS}, bool halves) -> Tensor",
    fake=_fake_step,
    cpu=f"{_MODULE}.cpu:step",
    cuda=f"{_MODULE}.triton:step",
    step=True,
)


class _Mamba3Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *arguments: Any):
        *given, z, _, _ = arguments
        y, ungated, *state = _forward(*arguments)
        ctx.save_for_backward(*given[:17], z, ungated)
        ctx.flags = given[17:]
        return y, *state

    @staticmethod
    def backward(ctx, *grads_of_outputs):  # pyright: ignore[reportIncompatibleMethodOverride]
        *inputs, z, ungated = ctx.saved_tensors
        *grads, dz = _backward(*grads_of_outputs, *inputs, *ctx.flags, z, ungated)
        given = (None if t is None else grad for t, grad in zip(inputs, grads, strict=False))
        return (*given, *(None,) * 4, None if z is None else dz, None, None)

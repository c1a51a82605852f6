"""The definition, one token after the other: Mamba-3, arXiv:2603.15569, the exponential-trapezoidal rule.

angle_t = angle_{t-1} + dt_t angles_t                                              modulo whole turns
k_t, q_t = R(angle_t) (B_t + B_bias), R(angle_t) (C_t + C_bias)
h_t = exp(dt_t A_t) (h_{t-1} + (1 - trap_t) dt_t v_{t-1} k_{t-1}^T) + trap_t dt_t v_t k_t^T
y_t = h_t q_t + D v_t

With ranks r, v_t is x_t mimo_x for each, v k^T is summed over them, and there is a y_t for each.
"""

import math

import torch
from torch import Tensor

from longwave.ops.checks import state_dtype


def mamba3_scan(
    x: Tensor,  # (b, l, h, p)
    dt: Tensor,  # (b, l, h)
    A: Tensor,  # (b, l, h)
    B: Tensor,  # (b, l, r, g, n)
    C: Tensor,  # (b, l, r, g, n)
    trap: Tensor,  # (b, l, h)
    angles: Tensor,  # (b, l, s)
    B_bias: Tensor | None,  # (h, r, n)
    C_bias: Tensor | None,  # (h, r, n)
    D: Tensor | None,  # (h,)
    mimo_x: Tensor | None,  # (h, r, p)
    state: tuple[Tensor, ...],  # (b, h, s), (b, h, p, n), (b, r, h, n), (b, h, p)
    reset: Tensor | None,  # (b, l)
    lengths: Tensor | None,  # (b,)
    halves: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y (b, l, r, h, p) in float32 at least, then the state: angle, ssm, and k and v in x's dtype."""
    h = x.shape[2]
    dtype = state_dtype(x.dtype)
    B, C = (_per_head(t.to(dtype), bias, h) for t, bias in ((B, B_bias), (C, C_bias)))  # (b, l, r, h, n)
    state = tuple(t.to(dtype) for t in state)
    dt, A, trap, angles, xs = (t.to(dtype) for t in (dt, A, trap, angles, x))

    ys = []
    # Unbound, not indexed: the gradient of an index is as long as the sequence, for every token.
    tokens = zip(*(s.unbind(1) for s in (xs, dt, A, B, C, trap, angles)), strict=True)
    for t, (x_t, dt_t, A_t, B_t, C_t, trap_t, angles_t) in enumerate(tokens):
        before = state if reset is None else _keep(~reset[:, t], state, tuple(map(torch.zeros_like, state)))
        angle, ssm, k, v = before
        angle = wrapped(angle + dt_t[..., None] * angles_t[:, None])  # (b, h, s)
        k_t, q_t = rotated(B_t, angle, halves), rotated(C_t, angle, halves)  # (b, r, h, n)
        decay, early, late = torch.exp(dt_t * A_t), (1 - trap_t) * dt_t, trap_t * dt_t
        ssm = _scale(decay) * (ssm + _scale(early) * _outer(v, k, mimo_x)) + _scale(late) * _outer(x_t, k_t, mimo_x)
        y = torch.einsum("bhpn,brhn->brhp", ssm, q_t)
        if D is not None:
            y = y + D.to(dtype)[:, None] * _ranks(x_t, k_t.shape[1], mimo_x)
        after = (angle, ssm, k_t, x_t)
        if lengths is not None:
            valid = t < lengths
            after = _keep(valid, after, state)
            y = torch.where(valid[:, None, None, None], y, 0.0)
        state = after
        ys.append(y)
    angle, ssm, k, v = state
    return torch.stack(ys, dim=1), angle, ssm, k.to(x.dtype), v.to(x.dtype)


def wrapped(angle: Tensor) -> Tensor:
    """The angle in [-pi, pi] that differs by whole turns. One that is small already stays as it is."""
    return angle - 2 * math.pi * torch.round(angle / (2 * math.pi))


def rotated(u: Tensor, angle: Tensor, halves: bool) -> Tensor:
    """u (b, r, h, n) with its first s pairs rotated by angle (b, h, s)."""
    n, s = u.shape[-1], angle.shape[-1]
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    first, second = pairs_of(u, s, halves)
    first, second = first * cos - second * sin, first * sin + second * cos
    if halves:
        return torch.cat([first, u[..., s : n // 2], second, u[..., n // 2 + s :]], dim=-1)
    return torch.cat([torch.stack([first, second], dim=-1).flatten(-2), u[..., 2 * s :]], dim=-1)


def pairs_of(u: Tensor, s: int, halves: bool) -> tuple[Tensor, Tensor]:
    """The first and the second channels of the pairs that are rotated, both (..., s)."""
    if halves:
        middle = u.shape[-1] // 2
        return u[..., :s], u[..., middle : middle + s]
    first, second = u[..., : 2 * s].unflatten(-1, (s, 2)).unbind(-1)
    return first, second


def _per_head(u: Tensor, bias: Tensor | None, h: int) -> Tensor:
    """(b, l, r, g, n) -> (b, l, r, h, n), with the bias (h, r, n) added."""
    u = u.repeat_interleave(h // u.shape[3], dim=3)
    return u if bias is None else u + bias.to(u.dtype).transpose(0, 1)


def _ranks(x: Tensor, r: int, mimo_x: Tensor | None) -> Tensor:
    """v (b, r, h, p) from x (b, h, p)."""
    x = x[:, None]
    return x.expand(-1, r, -1, -1) if mimo_x is None else x * mimo_x.to(x.dtype).transpose(0, 1)


def _outer(x: Tensor, k: Tensor, mimo_x: Tensor | None) -> Tensor:
    """v k^T (b, h, p, n), summed over the ranks."""
    return torch.einsum("brhp,brhn->bhpn", _ranks(x, k.shape[1], mimo_x), k)


def _scale(t: Tensor) -> Tensor:
    return t[..., None, None]


def _keep(condition: Tensor, then: tuple[Tensor, ...], otherwise: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Row by row."""
    return tuple(
        torch.where(condition.view(-1, *[1] * (a.dim() - 1)), a, b) for a, b in zip(then, otherwise, strict=True)
    )

"""The definition, one token after the other: Dao and Gu, 2024, arXiv:2405.21060, equation 1 with scalar A.

h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T
y_t = h_t C_t + D x_t
"""

import torch
from torch import Tensor
from torch.nn.functional import softplus

from longwave.ops.checks import state_dtype


def ssd(
    x: Tensor,  # (b, l, h, p)
    dt: Tensor,  # (b, l, h)
    A: Tensor,  # (h,)
    B: Tensor,  # (b, l, g, n)
    C: Tensor,  # (b, l, g, n)
    D: Tensor | None,  # (h,) or (h, p)
    dt_bias: Tensor | None,  # (h,)
    dt_softplus: bool,
    dt_limit: tuple[float, float],
    initial_state: Tensor | None,  # (b, h, p, n)
    reset: Tensor | None,  # (b, l)
    lengths: Tensor | None,  # (b,)
) -> tuple[Tensor, Tensor]:
    b, _, h, p = x.shape
    g, n = B.shape[2:]
    dtype = state_dtype(x.dtype)
    dt = step_sizes(dt.to(dtype), dt_bias, dt_softplus, dt_limit)
    xs, A = x.to(dtype), A.to(dtype)
    B = B.to(dtype).repeat_interleave(h // g, dim=2)  # (b, l, h, n)
    C = C.to(dtype).repeat_interleave(h // g, dim=2)
    state = xs.new_zeros(b, h, p, n) if initial_state is None else initial_state.to(dtype)

    ys = []
    # Unbound, not indexed: the gradient of an index is as long as the sequence, for every token.
    for t, (x_t, dt_t, B_t, C_t) in enumerate(zip(*(s.unbind(1) for s in (xs, dt, B, C)), strict=True)):
        before = state if reset is None else torch.where(reset[:, t, None, None, None], 0.0, state)
        decay = torch.exp(dt_t * A)[..., None, None]
        after = decay * before + (dt_t[..., None] * x_t)[..., None] * B_t[:, :, None]  # (b, h, p, n)
        y = (after @ C_t[..., None]).squeeze(-1)  # (b, h, p)
        if D is not None:
            y = y + D.to(dtype).reshape(h, -1) * x_t
        if lengths is not None:
            valid = t < lengths
            after = torch.where(valid[:, None, None, None], after, state)
            y = torch.where(valid[:, None, None], y, 0.0)
        state = after
        ys.append(y)
    return torch.stack(ys, dim=1).to(x.dtype), state


def step_sizes(dt: Tensor, dt_bias: Tensor | None, dt_softplus: bool, dt_limit: tuple[float, float]) -> Tensor:
    """clamp(softplus(dt + dt_bias), dt_limit), in dt's dtype."""
    if dt_bias is not None:
        dt = dt + dt_bias.to(dt.dtype)
    if dt_softplus:
        dt = softplus(dt)
    return dt.clamp(*dt_limit)

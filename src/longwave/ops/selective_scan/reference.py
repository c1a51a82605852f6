"""The definition, one token after the other: Gu and Dao, 2023, arXiv:2312.00752, algorithm 2.

h_t = exp(dt_t A) * h_{t-1} + (dt_t x_t) B_t
y_t = (h_t C_t + D x_t) * silu(z_t)
"""

import torch
from torch import Tensor
from torch.nn.functional import silu, softplus

from longwave.ops.checks import state_dtype


def selective_scan(
    x: Tensor,  # (b, l, e)
    dt: Tensor,  # (b, l, e)
    A: Tensor,  # (e, n)
    B: Tensor,  # (b, l, n)
    C: Tensor,  # (b, l, n)
    D: Tensor | None,  # (e,)
    z: Tensor | None,  # (b, l, e)
    dt_bias: Tensor | None,  # (e,)
    dt_softplus: bool,
    initial_state: Tensor | None,  # (b, e, n)
    reset: Tensor | None,  # (b, l)
    lengths: Tensor | None,  # (b,)
) -> tuple[Tensor, Tensor]:
    b, _, e = x.shape
    dtype = state_dtype(x.dtype)
    xs, dt, A, B, C = (tensor.to(dtype) for tensor in (x, dt, A, B, C))
    if dt_bias is not None:
        dt = dt + dt_bias.to(dtype)
    if dt_softplus:
        dt = softplus(dt)
    state = xs.new_zeros(b, e, A.shape[1]) if initial_state is None else initial_state.to(dtype)

    ys = []
    gates = xs if z is None else z.to(dtype)
    # Unbound, not indexed: the gradient of an index is as long as the sequence, for every token.
    for t, (x_t, dt_t, B_t, C_t, z_t) in enumerate(zip(*(s.unbind(1) for s in (xs, dt, B, C, gates)), strict=True)):
        before = state if reset is None else torch.where(reset[:, t, None, None], 0.0, state)
        decay = torch.exp(dt_t[..., None] * A)  # (b, e, n)
        after = decay * before + (dt_t * x_t)[..., None] * B_t[:, None, :]
        y = (after @ C_t[..., None]).squeeze(-1)  # (b, e)
        if D is not None:
            y = y + D.to(dtype) * x_t
        if z is not None:
            y = y * silu(z_t)
        if lengths is not None:
            valid = t < lengths
            after = torch.where(valid[:, None, None], after, state)
            y = torch.where(valid[:, None], y, 0.0)
        state = after
        ys.append(y)
    return torch.stack(ys, dim=1).to(x.dtype), state

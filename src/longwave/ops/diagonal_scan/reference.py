"""The definition, one token after the other.

h_t = Abar(dt_t) h_{t-1} + Bbar(dt_t) u_t
y_t = 2 Re sum_n C h_t + D u_t                                 with B and C; without, y_t = h_t

Gu et al. 2022, arXiv:2206.11893 (S4D), section 2; Smith et al. 2023, arXiv:2208.04933 (S5), section 3.
"""

import torch
from torch import Tensor

from longwave.ops.checks import state_dtype
from longwave.ops.discretize import discretize_diagonal


def diagonal_scan(
    u: Tensor,  # (b, l, e) with B and C, otherwise (b, l, e, n, 2)
    dt: Tensor,  # (b, l, e)
    A: Tensor,  # (e, n, 2)
    B: Tensor | None,  # (e, n, 2)
    C: Tensor | None,  # (e, n, 2)
    D: Tensor | None,  # (e,)
    initial_state: Tensor | None,  # (b, e, n, 2)
    reset: Tensor | None,  # (b, l)
    lengths: Tensor | None,  # (b,)
    method: str,
) -> tuple[Tensor, Tensor]:
    b = u.shape[0]
    dtype = state_dtype(u.dtype)
    us, dts, A = u.to(dtype), dt.to(dtype), _complex(A, dtype)
    state = torch.zeros(b, *A.shape, dtype=A.dtype, device=u.device)
    if initial_state is not None:
        state = _complex(initial_state, dtype)
    if B is None or C is None:
        us, B = _complex(us, dtype), torch.ones_like(A)
    else:
        us, B, C = us[..., None], _complex(B, dtype), _complex(C, dtype)

    ys = []
    # Unbound, not indexed: the gradient of an index is as long as the sequence, for every token.
    for t, (u_t, dt_t) in enumerate(zip(us.unbind(1), dts.unbind(1), strict=True)):
        before = state if reset is None else torch.where(reset[:, t, None, None], 0.0, state)
        Abar, Bbar = _discretize(A, B, dt_t[..., None], method)  # (b, e, n)
        after = Abar * before + Bbar * u_t
        if C is None:
            y = torch.view_as_real(after)  # (b, e, n, 2)
        else:
            y = 2 * (after * C).real.sum(-1)  # (b, e)
            if D is not None:
                y = y + D.to(dtype) * u_t[..., 0]
        if lengths is not None:
            valid = t < lengths
            after = torch.where(valid[:, None, None], after, state)
            y = torch.where(valid.view(b, *[1] * (y.ndim - 1)), y, 0.0)
        state = after
        ys.append(y)
    return torch.stack(ys, dim=1).to(u.dtype), torch.view_as_real(state)


def _discretize(A: Tensor, B: Tensor, dt: Tensor, method: str) -> tuple[Tensor, Tensor]:
    if method == "dirac":
        return torch.exp(dt * A), B
    return discretize_diagonal(A, B, dt, method)  # pyright: ignore[reportArgumentType]


def _complex(pairs: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.view_as_complex(pairs.to(dtype).contiguous())

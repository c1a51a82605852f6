"""From x' = A x + B u to x_t = Abar x_{t-1} + Bbar u_t, for steps of dt during which u is held.

    zoh        Abar = exp(dt A)                         Bbar = A^-1 (Abar - I) B       exact
    bilinear   Abar = (I - dt/2 A)^-1 (I + dt/2 A)      Bbar = (I - dt/2 A)^-1 dt B    second order, always stable
    euler      Abar = I + dt A                          Bbar = dt B                    first order, stable for small dt

Gu et al. 2022, arXiv:2111.00396, equation 3 (bilinear); Gu et al. 2022, arXiv:2206.11893, section 2 (zoh). dt may be
a tensor, so that each channel and each token can have its own. All are differentiable, and A need not be invertible.
"""

from typing import Literal

import torch
from torch import Tensor

from longwave.errors import UsageError

Method = Literal["zoh", "bilinear", "euler"]
METHODS = ("zoh", "bilinear", "euler")


def discretize(A: Tensor, B: Tensor, dt: Tensor | float, method: Method = "zoh") -> tuple[Tensor, Tensor]:
    """Dense A (..., n, n) and B (..., n), dt (...) -> Abar (..., n, n), Bbar (..., n)."""
    dt = torch.as_tensor(dt, dtype=A.dtype, device=A.device)[..., None, None]
    n = A.shape[-1]
    dtA, dtB = dt * A, dt * B[..., None]
    batch = torch.broadcast_shapes(dtA.shape[:-2], dtB.shape[:-2])
    dtA, dtB = dtA.expand(*batch, n, n), dtB.expand(*batch, n, 1)
    identity = torch.eye(n, dtype=A.dtype, device=A.device)
    if _known(method) == "euler":
        return identity + dtA, dtB[..., 0]
    if method == "bilinear":
        both = torch.linalg.solve(identity - dtA / 2, torch.cat([identity + dtA / 2, dtB], dim=-1))
    else:
        # exp [[dt A, dt B], [0, 0]] = [[Abar, Bbar], [0, 1]], which asks for no inverse of A.
        held = torch.cat([dtA, dtB], dim=-1)
        both = torch.matrix_exp(torch.cat([held, torch.zeros_like(held[..., :1, :])], dim=-2))[..., :n, :]
    return both[..., :n], both[..., n]


def discretize_diagonal(A: Tensor, B: Tensor, dt: Tensor | float, method: Method = "zoh") -> tuple[Tensor, Tensor]:
    """A (..., n), the diagonal, real or complex; B and dt of shapes that broadcast with it -> Abar, Bbar (..., n)."""
    dtA = dt * A
    if _known(method) == "euler":
        return 1 + dtA, dt * B
    if method == "bilinear":
        return (1 + dtA / 2) / (1 - dtA / 2), dt * B / (1 - dtA / 2)
    return dtA.exp(), dt * B * _mean_of_exp(dtA)


def _mean_of_exp(z: Tensor) -> Tensor:
    """(exp(z) - 1) / z, the mean of exp(s z) over s in [0, 1]; near 0, where 0 / 0 looms, by its series."""
    small = z.abs() < 1e-2
    safe = torch.where(small, 1.0, z)
    series = 1 + z / 2 * (1 + z / 3 * (1 + z / 4 * (1 + z / 5 * (1 + z / 6 * (1 + z / 7)))))
    return torch.where(small, series, torch.expm1(safe) / safe)


def _known(method: str) -> str:
    if method not in METHODS:
        raise UsageError(f"discretize: method must be 'zoh', 'bilinear' or 'euler', got {method!r}")
    return method

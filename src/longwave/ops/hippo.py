"""HiPPO: state spaces whose state holds the Legendre coefficients of what they have seen.

Gu et al. 2020, arXiv:2008.07669 (theorems 1 and 2). As S4 uses them: Gu et al. 2022, arXiv:2111.00396, section 2.2 and
appendix C. Everything is float64 on the CPU, however torch's defaults are set: it is computed once, for initial values.

    legs   x' = (A x + B u) / t      the whole history, [0, t]. S4 drops the 1 / t: x' = A x + B u then holds the
                                     history with a weight that decays exponentially into the past.
    legt   x' = A x + B u            the last `window` units of time, [t - window, t]
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from longwave.errors import UsageError

Measure = Literal["legs", "legt"]
WINDOW = 2.0  # S4's window of legt, in units of time


class NPLR(NamedTuple):
    """A = V (diag(Lambda) - P P*) V^-1 with V unitary: normal plus low rank (S4, theorem 1), in the basis V.

    A = V diag(Lambda) V^* - (V P) (V P)^*; eigenvalues ascend by their imaginary part, so that of n even the second
    half is the conjugate of the first, backwards. Each eigenvector is turned so that the P of largest size is positive.
    """

    Lambda: Tensor  # (n,) complex128
    P: Tensor  # (r, n) complex128: the columns of P, as seen from V
    B: Tensor  # (n,) complex128: V^-1 B
    V: Tensor  # (n, n) complex128


def hippo(measure: Measure, n: int, *, window: float = WINDOW) -> tuple[Tensor, Tensor]:
    """A (n, n) and B (n,) of a measure, float64. `window` is that of "legt".

    legs: A_nk = -sqrt(2n+1) sqrt(2k+1) below the diagonal, -(n+1) on it, 0 above; B_n = sqrt(2n+1).
    legt: A_nk = -sqrt(2n+1) sqrt(2k+1) / window, times (-1)^(n-k) above the diagonal; B_n = sqrt(2n+1) / window.
    """
    _check(measure, n)
    i = torch.arange(n, dtype=torch.float64, device="cpu")
    root = (2 * i + 1).sqrt()
    full = root[:, None] * root
    if measure == "legs":
        return -(full.tril(-1) + torch.diag(i + 1)), root
    signs = torch.where(i[:, None] < i, 1 - 2 * ((i[:, None] - i) % 2), 1.0)
    return -signs * full / window, root / window


def low_rank(measure: Measure, n: int, *, window: float = WINDOW) -> Tensor:
    """P (r, n) float64 such that A + P^T P is normal: a multiple of I plus a skew matrix. r: legs 1, legt 2."""
    _check(measure, n)
    i = torch.arange(n, dtype=torch.float64, device="cpu")
    if measure == "legs":
        return (i + 0.5).sqrt()[None]
    root = ((2 * i + 1) / window).sqrt()
    even = i % 2 == 0
    return torch.stack([torch.where(even, 0.0, root), torch.where(even, root, 0.0)])


def nplr(measure: Measure, n: int, *, window: float = WINDOW) -> NPLR:
    """The NPLR form of `hippo(measure, n)`.

    The diagonalisation is that of a Hermitian matrix, hence exact to rounding at any n. (A itself has no usable
    eigenvectors: S4, lemma 3.2.)
    """
    A, B = hippo(measure, n, window=window)
    P = low_rank(measure, n, window=window)
    normal = A + P.mT @ P  # (n, n) = real I + skew
    imaginary, V = torch.linalg.eigh(-1j * normal)
    Lambda = torch.complex(normal.diagonal().mean().expand(n), imaginary)
    seen = V.mH @ P.mT.to(V.dtype)  # (n, r)
    largest = seen.gather(1, seen.abs().argmax(1, keepdim=True))[:, 0]
    V = V * (largest / largest.abs())
    return NPLR(Lambda, (V.mH @ P.mT.to(V.dtype)).mT, V.mH @ B.to(V.dtype), V)


def reconstruction(measure: Measure, n: int, points: Tensor) -> Tensor:
    """M (m, n) with signal(points) = M x, from a state x (n,).

    points (m,) in [0, 1] are places in what the state remembers, 0 its oldest and 1 the present moment: of the history
    [0, t] for "legs" (in its scaled form, x' = (A x + B u) / t), of the window for "legt". Row i holds
    sqrt(2n+1) P_n(2 s_i - 1) for the Legendre polynomials P_n, by Bonnet's recurrence.
    """
    _check(measure, n)
    s = 2 * points.to(torch.float64) - 1
    before, now, columns = torch.zeros_like(s), torch.ones_like(s), []
    for k in range(n):
        columns.append(now * (2 * k + 1) ** 0.5)
        before, now = now, ((2 * k + 1) * s * now - k * before) / (k + 1)
    return torch.stack(columns, dim=1)


def _check(measure: str, n: int) -> None:
    if measure not in ("legs", "legt"):
        raise UsageError(f"hippo: measure must be 'legs' or 'legt', got {measure!r}")
    if n < 1:
        raise UsageError(f"hippo: n must be at least 1, got {n}")

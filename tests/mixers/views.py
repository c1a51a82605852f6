"""Independent forms of the time-invariant mixers' systems, in numpy and float64, one token after the other."""

import numpy as np
import scipy.linalg
import torch
from torch import Tensor


def recurrence(A: np.ndarray, B: np.ndarray, C: np.ndarray, D: np.ndarray, u: Tensor, dt: np.ndarray, method: str):
    """y (b, l, d) of dense systems A (d, n, n), B and C (d, n), D (d,); dt (b, l, d). And the states (b, d, n).

    zoh is scipy's matrix exponential, the others are solved.
    """
    b, l, d = u.shape
    x, y = np.zeros((b, d, B.shape[1]), A.dtype), np.zeros((b, l, d))
    for i, t, c in np.ndindex(b, l, d):
        Abar, Bbar = held(A[c], B[c], dt[i, t, c], method)
        x[i, c] = Abar @ x[i, c] + Bbar * u[i, t, c].item()
        y[i, t, c] = (C[c] @ x[i, c]).real + D[c] * u[i, t, c].item()
    return torch.from_numpy(y), x


def held(A: np.ndarray, B: np.ndarray, dt: float, method: str) -> tuple[np.ndarray, np.ndarray]:
    n = len(B)
    if method == "zoh":
        block = scipy.linalg.expm(np.block([[dt * A, dt * B[:, None]], [np.zeros((1, n + 1))]]))
        return block[:n, :n], block[:n, n]
    if method == "bilinear":
        both = np.linalg.solve(np.eye(n) - dt / 2 * A, np.concatenate([np.eye(n) + dt / 2 * A, dt * B[:, None]], 1))
        return both[:, :n], both[:, n]
    return np.eye(n) + dt * A, dt * B


def modes(pairs: Tensor) -> np.ndarray:
    """Pairs (..., n/2, 2) -> all n modes, each followed by its conjugate."""
    half = torch.view_as_complex(pairs.detach().double().contiguous())
    return torch.stack([half, half.conj()], -1).flatten(-2).resolve_conj().numpy()


def stamps(b: int, l: int) -> Tensor:
    """Durations between 0 and 3 steps, one of them 0."""
    dt = 3 * torch.rand(b, l, dtype=torch.float64)
    dt[:, l // 2] = 0
    return dt

"""Discretisation in kernels against the textbook's formulas in many digits, and its derivatives against torch's."""

import mpmath
import numpy as np
import pytest
import torch

from longwave.ops.discretize import discretize_diagonal
from longwave.ops.numba_discretize import METHODS, derivatives, discretize

# Of exp(z), the rounding of z: up to 30 times that of 1.
CASES = [(np.float32, 3e-6), (np.float64, 2e-14)]


def inputs(dtype: type) -> tuple[np.ndarray, np.ndarray]:
    """A (2, 8, 40) with sizes from 1e-6 to 300, some real, some 0; dt (40,) from 0.001 to 0.1."""
    rng = np.random.default_rng(0)
    sizes = 10 ** rng.uniform(-6, 2.5, (8, 40))
    angles = rng.uniform(np.pi / 2, np.pi, (8, 40))
    A = np.stack([sizes * np.cos(angles), sizes * np.sin(angles)])
    A[1, 0], A[:, 1, :5] = 0, 0
    return A.astype(dtype), (10 ** rng.uniform(-3, -1, 40)).astype(dtype)


def run(method: str, A: np.ndarray, dt: np.ndarray) -> list[np.ndarray]:
    """Abar, F, V, dF/ddt, dF/dA as complex arrays."""
    Abar, F, V, dF, dF_dA = (np.full_like(A, np.nan) for _ in range(5))
    discretize(METHODS.index(method), dt, A, Abar, F)
    derivatives(METHODS.index(method), dt, A, Abar, V, dF, dF_dA)
    return [x[0].astype(np.float64) + 1j * x[1] for x in (Abar, F, V, dF, dF_dA)]


@pytest.mark.parametrize(("dtype", "tolerance"), CASES)
@pytest.mark.parametrize("method", METHODS)
def test_many_digits(method, dtype, tolerance):
    A, dt = inputs(dtype)
    Abar, F, _, _, dF_dA = run(method, A, dt)
    with mpmath.workdps(50):
        for k, c in np.ndindex(Abar.shape):
            a, step = mpmath.mpc(float(A[0, k, c]), float(A[1, k, c])), mpmath.mpf(float(dt[c]))
            z = step * a
            mean = (mpmath.exp(z) - 1) / z if a else mpmath.mpf(1)
            slope = (mpmath.exp(z) - mean) / z if a else mpmath.mpf("0.5")
            expected = {
                "zoh": (mpmath.exp(z), step * mean, step**2 * slope),
                "bilinear": ((1 + z / 2) / (1 - z / 2), step / (1 - z / 2), step**2 / 2 / (1 - z / 2) ** 2),
                "euler": (1 + z, step, 0),
                "dirac": (mpmath.exp(z), 1, 0),
            }[method]
            for found, exact in zip((Abar, F, dF_dA), expected, strict=True):
                assert abs(mpmath.mpc(found[k, c]) - exact) <= tolerance * abs(exact)


@pytest.mark.parametrize("method", METHODS)
def test_derivatives(method):
    A, dt = inputs(np.float64)
    _, _, V, dF, dF_dA = (torch.from_numpy(x) for x in run(method, A, dt))
    rates = torch.from_numpy(A[0] + 1j * A[1]).requires_grad_()
    steps = torch.from_numpy(np.broadcast_to(dt, rates.shape).copy()).requires_grad_()
    one = torch.ones_like(rates)
    Abar, F = (torch.exp(steps * rates), one) if method == "dirac" else discretize_diagonal(rates, one, steps, method)

    def of(y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """dy/dx: holomorphic in A, of two parts in dt."""
        if not y.requires_grad:
            return torch.zeros_like(x)
        (real,) = torch.autograd.grad(y.real.sum(), x, retain_graph=True, allow_unused=True)
        if x.is_complex():
            return torch.zeros_like(x) if real is None else real.conj()
        imag = torch.autograd.grad(y.imag.sum(), x, retain_graph=True)[0] if y.is_complex() else torch.zeros_like(x)
        return torch.complex(real, imag)

    by_rate, by_step = V * steps.detach(), V * rates.detach()
    for found, expected in ((by_rate, of(Abar, rates)), (by_step, of(Abar, steps)), (dF, of(F, steps))):
        torch.testing.assert_close(found, expected.to(found.dtype), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(dF_dA, of(F, rates), rtol=1e-6, atol=1e-12)

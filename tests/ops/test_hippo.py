"""HiPPO remembers: a signal projected online comes back; its NPLR form is the matrix itself."""

import contextlib
import io
import re
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from numpy.polynomial import legendre

from longwave.errors import UsageError
from longwave.ops.hippo import hippo, low_rank, nplr, reconstruction

MEASURES = ("legs", "legt")


def signal(t):
    return torch.sin(5 * t) + 0.4 * torch.cos(11 * t + 1)


def remember_all(n, l, end):
    """x' = (A x + B u) / t by the bilinear rule from the first sample on: the coefficients of all l samples."""
    A, B = hippo("legs", n)
    x, eye = torch.zeros(n, dtype=torch.float64), torch.eye(n, dtype=torch.float64)
    u = signal(torch.arange(1, l + 1, dtype=torch.float64) * end / l)
    for k in range(1, l + 1):
        x = torch.linalg.solve(eye - A / (2 * k), (eye + A / (2 * k)) @ x + B * u[k - 1] / k)
    return x


def remember_window(n, l, end, window):
    """x' = A x + B u by the matrix exponential, the signal held over each sample at its middle."""
    A, B = hippo("legt", n, window=window)
    block = scipy.linalg.expm(np.block([[A.numpy(), B.numpy()[:, None]], [np.zeros((1, n + 1))]]) * end / l)
    step, reach = torch.from_numpy(block[:n, :n]), torch.from_numpy(block[:n, n])
    x = torch.zeros(n, dtype=torch.float64)
    for u in signal((torch.arange(l, dtype=torch.float64) + 0.5) * end / l):
        x = step @ x + reach * u
    return x


def error(measure, x, begin, end):
    """Largest distance from the signal, away from the ends."""
    s = torch.linspace(0.05, 0.95, 200, dtype=torch.float64)
    return (reconstruction(measure, len(x), s) @ x - signal(begin + s * (end - begin))).abs().max().item()


def test_legs_reconstructs_the_whole_history():
    errors = [error("legs", remember_all(n, 4000, 3.0), 0.0, 3.0) for n in (4, 8, 16, 32)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 0.3
    assert errors[-1] < 0.01


def test_legt_reconstructs_its_window():
    """The window forgets what came before it only as well as n coefficients tell; the error falls with n."""
    errors = [error("legt", remember_window(n, 6000, 3.0, 1.5), 1.5, 3.0) for n in (4, 8, 16, 32)]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 0.1
    assert errors[-1] < 0.02


@pytest.mark.parametrize("measure", MEASURES)
def test_reconstruction_is_by_legendre_polynomials(measure):
    points = torch.linspace(0, 1, 11, dtype=torch.float64)
    basis = legendre.legvander(2 * points.numpy() - 1, 7) * np.sqrt(2 * np.arange(8) + 1)
    np.testing.assert_allclose(reconstruction(measure, 8, points).numpy(), basis, atol=1e-12)


def test_matrices_as_printed_in_the_papers():
    A, B = hippo("legs", 3)
    r3, r5 = 3**0.5, 5**0.5
    expected = [[-1, 0, 0], [-r3, -2, 0], [-r5, -r3 * r5, -3]]
    torch.testing.assert_close(A, torch.tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(B, torch.tensor([1, r3, r5], dtype=torch.float64))
    A, B = hippo("legt", 3, window=1.0)
    expected = [[-1, r3, -r5], [-r3, -3, r3 * r5], [-r5, -r3 * r5, -5]]
    torch.testing.assert_close(A, torch.tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(B, torch.tensor([1, r3, r5], dtype=torch.float64))


def test_the_history_decays_without_the_scale():
    """x' = A x + B u: the response of x_n at age s is e^-s sqrt(2n+1) P_n(2 e^-s - 1) (arXiv:2206.12037, table 1)."""
    n = 6
    A, B = (matrix.numpy() for matrix in hippo("legs", n))
    for i in (0, 3, 5):
        response = np.array([(scipy.linalg.expm(A * t) @ B)[i] for t in (0.1, 0.7, 2.0)])
        at = np.exp(-np.array([0.1, 0.7, 2.0]))
        basis = legendre.legval(2 * at - 1, np.eye(n)[i]) * np.sqrt(2 * i + 1)
        np.testing.assert_allclose(response, at * basis, atol=1e-9)


@pytest.mark.parametrize("n", [1, 2, 7, 64, 128])
@pytest.mark.parametrize("measure", MEASURES)
def test_nplr_is_the_matrix(measure, n):
    A, B = hippo(measure, n)
    form = nplr(measure, n)
    V, P = form.V, form.P
    torch.testing.assert_close(V @ V.mH, torch.eye(n, dtype=V.dtype))
    inner = torch.diag(form.Lambda) - P.mT @ P.conj()
    torch.testing.assert_close(V @ inner @ torch.linalg.inv(V), A.to(V.dtype), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(V @ form.B, B.to(V.dtype), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(V @ P[0], low_rank(measure, n)[0].to(V.dtype), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(form.Lambda, form.Lambda.flip(0).conj(), rtol=1e-10, atol=1e-10)
    assert form.Lambda.real.max() < 1e-9
    if measure == "legs":
        torch.testing.assert_close(form.Lambda.real, torch.full((n,), -0.5, dtype=torch.float64))
        torch.testing.assert_close(P[0].imag, torch.zeros(n, dtype=torch.float64))


def test_defaults_of_torch_do_not_reach_it():
    usual = nplr("legs", 4)
    with torch.device("meta"):
        torch.testing.assert_close(nplr("legs", 4), usual, rtol=0, atol=0)


def test_bad_measures_are_refused():
    with pytest.raises(UsageError, match="'legs' or 'legt', got 'lagt'"):
        hippo("lagt", 4)  # pyright: ignore[reportArgumentType]
    with pytest.raises(UsageError, match="at least 1, got 0"):
        nplr("legs", 0)


def test_the_page_prints_what_it_says():
    page = (Path(__file__).parents[2] / "docs" / "hippo.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    said = re.findall(r"^print\(.*\)  +# (.*)$", example, re.MULTILINE)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(example, "hippo.md", "exec"), {})
    assert printed.getvalue().splitlines() == said

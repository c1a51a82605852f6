"""Discretisation against scipy's matrix exponential and closed forms, dense and diagonal."""

import typing

import numpy as np
import pytest
import scipy.linalg
import torch

from longwave.errors import UsageError
from longwave.ops.discretize import METHODS, Method, discretize, discretize_diagonal
from longwave.ops.hippo import hippo


def expected(A, B, dt, method):
    n = len(A)
    eye = np.eye(n)
    if method == "zoh":
        block = scipy.linalg.expm(np.block([[A * dt, B[:, None] * dt], [np.zeros((1, n + 1))]]))
        return block[:n, :n], block[:n, n]
    if method == "bilinear":
        inverse = np.linalg.inv(eye - dt / 2 * A)
        return inverse @ (eye + dt / 2 * A), inverse @ B * dt
    return eye + dt * A, dt * B


@pytest.mark.parametrize("method", METHODS)
def test_dense(method):
    A, B = hippo("legs", 6)
    dts = torch.tensor([[0.01, 0.3], [1.0, 2.5]], dtype=torch.float64)
    Abar, Bbar = discretize(A, B, dts, method)
    assert Abar.shape == (2, 2, 6, 6)
    for place in np.ndindex(2, 2):
        by_hand = expected(A.numpy(), B.numpy(), dts[place].item(), method)
        np.testing.assert_allclose(Abar[place], by_hand[0], rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(Bbar[place], by_hand[1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_diagonal_is_dense(method):
    A = torch.tensor([-0.5 + 3j, -1e-7 + 1e-5j, -2.0, -1e-3j, 0.0], dtype=torch.complex128)
    B = torch.randn(5, dtype=torch.complex128)
    Abar, Bbar = discretize_diagonal(A, B, 0.7, method)
    dense, dense_B = discretize(torch.diag(A), B, 0.7, method)
    torch.testing.assert_close(torch.diag(Abar), dense)
    torch.testing.assert_close(Bbar, dense_B)


def test_zoh_of_a_small_step_keeps_its_digits():
    """Bbar = (exp(dt A) - 1) / A in float32, for dt A from 1 down to 1e-8."""
    A = -torch.logspace(0, -8, 33)
    _, Bbar = discretize_diagonal(A.to(torch.complex64), torch.ones(33, dtype=torch.complex64), 1.0)
    exact = np.expm1(A.double().numpy()) / A.double().numpy()
    np.testing.assert_allclose(Bbar.real.numpy(), exact, rtol=3e-7)


def test_differentiable_where_A_vanishes():
    A = torch.tensor([0.0, -1e-3, -1.0], dtype=torch.float64, requires_grad=True)
    B, dt = torch.randn(2, 3, dtype=torch.float64, requires_grad=True).unbind()
    for method in typing.get_args(Method):

        def diagonal(A, B, dt, method=method):
            return discretize_diagonal(A, B, dt, method)

        def dense(A, B, dt, method=method):
            return discretize(torch.diag(A), B, dt.mean(), method)

        for function in (diagonal, dense):
            assert torch.autograd.gradcheck(function, (A, B, dt))


def test_unknown_methods_are_refused():
    for function, A in ((discretize, torch.eye(2)), (discretize_diagonal, torch.ones(2))):
        with pytest.raises(UsageError, match="got 'tustin'"):
            function(A, torch.ones(2), 0.1, "tustin")  # pyright: ignore[reportArgumentType]

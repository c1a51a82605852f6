"""The vanilla state space against scipy's matrix exponential, and the rung above it, S4D."""

import numpy as np
import pytest
import torch
from mixer_cases import shake
from views import recurrence, stamps

from longwave.errors import UsageError
from longwave.mixers import LTI, S4D
from longwave.ops.discretize import METHODS

torch.set_num_threads(1)


def small(**options):
    """Six channels with three systems, dt below Euler's limit; only the system, unless asked."""
    options = {"d_state": 4, "n_ssm": 3, "gelu": False, "glu": False} | options
    mixer = LTI(6, LTI.Config(**options)).double()
    shake(mixer)
    return mixer


def dense(mixer):
    """The system of every channel as numpy matrices."""
    A, B = (np.concatenate([t.detach().numpy()] * (6 // mixer.n_ssm)) for t in (mixer.A, mixer.B))
    D = np.zeros(6) if mixer.D is None else mixer.D.detach().numpy()
    return A, B, mixer.C.detach().numpy(), D


def steps(mixer, dt):
    return dt[..., None].numpy() * np.exp(mixer.inv_dt.detach().numpy())


@pytest.mark.parametrize("init", ["legs", "legt"])
@pytest.mark.parametrize("discretization", METHODS)
def test_irregular_stamps_are_exact(discretization, init):
    mixer = small(discretization=discretization, init=init, skip=init == "legs")
    u, dt = torch.randn(2, 12, 6, dtype=torch.float64), stamps(2, 12)
    expected, states = recurrence(*dense(mixer), u, steps(mixer, dt), discretization)
    y, state = mixer(u, dt=dt)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-10)
    np.testing.assert_allclose(state.ssm.detach(), states, rtol=0, atol=1e-10)


@pytest.mark.parametrize("dt", [1.0, 0.4])
@pytest.mark.parametrize("discretization", METHODS)
def test_views_equal_the_recurrence(discretization, dt):
    mixer, u = small(discretization=discretization), torch.randn(2, 13, 6, dtype=torch.float64)
    even = torch.full((2, 13), dt, dtype=torch.float64)
    expected, states = recurrence(*dense(mixer), u, steps(mixer, even), discretization)
    state = mixer.init_state(2)
    stepped = torch.stack([mixer.step(u[:, t], state, dt=even[:, t]) for t in range(13)], 1)
    for y, after in (mixer.convolution(u, dt=dt), mixer.recurrent(u, dt=dt), (stepped, state)):
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-10)
        np.testing.assert_allclose(after.ssm.detach(), states, rtol=0, atol=1e-10)


@pytest.mark.parametrize("discretization", ["zoh", "bilinear"])
def test_is_s4d_where_A_is_diagonal(discretization):
    """In real numbers a mode is a turn of two entries, and 2 Re(C x) is their product with 2 Re C and -2 Im C."""
    upper = S4D(6, S4D.Config(d_state=8, n_ssm=3, discretization=discretization)).double()
    shake(upper)
    lower = LTI(6, LTI.Config(d_state=8, n_ssm=3, discretization=discretization)).double()
    with torch.no_grad():
        lower.A.zero_()
        for i in range(4):
            real, imaginary = -upper.A_real[:, i].exp(), -upper.A_imag[:, i]
            lower.A[:, 2 * i, 2 * i] = lower.A[:, 2 * i + 1, 2 * i + 1] = real
            lower.A[:, 2 * i, 2 * i + 1], lower.A[:, 2 * i + 1, 2 * i] = -imaginary, imaginary
        lower.B.copy_(upper.B.flatten(-2))
        lower.C.copy_((2 * upper.C * torch.tensor([1, -1])).flatten(-2))
    shared = {name: upper.state_dict()[name] for name in ("inv_dt", "D", "output_linear.weight", "output_linear.bias")}
    lower.load_state_dict(shared, strict=False)
    u, dt = torch.randn(2, 20, 6, dtype=torch.float64), stamps(2, 20)
    for view in ({}, {"dt": 0.3}, {"dt": dt}, {"reset": torch.rand(2, 20) < 0.2}):
        (y, state), (z, other) = upper(u, **view), lower(u, **view)
        torch.testing.assert_close(z, y, rtol=0, atol=1e-10)
        torch.testing.assert_close(other.ssm, state.ssm.flatten(-2), rtol=0, atol=1e-10)


def test_held_signal_at_twice_the_rate():
    mixer, u = small(), torch.randn(2, 30, 6, dtype=torch.float64)
    y, state = mixer(u)
    fine, fine_state = mixer(u.repeat_interleave(2, dim=1), dt=0.5)
    torch.testing.assert_close(fine[:, 1::2], y, rtol=0, atol=1e-11)
    torch.testing.assert_close(fine_state, state, rtol=0, atol=1e-11)


def test_views_agree_in_float32_at_length():
    torch.manual_seed(0)
    mixer, u = LTI(4, LTI.Config(d_state=32, gelu=False, glu=False)), torch.randn(1, 2048, 4)
    with torch.no_grad():
        y, state = mixer.convolution(u)
        other, other_state = mixer.recurrent(u)
        stepped_state = mixer.init_state(1)
        stepped = torch.stack([mixer.step(u[:, t], stepped_state) for t in range(512)], 1)
    torch.testing.assert_close(other, y, rtol=0, atol=1e-5)
    torch.testing.assert_close(stepped, y[:, :512], rtol=0, atol=1e-5)
    torch.testing.assert_close(other_state, state, rtol=0, atol=1e-5)


def test_sizes_and_marks():
    mixer = LTI(16, LTI.Config(n_ssm=2, d_state=8))
    assert mixer.state_bytes(100) == 4 * 16 * 8
    assert mixer.A.shape == (2, 8, 8)
    torch.testing.assert_close(mixer.A[1].diagonal(), -torch.arange(1.0, 9.0))
    assert {name for name, p in mixer.named_parameters() if hasattr(p, "_no_weight_decay")} == {"inv_dt", "A", "B"}


def test_bad_settings():
    with pytest.raises(UsageError, match="one of zoh, bilinear, euler, got 'dss'"):
        LTI.Config(discretization="dss")
    with pytest.raises(UsageError, match="'legs' or 'legt', got 'lin'"):
        LTI.Config(init="lin")

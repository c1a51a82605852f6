"""S4D: its three views against scipy's matrix exponential, and against one another."""

import math

import numpy as np
import pytest
import torch
from mixer_cases import shake
from torch.nn.functional import gelu
from views import modes, recurrence, stamps

from longwave.errors import UsageError
from longwave.mixers import S4D

torch.set_num_threads(1)


def small(**options):
    """Six channels with three systems; only the system, unless asked."""
    options = {"d_state": 8, "n_ssm": 3, "gelu": False, "glu": False} | options
    mixer = S4D(6, S4D.Config(**options)).double()
    shake(mixer)
    return mixer


def dense(mixer):
    """The system of every channel as numpy matrices."""
    copies = mixer.d_model // mixer.n_ssm
    A = -np.exp(mixer.A_real.detach().numpy()) - 1j * mixer.A_imag.detach().numpy()
    A = np.stack([A, A.conj()], -1).reshape(mixer.n_ssm, -1)
    A = np.concatenate([np.stack([np.diag(row) for row in A])] * copies)
    B = np.concatenate([modes(mixer.B)] * copies)
    D = np.zeros(mixer.d_model) if mixer.D is None else mixer.D.detach().numpy()
    return A, B, modes(mixer.C), D


def steps(mixer, dt):
    return dt[..., None].numpy() * np.exp(mixer.inv_dt.detach().numpy())


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("discretization", ["zoh", "bilinear"])
def test_irregular_stamps_are_exact(discretization, skip):
    mixer, u = small(discretization=discretization, skip=skip), torch.randn(2, 20, 6, dtype=torch.float64)
    dt = stamps(2, 20)
    expected, states = recurrence(*dense(mixer), u, steps(mixer, dt), discretization)
    y, state = mixer(u, dt=dt)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-10)
    np.testing.assert_allclose(modes(state.ssm), states, rtol=0, atol=1e-10)


@pytest.mark.parametrize("dt", [1.0, 0.4])
@pytest.mark.parametrize("init", ["lin", "inv", "legs", "real"])
@pytest.mark.parametrize("discretization", ["zoh", "bilinear"])
def test_views_equal_the_recurrence(discretization, init, dt):
    mixer, u = small(discretization=discretization, init=init), torch.randn(2, 15, 6, dtype=torch.float64)
    expected, states = recurrence(
        *dense(mixer), u, steps(mixer, torch.full((2, 15), dt, dtype=torch.float64)), discretization
    )
    state = mixer.init_state(2)
    stepped = torch.stack([mixer.step(u[:, t], state, dt=dt) for t in range(15)], 1)
    views = [mixer.convolution(u, dt=dt), mixer.recurrent(u, dt=dt), (stepped, state)]
    for y, after in views:
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-10)
        np.testing.assert_allclose(modes(after.ssm), states, rtol=0, atol=1e-10)


def test_held_signal_at_twice_the_rate():
    """Exact under zoh: each value held for two half steps."""
    mixer, u = small(), torch.randn(2, 30, 6, dtype=torch.float64)
    y, state = mixer(u)
    fine, fine_state = mixer(u.repeat_interleave(2, dim=1), dt=0.5)
    torch.testing.assert_close(fine[:, 1::2], y, rtol=0, atol=1e-11)
    torch.testing.assert_close(fine_state, state, rtol=0, atol=1e-11)


@pytest.mark.parametrize(("discretization", "bound"), [("zoh", 0.02), ("bilinear", 0.02)])
def test_smooth_signal_at_another_rate(discretization, bound):
    """y of the signal sampled four times as often is y, resampled: the error falls with the step."""
    mixer = small(discretization=discretization, skip=False)
    errors = []
    for every in (4, 2, 1):
        t = torch.arange(every, 201, every, dtype=torch.float64)
        fine = torch.arange(0.25, 200.1, 0.25, dtype=torch.float64)
        coarse, _ = mixer(torch.sin(t / 9)[None, :, None].expand(1, -1, 6), dt=float(every))
        exact, _ = mixer(torch.sin(fine / 9)[None, :, None].expand(1, -1, 6), dt=0.25)
        at = exact[:, 4 * every - 1 :: 4 * every]
        errors.append(((coarse - at).norm() / at.norm()).item())
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < errors[0] / 3
    assert errors[-1] < 0.1


def test_views_agree_in_float32_at_length():
    """The bilinear rule leaves fast modes with a slow decay, of which float32 keeps less in a recurrence."""
    torch.manual_seed(0)
    for discretization, bound in (("zoh", 1e-5), ("bilinear", 3e-5)):
        mixer = S4D(8, S4D.Config(discretization=discretization, glu=False, gelu=False))
        u = torch.randn(1, 4096, 8)
        with torch.no_grad():
            y, state = mixer.convolution(u)
            other, other_state = mixer.recurrent(u)
            exact, exact_state = mixer.double().convolution(u.double())
        scale = exact.abs().max()
        assert (y - exact).abs().max() < 1e-6 * scale
        assert (other - exact).abs().max() < bound * scale
        for final in (state, other_state):
            torch.testing.assert_close(final.ssm.double(), exact_state.ssm, rtol=0, atol=bound * float(scale))


def test_packed_documents_in_the_convolution():
    mixer, u = small(glu=True), torch.randn(3, 14, 6, dtype=torch.float64)
    before = mixer(torch.randn(3, 4, 6, dtype=torch.float64))[1]
    reset = torch.rand(3, 14) < 0.2
    reset[0] = False
    lengths = torch.tensor([14, 0, 9])
    y, state = mixer.convolution(u, before, reset=reset, lengths=lengths)
    other, other_state = mixer.recurrent(u, before, reset=reset, lengths=lengths)
    real = torch.arange(14) < lengths[:, None]
    torch.testing.assert_close(y[real], other[real])
    torch.testing.assert_close(state, other_state)


def test_the_mix_of_channels():
    mixer, u = small(gelu=True, glu=True), torch.randn(1, 9, 6, dtype=torch.float64)
    alone = small()
    alone.load_state_dict({k: v for k, v in mixer.state_dict().items() if "output" not in k})
    y = gelu(alone(u)[0]) @ mixer.output_linear.weight.T + mixer.output_linear.bias
    torch.testing.assert_close(mixer(u)[0], y[..., :6] * torch.sigmoid(y[..., 6:]))


def test_initial_values():
    mixer = S4D(64, S4D.Config(d_state=8, dt_min=2e-3, dt_max=5e-2))
    np.testing.assert_allclose(mixer.A_imag[5].detach(), math.pi * np.arange(4), rtol=1e-6)
    inv = S4D(2, S4D.Config(d_state=8, init="inv")).A_imag[0].detach()
    np.testing.assert_allclose(inv, 8 / math.pi * (8 / np.array([1, 3, 5, 7]) - 1), rtol=1e-6)
    for init in ("lin", "inv", "legs"):
        np.testing.assert_allclose(S4D(2, S4D.Config(init=init)).A_real.detach().exp(), 0.5, rtol=1e-6)
    real = S4D(2, S4D.Config(d_state=8, init="real"))
    np.testing.assert_allclose(real.A_real[0].detach().exp(), [1, 2, 3, 4], rtol=1e-6)
    assert not real.A_imag.any()
    assert torch.equal(mixer.B, torch.tensor([1.0, 0.0]).expand(64, 4, 2))
    dt = mixer.inv_dt.exp()
    assert 2e-3 <= dt.min() < 3e-3
    assert 3e-2 < dt.max() <= 5e-2
    wide = S4D(512, S4D.Config(d_state=64))
    assert abs(wide.C.square().sum(-1).mean() - 1) < 0.05
    assert abs(wide.D.square().mean() - 1) < 0.3


def test_marks_of_the_parameters():
    mixer = S4D(4)
    slow = {"inv_dt", "A_real", "A_imag", "B"}
    assert {name for name, p in mixer.named_parameters() if hasattr(p, "_no_weight_decay")} == slow
    assert {name for name, p in mixer.named_parameters() if getattr(p, "_lr_scale", 1.0) == 0.25} == slow
    mixer.bfloat16()
    kept = {name for name, p in mixer.named_parameters() if p.dtype == torch.float32}
    assert kept == {*slow, "C", "D"}


def test_published_sizes():
    mixer = S4D(256)
    assert mixer.state_bytes(1000) == 4 * 256 * 64
    assert {name: tuple(p.shape) for name, p in mixer.named_parameters()} == {
        "inv_dt": (256,),
        "D": (256,),
        "A_real": (256, 32),
        "A_imag": (256, 32),
        "B": (256, 32, 2),
        "C": (256, 32, 2),
        "output_linear.weight": (512, 256),
        "output_linear.bias": (512,),
    }


def test_bad_settings_and_arguments():
    with pytest.raises(UsageError, match="d_state must be even, for conjugate pairs, got 7"):
        S4D.Config(d_state=7)
    with pytest.raises(UsageError, match="got 'hippo'"):
        S4D.Config(init="hippo")
    with pytest.raises(UsageError, match="got 'euler'"):
        S4D.Config(discretization="euler")
    with pytest.raises(UsageError, match=r"dt_min=0\.2, dt_max=0\.1"):
        S4D.Config(dt_min=0.2)
    with pytest.raises(UsageError, match="n_ssm=3 must divide d_model=8"):
        S4D(8, S4D.Config(n_ssm=3))
    mixer, u = S4D(4), torch.randn(2, 5, 4)
    with pytest.raises(ValueError, match=r"dt must be positive, got -1.0"):
        mixer(u, dt=-1.0)
    with pytest.raises(ValueError, match=r"dt must be \(b, l\) = \(2, 5\), got \(2, 4\)"):
        mixer(u, dt=torch.ones(2, 4))
    with pytest.raises(ValueError, match=r"dt must be \(b,\) = \(2,\), got \(3,\)"):
        mixer.step(u[:, 0], mixer.init_state(2), dt=torch.ones(3))

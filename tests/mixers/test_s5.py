"""S5 against the package s5-pytorch, numpy's recurrence, and scipy's matrix exponential."""

import warnings

import numpy as np
import pytest
import torch
from mixer_cases import shake
from torch.nn.functional import gelu
from views import held, stamps

from longwave.errors import UsageError
from longwave.mixers import S4D, S5

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", DeprecationWarning)
    from s5.s5_model import S5 as TheirS5

torch.set_num_threads(1)


def small(**options):
    """The system alone, unless asked."""
    mixer = S5(6, S5.Config(**({"d_state": 8, "activation": None} | options))).double()
    shake(mixer)
    return mixer


def recurrence(mixer, u, dt):
    """y and the states by dense matrices over all modes and all channels, one token after the other."""
    Lambda = mixer.Lambda_re.detach().numpy() + 1j * mixer.Lambda_im.detach().numpy()
    if mixer.config.clip_eigs:
        Lambda = np.minimum(Lambda.real, -1e-4) + 1j * Lambda.imag
    B, C = (torch.view_as_complex(t.detach()).numpy() for t in (mixer.B, mixer.C))
    D = 0 if mixer.D is None else mixer.D.detach().numpy()
    step, scale = np.exp(mixer.log_step.detach().numpy()[:, 0]), 2 if mixer.config.conj_sym else 1
    b, l, _ = u.shape
    x, y = np.zeros((b, len(Lambda)), complex), np.zeros(u.shape)
    for i, t in np.ndindex(b, l):
        for p in range(len(Lambda)):
            entering = B[p] @ u[i, t].numpy()
            Abar, Bbar = held(
                Lambda[p, None, None], entering[None], dt[i, t].item() * step[p], mixer.config.discretization
            )
            x[i, p] = (Abar @ x[i, p, None] + Bbar)[0]
        y[i, t] = scale * (C @ x[i]).real + D * u[i, t].numpy()
    return torch.from_numpy(y), x


CASES = [
    {"conj_sym": conj_sym, "discretization": discretization, "clip_eigs": clip_eigs, "skip": not clip_eigs}
    for conj_sym, discretization, clip_eigs in (
        (True, "zoh", False),
        (True, "bilinear", True),
        (False, "zoh", True),
        (False, "bilinear", False),
    )
]


@pytest.mark.parametrize("options", CASES)
def test_irregular_stamps_are_exact(options):
    mixer, u, dt = small(**options), torch.randn(2, 12, 6, dtype=torch.float64), stamps(2, 12)
    with torch.no_grad():
        mixer.Lambda_re[1] = 0.03  # grows, unless it is clipped
    expected, states = recurrence(mixer, u, dt)
    y, state = mixer(u, dt=dt)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-10)
    np.testing.assert_allclose(torch.view_as_complex(state.ssm.detach()), states, rtol=0, atol=1e-10)


@pytest.mark.parametrize("dt", [1.0, 0.4])
@pytest.mark.parametrize("options", CASES)
def test_views_equal_the_recurrence(options, dt):
    mixer, u = small(**options), torch.randn(2, 13, 6, dtype=torch.float64)
    expected, states = recurrence(mixer, u, torch.full((2, 13), dt, dtype=torch.float64))
    state = mixer.init_state(2)
    stepped = torch.stack([mixer.step(u[:, t], state, dt=dt) for t in range(13)], 1)
    for y, after in (mixer.convolution(u, dt=dt), mixer.recurrent(u, dt=dt), (stepped, state)):
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-10)
        np.testing.assert_allclose(torch.view_as_complex(after.ssm.detach()), states, rtol=0, atol=1e-10)


@pytest.mark.parametrize("n_blocks", [1, 2])
@pytest.mark.parametrize("scale", [1.0, 0.5, "irregular"])
def test_equals_s5_pytorch(n_blocks, scale):
    """It keeps every mode, conjugates too, and has no factor 2."""
    torch.manual_seed(1)
    theirs = TheirS5(12, state_width=16, block_count=n_blocks)
    ours = S5(12, S5.Config(d_state=16, n_blocks=n_blocks, conj_sym=False, activation=None))
    with torch.no_grad():
        ours.Lambda_re.copy_(theirs.seq.Lambda.real)
        ours.Lambda_im.copy_(theirs.seq.Lambda.imag)
        ours.B.copy_(theirs.seq.B)
        ours.C.copy_(torch.view_as_real(theirs.seq.C))
        ours.D.copy_(theirs.seq.D)
        ours.log_step[:, 0].copy_(theirs.seq.log_step)
        x = torch.randn(2, 100, 12)
        dt = 2 * torch.rand(2, 100) if scale == "irregular" else scale
        expected = theirs(x, step_scale=dt)
        y, state = ours(x, dt=dt)
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=2e-6)
        if scale == 1.0:
            more = torch.randn(2, 30, 12)
            (_, their_state), (_, _) = theirs(x, return_state=True), (y, state)
            torch.testing.assert_close(torch.view_as_complex(state.ssm), their_state, rtol=1e-5, atol=2e-6)
            torch.testing.assert_close(ours(more, state)[0], theirs(more, state=their_state), rtol=1e-5, atol=2e-6)


def test_conjugates_may_be_kept_or_left_out():
    half = small()
    whole = S5(6, S5.Config(d_state=8, conj_sym=False, activation=None)).double()
    with torch.no_grad():
        whole.Lambda_re.copy_(half.Lambda_re.repeat(2))
        whole.Lambda_im.copy_(torch.cat([half.Lambda_im, -half.Lambda_im]))
        mirror = torch.tensor([1.0, -1.0], dtype=torch.float64)
        whole.B.copy_(torch.cat([half.B, half.B * mirror]))
        whole.C.copy_(torch.cat([half.C, half.C * mirror], 1))
        whole.D.copy_(half.D)
        whole.log_step.copy_(half.log_step.repeat(2, 1))
    u = torch.randn(2, 15, 6, dtype=torch.float64)
    torch.testing.assert_close(whole(u)[0], half(u)[0])


def test_is_s4d_where_channels_do_not_mix():
    """One channel: a system of one input and one output, with one step for all modes."""
    lower = S4D(1, S4D.Config(d_state=8, gelu=False, glu=False)).double()
    shake(lower)
    upper = S5(1, S5.Config(d_state=8, activation=None)).double()
    with torch.no_grad():
        upper.Lambda_re.copy_(-lower.A_real[0].exp())
        upper.Lambda_im.copy_(-lower.A_imag[0])
        upper.B.copy_(lower.B[0][:, None])
        upper.C.copy_(lower.C)
        upper.D.copy_(lower.D)
        upper.log_step.copy_(lower.inv_dt.expand(4, 1))
    u, dt = torch.randn(2, 20, 1, dtype=torch.float64), stamps(2, 20)
    for view in ({}, {"dt": 0.3}, {"dt": dt}, {"reset": torch.rand(2, 20) < 0.2}):
        (y, state), (z, other) = upper(u, **view), lower(u, **view)
        torch.testing.assert_close(z, y)
        torch.testing.assert_close(other.ssm[:, 0], state.ssm)


def test_views_agree_in_float32_at_length():
    torch.manual_seed(0)
    mixer, u = S5(8, S5.Config(n_blocks=4, activation=None)), torch.randn(1, 4096, 8)
    with torch.no_grad():
        y, state = mixer.convolution(u)
        other, other_state = mixer.recurrent(u)
    scale = float(y.abs().max())
    torch.testing.assert_close(other, y, rtol=0, atol=1e-5 * scale)
    torch.testing.assert_close(other_state, state, rtol=0, atol=1e-5 * float(state.ssm.abs().max()))


def test_held_signal_at_twice_the_rate():
    mixer, u = small(), torch.randn(2, 30, 6, dtype=torch.float64)
    y, state = mixer(u)
    fine, fine_state = mixer(u.repeat_interleave(2, dim=1), dt=0.5)
    torch.testing.assert_close(fine[:, 1::2], y, rtol=0, atol=1e-11)
    torch.testing.assert_close(fine_state, state, rtol=0, atol=1e-11)


def test_packed_documents_in_the_convolution():
    mixer, u = small(), torch.randn(3, 14, 6, dtype=torch.float64)
    before = mixer(torch.randn(3, 4, 6, dtype=torch.float64))[1]
    reset = torch.rand(3, 14) < 0.2
    reset[0] = False
    lengths = torch.tensor([14, 0, 9])
    y, state = mixer.convolution(u, before, reset=reset, lengths=lengths)
    other, other_state = mixer.recurrent(u, before, reset=reset, lengths=lengths)
    real = torch.arange(14) < lengths[:, None]
    torch.testing.assert_close(y[real], other[real])
    torch.testing.assert_close(state, other_state)


def test_activations():
    u = torch.randn(1, 9, 6, dtype=torch.float64)
    for activation in ("full_glu", "half_glu1", "half_glu2", "gelu"):
        mixer, alone = small(activation=activation), small()
        alone.load_state_dict({k: v for k, v in mixer.state_dict().items() if not k.startswith("out")})
        y, _ = alone(u)
        g = gelu(y, approximate="tanh")
        gate = 1 if activation == "gelu" else torch.sigmoid(g @ mixer.out2.weight.T + mixer.out2.bias)
        value = {"full_glu": None, "half_glu2": y}.get(activation, g)
        if value is None:
            value = g @ mixer.out1.weight.T + mixer.out1.bias
        torch.testing.assert_close(mixer(u)[0], value * gate)


def test_initial_values():
    """HiPPO's basis: with all modes kept, C B is the product of the real matrices that were drawn."""
    torch.manual_seed(0)
    mixer = S5(256, S5.Config(d_state=64, n_blocks=4, conj_sym=False))
    B, C = (torch.view_as_complex(t.detach()) for t in (mixer.B, mixer.C))
    torch.testing.assert_close(mixer.Lambda_re.detach(), torch.full((64,), -0.5))
    torch.testing.assert_close(mixer.Lambda_im[:16].detach(), mixer.Lambda_im[16:32].detach())
    energy = B.abs().square().sum(0)  # of a column: that of a real vector of 64 numbers, variance 1/64
    assert abs(energy.mean() - 1) < 0.05
    assert abs(C.abs().square().sum(1).mean() - 2) < 0.1  # two such, one of them imaginary
    half = S5(256, S5.Config(d_state=64, n_blocks=4))
    assert half.Lambda_im.max() < 0
    assert abs(half.B.square().sum((0, 2)).mean() - 0.5) < 0.05
    steps = half.log_step.exp()
    assert 1e-3 <= steps.min() < steps.max() <= 0.1


def test_sizes_and_marks():
    mixer = S5(32, S5.Config(d_state=64, activation="full_glu"))
    assert mixer.state_bytes(9) == 4 * 64
    assert {name: tuple(p.shape) for name, p in mixer.named_parameters()} == {
        "Lambda_re": (32,),
        "Lambda_im": (32,),
        "B": (32, 32, 2),
        "C": (32, 32, 2),
        "D": (32,),
        "log_step": (32, 1),
        "out1.weight": (32, 32),
        "out1.bias": (32,),
        "out2.weight": (32, 32),
        "out2.bias": (32,),
    }
    slow = {"Lambda_re", "Lambda_im", "B", "log_step"}
    assert {name for name, p in mixer.named_parameters() if getattr(p, "_lr_scale", 1.0) == 0.25} == slow


def test_bad_settings():
    with pytest.raises(UsageError, match="d_state=10 must be n_blocks=4 equal blocks of conjugate pairs"):
        S5.Config(d_state=10, n_blocks=4)
    with pytest.raises(UsageError, match="got 'relu'"):
        S5.Config(activation="relu")
    with pytest.raises(UsageError, match="'zoh' or 'bilinear', got 'euler'"):
        S5.Config(discretization="euler")

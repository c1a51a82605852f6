"""StripedHyena's Hyena block against the published package's FFT path, and against its recurrence in float64."""

import pytest
import torch
from mixer_cases import shake
from stripedhyena.model import ParallelGatedConvBlock
from stripedhyena.utils import dotdict

from longwave.errors import UsageError
from longwave.mixers import HyenaModal

PUBLISHED = {
    "num_filters": 32,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "short_filter_bias": True,
    "hyena_filter_groups": 1,
    "params_dtype": torch.float32,
    "mlp_dtype": torch.float32,
    "model_parallel_size": 1,
    "use_flashfft": False,
}


def settle(mixer):
    """Published poles lie within the unit circle."""
    with torch.no_grad():
        poles = torch.view_as_complex(mixer.filter.poles)
        poles.mul_(0.97 / poles.abs().clamp(min=0.97))


@pytest.mark.parametrize("column_split", [True, False])
@pytest.mark.parametrize(("d_state", "d_conv"), [(2, 3), (8, 4)])
def test_equals_the_published_package(column_split, d_state, d_conv):
    theirs = ParallelGatedConvBlock(
        dotdict(PUBLISHED, state_size=d_state, short_filter_length=d_conv, column_split_hyena=column_split), layer_idx=0
    )
    ours = HyenaModal(32, HyenaModal.Config(n_heads=4 if column_split else 1, d_state=d_state, d_conv=d_conv))
    shake(ours)
    settle(ours)
    loaded = theirs.load_state_dict(ours.state_dict(), strict=False)
    assert not loaded.unexpected_keys
    assert all(name.startswith(("mlp.", "pre_norm.", "post_norm.")) for name in loaded.missing_keys)
    x = torch.randn(2, 300, 32)
    with torch.no_grad():
        expected = theirs.out_filter_dense(theirs.filter(theirs.projections(x))[0])
        torch.testing.assert_close(ours(x)[0], expected, atol=1e-5, rtol=0)
        _, state = ours(x[:, :290])  # prefill, then recurrent decoding
        steps = torch.stack([ours.step(x[:, t], state) for t in range(290, 300)], 1)
    torch.testing.assert_close(steps, expected[:, 290:], atol=1e-5, rtol=0)


@pytest.mark.parametrize(("n_heads", "conv_bias"), [(1, True), (3, False)])
def test_equals_the_recurrence(n_heads, conv_bias):
    mixer = HyenaModal(12, HyenaModal.Config(n_heads=n_heads, d_state=3, conv_bias=conv_bias)).double()
    shake(mixer)
    x = torch.randn(2, 17, 12, dtype=torch.float64)
    torch.testing.assert_close(mixer(x)[0], recurrence(mixer, x))


def recurrence(m, u):
    """The block of HyenaModal's docstring with one channel, one mode and one token at a time, in real arithmetic."""
    (b, l, d), heads, w = u.shape, m.config.n_heads, m.config.d_conv
    p = d // heads
    z = torch.nn.functional.pad(u @ m.projections.weight.T + m.projections.bias, (0, 0, w - 1, 0))
    taps, bias = m.filter.short_filter_weight[:, 0], m.filter.short_filter_bias
    z = torch.stack([z[:, k : k + l] * taps[:, k] for k in range(w)]).sum(0) + (0 if bias is None else bias)
    y = torch.zeros(b, l, d, dtype=u.dtype)
    for c in range(d):
        first = c // p * 3 * p + c % p
        x2, x1, v = z[..., first], z[..., first + p], z[..., first + 2 * p]
        y[..., c] = m.filter.D[c] * x1 * v
        for (pr, pi), (rr, ri) in zip(m.filter.poles[c, :, 0], m.filter.residues[c, :, 0], strict=True):
            re, im = torch.zeros(b, dtype=u.dtype), torch.zeros(b, dtype=u.dtype)
            for t in range(l):
                re, im = pr * re - pi * im + x1[:, t] * v[:, t], pr * im + pi * re
                y[:, t, c] += rr * re - ri * im
        y[..., c] *= x2
    return y @ m.out_filter_dense.weight.T + m.out_filter_dense.bias


def test_initial_values():
    """The poles of S4D-Lin under the bilinear rule: p = (1 + z/2) / (1 - z/2), z = dt (-1/2 + i pi n)."""
    mixer = HyenaModal(512, HyenaModal.Config(d_state=4, dt_min=2e-3, dt_max=5e-2))
    p = torch.view_as_complex(mixer.filter.poles.detach().double())[..., 0]
    z = 2 * (p - 1) / (p + 1)
    dt = -2 * z.real
    torch.testing.assert_close(dt, dt[:, :1].expand(-1, 4), rtol=1e-3, atol=0)
    assert 2e-3 * 0.999 < dt.min() < 2.3e-3
    assert 4.5e-2 < dt.max() < 5e-2 * 1.001
    torch.testing.assert_close(z.imag / dt, torch.pi * torch.arange(4.0).double().expand(512, 4), rtol=1e-3, atol=1e-4)
    C = torch.view_as_complex(mixer.filter.residues.detach().double())[..., 0] * (1 - z / 2) / (2 * dt)
    assert abs(C.abs().square().mean() - 1) < 0.1
    assert C.mean().abs() < 0.1
    assert abs(mixer.filter.D.std() - 1) < 0.1


def test_parameters_that_stay_in_float32_and_undecayed():
    mixer = HyenaModal(32).half().bfloat16()
    expected = {"filter.D", "filter.poles", "filter.residues"}
    assert {name for name, p in mixer.named_parameters() if p.dtype == torch.float32} == expected
    assert {name for name, p in mixer.named_parameters() if hasattr(p, "_no_weight_decay")} == expected


def test_published_sizes():
    """Evo-1: 8 modes. The state is 3 d (w - 1) items of the compute dtype and 8 d n bytes."""
    with torch.device("meta"):
        mixer = HyenaModal(4096, HyenaModal.Config(n_heads=32))
    shapes = {name: tuple(p.shape) for name, p in mixer.named_parameters()}
    assert shapes == {
        "projections.weight": (12288, 4096),
        "projections.bias": (12288,),
        "filter.D": (4096,),
        "filter.short_filter_weight": (12288, 1, 3),
        "filter.short_filter_bias": (12288,),
        "filter.poles": (4096, 8, 1, 2),
        "filter.residues": (4096, 8, 1, 2),
        "out_filter_dense.weight": (4096, 4096),
        "out_filter_dense.bias": (4096,),
    }
    assert mixer.state_bytes(10**6, torch.bfloat16) == 3 * 4096 * 2 * 2 + 8 * 4096 * 8


def test_bad_sizes():
    with pytest.raises(UsageError, match="n_heads=3 must divide d_model=32"):
        HyenaModal(32, HyenaModal.Config(n_heads=3))
    with pytest.raises(UsageError, match="d_state must be at least 1, got 0"):
        HyenaModal.Config(d_state=0)
    with pytest.raises(UsageError, match=r"0.2 and 0.1"):
        HyenaModal.Config(dt_min=0.2)

"""Mamba-2 against transformers' full forward, and against its own recurrence in float64."""

import pytest
import torch
from mixer_cases import shake
from torch.nn.functional import conv1d, silu, softplus
from transformers.models.mamba2 import Mamba2Config
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

from longwave.errors import UsageError
from longwave.mixers import Mamba2


@pytest.mark.parametrize(
    ("n_groups", "limit", "bias"), [(1, (0.0, float("inf")), False), (2, (0.02, 0.06), True), (4, (0.0, 0.05), False)]
)
def test_equals_transformers(n_groups, limit, bias):
    config = Mamba2Config(
        hidden_size=32,
        num_heads=8,
        head_dim=8,
        state_size=12,
        n_groups=n_groups,
        chunk_size=8,
        num_hidden_layers=1,
        time_step_limit=limit,
        use_bias=bias,
        use_conv_bias=not bias,
    )
    theirs = Mamba2Mixer(config, layer_idx=0)
    shake(theirs)
    options = {"d_state": 12, "d_head": 8, "n_groups": n_groups, "dt_limit": limit, "bias": bias, "conv_bias": not bias}
    ours = Mamba2(32, Mamba2.Config(**options))
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 21, 32)
    torch.testing.assert_close(ours(x)[0], theirs.eval()(x), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("norm_before_gate", [False, True])
@pytest.mark.parametrize("D_per_channel", [False, True])
def test_equals_the_recurrence(norm_before_gate, D_per_channel):
    options = {"D_per_channel": D_per_channel, "norm_before_gate": norm_before_gate, "dt_limit": (0.01, 0.08)}
    config = Mamba2.Config(d_state=5, d_head=4, n_groups=2, d_inner=24, norm_eps=1e-2, **options)
    mixer = Mamba2(10, config).double()
    shake(mixer)
    x = torch.randn(2, 13, 10, dtype=torch.float64)
    torch.testing.assert_close(mixer(x)[0], recurrence(mixer, x))


@pytest.mark.parametrize("norm", [False, True])
def test_multipliers_and_no_norm_equal_the_recurrence(norm):
    config = Mamba2.Config(d_state=5, d_head=4, n_groups=2, d_inner=24, norm=norm, in_multipliers=(0.5, 2, -1, 1, 3))
    mixer = Mamba2(10, config).double()
    shake(mixer)
    x = torch.randn(2, 13, 10, dtype=torch.float64)
    torch.testing.assert_close(mixer(x)[0], recurrence(mixer, x))
    assert ("norm.weight" in mixer.state_dict()) == norm


def recurrence(m, u):
    """The block of Mamba2's docstring with one token and one head at a time."""
    e, g, n, h, p = m.d_inner, m.config.n_groups, m.config.d_state, m.n_heads, m.config.d_head
    b, l, _ = u.shape
    parts = (u @ m.in_proj.weight.T).split([e, e, g * n, g * n, h], -1)
    z, *xBC, dt = [part * factor for part, factor in zip(parts, m.config.in_multipliers or (1,) * 5, strict=True)]
    xBC = torch.cat(xBC, -1)
    xBC = silu(conv1d(xBC.mT, m.conv1d.weight, m.conv1d.bias, padding=3, groups=e + 2 * g * n)[..., :l]).mT
    x, B, C = xBC.split([e, g * n, g * n], -1)
    dt = softplus(dt + m.dt_bias).clamp(*m.config.dt_limit)
    D = m.D.view(h, p) if m.config.D_per_channel else m.D[:, None].expand(h, p)
    y = torch.zeros(b, l, e, dtype=u.dtype)
    for i in range(b):
        for j in range(h):
            head, group = slice(j * p, (j + 1) * p), slice(j // (h // g) * n, (j // (h // g) + 1) * n)
            state = torch.zeros(p, n, dtype=u.dtype)
            for t in range(l):
                decay = torch.exp(-dt[i, t, j] * m.A_log[j].exp())
                state = decay * state + dt[i, t, j] * torch.outer(x[i, t, head], B[i, t, group])
                y[i, t, head] = state @ C[i, t, group] + D[j] * x[i, t, head]

    def norm(v):
        v = v.view(b, l, g, e // g)
        return (v / (v.square().mean(-1, keepdim=True) + m.config.norm_eps).sqrt()).view(b, l, e) * m.norm.weight

    if m.norm is None:
        return y * silu(z) @ m.out_proj.weight.T
    y = norm(y) * silu(z) if m.config.norm_before_gate else norm(y * silu(z))
    return y @ m.out_proj.weight.T


def test_initial_values():
    mixer = Mamba2(1024, Mamba2.Config(d_head=16, d_state=4, dt_min=2e-3, dt_max=5e-2, A_max=8.0))
    A = mixer.A_log.exp()
    assert 1 <= A.min() < 1.5
    assert 7.5 < A.max() <= 8.0 + 1e-5
    dt = softplus(mixer.dt_bias.double())
    assert 2e-3 - 1e-8 < dt.min() < 3e-3
    assert 4e-2 < dt.max() < 5e-2 + 1e-8
    assert mixer.D.eq(1).all()
    assert mixer.norm.weight.eq(1).all()


def test_parameters_that_stay_in_float32_and_undecayed():
    mixer = Mamba2(32, Mamba2.Config(d_head=8))
    expected = {"A_log", "D", "dt_bias"}
    assert {name for name, p in mixer.named_parameters() if hasattr(p, "_no_weight_decay")} == expected
    A_log = mixer.A_log.clone()
    mixer.half().bfloat16()
    assert {name for name, p in mixer.named_parameters() if p.dtype == torch.float32} == expected
    torch.testing.assert_close(mixer.A_log, A_log, rtol=0, atol=0)


def test_published_sizes():
    """mamba2-130m: 24 heads of 64; in_proj gives z, x, B, C and dt."""
    with torch.device("meta"):
        mixer = Mamba2(768)
    assert mixer.in_proj.weight.shape == (1536 + 1536 + 128 + 128 + 24, 768)
    assert mixer.conv1d.weight.shape == (1536 + 128 + 128, 1, 4)


def test_bad_sizes():
    with pytest.raises(UsageError, match="d_inner=100 must be heads of d_head=64"):
        Mamba2(50)
    with pytest.raises(UsageError, match="n_groups=3"):
        Mamba2(128, Mamba2.Config(n_groups=3))
    with pytest.raises(UsageError, match=r"got \(0.5, 0.1\)"):
        Mamba2.Config(dt_limit=(0.5, 0.1))
    with pytest.raises(UsageError, match=r"those of z, x, B, C and dt, got \(1.0, 2.0\)"):
        Mamba2.Config(in_multipliers=(1.0, 2.0))  # pyright: ignore[reportArgumentType]

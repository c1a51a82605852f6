"""Mamba-3 against an implementation in JAX, and against its recurrence in float64."""

import math
import os
import warnings

import numpy as np
import pytest
import torch
from mixer_cases import shake
from torch.nn.functional import silu, softplus

from longwave.errors import UsageError
from longwave.mixers import Mamba3
from longwave.mixers.mamba3 import _rate

D, L = 32, 21


@pytest.fixture(scope="module")
def jax_mixer():
    """The JAX library's mixer with the weights of ours: f(x, states) -> y, its four states."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")  # compiling takes longer than running
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import jax
        from flax import nnx
        from mamba3_jax.modeling import Mamba3Config, Mamba3Mixer

    def make(mixer):
        config = mixer.config
        theirs = Mamba3Mixer(
            Mamba3Config(
                hidden_size=mixer.d_model,
                state_size=config.d_state,
                head_dim=config.d_head,
                ngroups=config.n_groups,
                chunk_size=8,
                rope_fraction=config.rope_fraction,
                A_floor=config.A_floor,
                is_mimo=config.mimo_rank is not None,
                mimo_rank=mixer.rank,
                is_outproj_norm=config.norm,
            ),
            layer_idx=0,
            rngs=nnx.Rngs(0),
        )
        for name, value in mixer.state_dict().items():
            *path, last = name.split(".")
            part = theirs
            for step in path:
                part = getattr(part, step)
            value = jax.numpy.asarray(value.numpy())
            if "proj" in name:
                part.kernel[...] = value.T
            else:
                assert getattr(part, last).shape == value.shape
                getattr(part, last)[...] = value

        call = nnx.jit(lambda theirs, x, states: theirs(x, states))

        def run(x, states):
            y, states = call(theirs, jax.numpy.asarray(x.numpy()), tuple(jax.numpy.asarray(t) for t in states))
            return torch.from_numpy(np.array(y)), states

        return run

    return make


CASES = {
    "siso": {},
    "norm": {"norm": True},
    "rope 1.0": {"rope_fraction": 1.0},
    "groups": {"n_groups": 2},
    "mimo": {"mimo_rank": 2},
    "mimo norm": {"mimo_rank": 2, "norm": True, "n_groups": 2, "rope_fraction": 1.0},
}


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
@torch.no_grad()
def test_equals_jax(jax_mixer, options):
    """Whole, and then token by token."""
    mixer = Mamba3(D, Mamba3.Config(d_state=16, d_head=16, A_floor=0.8, **options))
    shake(mixer)
    theirs = jax_mixer(mixer)
    x = torch.randn(2, L, D)
    y, state = mixer(x)
    fresh = tuple(t.numpy().copy() for t in mixer.init_state(2))
    expected, expected_state = theirs(x, fresh)
    torch.testing.assert_close(y, expected, atol=5e-6, rtol=0)
    same_states(state, expected_state)

    state, states = mixer.init_state(2), fresh
    for t in range(6):
        stepped = mixer.step(x[:, t], state)
        expected, states = theirs(x[:, t : t + 1], states)
        torch.testing.assert_close(stepped, expected[:, 0], atol=5e-6, rtol=0)
        same_states(state, states)


def same_states(ours, theirs):
    """Angles may differ by whole turns."""
    angle, ssm, k, v = (torch.from_numpy(np.array(t)) for t in theirs)
    for function in (torch.cos, torch.sin):
        torch.testing.assert_close(function(ours.angle), function(angle), atol=5e-6, rtol=0)
    for mine, other in ((ours.ssm, ssm), (ours.k, k), (ours.v, v)):
        torch.testing.assert_close(mine, other, atol=5e-6, rtol=1e-5)


@pytest.mark.parametrize("activation", ["softplus", "heavy_tail"])
@pytest.mark.parametrize("options", [{}, {"mimo_rank": 3}, {"mimo_rank": 2, "norm": True}, {"norm": True}], ids=str)
def test_equals_the_recurrence(activation, options):
    config = Mamba3.Config(d_state=6, d_head=4, n_groups=2, d_inner=16, A_activation=activation, A_floor=0.6, **options)
    mixer = Mamba3(10, config).double()
    shake(mixer)
    x = torch.randn(2, 9, 10, dtype=torch.float64)
    torch.testing.assert_close(mixer(x)[0], recurrence(mixer, x))


@torch.no_grad()
def recurrence(m, u):
    """The block of Mamba3's docstring, one row, head and token at a time, pairs of channels as complex numbers."""
    c, r, h, p, n = m.config, m.rank, m.n_heads, m.config.d_head, m.config.d_state
    b, l, _ = u.shape
    widths = [h * p, h * p, r * c.n_groups * n, r * c.n_groups * n, h, h, h, int(n * c.rope_fraction) // 2]
    z, x, B, C, dt, a, trap, rates = (u @ m.in_proj.weight.T).split(widths, -1)
    one = torch.ones(h, r, p, dtype=u.dtype)
    mimo_x, mimo_z, mimo_o = (one if t is None else t for t in (m.mimo_x, m.mimo_z, m.mimo_o))
    y = torch.zeros(b, l, h, p, dtype=u.dtype)

    def normed(row, weight):
        return row / (row.square().mean() + 1e-5).sqrt() * weight

    def turned(row, angle):
        pairs = row.view(-1, 2) if c.mimo_rank is None else row.view(2, -1).T
        numbers = torch.complex(pairs[:, 0], pairs[:, 1])
        numbers[: len(angle)] *= torch.exp(1j * angle)
        pairs = torch.stack([numbers.real, numbers.imag], 1)
        return pairs.flatten() if c.mimo_rank is None else pairs.T.flatten()

    for i in range(b):
        for j in range(h):
            angle, state = torch.zeros(widths[-1], dtype=u.dtype), torch.zeros(p, n, dtype=u.dtype)
            before = torch.zeros(p, n, dtype=u.dtype)
            for t in range(l):
                size, share = softplus(dt[i, t, j] + m.dt_bias[j]), torch.sigmoid(trap[i, t, j])
                raw = a[i, t, j]
                f = softplus(raw) if c.A_activation == "softplus" else (1 + raw if raw > 0 else 1 / (1 - raw))
                decay = torch.exp(-size * max(f, torch.tensor(c.A_floor)))
                angle = angle + size * math.pi * torch.tanh(rates[i, t])
                group = j // (h // c.n_groups)
                ks, qs = (
                    [turned(normed(row, norm.weight) + bias[j, o], angle) for o, row in enumerate(rows)]
                    for rows, norm, bias in (
                        (B[i, t].view(r, c.n_groups, n)[:, group], m.B_norm, m.B_bias),
                        (C[i, t].view(r, c.n_groups, n)[:, group], m.C_norm, m.C_bias),
                    )
                )
                vs = [x[i, t].view(h, p)[j] * mimo_x[j, o] for o in range(r)]
                now = sum(torch.outer(v, k) for v, k in zip(vs, ks, strict=True))
                state = decay * state + (1 - share) * size * decay * before + share * size * now
                before = now
                for o in range(r):
                    out = state @ qs[o] + m.D[j] * vs[o]
                    if m.norm is not None:
                        out = normed(out, m.norm.weight.view(h, p)[j])
                    y[i, t, j] += mimo_o[j, o] * out * silu(z[i, t].view(h, p)[j] * mimo_z[j, o])
    return y.flatten(2) @ m.out_proj.weight.T


def test_both_activations():
    a = torch.tensor([-3.0, -0.5, 0.0, 0.5, 3.0], dtype=torch.float64)
    expected = torch.tensor([1 / 4, 1 / 1.5, 1.0, 1.5, 4.0], dtype=torch.float64)
    torch.testing.assert_close(_rate(a, "heavy_tail"), expected)
    torch.testing.assert_close(_rate(a, "softplus"), torch.log1p(a.exp()))


def test_state_is_the_published_one():
    """d 2048: 2.03 MiB per layer, of which 2 in float32 for the state proper; angle, k and v beside it."""
    with torch.device("meta"):
        mixer = Mamba3(2048)
    h, p, n, s = 64, 64, 128, 32
    assert mixer.state_bytes(1, torch.bfloat16) == 4 * h * s + 4 * h * p * n + 2 * (h * n + h * p)
    assert mixer.state_bytes(1, torch.bfloat16) / 2**20 == pytest.approx(2.03, abs=0.005)
    with torch.device("meta"):
        mixer = Mamba3(2048, Mamba3.Config(mimo_rank=4, rope_fraction=1.0))
    assert mixer.state_bytes(1, torch.bfloat16) == 4 * h * 64 + 4 * h * p * n + 2 * (4 * h * n + h * p)


def test_initial_values():
    mixer = Mamba3(512, Mamba3.Config(d_head=8, mimo_rank=4, norm=True, dt_min=2e-3, dt_max=5e-2))
    for name in ("B_bias", "C_bias", "D", "mimo_z", "B_norm.weight", "C_norm.weight", "norm.weight"):
        assert mixer.get_parameter(name).eq(1).all(), name
    assert mixer.get_parameter("mimo_x").eq(0.25).all()
    assert mixer.get_parameter("mimo_o").eq(0.25).all()
    dt = softplus(mixer.dt_bias.double())
    assert 2e-3 - 1e-8 < dt.min() < 3e-3
    assert 4e-2 < dt.max() < 5e-2 + 1e-8


def test_parameters_that_stay_in_float32_and_undecayed():
    mixer = Mamba3(32, Mamba3.Config(d_head=8, mimo_rank=2))
    expected = {"D", "dt_bias", "B_bias", "C_bias", "mimo_x", "mimo_z", "mimo_o"}
    assert {name for name, p in mixer.named_parameters() if hasattr(p, "_no_weight_decay")} == expected
    mixer.bfloat16()
    assert {name for name, p in mixer.named_parameters() if p.dtype == torch.float32} == expected


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"A_activation": "exp"}, "'heavy_tail' or 'softplus', got 'exp'"),
        ({"A_floor": -1.0}, "got -1.0"),
        ({"rope_fraction": 1.5}, "rope_fraction=1.5"),
        ({"d_state": 2}, "d_state=2"),
        ({"d_state": 7, "mimo_rank": 2}, "even, got 7"),
        ({"mimo_rank": 0}, "mimo_rank must be at least 1, got 0"),
    ],
)
def test_bad_settings(options, named):
    with pytest.raises(UsageError, match=named):
        Mamba3.Config(**options)


def test_bad_sizes():
    with pytest.raises(UsageError, match="d_inner=100 must be heads of d_head=64"):
        Mamba3(50)
    with pytest.raises(UsageError, match="n_groups=3"):
        Mamba3(128, Mamba3.Config(n_groups=3))

"""H3 against its recurrence in float64: the shift SSM with its own state, the diagonal one mode by mode."""

import cmath
import math

import pytest
import torch
from mixer_cases import shake

from longwave.errors import UsageError
from longwave.mixers import H3


@pytest.mark.parametrize("l", [3, 13], ids=["shorter than the state", "longer"])
@pytest.mark.parametrize("discretization", ["bilinear", "zoh"])
@pytest.mark.parametrize("d_head", [1, 3])
def test_equals_the_recurrence(d_head, discretization, l):
    mixer = H3(6, H3.Config(d_state=8, d_head=d_head, discretization=discretization)).double()
    shake(mixer)
    x = torch.randn(2, l, 6, dtype=torch.float64)
    expected = recurrence(mixer, x)
    torch.testing.assert_close(mixer(x)[0], expected)
    _, state = mixer(x[:, :2])  # a prompt shorter than the state
    steps = torch.stack([mixer.step(x[:, t], state) for t in range(2, l)], 1)
    torch.testing.assert_close(steps, expected[:, 2:])


@torch.no_grad()
def recurrence(m, u):
    """H3's docstring with one token at a time: x = shift(x) + B k, k' = C x + D_k k; h = Abar h + Bbar k'_i v_j."""
    (b, l, d), p, n = u.shape, m.config.d_head, m.config.d_state
    q, k, v = (u @ layer.weight.T + layer.bias for layer in (m.q_proj, m.k_proj, m.v_proj))
    shift, s4d = m.ssm_k_kernel.kernel, m.kernel.kernel
    out = torch.zeros(b, l, d, dtype=u.dtype)
    for row in range(b):
        held = torch.zeros(d, n, dtype=u.dtype)
        modes = torch.zeros(d // p, p, p, n // 2, dtype=torch.complex128)
        for t in range(l):
            held = torch.cat([torch.zeros(d, 1), held[:, :-1]], 1) + shift.B * k[row, t, :, None]
            key = (shift.C[0] * held).sum(1) + m.ssm_k_D * k[row, t]
            for head in range(d // p):
                dt = math.exp(s4d.log_dt[head])
                for i in range(p):
                    for j in range(p):
                        product = (key[head * p + i] * v[row, t, head * p + j]).item()
                        total = m.D[head].item() * product
                        for mode in range(n // 2):
                            A = complex(-math.exp(s4d.inv_A_real[head, mode]), s4d.A_imag[head, mode])
                            B, C = complex(*s4d.B[head, mode]), complex(*s4d.C[0, head, mode])
                            Abar = (1 + dt * A / 2) / (1 - dt * A / 2)
                            Bbar = dt * B / (1 - dt * A / 2)
                            if m.config.discretization == "zoh":
                                Abar, Bbar = cmath.exp(dt * A), (cmath.exp(dt * A) - 1) / A * B
                            h = Abar * modes[head, i, j, mode].item() + Bbar * product
                            modes[head, i, j, mode] = h
                            total += 2 * (C * h).real
                        # The channels of a head are spread out: i of each head, then i + 1 of each.
                        out[row, t, j * (d // p) + head] += q[row, t, head * p + i] * total
    return out @ m.output_linear.weight.T + m.output_linear.bias


def test_initial_values():
    mixer = H3(512, H3.Config(d_state=16, dt_min=2e-3, dt_max=5e-2))
    shift, s4d = mixer.ssm_k_kernel.kernel, mixer.kernel.kernel
    assert torch.equal(shift.B, torch.eye(16)[:1].expand(512, 16))
    assert 0.24 < shift.C.max() <= 0.25
    assert -0.25 <= shift.C.min() < -0.24
    dt = s4d.log_dt.exp()
    assert 2e-3 * 0.999 < dt.min() < 2.3e-3
    assert 4.5e-2 < dt.max() < 5e-2 * 1.001
    torch.testing.assert_close(s4d.inv_A_real.exp(), torch.full((512, 8), 0.5))
    torch.testing.assert_close(s4d.A_imag[3], math.pi * torch.arange(8.0))
    assert torch.equal(s4d.B, torch.tensor([1.0, 0.0]).expand(512, 8, 2))
    assert abs(torch.view_as_complex(s4d.C.detach()).abs().square().mean() - 1) < 0.1
    for D in (mixer.D, mixer.ssm_k_D):
        assert abs(D.std() - 1) < 0.15


def test_parameters_that_stay_in_float32_and_undecayed():
    mixer = H3(32).half().bfloat16()
    projections = {
        f"{layer}.{part}" for layer in ("q_proj", "k_proj", "v_proj", "output_linear") for part in ("weight", "bias")
    }
    expected = {name for name, _ in mixer.named_parameters()} - projections
    assert len(expected) == 9
    assert {name for name, p in mixer.named_parameters() if p.dtype == torch.float32} == expected
    assert {name for name, p in mixer.named_parameters() if hasattr(p, "_no_weight_decay")} == expected


@pytest.mark.parametrize("d_head", [1, 8])
def test_names_shapes_and_state_of_published_sizes(d_head):
    """The state is d (n - 1) items of the compute dtype and 4 d p n bytes."""
    with torch.device("meta"):
        mixer = H3(768, H3.Config(d_head=d_head))
    h = 768 // d_head
    shapes = {name: tuple(p.shape) for name, p in mixer.named_parameters()}
    square = {f"{layer}.weight": (768, 768) for layer in ("q_proj", "k_proj", "v_proj", "output_linear")}
    assert shapes == square | {name.replace("weight", "bias"): (768,) for name in square} | {
        "ssm_k_kernel.kernel.B": (768, 64),
        "ssm_k_kernel.kernel.C": (1, 768, 64),
        "ssm_k_D": (768,),
        "kernel.kernel.C": (1, h, 32, 2),
        "kernel.kernel.log_dt": (h,),
        "kernel.kernel.B": (h, 32, 2),
        "kernel.kernel.inv_A_real": (h, 32),
        "kernel.kernel.A_imag": (h, 32),
        "D": (h,),
    }
    assert mixer.state_bytes(10**6, torch.bfloat16) == 2 * 768 * 63 + 4 * 768 * d_head * 64


def test_bad_sizes():
    with pytest.raises(UsageError, match="d_head=5 must divide d_model=32"):
        H3(32, H3.Config(d_head=5))
    with pytest.raises(UsageError, match="d_state must be even, its modes being conjugate pairs, got 5"):
        H3.Config(d_state=5)
    with pytest.raises(UsageError, match=r"0.2 and 0.1"):
        H3.Config(dt_min=0.2)
    with pytest.raises(UsageError, match="got 'euler'"):
        H3.Config(discretization="euler")  # pyright: ignore[reportArgumentType]

"""Mamba against transformers' full forward (never its cached path), and its parameters."""

import pytest
import torch
from mixer_cases import shake
from torch import nn
from torch.nn.functional import softplus
from transformers.models.falcon_mamba import FalconMambaConfig
from transformers.models.falcon_mamba.modeling_falcon_mamba import FalconMambaMixer
from transformers.models.jamba import JambaConfig
from transformers.models.jamba.modeling_jamba import JambaMambaMixer
from transformers.models.mamba import MambaConfig
from transformers.models.mamba.modeling_mamba import MambaMixer

from longwave.errors import UsageError
from longwave.mixers import Mamba

SIZES = {"hidden_size": 24, "state_size": 6, "num_hidden_layers": 1, "time_step_rank": 4}


def mamba(bias):
    theirs = MambaMixer(MambaConfig(**SIZES, use_bias=bias), layer_idx=0)
    return theirs, Mamba.Config(d_state=6, dt_rank=4, bias=bias)


def falcon(bias):
    config = FalconMambaConfig(**SIZES, use_bias=bias, mixer_rms_eps=1e-3)
    theirs = FalconMambaMixer(config, layer_idx=0, initialize_mixer_weights=False)  # that needs norms not made yet
    theirs.init_falcon_mamba_weights()
    return theirs, Mamba.Config(d_state=6, dt_rank=4, bias=bias, inner_norm="weightless", inner_norm_eps=1e-3)


def jamba(bias):
    config = JambaConfig(
        hidden_size=24,
        num_hidden_layers=8,
        mamba_d_state=6,
        mamba_dt_rank=4,
        mamba_proj_bias=bias,
        mamba_conv_bias=not bias,
        rms_norm_eps=1e-3,
        use_mamba_kernels=False,
    )
    return JambaMambaMixer(config, layer_idx=0), Mamba.Config(
        d_state=6, dt_rank=4, bias=bias, conv_bias=not bias, inner_norm="learned", inner_norm_eps=1e-3
    )


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("family", [mamba, falcon, jamba])
def test_equals_transformers(family, bias):
    theirs, config = family(bias)
    shake(theirs)
    ours = Mamba(24, config)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 21, 24)
    torch.testing.assert_close(ours(x)[0], theirs.eval()(x), atol=2e-6, rtol=1e-5)


def test_initial_values():
    mixer = Mamba(256, Mamba.Config(dt_min=2e-3, dt_max=5e-2))
    torch.testing.assert_close(mixer.A_log.exp(), torch.arange(1.0, 17).expand(512, 16))
    assert mixer.D.eq(1).all()
    dt = softplus(mixer.dt_proj.bias.double())
    assert 2e-3 - 1e-8 < dt.min() < 2.3e-3
    assert 4.5e-2 < dt.max() < 5e-2 + 1e-8
    assert abs(dt.log().mean() - torch.tensor([2e-3, 5e-2]).log().mean()) < 0.15
    assert mixer.dt_rank == 16
    assert mixer.dt_proj.weight.abs().max() <= 0.25
    assert Mamba(17).dt_rank == 2


def test_dt_starts_no_lower_than_the_floor():
    mixer = Mamba(64, Mamba.Config(dt_min=1e-6, dt_max=1e-1, dt_init_floor=1e-4))
    torch.testing.assert_close(softplus(mixer.dt_proj.bias.double()).min().item(), 1e-4, atol=1e-8, rtol=1e-4)


@pytest.mark.parametrize("inner_norm", [None, "learned"])
def test_parameters_that_stay_in_float32(inner_norm):
    mixer = Mamba(32, Mamba.Config(inner_norm=inner_norm))
    shake(mixer)
    A_log, bias = mixer.A_log.clone(), mixer.dt_proj.bias.clone()
    mixer.bfloat16()
    kept = {name for name, parameter in mixer.named_parameters() if parameter.dtype == torch.float32}
    assert kept == {"A_log", "D", "dt_proj.bias"}
    torch.testing.assert_close(mixer.A_log, A_log, rtol=0, atol=0)
    torch.testing.assert_close(mixer.dt_proj.bias, bias, rtol=0, atol=0)
    x = torch.randn(2, 9, 32, dtype=torch.bfloat16)
    y, state = mixer(x)
    assert (y.dtype, state.conv.dtype, state.ssm.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    exact, _ = mixer.float()(x.float())
    torch.testing.assert_close(y.float(), exact, atol=0.03 * exact.abs().max().item(), rtol=0)
    assert {parameter.dtype for parameter in mixer.double().parameters()} == {torch.float64}


def test_the_default_dtype_does_not_reach_them():
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        mixer = Mamba(32)
    finally:
        torch.set_default_dtype(default)
    assert mixer.in_proj.weight.dtype == torch.bfloat16
    assert {mixer.A_log.dtype, mixer.D.dtype, mixer.dt_proj.bias.dtype} == {torch.float32}


def test_parameters_without_weight_decay():
    mixer = Mamba(32)
    marked = {name for name, parameter in mixer.named_parameters() if hasattr(parameter, "_no_weight_decay")}
    assert marked == {"A_log", "D", "dt_proj.bias"}


def test_projections_can_be_wrapped():
    """As LoRA does: a projection replaced by a module that is no nn.Linear takes part in forward and step."""

    class Wrapped(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.weight, self.bias = inner, inner.weight, inner.bias

        def forward(self, x):
            return self.inner(x) + 0.1 * x.sum(-1, keepdim=True)

    x = torch.randn(2, 5, 32, dtype=torch.float64)
    for name in ("in_proj", "x_proj", "dt_proj", "out_proj"):
        mixer = Mamba(32).double()
        before, _ = mixer(x)
        setattr(mixer, name, Wrapped(getattr(mixer, name)))
        after, _ = mixer(x)
        assert (after - before).abs().max() > 1e-8
        state = mixer.init_state(2)
        steps = torch.stack([mixer.step(x[:, t], state) for t in range(5)], 1)
        torch.testing.assert_close(steps, after)


def test_bad_options():
    with pytest.raises(UsageError, match="got 'spectral'"):
        Mamba.Config(inner_norm="spectral")  # pyright: ignore[reportArgumentType]
    with pytest.raises(UsageError, match="dt_rank must be 'auto' or at least 1, got 0"):
        Mamba.Config(dt_rank=0)

"""Channel mixers against their formulas."""

import json
import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from longwave.config import from_dict, to_dict
from longwave.errors import UsageError
from longwave.mixers import CHANNELS, MLP, SwiGLU


def gelu(x):
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def gelu_tanh(x):
    return x / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


@pytest.mark.parametrize(("approximate", "activation"), [("none", gelu), ("tanh", gelu_tanh)])
def test_mlp(approximate, activation):
    mixer = MLP(10, MLP.Config(d_inner=14, approximate=approximate)).double()
    x = torch.randn(2, 5, 10, dtype=torch.float64)
    inner = activation(x @ mixer.fc1.weight.T + mixer.fc1.bias)
    torch.testing.assert_close(mixer(x), inner @ mixer.fc2.weight.T + mixer.fc2.bias)


def test_mlp_of_squared_relu():
    mixer = MLP(10, MLP.Config(d_inner=14, activation="relu2", bias=False)).double()
    x = torch.randn(2, 5, 10, dtype=torch.float64)
    inner = x @ mixer.fc1.weight.T
    torch.testing.assert_close(mixer(x), (inner * inner * (inner > 0)) @ mixer.fc2.weight.T)


def test_geglu_with_multipliers():
    config = SwiGLU.Config(d_inner=14, activation="gelu", gate_multiplier=0.5, down_multiplier=-3.0)
    mixer = SwiGLU(10, config).double()
    x = torch.randn(2, 5, 10, dtype=torch.float64)
    inner = gelu(0.5 * x @ mixer.gate_proj.weight.T) * (x @ mixer.up_proj.weight.T)
    torch.testing.assert_close(mixer(x), -3 * inner @ mixer.down_proj.weight.T)


def test_swiglu():
    mixer = SwiGLU(10, SwiGLU.Config(d_inner=14)).double()
    x = torch.randn(2, 5, 10, dtype=torch.float64)
    gate = x @ mixer.gate_proj.weight.T
    inner = gate / (1 + torch.exp(-gate)) * (x @ mixer.up_proj.weight.T)
    torch.testing.assert_close(mixer(x), inner @ mixer.down_proj.weight.T)
    assert mixer.down_proj.bias is None


def test_usual_widths():
    """Transformer++ 2.7b has 6912 for 2560."""
    with torch.device("meta"):
        assert [SwiGLU(d).d_inner for d in (2560, 768, 100)] == [6912, 2048, 384]
        assert MLP(100).d_inner == 400


@pytest.mark.parametrize("kind", ["mlp", "swiglu"])
def test_flops_json_and_reset(kind):
    cls = CHANNELS[kind]
    config = cls.Config(d_inner=24, bias=True)
    assert from_dict(cls.Config, json.loads(json.dumps(to_dict(config)))) == config
    mixer = cls(16, config)
    with FlopCounterMode(display=False) as counter:
        mixer(torch.randn(1, 7, 16))
    assert mixer.flops(7) == counter.get_total_flops()
    with torch.device("meta"):
        empty = cls(16, config)
    empty.to_empty(device="cpu")
    for module in (mixer, empty):
        torch.manual_seed(0)
        module.reset_parameters()
    torch.testing.assert_close(empty.state_dict(), mixer.state_dict(), rtol=0, atol=0)


def test_bad_options():
    with pytest.raises(UsageError, match="mlp: d_inner must be at least 1, got -4"):
        MLP.Config(d_inner=-4)
    with pytest.raises(UsageError, match="got 'relu'"):
        MLP.Config(approximate="relu")  # pyright: ignore[reportArgumentType]
    with pytest.raises(UsageError, match="mlp: activation must be 'gelu' or 'relu2', got 'relu'"):
        MLP.Config(activation="relu")  # pyright: ignore[reportArgumentType]
    with pytest.raises(UsageError, match="swiglu: activation must be 'silu' or 'gelu', got 'relu'"):
        SwiGLU.Config(activation="relu")  # pyright: ignore[reportArgumentType]

"""A token's projection: streamed for a plain nn.Linear, called for everything else."""

import pytest
import torch
from torch import nn

from longwave.mixers import projection
from longwave.mixers.projection import project_token


@pytest.fixture
def streamed(monkeypatch):
    """The calls of linear_step."""
    calls, linear_step = [], projection.linear_step
    monkeypatch.setattr(projection, "linear_step", lambda *args: calls.append(args) or linear_step(*args))
    return calls


class Scaled(nn.Linear):
    def forward(self, input):
        return 2 * super().forward(input)


@torch.no_grad()
@pytest.mark.parametrize("bias", [True, False])
def test_a_plain_linear_is_streamed(streamed, bias):
    layer, x = nn.Linear(12, 7, bias=bias), torch.randn(2, 12)
    torch.testing.assert_close(project_token(layer, x), layer(x))
    assert streamed


@torch.no_grad()
def test_a_layer_in_its_place_is_called(streamed):
    layer, x = Scaled(12, 7), torch.randn(2, 12)
    torch.testing.assert_close(project_token(layer, x), layer(x), rtol=0, atol=0)
    hooked = nn.Linear(12, 7)
    hooked.register_forward_hook(lambda module, args, y: y + 1)
    torch.testing.assert_close(project_token(hooked, x), hooked(x), rtol=0, atol=0)
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(12, 7))
    torch.testing.assert_close(project_token(normed, x), normed(x), rtol=0, atol=0)
    assert not streamed


@torch.no_grad()
def test_autocast_decides_the_dtype(streamed):
    with torch.autocast("cpu", torch.bfloat16):
        assert project_token(nn.Linear(12, 7), torch.randn(2, 12)).dtype == torch.bfloat16
    assert not streamed

"""nn.Linear, whichever way it takes."""

import copy

import pytest
import torch
from torch import nn

from longwave.mixers.linear import Linear


@pytest.mark.parametrize("bias", [True, False])
def test_one_token_is_nn_linear(bias):
    layer, x = Linear(12, 7, bias=bias), torch.randn(2, 12)
    expected = nn.functional.linear(x, layer.weight, layer.bias)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), expected, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(layer(x[None])[0], expected, rtol=1e-6, atol=1e-6)


def test_with_a_gradient_it_has_one():
    layer, x = Linear(12, 7), torch.randn(2, 12, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.detach().sum(0).expand(2, 12))


def test_hooks_and_copies_are_honoured():
    layer = Linear(3, 2)
    layer.register_forward_hook(lambda module, inputs, output: output + 1)
    plain, x = copy.deepcopy(layer), torch.randn(1, 3)
    plain._forward_hooks.clear()
    with torch.no_grad():
        torch.testing.assert_close(layer(x), plain(x) + 1)


def test_autocast_decides_the_dtype():
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert Linear(12, 7)(torch.randn(2, 12)).dtype == torch.bfloat16

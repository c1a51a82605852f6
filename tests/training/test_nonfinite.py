import pytest
import torch
from torch import nn

from longwave.training.nonfinite import first_nonfinite


class Root(nn.Module):
    """A square root of what may be 0: finite forward, an infinite gradient backward."""

    def forward(self, x):
        return x.clamp(min=0).sqrt()


def model(*layers: nn.Module) -> tuple[nn.Sequential, torch.Tensor]:
    return nn.Sequential(nn.Linear(4, 4), *layers, nn.Linear(4, 1)), torch.randn(3, 4)


def test_the_innermost_module_is_named():
    net, x = model(nn.Sequential(nn.Tanh(), nn.Linear(4, 4)))
    net[1][1].bias.data[2] = float("inf")
    found = first_nonfinite(net, lambda: net(x).sum().backward())
    assert found == "1.1 (Linear): its output holds infinity; not finite in it: bias"


def test_a_bad_input_is_told_from_a_bad_module():
    net, x = model()
    x[0, 0] = float("nan")
    found = first_nonfinite(net, lambda: net(x).sum().backward())
    assert found == "0 (Linear): its output holds NaN, as does its input"


def test_a_bad_gradient_is_traced_to_its_module():
    net, x = model(Root())
    net[0].weight.data.zero_()
    net[0].bias.data.zero_()
    net[2].weight.data.fill_(1.0)
    found = first_nonfinite(net, lambda: net(x).sum().backward())
    assert found.startswith("1 (Root): the gradient of its input holds")


def test_a_loss_that_overflows_by_itself_is_said_so():
    net, x = model()
    found = first_nonfinite(net, lambda: (net(x).exp().sum() * 0 + float("inf")).backward())
    assert "the loss itself" in found


@pytest.mark.parametrize("times", [1, 2])
def test_hooks_are_removed(times):
    net, x = model()
    for _ in range(times):
        first_nonfinite(net, lambda: net(x).sum().backward())
    assert not any(m._forward_hooks or m._backward_hooks for m in net.modules())

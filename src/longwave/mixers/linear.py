"""The projection that all layers use."""

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from longwave.ops.linear_step import linear_step


class Linear(nn.Linear):
    """nn.Linear, except that one token of each sequence, x (b, k) without a gradient, streams the weights.

    That is what decoding does all the time, and torch reads the weights at half the speed of memory then. Under
    autocast, and with a weight that is no plain tensor (quantised, sharded), it is nn.Linear.
    """

    def forward(self, input: Tensor) -> Tensor:
        return project(input, self.weight, self.bias)


def project(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """input W^T + bias, the way `Linear` does it."""
    streams = input.ndim == 2 and not torch.is_grad_enabled() and type(weight) is nn.Parameter
    if streams and not torch.is_autocast_enabled(input.device.type):
        return linear_step(input, weight, bias)
    return linear(input, weight, bias)

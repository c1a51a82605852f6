"""The projections of one token."""

import torch
from torch import Tensor, nn

from longwave.ops.linear_step import linear_step


def project_token(layer: nn.Module, x: Tensor) -> Tensor:
    """layer(x) for one token of each sequence: x (b, k) -> (b, n), without a gradient.

    A plain nn.Linear streams its weights. Whatever else stands in its place (LoRA, a quantised layer or weight), hooks
    and autocast mean that the layer is called.
    """
    if (
        type(layer) is nn.Linear
        and type(layer.weight) is nn.Parameter
        and not (layer._forward_hooks or layer._forward_pre_hooks)
        and not torch.is_autocast_enabled(x.device.type)
    ):
        return linear_step(x, layer.weight, layer.bias)
    return layer(x)

"""The CPU form."""

import torch
from torch import Tensor

from longwave.ops.gated_rms_norm import reference


def forward(
    x: Tensor, weight: Tensor | None, z: Tensor | None, eps: float, group_size: int, norm_before_gate: bool
) -> Tensor:
    return reference.gated_rms_norm(x, weight, z, eps, group_size, norm_before_gate).contiguous()


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    z: Tensor | None,
    eps: float,
    group_size: int,
    norm_before_gate: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.enable_grad():
        leaves = [None if t is None else t.detach().requires_grad_() for t in (x, weight, z)]
        y = reference.gated_rms_norm(leaves[0], leaves[1], leaves[2], eps, group_size, norm_before_gate)
        grads = iter(torch.autograd.grad(y, [t for t in leaves if t is not None], dy))
    dx, dweight, dz = (x.new_empty(0) if t is None else next(grads).contiguous() for t in leaves)
    return dx, dweight, dz

"""The definition. RMSNorm: Zhang and Sennrich, 2019, arXiv:1910.07467, equation 4. Its gate: Mamba-2,
arXiv:2405.21060, section 7.

r(u) = u / sqrt(mean(u^2) + eps), the mean over each group of e
y = r(x silu(z)) weight, or r(x) weight silu(z) with the norm before the gate
"""

import torch
from torch import Tensor
from torch.nn.functional import silu

from longwave.ops.checks import state_dtype


def gated_rms_norm(
    x: Tensor,  # (..., e)
    weight: Tensor | None,  # (e,)
    z: Tensor | None,  # (..., e)
    eps: float,
    group_size: int,
    norm_before_gate: bool,
) -> Tensor:
    dtype = state_dtype(x.dtype)
    gate = None if z is None else silu(z.to(dtype))
    y = x.to(dtype)
    if gate is not None and not norm_before_gate:
        y = y * gate
    groups = y.unflatten(-1, (-1, group_size))
    y = (groups * torch.rsqrt(groups.square().mean(-1, keepdim=True) + eps)).flatten(-2)
    if weight is not None:
        y = y * weight.to(dtype)
    if gate is not None and norm_before_gate:
        y = y * gate
    return y.to(x.dtype)

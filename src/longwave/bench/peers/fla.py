"""flash-linear-attention's Triton kernels."""

from typing import Any

import torch
from fla.modules.causal_conv1d import causal_conv1d as fla_causal_conv1d  # pyright: ignore[reportMissingImports]
from fla.ops.simple_gla import chunk_simple_gla  # pyright: ignore[reportMissingImports]
from torch import Tensor
from torch.nn.functional import softplus

from longwave.bench.calls import Adapted, Inputs


def _ssd_native(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    dt_softplus: bool,
    **_: Any,
) -> Inputs:
    """Its recurrence alone, without dt and D; B and C are expanded over the heads, as it wants them."""
    h, g = x.shape[2], B.shape[2]
    sizes = softplus(dt.float() + dt_bias) if dt_softplus else dt.float()
    q, k = (t.repeat_interleave(h // g, dim=2) for t in (C, B))
    return {"x": x, "D": D, "q": q, "k": k, "v": (sizes[..., None] * x).to(x.dtype), "g": sizes * A}


def _ssd(x: Tensor, D: Tensor, **native: Tensor) -> Tensor:
    y, _ = chunk_simple_gla(**native, scale=1.0)
    return torch.addcmul(y, x, D[:, None].to(x.dtype))


ssd = Adapted(_ssd_native, _ssd)


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor, activation: str | None, **_: Any) -> Tensor:
    y, _ = fla_causal_conv1d(x, weight, bias, activation=activation)
    return y

"""RMSNorm as a layer, gated or not."""

import torch
from torch import Tensor, nn

from longwave.ops.checks import state_dtype
from longwave.ops.gated_rms_norm import gated_rms_norm


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, over groups of `group_size` channels; with z, gated by silu(z).

    The gate comes before the norm (Mamba-2), or after it with `norm_before_gate`. `weighted=False` has no parameter.
    Computed in float32. Zhang and Sennrich 2019, arXiv:1910.07467; gated: arXiv:2405.21060, section 7.
    """

    weight: nn.Parameter | None

    def __init__(
        self,
        d: int,
        *,
        eps: float = 1e-5,
        group_size: int | None = None,
        norm_before_gate: bool = False,
        weighted: bool = True,
    ):
        super().__init__()
        self.eps, self.group_size, self.norm_before_gate = eps, group_size, norm_before_gate
        self.register_parameter("weight", nn.Parameter(torch.empty(d)) if weighted else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        if self.weight is not None:
            nn.init.ones_(self.weight)

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        return gated_rms_norm(
            x, self.weight, z, eps=self.eps, group_size=self.group_size, norm_before_gate=self.norm_before_gate
        )


class OuterEpsRMSNorm(nn.Module):
    """x / (sqrt(mean(x^2)) + eps) * weight: RMSNorm with eps outside the root, as StripedHyena has it. In float32."""

    def __init__(self, d: int, *, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(d))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(state_dtype(x.dtype))
        root = torch.linalg.vector_norm(wide, dim=-1, keepdim=True) * x.shape[-1] ** -0.5
        return (wide / (root + self.eps) * self.weight).to(x.dtype)

"""Channel mixers: what a Transformer block has beside its attention. Each token is treated alone."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, nn
from torch.nn.functional import gelu, silu

from longwave.errors import UsageError
from longwave.mixers.base import check_positive, reset_children
from longwave.mixers.linear import Linear


class MLP(nn.Module):
    """y = W_2 gelu(W_1 x + b_1) + b_2.

    Vaswani et al. 2017, arXiv:1706.03762, equation 2, with gelu (Hendrycks and Gimpel 2016, arXiv:1606.08415) in place
    of relu. Parameters: fc1, fc2. Initialised as nn.Linear.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """`d_inner`: hidden width, None: 4 d_model. `approximate`: gelu by "tanh" (GPT-2, H3), or exact ("none")."""

        kind: ClassVar[str] = "mlp"
        d_inner: int | None = None
        approximate: Literal["none", "tanh"] = "tanh"
        bias: bool = True

        def __post_init__(self):
            if self.approximate not in ("none", "tanh"):
                raise UsageError(f"mlp: approximate must be 'none' or 'tanh', got {self.approximate!r}")
            check_positive(self, "d_inner")

    def __init__(self, d_model: int, config: Config | None = None):
        super().__init__()
        self.config = config or self.Config()
        self.d_model, self.d_inner = d_model, self.config.d_inner or 4 * d_model
        self.fc1 = Linear(d_model, self.d_inner, bias=self.config.bias)
        self.fc2 = Linear(self.d_inner, d_model, bias=self.config.bias)

    def reset_parameters(self) -> None:
        reset_children(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(gelu(self.fc1(x), approximate=self.config.approximate))

    def flops(self, length: int) -> int:
        return length * 4 * self.d_model * self.d_inner


class SwiGLU(nn.Module):
    """y = W_down (silu(W_gate x) * W_up x).

    Shazeer 2020, arXiv:2002.05202, equation 6. Parameters: gate_proj, up_proj, down_proj. Initialised as nn.Linear.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """`d_inner`: hidden width. None: 8/3 d_model, the parameters of a 4 d_model MLP, up to a multiple of 128."""

        kind: ClassVar[str] = "swiglu"
        d_inner: int | None = None
        bias: bool = False

        def __post_init__(self):
            check_positive(self, "d_inner")

    def __init__(self, d_model: int, config: Config | None = None):
        super().__init__()
        self.config = config or self.Config()
        self.d_model, self.d_inner = d_model, self.config.d_inner or -(-8 * d_model // 3 // 128) * 128
        self.gate_proj = Linear(d_model, self.d_inner, bias=self.config.bias)
        self.up_proj = Linear(d_model, self.d_inner, bias=self.config.bias)
        self.down_proj = Linear(self.d_inner, d_model, bias=self.config.bias)

    def reset_parameters(self) -> None:
        reset_children(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(silu(self.gate_proj(x)) * self.up_proj(x))

    def flops(self, length: int) -> int:
        return length * 6 * self.d_model * self.d_inner

"""Channel mixers: what a Transformer block has beside its attention. Each token is treated alone."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor, nn
from torch.nn.functional import gelu, relu, silu

from longwave.errors import UsageError
from longwave.mixers.base import check_positive, reset_children, scaled
from longwave.mixers.linear import Linear


class MLP(nn.Module):
    """y = W_2 f(W_1 x + b_1) + b_2.

    Vaswani et al. 2017, arXiv:1706.03762, equation 2, with f gelu (Hendrycks and Gimpel 2016, arXiv:1606.08415) or
    relu(x)^2 (So et al. 2021, arXiv:2109.08668) in place of relu. Parameters: fc1, fc2. Initialised as nn.Linear.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """`d_inner`: hidden width, None: 4 d_model. `activation`: "gelu", or "relu2", relu(x)^2 (Nemotron-H).

        `approximate`: gelu by "tanh" (GPT-2, H3), or exact ("none").
        """

        kind: ClassVar[str] = "mlp"
        d_inner: int | None = None
        activation: Literal["gelu", "relu2"] = "gelu"
        approximate: Literal["none", "tanh"] = "tanh"
        bias: bool = True

        def __post_init__(self):
            if self.activation not in ("gelu", "relu2"):
                raise UsageError(f"mlp: activation must be 'gelu' or 'relu2', got {self.activation!r}")
            if self.approximate not in ("none", "tanh"):
                raise UsageError(f"mlp: approximate must be 'none' or 'tanh', got {self.approximate!r}")
            check_positive(self, "d_inner")

        def width(self, d_model: int) -> int:
            """The hidden width, chosen or by default."""
            return self.d_inner or 4 * d_model

    def __init__(self, d_model: int, config: Config | None = None):
        super().__init__()
        self.config = config or self.Config()
        self.d_model, self.d_inner = d_model, self.config.width(d_model)
        self.fc1 = Linear(d_model, self.d_inner, bias=self.config.bias)
        self.fc2 = Linear(self.d_inner, d_model, bias=self.config.bias)

    def reset_parameters(self) -> None:
        reset_children(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self._activation(self.fc1(x)))

    def _activation(self, x: Tensor) -> Tensor:
        if self.config.activation == "relu2":
            return relu(x).square()
        return gelu(x, approximate=self.config.approximate)

    def flops(self, length: int) -> int:
        return length * 4 * self.d_model * self.d_inner


class SwiGLU(nn.Module):
    """y = W_down (silu(W_gate x) * W_up x), or with gelu in place of silu (GEGLU).

    Shazeer 2020, arXiv:2002.05202, equations 5 and 6. Parameters: gate_proj, up_proj, down_proj. Initialised as
    nn.Linear.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """`d_inner`: hidden width. None: 8/3 d_model, the parameters of a 4 d_model MLP, up to a multiple of 128.

        `activation`: "silu" or "gelu", exact. `gate_multiplier` is a factor of W_gate x, `down_multiplier` one of y.
        """

        kind: ClassVar[str] = "swiglu"
        d_inner: int | None = None
        activation: Literal["silu", "gelu"] = "silu"
        gate_multiplier: float = 1.0
        down_multiplier: float = 1.0
        bias: bool = False

        def __post_init__(self):
            if self.activation not in ("silu", "gelu"):
                raise UsageError(f"swiglu: activation must be 'silu' or 'gelu', got {self.activation!r}")
            check_positive(self, "d_inner")

        def width(self, d_model: int) -> int:
            """The hidden width, chosen or by default."""
            return self.d_inner or -(-8 * d_model // 3 // 128) * 128

    def __init__(self, d_model: int, config: Config | None = None):
        super().__init__()
        self.config = config or self.Config()
        self.d_model, self.d_inner = d_model, self.config.width(d_model)
        self.gate_proj = Linear(d_model, self.d_inner, bias=self.config.bias)
        self.up_proj = Linear(d_model, self.d_inner, bias=self.config.bias)
        self.down_proj = Linear(self.d_inner, d_model, bias=self.config.bias)

    def reset_parameters(self) -> None:
        reset_children(self)

    def forward(self, x: Tensor) -> Tensor:
        gate = scaled(self.gate_proj(x), self.config.gate_multiplier)
        gate = silu(gate) if self.config.activation == "silu" else gelu(gate)
        return scaled(self.down_proj(gate * self.up_proj(x)), self.config.down_multiplier)

    def flops(self, length: int) -> int:
        return length * 6 * self.d_model * self.d_inner

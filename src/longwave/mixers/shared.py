"""A Transformer block whose weights several layers share, each with adapters of its own (Zamba2)."""

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from longwave.errors import UsageError
from longwave.mixers.attention import Attention, AttentionState
from longwave.mixers.base import check_positive, mixer_class, reset_children
from longwave.mixers.linear import Linear
from longwave.mixers.mamba2 import Mamba2
from longwave.mixers.nested import reserve
from longwave.mixers.norm import RMSNorm


class SharedState(NamedTuple):
    mixer: Any  # the state of the layer's own mixer
    attention: AttentionState

    def reserve(self, n: int) -> "SharedState":
        """A copy with room for exactly `n` more tokens."""
        return SharedState(*reserve(tuple(self), n))


class Shared(nn.Module):
    """What a layer that calls on the shared Transformer adds to the input of its own mixer:

        layer: x + mixer(norm(x + T(x, x_0)))          x_0: the model's embeddings, as they entered the first layer

        a       = W_o attention(RMSNorm([x, x_0]))     of 2 d channels, down to d
        g, u    = W_gu RMSNorm(a)
        T(x, x_0) = W_l W_down (gelu(g) u)

    Glorioso et al. 2024, arXiv:2411.15242 (Zamba2), section 2. Layers of one `index` have all weights of T in common
    but W_l; W_q, W_k, W_v and W_gu can each have an adapter W_up W_down of low rank added that is the layer's own, as
    in LoRA (Hu et al. 2021, arXiv:2106.09685). Every layer has its own keys and values.

    Parameters: norm, attention, norm_mlp, gate_up_proj, down_proj, linear, where a projection with an adapter has parts
    base, down and up. Drawn as nn.Linear, `up` zero.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """`mixer`: that of the layer itself. `index`: layers with the same one share. `attention`: of 2 d channels.

        `d_inner`: hidden width of the MLP, None: 4 d. `bias`: of its projections. `rank`: of its adapter, and with
        `attention_adapters` of those of q, k and v; None: no adapters.
        """

        kind: ClassVar[str] = "shared"
        mixer: Any = field(default_factory=Mamba2.Config)
        index: int = 0
        attention: Attention.Config = field(default_factory=Attention.Config)
        d_inner: int | None = None
        rank: int | None = 128
        attention_adapters: bool = False
        bias: bool = False

        def __post_init__(self):
            check_positive(self, "d_inner", "rank")
            if self.index < 0:
                raise UsageError(f"shared: index must be at least 0, got {self.index}")
            mixer_class(self.mixer, "shared: mixer")
            if not isinstance(self.attention, Attention.Config):
                raise UsageError(f"shared: attention must be an Attention.Config, got {self.attention!r}")

    def __init__(self, d_model: int, config: Config | None = None, *, norm_eps: float = 1e-5):
        super().__init__()
        self.config = config = config or self.Config()
        self.d_model, self.d_inner = d_model, config.d_inner or 4 * d_model
        self.norm = RMSNorm(2 * d_model, eps=norm_eps)
        self.attention = Attention(2 * d_model, config.attention, d_out=d_model)
        rank = config.rank if config.attention_adapters else None
        for name in ("q_proj", "k_proj", "v_proj"):
            setattr(self.attention, name, Adapted(getattr(self.attention, name), rank))
        self.norm_mlp = RMSNorm(d_model, eps=norm_eps)
        self.gate_up_proj = Adapted(Linear(d_model, 2 * self.d_inner, bias=config.bias), config.rank)
        self.down_proj = Linear(self.d_inner, d_model, bias=config.bias)
        self.linear = Linear(d_model, d_model, bias=False)

    def share(self, first: "Shared") -> None:
        """Take the weights of `first` in place of one's own: its modules, so that every cast and move is shared too."""
        if replace(self.config, mixer=first.config.mixer) != first.config:
            raise UsageError(f"shared: layers of index {self.config.index} differ: {first.config} and {self.config}")
        for name in IN_COMMON:
            self.set_submodule(name, first.get_submodule(name))

    def reset_parameters(self) -> None:
        reset_children(self)

    def forward(
        self,
        x: Tensor,
        embedded: Tensor,
        state: AttentionState | None = None,
        *,
        reset: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, AttentionState]:
        """x and embedded (b, l, d) -> T (b, l, d)."""
        a, after = self.attention(self._join(x, embedded), state, reset=reset, lengths=lengths)
        return self._finish(a), after

    @torch.no_grad()
    def step(self, x: Tensor, embedded: Tensor, state: AttentionState) -> Tensor:
        """x and embedded (b, d) -> T (b, d)."""
        return self._finish(self.attention.step(self._join(x, embedded), state))

    def _join(self, x: Tensor, embedded: Tensor) -> Tensor:
        return self.norm(torch.cat([x, embedded], dim=-1)).to(self.linear.weight.dtype)

    def _finish(self, a: Tensor) -> Tensor:
        g, u = self.gate_up_proj(self.norm_mlp(a)).chunk(2, dim=-1)
        return self.linear(self.down_proj(gelu(g) * u))

    def flops(self, length: int) -> int:
        """Of T alone, without the layer's own mixer."""
        adapters = sum(module.adapter_flops for module in self.modules() if isinstance(module, Adapted))
        per_token = adapters + 2 * self.d_model * (3 * self.d_inner + self.d_model)
        return self.attention.flops(length) + length * per_token


IN_COMMON = (
    "norm",
    "attention.q_proj.base",
    "attention.k_proj.base",
    "attention.v_proj.base",
    "attention.o_proj",
    "norm_mlp",
    "gate_up_proj.base",
    "down_proj",
)
"""The modules that layers of one index share."""


class Adapted(nn.Module):
    """base(x) + up(down(x)), the sum's second part of rank `rank`; None: base alone. Starts as base."""

    def __init__(self, base: nn.Linear, rank: int | None):
        super().__init__()
        self.base = base
        self.down = None if rank is None else Linear(base.in_features, rank, bias=False)
        self.up = None if rank is None else Linear(rank, base.out_features, bias=False)
        if self.up is not None:
            nn.init.zeros_(self.up.weight)

    @property
    def weight(self) -> Tensor:
        """The shared weight: whoever asks wants its dtype and device."""
        return self.base.weight

    @property
    def adapter_flops(self) -> int:
        """Per token."""
        return 0 if self.down is None else 2 * self.down.out_features * (self.base.in_features + self.base.out_features)

    def reset_parameters(self) -> None:
        self.base.reset_parameters()
        if self.down is not None and self.up is not None:
            self.down.reset_parameters()
            nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        return y if self.down is None or self.up is None else y + self.up(self.down(x))

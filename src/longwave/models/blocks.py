"""Residual slots: a Block is x + mixer(norm(x)), a Stack is blocks in a row and the state that they carry."""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, layer_norm

from longwave.config import nearest
from longwave.errors import UsageError
from longwave.mixers import CALLERS, CHANNELS, ENCODERS, MIXERS
from longwave.mixers.base import reset_children, scaled, takes_dt
from longwave.mixers.bidirectional import refuse_state
from longwave.mixers.norm import OuterEpsRMSNorm, RMSNorm
from longwave.mixers.shared import Shared, SharedState
from longwave.models.state import State, entering

LAYERS: dict[str, type] = MIXERS | CHANNELS | ENCODERS | CALLERS
"""What a slot can hold, by `kind`."""

OUTPUTS = ("out_proj", "o_proj", "down_proj", "fc2", "output_linear", "out_filter_dense")
"""The layers of mixers that write into the residual stream."""


class LayerNorm(nn.LayerNorm):
    """nn.LayerNorm (Ba et al. 2016, arXiv:1607.06450), of an input that may have more bits than the weights."""

    def forward(self, input: Tensor) -> Tensor:
        weight, bias = self.weight.to(input.dtype), self.bias.to(input.dtype)
        return layer_norm(input, self.normalized_shape, weight, bias, self.eps)


NORMS = {"rms": RMSNorm, "layer": LayerNorm, "rms_outer_eps": OuterEpsRMSNorm}
NORM_POSITIONS = ("pre", "post", "res_post", "sandwich")


class Block(nn.Module):
    """A residual slot around a layer of any kind, with a = residual_multiplier and, by norm_position,

        pre        x + a mixer(norm(x))               Xiong et al. 2020, arXiv:2002.04745; GPT-2, Mamba
        post       norm(x + a mixer(x))               Vaswani et al. 2017, arXiv:1706.03762; S5
        res_post   x + a norm(mixer(x))               Liu et al. 2022, arXiv:2111.09883; OLMo 2
        sandwich   x + a norm_out(mixer(norm(x)))     Ding et al. 2021, arXiv:2105.13290; Gemma 2

    `config` is that of the mixer, `norm` a key of NORMS. x may be float32 beside 16-bit weights: the mixer is given the
    weights' dtype, and the sum has x's. Parameters: norm, mixer and, in a sandwich, norm_out.
    """

    def __init__(
        self,
        d_model: int,
        config: Any,
        *,
        norm: str = "rms",
        norm_eps: float = 1e-5,
        norm_position: str = "pre",
        residual_multiplier: float = 1.0,
    ):
        super().__init__()
        self.kind, self.carries_state, self.causal = config.kind, config.kind in MIXERS, config.kind not in ENCODERS
        self.norm_position, self.residual_multiplier = norm_position, residual_multiplier
        self.norm = NORMS[norm](d_model, eps=norm_eps)
        self.mixer = LAYERS[config.kind](d_model, config)
        self.norm_out = NORMS[norm](d_model, eps=norm_eps) if norm_position == "sandwich" else None
        self.takes_dt = takes_dt(self.mixer)

    def forward(
        self,
        x: Tensor,
        state: Any = None,
        *,
        reset: Tensor | None = None,
        lengths: Tensor | None = None,
        dt: Tensor | float | None = None,
    ) -> tuple[Tensor, Any]:
        """x (b, l, d) -> the same shape, and the mixer's state after it, None for a layer that carries none.

        `dt`, where it is given, goes to the mixer. Raises UsageError for a mixer without a rate.
        """
        inner = self._enter(x)
        if self.carries_state:
            y, state = self.mixer(inner, state, reset=reset, lengths=lengths, **self._rate(dt))
        elif self.causal:
            y = self.mixer(inner)
        else:
            y = self.mixer(inner, reset=reset, lengths=lengths, **self._rate(dt))
        return self._join(x, y), state

    def step(self, x: Tensor, state: Any, dt: Tensor | float | None = None) -> Tensor:
        """x (b, d) -> the same shape; the mixer's state is updated in place."""
        inner = self._enter(x)
        if self.carries_state or not self.causal:
            return self._join(x, self.mixer.step(inner, state, **self._rate(dt)))
        return self._join(x, self.mixer(inner))

    def _rate(self, dt: Tensor | float | None) -> dict[str, Any]:
        """How the mixer is given `dt`."""
        if dt is not None and not self.takes_dt:
            raise UsageError(
                f"{self.kind} takes no dt: how long a token lasts means nothing to it. Leave dt out, give the time "
                f"between tokens as a feature, or build the model of mixers with a rate: {', '.join(_with_rate())}"
            )
        return {} if dt is None else {"dt": dt}

    def _enter(self, x: Tensor) -> Tensor:
        """What the mixer is given of the residual stream."""
        inner = self.norm(x) if self.norm_position in ("pre", "sandwich") else x
        return inner.to(self.norm.weight.dtype)

    def _join(self, x: Tensor, y: Tensor) -> Tensor:
        """The residual stream once the mixer has given y."""
        if self.norm_position == "res_post":
            y = self.norm(y)
        elif self.norm_out is not None:
            y = self.norm_out(y)
        x = x + scaled(y, self.residual_multiplier)
        return self.norm(x) if self.norm_position == "post" else x

    def init_state(self, b: int, length: int, dtype: torch.dtype | None, device: torch.device | str | None) -> Any:
        if self.kind in CHANNELS:
            return None
        return self.mixer.init_state(b, length=length, dtype=dtype, device=device)

    def state_bytes(self, length: int, dtype: torch.dtype | None) -> int:
        return self.mixer.state_bytes(length, dtype) if self.carries_state else 0

    def flops(self, length: int) -> int:
        return self.mixer.flops(length)

    def reset_parameters(self) -> None:
        reset_children(self)

    @torch.no_grad()
    def scale_output(self, factor: float) -> None:
        """Multiply the weights that write into the residual stream by `factor`."""
        for name, child in self.mixer.named_modules():
            if name.rpartition(".")[2] in OUTPUTS:
                child.weight.mul_(factor)  # pyright: ignore[reportCallIssue, reportArgumentType]


class SharedBlock(Block):
    """A slot that adds what the shared Transformer says to the input of its mixer: x + a mixer(norm(x + T(x, x_0))).

    Parameters: those of Block, and transformer. Its calls are given x_0 as `embedded`.
    """

    def __init__(self, d_model: int, config: Shared.Config, *, norm_eps: float = 1e-5, **options: Any):
        super().__init__(d_model, config.mixer, norm_eps=norm_eps, **options)
        self.transformer = Shared(d_model, config, norm_eps=norm_eps)

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        x: Tensor,
        state: SharedState | None = None,
        *,
        embedded: Tensor,
        reset: Tensor | None = None,
        lengths: Tensor | None = None,
        dt: Tensor | float | None = None,
    ) -> tuple[Tensor, SharedState]:
        mixer, attention = state or (None, None)
        told, attention = self.transformer(x, embedded, attention, reset=reset, lengths=lengths)
        y, mixer = self.mixer(self._enter(x + told), mixer, reset=reset, lengths=lengths, **self._rate(dt))
        return self._join(x, y), SharedState(mixer, attention)

    def step(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, x: Tensor, state: SharedState, dt: Tensor | float | None = None, *, embedded: Tensor
    ) -> Tensor:
        told = self.transformer.step(x, embedded, state.attention)
        return self._join(x, self.mixer.step(self._enter(x + told), state.mixer, **self._rate(dt)))

    def init_state(
        self, b: int, length: int, dtype: torch.dtype | None, device: torch.device | str | None
    ) -> SharedState:
        mixer = super().init_state(b, length, dtype, device)
        attention = self.transformer.attention.init_state(b, length=length, dtype=dtype, device=device)
        return SharedState(mixer, attention)

    def state_bytes(self, length: int, dtype: torch.dtype | None) -> int:
        return super().state_bytes(length, dtype) + self.transformer.attention.state_bytes(length, dtype)

    def flops(self, length: int) -> int:
        return super().flops(length) + self.transformer.flops(length)


def make_block(d_model: int, config: Any, **options: Any) -> Block:
    """The residual slot for a layer's configuration; `options` are those of Block."""
    return (SharedBlock if config.kind in CALLERS else Block)(d_model, config, **options)


class Stack(nn.ModuleList):
    """Blocks one after the other. The weights that write into the residual stream begin divided by sqrt(blocks).

    `dropout` falls on what one block hands to the next. `fingerprint` names the model in the states that it makes; the
    model sets it once it is complete.
    """

    def __init__(self, blocks: Iterable[Block] = (), *, dropout: float = 0.0):
        super().__init__(blocks)
        self.dropout = dropout
        self.fingerprint = ""
        self._share()
        self._scale_outputs()

    @property
    def causal(self) -> bool:
        """Whether each token sees only those before it, so that there is a state to go on from."""
        return all(block.causal for block in self)

    def __iter__(self) -> Iterator[Block]:
        return super().__iter__()  # pyright: ignore[reportReturnType]

    def forward(
        self,
        x: Tensor,
        state: State | None = None,
        *,
        reset: Tensor | None = None,
        lengths: Tensor | None = None,
        dt: Tensor | float | None = None,
    ) -> tuple[Tensor, State]:
        """x (b, l, d) -> the same shape, and the state after it.

        Raises ValueError for a state of another model, UsageError for one given to bidirectional layers.
        """
        if state is not None and not self.causal:
            refuse_state()
        before, position = entering(state, self.fingerprint, len(self), x)
        l, embedded, after = x.shape[1], x, []
        for i, (block, layer) in enumerate(zip(self, before, strict=True)):
            if i and self.dropout:
                x = dropout(x, self.dropout, self.training)
            x, layer = block(x, layer, reset=reset, lengths=lengths, dt=dt, **_told(block, embedded))
            after.append(layer)
        return x, State(tuple(after), position + (l if lengths is None else lengths), self.fingerprint)

    def step(self, x: Tensor, state: State, dt: Tensor | float | None = None) -> Tensor:
        """x (b, d) -> the same shape; `state` is updated in place."""
        embedded = x
        for block, layer in zip(self, state.layers, strict=True):
            x = block.step(x, layer, dt, **_told(block, embedded))
        state.position.add_(1)
        return x

    def init_state(self, b: int, length: int, dtype: torch.dtype | None, device: torch.device | str | None) -> State:
        layers = tuple(block.init_state(b, length, dtype, device) for block in self)
        return State(layers, torch.zeros(b, dtype=torch.int64, device=device), self.fingerprint)

    def state_bytes(self, length: int, dtype: torch.dtype | None) -> int:
        return sum(block.state_bytes(length, dtype) for block in self)

    def flops(self, length: int) -> int:
        return sum(block.flops(length) for block in self)

    def reset_parameters(self) -> None:
        for block in self:
            block.reset_parameters()
        self._scale_outputs()

    def _scale_outputs(self) -> None:
        for block in self:
            block.scale_output(len(self) ** -0.5)

    def _share(self) -> None:
        """Let the blocks of one index have the weights of the first of them."""
        first: dict[int, Shared] = {}
        for block in self:
            if isinstance(block, SharedBlock):
                transformer = block.transformer
                owner = first.setdefault(transformer.config.index, transformer)
                if owner is not transformer:
                    transformer.share(owner)


def _told(block: Block, embedded: Tensor) -> dict[str, Tensor]:
    """What a block is given beside the residual stream."""
    return {"embedded": embedded} if isinstance(block, SharedBlock) else {}


def _with_rate() -> list[str]:
    return [kind for kind, mixer in MIXERS.items() if takes_dt(mixer)]


def check_layers(layers: Any, where: str) -> None:
    """Raise UsageError unless `layers` is a tuple of at least one mixer's or channel mixer's configuration."""
    if not isinstance(layers, tuple) or not layers:
        raise UsageError(f"{where}: layers must be a tuple of at least one configuration, got {layers!r}")
    for i, layer in enumerate(layers):
        kind = getattr(layer, "kind", None)
        if kind in LAYERS and dataclasses.is_dataclass(layer) and not isinstance(layer, type):
            continue
        name = layer.get("kind") if isinstance(layer, dict) else layer
        raise UsageError(
            f"{where}: layers[{i}] is {layer!r}, which is no layer's configuration.{nearest(str(name), LAYERS)} "
            "In Python write it as Mamba2.Config(...)"
        )


def check_norm(config: Any) -> None:
    """Raise UsageError unless config.norm and config.norm_position are known."""
    for name, known in (("norm", tuple(NORMS)), ("norm_position", NORM_POSITIONS)):
        if getattr(config, name) not in known:
            one_of = " or ".join(map(repr, known))
            raise UsageError(f"{config.kind}: {name} must be {one_of}, got {getattr(config, name)!r}")


def layer_configs() -> dict[str, type]:
    """The configuration class of every kind of layer."""
    return {kind: layer.Config for kind, layer in LAYERS.items()}

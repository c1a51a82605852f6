"""Residual slots: a Block is x + mixer(norm(x)), a Stack is blocks in a row and the state that they carry."""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, layer_norm

from longwave.config import nearest
from longwave.errors import UsageError
from longwave.mixers import CHANNELS, MIXERS
from longwave.mixers.norm import RMSNorm
from longwave.models.state import State

LAYERS: dict[str, type] = MIXERS | CHANNELS
"""What a slot can hold, by `kind`."""

OUTPUTS = ("out_proj", "o_proj", "down_proj", "fc2")
"""The layers of mixers that write into the residual stream."""


class LayerNorm(nn.LayerNorm):
    """nn.LayerNorm (Ba et al. 2016, arXiv:1607.06450), of an input that may have more bits than the weights."""

    def forward(self, input: Tensor) -> Tensor:
        weight, bias = self.weight.to(input.dtype), self.bias.to(input.dtype)
        return layer_norm(input, self.normalized_shape, weight, bias, self.eps)


NORMS = {"rms": RMSNorm, "layer": LayerNorm}


class Block(nn.Module):
    """x + mixer(norm(x)), the mixer being a mixer or a channel mixer (prenorm: Xiong et al. 2020, arXiv:2002.04745).

    `config` is that of the mixer, `norm` "rms" or "layer". x may be float32 beside 16-bit weights: the mixer is given
    the weights' dtype, and the sum has x's.
    """

    def __init__(self, d_model: int, config: Any, *, norm: str = "rms", norm_eps: float = 1e-5):
        super().__init__()
        self.carries_state = config.kind in MIXERS
        self.norm = NORMS[norm](d_model, eps=norm_eps)
        self.mixer = LAYERS[config.kind](d_model, config)

    def forward(
        self, x: Tensor, state: Any = None, *, reset: Tensor | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, Any]:
        """x (b, l, d) -> the same shape, and the mixer's state after it, None for a channel mixer."""
        inner = self.norm(x).to(self.norm.weight.dtype)
        if not self.carries_state:
            return x + self.mixer(inner), None
        y, state = self.mixer(inner, state, reset=reset, lengths=lengths)
        return x + y, state

    def step(self, x: Tensor, state: Any) -> Tensor:
        """x (b, d) -> the same shape; the mixer's state is updated in place."""
        inner = self.norm(x).to(self.norm.weight.dtype)
        return x + (self.mixer.step(inner, state) if self.carries_state else self.mixer(inner))

    def reset_parameters(self) -> None:
        self.norm.reset_parameters()
        self.mixer.reset_parameters()

    @torch.no_grad()
    def scale_output(self, factor: float) -> None:
        """Multiply the weights that write into the residual stream by `factor`."""
        for name, child in self.mixer.named_children():
            if name in OUTPUTS:
                child.weight.mul_(factor)


class Stack(nn.ModuleList):
    """Blocks one after the other. The weights that write into the residual stream begin divided by sqrt(blocks).

    `dropout` falls on what one block hands to the next. `fingerprint` names the model in the states that it makes; the
    model sets it once it is complete.
    """

    def __init__(self, blocks: Iterable[Block] = (), *, dropout: float = 0.0):
        super().__init__(blocks)
        self.dropout = dropout
        self.fingerprint = ""
        self._scale_outputs()

    def __iter__(self) -> Iterator[Block]:
        return super().__iter__()  # pyright: ignore[reportReturnType]

    def forward(
        self, x: Tensor, state: State | None = None, *, reset: Tensor | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """x (b, l, d) -> the same shape, and the state after it. Raises ValueError for a state of another model."""
        b, l, _ = x.shape
        if state is None:
            before, position = (None,) * len(self), torch.zeros(b, dtype=torch.int64, device=x.device)
        elif state.fingerprint == self.fingerprint:
            before, position = state.layers, state.position
        else:
            raise ValueError(f"the state is of another model: {state.fingerprint}; this one is {self.fingerprint}")
        after = []
        for i, (block, layer) in enumerate(zip(self, before, strict=True)):
            if i and self.dropout:
                x = dropout(x, self.dropout, self.training)
            x, layer = block(x, layer, reset=reset, lengths=lengths)
            after.append(layer)
        return x, State(tuple(after), position + (l if lengths is None else lengths), self.fingerprint)

    def step(self, x: Tensor, state: State) -> Tensor:
        """x (b, d) -> the same shape; `state` is updated in place."""
        for block, layer in zip(self, state.layers, strict=True):
            x = block.step(x, layer)
        state.position.add_(1)
        return x

    def init_state(self, b: int, length: int, dtype: torch.dtype | None, device: torch.device | str | None) -> State:
        layers = tuple(
            block.mixer.init_state(b, length=length, dtype=dtype, device=device) if block.carries_state else None
            for block in self
        )
        return State(layers, torch.zeros(b, dtype=torch.int64, device=device), self.fingerprint)

    def state_bytes(self, length: int, dtype: torch.dtype | None) -> int:
        return sum(block.mixer.state_bytes(length, dtype) for block in self if block.carries_state)

    def flops(self, length: int) -> int:
        return sum(block.mixer.flops(length) for block in self)

    def reset_parameters(self) -> None:
        for block in self:
            block.reset_parameters()
        self._scale_outputs()

    def _scale_outputs(self) -> None:
        for block in self:
            block.scale_output(len(self) ** -0.5)


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


def layer_configs() -> dict[str, type]:
    """The configuration class of every kind of layer."""
    return {kind: layer.Config for kind, layer in LAYERS.items()}

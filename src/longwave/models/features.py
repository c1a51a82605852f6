"""A model of features: vectors in, vectors out, any pattern of layers between."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from longwave.config import from_dict
from longwave.errors import UsageError
from longwave.mixers.documents import without_padding
from longwave.mixers.linear import Linear
from longwave.models.blocks import NORMS, Stack, check_layers, check_norm, layer_configs, make_block
from longwave.models.layered import Layered
from longwave.models.state import State, fingerprint


class Features(Layered):
    """Projection, residual slots, norm:

        x = W_in x + b_in (if the sizes differ);  x = x + layer_i(norm_i(x)) for each layer;  y = norm_f(x)

    What heads stand on where the input is measured and not spelled. Parameters: in_proj, layers.i.norm, layers.i.mixer,
    norm_f.
    """

    layers: Stack  # pyright: ignore[reportIncompatibleVariableOverride]

    @dataclass(frozen=True, kw_only=True)
    class Config:
        """`layers`: one configuration per residual slot. `dropout` falls on what one slot hands to the next."""

        kind: ClassVar[str] = "features"
        d_input: int
        d_model: int
        layers: tuple[Any, ...]
        norm: Literal["rms", "layer", "rms_outer_eps"] = "rms"
        norm_eps: float = 1e-5
        norm_position: Literal["pre", "post", "res_post", "sandwich"] = "pre"
        dropout: float = 0.0

        def __post_init__(self):
            if min(self.d_input, self.d_model) < 1 or not 0 <= self.dropout <= 1:
                raise UsageError(
                    "features: d_input and d_model must be at least 1 and dropout in 0..1, "
                    f"got {self.d_input}, {self.d_model} and {self.dropout}"
                )
            check_norm(self)
            check_layers(self.layers, "features")

        @classmethod
        def from_dict(cls, settings: Any) -> "Features.Config":
            """The configuration that `to_dict` has written. Raises UsageError on an unknown key, naming the nearest."""
            return from_dict(cls, settings, layer_configs())

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        d_model, norm = config.d_model, {"norm": config.norm, "norm_eps": config.norm_eps}
        self.in_proj = Linear(config.d_input, d_model) if config.d_input != d_model else None
        blocks = (make_block(d_model, layer, norm_position=config.norm_position, **norm) for layer in config.layers)
        self.layers = Stack(blocks, dropout=config.dropout)
        self.norm_f = NORMS[config.norm](d_model, eps=config.norm_eps)
        self.layers.fingerprint = fingerprint(config, self)

    def reset_parameters(self) -> None:
        """Draw all parameters anew. Follows `to_empty` on a module made on the meta device."""
        for child in (self.in_proj, self.layers, self.norm_f):
            if child is not None:
                child.reset_parameters()

    def hidden(
        self,
        x: Tensor,
        state: State | None = None,
        *,
        reset: Tensor | None = None,
        lengths: Tensor | None = None,
        dt: Tensor | float | None = None,
    ) -> tuple[Tensor, State]:
        """x (b, l, d_input) -> y (b, l, d_model) and the state after it.

        `state=None` is a fresh sequence; a state given is left as it was. `reset` (b, l) bool: True starts a document,
        which sees no other. `lengths` (b,) int64 in 0..l: tokens from lengths[i] on are padding, whatever stands there;
        y there means nothing. `dt`: how long each token lasts in steps of training, a number or (b, l), for mixers with
        a rate. Raises ValueError for shapes that do not fit and for a state of another model, UsageError for `dt` where
        a mixer has no rate and for a state where there are bidirectional layers.
        """
        if x.ndim != 3 or x.shape[-1] != self.config.d_input:
            raise ValueError(f"x must be (b, l, d_input={self.config.d_input}), got {tuple(x.shape)}")
        x = self._project(without_padding(x, lengths))
        x, after = self.layers(x, state, reset=reset, lengths=lengths, dt=dt)
        return self.norm_f(x), after

    @torch.no_grad()
    def step(self, x: Tensor, state: State, dt: Tensor | float | None = None) -> Tensor:
        """One token per row: x (b, d_input) -> (b, d_model). `state` is updated in place. No gradient."""
        return self.norm_f(self.layers.step(self._project(x), state, dt))

    hidden_step = step  # as a TokenModel has it beside its own step

    def flops(self, length: int) -> int:
        """Forward operations on one sequence of `length` tokens, a multiply-add being two; norms are not counted."""
        projection = 0 if self.in_proj is None else 2 * length * self.config.d_input * self.config.d_model
        return projection + self.layers.flops(length)

    def _project(self, x: Tensor) -> Tensor:
        return x if self.in_proj is None else self.in_proj(x)

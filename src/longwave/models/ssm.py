"""A stack of state space layers with the call of nn.GRU."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from longwave.config import nearest
from longwave.errors import UsageError
from longwave.mixers import MIXERS
from longwave.mixers.linear import Linear
from longwave.mixers.norm import RMSNorm
from longwave.models.blocks import Block, Stack, check_layers
from longwave.models.state import State, fingerprint


class SSM(nn.Module):
    """`y, state = ssm(x, state)`, in place of `y, h = gru(x, h)`:

        x = W_in x + b_in (if the sizes differ);  x = x + mixer_i(RMSNorm(x)) for each layer;  y = RMSNorm(x)

    input_size, hidden_size, num_layers, batch_first, dropout: as nn.GRU's; dropout falls on every layer's output but
    the last one's. `mixer`: the kind of layer ("mamba2", "mamba", "attention", "lstm", "gru") with its defaults, or its
    configuration, such as Mamba2.Config(d_state=64, d_head=16). Raises UsageError for a kind that does not exist and
    for sizes that do not fit.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        *,
        batch_first: bool = False,
        mixer: Any = "mamba2",
        dropout: float = 0.0,
    ):
        super().__init__()
        if min(input_size, hidden_size, num_layers) < 1 or not 0 <= dropout <= 1:
            raise UsageError(
                "SSM: input_size, hidden_size and num_layers must be at least 1 and dropout in 0..1, "
                f"got {input_size}, {hidden_size}, {num_layers} and {dropout}"
            )
        self.input_size, self.hidden_size, self.batch_first = input_size, hidden_size, batch_first
        layers = (_mixer_config(mixer),) * num_layers
        self.in_proj = Linear(input_size, hidden_size) if input_size != hidden_size else None
        self.layers = Stack((Block(hidden_size, layer) for layer in layers), dropout=dropout)
        self.norm_f = RMSNorm(hidden_size)
        self.layers.fingerprint = fingerprint({"d_model": hidden_size, "layers": layers}, self)

    @property
    def fingerprint(self) -> str:
        """Names the layers and the shapes of the parameters; states carry it."""
        return self.layers.fingerprint

    def reset_parameters(self) -> None:
        """Draw all parameters anew. Follows `to_empty` on a module made on the meta device."""
        for child in (self.in_proj, self.layers, self.norm_f):
            if child is not None:
                child.reset_parameters()

    def forward(
        self,
        x: Tensor,
        state: State | None = None,
        *,
        reset: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        """x (l, b, input_size), or (b, l, input_size) with batch_first, or one sequence (l, input_size).

        Returns y, with hidden_size in place of input_size, and the state after x. `state=None` is a fresh sequence; a
        state given is left as it was, and gradients flow through it. `reset`, bool, of x's shape without the last axis:
        True starts a document there. `lengths` (b,) int64: tokens from lengths[i] on are padding of row i. Raises
        ValueError for shapes that do not fit, UsageError for a PackedSequence.
        """
        if isinstance(x, PackedSequence):
            raise UsageError(
                "SSM takes no PackedSequence; pass x and lengths=, as pad_packed_sequence(packed) gives them"
            )
        if x.ndim not in (2, 3) or x.shape[-1] != self.input_size:
            raise ValueError(
                f"SSM: x must have 2 or 3 axes, the last of input_size={self.input_size}, got {tuple(x.shape)}"
            )
        unbatched = x.ndim == 2
        x = self._rows_first(x, unbatched)  # (b, l, input_size)
        if reset is not None:
            reset = self._rows_first(reset, unbatched)
        x, after = self.layers(self._project(x), state, reset=reset, lengths=lengths)
        y = self.norm_f(x)  # (b, l, d)
        if unbatched:
            return y[0], after
        return y if self.batch_first else y.transpose(0, 1), after

    @torch.no_grad()
    def step(self, x: Tensor, state: State) -> Tensor:
        """One token per row: x (b, input_size) -> (b, hidden_size). `state` is updated in place. No gradient."""
        return self.norm_f(self.layers.step(self._project(x), state))

    def init_state(
        self,
        b: int,
        *,
        length: int = 0,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> State:
        """The state of `b` fresh sequences, with room for `length` tokens. `dtype`: the compute dtype."""
        return self.layers.init_state(b, length, dtype, device or next(self.parameters()).device)

    def state_bytes(self, length: int, dtype: torch.dtype | None = None) -> int:
        """Bytes of the state of one sequence that has seen `length` tokens, int64 counters left out."""
        return self.layers.state_bytes(length, dtype)

    def flops(self, length: int) -> int:
        """Forward operations on one sequence of `length` tokens, a multiply-add being two; norms are not counted."""
        projection = 0 if self.in_proj is None else 2 * length * self.input_size * self.hidden_size
        return projection + self.layers.flops(length)

    def _project(self, x: Tensor) -> Tensor:
        return x if self.in_proj is None else self.in_proj(x)

    def _rows_first(self, x: Tensor, unbatched: bool) -> Tensor:
        if unbatched:
            return x[None]
        return x if self.batch_first else x.transpose(0, 1)


def _mixer_config(mixer: Any) -> Any:
    if isinstance(mixer, str):
        if mixer not in MIXERS:
            raise UsageError(f"SSM: unknown mixer {mixer!r}.{nearest(mixer, MIXERS)}")
        return MIXERS[mixer].Config()
    check_layers((mixer,), "SSM")
    if mixer.kind not in MIXERS:
        raise UsageError(f"SSM: {mixer.kind!r} carries no state.{nearest(mixer.kind, MIXERS)}")
    return mixer

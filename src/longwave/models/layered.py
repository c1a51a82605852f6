"""What models have in common that lie around layers which carry a state."""

from typing import Protocol

import torch
from torch import Tensor, nn

from longwave.models.state import State


class Layers(Protocol):
    """What lies between the embedding and the last norm: a Stack or a UNet."""

    fingerprint: str

    @property
    def causal(self) -> bool:
        """Whether each token sees only those before it, so that there is a state to go on from."""
        ...

    def __call__(
        self,
        x: Tensor,
        state: State | None = None,
        *,
        reset: Tensor | None = None,
        lengths: Tensor | None = None,
        dt: Tensor | float | None = None,
    ) -> tuple[Tensor, State]: ...

    def step(self, x: Tensor, state: State, dt: Tensor | float | None = None) -> Tensor: ...

    def init_state(
        self, b: int, length: int, dtype: torch.dtype | None, device: torch.device | str | None
    ) -> State: ...

    def state_bytes(self, length: int, dtype: torch.dtype | None) -> int: ...

    def flops(self, length: int) -> int: ...

    def reset_parameters(self) -> None: ...


class Layered(nn.Module):
    """A model around `layers`: what it says of its states is what they say."""

    layers: Layers

    @property
    def fingerprint(self) -> str:
        """Names the configuration and the shapes of the parameters; states carry it."""
        return self.layers.fingerprint

    @property
    def causal(self) -> bool:
        """Whether what is made of a token depends on it and those before it alone; not so with bidirectional layers."""
        return self.layers.causal

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

"""What a mixer is. A protocol, not a base class: each mixer is one file that can be read alone."""

import inspect
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from longwave.config import nearest
from longwave.errors import UsageError

State = TypeVar("State")


class Mixer(Protocol[State]):
    """A layer (b, l, d) -> (b, l, d) that mixes along the sequence and carries a state. Made by `Foo(d_model, config)`.

    A state is a NamedTuple of tensors, batch first. Recurrent states are float32; windows of short convolutions, keys
    and values are in the compute dtype; counters are int64.
    """

    config: Any

    def __call__(
        self, x: Tensor, state: State | None = None, *, reset: Tensor | None = None, lengths: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """x (b, l, d), any l >= 1 -> y (b, l, d) and the state after it, both differentiable.

        `state=None` is a fresh sequence; the state given is never changed. `reset` (b, l) bool: True starts a document,
        which sees nothing before it. `lengths` (b,) int64 in 0..l: tokens from lengths[i] on are padding; they leave
        row i's state alone, and what y holds there is finite and means nothing.
        """
        ...

    def step(self, x: Tensor, state: State) -> Tensor:
        """One token: x (b, d) -> y (b, d). The state is updated in place. No gradient."""
        ...

    def init_state(
        self,
        b: int,
        *,
        length: int = 0,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> State:
        """The state of `b` fresh sequences, all zeros. `length`: tokens to make room for where the state grows.

        `dtype` is the compute dtype: by default autocast's, where it is on, or else that of the weights.
        """
        ...

    def state_bytes(self, length: int, dtype: torch.dtype | None = None) -> int:
        """Bytes of the state of one sequence that has seen `length` tokens; int64 counters are left out."""
        ...

    def flops(self, length: int) -> int:
        """Operations of `forward` on one sequence of `length` tokens; a multiply-add is two.

        Counted: projections, short convolutions, and the recurrence or the attended pairs. Not counted: norms,
        activations, gates, rotary embedding and bias.
        """
        ...

    def reset_parameters(self) -> None:
        """Draw all parameters anew, as the paper has it. Follows `to_empty` on a module made on the meta device."""
        ...


class ChannelMixer(Protocol):
    """A layer (..., d) -> (..., d) that treats each token alone: no state."""

    config: Any

    def __call__(self, x: Tensor) -> Tensor: ...

    def flops(self, length: int) -> int:
        """As `Mixer.flops`."""
        ...

    def reset_parameters(self) -> None: ...


def compute_dtype(weight: Tensor, dtype: torch.dtype | None = None) -> torch.dtype:
    """`dtype` if given; autocast's where it is on for the weight's device; else the weight's."""
    if dtype is not None:
        return dtype
    device = weight.device.type
    if device != "meta" and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return weight.dtype


def takes_dt(mixer: Any) -> bool:
    """Whether a mixer has a rate: its forward takes `dt`, how long each token lasts in steps of its training."""
    return getattr(mixer, "takes_dt", "dt" in inspect.signature(mixer.forward).parameters)


def mixer_class(config: Any, where: str) -> type:
    """The mixer that `config` is a configuration of. Raises UsageError, which begins with `where`, if there is none."""
    from longwave.mixers import MIXERS  # late, because that list holds those who ask too

    kind = getattr(config, "kind", None)
    if kind not in MIXERS or isinstance(config, type):
        raise UsageError(
            f"{where} is {config!r}, which is no mixer's configuration.{nearest(str(kind or config), MIXERS)}"
        )
    return MIXERS[kind]


def check_positive(config: Any, *names: str) -> None:
    """Raise UsageError unless these settings are None or at least 1."""
    for name in names:
        value = getattr(config, name)
        if value is not None and value < 1:
            raise UsageError(f"{config.kind}: {name} must be at least 1, got {value}")


def scaled(x: Tensor, factor: float) -> Tensor:
    """factor x; x itself where the factor is 1."""
    return x if factor == 1 else x * factor


def reset_children(module: nn.Module) -> None:
    """Draw the parameters of the layers inside `module` anew, by their own rules."""
    for child in module.children():
        child.reset_parameters()  # pyright: ignore[reportCallIssue]

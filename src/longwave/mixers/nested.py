"""States nest: a field of a mixer's state is a tensor, the state of a part, a tuple of states, or None."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def map_named(change: Callable[[str, Tensor], Tensor], state: Any, name: str) -> Any:
    """The state with change(name, tensor) in place of every tensor; names are like '<name>.parts.0.ssm'."""
    if state is None:
        return None
    if isinstance(state, Tensor):
        return change(name, state)
    fields = getattr(state, "_fields", range(len(state)))
    parts = (map_named(change, part, f"{name}.{field}") for field, part in zip(fields, state, strict=True))
    return type(state)(*parts) if hasattr(state, "_fields") else tuple(parts)


def map_tensors(change: Callable[[Tensor], Tensor], state: Any) -> Any:
    """The state with change(tensor) in place of every tensor."""
    return map_named(lambda _, tensor: change(tensor), state, "")


def named_tensors(state: Any, name: str) -> dict[str, Tensor]:
    """All tensors by name, in order."""
    found: dict[str, Tensor] = {}

    def note(name: str, tensor: Tensor) -> Tensor:
        found[name] = tensor
        return tensor

    map_named(note, state, name)
    return found


def tensors(state: Any) -> list[Tensor]:
    """All tensors, in order."""
    return list(named_tensors(state, "").values())


def reserve(state: Any, n: int) -> Any:
    """A copy with room for exactly `n` more tokens, in the parts that grow."""
    if hasattr(state, "reserve"):
        return state.reserve(n)
    if type(state) is tuple:
        return tuple(reserve(part, n) for part in state)
    return map_tensors(torch.clone, state)

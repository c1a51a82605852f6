"""The state of a model: what it remembers of the sequences it has seen, as a value to keep, copy, move and save."""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from longwave.config import to_dict
from longwave.errors import LongwaveError
from longwave.mixers.nested import map_named, map_tensors, named_tensors, reserve
from longwave.models.saving import Stored, check_shapes, open_safetensors, write_safetensors


class Stateful(Protocol):
    """A model that makes states: LanguageModel, SaShiMi, Features, or a head on one of these."""

    @property
    def fingerprint(self) -> str: ...

    def init_state(self, b: int, *, length: int = 0, device: torch.device | str | None = None) -> "State": ...

    def parameters(self) -> Iterator[nn.Parameter]: ...


class State(NamedTuple):
    """The state of b sequences. A value: nothing here changes it, only `model.step` does.

    `layers`: for each residual slot its mixer's state, a NamedTuple of tensors, batch first, or of the states of its
    parts; None for a channel mixer.
    `position` (b,) int64: tokens seen. `fingerprint`: the model it belongs to.
    """

    layers: tuple[Any, ...]
    position: Tensor
    fingerprint: str

    def clone(self) -> "State":
        """A copy in new memory, differentiable."""
        return self._map(torch.clone)

    def detach(self) -> "State":
        """The same values cut off from the graph, for truncated backpropagation. Shares memory, as Tensor.detach."""
        return self._map(torch.detach)

    def to(self, device: torch.device | str) -> "State":
        """The state on `device`. Dtypes stay: they are the mixers' choice."""
        return self._map(lambda tensor: tensor.to(device))

    def index_select(self, rows: Tensor | Sequence[int]) -> "State":
        """The state of these rows, in this order, in new memory; a row named twice is forked."""
        index = torch.as_tensor(rows, dtype=torch.int64, device=self.position.device)
        return self._map(lambda tensor: tensor.index_select(0, index))

    def reserve(self, n: int) -> "State":
        """A copy with room for exactly `n` more tokens, in the layers whose state grows (attention)."""
        return State(reserve(self.layers, n), self.position.clone(), self.fingerprint)

    @property
    def nbytes(self) -> int:
        """Bytes held, unused room included and int64 counters left out."""
        return sum(t.nbytes for t in _tensors(self).values() if t.is_floating_point())

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, whole or not at all.

        Its tensors take `model.state_bytes(position)` bytes for each sequence (of the longest one's position, where
        they differ); counters and the fingerprint are in its header. Raises LongwaveError if it cannot be written.
        """
        tensors = _tensors(self.reserve(0))
        counters = {name: tensor.tolist() for name, tensor in tensors.items() if not tensor.is_floating_point()}
        header = {"longwave": "state", "fingerprint": self.fingerprint, "counters": json.dumps(counters)}
        payload = {name: tensor.detach().cpu() for name, tensor in tensors.items() if name not in counters}
        write_safetensors(Path(path), payload, header)

    @staticmethod
    def load(path: str | Path, model: Stateful) -> "State":
        """Read what `save` wrote, onto the model's device and in the dtypes of its states.

        Raises LongwaveError if the file is missing, damaged, no state at all, or the state of another model.
        """
        stored, header = open_safetensors(Path(path))
        if header.get("longwave") != "state":
            raise LongwaveError(f"{path} holds no state; give a file that state.save(path) has written")
        if header.get("fingerprint") != model.fingerprint:
            raise LongwaveError(
                f"{path} is the state of another model: {header.get('fingerprint')}; this one is {model.fingerprint}. "
                "Load the model that it was saved with"
            )
        counters = _read_counters(header, path)
        position = counters.get("position", [])
        expected = model.init_state(len(position), length=max(position, default=0), device="meta")
        return _read(expected, stored, counters, next(model.parameters()).device, str(path))

    def _map(self, change: Callable[[Tensor], Tensor]) -> "State":
        return State(map_tensors(change, self.layers), change(self.position), self.fingerprint)


def entering(state: State | None, fingerprint: str, n: int, like: Tensor) -> tuple[tuple[Any, ...], Tensor]:
    """The states of n layers and the positions (b,) to go on from, for an input like (b, ...); None: from the start.

    Raises ValueError for a state of another model.
    """
    if state is None:
        return (None,) * n, torch.zeros(len(like), dtype=torch.int64, device=like.device)
    if state.fingerprint != fingerprint:
        raise ValueError(f"the state is of another model: {state.fingerprint}; this one is {fingerprint}")
    return state.layers, state.position


def fingerprint(config: Any, model: nn.Module) -> str:
    """Names a model by its configuration and the shapes of its parameters; the same whatever their values and dtype.

    Readable in its first part: '4x mamba2, d_model 256: 1f0c9e...'.
    """
    settings = to_dict(config)
    shapes = [(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()]
    digest = hashlib.sha256(json.dumps([settings, shapes], sort_keys=True).encode()).hexdigest()[:16]
    kinds = [layer["kind"] for layer in settings["layers"]]
    counts = ", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds))
    return f"{counts}, d_model {settings['d_model']} ({digest})"


def _tensors(state: State) -> dict[str, Tensor]:
    """All tensors by name, such as 'layers.3.ssm'."""
    return {"position": state.position, **named_tensors(state.layers, "layers")}


def _read_counters(header: Mapping[str, str], path: str | Path) -> dict[str, list[int]]:
    try:
        counters = json.loads(header["counters"])
        return {name: [int(count) for count in counts] for name, counts in counters.items()}
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise LongwaveError(f"{path} is damaged: its counters cannot be read; copy the file again") from error


def _read(
    expected: State, stored: Mapping[str, Stored], counters: Mapping[str, list[int]], device: torch.device, where: str
) -> State:
    """The state with the names, shapes and dtypes of `expected`, and the values of the file."""
    shapes = {name: tuple(tensor.shape) for name, tensor in _tensors(expected).items()}
    found = {name: tensor.shape for name, tensor in stored.items()}
    check_shapes(shapes, found | {name: (len(counts),) for name, counts in counters.items()}, where)

    def read(name: str, like: Tensor) -> Tensor:
        if name in counters:
            return torch.tensor(counters[name], dtype=like.dtype, device=device)
        tensor = stored[name].read()
        return torch.empty(tensor.shape, dtype=like.dtype, device=device).copy_(tensor)

    layers = map_named(read, expected.layers, "layers")
    return State(layers, read("position", expected.position), expected.fingerprint)

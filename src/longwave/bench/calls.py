"""How a contender is called: forward, backward, both in one, and once for its results."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longwave.mixers.nested import map_tensors, named_tensors

Inputs = dict[str, Any]
Contender = Callable[..., Tensor]


@dataclass(frozen=True)
class Adapted:
    """A library's function behind the arguments of our operator.

    `native(**inputs)`, differentiable, gives the arguments that `call` takes, in the layout and the parametrisation
    that suit it best. Only `call` is timed.
    """

    native: Callable[..., Inputs]
    call: Callable[..., Tensor]

    def __call__(self, **inputs: Any) -> Tensor:
        return self.call(**self.native(**inputs))


class Outcome(NamedTuple):
    """Results by name, and the seconds that forward and backward took, None without a backward."""

    results: dict[str, Tensor]
    forward: float
    backward: float | None


def forward(contender: Contender, inputs: Sequence[Inputs]) -> Callable[[int], object]:
    """The i-th call, on inputs that take turns."""
    call, inputs = _as_it_likes(contender, inputs)

    @torch.inference_mode()
    def run(i: int) -> Tensor:
        return call(**inputs[i % len(inputs)])

    return run


def forward_for_training(contender: Contender, inputs: Sequence[Inputs]) -> Callable[[int], object]:
    """As `forward`, with what a backward would need kept."""
    call, inputs = _as_it_likes(contender, inputs)
    leaves = [_with_gradients(kwargs)[0] for kwargs in inputs]

    def run(i: int) -> Tensor:
        return call(**leaves[i % len(leaves)])

    return run


def forward_and_backward(contender: Contender, inputs: Sequence[Inputs]) -> Callable[[int], object]:
    """As `forward`, with the gradients of every tensor that goes in."""
    call, inputs = _as_it_likes(contender, inputs)
    leaves = [_with_gradients(kwargs) for kwargs in inputs]
    with torch.no_grad():
        dy = torch.ones_like(call(**inputs[0]))

    def run(i: int) -> object:
        kwargs, wanted = leaves[i % len(leaves)]
        return torch.autograd.grad(call(**kwargs), list(wanted.values()), dy)

    return run


def backward(contender: Contender, inputs: Sequence[Inputs]) -> Callable[[int], object]:
    """The gradients alone: the forward of each of the inputs is done the first time that its turn comes."""
    call, inputs = _as_it_likes(contender, inputs)
    done: dict[int, tuple[Tensor, Tensor, list[Tensor]]] = {}

    def run(i: int) -> object:
        turn = i % len(inputs)
        if turn not in done:
            kwargs, wanted = _with_gradients(inputs[turn])
            y = call(**kwargs)
            done[turn] = y, torch.randn_like(y), list(wanted.values())
        y, dy, leaves = done[turn]
        return torch.autograd.grad(y, leaves, dy, retain_graph=True)

    return run


def outcome(contender: Contender, inputs: Inputs, *, backward: bool) -> Outcome:
    """y, and the new state of a step or the gradients of a weighted sum of y. `inputs` stay as they are."""
    kwargs, leaves = _with_gradients(inputs) if backward else (_cloned(inputs), {})
    clock = _Clock(next(value.device for value in kwargs.values() if isinstance(value, Tensor)))
    with torch.inference_mode(not backward):
        y = contender(**kwargs)
    forward_seconds = clock.lap()
    if not backward:
        return Outcome({"y": y} | named_tensors(kwargs.get("state"), "state"), forward_seconds, None)
    weights = torch.linspace(-1, 1, y.numel(), device=y.device, dtype=y.dtype).reshape(y.shape)
    clock.lap()
    gradients = torch.autograd.grad(y, list(leaves.values()), weights)
    backward_seconds = clock.lap()
    named = {f"the gradient of {name}": g for name, g in zip(leaves, gradients, strict=True)}
    return Outcome({"y": y.detach()} | named, forward_seconds, backward_seconds)


class _Clock:
    """Seconds since the last lap, with the work on a GPU done."""

    def __init__(self, device: torch.device):
        self._device = device
        self.lap()

    def lap(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        started, self._last = getattr(self, "_last", 0.0), time.perf_counter()
        return self._last - started


@torch.no_grad()
def _as_it_likes(contender: Contender, inputs: Sequence[Inputs]) -> tuple[Contender, Sequence[Inputs]]:
    """What is timed, and its own form of the inputs."""
    if isinstance(contender, Adapted):
        return contender.call, [contender.native(**_cloned(kwargs)) for kwargs in inputs]
    return contender, inputs


def _cloned(inputs: Inputs) -> Inputs:
    return {
        key: map_tensors(torch.clone, value) if isinstance(value, Tensor) or key == "state" else value
        for key, value in inputs.items()
    }


def _with_gradients(inputs: Inputs) -> tuple[Inputs, dict[str, Tensor]]:
    fresh = _cloned(inputs)
    return fresh, {key: value.requires_grad_() for key, value in fresh.items() if isinstance(value, Tensor)}

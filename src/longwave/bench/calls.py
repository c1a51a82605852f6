"""How a contender is called: forward, forward and backward, and once for its results."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from longwave.mixers.nested import map_tensors, tensors

Inputs = dict[str, Any]
Contender = Callable[..., Tensor]


def forward(call: Contender, inputs: Sequence[Inputs]) -> Callable[[int], object]:
    """The i-th call, on inputs that take turns."""

    @torch.inference_mode()
    def run(i: int) -> Tensor:
        return call(**inputs[i % len(inputs)])

    return run


def forward_and_backward(call: Contender, inputs: Sequence[Inputs]) -> Callable[[int], object]:
    """As `forward`, with the gradients of every tensor that goes in."""
    leaves = [_with_gradients(kwargs) for kwargs in inputs]
    with torch.no_grad():
        dy = torch.ones_like(call(**inputs[0]))

    def run(i: int) -> object:
        kwargs, tensors = leaves[i % len(leaves)]
        return torch.autograd.grad(call(**kwargs), tensors, dy)

    return run


def outcome(call: Contender, inputs: Inputs, *, backward: bool) -> tuple[list[Tensor], float]:
    """y, and the new state of a step or the gradients of a weighted sum of y; and the seconds that took.

    `inputs` stay as they are.
    """
    kwargs, leaves = _with_gradients(inputs) if backward else (_cloned(inputs), [])
    started = time.perf_counter()
    with torch.inference_mode(not backward):
        y = call(**kwargs)
    if backward:
        weights = torch.linspace(-1, 1, y.numel()).reshape(y.shape)
        results = [y.detach(), *torch.autograd.grad(y, leaves, weights)]
    else:
        results = [y, *tensors(kwargs.get("state"))]
    return results, time.perf_counter() - started


def _cloned(inputs: Inputs) -> Inputs:
    return {
        key: map_tensors(torch.clone, value) if isinstance(value, Tensor) or key == "state" else value
        for key, value in inputs.items()
    }


def _with_gradients(inputs: Inputs) -> tuple[Inputs, list[Tensor]]:
    fresh = _cloned(inputs)
    leaves = [value.requires_grad_() for value in fresh.values() if isinstance(value, Tensor)]
    return fresh, leaves

"""Find the module in which a loss or a gradient stopped being finite."""

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn


def first_nonfinite(model: nn.Module, backward: Callable[[], object]) -> str:
    """Run `backward` (forward passes and loss.backward()) again under hooks and say where the trouble begins.

    The innermost module whose output is the first not to be finite; else the module through which the gradient first
    goes bad. Slow, and leaves gradients behind: for use when the run is over anyway.
    """
    found: list[str] = []
    names = {module: name or "the model" for name, module in model.named_modules()}

    def say(module: nn.Module, what: str) -> None:
        if not found:
            found.append(f"{names[module]} ({type(module).__name__}): {what}{_bad_parameters(module)}")

    def after_forward(module: nn.Module, inputs: Any, output: Any) -> None:
        if not _finite(output):
            say(module, f"its output holds {_kind(output)}" + ("" if _finite(inputs) else ", as does its input"))

    def after_backward(module: nn.Module, grad_input: Any, grad_output: Any) -> None:
        if _finite(grad_output) and not _finite(grad_input):
            say(module, f"the gradient of its input holds {_kind(grad_input)}, that of its output does not")

    def on_parameter(name: str, parameter: nn.Parameter) -> None:
        if not found and not _finite(parameter.grad):
            found.append(f"the gradient of {name} holds {_kind(parameter.grad)}")

    handles = [hook for module in names for hook in (
        module.register_forward_hook(after_forward), module.register_full_backward_hook(after_backward),
    )]  # fmt: skip
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.grad = None
            hook = parameter.register_post_accumulate_grad_hook(lambda p, name=name: on_parameter(name, p))
            handles.append(hook)
    try:
        with warnings.catch_warnings():
            # torch warns about the embedding, whose input (tokens) takes no gradient
            warnings.filterwarnings("ignore", message="Full backward hook is firing")
            backward()
    finally:
        for handle in handles:
            handle.remove()
    return (
        found[0] if found else "no module: every module's output and gradient is finite, so the loss itself overflowed"
    )


def _bad_parameters(module: nn.Module) -> str:
    bad = [name for name, parameter in module.named_parameters() if not _finite(parameter)]
    return f"; not finite in it: {', '.join(bad)}" if bad else ""


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)


def _finite(value: Any) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in _tensors(value))


def _kind(value: Any) -> str:
    return "NaN" if any(bool(torch.isnan(tensor).any()) for tensor in _tensors(value)) else "infinity"

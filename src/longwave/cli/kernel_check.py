"""Every kernel against its reference in float64: on the CPU, whole sequences and token by token; on a GPU, gradients
too, in bfloat16 and blocks of the sizes that models have, which are what its fastest forms are written for.
"""

import importlib
import inspect
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from longwave.mixers.nested import map_tensors, named_tensors
from longwave.ops import OPS
from longwave.ops.linear_step import linear_step
from longwave.ops.register import has_gpu_kernel, kernels_launched
from longwave.ops.ssm_kernel import vandermonde_kernel

SHAPE = 1  # of each operator's samples: with an odd length and all its options
GPU_SHAPES: dict[str, dict[str, Any]] = {
    "causal_conv1d": {"b": 2, "l": 130, "e": 256, "w": 4, "activation": "silu"},
    "diagonal_scan": {"b": 2, "l": 130, "e": 64, "n": 32},
    "fft_conv": {"b": 2, "l": 300, "e": 64, "k": 300, "D": True},
    "gated_rms_norm": {"b": 2, "l": 60, "e": 1536, "gate": True},
    "mamba3_scan": {"b": 2, "l": 130, "h": 8, "p": 64, "r": 1, "g": 1, "n": 128, "s": 32, "z": True},
    "selective_scan": {"b": 2, "l": 130, "e": 128, "n": 16, "dt_softplus": True},
    "ssd": {"b": 2, "l": 130, "h": 8, "p": 64, "g": 1, "n": 128, "dt_softplus": True},
    "ssm_kernel": {"m": 1, "e": 64, "n": 32, "l": 1000},
}

Results = dict[str, Tensor]


@dataclass(frozen=True)
class Check:
    """The norm of a kernel's error, beside twice that of the reference in the same dtype and one rounding.

    Of the result, output or gradient, whose error takes the largest part of what it is allowed.
    """

    name: str
    error: float
    allowed: float
    seconds: float
    """Of the first call, in which the kernel is compiled or read from a cache."""
    form: str = "Numba"
    worst: str = "y"

    @property
    def ok(self) -> bool:
        return self.error <= self.allowed  # not so for NaN


def check_kernels(device: torch.device) -> Iterator[Check]:
    """One after another, as they are done: every operator that has a kernel there, and every form for single tokens."""
    for name, op in (OPS | {"linear_step": linear_step, "ssm_kernel": vandermonde_kernel}).items():
        if device.type == "cuda":
            if name in GPU_SHAPES and has_gpu_kernel(op.__name__):
                yield _check_on_gpu(name, op, device)
        else:
            yield _check_on_cpu(name, op)
        step = getattr(importlib.import_module(f"longwave.ops.{name}"), f"{name}_step", None)
        if step and (device.type != "cuda" or has_gpu_kernel(f"{name}_step")):
            yield _check_step(name, op, step, device)


def _check_on_cpu(name: str, op: Callable[..., Any]) -> Check:
    inputs = _sample(name, torch.float32, torch.device("cpu"))
    return _compare(name, partial(_outputs, op), partial(_outputs, op, impl="reference"), inputs)


def _check_on_gpu(name: str, op: Callable[..., Any], device: torch.device) -> Check:
    inputs = _sample(name, torch.bfloat16, device, GPU_SHAPES[name])
    return _compare(name, partial(_gradients, op), partial(_gradients, op, impl="reference"), inputs)


def _check_step(name: str, op: Callable[..., Any], step: Callable[..., Tensor], device: torch.device) -> Check:
    """A step over the tokens of a sequence gives what the reference gives for the whole."""
    inputs = _sample(name, torch.float32, device)
    reference = partial(_outputs, op, impl="reference")
    return _compare(f"{name}_step", partial(_token_by_token, step, op), reference, inputs)


def _sample(name: str, dtype: torch.dtype, device: torch.device, shape: dict[str, Any] | None = None) -> dict[str, Any]:
    samples = importlib.import_module(f"longwave.ops.{name}.samples")
    return samples.make(shape or samples.SHAPES[SHAPE], dtype, str(device))


def _compare(
    name: str, kernel: Callable[..., Results], reference: Callable[..., Results], inputs: dict[str, Any]
) -> Check:
    device, dtype = next((value.device, value.dtype) for value in inputs.values() if isinstance(value, Tensor))
    double = {key: value.double() if _is_float(value) else value for key, value in inputs.items()}
    truth, same = reference(**double), reference(**inputs)
    op, cached = name.removesuffix("_step"), kernels_launched(name.removesuffix("_step"))
    _finish(device)
    started = time.perf_counter()
    found = kernel(**inputs)
    _finish(device)
    seconds = time.perf_counter() - started
    budget = {}
    for what, value in truth.items():
        rounding = torch.finfo(dtype).eps * value.norm().item()
        budget[what] = _distance(found[what], value), 2 * _distance(same[what], value) + rounding
    worst = max(budget, key=lambda what: _excess(*budget[what]))
    launched = kernels_launched(op)
    form = " and ".join(sorted({form for form, _ in launched - cached or launched})) or "torch"
    error, allowed = budget[worst]
    return Check(name, error, allowed, seconds, form if device.type == "cuda" else "Numba", worst)


def _excess(error: float, allowed: float) -> float:
    """How much of what is allowed an error takes; NaN is the most."""
    if math.isnan(error):
        return math.inf
    return error / allowed if allowed else math.copysign(math.inf, error) if error else 0.0


@torch.no_grad()
def _outputs(op: Callable[..., Any], **inputs: Any) -> Results:
    return named_tensors(op(**inputs), "result")


def _gradients(op: Callable[..., Any], **inputs: Any) -> Results:
    """All outputs, and the gradients of a weighted sum of them."""
    leaves = {key: value.clone().requires_grad_() for key, value in inputs.items() if _is_float(value)}
    outputs = named_tensors(op(**(inputs | leaves)), "result")
    weights = [torch.linspace(-1, 1, y.numel(), device=y.device).view(y.shape).to(y.dtype) for y in outputs.values()]
    gradients = torch.autograd.grad(list(outputs.values()), list(leaves.values()), weights)
    named = {f"the gradient of {key}": gradient for key, gradient in zip(leaves, gradients, strict=True)}
    return {key: y.detach() for key, y in outputs.items()} | named


@torch.no_grad()
def _token_by_token(step: Callable[..., Tensor], op: Callable[..., Any], **inputs: Any) -> Results:
    """All outputs of a step over the tokens of a sequence, and the state after them, which begins at 0."""
    b, l = next(iter(inputs.values())).shape[:2]  # of the sequence, the first argument everywhere
    known = {key: value for key, value in inputs.items() if key in inspect.signature(step).parameters}
    along = {key for key, value in known.items() if isinstance(value, Tensor) and value.shape[:2] == (b, l)}
    state, outputs = map_tensors(torch.zeros_like, op(**inputs, impl="reference")[1]), []
    for i in range(l):
        outputs.append(step(state, **{key: value[:, i] if key in along else value for key, value in known.items()}))
    return named_tensors((torch.stack(outputs, 1), state), "result")


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _distance(found: Tensor, truth: Tensor) -> float:
    return (found.double() - truth).norm().item()


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()

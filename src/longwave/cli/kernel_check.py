"""Every kernel, for whole sequences and token by token, against its reference in float64."""

import importlib
import inspect
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from longwave.mixers.nested import map_tensors, tensors
from longwave.ops import OPS
from longwave.ops.linear_step import linear_step
from longwave.ops.ssm_kernel import vandermonde_kernel

SHAPE = 1  # of each operator's samples: with an odd length and all its options


@dataclass(frozen=True)
class Check:
    """The norm of a kernel's error, beside twice that of the reference in float32 and one rounding."""

    name: str
    error: float
    allowed: float
    seconds: float
    """Of the first call, in which the kernel is compiled or read from Numba's cache."""

    @property
    def ok(self) -> bool:
        return self.error <= self.allowed  # not so for NaN


def check_kernels() -> Iterator[Check]:
    """One after another, as they are done: every operator, and every form for a single token."""
    for name, op in (OPS | {"linear_step": linear_step, "ssm_kernel": vandermonde_kernel}).items():
        samples = importlib.import_module(f"longwave.ops.{name}.samples")
        inputs = samples.make(samples.SHAPES[SHAPE], torch.float32)
        double = {key: value.double() if _is_float(value) else value for key, value in inputs.items()}
        with torch.no_grad():
            truth, same = op(**double, impl="reference"), op(**inputs, impl="reference")
            yield _compare(name, op, inputs, truth, same)
            if step := getattr(importlib.import_module(f"longwave.ops.{name}"), f"{name}_step", None):
                yield _compare(f"{name}_step", partial(_token_by_token, step, same[1]), inputs, truth, same)


def _compare(name: str, kernel: Callable[..., Any], inputs: dict[str, Any], truth: Any, same: Any) -> Check:
    """`same` is the reference's result in the dtype of the inputs, `truth` that in float64."""
    started = time.perf_counter()
    found = kernel(**inputs)
    seconds = time.perf_counter() - started
    rounding = torch.finfo(torch.float32).eps * sum(tensor.norm().item() for tensor in tensors(truth))
    return Check(name, _distance(found, truth), 2 * _distance(same, truth) + rounding, seconds)


def _token_by_token(step: Callable[..., Tensor], final: Any, **inputs: Any) -> tuple[Tensor, Any]:
    """All outputs of a step over the tokens of a sequence, and the state after them, which begins at 0."""
    b, l = next(iter(inputs.values())).shape[:2]  # of the sequence, the first argument everywhere
    known = {key: value for key, value in inputs.items() if key in inspect.signature(step).parameters}
    along = {key for key, value in known.items() if isinstance(value, Tensor) and value.shape[:2] == (b, l)}
    state, outputs = map_tensors(torch.zeros_like, final), []
    for i in range(l):
        outputs.append(step(state, **{key: value[:, i] if key in along else value for key, value in known.items()}))
    return torch.stack(outputs, 1), state


def _distance(found: Any, truth: Any) -> float:
    pairs = zip(tensors(found), tensors(truth), strict=True)
    return sum((a.double() - b).norm().item() for a, b in pairs)


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()

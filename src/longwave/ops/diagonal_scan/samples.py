"""Inputs for tests and benchmarks."""

import math
from typing import Any

import torch
from torch import Tensor

from longwave.ops.checks import state_dtype

SHAPES: tuple[dict[str, Any], ...] = (
    {"b": 2, "l": 1, "e": 5, "n": 3},
    {"b": 2, "l": 63, "e": 24, "n": 16},
    {"b": 1, "l": 100, "e": 70, "n": 4, "D": False, "method": "bilinear", "regular": True},
    {"b": 3, "l": 5, "e": 8, "n": 1, "method": "euler"},
    {"b": 2, "l": 40, "e": 3, "n": 5, "method": "dirac", "regular": True},
    {"b": 2, "l": 33, "e": 1, "n": 67, "states": True},
)


def make(shape: dict[str, Any], dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> dict[str, Any]:
    """Modes of S4D-Lin and step sizes about 0.05, one for all tokens of a channel if `regular`. With `states`, the form
    that has them come out. A, B, C and D are float32 at least.
    """
    g = torch.Generator().manual_seed(seed)
    b, l, e, n = (shape[key] for key in "blen")
    dt = 0.05 * torch.randn(b, 1 if shape.get("regular") else l, e, generator=g).exp()
    A = torch.stack([-0.5 - torch.rand(e, n, generator=g), math.pi * torch.arange(n).expand(e, n)], dim=-1)
    states, parameters = shape.get("states", False), state_dtype(dtype)
    u = torch.randn(b, l, e, *((n, 2) if states else ()), generator=g)
    return {
        "u": u.to(device, dtype),
        "dt": dt.expand(b, l, e).to(device, dtype),
        "A": A.to(device, parameters),
        "B": None if states else torch.randn(e, n, 2, generator=g).to(device, parameters),
        "C": None if states else torch.randn(e, n, 2, generator=g).to(device, parameters),
        "D": None if states or not shape.get("D", True) else torch.randn(e, generator=g).to(device, parameters),
        "method": shape.get("method", "zoh"),
    }


def initial_state(shape: dict[str, Any], dtype: torch.dtype, device: str = "cpu", seed: int = 1) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape["b"], shape["e"], shape["n"], 2, generator=g).to(device, state_dtype(dtype))

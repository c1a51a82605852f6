"""Inputs for tests and benchmarks."""

from typing import Any

import torch
from torch import Tensor

SHAPES: tuple[dict[str, Any], ...] = (
    {"b": 2, "l": 1, "e": 5, "w": 4},
    {"b": 2, "l": 63, "e": 24, "w": 4, "activation": "silu"},
    {"b": 1, "l": 100, "e": 70, "w": 3, "bias": False},
    {"b": 3, "l": 2, "e": 8, "w": 2, "activation": "silu"},
)


def make(shape: dict[str, Any], dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> dict[str, Any]:
    g = torch.Generator().manual_seed(seed)
    b, l, e, w = (shape[key] for key in "blew")
    return {
        "x": torch.randn(b, l, e, generator=g).to(device, dtype),
        "weight": (torch.randn(e, w, generator=g) / w**0.5).to(device, dtype),
        "bias": torch.randn(e, generator=g).to(device, dtype) if shape.get("bias", True) else None,
        "activation": shape.get("activation"),
    }


def initial_state(shape: dict[str, Any], dtype: torch.dtype, device: str = "cpu", seed: int = 1) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape["b"], shape["w"] - 1, shape["e"], generator=g).to(device, dtype)

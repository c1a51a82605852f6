"""Inputs for tests and benchmarks."""

from typing import Any

import torch
from torch import Tensor

SHAPES: tuple[dict[str, Any], ...] = (
    {"b": 2, "l": 1, "e": 3, "k": 5},
    {"b": 2, "l": 63, "e": 20, "k": 63, "D": True},
    {"b": 1, "l": 100, "e": 17, "k": 7, "D": True, "chunk_len": 16},
    {"b": 3, "l": 6, "e": 16, "k": 29},
    {"b": 2, "l": 40, "e": 2, "k": 1, "D": True},
)


def make(shape: dict[str, Any], dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> dict[str, Any]:
    g = torch.Generator().manual_seed(seed)
    b, l, e, k = (shape[key] for key in "blek")
    return {
        "x": torch.randn(b, l, e, generator=g).to(device, dtype),
        "kernel": (torch.randn(e, k, generator=g) / k**0.5).to(device, dtype),
        "D": torch.randn(e, generator=g).to(device, dtype) if shape.get("D") else None,
        "chunk_len": shape.get("chunk_len"),
    }


def initial_state(shape: dict[str, Any], dtype: torch.dtype, device: str = "cpu", seed: int = 1) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape["b"], shape["k"] - 1, shape["e"], generator=g).to(device, dtype)

"""Inputs for tests and benchmarks."""

from typing import Any

import torch

SHAPES: tuple[dict[str, Any], ...] = (
    {"b": 1, "k": 7, "n": 5},
    {"b": 1, "k": 96, "n": 201, "bias": True},
    {"b": 3, "k": 130, "n": 33},
    {"b": 9, "k": 64, "n": 40, "bias": True},
)


def make(shape: dict[str, Any], dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> dict[str, Any]:
    g = torch.Generator().manual_seed(seed)
    b, k, n = shape["b"], shape["k"], shape["n"]
    return {
        "x": torch.randn(b, k, generator=g).to(device, dtype),
        "weight": (torch.randn(n, k, generator=g) / k**0.5).to(device, dtype),
        "bias": torch.randn(n, generator=g).to(device, dtype) if shape.get("bias") else None,
    }

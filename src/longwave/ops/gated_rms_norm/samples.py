"""Inputs for tests and benchmarks."""

from typing import Any

import torch
from torch import Tensor

SHAPES: tuple[dict[str, Any], ...] = (
    {"b": 2, "l": 1, "e": 5},
    {"b": 2, "l": 63, "e": 48, "gate": True},
    {"b": 1, "l": 100, "e": 30, "gate": True, "group_size": 10, "norm_before_gate": True},
    {"b": 3, "l": 2, "e": 24, "gate": True, "weight": False, "group_size": 12},
    {"b": 2, "l": 7, "e": 64, "weight": False},
)


def make(shape: dict[str, Any], dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> dict[str, Any]:
    """The weight is float32 beside 16-bit activations."""
    generator = torch.Generator().manual_seed(seed)
    b, l, e = (shape[key] for key in "ble")
    parameter = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    return {
        "x": normal(b, l, e).to(device, dtype),
        "weight": (1 + normal(e) / 4).to(device, parameter) if shape.get("weight", True) else None,
        "z": normal(b, l, e).to(device, dtype) if shape.get("gate") else None,
        "eps": 1e-5,
        "group_size": shape.get("group_size"),
        "norm_before_gate": shape.get("norm_before_gate", False),
    }

"""Inputs for tests and benchmarks."""

from typing import Any

import torch
from torch import Tensor

SHAPES: tuple[dict[str, Any], ...] = (
    {"b": 2, "l": 1, "h": 2, "p": 4, "g": 1, "n": 5, "D": None},
    {"b": 2, "l": 63, "h": 4, "p": 8, "g": 2, "n": 16, "dt_softplus": True},
    {
        "b": 1,
        "l": 100,
        "h": 3,
        "p": 5,
        "g": 1,
        "n": 7,
        "dt_softplus": True,
        "D": "hp",
        "dt_limit": (0.01, 0.3),
    },
    {"b": 2, "l": 37, "h": 4, "p": 6, "g": 4, "n": 3, "dt_bias": False, "chunk_len": 8},
)


def make(shape: dict[str, Any], dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> dict[str, Any]:
    """Keyword arguments of `ssd`. Parameters are float32 beside 16-bit activations."""
    generator = torch.Generator().manual_seed(seed)
    b, l, h, p, g, n = (shape[key] for key in ("b", "l", "h", "p", "g", "n"))
    parameter = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    def uniform(low: float, high: float, *size: int) -> Tensor:
        return low + (high - low) * torch.rand(*size, generator=generator)

    steps = uniform(0.001, 0.1, h).log() if shape.get("dt_softplus") else uniform(0.0, 0.05, h)
    D = {None: None, "h": (h,), "hp": (h, p)}[shape.get("D", "h")]
    softplus = shape.get("dt_softplus", False)
    return {
        "x": normal(b, l, h, p).to(device, dtype),
        "dt": (normal(b, l, h) if softplus else uniform(0.001, 0.1, b, l, h)).to(device, dtype),
        "A": -uniform(1.0, 16.0, h).to(device, parameter),
        "B": normal(b, l, g, n).to(device, dtype),
        "C": normal(b, l, g, n).to(device, dtype),
        "D": None if D is None else normal(*D).to(device, parameter),
        "dt_bias": steps.to(device, parameter) if shape.get("dt_bias", True) else None,
        "dt_softplus": softplus,
        "dt_limit": shape.get("dt_limit", (0.0, float("inf"))),
        "chunk_len": shape.get("chunk_len"),
    }


def initial_state(shape: dict[str, Any], dtype: torch.dtype, device: str = "cpu", seed: int = 1) -> Tensor:
    """A state (b, h, p, n) in the dtype of states: float32, or float64 for float64."""
    generator = torch.Generator().manual_seed(seed)
    state = torch.randn(*(shape[key] for key in ("b", "h", "p", "n")), generator=generator)
    return state.to(device, torch.float64 if dtype == torch.float64 else torch.float32)

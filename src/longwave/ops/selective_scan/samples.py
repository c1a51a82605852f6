"""Inputs for tests and benchmarks."""

from typing import Any

import torch
from torch import Tensor

from longwave.ops.checks import state_dtype

SHAPES: tuple[dict[str, Any], ...] = (
    {"b": 2, "l": 1, "e": 5, "n": 3},
    {"b": 2, "l": 63, "e": 24, "n": 16, "dt_softplus": True},
    {"b": 1, "l": 100, "e": 70, "n": 4, "D": False, "dt_bias": False},
    {"b": 3, "l": 5, "e": 8, "n": 1, "z": False, "dt_softplus": True},
)


def make(shape: dict[str, Any], dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> dict[str, Any]:
    """Step sizes about 0.1 and A = -1..-n, as a fresh Mamba layer has them; A, D and dt_bias float32 at least."""
    g = torch.Generator().manual_seed(seed)
    b, l, e, n = (shape[key] for key in "blen")
    dt_softplus = shape.get("dt_softplus", False)
    dt = 0.1 * torch.randn(b, l, e, generator=g).exp()
    if dt_softplus:
        dt = dt.expm1().log()
    A = -torch.arange(1, n + 1, dtype=torch.float32) * (0.5 + torch.rand(e, 1, generator=g))
    parameters = state_dtype(dtype)
    return {
        "x": torch.randn(b, l, e, generator=g).to(device, dtype),
        "dt": dt.to(device, dtype),
        "A": A.to(device, parameters),
        "B": torch.randn(b, l, n, generator=g).to(device, dtype),
        "C": torch.randn(b, l, n, generator=g).to(device, dtype),
        "D": torch.randn(e, generator=g).to(device, parameters) if shape.get("D", True) else None,
        "z": torch.randn(b, l, e, generator=g).to(device, dtype) if shape.get("z", True) else None,
        "dt_bias": ((0.1 * torch.rand(e, generator=g)).to(device, parameters) if shape.get("dt_bias", True) else None),
        "dt_softplus": dt_softplus,
    }


def initial_state(shape: dict[str, Any], dtype: torch.dtype, device: str = "cpu", seed: int = 1) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape["b"], shape["e"], shape["n"], generator=g).to(device, state_dtype(dtype))

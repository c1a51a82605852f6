"""Inputs for tests and benchmarks."""

from typing import Any

import torch
from torch import Tensor

from longwave.ops.mamba3_scan.api import Mamba3ScanState

SHAPES: tuple[dict[str, Any], ...] = (
    {"b": 2, "l": 1, "h": 2, "p": 4, "r": 1, "g": 1, "n": 5, "s": 1, "D": False, "bias": False},
    {"b": 2, "l": 63, "h": 4, "p": 8, "r": 1, "g": 2, "n": 16, "s": 4, "z": True, "chunk_len": 16},
    {"b": 1, "l": 50, "h": 6, "p": 5, "r": 2, "g": 1, "n": 8, "s": 4, "z": True, "mimo": True, "pairs": "halves"},
    {"b": 2, "l": 19, "h": 2, "p": 3, "r": 3, "g": 2, "n": 6, "s": 1, "pairs": "halves", "chunk_len": 8},
)


def make(shape: dict[str, Any], dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> dict[str, Any]:
    """Keyword arguments of `mamba3_scan`. Parameters are float32 beside 16-bit activations."""
    generator = torch.Generator().manual_seed(seed)
    b, l, h, p, r, g, n, s = (shape[key] for key in ("b", "l", "h", "p", "r", "g", "n", "s"))
    exact = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(*size: int, wanted: bool = True, dtype: torch.dtype = dtype) -> Tensor | None:
        return torch.randn(*size, generator=generator).to(device, dtype) if wanted else None

    def uniform(low: float, high: float, *size: int) -> Tensor:
        return (low + (high - low) * torch.rand(*size, generator=generator)).to(device, exact)

    bias, mimo, z = shape.get("bias", True), shape.get("mimo", False), shape.get("z", False)
    return {
        "x": normal(b, l, h, p),
        "dt": uniform(0.001, 0.5, b, l, h),
        "A": -uniform(0.01, 2.0, b, l, h),
        "B": normal(b, l, r, g, n),
        "C": normal(b, l, r, g, n),
        "trap": uniform(0.05, 0.95, b, l, h),
        "angles": uniform(-3.0, 3.0, b, l, s),
        "B_bias": normal(h, r, n, wanted=bias, dtype=exact),
        "C_bias": normal(h, r, n, wanted=bias, dtype=exact),
        "D": normal(h, wanted=shape.get("D", True), dtype=exact),
        "mimo_x": normal(h, r, p, wanted=mimo, dtype=exact),
        "z": normal(b, l, h, p, wanted=z),
        "mimo_z": normal(h, r, p, wanted=mimo and z, dtype=exact),
        "mimo_o": normal(h, r, p, wanted=mimo, dtype=exact),
        "pairs": shape.get("pairs", "adjacent"),
        "chunk_len": shape.get("chunk_len"),
    }


def initial_state(shape: dict[str, Any], dtype: torch.dtype, device: str = "cpu", seed: int = 1) -> Mamba3ScanState:
    """A state as `mamba3_scan` returns it for x of this dtype."""
    generator = torch.Generator().manual_seed(seed)
    b, h, p, r, n, s = (shape[key] for key in ("b", "h", "p", "r", "n", "s"))
    exact = torch.float64 if dtype == torch.float64 else torch.float32

    def normal(*size: int, dtype: torch.dtype) -> Tensor:
        return torch.randn(*size, generator=generator).to(device, dtype)

    return Mamba3ScanState(
        normal(b, h, s, dtype=exact),
        normal(b, h, p, n, dtype=exact),
        normal(b, r, h, n, dtype=dtype),
        normal(b, h, p, dtype=dtype),
    )

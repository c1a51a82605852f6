"""Inputs for tests and benchmarks."""

from typing import Any

import torch

SHAPES: tuple[dict[str, Any], ...] = (
    {"n": 1, "v": 5},
    {"n": 37, "v": 1000},
    {"n": 3, "v": 10007},
)


def make(shape: dict[str, Any], dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> dict[str, Any]:
    """One row in seven is ignored, unless there is only one."""
    g = torch.Generator().manual_seed(seed)
    n, v = shape["n"], shape["v"]
    targets = torch.randint(v, (n,), generator=g)
    targets[1::7] = -100
    return {"logits": (3 * torch.randn(n, v, generator=g)).to(device, dtype), "targets": targets.to(device)}

"""Inputs for tests and benchmarks: modes as a fresh S4D layer has them."""

import math
from typing import Any

import torch

from longwave.ops.checks import state_dtype

SHAPES: tuple[dict[str, Any], ...] = (
    {"m": 1, "e": 5, "n": 3, "l": 1},
    {"m": 2, "e": 7, "n": 4, "l": 333},
    {"m": 1, "e": 2, "n": 33, "l": 130},
)


def make(shape: dict[str, Any], dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> dict[str, Any]:
    """For `vandermonde_kernel`: S4D-Lin, whose k-th mode turns k pi and decays by 1/2 in a unit of time, and step
    sizes from 0.001 to 0.1.
    """
    g = torch.Generator().manual_seed(seed)
    m, e, n = (shape[key] for key in "men")
    dt = torch.exp(torch.empty(e, 1).uniform_(math.log(1e-3), math.log(1e-1), generator=g))
    dtA = torch.stack([(-0.5 * dt).expand(e, n), dt * math.pi * torch.arange(n)], dim=-1)
    return {
        "C": torch.randn(m, e, n, 2, generator=g).to(device, dtype),
        "dtA": dtA.to(device, state_dtype(dtype)),
        "l": shape["l"],
    }


def make_cauchy(shape: dict[str, Any], dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> dict[str, Any]:
    """For `cauchy_kernel`: the same modes as poles, at the images of the upper half of the 2 (l-1)-th roots of unity
    under the bilinear transform; the last one is at infinity.
    """
    sequence = make(shape, dtype, device, seed)
    angle = torch.arange(shape["l"], dtype=torch.float64) * (math.pi / max(shape["l"] - 1, 1))
    nodes = torch.stack([torch.zeros_like(angle), 2 * torch.tan(angle / 2)], dim=-1)
    return {"v": sequence["C"], "z": nodes.to(device, state_dtype(dtype)), "w": sequence["dtA"]}

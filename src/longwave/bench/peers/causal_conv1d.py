"""causal-conv1d's CUDA kernel."""

from typing import Any

from causal_conv1d import causal_conv1d_fn  # pyright: ignore[reportMissingImports]
from torch import Tensor


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor, activation: str | None, **_: Any) -> Tensor:
    """On channels last, which it takes as the strides of (b, e, l)."""
    y = causal_conv1d_fn(x.transpose(1, 2), weight, bias, activation=activation)  # pyright: ignore[reportCallIssue]
    return y.transpose(1, 2)

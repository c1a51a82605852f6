"""Public function of the one-token projection, and its registration."""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from longwave.ops.checks import check_shape
from longwave.ops.linear_step import reference
from longwave.ops.register import Impl, define, use_kernel


def linear_step(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, impl: Impl = "fused") -> Tensor:
    """y = x W^T + bias for one token of each sequence, without a gradient.

    x (b, k), weight (n, k), bias (n,) or None; y (b, n) in x's dtype. On the CPU, for small b, the weights are streamed
    once at the speed of memory on all threads and accumulated in float32 (float64 for float64); for larger b torch's
    own product of matrices, which is fast once it has rows to work on. Raises ValueError for shapes that do not fit.
    """
    k, n = x.shape[-1], weight.shape[0]
    check_shape("linear_step", "x", x, (x.shape[0], k), "(b, k)")
    check_shape("linear_step", "weight", weight, (n, k), "(n, k)")
    check_shape("linear_step", "bias", bias, (n,), "(n,)")
    if use_kernel("linear_step", impl, x):
        return _forward(x, weight, bias)
    return reference.linear_step(x, weight, bias)


_forward = define(
    "linear_step(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    fake=lambda x, weight, bias: x.new_empty(x.shape[0], weight.shape[0]),
    cpu="longwave.ops.linear_step.cpu:forward",
    cuda="longwave.ops.linear_step.reference:linear_step",  # on a GPU torch's own product is as fast
    step=True,
)


@register_flop_formula(torch.ops.longwave.linear_step)
def _flops(x_shape, weight_shape, *args, **kwargs) -> int:
    """So that torch's FlopCounterMode counts it."""
    return 2 * x_shape.numel() * weight_shape[0]

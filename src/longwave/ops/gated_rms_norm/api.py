"""Public function of the gated norm, and its registration."""

import torch
from torch import Tensor

from longwave.ops.checks import check_shape
from longwave.ops.gated_rms_norm import reference
from longwave.ops.register import Impl, define, use_kernel


def gated_rms_norm(
    x: Tensor,
    weight: Tensor | None = None,
    z: Tensor | None = None,
    *,
    eps: float,
    group_size: int | None = None,
    norm_before_gate: bool = False,
    impl: Impl = "fused",
) -> Tensor:
    """RMSNorm over the last axis, gated by silu(z); plain RMSNorm if z is None.

        y = r(x silu(z)) weight      norm_before_gate=False (Mamba-2)
        y = r(x) weight silu(z)      norm_before_gate=True
        r(u) = u / sqrt(mean(u^2) + eps)

    x, z (..., e); weight (e,), or None for 1. The mean runs over groups of `group_size` neighbours, over
    all e if None.

    Returns y (..., e) in x's dtype, differentiable in x, weight and z. Computed in float32 (float64 for
    float64) and rounded once. Raises ValueError for shapes that do not fit.
    """
    e = x.shape[-1]
    check_shape("gated_rms_norm", "weight", weight, (e,), "(e,)")
    check_shape("gated_rms_norm", "z", z, tuple(x.shape), "x's shape")
    group_size = e if group_size is None else group_size
    if group_size < 1 or e % group_size:
        raise ValueError(f"gated_rms_norm: group_size must divide e = {e}, got {group_size}")
    if use_kernel("gated_rms_norm", impl, x):
        if torch.is_grad_enabled():
            return _GatedRMSNorm.apply(x, weight, z, eps, group_size, norm_before_gate)
        return _forward(x, weight, z, eps, group_size, norm_before_gate)
    return reference.gated_rms_norm(x, weight, z, eps, group_size, norm_before_gate)


def _fake_backward(dy, x, weight, z, eps, group_size, norm_before_gate):
    return tuple(x.new_empty(0) if t is None else t.new_empty(t.shape) for t in (x, weight, z))


_ARGUMENTS = "Tensor x, Tensor? weight, Tensor? z, float eps, int group_size, bool norm_before_gate"
_forward = define(
    f"gated_rms_norm_forward({_ARGUMENTS}) -> Tensor",
    fake=lambda x, *rest: torch.empty_like(x, memory_format=torch.contiguous_format),
    cpu="longwave.ops.gated_rms_norm.cpu:forward",
    cuda="longwave.ops.gated_rms_norm.triton:forward",
)
_backward = define(
    f"gated_rms_norm_backward(Tensor dy, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor)",
    fake=_fake_backward,
    cpu="longwave.ops.gated_rms_norm.cpu:backward",
    cuda="longwave.ops.gated_rms_norm.triton:backward",
)


class _GatedRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, z, eps, group_size, norm_before_gate):
        ctx.save_for_backward(x, weight, z)
        ctx.flags = (eps, group_size, norm_before_gate)
        return _forward(x, weight, z, *ctx.flags)

    @staticmethod
    def backward(ctx, dy):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, z = ctx.saved_tensors
        dx, dweight, dz = _backward(dy, x, weight, z, *ctx.flags)
        return dx, None if weight is None else dweight, None if z is None else dz, None, None, None

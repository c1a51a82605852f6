"""Public function of the cross entropy in place, and its registration."""

from torch import Tensor

from longwave.ops.checks import check_shape
from longwave.ops.cross_entropy import reference
from longwave.ops.register import Impl, define, use_kernel


def cross_entropy_(logits: Tensor, targets: Tensor, *, ignore_index: int = -100, impl: Impl = "fused") -> Tensor:
    """The loss of each row of logits, which are overwritten with the gradient of the sum of all losses.

        loss_i = log sum_j exp(logits_ij) - logits_i,target
        logits_ij <- softmax(logits_i)_j - [j = target]

    logits (n, v), contiguous; targets (n,) int64, in 0..v-1 or equal to `ignore_index`: such a row has loss 0 and
    gradient 0. Returns (n,) in float32 (float64 for float64), without a gradient of its own: a loss that forms its
    gradients as it goes has them already. Computed in float32 and rounded once. Raises ValueError for shapes that do
    not fit.
    """
    check_shape("cross_entropy_", "logits", logits, (targets.numel(), logits.shape[-1]), "(n, v)")
    if not logits.is_contiguous():
        raise ValueError(f"cross_entropy_: logits must be contiguous, got strides {logits.stride()}")
    if use_kernel("cross_entropy_", impl, logits):
        return _forward(logits, targets, ignore_index)
    return reference.cross_entropy_(logits, targets, ignore_index)


_forward = define(
    "cross_entropy_(Tensor(a!) logits, Tensor targets, int ignore_index) -> Tensor",
    fake=lambda logits, *rest: reference.losses_like(logits),
    cpu="longwave.ops.cross_entropy.cpu:cross_entropy_",
    cuda="longwave.ops.cross_entropy.triton:cross_entropy_",
)

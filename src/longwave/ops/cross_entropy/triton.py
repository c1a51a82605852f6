"""Cross entropy in Triton: one program per row reads it twice, the second time from the cache, and writes it once."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from longwave.ops.triton_math import LOG2E, device_of

_BLOCK = 16384  # columns at a time, and no more than the row has: the rows being worked on then stay in the cache
_PER_WARP = 512  # columns
_VECTOR = 8  # columns that a thread reads at once, if the rows begin and end at multiples of them


@triton.jit
def _cross_entropy_kernel(logits, targets, losses, vectors, ignore_index, VECTOR: tl.constexpr, BLOCK: tl.constexpr):
    v = vectors * VECTOR
    row = tl.program_id(0).to(tl.int64)
    logits += row * v
    columns = tl.arange(0, BLOCK)
    target = tl.load(targets + row)
    counts = target != ignore_index
    chosen = tl.load(logits + target, mask=counts, other=0.0).to(tl.float32)
    highest, total = float("-inf"), 0.0  # total of exp(x - highest)
    for start in range(0, v, BLOCK):
        x = tl.load(logits + start + columns, mask=start + columns < v, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(highest, tl.max(x))
        total = total * tl.exp2((highest - higher) * LOG2E) + tl.sum(tl.exp2((x - higher) * LOG2E))
        highest = higher
    share = tl.where(counts, 1.0 / total, 0.0)
    tl.store(losses + row, tl.where(counts, tl.log(total) + (highest - chosen), 0.0))
    for start in range(0, v, BLOCK):
        at = start + columns
        x = tl.load(logits + at, mask=at < v, other=float("-inf")).to(tl.float32)
        gradient = tl.exp2((x - highest) * LOG2E) * share - tl.where((at == target) & counts, 1.0, 0.0)
        tl.store(logits + at, gradient.to(logits.dtype.element_ty), mask=at < v)


def cross_entropy_(logits: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
    n, v = logits.shape
    losses = torch.empty(n, dtype=torch.float32, device=logits.device)
    vector = _VECTOR if v % _VECTOR == 0 else 1
    block = min(_BLOCK, triton.next_power_of_2(v))
    with device_of(logits):
        _cross_entropy_kernel[(n,)](
            logits,
            targets.contiguous(),
            losses,
            v // vector,
            ignore_index,
            VECTOR=vector,
            BLOCK=block,
            num_warps=max(1, block // _PER_WARP),
        )
    return losses

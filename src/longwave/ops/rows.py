"""Hand torch tensors to Numba kernels as flat arrays with strides.

Numba vectorises an innermost loop only over memory it knows to be contiguous, and a strided view is not. A kernel
therefore gets the view's memory as one flat array and the strides of its leading axes, and indexes
`flat[i * stride0 + t * stride1 + c]`. No copy is made as long as the last axis is contiguous.
"""

import numpy as np
import torch
from torch import Tensor


def flat(x: Tensor) -> tuple[np.ndarray, tuple[int, ...]]:
    """The memory that `x` spans from its first element on, as a 1-D array, and the strides of all but the last axis.

    `x` must be on the CPU: float32, float64, or bfloat16, which is given as its uint16 bits (`numba_bfloat16.py`).
    Copied only if its last axis is not contiguous.
    """
    x = x.detach()
    if x.stride(-1) != 1 and x.shape[-1] > 1:
        x = x.contiguous()
    if x.dtype is torch.bfloat16:
        x = x.view(torch.uint16)
    if x.numel() == 0:
        return np.empty(0, dtype=x.new_empty(0).numpy().dtype), x.stride()[:-1]
    span = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return torch.as_strided(x, (span,), (1,)).numpy(), x.stride()[:-1]

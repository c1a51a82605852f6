"""A few rows times a matrix on the CPU: each thread draws blocks of outputs and reads their weights once.

torch's own product of one row reads memory at less than half the speed that the cores reach together.
"""

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear

from longwave.ops.checks import state_dtype
from longwave.ops.openmp import carray, next_ticket, pointer, region, run, widen_bfloat16

_MOST_ROWS = 4  # from here on torch's product of matrices is the faster one
_BLOCK_BYTES = 1 << 16  # weights that a thread reads for one ticket


def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    kernel = _KERNELS.get(weight.dtype)
    if x.shape[0] > _MOST_ROWS or kernel is None or weight.stride(-1) != 1:
        return linear(x, weight, bias)
    (b, k), n = x.shape, weight.shape[0]
    dtype = state_dtype(weight.dtype)
    rows = (x if x.dtype is dtype else x.to(dtype)).contiguous()  # even a `to` that does nothing costs 1 us
    y = torch.empty(b, n, dtype=dtype) if bias is None else bias.to(dtype).repeat(b, 1)
    block = max(4, _BLOCK_BYTES // (k * weight.element_size() + 1))
    addresses = [rows.data_ptr(), weight.data_ptr(), y.data_ptr()]
    row_bytes = weight.stride(0) * weight.element_size()
    run(kernel, [*addresses, b, k, n, row_bytes, block, bias is not None], n_blocks=-(-n // block))
    return y if dtype is x.dtype else y.to(x.dtype)


def _make_kernel(accumulate: type, stored: type, widen: Callable[[Any], Any]) -> Any:
    """The parallel region for weights held as `stored`, which `widen` turns into `accumulate`."""

    @region
    def kernel(words):
        _, x_at, weight_at, y_at, b, k, n, row_bytes, block, add = carray(words, 10, np.int64)
        x = carray(pointer(x_at), (b, k), accumulate)
        y = carray(pointer(y_at), (b, n), accumulate)
        start = next_ticket(words) * block
        while start < n:
            for j in range(start, min(start + block, n)):
                weight = carray(pointer(weight_at + j * row_bytes), k, stored)
                for i in range(b):
                    total = accumulate(0)
                    for c in range(k):
                        total += x[i, c] * widen(weight[c])
                    y[i, j] = y[i, j] + total if add else total
            start = next_ticket(words) * block

    return kernel


@numba.njit(inline="always")
def _same(value):
    return value


_KERNELS = {
    torch.float32: _make_kernel(np.float32, np.float32, _same),
    torch.float64: _make_kernel(np.float64, np.float64, _same),
    torch.bfloat16: _make_kernel(np.float32, np.uint16, widen_bfloat16),
}

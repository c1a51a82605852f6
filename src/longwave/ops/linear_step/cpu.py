"""A few rows times a matrix on the CPU: each thread draws blocks of outputs and reads their weights once.

torch's own product of one row reads memory at less than half the speed that the cores reach together.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import linear

from longwave.ops.numba_bfloat16 import NUMBERS, Number
from longwave.ops.openmp import carray, next_ticket, pointer, region, run

_MOST_ROWS = 4  # from here on torch's product of matrices is the faster one
_BLOCK_BYTES = 1 << 19  # weights that a thread reads for one ticket: long runs are read faster, by a fifth against 2^16
_SMALL_BYTES = 1 << 16  # weights that are not worth a second thread


def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    kernel = _KERNELS.get((x.dtype, weight.dtype))
    if x.shape[0] > _MOST_ROWS or kernel is None or weight.stride(-1) != 1:
        return linear(x, weight.to(x.dtype), bias)
    (b, k), n = x.shape, weight.shape[0]
    rows = x.contiguous()
    y = torch.empty(b, n, dtype=x.dtype) if bias is None else bias.to(x.dtype).repeat(b, 1)
    size = weight.element_size()
    block = -(-n // _n_blocks(n * k * size))
    addresses = [rows.data_ptr(), weight.data_ptr(), y.data_ptr()]
    run(kernel, [*addresses, b, k, n, weight.stride(0) * size, block, bias is not None], n_blocks=-(-n // block))
    return y


def _n_blocks(n_bytes: int) -> int:
    """Into how many parts to cut the weights: equal ones, a multiple of the threads."""
    n_threads = torch.get_num_threads()
    return 1 if n_bytes < _SMALL_BYTES else n_threads * max(1, round(n_bytes / (n_threads * _BLOCK_BYTES)))


def _make_kernel(number: Number, weights: Number) -> Any:
    """The parallel region for inputs and outputs in `number`, and weights in `weights`."""
    stored, computed, widen, narrow = number
    stored_weight, _, widen_weight, _ = weights

    @region
    def kernel(words):
        _, x_at, weight_at, y_at, b, k, n, row_bytes, block, add = carray(words, 10, np.int64)
        start = next_ticket(words) * block
        if start >= n:
            return
        given, y = carray(pointer(x_at), (b, k), stored), carray(pointer(y_at), (b, n), stored)
        x = np.empty((b, k), computed)
        for i in range(b):
            for c in range(k):
                x[i, c] = widen(given[i, c])
        while start < n:
            for j in range(start, min(start + block, n)):
                weight = carray(pointer(weight_at + j * row_bytes), k, stored_weight)
                for i in range(b):
                    total = computed(0)
                    for c in range(k):
                        total += x[i, c] * widen_weight(weight[c])
                    y[i, j] = narrow(widen(y[i, j]) + total if add else total)
            start = next_ticket(words) * block

    return kernel


_F32, _F64, _BF16 = torch.float32, torch.float64, torch.bfloat16
_KERNELS = {
    (given, weight): _make_kernel(NUMBERS[given], NUMBERS[weight])
    for given, weight in ((_F32, _F32), (_F64, _F64), (_BF16, _BF16), (_F32, _BF16))
}

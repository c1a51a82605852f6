"""What chunked scans share inside Numba kernels: cutting a row into chunks, moving blocks, the state between chunks.

A state is kept as (n, p_wide), with p filled up to whole tiles, so that p is the contiguous axis of every product that
touches it. Blocks are flat arrays; a name that ends in t is a transposed block, tokens along its contiguous axis.
"""

import numpy as np

from longwave.ops.numba_math import jit
from longwave.ops.numba_matmul import ROWS, add_product


@jit
def chunk_starts(reset, row, end, q):
    """Starts of the chunks of at most q tokens, none across a reset, and `end` last."""
    starts = np.empty(end + 1, np.int64)
    count, t = 0, 0
    while t < end:
        starts[count] = t
        count += 1
        stop = min(t + q, end)
        t += 1
        while t < stop and not reset[row, t]:
            t += 1
    starts[count] = end
    return starts[: count + 1]


@jit
def row_of(flat, i, width):
    """Row i of a flat array. Loops run over such slices: their index has no sign to test, so LLVM vectorises them."""
    return flat[i * width : (i + 1) * width]


@jit
def copy(source, out):
    for k in range(len(source)):
        out[k] = source[k]


@jit
def add(source, out):
    for k in range(len(source)):
        out[k] += source[k]


@jit
def copy_rows(source, stride, size, width, out, out_width):
    """out[i, c] = source[i, c]; rows `stride` and `out_width` apart."""
    for i in range(size):
        row, target = source[i * stride : i * stride + width], row_of(out, i, out_width)
        for c in range(width):
            target[c] = row[c]


@jit
def copy_transposed(source, stride, size, width, out, out_width):
    """out[c, i] = source[i, c]."""
    for i in range(size):
        row = source[i * stride : i * stride + width]
        for c in range(width):
            out[c * out_width + i] = row[c]


@jit
def scale_rows(rows, width, size, scale):
    for i in range(size):
        row = row_of(rows, i, width)
        for c in range(width):
            row[c] *= scale[i]


@jit
def dot(a, b):
    total = 0.0
    for k in range(len(a)):
        total += a[k] * b[k]
    return total


@jit
def load_states(initial, row, h0, h1, p_wide):
    """(heads, n, p_wide), flat, from (b, h, p, n)."""
    _, _, p, n = initial.shape
    state = np.zeros((h1 - h0) * n * p_wide, initial.dtype)
    for head in range(h0, h1):
        for c in range(p):
            for k in range(n):
                state[((head - h0) * n + k) * p_wide + c] = initial[row, head, c, k]
    return state


@jit
def store_states(state, row, h0, h1, p_wide, out):
    _, _, p, n = out.shape
    for head in range(h0, h1):
        for c in range(p):
            for k in range(n):
                out[row, head, c, k] = state[((head - h0) * n + k) * p_wide + c]


@jit
def pass_state(state, decay, a, a_row, a_column, rows, n, size, p_wide):
    """state <- decay state + A rows, for A (n, size) and rows (size, p_wide)."""
    for k in range(len(state)):
        state[k] *= decay
    add_product(a, a_row, a_column, rows, state, n, size, p_wide)


@jit
def add_upper_product(mt, q_wide, rows, size, p_wide, out):
    """out_j += sum_{i>=j} mt[j, i] rows_i."""
    for j in range(0, size, ROWS):
        height, left = min(ROWS, size - j), size - j
        add_product(mt[j * q_wide + j :], q_wide, 1, rows[j * p_wide :], out[j * p_wide :], height, left, p_wide)


@jit
def past_gradients(state, dyt, from_past, ct, n, p, p_wide, q_wide, zt, dct, back):
    """Add to dct what reaches C from the state before the chunk; back_i is what flows from that state to y_i."""
    zt[:] = 0
    add_product(state, p_wide, 1, dyt, zt, n, p, q_wide)
    back[:] = 0
    for k in range(n):
        grads, products, outs = row_of(dct, k, q_wide), row_of(zt, k, q_wide), row_of(ct, k, q_wide)
        for i in range(len(back)):
            grad = products[i] * from_past[i]
            grads[i] += grad
            back[i] += grad * outs[i]


@jit
def step_gradients(forth, back, whole, da):
    """Add to da_k what else flows over step k: from x_j, j < k, to the state after the chunk, from the state before it
    to y_i, i >= k, and from state to state.
    """
    total = whole
    for k in range(len(da)):
        da[k] += total
        total += forth[k]
    total = 0.0
    for k in range(len(da) - 1, -1, -1):
        total += back[k]
        da[k] += total

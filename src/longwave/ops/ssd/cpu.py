"""State space duality on the CPU: the block decomposition of arXiv:2405.21060, section 6, chunk after chunk.

One block of work is up to `_HEADS` heads of one group of one row of the batch: they share C B^T. A chunk never spans
two documents, so that no mask is needed: a reset ends the chunk before it and clears the state. Within a chunk
that starts from the state H, with cum_i the sum of dt A up to and with token i,

    y_i = exp(cum_i) C_i H + sum_{j<=i} exp(cum_i - cum_j) (C_i . B_j) dt_j x_j + D x_i
    H  <- exp(cum_last) H + sum_j exp(cum_last - cum_j) dt_j B_j x_j^T

cum is float64: a difference of two of its values is exact enough for weak and for strong decay. The state is kept as
(n, p), so that p is the contiguous axis of every product that touches it. Blocks are kept transposed where that lets
a product read them: `ct` is C^T (n, q), `st` is (C B^T)^T.
"""

import numpy as np
import torch
from torch import Tensor

from longwave.ops.checks import state_dtype
from longwave.ops.numba_math import exp, jit, softplus
from longwave.ops.numba_matmul import COLUMNS, ROWS, add_lower_product, add_product, padded
from longwave.ops.rows import flat
from longwave.ops.ssd.reference import step_sizes
from longwave.ops.threads import parallel_for

_CHUNK = 64
_HEADS = 4
_STEP_ELEMENTS = 1 << 18  # of state, updated in a time that outweighs handing out a block


def forward(x, dt, A, B, C, D, dt_bias, initial_state, reset, lengths, dt_softplus, low, high, chunk_len):
    b, l, h, p = x.shape  # noqa: E741
    inputs = _Inputs(x, A, B, C, D, initial_state, reset, lengths, chunk_len)
    sizes = step_sizes(dt.detach().to(inputs.dtype), dt_bias, dt_softplus, (low, high)).contiguous()
    y = inputs.empty(b, l, h, p)
    final = torch.empty(b, h, p, B.shape[-1], dtype=inputs.dtype)

    def body(i: int) -> None:
        _forward_heads(*inputs.kernel_args, sizes.numpy(), y.numpy(), final.numpy(), *inputs.block(i))

    parallel_for(inputs.n_blocks, body)
    return y.to(x.dtype), final


def backward(
    dy, dfinal, x, dt, A, B, C, D, dt_bias, initial_state, reset, lengths, dt_softplus, low, high, chunk_len
):
    b, l, h, p = x.shape  # noqa: E741
    g, n = B.shape[2:]
    inputs = _Inputs(x, A, B, C, D, initial_state, reset, lengths, chunk_len)
    with torch.enable_grad():
        raw = [None if t is None else t.detach().requires_grad_() for t in (dt, dt_bias)]
        sizes = step_sizes(raw[0].to(inputs.dtype), raw[1], dt_softplus, (low, high))
    dy_flat, dy_strides = flat(dy.to(inputs.dtype))
    # Heads of one group add to the same dB and dC: each block has a slice of its own, summed in a fixed order.
    dx, dB, dC = inputs.empty(b, l, h, p), *(inputs.empty(b, l, g, inputs.splits, n) for _ in range(2))
    dsizes, dA, dD = inputs.empty(b, l, h), inputs.zeros(b, h), inputs.zeros(b, h, p)
    dstate = dfinal.to(inputs.dtype, copy=True).contiguous()
    outputs = [t.numpy() for t in (dx, dsizes, dA, dB, dC, dD, dstate)]

    def body(i: int) -> None:
        _backward_heads(
            *inputs.kernel_args, sizes.detach().numpy(), dy_flat, dy_strides, *outputs, *inputs.block(i)
        )

    sizes = sizes.contiguous()
    parallel_for(inputs.n_blocks, body)
    draw = torch.autograd.grad(sizes, [t for t in raw if t is not None], dsizes)
    dD = None if D is None else dD.sum(0) if D.dim() == 2 else dD.sum((0, 2))
    grads = (
        (dx, x),
        (draw[0], dt),
        (dA.sum(0), A),
        (dB.sum(3), B),
        (dC.sum(3), C),
        (dD, D),
        (draw[-1], dt_bias),
        (dstate, initial_state),
    )
    return tuple(x.new_empty(0) if t is None else grad.to(t.dtype).contiguous() for grad, t in grads)


def step(state, x, dt, A, B, C, D, dt_bias, dt_softplus, low, high):
    b, h, p, n = state.shape
    dtype = state.dtype
    memory = state.contiguous()
    y = torch.empty(b, h, p, dtype=dtype)
    skip = torch.zeros(h, 1, dtype=dtype) if D is None else D.view(h, -1)
    bias = torch.zeros(h, dtype=dtype) if dt_bias is None else dt_bias
    arrays = [_array(t, dtype) for t in (memory, x, dt, A, B, C, skip, bias, y)]
    blocks = max(1, min(b * h, state.numel() // _STEP_ELEMENTS))

    def body(i: int) -> None:
        _step_heads(*arrays, dt_softplus, low, high, i * b * h // blocks, (i + 1) * b * h // blocks)

    parallel_for(blocks, body)
    if memory is not state:
        state.copy_(memory)
    return y.to(x.dtype)


def _array(x: Tensor, dtype: torch.dtype) -> np.ndarray:
    if x.dtype is not dtype:
        x = x.to(dtype)
    return (x.detach() if x.requires_grad else x).contiguous().numpy()


class _Inputs:
    """What both kernels read, in the accumulation dtype, and how the work is cut."""

    def __init__(self, x, A, B, C, D, initial_state, reset, lengths, chunk_len):
        b, l, h, p = x.shape  # noqa: E741
        self.g, n = B.shape[2:]
        self.heads = h // self.g
        self.splits = -(-self.heads // _HEADS)
        self.n_blocks = b * self.g * self.splits
        self.dtype = state_dtype(x.dtype)
        self.empty = self.zeros if lengths is not None else lambda *size: torch.empty(*size, dtype=self.dtype)
        skip = self.zeros(h, p) if D is None else D.detach().to(self.dtype).reshape(h, -1).expand(h, p)
        state = self.zeros(b, h, p, n) if initial_state is None else initial_state.detach().to(self.dtype)
        self.kernel_args = (
            *(part for t in (x, B, C) for part in flat(t.to(self.dtype))),
            A.detach().to(self.dtype).numpy(),
            skip.contiguous().numpy(),
            state.contiguous().numpy(),
            np.zeros((b, l), np.bool_) if reset is None else reset.numpy(),
            np.full(b, l) if lengths is None else lengths.numpy(),
            min(chunk_len or _CHUNK, l),
        )

    def zeros(self, *size: int) -> Tensor:
        return torch.zeros(*size, dtype=self.dtype)

    def block(self, i: int) -> tuple[int, int, int, int, int]:
        """Row, group, split of the group, first head and end of heads of block i."""
        row, rest = divmod(i, self.g * self.splits)
        group, split = divmod(rest, self.splits)
        first = group * self.heads
        return row, group, split, first + split * _HEADS, first + min((split + 1) * _HEADS, self.heads)


@jit
def _chunk_starts(reset, row, end, q):
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
def _row(flat, i, width):
    """Row i of a flat array. Loops run over such slices: their index has no sign to test, so LLVM vectorises them."""
    return flat[i * width : (i + 1) * width]


@jit
def _copy_rows(source, at, stride, size, width, out, out_width):
    """out[i, c] = source[i, c]; rows `stride` and `out_width` apart."""
    for i in range(size):
        row, target = source[at + i * stride : at + i * stride + width], _row(out, i, out_width)
        for c in range(width):
            target[c] = row[c]


@jit
def _copy_transposed(source, at, stride, size, width, out, out_width):
    """out[c, i] = source[i, c]."""
    for i in range(size):
        row = source[at + i * stride : at + i * stride + width]
        for c in range(width):
            out[c * out_width + i] = row[c]


@jit
def _scale_rows(rows, width, size, scale):
    for i in range(size):
        row = _row(rows, i, width)
        for c in range(width):
            row[c] *= scale[i]


@jit
def _dot(a, b):
    total = a.dtype.type(0)
    for k in range(len(a)):
        total += a[k] * b[k]
    return total


@jit
def _decays(sizes, row, start, head, a, dt, cum, from_past, to_future):
    """The chunk's dt; cum_i = sum_{j<=i} dt_j a; exp(cum_i), and exp(cum_last - cum_i)."""
    total = 0.0
    for i in range(len(cum)):
        dt[i] = sizes[row, start + i, head]
        total += np.float64(dt[i]) * np.float64(a)
        cum[i] = total
    for i in range(len(cum)):
        from_past[i] = exp(dt.dtype.type(cum[i]))
        to_future[i] = exp(dt.dtype.type(total - cum[i]))


@jit
def _load_states(initial, row, h0, h1, p_wide):
    """(heads, n, p_wide), flat, from (b, h, p, n)."""
    _, _, p, n = initial.shape
    state = np.zeros((h1 - h0) * n * p_wide, initial.dtype)
    for head in range(h0, h1):
        for c in range(p):
            for k in range(n):
                state[((head - h0) * n + k) * p_wide + c] = initial[row, head, c, k]
    return state


@jit
def _store_states(state, row, h0, h1, p_wide, out):
    _, _, p, n = out.shape
    for head in range(h0, h1):
        for c in range(p):
            for k in range(n):
                out[row, head, c, k] = state[((head - h0) * n + k) * p_wide + c]


@jit
def _pass_state(state, decay, a, a_at, a_row, a_column, rows, n, size, p_wide):
    """state <- decay state + A rows, for A (n, size) and rows (size, p_wide)."""
    for k in range(len(state)):
        state[k] *= decay
    add_product(a, a_at, a_row, a_column, rows, 0, state, 0, n, size, p_wide)


@jit
def _forward_heads(
    x, x_strides, B, b_strides, C, c_strides, A, D, initial, reset, ends, q, sizes, y, final, row, group, _, h0, h1
):
    _, _, p, n = initial.shape
    p_wide, q_wide = padded(p, COLUMNS), padded(q, COLUMNS)
    kind, b_step = x.dtype, b_strides[1]
    states = _load_states(initial, row, h0, h1, p_wide)
    ct, st, mt = np.zeros(n * q_wide, kind), np.empty(q * q_wide, kind), np.empty(q * q_wide, kind)
    x_chunk, y_chunk = np.zeros(q * p_wide, kind), np.empty(q * p_wide, kind)
    scratch, sums = np.empty((3, q), kind), np.empty(q)
    starts = _chunk_starts(reset, row, ends[row], q)

    for chunk in range(len(starts) - 1):
        start, size = starts[chunk], starts[chunk + 1] - starts[chunk]
        dt, from_past, to_future, cum = scratch[0, :size], scratch[1, :size], scratch[2, :size], sums[:size]
        if reset[row, start]:
            states[:] = 0
        b_at = row * b_strides[0] + start * b_step + group * b_strides[2]
        c_at = row * c_strides[0] + start * c_strides[1] + group * c_strides[2]
        _copy_transposed(C, c_at, c_strides[1], size, n, ct, q_wide)
        st[:] = 0
        add_product(B, b_at, b_step, 1, ct, 0, st, 0, size, n, q_wide)
        for head in range(h0, h1):
            _decays(sizes, row, start, head, A[head], dt, cum, from_past, to_future)
            x_at = row * x_strides[0] + start * x_strides[1] + head * x_strides[2]
            _copy_rows(x, x_at, x_strides[1], size, p, x_chunk, p_wide)
            _weigh_pairs(st, cum, dt, q_wide, mt)
            state = _row(states, head - h0, n * p_wide)
            y_chunk[:] = 0
            add_product(ct, 0, 1, q_wide, state, 0, y_chunk, 0, size, n, p_wide)
            _scale_rows(y_chunk, p_wide, size, from_past)
            add_lower_product(mt, 0, 1, q_wide, x_chunk, 0, y_chunk, 0, size, p_wide)
            skip = D[head]
            for i in range(size):
                out, y_row, x_row = y[row, start + i, head], _row(y_chunk, i, p_wide), _row(x_chunk, i, p_wide)
                for c in range(p):
                    out[c] = y_row[c] + skip[c] * x_row[c]
            to_future *= dt
            _scale_rows(x_chunk, p_wide, size, to_future)
            _pass_state(state, from_past[size - 1], B, b_at, 1, b_step, x_chunk, n, size, p_wide)
    _store_states(states, row, h0, h1, p_wide, final)


@jit
def _weigh_pairs(st, cum, dt, q_wide, mt):
    """mt[j, i] = exp(cum_i - cum_j) st[j, i] dt_j for i >= j; the rest is not touched."""
    size = len(cum)
    for j in range(size):
        pairs, out, after = st[j * q_wide + j :], mt[j * q_wide + j :], cum[j:]
        for i in range(size - j):
            out[i] = exp(dt.dtype.type(after[i] - cum[j])) * pairs[i] * dt[j]


@jit
def _chunk_states(x, x_strides, B, b_strides, A, initial, reset, starts, q, sizes, row, group, h0, h1):
    """The states that the chunks start from, (chunks, heads, n, p_wide), flat."""
    _, _, p, n = initial.shape
    p_wide, kind = padded(p, COLUMNS), x.dtype
    states = _load_states(initial, row, h0, h1, p_wide)
    saved = np.empty((len(starts) - 1) * len(states), kind)
    x_chunk, scratch, sums = np.zeros(q * p_wide, kind), np.empty((3, q), kind), np.empty(q)
    for chunk in range(len(starts) - 1):
        start, size = starts[chunk], starts[chunk + 1] - starts[chunk]
        dt, from_past, to_future, cum = scratch[0, :size], scratch[1, :size], scratch[2, :size], sums[:size]
        if reset[row, start]:
            states[:] = 0
        _row(saved, chunk, len(states))[:] = states
        b_at = row * b_strides[0] + start * b_strides[1] + group * b_strides[2]
        for head in range(h0, h1):
            _decays(sizes, row, start, head, A[head], dt, cum, from_past, to_future)
            x_at = row * x_strides[0] + start * x_strides[1] + head * x_strides[2]
            _copy_rows(x, x_at, x_strides[1], size, p, x_chunk, p_wide)
            to_future *= dt
            _scale_rows(x_chunk, p_wide, size, to_future)
            state = _row(states, head - h0, n * p_wide)
            _pass_state(state, from_past[size - 1], B, b_at, 1, b_strides[1], x_chunk, n, size, p_wide)
    return saved


@jit
def _pair_gradients(st, gt, cum, dt, q_wide, mt, dst, run, da):
    """Gradients through the pairs j <= i of one head and chunk.

    gt (q, q) is (dy_i . x_j)^T. Fills mt with the transposed decays times C B^T, adds to dst, the gradient of st, and
    sets da_k to what flows over step k, from every j < k to every i >= k: a sum without cancellation.
    """
    size = len(cum)
    run[:] = 0
    da[0] = 0
    for j in range(size):
        mt[j * q_wide + j // ROWS * ROWS : j * q_wide + j] = 0  # read by the tile on the diagonal
        at = j * q_wide + j
        pairs, products, weights, grads, flows, after = st[at:], gt[at:], mt[at:], dst[at:], run[j:], cum[j:]
        for i in range(size - j):
            decay = exp(dt.dtype.type(after[i] - cum[j]))
            grad = decay * products[i] * dt[j]
            weights[i] = decay * pairs[i]
            grads[i] += grad
            flows[i] += grad * pairs[i]
        if j + 1 < size:
            da[j + 1] = flows[1 : size - j].sum()


@jit
def _add_upper_product(mt, q_wide, rows, size, p_wide, out):
    """out_j += sum_{i>=j} mt[j, i] rows_i."""
    for j in range(0, size, ROWS):
        height = min(ROWS, size - j)
        add_product(mt, j * q_wide + j, q_wide, 1, rows, j * p_wide, out, j * p_wide, height, size - j, p_wide)


@jit
def _past_gradients(state, dyt, from_past, ct, n, p, p_wide, q_wide, zt, dct, back):
    """Add to dct what reaches C from the state before the chunk; back_i is what flows from that state to y_i."""
    zt[:] = 0
    add_product(state, 0, p_wide, 1, dyt, 0, zt, 0, n, p, q_wide)
    back[:] = 0
    for k in range(n):
        grads, products, outs = _row(dct, k, q_wide), _row(zt, k, q_wide), _row(ct, k, q_wide)
        for i in range(len(back)):
            grad = products[i] * from_past[i]
            grads[i] += grad
            back[i] += grad * outs[i]


@jit
def _step_gradients(forth, back, whole, da):
    """Add to da_k what else flows over step k: from x_j, j < k, to the state after the chunk, from the state before it
    to y_i, i >= k, and from state to state.
    """
    total = whole
    for k in range(len(da)):
        da[k] += total
        total += forth[k]
    total = whole * 0
    for k in range(len(da) - 1, -1, -1):
        total += back[k]
        da[k] += total


@jit
def _backward_heads(
    x, x_strides, B, b_strides, C, c_strides, A, D, initial, reset, ends, q, sizes,
    dy, dy_strides, dx, dsizes, dA, dB, dC, dD, dstate, row, group, split, h0, h1,
):  # fmt: skip
    _, _, p, n = initial.shape
    p_wide, q_wide = padded(p, COLUMNS), padded(q, COLUMNS)
    kind, b_step = x.dtype, b_strides[1]
    starts = _chunk_starts(reset, row, ends[row], q)
    saved = _chunk_states(x, x_strides, B, b_strides, A, initial, reset, starts, q, sizes, row, group, h0, h1)
    dstates = _load_states(dstate, row, h0, h1, p_wide)
    ct, dct, dbt, zt = (np.zeros(n * q_wide, kind), np.zeros(n * q_wide, kind),
                        np.zeros(n * q_wide, kind), np.zeros(n * q_wide, kind))  # fmt: skip
    st, dst, gt, mt = (np.zeros(q * q_wide, kind), np.zeros(q * q_wide, kind),
                       np.zeros(q * q_wide, kind), np.zeros(q * q_wide, kind))  # fmt: skip
    x_chunk, dy_chunk, u = np.zeros(q * p_wide, kind), np.zeros(q * p_wide, kind), np.zeros(q * p_wide, kind)
    xt, dyt = np.zeros(p * q_wide, kind), np.zeros(p * q_wide, kind)
    scratch, sums = np.empty((7, q), kind), np.empty(q)

    for chunk in range(len(starts) - 2, -1, -1):
        start, size = starts[chunk], starts[chunk + 1] - starts[chunk]
        dt, from_past, to_future, cum = scratch[0, :size], scratch[1, :size], scratch[2, :size], sums[:size]
        forth, back, da, run = scratch[3, :size], scratch[4, :size], scratch[5, :size], scratch[6, :size]
        b_at = row * b_strides[0] + start * b_step + group * b_strides[2]
        c_at = row * c_strides[0] + start * c_strides[1] + group * c_strides[2]
        _copy_transposed(C, c_at, c_strides[1], size, n, ct, q_wide)
        st[:], dst[:], dct[:], dbt[:] = 0, 0, 0, 0
        add_product(B, b_at, b_step, 1, ct, 0, st, 0, size, n, q_wide)
        for head in range(h0, h1):
            _decays(sizes, row, start, head, A[head], dt, cum, from_past, to_future)
            x_at = row * x_strides[0] + start * x_strides[1] + head * x_strides[2]
            dy_at = row * dy_strides[0] + start * dy_strides[1] + head * dy_strides[2]
            _copy_rows(x, x_at, x_strides[1], size, p, x_chunk, p_wide)
            _copy_rows(dy, dy_at, dy_strides[1], size, p, dy_chunk, p_wide)
            _copy_transposed(dy, dy_at, dy_strides[1], size, p, dyt, q_wide)
            state = _row(saved, chunk * (h1 - h0) + head - h0, n * p_wide)
            dstate_head = _row(dstates, head - h0, n * p_wide)

            gt[:] = 0
            add_product(x_chunk, 0, p_wide, 1, dyt, 0, gt, 0, size, p, q_wide)
            _pair_gradients(st, gt, cum, dt, q_wide, mt, dst, run, da)
            u[:] = 0
            add_product(B, b_at, b_step, 1, dstate_head, 0, u, 0, size, n, p_wide)
            _scale_rows(u, p_wide, size, to_future)
            for j in range(size):
                forth[j] = _dot(_row(u, j, p_wide), _row(x_chunk, j, p_wide)) * dt[j]
            _add_upper_product(mt, q_wide, dy_chunk, size, p_wide, u)
            _past_gradients(state, dyt, from_past, ct, n, p, p_wide, q_wide, zt, dct, back)
            _step_gradients(forth, back, from_past[size - 1] * _dot(state, dstate_head), da)
            _write_gradients(
                x_chunk, dy_chunk, u, dt, da, A[head], D[head], dx[row, start:], dsizes[row, start:], dD[row], head
            )
            dA[row, head] += _dot(da, dt)

            to_future *= dt
            _scale_rows(x_chunk, p_wide, size, to_future)
            _copy_transposed(x_chunk, 0, p_wide, size, p, xt, q_wide)
            add_product(dstate_head, 0, p_wide, 1, xt, 0, dbt, 0, n, p, q_wide)
            _scale_rows(dy_chunk, p_wide, size, from_past)
            _pass_state(dstate_head, from_past[size - 1], ct, 0, q_wide, 1, dy_chunk, n, size, p_wide)
        if reset[row, start]:
            dstates[:] = 0
        add_product(B, b_at, 1, b_step, dst, 0, dct, 0, n, size, q_wide)
        _copy_transposed(dst, 0, q_wide, size, size, gt, q_wide)
        add_product(ct, 0, q_wide, 1, gt, 0, dbt, 0, n, size, q_wide)
        for i in range(size):
            db_row, dc_row = dB[row, start + i, group, split], dC[row, start + i, group, split]
            for k in range(n):
                db_row[k], dc_row[k] = dbt[k * q_wide + i], dct[k * q_wide + i]
    _store_states(dstates, row, h0, h1, p_wide, dstate)


@jit
def _write_gradients(x_chunk, dy_chunk, u, dt, da, a, skip, dx, dsizes, dD, head):
    """dx, d(dt) and dD of one head and chunk from u_j, the gradient of dt_j x_j, and da_j, that of dt_j a."""
    p_wide, dskip = padded(len(skip), COLUMNS), dD[head]
    for j in range(len(dt)):
        x_row, dy_row, u_row, out = _row(x_chunk, j, p_wide), _row(dy_chunk, j, p_wide), _row(u, j, p_wide), dx[j, head]
        dsizes[j, head] = _dot(u_row, x_row) + da[j] * a
        for c in range(len(skip)):
            out[c] = dt[j] * u_row[c] + skip[c] * dy_row[c]
            dskip[c] += dy_row[c] * x_row[c]


@jit
def _step_heads(state, x, dt, A, B, C, D, dt_bias, y, dt_softplus, low, high, first, end):
    """Heads first..end of all rows, counted through: one token."""
    _, h, p, n = state.shape
    kind = state.dtype
    for i in range(first, end):
        row, head = i // h, i % h
        group = head // (h // B.shape[1])
        size = dt[row, head] + dt_bias[head]
        if dt_softplus:
            size = softplus(size)
        size = kind.type(low) if size < low else kind.type(high) if size > high else size
        decay = exp(size * A[head])
        b_row, c_row = B[row, group], C[row, group]
        for c in range(p):
            memory, inlet, total = state[row, head, c], size * x[row, head, c], kind.type(0)
            for k in range(n):
                memory[k] = decay * memory[k] + inlet * b_row[k]
                total += memory[k] * c_row[k]
            y[row, head, c] = total + D[head, c % D.shape[1]] * x[row, head, c]

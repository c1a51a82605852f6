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

import functools
import struct
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import softplus

from longwave.ops import numba_math
from longwave.ops.checks import state_dtype
from longwave.ops.numba_chunks import (
    add_upper_product,
    chunk_starts,
    copy,
    copy_rows,
    copy_transposed,
    dot,
    load_states,
    pass_state,
    past_gradients,
    row_of,
    scale_rows,
    step_gradients,
    store_states,
)
from longwave.ops.numba_math import exp, jit
from longwave.ops.numba_matmul import COLUMNS, ROWS, add_lower_product, add_product, padded
from longwave.ops.openmp import carray, next_ticket, pointer, region, run
from longwave.ops.rows import flat
from longwave.ops.ssd.reference import step_sizes
from longwave.ops.threads import parallel_for

_CHUNK = 64
_HEADS = 4
_STEP_ELEMENTS = 1 << 15  # of the state, for which another thread is worth starting


def forward(x, dt, A, B, C, D, dt_bias, initial_state, reset, lengths, dt_softplus, low, high, chunk_len):
    b, l, h, p = x.shape
    inputs = _Inputs(x, A, B, C, D, initial_state, reset, lengths, chunk_len)
    sizes = step_sizes(dt.detach().to(inputs.dtype), dt_bias, dt_softplus, (low, high)).detach().contiguous()
    y = inputs.empty(b, l, h, p)
    final = torch.empty(b, h, p, B.shape[-1], dtype=inputs.dtype)

    def body(i: int) -> None:
        _forward_heads(*inputs.kernel_args, sizes.numpy(), y.numpy(), final.numpy(), *inputs.block(i))

    parallel_for(inputs.n_blocks, body)
    return y.to(x.dtype), final


def backward(dy, dfinal, x, dt, A, B, C, D, dt_bias, initial_state, reset, lengths, dt_softplus, low, high, chunk_len):
    b, l, h, p = x.shape
    g, n = B.shape[2:]
    inputs = _Inputs(x, A, B, C, D, initial_state, reset, lengths, chunk_len)
    sizes = step_sizes(dt.detach().to(inputs.dtype), dt_bias, dt_softplus, (low, high)).detach().contiguous()
    dy_flat, dy_strides = flat(dy.to(inputs.dtype))
    # Heads of one group add to the same dB and dC: each block has a slice of its own, summed in a fixed order.
    dx, dB, dC = inputs.empty(b, l, h, p), *(inputs.empty(b, l, g, inputs.splits, n) for _ in range(2))
    dsizes = inputs.empty(b, l, h)
    dA, dD = torch.zeros(b, h, dtype=torch.float64), torch.zeros(b, h, p, dtype=torch.float64)  # sums over all tokens
    dstate = dfinal.to(inputs.dtype, copy=True).contiguous()
    outputs = [t.numpy() for t in (dx, dsizes, dA, dB, dC, dD, dstate)]

    def body(i: int) -> None:
        _backward_heads(*inputs.kernel_args, sizes.numpy(), dy_flat, dy_strides, *outputs, *inputs.block(i))

    parallel_for(inputs.n_blocks, body)
    ddt = _step_size_gradient(dsizes, dt, dt_bias, dt_softplus, low, high, lengths)
    dD = dD.sum((0, 2)) if D is not None and D.dim() == 1 else dD.sum(0)
    grads = (
        (dx, x),
        (ddt, dt),
        (dA.sum(0), A),
        (dB.sum(3), B),
        (dC.sum(3), C),
        (dD, D),
        (ddt.sum((0, 1)), dt_bias),
        (dstate, initial_state),
    )
    return tuple(x.new_empty(0) if t is None else grad.to(t.dtype).contiguous() for grad, t in grads)


def _step_size_gradient(grad, dt, dt_bias, dt_softplus, low, high, lengths) -> Tensor:
    """The gradient of dt from that of clamp(softplus(dt + dt_bias)): zero where clamped and from lengths on."""
    raw = step_sizes(dt.detach().to(grad.dtype), dt_bias, False, (-torch.inf, torch.inf))
    sizes = softplus(raw) if dt_softplus else raw
    if dt_softplus:
        grad = torch.ops.aten.softplus_backward(grad, raw, 1.0, 20.0)
    stopped = (sizes < low) | (sizes > high)
    if lengths is not None:
        stopped |= (torch.arange(dt.shape[1]) >= lengths[:, None])[..., None]
    return grad.masked_fill(stopped, 0.0)


def step(state, x, dt, A, B, C, D, dt_bias, dt_softplus, low, high):
    b, h, p, n = state.shape
    dtype = state.dtype
    y = torch.empty(b, h, p, dtype=dtype)
    memory = state.contiguous()
    # The kernel gets addresses only, so this list keeps the tensors alive; 0 stands for what is absent.
    tensors = [_dense(t, dtype) for t in (memory, y, x, dt, A, B, C, D, dt_bias)]
    skips = 0 if D is None else D.numel() // h
    limits = struct.unpack("2q", struct.pack("2d", low, high))  # the bits of float64
    words = [b, h, p, n, B.shape[1], skips, dt_softplus, *limits, *(0 if t is None else t.data_ptr() for t in tensors)]
    run(_step_kernel(dtype), words, n_blocks=max(1, state.numel() // _STEP_ELEMENTS))
    if memory is not state:
        state.copy_(memory)
    return y if dtype is x.dtype else y.to(x.dtype)


def _dense(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if t is None or (t.dtype is dtype and t.is_contiguous()):  # even a `to` that does nothing costs 1 us
        return t
    return t.to(dtype).contiguous()


class _Inputs:
    """What both kernels read, in the accumulation dtype, and how the work is cut."""

    def __init__(self, x, A, B, C, D, initial_state, reset, lengths, chunk_len):
        b, l, h, p = x.shape
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
            A.detach().to(self.dtype).contiguous().numpy(),
            skip.contiguous().numpy(),
            state.contiguous().numpy(),
            np.zeros((b, l), np.bool_) if reset is None else reset.contiguous().numpy(),
            np.full(b, l) if lengths is None else lengths.contiguous().numpy(),
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
def _decays(sizes, row, start, head, a, dt, cum, from_past, to_future):
    """The chunk's dt; cum_i = sum_{j<=i} dt_j a; exp(cum_i), and exp(cum_last - cum_i)."""
    total = 0.0
    for i in range(len(cum)):
        dt[i] = sizes[row, start + i, head]
        total += np.float64(dt[i]) * np.float64(a)
        cum[i] = total
    for i in range(len(cum)):
        from_past[i] = np.exp(cum[i])
        to_future[i] = np.exp(total - cum[i])


@jit
def _forward_heads(
    x, x_strides, B, b_strides, C, c_strides, A, D, initial, reset, ends, q, sizes, y, final, row, group, _, h0, h1
):
    _, _, p, n = initial.shape
    p_wide, q_wide = padded(p, COLUMNS), padded(q, COLUMNS)
    kind, b_step = x.dtype, b_strides[1]
    states = load_states(initial, row, h0, h1, p_wide)
    ct, st, mt = np.zeros(n * q_wide, kind), np.empty(q * q_wide, kind), np.empty(q * q_wide, kind)
    x_chunk, y_chunk = np.zeros(q * p_wide, kind), np.empty(q * p_wide, kind)
    scratch, sums = np.empty((3, q), kind), np.empty(q)
    starts = chunk_starts(reset, row, ends[row], q)

    for chunk in range(len(starts) - 1):
        start, size = starts[chunk], starts[chunk + 1] - starts[chunk]
        dt, from_past, to_future, cum = scratch[0, :size], scratch[1, :size], scratch[2, :size], sums[:size]
        if reset[row, start]:
            states[:] = 0
        b_at = row * b_strides[0] + start * b_step + group * b_strides[2]
        c_at = row * c_strides[0] + start * c_strides[1] + group * c_strides[2]
        copy_transposed(C[c_at:], c_strides[1], size, n, ct, q_wide)
        st[:] = 0
        add_product(B[b_at:], b_step, 1, ct, st, size, n, q_wide)
        for head in range(h0, h1):
            _decays(sizes, row, start, head, A[head], dt, cum, from_past, to_future)
            x_at = row * x_strides[0] + start * x_strides[1] + head * x_strides[2]
            copy_rows(x[x_at:], x_strides[1], size, p, x_chunk, p_wide)
            _weigh_pairs(st, cum, dt, q_wide, mt)
            state = row_of(states, head - h0, n * p_wide)
            y_chunk[:] = 0
            add_product(ct, 1, q_wide, state, y_chunk, size, n, p_wide)
            scale_rows(y_chunk, p_wide, size, from_past)
            add_lower_product(mt, 1, q_wide, x_chunk, y_chunk, size, p_wide)
            skip = D[head]
            for i in range(size):
                out, y_row, x_row = y[row, start + i, head], row_of(y_chunk, i, p_wide), row_of(x_chunk, i, p_wide)
                for c in range(p):
                    out[c] = y_row[c] + skip[c] * x_row[c]
            to_future *= dt
            scale_rows(x_chunk, p_wide, size, to_future)
            pass_state(state, from_past[size - 1], B[b_at:], 1, b_step, x_chunk, n, size, p_wide)
    store_states(states, row, h0, h1, p_wide, final)


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
    states = load_states(initial, row, h0, h1, p_wide)
    saved = np.empty((len(starts) - 1) * len(states), kind)
    x_chunk, scratch, sums = np.zeros(q * p_wide, kind), np.empty((3, q), kind), np.empty(q)
    for chunk in range(len(starts) - 1):
        start, size = starts[chunk], starts[chunk + 1] - starts[chunk]
        dt, from_past, to_future, cum = scratch[0, :size], scratch[1, :size], scratch[2, :size], sums[:size]
        if reset[row, start]:
            states[:] = 0
        copy(states, row_of(saved, chunk, len(states)))
        b_at = row * b_strides[0] + start * b_strides[1] + group * b_strides[2]
        for head in range(h0, h1):
            _decays(sizes, row, start, head, A[head], dt, cum, from_past, to_future)
            x_at = row * x_strides[0] + start * x_strides[1] + head * x_strides[2]
            copy_rows(x[x_at:], x_strides[1], size, p, x_chunk, p_wide)
            to_future *= dt
            scale_rows(x_chunk, p_wide, size, to_future)
            state = row_of(states, head - h0, n * p_wide)
            pass_state(state, from_past[size - 1], B[b_at:], 1, b_strides[1], x_chunk, n, size, p_wide)
    return saved


@jit
def _pair_gradients(st, gt, cum, dt, q_wide, mt, dst, flow, da):
    """Gradients through the pairs j <= i of one head and chunk.

    gt (q, q) is (dy_i . x_j)^T. Fills mt with the transposed decays times C B^T, adds to dst, the gradient of st, and
    sets da_k to what flows over step k, from every j < k to every i >= k: a sum without cancellation.
    """
    size = len(cum)
    flow[:] = 0
    da[0] = 0
    for j in range(size):
        mt[j * q_wide + j // ROWS * ROWS : j * q_wide + j] = 0  # read by the tile on the diagonal
        at = j * q_wide + j
        pairs, products, weights, grads, flows, after = st[at:], gt[at:], mt[at:], dst[at:], flow[j:], cum[j:]
        for i in range(size - j):
            decay = exp(dt.dtype.type(after[i] - cum[j]))
            grad = decay * products[i] * dt[j]
            weights[i] = decay * pairs[i]
            grads[i] += grad
            flows[i] += grad * pairs[i]
        if j + 1 < size:
            da[j + 1] = flows[1 : size - j].sum()


@jit
def _backward_heads(
    x, x_strides, B, b_strides, C, c_strides, A, D, initial, reset, ends, q, sizes,
    dy, dy_strides, dx, dsizes, dA, dB, dC, dD, dstate, row, group, split, h0, h1,
):  # fmt: skip
    _, _, p, n = initial.shape
    p_wide, q_wide = padded(p, COLUMNS), padded(q, COLUMNS)
    kind, b_step = x.dtype, b_strides[1]
    starts = chunk_starts(reset, row, ends[row], q)
    saved = _chunk_states(x, x_strides, B, b_strides, A, initial, reset, starts, q, sizes, row, group, h0, h1)
    dstates = load_states(dstate, row, h0, h1, p_wide)
    c_blocks, q_blocks = np.zeros((4, n * q_wide), kind), np.zeros((4, q * q_wide), kind)
    ct, dct, dbt, zt = c_blocks[0], c_blocks[1], c_blocks[2], c_blocks[3]
    st, dst, gt, mt = q_blocks[0], q_blocks[1], q_blocks[2], q_blocks[3]
    x_chunk, dy_chunk, u = np.zeros(q * p_wide, kind), np.zeros(q * p_wide, kind), np.zeros(q * p_wide, kind)
    xt, dyt = np.zeros(p * q_wide, kind), np.zeros(p * q_wide, kind)
    scratch, sums = np.empty((3, q), kind), np.empty((5, q))

    for chunk in range(len(starts) - 2, -1, -1):
        start, size = starts[chunk], starts[chunk + 1] - starts[chunk]
        dt, from_past, to_future, cum = scratch[0, :size], scratch[1, :size], scratch[2, :size], sums[0, :size]
        da, flow, forth, back = sums[1, :size], sums[2, :size], sums[3, :size], sums[4, :size]
        b_at = row * b_strides[0] + start * b_step + group * b_strides[2]
        c_at = row * c_strides[0] + start * c_strides[1] + group * c_strides[2]
        copy_transposed(C[c_at:], c_strides[1], size, n, ct, q_wide)
        st[:], dst[:], dct[:], dbt[:] = 0, 0, 0, 0
        add_product(B[b_at:], b_step, 1, ct, st, size, n, q_wide)
        for head in range(h0, h1):
            _decays(sizes, row, start, head, A[head], dt, cum, from_past, to_future)
            x_at = row * x_strides[0] + start * x_strides[1] + head * x_strides[2]
            dy_at = row * dy_strides[0] + start * dy_strides[1] + head * dy_strides[2]
            copy_rows(x[x_at:], x_strides[1], size, p, x_chunk, p_wide)
            copy_rows(dy[dy_at:], dy_strides[1], size, p, dy_chunk, p_wide)
            copy_transposed(dy[dy_at:], dy_strides[1], size, p, dyt, q_wide)
            state = row_of(saved, chunk * (h1 - h0) + head - h0, n * p_wide)
            dstate_head = row_of(dstates, head - h0, n * p_wide)

            gt[:] = 0
            add_product(x_chunk, p_wide, 1, dyt, gt, size, p, q_wide)
            _pair_gradients(st, gt, cum, dt, q_wide, mt, dst, flow, da)
            u[:] = 0
            add_product(B[b_at:], b_step, 1, dstate_head, u, size, n, p_wide)
            scale_rows(u, p_wide, size, to_future)
            for j in range(size):
                forth[j] = dot(row_of(u, j, p_wide), row_of(x_chunk, j, p_wide)) * dt[j]
            add_upper_product(mt, q_wide, dy_chunk, size, p_wide, u)
            past_gradients(state, dyt, from_past, ct, n, p, p_wide, q_wide, zt, dct, back)
            step_gradients(forth, back, from_past[size - 1] * dot(state, dstate_head), da)
            _write_gradients(
                x_chunk, dy_chunk, u, dt, da, A[head], D[head], dx[row, start:], dsizes[row, start:], dD[row], head
            )
            dA[row, head] += dot(da, dt)

            to_future *= dt
            scale_rows(x_chunk, p_wide, size, to_future)
            copy_transposed(x_chunk, p_wide, size, p, xt, q_wide)
            add_product(dstate_head, p_wide, 1, xt, dbt, n, p, q_wide)
            scale_rows(dy_chunk, p_wide, size, from_past)
            pass_state(dstate_head, from_past[size - 1], ct, q_wide, 1, dy_chunk, n, size, p_wide)
        if reset[row, start]:
            dstates[:] = 0
        add_product(B[b_at:], 1, b_step, dst, dct, n, size, q_wide)
        copy_transposed(dst, q_wide, size, size, gt, q_wide)
        add_product(ct, q_wide, 1, gt, dbt, n, size, q_wide)
        for i in range(size):
            db_row, dc_row = dB[row, start + i, group, split], dC[row, start + i, group, split]
            for k in range(n):
                db_row[k], dc_row[k] = dbt[k * q_wide + i], dct[k * q_wide + i]
    store_states(dstates, row, h0, h1, p_wide, dstate)


@jit
def _write_gradients(x_chunk, dy_chunk, u, dt, da, a, skip, dx, dsizes, dD, head):
    """dx, d(dt) and dD of one head and chunk from u_j, the gradient of dt_j x_j, and da_j, that of dt_j a."""
    p_wide, dskip = padded(len(skip), COLUMNS), dD[head]
    for j in range(len(dt)):
        x_row, dy_row, u_row, out = (
            row_of(x_chunk, j, p_wide),
            row_of(dy_chunk, j, p_wide),
            row_of(u, j, p_wide),
            dx[j, head],
        )
        dsizes[j, head] = dot(u_row, x_row) + da[j] * a
        for c in range(len(skip)):
            out[c] = dt[j] * u_row[c] + skip[c] * dy_row[c]
            dskip[c] += dy_row[c] * x_row[c]


@functools.cache
def _step_kernel(dtype: torch.dtype) -> Any:
    """The parallel region of `step`: threads draw heads."""
    scalar, size = (np.float64, 8) if dtype == torch.float64 else (np.float32, 4)

    @region
    def kernel(words):
        # fmt: off
        _, b, h, p, n, g, skips, dt_softplus, _, _, state, y, x, dt, A, B, C, D, dt_bias = carray(words, 19, np.int64)
        # fmt: on
        low, high = scalar(carray(words, 10, np.float64)[8]), scalar(carray(words, 10, np.float64)[9])
        i = next_ticket(words)
        while i < b * h:
            row, head = i // h, i % h
            group = (row * g + head // (h // g)) * n
            step = carray(pointer(dt + i * size), 1, scalar)[0]
            if dt_bias:
                step += carray(pointer(dt_bias + head * size), 1, scalar)[0]
            if dt_softplus:
                step = numba_math.softplus(step)
            step = low if step < low else high if step > high else step  # a NaN stays
            decay = exp(step * carray(pointer(A + head * size), 1, scalar)[0])
            heads = carray(pointer(state + i * p * n * size), (p, n), scalar)
            b_row, c_row = carray(pointer(B + group * size), n, scalar), carray(pointer(C + group * size), n, scalar)
            x_row, out = carray(pointer(x + i * p * size), p, scalar), carray(pointer(y + i * p * size), p, scalar)
            for c in range(p):
                out[c] = _step_channel(heads[c], decay, step * x_row[c], b_row, c_row)
            if skips:
                skip = carray(pointer(D + head * skips * size), skips, scalar)
                for c in range(p):
                    out[c] += skip[c % skips] * x_row[c]
            i = next_ticket(words)

    return kernel


@jit
def _step_channel(state, decay, inlet, B, C):
    """One token of one channel: state (n,) <- decay state + inlet B, in place; returns state . C."""
    total = state.dtype.type(0)
    for k in range(len(state)):
        new = decay * state[k] + inlet * B[k]
        state[k] = new
        total += new * C[k]
    return total

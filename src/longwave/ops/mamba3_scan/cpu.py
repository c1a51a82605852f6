"""Mamba-3's scan on the CPU, chunk after chunk, as matrix products between blocks that lie in cache.

What token t takes from v_{t-1} k_{t-1}^T decays as what is in the state already does. So v_j k_j^T counts with

    w_j = trap_j dt_j + (1 - trap_{j+1}) dt_{j+1}

for all tokens after j, where the second term is 0 if j + 1 starts a document or is not there, and for token j itself
with gamma_j = trap_j dt_j. Within a chunk that starts from the state H, which holds what its first token takes from the
token before it, and with cum_i the sum of dt A up to and with token i,

    y_i = exp(cum_i) H q_i + sum_{j<i} exp(cum_i - cum_j) w_j (q_i . k_j) v_j + gamma_i (q_i . k_i) v_i + D v_i
    H  <- exp(cum_last) H + sum_j exp(cum_last - cum_j) w_j v_j k_j^T

as in `ssd`, whose notes hold here too: float64 cum, chunks that end before a reset, the state as (n, p), names in t
for transposed blocks. q and k differ from head to head by bias and rotation; they are made for one head and chunk at a
time, from B^T and C^T, so that the rotation runs along tokens. Ranks take turns: there is a product for each pair.
"""

import functools
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from longwave.ops.checks import state_dtype
from longwave.ops.numba_chunks import (
    add,
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
from longwave.ops.numba_rotation import rotate, rotate_back, rotate_token, turn, turn_back, unit_circle, wrapped
from longwave.ops.openmp import carray, next_ticket, pointer, region, run
from longwave.ops.output_gate import finished, gate_gradients
from longwave.ops.rows import flat
from longwave.ops.threads import parallel_for
from longwave.ops.trapezoid import Trapezoid

_CHUNK = 64  # tokens, for one rank
_CHUNK_OF_RANKS = 32
_HEADS = 4
_STEP_ELEMENTS = 1 << 15  # of the state, for which another thread is worth starting


class _Sequence(NamedTuple):
    """What the kernels read for each token, in the accumulation dtype; flat arrays are followed by their strides."""

    x: Any
    x_strides: Any
    B: Any
    b_strides: Any
    C: Any
    c_strides: Any
    rates: Any  # angles (b, l, s)
    rate_strides: Any
    dt: Any  # (b, l, h), and the next three
    dtA: Any
    gamma: Any
    weight: Any
    reset: Any  # (b, l)
    ends: Any  # (b,)


class _Parameters(NamedTuple):
    B_bias: Any  # (h, r, n)
    C_bias: Any  # (h, r, n)
    D: Any  # (h,)
    mimo_x: Any  # (h, r, p)
    halves: Any


class _Chunk(NamedTuple):
    """Blocks of one chunk; rows of those that are transposed are q_wide apart."""

    rates: Any  # (s, q)
    cos: Any  # (s, q)
    sin: Any  # (s, q)
    sums: Any  # (q,), float64
    bt: Any  # (r, n q): B^T of the group
    ct: Any  # (r, n q)
    kt: Any  # (r, n q): of the head
    qt: Any  # (r, n q)
    v: Any  # (r, q p_wide)
    dt: Any  # (q,), and the next four
    gamma: Any
    weight: Any
    from_past: Any
    to_future: Any
    cum: Any  # (q,), float64
    st: Any  # (q q): k_j . q_i
    mt: Any  # (q q): how much v_j counts for y_i


def forward(
    x, dt, A, B, C, trap, angles, B_bias, C_bias, D, mimo_x, angle, ssm, k, v,
    reset, lengths, halves, chunk_len, z, finish, keep,
):  # fmt: skip
    work = _Work(x, dt, A, B, C, trap, angles, B_bias, C_bias, D, mimo_x, reset, lengths, halves, chunk_len)
    y = work.empty(*x.shape[:2], B.shape[2], *x.shape[2:])
    state = work.rule.entry(ssm, k, v, work.mimo_x)
    last_angle, last_k = (t.detach().to(work.rule.dtype, copy=True).contiguous() for t in (angle, k))
    outputs = [t.numpy() for t in (y, last_angle, state, last_k)]

    def body(i: int) -> None:
        _forward_heads(*work.kernel_args, *outputs, *work.block(i))

    parallel_for(work.n_blocks, body)
    last = last_angle, state, last_k.to(x.dtype), work.rule.last(x, v)
    return *finished(y, x, z, lengths, finish, keep), *last


def backward(
    dy, dangle, dssm, dk, dv, x, dt, A, B, C, trap, angles, B_bias, C_bias, D, mimo_x, angle, ssm, k, v,
    reset, lengths, halves, chunk_len, z, ungated,
):  # fmt: skip
    work = _Work(x, dt, A, B, C, trap, angles, B_bias, C_bias, D, mimo_x, reset, lengths, halves, chunk_len)
    b, l, h, p = x.shape
    r, g, n = B.shape[2:]
    dx, ddt, ddtA, dgamma, dweight = work.empty(b, l, h, p), *(work.empty(b, l, h) for _ in range(4))
    # Heads of one group add to the same dB and dC: each block has a slice of its own, summed in a fixed order.
    dB, dC = (work.empty(b, l, r, g, work.splits, n) for _ in range(2))
    dangles = work.empty(b, l, g * work.splits, angles.shape[-1])
    sums = [torch.zeros(b, *size, dtype=torch.float64) for size in ((h, r, n), (h, r, n), (h,), (h, r, p))]
    dstate, dangle = (t.to(work.rule.dtype, copy=True).contiguous() for t in (dssm, dangle))
    grads = _Gradients(*(t.numpy() for t in (dx, ddt, ddtA, dgamma, dweight, dB, dC, dangles, *sums, dstate, dangle)))
    entry, first_angle, last_dk = (
        t.contiguous().numpy()
        for t in (work.rule.entry(ssm, k, v, work.mimo_x), work.rule.exact(angle), work.rule.exact(dk))
    )
    dy, dz = gate_gradients(work.rule.exact(dy), z, ungated, lengths, work.rule.dtype)
    dy_flat, dy_strides = flat(dy)

    def body(i: int) -> None:
        _backward_heads(*work.kernel_args, entry, first_angle, dy_flat, dy_strides, last_dk, grads, *work.block(i))

    parallel_for(work.n_blocks, body)
    dB_bias, dC_bias, dD, dmimo_x = (t.sum(0) for t in sums)
    dk, dv, dfirst, dmimo_entry = work.rule.entry_gradients(dstate, k, v, work.mimo_x, dk, dv, dx)
    ddt, dA, dtrap = work.rule.size_gradients(ddt, ddtA, dgamma, dweight, dfirst)
    tensors = (x, dt, A, B, C, trap, angles, B_bias, C_bias, D, mimo_x, angle, ssm, k, v)
    results = (
        dx, ddt, dA, dB.sum(4), dC.sum(4), dtrap, dangles.sum(2),
        dB_bias, dC_bias, dD, dmimo_x + dmimo_entry, dangle, dstate, dk, dv,
    )  # fmt: skip
    grads = (
        x.new_empty(0) if t is None else grad.to(t.dtype).contiguous() for grad, t in zip(results, tensors, strict=True)
    )
    return *grads, dz


class _Work:
    """What both kernels read, in the accumulation dtype, and how the work is cut."""

    def __init__(self, x, dt, A, B, C, trap, angles, B_bias, C_bias, D, mimo_x, reset, lengths, halves, chunk_len):
        b, l, h, p = x.shape
        r, self.g, n = B.shape[2:]
        self.heads = h // self.g
        self.splits = -(-self.heads // _HEADS)
        self.n_blocks = b * self.g * self.splits
        self.rule = Trapezoid(dt, A, trap, reset, lengths, state_dtype(x.dtype))
        reset = torch.zeros(b, l, dtype=torch.bool) if reset is None else reset
        gamma = self.rule.trap * self.rule.dt
        weight = gamma + torch.nn.functional.pad(self.rule.early()[:, 1:], (0, 0, 0, 1))
        sequence = _Sequence(
            *flat(self.rule.exact(x)),
            *flat(self.rule.exact(B)),
            *flat(self.rule.exact(C)),
            *flat(self.rule.exact(angles)),
            self.rule.dt.contiguous().numpy(),
            (self.rule.dt * self.rule.A).contiguous().numpy(),
            gamma.contiguous().numpy(),
            weight.contiguous().numpy(),
            reset.contiguous().numpy(),
            np.full(b, l) if lengths is None else lengths.contiguous().numpy(),
        )
        B_bias, C_bias, D, self.mimo_x = _parameters(B_bias, C_bias, D, mimo_x, (h, r, p, n), self.rule.dtype)
        kernel_parameters = _Parameters(B_bias.numpy(), C_bias.numpy(), D.numpy(), self.mimo_x.numpy(), halves)
        self.kernel_args = (
            sequence,
            kernel_parameters,
            min(chunk_len or (_CHUNK if r == 1 else _CHUNK_OF_RANKS), l),
        )

    def empty(self, *size: int) -> Tensor:
        """For what the kernels write: they leave out what is not there."""
        return (torch.empty if self.rule.lengths is None else torch.zeros)(*size, dtype=self.rule.dtype)

    def block(self, i: int) -> tuple[int, int, int, int, int]:
        """Row, group, split of the group, first head and end of heads of block i."""
        row, rest = divmod(i, self.g * self.splits)
        group, split = divmod(rest, self.splits)
        first = group * self.heads
        return row, group, split, first + split * _HEADS, first + min((split + 1) * _HEADS, self.heads)


def _parameters(B_bias, C_bias, D, mimo_x, sizes: tuple[int, int, int, int], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """B_bias, C_bias, D and mimo_x, dense, and what stands for those that are None."""
    h, r, p, n = sizes
    absent = (((h, r, n), 0.0), ((h, r, n), 0.0), ((h,), 0.0), ((h, r, p), 1.0))
    return tuple(
        torch.full(shape, value, dtype=dtype) if t is None else _dense(t.detach(), dtype)
        for t, (shape, value) in zip((B_bias, C_bias, D, mimo_x), absent, strict=True)
    )


@jit
def _new_chunk(sequence, parameters, s, q):
    _, r, n = parameters.B_bias.shape
    p_wide, q_wide, kind = padded(parameters.mimo_x.shape[2], COLUMNS), padded(q, COLUMNS), sequence.x.dtype
    angles, columns = np.zeros((3, s * q_wide), kind), np.zeros((4, r, n * q_wide), kind)
    tokens, pairs = np.zeros((5, q), kind), np.zeros((2, q * q_wide), kind)
    return _Chunk(
        angles[0], angles[1], angles[2], np.zeros(q),
        columns[0], columns[1], columns[2], columns[3], np.zeros((r, q * p_wide), kind),
        tokens[0], tokens[1], tokens[2], tokens[3], tokens[4], np.zeros(q), pairs[0], pairs[1],
    )  # fmt: skip


@jit
def _load_group(sequence, chunk, row, group, start, size, s, q_wide):
    """The chunk's angles, B and C, which the heads of a group share."""
    r = len(chunk.bt)
    n = chunk.bt.shape[1] // q_wide
    at = row * sequence.rate_strides[0] + start * sequence.rate_strides[1]
    copy_transposed(sequence.rates[at:], sequence.rate_strides[1], size, s, chunk.rates, q_wide)
    for o in range(r):
        for source, strides, out in (
            (sequence.B, sequence.b_strides, chunk.bt[o]),
            (sequence.C, sequence.c_strides, chunk.ct[o]),
        ):
            at = row * strides[0] + start * strides[1] + o * strides[2] + group * strides[3]
            copy_transposed(source[at:], strides[1], size, n, out, q_wide)


@jit
def _load_head(sequence, parameters, chunk, row, head, start, size, angle, q_wide):
    """The rest of the chunk for one head, whose `angle` (s,) it takes to the chunk's end."""
    _, r, p = parameters.mimo_x.shape
    s = len(angle)
    p_wide, total = padded(p, COLUMNS), 0.0
    for i in range(size):
        chunk.dt[i] = sequence.dt[row, start + i, head]
        chunk.gamma[i] = sequence.gamma[row, start + i, head]
        chunk.weight[i] = sequence.weight[row, start + i, head]
        total += np.float64(sequence.dtA[row, start + i, head])
        chunk.cum[i] = total
    for i in range(size):
        chunk.from_past[i] = np.exp(chunk.cum[i])
        chunk.to_future[i] = np.exp(total - chunk.cum[i])
    turn(chunk.rates, chunk.dt[:size], q_wide, angle, chunk.sums, chunk.cos, chunk.sin)
    at = row * sequence.x_strides[0] + start * sequence.x_strides[1] + head * sequence.x_strides[2]
    for o in range(r):
        rotate(
            chunk.bt[o],
            parameters.B_bias[head, o],
            chunk.cos,
            chunk.sin,
            s,
            size,
            q_wide,
            parameters.halves,
            chunk.kt[o],
        )
        rotate(
            chunk.ct[o],
            parameters.C_bias[head, o],
            chunk.cos,
            chunk.sin,
            s,
            size,
            q_wide,
            parameters.halves,
            chunk.qt[o],
        )
        scale, v = parameters.mimo_x[head, o], chunk.v[o]
        copy_rows(sequence.x[at:], sequence.x_strides[1], size, p, v, p_wide)
        for i in range(size):
            v_row = row_of(v, i, p_wide)
            for c in range(p):
                v_row[c] *= scale[c]


@jit
def _write_state(chunk, state, size, q_wide, p_wide):
    """The state (n, p_wide) after the chunk. Changes v and to_future."""
    n = chunk.kt.shape[1] // q_wide
    for i in range(size):
        chunk.to_future[i] *= chunk.weight[i]
    decay = chunk.from_past[size - 1]
    for o in range(len(chunk.kt)):
        scale_rows(chunk.v[o], p_wide, size, chunk.to_future)
        pass_state(state, decay, chunk.kt[o], q_wide, 1, chunk.v[o], n, size, p_wide)
        decay = chunk.dt.dtype.type(1)


@jit
def _forward_heads(sequence, parameters, q, y, angles, states_out, last_k, row, group, _, h0, h1):
    """Writes y, and the last k; takes the angles and the states in place from the first token to the last."""
    r, n, p, s = last_k.shape[1], last_k.shape[3], y.shape[4], angles.shape[2]
    p_wide, q_wide = padded(p, COLUMNS), padded(q, COLUMNS)
    chunk = _new_chunk(sequence, parameters, s, q)
    states, angle = load_states(states_out, row, h0, h1, p_wide), angles[row, h0:h1].astype(np.float64)
    y_chunk = np.empty(q * p_wide, sequence.x.dtype)
    starts = chunk_starts(sequence.reset, row, sequence.ends[row], q)

    for c in range(len(starts) - 1):
        start, size = starts[c], starts[c + 1] - starts[c]
        if sequence.reset[row, start]:
            states[:] = 0
            angle[:] = 0
        _load_group(sequence, chunk, row, group, start, size, s, q_wide)
        for head in range(h0, h1):
            _load_head(sequence, parameters, chunk, row, head, start, size, angle[head - h0], q_wide)
            state, skip = row_of(states, head - h0, n * p_wide), parameters.D[head]
            for o in range(r):
                y_chunk[:] = 0
                add_product(chunk.qt[o], 1, q_wide, state, y_chunk, size, n, p_wide)
                scale_rows(y_chunk, p_wide, size, chunk.from_past)
                for a in range(r):
                    chunk.st[:] = 0
                    add_product(chunk.kt[a], 1, q_wide, chunk.qt[o], chunk.st, size, n, q_wide)
                    _weigh_pairs(chunk, size, q_wide)
                    add_lower_product(chunk.mt, 1, q_wide, chunk.v[a], y_chunk, size, p_wide)
                for i in range(size):
                    out, y_row, v_row = (
                        y[row, start + i, o, head],
                        row_of(y_chunk, i, p_wide),
                        row_of(chunk.v[o], i, p_wide),
                    )
                    for e in range(p):
                        out[e] = y_row[e] + skip * v_row[e]
            _write_state(chunk, state, size, q_wide, p_wide)
            if c == len(starts) - 2:
                for o in range(r):
                    for k in range(n):
                        last_k[row, o, head, k] = chunk.kt[o, k * q_wide + size - 1]
    store_states(states, row, h0, h1, p_wide, states_out)
    angles[row, h0:h1] = angle


@jit
def _weigh_pairs(chunk, size, q_wide):
    """mt[j, i] = exp(cum_i - cum_j) w_j st[j, i] for i > j, and gamma_j st[j, j]; the rest is not touched."""
    for j in range(size):
        at = j * q_wide + j
        pairs, out, after = chunk.st[at:], chunk.mt[at:], chunk.cum[j:]
        for i in range(size - j):
            out[i] = exp(chunk.dt.dtype.type(after[i] - chunk.cum[j])) * pairs[i] * chunk.weight[j]
        out[0] = chunk.gamma[j] * pairs[0]


class _Gradients(NamedTuple):
    """What the backward kernel writes. dB and dC (b, l, r, g, splits, n), angles (b, l, g splits, s): slices to sum."""

    x: Any
    dt: Any  # (b, l, h): what comes by way of the angles
    dtA: Any
    gamma: Any
    weight: Any
    B: Any
    C: Any
    rates: Any
    B_bias: Any  # (b, h, r, n), float64, and the next three
    C_bias: Any
    D: Any
    mimo_x: Any
    states: Any  # (b, h, p, n): in, after the last token; out, before the first
    angles: Any  # (b, h, s): as states


@jit
def _chunk_states(sequence, parameters, chunk, starts, entry, angles, q_wide, row, group, h0, h1):
    """The states that the chunks start from, (chunks, heads, n, p_wide) flat, and their angles (chunks, heads, s)."""
    n, p_wide, s = entry.shape[3], padded(entry.shape[2], COLUMNS), angles.shape[2]
    states, angle = load_states(entry, row, h0, h1, p_wide), angles[row, h0:h1].astype(np.float64)
    saved = np.empty((len(starts) - 1) * len(states), sequence.x.dtype)
    saved_angles = np.empty((len(starts) - 1, h1 - h0, s))
    for c in range(len(starts) - 1):
        start, size = starts[c], starts[c + 1] - starts[c]
        if sequence.reset[row, start]:
            states[:] = 0
            angle[:] = 0
        copy(states, row_of(saved, c, len(states)))
        saved_angles[c] = angle
        _load_group(sequence, chunk, row, group, start, size, s, q_wide)
        for head in range(h0, h1):
            _load_head(sequence, parameters, chunk, row, head, start, size, angle[head - h0], q_wide)
            _write_state(chunk, row_of(states, head - h0, n * p_wide), size, q_wide, p_wide)
    return saved, saved_angles


@jit
def _pair_gradients(chunk, gt, size, q_wide, dst, flow, da, dgamma, dweight):
    """Gradients through the pairs j <= i of one head, chunk and pair of ranks.

    gt (q, q) is (dy_i . v_j)^T. Fills mt as `_weigh_pairs` does, and dst, the gradient of st. Adds to dgamma, dweight,
    and to da_k what flows over step k, from every j < k to every i >= k: a sum without cancellation.
    """
    flow[:] = 0
    for j in range(size):
        tile = j * q_wide + j // ROWS * ROWS
        chunk.mt[tile : j * q_wide + j] = 0  # read by the tile on the diagonal
        at, weight = j * q_wide + j, chunk.weight[j]
        pairs, products, out, grads = chunk.st[at:], gt[at:], chunk.mt[at:], dst[at:]
        flows, after, total = flow[j:], chunk.cum[j:], 0.0
        for i in range(1, size - j):
            decay = exp(chunk.dt.dtype.type(after[i] - chunk.cum[j]))
            out[i] = decay * pairs[i] * weight
            grads[i] = decay * products[i] * weight
            product = decay * pairs[i] * products[i]
            flows[i] += product * weight
            total += product
        dweight[j] += total
        dgamma[j] += pairs[0] * products[0]
        out[0], grads[0] = chunk.gamma[j] * pairs[0], chunk.gamma[j] * products[0]
        if j + 1 < size:
            da[j + 1] += flows[1 : size - j].sum()


@jit
def _backward_heads(
    sequence, parameters, q, entry, first_angle, dy, dy_strides, last_dk, grads, row, group, split, h0, h1
):  # fmt: skip
    _, _, p, n = entry.shape
    r, s, halves = last_dk.shape[1], first_angle.shape[2], parameters.halves
    p_wide, q_wide, kind = padded(p, COLUMNS), padded(q, COLUMNS), sequence.x.dtype
    chunk = _new_chunk(sequence, parameters, s, q)
    starts = chunk_starts(sequence.reset, row, sequence.ends[row], q)
    saved, angles = _chunk_states(sequence, parameters, chunk, starts, entry, first_angle, q_wide, row, group, h0, h1)
    dstates, dangle = load_states(grads.states, row, h0, h1, p_wide), grads.angles[row, h0:h1].astype(np.float64)
    columns, drates, dphases = (
        np.zeros((4, r, n * q_wide), kind),
        np.zeros(s * q_wide, kind),
        np.zeros(s * q_wide, kind),
    )
    dbt, dct, dkt, dqt = columns[0], columns[1], columns[2], columns[3]
    dst, gt, zt = np.zeros(q * q_wide, kind), np.zeros(q * q_wide, kind), np.zeros(n * q_wide, kind)
    dys, dyt = np.zeros((r, q * p_wide), kind), np.zeros((r, p * q_wide), kind)
    u, vt = np.zeros(q * p_wide, kind), np.zeros(p * q_wide, kind)
    sums = np.zeros((7, q))

    for c in range(len(starts) - 2, -1, -1):
        start, size = starts[c], starts[c + 1] - starts[c]
        _load_group(sequence, chunk, row, group, start, size, s, q_wide)
        dbt[:], dct[:], drates[:] = 0, 0, 0
        for head in range(h0, h1):
            _load_head(sequence, parameters, chunk, row, head, start, size, angles[c, head - h0], q_wide)
            state = row_of(saved, c * (h1 - h0) + head - h0, n * p_wide)
            dstate = row_of(dstates, head - h0, n * p_wide)
            dkt[:], dqt[:], dphases[:], sums[:] = 0, 0, 0, 0
            da, flow, forth, back = sums[0, :size], sums[1, :size], sums[2, :size], sums[3, :size]
            dgamma, dweight, ddt = sums[4, :size], sums[5, :size], sums[6, :size]
            if c == len(starts) - 2:
                for o in range(r):
                    for k in range(n):
                        dkt[o, k * q_wide + size - 1] = last_dk[row, o, head, k]
            for o in range(r):
                at = row * dy_strides[0] + start * dy_strides[1] + o * dy_strides[2] + head * dy_strides[3]
                copy_rows(dy[at:], dy_strides[1], size, p, dys[o], p_wide)
                copy_transposed(dy[at:], dy_strides[1], size, p, dyt[o], q_wide)
                past_gradients(state, dyt[o], chunk.from_past, chunk.qt[o], n, p, p_wide, q_wide, zt, dqt[o], flow)
                for i in range(size):
                    back[i] += flow[i]

            for a in range(r):
                v = chunk.v[a]
                u[:] = 0
                add_product(chunk.kt[a], 1, q_wide, dstate, u, size, n, p_wide)
                for j in range(size):
                    kept = dot(row_of(u, j, p_wide), row_of(v, j, p_wide)) * chunk.to_future[j]
                    dweight[j] += kept
                    forth[j] += kept * chunk.weight[j]
                scale_rows(u, p_wide, size, chunk.to_future)
                scale_rows(u, p_wide, size, chunk.weight)
                for o in range(r):
                    chunk.st[:], gt[:] = 0, 0
                    add_product(chunk.kt[a], 1, q_wide, chunk.qt[o], chunk.st, size, n, q_wide)
                    add_product(v, p_wide, 1, dyt[o], gt, size, p, q_wide)
                    _pair_gradients(chunk, gt, size, q_wide, dst, flow, da, dgamma, dweight)
                    add_upper_product(chunk.mt, q_wide, dys[o], size, p_wide, u)
                    add_product(chunk.kt[a], q_wide, 1, dst, dqt[o], n, size, q_wide)
                    copy_transposed(dst, q_wide, size, size, gt, q_wide)
                    add_product(chunk.qt[o], q_wide, 1, gt, dkt[a], n, size, q_wide)
                _write_value_gradients(sequence, parameters, u, dys[a], grads, row, head, a, start, size, p_wide)
                scale_rows(v, p_wide, size, chunk.to_future)
                scale_rows(v, p_wide, size, chunk.weight)
                copy_transposed(v, p_wide, size, p, vt, q_wide)
                add_product(dstate, p_wide, 1, vt, dkt[a], n, p, q_wide)

            step_gradients(forth, back, chunk.from_past[size - 1] * dot(state, dstate), da)
            decay = chunk.from_past[size - 1]
            for o in range(r):
                scale_rows(dys[o], p_wide, size, chunk.from_past)
                pass_state(dstate, decay, chunk.qt[o], q_wide, 1, dys[o], n, size, p_wide)
                decay = kind.type(1)
                rotate_back(
                    dkt[o], chunk.kt[o], chunk.cos, chunk.sin, s, size, q_wide, halves,
                    dphases, grads.B_bias[row, head, o], dbt[o],
                )  # fmt: skip
                rotate_back(
                    dqt[o], chunk.qt[o], chunk.cos, chunk.sin, s, size, q_wide, halves,
                    dphases, grads.C_bias[row, head, o], dct[o],
                )  # fmt: skip
            turn_back(dphases, chunk.rates, chunk.dt[:size], q_wide, dangle[head - h0], drates, ddt)
            for i in range(size):
                grads.dt[row, start + i, head], grads.dtA[row, start + i, head] = ddt[i], da[i]
                grads.gamma[row, start + i, head], grads.weight[row, start + i, head] = dgamma[i], dweight[i]
        if sequence.reset[row, start]:
            dstates[:] = 0
            dangle[:] = 0
        _write_group_gradients(dbt, dct, drates, grads, row, group, split, start, size, q_wide)
    store_states(dstates, row, h0, h1, p_wide, grads.states)
    grads.angles[row, h0:h1] = dangle


@jit
def _write_value_gradients(sequence, parameters, u, dys, grads, row, head, rank, start, size, p_wide):
    """From u, the gradient of v but for D: those of x, D and mimo_x."""
    strides, skip, scale = sequence.x_strides, parameters.D[head], parameters.mimo_x[head, rank]
    at, dscale, dskip = row * strides[0] + start * strides[1] + head * strides[2], grads.mimo_x[row, head, rank], 0.0
    for j in range(size):
        u_row, dy_row, out = row_of(u, j, p_wide), row_of(dys, j, p_wide), grads.x[row, start + j, head]
        x_row = sequence.x[at + j * strides[1] :][: len(scale)]
        for c in range(len(scale)):
            dv = u_row[c] + skip * dy_row[c]
            out[c] = dv * scale[c] if rank == 0 else out[c] + dv * scale[c]
            dscale[c] += dv * x_row[c]
            dskip += dy_row[c] * x_row[c] * scale[c]
    grads.D[row, head] += dskip


@jit
def _write_group_gradients(dbt, dct, drates, grads, row, group, split, start, size, q_wide):
    """dB, dC and the gradient of the angles of one chunk, from transposed blocks."""
    splits, n, s = grads.B.shape[4:] + grads.rates.shape[3:]
    for i in range(size):
        for o in range(len(dbt)):
            db, dc = grads.B[row, start + i, o, group, split], grads.C[row, start + i, o, group, split]
            for k in range(n):
                db[k], dc[k] = dbt[o, k * q_wide + i], dct[o, k * q_wide + i]
        out = grads.rates[row, start + i, group * splits + split]
        for j in range(s):
            out[j] = drates[j * q_wide + i]


def step(angle, ssm, k, v, x, dt, A, B, C, trap, angles, B_bias, C_bias, D, mimo_x, halves):
    b, h, p, n = ssm.shape
    r, g = B.shape[1:3]
    dtype, s = ssm.dtype, angle.shape[2]
    y, q, last = (torch.empty(b, r, h, width, dtype=dtype) for width in (p, n, n))
    circle, sums = torch.empty(b, h, 2, s, dtype=dtype), torch.empty(b, h, s, dtype=torch.float64)
    memory, turned = ssm.contiguous(), angle.contiguous()
    given = (_dense(t, dtype) for t in (k, v, x, dt, A, B, C, trap, angles))
    # The kernel gets addresses only, so this list keeps the tensors alive.
    tensors = [turned, memory, y, q, last, circle, sums, *given]
    tensors += _parameters(B_bias, C_bias, D, mimo_x, (h, r, p, n), dtype)
    words = [b, h, p, n, r, g, s, halves, *(t.data_ptr() for t in tensors)]
    run(_step_kernel(dtype), words, n_blocks=max(1, ssm.numel() // _STEP_ELEMENTS))
    for old, new in ((ssm, memory), (angle, turned), (k, last), (v, x)):
        if old is not new:
            old.copy_(new)
    return y


def _dense(t: Tensor, dtype: torch.dtype) -> Tensor:
    if t.dtype is dtype and t.is_contiguous():  # even a `to` that does nothing costs 1 us
        return t
    return t.to(dtype).contiguous()


@functools.cache
def _step_kernel(dtype: torch.dtype) -> Any:
    """The parallel region of `step`: threads draw heads."""
    scalar, size = (np.float64, 8) if dtype == torch.float64 else (np.float32, 4)

    @region
    def kernel(words):
        # fmt: off
        (
            _, b, h, p, n, r, g, s, halves, angle, ssm, y, q, last, circle, sums,
            k, v, x, dt, A, B, C, trap, angles, B_bias, C_bias, D, mimo_x,
        ) = carray(words, 29, np.int64)
        # fmt: on
        i = next_ticket(words)
        while i < b * h:
            row, head = i // h, i % h
            group = head // (h // g)
            step = carray(pointer(dt + i * size), 1, scalar)[0]
            share = carray(pointer(trap + i * size), 1, scalar)[0]
            decay = exp(step * carray(pointer(A + i * size), 1, scalar)[0])
            early, late = (scalar(1) - share) * step * decay, share * step
            turned = carray(pointer(angle + i * s * size), s, scalar)
            rates = carray(pointer(angles + row * s * size), s, scalar)
            total, cos_sin = carray(pointer(sums + i * s * 8), s, np.float64), circle + i * 2 * s * size
            cos, sin = carray(pointer(cos_sin), s, scalar), carray(pointer(cos_sin + s * size), s, scalar)
            for j in range(s):
                total[j] = wrapped(np.float64(turned[j]) + np.float64(rates[j]) * np.float64(step))
                turned[j] = total[j]
            unit_circle(total, cos, sin)

            state = carray(pointer(ssm + i * p * n * size), (p, n), scalar)
            now, before = carray(pointer(x + i * p * size), p, scalar), carray(pointer(v + i * p * size), p, scalar)
            for o in range(r):
                place, source = ((row * r + o) * h + head) * n * size, ((row * r + o) * g + group) * n * size
                parameter, k_now = (head * r + o) * size, carray(pointer(last + place), n, scalar)
                q_now, k_before = carray(pointer(q + place), n, scalar), carray(pointer(k + place), n, scalar)
                copy(carray(pointer(B + source), n, scalar), k_now)
                copy(carray(pointer(C + source), n, scalar), q_now)
                add(carray(pointer(B_bias + parameter * n), n, scalar), k_now)
                add(carray(pointer(C_bias + parameter * n), n, scalar), q_now)
                rotate_token(k_now, cos, sin, halves)
                rotate_token(q_now, cos, sin, halves)
                scale = carray(pointer(mimo_x + parameter * p), p, scalar)
                for c in range(p):
                    old, new = early * scale[c] * before[c], late * scale[c] * now[c]
                    _write_channel(state[c], decay, old, k_before, new, k_now)
                decay = scalar(1)
            skip = carray(pointer(D + head * size), 1, scalar)[0]
            for o in range(r):
                place, scale = (
                    ((row * r + o) * h + head) * size,
                    carray(pointer(mimo_x + (head * r + o) * p * size), p, scalar),
                )
                out, q_now = carray(pointer(y + place * p), p, scalar), carray(pointer(q + place * n), n, scalar)
                for c in range(p):
                    out[c] = _read_channel(state[c], q_now) + skip * scale[c] * now[c]
            i = next_ticket(words)

    return kernel


@jit
def _write_channel(state, decay, early, k_before, late, k_now):
    """state (n,) <- decay state + early k_before + late k_now, in place."""
    for i in range(len(state)):
        state[i] = decay * state[i] + early * k_before[i] + late * k_now[i]


@jit
def _read_channel(state, q):
    total = state.dtype.type(0)
    for i in range(len(state)):
        total += state[i] * q[i]
    return total

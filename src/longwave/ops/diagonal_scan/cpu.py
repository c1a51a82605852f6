"""Diagonal scan on the CPU: serial in time, vectorised over channels, in parallel over rows and channel blocks.

One block is some lanes of one row of the batch. With B and C a lane is a channel with all its modes; without, where
nothing is summed over modes, each mode is a lane, as if it were a channel with a single mode. Arrays of a block are
(2, n, lanes): real and imaginary part, modes, lanes; those past the last lane hold zeros. Abar and Bbar are computed
when dt differs from that of the token before. docs/ops/diagonal_scan.md has the recurrences.
"""

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor

from longwave.ops.checks import state_dtype
from longwave.ops.numba_bfloat16 import NUMBERS, narrow, widen
from longwave.ops.numba_discretize import METHODS, derivatives, discretize
from longwave.ops.numba_math import disjoint, jit
from longwave.ops.openmp import carray, next_ticket, pointer, region, run
from longwave.ops.rows import flat
from longwave.ops.threads import parallel_for

_CHANNELS = 16  # in a block, with all their modes: the arrays of 32 modes lie in the first-level cache
_LANES = 64  # in a block where each mode is a lane
_CHUNK_LEN = 32  # where no states are kept
_STEP_LANES = 256  # in a block of `step`
_STEP_ELEMENTS = 8192  # of the state, for which another thread is worth starting


def forward(u, dt, A, B, C, D, initial_state, reset, lengths, method, chunk_len) -> tuple[Tensor, Tensor, Tensor]:
    b, l = u.shape[:2]
    inputs = _Inputs(u, dt, A, B, reset, lengths)
    dtype, lanes, modes = inputs.dtype, inputs.lanes, inputs.modes
    state = inputs.state(initial_state)
    code = METHODS.index(method)
    states = torch.empty(b, -(-l // chunk_len) if chunk_len and C is not None else 0, 2, modes, lanes, dtype=dtype)
    y = inputs.new(u.shape, inputs.given if C is not None else dtype)
    if C is None:
        memory = y.view(b, l, 2 * lanes).numpy()
        arguments = (*inputs.arrays, inputs.planes(A), memory, state.numpy())
        parallel_for(inputs.n_blocks, lambda i: _forward_states(inputs.place(i), code, *arguments))
    else:
        parameters = inputs.planes(A), inputs.planes(B), 2 * inputs.planes(C), inputs.vector(D)
        arguments = (*inputs.arrays, *parameters, _memory(y), state.numpy(), states.numpy(), chunk_len or _CHUNK_LEN)
        parallel_for(inputs.n_blocks, lambda i: _forward_block(inputs.place(i), code, *arguments))
        y = y.to(u.dtype)
    return y, inputs.pairs(state), states


def backward(dy, dfinal, states, u, dt, A, B, C, D, initial_state, reset, lengths, method, chunk_len):
    """`states`: those before each chunk; without B and C the states of all tokens, as the forward returned them."""
    b, l = u.shape[:2]
    inputs = _Inputs(u, dt, A, B, reset, lengths, state_dtype(u.dtype))
    dtype, lanes, modes = inputs.dtype, inputs.lanes, inputs.modes
    code = METHODS.index(method)
    du, ddt = inputs.new(u.shape), inputs.new((b, l, lanes))
    dstate = inputs.state(dfinal)
    dA, dB, dC = (torch.empty(b, 2, modes, lanes, dtype=dtype) for _ in range(3))
    dD = torch.empty(b, lanes, dtype=dtype)
    if C is None:
        start = inputs.state(initial_state).numpy()
        flows = tuple(t.to(dtype).reshape(b, l, 2 * lanes).contiguous().numpy() for t in (dy, states))
        grads = du.view(b, l, 2 * lanes).numpy(), *(t.numpy() for t in (ddt, dstate, dA, dB))
        arguments = (*inputs.arrays, inputs.planes(A), *flows, start, *grads)
        parallel_for(inputs.n_blocks, lambda i: _backward_states(inputs.place(i), code, *arguments))
    else:
        parameters = inputs.planes(A), inputs.planes(B), 2 * inputs.planes(C), inputs.vector(D)
        grads = tuple(t.numpy() for t in (du, ddt, dstate, dA, dB, dC, dD))
        arguments = (*inputs.arrays, *parameters, inputs.array(dy, dtype), states.numpy(), *grads, chunk_len)
        parallel_for(inputs.n_blocks, lambda i: _backward_block(inputs.place(i), code, *arguments))
    dt_grad = ddt.view(*dt.shape, -1).sum(-1)
    sums = (inputs.pairs(t.sum(0, keepdim=True))[0] for t in (dA, dB, 2 * dC))
    found = (du, dt_grad, *sums, dD.sum(0), inputs.pairs(dstate))
    given = (u, dt, A, B, C, D, initial_state)
    return tuple(
        u.new_empty(0) if t is None else grad.to(t.dtype).contiguous() for t, grad in zip(given, found, strict=True)
    )


def step(state: Tensor, u, dt, A, B, C, D, method) -> Tensor:
    b, e, n, _ = state.shape
    dtype = state.dtype
    in_bfloat16 = all(t.dtype is torch.bfloat16 for t in (u, dt))
    given = torch.bfloat16 if in_bfloat16 and dtype is torch.float32 else dtype
    y = torch.empty(u.shape, dtype=given)
    memory = state.contiguous()
    # The kernel gets addresses only, so these lists keep the tensors alive; 0 stands for what is absent.
    held = [None if t is None else t.to(dtype).contiguous() for t in (A, B, C, D)]
    held += [t.to(given).contiguous() for t in (u, dt)]
    group = max(1, _STEP_LANES // n)
    words = [b, e, n, METHODS.index(method), group, memory.data_ptr(), y.data_ptr()]
    words += [0 if t is None else t.data_ptr() for t in held]
    run(_step_kernel(given), words, n_blocks=max(1, min(b * -(-e // group), state.numel() // _STEP_ELEMENTS)))
    if memory.data_ptr() != state.data_ptr():
        state.copy_(memory)
    return y if given is u.dtype else y.to(u.dtype)


def _memory(t: Tensor) -> np.ndarray:
    """The memory of `t`; bfloat16 as its bits."""
    return (t.view(torch.uint16) if t.dtype is torch.bfloat16 else t).numpy()


class _Inputs:
    """What all kernels read, and how the work is cut."""

    def __init__(self, u, dt, A, B, reset, lengths, given=None):
        """`given`: the dtype in which u and dt are read, their own if None."""
        b, l = u.shape[:2]
        e, n, _ = A.shape
        self.dtype = state_dtype(u.dtype)
        self.lanes, self.modes = (e * n, 1) if B is None else (e, n)
        in_bfloat16 = u.dtype is torch.bfloat16 and dt.dtype is torch.bfloat16
        self.given = given or (torch.bfloat16 if in_bfloat16 else self.dtype)
        self.width = _LANES if B is None else _CHANNELS
        self.blocks_per_row = -(-self.lanes // self.width)
        self.n_blocks = b * self.blocks_per_row
        # The kernels leave out what lies behind the lengths.
        new = torch.empty if lengths is None else torch.zeros
        self.new = lambda shape, dtype=self.dtype: new(shape, dtype=dtype)
        ends = np.full(b, l) if lengths is None else lengths.contiguous().numpy()
        resets = np.zeros((b, l), np.bool_) if reset is None else reset.contiguous().numpy()
        owner = np.arange(e).repeat(self.lanes // e)  # the channel of each lane
        rows = u if B is not None else u.reshape(b, l, 2 * self.lanes)
        self.arrays = self.array(rows, self.given), self.array(dt, self.given), owner, resets, ends

    def array(self, t: Tensor, dtype: torch.dtype) -> tuple[np.ndarray, int, int]:
        """The memory of a sequence in `dtype`, and its strides over rows and time."""
        memory, (row, time) = flat(t.to(dtype))
        return memory, row, time

    def vector(self, t: Tensor | None) -> np.ndarray:
        t = torch.zeros(self.lanes, dtype=self.dtype) if t is None else t.detach().to(self.dtype)
        return t.contiguous().numpy()

    def planes(self, t: Tensor) -> np.ndarray:
        """(e, n, 2) -> (2, modes, lanes)."""
        t = t.detach().to(self.dtype).reshape(self.lanes, self.modes, 2)
        return t.permute(2, 1, 0).contiguous().numpy()

    def state(self, t: Tensor | None) -> Tensor:
        """(b, e, n, 2), zeros if None -> a copy (b, 2, modes, lanes)."""
        b = self.n_blocks // self.blocks_per_row
        planes = torch.zeros(b, 2, self.modes, self.lanes, dtype=self.dtype)
        if t is not None:
            planes.copy_(t.detach().reshape(b, self.lanes, self.modes, 2).permute(0, 3, 2, 1))
        return planes

    def pairs(self, planes: Tensor) -> Tensor:
        """(b, 2, modes, lanes) -> (b, e, n, 2)."""
        e = len(np.unique(self.arrays[2]))
        return planes.permute(0, 3, 2, 1).reshape(len(planes), e, -1, 2).contiguous()

    def place(self, i: int) -> tuple[int, int, int]:
        """Row, first lane and number of lanes of block i."""
        row, block = divmod(i, self.blocks_per_row)
        return row, block * self.width, min(self.width, self.lanes - block * self.width)


@jit
def _forward_block(place, method, u, dt, owner, resets, ends, A, B, C, D, y, state, states, chunk_len):
    i, c0, width = place
    blocks = _blocks(9, A, _CHANNELS)
    rates, enters, leaves, Abar, F, Bbar = blocks[0], blocks[1], blocks[2], blocks[3], blocks[4], blocks[5]
    before, after, zeros = blocks[6], blocks[7], blocks[8]
    rows = np.zeros((3, chunk_len, _CHANNELS), A.dtype)
    steps, inputs, sums = rows[0], rows[1], rows[2]
    skip = D[c0 : c0 + width]
    current = np.full(_CHANNELS, np.nan, A.dtype)
    _read(A, c0, width, rates)
    _read(B, c0, width, enters)
    _read(C, c0, width, leaves)
    _read(state[i], c0, width, before)
    for t0 in range(0, y.shape[1], chunk_len):
        if states.shape[1] > 0:
            _write(before, width, states[i, t0 // chunk_len], c0)
        t1 = min(t0 + chunk_len, ends[i])
        _read_rows(place, t0, t1, u, dt, owner, inputs, steps)
        for s in range(t1 - t0):
            if _differ(current, steps[s]):
                current[:] = steps[s]
                discretize(method, current, rates, Abar, F)
                _multiply(F, enters, Bbar)
            _advance(zeros if resets[i, t0 + s] else before, after, Abar, Bbar, leaves, inputs[s], sums[s])
            before, after = after, before
        for s in range(t1 - t0):
            out, entry, total = y[i, t0 + s, c0 : c0 + width], inputs[s], sums[s]
            for c in range(width):
                out[c] = narrow(total[c] + skip[c] * entry[c], y)
    _write(before, width, state[i], c0)


@jit
def _backward_block(
    place,
    method,
    u,
    dt,
    owner,
    resets,
    ends,
    A,
    B,
    C,
    D,
    dy,
    states,
    du,
    ddt,
    dstate,
    dA,
    dB,
    dC,
    dD,
    chunk_len,
):
    i, c0, width = place
    n = A.shape[1]
    blocks = _blocks(21, A, _CHANNELS)
    rates, enters, leaves, Abar, F, Bbar = blocks[0], blocks[1], blocks[2], blocks[3], blocks[4], blocks[5]
    dh, before, zeros = blocks[6], blocks[7], blocks[8]
    slopes, flows, grads, dleaves = blocks[9:15], blocks[15:17], blocks[17:20], blocks[20]
    after = np.empty((chunk_len, 2, n, _CHANNELS), A.dtype)
    rows = np.zeros((5, chunk_len, _CHANNELS), A.dtype)
    steps, inputs, sums, dsteps, dinputs = rows[0], rows[1], rows[2], rows[3], rows[4]
    up, skip = np.zeros(_CHANNELS, A.dtype), D[c0 : c0 + width]
    dskip, dskip_chunk = np.zeros(_CHANNELS, A.dtype), np.zeros(_CHANNELS, A.dtype)
    current = np.full(_CHANNELS, np.nan, A.dtype)
    sloped = current.copy()
    pending = False
    _read(A, c0, width, rates)
    _read(B, c0, width, enters)
    _read(C, c0, width, leaves)
    _read(dstate[i], c0, width, dh)
    for chunk in range(states.shape[1] - 1, -1, -1):
        t0 = chunk * chunk_len
        t1 = min(t0 + chunk_len, ends[i])
        _read(states[i, chunk], c0, width, before)
        _read_rows(place, t0, t1, u, dt, owner, inputs, steps)
        for s in range(t1 - t0):
            if _differ(current, steps[s]):
                current[:] = steps[s]
                discretize(method, current, rates, Abar, F)
                _multiply(F, enters, Bbar)
            start = zeros if resets[i, t0 + s] else (after[s - 1] if s > 0 else before)
            _advance(start, after[s], Abar, Bbar, leaves, inputs[s], sums[s])

        for s in range(t1 - t0 - 1, -1, -1):
            t = t0 + s
            if _differ(sloped, steps[s]):
                if pending:
                    _settle(sloped, F, enters, slopes, flows, grads)
                if _differ(current, steps[s]):
                    current[:] = steps[s]
                    discretize(method, current, rates, Abar, F)
                    _multiply(F, enters, Bbar)
                sloped[:] = current
                _slopes(method, sloped, rates, enters, Abar, slopes)
            pending = True
            start = zeros if resets[i, t] else (after[s - 1] if s > 0 else before)
            gradient = _channels(dy, place, t)
            for c in range(width):
                up[c] = gradient[c]
                dskip_chunk[c] += up[c] * inputs[s, c]
            entry, dstep, dentry = inputs[s], dsteps[s], dinputs[s]
            _retreat(start, after[s], Abar, Bbar, leaves, slopes, entry, up, dh, flows, dleaves, dstep, dentry)
            if resets[i, t]:
                dh[:] = 0
            out, step_out = du[i, t, c0 : c0 + width], ddt[i, t, c0 : c0 + width]
            for c in range(width):
                out[c] = dinputs[s, c] + skip[c] * up[c]
            for c in range(width):
                step_out[c] = dsteps[s, c]
        if pending:
            _settle(sloped, F, enters, slopes, flows, grads)
            pending = False
        # Sums of sums lose less than one long sum.
        grads[2] += dleaves
        dskip += dskip_chunk
        dleaves[:] = 0
        dskip_chunk[:] = 0
    _write(dh, width, dstate[i], c0)
    _write(grads[0], width, dA[i], c0)
    _write(grads[1], width, dB[i], c0)
    _write(grads[2], width, dC[i], c0)
    dD[i, c0 : c0 + width] = dskip[:width]


@jit
def _forward_states(place, method, u, dt, owner, resets, ends, A, y, state):
    i, c0, width = place
    blocks = _blocks(4, A, _LANES)
    rates, h, Abar, F = blocks[0], blocks[1], blocks[2], blocks[3]
    x, z, a, b, p, q = h[0, 0], h[1, 0], Abar[0, 0], Abar[1, 0], F[0, 0], F[1, 0]
    steps, current = np.zeros(_LANES, A.dtype), np.full(_LANES, np.nan, A.dtype)
    _read(A, c0, width, rates)
    _read(state[i], c0, width, h)
    for t in range(ends[i]):
        _read_steps(dt, i, t, owner, c0, width, steps)
        if resets[i, t]:
            h[:] = 0
        if _differ(current, steps):
            current[:] = steps
            discretize(method, current, rates, Abar, F)
        _advance_states(width, x, z, a, b, p, q, _pairs(u, place, t), y[i, t, 2 * c0 : 2 * (c0 + width)])
    _write(h, width, state[i], c0)


@jit
def _backward_states(place, method, u, dt, owner, resets, ends, A, dy, states, initial, du, ddt, dstate, dA, dB):
    """dB, which nobody asked for, comes with dA."""
    i, c0, width = place
    blocks = _blocks(16, A, _LANES)
    rates, ones, Abar, F, dh, before = blocks[0], blocks[1], blocks[2], blocks[3], blocks[4], blocks[5]
    slopes, flows, grads = blocks[6:12], blocks[12:14], blocks[14:16]
    x, z, a, b, p, q = before[0, 0], before[1, 0], Abar[0, 0], Abar[1, 0], F[0, 0], F[1, 0]
    a_t, b_t, p_t, q_t = slopes[0, 0, 0], slopes[0, 1, 0], slopes[1, 0, 0], slopes[1, 1, 0]
    g, h, da, db = dh[0, 0], dh[1, 0], flows[0, 0, 0], flows[0, 1, 0]
    dp, dq = flows[1, 0, 0], flows[1, 1, 0]
    ones[0] = 1
    steps, current = np.zeros(_LANES, A.dtype), np.full(_LANES, np.nan, A.dtype)
    pending = False
    _read(A, c0, width, rates)
    _read(dstate[i], c0, width, dh)
    for t in range(ends[i] - 1, -1, -1):
        _read_steps(dt, i, t, owner, c0, width, steps)
        if _differ(current, steps):
            if pending:
                _settle(current, F, ones, slopes, flows, grads)
            current[:] = steps
            discretize(method, current, rates, Abar, F)
            _slopes(method, current, rates, ones, Abar, slopes)
        pending = True
        if resets[i, t]:
            before[:] = 0
        elif t == 0:
            _read(initial[i], c0, width, before)
        else:
            last = states[i, t - 1, 2 * c0 : 2 * (c0 + width)]
            for c in range(width):
                before[0, 0, c], before[1, 0, c] = last[2 * c], last[2 * c + 1]
        entry, up = _pairs(u, place, t), dy[i, t, 2 * c0 : 2 * (c0 + width)]
        dentry, dstep = du[i, t, 2 * c0 : 2 * (c0 + width)], ddt[i, t, c0 : c0 + width]
        _retreat_states(width, x, z, a, b, p, q, a_t, b_t, p_t, q_t, entry, up, g, h, da, db, dp, dq, dstep, dentry)
        if resets[i, t]:
            dh[:] = 0
    if pending:
        _settle(current, F, ones, slopes, flows, grads)
    _write(dh, width, dstate[i], c0)
    _write(grads[0], width, dA[i], c0)
    _write(grads[1], width, dB[i], c0)


@jit
def _blocks(count, planes, lanes):
    return np.zeros((count, 2, planes.shape[1], lanes), planes.dtype)


@jit
def _read(planes, c0, width, block):
    for part in range(2):
        for k in range(block.shape[1]):
            block[part, k, :width] = planes[part, k, c0 : c0 + width]


@jit
def _write(block, width, planes, c0):
    for part in range(2):
        for k in range(block.shape[1]):
            planes[part, k, c0 : c0 + width] = block[part, k, :width]


@jit
def _channels(tensor, place, t):
    """The block's channels at time t."""
    i, c0, width = place
    memory, row, time = tensor
    start = i * row + t * time + c0
    return memory[start : start + width]


@jit
def _pairs(tensor, place, t):
    """The block's complex lanes at time t."""
    i, c0, width = place
    return _channels(tensor, (i, 2 * c0, 2 * width), t)


@jit
def _read_rows(place, t0, t1, u, dt, owner, inputs, steps):
    """Inputs and step sizes of the tokens t0..t1-1."""
    i, c0, width = place
    for t in range(t0, t1):
        entry, row = _channels(u, place, t), inputs[t - t0]
        for c in range(width):
            row[c] = widen(entry[c])
        _read_steps(dt, i, t, owner, c0, width, steps[t - t0])


@jit
def _read_steps(dt, i, t, owner, c0, width, steps):
    memory, row, time = dt
    start = i * row + t * time
    for c in range(width):
        steps[c] = widen(memory[start + owner[c0 + c]])


@jit
def _differ(a, b):
    """Whether two rows of step sizes differ; NaN differs from itself."""
    count = 0
    for c in range(len(a)):
        count += a[c] != b[c]
    return count > 0


@jit
def _multiply(x, y, out):
    """Element by element."""
    for k in range(x.shape[1]):
        a, b, c, d, p, q = x[0, k], x[1, k], y[0, k], y[1, k], out[0, k], out[1, k]
        for j in range(len(p)):
            p[j], q[j] = a[j] * c[j] - b[j] * d[j], a[j] * d[j] + b[j] * c[j]


@jit
def _advance(before, after, Abar, Bbar, leaves, entry, total):
    """One token: after = Abar before + Bbar entry, and total = Re (leaves after), summed over modes."""
    for c in range(_CHANNELS):
        total[c] = 0
    for k in range(before.shape[1]):
        x, y, new_x, new_y = before[0, k], before[1, k], after[0, k], after[1, k]
        a, b, p, q = Abar[0, k], Abar[1, k], Bbar[0, k], Bbar[1, k]
        _advance_mode(x, y, new_x, new_y, a, b, p, q, leaves[0, k], leaves[1, k], entry, total)


@disjoint
def _advance_mode(x, y, new_x, new_y, a, b, p, q, r, s, entry, total):
    for c in range(_CHANNELS):
        re = a[c] * x[c] - b[c] * y[c] + p[c] * entry[c]
        im = a[c] * y[c] + b[c] * x[c] + q[c] * entry[c]
        new_x[c] = re
        new_y[c] = im
        total[c] += r[c] * re - s[c] * im


@disjoint
def _advance_states(width, x, y, a, b, p, q, entry, out):
    """As `_advance`, in place, for complex inputs and outputs in pairs."""
    for c in range(width):
        re, im = widen(entry[2 * c]), widen(entry[2 * c + 1])
        new_x = a[c] * x[c] - b[c] * y[c] + (p[c] * re - q[c] * im)
        new_y = a[c] * y[c] + b[c] * x[c] + (p[c] * im + q[c] * re)
        x[c] = new_x
        y[c] = new_y
        out[2 * c] = new_x
        out[2 * c + 1] = new_y


@jit
def _slopes(method, dt, rates, enters, Abar, slopes):
    """slopes: dAbar/ddt, dBbar/ddt, V with dAbar/dA = dt V, dBbar/dA, dF/ddt, dF/dA."""
    derivatives(method, dt, rates, Abar, slopes[2], slopes[4], slopes[5])
    _multiply(rates, slopes[2], slopes[0])
    _multiply(enters, slopes[4], slopes[1])
    _multiply(enters, slopes[5], slopes[3])


@jit
def _retreat(before, after, Abar, Bbar, leaves, slopes, entry, up, dh, flows, dleaves, dstep, dentry):
    """One token back: dh is the gradient of the state after the token, then of the one before it.

    The gradients of Abar and Bbar are added to `flows`.
    """
    for c in range(_CHANNELS):
        dstep[c] = 0
        dentry[c] = 0
    for k in range(before.shape[1]):
        x, y, new_x, new_y = before[0, k], before[1, k], after[0, k], after[1, k]
        a, b, p, q, r, s = Abar[0, k], Abar[1, k], Bbar[0, k], Bbar[1, k], leaves[0, k], leaves[1, k]
        a_t, b_t, p_t, q_t = slopes[0, 0, k], slopes[0, 1, k], slopes[1, 0, k], slopes[1, 1, k]
        g, h, da, db = dh[0, k], dh[1, k], flows[0, 0, k], flows[0, 1, k]
        dp, dq, dr, ds = flows[1, 0, k], flows[1, 1, k], dleaves[0, k], dleaves[1, k]
        _retreat_mode(
            x,
            y,
            new_x,
            new_y,
            a,
            b,
            p,
            q,
            r,
            s,
            a_t,
            b_t,
            p_t,
            q_t,
            entry,
            up,
            g,
            h,
            da,
            db,
            dp,
            dq,
            dr,
            ds,
            dstep,
            dentry,
        )


@disjoint
def _retreat_mode(
    x, y, new_x, new_y, a, b, p, q, r, s, a_t, b_t, p_t, q_t, entry, up, g, h, da, db, dp, dq, dr, ds, dstep, dentry
):
    for c in range(_CHANNELS):
        g_all, h_all = g[c] + up[c] * r[c], h[c] - up[c] * s[c]
        dr[c] += up[c] * new_x[c]
        ds[c] -= up[c] * new_y[c]
        dp[c] += entry[c] * g_all
        dq[c] += entry[c] * h_all
        dentry[c] += p[c] * g_all + q[c] * h_all
        re, im = g_all * x[c] + h_all * y[c], h_all * x[c] - g_all * y[c]  # of Abar
        da[c] += re
        db[c] += im
        dstep[c] += a_t[c] * re + b_t[c] * im + entry[c] * (p_t[c] * g_all + q_t[c] * h_all)
        g[c] = a[c] * g_all + b[c] * h_all
        h[c] = a[c] * h_all - b[c] * g_all


@disjoint
def _retreat_states(width, x, y, a, b, p, q, a_t, b_t, p_t, q_t, entry, up, g, h, da, db, dp, dq, dstep, dentry):
    """As `_retreat`, for complex inputs in pairs, where the states themselves come out."""
    for c in range(width):
        g_all, h_all = g[c] + up[2 * c], h[c] + up[2 * c + 1]
        u, v = entry[2 * c], entry[2 * c + 1]
        dentry[2 * c] = p[c] * g_all + q[c] * h_all
        dentry[2 * c + 1] = p[c] * h_all - q[c] * g_all
        re, im = g_all * x[c] + h_all * y[c], h_all * x[c] - g_all * y[c]  # of Abar
        f_re, f_im = g_all * u + h_all * v, h_all * u - g_all * v  # of Bbar
        da[c] += re
        db[c] += im
        dp[c] += f_re
        dq[c] += f_im
        dstep[c] = a_t[c] * re + b_t[c] * im + p_t[c] * f_re + q_t[c] * f_im
        g[c] = a[c] * g_all + b[c] * h_all
        h[c] = a[c] * h_all - b[c] * g_all


@jit
def _settle(dt, F, enters, slopes, flows, grads):
    """Hand the gradients of Abar and Bbar on to A and B, and begin their sums anew."""
    for k in range(F.shape[1]):
        v, w, s, t = slopes[2, 0, k], slopes[2, 1, k], slopes[3, 0, k], slopes[3, 1, k]
        g, h, x, y = flows[0, 0, k], flows[0, 1, k], flows[1, 0, k], flows[1, 1, k]
        dA_re, dA_im = grads[0, 0, k], grads[0, 1, k]
        for c in range(len(dt)):
            dA_re[c] += dt[c] * (v[c] * g[c] + w[c] * h[c]) + (s[c] * x[c] + t[c] * y[c])
        for c in range(len(dt)):
            dA_im[c] += dt[c] * (v[c] * h[c] - w[c] * g[c]) + (s[c] * y[c] - t[c] * x[c])
        p, q, dB_re, dB_im = F[0, k], F[1, k], grads[1, 0, k], grads[1, 1, k]
        for c in range(len(dt)):
            dB_re[c] += p[c] * x[c] + q[c] * y[c]
            dB_im[c] += p[c] * y[c] - q[c] * x[c]
    flows[:] = 0


@functools.cache
def _step_kernel(dtype: torch.dtype) -> Any:
    """The parallel region of `step`, for u, dt and y in `dtype`: threads draw blocks of channels."""
    stored, scalar, _, _ = NUMBERS[dtype]
    given_size, size = np.dtype(stored).itemsize, np.dtype(scalar).itemsize

    @region
    def kernel(words):
        _, b, e, n, method, group, state, y, A, B, C, D, u, dt = carray(words, 14, np.int64)
        blocks = -(-e // group)
        wide = 1 if B else 2 * n  # numbers of u and of y for each channel
        block = next_ticket(words)
        while block < b * blocks:
            i, c0 = block // blocks, block % blocks * group
            width = min(group, e - c0)
            channel = i * e + c0
            _step_block(
                method,
                carray(pointer(state + channel * 2 * n * size), (width, n, 2), scalar),
                carray(pointer(u + channel * wide * given_size), width * wide, stored),
                carray(pointer(dt + channel * given_size), width, stored),
                carray(pointer(A + c0 * 2 * n * size), (width, n, 2), scalar),
                carray(pointer(B + c0 * 2 * n * size), (width if B else 0, n, 2), scalar),
                carray(pointer(C + c0 * 2 * n * size), (width if B else 0, n, 2), scalar),
                carray(pointer(D + c0 * size), width if D else 0, scalar),
                carray(pointer(y + channel * wide * given_size), width * wide, stored),
            )
            block = next_ticket(words)

    return kernel


@jit
def _step_block(method, h, u, dt, A, B, C, D, y):
    """One token. B and C are empty where the states are to come out, D where it is absent."""
    width, n, _ = h.shape
    # All modes of all channels are lanes of one row.
    blocks, steps = np.empty((3, 2, 1, width * n), h.dtype), np.empty(width * n, h.dtype)
    rates, Abar, F = blocks[0], blocks[1], blocks[2]
    for c in range(width):
        for k in range(n):
            rates[0, 0, c * n + k] = A[c, k, 0]
            rates[1, 0, c * n + k] = A[c, k, 1]
            steps[c * n + k] = widen(dt[c])
    discretize(method, steps, rates, Abar, F)
    for c in range(width):
        a, b = Abar[0, 0, c * n : (c + 1) * n], Abar[1, 0, c * n : (c + 1) * n]
        p, q = F[0, 0, c * n : (c + 1) * n], F[1, 0, c * n : (c + 1) * n]
        one = h[c]
        for k in range(n):
            x, z = one[k, 0], one[k, 1]
            one[k, 0] = a[k] * x - b[k] * z
            one[k, 1] = a[k] * z + b[k] * x
        if len(B) == 0:
            entry, out = u[c * 2 * n : (c + 1) * 2 * n], y[c * 2 * n : (c + 1) * 2 * n]
            for k in range(n):
                re, im = widen(entry[2 * k]), widen(entry[2 * k + 1])
                one[k, 0] += p[k] * re - q[k] * im
                one[k, 1] += p[k] * im + q[k] * re
                out[2 * k] = narrow(one[k, 0], y)
                out[2 * k + 1] = narrow(one[k, 1], y)
        else:
            entry, enters, leaves, total = widen(u[c]), B[c], C[c], h.dtype.type(0)
            for k in range(n):
                one[k, 0] += entry * (p[k] * enters[k, 0] - q[k] * enters[k, 1])
                one[k, 1] += entry * (p[k] * enters[k, 1] + q[k] * enters[k, 0])
            for k in range(n):
                total += leaves[k, 0] * one[k, 0] - leaves[k, 1] * one[k, 1]
            total += total
            if len(D) > 0:
                total += D[c] * entry
            y[c] = narrow(total, y)

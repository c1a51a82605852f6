"""Selective scan on the CPU: serial in time, vectorised over channels, in parallel over rows and channel blocks.

One block is `_WIDTH` channels of one row of the batch. Its state is an array (n, _WIDTH) that stays in the first-level
cache, and every innermost loop runs over its channels, all `_WIDTH` of them: those past the last channel hold zeros.
Time is cut into chunks so that step sizes, gates and their derivatives are computed in loops of their own. The backward
takes chunks from the last to the first and computes the states of a chunk again from the one before it.
docs/ops/selective_scan.md has the recurrences.
"""

import functools
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from longwave.ops.checks import state_dtype
from longwave.ops.numba_bfloat16 import NUMBERS, narrow, widen
from longwave.ops.numba_math import exp, exp2, jit, sigmoid, silu, silu_slope, softplus
from longwave.ops.openmp import carray, next_ticket, pointer, region, run
from longwave.ops.rows import flat
from longwave.ops.threads import parallel_for

_WIDTH = 64
_CHUNK_LEN = 32  # where no states are kept
_STEP_CHANNELS = 256  # in a block of `step`
_STEP_ELEMENTS = 8192  # of the state, for which another thread is worth starting
_LOG2E = math.log2(math.e)
_LN2 = math.log(2)


def forward(x, dt, A, B, C, D, z, dt_bias, initial_state, reset, lengths, dt_softplus, chunk_len):
    b, l, e = x.shape
    n = A.shape[1]
    in_bfloat16 = all(t is None or t.dtype is torch.bfloat16 for t in (x, dt, z))
    given = torch.bfloat16 if in_bfloat16 else state_dtype(x.dtype)
    inputs = _Inputs(x, dt, A, B, C, D, z, dt_bias, reset, lengths, dt_softplus, given)
    y = inputs.new(b, l, e, dtype=inputs.given)
    state = torch.zeros(b, e, n, dtype=inputs.dtype)
    if initial_state is not None:
        state.copy_(initial_state)
    states = torch.empty(b, -(-l // chunk_len) if chunk_len else 0, n, e, dtype=inputs.dtype)
    outputs = _array(y), state.numpy(), states.numpy()

    def body(i: int) -> None:
        place = inputs.place(i)
        rows = torch.zeros(3, chunk_len or _CHUNK_LEN, _WIDTH, dtype=inputs.dtype)
        blocks = torch.zeros(2, n, _WIDTH, dtype=inputs.dtype)
        _forward_block(place, *inputs.arrays, *outputs, rows.numpy(), blocks.numpy())

    parallel_for(inputs.n_blocks, body)
    return y.to(x.dtype), state, states


def backward(dy, dfinal, states, x, dt, A, B, C, D, z, dt_bias, initial_state, reset, lengths, dt_softplus, chunk_len):
    b, l, e = x.shape
    n = A.shape[1]
    inputs = _Inputs(x, dt, A, B, C, D, z, dt_bias, reset, lengths, dt_softplus)
    dtype = inputs.dtype
    dx, ddt = inputs.new(b, l, e), inputs.new(b, l, e)
    dz = inputs.new(b, l, e) if z is not None else torch.empty(0, 0, 0, dtype=dtype)
    dstate = dfinal.to(dtype, copy=True, memory_format=torch.contiguous_format)
    dA = torch.empty(b, n, e, dtype=dtype)
    dD, ddt_bias = torch.empty(b, e, dtype=dtype), torch.empty(b, e, dtype=dtype)
    # Sums over channels: one part for each block, added up in a fixed order.
    dB, dC = inputs.new(inputs.n_blocks, l, n), inputs.new(inputs.n_blocks, l, n)
    grads = tuple(t.numpy() for t in (dx, ddt, dz, dstate, dA, dD, ddt_bias, dB, dC))
    dy_array, states_array = inputs.array(dy, dtype), states.numpy()

    def body(i: int) -> None:
        place = inputs.place(i)
        rows = torch.zeros(6, chunk_len, _WIDTH, dtype=dtype)
        blocks = torch.zeros(5 + 2 * chunk_len, n, _WIDTH, dtype=dtype)
        _backward_block(place, i, *inputs.arrays, dy_array, states_array, grads, rows.numpy(), blocks.numpy())

    parallel_for(inputs.n_blocks, body)
    dB, dC = (part.view(b, -1, l, n).sum(1) for part in (dB, dC))
    found = (dx, ddt, dA.sum(0).t(), dB, dC, dD.sum(0), dz, ddt_bias.sum(0), dstate)
    given = (x, dt, A, B, C, D, z, dt_bias, initial_state)
    return tuple(
        x.new_empty(0) if t is None else grad.to(t.dtype).contiguous() for t, grad in zip(given, found, strict=True)
    )


def step(state: Tensor, x, dt, A, B, C, D, z, dt_bias, dt_softplus, log_A) -> Tensor:
    (b, e), n, dtype = x.shape, A.shape[1], state.dtype
    in_bfloat16 = all(t is None or t.dtype is torch.bfloat16 for t in (x, dt, B, C, z))
    given = torch.bfloat16 if in_bfloat16 and dtype is torch.float32 else dtype
    y = torch.empty(b, e, dtype=given)
    memory = state.contiguous()
    # The kernel gets addresses only, so these lists keep the tensors alive; 0 stands for what is absent.
    vectors = [None if t is None else _addressable(t, dtype).contiguous() for t in (A, D, dt_bias)]
    rows = [None if t is None else _addressable(t, given) for t in (x, dt, B, C, z)]
    words = [b, e, n, dt_softplus, log_A, memory.data_ptr(), y.data_ptr()]
    words += [0 if t is None else t.data_ptr() for t in vectors]
    for t in rows:
        words += (0, 0) if t is None else (t.data_ptr(), t.stride(0))
    run(_step_kernel(given), words, n_blocks=max(1, state.numel() // _STEP_ELEMENTS))
    if memory.data_ptr() != state.data_ptr():
        state.copy_(memory)
    return y if given is x.dtype else y.to(x.dtype)


def _addressable(t: Tensor, dtype: torch.dtype) -> Tensor:
    """`t` in `dtype`, with its last axis contiguous."""
    if t.dtype is not dtype:  # even a `to` that does nothing costs 1 us
        t = t.to(dtype)
    return t if t.stride(-1) == 1 else t.contiguous()


def _array(t: Tensor) -> np.ndarray:
    """The memory of `t`; bfloat16 as its bits."""
    return (t.view(torch.uint16) if t.dtype is torch.bfloat16 else t).numpy()


class _Inputs:
    """What both kernels read, in the accumulation dtype, and how the work is cut."""

    def __init__(self, x, dt, A, B, C, D, z, dt_bias, reset, lengths, dt_softplus, given=None):
        """`given`: the dtype in which x, dt and z are read."""
        b, l, self.e = x.shape
        self.dtype = dtype = state_dtype(x.dtype)
        self.given = given or dtype
        self.blocks_per_row = -(-self.e // _WIDTH)
        self.n_blocks = b * self.blocks_per_row
        # The kernels leave out what lies behind the lengths.
        new = torch.empty if lengths is None else torch.zeros
        self.new = lambda *shape, dtype=dtype: new(shape, dtype=dtype)

        # The kernels compute 2^(dt A log2(e)).
        exponents = (A.detach().to(dtype) * _LOG2E).contiguous().numpy()
        ends = np.full(b, l) if lengths is None else lengths.contiguous().numpy()
        resets = np.zeros((b, l), np.bool_) if reset is None else reset.contiguous().numpy()
        gate = self.array(x if z is None else z, self.given)
        self.arrays = (
            *(self.array(t, self.given) for t in (x, dt)),
            *(self.array(t, dtype) for t in (B, C)),
            *(gate, z is not None, exponents, self._vector(D), self._vector(dt_bias), dt_softplus, resets, ends),
        )

    def array(self, t: Tensor, dtype: torch.dtype) -> tuple[np.ndarray, int, int]:
        """The memory of a sequence in `dtype`, and its strides over rows and time."""
        memory, (row, time) = flat(t.to(dtype))
        return memory, row, time

    def _vector(self, t: Tensor | None) -> np.ndarray:
        t = torch.zeros(self.e, dtype=self.dtype) if t is None else t.detach().to(self.dtype)
        return t.contiguous().numpy()

    def place(self, i: int) -> tuple[int, int, int]:
        """Row, first channel and number of channels of block i."""
        row, block = divmod(i, self.blocks_per_row)
        return row, block * _WIDTH, min(_WIDTH, self.e - block * _WIDTH)


@jit
def _forward_block(
    place, x, dt, B, C, z, has_z, A, D, dt_bias, dt_softplus, resets, ends, y, state, states, rows, blocks
):
    i, c0, width = place
    steps, entries, sums = rows[0], rows[1], rows[2]
    chunk_len = rows.shape[1]
    exponents, h = blocks[0], blocks[1]
    _read_transposed(A[c0:], width, exponents)
    _read_transposed(state[i, c0:], width, h)
    for t0 in range(0, y.shape[1], chunk_len):
        if states.shape[1] > 0:
            for k in range(h.shape[0]):
                states[i, t0 // chunk_len, k, c0 : c0 + width] = h[k, :width]
        t1 = min(t0 + chunk_len, ends[i])
        _prepare(place, t0, t1, x, dt, dt_bias, dt_softplus, steps, entries)
        for s in range(t1 - t0):
            if resets[i, t0 + s]:
                h[:] = 0
            _advance(h, exponents, steps[s], entries[s], _row(B, i, t0 + s), _row(C, i, t0 + s), sums[s])
        skip = D[c0 : c0 + width]
        for s in range(t1 - t0):
            out, u, scan = y[i, t0 + s, c0 : c0 + width], _channels(x, place, t0 + s), sums[s]
            if has_z:
                gate = _channels(z, place, t0 + s)
                for c in range(width):
                    out[c] = narrow((scan[c] + skip[c] * widen(u[c])) * silu(widen(gate[c])), y)
            else:
                for c in range(width):
                    out[c] = narrow(scan[c] + skip[c] * widen(u[c]), y)
    _write_transposed(h, width, state[i, c0:])


@jit
def _backward_block(
    place, part, x, dt, B, C, z, has_z, A, D, dt_bias, dt_softplus, resets, ends, dy, states, grads, rows, blocks
):
    i, c0, width = place
    dx, ddt, dz, dstate, dA, dD, ddt_bias, dB, dC = grads
    steps, entries, sums, dsums, dsteps, dentries = rows[0], rows[1], rows[2], rows[3], rows[4], rows[5]
    chunk_len, n = rows.shape[1], blocks.shape[1]
    exponents, dA_block, dh, zeros = blocks[0], blocks[1], blocks[2], blocks[3]
    decays, before, after = blocks[4 : 4 + chunk_len], blocks[4 + chunk_len], blocks[5 + chunk_len :]
    skip, bias = D[c0 : c0 + width], dt_bias[c0 : c0 + width]
    dskip, dbias = dD[i, c0 : c0 + width], ddt_bias[i, c0 : c0 + width]
    ln2 = rows.dtype.type(_LN2)
    dskip[:] = 0
    dbias[:] = 0
    _read_transposed(A[c0:], width, exponents)
    _read_transposed(dstate[i, c0:], width, dh)

    for chunk in range(states.shape[1] - 1, -1, -1):
        t0 = chunk * chunk_len
        t1 = min(t0 + chunk_len, ends[i])
        for k in range(n):
            before[k, :width] = states[i, chunk, k, c0 : c0 + width]
        _prepare(place, t0, t1, x, dt, dt_bias, dt_softplus, steps, entries)
        for s in range(t1 - t0):
            t = t0 + s
            start = zeros if resets[i, t] else (after[s - 1] if s > 0 else before)
            _replay(start, after[s], decays[s], exponents, steps[s], entries[s], _row(B, i, t), _row(C, i, t), sums[s])

        for s in range(t1 - t0):
            u, up, total, dtotal = _channels(x, place, t0 + s), _channels(dy, place, t0 + s), sums[s], dsums[s]
            if has_z:
                gate, dgate = _channels(z, place, t0 + s), dz[i, t0 + s, c0 : c0 + width]
                for c in range(width):
                    total[c] += skip[c] * u[c]
                for c in range(width):
                    dgate[c] = up[c] * total[c] * silu_slope(gate[c])
                for c in range(width):
                    dtotal[c] = up[c] * silu(gate[c])
            else:
                for c in range(width):
                    dtotal[c] = up[c]
            for c in range(width):
                dskip[c] += dtotal[c] * u[c]

        for s in range(t1 - t0 - 1, -1, -1):
            t = t0 + s
            start = zeros if resets[i, t] else (after[s - 1] if s > 0 else before)
            _retreat(
                start,
                after[s],
                decays[s],
                exponents,
                steps[s],
                entries[s],
                _row(B, i, t),
                _row(C, i, t),
                dsums[s],
                dh,
                dA_block,
                dsteps[s],
                dentries[s],
                dB[part, t],
                dC[part, t],
            )
            if resets[i, t]:
                dh[:] = 0

        for s in range(t1 - t0):
            t = t0 + s
            u, raw, dtotal, step = _channels(x, place, t), _channels(dt, place, t), dsums[s], steps[s]
            dstep, dentry = dsteps[s], dentries[s]
            du, draw = dx[i, t, c0 : c0 + width], ddt[i, t, c0 : c0 + width]
            for c in range(width):
                du[c] = skip[c] * dtotal[c] + step[c] * dentry[c]
            for c in range(width):
                draw[c] = ln2 * dstep[c] + u[c] * dentry[c]
            if dt_softplus:
                for c in range(width):
                    draw[c] *= sigmoid(raw[c] + bias[c])
            for c in range(width):
                dbias[c] += draw[c]

    _write_transposed(dh, width, dstate[i, c0:])
    for k in range(n):
        dA[i, k, c0 : c0 + width] = dA_block[k, :width]


@jit
def _row(tensor, i, t):
    """The memory from row i and time t on."""
    memory, row, time = tensor
    return memory[i * row + t * time :]


@jit
def _channels(tensor, place, t):
    """The block's channels at time t."""
    i, c0, width = place
    memory, row, time = tensor
    start = i * row + t * time + c0
    return memory[start : start + width]


@jit
def _read_transposed(source, width, block):
    for c in range(width):
        for k in range(block.shape[0]):
            block[k, c] = source[c, k]


@jit
def _write_transposed(block, width, target):
    for c in range(width):
        for k in range(block.shape[0]):
            target[c, k] = block[k, c]


@jit
def _prepare(place, t0, t1, x, dt, dt_bias, dt_softplus, steps, entries):
    """Step sizes dt_t and entries dt_t x_t of the tokens t0..t1-1."""
    c0, width = place[1], place[2]
    bias = dt_bias[c0 : c0 + width]
    for t in range(t0, t1):
        u, raw, step, entry = _channels(x, place, t), _channels(dt, place, t), steps[t - t0], entries[t - t0]
        if dt_softplus:
            for c in range(width):
                step[c] = softplus(widen(raw[c]) + bias[c])
        else:
            for c in range(width):
                step[c] = widen(raw[c]) + bias[c]
        for c in range(width):
            entry[c] = step[c] * widen(u[c])


@jit
def _advance(h, exponents, step, entry, B, C, total):
    """One token: h = 2^(step exponents) * h + entry B, and total = h C."""
    for c in range(_WIDTH):
        total[c] = 0
    for k in range(h.shape[0]):
        for c in range(_WIDTH):
            new = exp2(step[c] * exponents[k, c]) * h[k, c] + entry[c] * B[k]
            h[k, c] = new
            total[c] += new * C[k]


@jit
def _replay(before, after, decay, exponents, step, entry, B, C, total):
    """`_advance` that keeps the state before and the decays."""
    for c in range(_WIDTH):
        total[c] = 0
    for k in range(before.shape[0]):
        for c in range(_WIDTH):
            factor = exp2(step[c] * exponents[k, c])
            new = factor * before[k, c] + entry[c] * B[k]
            decay[k, c] = factor
            after[k, c] = new
            total[c] += new * C[k]


@jit
def _retreat(before, after, decay, exponents, step, entry, B, C, dtotal, dh, dA_block, dstep, dentry, dB, dC):
    """One token back: dh is the gradient of the state after the token, then of the one before it."""
    for c in range(_WIDTH):
        dstep[c] = 0
        dentry[c] = 0
    for k in range(before.shape[0]):
        dB_sum = dtotal.dtype.type(0)
        dC_sum = dtotal.dtype.type(0)
        for c in range(_WIDTH):
            g = dh[k, c] + dtotal[c] * C[k]
            dB_sum += g * entry[c]
            dC_sum += after[k, c] * dtotal[c]
            dentry[c] += g * B[k]
            passed = g * decay[k, c]
            dh[k, c] = passed
            log = passed * before[k, c]  # the gradient of step * A
            dA_block[k, c] += log * step[c]
            dstep[c] += log * exponents[k, c]
        dB[k] = dB_sum
        dC[k] = dC_sum


@functools.cache
def _step_kernel(dtype: torch.dtype) -> Any:
    """The parallel region of `step`, for x, dt, B, C, z and y in `dtype`: threads draw blocks of channels."""
    stored, scalar, _, _ = NUMBERS[dtype]
    given_size, size = np.dtype(stored).itemsize, np.dtype(scalar).itemsize

    @region
    def kernel(words):
        _, b, e, n, dt_softplus, log_A, state, y, A, D, dt_bias = carray(words, 11, np.int64)
        x, x_row, dt, dt_row, B, B_row, C, C_row, z, z_row = carray(words, 21, np.int64)[11:]
        blocks = -(-e // _STEP_CHANNELS)
        block = next_ticket(words)
        while block < b * blocks:
            i, c0 = block // blocks, block % blocks * _STEP_CHANNELS
            width = min(_STEP_CHANNELS, e - c0)
            _step_block(
                carray(pointer(state + (i * e + c0) * n * size), (width, n), scalar),
                carray(pointer(x + (i * x_row + c0) * given_size), width, stored),
                carray(pointer(dt + (i * dt_row + c0) * given_size), width, stored),
                carray(pointer(A + c0 * n * size), (width, n), scalar),
                carray(pointer(B + i * B_row * given_size), n, stored),
                carray(pointer(C + i * C_row * given_size), n, stored),
                carray(pointer(D + c0 * size), width if D else 0, scalar),
                carray(pointer(z + (i * z_row + c0) * given_size), width if z else 0, stored),
                carray(pointer(dt_bias + c0 * size), width if dt_bias else 0, scalar),
                dt_softplus,
                log_A,
                carray(pointer(y + (i * e + c0) * given_size), width, stored),
            )
            block = next_ticket(words)

    return kernel


@jit
def _step_block(h, x, dt, A, B, C, D, z, dt_bias, dt_softplus, log_A, y):
    """One token; D, z and dt_bias are empty where absent."""
    width, n = h.shape
    out, enters, leaves = np.empty(width, h.dtype), np.empty(n, h.dtype), np.empty(n, h.dtype)
    for k in range(n):
        enters[k] = widen(B[k])
        leaves[k] = widen(C[k])
    for c in range(width):
        out[c] = widen(dt[c])
    for c in range(len(dt_bias)):
        out[c] += dt_bias[c]
    if dt_softplus:
        for c in range(width):
            out[c] = softplus(out[c])
    for c in range(width):
        step, entry, one, rate = out[c], out[c] * widen(x[c]), h[c], A[c]
        if log_A:
            for k in range(n):
                one[k] = exp(-step * exp(rate[k])) * one[k] + entry * enters[k]
        else:
            for k in range(n):
                one[k] = exp(step * rate[k]) * one[k] + entry * enters[k]
    # A loop of its own: a sum is a chain of additions, each of which waits for the one before.
    for c in range(width):
        one, total = h[c], h.dtype.type(0)
        for k in range(n):
            total += one[k] * leaves[k]
        out[c] = total
    for c in range(len(D)):
        out[c] += D[c] * widen(x[c])
    for c in range(len(z)):
        out[c] *= silu(widen(z[c]))
    for c in range(width):
        y[c] = narrow(out[c], y)

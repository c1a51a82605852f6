"""Short convolution on the CPU: serial in time, vectorised over channels, in parallel over rows and channel blocks.

One block is `_BLOCK` channels of one row of the batch. `age[t]` is how many tokens of t's own document lie before it,
at most w-1: tap j (j tokens back) counts where j <= age[t]. The initial state stands at times -(w-1)..-1.
"""

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor

from longwave.ops.checks import state_dtype
from longwave.ops.numba_bfloat16 import NUMBERS, narrow, widen
from longwave.ops.numba_math import jit, silu, silu_slope
from longwave.ops.openmp import carray, next_ticket, pointer, region, run
from longwave.ops.rows import flat
from longwave.ops.threads import parallel_for

_BLOCK = 128  # channels
_TILE = 32  # tokens whose inputs lie in the first-level cache together


def forward(x, weight, bias, silu, initial_state, reset, lengths) -> tuple[Tensor, Tensor]:
    b, l, e = x.shape
    inputs = _Inputs(x, weight, bias, initial_state, reset, lengths)
    y = torch.empty(b, l, e, dtype=inputs.given)
    y_flat, _ = flat(y.view(-1))
    blocks = -(-e // _BLOCK)

    def body(i: int) -> None:
        row, c0 = i // blocks, i % blocks * _BLOCK
        _forward_block(*inputs.kernel_args, silu, y_flat, row, c0, min(c0 + _BLOCK, e))

    parallel_for(b * blocks, body)
    return y.to(x.dtype), _final_window(x, inputs)


def backward(dy, dfinal, x, weight, bias, silu, initial_state, reset, lengths) -> tuple[Tensor, ...]:
    b, l, e = x.shape
    w = weight.shape[1]
    inputs = _Inputs(x, weight, bias, initial_state, reset, lengths)
    dy_flat, (dy_row, dy_time) = flat(dy.to(inputs.dtype))
    dx = torch.zeros(b, w - 1 + l, e, dtype=inputs.dtype)  # the initial state's gradient stands before that of x
    _add_final_window(dx, dfinal.to(inputs.dtype), inputs)
    dtaps = torch.zeros(b, w, e, dtype=inputs.dtype)
    dbias = torch.zeros(b, e, dtype=inputs.dtype)
    gradients = dx.view(-1).numpy(), dtaps.numpy(), dbias.numpy()
    blocks = -(-e // _BLOCK)

    def body(i: int) -> None:
        row, c0 = i // blocks, i % blocks * _BLOCK
        c1 = min(c0 + _BLOCK, e)
        _backward_block(*inputs.kernel_args, silu, dy_flat, dy_row, dy_time, *gradients, row, c0, c1)

    parallel_for(b * blocks, body)
    dx = dx.to(x.dtype)
    dweight = dtaps.sum(0).flip(0).t().to(weight.dtype)
    return tuple(g.contiguous() for g in (dx[:, w - 1 :], dweight, dbias.sum(0).to(weight.dtype), dx[:, : w - 1]))


def step(state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    (b, e), w = x.shape, weight.shape[1]
    given = (state, x, weight) if bias is None else (state, x, weight, bias)
    in_bfloat16 = all(t.dtype is torch.bfloat16 for t in given)
    dtype = torch.bfloat16 if in_bfloat16 else state_dtype(x.dtype)
    y = torch.empty(b, e, dtype=dtype)
    # The kernel gets addresses only, so these names keep the tensors alive; 0 stands for no bias.
    window, rows, taps = (_contiguous(t, dtype) for t in (state, x, weight))
    offset = None if bias is None else _contiguous(bias, dtype)
    addresses = [0 if t is None else t.data_ptr() for t in (window, rows, taps, offset, y)]
    run(_step_kernel(dtype), [*addresses, b, e, w, silu], n_blocks=1)
    if window.data_ptr() != state.data_ptr():
        state.copy_(window)
    return y if dtype is x.dtype else y.to(x.dtype)


def _contiguous(t: Tensor, dtype: torch.dtype) -> Tensor:
    return (t if t.dtype is dtype else t.to(dtype)).contiguous()  # even a `to` that does nothing costs 1 us


class _Inputs:
    """What both kernels read, in the accumulation dtype, and as flat arrays with strides."""

    def __init__(self, x, weight, bias, initial_state, reset, lengths):
        b, l, e = x.shape
        self.dtype = state_dtype(x.dtype)
        self.given = x.dtype if x.dtype is torch.bfloat16 else self.dtype  # what the kernels read x as
        self.w = weight.shape[1]
        window = torch.zeros(b, self.w - 1, e, dtype=x.dtype) if initial_state is None else initial_state
        self.window = window.to(x.dtype).contiguous()
        self.ends = np.full(b, l) if lengths is None else lengths.numpy()
        self.age = _ages(np.zeros((b, l), np.bool_) if reset is None else reset.numpy(), self.w)
        taps = weight.detach().to(self.dtype).flip(1).t().contiguous()  # (w, e): tap j looks j tokens back
        offset = torch.zeros(e, dtype=self.dtype) if bias is None else bias.detach().to(self.dtype).contiguous()
        x_flat, (x_row, x_time) = flat(x.to(self.given))
        window_flat = self.window.detach().to(self.dtype).contiguous().view(-1).numpy()
        self.kernel_args = (
            x_flat,
            x_row,
            x_time,
            l,
            e,
            window_flat,
            taps.numpy(),
            offset.numpy(),
            self.age,
            self.ends,
        )

    def last_ages(self) -> np.ndarray:
        """(b,): tokens that each row's final window may show: its last one and those before it in its document."""
        rows = np.arange(len(self.ends))
        return np.where(self.ends > 0, self.age[rows, np.maximum(self.ends - 1, 0)] + 1, self.w)


def _final_window(x: Tensor, inputs: _Inputs) -> Tensor:
    """(b, w-1, e): the inputs before `ends`, zero where they belong to an earlier document."""
    w, reach = inputs.w, inputs.last_ages()
    window = torch.empty_like(inputs.window)
    for i, end in enumerate(inputs.ends):
        both = torch.cat([inputs.window[i], x[i, max(end - w + 1, 0) : end]])
        window[i] = both[len(both) - (w - 1) :]
        window[i, : max(w - 1 - reach[i], 0)] = 0
    return window


def _add_final_window(dx: Tensor, dfinal: Tensor, inputs: _Inputs) -> None:
    """Add the final window's gradient to the inputs it was copied from; dx (b, w-1+l, e) begins with the state's."""
    w, reach = inputs.w, inputs.last_ages()
    for i, end in enumerate(inputs.ends):
        kept = min(int(reach[i]), w - 1)
        dx[i, end + w - 1 - kept : end + w - 1] += dfinal[i, w - 1 - kept :]


@jit
def _ages(reset, w):
    b, l = reset.shape
    age = np.empty((b, l), np.int64)
    for i in range(b):
        current = w - 1  # the initial state is a full window of the first document
        for t in range(l):
            current = 0 if reset[i, t] else min(current + 1, w - 1)
            age[i, t] = current
    return age


@jit
def _forward_block(x, x_row, x_time, l, e, window, taps, bias, age, ends, with_silu, y, i, c0, c1):
    w, width = taps.shape[0], c1 - c0
    local_taps, offset = taps[:, c0:c1].copy(), bias[c0:c1].copy()
    rows, sums = np.empty((w - 1 + _TILE, width), taps.dtype), np.empty((_TILE, width), taps.dtype)
    for t0 in range(0, ends[i], _TILE):
        n = min(_TILE, ends[i] - t0)
        _read_tile(rows, x, x_row, x_time, e, window, w, i, t0, n, c0)
        _convolve(rows, local_taps, offset, age[i], t0, n, sums)
        if with_silu:
            for s in range(n):
                for c in range(width):
                    sums[s, c] = silu(sums[s, c])
        for s in range(n):
            start = (i * l + t0 + s) * e + c0
            out = y[start : start + width]
            for c in range(width):
                out[c] = narrow(sums[s, c], y)
    for t in range(ends[i], l):
        y[(i * l + t) * e + c0 : (i * l + t) * e + c1] = 0


@jit
def _backward_block(
    x, x_row, x_time, l, e, window, taps, bias, age, ends, with_silu, dy, dy_row, dy_time, dx, dtaps, dbias, i, c0, c1
):
    w, width = taps.shape[0], c1 - c0
    local_taps, offset = taps[:, c0:c1].copy(), bias[c0:c1].copy()
    rows, sums = np.empty((w - 1 + _TILE, width), dx.dtype), np.empty((_TILE, width), dx.dtype)
    drows = np.zeros((w - 1 + _TILE, width), dx.dtype)
    dlocal_taps, doffset = np.zeros((w, width), dx.dtype), np.zeros(width, dx.dtype)
    for t0 in range(0, ends[i], _TILE):
        n = min(_TILE, ends[i] - t0)
        _read_tile(rows, x, x_row, x_time, e, window, w, i, t0, n, c0)
        if with_silu:
            _convolve(rows, local_taps, offset, age[i], t0, n, sums)
        for s in range(n):
            start = i * dy_row + (t0 + s) * dy_time + c0
            slope = dy[start : start + width]
            if with_silu:
                for c in range(width):
                    sums[s, c] = slope[c] * silu_slope(sums[s, c])
            else:
                sums[s] = slope
            for c in range(width):
                doffset[c] += sums[s, c]
        for s in range(n):
            for j in range(age[i, t0 + s] + 1):
                for c in range(width):
                    drows[s + w - 1 - j, c] += local_taps[j, c] * sums[s, c]
                    dlocal_taps[j, c] += sums[s, c] * rows[s + w - 1 - j, c]
        # Rows that no later token reaches are done; the last w-1 are carried on.
        last = t0 + n == ends[i]
        for s in range(n + w - 1 if last else n):
            out = (i * (l + w - 1) + t0 + s) * e
            dx[out + c0 : out + c1] += drows[s]
        drows[: w - 1] = drows[n : n + w - 1].copy()
        drows[w - 1 :] = 0
    dtaps[i, :, c0:c1] = dlocal_taps
    dbias[i, c0:c1] = doffset


@jit
def _read_tile(rows, x, x_row, x_time, e, window, w, i, t0, n, c0):
    """rows[s] = the input at time t0 - (w-1) + s, for the channels from c0 on; before time 0, the initial state."""
    width = rows.shape[1]
    for s in range(w - 1 + n):
        t = t0 - (w - 1) + s
        if t >= 0:
            start = i * x_row + t * x_time + c0
            inputs = x[start : start + width]
            for c in range(width):
                rows[s, c] = widen(inputs[c])
        else:
            start = (i * (w - 1) + w - 1 + t) * e + c0
            rows[s] = window[start : start + width]


@jit
def _convolve(rows, taps, bias, age, t0, n, sums):
    """sums[s] = bias + sum_j taps[j] * (the input j tokens before t0 + s), over the inputs of its document."""
    w, width = taps.shape
    for s in range(n):
        if w == 4 and age[t0 + s] == 3:  # the usual case, in one pass
            for c in range(width):
                recent = taps[0, c] * rows[s + 3, c] + taps[1, c] * rows[s + 2, c]
                sums[s, c] = bias[c] + recent + taps[2, c] * rows[s + 1, c] + taps[3, c] * rows[s, c]
            continue
        sums[s] = bias
        for j in range(age[t0 + s] + 1):
            for c in range(width):
                sums[s, c] += taps[j, c] * rows[s + w - 1 - j, c]


@functools.cache
def _step_kernel(dtype: torch.dtype) -> Any:
    stored, computed, widen, narrow = NUMBERS[dtype]
    size = np.dtype(stored).itemsize

    @region
    def kernel(words):
        _, state_at, x_at, taps_at, bias_at, y_at, b, e, w, with_silu = carray(words, 10, np.int64)
        taps = carray(pointer(taps_at), (e, w), stored)
        total = np.empty(e, computed)
        for i in range(b if next_ticket(words) == 0 else 0):
            x = carray(pointer(x_at + i * e * size), e, stored)
            y = carray(pointer(y_at + i * e * size), e, stored)
            if bias_at:
                bias = carray(pointer(bias_at), e, stored)
                for c in range(e):
                    total[c] = widen(bias[c]) + widen(taps[c, w - 1]) * widen(x[c])
            else:
                for c in range(e):
                    total[c] = widen(taps[c, w - 1]) * widen(x[c])
            for k in range(w - 1):
                row = carray(pointer(state_at + (i * (w - 1) + k) * e * size), e, stored)
                newer = carray(pointer(state_at + (i * (w - 1) + k + 1) * e * size), e, stored)
                for c in range(e):
                    total[c] += widen(taps[c, k]) * widen(row[c])
                if k < w - 2:
                    row[:] = newer
                else:
                    row[:] = x
            if with_silu:
                for c in range(e):
                    total[c] = silu(total[c])
            for c in range(e):
                y[c] = narrow(total[c])

    return kernel

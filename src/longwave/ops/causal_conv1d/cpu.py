"""Short convolution on the CPU: serial in time, vectorised over channels, in parallel over rows and channel blocks.

One block is `_BLOCK` channels of one row of the batch. `age[t]` is how many tokens of t's own document lie before it,
at most w-1: tap j (j tokens back) counts where j <= age[t]. The initial state stands at times -(w-1)..-1.
"""

import numpy as np
import torch
from torch import Tensor

from longwave.ops.checks import state_dtype
from longwave.ops.numba_math import jit, sigmoid
from longwave.ops.rows import flat
from longwave.ops.threads import parallel_for

_BLOCK = 128


def forward(x, weight, bias, silu, initial_state, reset, lengths) -> tuple[Tensor, Tensor]:
    b, l, e = x.shape
    inputs = _Inputs(x, weight, bias, initial_state, reset, lengths)
    y = torch.empty(b, l, e, dtype=inputs.dtype)
    y_flat = y.view(-1).numpy()
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
    dtype = state_dtype(x.dtype)
    window = state.to(dtype).contiguous()
    y = torch.empty(x.shape, dtype=dtype)
    offset = torch.zeros(weight.shape[0], dtype=dtype) if bias is None else bias.detach().to(dtype)
    taps = weight.detach().to(dtype).contiguous()
    _step(
        window.numpy(),
        x.detach().to(dtype).contiguous().numpy(),
        taps.numpy(),
        offset.numpy(),
        silu,
        y.numpy(),
    )
    if window.data_ptr() != state.data_ptr():
        state.copy_(window)
    return y.to(x.dtype)


class _Inputs:
    """What both kernels read, in the accumulation dtype, and as flat arrays with strides."""

    def __init__(self, x, weight, bias, initial_state, reset, lengths):
        b, l, e = x.shape
        self.dtype = state_dtype(x.dtype)
        self.w = weight.shape[1]
        window = torch.zeros(b, self.w - 1, e, dtype=x.dtype) if initial_state is None else initial_state
        self.window = window.to(x.dtype).contiguous()
        self.ends = np.full(b, l) if lengths is None else lengths.numpy()
        self.age = _ages(np.zeros((b, l), np.bool_) if reset is None else reset.numpy(), self.w)
        taps = weight.detach().to(self.dtype).flip(1).t().contiguous()  # (w, e): tap j looks j tokens back
        offset = torch.zeros(e, dtype=self.dtype) if bias is None else bias.detach().to(self.dtype).contiguous()
        x_flat, (x_row, x_time) = flat(x.to(self.dtype))
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
def _accumulate(acc, x, x_row, x_time, e, window, taps, bias, age, i, t, c0, c1):
    """acc[:] = bias + sum_j taps[j] * x_{t-j} for channels c0..c1 of row i."""
    w = taps.shape[0]
    for c in range(c0, c1):
        acc[c - c0] = bias[c]
    for j in range(age[i, t] + 1):
        source, base = (x, i * x_row + (t - j) * x_time) if t >= j else (window, (i * (w - 1) + w - 1 + t - j) * e)
        for c in range(c0, c1):
            acc[c - c0] += taps[j, c] * source[base + c]


@jit
def _forward_block(x, x_row, x_time, l, e, window, taps, bias, age, ends, silu, y, i, c0, c1):
    acc = np.empty(c1 - c0, y.dtype)
    for t in range(ends[i]):
        _accumulate(acc, x, x_row, x_time, e, window, taps, bias, age, i, t, c0, c1)
        out = (i * l + t) * e
        if silu:
            for c in range(c0, c1):
                y[out + c] = acc[c - c0] * sigmoid(acc[c - c0])
        else:
            for c in range(c0, c1):
                y[out + c] = acc[c - c0]
    for t in range(ends[i], l):
        for c in range(c0, c1):
            y[(i * l + t) * e + c] = 0


@jit
def _backward_block(
    x,
    x_row,
    x_time,
    l,
    e,
    window,
    taps,
    bias,
    age,
    ends,
    silu,
    dy,
    dy_row,
    dy_time,
    dx,
    dtaps,
    dbias,
    i,
    c0,
    c1,
):
    w = taps.shape[0]
    acc = np.empty(c1 - c0, dx.dtype)
    for t in range(ends[i]):
        base = i * dy_row + t * dy_time
        if silu:
            _accumulate(acc, x, x_row, x_time, e, window, taps, bias, age, i, t, c0, c1)
            for c in range(c0, c1):
                s = sigmoid(acc[c - c0])
                acc[c - c0] = dy[base + c] * s * (1 + acc[c - c0] * (1 - s))
        else:
            for c in range(c0, c1):
                acc[c - c0] = dy[base + c]
        for c in range(c0, c1):
            dbias[i, c] += acc[c - c0]
        for j in range(age[i, t] + 1):
            source, at = (x, i * x_row + (t - j) * x_time) if t >= j else (window, (i * (w - 1) + w - 1 + t - j) * e)
            out = (i * (l + w - 1) + w - 1 + t - j) * e
            for c in range(c0, c1):
                dx[out + c] += taps[j, c] * acc[c - c0]
                dtaps[i, j, c] += acc[c - c0] * source[at + c]


@jit
def _step(state, x, weight, bias, silu, y):
    b, e = x.shape
    w = weight.shape[1]
    for i in range(b):
        for c in range(e):
            y[i, c] = bias[c] + weight[c, w - 1] * x[i, c]
        for k in range(w - 1):
            for c in range(e):
                y[i, c] += weight[c, k] * state[i, k, c]
        for k in range(w - 2):
            for c in range(e):
                state[i, k, c] = state[i, k + 1, c]
        if w > 1:
            for c in range(e):
                state[i, w - 2, c] = x[i, c]
        if silu:
            for c in range(e):
                y[i, c] = y[i, c] * sigmoid(y[i, c])

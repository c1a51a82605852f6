"""The long convolution on the CPU: blocks of channels side by side, each through `ops/numba_fft.py`.

A tile is as many channels as a vector holds. Its filter is transformed, and then, block by block, the inputs that the
next q tokens see (overlap-save): all in memory of one thread, most of it in cache. A document that fits is one block.
"""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from longwave.ops import numba_fft as fft
from longwave.ops.checks import state_dtype
from longwave.ops.fft_blocks import block_size, documents_of, groups_of
from longwave.ops.numba_bfloat16 import NUMBERS, Number
from longwave.ops.numba_math import jit
from longwave.ops.openmp import carray, next_ticket, pointer, region, run
from longwave.ops.rows import flat
from longwave.ops.threads import parallel_for

_IN_CACHE = 8192  # points of a tile that the second-level cache holds
_STEP_CHANNELS = 64
_TAPS = 64


class _Blocks(NamedTuple):
    """Documents that are treated alike: q tokens at a time, with the filter's first `taps` taps."""

    documents: np.ndarray  # (n, 4) int64, see `documents_of`
    taps: int
    q: int
    plan: fft.Plan


def forward(x, kernel, points, D, initial_state, reset, lengths, chunk_len) -> tuple[Tensor, Tensor]:
    inputs = _Inputs(x, kernel, D, initial_state, reset, lengths)
    b, l, e = x.shape
    y = (torch.empty if lengths is None else torch.zeros)(b, l, e, dtype=inputs.dtype)
    y_flat = y.view(-1).numpy()
    h = None if points is None else points.view(len(points), -1).numpy()
    for blocks in inputs.blocks(chunk_len, h):
        # Where there are fewer tiles than threads, several transform the same filter.
        parts = min(len(blocks.documents), -(-torch.get_num_threads() // inputs.n_tiles))

        def body(i: int, blocks=blocks, parts=parts) -> None:
            tile, part = divmod(i, parts)
            documents = blocks.documents[part::parts]
            spectrum = _filter(inputs, blocks, tile) if h is None else h[tile]
            _forward_tile(*inputs.x, *inputs.state, inputs.D, spectrum, y_flat, l, e, documents, *blocks[1:3],
                          *blocks.plan, *inputs.channels(tile))  # fmt: skip

        parallel_for(inputs.n_tiles * parts, body)
    return y.to(x.dtype), _final_state(x, initial_state, inputs)


def backward(dy, dfinal, x, kernel, D, initial_state, reset, lengths, chunk_len) -> tuple[Tensor, ...]:
    inputs = _Inputs(x, kernel, D, initial_state, reset, lengths)
    b, l, e = x.shape
    history = 0 if initial_state is None else initial_state.shape[1]
    dy_flat, dy_strides = flat(dy.to(inputs.dtype))
    dx = torch.zeros(b, history + l, e, dtype=inputs.dtype)  # the initial state's gradient stands before that of x
    dkernel = torch.zeros(e, kernel.shape[1], dtype=inputs.dtype)
    gradients = dx.view(-1).numpy(), dkernel.numpy()
    for blocks in inputs.blocks(chunk_len, None):

        def body(tile: int, blocks=blocks) -> None:
            spectrum = _filter(inputs, blocks, tile)
            _backward_tile(*inputs.x, *inputs.state, inputs.D, spectrum, dy_flat, *dy_strides, *gradients, l, e,
                           blocks.documents, *blocks[1:3], *blocks.plan, *inputs.channels(tile))  # fmt: skip

        parallel_for(inputs.n_tiles, body)
    dD = dkernel[:, 0].clone()  # the skip is one more first tap
    if dfinal is None:
        dfinal = dy.new_zeros(len(dy), kernel.shape[1] - 1, dy.shape[2])
    for i, (start, end) in enumerate(_kept(inputs)):
        dx[i, history + start : history + end] += dfinal[i, len(dfinal[i]) - (end - start) :]
    dx = dx.to(x.dtype)
    return dx[:, history:].contiguous(), dkernel.to(kernel.dtype), dD.to(kernel.dtype), dx[:, :history].contiguous()


def spectrum(kernel: Tensor, l: int, chunk_len: int | None) -> Tensor:
    """(tiles, 2 n lanes): the transform of each tile of the filter."""
    e, k = kernel.shape
    inputs = _Inputs(kernel.new_zeros(0, l, e), kernel, None, None, None, None)
    blocks = _Blocks(np.empty((0, 4), np.int64), k, *_sizes(k, l, chunk_len, inputs.dtype))
    points = kernel.new_empty(inputs.n_tiles, 2 * blocks.plan.n * inputs.lanes)
    rows = points.numpy()

    def body(tile: int) -> None:
        rows[tile] = _filter(inputs, blocks, tile)

    parallel_for(inputs.n_tiles, body)
    return points


class _Inputs:
    """What the kernels read, in the dtype they compute in, and as flat arrays with strides."""

    def __init__(self, x, kernel, D, initial_state, reset, lengths):
        (b, l, self.e), self.k = x.shape, kernel.shape[1]
        self.dtype = state_dtype(x.dtype)
        self.lanes = fft.VECTOR_BYTES // self.dtype.itemsize
        self.n_tiles = -(-self.e // self.lanes)
        memory, (row, time) = flat(x.to(self.dtype))
        self.x = memory, row, time
        self.has_state = initial_state is not None
        state = x.new_empty(0) if initial_state is None else initial_state
        history = self.k - 1 if self.has_state else 0
        self.state = state.detach().to(self.dtype).contiguous().view(-1).numpy(), history
        self.D = np.empty(0, self.x[0].dtype) if D is None else D.detach().to(self.dtype).contiguous().numpy()
        taps = kernel.detach().to(self.dtype)
        by_time = taps.stride(0) == 1
        memory, (stride,) = flat(taps.t() if by_time else taps)
        self.kernel = memory, *((1, stride) if by_time else (stride, 1))
        self.ends = np.full(b, l) if lengths is None else lengths.numpy()
        self.documents = documents_of(np.zeros((b, l), np.bool_) if reset is None else reset.numpy(), self.ends,
                                    -history)  # fmt: skip

    def channels(self, tile: int) -> tuple[int, int]:
        """The first channel of a tile, and how many it has."""
        begin = tile * self.lanes
        return begin, min(self.lanes, self.e - begin)

    def blocks(self, chunk_len: int | None, h: np.ndarray | None) -> Iterator[_Blocks]:
        """All documents in groups of like length, each with a transform of its own, or with that of the spectrum h."""
        if h is not None:
            n = h.shape[1] // (2 * self.lanes)
            yield _Blocks(self.documents, self.k, 2 * n - (self.k - 1), fft.plan(n, self.x[0].dtype))
            return
        for documents, length, taps in groups_of(self.documents, self.k):
            yield _Blocks(documents, taps, *_sizes(taps, length, chunk_len, self.dtype))


def _sizes(taps: int, length: int, chunk_len: int | None, dtype: torch.dtype) -> tuple[int, fft.Plan]:
    """Tokens to a block, and the transform, for documents of `length` tokens."""
    q, n = block_size(taps, length, chunk_len, _cost)
    return q, _plan(n, dtype)


def _cost(n: int) -> float:
    """Of a transform and its way back, in units of their own."""
    return n * (n.bit_length() + 4) * (1 if n <= _IN_CACHE else 2)


def _plan(n: int, dtype: torch.dtype) -> fft.Plan:
    return fft.plan(n, np.dtype(str(dtype).removeprefix("torch.")))


def _filter(inputs: _Inputs, blocks: _Blocks, tile: int) -> np.ndarray:
    return _transform_filter(*inputs.kernel, blocks.taps, *blocks.plan, *inputs.channels(tile))


def _kept(inputs: _Inputs) -> Iterator[tuple[int, int]]:
    """For each row, the times of the inputs of which its final state consists; those before them are zeros."""
    last = {row: seen for row, _, _, seen in inputs.documents.tolist()}
    for row, end in enumerate(inputs.ends.tolist()):
        start = max(last.get(row, -inputs.state[1]), end - (inputs.k - 1))
        yield start, end


def _final_state(x: Tensor, initial_state: Tensor | None, inputs: _Inputs) -> Tensor:
    """(b, k-1, e)"""
    size = inputs.k - 1
    final = x.new_empty(len(x), size, inputs.e)
    for i, (start, end) in enumerate(_kept(inputs)):
        kept = end - start
        final[i, : size - kept] = 0
        if start < 0 and initial_state is not None:
            final[i, size - kept : size - max(end, 0)] = initial_state[i, size + start : size + min(end, 0)]
        final[i, size - (end - max(start, 0)) :] = x[i, max(start, 0) : end]
    return final


@jit
def _transform_filter(kernel, channel, time, taps, n, radices, first, roots, c0, width):
    """The transform of the taps, divided by n, which makes up for the way back."""
    h = fft.points(n, kernel)
    h[0] = 1 / n
    scale = h[0]  # in the dtype of h
    h[:] = 0
    row = fft.place(1, n, h) if n > 1 else 0
    for half in range(2):  # taps below n are real parts, the others imaginary ones
        begin, end = half * n, min(taps, (half + 1) * n)
        for j0 in range(begin, end, _TAPS):  # a run of one channel's taps, and the rows they go to, are in cache
            for c in range(width):
                to, source = fft.place(j0, n, h) + c, (c0 + c) * channel + j0 * time
                for j in range(min(_TAPS, end - j0)):
                    h[to + j * row] = scale * kernel[source + j * time]
    fft.transform(h, n, radices, first, roots)
    return h


@jit
def _forward_tile(
    x, x_row, x_time, state, history, D, h, y, l, e, documents, taps, q, n, radices, first, roots, c0, width
):
    z = fft.points(n, x)
    for i in range(len(documents)):
        row, start, end, seen = documents[i]
        for t0 in range(start, end, q):
            t1 = min(t0 + q, end)
            _read_inputs(z, n, x, x_row, x_time, state, history, e, row, max(seen, t0 - (taps - 1)), t0, t1, taps, c0,
                         width)  # fmt: skip
            fft.convolve(z, h, n, radices, first, roots)
            for t in range(t0, t1):
                at, from_z = (row * l + t) * e + c0, fft.place(t - t0 + taps - 1, n, z)
                if len(D):
                    fft.sum_row(y, at, z, from_z, D, c0, x, row * x_row + t * x_time + c0, width)
                else:
                    fft.copy_row(y, at, z, from_z, width)


@jit
def _backward_tile(
    x, x_row, x_time, state, history, D, h, dy, dy_row, dy_time, dx, dkernel, l, e, documents, taps, q, n, radices,
    first, roots, c0, width,
):  # fmt: skip
    z, dz, dh = fft.points(n, x), fft.points(n, x), fft.points(n, x)
    dh[:] = 0
    for i in range(len(documents)):
        row, start, end, seen = documents[i]
        for t0 in range(start, end, q):
            t1, low = min(t0 + q, end), max(seen, t0 - (taps - 1))
            _read_inputs(z, n, x, x_row, x_time, state, history, e, row, low, t0, t1, taps, c0, width)
            dz[:] = 0
            for t in range(t0, t1):
                at = row * dy_row + t * dy_time + c0
                fft.copy_row(dz, fft.place(t - t0 + taps - 1, n, dz), dy, at, width)
            fft.transform(z, n, radices, first, roots)
            fft.transform(dz, n, radices, first, roots)
            fft.add_correlation(dh, dz, z, n)
            fft.multiply_conjugate(dz, h, n)
            fft.untransform(dz, n, radices, first, roots)
            for t in range(low, t1):
                at = (row * (history + l) + history + t) * e + c0
                fft.add_row(dx, at, dz, fft.place(t - t0 + taps - 1, n, dz), width)
                if len(D) and t >= t0:
                    fft.sum_row(dx, at, dx, at, D, c0, dy, row * dy_row + t * dy_time + c0, width)
    fft.untransform(dh, n, radices, first, roots)
    scale = 1.0 / n
    for j in range(taps):
        at = fft.place(j, n, dh)
        for c in range(width):
            dkernel[c0 + c, j] += scale * dh[at + c]


@jit
def _read_inputs(z, n, x, x_row, x_time, state, history, e, row, low, t0, t1, taps, c0, width):
    """The inputs at times low..t1 as a polynomial, in which time t0 has degree taps - 1."""
    z[:] = 0
    for t in range(low, t1):
        at = fft.place(t - t0 + taps - 1, n, z)
        if t < 0:
            fft.copy_row(z, at, state, (row * history + history + t) * e + c0, width)
        else:
            fft.copy_row(z, at, x, row * x_row + t * x_time + c0, width)


def step(state: Tensor, x: Tensor, kernel: Tensor, D: Tensor | None, length: Tensor | None) -> Tensor:
    (b, m, e), k = state.shape, kernel.shape[1]
    if length is not None and b and (longest := int(length.max())) >= min(m, k):
        raise ValueError(f"fft_conv_step: length={longest} leaves no room in a state of {m} and a filter of {k} taps")
    compiled = NUMBERS.get(state.dtype)
    dtype = state_dtype(state.dtype)
    held = state if compiled and state.stride(-1) == 1 else state.to(dtype).contiguous()
    y = torch.empty(b, e, dtype=dtype)
    # The kernel gets addresses only, so these names keep the tensors alive; 0 stands for what is absent.
    taps, token = kernel.detach().to(dtype).t().contiguous(), x.to(held.dtype).contiguous()
    skip = None if D is None else D.detach().to(dtype).contiguous()
    lengths = None if length is None else length.contiguous()
    words = [0 if t is None else t.data_ptr() for t in (held, token, taps, skip, lengths, y)]
    n_blocks = b * -(-e // _STEP_CHANNELS)
    run(_step_kernel(held.dtype), [*words, b, m, e, held.stride(0), held.stride(1)], n_blocks=n_blocks)
    if held is not state:
        state.copy_(held)
    return y.to(x.dtype)


@functools.cache
def _step_kernel(dtype: torch.dtype) -> Any:
    return _make_step_kernel(NUMBERS[dtype])


def _make_step_kernel(number: Number) -> Any:
    stored, computed, widen, _ = number

    @region
    def kernel(words):
        _, state_at, x_at, taps_at, skip_at, length_at, y_at, b, m, e, row, time = carray(words, 12, np.int64)
        state = carray(pointer(state_at), (b - 1) * row + max(m - 1, 0) * time + e, stored)
        x, y = carray(pointer(x_at), (b, e), stored), carray(pointer(y_at), (b, e), computed)
        blocks = -(-e // _STEP_CHANNELS)
        total = np.empty(_STEP_CHANNELS, computed)
        ticket = next_ticket(words)
        while ticket < b * blocks:
            i, c0 = ticket // blocks, ticket % blocks * _STEP_CHANNELS
            width = min(_STEP_CHANNELS, e - c0)
            n = carray(pointer(length_at), b, np.int64)[i] if length_at else m
            taps = carray(pointer(taps_at), (n + 1) * e, computed)
            for c in range(width):
                total[c] = widen(x[i, c0 + c]) * taps[c0 + c]
            if skip_at:
                skip = carray(pointer(skip_at), e, computed)
                for c in range(width):
                    total[c] += widen(x[i, c0 + c]) * skip[c0 + c]
            for s in range(n):
                held = state[i * row + s * time + c0 : i * row + s * time + c0 + width]
                tap = taps[(n - s) * e + c0 : (n - s) * e + c0 + width]
                for c in range(width):
                    total[c] += widen(held[c]) * tap[c]
                if not length_at and s:
                    state[i * row + (s - 1) * time + c0 : i * row + (s - 1) * time + c0 + width] = held
            last = n if length_at else m - 1
            if last >= 0:
                for c in range(width):
                    state[i * row + last * time + c0 + c] = x[i, c0 + c]
            for c in range(width):
                y[i, c0 + c] = total[c]
            ticket = next_ticket(words)

    return kernel

"""The long convolution on a GPU: cuFFT, real to complex, in blocks of all rows; and one token, in Triton.

A block's inputs go into a zeroed buffer, channels first, are transformed, multiplied by the filter's spectrum and
transformed back (overlap-save: what wraps around falls on the places of the k - 1 inputs before the block). Where
documents begin inside rows, they are gathered in groups of like length, as if each were a row; to cut them, `reset` and
`lengths` come to the host.
"""

from collections.abc import Callable, Iterator
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from longwave.ops.checks import state_dtype
from longwave.ops.fft_blocks import block_size, documents_of, groups_of
from longwave.ops.triton_math import device_of, processors_of, rows
from longwave.ops.triton_segments import segments_of


class Blocks(NamedTuple):
    taps: int  # of the filter that are needed
    q: int  # tokens to a block
    n: int  # half the points of a transform


class _Pieces(NamedTuple):
    """Documents cut out of their rows, and where they lie. `inside` is False for what is to be read as 0."""

    at: Tensor  # (documents, taps - 1 + length) in the rows' inputs, those of the initial state first
    inside: Tensor
    out: Tensor  # (documents, length) in the rows' outputs; one place behind the last for what is not there
    blocks: Blocks


class Transforms(NamedTuple):
    """What convolves, of rows (b, l, e) that are documents. cuFFT, or kernels of our own."""

    blocks: Callable[[int, int, int | None], Blocks]  # of taps, the rows' length, chunk_len
    points: Callable[[Tensor], int]  # n, of a spectrum
    spectrum: Callable[[Tensor, Blocks], Tensor]
    convolve: Callable[[Tensor | None, Tensor, Tensor, Blocks], Tensor]  # history (b, taps - 1, e), x, spectrum -> y
    correlate: Callable[[Tensor | None, Tensor, Tensor, Tensor, Blocks], tuple[Tensor, Tensor]]
    """history, x, dy, kernel -> the gradients of history and x (b, taps - 1 + l, e), and of the taps (e, taps)"""


def forward(
    x, kernel, points, D, initial_state, reset, lengths, chunk_len, transforms: Transforms | None = None
) -> tuple[Tensor, Tensor]:
    b, l, e = x.shape
    transforms = transforms or _CUFFT
    inputs = Inputs(x, kernel, initial_state, reset, lengths, transforms)
    with device_of(x):
        if reset is None:
            blocks = inputs.row_blocks(chunk_len, points)
            h = transforms.spectrum(inputs.kernel, blocks) if points is None else points
            y = transforms.convolve(inputs.history, inputs.x, h, blocks)
        else:
            y, given = x.new_empty(b * l + 1, e, dtype=inputs.dtype), inputs.flat()
            for piece in inputs.pieces(chunk_len, points):
                h = transforms.spectrum(inputs.kernel, piece.blocks) if points is None else points
                before = piece.blocks.taps - 1
                documents = torch.where(piece.inside[..., None], given[piece.at], 0)
                found = transforms.convolve(documents[:, :before], documents[:, before:], h, piece.blocks)
                y[piece.out] = found
            y = y[: b * l].view(b, l, e)
        if D is not None:
            y = torch.addcmul(y, inputs.x, D.to(inputs.dtype))
        if lengths is not None:
            y = torch.where(inputs.real, y, 0)
        return y.to(x.dtype), inputs.final_state(x, initial_state)


def backward(
    dy, dfinal, x, kernel, D, initial_state, reset, lengths, chunk_len, transforms: Transforms | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    b, l, e = x.shape
    transforms = transforms or _CUFFT
    inputs = Inputs(x, kernel, initial_state, reset, lengths, transforms)
    dy = dy.to(inputs.dtype)
    if lengths is not None:
        dy = torch.where(inputs.real, dy, 0)
    with device_of(x):
        dkernel = torch.zeros(inputs.kernel.shape, dtype=inputs.dtype, device=x.device)
        if reset is None:
            blocks = inputs.row_blocks(chunk_len, None)
            dinputs, dtaps = transforms.correlate(inputs.history, inputs.x, dy, inputs.kernel, blocks)
            dinputs = dinputs[:, dinputs.shape[1] - l - inputs.held :]
            dkernel[:, : blocks.taps] = dtaps
        else:
            dinputs, given = x.new_zeros(b * (inputs.held + l) + 1, e, dtype=inputs.dtype), inputs.flat()
            up = torch.cat([dy.reshape(b * l, e), dy.new_zeros(1, e)])
            for piece in inputs.pieces(chunk_len, None):
                before = piece.blocks.taps - 1
                documents = torch.where(piece.inside[..., None], given[piece.at], 0)
                ddocuments, dtaps = transforms.correlate(
                    documents[:, :before], documents[:, before:], up[piece.out], inputs.kernel, piece.blocks
                )
                dinputs[torch.where(piece.inside, piece.at, len(dinputs) - 1)] = ddocuments
                dkernel[:, : piece.blocks.taps] += dtaps
            dinputs = dinputs[:-1].view(b, inputs.held + l, e)
        dinputs = inputs.add_final_gradient(dinputs, dfinal)
        dx, dinitial = dinputs[:, inputs.held :], dinputs[:, : inputs.held]
        if D is not None:
            dx = torch.addcmul(dx, dy, D.to(inputs.dtype))
        dD = x.new_empty(e) if D is None else (inputs.x * dy).sum((0, 1))
    dkernel, dD = dkernel.to(kernel.dtype), dD.to(kernel.dtype)
    return dx.to(x.dtype).contiguous(), dkernel, dD, dinitial.to(x.dtype, copy=True).contiguous()


def spectrum(kernel: Tensor, l: int, chunk_len: int | None) -> Tensor:
    """(e, n + 1, 2): the filter's transform, for blocks of about l tokens."""
    with device_of(kernel):
        return _spectrum(kernel, _blocks(kernel.shape[1], l, chunk_len))


class Inputs:
    """What is convolved, in the dtype that is computed in, and its documents."""

    def __init__(self, x, kernel, initial_state, reset, lengths, transforms: Transforms):
        self.dtype, self.k = state_dtype(x.dtype), kernel.shape[1]
        self.given = x, kernel, initial_state
        self.reset, self.lengths, self.transforms = reset, lengths, transforms
        self.b, self.l, _ = x.shape
        self.held = 0 if initial_state is None else self.k - 1

    @cached_property
    def x(self) -> Tensor:
        x = self.given[0]
        return (x if self.real is None else torch.where(self.real, x, 0)).to(self.dtype)

    @cached_property
    def kernel(self) -> Tensor:
        return self.given[1].to(self.dtype)

    @cached_property
    def history(self) -> Tensor | None:
        initial = self.given[2]
        return None if initial is None else initial.to(self.dtype)

    @cached_property
    def times(self) -> Tensor:
        return torch.arange(self.l, device=self.given[0].device)

    @cached_property
    def ends(self) -> Tensor:
        return torch.full((self.b,), self.l, device=self.given[0].device) if self.lengths is None else self.lengths

    @cached_property
    def real(self) -> Tensor | None:
        return None if self.lengths is None else (self.times < self.lengths[:, None])[..., None]

    def flat(self) -> Tensor:
        """(b (held + l), e): the inputs of all rows."""
        whole = self.x if self.history is None else torch.cat([self.history, self.x], 1)
        return whole.reshape(-1, whole.shape[2])

    def row_blocks(self, chunk_len: int | None, points: Tensor | None) -> Blocks:
        return self._blocks(self.l, self.k if self.held else min(self.k, self.l), chunk_len, points)

    def _blocks(self, length: int, taps: int, chunk_len: int | None, points: Tensor | None) -> Blocks:
        if points is None:
            return self.transforms.blocks(taps, length, chunk_len)
        n = self.transforms.points(points)
        return Blocks(self.k, min(length, 2 * n - (self.k - 1)), n)

    def pieces(self, chunk_len: int | None, points: Tensor | None) -> Iterator[_Pieces]:
        b, l = self.b, self.l
        documents = documents_of(self.reset.cpu().numpy(), self.ends.cpu().numpy(), -self.held)
        for group, length, taps in groups_of(documents, self.k):
            blocks = self._blocks(length, taps, chunk_len, points)
            row, start, end, seen = torch.from_numpy(np.ascontiguousarray(group.T)).to(self.x.device)[..., None]
            time = start + torch.arange(1 - blocks.taps, length, device=self.x.device)
            inside = (time >= seen) & (time < end)
            at = torch.where(inside, row * (self.held + l) + self.held + time, 0)
            time = start + self.times[:length]
            yield _Pieces(at, inside, torch.where(time < end, row * l + time, b * l), blocks)

    def final_state(self, x: Tensor, initial_state: Tensor | None) -> Tensor:
        """(b, k-1, e): the last inputs; zeros for those of earlier documents, and before the first."""
        time = self.ends[:, None] + torch.arange(1 - self.k, 0, device=x.device)  # (b, k-1)
        size = (-1, -1, x.shape[2])
        final = x.gather(1, time.clamp(min=0)[..., None].expand(size))
        if initial_state is not None and self.k > 1:
            past = initial_state.gather(1, (time + self.k - 1).clamp(max=self.k - 2)[..., None].expand(size))
            final = torch.where((time >= 0)[..., None], final, past.to(x.dtype))
        return torch.where((time >= self._seen())[..., None], final, 0)

    def add_final_gradient(self, dinputs: Tensor, dfinal: Tensor | None) -> Tensor:
        if dfinal is None or self.k == 1:
            return dinputs
        time = torch.arange(-self.held, self.l, device=dfinal.device)
        place = time - (self.ends[:, None] - (self.k - 1))  # (b, held + l)
        kept = (place >= 0) & (place < self.k - 1) & (time >= self._seen())
        up = dfinal.gather(1, place.clamp(0, self.k - 2)[..., None].expand(dinputs.shape))
        return dinputs + torch.where(kept[..., None], up, 0).to(self.dtype)

    def _seen(self) -> Tensor:
        """(b, 1): the time of the first input that a row's last document sees."""
        first = torch.full((len(self.ends), 1), -self.held, device=self.ends.device)
        if self.reset is None:
            return first
        starts = torch.where(self.reset & (self.times < self.ends[:, None]), self.times, -1)
        last = starts.amax(1, keepdim=True)
        return torch.where(last < 0, first, last)


def _cost(n: int) -> float:
    """Of a transform of 2n points and its way back, in units of their own; below 4096, of starting its kernels."""
    n = max(n, 4096)
    return n * (n.bit_length() + 4)


def _blocks(taps: int, length: int, chunk_len: int | None) -> Blocks:
    return Blocks(taps, *block_size(taps, length, chunk_len, _cost))


def _spectrum(kernel: Tensor, blocks: Blocks) -> Tensor:
    """(e, n + 1, 2)."""
    return torch.view_as_real(torch.fft.rfft(kernel[:, : blocks.taps], 2 * blocks.n))


def _transform(history: Tensor | None, x: Tensor, t0: int, t1: int, blocks: Blocks) -> Tensor:
    """(b, e, n + 1): that of the inputs from taps - 1 before t0 to t1. `history` holds the taps - 1 before x."""
    b, _, e = x.shape
    buffer = x.new_zeros(b, e, 2 * blocks.n)
    first = t0 - (blocks.taps - 1)
    if history is not None and first < 0:
        buffer[..., :-first] = history[:, t0:].transpose(1, 2)
    low = max(first, 0)
    buffer[..., low - first : t1 - first] = x[:, low:t1].transpose(1, 2)
    return torch.fft.rfft(buffer)


def _convolve(history: Tensor | None, x: Tensor, h: Tensor, blocks: Blocks) -> Tensor:
    """(b, l, e), from x (b, l, e)."""
    taps, q, n = blocks
    h = torch.view_as_complex(h)
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    for t0 in range(0, x.shape[1], q):
        t1 = min(t0 + q, x.shape[1])
        product = _transform(history, x, t0, t1, blocks).mul_(h)
        y[:, t0:t1] = torch.fft.irfft(product, 2 * n)[..., taps - 1 : taps - 1 + t1 - t0].transpose(1, 2)
    return y


def _correlate(history: Tensor | None, x: Tensor, dy: Tensor, kernel: Tensor, blocks: Blocks) -> tuple[Tensor, Tensor]:
    """The gradients of the inputs (b, taps - 1 + l, e) and of the taps (e, taps)."""
    (b, l, e), (taps, q, n) = x.shape, blocks
    h = torch.view_as_complex(_spectrum(kernel, blocks))
    dinputs = x.new_zeros(b, taps - 1 + l, e)
    dh = torch.zeros_like(h)
    for t0 in range(0, l, q):
        t1 = min(t0 + q, l)
        up = x.new_zeros(b, e, 2 * n)
        up[..., taps - 1 : taps - 1 + t1 - t0] = dy[:, t0:t1].transpose(1, 2)
        up = torch.fft.rfft(up)
        dh += (_transform(history, x, t0, t1, blocks).conj() * up).sum(0)
        back = torch.fft.irfft(up.mul_(h.conj()), 2 * n)[..., : taps - 1 + t1 - t0]
        dinputs[:, t0 : t1 + taps - 1] += back.transpose(1, 2)
    return dinputs, torch.fft.irfft(dh, 2 * n)[:, :taps]


_CUFFT = Transforms(_blocks, lambda h: h.shape[1] - 1, _spectrum, _convolve, _correlate)


@triton.jit
def _step_kernel(
    state, x, kernel, length, parts, b, m, e, k, per_split, splits,
    stride_sb, stride_sm, stride_xb, stride_ke, stride_kk,
    LENGTH: tl.constexpr, BM: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """A part of the sum over the inputs that a row holds; the first one takes x, and with LENGTH puts it behind."""
    blocks = tl.cdiv(e, BE)
    program = tl.program_id(0).to(tl.int64)
    i_e = (program % blocks).to(tl.int32) * BE + tl.arange(0, BE)
    split, row = program // blocks % splits, program // (blocks * splits)
    in_e = i_e < e
    held = tl.load(length + row).to(tl.int32) if LENGTH else m
    state += row * stride_sb + i_e[None, :]
    kernel += i_e[None, :] * stride_ke
    total = tl.zeros((BM, BE), tl.float32)
    first = (split * per_split).to(tl.int32)
    for start in range(first, tl.minimum(first + per_split, held), BM):
        s = start + tl.arange(0, BM)
        here = ((s < tl.minimum(first + per_split, held)) & (held - s < k))[:, None] & in_e[None, :]
        u = tl.load(state + s.to(tl.int64)[:, None] * stride_sm, mask=here, other=0.0).to(tl.float32)
        total += u * tl.load(kernel + (held - s).to(tl.int64)[:, None] * stride_kk, mask=here, other=0.0).to(tl.float32)
    y = tl.sum(total, 0)
    if split == 0:
        token = tl.load(x + row * stride_xb + i_e, mask=in_e, other=0.0)
        y += token.to(tl.float32) * tl.sum(tl.load(kernel, mask=in_e[None, :], other=0.0).to(tl.float32), 0)
        if LENGTH:
            room = i_e < tl.where(held < m, e, 0)
            at = state + held.to(tl.int64) * stride_sm + tl.zeros((1, BE), tl.int32)
            tl.store(at, token.to(state.dtype.element_ty)[None, :], mask=room[None, :])
    tl.store(parts + (split * b + row) * e + i_e, y, mask=in_e)


def step(state: Tensor, x: Tensor, kernel: Tensor, D: Tensor | None, length: Tensor | None) -> Tensor:
    (b, m, e), k = state.shape, kernel.shape[1]
    memory, x = rows(state), rows(x)
    BM, BE = 16, 64
    blocks = triton.cdiv(e, BE)
    splits = segments_of(b * blocks, 4 * processors_of(x), m, 4 * BM)
    per_split = max(BM, triton.cdiv(triton.cdiv(m, splits), BM) * BM)
    parts = torch.empty(splits, b, e, dtype=torch.float32, device=x.device)
    with device_of(x):
        _step_kernel[(b * splits * blocks,)](
            memory, x, kernel, length, parts, b, m, e, k, per_split, splits,
            *memory.stride()[:2], x.stride(0), *kernel.stride(), LENGTH=length is not None, BM=BM, BE=BE, num_warps=4,
        )  # fmt: skip
    y = parts.sum(0)
    if D is not None:
        y = torch.addcmul(y, x, D.to(torch.float32))
    if length is None and m:
        state.copy_(torch.cat([state[:, 1:], x[:, None].to(state.dtype)], 1))
    elif memory is not state:
        state.copy_(memory)
    return y.to(x.dtype)

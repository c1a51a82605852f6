"""The long convolution on Hopper, by transforms of its own: memory is crossed once, the second cache by long blocks.

Blocks are cut as in `triton.py` (overlap-save), of 2n points with n a power of two. The skip D x is D in each number of
the filter's spectrum. The gradient of the inputs is a convolution with the conjugate spectrum, whose blocks begin where
the results do; that of the taps is the transform back of a sum over rows and blocks, in a fixed order.
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from longwave.ops.fft_blocks import block_size
from longwave.ops.fft_conv import hopper_kernels as short
from longwave.ops.fft_conv import hopper_long as long
from longwave.ops.fft_conv import triton as portable
from longwave.ops.gluon_fft import turns
from longwave.ops.triton_math import absent, device_of, processors_of, rows
from longwave.ops.triton_segments import segments_of

_LONGEST = 2048  # complex numbers that one program transforms
_CHUNK = 4 << 20  # bytes of complex numbers between two passes, of which _SLOTS times as many stay in the cache
_SLOTS, _LAG = 6, 2
_RADICES = {
    32: (8, 4), 64: (8, 8), 128: (16, 8), 256: (16, 16), 512: (8, 8, 8), 1024: (16, 8, 8), 2048: (16, 16, 8),
    4096: (16, 16, 16), 8192: (16, 8, 8, 8),
}  # fmt: skip


class _Plan(NamedTuple):
    """How one program transforms n numbers, of `channels` sequences at once."""

    radices: tuple[int, ...]
    channels: int
    warps: int

    def tables(self, x: Tensor, *, twisted: bool, columns: int = 0) -> tuple[Tensor, int]:
        table = turns(self.radices, x.device, twisted=twisted, columns=columns)
        return table, table.shape[1]

    def sizes(self) -> dict:
        return {"RADICES": self.radices, "BE": self.channels, "VEC": min(2, self.channels), "num_warps": self.warps}

    def programs(self, e: int) -> int:
        return -(-e // self.channels)


@functools.cache
def _plan(n: int, held: int = 1) -> _Plan:
    """`held`: how many transforms a program has in its registers at once."""
    channels = min(16, 16384 // (held * n))
    return _Plan(_RADICES[n], channels, max(1, n * channels // 1024))


def _size(least: int) -> int:
    """The power of two, at least 64, that covers `least`."""
    return max(64, 1 << (least - 1).bit_length())


def _cost(n: int) -> float:
    """Of a block of 2n points, in units of its own."""
    return n * (n.bit_length() + 8) * (3 if n > _LONGEST else 1)


def _blocks(taps: int, length: int, chunk_len: int | None) -> portable.Blocks:
    return portable.Blocks(taps, *block_size(taps, length, chunk_len, _cost, _size))


def forward(x, kernel, points, D, initial_state, reset, lengths, chunk_len) -> tuple[Tensor, Tensor]:
    if reset is not None:
        return portable.forward(x, kernel, points, D, initial_state, reset, lengths, chunk_len, TRANSFORMS)
    (b, l, e), k = x.shape, kernel.shape[1]
    inputs = portable.Inputs(x, kernel, initial_state, None, lengths, TRANSFORMS)
    with device_of(x):
        blocks = inputs.row_blocks(chunk_len, points)
        h = _spectrum(kernel, blocks) if points is None else points
        y, given = x.new_empty(b, l, e), _Given.of(x, initial_state, lengths)
        final = x.new_empty(b, k - 1, e) if lengths is None and 1 < k <= l + 1 else None
        _convolve(given, h, D, y, blocks, final=final)
        return y, inputs.final_state(x, initial_state) if final is None else final


def backward(dy, dfinal, x, kernel, D, initial_state, reset, lengths, chunk_len):
    if reset is not None:
        return portable.backward(dy, dfinal, x, kernel, D, initial_state, reset, lengths, chunk_len, TRANSFORMS)
    (b, l, e), k = x.shape, kernel.shape[1]
    inputs = portable.Inputs(x, kernel, initial_state, None, lengths, TRANSFORMS)
    with device_of(x):
        blocks = inputs.row_blocks(chunk_len, None)
        given, up = _Given.of(x, initial_state, lengths), _Given.of(dy, None, lengths)
        h = _spectrum(kernel, blocks)
        simple = not inputs.held and (dfinal is None or (lengths is None and k <= l + 1))
        if simple:
            dx = x.new_empty(b, l, e)
            _convolve(up, h, D, dx, blocks, back=True, dfinal=dfinal)
            dinitial = x.new_empty(b, 0, e)
        else:
            dinputs = x.new_empty(b, inputs.held + l, e, dtype=inputs.dtype)
            _convolve(up, h, D, dinputs, blocks, back=True)
            dinputs = inputs.add_final_gradient(dinputs, dfinal)
            dx, dinitial = (t.to(x.dtype, copy=True) for t in (dinputs[:, inputs.held :], dinputs[:, : inputs.held]))
        dkernel, dD = _correlate(given, up, kernel, D, blocks)
        dD = x.new_empty(e, dtype=kernel.dtype) if dD is None else dD.to(kernel.dtype)
    return dx.contiguous(), dkernel, dD, dinitial.contiguous()


def spectrum(kernel: Tensor, l: int, chunk_len: int | None) -> Tensor:
    """The filter's transform, for blocks of about l tokens: (programs, 2, n, channels), or (2, n1, n2, e)."""
    with device_of(kernel):
        return _spectrum(kernel, _blocks(kernel.shape[1], l, chunk_len))


class _Given(NamedTuple):
    """Inputs (b, l, e), those before them or none, and the rows' lengths or none; the last axes contiguous."""

    x: Tensor
    history: Tensor | None
    lengths: Tensor | None

    @classmethod
    def of(cls, x: Tensor, history: Tensor | None, lengths: Tensor | None) -> "_Given":
        history = None if history is None or not history.shape[1] else rows(history)
        return cls(rows(x), history, None if lengths is None else lengths.contiguous())

    @property
    def held(self) -> int:
        return 0 if self.history is None else self.history.shape[1]

    def pointers(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.x, absent(self.history, self.x), absent(self.lengths, self.x)

    def strides(self) -> tuple[int, ...]:
        past = self.x if self.history is None else self.history
        return self.x.stride(0), self.x.stride(1), past.stride(0), past.stride(1)

    def flags(self) -> dict:
        return {"HISTORY": self.history is not None, "LENGTHS": self.lengths is not None}


def _halves(n: int) -> tuple[int, int]:
    """n1 and n2 of a transform in three passes."""
    n1 = 1 << n.bit_length() // 2
    return n1, n // n1


def _spectrum(kernel: Tensor, blocks: portable.Blocks) -> Tensor:
    e, n = len(kernel), blocks.n
    taps = kernel.new_empty(blocks.taps, e)  # programs take several channels of one tap
    _transpose(kernel[:, : blocks.taps], taps)
    if n <= _LONGEST:
        plan = _plan(n)
        h = kernel.new_empty(plan.programs(e), 2, n, plan.channels, dtype=torch.float32)
        short.spectrum_kernel[(plan.programs(e),)](
            taps, h, *plan.tables(h, twisted=True), blocks.taps, e, taps.stride(0),
            HALF=blocks.taps <= n, N=n, **plan.sizes(),
        )  # fmt: skip
        return h
    n1, n2 = _halves(n)
    z = _down(_Given.of(taps[None], None, None), n, 0, 0, blocks.taps, half=blocks.taps <= n)
    h = torch.empty_like(z[:, 0])
    plan = _plan(n2)
    long.rows_kernel[(n1 * plan.programs(e),)](
        z, h, *plan.tables(z, twisted=False), e, h.stride(0), 1 / n, N2=n2, **plan.sizes()
    )
    return h


def _transpose(x: Tensor, y: Tensor) -> None:
    n_rows, n_columns = x.shape
    short.transpose_kernel[(-(-n_rows // 64) * -(-n_columns // 64),)](
        x, y, n_rows, n_columns, *x.stride(), *y.stride(), B=64, num_warps=4
    )


def _convolve(
    given: _Given, h: Tensor, D: Tensor | None, y: Tensor, blocks: portable.Blocks,
    *, back: bool = False, final: Tensor | None = None, dfinal: Tensor | None = None,
) -> None:  # fmt: skip
    """y: the last tokens of (b, held + l, e). `back`: with the conjugate of h, from later inputs to earlier ones.

    `final` gets the last inputs; `dfinal` is added to the last results.
    """
    (b, l, e), (taps, q, n) = given.x.shape, blocks
    begin = l - y.shape[1]
    if back and begin:  # the results are more than the inputs
        q = min(y.shape[1], 2 * n - (taps - 1))
    count = -(-y.shape[1] // q)
    offset = 0 if back or (count == 1 and not given.held) else taps - 1
    reach = min(q + taps - 1, l - begin) if count == 1 and not offset else q + taps - 1
    half = not offset and max(q, reach) <= n
    D = None if D is None else D.contiguous()
    edge = final if dfinal is None else dfinal.contiguous()
    keep = 0 if edge is None else edge.shape[1]
    if n <= _LONGEST:
        plan = _plan(n)
        short.convolve_kernel[(b * count * plan.programs(e),)](
            *given.pointers(), h, absent(D, h), y, absent(edge, y), *plan.tables(h, twisted=True),
            b, l, e, count, q, offset, begin, begin, y.shape[1], reach, given.held, keep, *given.strides(),
            CONJ=back, HALF=half, FINAL=final is not None, DFINAL=dfinal is not None, SKIP=D is not None, N=n,
            **given.flags(), **plan.sizes(),
        )  # fmt: skip
        return
    n1, n2 = _halves(n)
    down, along = _plan(n1), _plan(n2)
    channels = min(down.channels, along.channels)
    of_e, cached = -(-e // channels), 8 * n * channels <= _CHUNK
    width = min(of_e, _CHUNK // (8 * n * channels)) if cached else of_e
    chunks = b * -(-of_e // width)
    per_chunk = {0: n2 * width, 1: n1 * width, 2: n2 * width}
    launches = (
        {3: (chunks + 2 * _LAG) * sum(per_chunk.values())} if cached else {p: chunks * m for p, m in per_chunk.items()}
    )
    z = h.new_empty(_SLOTS if cached else chunks, 2, n1, n2, width * channels)
    for t0 in range(begin, l, q):
        start = t0 - offset
        counters = h.new_zeros(3, chunks, dtype=torch.int32)
        for part, programs in launches.items():
            long.passes_kernel[(programs,)](
                *given.pointers(), h, absent(D, h), y, absent(edge, y), z, counters,
                *down.tables(h, twisted=True, columns=n2), *along.tables(h, twisted=False),
                b, l, e, chunks, start, start, min(l, start + reach), given.held, keep,
                t0, min(t0 + q, l), begin, y.shape[1], *given.strides(), h.stride(0), 1 / n,
                CONJ=back, HALF=half, FINAL=final is not None, DFINAL=dfinal is not None, SKIP=D is not None,
                PASS=part, SLOTS=_SLOTS, LAG=_LAG, BLOCKS=width, RADICES=down.radices, RADICES2=along.radices,
                N1=n1, N2=n2, BE=channels, VEC=min(2, channels), **given.flags(),
                num_warps=max(1, max(n1, n2) * channels // 1024), maxnreg=128,
            )  # fmt: skip


def _correlate(
    given: _Given, up: _Given, kernel: Tensor, D: Tensor | None, blocks: portable.Blocks
) -> tuple[Tensor, Tensor | None]:
    """The gradients of the taps (e, k), and of D."""
    (b, l, e), (taps, q, n) = given.x.shape, blocks
    count = -(-l // q)
    offset = 0 if count == 1 and not given.held else taps - 1
    half = not offset and l <= n
    dkernel = (kernel.new_zeros if taps < kernel.shape[1] else kernel.new_empty)(kernel.shape)
    if n <= _LONGEST:
        plan = _plan(n, 2)
        splits = segments_of(plan.programs(e), 2 * processors_of(kernel), b * count, 1)
        parts = kernel.new_empty(splits, plan.programs(e), 2, n, plan.channels, dtype=torch.float32)
        skips = None if D is None else kernel.new_empty(splits, e, dtype=torch.float32)
        tables = plan.tables(parts, twisted=True)
        short.correlate_kernel[(splits * plan.programs(e),)](
            *given.pointers(), up.x, parts, absent(skips, parts), *tables,
            b, l, e, count, q, offset, given.held, splits, *given.strides(), *up.strides()[:2],
            HALF=half, SKIP=D is not None, N=n, **given.flags(), **plan.sizes(),
        )  # fmt: skip
        short.taps_kernel[(plan.programs(e),)](
            parts, dkernel, *tables, taps, e, splits, *dkernel.stride(), HALF=taps <= n, N=n, **plan.sizes()
        )
        return dkernel, None if skips is None else skips.sum(0)
    n1, n2 = _halves(n)
    total = kernel.new_empty(2, n1, n2, e, dtype=torch.float32)
    plan = _plan(n2)
    for t0 in range(0, l, q):
        t1 = min(t0 + q, l)
        z = _down(given, n, t0 - offset, t0 - offset, t1, half=half)
        w = _down(up, n, t0 - offset, t0, t1, half=half)
        long.rows_correlate_kernel[(n1 * plan.programs(e),)](
            z, w, total, *plan.tables(z, twisted=False), b, e, n1, z.stride(0), total.stride(0), 1 / n,
            MORE=t0 > 0, N2=n2, **plan.sizes(),
        )  # fmt: skip
    long.rows_back_kernel[(n1 * plan.programs(e),)](
        total, *plan.tables(total, twisted=False), e, total.stride(0), N2=n2, **plan.sizes()
    )
    found = kernel.new_empty(taps, e, dtype=torch.float32)
    plan = _plan(n1)
    long.columns_back_kernel[(n2 * plan.programs(e),)](
        total, found, *plan.tables(total, twisted=True, columns=n2), e, n2, taps, total.stride(0),
        HALF=taps <= n, N1=n1, N=n, **plan.sizes(),
    )  # fmt: skip
    _transpose(found, dkernel[:, :taps])
    return dkernel, None if D is None else found[0]  # the skip is one more first tap


def _down(given: _Given, n: int, start: int, low: int, high: int, *, half: bool) -> Tensor:
    """(2, b, n1, n2, e): the columns' transforms of a block whose point 0 is time `start`."""
    (b, l, e), (n1, n2) = given.x.shape, _halves(n)
    plan = _plan(n1)
    z = given.x.new_empty(2, b, n1, n2, e, dtype=torch.float32)
    long.columns_kernel[(b * n2 * plan.programs(e),)](
        *given.pointers(), z, *plan.tables(z, twisted=True, columns=n2), l, e, n2, start, low, high, given.held,
        *given.strides()[:2], 1, *given.strides()[2:], z.stride(0),
        HALF=half, N1=n1, N=n, **given.flags(), **plan.sizes(),
    )  # fmt: skip
    return z


def _convolve_documents(history: Tensor, x: Tensor, h: Tensor, blocks: portable.Blocks) -> Tensor:
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    _convolve(_Given.of(x, history, None), h, None, y, blocks)
    return y


def _correlate_documents(
    history: Tensor, x: Tensor, dy: Tensor, kernel: Tensor, blocks: portable.Blocks
) -> tuple[Tensor, Tensor]:
    given, up = _Given.of(x, history, None), _Given.of(dy, None, None)
    dinputs = x.new_empty(x.shape[0], given.held + x.shape[1], x.shape[2])
    _convolve(up, _spectrum(kernel, blocks), None, dinputs, blocks, back=True)
    return dinputs, _correlate(given, up, kernel, None, blocks)[0][:, : blocks.taps]


def _points(h: Tensor) -> int:
    return h.shape[2] if h.shape[1] == 2 else h.shape[1] * h.shape[2]


TRANSFORMS = portable.Transforms(_blocks, _points, _spectrum, _convolve_documents, _correlate_documents)

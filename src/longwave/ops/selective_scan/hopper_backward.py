"""The selective scan's backward pass on Hopper: every thread has one channel, with all of its states in registers.

The mathematics is that of `triton.py`. A program takes 128 channels and walks a segment of l from its end in tiles of
16 tokens, whose inputs come by TMA one tile ahead. Two groups of warps share the work, and both have a thread for each
channel. The first computes a tile's states again from the one that the forward kept before it, puts them into shared
memory, and finds dz; the second goes through the tile backwards for all other gradients. There is room for one tile:
what the second group has read the first fills again at once, so that every other tile lies in it backwards, in pieces
of 4 tokens. Where programs are too few to fill the GPU, l is cut into segments (`triton_segments.py`).

Sums over a channel's states are sums within a thread. Sums over channels, dB and dC, are products with a matrix of ones
and zeros on the tensor cores, laid out so that the threads' registers are operands as they stand (in TF32: the products
are cut to 11 bits, the sums are not). Each block of channels writes its own part of dB and dC, and the parts are added
up in a fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, mma_v2, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from longwave.ops.gluon_math import sigmoid, softplus
from longwave.ops.gluon_tiles import for_tma
from longwave.ops.selective_scan import triton as portable
from longwave.ops.triton_math import absent, device_of, processors_of
from longwave.ops.triton_segments import pass_states, segments_of

_LOG2E = gl.constexpr(1.4426950408889634)
_LN2 = gl.constexpr(0.6931471805599453)
_W = gl.constexpr(4)  # warps of a group
_E = gl.constexpr(128)  # channels of a program: as many as a group has threads
_N = gl.constexpr(16)  # numbers of a channel's state
_T = gl.constexpr(16)  # tokens of a tile
_P = gl.constexpr(4)  # tokens of a piece
_PIECES = gl.constexpr(4)  # of a tile

_CELLS = gl.constexpr(gl.BlockedLayout([1, 16], [32, 1], [4, 1], [1, 0]))  # (channels, states): a channel to a thread
_OF_E = gl.constexpr(gl.SliceLayout(1, _CELLS.value))
_OF_N = gl.constexpr(gl.SliceLayout(0, _CELLS.value))
_STEPS = gl.constexpr(gl.BlockedLayout([4, 1], [1, 32], [1, 4], [1, 0]))  # (tokens of a piece, channels), likewise
_SMALL = gl.constexpr(gl.BlockedLayout([1, 2], [4, 8], [4, 1], [1, 0]))  # (tokens of a tile, states)
_SUMS = gl.constexpr(gl.NVMMADistributedLayout([2, 0], [4, 1, 1], [1, 16, 8]))  # (warps, 16, 8 or 16)
_RAW = gl.constexpr(gl.NVMMASharedLayout(0, 16, 3))
_STARTS = gl.constexpr(gl.NVMMASharedLayout(0, 32, 3))
_PLAIN = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
_SPREAD = gl.constexpr(gl.SwizzledSharedLayout(4, 2, 4, [1, 0]))  # of _CELLS: no bank conflicts


@gluon.jit
def _ones():
    """(warps, 16, 64): row i has ones in columns 4 i to 4 i + 3.

    By way of shared memory: zeros that the compiler knows it would put into their registers for every product anew.
    """
    flat: gl.constexpr = gl.BlockedLayout([1, 4], [2, 16], [_W, 1], [1, 0])
    left: gl.constexpr = gl.DotOperandLayout(0, _SUMS, 1)
    i = gl.arange(0, 16, layout=gl.SliceLayout(1, flat))
    k = gl.arange(0, 64, layout=gl.SliceLayout(0, flat))
    ones = gl.where((k // 4)[None, :] == i[:, None], 1.0, 0.0)
    tile = gl.allocate_shared_memory(gl.float32, [16, 64], _PLAIN, ones)
    return tile.load(gl.SliceLayout(0, left))[None, :, :] + gl.zeros([_W, 16, 64], gl.float32, left)


@gluon.jit
def _sum_fours(ones, products):
    """(channels, states), a channel to a thread -> (warps, states, 8): sums over each four channels."""
    operand = products.reshape([_W, 8, 4, _N]).permute((0, 3, 2, 1)).reshape([_W, 4 * _N, 8])
    operand = gl.convert_layout(operand, gl.DotOperandLayout(1, _SUMS, 1), assert_trivial=True)
    return mma_v2(ones, operand, gl.zeros([_W, _N, 8], gl.float32, _SUMS), input_precision="tf32")


@gluon.jit
def _sum_warps(total, first, second, t):
    """Add up what `_sum_fours` found for tokens t and t + 1, into these rows of `total` (warps, tokens, states)."""
    left: gl.constexpr = gl.DotOperandLayout(0, _SUMS, 2)
    operand = gl.join(first, second).permute((0, 3, 2, 1)).reshape([_W, 16, _N])
    operand = gl.convert_layout(operand, gl.DotOperandLayout(1, _SUMS, 2), assert_trivial=True)
    i = gl.arange(0, _T, layout=gl.SliceLayout(0, gl.SliceLayout(2, left)))
    j = gl.arange(0, 16, layout=gl.SliceLayout(0, gl.SliceLayout(1, left)))
    rows = gl.where(i[None, :, None] == (j // 8 + t)[None, None, :], 1.0, 0.0)
    return mma_v2(rows + gl.zeros([_W, _T, 16], gl.float32, left), operand, total, input_precision="tf32")


@gluon.jit
def _store_sums(to, total, held, tokens):
    """The sums of a tile, over all warps, into every other run of 16 of (l, 32). `held`: memory for `total`."""
    held.store(total)
    of_warps = held._reinterpret(gl.float32, [_W, _T, _N], _PLAIN)
    sums = of_warps.index(0).load(_SMALL)
    for w in gl.static_range(1, _W):
        sums += of_warps.index(w).load(_SMALL)
    t = gl.arange(0, _T, layout=gl.SliceLayout(1, _SMALL))[:, None]
    n = gl.arange(0, _N, layout=gl.SliceLayout(0, _SMALL))[None, :]
    gl.store(to + (t * (2 * _N) + n), sums, mask=t < tokens)


@gluon.jit
def _vectors(tiles, count: gl.constexpr, width: gl.constexpr):
    """Shared memory as `count` vectors, to be indexed."""
    return tiles._reinterpret(tiles.dtype, [count, width], gl.SwizzledSharedLayout(1, 1, 1, [0]))


@gluon.jit
def _pieces(tiles, count: gl.constexpr):
    """Shared memory as `count` matrices (tokens of a piece, channels), to be indexed."""
    return tiles._reinterpret(tiles.dtype, [count, _P, _E], _PLAIN)


@gluon.jit
def _tokens(piece):
    """The four rows of (tokens of a piece, channels), which a thread holds."""
    even, odd = piece.permute((1, 0)).reshape([_E, 2, 2]).split()
    first, third = even.split()
    second, fourth = odd.split()
    return (
        gl.convert_layout(first, _OF_E, assert_trivial=True),
        gl.convert_layout(second, _OF_E, assert_trivial=True),
        gl.convert_layout(third, _OF_E, assert_trivial=True),
        gl.convert_layout(fourth, _OF_E, assert_trivial=True),
    )


@gluon.jit
def _rates(A, column, e, stride_e, stride_n):
    """A in units of log 2."""
    i_e = column + gl.arange(0, _E, layout=_OF_E)
    i_n = gl.arange(0, _N, layout=_OF_N)
    rate = gl.load(A + i_e[:, None] * stride_e + i_n[None, :] * stride_n, mask=(i_e < e)[:, None], other=0.0)
    return rate.to(gl.float32) * _LOG2E


@gluon.jit
def _of_channels(parameter, column, e, layout: gl.constexpr, GIVEN: gl.constexpr):
    """A parameter of each channel; zeros if it is not given."""
    if GIVEN:
        i = column + gl.arange(0, _E, layout=layout)
        return gl.load(parameter + i, mask=i < e, other=0.0).to(gl.float32)
    else:
        return gl.zeros([_E], gl.float32, layout)


@gluon.jit
def _step_sizes(raw, bias, start, end, SOFTPLUS: gl.constexpr):
    """dt of a piece, and which tokens lie before the end: dt is 0 from there on."""
    here = (start + gl.arange(0, _P, layout=gl.SliceLayout(1, _STEPS)) < end)[:, None]
    size = raw.load(_STEPS).to(gl.float32) + bias[None, :]
    if SOFTPLUS:
        size = softplus(size)
    return gl.where(here, size, 0.0), here


@gluon.jit
def _decays(size, rate, reset, at, here, RESET: gl.constexpr):
    """exp(dt A) of a token, 0 where a document starts."""
    decay = gl.exp2(size[:, None] * rate)
    if RESET:
        decay = gl.where(gl.load(reset + at, mask=here, other=0) != 0, 0.0, decay)
    return decay


@gluon.jit
def _fetch(
    x, dt, dy, z, B, C, states, tiles, B_tiles, C_tiles, starts, bars,
    stage, here, row, start, column, chunks, GATE: gl.constexpr,
):  # fmt: skip
    """Start the copies of a tile into one stage of the ring, if it is `here`. `tiles`: x, dt, dy and z."""
    bar = bars.index(stage)
    nbytes: gl.constexpr = (4 if GATE else 3) * x.block_type.nbytes + 2 * B.block_type.nbytes + states.block_type.nbytes
    mbarrier.expect(bar, nbytes, pred=here)
    tma.async_copy_global_to_shared(
        states, [row * chunks + start // _T, 0, column], bar, starts.index(stage), pred=here
    )
    tma.async_copy_global_to_shared(x, [row, start, column], bar, tiles.index(4 * stage), pred=here)
    tma.async_copy_global_to_shared(dt, [row, start, column], bar, tiles.index(4 * stage + 1), pred=here)
    tma.async_copy_global_to_shared(dy, [row, start, column], bar, tiles.index(4 * stage + 2), pred=here)
    if GATE:
        tma.async_copy_global_to_shared(z, [row, start, column], bar, tiles.index(4 * stage + 3), pred=here)
    tma.async_copy_global_to_shared(B, [row, start, 0], bar, B_tiles.index(stage), pred=here)
    tma.async_copy_global_to_shared(C, [row, start, 0], bar, C_tiles.index(stage), pred=here)


@gluon.jit
def _states_partition(
    x, dt, dy, z, B, C, states, A, D, dt_bias, reset, dz,
    tiles, B_tiles, C_tiles, starts, B_rows, C_rows, sizes, enters, dys, befores, ends, bars, ready, free,
    count, first, end, row, column, l, e, chunks, stride_Ae, stride_An, stride_rb, stride_rl,
    SOFTPLUS: gl.constexpr, BIAS: gl.constexpr, SKIP: gl.constexpr, GATE: gl.constexpr, RESET: gl.constexpr,
):  # fmt: skip
    """Computes the states of each tile again, what the gradients need of each token, and the gradient of z."""
    across: gl.constexpr = gl.BlockedLayout([_N, 1], [1, 32], [1, _W], [0, 1])
    i_e = column + gl.arange(0, _E, layout=_OF_E)
    rate = _rates(A, column, e, stride_Ae, stride_An)
    bias = _of_channels(dt_bias, column, e, gl.SliceLayout(0, _STEPS), BIAS)
    skip = _of_channels(D, column, e, _OF_E, SKIP)
    reset += row.to(gl.int64) * stride_rb
    raws = _pieces(tiles, 8 * _PIECES)
    all_starts = starts._reinterpret(gl.float32, [2, _N, _E], _PLAIN)
    for k_tile in range(count):
        stage = k_tile % 2
        begin = first + (count - 1 - k_tile) * _T
        mbarrier.wait(bars.index(stage), (k_tile // 2) & 1)
        state = gl.convert_layout(all_starts.index(stage).load(across).permute((1, 0)), _CELLS, assert_trivial=True)
        B_rows.index(stage).store(B_tiles.index(stage).reshape([_T, _N]).load(_SMALL).to(gl.float32))
        C_rows.index(stage).store(C_tiles.index(stage).reshape([_T, _N]).load(_SMALL).to(gl.float32))
        to_tile = (row.to(gl.int64) * l + begin) * e
        for piece in range(_PIECES):
            place = gl.where(stage == 0, piece, _PIECES - 1 - piece)
            start = begin + piece * _P
            at = 4 * stage * _PIECES + piece
            size, here = _step_sizes(raws.index(at + _PIECES), bias, start, end, SOFTPLUS)
            x_k = raws.index(at).load(_STEPS).to(gl.float32)
            dy_k = gl.where(here, raws.index(at + 2 * _PIECES).load(_STEPS).to(gl.float32), 0.0)
            dgate = dy_k
            if GATE:
                gate = raws.index(at + 3 * _PIECES).load(_STEPS).to(gl.float32)
                share = sigmoid(gate)
                dgate = dy_k * (share * (1.0 + gate * (1.0 - share)))
                dy_k *= gate * share
            u = size * x_k
            mbarrier.wait(free.index(place), (k_tile + 1) & 1)
            _pieces(sizes, _PIECES).index(place).store(size)
            _pieces(enters, _PIECES).index(place).store(u)
            _pieces(dys, _PIECES).index(place).store(dy_k)
            size_of, u_of, x_of, dgate_of = _tokens(size), _tokens(u), _tokens(x_k), _tokens(dgate)
            for k in gl.static_range(_P):
                t = start + k
                in_rows = stage * _T + piece * _P + k
                B_t = _vectors(B_rows, 2 * _T, _N).index(in_rows).load(_OF_N)
                befores[k].index(place).store(state)
                decay = _decays(size_of[k], rate, reset, t * stride_rl, t < end, RESET)
                state = decay * state + u_of[k][:, None] * B_t[None, :]
                if GATE:
                    C_t = _vectors(C_rows, 2 * _T, _N).index(in_rows).load(_OF_N)
                    out = gl.sum(state * C_t[None, :], 1) + skip * x_of[k]
                    to = (piece * _P + k) * e + i_e
                    gl.store(dz + to_tile + to, (dgate_of[k] * out).to(dz.dtype.element_ty), mask=(i_e < e) & (t < l))
        ends.store(state)
        gl.thread_barrier()
        mbarrier.arrive(ready)
        # The tile before this one has been read to its end: its last piece was free.
        _fetch(
            x, dt, dy, z, B, C, states, tiles, B_tiles, C_tiles, starts, bars,
            1 - stage, k_tile + 1 < count, row, begin - _T, column, chunks, GATE,
        )  # fmt: skip


@gluon.jit
def _gradients_partition(
    A, D, reset, after, dx, ddt, dA, dBC, dD, dbias, before,
    tiles, B_rows, C_rows, sizes, enters, dys, befores, ends, bars, ready, free,
    count, first, end, row, segment, part, column, b, l, e, segments, cuts, stride_Ae, stride_An, stride_rb, stride_rl,
    SOFTPLUS: gl.constexpr, BIAS: gl.constexpr, SKIP: gl.constexpr, RESET: gl.constexpr, PER: gl.constexpr,
):  # fmt: skip
    """Goes through each tile backwards."""
    i_e = column + gl.arange(0, _E, layout=_OF_E)
    inside = i_e < e
    cell = i_e[:, None] * _N + gl.arange(0, _N, layout=_OF_N)[None, :]
    rate = _rates(A, column, e, stride_Ae, stride_An)
    skip = _of_channels(D, column, e, _OF_E, SKIP)
    last_cut = gl.minimum(PER * (segment + 1), cuts) - 1
    grad = gl.load(after + (row * cuts + last_cut).to(gl.int64) * e * _N + cell, mask=inside[:, None], other=0.0)
    dA_sum = gl.zeros([_E, _N], gl.float32, _CELLS)
    dD_sum = gl.zeros([_E], gl.float32, _OF_E)
    dbias_sum = gl.zeros([_E], gl.float32, _OF_E)
    dBC += (part.to(gl.int64) * b + row) * l * (2 * _N)
    reset += row.to(gl.int64) * stride_rb
    ones = _ones()
    held = gl.allocate_shared_memory(gl.float32, [_W, _T, _N], gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0]))
    for k_tile in range(count):
        stage = k_tile % 2
        begin = first + (count - 1 - k_tile) * _T
        mbarrier.wait(bars.index(stage), (k_tile // 2) & 1)
        mbarrier.wait(ready, k_tile & 1)
        to_tile = (row.to(gl.int64) * l + begin) * e
        h_t = ends.load(_CELLS)
        dB_sum = gl.zeros([_W, _T, _N], gl.float32, _SUMS)
        dC_sum = gl.zeros([_W, _T, _N], gl.float32, _SUMS)
        for k_piece in range(_PIECES):
            piece = _PIECES - 1 - k_piece
            place = gl.where(stage == 0, piece, k_piece)
            for k_back in gl.static_range(_P):
                k = piece * _P + _P - 1 - k_back  # in the tile
                at = place * _P + _P - 1 - k_back
                t = begin + k
                B_t = _vectors(B_rows, 2 * _T, _N).index(stage * _T + k).load(_OF_N)
                C_t = _vectors(C_rows, 2 * _T, _N).index(stage * _T + k).load(_OF_N)
                size_t = _vectors(sizes, _T, _E).index(at).load(_OF_E)
                u_t = _vectors(enters, _T, _E).index(at).load(_OF_E)
                dy_t = _vectors(dys, _T, _E).index(at).load(_OF_E)
                x_t = _vectors(tiles, 8 * _T, _E).index(4 * stage * _T + k).load(_OF_E).to(gl.float32)
                h_before = befores[_P - 1 - k_back].index(place).load(_CELLS)
                decay = _decays(size_t, rate, reset, t * stride_rl, t < end, RESET)
                grad += dy_t[:, None] * C_t[None, :]
                of_B, of_C = _sum_fours(ones, u_t[:, None] * grad), _sum_fours(ones, dy_t[:, None] * h_t)
                if k_back % 2 == 0:
                    later_B, later_C = of_B, of_C
                else:
                    dB_sum = _sum_warps(dB_sum, of_B, later_B, k)
                    dC_sum = _sum_warps(dC_sum, of_C, later_C, k)
                du = gl.sum(grad * B_t[None, :], 1)
                grad *= decay
                through = grad * h_before  # the gradient of dt A
                h_t = h_before
                dA_sum += size_t[:, None] * through
                draw = gl.sum(through * rate, 1) * _LN2 + x_t * du
                if SOFTPLUS:  # its slope
                    draw *= 1.0 - gl.exp2(-_LOG2E * size_t)
                else:
                    draw = gl.where(t < end, draw, 0.0)
                to, stored = k * e + i_e, inside & (t < l)
                gl.store(dx + to_tile + to, (size_t * du + skip * dy_t).to(dx.dtype.element_ty), mask=stored)
                gl.store(ddt + to_tile + to, draw.to(ddt.dtype.element_ty), mask=stored)
                dD_sum += dy_t * x_t
                dbias_sum += draw
            gl.thread_barrier()
            mbarrier.arrive(free.index(place))
        _store_sums(dBC + begin * (2 * _N), dB_sum, held, l - begin)
        _store_sums(dBC + begin * (2 * _N) + _N, dC_sum, held, l - begin)
    if segment == 0:
        gl.store(before + row.to(gl.int64) * e * _N + cell, grad, mask=inside[:, None])
    gl.store(dA + (row * segments + segment).to(gl.int64) * e * _N + cell, dA_sum, mask=inside[:, None])
    to = (row * segments + segment) * e + i_e
    if BIAS:
        gl.store(dbias + to, dbias_sum, mask=inside)
    if SKIP:
        gl.store(dD + to, dD_sum, mask=inside)


@gluon.jit
def _backward_kernel(
    dy, x, dt, B, C, z, A, D, dt_bias, reset, lengths, states, after,
    dx, ddt, dz, dA, dBC, dD, dbias, before,
    b, l, e, per_segment, segments, cuts, chunks, stride_Ae, stride_An, stride_rb, stride_rl,
    SOFTPLUS: gl.constexpr, BIAS: gl.constexpr, SKIP: gl.constexpr, GATE: gl.constexpr, RESET: gl.constexpr,
    LENGTHS: gl.constexpr, PER: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    blocks = gl.cdiv(e, _E)
    program = gl.program_id(0)
    part = program % blocks
    segment = program // blocks % segments
    row = program // (blocks * segments)
    column = part * _E
    first = segment * per_segment
    count = gl.cdiv(gl.minimum(per_segment, l - first), _T)
    end = l
    if LENGTHS:
        end = gl.load(lengths + row).to(gl.int32)

    tiles = gl.allocate_shared_memory(x.dtype, [8, 1, _T, _E], _RAW)  # two stages of x, dt, dy and z
    B_tiles = gl.allocate_shared_memory(x.dtype, [2, 1, _T, _N], _RAW)
    C_tiles = gl.allocate_shared_memory(x.dtype, [2, 1, _T, _N], _RAW)
    starts = gl.allocate_shared_memory(gl.float32, [2, 1, _N, _E], states.layout)
    B_rows = gl.allocate_shared_memory(gl.float32, [2, _T, _N], _PLAIN)
    C_rows = gl.allocate_shared_memory(gl.float32, [2, _T, _N], _PLAIN)
    sizes = gl.allocate_shared_memory(gl.float32, [_T, _E], _PLAIN)
    enters = gl.allocate_shared_memory(gl.float32, [_T, _E], _PLAIN)
    dys = gl.allocate_shared_memory(gl.float32, [_T, _E], _PLAIN)
    # The state before each token. The four tokens of a piece have memory of their own: the compiler puts a barrier
    # between stores that could meet.
    befores = ()
    for _ in gl.static_range(_P):
        befores = befores + (gl.allocate_shared_memory(gl.float32, [_PIECES, _E, _N], _SPREAD),)
    ends = gl.allocate_shared_memory(gl.float32, [_E, _N], _SPREAD)
    bars = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [_PIECES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(bars.index(i), count=1)
    for i in gl.static_range(_PIECES):
        mbarrier.init(free.index(i), count=1)
    mbarrier.init(ready, count=1)
    _fetch(
        x, dt, dy, z, B, C, states, tiles, B_tiles, C_tiles, starts, bars,
        0, count > 0, row, first + (count - 1) * _T, column, chunks, GATE,
    )  # fmt: skip
    gl.thread_barrier()
    gl.warp_specialize(
        [
            (
                _gradients_partition,
                (
                    A, D, reset, after, dx, ddt, dA, dBC, dD, dbias, before,
                    tiles, B_rows, C_rows, sizes, enters, dys, befores, ends, bars, ready, free,
                    count, first, end, row, segment, part, column, b, l, e, segments, cuts,
                    stride_Ae, stride_An, stride_rb, stride_rl,
                    SOFTPLUS, BIAS, SKIP, RESET, PER,
                ),
            ),
            (
                _states_partition,
                (
                    x, dt, dy, z, B, C, states, A, D, dt_bias, reset, dz,
                    tiles, B_tiles, C_tiles, starts, B_rows, C_rows, sizes, enters, dys, befores, ends,
                    bars, ready, free,
                    count, first, end, row, column, l, e, chunks, stride_Ae, stride_An, stride_rb, stride_rl,
                    SOFTPLUS, BIAS, SKIP, GATE, RESET,
                ),
            ),
        ],
        [4],
        [REGISTERS],
    )  # fmt: skip


@gluon.jit
def _adjoint_kernel(
    dy, dt, z, C, A, dt_bias, reset, lengths, ends, total,
    l, e, per_cut, cuts, skipped, stride_Ae, stride_An, stride_rb, stride_rl,
    SOFTPLUS: gl.constexpr, BIAS: gl.constexpr, GATE: gl.constexpr, RESET: gl.constexpr, LENGTHS: gl.constexpr,
):  # fmt: skip
    """The gradient of the state before a cut, where the one after it is 0, and the product of its decays.

    Nothing asks for those of the first `skipped` cuts.
    """
    blocks = gl.cdiv(e, _E)
    program = gl.program_id(0)
    cut = skipped + program // blocks % (cuts - skipped)
    row = program // (blocks * (cuts - skipped))
    column = program % blocks * _E
    first = cut * per_cut
    count = gl.cdiv(gl.minimum(per_cut, l - first), _T)
    end = l
    if LENGTHS:
        end = gl.load(lengths + row).to(gl.int32)
    tiles = gl.allocate_shared_memory(dy.dtype, [6, 1, _T, _E], _RAW)  # two stages of dt, dy and z
    C_tiles = gl.allocate_shared_memory(dy.dtype, [2, 1, _T, _N], _RAW)
    C_rows = gl.allocate_shared_memory(gl.float32, [2, _T, _N], _PLAIN)
    bars = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(bars.index(i), count=1)
    nbytes: gl.constexpr = (3 if GATE else 2) * dt.block_type.nbytes + C.block_type.nbytes

    rate = _rates(A, column, e, stride_Ae, stride_An)
    bias = _of_channels(dt_bias, column, e, gl.SliceLayout(0, _STEPS), BIAS)
    reset += row.to(gl.int64) * stride_rb
    raws = _pieces(tiles, 6 * _PIECES)
    grad = gl.zeros([_E, _N], gl.float32, _CELLS)
    sum_sizes = gl.zeros([_E], gl.float32, _OF_E)
    whole = gl.full([_E, _N], 1.0, gl.float32, _CELLS)
    for k_tile in range(-1, count):
        stage, other = k_tile & 1, 1 - (k_tile & 1)
        begin = first + (count - 1 - k_tile) * _T
        more = k_tile + 1 < count
        bar = bars.index(other)
        gl.thread_barrier()
        mbarrier.expect(bar, nbytes, pred=more)
        tma.async_copy_global_to_shared(dt, [row, begin - _T, column], bar, tiles.index(3 * other), pred=more)
        tma.async_copy_global_to_shared(dy, [row, begin - _T, column], bar, tiles.index(3 * other + 1), pred=more)
        if GATE:
            tma.async_copy_global_to_shared(z, [row, begin - _T, column], bar, tiles.index(3 * other + 2), pred=more)
        tma.async_copy_global_to_shared(C, [row, begin - _T, 0], bar, C_tiles.index(other), pred=more)
        if k_tile >= 0:
            mbarrier.wait(bars.index(stage), (k_tile // 2) & 1)
            C_rows.index(stage).store(C_tiles.index(stage).reshape([_T, _N]).load(_SMALL).to(gl.float32))
            for k_piece in range(_PIECES):
                piece = _PIECES - 1 - k_piece
                start = begin + piece * _P
                at = 3 * stage * _PIECES + piece
                size, here = _step_sizes(raws.index(at), bias, start, end, SOFTPLUS)
                dy_k = gl.where(here, raws.index(at + _PIECES).load(_STEPS).to(gl.float32), 0.0)
                if GATE:
                    gate = raws.index(at + 2 * _PIECES).load(_STEPS).to(gl.float32)
                    dy_k *= gate * sigmoid(gate)
                size_of, dy_of = _tokens(size), _tokens(dy_k)
                for k_back in gl.static_range(_P):
                    size_t, dy_t = size_of[_P - 1 - k_back], dy_of[_P - 1 - k_back]
                    t = start + _P - 1 - k_back
                    C_t = _vectors(C_rows, 2 * _T, _N).index(stage * _T + t - begin).load(_OF_N)
                    decay = _decays(size_t, rate, reset, t * stride_rl, t < end, RESET)
                    if RESET:
                        whole *= decay
                    else:
                        sum_sizes += size_t
                    grad = decay * (grad + dy_t[:, None] * C_t[None, :])
    for i in gl.static_range(2):
        mbarrier.invalidate(bars.index(i))
    if not RESET:
        whole = gl.exp2(sum_sizes[:, None] * rate)
    i_e = column + gl.arange(0, _E, layout=_OF_E)
    cell = (row * cuts + cut).to(gl.int64) * e * _N + (i_e[:, None] * _N + gl.arange(0, _N, layout=_OF_N)[None, :])
    gl.store(ends + cell, grad, mask=(i_e < e)[:, None])
    gl.store(total + cell, whole, mask=(i_e < e)[:, None])


@triton.jit
def _sum_parts_kernel(dBC, dB, dC, parts, count, N: tl.constexpr, BLOCK: tl.constexpr):
    """dB and dC from the parts that blocks of channels have written, in a fixed order.

    What TF32 cuts off a number is 3.5e-4 of it on average, and the parts have been through it twice.
    """
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in range(parts):
        total += tl.load(dBC + at, mask=inside, other=0.0)
        dBC += count
    total *= 1.0007
    to = at // (2 * N) * N + at % N
    of_B = at % (2 * N) < N
    tl.store(dB + to, total.to(dB.dtype.element_ty), mask=inside & of_B)
    tl.store(dC + to, total.to(dC.dtype.element_ty), mask=inside & (of_B == 0))


_CUTS = 4  # of a segment, for the pass that finds the gradients of the states between segments
_SEGMENT = 256  # tokens of a segment that are worth that pass
_REGISTERS = 208  # of a thread that computes states


def backward(dy, dfinal, states, x, dt, A, B, C, D, z, dt_bias, initial_state, reset, lengths, dt_softplus, chunk_len):
    b, l, e = x.shape
    n = A.shape[1]
    inputs = [x, dt, B, C, dy, *([] if z is None else [z])]
    odd = n != _N.value or chunk_len != _T.value or e % 8 or x.numel() == 0
    if odd or x.element_size() != 2 or any(t.dtype != x.dtype for t in inputs):
        return portable.backward(
            dy, dfinal, states, x, dt, A, B, C, D, z, dt_bias, initial_state, reset, lengths, dt_softplus, chunk_len
        )
    flags = {
        "SOFTPLUS": dt_softplus, "BIAS": dt_bias is not None, "GATE": z is not None, "RESET": reset is not None,
        "LENGTHS": lengths is not None, "num_warps": _W.value,
    }  # fmt: skip
    strides = (*A.stride(), *portable._strides(reset))
    D, dt_bias = (None if t is None else t.contiguous() for t in (D, dt_bias))

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=x.device)

    with device_of(x):
        dy_tiles, x_tiles, dt_tiles, z_tiles = (_tiles(t, _E.value) for t in (dy, x, dt, absent(z, x)))
        B_tiles, C_tiles = _tiles(B, n), _tiles(C, n)
        starts = TensorDescriptor.from_tensor(states.flatten(0, 1), [1, n, _E.value], _STARTS.value)
        blocks = triton.cdiv(e, _E.value)
        segments, cuts = segments_of(b * blocks, processors_of(x), l, _SEGMENT), 1
        per_segment = triton.cdiv(l, _T.value) * _T.value
        after = dfinal.to(torch.float32).contiguous()
        if segments > 1:
            per_cut = triton.cdiv(triton.cdiv(l, segments * _CUTS), _T.value) * _T.value
            per_segment, cuts = _CUTS * per_cut, triton.cdiv(l, per_cut)
            segments = triton.cdiv(l, per_segment)
        if segments > 1:
            ends, total = empty(b, cuts, e, n), empty(b, cuts, e, n)
            _adjoint_kernel[(b * (cuts - _CUTS) * blocks,)](
                dy_tiles, dt_tiles, z_tiles, C_tiles, A, dt_bias, absent(reset, x), lengths, ends, total,
                l, e, per_cut, cuts, _CUTS, *strides, **flags,
            )  # fmt: skip
            after, _ = pass_states(ends, total, after, reverse=True)
        else:
            cuts = 1
        dx, ddt, dz = (None if t is None else torch.empty(b, l, e, dtype=t.dtype, device=x.device) for t in (x, dt, z))
        dB, dC = (torch.empty(b, l, n, dtype=t.dtype, device=x.device) for t in (B, C))
        dBC = empty(blocks, b, l, 2 * n)
        before, dA = empty(b, e, n), empty(b, segments, e, n)
        parts = empty(2, b, segments, e)  # of D and dt_bias
        _backward_kernel[(b * segments * blocks,)](
            dy_tiles, x_tiles, dt_tiles, B_tiles, C_tiles, z_tiles, A, D, dt_bias, absent(reset, x), lengths, starts,
            after, dx, ddt, dz, dA, dBC, parts[0], parts[1], before,
            b, l, e, per_segment, segments, cuts, states.shape[1], *strides,
            SKIP=D is not None, PER=_CUTS if segments > 1 else 1, REGISTERS=_REGISTERS, **flags,
        )  # fmt: skip
        _sum_parts_kernel[(triton.cdiv(2 * dB.numel(), 512),)](
            dBC, dB, dC, blocks, 2 * dB.numel(), N=n, BLOCK=512, num_warps=4
        )
        dD, dbias = parts.sum((1, 2))
    grads = (
        (dx, x), (ddt, dt), (dA.sum((0, 1)), A), (dB, B), (dC, C), (dD, D), (dz, z),
        (dbias, dt_bias), (before, initial_state),
    )  # fmt: skip
    return tuple(x.new_empty(0) if t is None else grad.to(t.dtype) for grad, t in grads)


def _tiles(t: Tensor, columns: int) -> TensorDescriptor:
    """Boxes of one tile of (b, l, columns)."""
    return TensorDescriptor.from_tensor(for_tma(t), [1, _T.value, columns], _RAW.value)

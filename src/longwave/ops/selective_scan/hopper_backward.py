"""The selective scan's backward pass on Hopper: every thread has one channel, with all of its states in registers.

The mathematics is that of `triton.py`. A program takes 128 channels and walks a segment of l from its end in tiles of
16 tokens, whose inputs come by TMA one tile ahead. Two groups of warps share the work, and both have a thread for each
channel. The first computes a tile's states again from the one that the forward kept before it, puts a_t h_{t-1} into
shared memory, and finds dz and dC; the second goes through the tile backwards for all other gradients. There is room
for one tile: what the second group has read the first fills again at once, so that every other tile lies in it
backwards, in pieces of 4 tokens. Where programs are too few to fill the GPU, l is cut into segments
(`triton_segments.py`).

Sums over a channel's states are sums within a thread. Sums over channels, dB and dC, are products with a matrix of ones
and zeros on the tensor cores (in TF32: the products are cut to 11 bits, the sums are not), laid out so that the
threads' registers are operands as they stand. Each block of channels writes its own part of dB and dC.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import cdiv
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, mma_v2, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from longwave.ops.gluon_math import sigmoid, softplus
from longwave.ops.selective_scan import triton as portable
from longwave.ops.triton_math import absent, device_of, processors_of
from longwave.ops.triton_segments import pass_states, segments_of

_LOG2E = gl.constexpr(1.4426950408889634)
_LN2 = gl.constexpr(0.6931471805599453)


@gluon.jit
def _summing(W: gl.constexpr):
    """(W, 16, 64): row i has ones in columns 4 i to 4 i + 3. By way of shared memory, since its zeros would be put in
    their registers anew for every product otherwise."""
    sums: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [W, 1, 1], [1, 16, 8])
    left: gl.constexpr = gl.DotOperandLayout(0, sums, 1)
    flat: gl.constexpr = gl.BlockedLayout([1, 4], [2, 16], [W, 1], [1, 0])
    i = gl.arange(0, 16, layout=gl.SliceLayout(1, flat))
    k = gl.arange(0, 64, layout=gl.SliceLayout(0, flat))
    ones = gl.where((k // 4)[None, :] == i[:, None], 1.0, 0.0)
    tile = gl.allocate_shared_memory(gl.float32, [16, 64], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]), ones)
    return tile.load(gl.SliceLayout(0, left))[None, :, :] + gl.zeros([W, 16, 64], gl.float32, left)


@gluon.jit
def _sum_channels(ones, products, W: gl.constexpr):
    """(32 W, 16), a channel to a thread -> (W, 16, 8): sums over each four channels."""
    sums: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [W, 1, 1], [1, 16, 8])
    right: gl.constexpr = gl.DotOperandLayout(1, sums, 1)
    operand = products.reshape([W, 8, 4, 16]).permute((0, 3, 2, 1)).reshape([W, 64, 8])
    operand = gl.convert_layout(operand, right, assert_trivial=True)
    return mma_v2(ones, operand, gl.zeros([W, 16, 8], gl.float32, sums), input_precision="tf32")


@gluon.jit
def _sum_warps(total, first, second, t, W: gl.constexpr):
    """Add up the (W, 16, 8) of tokens t and t + 1, and add them to these rows of `total` (W, 16, 16)."""
    sums: gl.constexpr = total.type.layout
    left: gl.constexpr = gl.DotOperandLayout(0, sums, 2)
    right: gl.constexpr = gl.DotOperandLayout(1, sums, 2)
    operand = gl.join(first, second).permute((0, 3, 2, 1)).reshape([W, 16, 16])
    i = gl.arange(0, 16, layout=gl.SliceLayout(0, gl.SliceLayout(2, left)))
    j = gl.arange(0, 16, layout=gl.SliceLayout(0, gl.SliceLayout(1, left)))
    row = gl.where(i[None, :, None] == (j // 8 + t)[None, None, :], 1.0, 0.0)
    row += gl.zeros([W, 16, 16], gl.float32, left)
    return mma_v2(row, gl.convert_layout(operand, right, assert_trivial=True), total, input_precision="tf32")


@gluon.jit
def _store_sums(to, total, held, tokens, W: gl.constexpr):
    """The sums of a tile, over all warps, into every other run of 16 of (l, 32). `held`: memory for `total`."""
    layout: gl.constexpr = gl.BlockedLayout([1, 2], [4, 8], [W, 1], [1, 0])
    held.store(total)
    of_warps = held._reinterpret(gl.float32, [W, 16, 16], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    sums = of_warps.index(0).load(layout)
    for w in gl.static_range(1, W):
        sums += of_warps.index(w).load(layout)
    t = gl.arange(0, 16, layout=gl.SliceLayout(1, layout))[:, None]
    n = gl.arange(0, 16, layout=gl.SliceLayout(0, layout))[None, :]
    gl.store(to + (t * 32 + n), sums, mask=t < tokens)


@gluon.jit
def _fetch(
    x, dt, dy, z, B, C, states, tiles, B_tiles, C_tiles, starts, bars,
    stage, here, row, start, column, chunks, T: gl.constexpr, GATE: gl.constexpr,
):  # fmt: skip
    """Start the copies of a tile into one stage of the ring, if it is `here`. `tiles`: x, dt, dy and z."""
    bar = bars.index(stage)
    nbytes: gl.constexpr = (4 if GATE else 3) * x.block_type.nbytes + 2 * B.block_type.nbytes + states.block_type.nbytes
    mbarrier.expect(bar, nbytes, pred=here)
    tma.async_copy_global_to_shared(states, [row * chunks + start // T, 0, column], bar, starts.index(stage), pred=here)
    tma.async_copy_global_to_shared(x, [row, start, column], bar, tiles.index(4 * stage), pred=here)
    tma.async_copy_global_to_shared(dt, [row, start, column], bar, tiles.index(4 * stage + 1), pred=here)
    tma.async_copy_global_to_shared(dy, [row, start, column], bar, tiles.index(4 * stage + 2), pred=here)
    if GATE:
        tma.async_copy_global_to_shared(z, [row, start, column], bar, tiles.index(4 * stage + 3), pred=here)
    tma.async_copy_global_to_shared(B, [row, start, 0], bar, B_tiles.index(stage), pred=here)
    tma.async_copy_global_to_shared(C, [row, start, 0], bar, C_tiles.index(stage), pred=here)


@gluon.jit
def _vectors(tiles, count: gl.constexpr, width: gl.constexpr):
    """Shared memory as `count` vectors, to be indexed."""
    return tiles._reinterpret(tiles.dtype, [count, width], gl.SwizzledSharedLayout(1, 1, 1, [0]))


@gluon.jit
def _fours(tiles, count: gl.constexpr, width: gl.constexpr):
    """Shared memory as `count` pieces of 4 vectors, to be indexed."""
    return tiles._reinterpret(tiles.dtype, [count, 4, width], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))


@gluon.jit
def _tokens(four, layout: gl.constexpr):
    """The rows of a (4, channels), which a thread holds."""
    E: gl.constexpr = four.shape[1]
    even, odd = four.permute((1, 0)).reshape([E, 2, 2]).split()
    first, third = even.split()
    second, fourth = odd.split()
    return (
        gl.convert_layout(first, layout, assert_trivial=True),
        gl.convert_layout(second, layout, assert_trivial=True),
        gl.convert_layout(third, layout, assert_trivial=True),
        gl.convert_layout(fourth, layout, assert_trivial=True),
    )


@gluon.jit
def _open(decay, reset, at, here):
    """The decay, or 0 where a document starts."""
    return gl.where(gl.load(reset + at, mask=here, other=0) != 0, 0.0, decay)


@gluon.jit
def _states_partition(
    dy, x, dt, B, C, z, A, D, dt_bias, reset, states, dz, dBC,
    tiles, B_tiles, C_tiles, starts, B_rows, C_rows, sizes, enters, dys, kept0, kept1, kept2, kept3, bars, ready, free,
    count, first, end, row, part, column, b, l, e, chunks, stride_Ae, stride_An, stride_rb, stride_rl,
    SOFTPLUS: gl.constexpr, BIAS: gl.constexpr, SKIP: gl.constexpr, GATE: gl.constexpr, RESET: gl.constexpr,
    T: gl.constexpr, W: gl.constexpr,
):  # fmt: skip
    """Computes the states of each tile again, what the gradients need of each token, and the gradients of z and C."""
    dtype: gl.constexpr = tiles.dtype
    E: gl.constexpr = 32 * W
    N: gl.constexpr = 16
    cells: gl.constexpr = gl.BlockedLayout([1, N], [32, 1], [W, 1], [1, 0])
    of_e: gl.constexpr = gl.SliceLayout(1, cells)
    of_n: gl.constexpr = gl.SliceLayout(0, cells)
    steps: gl.constexpr = gl.BlockedLayout([4, 1], [1, 32], [1, W], [1, 0])
    narrow: gl.constexpr = gl.BlockedLayout([1, 2], [4, 8], [W, 1], [1, 0])
    pieces: gl.constexpr = T // 4

    i_e = column + gl.arange(0, E, layout=of_e)
    i_n = gl.arange(0, N, layout=of_n)
    inside = (i_e < e)[:, None]
    rate = gl.load(A + i_e[:, None] * stride_Ae + i_n[None, :] * stride_An, mask=inside, other=0.0)
    rate = rate.to(gl.float32) * _LOG2E
    k_e = column + gl.arange(0, E, layout=gl.SliceLayout(0, steps))
    k_t = gl.arange(0, 4, layout=gl.SliceLayout(1, steps))
    bias = gl.zeros([E], gl.float32, gl.SliceLayout(0, steps))
    if BIAS:
        bias = gl.load(dt_bias + k_e, mask=k_e < e, other=0.0).to(gl.float32)
    reset += row.to(gl.int64) * stride_rb
    skip = gl.zeros([E], gl.float32, of_e)
    if SKIP:
        skip = gl.load(D + i_e, mask=i_e < e, other=0.0).to(gl.float32)
    dBC += (part.to(gl.int64) * b + row) * l * 32 + 16
    ones = _summing(W)
    held = gl.allocate_shared_memory(gl.float32, [W, 16, N], gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0]))
    of_sums: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [W, 1, 1], [1, 16, 8])
    raws = _fours(tiles, 8 * pieces, E)
    of_starts = starts._reinterpret(gl.float32, [2, N, E], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    across: gl.constexpr = gl.BlockedLayout([N, 1], [1, 32], [1, W], [0, 1])
    for k_tile in range(count):
        stage = k_tile % 2
        begin = first + (count - 1 - k_tile) * T
        mbarrier.wait(bars.index(stage), (k_tile // 2) & 1)
        state = gl.convert_layout(of_starts.index(stage).load(across).permute((1, 0)), cells, assert_trivial=True)
        B_rows.index(stage).store(B_tiles.index(stage).reshape([T, N]).load(narrow).to(gl.float32))
        C_rows.index(stage).store(C_tiles.index(stage).reshape([T, N]).load(narrow).to(gl.float32))
        to_tile = (row.to(gl.int64) * l + begin) * e
        total = gl.zeros([W, 16, N], gl.float32, of_sums)
        for piece in range(pieces):
            place = gl.where(stage == 0, piece, pieces - 1 - piece)
            mbarrier.wait(free.index(place), (k_tile + 1) & 1)
            start = begin + piece * 4
            x_k = raws.index(4 * stage * pieces + piece).load(steps).to(gl.float32)
            size = raws.index((4 * stage + 1) * pieces + piece).load(steps).to(gl.float32) + bias[None, :]
            dy_k = raws.index((4 * stage + 2) * pieces + piece).load(steps).to(gl.float32)
            here = (start + k_t < end)[:, None]
            if SOFTPLUS:
                size = softplus(size)
            size = gl.where(here, size, 0.0)
            u = size * x_k
            _fours(sizes, pieces, E).index(place).store(size)
            _fours(enters, pieces, E).index(place).store(u)
            dy_k = gl.where(here, dy_k, 0.0)
            dgate = dy_k
            if GATE:
                gate = raws.index((4 * stage + 3) * pieces + piece).load(steps).to(gl.float32)
                share = sigmoid(gate)
                dgate = dy_k * (share * (1.0 + gate * (1.0 - share)))
                dy_k *= gate * share
            _fours(dys, pieces, E).index(place).store(dy_k)
            size_of, u_of, dy_of = _tokens(size, of_e), _tokens(u, of_e), _tokens(dy_k, of_e)
            x_of, dgate_of = _tokens(x_k, of_e), _tokens(dgate, of_e)
            for k in gl.static_range(4):
                B_t = _vectors(B_rows, 2 * T, N).index(stage * T + piece * 4 + k).load(of_n)
                C_t = _vectors(C_rows, 2 * T, N).index(stage * T + piece * 4 + k).load(of_n)
                decay = gl.exp2(size_of[k][:, None] * rate)
                if RESET:
                    decay = _open(decay, reset, (start + k) * stride_rl, start + k < end)
                state = decay * state
                if k == 0:
                    kept0.index(place).store(state)
                if k == 1:
                    kept1.index(place).store(state)
                if k == 2:
                    kept2.index(place).store(state)
                if k == 3:
                    kept3.index(place).store(state)
                state += u_of[k][:, None] * B_t[None, :]
                if GATE:
                    out = gl.sum(state * C_t[None, :], 1) + skip * x_of[k]
                    to = (piece * 4 + k) * e + i_e
                    gl.store(dz + to_tile + to, (dgate_of[k] * out).to(dtype), mask=(i_e < e) & (start + k < l))
                sums = _sum_channels(ones, dy_of[k][:, None] * state, W)
                if k % 2 == 0:
                    before = sums
                else:
                    total = _sum_warps(total, before, sums, piece * 4 + k - 1, W)
        gl.thread_barrier()
        mbarrier.arrive(ready)
        _store_sums(dBC + begin * 32, total, held, l - begin, W)
        # The tile before this one has been read to its end: its last piece was free.
        _fetch(
            x, dt, dy, z, B, C, states, tiles, B_tiles, C_tiles, starts, bars,
            1 - stage, k_tile + 1 < count, row, begin - T, column, chunks, T, GATE,
        )  # fmt: skip


@gluon.jit
def _gradients_partition(
    A, D, reset, after, dx, ddt, dA, dBC, dD, dbias, before,
    tiles, B_rows, C_rows, sizes, enters, dys, kept0, kept1, kept2, kept3, bars, ready, free,
    count, first, end, row, segment, part, column, b, l, e, segments, cuts, stride_Ae, stride_An, stride_rb, stride_rl,
    SOFTPLUS: gl.constexpr, BIAS: gl.constexpr, SKIP: gl.constexpr, RESET: gl.constexpr,
    T: gl.constexpr, W: gl.constexpr, PER: gl.constexpr,
):  # fmt: skip
    """Goes through each tile backwards."""
    dtype: gl.constexpr = tiles.dtype
    E: gl.constexpr = 32 * W
    N: gl.constexpr = 16
    cells: gl.constexpr = gl.BlockedLayout([1, N], [32, 1], [W, 1], [1, 0])
    of_e: gl.constexpr = gl.SliceLayout(1, cells)
    of_n: gl.constexpr = gl.SliceLayout(0, cells)
    of_sums: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [W, 1, 1], [1, 16, 8])
    pieces: gl.constexpr = T // 4

    i_e = column + gl.arange(0, E, layout=of_e)
    i_n = gl.arange(0, N, layout=of_n)
    inside = i_e < e
    rate = gl.load(A + i_e[:, None] * stride_Ae + i_n[None, :] * stride_An, mask=inside[:, None], other=0.0)
    rate = rate.to(gl.float32) * _LOG2E
    cell = (row * segments + segment).to(gl.int64) * e * N + (i_e[:, None] * N + i_n[None, :])
    at = gl.minimum(PER * (segment + 1), cuts) - 1
    at = (row * cuts + at).to(gl.int64) * e * N + (i_e[:, None] * N + i_n[None, :])
    grad = gl.load(after + at, mask=inside[:, None], other=0.0)
    dA_sum = gl.zeros([E, N], gl.float32, cells)
    dD_sum = gl.zeros([E], gl.float32, of_e)
    dbias_sum = gl.zeros([E], gl.float32, of_e)
    skip = gl.zeros([E], gl.float32, of_e)
    if SKIP:
        skip = gl.load(D + i_e, mask=inside, other=0.0).to(gl.float32)
    dBC += (part.to(gl.int64) * b + row) * l * 32
    reset += row.to(gl.int64) * stride_rb
    raws = _vectors(tiles, 8 * T, E)
    ones = _summing(W)
    held = gl.allocate_shared_memory(gl.float32, [W, 16, N], gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0]))
    for k_tile in range(count):
        stage = k_tile % 2
        begin = first + (count - 1 - k_tile) * T
        mbarrier.wait(bars.index(stage), (k_tile // 2) & 1)
        mbarrier.wait(ready, k_tile & 1)
        to_tile = (row.to(gl.int64) * l + begin) * e
        total = gl.zeros([W, 16, N], gl.float32, of_sums)
        for k_piece in range(pieces):
            piece = pieces - 1 - k_piece
            place = gl.where(stage == 0, piece, pieces - 1 - piece)
            for k_back in gl.static_range(4):
                k = piece * 4 + 3 - k_back  # in the tile
                t = begin + k
                B_t = _vectors(B_rows, 2 * T, N).index(stage * T + k).load(of_n)
                C_t = _vectors(C_rows, 2 * T, N).index(stage * T + k).load(of_n)
                size_t = _vectors(sizes, T, E).index(place * 4 + 3 - k_back).load(of_e)
                u_t = _vectors(enters, T, E).index(place * 4 + 3 - k_back).load(of_e)
                dy_t = _vectors(dys, T, E).index(place * 4 + 3 - k_back).load(of_e)
                x_t = raws.index(4 * stage * T + k).load(of_e).to(gl.float32)
                if k_back == 0:
                    kept_t = kept3.index(place).load(cells)
                if k_back == 1:
                    kept_t = kept2.index(place).load(cells)
                if k_back == 2:
                    kept_t = kept1.index(place).load(cells)
                if k_back == 3:
                    kept_t = kept0.index(place).load(cells)
                decay = gl.exp2(size_t[:, None] * rate)
                if RESET:
                    decay = _open(decay, reset, t * stride_rl, t < end)
                grad += dy_t[:, None] * C_t[None, :]
                sums = _sum_channels(ones, u_t[:, None] * grad, W)
                if k_back % 2 == 0:
                    later = sums
                else:
                    total = _sum_warps(total, sums, later, k, W)
                du = gl.sum(grad * B_t[None, :], 1)
                through = grad * kept_t  # the gradient of dt A
                dA_sum += size_t[:, None] * through
                draw = gl.sum(through * rate, 1) * _LN2 + x_t * du
                grad *= decay
                if SOFTPLUS:  # its slope
                    draw *= 1.0 - gl.exp2(-_LOG2E * size_t)
                else:
                    draw = gl.where(t < end, draw, 0.0)
                to = k * e + i_e
                stored = inside & (t < l)
                gl.store(dx + to_tile + to, (size_t * du + skip * dy_t).to(dtype), mask=stored)
                gl.store(ddt + to_tile + to, draw.to(dtype), mask=stored)
                dD_sum += dy_t * x_t
                dbias_sum += draw
            gl.thread_barrier()
            mbarrier.arrive(free.index(place))
        _store_sums(dBC + begin * 32, total, held, l - begin, W)
    if segment == 0:
        gl.store(before + row.to(gl.int64) * e * N + (i_e[:, None] * N + i_n[None, :]), grad, mask=inside[:, None])
    gl.store(dA + cell, dA_sum, mask=inside[:, None])
    to_e = (row * segments + segment) * e + i_e
    if BIAS:
        gl.store(dbias + to_e, dbias_sum, mask=inside)
    if SKIP:
        gl.store(dD + to_e, dD_sum, mask=inside)


@gluon.jit
def _backward_kernel(
    dy, x, dt, B, C, z, A, D, dt_bias, reset, lengths, states, after,
    dx, ddt, dz, dA, dBC, dD, dbias, before,
    b, l, e, per_segment, segments, cuts, chunks, stride_Ae, stride_An, stride_rb, stride_rl,
    SOFTPLUS: gl.constexpr, BIAS: gl.constexpr, SKIP: gl.constexpr, GATE: gl.constexpr, RESET: gl.constexpr,
    LENGTHS: gl.constexpr, T: gl.constexpr, W: gl.constexpr, PER: gl.constexpr, REGISTERS: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = x.dtype
    E: gl.constexpr = 32 * W
    N: gl.constexpr = 16
    pieces: gl.constexpr = T // 4
    blocks = gl.cdiv(e, E)
    program = gl.program_id(0)
    part = program % blocks
    segment = program // blocks % segments
    row = program // (blocks * segments)
    column = part * E
    first = segment * per_segment
    count = gl.cdiv(gl.minimum(per_segment, l - first), T)
    end = l
    if LENGTHS:
        end = gl.load(lengths + row).to(gl.int32)

    raw: gl.constexpr = gl.NVMMASharedLayout(0, 16, 3)
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    spread: gl.constexpr = gl.SwizzledSharedLayout(4, 2, 4, [1, 0])
    tiles = gl.allocate_shared_memory(dtype, [8, 1, T, E], raw)  # two stages of x, dt, dy and z
    B_tiles = gl.allocate_shared_memory(dtype, [2, 1, T, N], raw)
    C_tiles = gl.allocate_shared_memory(dtype, [2, 1, T, N], raw)
    starts = gl.allocate_shared_memory(gl.float32, [2, 1, N, E], states.layout)
    B_rows = gl.allocate_shared_memory(gl.float32, [2, T, N], plain)
    C_rows = gl.allocate_shared_memory(gl.float32, [2, T, N], plain)
    sizes = gl.allocate_shared_memory(gl.float32, [T, E], plain)
    enters = gl.allocate_shared_memory(gl.float32, [T, E], plain)
    dys = gl.allocate_shared_memory(gl.float32, [T, E], plain)
    # Memory of their own for the first, second, third and fourth tokens: the compiler parts stores that could meet by
    # a barrier.
    kept0 = gl.allocate_shared_memory(gl.float32, [pieces, E, N], spread)
    kept1 = gl.allocate_shared_memory(gl.float32, [pieces, E, N], spread)
    kept2 = gl.allocate_shared_memory(gl.float32, [pieces, E, N], spread)
    kept3 = gl.allocate_shared_memory(gl.float32, [pieces, E, N], spread)
    bars = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [pieces, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(bars.index(i), count=1)
    for i in gl.static_range(pieces):
        mbarrier.init(free.index(i), count=1)
    mbarrier.init(ready, count=1)
    _fetch(
        x, dt, dy, z, B, C, states, tiles, B_tiles, C_tiles, starts, bars,
        0, count > 0, row, first + (count - 1) * T, column, chunks, T, GATE,
    )  # fmt: skip
    gl.thread_barrier()
    gl.warp_specialize(
        [
            (
                _gradients_partition,
                (
                    A, D, reset, after, dx, ddt, dA, dBC, dD, dbias, before,
                    tiles, B_rows, C_rows, sizes, enters, dys, kept0, kept1, kept2, kept3, bars, ready, free,
                    count, first, end, row, segment, part, column, b, l, e, segments, cuts,
                    stride_Ae, stride_An, stride_rb, stride_rl,
                    SOFTPLUS, BIAS, SKIP, RESET, T, W, PER,
                ),
            ),
            (
                _states_partition,
                (
                    dy, x, dt, B, C, z, A, D, dt_bias, reset, states, dz, dBC,
                    tiles, B_tiles, C_tiles, starts, B_rows, C_rows, sizes, enters, dys,
                    kept0, kept1, kept2, kept3, bars, ready, free,
                    count, first, end, row, part, column, b, l, e, chunks, stride_Ae, stride_An, stride_rb, stride_rl,
                    SOFTPLUS, BIAS, SKIP, GATE, RESET, T, W,
                ),
            ),
        ],
        [W],
        [REGISTERS],
    )  # fmt: skip


@gluon.jit
def _adjoint_kernel(
    dy, dt, z, C, A, dt_bias, reset, lengths, ends, total,
    l, e, per_segment, segments, stride_Ae, stride_An, stride_rb, stride_rl,
    SOFTPLUS: gl.constexpr, BIAS: gl.constexpr, GATE: gl.constexpr, RESET: gl.constexpr, LENGTHS: gl.constexpr,
    T: gl.constexpr, W: gl.constexpr,
):  # fmt: skip
    """The gradient of the state before a segment, where the one after it is 0, and the product of its decays."""
    dtype: gl.constexpr = dy.dtype
    E: gl.constexpr = 32 * W
    N: gl.constexpr = 16
    cells: gl.constexpr = gl.BlockedLayout([1, N], [32, 1], [W, 1], [1, 0])
    of_e: gl.constexpr = gl.SliceLayout(1, cells)
    of_n: gl.constexpr = gl.SliceLayout(0, cells)
    steps: gl.constexpr = gl.BlockedLayout([4, 1], [1, 32], [1, W], [1, 0])
    narrow: gl.constexpr = gl.BlockedLayout([1, 2], [4, 8], [W, 1], [1, 0])
    pieces: gl.constexpr = T // 4
    blocks = gl.cdiv(e, E)
    program = gl.program_id(0)
    segment = program // blocks % segments
    row = program // (blocks * segments)
    column = program % blocks * E
    first = segment * per_segment
    count = gl.cdiv(gl.minimum(per_segment, l - first), T)
    end = l
    if LENGTHS:
        end = gl.load(lengths + row).to(gl.int32)
    raw: gl.constexpr = gl.NVMMASharedLayout(0, 16, 3)
    tiles = gl.allocate_shared_memory(dtype, [6, 1, T, E], raw)  # two stages of dt, dy and z
    C_tiles = gl.allocate_shared_memory(dtype, [2, 1, T, N], raw)
    C_rows = gl.allocate_shared_memory(gl.float32, [2, T, N], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    bars = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(bars.index(i), count=1)
    nbytes: gl.constexpr = (3 if GATE else 2) * dt.block_type.nbytes + C.block_type.nbytes

    i_e = column + gl.arange(0, E, layout=of_e)
    i_n = gl.arange(0, N, layout=of_n)
    inside = (i_e < e)[:, None]
    rate = gl.load(A + i_e[:, None] * stride_Ae + i_n[None, :] * stride_An, mask=inside, other=0.0)
    rate = rate.to(gl.float32) * _LOG2E
    k_e = column + gl.arange(0, E, layout=gl.SliceLayout(0, steps))
    k_t = gl.arange(0, 4, layout=gl.SliceLayout(1, steps))
    bias = gl.zeros([E], gl.float32, gl.SliceLayout(0, steps))
    if BIAS:
        bias = gl.load(dt_bias + k_e, mask=k_e < e, other=0.0).to(gl.float32)
    reset += row.to(gl.int64) * stride_rb
    raws = _fours(tiles, 6 * pieces, E)
    grad = gl.zeros([E, N], gl.float32, cells)
    sum_sizes = gl.zeros([E], gl.float32, of_e)
    whole = gl.full([E, N], 1.0, gl.float32, cells)
    for k_tile in range(-1, count):
        stage = k_tile & 1
        begin = first + (count - 1 - k_tile) * T
        gl.thread_barrier()
        more = k_tile + 1 < count
        bar = bars.index(1 - stage)
        mbarrier.expect(bar, nbytes, pred=more)
        at = 3 * (1 - stage)
        tma.async_copy_global_to_shared(dt, [row, begin - T, column], bar, tiles.index(at), pred=more)
        tma.async_copy_global_to_shared(dy, [row, begin - T, column], bar, tiles.index(at + 1), pred=more)
        if GATE:
            tma.async_copy_global_to_shared(z, [row, begin - T, column], bar, tiles.index(at + 2), pred=more)
        tma.async_copy_global_to_shared(C, [row, begin - T, 0], bar, C_tiles.index(1 - stage), pred=more)
        if k_tile >= 0:
            mbarrier.wait(bars.index(stage), (k_tile // 2) & 1)
            C_rows.index(stage).store(C_tiles.index(stage).reshape([T, N]).load(narrow).to(gl.float32))
            for k_piece in range(pieces):
                piece = pieces - 1 - k_piece
                start = begin + piece * 4
                size = raws.index(3 * stage * pieces + piece).load(steps).to(gl.float32) + bias[None, :]
                dy_k = raws.index((3 * stage + 1) * pieces + piece).load(steps).to(gl.float32)
                here = (start + k_t < end)[:, None]
                if SOFTPLUS:
                    size = softplus(size)
                size = gl.where(here, size, 0.0)
                dy_k = gl.where(here, dy_k, 0.0)
                if GATE:
                    gate = raws.index((3 * stage + 2) * pieces + piece).load(steps).to(gl.float32)
                    dy_k *= gate * sigmoid(gate)
                size_of, dy_of = _tokens(size, of_e), _tokens(dy_k, of_e)
                for k_back in gl.static_range(4):
                    C_t = _vectors(C_rows, 2 * T, N).index(stage * T + piece * 4 + 3 - k_back).load(of_n)
                    size_t = size_of[3 - k_back]
                    decay = gl.exp2(size_t[:, None] * rate)
                    if RESET:
                        decay = _open(decay, reset, (start + 3 - k_back) * stride_rl, start + 3 - k_back < end)
                        whole *= decay
                    else:
                        sum_sizes += size_t
                    grad = decay * (grad + dy_of[3 - k_back][:, None] * C_t[None, :])
    for i in gl.static_range(2):
        mbarrier.invalidate(bars.index(i))
    if not RESET:
        whole = gl.exp2(sum_sizes[:, None] * rate)
    cell = (row * segments + segment).to(gl.int64) * e * N + (i_e[:, None] * N + i_n[None, :])
    gl.store(ends + cell, grad, mask=inside)
    gl.store(total + cell, whole, mask=inside)


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


_T = 16  # tokens of a tile
_W = 4  # warps of a group: a program takes 32 channels to a warp
_CUTS = 4  # of a segment, for the pass that finds the gradients of the states between segments
_SEGMENT = 256  # tokens of a segment that are worth that pass
_REGISTERS = 240  # of a thread that computes states


def backward(dy, dfinal, states, x, dt, A, B, C, D, z, dt_bias, initial_state, reset, lengths, dt_softplus, chunk_len):
    b, l, e = x.shape
    n = A.shape[1]
    inputs = [x, dt, B, C, dy, *([] if z is None else [z])]
    if n != 16 or chunk_len != _T or e % 8 or x.element_size() != 2 or any(t.dtype != x.dtype for t in inputs):
        return portable.backward(
            dy, dfinal, states, x, dt, A, B, C, D, z, dt_bias, initial_state, reset, lengths, dt_softplus, chunk_len
        )
    E = 32 * _W
    tiles = [_tiles(t, E) for t in (dy, x, dt, absent(z, x))]
    B_tiles, C_tiles = _tiles(B, n), _tiles(C, n)
    flags = {
        "SOFTPLUS": dt_softplus, "BIAS": dt_bias is not None, "GATE": z is not None, "RESET": reset is not None,
        "LENGTHS": lengths is not None, "T": _T, "W": _W, "num_warps": _W,
    }  # fmt: skip
    strides = (*A.stride(), *((0, 0) if reset is None else reset.stride()))

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=x.device)

    with device_of(x):
        blocks = cdiv(e, E)
        segments, cuts = segments_of(b * blocks, processors_of(x), l, _SEGMENT), 1
        after = dfinal.to(torch.float32).contiguous()
        per_segment = cdiv(l, _T) * _T
        if segments > 1:
            per_cut = cdiv(cdiv(l, segments * _CUTS), _T) * _T
            per_segment, cuts = _CUTS * per_cut, cdiv(l, per_cut)
            segments = cdiv(l, per_segment)
            ends, total = empty(b, cuts, e, n), empty(b, cuts, e, n)
            _adjoint_kernel[(b * cuts * blocks,)](
                tiles[0], tiles[2], tiles[3], C_tiles, A, dt_bias, absent(reset, x), lengths, ends, total,
                l, e, per_cut, cuts, *strides, **flags,
            )  # fmt: skip
            after, _ = pass_states(ends, total, after, reverse=True)
        dx, ddt, dz = (None if t is None else torch.empty(b, l, e, dtype=t.dtype, device=x.device) for t in (x, dt, z))
        dB, dC = (torch.empty(b, l, n, dtype=t.dtype, device=x.device) for t in (B, C))
        dBC = empty(blocks, b, l, 2 * n)
        before, dA = empty(b, e, n), empty(b, segments, e, n)
        dD, dbias = empty(b, segments, e), empty(b, segments, e)
        starts = TensorDescriptor.from_tensor(states.flatten(0, 1), [1, n, E], gl.NVMMASharedLayout(0, 32, 3))
        _backward_kernel[(b * segments * blocks,)](
            *tiles[:3], B_tiles, C_tiles, tiles[3], A, D, dt_bias, absent(reset, x), lengths, starts, after,
            dx, ddt, dz, dA, dBC, dD, dbias, before,
            b, l, e, per_segment, segments, cuts, states.shape[1], *strides,
            SKIP=D is not None, PER=_CUTS if cuts > 1 else 1, REGISTERS=_REGISTERS, **flags,
        )  # fmt: skip
        _sum_parts_kernel[(cdiv(dB.numel(), 256),)](dBC, dB, dC, blocks, 2 * dB.numel(), N=n, BLOCK=512, num_warps=4)
    grads = (
        (dx, x), (ddt, dt), (dA.sum((0, 1)), A), (dB, B), (dC, C), (dD.sum((0, 1)), D), (dz, z),
        (dbias.sum((0, 1)), dt_bias), (before, initial_state),
    )  # fmt: skip
    return tuple(x.new_empty(0) if t is None else grad.to(t.dtype) for grad, t in grads)


def _tiles(t: Tensor, columns: int) -> TensorDescriptor:
    """Boxes of one tile of (b, l, columns); of a copy where address or strides are not multiples of 16 bytes."""
    whole = all(stride > 0 and stride * t.element_size() % 16 == 0 for stride in t.stride()[:-1])
    if t.data_ptr() % 16 or not whole or t.stride(-1) != 1:
        t = t.clone(memory_format=torch.contiguous_format)
    return TensorDescriptor.from_tensor(t, [1, _T, columns], gl.NVMMASharedLayout(0, 16, 3))

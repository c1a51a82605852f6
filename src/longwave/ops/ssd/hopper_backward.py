"""SSD's backward pass on Hopper: one walk along l for the states, then all chunks at once.

The mathematics is that of `triton.py`. `_states_kernel` walks l forwards for the states and backwards for their
gradients, and stores both at every second chunk only, in the inputs' dtype. `_chunks_kernel` then takes one chunk and
goes over the heads of a group, so that dB and dC are sums in registers; the state (or gradient) at the chunk's side
that was not stored is made from the other chunk of the pair. Groups of warps work side by side, one or two heads apart:
one fetches the tiles, one takes the pairs of tokens within the chunk, one dB and dx, one dC and the states to be made.

With W_ij the weight of x_j in y_i, the gradient of s_i - s_j is dy_i W_ij x_j. Its sums over j and i are dy_i (W x)_i
and x_j (W^T dy)_j, where products with the same rounded W meet: what belongs to neither side of a token cancels.
"""

import torch
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.core import _aggregate as aggregate

from longwave.ops.gluon_math import exp2, widen
from longwave.ops.gluon_tiles import for_tma, matrix, tiles, zero_from
from longwave.ops.ssd import triton as portable
from longwave.ops.triton_math import device_of, processors_of, step_size
from longwave.ops.triton_segments import splits_of

_Q = 64  # tokens of a chunk
_P = 64  # channels of a head


@gluon.jit
def _to_start(s, document, t, RESET: gl.constexpr):
    """The decay of tokens t from the start of their chunk, 0 in another document."""
    weight = exp2(s)
    if RESET:
        weight = gl.where(gl.load(document + t) == 0, weight, 0.0)
    return weight


@gluon.jit
def _to_end(s, s_end, document, t, Q: gl.constexpr, RESET: gl.constexpr):
    """The decay of tokens t to the end of their chunk, 0 in another document."""
    weight = exp2(s_end - s)
    if RESET:
        weight = gl.where(gl.load(document + t) == gl.load(document + Q - 1), weight, 0.0)
    return weight


@gluon.jit
def _whole(s_end, document, Q: gl.constexpr, RESET: gl.constexpr):
    """The decay over a chunk, 0 if a document begins in it."""
    weight = exp2(s_end)
    if RESET:
        weight = gl.where(gl.load(document + Q - 1) == 0, weight, 0.0)
    return weight


@gluon.jit
def _log2(x):
    """The special function unit's, not its refinement."""
    return gl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@aggregate
class _Walk:
    """What the heads of one program of `_states_kernel` share: a ring of tiles, and where it goes."""

    v: gl.shared_memory_descriptor
    u: gl.shared_memory_descriptor
    sizes: gl.shared_memory_descriptor
    decays: gl.shared_memory_descriptor
    held: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor

    @gluon.constexpr_function
    def __init__(self, v, u, sizes, decays, held, full, empty):
        self.v = v
        self.u = u
        self.sizes = sizes
        self.decays = decays
        self.held = held
        self.full = full
        self.empty = empty


@gluon.jit
def _fetch_walk(
    ring, x, dy, B, C, sizes, decays, reverse, row, group, head, chunks, h,
    HEADS: gl.constexpr, STAGES: gl.constexpr, Q: gl.constexpr, P: gl.constexpr,
):  # fmt: skip
    nbytes: gl.constexpr = HEADS * (x.block_type.nbytes + 2 * sizes.block_type.nbytes) + B.block_type.nbytes
    for k in range(chunks):
        stage = k % STAGES
        chunk = chunks - 1 - k if reverse else k
        bar = ring.full.index(stage)
        mbarrier.wait(ring.empty.index(stage), ((k // STAGES) & 1) ^ 1)
        mbarrier.expect(bar, nbytes)
        u_t = ring.u.index(stage)
        tma.async_copy_global_to_shared(B, [row, chunk * Q, group, 0], bar, u_t, pred=not reverse)
        tma.async_copy_global_to_shared(C, [row, chunk * Q, group, 0], bar, u_t, pred=reverse)
        for j in gl.static_range(HEADS):
            v_t, at = ring.v.index(stage * HEADS + j), row * h + head + j
            tma.async_copy_global_to_shared(x, [row, chunk * Q, head + j, 0], bar, v_t, pred=not reverse)
            tma.async_copy_global_to_shared(dy, [row, chunk * Q, head + j, 0], bar, v_t, pred=reverse)
            tma.async_copy_global_to_shared(sizes, [at, chunk * Q], bar, ring.sizes.index(stage * HEADS + j))
            tma.async_copy_global_to_shared(decays, [at, chunk * Q], bar, ring.decays.index(stage * HEADS + j))


@gluon.jit
def _walk_head(
    ring, states, decay, document, initial, dfinal, dinitial, reverse, row, head, slot, chunks, h, end,
    INITIAL: gl.constexpr, RESET: gl.constexpr, LENGTHS: gl.constexpr, HEADS: gl.constexpr, STAGES: gl.constexpr,
    Q: gl.constexpr, N: gl.constexpr, P: gl.constexpr,
):  # fmt: skip
    """One head's state, or its gradient, in the accumulators of the product that updates it."""
    dtype: gl.constexpr = ring.v.dtype
    of_state: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, of_state, 2)
    columns: gl.constexpr = gl.SliceLayout(0, operand)
    t = gl.arange(0, Q, layout=columns)
    i_p = gl.arange(0, P, layout=gl.SliceLayout(1, of_state))
    i_n = gl.arange(0, N, layout=gl.SliceLayout(0, of_state))
    bh = row.to(gl.int64) * h + head
    cell = bh * (P * N) + i_p[:, None] * N + i_n[None, :]
    state = gl.load(dfinal + cell, mask=reverse)
    if INITIAL:
        if not reverse:
            state = gl.load(initial + cell)
    else:
        state = gl.where(reverse, state, 0.0)
    held = ring.held.index(slot)
    decay += bh * chunks * Q + Q - 1
    pairs = (chunks + 1) // 2
    first = row * pairs * h + head
    if reverse:
        first += states.shape[0] // 2
    s_end = gl.load(decay + (chunks - 1 if reverse else 0) * Q)
    for k in range(chunks):
        chunk = chunks - 1 - k if reverse else k
        stage = k % STAGES
        at = stage * HEADS + slot
        if (chunk % 2 == 1 or k == 0) if reverse else chunk % 2 == 0:
            tma.store_wait(0)
            gl.thread_barrier()
            held.store(state.to(dtype))
            fence_async_shared()
            gl.thread_barrier()
            tma.async_copy_shared_to_global(states, [first + chunk // 2 * h, 0, 0, 0], held.reshape([1, P, 1, N]))
        s_next = gl.load(decay + gl.minimum(gl.maximum(chunk + (-1 if reverse else 1), 0), chunks - 1) * Q)
        mbarrier.wait(ring.full.index(stage), (k // STAGES) & 1)
        v_t = ring.v.index(at).reshape([Q, P])
        u_t = ring.u.index(stage).reshape([Q, N])
        s, size = ring.decays.index(at).reshape([Q]).load(columns), ring.sizes.index(at).reshape([Q]).load(columns)
        here = document
        if RESET:
            here += chunk * Q
        weight = gl.where(reverse, _to_start(s, here, t, RESET), _to_end(s, s_end, here, t, Q, RESET) * size)
        v_k = widen(v_t.permute((1, 0)).load(operand)) * weight[None, :]
        if LENGTHS:
            if chunk * Q + Q > end:
                zero_from(u_t, end - chunk * Q, Q, N)
                fence_async_shared()
                gl.thread_barrier()
            v_k = gl.where((chunk * Q + t < end)[None, :], v_k, 0.0)
        state = warpgroup_mma(v_k.to(dtype), u_t, state * _whole(s_end, here, Q, RESET), is_async=True)
        state = warpgroup_mma_wait(0, deps=(state,))
        s_end = s_next
        gl.thread_barrier()
        mbarrier.arrive(ring.empty.index(stage), count=1)
    if INITIAL and reverse:
        gl.store(dinitial + cell, state)
    tma.store_wait(0)


@gluon.jit
def _states_kernel(
    x, dy, B, C, sizes, decays, states, decay, document, initial, dfinal, dinitial, lengths, l, chunks, h, h_per_g,
    INITIAL: gl.constexpr, RESET: gl.constexpr, LENGTHS: gl.constexpr, HEADS: gl.constexpr, STAGES: gl.constexpr,
    Q: gl.constexpr, N: gl.constexpr, P: gl.constexpr,
):  # fmt: skip
    """`states` (2 b pairs h, p, n) takes the states before pairs of chunks, then their gradients after pairs."""
    program = gl.program_id(0)
    half = gl.num_programs(0) // 2
    reverse = program >= half
    program = program % half
    row, head = program // (h // HEADS), program % (h // HEADS) * HEADS
    end = l
    if LENGTHS:
        end = gl.load(lengths + row).to(gl.int32)
    if RESET:
        document += row.to(gl.int64) * chunks * Q
    dtype: gl.constexpr = x.dtype
    ring = _Walk(
        gl.allocate_shared_memory(dtype, [STAGES * HEADS, 1, Q, 1, P], x.layout),
        gl.allocate_shared_memory(dtype, [STAGES, 1, Q, 1, N], B.layout),
        gl.allocate_shared_memory(gl.float32, [STAGES * HEADS, 1, Q], sizes.layout),
        gl.allocate_shared_memory(gl.float32, [STAGES * HEADS, 1, Q], decays.layout),
        gl.allocate_shared_memory(dtype, [HEADS, P, N], gl.NVMMASharedLayout.get_default_for([P, N], dtype)),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout()),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout()),
    )
    for k in gl.static_range(STAGES):
        mbarrier.init(ring.full.index(k), count=1)
        mbarrier.init(ring.empty.index(k), count=HEADS)
    fence_async_shared()
    gl.thread_barrier()
    if HEADS == 2:
        gl.warp_specialize(
            [
                (_walk_head, (ring, states, decay, document, initial, dfinal, dinitial, reverse, row, head, 0, chunks,
                              h, end, INITIAL, RESET, LENGTHS, HEADS, STAGES, Q, N, P)),
                (_walk_head, (ring, states, decay, document, initial, dfinal, dinitial, reverse, row, head + 1, 1,
                              chunks, h, end, INITIAL, RESET, LENGTHS, HEADS, STAGES, Q, N, P)),
                (_fetch_walk, (ring, x, dy, B, C, sizes, decays, reverse, row, head // h_per_g, head, chunks, h,
                               HEADS, STAGES, Q, P)),
            ],
            [4, 1],
            [168, 32],
        )  # fmt: skip
    else:
        gl.warp_specialize(
            [
                (_walk_head, (ring, states, decay, document, initial, dfinal, dinitial, reverse, row, head, 0, chunks,
                              h, end, INITIAL, RESET, LENGTHS, HEADS, STAGES, Q, N, P)),
                (_fetch_walk, (ring, x, dy, B, C, sizes, decays, reverse, row, head // h_per_g, head, chunks, h,
                               HEADS, STAGES, Q, P)),
            ],
            [1],
            [32],
        )  # fmt: skip


@aggregate
class _Chunk:
    """The tiles of `_chunks_kernel`: those of a chunk, and a ring for its heads.

    `states` has two tiles to a stage: the state before the pair of chunks and the gradient after it. The one that is
    not at this chunk's side is taken to it, with the other chunk's `u` (B or C) and `v` (x or dy). `v` then takes the
    weights of the pairs of tokens, and dx on its way out.
    """

    B: gl.shared_memory_descriptor
    C: gl.shared_memory_descriptor
    u: gl.shared_memory_descriptor
    x: gl.shared_memory_descriptor
    dy: gl.shared_memory_descriptor
    v: gl.shared_memory_descriptor
    states: gl.shared_memory_descriptor
    sizes: gl.shared_memory_descriptor
    decays: gl.shared_memory_descriptor
    begin: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor
    ready: gl.shared_memory_descriptor
    weighed: gl.shared_memory_descriptor
    spent: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor
    left: gl.shared_memory_descriptor
    end: gl.shared_memory_descriptor

    @gluon.constexpr_function
    def __init__(self, B, C, u, x, dy, v, states, sizes, decays, begin, full, ready, weighed, spent, empty, left, end):
        self.B = B
        self.C = C
        self.u = u
        self.x = x
        self.dy = dy
        self.v = v
        self.states = states
        self.sizes = sizes
        self.decays = decays
        self.begin = begin
        self.full = full
        self.ready = ready
        self.weighed = weighed
        self.spent = spent
        self.empty = empty
        self.left = left
        self.end = end


@gluon.jit
def _fetch_chunk(
    tiles, x, dy, B, C, states, sizes, decays, row, chunk, group, first, heads, chunks, h,
    STAGES: gl.constexpr, Q: gl.constexpr, P: gl.constexpr,
):  # fmt: skip
    odd = chunk % 2 == 1
    other = chunk + 1 - 2 * (chunk % 2)
    mbarrier.expect(tiles.begin, 3 * B.block_type.nbytes)
    tma.async_copy_global_to_shared(B, [row, chunk * Q, group, 0], tiles.begin, tiles.B)
    tma.async_copy_global_to_shared(C, [row, chunk * Q, group, 0], tiles.begin, tiles.C)
    tma.async_copy_global_to_shared(B, [row, other * Q, group, 0], tiles.begin, tiles.u, pred=odd)
    tma.async_copy_global_to_shared(C, [row, other * Q, group, 0], tiles.begin, tiles.u, pred=not odd)
    pairs = (chunks + 1) // 2
    pair = (row * pairs + chunk // 2) * h + first
    nbytes: gl.constexpr = 3 * x.block_type.nbytes + 2 * states.block_type.nbytes + 4 * sizes.block_type.nbytes
    for k in range(heads):
        stage, at = k % STAGES, row * h + first + k
        bar = tiles.full.index(stage)
        mbarrier.wait(tiles.empty.index(stage), ((k // STAGES) & 1) ^ 1)
        mbarrier.expect(bar, nbytes)
        tma.async_copy_global_to_shared(x, [row, other * Q, first + k, 0], bar, tiles.v.index(stage), pred=odd)
        tma.async_copy_global_to_shared(dy, [row, other * Q, first + k, 0], bar, tiles.v.index(stage), pred=not odd)
        tma.async_copy_global_to_shared(states, [pair + k, 0, 0, 0], bar, tiles.states.index(2 * stage))
        after = states.shape[0] // 2 + pair + k
        tma.async_copy_global_to_shared(states, [after, 0, 0, 0], bar, tiles.states.index(2 * stage + 1))
        tma.async_copy_global_to_shared(x, [row, chunk * Q, first + k, 0], bar, tiles.x.index(stage))
        tma.async_copy_global_to_shared(dy, [row, chunk * Q, first + k, 0], bar, tiles.dy.index(stage))
        tma.async_copy_global_to_shared(sizes, [at, chunk * Q], bar, tiles.sizes.index(2 * stage))
        tma.async_copy_global_to_shared(sizes, [at, other * Q], bar, tiles.sizes.index(2 * stage + 1))
        tma.async_copy_global_to_shared(decays, [at, chunk * Q], bar, tiles.decays.index(2 * stage))
        tma.async_copy_global_to_shared(decays, [at, other * Q], bar, tiles.decays.index(2 * stage + 1))


@gluon.jit
def _make_state(
    tiles, decay, document, row, chunk, head, k, chunks, h, end,
    RESET: gl.constexpr, LENGTHS: gl.constexpr, STAGES: gl.constexpr, Q: gl.constexpr, N: gl.constexpr,
    P: gl.constexpr,
):  # fmt: skip
    """Complete stage k of the ring: the state between the two chunks of the pair, or its gradient, takes the place of
    what it is made from."""
    dtype: gl.constexpr = tiles.x.dtype
    of_state: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, of_state, 2)
    columns: gl.constexpr = gl.SliceLayout(0, operand)
    stage = k % STAGES
    odd = chunk % 2
    other = chunk + 1 - 2 * odd
    t = gl.arange(0, Q, layout=columns)
    at = (row.to(gl.int64) * h + head) * chunks
    s_end = gl.load(decay + (at + other) * Q + Q - 1, mask=other < chunks, other=0.0)
    if RESET:
        document += (row.to(gl.int64) * chunks + gl.minimum(other, chunks - 1)) * Q
    mbarrier.wait(tiles.full.index(stage), (k // STAGES) & 1)
    v_t = tiles.v.index(stage).reshape([Q, P])
    if LENGTHS and gl.maximum(chunk, other) * Q + Q > end:
        zero_from(tiles.x.index(stage).reshape([Q, P]), end - chunk * Q, Q, P)
        zero_from(tiles.dy.index(stage).reshape([Q, P]), end - chunk * Q, Q, P)
        zero_from(v_t, end - other * Q, Q, P)
        gl.thread_barrier()
    s = tiles.decays.index(2 * stage + 1).reshape([Q]).load(columns)
    size = tiles.sizes.index(2 * stage + 1).reshape([Q]).load(columns)
    weight = exp2(gl.where(odd == 1, s_end - s, s)) * gl.where(odd == 1, size, 1.0)
    if RESET:
        same = gl.load(document + t) == gl.where(odd == 1, gl.load(document + Q - 1), 0)
        weight = gl.where(same, weight, 0.0)
    v_k = (widen(v_t.permute((1, 0)).load(operand)) * weight[None, :]).to(dtype)
    given = tiles.states.index(2 * stage + 1 - odd).reshape([P, N])
    whole = gl.where(other < chunks, _whole(s_end, document, Q, RESET), 1.0)
    for j in gl.static_range(N // 64):
        u_t = tiles.u.reshape([Q, N]).slice(j * 64, 64, dim=1)
        given_t = given.slice(j * 64, 64, dim=1)
        made = warpgroup_mma(v_k, u_t, widen(given_t.load(of_state)) * whole, is_async=True)
        made = warpgroup_mma_wait(0, deps=(made,))
        given_t.store(made.to(dtype))
    fence_async_shared()
    gl.thread_barrier()
    mbarrier.arrive(tiles.ready.index(stage), count=1)


@gluon.jit
def _finish_rows(
    out, pairs, u, total, row, chunk, group, part, l, g,
    PARTS: gl.constexpr, Q: gl.constexpr, N: gl.constexpr,
):  # fmt: skip
    """A chunk's dB or dC, or the part of it that some of the heads make: what came through states, and through pairs of
    tokens."""
    values = warpgroup_mma(pairs, u, total, is_async=True)
    values = warpgroup_mma_wait(0, deps=(values,))
    layout: gl.constexpr = values.type.layout
    t = gl.arange(0, Q, layout=gl.SliceLayout(1, layout))
    n = gl.arange(0, N, layout=gl.SliceLayout(0, layout))
    if PARTS:
        gl.store(out + (part.to(gl.int64) * Q + t)[:, None] * N + n[None, :], values)
    else:
        token = chunk * Q + t
        to = ((row.to(gl.int64) * l + token) * g + group)[:, None] * N + n[None, :]
        gl.store(out + to, values.to(out.dtype.element_ty), mask=(token < l)[:, None])


@gluon.jit
def _of_pairs(
    tiles, decay, document, vectors, of_vector, dots, row, chunk, first, heads, chunks, h,
    RESET: gl.constexpr, STAGES: gl.constexpr, Q: gl.constexpr, N: gl.constexpr, P: gl.constexpr,
):  # fmt: skip
    """The pairs of tokens of the chunk, whose weights go on to dx and dC: (j, i) is what x_j gives to y_i. And what
    reaches the decay of the whole chunk."""
    dtype: gl.constexpr = tiles.x.dtype
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, Q, 16])
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    rows: gl.constexpr = gl.SliceLayout(1, layout)
    columns: gl.constexpr = gl.SliceLayout(0, layout)
    t_j, t_i = gl.arange(0, Q, layout=rows), gl.arange(0, Q, layout=columns)
    B_t, C_t = tiles.B.reshape([Q, N]), tiles.C.reshape([Q, N])
    seen = t_j[:, None] <= t_i[None, :]
    here = document
    if RESET:
        here += (row.to(gl.int64) * chunks + chunk) * Q
        seen = seen & (gl.load(here + t_j)[:, None] == gl.load(here + t_i)[None, :])
    at = (row.to(gl.int64) * h + first) * chunks + chunk
    vectors += at * Q + of_vector
    dots += at
    decay += at * Q + Q - 1
    s_end = gl.load(decay)
    zeros = gl.zeros([Q, Q], gl.float32, layout)
    mbarrier.wait(tiles.ready.index(0), 0)
    BC = warpgroup_mma(B_t, C_t.permute((1, 0)), zeros, use_acc=False, is_async=True)
    BC = warpgroup_mma_wait(0, deps=(BC,))
    of_BC = zeros
    for k in range(heads):
        stage = k % STAGES
        x_t, dy_t = tiles.x.index(stage).reshape([Q, P]), tiles.dy.index(stage).reshape([Q, P])
        state = tiles.states.index(2 * stage).reshape([P, N])
        dstate = tiles.states.index(2 * stage + 1).reshape([P, N])
        decay += chunks * Q
        s_next = gl.load(decay, mask=k + 1 < heads, other=0.0)
        mbarrier.wait(tiles.ready.index(stage), (k // STAGES) & 1)
        pairs = warpgroup_mma(x_t, dy_t.permute((1, 0)), zeros, use_acc=False, is_async=True)
        s, size = tiles.decays.index(2 * stage).reshape([Q]), tiles.sizes.index(2 * stage).reshape([Q]).load(rows)
        # A step of size 0 has a gradient too: what it would give is divided by its size again.
        positive = gl.maximum(size, 1e-30)
        less = s.load(rows) - _log2(positive)
        weights = exp2(gl.where(seen, s.load(columns)[None, :] - less[:, None], -float("inf")))
        pairs = warpgroup_mma_wait(0, deps=(pairs,))
        of_BC += pairs * weights
        weights *= BC
        tiles.v.index(stage).reshape([Q, Q]).store(weights.to(dtype))
        fence_async_shared()
        gl.thread_barrier()
        mbarrier.arrive(tiles.weighed.index(stage), count=1)
        gl.store(vectors + t_j, gl.sum(pairs * weights, 1) * (1.0 / positive))
        vectors += chunks * Q
        passed = gl.zeros([P, 64], gl.float32, wide)
        for j in gl.static_range(N // 64):
            after = widen(dstate.slice(j * 64, 64, dim=1).load(wide))
            passed += widen(state.slice(j * 64, 64, dim=1).load(wide)) * after
        gl.store(dots, gl.sum(gl.sum(passed, 1), 0) * _whole(s_end, here, Q, RESET))
        dots += chunks
        s_end = s_next
        gl.thread_barrier()
        mbarrier.arrive(tiles.empty.index(stage), count=1)
    mbarrier.wait(tiles.left, 0)
    tiles.v.index(0).reshape([Q, Q]).store(of_BC.to(dtype))
    fence_async_shared()
    gl.thread_barrier()
    mbarrier.arrive(tiles.end, count=1)


@gluon.jit
def _of_B_and_x(
    tiles, dx, D, dD, decay, document, vectors, of_vector, dB, row, chunk, group, first, heads, part, chunks, h, g, l,
    stride_Dh, stride_Dp,
    SKIP: gl.constexpr, RESET: gl.constexpr, PARTS: gl.constexpr, STAGES: gl.constexpr, Q: gl.constexpr,
    N: gl.constexpr, P: gl.constexpr,
):  # fmt: skip
    """dB and dx."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    of_x: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, P, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, layout, 2)
    rows: gl.constexpr = gl.SliceLayout(1, of_x)
    t, p = gl.arange(0, Q, layout=rows), gl.arange(0, P, layout=gl.SliceLayout(0, of_x))
    B_t, C_t = tiles.B.reshape([Q, N]), tiles.C.reshape([Q, N])
    here = document
    if RESET:
        here += (row.to(gl.int64) * chunks + chunk) * Q
    at = ((row.to(gl.int64) * h + first) * chunks + chunk) * Q
    vectors += at + 2 * of_vector
    decay += at + Q - 1
    if SKIP == 2:
        dD += ((row.to(gl.int64) * chunks + chunk) * h + first) * P
    s_end = gl.load(decay)
    zeros = gl.zeros([Q, P], gl.float32, of_x)
    total = gl.zeros([Q, N], gl.float32, layout)
    for k in range(heads):
        stage = k % STAGES
        x_t, dy_t = tiles.x.index(stage).reshape([Q, P]), tiles.dy.index(stage).reshape([Q, P])
        dstate = tiles.states.index(2 * stage + 1).reshape([P, N])
        decay += chunks * Q
        s_next = gl.load(decay, mask=k + 1 < heads, other=0.0)
        skip = 0.0
        if SKIP == 1:
            skip = gl.load(D + (first + k) * stride_Dh).to(gl.float32)
        mbarrier.wait(tiles.ready.index(stage), (k // STAGES) & 1)
        through = warpgroup_mma(B_t, dstate.permute((1, 0)), zeros, use_acc=False, is_async=True)
        weight = _to_end(tiles.decays.index(2 * stage).reshape([Q]).load(rows), s_end, here, t, Q, RESET)
        sized = weight * tiles.sizes.index(2 * stage).reshape([Q]).load(rows)
        x_w = gl.convert_layout((widen(x_t.load(of_x)) * sized[:, None]).to(x_t.dtype), operand)
        total = warpgroup_mma(x_w, dstate, total, is_async=True)
        through = warpgroup_mma_wait(1, deps=(through,))
        gl.store(vectors + t, gl.sum(widen(x_t.load(of_x)) * through, 1) * weight)
        through *= sized[:, None]
        s_end = s_next
        tma.store_wait(0)
        total = warpgroup_mma_wait(0, deps=(total,))
        gl.thread_barrier()
        mbarrier.arrive(tiles.empty.index((k + STAGES - 1) % STAGES), count=1, pred=k > 0)
        mbarrier.wait(tiles.weighed.index(stage), (k // STAGES) & 1)
        dx_t = tiles.v.index(stage)
        out = warpgroup_mma(dx_t.reshape([Q, Q]), dy_t, zeros, use_acc=False, is_async=True)
        out = warpgroup_mma_wait(0, deps=(out,))
        x_k = x_t.load(of_x).to(gl.float32)
        gl.store(vectors + of_vector + t, gl.sum(x_k * out, 1))
        out += through
        if SKIP:
            dy_k = dy_t.load(of_x).to(gl.float32)
            if SKIP == 2:
                skip = gl.load(D + (first + k) * stride_Dh + p * stride_Dp).to(gl.float32)[None, :]
                gl.store(dD + p, gl.sum(x_k * dy_k, 0))
                dD += P
            else:
                gl.store(vectors + 2 * of_vector + t, gl.sum(x_k * dy_k, 1))
            out += dy_k * skip
        vectors += chunks * Q
        mbarrier.wait(tiles.spent.index(stage), (k // STAGES) & 1)
        dx_t.reshape([Q, P]).store(out.to(dy_t.dtype))
        fence_async_shared()
        gl.thread_barrier()
        tma.async_copy_shared_to_global(dx, [row, chunk * Q, first + k, 0], dx_t)
    tma.store_wait(0)
    gl.thread_barrier()
    mbarrier.arrive(tiles.left, count=1)
    mbarrier.wait(tiles.end, 0)
    _finish_rows(dB, tiles.v.index(0).reshape([Q, Q]), C_t, total, row, chunk, group, part, l, g, PARTS, Q, N)


@gluon.jit
def _of_C(
    tiles, decay, document, vectors, dC, row, chunk, group, first, heads, part, chunks, h, g, l, end,
    RESET: gl.constexpr, LENGTHS: gl.constexpr, PARTS: gl.constexpr, STAGES: gl.constexpr, Q: gl.constexpr,
    N: gl.constexpr, P: gl.constexpr,
):  # fmt: skip
    """dC, and dy y for the gradients of decays. And the states that are made here."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    of_y: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, P, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, layout, 2)
    rows: gl.constexpr = gl.SliceLayout(1, of_y)
    t = gl.arange(0, Q, layout=rows)
    B_t, C_t = tiles.B.reshape([Q, N]), tiles.C.reshape([Q, N])
    here = document
    if RESET:
        here += (row.to(gl.int64) * chunks + chunk) * Q
    at = (row.to(gl.int64) * h + first) * chunks + chunk
    vectors += at * Q
    zeros = gl.zeros([Q, P], gl.float32, of_y)
    total = gl.zeros([Q, N], gl.float32, layout)
    mbarrier.wait(tiles.begin, 0)
    if LENGTHS:
        other = chunk + 1 - 2 * (chunk % 2)
        if gl.maximum(chunk, other) * Q + Q > end:
            zero_from(B_t, end - chunk * Q, Q, N)
            zero_from(C_t, end - chunk * Q, Q, N)
            zero_from(tiles.u.reshape([Q, N]), end - other * Q, Q, N)
            fence_async_shared()
            gl.thread_barrier()
    _make_state(tiles, decay, document, row, chunk, first, 0, chunks, h, end, RESET, LENGTHS, STAGES, Q, N, P)
    for k in range(heads):
        stage = k % STAGES
        x_t, dy_t = tiles.x.index(stage).reshape([Q, P]), tiles.dy.index(stage).reshape([Q, P])
        state = tiles.states.index(2 * stage).reshape([P, N])
        if k + 1 < heads:
            _make_state(
                tiles, decay, document, row, chunk, first + k + 1, k + 1, chunks, h, end,
                RESET, LENGTHS, STAGES, Q, N, P,
            )  # fmt: skip
        y = warpgroup_mma(C_t, state.permute((1, 0)), zeros, use_acc=False, is_async=True)
        weight = _to_start(tiles.decays.index(2 * stage).reshape([Q]).load(rows), here, t, RESET)
        dy_w = gl.convert_layout((widen(dy_t.load(of_y)) * weight[:, None]).to(dy_t.dtype), operand)
        total = warpgroup_mma(dy_w, state, total, is_async=True)
        y = warpgroup_mma_wait(1, deps=(y,))
        mbarrier.wait(tiles.weighed.index(stage), (k // STAGES) & 1)
        weights = tiles.v.index(stage).reshape([Q, Q])
        y = warpgroup_mma(weights.permute((1, 0)), x_t, y * weight[:, None], is_async=True)
        total, y = warpgroup_mma_wait(0, deps=(total, y))
        gl.store(vectors + t, gl.sum(widen(dy_t.load(of_y)) * y, 1))
        gl.thread_barrier()
        mbarrier.arrive(tiles.spent.index(stage), count=1)
        mbarrier.arrive(tiles.empty.index(stage), count=1)
        vectors += chunks * Q
    mbarrier.wait(tiles.end, 0)
    pairs = tiles.v.index(0).reshape([Q, Q]).permute((1, 0))
    _finish_rows(dC, pairs, B_t, total, row, chunk, group, part, l, g, PARTS, Q, N)


@gluon.jit
def _chunks_kernel(
    x, dy, B, C, sizes, decays, states, dx, D, decay, document, lengths, dB, dC, vectors, dD, dots,
    l, chunks, h, g, h_per_program, splits, stride_Dh, stride_Dp,
    SKIP: gl.constexpr, RESET: gl.constexpr, LENGTHS: gl.constexpr, PARTS: gl.constexpr, STAGES: gl.constexpr,
    Q: gl.constexpr, N: gl.constexpr, P: gl.constexpr,
):  # fmt: skip
    """`vectors` (5, b h, chunks q) takes of every token its parts in the gradients of decays and sizes: dy y, of its
    size from the pairs and through the state after the chunk, x dx from the pairs; and x dy.
    """
    part = gl.program_id(0)
    split, group = part % splits, part // splits % g
    chunk, row = part // (splits * g) % chunks, part // (splits * g * chunks)
    first = (group * splits + split) * h_per_program
    end = l
    if LENGTHS:
        end = gl.load(lengths + row).to(gl.int32)
    dtype: gl.constexpr = x.dtype
    tiles = _Chunk(
        gl.allocate_shared_memory(dtype, [1, Q, 1, N], B.layout),
        gl.allocate_shared_memory(dtype, [1, Q, 1, N], C.layout),
        gl.allocate_shared_memory(dtype, [1, Q, 1, N], B.layout),
        gl.allocate_shared_memory(dtype, [STAGES, 1, Q, 1, P], x.layout),
        gl.allocate_shared_memory(dtype, [STAGES, 1, Q, 1, P], x.layout),
        gl.allocate_shared_memory(dtype, [STAGES, 1, Q, 1, P], x.layout),
        gl.allocate_shared_memory(dtype, [2 * STAGES, 1, P, 1, N], states.layout),
        gl.allocate_shared_memory(gl.float32, [2 * STAGES, 1, Q], sizes.layout),
        gl.allocate_shared_memory(gl.float32, [2 * STAGES, 1, Q], decays.layout),
        gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout()),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout()),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout()),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout()),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout()),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout()),
        gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout()),
        gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout()),
    )
    mbarrier.init(tiles.begin, count=1)
    mbarrier.init(tiles.left, count=1)
    mbarrier.init(tiles.end, count=1)
    for k in gl.static_range(STAGES):
        mbarrier.init(tiles.full.index(k), count=1)
        mbarrier.init(tiles.ready.index(k), count=1)
        mbarrier.init(tiles.weighed.index(k), count=1)
        mbarrier.init(tiles.spent.index(k), count=1)
        mbarrier.init(tiles.empty.index(k), count=3)
    fence_async_shared()
    gl.thread_barrier()
    of_vector = gl.num_programs(0).to(gl.int64) // (splits * g) * h * Q  # b h chunks q
    gl.warp_specialize(
        [
            (_of_pairs, (tiles, decay, document, vectors, of_vector, dots, row, chunk, first, h_per_program, chunks, h,
                         RESET, STAGES, Q, N, P)),
            (_of_B_and_x, (tiles, dx, D, dD, decay, document, vectors, of_vector, dB, row, chunk, group, first,
                           h_per_program, part, chunks, h, g, l, stride_Dh, stride_Dp, SKIP, RESET, PARTS, STAGES,
                           Q, N, P)),
            (_of_C, (tiles, decay, document, vectors, dC, row, chunk, group, first, h_per_program, part, chunks, h, g,
                     l, end, RESET, LENGTHS, PARTS, STAGES, Q, N, P)),
            (_fetch_chunk, (tiles, x, dy, B, C, states, sizes, decays, row, chunk, group, first, h_per_program, chunks,
                            h, STAGES, Q, P)),
        ],
        [4, 4, 1],
        [168, 152, 24],
    )  # fmt: skip


@triton.jit
def _sizes_backward_kernel(
    vectors, dots, sizes, dt, dt_bias, A, lengths, ddt, parts,
    l, chunks, h, of_vector, stride_tb, stride_tl, stride_th, low, high,
    SOFTPLUS: tl.constexpr, BIAS: tl.constexpr, SKIP: tl.constexpr, LENGTHS: tl.constexpr, Q: tl.constexpr,
    BH: tl.constexpr,
):  # fmt: skip
    """The gradients of dt, A, dt_bias and one D per head from the vectors of `_chunks_kernel`, for a chunk."""
    blocks = tl.cdiv(h, BH)
    i, head = tl.program_id(0) // blocks, (tl.program_id(0) % blocks) * BH + tl.arange(0, BH)
    row, chunk = (i // chunks).to(tl.int64), i % chunks
    of_vector = of_vector.to(tl.int64)
    t = tl.arange(0, Q)
    token = chunk * Q + t
    in_h = head < h
    at = (row * h + head.to(tl.int64)[None, :]) * (chunks * Q) + token[:, None]
    mask = (token < l)[:, None] & in_h[None, :]
    end = tl.load(lengths + row).to(tl.int32) if LENGTHS else l
    real = (token < end)[:, None] & in_h[None, :]
    raw = tl.load(
        dt + (row * stride_tb + token.to(tl.int64)[:, None] * stride_tl + head[None, :] * stride_th),
        mask=real,
        other=0.0,
    ).to(tl.float32)
    if BIAS:
        raw += tl.load(dt_bias + head, mask=in_h, other=0.0).to(tl.float32)[None, :]
    step = tl.load(sizes + at, mask=in_h[None, :], other=0.0)
    ds = tl.load(vectors + at, mask=in_h[None, :], other=0.0)
    ds -= tl.load(vectors + 3 * of_vector + at, mask=in_h[None, :], other=0.0)
    ds = tl.cumsum(ds, 0, reverse=True)
    arrived = tl.load(vectors + 2 * of_vector + at, mask=in_h[None, :], other=0.0)
    dsize = tl.load(vectors + of_vector + at, mask=in_h[None, :], other=0.0) + arrived
    arrived *= step
    ds += tl.cumsum(arrived, 0) - arrived
    ds += tl.load(dots + (row * h + head) * chunks + chunk, mask=in_h, other=0.0)[None, :]
    rate = tl.load(A + head, mask=in_h, other=0.0).to(tl.float32)
    free, slope = step_size(raw, SOFTPLUS)
    slope = tl.where(real & (free >= low) & (free <= high), slope, 0.0)
    draw = (dsize + ds * rate[None, :]) * slope
    tl.store(ddt + (row * l + token)[:, None] * h + head[None, :], draw.to(ddt.dtype.element_ty), mask=mask)
    parts += i.to(tl.int64) * h + head
    of_part = tl.num_programs(0).to(tl.int64) // blocks * h
    tl.store(parts, tl.sum(ds * step, 0), mask=in_h)
    tl.store(parts + of_part, tl.sum(draw, 0), mask=in_h)
    if SKIP == 1:
        product = tl.load(vectors + 4 * of_vector + at, mask=in_h[None, :], other=0.0)
        tl.store(parts + 2 * of_part, tl.sum(product, 0), mask=in_h)


def backward(dy, dfinal, x, dt, A, B, C, D, dt_bias, initial_state, reset, lengths, dt_softplus, low, high, chunk_len):
    b, l, h, p = x.shape
    g, n = B.shape[2:]
    if x.element_size() != 2 or p != _P or n not in (64, 128) or not x.dtype == B.dtype == C.dtype:
        return portable.backward(
            dy, dfinal, x, dt, A, B, C, D, dt_bias, initial_state, reset, lengths, dt_softplus, low, high, chunk_len
        )
    dy, x, B, C = (for_tma(t) for t in (dy.to(x.dtype), x, B, C))
    with device_of(x):
        plan = portable._Plan(x, dt, A, B, D, dt_bias, reset, lengths, dt_softplus, low, high, _Q)
        sizes, decay, document = plan.decays
        chunks, processors = plan.chunks, processors_of(x)
        states = torch.empty(2 * b * triton.cdiv(chunks, 2) * h, p, 1, n, dtype=x.dtype, device=x.device)
        inputs = (
            tiles(x, _Q, p), tiles(dy, _Q, p), tiles(B, _Q, n), tiles(C, _Q, n),
            *(matrix(t.flatten(0, 1), 1, _Q) for t in (sizes, decay)), tiles(states, p, n),
        )  # fmt: skip
        begin, dinitial = portable._contiguous(initial_state), None if initial_state is None else plan.state()
        heads = 2 if h // g % 2 == 0 and 4 * b * h > 3 * processors else 1
        flags = {"RESET": reset is not None, "LENGTHS": lengths is not None, "Q": _Q, "N": n, "P": p}
        _states_kernel[(2 * b * h // heads,)](
            *inputs, decay, document, begin, portable._contiguous(dfinal), dinitial, lengths, l, chunks, h, h // g,
            INITIAL=begin is not None, HEADS=heads, STAGES=5 - heads, **flags, num_warps=4,
        )  # fmt: skip
        splits = splits_of(h // g, b * chunks * g, processors * 3 // 4)
        dx = torch.empty(b, l, h, p, dtype=x.dtype, device=x.device)
        ddt = torch.empty(b, l, h, dtype=dt.dtype, device=x.device)
        if splits == 1:
            dB, dC = (torch.empty(b, l, g, n, dtype=x.dtype, device=x.device) for _ in range(2))
        else:
            dB, dC = both = plan.empty(2, b, chunks, g, splits, _Q, n)
        skip = 0 if D is None else D.dim()
        vectors, dots = plan.empty(5 if skip == 1 else 4, b * h, chunks * _Q), plan.empty(b * h, chunks)
        parts = plan.empty(3 if skip == 1 else 2, b * chunks, h)  # of dA, dbias, dD
        dD = plan.empty(b * chunks, h, p) if skip == 2 else None
        _chunks_kernel[(b * chunks * g * splits,)](
            *inputs, tiles(dx, _Q, p), D, decay, document, lengths, dB, dC, vectors, dD, dots,
            l, chunks, h, g, h // g // splits, splits, *plan.D_strides,
            SKIP=skip, PARTS=splits > 1, STAGES=3, **flags, num_warps=4,
        )  # fmt: skip
        BH = min(portable.block(h, 1), 32)
        _sizes_backward_kernel[(b * chunks * triton.cdiv(h, BH),)](
            vectors, dots, sizes, dt, dt_bias, A, lengths, ddt, parts, l, chunks, h, vectors[0].numel(),
            *dt.stride(), low, high, SOFTPLUS=dt_softplus, BIAS=dt_bias is not None, SKIP=skip,
            LENGTHS=lengths is not None, Q=_Q, BH=BH, num_warps=4,
        )  # fmt: skip
        if splits > 1:
            both = both.sum(4).transpose(3, 4).reshape(2, b, chunks * _Q, g, n)[:, :, :l]
            dB, dC = (t.to(x.dtype) for t in both)
    dA, dbias, *of_D = torch.unbind_copy(parts.sum(1))
    dD = dD.sum(0) if skip == 2 else of_D[0] if skip else None
    grads = ((dx, x), (ddt, dt), (dA, A), (dB, B), (dC, C), (dD, D), (dbias, dt_bias))
    given = tuple(x.new_empty(0) if t is None else grad.to(t.dtype) for grad, t in grads)
    return *given, x.new_empty(0) if initial_state is None else dinitial.to(initial_state.dtype)

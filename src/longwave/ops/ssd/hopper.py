"""SSD's forward pass on Hopper: two warpgroups per head walk l, one with the state, one with the outputs.

The mathematics is that of `triton.py`. `_walk` holds the state as (p, n) in the accumulators of the product that
updates it, fetches the tiles by TMA, and puts each chunk's state, in the inputs' dtype, into shared memory. `_outputs`
makes y of that and of the pairs of tokens in the chunk, while the other is a chunk ahead. Where b h cannot fill the
GPU, segments of l are first walked for their states alone.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
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
from longwave.ops.gluon_tiles import for_tma, matrix, tiles, walk_of, zero_from
from longwave.ops.ssd import triton as portable
from longwave.ops.triton_math import LOG2E, block, device_of, processors_of, step_size
from longwave.ops.triton_segments import segments_of

_Q = 64  # tokens of a chunk: the rows of one wgmma
_P = 64  # channels of a head that a program takes


@triton.jit
def _decays_kernel(
    dt, dt_bias, A, reset, lengths, vectors, document,
    l, chunks, h, stride_b, stride_l, stride_h, stride_rb, stride_rl, low, high,
    SOFTPLUS: tl.constexpr, BIAS: tl.constexpr, RESET: tl.constexpr, LENGTHS: tl.constexpr,
    Q: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """s, the cumulative decay in powers of 2, and s - log2(dt) of each chunk: `vectors` (b, h, chunks, 2, Q)."""
    blocks = tl.cdiv(h, BH)
    i, head = tl.program_id(0) // blocks, (tl.program_id(0) % blocks) * BH + tl.arange(0, BH)
    row, chunk = (i // chunks).to(tl.int64), i % chunks
    each = tl.arange(0, Q)
    t = chunk * Q + each
    end = tl.load(lengths + row).to(tl.int32) if LENGTHS else l
    in_h = (head < h)[None, :]
    real = (t < end)[:, None] & in_h
    at = row * stride_b + t.to(tl.int64)[:, None] * stride_l + head[None, :] * stride_h
    raw = tl.load(dt + at, mask=real, other=0.0).to(tl.float32)
    if BIAS:
        raw += tl.load(dt_bias + head, mask=head < h, other=0.0).to(tl.float32)[None, :]
    size, _ = step_size(raw, SOFTPLUS)
    size = tl.where(real, tl.minimum(tl.maximum(size, low), high), 0.0)
    rate = tl.load(A + head, mask=head < h, other=0.0).to(tl.float32) * LOG2E
    s = tl.cumsum(size * rate[None, :], 0)
    to = vectors + ((row * h + head.to(tl.int64)) * chunks + chunk)[None, :] * (2 * Q) + each[:, None]
    tl.store(to, s, mask=in_h)
    tl.store(to + Q, s - tl.log2(size), mask=in_h)
    if RESET:
        begins = tl.load(reset + row * stride_rb + t.to(tl.int64) * stride_rl, mask=t < end, other=0).to(tl.int32)
        tl.store(document + row * (chunks * Q) + t, tl.cumsum(begins, 0))


@aggregate
class _Ring:
    """Tiles of the chunks under way, and what says that they are `full`, or `done` with by both."""

    x: gl.shared_memory_descriptor
    B: gl.shared_memory_descriptor
    vectors: gl.shared_memory_descriptor
    C: gl.shared_memory_descriptor
    held: gl.shared_memory_descriptor
    y: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor
    done: gl.shared_memory_descriptor
    C_full: gl.shared_memory_descriptor
    held_full: gl.shared_memory_descriptor

    @gluon.constexpr_function
    def __init__(self, x, B, vectors, C, held, y, full, done, C_full, held_full):
        self.x = x
        self.B = B
        self.vectors = vectors
        self.C = C
        self.held = held
        self.y = y
        self.full = full
        self.done = done
        self.C_full = C_full
        self.held_full = held_full


@gluon.jit
def _fetch(ring, x, B, vectors, stage, chunk, here, row, head, group, column, at, Q: gl.constexpr):
    """Start the copies of a chunk into one stage of the ring, if it is `here`."""
    nbytes: gl.constexpr = x.block_type.nbytes + B.block_type.nbytes + vectors.block_type.nbytes
    bar = ring.full.index(stage)
    mbarrier.expect(bar, nbytes, pred=here)
    tma.async_copy_global_to_shared(x, [row, chunk * Q, head, column], bar, ring.x.index(stage), pred=here)
    tma.async_copy_global_to_shared(B, [row, chunk * Q, group, 0], bar, ring.B.index(stage), pred=here)
    tma.async_copy_global_to_shared(vectors, [at + chunk, 0], bar, ring.vectors.index(stage), pred=here)


@gluon.jit
def _walk(
    ring, x, B, vectors, decay_end, document, initial, ends, totals, final,
    row, head, group, column, bh, first, stop, chunks, segment, segments, end,
    OUTPUT: gl.constexpr, INITIAL: gl.constexpr, RESET: gl.constexpr, LENGTHS: gl.constexpr, STAGES: gl.constexpr,
    Q: gl.constexpr, N: gl.constexpr, P: gl.constexpr, BP: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = ring.x.dtype
    of_state: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, of_state, 2)
    j_operand: gl.constexpr = gl.SliceLayout(0, operand)
    at = (bh * chunks).to(gl.int32)
    for k in gl.static_range(STAGES - 1):
        _fetch(ring, x, B, vectors, k, first + k, first + k < stop, row, head, group, column, at, Q)
    i_p = gl.arange(0, BP, layout=gl.SliceLayout(1, of_state))
    i_n = gl.arange(0, N, layout=gl.SliceLayout(0, of_state))
    cell = (column + i_p)[:, None] * N + i_n[None, :]
    state = gl.zeros([BP, N], gl.float32, of_state)
    if INITIAL and OUTPUT:
        state = gl.load(initial + bh * (P * N) + cell)
    if OUTPUT and ends is not None:
        for k in range(segment):
            before = bh * segments + k
            state = state * gl.load(totals + before) + gl.load(ends + before * (P * N) + cell)
    t_j = gl.arange(0, Q, layout=j_operand)
    decay_end += bh * chunks * (2 * Q) + Q - 1
    s_end = gl.load(decay_end + first * (2 * Q))
    total = 1.0
    for chunk in range(first, stop):
        step = chunk - first
        stage = step % STAGES
        x_t = ring.x.index(stage).reshape([Q, BP])
        B_t = ring.B.index(stage).reshape([Q, N])
        if LENGTHS:
            mbarrier.wait(ring.full.index(stage), (step // STAGES) & 1)
            if chunk * Q + Q > end:
                zero_from(x_t, end - chunk * Q, Q, BP)
                zero_from(B_t, end - chunk * Q, Q, N)
        if OUTPUT:
            ring.held.index(step % 2).store(state.to(dtype))
        if OUTPUT or LENGTHS:
            fence_async_shared()
            gl.thread_barrier()
        if OUTPUT:
            mbarrier.arrive(ring.held_full.index(step % 2), count=1)
        later = step + STAGES - 1  # takes the stage of the chunk before this one
        mbarrier.wait(ring.done.index(later % STAGES), ((later // STAGES) & 1) ^ 1)
        _fetch(
            ring, x, B, vectors, later % STAGES, first + later, first + later < stop, row, head, group, column, at, Q
        )
        s_next = gl.load(decay_end + gl.minimum(chunk + 1, chunks - 1) * (2 * Q))
        if not LENGTHS:
            mbarrier.wait(ring.full.index(stage), (step // STAGES) & 1)
        whole = exp2(s_end)
        to_end = exp2(s_end - ring.vectors.index(stage).reshape([2 * Q]).slice(Q, Q).load(j_operand))
        if RESET:
            here = document + chunk * Q
            n_j, last = gl.load(here + t_j), gl.load(here + Q - 1)
            to_end = gl.where(n_j == last, to_end, 0.0)
            whole = gl.where(last == 0, whole, 0.0)
        x_k = (widen(x_t.permute((1, 0)).load(operand)) * to_end[None, :]).to(dtype)  # (p, j)
        state = warpgroup_mma(x_k, B_t, state * whole, is_async=True)
        state = warpgroup_mma_wait(0, deps=(state,))
        total *= whole
        s_end = s_next
        gl.thread_barrier()
        mbarrier.arrive(ring.done.index(stage), count=1)
    if OUTPUT:
        if segment == segments - 1:
            gl.store(final + bh * (P * N) + cell, state)
    else:
        gl.store(ends + (bh * segments + segment) * (P * N) + cell, state)
        gl.store(totals + bh * segments + segment, total)


@gluon.jit
def _outputs(
    ring, C, y, D, document, row, head, group, column, first, stop, end, stride_Dh, stride_Dp,
    RESET: gl.constexpr, LENGTHS: gl.constexpr, STAGES: gl.constexpr, ALONE: gl.constexpr,
    Q: gl.constexpr, N: gl.constexpr, BP: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = ring.x.dtype
    of_pairs: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BP, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, of_pairs, 2)
    i_rows: gl.constexpr = gl.SliceLayout(1, of_pairs)
    j_columns: gl.constexpr = gl.SliceLayout(0, of_pairs)
    mbarrier.expect(ring.C_full, C.block_type.nbytes)
    tma.async_copy_global_to_shared(C, [row, first * Q, group, 0], ring.C_full, ring.C)
    if D is not None:
        i_p = column + gl.arange(0, BP, layout=j_columns)
        skip = gl.load(D + head * stride_Dh + i_p * stride_Dp).to(gl.float32)
    t_i, t_j = gl.arange(0, Q, layout=i_rows), gl.arange(0, Q, layout=j_columns)
    for chunk in range(first, stop):
        step = chunk - first
        stage = step % STAGES
        x_t = ring.x.index(stage).reshape([Q, BP])
        B_t = ring.B.index(stage).reshape([Q, N])
        C_t = ring.C.reshape([Q, N])
        mbarrier.wait(ring.C_full, step & 1)
        more = chunk + 1 < stop
        if ALONE:  # there are registers for it
            C_t = C_t.load(operand)
            gl.thread_barrier()
            mbarrier.expect(ring.C_full, C.block_type.nbytes, pred=more)
            tma.async_copy_global_to_shared(C, [row, (chunk + 1) * Q, group, 0], ring.C_full, ring.C, pred=more)
        mbarrier.wait(ring.full.index(stage), (step // STAGES) & 1)
        if LENGTHS:  # the other warpgroup has put zeros into the tiles
            mbarrier.wait(ring.held_full.index(step % 2), (step // 2) & 1)
        zero = gl.zeros([Q, Q], gl.float32, of_pairs)
        pairs = warpgroup_mma(C_t, B_t.permute((1, 0)), zero, use_acc=False, is_async=True)
        if not LENGTHS:
            mbarrier.wait(ring.held_full.index(step % 2), (step // 2) & 1)
        zero = gl.zeros([Q, BP], gl.float32, of_pairs)
        through = warpgroup_mma(C_t, ring.held.index(step % 2).permute((1, 0)), zero, use_acc=False, is_async=True)
        vectors = ring.vectors.index(stage).reshape([2 * Q])
        s_i, s_j = vectors.slice(0, Q).load(i_rows), vectors.slice(Q, Q).load(j_columns)
        from_start = exp2(s_i)
        seen = t_i[:, None] >= t_j[None, :]
        if RESET:
            here = document + chunk * Q
            n_i, n_j = gl.load(here + t_i), gl.load(here + t_j)
            seen = seen & (n_i[:, None] == n_j[None, :])
            from_start = gl.where(n_i == 0, from_start, 0.0)
        factor = exp2(gl.where(seen, s_i[:, None] - s_j[None, :], -float("inf")))
        pairs, through = warpgroup_mma_wait(0, deps=(pairs, through))
        if not ALONE:
            gl.thread_barrier()
            mbarrier.expect(ring.C_full, C.block_type.nbytes, pred=more)
            tma.async_copy_global_to_shared(C, [row, (chunk + 1) * Q, group, 0], ring.C_full, ring.C, pred=more)
        weights = gl.convert_layout((pairs * factor).to(dtype), operand)
        out = through * from_start[:, None]
        if D is not None:
            out += widen(x_t.load(of_pairs)) * skip[None, :]
        out = warpgroup_mma(weights, x_t, out, is_async=True)
        tma.store_wait(0)
        out = warpgroup_mma_wait(0, deps=(out,))
        gl.thread_barrier()
        mbarrier.arrive(ring.done.index(stage), count=1)
        if LENGTHS:
            out = gl.where((chunk * Q + t_i < end)[:, None], out, 0.0)
        ring.y.reshape([Q, BP]).store(out.to(dtype))
        fence_async_shared()
        gl.thread_barrier()
        tma.async_copy_shared_to_global(y, [row, chunk * Q, head, column], ring.y)
    tma.store_wait(0)


@gluon.jit
def _forward_kernel(
    x, B, C, y, vectors, decay_end, D, document, initial, ends, totals, final, lengths,
    l, chunks, h, h_per_g, per_segment, segments, stride_Dh, stride_Dp,
    OUTPUT: gl.constexpr, INITIAL: gl.constexpr, RESET: gl.constexpr, LENGTHS: gl.constexpr,
    STAGES: gl.constexpr, ALONE: gl.constexpr, REGISTERS: gl.constexpr,
    Q: gl.constexpr, N: gl.constexpr, P: gl.constexpr, BP: gl.constexpr,
):  # fmt: skip
    """y and the final state.

    Without OUTPUT only what each segment of l but the last makes of nothing, its state and its decay: `ends` (b, h,
    segments, p, n) and `totals` (b, h, segments), from which each segment then makes the state that it begins with.
    """
    dtype: gl.constexpr = x.dtype
    WALKERS: gl.constexpr = 2 if OUTPUT else 1
    taken = segments
    if not OUTPUT:
        taken = segments - 1
    block, bh, segment, row, head, group, first, stop, end = walk_of(
        h, h_per_g, taken, per_segment, chunks, l, lengths, P // BP, LENGTHS
    )
    column = block * BP
    if RESET:
        document += row.to(gl.int64) * chunks * Q
    bar: gl.constexpr = mbarrier.MBarrierLayout()
    ring = _Ring(
        gl.allocate_shared_memory(dtype, [STAGES, 1, Q, 1, BP], x.layout),
        gl.allocate_shared_memory(dtype, [STAGES, 1, Q, 1, N], B.layout),
        gl.allocate_shared_memory(gl.float32, [STAGES, 1, 2 * Q], vectors.layout),
        gl.allocate_shared_memory(dtype, [1, Q, 1, N], C.layout),
        gl.allocate_shared_memory(dtype, [2, BP, N], gl.NVMMASharedLayout.get_default_for([BP, N], dtype)),
        gl.allocate_shared_memory(dtype, [1, Q, 1, BP], y.layout),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar),
        gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar),
        gl.allocate_shared_memory(gl.int64, [1], bar),
        gl.allocate_shared_memory(gl.int64, [2, 1], bar),
    )
    for k in gl.static_range(STAGES):
        mbarrier.init(ring.full.index(k), count=1)
        mbarrier.init(ring.done.index(k), count=WALKERS)
    mbarrier.init(ring.C_full, count=1)
    for k in gl.static_range(2):
        mbarrier.init(ring.held_full.index(k), count=1)
    fence_async_shared()
    gl.thread_barrier()
    if OUTPUT:
        gl.warp_specialize(
            [
                (_outputs, (ring, C, y, D, document, row, head, group, column, first, stop, end, stride_Dh, stride_Dp,
                            RESET, LENGTHS, STAGES, ALONE, Q, N, BP)),
                (_walk, (ring, x, B, vectors, decay_end, document, initial, ends, totals, final, row, head, group,
                         column, bh, first, stop, chunks, segment, segments, end, True, INITIAL, RESET, LENGTHS, STAGES,
                         Q, N, P, BP)),
            ],
            [4],
            [REGISTERS],
        )  # fmt: skip
    else:
        _walk(
            ring, x, B, vectors, decay_end, document, initial, ends, totals, final, row, head, group,
            column, bh, first, stop, chunks, segment, segments, end, False, INITIAL, RESET, LENGTHS, STAGES,
            Q, N, P, BP,
        )  # fmt: skip


_SEGMENT_CHUNKS = 8  # fewer than this in a segment of l are not worth the second pass over them
_SEGMENTS = 3  # and less segments than this not either


def forward(x, dt, A, B, C, D, dt_bias, initial_state, reset, lengths, dt_softplus, low, high, chunk_len):
    b, l, h, p = x.shape
    g, n = B.shape[2:]
    alike = x.element_size() == 2 and x.dtype == B.dtype == C.dtype
    if not alike or p % _P or n not in (64, 128) or low < 0:  # a negative step size has no logarithm
        arguments = (dt_softplus, low, high, chunk_len)
        return portable.forward(x, dt, A, B, C, D, dt_bias, initial_state, reset, lengths, *arguments)
    x, B, C = (for_tma(t) for t in (x, B, C))
    chunks, blocks, processors = triton.cdiv(l, _Q), p // _P, processors_of(x)
    given = {"RESET": reset is not None, "LENGTHS": lengths is not None}

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=x.device)

    with device_of(x):
        vectors = empty(b * h * chunks, 2 * _Q)
        document = None if reset is None else empty(b, chunks * _Q, dtype=torch.int32)
        BH = min(block(h, 1), 32)
        _decays_kernel[(b * chunks * triton.cdiv(h, BH),)](
            dt, dt_bias, A, reset, lengths, vectors, document, l, chunks, h,
            *dt.stride(), *((0, 0) if reset is None else reset.stride()), low, high,
            SOFTPLUS=dt_softplus, BIAS=dt_bias is not None, **given, Q=_Q, BH=BH, num_warps=4,
        )  # fmt: skip
        segments = segments_of(b * h * blocks, 2 * processors, chunks, _SEGMENT_CHUNKS, pays=_SEGMENTS)
        per_segment = triton.cdiv(chunks, segments)
        segments = triton.cdiv(chunks, per_segment)
        y, final = empty(b, l, h, p, dtype=x.dtype), empty(b, h, p, n)
        ends, totals = (empty(b, h, segments, p, n), empty(b, h, segments)) if segments > 1 else (None, None)
        for output in (False, True) if segments > 1 else (True,):
            programs = b * h * blocks * (segments if output else segments - 1)
            if not output:
                how = {"STAGES": 3, "ALONE": False, "REGISTERS": 0}
            elif programs > processors:  # two programs share one
                how = {"STAGES": 2, "ALONE": False, "REGISTERS": 112, "maxnreg": 128}
            else:
                how = {"STAGES": 4, "ALONE": True, "REGISTERS": 152}
            _forward_kernel[(programs,)](
                tiles(x, _Q, _P), tiles(B, _Q, n), tiles(C, _Q, n), tiles(y, _Q, _P),
                matrix(vectors, 1, 2 * _Q), vectors, D, document,
                portable._contiguous(initial_state), ends, totals, final, lengths,
                l, chunks, h, h // g, per_segment, segments, *portable._skip_strides(D),
                OUTPUT=output, INITIAL=initial_state is not None, **given, Q=_Q, N=n, P=p, BP=_P, num_warps=4,
                **how,
            )  # fmt: skip
    return y, final

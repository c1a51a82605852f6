"""SSD's forward pass on Hopper: one warpgroup per head walks l; tiles come by TMA, products are asynchronous wgmma.

The mathematics is that of `triton.py`. The state is held as (p, n) in the accumulators of the product that updates it,
and goes through shared memory in the inputs' dtype once per chunk, as an operand of C h. While a chunk is worked on the
tiles of the next are on their way.
"""

import torch
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
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from longwave.ops.ssd import triton as portable
from longwave.ops.triton_math import device_of

_Q = 64  # tokens of a chunk: the rows of one wgmma
_P = 64  # channels of a head that a program takes


@gluon.jit
def _zero_from(tile, count, ROWS: gl.constexpr, COLUMNS: gl.constexpr):
    """Zero the rows of a tile in shared memory from `count` on."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    t = gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    value = tile.load(layout)
    tile.store(gl.where((t < count)[:, None], value, gl.zeros([ROWS, COLUMNS], value.dtype, layout)))


@gluon.jit
def _fetch(
    x, B, C, sizes, decay, x_tiles, B_tiles, C_tiles, size_rows, decay_rows, bars,
    stage, chunk, here, row, head, h, group, column, Q: gl.constexpr,
):  # fmt: skip
    """Start the copies of a chunk into one stage of the ring, if it is `here`."""
    bar = bars.index(stage)
    nbytes: gl.constexpr = (
        x.block_type.nbytes
        + B.block_type.nbytes
        + C.block_type.nbytes
        + sizes.block_type.nbytes
        + decay.block_type.nbytes
    )
    mbarrier.expect(bar, nbytes, pred=here)
    tma.async_copy_global_to_shared(x, [row, chunk * Q, head, column], bar, x_tiles.index(stage), pred=here)
    tma.async_copy_global_to_shared(B, [row, chunk * Q, group, 0], bar, B_tiles.index(stage), pred=here)
    tma.async_copy_global_to_shared(C, [row, chunk * Q, group, 0], bar, C_tiles.index(stage), pred=here)
    tma.async_copy_global_to_shared(sizes, [row * h + head, chunk * Q], bar, size_rows.index(stage), pred=here)
    tma.async_copy_global_to_shared(decay, [row * h + head, chunk * Q], bar, decay_rows.index(stage), pred=here)


@gluon.jit
def _forward_kernel(
    x, B, C, D, sizes, decay, decay_end, document, initial, y, final, lengths,
    l, chunks, h, h_per_g, per_segment, segments, stride_Dh, stride_Dp,
    INITIAL: gl.constexpr, FINAL: gl.constexpr, SKIP: gl.constexpr, RESET: gl.constexpr, LENGTHS: gl.constexpr,
    Q: gl.constexpr, N: gl.constexpr, P: gl.constexpr, BP: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = x.dtype
    of_pairs: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BP, 16])
    of_state: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, N, 16])
    pairs_operand: gl.constexpr = gl.DotOperandLayout(0, of_pairs, 2)
    state_operand: gl.constexpr = gl.DotOperandLayout(0, of_state, 2)
    i_rows: gl.constexpr = gl.SliceLayout(1, of_pairs)
    j_columns: gl.constexpr = gl.SliceLayout(0, of_pairs)
    j_operand: gl.constexpr = gl.SliceLayout(0, state_operand)
    wide: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])

    blocks: gl.constexpr = P // BP
    program = gl.program_id(0).to(gl.int64)
    p_block = (program % blocks).to(gl.int32)
    bh, segment = program // blocks // segments, (program // blocks % segments).to(gl.int32)
    row, head = (bh // h).to(gl.int32), (bh % h).to(gl.int32)
    group = head // h_per_g
    first = segment * per_segment
    stop = gl.minimum(first + per_segment, chunks)
    end = l
    if LENGTHS:
        end = gl.load(lengths + row).to(gl.int32)

    x_tiles = gl.allocate_shared_memory(dtype, [2, 1, Q, 1, BP], x.layout)
    B_tiles = gl.allocate_shared_memory(dtype, [2, 1, Q, 1, N], B.layout)
    C_tiles = gl.allocate_shared_memory(dtype, [2, 1, Q, 1, N], C.layout)
    held_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BP, N], dtype)
    held = gl.allocate_shared_memory(dtype, [BP, N], held_layout)
    size_rows = gl.allocate_shared_memory(gl.float32, [2, 1, Q], sizes.layout)
    decay_rows = gl.allocate_shared_memory(gl.float32, [2, 1, Q], decay.layout)
    bars = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for k in gl.static_range(2):
        mbarrier.init(bars.index(k), count=1)
    for k in gl.static_range(2):
        _fetch(
            x, B, C, sizes, decay, x_tiles, B_tiles, C_tiles, size_rows, decay_rows, bars,
            k, first + k, first + k < stop, row, head, h, group, p_block * BP, Q,
        )  # fmt: skip

    i_p = gl.arange(0, BP, layout=gl.SliceLayout(1, of_state))
    i_n = gl.arange(0, N, layout=gl.SliceLayout(0, of_state))
    cell = (bh * segments + segment) * (P * N) + (p_block * BP + i_p)[:, None] * N + i_n[None, :]
    state = gl.zeros([BP, N], gl.float32, of_state)
    if INITIAL:
        state = gl.load(initial + cell)
    skip = gl.zeros([BP], gl.float32, gl.SliceLayout(0, of_pairs))
    if SKIP:
        i_y = gl.arange(0, BP, layout=gl.SliceLayout(0, of_pairs))
        skip = gl.load(D + head * stride_Dh + (p_block * BP + i_y) * stride_Dp).to(gl.float32)

    t_i = gl.arange(0, Q, layout=i_rows)
    t_j = gl.arange(0, Q, layout=j_columns)
    t_k = gl.arange(0, Q, layout=j_operand)
    decay_end += bh * chunks * Q + Q - 1
    s_end = gl.load(decay_end + first * Q)
    row_base = row.to(gl.int64) * chunks * Q
    y_p = gl.arange(0, BP, layout=gl.SliceLayout(0, wide))
    y_t = gl.arange(0, Q, layout=gl.SliceLayout(1, wide))
    y += (row.to(gl.int64) * l * h + head) * P + p_block * BP

    for chunk in range(first, stop):
        stage = (chunk - first) % 2
        held.store(state.to(dtype))
        x_t = x_tiles.index(stage).reshape([Q, BP])
        B_t = B_tiles.index(stage).reshape([Q, N])
        C_t = C_tiles.index(stage).reshape([Q, N])
        mbarrier.wait(bars.index(stage), ((chunk - first) // 2) & 1)
        if LENGTHS:
            if chunk * Q + Q > end:
                _zero_from(x_t, end - chunk * Q, Q, BP)
                _zero_from(B_t, end - chunk * Q, Q, N)
                _zero_from(C_t, end - chunk * Q, Q, N)
        fence_async_shared()
        gl.thread_barrier()
        pairs = warpgroup_mma(
            C_t, B_t.permute((1, 0)), gl.zeros([Q, Q], gl.float32, of_pairs), use_acc=False, is_async=True
        )
        through = warpgroup_mma(
            C_t, held.permute((1, 0)), gl.zeros([Q, BP], gl.float32, of_pairs), use_acc=False, is_async=True
        )

        s, size = decay_rows.index(stage).reshape([Q]), size_rows.index(stage).reshape([Q])
        s_i, s_j, s_k = s.load(i_rows), s.load(j_columns), s.load(j_operand)
        from_start, to_end, whole = gl.exp2(s_i), gl.exp2(s_end - s_k), gl.exp2(s_end)
        s_end = gl.load(decay_end + gl.minimum(chunk + 1, chunks - 1) * Q)
        seen = t_i[:, None] >= t_j[None, :]
        if RESET:
            row_at = row_base + chunk * Q
            n_i, n_j = gl.load(document + row_at + t_i), gl.load(document + row_at + t_j)
            n_k, last = gl.load(document + row_at + t_k), gl.load(document + row_at + Q - 1)
            from_start = gl.where(n_i == 0, from_start, 0.0)
            to_end = gl.where(n_k == last, to_end, 0.0)
            whole = gl.where(last == 0, whole, 0.0)
            seen = seen & (n_i[:, None] == n_j[None, :])
        x_k = x_t.permute((1, 0)).load(state_operand)  # (p, j)
        x_k = (x_k.to(gl.float32) * (to_end * size.load(j_operand))[None, :]).to(dtype)
        factor = gl.exp2(gl.where(seen, s_i[:, None] - s_j[None, :], -float("inf"))) * size.load(j_columns)[None, :]
        pairs, through = warpgroup_mma_wait(0, deps=(pairs, through))
        weights = gl.convert_layout((pairs * factor).to(dtype), pairs_operand)
        out = through * from_start[:, None]
        if SKIP:
            out += x_t.load(of_pairs).to(gl.float32) * skip[None, :]
        out = warpgroup_mma(weights, x_t, out, is_async=True)
        state = warpgroup_mma(x_k, B_t, state * whole, is_async=True)
        out, state = warpgroup_mma_wait(0, deps=(out, state))
        gl.thread_barrier()
        _fetch(
            x, B, C, sizes, decay, x_tiles, B_tiles, C_tiles, size_rows, decay_rows, bars,
            stage, chunk + 2, chunk + 2 < stop, row, head, h, group, p_block * BP, Q,
        )  # fmt: skip
        token = chunk * Q + y_t
        out_t = gl.convert_layout(out.to(dtype), wide)
        gl.store(y + token.to(gl.int64)[:, None] * (h * P) + y_p[None, :], out_t, mask=(token < l)[:, None])
    for k in gl.static_range(2):
        mbarrier.invalidate(bars.index(k))
    if FINAL:
        gl.store(final + cell, state)


def forward(x, dt, A, B, C, D, dt_bias, initial_state, reset, lengths, dt_softplus, low, high, chunk_len):
    b, l, h, p = x.shape
    n = B.shape[-1]
    arguments = (dt_softplus, low, high, chunk_len)
    if x.element_size() != 2 or p % _P or n not in (64, 128) or x.dtype != B.dtype or x.dtype != C.dtype:
        return portable.forward(x, dt, A, B, C, D, dt_bias, initial_state, reset, lengths, *arguments)
    x, B, C = (_for_tma(t) for t in (x, B, C))
    with device_of(x):
        plan = portable._Plan(x, dt, A, B, D, dt_bias, reset, lengths, dt_softplus, low, high, _Q)
        sizes, decay, document = plan.decays
        y = torch.empty(b, l, h, p, dtype=x.dtype, device=x.device)
        begins, final = portable._contiguous(initial_state), plan.state()
        if plan.segments > 1:
            begins, final = plan.segment_states(B, x, begins, reverse=False)
        _forward_kernel[(b * h * plan.segments * (p // _P),)](
            _tiles(x, _P), _tiles(B, n), _tiles(C, n), D, _rows(sizes), _rows(decay), decay, document, begins, y, final,
            lengths,
            l, plan.chunks, h, plan.h_per_g, plan.per_segment, plan.segments, *plan.D_strides,
            INITIAL=begins is not None, FINAL=plan.segments == 1, SKIP=D is not None, RESET=reset is not None,
            LENGTHS=lengths is not None, Q=_Q, N=n, P=p, BP=_P, num_warps=4,
        )  # fmt: skip
    return y, final


def _for_tma(t: Tensor) -> Tensor:
    """`t`, or a copy where its address or strides are not multiples of 16 bytes."""
    aligned = t.data_ptr() % 16 == 0 and all(stride * t.element_size() % 16 == 0 for stride in t.stride()[:-1])
    return t if aligned and t.stride(-1) == 1 else t.contiguous()


def _tiles(t: Tensor, columns: int) -> TensorDescriptor:
    """Boxes of one chunk of (b, l, h, p)."""
    block = [1, _Q, 1, columns]
    layout = gl.NVMMASharedLayout.get_default_for(
        block, {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}[t.dtype]
    )
    return TensorDescriptor.from_tensor(t, block, layout)


def _rows(t: Tensor) -> TensorDescriptor:
    """Runs of one chunk of (b, h, tokens) float32."""
    return TensorDescriptor.from_tensor(t.flatten(0, 1), [1, _Q], gl.NVMMASharedLayout(0, 32, 2))

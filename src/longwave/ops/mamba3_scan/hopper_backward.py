"""The backward pass of Mamba-3's scan on Hopper, for one rank: states forward, gradients back, all chunks at once.

The mathematics is that of `triton.py`. Two kernels walk l, of B and x forwards, of C and dy backwards, and store in the
inputs' dtype what each chunk is given; the second applies the gate to dy first. In the third, programs take a
chunk and go over the heads of a group: for dx, for dB, and for dC. Angles' gradients are added up there, too.

dt A has the gradient sum_{i >= t} (q_i . dq_i - k_i . dk_i) within the chunk and <H_end, dH_end>. As pairs of tokens
cancel there, and in the gradients of the angles, q and k are taken as they were rounded for the matrix products.
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

from longwave.ops.gluon_math import widen
from longwave.ops.gluon_tiles import for_tma, matrix, swizzled, tiles, zero_from
from longwave.ops.mamba3_scan import triton as portable
from longwave.ops.mamba3_scan.hopper_tiles import (
    OF_BIAS,
    OPERAND,
    PAIR,
    SUM,
    TURN,
    TURNED,
    WARPS,
    WIDE,
    N,
    Q,
    back_of,
    barriers,
    biased,
    circle_of,
    discard,
    expect,
    fetch_angles,
    fetch_tile,
    front_of,
    pairs_of,
    scattered,
    turned_by,
    vectors_of,
    wait_for,
)
from longwave.ops.mamba3_scan.reference import rotated
from longwave.ops.triton_math import device_of
from longwave.ops.triton_segments import splits_of


@gluon.jit
def _fetch_step(
    u, v, z, raw, before, phases, bases, vectors, u_tile, v_tile, z_tile, raw_tile, before_tile, phase, base, vector,
    bars, chunk, row, head, bh, group, chunks, pred, GATE: gl.constexpr, REVERSE: gl.constexpr,
):  # fmt: skip
    start = chunk * Q
    if GATE:
        expect(bars, (phases, bases, vectors, u, v, before, z, raw), pred)
    elif REVERSE:
        expect(bars, (phases, bases, vectors, u, v, before), pred)
    else:
        expect(bars, (phases, bases, vectors, u, v), pred)
    fetch_angles(phases, bases, vectors, phase, base, vector, bars, chunk, bh, chunks, pred)
    fetch_tile(u, u_tile, bars[3], row, start, group, pred)
    fetch_tile(v, v_tile, bars[4], row, start, head, pred)
    if REVERSE:
        at = (bh * (chunks + 1) + chunk + 1) * Q
        tma.async_copy_global_to_shared(before, [at, 0], bars[5], before_tile, pred=pred)
    if GATE:
        fetch_tile(z, z_tile, bars[6], row, start, head, pred)
        fetch_tile(raw, raw_tile, bars[7], row, start, head, pred)


@gluon.jit
def _gate(dy_tile, z_tile, raw_tile, dy_to, dz_to, count, LENGTHS: gl.constexpr):
    """dy silu(z) and dz of a chunk."""
    dtype: gl.constexpr = dy_tile.dtype
    z, dy, raw = z_tile.load(WIDE).to(gl.float32), dy_tile.load(WIDE).to(gl.float32), raw_tile.load(WIDE).to(gl.float32)
    share = 0.5 + 0.5 * gl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [z * 0.5], gl.float32, True, 1)
    dz, dy = dy * raw * share * (1.0 + z * (1.0 - share)), dy * z * share
    if LENGTHS:
        real = (gl.arange(0, Q, layout=gl.SliceLayout(1, WIDE)) < count)[:, None]
        dz, dy = gl.where(real, dz, 0.0), gl.where(real, dy, 0.0)
    dz_to.store(dz.to(dtype))
    dy_to.store(dy.to(dtype))


@gluon.jit
def _entry(ssm, early, k, v, bh, cell, i_p, i_n):
    """The state before the first token, with what that takes from the token before it."""
    bh = bh.to(gl.int64)
    k_t, v_t = gl.load(k + bh * N + i_n).to(gl.float32), gl.load(v + bh * Q + i_p).to(gl.float32)
    return gl.load(ssm + bh * (Q * N) + cell) + (gl.load(early + bh) * v_t)[:, None] * k_t[None, :]


@gluon.jit
def _states_kernel(
    u, v, z, raw, before, gated, dz, states, phases, vectors, bias, bases, decay, document, lengths,
    initial, ssm, early, k_before, v_before, total, crossed, dssm, dearly, dk, dv, turned_first,
    l, chunks, h, h_per_g, S,
    REVERSE: gl.constexpr, GATE: gl.constexpr, BIAS: gl.constexpr, RESET: gl.constexpr, LENGTHS: gl.constexpr,
):  # fmt: skip
    """The state (p, n) through the chunks, of B and x; reversed its gradient, of C and dy, which is gated first.

    `states` takes what each chunk is given, forwards also the last one. Reversed, `total` (b, h, chunks) and `crossed`
    (b, h, chunks, s) are <H_end, dH_end> and X(H_end, dH_end), of the states `before` that were stored. What the first
    token takes from the one before it is part of the state there: at the end the gradients of both, and X of it.
    """
    dtype: gl.constexpr = v.dtype
    short: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, 64], dtype)
    long: gl.constexpr = states.layout
    bh = gl.program_id(0)
    row, head = bh // h, bh % h
    group = head // h_per_g
    u_tile = gl.allocate_shared_memory(dtype, [Q, N], long)
    turned = gl.allocate_shared_memory(dtype, [Q, N], long)
    held = gl.allocate_shared_memory(dtype, [Q, N], long)
    v_tile = gl.allocate_shared_memory(dtype, [Q, Q], short)
    z_tile, raw_tile, gated_tile, dz_tile, before_tile = v_tile, v_tile, v_tile, v_tile, held
    if GATE:
        z_tile = gl.allocate_shared_memory(dtype, [Q, Q], short)
        raw_tile = gl.allocate_shared_memory(dtype, [Q, Q], short)
        gated_tile = gl.allocate_shared_memory(dtype, [Q, Q], short)
        dz_tile = gl.allocate_shared_memory(dtype, [Q, Q], short)
    if REVERSE:
        before_tile = gl.allocate_shared_memory(dtype, [Q, N], long)
    phase = gl.allocate_shared_memory(gl.int16, [Q, TURNED], phases.layout)
    vector = gl.allocate_shared_memory(gl.float32, [4, 1, Q], gl.NVMMASharedLayout(0, 32, 2))
    base = gl.allocate_shared_memory(gl.float32, [1, TURNED], bases.layout)
    offset = base
    if BIAS:
        offset = gl.allocate_shared_memory(gl.float32, [1, N], bias.layout)
    once = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(once, count=1)
    bars = barriers()
    if BIAS:
        expect((once,), (bias,), True)
        tma.async_copy_global_to_shared(bias, [head, 0], once, offset)
    first = chunks - 1 if REVERSE else 0
    _fetch_step(
        u, v, z, raw, before, phases, bases, vectors,
        u_tile, v_tile, z_tile, raw_tile, before_tile, phase, base, vector,
        bars, first, row, head, bh, group, chunks, True, GATE, REVERSE,
    )  # fmt: skip
    end = l
    if LENGTHS:
        end = gl.load(lengths + row).to(gl.int32)
    i_p, i_n = gl.arange(0, Q, layout=gl.SliceLayout(1, SUM)), gl.arange(0, N, layout=gl.SliceLayout(0, SUM))
    cell = i_p[:, None] * N + i_n[None, :]
    wide_bh = bh.to(gl.int64)
    if REVERSE:
        state = gl.load(initial + wide_bh * (Q * N) + cell)
    else:
        state = _entry(ssm, early, k_before, v_before, bh, cell, i_p, i_n)
    pair = gl.arange(0, TURNED, layout=gl.SliceLayout(0, PAIR))
    t_pair = gl.arange(0, Q, layout=gl.SliceLayout(1, PAIR))
    k_t: gl.constexpr = gl.SliceLayout(0, OPERAND)
    t_k = gl.arange(0, Q, layout=k_t)
    decay += bh.to(gl.int64) * chunks * Q
    row_at = row.to(gl.int64) * chunks * Q

    if BIAS:
        mbarrier.wait(once, 0)
    for k in range(chunks):
        chunk = chunks - 1 - k if REVERSE else k
        start = chunk * Q
        s_end = gl.load(decay + start + Q - 1)
        whole = gl.exp2(s_end)
        tma.store_wait(0)
        gl.thread_barrier()
        wait_for(bars, (8 if GATE else 6) if REVERSE else 5, k & 1)
        rounded = state.to(dtype)
        held.store(rounded)
        if REVERSE:
            ended, rounded = widen(before_tile.load(SUM)), rounded.to(gl.float32)
            h_1, h_2, _ = pairs_of(ended)
            d_1, d_2, _ = pairs_of(rounded)
            cross = gl.sum(h_1 * d_2 - h_2 * d_1, 0)
            gl.store(crossed + (bh * chunks + chunk).to(gl.int64) * S + pair, cross, mask=pair < S)
            gl.store(total + bh * chunks + chunk, gl.sum(gl.sum(ended * rounded, 1), 0))
        if LENGTHS:
            if start + Q > end:
                zero_from(u_tile, end - start, Q, N)
                if not GATE:
                    zero_from(v_tile, end - start, Q, Q)
        number = t_pair
        if RESET:
            number = gl.load(document + row_at + start + t_pair)
        circle = circle_of(phase, base, number, RESET)
        turned.store(turned_by(biased(u_tile, offset, BIAS), circle, False).to(dtype))
        if GATE:
            _gate(v_tile, z_tile, raw_tile, gated_tile, dz_tile, end - start, LENGTHS)
        s = vector.index(2).reshape([Q]).load(k_t)
        scale = gl.exp2(s if REVERSE else s_end - s)
        if not REVERSE:
            scale *= vector.index(1).reshape([Q]).load(k_t)
        if RESET:
            n_k, last = gl.load(document + row_at + start + t_k), gl.load(document + row_at + start + Q - 1)
            scale = gl.where(n_k == (0 if REVERSE else last), scale, 0.0)
            whole = gl.where(last == 0, whole, 0.0)
        a = widen(gated_tile.permute((1, 0)).load(OPERAND))
        a = (a * scale[None, :]).to(dtype)
        fence_async_shared()
        gl.thread_barrier()
        at = (bh * (chunks if REVERSE else chunks + 1) + chunk) * Q
        tma.async_copy_shared_to_global(states, [at, 0], held)
        if GATE:
            tma.async_copy_shared_to_global(gated, [row, start, head, 0], gated_tile.reshape([1, Q, 1, Q]))
            tma.async_copy_shared_to_global(dz, [row, start, head, 0], dz_tile.reshape([1, Q, 1, Q]))
        _fetch_step(
            u, v, z, raw, before, phases, bases, vectors,
            u_tile, v_tile, z_tile, raw_tile, before_tile, phase, base, vector,
            bars, chunk - 1 if REVERSE else chunk + 1, row, head, bh, group, chunks, k + 1 < chunks, GATE, REVERSE,
        )  # fmt: skip
        state = warpgroup_mma(a, turned, state * whole, is_async=True)
        state = warpgroup_mma_wait(0, deps=(state,))
    if REVERSE:
        gl.store(dssm + wide_bh * (Q * N) + cell, state)
        h_1, h_2, _ = pairs_of(_entry(ssm, early, k_before, v_before, bh, cell, i_p, i_n))
        d_1, d_2, _ = pairs_of(state)
        gl.store(turned_first + wide_bh * S + pair, gl.sum(h_1 * d_2 - h_2 * d_1, 0), mask=pair < S)
        k_t = gl.load(k_before + wide_bh * N + i_n).to(gl.float32)
        v_t = gl.load(v_before + wide_bh * Q + i_p).to(gl.float32)
        share, through = gl.load(early + bh), gl.sum(state * k_t[None, :], 1)
        gl.store(dv + wide_bh * Q + i_p, share * through)
        gl.store(dk + wide_bh * N + i_n, share * gl.sum(state * v_t[:, None], 0))
        gl.store(dearly + bh, gl.sum(through * v_t, 0))
    else:
        tma.store_wait(0)
        gl.thread_barrier()
        held.store(state.to(dtype))
        fence_async_shared()
        gl.thread_barrier()
        tma.async_copy_shared_to_global(states, [(bh * (chunks + 1) + chunks) * Q, 0], held)
    tma.store_wait(0)
    mbarrier.invalidate(once)
    discard(bars)


@gluon.jit
def _fetch_head(
    x, dy, states, phases, bases, vectors, first_bias, second_bias, x_tile, dy_tile, state_tile, phase, base, vector,
    first_row, second_row, bars, chunk, state_at, row, head, bh, chunks, pred, BIAS: gl.constexpr,
):  # fmt: skip
    if BIAS:
        expect(bars, (phases, bases, vectors, x, dy, states, first_bias, second_bias), pred)
    else:
        expect(bars, (phases, bases, vectors, x, dy, states), pred)
    fetch_angles(phases, bases, vectors, phase, base, vector, bars, chunk, bh, chunks, pred)
    fetch_tile(x, x_tile, bars[3], row, chunk * Q, head, pred)
    fetch_tile(dy, dy_tile, bars[4], row, chunk * Q, head, pred)
    tma.async_copy_global_to_shared(states, [state_at, 0], bars[5], state_tile, pred=pred)
    if BIAS:
        tma.async_copy_global_to_shared(first_bias, [head, 0], bars[6], first_row, pred=pred)
        tma.async_copy_global_to_shared(second_bias, [head, 0], bars[7], second_row, pred=pred)


@gluon.jit
def _of_values(
    x, dy, B, C, dstates, phases, vectors, decay, B_bias, C_bias, D, bases, document,
    weight_sums, own_sums, dx, dD_parts,
    chunk, row, group, split, end, l, chunks, h, h_per_g, h_per_program, S,
    BIAS: gl.constexpr, SKIP: gl.constexpr, RESET: gl.constexpr, LENGTHS: gl.constexpr,
):  # fmt: skip
    """Of one chunk and some heads of one group: dx, and the gradients of w and of gamma."""
    dtype: gl.constexpr = x.dtype
    short: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, 64], dtype)
    long: gl.constexpr = dstates.layout
    B_tile = gl.allocate_shared_memory(dtype, [Q, N], long)
    C_tile = gl.allocate_shared_memory(dtype, [Q, N], long)
    k_tile = gl.allocate_shared_memory(dtype, [Q, N], long)
    q_tile = gl.allocate_shared_memory(dtype, [Q, N], long)
    state_tile = gl.allocate_shared_memory(dtype, [Q, N], long)
    x_tile = gl.allocate_shared_memory(dtype, [Q, Q], short)
    dy_tile = gl.allocate_shared_memory(dtype, [Q, Q], short)
    phase = gl.allocate_shared_memory(gl.int16, [Q, TURNED], phases.layout)
    vector = gl.allocate_shared_memory(gl.float32, [4, 1, Q], gl.NVMMASharedLayout(0, 32, 2))
    base = gl.allocate_shared_memory(gl.float32, [1, TURNED], bases.layout)
    first_row, second_row = base, base
    if BIAS:
        first_row = gl.allocate_shared_memory(gl.float32, [1, N], B_bias.layout)
        second_row = gl.allocate_shared_memory(gl.float32, [1, N], B_bias.layout)
    once = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(once, count=1)
    bars = barriers()
    start = chunk * Q
    mbarrier.expect(once, B.block_type.nbytes + C.block_type.nbytes)
    fetch_tile(B, B_tile, once, row, start, group, True)
    fetch_tile(C, C_tile, once, row, start, group, True)
    head = group * h_per_g + split * h_per_program
    bh = row * h + head
    _fetch_head(
        x, dy, dstates, phases, bases, vectors, B_bias, C_bias, x_tile, dy_tile, state_tile, phase, base, vector,
        first_row, second_row, bars, chunk, (bh * chunks + chunk) * Q, row, head, bh, chunks, True, BIAS,
    )  # fmt: skip
    rows: gl.constexpr = gl.SliceLayout(1, SUM)
    columns: gl.constexpr = gl.SliceLayout(0, SUM)
    t_j, t_i = gl.arange(0, Q, layout=rows), gl.arange(0, Q, layout=columns)
    t_pair = gl.arange(0, Q, layout=gl.SliceLayout(1, PAIR))
    number, n_j, n_i, last = t_pair, t_j, t_i, 0
    if RESET:
        document += row.to(gl.int64) * chunks * Q + start
        number, n_j = gl.load(document + t_pair), gl.load(document + t_j)
        n_i, last = gl.load(document + t_i), gl.load(document + Q - 1)
    dx += (row.to(gl.int64) * l + start) * (h * Q)
    wide_t, wide_p = gl.arange(0, Q, layout=gl.SliceLayout(1, WIDE)), gl.arange(0, Q, layout=gl.SliceLayout(0, WIDE))
    mbarrier.wait(once, 0)
    if LENGTHS:
        if start + Q > end:
            zero_from(B_tile, end - start, Q, N)
            zero_from(C_tile, end - start, Q, N)
    for k in range(h_per_program):
        at = bh.to(gl.int64) * chunks * Q + start
        s_end = gl.load(decay + at + Q - 1)
        wait_for(bars, 8 if BIAS else 6, k & 1)
        if LENGTHS:
            if start + Q > end:
                zero_from(x_tile, end - start, Q, Q)
                zero_from(dy_tile, end - start, Q, Q)
        circle = circle_of(phase, base, number, RESET)
        k_tile.store(turned_by(biased(B_tile, first_row, BIAS), circle, False).to(dtype))
        q_tile.store(turned_by(biased(C_tile, second_row, BIAS), circle, False).to(dtype))
        fence_async_shared()
        gl.thread_barrier()
        zero = gl.zeros([Q, Q], gl.float32, SUM)
        pairs = warpgroup_mma(x_tile, dy_tile.permute((1, 0)), zero, use_acc=False, is_async=True)
        scores = warpgroup_mma(k_tile, q_tile.permute((1, 0)), zero, use_acc=False, is_async=True)
        through = warpgroup_mma(k_tile, state_tile.permute((1, 0)), zero, use_acc=False, is_async=True)
        own, size, s = vector.index(0).reshape([Q]), vector.index(1).reshape([Q]), vector.index(2).reshape([Q])
        s_j, size = s.load(rows), size.load(rows)
        to_end = gl.exp2(s_end - s_j)
        seen = t_j[:, None] < t_i[None, :]
        if RESET:
            to_end = gl.where(n_j == last, to_end, 0.0)
            seen = seen & (n_j[:, None] == n_i[None, :])
        same = t_j[:, None] == t_i[None, :]
        factor = gl.exp2(gl.where(seen, s.load(columns)[None, :] - s_j[:, None], -float("inf")))
        pairs, scores, through = warpgroup_mma_wait(0, deps=(pairs, scores, through))
        pairs *= gl.where(same, 1.0, factor) * scores
        own_sum = gl.sum(gl.where(same, pairs, 0.0), 1)
        weight_sum = gl.sum(pairs, 1) - own_sum + to_end * gl.sum(widen(x_tile.load(SUM)) * through, 1)
        gl.store(weight_sums + at + t_j, weight_sum)
        gl.store(own_sums + at + t_j, own_sum)
        factor = gl.where(same, own.load(rows)[:, None], factor * size[:, None])
        dv = through * (to_end * size)[:, None]
        if SKIP:
            dy_t = widen(dy_tile.load(SUM))
            dv += gl.load(D + head).to(gl.float32) * dy_t
            part = dD_parts + (row * chunks + chunk).to(gl.int64) * h + head
            gl.store(part, gl.sum(gl.sum(widen(x_tile.load(SUM)) * dy_t, 1), 0))
        x_tile.store((scores * factor).to(dtype))
        fence_async_shared()
        gl.thread_barrier()
        dv = warpgroup_mma(x_tile, dy_tile, dv, is_async=True)
        dv = warpgroup_mma_wait(0, deps=(dv,))
        gl.thread_barrier()
        _fetch_head(
            x, dy, dstates, phases, bases, vectors, B_bias, C_bias, x_tile, dy_tile, state_tile, phase, base, vector,
            first_row, second_row, bars, chunk, ((bh + 1) * chunks + chunk) * Q, row, head + 1, bh + 1,
            chunks, k + 1 < h_per_program, BIAS,
        )  # fmt: skip
        cells = wide_t[:, None] * (h * Q) + (head * Q + wide_p)[None, :]
        gl.store(dx + cells, gl.convert_layout(dv.to(dtype), WIDE), mask=(wide_t < l - start)[:, None])
        head += 1
        bh += 1
    mbarrier.invalidate(once)
    discard(bars)


@gluon.jit
def _of_rotated(
    x, dy, u, other, states, phases, vectors, decay, u_bias, other_bias, bases, document, rates, dt, later,
    products, ddt, dangles, du, dbias,
    chunk, row, group, split, end, l, chunks, h, g, h_per_g, h_per_program, splits, S,
    stride_rb, stride_rl, stride_tb, stride_tl, stride_th,
    OF_C: gl.constexpr, BIAS: gl.constexpr, RESET: gl.constexpr, LENGTHS: gl.constexpr,
):  # fmt: skip
    """Of one chunk and some heads of one group: the gradients of B (u; C is the other) or of C, of bias and angles.

    `states` are those before the chunk for C, and for B the gradients of those after it.
    """
    dtype: gl.constexpr = x.dtype
    short: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, 64], dtype)
    long: gl.constexpr = states.layout
    u_tile = gl.allocate_shared_memory(dtype, [Q, N], long)
    other_tile = gl.allocate_shared_memory(dtype, [Q, N], long)
    turned = gl.allocate_shared_memory(dtype, [Q, N], long)
    state_tile = gl.allocate_shared_memory(dtype, [Q, N], long)
    x_tile = gl.allocate_shared_memory(dtype, [Q, Q], short)
    dy_tile = gl.allocate_shared_memory(dtype, [Q, Q], short)
    phase = gl.allocate_shared_memory(gl.int16, [Q, TURNED], phases.layout)
    narrow: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, 32], dtype)
    crossed = gl.allocate_shared_memory(dtype, [2, Q, TURNED], narrow)
    later_tile = gl.allocate_shared_memory(dtype, [Q, Q], short)
    ones_tile = gl.allocate_shared_memory(dtype, [8, Q], short)
    vector = gl.allocate_shared_memory(gl.float32, [4, 1, Q], gl.NVMMASharedLayout(0, 32, 2))
    base = gl.allocate_shared_memory(gl.float32, [1, TURNED], bases.layout)
    first_row, second_row = vector, base
    if BIAS:
        first_row = gl.allocate_shared_memory(gl.float32, [2, 1, N], u_bias.layout)
        second_row = gl.allocate_shared_memory(gl.float32, [1, N], u_bias.layout)
    once = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(once, count=1)
    bars = barriers()
    start = chunk * Q
    mbarrier.expect(once, u.block_type.nbytes + other.block_type.nbytes)
    fetch_tile(u, u_tile, once, row, start, group, True)
    fetch_tile(other, other_tile, once, row, start, group, True)
    head = group * h_per_g + split * h_per_program
    bh = row * h + head
    slots = chunks + 1 if OF_C else chunks
    _fetch_head(
        x, dy, states, phases, bases, vectors, u_bias, other_bias, x_tile, dy_tile, state_tile, phase, base, vector,
        first_row.index(0), second_row, bars, chunk, (bh * slots + chunk) * Q, row, head, bh, chunks, True, BIAS,
    )  # fmt: skip
    rows: gl.constexpr = gl.SliceLayout(1, SUM)
    columns: gl.constexpr = gl.SliceLayout(0, SUM)
    a_rows: gl.constexpr = gl.SliceLayout(1, OPERAND)
    t_i, t_j, t_a = gl.arange(0, Q, layout=rows), gl.arange(0, Q, layout=columns), gl.arange(0, Q, layout=a_rows)
    i_n = gl.arange(0, N, layout=columns)
    t_turn, i_s = gl.arange(0, Q, layout=gl.SliceLayout(1, TURN)), gl.arange(0, TURNED, layout=gl.SliceLayout(0, TURN))
    i_s = i_s % 8 * 4 + i_s // 8  # as scattered has them
    t_pair = gl.arange(0, Q, layout=gl.SliceLayout(1, PAIR))
    wide_i, wide_j = gl.arange(0, Q, layout=gl.SliceLayout(1, WIDE)), gl.arange(0, Q, layout=gl.SliceLayout(0, WIDE))
    sums = wide_i[:, None] <= wide_j[None, :]
    number, n_i, n_j, n_a, n_turn, last = t_pair, t_i, t_j, t_a, t_turn, 0
    if RESET:
        document += row.to(gl.int64) * chunks * Q + start
        number, n_i, n_j = gl.load(document + t_pair), gl.load(document + t_i), gl.load(document + t_j)
        n_a, n_turn, last = gl.load(document + t_a), gl.load(document + t_turn), gl.load(document + Q - 1)
        sums = sums & (gl.load(document + wide_i)[:, None] == gl.load(document + wide_j)[None, :])
    later_tile.store(gl.where(sums, 1.0, 0.0).to(dtype))
    ones_tile.store(gl.full([8, Q], 1.0, dtype, WIDE))
    in_turn = (start + t_turn < end)[:, None] & (i_s < S)[None, :]
    rates += row.to(gl.int64) * stride_rb + start.to(gl.int64) * stride_rl
    dt += row.to(gl.int64) * stride_tb + start.to(gl.int64) * stride_tl
    mbarrier.wait(once, 0)
    if LENGTHS:
        if start + Q > end:
            zero_from(u_tile, end - start, Q, N)
            zero_from(other_tile, end - start, Q, N)
    rate_tile = gl.allocate_shared_memory(gl.float32, [Q, TURNED], gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
    rate_tile.store(gl.load(rates + t_turn[:, None] * stride_rl + i_s[None, :], mask=in_turn, other=0.0).to(gl.float32))
    total = gl.zeros([Q, N], gl.float32, SUM)
    dangle = gl.zeros([Q, TURNED], gl.float32, TURN)
    for k in range(h_per_program):
        step = gl.load(dt + t_turn * stride_tl + head * stride_th, mask=start + t_turn < end, other=0.0).to(gl.float32)
        at = bh.to(gl.int64) * chunks * Q + start
        s_end = gl.load(decay + at + Q - 1)
        wait_for(bars, 8 if BIAS else 6, k & 1)
        if LENGTHS:
            if start + Q > end:
                zero_from(x_tile, end - start, Q, Q)
                zero_from(dy_tile, end - start, Q, Q)
        circle = circle_of(phase, base, number, RESET)
        turned.store(turned_by(biased(other_tile, second_row, BIAS), circle, False).to(dtype))
        own, size, s = vector.index(0).reshape([Q]), vector.index(1).reshape([Q]), vector.index(2).reshape([Q])
        s_i, s_j, s_a = s.load(rows)[:, None], s.load(columns)[None, :], s.load(a_rows)
        if OF_C:  # (i, j)
            difference, seen, early, self = (
                s_i - s_j,
                t_i[:, None] > t_j[None, :],
                size.load(columns)[None, :],
                own.load(columns)[None, :],
            )
            scale = gl.exp2(s_a)
            if RESET:
                scale = gl.where(n_a == 0, scale, 0.0)
            given = dy_tile
        else:  # (j, i)
            difference, seen, early, self = (
                s_j - s_i,
                t_i[:, None] < t_j[None, :],
                size.load(rows)[:, None],
                own.load(rows)[:, None],
            )
            scale = gl.exp2(s_end - s_a) * size.load(a_rows)
            if RESET:
                scale = gl.where(n_a == last, scale, 0.0)
            given = x_tile
        fence_async_shared()
        gl.thread_barrier()
        zero = gl.zeros([Q, Q], gl.float32, SUM)
        if OF_C:
            pairs = warpgroup_mma(dy_tile, x_tile.permute((1, 0)), zero, use_acc=False, is_async=True)
        else:
            pairs = warpgroup_mma(x_tile, dy_tile.permute((1, 0)), zero, use_acc=False, is_async=True)
        if RESET:
            seen = seen & (n_i[:, None] == n_j[None, :])
        factor = gl.exp2(gl.where(seen, difference, -float("inf"))) * early
        factor = gl.where(t_i[:, None] == t_j[None, :], self, factor)
        given = (widen(given.load(OPERAND)) * scale[:, None]).to(dtype)
        pairs = warpgroup_mma_wait(0, deps=(pairs,))
        x_tile.store((pairs * factor).to(dtype))
        fence_async_shared()
        gl.thread_barrier()
        grad = warpgroup_mma(given, state_tile, gl.zeros([Q, N], gl.float32, SUM), use_acc=False, is_async=True)
        grad = warpgroup_mma(x_tile, turned, grad, is_async=True)
        grad = warpgroup_mma_wait(0, deps=(grad,))
        gl.thread_barrier()
        _fetch_head(
            x, dy, states, phases, bases, vectors, u_bias, other_bias, x_tile, dy_tile, state_tile, phase, base, vector,
            first_row.index((k + 1) % 2), second_row, bars, chunk, ((bh + 1) * slots + chunk) * Q, row, head + 1,
            bh + 1, chunks, k + 1 < h_per_program, BIAS,
        )  # fmt: skip
        du_1, du_2, back = pairs_of(grad)
        u_1, u_2 = front_of(u_tile, first_row.index(k % 2), circle, BIAS)
        cross = scattered(u_1 * du_2 - u_2 * du_1)
        product = gl.convert_layout(gl.sum(u_1 * du_1 + u_2 * du_2, 1), rows)
        product += gl.sum(
            back_of(u_tile, first_row.index(k % 2), BIAS) * gl.convert_layout(back, SUM, assert_trivial=True), 1
        )
        gl.store(products + at + t_i, product)
        high = cross.to(dtype)
        crossed.index(0).store(high)
        crossed.index(1).store((cross - high.to(gl.float32)).to(dtype))
        grad = turned_by(grad, circle, True)
        if BIAS:
            turned.store(grad.to(dtype))
        total += grad
        fence_async_shared()
        gl.thread_barrier()
        turning = gl.zeros([Q, TURNED], gl.float32, TURN)
        turning = warpgroup_mma(later_tile, crossed.index(0), turning, use_acc=False, is_async=True)
        turning = warpgroup_mma(later_tile, crossed.index(1), turning, is_async=True)
        turning = warpgroup_mma_wait(0, deps=(turning,))
        if BIAS:
            of_bias = gl.zeros([N, 8], gl.float32, OF_BIAS)
            ones = ones_tile.permute((1, 0))
            of_bias = warpgroup_mma(turned.permute((1, 0)), ones, of_bias, use_acc=False, is_async=True)
        if OF_C:
            after = gl.load(later + (bh.to(gl.int64) * chunks + chunk) * S + i_s, mask=i_s < S, other=0.0)[None, :]
            turning += gl.where((n_turn == last)[:, None], after, 0.0) if RESET else after
        dangle += turning * step[:, None]
        gl.store(ddt + at + t_turn, gl.sum(turning * rate_tile.load(TURN), 1))
        if BIAS:
            of_bias = warpgroup_mma_wait(0, deps=(of_bias,))
            to = dbias + ((row * chunks + chunk).to(gl.int64) * h + head) * N
            gl.store(to + gl.arange(0, N, layout=gl.SliceLayout(1, OF_BIAS)), gl.max(of_bias, 1))
        head += 1
        bh += 1
    inside = start + t_i < l
    du += ((row.to(gl.int64) * l + start) * (g * splits) + group * splits + split) * N
    cells = t_i[:, None] * (g * splits * N) + i_n[None, :]
    gl.store(du + cells, total.to(du.dtype.element_ty), mask=inside[:, None])
    parts = 2 * g * splits
    dangles += ((row.to(gl.int64) * l + start) * parts + ((0 if OF_C else g) + group) * splits + split) * S
    inside = (start + t_turn < l)[:, None] & (i_s < S)[None, :]
    gl.store(dangles + t_turn[:, None] * (parts * S) + i_s[None, :], dangle, mask=inside)
    mbarrier.invalidate(once)
    discard(bars)


@gluon.jit
def _chunks_kernel(
    x, dy, B, C, states, dstates, phases, vectors, decay, B_bias, C_bias, D, bases, document, lengths, rates, dt, later,
    products_C, products_B, weight_sums, own_sums, ddt_C, ddt_B, dangles, dx, dB, dC, dB_parts, dC_parts, dD_parts,
    l, chunks, h, g, h_per_g, h_per_program, splits, S,
    stride_rb, stride_rl, stride_tb, stride_tl, stride_th,
    JOB: gl.constexpr, BIAS: gl.constexpr, SKIP: gl.constexpr, RESET: gl.constexpr, LENGTHS: gl.constexpr,
):  # fmt: skip
    """A program takes one chunk and some heads of a group.

    The jobs are launches of their own: side by side, to read from the cache what another has fetched, they were no
    faster, and all needed the registers of the greediest.
    """
    program = gl.program_id(0)
    split, group = program % splits, program // splits % g
    chunk, row = program // (splits * g) % chunks, program // (splits * g * chunks)
    end = l
    if LENGTHS:
        end = gl.load(lengths + row).to(gl.int32)
    if JOB == "dx":
        _of_values(
            x, dy, B, C, dstates, phases, vectors, decay, B_bias, C_bias, D, bases, document, weight_sums, own_sums, dx,
            dD_parts, chunk, row, group, split, end, l, chunks, h, h_per_g, h_per_program, S,
            BIAS, SKIP, RESET, LENGTHS,
        )  # fmt: skip
    elif JOB == "dB":
        _of_rotated(
            x, dy, B, C, dstates, phases, vectors, decay, B_bias, C_bias, bases, document, rates, dt, later,
            products_B, ddt_B, dangles, dB, dB_parts,
            chunk, row, group, split, end, l, chunks, h, g, h_per_g, h_per_program, splits, S,
            stride_rb, stride_rl, stride_tb, stride_tl, stride_th, False, BIAS, RESET, LENGTHS,
        )  # fmt: skip
    else:
        _of_rotated(
            x, dy, C, B, states, phases, vectors, decay, C_bias, B_bias, bases, document, rates, dt, later,
            products_C, ddt_C, dangles, dC, dC_parts,
            chunk, row, group, split, end, l, chunks, h, g, h_per_g, h_per_program, splits, S,
            stride_rb, stride_rl, stride_tb, stride_tl, stride_th, True, BIAS, RESET, LENGTHS,
        )  # fmt: skip


@triton.jit
def _size_gradients_kernel(
    products_C, products_B, weight_sums, own_sums, totals, ddt_C, ddt_B, dfirst, dt, A, trap, reset, lengths,
    ddt, dA, dtrap, l, chunks, h,
    stride_tb, stride_tl, stride_th, stride_Ab, stride_Al, stride_Ah, stride_sb, stride_sl, stride_sh,
    stride_rb, stride_rl,
    RESET: tl.constexpr, LENGTHS: tl.constexpr, T: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """Of one chunk and BH heads: gradients of dt, A and trap."""
    blocks = tl.cdiv(h, BH)
    i, head = tl.program_id(0) // blocks, ((tl.program_id(0) % blocks) * BH + tl.arange(0, BH))[None, :]
    row, chunk = (i // chunks).to(tl.int64), i % chunks
    token = chunk * T + tl.arange(0, T)
    end = tl.load(lengths + row).to(tl.int32) if LENGTHS else l
    in_h, place = head < h, token.to(tl.int64)[:, None]
    real = (token < end)[:, None] & in_h
    at = (row * h + head) * (chunks * T) + token[:, None]
    column = tl.load(weight_sums + at, mask=real, other=0.0)
    grad = tl.load(products_C + at, mask=real, other=0.0) - tl.load(products_B + at, mask=real, other=0.0)
    grad = tl.cumsum(grad, 0, reverse=True)
    grad += tl.load(totals + (row * h + head) * chunks + chunk, mask=in_h, other=0.0)
    early = tl.load(weight_sums + at - 1, mask=real & (token > 0)[:, None], other=0.0)
    early += tl.load(dfirst + row * h + head, mask=in_h & (token == 0)[:, None], other=0.0)
    if RESET:
        begins = tl.load(reset + row * stride_rb + token.to(tl.int64) * stride_rl, mask=token < end, other=0)
        early = tl.where((begins != 0)[:, None], 0.0, early)
    size = tl.load(dt + row * stride_tb + place * stride_tl + head * stride_th, mask=real, other=0.0).to(tl.float32)
    rate = tl.load(A + row * stride_Ab + place * stride_Al + head * stride_Ah, mask=real, other=0.0).to(tl.float32)
    share = tl.load(trap + row * stride_sb + place * stride_sl + head * stride_sh, mask=real, other=0.0).to(tl.float32)
    own = column + tl.load(own_sums + at, mask=real, other=0.0)
    of_dt = rate * grad + share * own + (1.0 - share) * early
    of_dt += tl.load(ddt_C + at, mask=real, other=0.0) + tl.load(ddt_B + at, mask=real, other=0.0)
    to = (row * l + place) * h + head
    inside = (token < l)[:, None] & in_h
    tl.store(ddt + to, tl.where(real, of_dt, 0.0).to(ddt.dtype.element_ty), mask=inside)
    tl.store(dA + to, (size * grad).to(dA.dtype.element_ty), mask=inside)
    tl.store(dtrap + to, tl.where(real, size * (own - early), 0.0).to(dtrap.dtype.element_ty), mask=inside)


def backward(
    dy, dangle, dssm, dk, dv, x, dt, A, B, C, trap, angles, B_bias, C_bias, D, mimo_x, angle, ssm, k, v,
    reset, lengths, halves, chunk_len, z, ungated,
):  # fmt: skip
    b, l, h, p = x.shape
    r, g, n = B.shape[2:]
    s = angles.shape[-1]
    arguments = (
        x, dt, A, B, C, trap, angles, B_bias, C_bias, D, mimo_x, angle, ssm, k, v, reset, lengths, halves, chunk_len, z,
        ungated,
    )  # fmt: skip
    plain = x.element_size() == 2 and x.dtype == B.dtype == C.dtype and not halves and mimo_x is None
    plain = plain and (B_bias is None) == (C_bias is None)
    fits = p == 64 and n == 128 and r == 1 and s <= 32 and s % 8 == 0 and b * h * (l + 128) < 2**31
    if not plain or not fits:
        return portable.backward(dy, dangle, dssm, dk, dv, *arguments)
    with device_of(x):
        plan = portable._Plan(
            x, dt, A, B, C, trap, angles, B_bias, C_bias, D, mimo_x, angle, reset, lengths, halves, None
        )
        if plan.segments > 1:
            return portable.backward(dy, dangle, dssm, dk, dv, *arguments)
        *_, decay, document = plan.weights
        phases, bases = plan.turns
        chunks = plan.chunks
        dy = for_tma(dy.to(x.dtype).squeeze(2))
        x, B, C = for_tma(x), for_tma(B.squeeze(2)), for_tma(C.squeeze(2))
        states = torch.empty(b * h * (chunks + 1) * p, n, dtype=x.dtype, device=x.device)
        dstates = torch.empty(b * h * chunks * p, n, dtype=x.dtype, device=x.device)
        read = (swizzled(phases.flatten(0, 2), (64, 32)), vectors_of(plan.vectors))
        flags = {"RESET": reset is not None, "LENGTHS": lengths is not None}
        begin = (ssm.float().contiguous(), plan.rule.early(first=True).contiguous(), k.contiguous(), v.contiguous())
        x_tiles, B_tiles, C_tiles, dy_tiles = (tiles(t, 64, t.shape[-1]) for t in (x, B, C, dy))
        stored, dstored = swizzled(states, (64, 128)), swizzled(dstates, (64, 128))
        common = (l, chunks, h, h // g, s)
        base_rows = matrix(bases.flatten(0, 2), 1, 32)
        biases = [
            None if t is None else matrix(for_tma(t.float().flatten(0, 1)), 1, n) for t in (plan.B_bias, plan.C_bias)
        ]
        _states_kernel[(b * h,)](
            B_tiles, x_tiles, x_tiles, x_tiles, stored, x_tiles, x_tiles, stored, *read,
            biases[0], base_rows, decay, document, lengths, None, *begin, *(None,) * 7, *common,
            REVERSE=False, GATE=False, BIAS=B_bias is not None, **flags, num_warps=WARPS,
        )  # fmt: skip
        gated, dz, gates, given = dy_tiles, None, (x_tiles, x_tiles), (x_tiles, x_tiles)
        if z is not None:
            kept, dz = (torch.empty(b, l, h, p, dtype=x.dtype, device=x.device) for _ in range(2))
            gates = tuple(tiles(for_tma(t), 64, p) for t in (z, ungated.squeeze(2)))
            gated, _ = given = tiles(kept, 64, p), tiles(dz, 64, p)
        total, crossed = plan.empty(b, h, chunks), plan.empty(b, h, chunks, s)
        dentry, dfirst, turned_first = plan.state(), plan.empty(b, h), plan.empty(b, h, s)
        dk_first, dv_first = plan.empty(b, 1, h, n), plan.empty(b, h, p)
        _states_kernel[(b * h,)](
            C_tiles, dy_tiles, *gates, stored, *given, dstored, *read,
            biases[1], base_rows, decay, document, lengths, dssm.float().contiguous(), *begin,
            total, crossed, dentry, dfirst, dk_first, dv_first, turned_first, *common,
            REVERSE=True, GATE=z is not None, BIAS=C_bias is not None, **flags, num_warps=WARPS,
        )  # fmt: skip
        through_k = plan._crossed(plan.last_k(k).float(), dk.float()).sum(1)
        later, whole = _later(crossed, dangle, through_k, document, lengths)
        dfirst_angle = whole - turned_first

        splits = splits_of(h // g, b * chunks * g, plan.wanted // 2)
        part = torch.float32 if splits > 1 else None
        dx = torch.empty(b, l, h, p, dtype=x.dtype, device=x.device)
        dB, dC = (torch.empty(b, l, 1, g, splits, n, dtype=part or x.dtype, device=x.device) for _ in range(2))
        dB_bias, dC_bias = (None if t is None else plan.empty(b * chunks, h, n) for t in (B_bias, C_bias))
        dD = None if D is None else plan.empty(b * chunks, h)
        sums = [plan.empty(b, h, chunks * 64) for _ in range(6)]
        dangles = plan.empty(b, l, 2 * g * splits, s)
        for job in ("dx", "dB", "dC"):
            _chunks_kernel[(b * chunks * g * splits,)](
                x_tiles, gated, B_tiles, C_tiles, stored, dstored, *read, decay,
                *biases, plan.D, base_rows, document, lengths, plan.angles, dt, later,
                *sums, dangles, dx, dB, dC, dB_bias, dC_bias, dD,
                l, chunks, h, g, h // g, h // g // splits, splits, s, *plan.angles.stride()[:2], *dt.stride(),
                JOB=job, BIAS=B_bias is not None, SKIP=D is not None, **flags, num_warps=WARPS,
            )  # fmt: skip
        dB, dC = (t.squeeze(4) if splits == 1 else t.sum(4) for t in (dB, dC))
        dlast = rotated(dk.float(), -bases[:, :, chunks] * 6.283185307179586, halves)  # (b, r, h, n)
        at = (slice(None), l - 1) if lengths is None else plan.rule.last_tokens()
        if lengths is not None:
            dlast = dlast.where((lengths > 0)[:, None, None, None], 0.0)
        dB[at] += dlast.unflatten(2, (g, h // g)).sum(3).to(dB.dtype)
        dk_first, dv_first = _last_gradients(dx, dk, dv, dk_first, dv_first, lengths)
        ddt, dA, dtrap = (torch.empty(b, l, h, dtype=t.dtype, device=x.device) for t in (dt, A, trap))
        *products, ddt_C, ddt_B = sums
        BH = 16
        _size_gradients_kernel[(b * chunks * triton.cdiv(h, BH),)](
            *products, total, ddt_C, ddt_B, dfirst, dt, A, trap, reset, lengths,
            ddt, dA, dtrap, l, chunks, h, *dt.stride(), *A.stride(), *trap.stride(),
            *((0, 0) if reset is None else reset.stride()),
            RESET=reset is not None, LENGTHS=lengths is not None, T=64, BH=BH, num_warps=4,
        )  # fmt: skip
    dB_bias, dC_bias, dD = (None if t is None else t.sum(0) for t in (dB_bias, dC_bias, dD))
    if dB_bias is not None:
        dB_bias = (dB_bias + dlast[:, 0].sum(0))[:, None]
    dC_bias = None if dC_bias is None else dC_bias[:, None]
    tensors = (x, dt, A, B, C, trap, angles, B_bias, C_bias, D, mimo_x, angle, ssm, k, v)
    results = (
        dx, ddt, dA, dB, dC, dtrap, dangles.sum(2), dB_bias, dC_bias, dD, None, dfirst_angle, dentry, dk_first,
        dv_first,
    )  # fmt: skip
    grads = tuple(x.new_empty(0) if t is None else grad.to(t.dtype) for grad, t in zip(results, tensors, strict=True))
    return *grads, x.new_empty(0) if dz is None else dz


def _later(crossed, dangle, through_k, document, lengths) -> tuple[Tensor, Tensor]:
    """How what comes after each chunk turns what comes out at the end (b, h, chunks, s), less X of the chunk's end, and
    how all does (b, h, s). The last token's k turns with its own chunk on.
    """
    through_state, chunks = crossed[:, :, -1] + dangle, crossed.shape[2]
    if lengths is None:
        later = (whole := through_state + through_k)[:, :, None]
    else:
        some = (torch.arange(chunks, device=lengths.device) * 64 < lengths[:, None])[:, None, :, None]
        whole = through_state + through_k.where((lengths > 0)[:, None, None], 0.0)
        later = torch.where(some, whole[:, :, None], through_state[:, :, None])
    if document is not None:  # what is after a reset does not turn with what is before
        clear = (document.unflatten(1, (-1, 64))[:, :, -1] == 0).flip(1).cumprod(1).flip(1)
        later = later * torch.nn.functional.pad(clear[:, 1:], (0, 1), value=1)[:, None, :, None]
        whole = whole * clear[:, 0, None, None]
    return later - crossed, whole


def _last_gradients(dx, dk, dv, dk_first, dv_first, lengths) -> tuple[Tensor, Tensor]:
    """Adds dv to dx of the last tokens; dk and dv of rows without one are the initial state's."""
    if lengths is None:
        dx[:, -1] += dv
        return dk_first, dv_first
    empty = (lengths == 0)[:, None, None]
    last = torch.arange(len(lengths), device=lengths.device), (lengths - 1).clamp(min=0)
    dx[last] += dv.where(~empty, 0.0)
    return dk_first + dk.where(empty[..., None], 0.0), dv_first + dv.where(empty, 0.0)

"""Mamba-3's forward pass on Hopper, for one rank: one warpgroup per head walks l, as `ssd`'s does.

The mathematics is that of `triton.py`. B gets its bias and is turned where its tile lies in shared memory; C on its way
to registers, from where it enters its products. Adjacent channels are the pairs. The state is held as (p, n) in the
accumulators of the products that update it, 64 channels each. y replaces the gate's tile and leaves from there.
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

from longwave.ops.gluon_math import exp2, silu, widen
from longwave.ops.gluon_tiles import for_tma, matrix, tiles, walk_of, zero_from
from longwave.ops.mamba3_scan import triton as portable
from longwave.ops.triton_math import LOG2E, block, device_of, processors_of
from longwave.ops.triton_rotation import rotated_row, turns_kernel
from longwave.ops.triton_segments import segments_of

_Q = 64  # tokens of a chunk, channels of a head that a program takes, and of a panel of B and C


@triton.jit
def _vectors_kernel(
    dt, A, trap, reset, lengths, vectors, decays, early, document, l, chunks, h,
    stride_tb, stride_tl, stride_th, stride_Ab, stride_Al, stride_Ah, stride_sb, stride_sl, stride_sh,
    stride_rb, stride_rl,
    RESET: tl.constexpr, LENGTHS: tl.constexpr, T: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """Of each chunk and head four vectors (T,): the cumulative decay s, w, gamma, and exp(s_q - s) w; and exp(s_q).

    `early` (b, h) is what the token before the first counts.
    """
    blocks = tl.cdiv(h, BH)
    i, head = tl.program_id(0) // blocks, (tl.program_id(0) % blocks) * BH + tl.arange(0, BH)
    row, chunk = (i // chunks).to(tl.int64), i % chunks
    each = tl.arange(0, T)
    t = chunk * T + each
    end = tl.load(lengths + row).to(tl.int32) if LENGTHS else l
    in_h, token, column = (head < h)[None, :], t.to(tl.int64)[:, None], head[None, :]
    real, more = (t < end)[:, None] & in_h, (t + 1 < end)[:, None] & in_h
    dt_at = dt + row * stride_tb + token * stride_tl + column * stride_th
    trap_at = trap + row * stride_sb + token * stride_sl + column * stride_sh
    size = tl.load(dt_at, mask=real, other=0.0).to(tl.float32)
    share = tl.load(trap_at, mask=real, other=0.0).to(tl.float32)
    next_early = tl.load(dt_at + stride_tl, mask=more, other=0.0).to(tl.float32)
    next_early *= 1.0 - tl.load(trap_at + stride_sl, mask=more, other=0.0).to(tl.float32)
    own_early = (1.0 - share) * size
    rate = tl.load(A + row * stride_Ab + token * stride_Al + column * stride_Ah, mask=real, other=0.0).to(tl.float32)
    s = tl.cumsum(size * rate * LOG2E, 0)
    last = each == T - 1
    s_end = tl.sum(tl.where(last[:, None], s, 0.0), 0)
    to_end, whole = tl.exp2(s_end[None, :] - s), tl.exp2(s_end)
    if RESET:
        begins = reset + row * stride_rb + t.to(tl.int64) * stride_rl
        begun = tl.load(begins, mask=t < end, other=0).to(tl.int32)
        number = tl.cumsum(begun, 0)
        tl.store(document + row * (chunks * T) + t, number)
        next_begun = tl.load(begins + stride_rl, mask=t + 1 < end, other=0).to(tl.int32)
        next_early = tl.where(next_begun[:, None] == 0, next_early, 0.0)
        own_early = tl.where(begun[:, None] == 0, own_early, 0.0)
        count = tl.max(number, 0)
        to_end = tl.where((number == count)[:, None], to_end, 0.0)
        whole = tl.where(count == 0, whole, 0.0)
    weight = share * size + next_early
    bh = row * h + head.to(tl.int64)
    to = vectors + (bh[None, :] * chunks + chunk) * (4 * T) + each[:, None]
    tl.store(to, s, mask=in_h)
    tl.store(to + T, weight, mask=in_h)
    tl.store(to + 2 * T, share * size, mask=in_h)
    tl.store(to + 3 * T, to_end * weight, mask=in_h)
    tl.store(decays + bh * chunks + chunk, whole, mask=head < h)
    if chunk == 0:
        tl.store(early + bh, tl.sum(tl.where((each == 0)[:, None], own_early, 0.0), 0), mask=head < h)


@gluon.jit
def _within(value, number, later, later_number):
    """Of a sum that starts anew where the number of the document changes."""
    return later + gl.where(number == later_number, value, 0.0), later_number


@gluon.jit
def _sum(value, later):
    return value + later


@gluon.jit
def _phases_kernel(
    dt, angles, document, lengths, phases, turns, l, chunks, h, s,
    stride_tb, stride_tl, stride_th, stride_ab, stride_al,
    RESET: gl.constexpr, LENGTHS: gl.constexpr, T: gl.constexpr, BS: gl.constexpr, BH: gl.constexpr,
):  # fmt: skip
    """Turns since the chunk's or the document's start (b, h, chunks T, s), and at the chunk's end (b, h, chunks, s).

    A warp takes a chunk, a thread one angle of all its tokens.
    """
    layout: gl.constexpr = gl.BlockedLayout([T, 1], [1, BS], [1, 1], [1, 0])
    program = gl.program_id(0).to(gl.int64)
    angle_blocks, head_blocks = (s + BS - 1) // BS, (h + BH - 1) // BH
    first = (program // angle_blocks % head_blocks * BH).to(gl.int32)
    chunk, row = program // (angle_blocks * head_blocks) % chunks, program // (angle_blocks * head_blocks * chunks)
    t = gl.arange(0, T, layout=gl.SliceLayout(1, layout))
    j = (program % angle_blocks).to(gl.int32) * BS + gl.arange(0, BS, layout=gl.SliceLayout(0, layout))
    end = l
    if LENGTHS:
        end = gl.load(lengths + row).to(gl.int32)
    real, in_s = chunk.to(gl.int32) * T + t < end, (j < s)[None, :]
    angles += row * stride_ab + chunk * T * stride_al
    rate = gl.load(angles + (t[:, None] * stride_al + j[None, :]), mask=real[:, None] & in_s, other=0.0)
    rate = rate.to(gl.float32) * 0.15915494309189535
    if RESET:
        number = gl.load(document + (row * chunks + chunk) * T + t)
        number = number[:, None] + gl.zeros([T, BS], gl.int32, layout)
    dt += row * stride_tb + chunk * T * stride_tl
    for head in range(first, gl.minimum(first + BH, h)):
        size = gl.load(dt + (t * stride_tl + head * stride_th), mask=real, other=0.0).to(gl.float32)
        value = rate * size[:, None]
        value -= (value + 12582912.0) - 12582912.0  # to whole turns: 2^23 + 2^22 has no fraction
        if RESET:
            value, _number = gl.associative_scan((value, number), 0, _within)
        else:
            value = gl.associative_scan(value, 0, _sum)
        at = ((row * h + head) * chunks + chunk) * s
        fixed = (value + 192.0).to(gl.int32, bitcast=True).to(gl.int16)  # 2^7 + 2^6 counts in 2^-16
        gl.store(phases + at * T + (t[:, None] * s + j[None, :]), fixed, mask=in_s)
        last = gl.sum(gl.where((t == T - 1)[:, None], value, 0.0), 0)
        gl.store(turns + at + j, last - ((last + 12582912.0) - 12582912.0), mask=j < s)


@triton.jit
def _last_kernel(
    x, B, B_bias, bases, lengths, angle, k, v, last_angle, last_k, last_v, l, chunks, h, h_per_g,
    stride_xb, stride_xl, stride_xh, stride_Bb, stride_Bl, stride_Bg,
    LENGTHS: tl.constexpr, N: tl.constexpr, S: tl.constexpr, P: tl.constexpr, BS: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """The angle, B biased and rotated, and x after each row's last token; what there was in rows without one."""
    bh = tl.program_id(0).to(tl.int64)
    row, head = bh // h, bh % h
    i_n, i_s, i_p = tl.arange(0, N), tl.arange(0, BS), tl.arange(0, BP)
    end = tl.load(lengths + row) if LENGTHS else tl.cast(l, tl.int64)
    bases += (bh * (chunks + 1) + chunks) * S
    if end > 0:
        turned = tl.load(bases + i_s, mask=i_s < S, other=0.0) * 6.283185307179586
        phase = 4.0 * tl.load(bases + i_n // 2, mask=i_n // 2 < S, other=0.0)
        bias = None if B_bias is None else B_bias + head * N
        at = B + row * stride_Bb + (head // h_per_g) * stride_Bg + (end - 1) * stride_Bl
        tl.store(last_k + bh * N + i_n, rotated_row(at, bias, phase, N, S, N, False).to(last_k.dtype.element_ty))
        value = tl.load(x + row * stride_xb + (end - 1) * stride_xl + head * stride_xh + i_p, mask=i_p < P)
    else:
        turned = tl.load(angle + bh * S + i_s, mask=i_s < S, other=0.0)
        tl.store(last_k + bh * N + i_n, tl.load(k + bh * N + i_n).to(last_k.dtype.element_ty))
        value = tl.load(v + bh * P + i_p, mask=i_p < P).to(x.dtype.element_ty)
    tl.store(last_angle + bh * S + i_s, turned, mask=i_s < S)
    tl.store(last_v + bh * P + i_p, value, mask=i_p < P)


@gluon.jit
def _with_bias(tile, bias, layout: gl.constexpr):
    return widen(tile.load(layout)) + bias.load(gl.SliceLayout(0, layout))[None, :]


@gluon.jit
def _pairs_of(u):
    return u.reshape([u.shape[0], u.shape[1] // 2, 2]).split()


@gluon.jit
def _turn(first, second, cosine, sine, dtype: gl.constexpr, layout: gl.constexpr):
    """Both channels of the pairs turned, side by side again."""
    first, second = first * cosine - second * sine, first * sine + second * cosine
    u = gl.join(first.to(dtype), second.to(dtype))
    return gl.convert_layout(u.reshape([u.shape[0], u.shape[1] * 2]), layout, assert_trivial=True)


@gluon.jit
def _circle(phases, base, document, first, like, S: gl.constexpr, RESET: gl.constexpr):
    """cos and sin of 32 pairs from `first` on, in the layout of `like`; the chunk's `base` is the first document's."""
    layout: gl.constexpr = like.type.layout
    j = first + gl.arange(0, 32, layout=gl.SliceLayout(0, layout))
    start = gl.load(base + j, mask=j < S, other=0.0)[None, :]
    if RESET:
        number = gl.load(document + gl.arange(0, like.shape[0], layout=gl.SliceLayout(1, layout)))
        start = gl.where((number == 0)[:, None], start, 0.0)
    phase = (phases.load(layout).to(gl.float32) * (1 / 65536) + start) * 6.283185307179586
    cosine = gl.inline_asm_elementwise(
        "cos.approx.ftz.f32 $0, $1;", "=f,f", [phase], dtype=gl.float32, is_pure=True, pack=1
    )
    sine = gl.inline_asm_elementwise(
        "sin.approx.ftz.f32 $0, $1;", "=f,f", [phase], dtype=gl.float32, is_pure=True, pack=1
    )
    return cosine, sine


@gluon.jit
def _fetch(
    x, B, vectors, phases, x_tiles, B_tiles, vector_tiles, phase_tiles, bars,
    stage, chunk, here, row, head, group, column, at, Q: gl.constexpr,
):  # fmt: skip
    """Start the copies of a chunk into one stage of the ring, if it is `here`."""
    bar = bars.index(stage)
    nbytes: gl.constexpr = (
        x.block_type.nbytes + B.block_type.nbytes + vectors.block_type.nbytes + phases.block_type.nbytes
    )
    mbarrier.expect(bar, nbytes, pred=here)
    tma.async_copy_global_to_shared(x, [row, chunk * Q, head, column], bar, x_tiles.index(stage), pred=here)
    tma.async_copy_global_to_shared(B, [row, chunk * Q, group, 0], bar, B_tiles.index(stage), pred=here)
    tma.async_copy_global_to_shared(vectors, [at + chunk, 0], bar, vector_tiles.index(stage), pred=here)
    tma.async_copy_global_to_shared(phases, [(at + chunk) * Q, 0], bar, phase_tiles.index(stage), pred=here)


@gluon.jit
def _forward_kernel(
    x, B, C, z, y, raw, vectors, phases, decays, bases, B_bias, C_bias, D, document, initial, early, k_before, v_before,
    ends, totals, final, lengths, l, chunks, h, h_per_g, per_segment, segments,
    OUTPUT: gl.constexpr, RESET: gl.constexpr, LENGTHS: gl.constexpr,
    Q: gl.constexpr, N: gl.constexpr, P: gl.constexpr, S: gl.constexpr,
):  # fmt: skip
    """y, what it was before the gate in `raw` if that is given, and the final state.

    Without OUTPUT only what each segment of l makes of nothing, its state and its decay: `ends` (b, h, segments, p, n)
    and `totals` (b, h, segments), from which each segment then makes the state that it begins with.
    """
    dtype: gl.constexpr = x.dtype
    of_pairs: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, Q, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, of_pairs, 2)
    i_rows: gl.constexpr = gl.SliceLayout(1, of_pairs)
    j_columns: gl.constexpr = gl.SliceLayout(0, of_pairs)
    PANELS: gl.constexpr = N // Q
    TURNED: gl.constexpr = (2 * S + Q - 1) // Q  # panels in which channels turn

    block, bh, segment, row, head, group, first, stop, end = walk_of(
        h, h_per_g, segments, per_segment, chunks, l, lengths, P // Q, LENGTHS
    )
    column = block * Q

    x_tiles = gl.allocate_shared_memory(dtype, [2, 1, Q, 1, Q], x.layout)
    B_tiles = gl.allocate_shared_memory(dtype, [2, 1, Q, 1, N], B.layout)
    vector_tiles = gl.allocate_shared_memory(gl.float32, [2, 1, 4 * Q], vectors.layout)
    phase_tiles = gl.allocate_shared_memory(gl.int16, [2, Q, 32 * TURNED], phases.layout)
    bars = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    flat: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    i_n = gl.arange(0, N, layout=flat)
    B_shift = gl.allocate_shared_memory(gl.float32, [N], plain)
    shift = gl.zeros([N], gl.float32, flat)
    if B_bias is not None:
        shift = gl.load(B_bias + head * N + i_n).to(gl.float32)
    B_shift.store(shift)
    for k in gl.static_range(2):
        mbarrier.init(bars.index(k), count=1)
    if OUTPUT:
        C_tile = gl.allocate_shared_memory(dtype, [1, Q, 1, N], C.layout)
        y_tile = gl.allocate_shared_memory(dtype, [1, Q, 1, Q], y.layout)
        held = gl.allocate_shared_memory(dtype, [PANELS, Q, Q], gl.NVMMASharedLayout.get_default_for([Q, Q], dtype))
        if raw is not None:
            raw_tile = gl.allocate_shared_memory(dtype, [1, Q, 1, Q], y.layout)
        C_bar = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
        z_bar = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
        mbarrier.init(C_bar, count=1)
        mbarrier.init(z_bar, count=1)
        C_shift = gl.allocate_shared_memory(gl.float32, [N], plain)
        shift = gl.zeros([N], gl.float32, flat)
        if C_bias is not None:
            shift = gl.load(C_bias + head * N + i_n).to(gl.float32)
        C_shift.store(shift)
        mbarrier.expect(C_bar, C.block_type.nbytes)
        tma.async_copy_global_to_shared(C, [row, first * Q, group, 0], C_bar, C_tile)
    at = (bh * chunks).to(gl.int32)
    for k in gl.static_range(2):
        _fetch(
            x, B, vectors, phases, x_tiles, B_tiles, vector_tiles, phase_tiles, bars,
            k, first + k, first + k < stop, row, head, group, column, at, Q,
        )  # fmt: skip

    i_p, i_n = gl.arange(0, Q, layout=i_rows), gl.arange(0, Q, layout=j_columns)
    cell = (column + i_p)[:, None] * N + i_n[None, :]
    state_0 = gl.zeros([Q, Q], gl.float32, of_pairs)
    state_1 = state_0
    if OUTPUT:
        v_t = gl.load(v_before + bh * P + column + i_p).to(gl.float32) * gl.load(early + bh)
        k_t = k_before + bh * N + i_n
        state_0 = gl.load(initial + bh * (P * N) + cell) + v_t[:, None] * gl.load(k_t).to(gl.float32)[None, :]
        if PANELS == 2:
            state_1 = gl.load(initial + bh * (P * N) + Q + cell)
            state_1 += v_t[:, None] * gl.load(k_t + Q).to(gl.float32)[None, :]
        if ends is not None:
            for k in range(segment):
                before = ends + (bh * segments + k) * (P * N) + cell
                total = gl.load(totals + bh * segments + k)
                state_0 = state_0 * total + gl.load(before)
                if PANELS == 2:
                    state_1 = state_1 * total + gl.load(before + Q)
    if D is not None:
        skip = gl.load(D + head).to(gl.float32)
    t_i, t_j = gl.arange(0, Q, layout=i_rows), gl.arange(0, Q, layout=j_columns)
    if RESET:
        document += row.to(gl.int64) * chunks * Q
    bases += bh * (chunks + 1) * S
    decays += bh * chunks
    all_decay = 1.0

    for chunk in range(first, stop):
        step = chunk - first
        stage = step % 2
        if OUTPUT:
            held.index(0).store(state_0.to(dtype))
            if PANELS == 2:
                held.index(1).store(state_1.to(dtype))
        x_t = x_tiles.index(stage).reshape([Q, Q])
        B_t = B_tiles.index(stage).reshape([Q, N])
        vectors_t = vector_tiles.index(stage).reshape([4 * Q])
        whole = gl.load(decays + chunk)
        here = document
        if RESET:
            here += chunk * Q
        mbarrier.wait(bars.index(stage), (step // 2) & 1)
        if LENGTHS:
            if chunk * Q + Q > end:
                zero_from(x_t, end - chunk * Q, Q, Q)
                zero_from(B_t, end - chunk * Q, Q, N)
                gl.thread_barrier()
        if OUTPUT:
            mbarrier.wait(C_bar, step & 1)
            C_t = C_tile.reshape([Q, N])
        for panel in gl.static_range(PANELS):
            k_tile = B_t.slice(panel * Q, Q, dim=1)
            k_p = _with_bias(k_tile, B_shift.slice(panel * Q, Q), operand)
            q_p = k_p.to(dtype)
            if panel < TURNED:
                first_k, second_k = _pairs_of(k_p)
                cosine, sine = _circle(
                    phase_tiles.index(stage).slice(panel * 32, 32, dim=1), bases + chunk * S, here, panel * 32, first_k,
                    S, RESET,
                )  # fmt: skip
                k_tile.store(_turn(first_k, second_k, cosine, sine, dtype, operand))
                if OUTPUT:
                    q_p = _with_bias(C_t.slice(panel * Q, Q, dim=1), C_shift.slice(panel * Q, Q), operand)
                    first_q, second_q = _pairs_of(q_p)
                    q_p = _turn(first_q, second_q, cosine, sine, dtype, operand)
            else:
                k_tile.store(k_p.to(dtype))
                if OUTPUT:
                    q_p = _with_bias(C_t.slice(panel * Q, Q, dim=1), C_shift.slice(panel * Q, Q), operand).to(dtype)
            if panel == 0:
                q_0 = q_p
            else:
                q_1 = q_p
        fence_async_shared()
        gl.thread_barrier()
        k_0, k_1 = B_t.slice(0, Q, dim=1), B_t.slice(N - Q, Q, dim=1)
        if OUTPUT:
            zero = gl.zeros([Q, Q], gl.float32, of_pairs)
            pairs = warpgroup_mma(q_0, k_0.permute((1, 0)), zero, use_acc=False, is_async=True)
            if PANELS == 2:
                pairs = warpgroup_mma(q_1, k_1.permute((1, 0)), pairs, is_async=True)
            zero = gl.zeros([Q, Q], gl.float32, of_pairs)
            through = warpgroup_mma(q_0, held.index(0).permute((1, 0)), zero, use_acc=False, is_async=True)
            if PANELS == 2:
                through = warpgroup_mma(q_1, held.index(PANELS - 1).permute((1, 0)), through, is_async=True)
            more = chunk + 1 < stop
            mbarrier.expect(C_bar, C.block_type.nbytes, pred=more)
            tma.async_copy_global_to_shared(C, [row, (chunk + 1) * Q, group, 0], C_bar, C_tile, pred=more)
            tma.store_wait(0)
            if z is not None:
                mbarrier.expect(z_bar, z.block_type.nbytes)
                tma.async_copy_global_to_shared(z, [row, chunk * Q, head, column], z_bar, y_tile)

        x_k = widen(x_t.permute((1, 0)).load(operand))  # (p, j)
        x_k = (x_k * vectors_t.slice(3 * Q, Q).load(gl.SliceLayout(0, operand))[None, :]).to(dtype)
        state_0 *= whole
        if PANELS == 2:
            state_1 *= whole
        if OUTPUT:
            s = vectors_t.slice(0, Q)
            s_i, s_j = s.load(i_rows), s.load(j_columns)
            from_start = exp2(s_i)
            seen = t_i[:, None] > t_j[None, :]
            if RESET:
                n_i, n_j = gl.load(here + t_i), gl.load(here + t_j)
                from_start = gl.where(n_i == 0, from_start, 0.0)
                seen = seen & (n_i[:, None] == n_j[None, :])
            factor = exp2(gl.where(seen, s_i[:, None] - s_j[None, :], -float("inf")))
            factor *= vectors_t.slice(Q, Q).load(j_columns)[None, :]
            own = vectors_t.slice(2 * Q, Q).load(j_columns)
            factor = gl.where(t_i[:, None] == t_j[None, :], own[None, :], factor)
            pairs, through = warpgroup_mma_wait(0, deps=(pairs, through))
            weights = gl.convert_layout((pairs * factor).to(dtype), operand)
            out = through * from_start[:, None]
            if D is not None:
                out += widen(x_t.load(of_pairs)) * skip
            out = warpgroup_mma(weights, x_t, out, is_async=True)
        state_0 = warpgroup_mma(x_k, k_0, state_0, is_async=True)
        if PANELS == 2:
            state_1 = warpgroup_mma(x_k, k_1, state_1, is_async=True)
            state_1 = warpgroup_mma_wait(0, deps=(state_1,))
        state_0 = warpgroup_mma_wait(0, deps=(state_0,))
        if OUTPUT:
            out = warpgroup_mma_wait(0, deps=(out,))
        else:
            all_decay *= whole
        gl.thread_barrier()
        _fetch(
            x, B, vectors, phases, x_tiles, B_tiles, vector_tiles, phase_tiles, bars,
            stage, chunk + 2, chunk + 2 < stop, row, head, group, column, at, Q,
        )  # fmt: skip
        if OUTPUT:
            y_t = y_tile.reshape([Q, Q])
            real = (chunk * Q + t_i < end)[:, None]
            if raw is not None:
                if LENGTHS:
                    out = gl.where(real, out, 0.0)
                raw_tile.reshape([Q, Q]).store(out.to(dtype))
            if z is not None:
                mbarrier.wait(z_bar, step & 1)
                out *= silu(widen(y_t.load(of_pairs)), False)
            if LENGTHS:
                out = gl.where(real, out, 0.0)
            y_t.store(out.to(dtype))
            fence_async_shared()
            gl.thread_barrier()
            tma.async_copy_shared_to_global(y, [row, chunk * Q, head, column], y_tile)
            if raw is not None:
                tma.async_copy_shared_to_global(raw, [row, chunk * Q, head, column], raw_tile)
    for k in gl.static_range(2):
        mbarrier.invalidate(bars.index(k))
    if OUTPUT:
        tma.store_wait(0)
        mbarrier.invalidate(C_bar)
        mbarrier.invalidate(z_bar)
    state_at = final + bh * (P * N)
    if not OUTPUT:
        state_at = ends + (bh * segments + segment) * (P * N)
        gl.store(totals + bh * segments + segment, all_decay)
    if segment == segments - 1 or not OUTPUT:
        gl.store(state_at + cell, state_0)
        if PANELS == 2:
            gl.store(state_at + Q + cell, state_1)


def forward(
    x, dt, A, B, C, trap, angles, B_bias, C_bias, D, mimo_x, angle, ssm, k, v,
    reset, lengths, halves, chunk_len, z, finish, keep,
):  # fmt: skip
    arguments = (x, dt, A, B, C, trap, angles, B_bias, C_bias, D, mimo_x, angle, ssm, k, v)
    if not _serves(x, B, C, z, angles, mimo_x, halves, finish):
        return portable.forward(*arguments, reset, lengths, halves, chunk_len, z, finish, keep)
    b, l, h, p = x.shape
    g, n = B.shape[3:]
    s, chunks = angles.shape[-1], triton.cdiv(l, _Q)
    x, B, C, z = (None if t is None else for_tma(t) for t in (x, B[:, :, 0], C[:, :, 0], z))
    B_bias, C_bias, D = (None if t is None else t.contiguous() for t in (B_bias, C_bias, D))
    angle, ssm, k, v = angle.float().contiguous(), ssm.float().contiguous(), k.contiguous(), v.contiguous()
    angles = angles if angles.stride(-1) == 1 else angles.contiguous()
    given = {"RESET": reset is not None, "LENGTHS": lengths is not None}

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=x.device)

    with device_of(x):
        vectors, decays, early = empty(b * h * chunks, 4 * _Q), empty(b, h, chunks), empty(b, h)
        document = None if reset is None else empty(b, chunks * _Q, dtype=torch.int32)
        BH = min(block(h, 1), 32)
        _vectors_kernel[(b * chunks * triton.cdiv(h, BH),)](
            dt, A, trap, reset, lengths, vectors, decays, early, document, l, chunks, h,
            *dt.stride(), *A.stride(), *trap.stride(), *((0, 0) if reset is None else reset.stride()),
            **given, T=_Q, BH=BH, num_warps=4,
        )  # fmt: skip
        phases, turns = empty(b * h * chunks * _Q, s, dtype=torch.int16), empty(b, h, chunks, s)
        bases, BS = empty(b, h, chunks + 1, s), block(s)
        _phases_kernel[(b * chunks * triton.cdiv(h, _HEADS) * triton.cdiv(s, 32),)](
            dt, angles, document, lengths, phases, turns, l, chunks, h, s, *dt.stride(), *angles.stride()[:2],
            **given, T=_Q, BS=32, BH=_HEADS, num_warps=1,
        )  # fmt: skip
        turns_kernel[(b * h,)](
            turns, document, angle, bases, chunks, h, s,
            RESET=reset is not None, T=_Q, BC=min(64, block(chunks, 1)), BS=BS, num_warps=4,
        )  # fmt: skip
        blocks = p // _Q
        segments = segments_of(b * h * blocks, 2 * processors_of(x), chunks, _SEGMENT_CHUNKS, pays=_SEGMENTS)
        per_segment = triton.cdiv(chunks, segments)
        segments = triton.cdiv(chunks, per_segment)
        y, final = empty(b, l, 1, h, p, dtype=x.dtype), empty(b, h, p, n)
        raw = empty(b, l, 1, h, p, dtype=x.dtype) if keep else x.new_empty(0)
        ends, totals = (empty(b, h, segments, p, n), empty(b, h, segments)) if segments > 1 else (None, None)
        for output in (False, True) if segments > 1 else (True,):
            _forward_kernel[(b * h * segments * blocks,)](
                tiles(x, _Q, _Q), tiles(B, _Q, n), tiles(C, _Q, n), None if z is None else tiles(z, _Q, _Q),
                tiles(y[:, :, 0], _Q, _Q), tiles(raw[:, :, 0], _Q, _Q) if keep else None,
                matrix(vectors, 1, 4 * _Q), matrix(phases, _Q, 32 * triton.cdiv(s, 32)),
                decays, bases, B_bias, C_bias, D, document, ssm, early, k, v, ends, totals, final, lengths,
                l, chunks, h, h // g, per_segment, segments,
                OUTPUT=output, **given, Q=_Q, N=n, P=p, S=s, num_warps=4,
            )  # fmt: skip
        last_angle = torch.empty_like(angle)
        last_k, last_v = empty(b, 1, h, n, dtype=x.dtype), empty(b, h, p, dtype=x.dtype)
        _last_kernel[(b * h,)](
            x, B, B_bias, bases, lengths, angle, k, v, last_angle, last_k, last_v, l, chunks, h, h // g,
            *x.stride()[:3], *B.stride()[:3],
            LENGTHS=lengths is not None, N=n, S=s, P=p, BS=BS, BP=block(p), num_warps=1,
        )  # fmt: skip
    return y, raw, last_angle, final, last_k, last_v


_HEADS = 8  # that share the angles' rates when these are added up
_SEGMENT_CHUNKS = 16  # fewer than this in a segment of l are not worth the second pass over them
_SEGMENTS = 3  # and less segments than this not either


def _serves(x, B, C, z, angles, mimo_x, halves: bool, finish: bool) -> bool:
    """Is this one of the shapes that the kernel is made for?"""
    alike = all(t is None or t.dtype == x.dtype for t in (B, C, z))
    one_rank = B.shape[2] == 1 and mimo_x is None and finish and not halves
    sizes = x.shape[-1] % _Q == 0 and B.shape[-1] in (64, 128) and angles.shape[-1] % 8 == 0
    return x.element_size() == 2 and alike and one_rank and sizes

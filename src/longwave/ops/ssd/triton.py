"""SSD on a GPU, portable Triton: the running state stays on chip, and l is split only where b h cannot fill the GPU.

Chunks of q tokens. With s the cumulative sum of dt A inside a chunk, h_0 the state before it, and sums over j <= i in
i's document (section 6 of arXiv:2405.21060):

    y_i   = sum_j exp(s_i - s_j) (C_i . B_j) dt_j x_j + exp(s_i) C_i h_0 + D x_i
    h_end = exp(s_q) h_0 + sum_j exp(s_q - s_j) dt_j B_j x_j^T

`exp(s_i)` is 0 once the chunk has begun a document before i, and `exp(s_q - s_j)` unless j is of its last document.
Decays are powers of 2: s is kept in units of log 2, in float64 beside float32 inputs. States are (n, p) on chip,
(p, n) outside.

The backward pass walks the chunks forwards for the states before them and backwards for the gradients of the states
after them, both stored once in the inputs' dtype, and then takes all chunks at once: a program holds B and C of one
chunk and adds up their gradients over the heads of its group, in a fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from longwave.ops.triton_chunks import chunk_weights
from longwave.ops.triton_math import LOG2E, TYPES, block, device_of, processors_of, rows, step_size
from longwave.ops.triton_segments import pass_states, segments_of, splits_of


@triton.jit
def _sizes_kernel(
    dt, dt_bias, A, reset, lengths, sizes, decay, document,
    l, chunks, h, stride_b, stride_l, stride_h, stride_rb, stride_rl, low, high,
    SOFTPLUS: tl.constexpr, BIAS: tl.constexpr, RESET: tl.constexpr, LENGTHS: tl.constexpr,
    Q: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """Step sizes and their cumulative decays (b, h, chunks q), and the number of the document within the chunk."""
    blocks = tl.cdiv(h, BH)
    i, head = tl.program_id(0) // blocks, (tl.program_id(0) % blocks) * BH + tl.arange(0, BH)
    row, chunk = (i // chunks).to(tl.int64), i % chunks
    t = chunk * Q + tl.arange(0, Q)
    end = tl.load(lengths + row).to(tl.int32) if LENGTHS else l
    real = (t < end)[:, None] & (head < h)[None, :]
    at = row * stride_b + t.to(tl.int64)[:, None] * stride_l + head[None, :] * stride_h
    raw = tl.load(dt + at, mask=real, other=0.0).to(tl.float32)
    if BIAS:
        raw += tl.load(dt_bias + head, mask=head < h, other=0.0).to(tl.float32)[None, :]
    # float64 for float32 inputs: the error of a size is in all decays behind it, and a GPU's exponentials are rough.
    size, _ = step_size(raw.to(decay.dtype.element_ty), SOFTPLUS)
    size = tl.where(real, tl.minimum(tl.maximum(size, low), high), 0.0)
    rate = tl.load(A + head, mask=head < h, other=0.0).to(decay.dtype.element_ty) * LOG2E
    to = (row * h + head.to(tl.int64)[None, :]) * (chunks * Q) + t[:, None]
    tl.store(sizes + to, size, mask=(head < h)[None, :])
    tl.store(decay + to, tl.cumsum(size.to(rate.dtype) * rate[None, :], 0), mask=(head < h)[None, :])
    if RESET:
        begins = tl.load(reset + row * stride_rb + t.to(tl.int64) * stride_rl, mask=t < end, other=0).to(tl.int32)
        tl.store(document + row * (chunks * Q) + t, tl.cumsum(begins, 0))


@triton.jit
def _states_kernel(
    u, v, sizes, decay, document, initial, states, final, total, lengths,
    l, chunks, h, h_per_g, per_segment, segments,
    stride_ub, stride_ul, stride_ug, stride_vb, stride_vl, stride_vh,
    REVERSE: tl.constexpr, STORE: tl.constexpr, INITIAL: tl.constexpr, TOTAL: tl.constexpr, RESET: tl.constexpr,
    LENGTHS: tl.constexpr, Q: tl.constexpr, N: tl.constexpr, P: tl.constexpr, BN: tl.constexpr,
    BP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The state (n, p) through a segment's chunks, u being B and v x; reversed its gradient, u being C and v dy.

    `states` (b, h, chunks, n, p) takes what each chunk is given, `final` (b, h, segments, p, n) the last one, and
    `total` (b, h, segments) the decay of the whole segment. `initial` is of `final`'s shape.
    """
    program = tl.program_id(0).to(tl.int64)
    bh, segment = program // segments, program % segments
    row, head = bh // h, bh % h
    i_n, i_p, t = tl.arange(0, BN), tl.arange(0, BP), tl.arange(0, Q)
    inside = (i_n < N)[:, None] & (i_p < P)[None, :]
    outside = i_p[None, :] * N + i_n[:, None]
    state = tl.zeros((BN, BP), tl.float32)
    if INITIAL:
        state = tl.load(initial + program * (N * P) + outside, mask=inside, other=0.0)
    end = tl.load(lengths + row).to(tl.int32) if LENGTHS else l
    first = (segment * per_segment).to(tl.int32)
    count = tl.minimum(chunks - first, per_segment)
    u += row * stride_ub + (head // h_per_g) * stride_ug
    v += row * stride_vb + head * stride_vh
    begin = segment * per_segment + (count - 1 if REVERSE else 0)
    u += begin * Q * stride_ul
    v += begin * Q * stride_vl
    step: tl.constexpr = -Q if REVERSE else Q
    dtype = states.dtype.element_ty if STORE else v.dtype.element_ty
    all_decay = 1.0
    for k in range(count):
        chunk = first + (count - 1 - k if REVERSE else k)
        if STORE:
            cell = i_n[:, None] * P + i_p[None, :]
            tl.store(states + (bh * chunks + chunk) * (N * P) + cell, state.to(states.dtype.element_ty), mask=inside)
        begin = bh * (chunks * Q) + chunk * Q
        size, _, from_start, to_end, whole, _ = chunk_weights(
            sizes, decay, document, begin, row * (chunks * Q) + chunk * Q, t, Q, RESET
        )
        weight = from_start if REVERSE else to_end * size
        token = chunk * Q + t
        real = token < end
        u_t = tl.load(
            u + t[None, :] * stride_ul + i_n[:, None],
            mask=real[None, :] & (i_n < N)[:, None],
            other=0.0,
        )
        v_t = tl.load(
            v + t[:, None] * stride_vl + i_p[None, :],
            mask=real[:, None] & (i_p < P)[None, :],
            other=0.0,
        )
        v_t = (v_t.to(tl.float32) * weight[:, None]).to(dtype)
        state = tl.dot(u_t.to(dtype), v_t, state * whole, input_precision=PRECISION)
        u += step * stride_ul
        v += step * stride_vl
        all_decay *= whole
    tl.store(final + program * (N * P) + outside, state, mask=inside)
    if TOTAL:
        tl.store(total + program, all_decay)


@triton.jit
def _forward_kernel(
    x, B, C, D, sizes, decay, document, initial, y, final, lengths,
    l, chunks, h, h_per_g, per_segment, segments,
    stride_xb, stride_xl, stride_xh, stride_Bb, stride_Bl, stride_Bg, stride_Cb, stride_Cl, stride_Cg,
    stride_Dh, stride_Dp,
    INITIAL: tl.constexpr, FINAL: tl.constexpr, SKIP: tl.constexpr, RESET: tl.constexpr, LENGTHS: tl.constexpr,
    Q: tl.constexpr, N: tl.constexpr, P: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    bh, segment = program // segments, program % segments
    row, head = bh // h, bh % h
    i_n, i_p, t = tl.arange(0, BN), tl.arange(0, BP), tl.arange(0, Q)
    inside = (i_n < N)[:, None] & (i_p < P)[None, :]
    outside = i_p[None, :] * N + i_n[:, None]
    state = tl.zeros((BN, BP), tl.float32)
    if INITIAL:
        state = tl.load(initial + program * (N * P) + outside, mask=inside, other=0.0)
    end = tl.load(lengths + row).to(tl.int32) if LENGTHS else l
    if SKIP:
        skip = tl.load(D + head * stride_Dh + i_p * stride_Dp, mask=i_p < P, other=0.0).to(tl.float32)
    x += row * stride_xb + head * stride_xh
    y += (row * l * h + head) * P
    B += row * stride_Bb + (head // h_per_g) * stride_Bg
    C += row * stride_Cb + (head // h_per_g) * stride_Cg
    dtype = x.dtype.element_ty
    first = (segment * per_segment).to(tl.int32)
    x += segment * per_segment * Q * stride_xl
    B += segment * per_segment * Q * stride_Bl
    C += segment * per_segment * Q * stride_Cl
    y += segment * per_segment * Q * (h * P)
    for chunk in range(first, tl.minimum(first + per_segment, chunks)):
        begin = bh * (chunks * Q) + chunk * Q
        size, s, from_start, to_end, whole, number = chunk_weights(
            sizes, decay, document, begin, row * (chunks * Q) + chunk * Q, t, Q, RESET
        )
        token = chunk * Q + t
        real = token < end
        x_t = tl.load(
            x + t[:, None] * stride_xl + i_p[None, :],
            mask=real[:, None] & (i_p < P)[None, :],
            other=0.0,
        )
        BT = tl.load(
            B + t[None, :] * stride_Bl + i_n[:, None],
            mask=real[None, :] & (i_n < N)[:, None],
            other=0.0,
        ).to(dtype)
        C_t = tl.load(
            C + t[:, None] * stride_Cl + i_n[None, :],
            mask=real[:, None] & (i_n < N)[None, :],
            other=0.0,
        ).to(dtype)
        y_t = tl.dot(C_t, state.to(dtype), input_precision=PRECISION) * from_start[:, None]
        seen = t[:, None] >= t[None, :]
        if RESET:
            seen = seen & (number[:, None] == number[None, :])
        weights = tl.dot(C_t, BT, input_precision=PRECISION)
        weights *= tl.exp2(tl.where(seen, (s[:, None] - s[None, :]).to(tl.float32), -float("inf"))) * size[None, :]
        y_t = tl.dot(weights.to(dtype), x_t, y_t, input_precision=PRECISION)
        if SKIP:
            y_t += skip[None, :] * x_t.to(tl.float32)
        tl.store(
            y + t[:, None] * (h * P) + i_p[None, :],
            y_t.to(dtype),
            mask=(token < l)[:, None] & (i_p < P)[None, :],
        )
        x_t = (x_t.to(tl.float32) * (to_end * size)[:, None]).to(dtype)
        state = tl.dot(BT, x_t, state * whole, input_precision=PRECISION)
        x += Q * stride_xl
        B += Q * stride_Bl
        C += Q * stride_Cl
        y += Q * (h * P)
    if FINAL:
        tl.store(final + program * (N * P) + outside, state, mask=inside)


@triton.jit
def _pairs(
    dy, x, dt, dt_bias, A, B, C, D, sizes, decay, document, states, dstates, end,
    dx, ddt, dA_parts, dbias_parts, dD_parts,
    row, chunk, group, split, l, chunks, h, h_per_g, h_per_program, low, high,
    stride_dyl, stride_dyh, stride_xl, stride_xh, stride_tb, stride_tl, stride_th, stride_Bl, stride_Cl,
    stride_Dh, stride_Dp,
    SOFTPLUS: tl.constexpr, BIAS: tl.constexpr, SKIP: tl.constexpr, RESET: tl.constexpr, EXACT: tl.constexpr,
    Q: tl.constexpr, N: tl.constexpr, P: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Of one chunk and some heads of one group: dx and ddt."""
    i_n, i_p, t = tl.arange(0, BN), tl.arange(0, BP), tl.arange(0, Q)
    in_n, in_p = i_n < N, i_p < P
    token = (chunk * Q).to(tl.int32) + t
    real = token < end
    start = chunk * Q
    dtype = x.dtype.element_ty
    B_t = tl.load(
        B + start * stride_Bl + t[:, None] * stride_Bl + i_n[None, :], mask=real[:, None] & in_n[None, :], other=0.0
    )
    C_t = tl.load(
        C + start * stride_Cl + t[:, None] * stride_Cl + i_n[None, :], mask=real[:, None] & in_n[None, :], other=0.0
    )
    B_t, C_t = B_t.to(dtype), C_t.to(dtype)
    BC = tl.dot(B_t, tl.trans(C_t), input_precision=PRECISION)  # (j, i)
    seen = t[:, None] <= t[None, :]
    if RESET:
        number = tl.load(document + row * (chunks * Q) + token)
        seen = seen & (number[:, None] == number[None, :])
    mask = real[:, None] & in_p[None, :]
    inside = in_n[:, None] & in_p[None, :]
    for k in range(h_per_program):
        head = group * h_per_g + split * h_per_program + k
        bh = row * h + head
        size, s, from_start, to_end, whole, _ = chunk_weights(
            sizes, decay, document, bh * (chunks * Q) + chunk * Q, row * (chunks * Q) + chunk * Q, t, Q, RESET
        )
        x_t = tl.load(
            x + (head * stride_xh + start * stride_xl) + (t[:, None] * stride_xl + i_p[None, :]), mask=mask, other=0.0
        )
        dy_t = tl.load(
            dy + (head * stride_dyh + start * stride_dyl) + (t[:, None] * stride_dyl + i_p[None, :]),
            mask=mask,
            other=0.0,
        )
        dy_t = dy_t.to(dtype)
        first, cell = (bh * chunks + chunk) * (N * P), i_n[:, None] * P + i_p[None, :]
        state = tl.load(states + first + cell, mask=inside, other=0.0)
        dstate = tl.load(dstates + first + cell, mask=inside, other=0.0)

        given = tl.dot(C_t, state, input_precision=PRECISION)  # (i, p)
        ds = tl.sum(dy_t.to(tl.float32) * given, 1) * from_start
        ds = tl.cumsum(ds, 0, reverse=True)  # of dt A at each token
        ds += whole * tl.sum(state.to(tl.float32) * dstate.to(tl.float32))

        factor = tl.exp2(tl.where(seen, (s[None, :] - s[:, None]).to(tl.float32), -float("inf")))  # (j, i)
        pairs = tl.dot(x_t, tl.trans(dy_t), input_precision=PRECISION) * factor
        pairs *= BC
        dsize = tl.sum(pairs, 1)
        pairs *= size[:, None]
        if EXACT:  # the pairs j < t <= i for each t, and no others that would have to cancel
            ds += tl.sum(tl.where(t[:, None] < t[None, :], tl.cumsum(pairs, 1, reverse=True), 0.0), 0)
        else:
            ds += tl.cumsum(tl.sum(pairs, 0) - tl.sum(pairs, 1), 0, reverse=True)

        through = tl.dot(B_t, dstate, input_precision=PRECISION)  # (j, p)
        arrived = tl.sum(x_t.to(tl.float32) * through, 1) * to_end
        dsize += arrived
        arrived *= size
        if EXACT:
            ds += tl.sum(tl.where(t[:, None] < t[None, :], arrived[:, None], 0.0), 0)
        else:
            ds += tl.cumsum(arrived, 0) - arrived
        weights = (BC * factor * size[:, None]).to(dtype)
        dx_t = tl.dot(weights, dy_t, through * (to_end * size)[:, None], input_precision=PRECISION)
        part = (row * chunks + chunk) * h + head
        if SKIP:
            skip = tl.load(D + head * stride_Dh + i_p * stride_Dp, mask=in_p, other=0.0).to(tl.float32)
            dx_t += skip[None, :] * dy_t.to(tl.float32)
            tl.store(dD_parts + part * P + i_p, tl.sum(x_t.to(tl.float32) * dy_t.to(tl.float32), 0), mask=in_p)
        tl.store(
            dx + ((row * l + start) * h + head) * P + (t[:, None] * (h * P) + i_p[None, :]),
            dx_t.to(dtype),
            mask=(token < l)[:, None] & in_p[None, :],
        )

        rate = tl.load(A + head).to(tl.float32)
        raw = tl.load(
            dt + (row * stride_tb + start * stride_tl + head * stride_th) + t * stride_tl, mask=real, other=0.0
        )
        raw = raw.to(tl.float32)
        if BIAS:
            raw += tl.load(dt_bias + head).to(tl.float32)
        free, slope = step_size(raw, SOFTPLUS)
        slope = tl.where(real & (free >= low) & (free <= high), slope, 0.0)
        draw = (dsize + ds * rate) * slope
        tl.store(ddt + ((row * l + start) * h + head) + t * h, draw.to(ddt.dtype.element_ty), mask=token < l)
        tl.store(dA_parts + part, tl.sum(ds * size))
        tl.store(dbias_parts + part, tl.sum(draw))


@triton.jit
def _through_states(
    v, w, states, sizes, decay, document, end, out, dBC,
    row, chunk, group, split, chunks, h, g, h_per_g, h_per_program, splits, stride_vl, stride_vh, stride_wl, stride_wh,
    OF_C: tl.constexpr, RESET: tl.constexpr,
    Q: tl.constexpr, N: tl.constexpr, P: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What reaches dB through the state after a chunk (v is x), or dC through the one before it (v is dy), over heads.

    With dB comes the gradient of B C^T inside the chunk (w is dy), indexed (j, i).
    """
    i_n, i_p, t = tl.arange(0, BN), tl.arange(0, BP), tl.arange(0, Q)
    inside = (i_n < N)[None, :] & (i_p < P)[:, None]
    token = (chunk * Q).to(tl.int32) + t
    mask = (token < end)[:, None] & (i_p < P)[None, :]
    dtype = states.dtype.element_ty
    total, pairs = tl.zeros((Q, BN), tl.float32), tl.zeros((Q, Q), tl.float32)
    for k in range(h_per_program):
        head = group * h_per_g + split * h_per_program + k
        bh = row * h + head
        size, s, from_start, to_end, _, number = chunk_weights(
            sizes, decay, document, bh * (chunks * Q) + chunk * Q, row * (chunks * Q) + chunk * Q, t, Q, RESET
        )
        v_t = tl.load(
            v + (head * stride_vh + chunk * Q * stride_vl) + (t[:, None] * stride_vl + i_p[None, :]),
            mask=mask,
            other=0.0,
        )
        if OF_C:
            weight = from_start
        else:
            weight = to_end * size
            w_t = tl.load(
                w + (head * stride_wh + chunk * Q * stride_wl) + (t[None, :] * stride_wl + i_p[:, None]),
                mask=(token < end)[None, :] & (i_p < P)[:, None],
                other=0.0,
            ).to(dtype)
            seen = t[:, None] <= t[None, :]
            if RESET:
                seen = seen & (number[:, None] == number[None, :])
            factor = tl.exp2(tl.where(seen, (s[None, :] - s[:, None]).to(tl.float32), -float("inf")))
            pairs += tl.dot(v_t, w_t, input_precision=PRECISION) * factor * size[:, None]
        state = tl.load(
            states + (bh * chunks + chunk) * (N * P) + (i_n[None, :] * P + i_p[:, None]), mask=inside, other=0.0
        )  # (p, n)
        v_t = (v_t.to(tl.float32) * weight[:, None]).to(dtype)
        total = tl.dot(v_t, state, total, input_precision=PRECISION)
    at = ((row * chunks + chunk) * g + group) * splits + split
    tl.store(out + at * (Q * N) + t[:, None] * N + i_n[None, :], total, mask=(i_n < N)[None, :])
    if not OF_C:
        tl.store(dBC + at * (Q * Q) + t[:, None] * Q + t[None, :], pairs)


@triton.jit
def _backward_kernel(
    dy, x, dt, dt_bias, A, B, C, D, sizes, decay, document, states, dstates, lengths,
    dx, ddt, dB, dC, dBC, dA_parts, dbias_parts, dD_parts,
    l, chunks, h, g, h_per_g, h_per_program, splits, low, high,
    stride_dyb, stride_dyl, stride_dyh, stride_xb, stride_xl, stride_xh, stride_tb, stride_tl, stride_th,
    stride_Bb, stride_Bl, stride_Bg, stride_Cb, stride_Cl, stride_Cg, stride_Dh, stride_Dp,
    SOFTPLUS: tl.constexpr, BIAS: tl.constexpr, SKIP: tl.constexpr, RESET: tl.constexpr, LENGTHS: tl.constexpr,
    EXACT: tl.constexpr, Q: tl.constexpr, N: tl.constexpr, P: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Three programs side by side read the same chunk and heads, the second and third from the cache of the GPU."""
    program = tl.program_id(0).to(tl.int64)
    job, program = program % 3, program // 3
    split, group = program % splits, program // splits % g
    chunk, row = program // (splits * g) % chunks, program // (splits * g * chunks)
    end = tl.load(lengths + row).to(tl.int32) if LENGTHS else l
    dy += row * stride_dyb
    x += row * stride_xb
    if job == 0:
        _pairs(
            dy, x, dt, dt_bias, A, B + row * stride_Bb + group * stride_Bg, C + row * stride_Cb + group * stride_Cg, D,
            sizes, decay, document, states, dstates, end, dx, ddt, dA_parts, dbias_parts, dD_parts,
            row, chunk, group, split, l, chunks, h, h_per_g, h_per_program, low, high,
            stride_dyl, stride_dyh, stride_xl, stride_xh, stride_tb, stride_tl, stride_th, stride_Bl, stride_Cl,
            stride_Dh, stride_Dp, SOFTPLUS, BIAS, SKIP, RESET, EXACT, Q, N, P, BN, BP, PRECISION,
        )  # fmt: skip
    elif job == 1:
        _through_states(
            x, dy, dstates, sizes, decay, document, end, dB, dBC,
            row, chunk, group, split, chunks, h, g, h_per_g, h_per_program, splits, stride_xl, stride_xh,
            stride_dyl, stride_dyh,
            False, RESET, Q, N, P, BN, BP, PRECISION,
        )  # fmt: skip
    else:
        _through_states(
            dy, x, states, sizes, decay, document, end, dC, dBC,
            row, chunk, group, split, chunks, h, g, h_per_g, h_per_program, splits, stride_dyl, stride_dyh,
            stride_xl, stride_xh,
            True, RESET, Q, N, P, BN, BP, PRECISION,
        )  # fmt: skip


@triton.jit
def _finish_kernel(
    B, C, lengths, dB_parts, dC_parts, dBC_parts, dB, dC, l, chunks, g, splits,
    stride_Bb, stride_Bl, stride_Bg, stride_Cb, stride_Cl, stride_Cg,
    LENGTHS: tl.constexpr, Q: tl.constexpr, N: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """Adds up the parts of a chunk's dB and dC in order, and takes the gradient of B C^T to both."""
    program = tl.program_id(0).to(tl.int64)
    group, chunk, row = program % g, program // g % chunks, program // (g * chunks)
    end = tl.load(lengths + row).to(tl.int32) if LENGTHS else l
    i_n, t = tl.arange(0, BN), tl.arange(0, Q)
    in_n = (i_n < N)[None, :]
    token = (chunk * Q).to(tl.int32) + t
    mask = (token < end)[:, None] & in_n
    B_t = tl.load(
        B + row * stride_Bb + group * stride_Bg + chunk * Q * stride_Bl + (t[:, None] * stride_Bl + i_n[None, :]),
        mask=mask,
        other=0.0,
    ).to(DTYPE)
    C_t = tl.load(
        C + row * stride_Cb + group * stride_Cg + chunk * Q * stride_Cl + (t[:, None] * stride_Cl + i_n[None, :]),
        mask=mask,
        other=0.0,
    ).to(DTYPE)
    of_B, of_C, of_BC = tl.zeros((Q, BN), tl.float32), tl.zeros((Q, BN), tl.float32), tl.zeros((Q, Q), tl.float32)
    of_CB = tl.zeros((Q, Q), tl.float32)
    for k in range(splits):
        at = program * splits + k
        cell = at * (Q * N) + t[:, None] * N + i_n[None, :]
        of_B += tl.load(dB_parts + cell, mask=in_n, other=0.0)
        of_C += tl.load(dC_parts + cell, mask=in_n, other=0.0)
        of_BC += tl.load(dBC_parts + at * (Q * Q) + t[:, None] * Q + t[None, :])
        of_CB += tl.load(dBC_parts + at * (Q * Q) + t[None, :] * Q + t[:, None])
    of_B = tl.dot(of_BC.to(DTYPE), C_t, of_B, input_precision=PRECISION)
    of_C = tl.dot(of_CB.to(DTYPE), B_t, of_C, input_precision=PRECISION)
    to = ((row * l + chunk * Q) * g + group) * N + (t[:, None] * (g * N) + i_n[None, :])
    mask = (token < l)[:, None] & in_n
    tl.store(dB + to, of_B.to(dB.dtype.element_ty), mask=mask)
    tl.store(dC + to, of_C.to(dC.dtype.element_ty), mask=mask)


@triton.jit
def _step_kernel(
    state, x, dt, A, B, C, D, dt_bias, y, h, h_per_g, p, n, low, high,
    stride_sb, stride_sh, stride_sp, stride_xb, stride_xh, stride_tb, stride_th,
    stride_Bb, stride_Bg, stride_Cb, stride_Cg, stride_Dh, stride_Dp,
    SOFTPLUS: tl.constexpr, BIAS: tl.constexpr, SKIP: tl.constexpr, BN: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    bh = tl.program_id(0).to(tl.int64)
    row, head = bh // h, bh % h
    i_p, i_n = tl.program_id(1) * BP + tl.arange(0, BP), tl.arange(0, BN)
    in_p, in_n = i_p < p, i_n < n
    size = tl.load(dt + row * stride_tb + head * stride_th).to(tl.float32)
    if BIAS:
        size += tl.load(dt_bias + head).to(tl.float32)
    size, _ = step_size(size, SOFTPLUS)
    size = tl.minimum(tl.maximum(size, low), high)
    decay = tl.exp2(size * tl.load(A + head).to(tl.float32) * LOG2E)
    group = head // h_per_g
    B_t = tl.load(B + row * stride_Bb + group * stride_Bg + i_n, mask=in_n, other=0.0).to(tl.float32)
    C_t = tl.load(C + row * stride_Cb + group * stride_Cg + i_n, mask=in_n, other=0.0).to(tl.float32)
    x_t = tl.load(x + row * stride_xb + head * stride_xh + i_p, mask=in_p, other=0.0).to(tl.float32)
    at = state + row * stride_sb + head * stride_sh + i_p[:, None] * stride_sp + i_n[None, :]
    mask = in_p[:, None] & in_n[None, :]
    after = tl.load(at, mask=mask, other=0.0) * decay + (x_t * size)[:, None] * B_t[None, :]
    tl.store(at, after, mask=mask)
    y_t = tl.sum(after * C_t[None, :], 1)
    if SKIP:
        y_t += tl.load(D + head * stride_Dh + i_p * stride_Dp, mask=in_p, other=0.0).to(tl.float32) * x_t
    tl.store(y + bh * p + i_p, y_t.to(y.dtype.element_ty), mask=in_p)


_BACKWARD_WARPS = 4
_SEGMENT_CHUNKS = 64  # fewer than this in a segment of l are not worth the second pass over them
_SEGMENTS = 4  # and less segments than this not either: two programs share a processor well


def forward(x, dt, A, B, C, D, dt_bias, initial_state, reset, lengths, dt_softplus, low, high, chunk_len):
    x, B, C = rows(x), rows(B), rows(C)
    b, l, h, p = x.shape
    with device_of(x):
        plan = _Plan(x, dt, A, B, D, dt_bias, reset, lengths, dt_softplus, low, high, chunk_len)
        y = torch.empty(b, l, h, p, dtype=x.dtype, device=x.device)
        begins, final = _contiguous(initial_state), plan.state()
        if plan.segments > 1:
            begins, final = plan.segment_states(B, x, begins, reverse=False)
        _forward_kernel[(b * h * plan.segments,)](
            x, B, C, plan.D, *plan.decays, begins, y, final, lengths,
            l, plan.chunks, h, plan.h_per_g, plan.per_segment, plan.segments,
            *x.stride()[:3], *B.stride()[:3], *C.stride()[:3], *plan.D_strides,
            INITIAL=begins is not None, FINAL=plan.segments == 1, SKIP=D is not None, **plan.flags,
            num_warps=4, num_stages=2,
        )  # fmt: skip
    return y, final


def backward(dy, dfinal, x, dt, A, B, C, D, dt_bias, initial_state, reset, lengths, dt_softplus, low, high, chunk_len):
    x, B, C, dy = rows(x), rows(B), rows(C), rows(dy)
    b, l, h, p = x.shape
    g, n = B.shape[2:]
    with device_of(x):
        plan = _Plan(x, dt, A, B, D, dt_bias, reset, lengths, dt_softplus, low, high, chunk_len)
        states, _ = plan.chunk_states(B, x, _contiguous(initial_state), reverse=False)
        dstates, dinitial = plan.chunk_states(C, dy, _contiguous(dfinal), reverse=True)
        splits = splits_of(plan.h_per_g, b * plan.chunks * g, plan.wanted)
        dx = torch.empty(b, l, h, p, dtype=x.dtype, device=x.device)
        ddt = torch.empty(b, l, h, dtype=dt.dtype, device=x.device)
        dB, dC = (torch.empty(b, l, g, n, dtype=t.dtype, device=x.device) for t in (B, C))
        q = plan.flags["Q"]
        dB_parts, dC_parts = (plan.empty(b, plan.chunks, g, splits, q, n) for _ in range(2))
        dBC_parts = plan.empty(b, plan.chunks, g, splits, q, q)
        dA, dbias = (plan.empty(b * plan.chunks, h) for _ in range(2))
        dD = plan.empty(b * plan.chunks, h, p) if D is not None else None
        _backward_kernel[(3 * b * plan.chunks * g * splits,)](
            dy, x, dt, dt_bias, A, B, C, plan.D, *plan.decays, states, dstates, lengths,
            dx, ddt, dB_parts, dC_parts, dBC_parts, dA, dbias, dD,
            l, plan.chunks, h, g, plan.h_per_g, plan.h_per_g // splits, splits, low, high,
            *dy.stride()[:3], *x.stride()[:3], *dt.stride(), *B.stride()[:3], *C.stride()[:3], *plan.D_strides,
            SOFTPLUS=dt_softplus, BIAS=dt_bias is not None, SKIP=D is not None,
            EXACT=x.element_size() == 4, **plan.flags, num_warps=_BACKWARD_WARPS, num_stages=1,
        )  # fmt: skip
        _finish_kernel[(b * plan.chunks * g,)](
            B, C, lengths, dB_parts, dC_parts, dBC_parts, dB, dC, l, plan.chunks, g, splits,
            *B.stride()[:3], *C.stride()[:3], LENGTHS=lengths is not None, Q=q, N=n, BN=block(n),
            PRECISION=plan.flags["PRECISION"], DTYPE=TYPES[x.dtype], num_warps=4,
        )  # fmt: skip
    if dD is not None:
        dD = dD.sum((0, 2)) if D.dim() == 1 else dD.sum(0)
    grads = ((dx, x), (ddt, dt), (dA.sum(0), A), (dB, B), (dC, C), (dD, D), (dbias.sum(0), dt_bias))
    given = tuple(x.new_empty(0) if t is None else grad.to(t.dtype) for grad, t in grads)
    return *given, x.new_empty(0) if initial_state is None else dinitial.to(initial_state.dtype)


def step(state, x, dt, A, B, C, D, dt_bias, dt_softplus, low, high):
    b, h, p, n = state.shape
    x, B, C = rows(x), rows(B), rows(C)
    memory = rows(state)
    y = torch.empty(b, h, p, dtype=x.dtype, device=x.device)
    BN = block(n)
    BP = max(1, min(block(p), 8192 // BN))
    with device_of(x):
        _step_kernel[(b * h, triton.cdiv(p, BP))](
            memory, x, dt, A, B, C, D, dt_bias, y, h, h // B.shape[1], p, n, low, high,
            *memory.stride()[:3], *x.stride()[:2], *dt.stride(), *B.stride()[:2], *C.stride()[:2], *_skip_strides(D),
            SOFTPLUS=dt_softplus, BIAS=dt_bias is not None, SKIP=D is not None, BN=BN, BP=BP,
            num_warps=max(1, BP * BN // 1024),
        )  # fmt: skip
    if memory is not state:
        state.copy_(memory)
    return y


def _contiguous(state: Tensor | None) -> Tensor | None:
    return None if state is None else state.to(torch.float32).contiguous()


def _skip_strides(D: Tensor | None) -> tuple[int, int]:
    """D may be (h,), the same for all of a head's channels."""
    return (0, 0) if D is None else (D.stride(0), D.stride(1) if D.dim() == 2 else 0)


class _Plan:
    """How the work is cut, and the decays of every chunk."""

    def __init__(self, x, dt, A, B, D, dt_bias, reset, lengths, dt_softplus, low, high, chunk_len):
        b, l, h, p = x.shape
        g, self.n = B.shape[2:]
        self.x, self.lengths, self.h_per_g = x, lengths, h // g
        self.D, self.D_strides = D, _skip_strides(D)
        q = 64 if x.element_size() == 2 else 32
        q = min(q, block(chunk_len)) if chunk_len else q
        self.chunks = triton.cdiv(l, q)
        processors = processors_of(x)
        self.wanted = 4 * processors
        segments = segments_of(b * h, 2 * processors, self.chunks, _SEGMENT_CHUNKS, pays=_SEGMENTS)
        self.per_segment = triton.cdiv(self.chunks, segments)
        self.segments = triton.cdiv(self.chunks, self.per_segment)
        self.flags = {
            "RESET": reset is not None, "LENGTHS": lengths is not None, "Q": q, "N": self.n, "P": p,
            "BN": block(self.n), "BP": block(p), "PRECISION": "tf32" if x.element_size() == 2 else "ieee",
        }  # fmt: skip
        sizes = self.empty(b, h, self.chunks * q)
        # Of float32 numbers a difference would lose digits that float32 inputs are owed.
        decay = torch.empty_like(sizes, dtype=torch.float32 if x.element_size() == 2 else torch.float64)
        document = None if reset is None else torch.empty(b, self.chunks * q, dtype=torch.int32, device=x.device)
        self.decays = (sizes, decay, document)
        BH = min(block(h, 1), 32)
        _sizes_kernel[(b * self.chunks * triton.cdiv(h, BH),)](
            dt, dt_bias, A, reset, lengths, *self.decays, l, self.chunks, h, *dt.stride(),
            *(reset.stride() if reset is not None else (0, 0)), low, high,
            SOFTPLUS=dt_softplus, BIAS=dt_bias is not None, RESET=reset is not None, LENGTHS=lengths is not None,
            Q=q, BH=BH, num_warps=4,
        )  # fmt: skip

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.x.device)

    def state(self) -> Tensor:
        b, _, h, p = self.x.shape
        return self.empty(b, h, p, self.n)

    def segment_states(self, u: Tensor, v: Tensor, initial: Tensor | None, *, reverse: bool) -> tuple[Tensor, Tensor]:
        """The states that the segments of l are given (b, h, segments, p, n), and the last one (b, h, p, n)."""
        b, _, h, p = v.shape
        ends, total = self.empty(b, h, self.segments, p, self.n), self.empty(b, h, self.segments)
        self._states(u, v, None, None, ends, total, reverse)
        begins, final = pass_states(ends.flatten(0, 1), total.flatten(0, 1), initial, reverse=reverse)
        return begins.view_as(ends), final.view(b, h, p, self.n)

    def chunk_states(self, u: Tensor, v: Tensor, initial: Tensor | None, *, reverse: bool) -> tuple[Tensor, Tensor]:
        """The states that the chunks are given (b, h, chunks, n, p) in v's dtype, and the last one (b, h, p, n)."""
        b, _, h, p = v.shape
        states = torch.empty(b, h, self.chunks, self.n, p, dtype=self.x.dtype, device=v.device)
        if self.segments == 1:
            final = self.state()
            self._states(u, v, initial, states, final, None, reverse)
            return states, final
        begins, final = self.segment_states(u, v, initial, reverse=reverse)
        self._states(u, v, begins, states, torch.empty_like(begins), None, reverse)
        return states, final

    def _states(self, u, v, initial, states, final, total, reverse):
        b, l, h, _ = v.shape
        _states_kernel[(b * h * self.segments,)](
            u, v, *self.decays, initial, states, final, total, self.lengths,
            l, self.chunks, h, self.h_per_g, self.per_segment, self.segments,
            *u.stride()[:3], *v.stride()[:3],
            REVERSE=reverse, STORE=states is not None, INITIAL=initial is not None, TOTAL=total is not None,
            **self.flags, num_warps=4, num_stages=2,
        )  # fmt: skip

"""Mamba-3's scan on a GPU, portable Triton: SSD's chunks (see `ssd`), with B and C biased and rotated on chip.

By the trapezoidal rule (`cpu.py` derives it) token j counts with w_j for all later tokens of its document and with
gamma_j for itself. With s the cumulative sum of dt A inside a chunk, and H the state before it,

    y_i   = sum_{j<i} exp(s_i - s_j) w_j (q_i . k_j) v_j + gamma_i (q_i . k_i) v_i + exp(s_i) H q_i + D v_i
    H_end = exp(s_q) H + sum_j exp(s_q - s_j) w_j v_j k_j^T

A row of a block is one rank of one token, so that ranks are only more rows: those of one token meet with gamma.

The first and the second channels of the pairs (`triton_rotation`), M of each, are two blocks, and so is the state.

The backward pass: with X(a, b) = a_1 b_2 - a_2 b_1 of a pair's channels, a phase's gradient is X(k, dk) + X(q, dq), and
an angle's the sum of these over all later tokens. It makes no difference whether these turn, or the state that they are
given turns back: their sum is what X gives for the final state less X(H_end, dH_end). So no sum is longer than a chunk.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from longwave.ops.mamba3_scan.reference import pairs_of
from longwave.ops.output_gate import finished, gate_gradients
from longwave.ops.trapezoid import Trapezoid
from longwave.ops.triton_chunks import chunk_weights, over_ranks
from longwave.ops.triton_math import LOG2E, TYPES, block, device_of, processors_of, rows
from longwave.ops.triton_rotation import (
    TURNS,
    angles_kernel,
    channels,
    circle,
    fraction,
    last_kernel,
    later_turns,
    partners,
    phases_kernel,
    rotate,
    rotated,
    rotated_row,
    turns_kernel,
)
from longwave.ops.triton_segments import pass_states, segments_of, splits_of


@triton.jit
def _sizes_kernel(
    dt, A, trap, reset, lengths, gamma, weight, decay, document, l, chunks, h,
    stride_tb, stride_tl, stride_th, stride_Ab, stride_Al, stride_Ah, stride_sb, stride_sl, stride_sh,
    stride_rb, stride_rl,
    RESET: tl.constexpr, LENGTHS: tl.constexpr, T: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """gamma, w and the cumulative decays (b, h, chunks T), and the number of the document within the chunk."""
    blocks = tl.cdiv(h, BH)
    i, head = tl.program_id(0) // blocks, (tl.program_id(0) % blocks) * BH + tl.arange(0, BH)
    row, chunk = (i // chunks).to(tl.int64), i % chunks
    t = chunk * T + tl.arange(0, T)
    end = tl.load(lengths + row).to(tl.int32) if LENGTHS else l
    in_h, token, column = (head < h)[None, :], t.to(tl.int64)[:, None], head[None, :]
    real, more = (t < end)[:, None] & in_h, (t + 1 < end)[:, None] & in_h
    dt_at = dt + row * stride_tb + token * stride_tl + column * stride_th
    trap_at = trap + row * stride_sb + token * stride_sl + column * stride_sh
    size = tl.load(dt_at, mask=real, other=0.0).to(tl.float32)
    share = tl.load(trap_at, mask=real, other=0.0).to(tl.float32)
    early = tl.load(dt_at + stride_tl, mask=more, other=0.0).to(tl.float32)
    early *= 1.0 - tl.load(trap_at + stride_sl, mask=more, other=0.0).to(tl.float32)
    if RESET:
        begins = reset + row * stride_rb + t.to(tl.int64) * stride_rl
        tl.store(document + row * (chunks * T) + t, tl.cumsum(tl.load(begins, mask=t < end, other=0).to(tl.int32), 0))
        next_begins = tl.load(begins + stride_rl, mask=t + 1 < end, other=0).to(tl.int32)
        early = tl.where(next_begins[:, None] == 0, early, 0.0)
    kind = decay.dtype.element_ty
    rate = tl.load(A + row * stride_Ab + token * stride_Al + column * stride_Ah, mask=real, other=0.0).to(kind)
    to = (row * h + head.to(tl.int64)[None, :]) * (chunks * T) + t[:, None]
    tl.store(gamma + to, share * size, mask=in_h)
    tl.store(weight + to, share * size + early, mask=in_h)
    tl.store(decay + to, tl.cumsum(size.to(kind) * rate * LOG2E, 0), mask=in_h)


@triton.jit
def _values(x, mimo_x, at, real, rank, P: tl.constexpr, RB: tl.constexpr, BP: tl.constexpr):
    """Rows of v (q, BP): x, times mimo_x (r, P), zero where they are not real."""
    i_p = tl.arange(0, BP)
    mask = real[:, None] & (i_p < P)[None, :]
    v = tl.load(x + at[:, None] + i_p[None, :], mask=mask, other=0.0)
    if mimo_x is not None:
        v = (v.to(tl.float32) * _scale(mimo_x, real, rank, P, RB, BP)).to(v.dtype)
    return v


@triton.jit
def _scale(mimo_x, real, rank, P: tl.constexpr, RB: tl.constexpr, BP: tl.constexpr):
    i_p = tl.arange(0, BP)
    mask = real[:, None] & (i_p < P)[None, :]
    return tl.load(mimo_x + rank[:, None] * P + i_p[None, :], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _states_kernel(
    u, bias, x, mimo_x, gamma, weight, decay, document, phases, bases, initial, states, final, total, lengths,
    l, chunks, h, h_per_g, per_segment, segments,
    stride_ub, stride_ul, stride_ur, stride_ug, stride_xb, stride_xl, stride_xr, stride_xh,
    REVERSE: tl.constexpr, STORE: tl.constexpr, INITIAL: tl.constexpr, TOTAL: tl.constexpr,
    RESET: tl.constexpr, LENGTHS: tl.constexpr, HALVES: tl.constexpr, T: tl.constexpr, R: tl.constexpr,
    RB: tl.constexpr, N: tl.constexpr, S: tl.constexpr, P: tl.constexpr, BM: tl.constexpr, BP: tl.constexpr,
    PRECISION: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """The state through a segment's chunks, of B and x; reversed its gradient, of C and dy.

    `states` (b, h, chunks, 2 M, p) takes what each chunk is given, `final` (b, h, segments, p, n) the last one, and
    `total` (b, h, segments) the decay of the whole segment. `initial` is of `final`'s shape.
    """
    program = tl.program_id(0).to(tl.int64)
    bh, segment = program // segments, program % segments
    row, head = bh // h, bh % h
    M: tl.constexpr = (N + 1) // 2
    i_m, i_p, i = tl.arange(0, BM), tl.arange(0, BP), tl.arange(0, T * RB)
    t, rank = i // RB, i % RB
    first, second, in_first, in_second = channels(N, BM, HALVES)
    in_p = (i_p < P)[None, :]
    in_first, in_second = in_first[:, None] & in_p, in_second[:, None] & in_p
    first, second = i_p[None, :] * N + first[:, None], i_p[None, :] * N + second[:, None]
    state_1, state_2 = tl.zeros((BM, BP), tl.float32), tl.zeros((BM, BP), tl.float32)
    if INITIAL:
        state_1 = tl.load(initial + program * (N * P) + first, mask=in_first, other=0.0)
        state_2 = tl.load(initial + program * (N * P) + second, mask=in_second, other=0.0)
    end = tl.load(lengths + row).to(tl.int32) if LENGTHS else l
    start = (segment * per_segment).to(tl.int32)
    count = tl.minimum(chunks - start, per_segment)
    u += row * stride_ub + (head // h_per_g) * stride_ug
    x += row * stride_xb + head * stride_xh
    if bias is not None:
        bias += head * (R * N)
    if mimo_x is not None:
        mimo_x += head * (R * P)
    begin = segment * per_segment + (count - 1 if REVERSE else 0)
    u += begin * T * stride_ul
    x += begin * T * stride_xl
    step: tl.constexpr = -T if REVERSE else T
    cell = i_m[:, None] * P + i_p[None, :]
    all_decay = 1.0
    for k in range(count):
        chunk = start + (count - 1 - k if REVERSE else k)
        if STORE:
            to = states + (bh * chunks + chunk) * (2 * M * P) + cell
            tl.store(to, state_1.to(DTYPE), mask=(i_m < M)[:, None] & in_p)
            tl.store(to + M * P, state_2.to(DTYPE), mask=(i_m < M)[:, None] & in_p)
        at = bh * (chunks * T) + chunk * T
        w, _, from_start, to_end, whole, number = chunk_weights(
            weight, decay, document, at, row * (chunks * T) + chunk * T, t, T, RESET
        )
        scale = from_start if REVERSE else to_end * w
        real = (chunk * T + t < end) & (rank < R)
        cosine, sine = circle(phases, bases, at, bh * (chunks + 1) + chunk, t, number, S, BM, RESET)
        u_1, u_2 = rotated(u, bias, t * stride_ul + rank * stride_ur, real, rank, cosine, sine, N, RB, BM, HALVES)
        v = _values(x, mimo_x, t * stride_xl + rank * stride_xr, real, rank, P, RB, BP)
        v = (v.to(tl.float32) * scale[:, None]).to(DTYPE)
        state_1 = tl.dot(tl.trans(u_1.to(DTYPE)), v, state_1 * whole, input_precision=PRECISION)
        state_2 = tl.dot(tl.trans(u_2.to(DTYPE)), v, state_2 * whole, input_precision=PRECISION)
        u += step * stride_ul
        x += step * stride_xl
        all_decay *= whole
    tl.store(final + program * (N * P) + first, state_1, mask=in_first)
    tl.store(final + program * (N * P) + second, state_2, mask=in_second)
    if TOTAL:
        tl.store(total + program, all_decay)


@triton.jit
def _forward_kernel(
    x, B, C, B_bias, C_bias, D, mimo_x, gamma, weight, decay, document, phases, bases, initial, y, final, lengths,
    l, chunks, h, h_per_g, per_segment, segments,
    stride_xb, stride_xl, stride_xh, stride_Bb, stride_Bl, stride_Br, stride_Bg,
    stride_Cb, stride_Cl, stride_Cr, stride_Cg,
    FINAL: tl.constexpr,
    RESET: tl.constexpr, LENGTHS: tl.constexpr, HALVES: tl.constexpr, T: tl.constexpr, R: tl.constexpr,
    RB: tl.constexpr, N: tl.constexpr, S: tl.constexpr, P: tl.constexpr, BM: tl.constexpr, BP: tl.constexpr,
    PRECISION: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    bh, segment = program // segments, program % segments
    row, head = bh // h, bh % h
    i_p, i = tl.arange(0, BP), tl.arange(0, T * RB)
    t, rank = i // RB, i % RB
    first, second, in_first, in_second = channels(N, BM, HALVES)
    in_p = (i_p < P)[None, :]
    in_first, in_second = in_first[:, None] & in_p, in_second[:, None] & in_p
    first, second = i_p[None, :] * N + first[:, None], i_p[None, :] * N + second[:, None]
    state_1 = tl.load(initial + program * (N * P) + first, mask=in_first, other=0.0)
    state_2 = tl.load(initial + program * (N * P) + second, mask=in_second, other=0.0)
    end = tl.load(lengths + row).to(tl.int32) if LENGTHS else l
    start = (segment * per_segment).to(tl.int32)
    x += row * stride_xb + head * stride_xh + segment * per_segment * T * stride_xl
    B += row * stride_Bb + (head // h_per_g) * stride_Bg + segment * per_segment * T * stride_Bl
    C += row * stride_Cb + (head // h_per_g) * stride_Cg + segment * per_segment * T * stride_Cl
    y += ((row * l + segment * per_segment * T) * (R * h) + head) * P
    if B_bias is not None:
        B_bias += head * (R * N)
    if C_bias is not None:
        C_bias += head * (R * N)
    if mimo_x is not None:
        mimo_x += head * (R * P)
    if D is not None:
        skip = tl.load(D + head).to(tl.float32)
    for chunk in range(start, tl.minimum(start + per_segment, chunks)):
        at = bh * (chunks * T) + chunk * T
        w, s, from_start, to_end, whole, number = chunk_weights(
            weight, decay, document, at, row * (chunks * T) + chunk * T, t, T, RESET
        )
        own = tl.load(gamma + at + t)
        real = (chunk * T + t < end) & (rank < R)
        cosine, sine = circle(phases, bases, at, bh * (chunks + 1) + chunk, t, number, S, BM, RESET)
        v = _values(x, mimo_x, t * stride_xl, real, rank, P, RB, BP)
        k_1, k_2 = rotated(B, B_bias, t * stride_Bl + rank * stride_Br, real, rank, cosine, sine, N, RB, BM, HALVES)
        q_1, q_2 = rotated(C, C_bias, t * stride_Cl + rank * stride_Cr, real, rank, cosine, sine, N, RB, BM, HALVES)
        k_1, k_2, q_1, q_2 = tl.trans(k_1.to(DTYPE)), tl.trans(k_2.to(DTYPE)), q_1.to(DTYPE), q_2.to(DTYPE)
        pairs = tl.dot(q_1, k_1, input_precision=PRECISION)
        pairs = tl.dot(q_2, k_2, pairs, input_precision=PRECISION)
        seen = t[:, None] > t[None, :]
        if RESET:
            seen = seen & (number[:, None] == number[None, :])
        factor = tl.exp2(tl.where(seen, (s[:, None] - s[None, :]).to(tl.float32), -float("inf"))) * w[None, :]
        factor = tl.where(t[:, None] == t[None, :], own[None, :], factor)
        pairs = (pairs * factor).to(DTYPE)
        y_t = tl.dot(q_1, state_1.to(DTYPE), input_precision=PRECISION)
        y_t = tl.dot(q_2, state_2.to(DTYPE), y_t, input_precision=PRECISION) * from_start[:, None]
        y_t = tl.dot(pairs, v, y_t, input_precision=PRECISION)
        if D is not None:
            y_t += skip * v.to(tl.float32)
        tl.store(
            y + (t * R + rank)[:, None] * (h * P) + i_p[None, :],
            y_t.to(y.dtype.element_ty),
            mask=((chunk * T + t < l) & (rank < R))[:, None] & in_p,
        )
        v = (v.to(tl.float32) * (to_end * w)[:, None]).to(DTYPE)
        state_1 = tl.dot(k_1, v, state_1 * whole, input_precision=PRECISION)
        state_2 = tl.dot(k_2, v, state_2 * whole, input_precision=PRECISION)
        x += T * stride_xl
        B += T * stride_Bl
        C += T * stride_Cl
        y += T * R * h * P
    if FINAL:
        tl.store(final + program * (N * P) + first, state_1, mask=in_first)
        tl.store(final + program * (N * P) + second, state_2, mask=in_second)


@triton.jit
def _of_values(
    dy, x, B, C, B_bias, C_bias, D, mimo_x, gamma, weight, decay, document, phases, bases, states, dstates, end,
    dx, ddtA, dgamma, dweight, crossed, dD_parts, dmimo_parts,
    row, chunk, group, split, l, chunks, h, h_per_g, h_per_program,
    stride_dyl, stride_dyr, stride_dyh, stride_xl, stride_xh, stride_Bl, stride_Br, stride_Cl, stride_Cr,
    EXACT: tl.constexpr, RESET: tl.constexpr, HALVES: tl.constexpr, T: tl.constexpr, R: tl.constexpr,
    RB: tl.constexpr, N: tl.constexpr, S: tl.constexpr, P: tl.constexpr, BM: tl.constexpr, BP: tl.constexpr,
    PRECISION: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Of one chunk and some heads of one group: dx, and the gradients of dt A, gamma and w."""
    M: tl.constexpr = (N + 1) // 2
    i_m, i_p, i, each = tl.arange(0, BM), tl.arange(0, BP), tl.arange(0, T * RB), tl.arange(0, T)
    t, rank = i // RB, i % RB
    in_p = (i_p < P)[None, :]
    inside = (i_m < M)[:, None] & in_p
    start = chunk * T
    token = start.to(tl.int32) + t
    real = (token < end) & (rank < R)
    same = t[:, None] == t[None, :]
    for k in range(h_per_program):
        head = group * h_per_g + split * h_per_program + k
        bh = row * h + head
        at = bh * (chunks * T) + start
        w, s, from_start, to_end, whole, number = chunk_weights(
            weight, decay, document, at, row * (chunks * T) + start, t, T, RESET
        )
        own = tl.load(gamma + at + t)
        cosine, sine = circle(phases, bases, at, bh * (chunks + 1) + chunk, t, number, S, BM, RESET)
        bias = None if B_bias is None else B_bias + head * (R * N)
        k_1, k_2 = rotated(B, bias, t * stride_Bl + rank * stride_Br, real, rank, cosine, sine, N, RB, BM, HALVES)
        bias = None if C_bias is None else C_bias + head * (R * N)
        q_1, q_2 = rotated(C, bias, t * stride_Cl + rank * stride_Cr, real, rank, cosine, sine, N, RB, BM, HALVES)
        k_1, k_2, q_1, q_2 = k_1.to(DTYPE), k_2.to(DTYPE), q_1.to(DTYPE), q_2.to(DTYPE)
        scale = None if mimo_x is None else mimo_x + head * (R * P)
        v = _values(x + (head * stride_xh + start * stride_xl), scale, t * stride_xl, real, rank, P, RB, BP)
        dy_t = _values(
            dy + (head * stride_dyh + start * stride_dyl), None, t * stride_dyl + rank * stride_dyr, real, rank,
            P, RB, BP,
        ).to(DTYPE)  # fmt: skip
        first = (bh * chunks + chunk) * (2 * M * P)
        cell = i_m[:, None] * P + i_p[None, :]
        state_1 = tl.load(states + first + cell, mask=inside, other=0.0)
        state_2 = tl.load(states + first + M * P + cell, mask=inside, other=0.0)
        dstate_1 = tl.load(dstates + first + cell, mask=inside, other=0.0)
        dstate_2 = tl.load(dstates + first + M * P + cell, mask=inside, other=0.0)

        given = tl.dot(q_1, state_1, input_precision=PRECISION)
        given = tl.dot(q_2, state_2, given, input_precision=PRECISION)  # (i, p)
        ds = tl.sum(dy_t.to(tl.float32) * given, 1) * from_start
        ds = tl.cumsum(ds, 0, reverse=True)  # of dt A at each token, as its first row has it
        through = tl.dot(k_1, dstate_1, input_precision=PRECISION)
        through = tl.dot(k_2, dstate_2, through, input_precision=PRECISION)  # (j, p)
        state_1, state_2 = state_1.to(tl.float32), state_2.to(tl.float32)
        dstate_1, dstate_2 = dstate_1.to(tl.float32), dstate_2.to(tl.float32)
        ds += whole * tl.sum(state_1 * dstate_1 + state_2 * dstate_2)
        cross = whole * tl.sum(state_1 * dstate_2 - state_2 * dstate_1, 1)
        tl.store(crossed + (bh * chunks + chunk) * S + i_m, cross, mask=i_m < S)

        seen = t[:, None] < t[None, :]
        if RESET:
            seen = seen & (number[:, None] == number[None, :])
        factor = tl.exp2(tl.where(seen, (s[None, :] - s[:, None]).to(tl.float32), -float("inf")))  # (j, i)
        products = tl.dot(k_1, tl.trans(q_1), input_precision=PRECISION)
        products = tl.dot(k_2, tl.trans(q_2), products, input_precision=PRECISION)
        pairs = tl.dot(v, tl.trans(dy_t), input_precision=PRECISION) * products
        own_gradient = tl.sum(tl.where(same, pairs, 0.0), 1)
        pairs *= factor
        w_gradient = tl.sum(pairs, 1)
        pairs *= w[:, None]
        if EXACT:  # the pairs j < t <= i for each t, and no others that would have to cancel
            ds += tl.sum(tl.where(i[:, None] < i[None, :], tl.cumsum(pairs, 1, reverse=True), 0.0), 0)
        else:
            ds += tl.cumsum(tl.sum(pairs, 0) - tl.sum(pairs, 1), 0, reverse=True)
        arrived = tl.sum(v.to(tl.float32) * through, 1) * to_end
        w_gradient += arrived
        arrived *= w
        if EXACT:
            ds += tl.sum(tl.where(i[:, None] < i[None, :], arrived[:, None], 0.0), 0)
        else:
            ds += tl.cumsum(arrived, 0) - arrived
        weights = (tl.where(same, own[:, None], factor * w[:, None]) * products).to(DTYPE)
        dv = tl.dot(weights, dy_t, through * (to_end * w)[:, None], input_precision=PRECISION)

        part = (row * chunks + chunk) * h + head
        if D is not None:
            dv += tl.load(D + head).to(tl.float32) * dy_t.to(tl.float32)
            tl.store(dD_parts + part, tl.sum(v.to(tl.float32) * dy_t.to(tl.float32)))
        if mimo_x is not None:
            x_t = _values(x + (head * stride_xh + start * stride_xl), None, t * stride_xl, real, rank, P, RB, BP)
            of_scale = tl.sum(tl.reshape(dv * x_t.to(tl.float32), (T, RB, BP)), 0)
            i_r = tl.arange(0, RB)
            tl.store(
                dmimo_parts + part * (R * P) + i_r[:, None] * P + i_p[None, :], of_scale, mask=(i_r < R)[:, None] & in_p
            )
            dv *= _scale(scale, real, rank, P, RB, BP)
        inside_l = start.to(tl.int32) + each < l
        tl.store(
            dx + ((row * l + start) * h + head) * P + (each[:, None] * (h * P) + i_p[None, :]),
            over_ranks(dv, T, RB).to(dx.dtype.element_ty),
            mask=inside_l[:, None] & in_p,
        )
        to = (row * l + start) * h + head + each * h
        tl.store(ddtA + to, over_ranks(tl.where(rank == 0, ds, 0.0), T, RB), mask=inside_l)
        tl.store(dgamma + to, over_ranks(own_gradient, T, RB), mask=inside_l)
        tl.store(dweight + to, over_ranks(w_gradient, T, RB), mask=inside_l)


@triton.jit
def _of_rotated(
    dy, x, u, other, u_bias, other_bias, mimo_x, gamma, weight, decay, document, phases, bases, states, end,
    dlast, du, dbias, dphases, crossed,
    row, chunk, group, split, l, chunks, h, g, h_per_g, h_per_program, splits,
    stride_dyl, stride_dyr, stride_dyh, stride_xl, stride_xh, stride_ul, stride_ur, stride_ol, stride_or,
    OF_C: tl.constexpr, RESET: tl.constexpr, HALVES: tl.constexpr, T: tl.constexpr, R: tl.constexpr,
    RB: tl.constexpr, N: tl.constexpr, S: tl.constexpr, P: tl.constexpr, BM: tl.constexpr, BP: tl.constexpr,
    PRECISION: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Of one chunk and some heads of one group: the gradients of B (u; C is the other) or of C, of bias and phases.

    `states` are those before the chunk for C, and for B the gradients of those after it.
    """
    M: tl.constexpr = (N + 1) // 2
    i_m, i_p, i, each = tl.arange(0, BM), tl.arange(0, BP), tl.arange(0, T * RB), tl.arange(0, T)
    t, rank = i // RB, i % RB
    first, second, in_first, in_second = channels(N, BM, HALVES)
    inside = (i_m < M)[None, :] & (i_p < P)[:, None]
    start = chunk * T
    token = start.to(tl.int32) + t
    real = (token < end) & (rank < R)
    total_1, total_2 = tl.zeros((T * RB, BM), tl.float32), tl.zeros((T * RB, BM), tl.float32)
    for k in range(h_per_program):
        head = group * h_per_g + split * h_per_program + k
        bh = row * h + head
        at = bh * (chunks * T) + start
        w, s, from_start, to_end, _, number = chunk_weights(
            weight, decay, document, at, row * (chunks * T) + start, t, T, RESET
        )
        own = tl.load(gamma + at + t)
        scale = None if mimo_x is None else mimo_x + head * (R * P)
        v = _values(x + (head * stride_xh + start * stride_xl), scale, t * stride_xl, real, rank, P, RB, BP)
        dy_t = _values(
            dy + (head * stride_dyh + start * stride_dyl), None, t * stride_dyl + rank * stride_dyr, real, rank,
            P, RB, BP,
        ).to(DTYPE)  # fmt: skip
        if OF_C:  # (i, j)
            difference, seen, early, self = s[:, None] - s[None, :], t[:, None] > t[None, :], w[None, :], own[None, :]
            pairs = tl.dot(dy_t, tl.trans(v), input_precision=PRECISION)
            given = (dy_t.to(tl.float32) * from_start[:, None]).to(DTYPE)
        else:  # (j, i)
            difference, seen, early, self = s[None, :] - s[:, None], t[:, None] < t[None, :], w[:, None], own[:, None]
            pairs = tl.dot(v, tl.trans(dy_t), input_precision=PRECISION)
            given = (v.to(tl.float32) * (to_end * w)[:, None]).to(DTYPE)
        if RESET:
            seen = seen & (number[:, None] == number[None, :])
        factor = tl.exp2(tl.where(seen, difference.to(tl.float32), -float("inf"))) * early
        pairs = (pairs * tl.where(t[:, None] == t[None, :], self, factor)).to(DTYPE)

        cell = (bh * chunks + chunk) * (2 * M * P) + (i_m[None, :] * P + i_p[:, None])
        state_1 = tl.load(states + cell, mask=inside, other=0.0)  # (p, m)
        state_2 = tl.load(states + M * P + cell, mask=inside, other=0.0)
        du_1 = tl.dot(given, state_1, input_precision=PRECISION)
        du_2 = tl.dot(given, state_2, input_precision=PRECISION)
        cosine, sine = circle(phases, bases, at, bh * (chunks + 1) + chunk, t, number, S, BM, RESET)
        bias = None if u_bias is None else u_bias + head * (R * N)
        u_1, u_2 = rotated(u, bias, t * stride_ul + rank * stride_ur, real, rank, cosine, sine, N, RB, BM, HALVES)
        if not OF_C:
            cross = tl.sum(u_1 * du_2 - u_2 * du_1, 0)
            tl.store(crossed + (bh * chunks + chunk) * S + i_m, cross, mask=i_m < S)
        bias = None if other_bias is None else other_bias + head * (R * N)
        o_1, o_2 = rotated(other, bias, t * stride_ol + rank * stride_or, real, rank, cosine, sine, N, RB, BM, HALVES)
        du_1 = tl.dot(pairs, o_1.to(DTYPE), du_1, input_precision=PRECISION)
        du_2 = tl.dot(pairs, o_2.to(DTYPE), du_2, input_precision=PRECISION)
        if not OF_C:
            at_last = real & (token == end - 1)
            cells = ((row * R + rank) * h + head)[:, None] * N
            mask = at_last[:, None] & in_first[None, :]
            du_1 += tl.load(dlast + cells + first[None, :], mask=mask, other=0.0).to(tl.float32)
            mask = at_last[:, None] & in_second[None, :]
            du_2 += tl.load(dlast + cells + second[None, :], mask=mask, other=0.0).to(tl.float32)
        dphase = over_ranks(u_1 * du_2 - u_2 * du_1, T, RB)
        tl.store(
            dphases + at * S + (each[:, None] * S + i_m[None, :]),
            dphase.to(dphases.dtype.element_ty),
            mask=(i_m < S)[None, :],
        )
        du_1, du_2 = rotate(du_1, du_2, cosine, -sine)
        du_1, du_2 = tl.where(real[:, None], du_1, 0.0), tl.where(real[:, None], du_2, 0.0)
        if u_bias is not None:
            i_r = tl.arange(0, RB)
            part = dbias + (((row * chunks + chunk) * h + head) * R + i_r[:, None]) * N
            of_bias = tl.sum(tl.reshape(du_1, (T, RB, BM)), 0)
            tl.store(part + first[None, :], of_bias, mask=(i_r < R)[:, None] & in_first[None, :])
            of_bias = tl.sum(tl.reshape(du_2, (T, RB, BM)), 0)
            tl.store(part + second[None, :], of_bias, mask=(i_r < R)[:, None] & in_second[None, :])
        total_1 += du_1
        total_2 += du_2
    to = ((row * l + start) * R * g + group) * splits + split + (t * R + rank) * (g * splits)
    mask = ((token < l) & (rank < R))[:, None]
    kind = du.dtype.element_ty
    tl.store(du + to[:, None] * N + first[None, :], total_1.to(kind), mask=mask & in_first[None, :])
    tl.store(du + to[:, None] * N + second[None, :], total_2.to(kind), mask=mask & in_second[None, :])


@triton.jit
def _backward_kernel(
    dy, x, B, C, B_bias, C_bias, D, mimo_x, gamma, weight, decay, document, phases, bases, states, dstates, lengths,
    dlast, dx, ddtA, dgamma, dweight, dB, dC, dB_parts, dC_parts, dD_parts, dmimo_parts, dphases, crossed,
    l, chunks, h, g, h_per_g, h_per_program, splits,
    stride_dyb, stride_dyl, stride_dyr, stride_dyh, stride_xb, stride_xl, stride_xh,
    stride_Bb, stride_Bl, stride_Br, stride_Bg, stride_Cb, stride_Cl, stride_Cr, stride_Cg,
    stride_phases, stride_crossed,
    EXACT: tl.constexpr, RESET: tl.constexpr, LENGTHS: tl.constexpr, HALVES: tl.constexpr, T: tl.constexpr,
    R: tl.constexpr, RB: tl.constexpr, N: tl.constexpr, S: tl.constexpr, P: tl.constexpr, BM: tl.constexpr,
    BP: tl.constexpr, PRECISION: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Three programs side by side read the same chunk and heads, the second and third from the cache of the GPU."""
    program = tl.program_id(0).to(tl.int64)
    job, program = program % 3, program // 3
    split, group = program % splits, program // splits % g
    chunk, row = program // (splits * g) % chunks, program // (splits * g * chunks)
    end = tl.load(lengths + row).to(tl.int32) if LENGTHS else l
    dy += row * stride_dyb
    x += row * stride_xb
    B += row * stride_Bb + group * stride_Bg + chunk * T * stride_Bl
    C += row * stride_Cb + group * stride_Cg + chunk * T * stride_Cl
    if job == 0:
        _of_values(
            dy, x, B, C, B_bias, C_bias, D, mimo_x, gamma, weight, decay, document, phases, bases, states, dstates,
            end, dx, ddtA, dgamma, dweight, crossed, dD_parts, dmimo_parts,
            row, chunk, group, split, l, chunks, h, h_per_g, h_per_program,
            stride_dyl, stride_dyr, stride_dyh, stride_xl, stride_xh, stride_Bl, stride_Br, stride_Cl, stride_Cr,
            EXACT, RESET, HALVES, T, R, RB, N, S, P, BM, BP, PRECISION, DTYPE,
        )  # fmt: skip
    elif job == 1:
        _of_rotated(
            dy, x, B, C, B_bias, C_bias, mimo_x, gamma, weight, decay, document, phases, bases, dstates, end,
            dlast, dB, dB_parts, dphases, crossed + stride_crossed,
            row, chunk, group, split, l, chunks, h, g, h_per_g, h_per_program, splits,
            stride_dyl, stride_dyr, stride_dyh, stride_xl, stride_xh, stride_Bl, stride_Br, stride_Cl, stride_Cr,
            False, RESET, HALVES, T, R, RB, N, S, P, BM, BP, PRECISION, DTYPE,
        )  # fmt: skip
    else:
        _of_rotated(
            dy, x, C, B, C_bias, B_bias, mimo_x, gamma, weight, decay, document, phases, bases, states, end,
            dlast, dC, dC_parts, dphases + stride_phases, crossed,
            row, chunk, group, split, l, chunks, h, g, h_per_g, h_per_program, splits,
            stride_dyl, stride_dyr, stride_dyh, stride_xl, stride_xh, stride_Cl, stride_Cr, stride_Bl, stride_Br,
            True, RESET, HALVES, T, R, RB, N, S, P, BM, BP, PRECISION, DTYPE,
        )  # fmt: skip


@triton.jit
def _step_kernel(
    angle, state, k, v, x, dt, A, B, C, trap, angles, B_bias, C_bias, D, mimo_x, y, h, h_per_g,
    stride_sb, stride_sh, stride_sp, stride_xb, stride_xh, stride_tb, stride_th, stride_Ab, stride_Ah,
    stride_pb, stride_ph, stride_Bb, stride_Br, stride_Bg, stride_Cb, stride_Cr, stride_Cg, stride_ab,
    HALVES: tl.constexpr, R: tl.constexpr, N: tl.constexpr, S: tl.constexpr, P: tl.constexpr, BN: tl.constexpr,
    BP: tl.constexpr,
):  # fmt: skip
    """One token of one head; angle (b, h, s), k (b, r, h, n) and v (b, h, p) are contiguous."""
    bh = tl.program_id(0).to(tl.int64)
    row, head = bh // h, bh % h
    group = head // h_per_g
    i_n, pair = tl.arange(0, BN), partners(N, BN, HALVES)[0]
    in_n = i_n < N
    size = tl.load(dt + row * stride_tb + head * stride_th).to(tl.float32)
    share = tl.load(trap + row * stride_pb + head * stride_ph).to(tl.float32)
    decay = tl.exp2(size * tl.load(A + row * stride_Ab + head * stride_Ah).to(tl.float32) * LOG2E)
    early, late = (1.0 - share) * size * decay, share * size
    turned = tl.load(angle + bh * S + pair, mask=pair < S, other=0.0).to(tl.float64)
    turned += tl.load(angles + row * stride_ab + pair, mask=pair < S, other=0.0).to(tl.float64) * size
    phase = fraction(turned * TURNS) * 4.0
    turned -= tl.floor(turned * TURNS + 0.5) / TURNS
    x += row * stride_xb + head * stride_xh
    B += row * stride_Bb + group * stride_Bg
    C += row * stride_Cb + group * stride_Cg
    state += row * stride_sb + head * stride_sh
    for first in range(0, P, BP):
        i_p = first + tl.arange(0, BP)
        in_p = i_p < P
        x_t = tl.load(x + i_p, mask=in_p, other=0.0).to(tl.float32)
        before = tl.load(v + bh * P + i_p, mask=in_p, other=0.0).to(tl.float32)
        cells, mask = i_p[:, None] * stride_sp + i_n[None, :], in_p[:, None] & in_n[None, :]
        after = tl.load(state + cells, mask=mask, other=0.0) * decay
        for rank in range(R):
            bias = None if B_bias is None else B_bias + (head * R + rank) * N
            k_t = rotated_row(B + rank * stride_Br, bias, phase, N, S, BN, HALVES)
            k_before = tl.load(k + ((row * R + rank) * h + head) * N + i_n, mask=in_n, other=0.0).to(tl.float32)
            new, old = x_t * late, before * early
            if mimo_x is not None:
                scale = tl.load(mimo_x + (head * R + rank) * P + i_p, mask=in_p, other=0.0).to(tl.float32)
                new, old = new * scale, old * scale
            after += new[:, None] * k_t[None, :] + old[:, None] * k_before[None, :]
        tl.store(state + cells, after, mask=mask)
        for rank in range(R):
            bias = None if C_bias is None else C_bias + (head * R + rank) * N
            q_t = rotated_row(C + rank * stride_Cr, bias, phase, N, S, BN, HALVES)
            y_t = tl.sum(after * q_t[None, :], 1)
            if D is not None:
                skip = x_t * tl.load(D + head).to(tl.float32)
                if mimo_x is not None:
                    skip *= tl.load(mimo_x + (head * R + rank) * P + i_p, mask=in_p, other=0.0).to(tl.float32)
                y_t += skip
            tl.store(y + ((row * R + rank) * h + head) * P + i_p, y_t, mask=in_p)
    tl.debug_barrier()  # all have read what is now overwritten
    for first in range(0, P, BP):
        i_p = first + tl.arange(0, BP)
        tl.store(v + bh * P + i_p, tl.load(x + i_p, mask=i_p < P, other=0.0).to(v.dtype.element_ty), mask=i_p < P)
    for rank in range(R):
        bias = None if B_bias is None else B_bias + (head * R + rank) * N
        k_t = rotated_row(B + rank * stride_Br, bias, phase, N, S, BN, HALVES)
        tl.store(k + ((row * R + rank) * h + head) * N + i_n, k_t.to(k.dtype.element_ty), mask=in_n)
    tl.store(angle + bh * S + pair, turned.to(tl.float32), mask=in_n & (pair < S))


_WARPS = 8  # with 4 the blocks of rotated B and C do not fit the registers
_SEGMENT_CHUNKS = 64  # fewer than this in a segment of l are not worth the second pass over them
_SEGMENTS = 4  # and less segments than this not either
_HEADS = 8  # that share the angles' rates when these are added up


def forward(
    x, dt, A, B, C, trap, angles, B_bias, C_bias, D, mimo_x, angle, ssm, k, v,
    reset, lengths, halves, chunk_len, z, finish, keep,
):  # fmt: skip
    with device_of(x):
        plan = _Plan(x, dt, A, B, C, trap, angles, B_bias, C_bias, D, mimo_x, angle, reset, lengths, halves, chunk_len)
        b, l, h, p = x.shape
        y = torch.empty(b, l, plan.r, h, p, dtype=x.dtype if finish and z is None else torch.float32, device=x.device)
        begins, final = plan.entry(ssm, k, v), plan.state()
        if plan.segments > 1:
            begins, final = plan.segment_states(begins, plan.of_B())
        _forward_kernel[(b * h * plan.segments,)](
            plan.x, plan.B, plan.C, plan.B_bias, plan.C_bias, plan.D, plan.mimo_x, *plan.weights, *plan.turns, begins,
            y, final, lengths, l, plan.chunks, h, plan.h_per_g, plan.per_segment, plan.segments,
            *plan.x.stride()[:3], *plan.B.stride()[:4], *plan.C.stride()[:4],
            FINAL=plan.segments == 1, **plan.flags, num_warps=_WARPS, num_stages=2,
        )  # fmt: skip
        last = plan.last_angle(angle), final, plan.last_k(k), plan.rule.last(x, v)
        return *finished(y, x, z, lengths, finish, keep), *last


def backward(
    dy, dangle, dssm, dk, dv, x, dt, A, B, C, trap, angles, B_bias, C_bias, D, mimo_x, angle, ssm, k, v,
    reset, lengths, halves, chunk_len, z, ungated,
):  # fmt: skip
    with device_of(x):
        plan = _Plan(x, dt, A, B, C, trap, angles, B_bias, C_bias, D, mimo_x, angle, reset, lengths, halves, chunk_len)
        b, l, h, p = x.shape
        r, g, n, s, chunks = plan.r, plan.g, plan.n, plan.s, plan.chunks
        dy, dz = gate_gradients(dy, z, ungated, lengths, torch.float32)
        dy, dk_last, entry = rows(dy), dk.contiguous(), plan.entry(ssm, k, v)
        states, final = plan.chunk_states(entry, plan.of_B())
        dstates, dentry = plan.chunk_states(dssm.float().contiguous(), plan.of_C(dy))
        splits = splits_of(plan.h_per_g, b * chunks * g, plan.wanted)
        dx = torch.empty(b, l, h, p, dtype=x.dtype, device=x.device)
        ddtA, dgamma, dweight, ddt = (plan.empty(b, l, h) for _ in range(4))
        parts = torch.float32 if splits > 1 else None
        dB, dC = (torch.empty(b, l, r, g, splits, n, dtype=parts or t.dtype, device=x.device) for t in (B, C))
        dB_bias, dC_bias = (None if t is None else plan.empty(b * chunks, h, r, n) for t in (B_bias, C_bias))
        dD = None if D is None else plan.empty(b * chunks, h)
        dmimo = None if mimo_x is None else plan.empty(b * chunks, h, r, p)
        dphases = torch.empty(2, b, h, chunks * plan.flags["T"], s, dtype=x.dtype, device=x.device)
        crossed = plan.empty(2, b, h, chunks, s)
        _backward_kernel[(3 * b * chunks * g * splits,)](
            dy, plan.x, plan.B, plan.C, plan.B_bias, plan.C_bias, plan.D, plan.mimo_x, *plan.weights, *plan.turns,
            states, dstates, lengths, dk_last, dx, ddtA, dgamma, dweight, dB, dC, dB_bias, dC_bias, dD, dmimo,
            dphases, crossed, l, chunks, h, g, plan.h_per_g, plan.h_per_g // splits, splits,
            *dy.stride()[:4], *plan.x.stride()[:3], *plan.B.stride()[:4], *plan.C.stride()[:4],
            dphases.stride(0), crossed.stride(0), EXACT=x.element_size() == 4, **plan.flags, num_warps=_WARPS,
            num_stages=1,
        )  # fmt: skip
        turned, dfirst_angle = plan.turned(entry, dentry, final, dssm, plan.last_k(k), dk, dangle)
        splits = splits_of(h, b * chunks, plan.wanted)
        dangles = plan.empty(b, l, splits, s)
        angles_kernel[(b * chunks * splits,)](
            dphases, crossed, turned, dt, plan.angles, plan.weights[-1], lengths, dangles, ddt,
            l, chunks, h, s, h // splits, splits, dphases.stride(0), crossed.stride(0),
            *dt.stride(), *plan.angles.stride()[:2], RESET=reset is not None, LENGTHS=lengths is not None,
            T=plan.flags["T"], BS=block(s, 1), num_warps=4,
        )  # fmt: skip
        dk, dv, dfirst, dmimo_entry = plan.rule.entry_gradients(dentry, k, v, plan.ones_or_mimo_x(), dk, dv, dx)
        ddt, dA, dtrap = plan.rule.size_gradients(ddt, ddtA, dgamma, dweight, dfirst)
    dB_bias, dC_bias, dD, dmimo = (None if t is None else t.sum(0) for t in (dB_bias, dC_bias, dD, dmimo))
    dmimo = None if dmimo is None else dmimo + dmimo_entry
    tensors = (x, dt, A, B, C, trap, angles, B_bias, C_bias, D, mimo_x, angle, ssm, k, v)
    sums = (dB.sum(4), dC.sum(4), dtrap, dangles.sum(2), dB_bias, dC_bias, dD, dmimo)
    found = zip((dx, ddt, dA, *sums, dfirst_angle, dentry, dk, dv), tensors, strict=True)
    grads = (x.new_empty(0) if t is None else grad.to(t.dtype) for grad, t in found)
    return *grads, dz


def step(angle, ssm, k, v, x, dt, A, B, C, trap, angles, B_bias, C_bias, D, mimo_x, halves):
    b, h, p, n = ssm.shape
    r, g = B.shape[1:3]
    x, B, C, angles, memory = rows(x), rows(B), rows(C), rows(angles), rows(ssm)
    state = (angle.contiguous(), memory, k.contiguous(), v.contiguous())
    y = torch.empty(b, r, h, p, dtype=torch.float32, device=x.device)
    BN = block(n)
    BP = max(1, min(block(p), 8192 // BN))
    parameters = (None if t is None else t.contiguous() for t in (B_bias, C_bias, D, mimo_x))
    with device_of(x):
        _step_kernel[(b * h,)](
            *state, x, dt, A, B, C, trap, angles, *parameters, y, h, h // g,
            *memory.stride()[:3], *x.stride()[:2], *dt.stride(), *A.stride(), *trap.stride(),
            *B.stride()[:3], *C.stride()[:3], angles.stride(0),
            HALVES=halves, R=r, N=n, S=angle.shape[2], P=p, BN=BN, BP=BP, num_warps=max(1, BP * BN // 1024),
        )  # fmt: skip
    for old, new in zip((angle, ssm, k, v), state, strict=True):
        if old is not new:
            old.copy_(new)
    return y


class _Plan:
    """How the work is cut; the weights and turns of every chunk; dense parameters."""

    def __init__(
        self, x, dt, A, B, C, trap, angles, B_bias, C_bias, D, mimo_x, angle, reset, lengths, halves, chunk_len
    ):  # fmt: skip
        b, l, h, p = x.shape
        self.r, self.g, self.n = B.shape[2:]
        self.s, self.h_per_g, self.lengths, self.halves = angles.shape[-1], h // self.g, lengths, halves
        self.x, self.B, self.C, self.angles = rows(x), rows(B), rows(C), rows(angles)
        dense = (None if t is None else t.contiguous() for t in (B_bias, C_bias, D, mimo_x))
        self.B_bias, self.C_bias, self.D, self.mimo_x = dense
        self.rule = Trapezoid(dt, A, trap, reset, lengths, torch.float32)
        narrow = x.element_size() == 2
        ranks = block(self.r, 1)
        tokens = (64 if narrow else 32) // ranks
        tokens = max(1, 16 // ranks, min(tokens, block(chunk_len or tokens, 1)))
        self.chunks = triton.cdiv(l, tokens)
        self.wanted = 4 * processors_of(x)
        segments = segments_of(b * h, self.wanted // 2, self.chunks, _SEGMENT_CHUNKS, pays=_SEGMENTS)
        self.per_segment = triton.cdiv(self.chunks, segments)
        self.segments = triton.cdiv(self.chunks, self.per_segment)
        given = {"RESET": reset is not None, "LENGTHS": lengths is not None}
        self.flags = given | {
            "HALVES": halves, "T": tokens, "R": self.r, "RB": ranks, "N": self.n, "S": self.s, "P": p,
            "BM": block((self.n + 1) // 2), "BP": block(p), "PRECISION": "tf32" if narrow else "ieee",
            "DTYPE": TYPES[x.dtype],
        }  # fmt: skip
        # Of float32 numbers a difference would lose digits that float32 inputs are owed.
        kind = torch.float32 if narrow else torch.float64
        self.vectors = self.empty(3, b, h, self.chunks * tokens)
        gamma, weight, decay = self.vectors
        decay = torch.empty_like(decay, dtype=kind) if kind != decay.dtype else decay
        document = None if reset is None else torch.empty(b, self.chunks * tokens, dtype=torch.int32, device=x.device)
        reset_strides = (0, 0) if reset is None else reset.stride()
        BH = min(block(h, 1), 32)
        _sizes_kernel[(b * self.chunks * triton.cdiv(h, BH),)](
            dt, A, trap, reset, lengths, gamma, weight, decay, document, l, self.chunks, h,
            *dt.stride(), *A.stride(), *trap.stride(), *reset_strides, **given, T=tokens, BH=BH, num_warps=4,
        )  # fmt: skip
        self.weights = (gamma, weight, decay, document)
        turns = torch.empty(b, h, self.chunks, self.s, dtype=kind, device=x.device)
        phases = torch.empty(
            b, h, self.chunks * tokens, self.s, dtype=torch.int16 if narrow else torch.float32, device=x.device
        )
        bases, BS = self.empty(b, h, self.chunks + 1, self.s), block(self.s, 1)
        phases_kernel[(b * self.chunks * triton.cdiv(h, _HEADS),)](
            dt, self.angles, reset, lengths, phases, turns, l, self.chunks, h, self.s,
            *dt.stride(), *self.angles.stride()[:2], *reset_strides, **given, T=tokens, BS=BS, BH=_HEADS, num_warps=4,
        )  # fmt: skip
        turns_kernel[(b * h,)](
            turns, document, angle.float().contiguous(), bases, self.chunks, h, self.s,
            RESET=reset is not None, T=tokens, BC=min(64, block(self.chunks, 1)), BS=BS, num_warps=4,
        )  # fmt: skip
        self.turns = (phases, bases)

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.x.device)

    def state(self) -> Tensor:
        b, _, h, p = self.x.shape
        return self.empty(b, h, p, self.n)

    def ones_or_mimo_x(self) -> Tensor:
        h, p = self.x.shape[2:]
        return self.rule.exact(self.mimo_x) if self.mimo_x is not None else self.x.new_ones(h, self.r, p).float()

    def entry(self, ssm: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.rule.entry(ssm, k, v, self.ones_or_mimo_x())

    def last_angle(self, angle: Tensor) -> Tensor:
        last = self.turns[1][:, :, -1] * (2 * math.pi)
        return last if self.lengths is None else torch.where((self.lengths > 0)[:, None, None], last, angle)

    def last_k(self, k: Tensor) -> Tensor:
        """B of each row's last token, biased and rotated; k of rows without one."""
        b, l, h, _ = self.x.shape
        last = k.to(self.x.dtype, copy=True, memory_format=torch.contiguous_format)
        last_kernel[(b * h,)](
            self.B, self.B_bias, self.turns[1], self.lengths, last, l, self.chunks, h, self.h_per_g,
            *self.B.stride()[:4], LENGTHS=self.lengths is not None, HALVES=self.halves, R=self.r, N=self.n, S=self.s,
            BN=block(self.n), num_warps=1,
        )  # fmt: skip
        return last

    def turned(self, entry, dentry, final, dssm, last_k, dk, dangle) -> tuple[Tensor, Tensor]:
        """How the tokens after a chunk turn what comes out at the end (b, h, chunks, s); the first angle's gradient."""
        through_k = self._crossed(last_k.float(), dk.float()).sum(1)
        through_state = self._crossed(final, dssm.float()).sum(2) + dangle  # (b, h, s)
        document, tokens = self.weights[-1], self.flags["T"]
        later, whole = later_turns(
            through_state, through_k, document, self.lengths, self.x.shape[1], tokens, self.chunks
        )
        return later, whole - self._crossed(entry, dentry).sum(2)

    def _crossed(self, u: Tensor, du: Tensor) -> Tensor:
        (first, second), (dfirst, dsecond) = (pairs_of(t, self.s, self.halves) for t in (u, du))
        return first * dsecond - second * dfirst

    def of_B(self):
        """What the states are made from: B, its bias, x and mimo_x, with strides; and whether it is reversed."""
        x = self.x
        return self.B, self.B_bias, x, self.mimo_x, (*x.stride()[:2], 0, x.stride(2)), False

    def of_C(self, dy: Tensor):
        """What their gradients are made from."""
        return self.C, self.C_bias, dy, None, dy.stride()[:4], True

    def segment_states(self, initial: Tensor, source) -> tuple[Tensor, Tensor]:
        """The states that the segments of l are given (b, h, segments, p, n), and the last one (b, h, p, n)."""
        b, _, h, p = self.x.shape
        ends, total = self.empty(b, h, self.segments, p, self.n), self.empty(b, h, self.segments)
        self._states(None, None, ends, total, *source)
        begins, final = pass_states(ends.flatten(0, 1), total.flatten(0, 1), initial, reverse=source[-1])
        return begins.view_as(ends), final.view(b, h, p, self.n)

    def chunk_states(self, initial: Tensor, source) -> tuple[Tensor, Tensor]:
        """The states that the chunks are given (b, h, chunks, 2 m, p) in x's dtype, and the last one (b, h, p, n)."""
        b, _, h, p = self.x.shape
        m = (self.n + 1) // 2
        states = torch.empty(b, h, self.chunks, 2 * m, p, dtype=self.x.dtype, device=self.x.device)
        if self.segments == 1:
            final = self.state()
            self._states(initial, states, final, None, *source)
            return states, final
        begins, final = self.segment_states(initial, source)
        self._states(begins, states, torch.empty_like(begins), None, *source)
        return states, final

    def _states(self, initial, states, final, total, u, bias, x, mimo_x, x_strides, reverse):
        b, l, h, _ = self.x.shape
        _states_kernel[(b * h * self.segments,)](
            u, bias, x, mimo_x, *self.weights, *self.turns, initial, states, final, total, self.lengths,
            l, self.chunks, h, self.h_per_g, self.per_segment, self.segments, *u.stride()[:4], *x_strides,
            REVERSE=reverse, STORE=states is not None, INITIAL=initial is not None, TOTAL=total is not None,
            **self.flags, num_warps=4, num_stages=2,
        )  # fmt: skip

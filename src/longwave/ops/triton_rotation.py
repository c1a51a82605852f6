"""Rotation of pairs of channels by angles that add up along a sequence, for Triton kernels.

Angles count in turns, of which only the fraction matters. In memory are the angle of each token of a chunk, counted
from the chunk's or the document's start (int16 for 16-bit inputs: 2^-16 of a turn), and that at each chunk's start.
In registers the first and the second channels of the pairs are two blocks side by side: a product over channels does
not ask for their order, and so a rotation is arithmetic between two registers.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from longwave.ops.triton_math import cos_sin

TURNS = tl.constexpr(0.15915494309189535)  # of a radian
FIXED = tl.constexpr(65536.0)  # int16 of a turn


@triton.jit
def _within(value, begins, later, later_begins):
    """Of a sum that starts anew where `begins`."""
    return later + tl.where(later_begins != 0, 0.0, value), begins | later_begins


@triton.jit
def fraction(turns):
    return turns - tl.floor(turns + 0.5)


@triton.jit
def phases_kernel(
    dt, angles, reset, lengths, phases, turns, l, chunks, h, s,
    stride_tb, stride_tl, stride_th, stride_ab, stride_al, stride_rb, stride_rl,
    RESET: tl.constexpr, LENGTHS: tl.constexpr, T: tl.constexpr, BS: tl.constexpr, BH: tl.constexpr,
):  # fmt: skip
    """Turns since the chunk's or the document's start (b, h, chunks T, s), and at the chunk's end (b, h, chunks, s)."""
    blocks = tl.cdiv(h, BH)
    i, first = tl.program_id(0) // blocks, (tl.program_id(0) % blocks) * BH
    row, chunk = (i // chunks).to(tl.int64), i % chunks
    t, j = tl.arange(0, T), tl.arange(0, BS)
    token, in_s = chunk * T + t, (j < s)[None, :]
    end = tl.load(lengths + row).to(tl.int32) if LENGTHS else l
    real, place = token < end, token.to(tl.int64)
    kind = turns.dtype.element_ty
    rate = tl.load(
        angles + row * stride_ab + place[:, None] * stride_al + j[None, :], mask=real[:, None] & in_s, other=0.0
    )
    rate = rate.to(kind) * TURNS
    if RESET:
        begins = tl.load(reset + row * stride_rb + place * stride_rl, mask=real, other=0).to(tl.int32)
        begins = tl.broadcast_to(begins[:, None], (T, BS))
    for head in range(first, tl.minimum(first + BH, h)):
        size = tl.load(dt + row * stride_tb + place * stride_tl + head * stride_th, mask=real, other=0.0).to(kind)
        value = fraction(rate * size[:, None])
        if RESET:
            value, _ = tl.associative_scan((value, begins), 0, _within)
        else:
            value = tl.cumsum(value, 0)
        value = fraction(value)
        at = (row * h + head) * chunks + chunk
        tl.store(turns + at * s + j, tl.sum(tl.where(t[:, None] == T - 1, value, 0.0), 0), mask=j < s)
        if phases.dtype.element_ty == tl.int16:
            value = tl.floor(value * FIXED + 0.5).to(tl.int32)
        tl.store(phases + at * T * s + t[:, None] * s + j[None, :], value.to(phases.dtype.element_ty), mask=in_s)


@triton.jit
def turns_kernel(
    turns, document, angle, bases, chunks, h, s,
    RESET: tl.constexpr, T: tl.constexpr, BC: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """Turns before each chunk and after the last one (b, h, chunks + 1, s)."""
    bh = tl.program_id(0).to(tl.int64)
    j, c = tl.arange(0, BS), tl.arange(0, BC)
    turned = fraction(tl.load(angle + bh * s + j, mask=j < s, other=0.0).to(tl.float64) * TURNS)
    tl.store(bases + bh * (chunks + 1) * s + j, turned.to(tl.float32), mask=j < s)
    for first in range(0, chunks, BC):
        chunk = first + c
        mask = (chunk < chunks)[:, None] & (j < s)[None, :]
        value = tl.load(turns + (bh * chunks + chunk[:, None]) * s + j[None, :], mask=mask, other=0.0).to(tl.float64)
        if RESET:
            last = tl.load(document + (bh // h * chunks + chunk) * T + T - 1, mask=chunk < chunks, other=0)
            value, begun = tl.associative_scan((value, tl.broadcast_to(last[:, None], (BC, BS))), 0, _within)
            value += tl.where(begun != 0, 0.0, turned[None, :])
        else:
            value = tl.cumsum(value, 0) + turned[None, :]
        value = fraction(value)
        tl.store(bases + (bh * (chunks + 1) + 1 + chunk[:, None]) * s + j[None, :], value.to(tl.float32), mask=mask)
        turned = tl.sum(tl.where(c[:, None] == BC - 1, value, 0.0), 0)


@triton.jit
def angles_kernel(
    dphases, crossed, final, dt, angles, document, lengths, dangles, ddt,
    l, chunks, h, s, h_per_program, splits, stride_phases, stride_crossed,
    stride_tb, stride_tl, stride_th, stride_ab, stride_al,
    RESET: tl.constexpr, LENGTHS: tl.constexpr, T: tl.constexpr, BS: tl.constexpr,
):  # fmt: skip
    """Of one chunk and some heads: the gradients of the angles (b, l, splits, s), and through them of dt (b, l, h).

    `final` (b, h, chunks, s) is what the tokens after the chunk turn in what comes out at the end.
    """
    program = tl.program_id(0).to(tl.int64)
    split, chunk, row = program % splits, program // splits % chunks, program // (splits * chunks)
    t, j = tl.arange(0, T), tl.arange(0, BS)
    start = chunk * T
    token, in_s = start.to(tl.int32) + t, (j < s)[None, :]
    end = tl.load(lengths + row).to(tl.int32) if LENGTHS else l
    real, cell = token < end, t[:, None] * s + j[None, :]
    rate = tl.load(
        angles + row * stride_ab + start * stride_al + (t[:, None] * stride_al + j[None, :]),
        mask=real[:, None] & in_s,
        other=0.0,
    ).to(tl.float32)
    if RESET:
        number = tl.load(document + row * (chunks * T) + start + t)
        after = tl.load(document + row * (chunks * T) + start + t + 1, mask=t < T - 1, other=0)
        last = tl.load(document + row * (chunks * T) + start + T - 1)
        ends = tl.broadcast_to(((after != number) & (t < T - 1)).to(tl.int32)[:, None], (T, BS))
    total = tl.zeros((T, BS), tl.float32)
    for k in range(h_per_program):
        head = split * h_per_program + k
        bh = row * h + head
        at = (bh * chunks * T + start) * s
        grad = tl.load(dphases + at + cell, mask=in_s, other=0.0).to(tl.float32)
        grad += tl.load(dphases + stride_phases + at + cell, mask=in_s, other=0.0).to(tl.float32)
        at = (bh * chunks + chunk) * s + j
        later = tl.load(final + at, mask=j < s, other=0.0) - tl.load(crossed + at, mask=j < s, other=0.0)
        later = (later - tl.load(crossed + stride_crossed + at, mask=j < s, other=0.0))[None, :]
        if RESET:
            grad, _ = tl.associative_scan((grad, ends), 0, _within, reverse=True)
            grad += tl.where((number == last)[:, None], later, 0.0)
        else:
            grad = tl.cumsum(grad, 0, reverse=True) + later
        size = tl.load(
            dt + row * stride_tb + start * stride_tl + head * stride_th + t * stride_tl, mask=real, other=0.0
        )
        total += grad * size.to(tl.float32)[:, None]
        tl.store(ddt + (row * l + start) * h + head + t * h, tl.sum(grad * rate, 1), mask=token < l)
    to = ((row * l + start) * splits + split) * s + (t[:, None] * (splits * s) + j[None, :])
    tl.store(dangles + to, total, mask=(token < l)[:, None] & in_s)


@triton.jit
def channels(N: tl.constexpr, BM: tl.constexpr, HALVES: tl.constexpr):
    """The first and the second channels of the pairs, and which of these there are."""
    i = tl.arange(0, BM)
    if HALVES:
        first, second = i, i + N // 2
        return first, second, i < N // 2, i < N // 2
    else:
        first, second = 2 * i, 2 * i + 1
        return first, second, first < N, second < N


@triton.jit
def circle(phases, bases, at, base_at, t, number, S: tl.constexpr, BM: tl.constexpr, RESET: tl.constexpr):
    """cos and sin (q, BM) of the tokens t of the chunk that begins at `at`; of 0 for pairs that are not rotated."""
    j = tl.arange(0, BM)
    phase = tl.load(phases + at * S + (t[:, None] * S + j[None, :]), mask=(j < S)[None, :], other=0).to(tl.float32)
    base = tl.load(bases + base_at * S + j, mask=j < S, other=0.0)[None, :]
    phase *= 4.0 / FIXED if phases.dtype.element_ty == tl.int16 else 4.0
    phase += tl.where(number[:, None] == 0, base, 0.0) * 4.0 if RESET else base * 4.0
    quarter = tl.floor(phase + 0.5)
    cosine, _, sine = cos_sin(quarter, phase - quarter)
    return cosine, sine


@triton.jit
def rotate(first, second, cosine, sine):
    return first * cosine - second * sine, first * sine + second * cosine


@triton.jit
def rotated(
    u, bias, at, real, rank, cosine, sine,
    N: tl.constexpr, RB: tl.constexpr, BM: tl.constexpr, HALVES: tl.constexpr,
):  # fmt: skip
    """Rows of B or C at `at`, with `bias` (r, N), rotated: the pairs' first and second channels (q, BM) in float32."""
    first_at, second_at, in_first, in_second = channels(N, BM, HALVES)
    real, in_first, in_second = real[:, None], in_first[None, :], in_second[None, :]
    if HALVES:
        first = tl.load(u + at[:, None] + first_at[None, :], mask=real & in_first, other=0.0)
        second = tl.load(u + at[:, None] + second_at[None, :], mask=real & in_second, other=0.0)
    else:
        i = tl.arange(0, 2 * BM)
        both = tl.load(u + at[:, None] + i[None, :], mask=real & (i < N)[None, :], other=0.0)
        first, second = tl.split(tl.reshape(both, (both.shape[0], BM, 2)))
    first, second = first.to(tl.float32), second.to(tl.float32)
    if bias is not None:
        bias += (rank[:, None] if RB > 1 else 0) * N
        first += tl.load(bias + first_at[None, :], mask=in_first, other=0.0).to(tl.float32)
        second += tl.load(bias + second_at[None, :], mask=in_second, other=0.0).to(tl.float32)
        first, second = tl.where(real, first, 0.0), tl.where(real, second, 0.0)
    return rotate(first, second, cosine, sine)


@triton.jit
def partners(N: tl.constexpr, BN: tl.constexpr, HALVES: tl.constexpr):
    """Of each channel: its pair, the other channel of that, and whether that comes first."""
    i = tl.arange(0, BN)
    if HALVES:
        is_second = i >= N // 2
        return tl.where(is_second, i - N // 2, i), tl.where(is_second, i - N // 2, i + N // 2), is_second
    else:
        return i // 2, i ^ 1, i % 2 == 1


@triton.jit
def rotated_row(u, bias, phase, N: tl.constexpr, S: tl.constexpr, BN: tl.constexpr, HALVES: tl.constexpr):
    """A row (n,) of B or C, with `bias` (n,), rotated by `phase`, which counts in quarter turns for each channel."""
    i = tl.arange(0, BN)
    pair, partner, is_second = partners(N, BN, HALVES)
    turned = pair < S
    own = tl.load(u + i, mask=i < N, other=0.0).to(tl.float32)
    others = tl.load(u + partner, mask=turned, other=0.0).to(tl.float32)
    if bias is not None:
        own += tl.load(bias + i, mask=i < N, other=0.0).to(tl.float32)
        others += tl.load(bias + partner, mask=turned, other=0.0).to(tl.float32)
    quarter = tl.floor(phase + 0.5)
    cosine, _, sine = cos_sin(quarter, (phase - quarter).to(tl.float32))
    return tl.where(turned, own * cosine + tl.where(is_second, others, -others) * sine, own)


@triton.jit
def last_kernel(
    B, B_bias, bases, lengths, k, l, chunks, h, h_per_g, stride_Bb, stride_Bl, stride_Br, stride_Bg,
    LENGTHS: tl.constexpr, HALVES: tl.constexpr, R: tl.constexpr, N: tl.constexpr, S: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Writes B of the last token, biased and rotated, to k (b, r, h, n); not for rows without a token."""
    bh = tl.program_id(0).to(tl.int64)
    row, head = bh // h, bh % h
    i = tl.arange(0, BN)
    end = tl.load(lengths + row) if LENGTHS else tl.cast(l, tl.int64)
    pair, _, _ = partners(N, BN, HALVES)
    phase = 4.0 * tl.load(bases + (bh * (chunks + 1) + chunks) * S + pair, mask=pair < S, other=0.0)
    B += row * stride_Bb + (head // h_per_g) * stride_Bg + (end - 1) * stride_Bl
    for rank in range(tl.where(end > 0, R, 0)):
        bias = None if B_bias is None else B_bias + (head * R + rank) * N
        last = rotated_row(B + rank * stride_Br, bias, phase, N, S, BN, HALVES)
        tl.store(k + ((row * R + rank) * h + head) * N + i, last.to(k.dtype.element_ty), mask=i < N)


def later_turns(through_state, through_k, document, lengths, l: int, tokens: int, chunks: int) -> tuple[Tensor, Tensor]:
    """How the tokens after each chunk turn what comes out at the end (b, h, chunks, s), and how all do (b, h, s).

    `through_state`, the final state's and angle's share, and `through_k`, the last token's, are (b, h, s).
    """
    ends = torch.arange(1, chunks + 1, device=through_k.device) * tokens
    if lengths is not None:
        through_k = through_k.where((lengths > 0)[:, None, None], 0.0)
    some = (ends < (l if lengths is None else lengths[:, None])).expand(len(through_k), -1)
    whole = through_state + through_k
    later = torch.where(some[:, None, :, None], whole[:, :, None], through_state[:, :, None])
    if document is not None:  # what is after a reset does not turn with what is before
        clear = (document.unflatten(1, (-1, tokens))[:, :, -1] == 0).flip(1).cumprod(1).flip(1)
        later = later * torch.nn.functional.pad(clear[:, 1:], (0, 1), value=1)[:, None, :, None]
        whole = whole * clear[:, 0, None, None]
    return later.contiguous(), whole

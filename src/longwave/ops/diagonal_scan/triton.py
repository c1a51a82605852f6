"""The diagonal scan on a GPU, portable Triton: one token after the other, the states of a block of channels on chip.

    h_t = a_t h_{t-1} + F_t B u_t;   y_t = 2 Re sum_n C h_t + D u_t, or h_t

a = Abar and F are functions of dt_t A, computed for each token, or once where dt has stride 0 along l. A program takes
some channels of one row with all their modes, and loads a tile of tokens before it works through them. Where the
channels are too few to fill the GPU, l is cut into segments, whose states a second pass hands on.

Backward, with G_t the gradient of h_t, conj(a) the complex conjugate, and dy as a complex number without C:

    G_t = 2 conj(C) dy_t + conj(a_{t+1}) G_{t+1}

With C the states before each chunk come from the forward pass. A program works through the chunk once more, putting the
states before each tile aside in memory of its own, which stays in the GPU's cache, and then goes through the tiles from
the end. Without C the states are the output.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from longwave.ops.triton_math import (
    LOG2E,
    QUARTERS,
    absent,
    block,
    cos_sin,
    device_of,
    expm1_near_0,
    power_of_2,
    processors_of,
    rows,
)
from longwave.ops.triton_segments import segments_of


@triton.jit
def _pair(x, part, cell, inside):
    """Numbers that are given as a real part and, `part` behind it, an imaginary one."""
    return (
        tl.load(x + cell, mask=inside, other=0.0).to(tl.float32),
        tl.load(x + part + cell, mask=inside, other=0.0).to(tl.float32),
    )


@triton.jit
def _parameter(A, part, cell, inside, STATES: tl.constexpr):
    """A as the sequences have their numbers, so that Triton lays all out alike: pairs side by side with STATES."""
    if STATES:
        return _pair(A, 1, 2 * cell, inside)
    return _pair(A, part, cell, inside)


@triton.jit
def _times(a, b, x, y):
    return a * x - b * y, a * y + b * x


@triton.jit
def _conj_times(a, b, x, y):
    """conj(a + ib) (x + iy)."""
    return a * x + b * y, a * y - b * x


@triton.jit
def _modes(re, im, METHOD: tl.constexpr):
    """What a step needs of A: its parts, its quarter turns as two numbers, and 1 / A for zoh."""
    if METHOD == "zoh":  # what stands in for 0 gives F = dt
        re = tl.where(tl.abs(re) + tl.abs(im) < 1e-18, -1e-18, re)
        scale = 1.0 / (re * re + im * im)
        inverse_re, inverse_im = re * scale, -im * scale
    else:
        inverse_re, inverse_im = re, im
    quarters = im.to(tl.float64) * QUARTERS
    high = quarters.to(tl.float32)
    return re, im, high, (quarters - high.to(tl.float64)).to(tl.float32), inverse_re, inverse_im


@triton.jit
def _discretize(size, A, METHOD: tl.constexpr):
    """Abar and F for steps `size`, a column."""
    re, im, high, low, inverse_re, inverse_im = A
    size = tl.broadcast_to(size, re.shape)
    nothing = tl.zeros(re.shape, tl.float32)
    if METHOD == "euler":
        return 1.0 + size * re, size * im, size, nothing
    if METHOD == "bilinear":
        p, q = _inverse(size, re, im)
        p, q = size * p, size * q
        return 1.0 + (re * p - im * q), re * q + im * p, p, q  # near 1 this rounds but once
    # No product is rounded before whole halvings and quarter turns are taken off.
    halvings = tl.floor(size * re * LOG2E + 0.5)
    rest = tl.fma(halvings, 2.121944400546906e-4, tl.fma(size, re, halvings * -0.693359375))
    scale = power_of_2(halvings)
    less = scale * expm1_near_0(tl.where(halvings < -200.0, 0.0, rest)) + (scale - 1.0)  # exp(dt re) - 1
    quarters = tl.floor(size * high + 0.5)
    cosine, cosine_less, sine = cos_sin(quarters, tl.fma(size, low, tl.fma(size, high, -quarters)))
    x, y = (1.0 + less) * cosine, (1.0 + less) * sine
    if METHOD == "dirac":
        return x, y, 1.0 + nothing, nothing
    p, q = _times(less * cosine + cosine_less, y, inverse_re, inverse_im)  # (Abar - 1) / A
    return x, y, p, q


@triton.jit
def _inverse(size, re, im):
    """1 / (1 - z/2)."""
    a, b = 1.0 - 0.5 * size * re, 0.5 * size * im
    scale = 1.0 / (a * a + b * b)
    return a * scale, b * scale


@triton.jit
def _slopes(size, A, x, y, p, q, METHOD: tl.constexpr):
    """V with d Abar / d dt = A V and d Abar / d A = dt V, which is d F / d dt but for dirac; and d F / d A."""
    re, im, _, _, inverse_re, inverse_im = A
    size = tl.broadcast_to(size, re.shape)
    nothing = tl.zeros(re.shape, tl.float32)
    if METHOD == "zoh":
        # dt^2 times the derivative of phi(z) = (exp(z) - 1) / z: near 0, where the quotient loses digits, its series
        a, b = size * re, size * im
        s, t = 1 / 840 + a * (1 / 5760), b * (1 / 5760)
        s, t = _times(a, b, s, t)
        s, t = _times(a, b, 1 / 144 + s, t)
        s, t = _times(a, b, 1 / 30 + s, t)
        s, t = _times(a, b, 1 / 8 + s, t)
        s, t = _times(a, b, 1 / 3 + s, t)
        s, t = size * size * (0.5 + s), size * size * t
        v, w = _times(size * x - p, size * y - q, inverse_re, inverse_im)
        small = a * a + b * b < 0.0625
        return x, y, tl.where(small, s, v), tl.where(small, t, w)
    if METHOD == "bilinear":
        v, w = _inverse(size, re, im)
        v, w = _times(v, w, v, w)
        return v, w, 0.5 * size * size * v, 0.5 * size * size * w
    if METHOD == "euler":
        return 1.0 + nothing, nothing, nothing, nothing
    return x, y, nothing, nothing


@triton.jit
def _tile(
    u, dt, dy, reset, start, end, i_e, i_n, e, n, stride_ul, stride_tl, stride_yl, stride_rl,
    STATES: tl.constexpr, REGULAR: tl.constexpr, GRADIENT: tl.constexpr, RESET: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """T tokens from `start` on, 0 from `end` on: tuples of u, dt, dy (pairs with STATES), and is the state kept."""
    us, vs, dts, dys, dzs, keeps = (), (), (), (), (), ()
    for k in tl.static_range(T):
        t = start + k
        here, t64 = t < end, t.to(tl.int64)
        in_e, in_n = i_e < tl.where(here, e, 0), i_n < n
        if STATES:
            at, inside = 2 * (i_e[:, None] * n + i_n[None, :]), in_e[:, None] & in_n[None, :]
            us = us + (tl.load(u + t64 * stride_ul + at, mask=inside, other=0.0),)
            vs = vs + (tl.load(u + t64 * stride_ul + at + 1, mask=inside, other=0.0),)
            if GRADIENT:
                dys = dys + (tl.load(dy + t64 * stride_yl + at, mask=inside, other=0.0),)
                dzs = dzs + (tl.load(dy + t64 * stride_yl + at + 1, mask=inside, other=0.0),)
        else:
            us = us + (tl.load(u + t64 * stride_ul + i_e, mask=in_e, other=0.0),)
            if GRADIENT:
                dys = dys + (tl.load(dy + t64 * stride_yl + i_e, mask=in_e, other=0.0),)
        if not REGULAR:
            dts = dts + (tl.load(dt + t64 * stride_tl + i_e, mask=in_e, other=0.0),)
        if RESET:
            keeps = keeps + (tl.load(reset + t64 * stride_rl, mask=here, other=0) == 0,)
    return us, vs, dts, dys, dzs, keeps


@triton.jit
def _forward_kernel(
    u, dt, A, B, C, D, initial, reset, lengths, y, final, total, states,
    l, e, n, per_segment, segments, chunks, per_state,
    stride_ub, stride_ul, stride_tb, stride_tl, stride_rb, stride_rl,
    OUTPUT: tl.constexpr, STORE: tl.constexpr, METHOD: tl.constexpr, STATES: tl.constexpr, REGULAR: tl.constexpr,
    SKIP: tl.constexpr, INITIAL: tl.constexpr, RESET: tl.constexpr, LENGTHS: tl.constexpr,
    T: tl.constexpr, BE: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """One segment. Without OUTPUT only its last state, from nothing, and the product of its decays (`total`)."""
    blocks = tl.cdiv(e, BE)
    program = tl.program_id(0).to(tl.int64)
    segment = program // blocks % segments
    row = program // (blocks * segments)
    i_e, i_n = (program % blocks).to(tl.int32) * BE + tl.arange(0, BE), tl.arange(0, BN)
    in_e = i_e < e
    inside = in_e[:, None] & (i_n < n)[None, :]
    cell, part = i_e[:, None] * n + i_n[None, :], e * n
    re, im = _parameter(A, part, cell, inside, STATES)
    modes = _modes(re, im, METHOD)
    if not STATES:
        B_re, B_im = _pair(B, part, cell, inside)
        C_re, C_im = _pair(C, part, cell, inside)
        C_re, C_im = 2.0 * C_re, 2.0 * C_im
    skip = tl.load(D + i_e, mask=in_e, other=0.0).to(tl.float32) if SKIP else 0.0
    at_state = (row * segments + segment) * (2 * part)
    h_re, h_im = tl.zeros((BE, BN), tl.float32), tl.zeros((BE, BN), tl.float32)
    all_re, all_im = tl.full((BE, BN), 1.0, tl.float32), tl.zeros((BE, BN), tl.float32)
    if INITIAL:
        h_re, h_im = _pair(initial + at_state, part, cell, inside)
    end = tl.load(lengths + row).to(tl.int32) if LENGTHS else l
    u += row * stride_ub
    dt += row * stride_tb
    reset += row * stride_rb
    if REGULAR:
        size = tl.load(dt + i_e, mask=in_e, other=0.0).to(tl.float32)
        every_x, every_y, F_re, F_im = _discretize(size[:, None], modes, METHOD)
        if not STATES:
            F_re, F_im = _times(F_re, F_im, B_re, B_im)
    first = (segment * per_segment).to(tl.int32)
    tile = _tile(
        u, dt, u, reset, first, end, i_e, i_n, e, n, stride_ul, stride_tl, 0, stride_rl, STATES, REGULAR, False, RESET,
        T,
    )  # fmt: skip
    for start in range(first, tl.minimum(first + per_segment, l), T):
        if STORE:
            if start % per_state == 0:
                at = (row * chunks + start // per_state) * (2 * part)
                tl.store(states + at + cell, h_re, mask=inside)
                tl.store(states + at + part + cell, h_im, mask=inside)
        us, vs, dts, _, _, keeps = tile
        tile = _tile(  # the next one, while this one is worked on
            u, dt, u, reset, start + T, end, i_e, i_n, e, n, stride_ul, stride_tl, 0, stride_rl, STATES, REGULAR,
            False, RESET, T,
        )  # fmt: skip
        for k in tl.static_range(T):
            t = start + k
            u_t = us[k].to(tl.float32)
            if REGULAR:
                x, y_ = tl.where(t < end, every_x, 1.0), tl.where(t < end, every_y, 0.0)
            else:
                x, y_, F_re, F_im = _discretize(dts[k].to(tl.float32)[:, None], modes, METHOD)
                if not STATES:
                    F_re, F_im = _times(F_re, F_im, B_re, B_im)
            if RESET:
                x, y_ = tl.where(keeps[k], x, 0.0), tl.where(keeps[k], y_, 0.0)
            if STATES:
                enter_re, enter_im = _times(F_re, F_im, u_t, vs[k].to(tl.float32))
            else:
                enter_re, enter_im = F_re * u_t[:, None], F_im * u_t[:, None]
            h_re, h_im = _times(x, y_, h_re, h_im)
            h_re += enter_re
            h_im += enter_im
            if not OUTPUT:
                all_re, all_im = _times(x, y_, all_re, all_im)
            elif STATES:
                to = y + (row * l + t) * (2 * part) + 2 * cell
                mask = inside & (i_e < tl.where(t < l, e, 0))[:, None]
                tl.store(to, tl.where(t < end, h_re, 0.0), mask=mask)
                tl.store(to + 1, tl.where(t < end, h_im, 0.0), mask=mask)
            else:
                y_t = tl.sum(C_re * h_re - C_im * h_im, 1) + skip * u_t
                y_t = tl.where(t < end, y_t, 0.0)
                tl.store(y + (row * l + t) * e + i_e, y_t.to(y.dtype.element_ty), mask=i_e < tl.where(t < l, e, 0))
    tl.store(final + at_state + cell, h_re, mask=inside)
    tl.store(final + at_state + part + cell, h_im, mask=inside)
    if not OUTPUT:
        tl.store(total + at_state + cell, all_re, mask=inside)
        tl.store(total + at_state + part + cell, all_im, mask=inside)


@triton.jit
def _adjoint_kernel(
    dy, dt, A, C, reset, lengths, ends, total, l, e, n, per_segment, segments,
    stride_yb, stride_yl, stride_tb, stride_tl, stride_rb, stride_rl,
    METHOD: tl.constexpr, STATES: tl.constexpr, REGULAR: tl.constexpr, RESET: tl.constexpr, LENGTHS: tl.constexpr,
    T: tl.constexpr, BE: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The gradient of the state before a segment, where the one after it is 0, and the product of its conj(a)."""
    blocks = tl.cdiv(e, BE)
    program = tl.program_id(0).to(tl.int64)
    segment = program // blocks % segments
    row = program // (blocks * segments)
    i_e, i_n = (program % blocks).to(tl.int32) * BE + tl.arange(0, BE), tl.arange(0, BN)
    in_e = i_e < e
    inside = in_e[:, None] & (i_n < n)[None, :]
    cell, part = i_e[:, None] * n + i_n[None, :], e * n
    re, im = _parameter(A, part, cell, inside, STATES)
    modes = _modes(re, im, METHOD)
    if not STATES:
        C_re, C_im = _pair(C, part, cell, inside)
    end = tl.load(lengths + row).to(tl.int32) if LENGTHS else l
    dy += row * stride_yb
    dt += row * stride_tb
    reset += row * stride_rb
    if REGULAR:
        size = tl.load(dt + i_e, mask=in_e, other=0.0).to(tl.float32)
        every_x, every_y, F_re, F_im = _discretize(size[:, None], modes, METHOD)
    g_re, g_im = tl.zeros((BE, BN), tl.float32), tl.zeros((BE, BN), tl.float32)
    all_re, all_im = tl.full((BE, BN), 1.0, tl.float32), tl.zeros((BE, BN), tl.float32)
    first = (segment * per_segment).to(tl.int32)
    tiles = tl.cdiv(tl.minimum(per_segment, l - first), T)
    for k_tile in range(tiles):
        start = first + (tiles - 1 - k_tile) * T
        dys, dzs, dts, _, _, keeps = _tile(
            dy, dt, dy, reset, start, end, i_e, i_n, e, n, stride_yl, stride_tl, 0, stride_rl, STATES, REGULAR, False,
            RESET, T,
        )  # fmt: skip
        for k in tl.static_range(T - 1, -1, -1):
            t = start + k
            dy_t = dys[k].to(tl.float32)
            if STATES:
                g_re += dy_t
                g_im += dzs[k].to(tl.float32)
            else:
                g_re += 2.0 * C_re * dy_t[:, None]
                g_im -= 2.0 * C_im * dy_t[:, None]
            if REGULAR:
                x, y = tl.where(t < end, every_x, 1.0), tl.where(t < end, every_y, 0.0)
            else:
                x, y, F_re, F_im = _discretize(dts[k].to(tl.float32)[:, None], modes, METHOD)
            if RESET:
                x, y = tl.where(keeps[k], x, 0.0), tl.where(keeps[k], y, 0.0)
            g_re, g_im = _conj_times(x, y, g_re, g_im)
            all_re, all_im = _conj_times(x, y, all_re, all_im)
    at = (row * segments + segment) * (2 * part)
    tl.store(ends + at + cell, g_re, mask=inside)
    tl.store(ends + at + part + cell, g_im, mask=inside)
    tl.store(total + at + cell, all_re, mask=inside)
    tl.store(total + at + part + cell, all_im, mask=inside)


@triton.jit
def _pass_kernel(
    ends, total, initial, begins, final, segments, part, REVERSE: tl.constexpr, INITIAL: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The states that segments are given: segment k makes total_k h + ends_k of h."""
    row = tl.program_id(0).to(tl.int64)
    cell = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = cell < part
    h_re, h_im = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    if INITIAL:
        h_re, h_im = _pair(initial + row * 2 * part, part, cell, inside)
    for k in range(segments):
        at = (row * segments + (segments - 1 - k if REVERSE else k)) * (2 * part)
        tl.store(begins + at + cell, h_re, mask=inside)
        tl.store(begins + at + part + cell, h_im, mask=inside)
        x, y = _pair(total + at, part, cell, inside)
        end_re, end_im = _pair(ends + at, part, cell, inside)
        h_re, h_im = _times(x, y, h_re, h_im)
        h_re += end_re
        h_im += end_im
    tl.store(final + row * 2 * part + cell, h_re, mask=inside)
    tl.store(final + row * 2 * part + part + cell, h_im, mask=inside)


@triton.jit
def _backward_kernel(
    dy, u, dt, A, B, C, D, initial, reset, lengths, states, after,
    du, ddt, dA, dB, dC, dD, before, scratch,
    l, e, n, per_segment, segments, chunks,
    stride_yb, stride_yl, stride_ub, stride_ul, stride_tb, stride_tl, stride_rb, stride_rl,
    METHOD: tl.constexpr, STATES: tl.constexpr, REGULAR: tl.constexpr, SKIP: tl.constexpr, INITIAL: tl.constexpr,
    RESET: tl.constexpr, LENGTHS: tl.constexpr, T: tl.constexpr, TILES: tl.constexpr,
    BE: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(e, BE)
    program = tl.program_id(0).to(tl.int64)
    segment = program // blocks % segments
    row = program // (blocks * segments)
    i_e, i_n = (program % blocks).to(tl.int32) * BE + tl.arange(0, BE), tl.arange(0, BN)
    in_e = i_e < e
    inside = in_e[:, None] & (i_n < n)[None, :]
    cell, part = i_e[:, None] * n + i_n[None, :], e * n
    re, im = _parameter(A, part, cell, inside, STATES)
    modes = _modes(re, im, METHOD)
    if not STATES:
        B_re, B_im = _pair(B, part, cell, inside)
        C_re, C_im = _pair(C, part, cell, inside)
    skip = tl.load(D + i_e, mask=in_e, other=0.0).to(tl.float32) if SKIP else 0.0
    end = tl.load(lengths + row).to(tl.int32) if LENGTHS else l
    at_state = (row * segments + segment) * (2 * part)
    g_re, g_im = _pair(after + at_state, part, cell, inside)
    dA_re, dA_im = tl.zeros((BE, BN), tl.float32), tl.zeros((BE, BN), tl.float32)
    dB_re, dB_im = tl.zeros((BE, BN), tl.float32), tl.zeros((BE, BN), tl.float32)
    dC_re, dC_im = tl.zeros((BE, BN), tl.float32), tl.zeros((BE, BN), tl.float32)
    dD_sum = tl.zeros((BE,), tl.float32)
    u += row * stride_ub
    dt += row * stride_tb
    dy += row * stride_yb
    reset += row * stride_rb
    if REGULAR:
        every = tl.load(dt + i_e, mask=in_e, other=0.0).to(tl.float32)
        every_x, every_y, F_re, F_im = _discretize(every[:, None], modes, METHOD)
        V_re, V_im, S_re, S_im = _slopes(every[:, None], modes, every_x, every_y, F_re, F_im, METHOD)
    first = (segment * per_segment).to(tl.int32)
    scratch += program * (TILES * 2 * BE * BN) + tl.arange(0, BE)[:, None] * BN + i_n[None, :]
    parts = tl.cdiv(tl.minimum(per_segment, l - first), TILES * T)
    for chunk in range(parts):
        begin = first + (parts - 1 - chunk) * (TILES * T)
        if not STATES:
            h_re, h_im = _pair(states + (row * chunks + begin // (TILES * T)) * (2 * part), part, cell, inside)
            tile = _tile(
                u, dt, dy, reset, begin, end, i_e, i_n, e, n, stride_ul, stride_tl, stride_yl, stride_rl, STATES,
                REGULAR, False, RESET, T,
            )  # fmt: skip
            for k_tile in range(TILES):
                tl.store(scratch + k_tile * (2 * BE * BN), h_re)
                tl.store(scratch + k_tile * (2 * BE * BN) + BE * BN, h_im)
                start = begin + k_tile * T
                us, vs, dts, _, _, keeps = tile
                tile = _tile(
                    u, dt, dy, reset, start + T, end, i_e, i_n, e, n, stride_ul, stride_tl, stride_yl, stride_rl,
                    STATES, REGULAR, False, RESET, T,
                )  # fmt: skip
                for k in tl.static_range(T):
                    if REGULAR:
                        x, y = tl.where(start + k < end, every_x, 1.0), tl.where(start + k < end, every_y, 0.0)
                    else:
                        x, y, F_re, F_im = _discretize(dts[k].to(tl.float32)[:, None], modes, METHOD)
                    if RESET:
                        x, y = tl.where(keeps[k], x, 0.0), tl.where(keeps[k], y, 0.0)
                    enter_re, enter_im = _times(F_re, F_im, B_re, B_im)
                    h_re, h_im = _times(x, y, h_re, h_im)
                    h_re += enter_re * us[k].to(tl.float32)[:, None]
                    h_im += enter_im * us[k].to(tl.float32)[:, None]
            tl.debug_barrier()
        for k_tile in range(TILES):
            start = begin + (TILES - 1 - k_tile) * T
            us, vs, dts, dys, dzs, keeps = _tile(
                u, dt, dy, reset, start, end, i_e, i_n, e, n, stride_ul, stride_tl, stride_yl, stride_rl, STATES,
                REGULAR, True, RESET, T,
            )  # fmt: skip
            xs, ys, Fs, Hs, hs, ks = (), (), (), (), (), ()  # Abar, F, and the states before
            if not STATES:
                from_scratch = scratch + (TILES - 1 - k_tile) * (2 * BE * BN)
                h_re, h_im = tl.load(from_scratch), tl.load(from_scratch + BE * BN)
            for k in tl.static_range(T):
                t = start + k
                if REGULAR:
                    x, y = tl.where(t < end, every_x, 1.0), tl.where(t < end, every_y, 0.0)
                else:
                    x, y, F_re, F_im = _discretize(dts[k].to(tl.float32)[:, None], modes, METHOD)
                if STATES:
                    here = inside & (i_e < tl.where((t > 0) & (t < end), e, 0))[:, None]
                    from_y = states + (row * l + t - 1) * (2 * part) + 2 * cell
                    h_re, h_im = tl.load(from_y, mask=here, other=0.0), tl.load(from_y + 1, mask=here, other=0.0)
                    if INITIAL:
                        now = inside & (i_e < tl.where(t == 0, e, 0))[:, None]
                        first_re, first_im = _pair(initial + row * (2 * part), part, cell, now)
                        h_re += first_re
                        h_im += first_im
                if RESET:
                    h_re, h_im = tl.where(keeps[k], h_re, 0.0), tl.where(keeps[k], h_im, 0.0)
                xs, ys, Fs, Hs, hs, ks = xs + (x,), ys + (y,), Fs + (F_re,), Hs + (F_im,), hs + (h_re,), ks + (h_im,)
                if not STATES:
                    enter_re, enter_im = _times(F_re, F_im, B_re, B_im)
                    h_re, h_im = _times(x, y, h_re, h_im)
                    h_re += enter_re * us[k].to(tl.float32)[:, None]
                    h_im += enter_im * us[k].to(tl.float32)[:, None]
            dD_tile = tl.zeros((BE,), tl.float32)  # few numbers at a time round less
            for k in tl.static_range(T - 1, -1, -1):
                t = start + k
                x, y, F_re, F_im, h_re, h_im = xs[k], ys[k], Fs[k], Hs[k], hs[k], ks[k]
                u_t, dy_t = us[k].to(tl.float32), dys[k].to(tl.float32)
                if REGULAR:
                    size = tl.where(t < end, every, 0.0)[:, None]
                else:
                    size = dts[k].to(tl.float32)[:, None]
                    V_re, V_im, S_re, S_im = _slopes(size, modes, x, y, F_re, F_im, METHOD)
                if STATES:
                    v_t = vs[k].to(tl.float32)
                    g_re += dy_t
                    g_im += dzs[k].to(tl.float32)
                    du_re, du_im = _conj_times(F_re, F_im, g_re, g_im)
                    to = du + (row * l + t) * (2 * part) + 2 * cell
                    mask = inside & (i_e < tl.where(t < l, e, 0))[:, None]
                    tl.store(to, tl.where(t < end, du_re, 0.0).to(du.dtype.element_ty), mask=mask)
                    tl.store(to + 1, tl.where(t < end, du_im, 0.0).to(du.dtype.element_ty), mask=mask)
                    dF_re, dF_im = _conj_times(u_t, v_t, g_re, g_im)
                else:
                    g_re += 2.0 * C_re * dy_t[:, None]
                    g_im -= 2.0 * C_im * dy_t[:, None]
                    after_re, after_im = _times(x, y, h_re, h_im)
                    enter_re, enter_im = _times(F_re, F_im, B_re, B_im)
                    dC_re += (after_re + enter_re * u_t[:, None]) * dy_t[:, None]
                    dC_im -= (after_im + enter_im * u_t[:, None]) * dy_t[:, None]
                    through_re, through_im = _conj_times(F_re, F_im, g_re, g_im)
                    dB_re += through_re * u_t[:, None]
                    dB_im += through_im * u_t[:, None]
                    du_t = tl.sum(enter_re * g_re + enter_im * g_im, 1) + skip * dy_t
                    to = (row * l + t) * e + i_e
                    du_t = tl.where(t < end, du_t, 0.0).to(du.dtype.element_ty)
                    tl.store(du + to, du_t, mask=i_e < tl.where(t < l, e, 0))
                    dD_tile += dy_t * u_t
                    dF_re, dF_im = _conj_times(B_re * u_t[:, None], B_im * u_t[:, None], g_re, g_im)
                dabar_re, dabar_im = _conj_times(h_re, h_im, g_re, g_im)
                dabar_re, dabar_im = _conj_times(V_re, V_im, dabar_re, dabar_im)
                through_re, through_im = _conj_times(S_re, S_im, dF_re, dF_im)
                dA_re += size * dabar_re + through_re
                dA_im += size * dabar_im + through_im
                dsize = modes[0] * dabar_re + modes[1] * dabar_im
                if METHOD != "dirac":
                    dsize += V_re * dF_re + V_im * dF_im
                ddt_t = tl.where(t < end, tl.sum(dsize, 1), 0.0).to(ddt.dtype.element_ty)
                tl.store(ddt + (row * l + t) * e + i_e, ddt_t, mask=i_e < tl.where(t < l, e, 0))
                g_re, g_im = _conj_times(x, y, g_re, g_im)
                if RESET:
                    g_re, g_im = tl.where(keeps[k], g_re, 0.0), tl.where(keeps[k], g_im, 0.0)
            dD_sum += dD_tile
    tl.store(before + at_state + cell, g_re, mask=inside)
    tl.store(before + at_state + part + cell, g_im, mask=inside)
    tl.store(dA + at_state + cell, dA_re, mask=inside)
    tl.store(dA + at_state + part + cell, dA_im, mask=inside)
    if not STATES:
        tl.store(dB + at_state + cell, dB_re, mask=inside)
        tl.store(dB + at_state + part + cell, dB_im, mask=inside)
        tl.store(dC + at_state + cell, 2.0 * dC_re, mask=inside)
        tl.store(dC + at_state + part + cell, 2.0 * dC_im, mask=inside)
    if SKIP:
        tl.store(dD + (row * segments + segment) * e + i_e, dD_sum, mask=in_e)


@triton.jit
def _pairs_at(x, cell, inside):
    """The two parts, in float32, of pairs that lie side by side at `cell`, (rows, 2 columns)."""
    values = tl.load(x + cell, mask=inside, other=0.0).to(tl.float32)
    return tl.split(tl.reshape(values, (values.shape[0], values.shape[1] // 2, 2)))


@triton.jit
def _step_kernel(
    state, u, dt, A, B, C, D, y, b, e, n, per_program, stride_ub, stride_tb,
    METHOD: tl.constexpr, STATES: tl.constexpr, SKIP: tl.constexpr, BE: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Some rows, one after the other, of some channels. All numbers are pairs side by side."""
    blocks = tl.cdiv(e, BE)
    first = (tl.program_id(0) // blocks).to(tl.int64) * per_program
    i_e, i_n = tl.program_id(0) % blocks * BE + tl.arange(0, BE), tl.arange(0, 2 * BN)
    in_e = i_e < e
    inside = in_e[:, None] & (i_n < 2 * n)[None, :]
    cell = i_e[:, None] * (2 * n) + i_n[None, :]
    re, im = _pairs_at(A, cell, inside)
    modes = _modes(re, im, METHOD)
    if not STATES:
        B_re, B_im = _pairs_at(B, cell, inside)
        C_re, C_im = _pairs_at(C, cell, inside)
    for row in range(first, tl.minimum(first + per_program, b)):
        size = tl.load(dt + row * stride_tb + i_e, mask=in_e, other=0.0).to(tl.float32)
        x, z, F_re, F_im = _discretize(size[:, None], modes, METHOD)
        at = row * (2 * e * n) + cell
        h_re, h_im = _pairs_at(state, at, inside)
        h_re, h_im = _times(x, z, h_re, h_im)
        if STATES:
            u_re, u_im = _pairs_at(u + row * stride_ub, cell, inside)
        else:
            u_t = tl.load(u + row * stride_ub + i_e, mask=in_e, other=0.0).to(tl.float32)
            u_re, u_im = B_re * u_t[:, None], B_im * u_t[:, None]
        enter_re, enter_im = _times(F_re, F_im, u_re, u_im)
        h_re += enter_re
        h_im += enter_im
        after = tl.reshape(tl.join(h_re, h_im), (BE, 2 * BN))
        tl.store(state + at, after, mask=inside)
        if STATES:
            tl.store(y + at, after.to(y.dtype.element_ty), mask=inside)
        else:
            y_t = 2.0 * tl.sum(C_re * h_re - C_im * h_im, 1)
            if SKIP:
                y_t += tl.load(D + i_e, mask=in_e, other=0.0).to(tl.float32) * u_t
            tl.store(y + row * e + i_e, y_t.to(y.dtype.element_ty), mask=in_e)


_TILE = 4  # tokens that are loaded before the first of them is worked on
_CELLS = 256  # of the state of one warp
_BACKWARD_CELLS = 128
_STATES_TILE, _STATES_CELLS = 2, 128  # where a token has a number for every cell
_SEGMENT = 256  # tokens of a segment that are worth a second pass over them
_STEPS = 64  # programs of a step for each processor that are worth reading the parameters once more


def forward(u, dt, A, B, C, D, initial_state, reset, lengths, method, chunk_len):
    b, l = u.shape[:2]
    e, n, _ = A.shape
    states_form = B is None
    with device_of(u):
        cut = _Cut(u, dt, A, states_form, chunk_len, _CELLS)
        u, dt = cut.u, cut.dt
        y = torch.empty(u.shape, dtype=torch.float32 if states_form else u.dtype, device=u.device)
        chunks = triton.cdiv(l, chunk_len) if chunk_len and not states_form else 0
        states = cut.empty(b, chunks, 2, n, e)  # in memory (e, n)
        begins = None if initial_state is None else _planes(initial_state)
        parameters = _parameters(A, B, C)

        def launch(initial, final, total, output):
            _forward_kernel[(cut.programs,)](
                u, dt, *parameters, D, initial, absent(reset, u), lengths, y, final, total, states,
                l, e, n, cut.per_segment, cut.segments, chunks, chunk_len,
                *u.stride()[:2], *dt.stride()[:2], *_strides(reset),
                OUTPUT=output, STORE=output and chunks > 0, METHOD=method, STATES=states_form, REGULAR=cut.regular,
                SKIP=D is not None, INITIAL=initial is not None, RESET=reset is not None, LENGTHS=lengths is not None,
                T=cut.tile, BE=cut.BE, BN=cut.BN, num_warps=cut.warps,
            )  # fmt: skip

        final = cut.empty(b, cut.segments, 2, e, n)
        if cut.segments == 1:
            launch(begins, final, None, True)
            return y, _pairs(final[:, 0]), states
        total = torch.empty_like(final)
        launch(None, final, total, False)
        begins, last = _pass(final, total, begins, reverse=False)
        launch(begins, torch.empty_like(final), None, True)
    return y, _pairs(last), states


def backward(dy, dfinal, states, u, dt, A, B, C, D, initial_state, reset, lengths, method, chunk_len):
    """`states`: those before each chunk; without B and C the states of all tokens, as the forward returned them."""
    b, l = u.shape[:2]
    e, n, _ = A.shape
    states_form = B is None
    with device_of(u):
        cut = _Cut(u, dt, A, states_form, chunk_len, _BACKWARD_CELLS)
        given, u, dt, dy = (u, dt, A, B, C, D, initial_state), cut.u, cut.dt, _dense(dy, states_form)
        start = None if initial_state is None or not states_form else _planes(initial_state)
        A, B, C = _parameters(A, B, C)
        flags = {
            "METHOD": method, "STATES": states_form, "REGULAR": cut.regular, "RESET": reset is not None,
            "LENGTHS": lengths is not None, "T": cut.tile, "BE": cut.BE, "BN": cut.BN,
        }  # fmt: skip
        sizes = (l, e, n, cut.per_segment, cut.segments)
        strides = (*dt.stride()[:2], *_strides(reset))
        after = _planes(dfinal)
        shape = (b, cut.segments, 2, e, n)
        if cut.segments > 1:
            ends, total = cut.empty(*shape), cut.empty(*shape)
            _adjoint_kernel[(cut.programs,)](
                dy, dt, A, C, absent(reset, u), lengths, ends, total, *sizes, *dy.stride()[:2], *strides, **flags,
                num_warps=cut.warps,
            )  # fmt: skip
            after, _ = _pass(ends, total, after, reverse=True)
        du = torch.empty(u.shape, dtype=u.dtype, device=u.device)
        ddt = torch.empty(b, l, e, dtype=dt.dtype, device=u.device)
        before, dA = cut.empty(*shape), cut.empty(*shape)
        dB, dC = (None if states_form else cut.empty(*shape) for _ in range(2))
        dD = None if D is None else cut.empty(b, cut.segments, e)
        tiles = chunk_len // cut.tile
        scratch = cut.empty(0 if states_form else cut.programs * tiles * 2 * cut.BE * cut.BN)
        _backward_kernel[(cut.programs,)](
            dy, u, dt, A, B, C, D, start, absent(reset, u), lengths, states, after,
            du, ddt, dA, dB, dC, dD, before, scratch, *sizes, 0 if states_form else states.shape[1],
            *dy.stride()[:2], *u.stride()[:2], *strides,
            SKIP=D is not None, INITIAL=start is not None, TILES=tiles, **flags, num_warps=cut.warps,
        )  # fmt: skip
    sums = (None if t is None else _pairs(t.sum((0, 1), keepdim=True)[0])[0] for t in (dA, dB, dC))
    found = (du, ddt, *sums, None if dD is None else dD.sum((0, 1)), _pairs(before[:, 0]))
    return tuple(
        du.new_empty(0) if t is None else grad.to(t.dtype) for t, grad in zip(given, found, strict=True)
    )  # fmt: skip


def step(state, u, dt, A, B, C, D, method):
    b, e, n, _ = state.shape
    memory, u, dt = state.contiguous(), u.contiguous(), rows(dt)
    parameters = [None if t is None else t.contiguous() for t in (A, B, C, D)]
    y = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    BN = block(n, 1)
    BE = max(1, min(block(e, 1), 512 // BN))
    blocks = triton.cdiv(e, BE)
    per_program = max(1, b * blocks // (_STEPS * processors_of(u)))
    with device_of(u):
        _step_kernel[(blocks * triton.cdiv(b, per_program),)](
            memory, u, dt, *parameters, y, b, e, n, per_program, u.stride(0), dt.stride(0),
            METHOD=method, STATES=B is None, SKIP=D is not None, BE=BE, BN=BN, num_warps=4,
        )  # fmt: skip
    if memory is not state:
        state.copy_(memory)
    return y


def _planes(t: Tensor) -> Tensor:
    """(..., e, n, 2) -> (..., 2, e, n) in float32."""
    return t.to(torch.float32).movedim(-1, -3).contiguous()


def _parameters(A: Tensor, B: Tensor | None, C: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
    if B is None or C is None:
        return A.to(torch.float32).contiguous(), None, None
    return _planes(A), _planes(B), _planes(C)


def _pairs(t: Tensor) -> Tensor:
    """(..., 2, e, n) -> (..., e, n, 2)."""
    return t.movedim(-3, -1).contiguous()


def _dense(t: Tensor, states_form: bool) -> Tensor:
    """`t` (b, l, ...), its rows in one piece."""
    if not states_form:
        return rows(t)
    return t if t[0, 0].is_contiguous() else t.contiguous()


def _strides(t: Tensor | None) -> tuple[int, int]:
    return (0, 0) if t is None else (t.stride(0), t.stride(1))


def _pass(ends: Tensor, total: Tensor, initial: Tensor | None, *, reverse: bool) -> tuple[Tensor, Tensor]:
    """The states that segments are given, of the shape of `ends` (b, segments, 2, e, n), and the last one."""
    b, segments, _, e, n = ends.shape
    begins, final = torch.empty_like(ends), ends.new_empty(b, 2, e, n)
    _pass_kernel[(b, triton.cdiv(e * n, 512))](
        ends, total, initial, begins, final, segments, e * n, REVERSE=reverse, INITIAL=initial is not None, BLOCK=512,
        num_warps=4,
    )  # fmt: skip
    return begins, final


class _Cut:
    """What the kernels read of sequences, and how the work is cut: blocks of channels, and segments of l."""

    def __init__(self, u: Tensor, dt: Tensor, A: Tensor, states_form: bool, chunk_len: int, cells: int):
        b, l = u.shape[:2]
        e, n, _ = A.shape
        self.regular = l == 1 or dt.stride(1) == 0
        self.u, self.dt = _dense(u, states_form), rows(dt[:, :1] if self.regular else dt)
        self.tile, cells = (_STATES_TILE, _STATES_CELLS) if states_form else (_TILE, cells)
        self.BN = block(n, 1)
        self.BE = max(1, min(block(e, 1), cells // self.BN))
        self.warps = max(1, min(8, self.BE * self.BN // cells))
        blocks = triton.cdiv(e, self.BE)
        segments = segments_of(b * blocks, 8 * processors_of(u), l, _SEGMENT)
        whole = chunk_len or self.tile
        self.per_segment = triton.cdiv(triton.cdiv(l, segments), whole) * whole
        self.segments = triton.cdiv(l, self.per_segment)
        self.programs = b * blocks * self.segments

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.u.device)

"""The selective scan on a GPU, portable Triton: one token after the other, the states of a block of channels on chip.

    h_t = a_t h_{t-1} + dt_t x_t B_t,  a_t = exp(dt_t A);  y_t = (h_t . C_t + D x_t) silu(z_t)

A program takes some channels of one row, all n states of each, so that B and C are read once for all of them. It loads
a tile of tokens before it works through them, which hides the memory's latency. Where the channels are too few to
fill the GPU, l is cut into segments (`triton_segments.py`).

The backward pass has the states before each chunk from the forward pass. It works through the chunk once more, putting
the states before each tile aside in memory of its own, which stays in the GPU's cache, and then goes through the tiles
from the end, with G_t the gradient of h_t:

    G_t = C_t dy_t silu(z_t) + a_{t+1} G_{t+1}

Each block of channels writes its own part of dB and dC; the parts are added up in a fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from longwave.ops.triton_math import LOG2E, absent, block, device_of, processors_of, rows, silu, step_size
from longwave.ops.triton_segments import pass_states, segments_of


@triton.jit
def _tile(
    x, dt, B, C, z, dy, reset, start, end, i_e, i_n, e, n,
    stride_xl, stride_tl, stride_Bl, stride_Cl, stride_zl, stride_yl, stride_rl,
    OUTPUT: tl.constexpr, GATE: tl.constexpr, GRADIENT: tl.constexpr, RESET: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """T tokens from `start` on, 0 from `end` on: tuples of x, dt, B, C, z, dy, and whether the state is kept."""
    xs, dts, Bs, Cs, zs, dys, keeps = (), (), (), (), (), (), ()
    for k in tl.static_range(T):
        t = start + k
        here, t64 = t < end, t.to(tl.int64)
        in_e, in_n = i_e < tl.where(here, e, 0), i_n < tl.where(here, n, 0)
        xs = xs + (tl.load(x + t64 * stride_xl + i_e, mask=in_e, other=0.0),)
        dts = dts + (tl.load(dt + t64 * stride_tl + i_e, mask=in_e, other=0.0),)
        Bs = Bs + (tl.load(B + t64 * stride_Bl + i_n, mask=in_n, other=0.0),)
        if OUTPUT:
            Cs = Cs + (tl.load(C + t64 * stride_Cl + i_n, mask=in_n, other=0.0),)
            if GATE:
                zs = zs + (tl.load(z + t64 * stride_zl + i_e, mask=in_e, other=0.0),)
        if GRADIENT:
            dys = dys + (tl.load(dy + t64 * stride_yl + i_e, mask=in_e, other=0.0),)
        if RESET:
            keeps = keeps + (tl.load(reset + t64 * stride_rl, mask=here, other=0) == 0,)
    return xs, dts, Bs, Cs, zs, dys, keeps


@triton.jit
def _forward_kernel(
    x, dt, A, B, C, D, z, dt_bias, initial, reset, lengths, y, final, total, states,
    l, e, n, per_segment, segments, chunks, per_state,
    stride_xb, stride_xl, stride_tb, stride_tl, stride_Ae, stride_An, stride_Bb, stride_Bl, stride_Cb, stride_Cl,
    stride_zb, stride_zl, stride_rb, stride_rl,
    OUTPUT: tl.constexpr, STORE: tl.constexpr, SOFTPLUS: tl.constexpr, BIAS: tl.constexpr, SKIP: tl.constexpr,
    GATE: tl.constexpr, INITIAL: tl.constexpr, RESET: tl.constexpr, LENGTHS: tl.constexpr,
    T: tl.constexpr, BE: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """One segment. Without OUTPUT only its last state, from nothing, and the product of its decays (`total`)."""
    blocks = tl.cdiv(e, BE)
    program = tl.program_id(0).to(tl.int64)
    segment = program // blocks % segments
    row = program // (blocks * segments)
    i_e, i_n = (program % blocks).to(tl.int32) * BE + tl.arange(0, BE), tl.arange(0, BN)
    in_e, in_n = i_e < e, i_n < n
    inside = in_e[:, None] & in_n[None, :]
    rate = tl.load(A + i_e[:, None] * stride_Ae + i_n[None, :] * stride_An, mask=inside, other=0.0).to(tl.float32)
    rate *= LOG2E
    cell = (row * segments + segment) * e * n + i_e[:, None] * n + i_n[None, :]
    state = tl.zeros((BE, BN), tl.float32)
    decays = tl.full((BE, BN), 1.0, tl.float32)
    if INITIAL:
        state = tl.load(initial + cell, mask=inside, other=0.0)
    end = tl.load(lengths + row).to(tl.int32) if LENGTHS else l
    bias = tl.load(dt_bias + i_e, mask=in_e, other=0.0).to(tl.float32) if BIAS else 0.0
    skip = tl.load(D + i_e, mask=in_e, other=0.0).to(tl.float32) if SKIP else 0.0
    x += row * stride_xb
    dt += row * stride_tb
    B += row * stride_Bb
    C += row * stride_Cb
    z += row * stride_zb
    reset += row * stride_rb
    first = (segment * per_segment).to(tl.int32)
    tile = _tile(
        x, dt, B, C, z, x, reset, first, end, i_e, i_n, e, n, stride_xl, stride_tl, stride_Bl, stride_Cl, stride_zl, 0,
        stride_rl, OUTPUT, GATE, False, RESET, T,
    )  # fmt: skip
    for start in range(first, tl.minimum(first + per_segment, l), T):
        if STORE:
            if start % per_state == 0:
                at = ((row * chunks + start // per_state) * n + i_n[None, :]) * e + i_e[:, None]
                tl.store(states + at, state, mask=inside)
        xs, dts, Bs, Cs, zs, _, keeps = tile
        tile = _tile(  # the next one, while this one is worked on
            x, dt, B, C, z, x, reset, start + T, end, i_e, i_n, e, n, stride_xl, stride_tl, stride_Bl, stride_Cl,
            stride_zl, 0, stride_rl, OUTPUT, GATE, False, RESET, T,
        )  # fmt: skip
        for k in tl.static_range(T):
            t = start + k
            x_t = xs[k].to(tl.float32)
            size, _ = step_size(dts[k].to(tl.float32) + bias, SOFTPLUS)
            size = tl.where(t < end, size, 0.0)
            decay = tl.exp2(size[:, None] * rate)
            if RESET:
                decay = tl.where(keeps[k], decay, 0.0)
            state = decay * state + (size * x_t)[:, None] * Bs[k].to(tl.float32)[None, :]
            if OUTPUT:
                y_t = tl.sum(state * Cs[k].to(tl.float32)[None, :], 1) + skip * x_t
                if GATE:
                    y_t *= silu(zs[k].to(tl.float32))
                y_t = tl.where(t < end, y_t, 0.0)
                tl.store(y + (row * l + t) * e + i_e, y_t.to(y.dtype.element_ty), mask=i_e < tl.where(t < l, e, 0))
            else:
                decays *= decay
    tl.store(final + cell, state, mask=inside)
    if not OUTPUT:
        tl.store(total + cell, decays, mask=inside)


@triton.jit
def _adjoint_kernel(
    dy, dt, A, C, z, dt_bias, reset, lengths, ends, total, l, e, n, per_segment, segments,
    stride_yb, stride_yl, stride_tb, stride_tl, stride_Ae, stride_An, stride_Cb, stride_Cl, stride_zb, stride_zl,
    stride_rb, stride_rl,
    SOFTPLUS: tl.constexpr, BIAS: tl.constexpr, GATE: tl.constexpr, RESET: tl.constexpr, LENGTHS: tl.constexpr,
    BE: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The gradient of the state before a segment, where the one after it is 0, and the product of its decays."""
    blocks = tl.cdiv(e, BE)
    program = tl.program_id(0).to(tl.int64)
    segment = program // blocks % segments
    row = program // (blocks * segments)
    i_e, i_n = (program % blocks).to(tl.int32) * BE + tl.arange(0, BE), tl.arange(0, BN)
    in_e, in_n = i_e < e, i_n < n
    inside = in_e[:, None] & in_n[None, :]
    rate = tl.load(A + i_e[:, None] * stride_Ae + i_n[None, :] * stride_An, mask=inside, other=0.0).to(tl.float32)
    rate *= LOG2E
    bias = tl.load(dt_bias + i_e, mask=in_e, other=0.0).to(tl.float32) if BIAS else 0.0
    end = tl.load(lengths + row).to(tl.int32) if LENGTHS else l
    grad, decays = tl.zeros((BE, BN), tl.float32), tl.full((BE, BN), 1.0, tl.float32)
    first = (segment * per_segment).to(tl.int32)
    last = tl.minimum(first + per_segment, l)
    for k in range(last - first):
        t = last - 1 - k
        here, t64 = t < end, t.to(tl.int64)
        here_e, here_n = tl.where(here, e, 0), tl.where(here, n, 0)
        dy_t = tl.load(dy + row * stride_yb + t64 * stride_yl + i_e, mask=i_e < here_e, other=0.0).to(tl.float32)
        if GATE:
            dy_t *= silu(
                tl.load(z + row * stride_zb + t64 * stride_zl + i_e, mask=i_e < here_e, other=0.0).to(tl.float32)
            )
        C_t = tl.load(C + row * stride_Cb + t64 * stride_Cl + i_n, mask=i_n < here_n, other=0.0).to(tl.float32)
        size = tl.load(dt + row * stride_tb + t64 * stride_tl + i_e, mask=i_e < here_e, other=0.0).to(tl.float32)
        size, _ = step_size(size + bias, SOFTPLUS)
        decay = tl.exp2(tl.where(here, size, 0.0)[:, None] * rate)
        if RESET:
            decay = tl.where(tl.load(reset + row * stride_rb + t64 * stride_rl, mask=here, other=0) == 0, decay, 0.0)
        grad = decay * (grad + dy_t[:, None] * C_t[None, :])
        decays *= decay
    cell = (row * segments + segment) * e * n + i_e[:, None] * n + i_n[None, :]
    tl.store(ends + cell, grad, mask=inside)
    tl.store(total + cell, decays, mask=inside)


@triton.jit
def _backward_kernel(
    dy, x, dt, A, B, C, D, z, dt_bias, reset, lengths, states, after,
    dx, ddt, dA, dB, dC, dD, dz, dbias, before, scratch,
    b, l, e, n, per_segment, segments, chunks,
    stride_yb, stride_yl, stride_xb, stride_xl, stride_tb, stride_tl, stride_Ae, stride_An, stride_Bb, stride_Bl,
    stride_Cb, stride_Cl, stride_zb, stride_zl, stride_rb, stride_rl,
    SOFTPLUS: tl.constexpr, BIAS: tl.constexpr, SKIP: tl.constexpr, GATE: tl.constexpr, RESET: tl.constexpr,
    LENGTHS: tl.constexpr, T: tl.constexpr, TILES: tl.constexpr, BE: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(e, BE)
    program = tl.program_id(0).to(tl.int64)
    segment = program // blocks % segments
    row = program // (blocks * segments)
    part = program % blocks
    i_e, i_n = part.to(tl.int32) * BE + tl.arange(0, BE), tl.arange(0, BN)
    in_e, in_n = i_e < e, i_n < n
    inside = in_e[:, None] & in_n[None, :]
    rate = tl.load(A + i_e[:, None] * stride_Ae + i_n[None, :] * stride_An, mask=inside, other=0.0).to(tl.float32)
    end = tl.load(lengths + row).to(tl.int32) if LENGTHS else l
    bias = tl.load(dt_bias + i_e, mask=in_e, other=0.0).to(tl.float32) if BIAS else 0.0
    skip = tl.load(D + i_e, mask=in_e, other=0.0).to(tl.float32) if SKIP else 0.0
    cell = (row * segments + segment) * e * n + i_e[:, None] * n + i_n[None, :]
    grad = tl.load(after + cell, mask=inside, other=0.0)
    dA_sum, dD_sum, dbias_sum = tl.zeros((BE, BN), tl.float32), tl.zeros((BE,), tl.float32), tl.zeros((BE,), tl.float32)
    x += row * stride_xb
    dt += row * stride_tb
    dy += row * stride_yb
    B += row * stride_Bb
    C += row * stride_Cb
    z += row * stride_zb
    reset += row * stride_rb
    first = (segment * per_segment).to(tl.int32)
    chunk_len = TILES * T
    scratch += program * (TILES * BE * BN) + tl.arange(0, BE)[:, None] * BN + i_n[None, :]
    parts = tl.cdiv(tl.minimum(per_segment, l - first), chunk_len)
    for chunk in range(parts):
        begin = first + (parts - 1 - chunk) * chunk_len
        at = ((row * chunks + begin // chunk_len) * n + i_n[None, :]) * e + i_e[:, None]
        state = tl.load(states + at, mask=inside, other=0.0)
        tile = _tile(
            x, dt, B, C, z, dy, reset, begin, end, i_e, i_n, e, n, stride_xl, stride_tl, stride_Bl, stride_Cl,
            stride_zl, stride_yl, stride_rl, False, False, False, RESET, T,
        )  # fmt: skip
        for k_tile in range(TILES):
            tl.store(scratch + k_tile * (BE * BN), state)
            start = begin + k_tile * T
            xs, dts, Bs, _, _, _, keeps = tile
            tile = _tile(
                x, dt, B, C, z, dy, reset, start + T, end, i_e, i_n, e, n, stride_xl, stride_tl, stride_Bl, stride_Cl,
                stride_zl, stride_yl, stride_rl, False, False, False, RESET, T,
            )  # fmt: skip
            for k in tl.static_range(T):
                size, _ = step_size(dts[k].to(tl.float32) + bias, SOFTPLUS)
                size = tl.where(start + k < end, size, 0.0)
                decay = tl.exp2(size[:, None] * (rate * LOG2E))
                if RESET:
                    decay = tl.where(keeps[k], decay, 0.0)
                state = decay * state + (size * xs[k].to(tl.float32))[:, None] * Bs[k].to(tl.float32)[None, :]
        tl.debug_barrier()
        for k_tile in range(TILES):
            start = begin + (TILES - 1 - k_tile) * T
            state = tl.load(scratch + (TILES - 1 - k_tile) * (BE * BN))
            xs, dts, Bs, Cs, zs, dys, keeps = _tile(
                x, dt, B, C, z, dy, reset, start, end, i_e, i_n, e, n, stride_xl, stride_tl, stride_Bl, stride_Cl,
                stride_zl, stride_yl, stride_rl, True, GATE, True, RESET, T,
            )  # fmt: skip
            kept, decays = (), ()  # a_t h_{t-1} and a_t
            for k in tl.static_range(T):
                size, _ = step_size(dts[k].to(tl.float32) + bias, SOFTPLUS)
                size = tl.where(start + k < end, size, 0.0)
                decay = tl.exp2(size[:, None] * (rate * LOG2E))
                if RESET:
                    decay = tl.where(keeps[k], decay, 0.0)
                state = decay * state
                kept, decays = kept + (state,), decays + (decay,)
                state += (size * xs[k].to(tl.float32))[:, None] * Bs[k].to(tl.float32)[None, :]
            for k in tl.static_range(T - 1, -1, -1):
                t = start + k
                x_t, B_t, C_t = xs[k].to(tl.float32), Bs[k].to(tl.float32), Cs[k].to(tl.float32)
                raw = dts[k].to(tl.float32) + bias
                size, slope = step_size(raw, SOFTPLUS)
                size = tl.where(t < end, size, 0.0)
                h_t = kept[k] + (size * x_t)[:, None] * B_t[None, :]
                dy_t = dys[k].to(tl.float32)
                if GATE:
                    gate = zs[k].to(tl.float32)
                    share = 1.0 / (1.0 + tl.exp(-gate))
                    y_t = tl.sum(h_t * C_t[None, :], 1) + skip * x_t
                    dgate = dy_t * y_t * share * (1.0 + gate * (1.0 - share))
                    to_z = (row * l + t) * e + i_e
                    tl.store(
                        dz + to_z,
                        tl.where(t < end, dgate, 0.0).to(dz.dtype.element_ty),
                        mask=i_e < tl.where(t < l, e, 0),
                    )
                    dy_t *= gate * share
                grad += dy_t[:, None] * C_t[None, :]
                to = ((part * b + row) * l + t) * n + i_n
                tl.store(dC + to, tl.sum(dy_t[:, None] * h_t, 0), mask=i_n < tl.where(t < l, n, 0))
                tl.store(dB + to, tl.sum((size * x_t)[:, None] * grad, 0), mask=i_n < tl.where(t < l, n, 0))
                through = tl.sum(grad * B_t[None, :], 1)
                dlog = grad * kept[k]  # of dt A
                dA_sum += size[:, None] * dlog
                dsize = tl.sum(dlog * rate, 1) + x_t * through
                draw = tl.where(t < end, dsize * slope, 0.0)
                dbias_sum += draw
                dD_sum += dy_t * x_t
                to_x = (row * l + t) * e + i_e
                tl.store(ddt + to_x, draw.to(ddt.dtype.element_ty), mask=i_e < tl.where(t < l, e, 0))
                tl.store(
                    dx + to_x, (size * through + skip * dy_t).to(dx.dtype.element_ty), mask=i_e < tl.where(t < l, e, 0)
                )
                grad *= decays[k]
    tl.store(before + cell, grad, mask=inside)
    tl.store(dA + cell, dA_sum, mask=inside)
    to = (row * segments + segment) * e + i_e
    if BIAS:
        tl.store(dbias + to, dbias_sum, mask=in_e)
    if SKIP:
        tl.store(dD + to, dD_sum, mask=in_e)


@triton.jit
def _step_kernel(
    state, x, dt, A, B, C, D, z, dt_bias, y, e, n,
    stride_sb, stride_se, stride_xb, stride_tb, stride_Ae, stride_An, stride_Bb, stride_Cb, stride_zb,
    SOFTPLUS: tl.constexpr, BIAS: tl.constexpr, SKIP: tl.constexpr, GATE: tl.constexpr, LOG_A: tl.constexpr,
    BE: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(e, BE)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    i_e, i_n = (tl.program_id(0) % blocks) * BE + tl.arange(0, BE), tl.arange(0, BN)
    in_e, in_n = i_e < e, i_n < n
    inside = in_e[:, None] & in_n[None, :]
    rate = tl.load(A + i_e[:, None] * stride_Ae + i_n[None, :] * stride_An, mask=inside, other=0.0).to(tl.float32)
    if LOG_A:
        rate = -tl.exp(rate)
    size = tl.load(dt + row * stride_tb + i_e, mask=in_e, other=0.0).to(tl.float32)
    if BIAS:
        size += tl.load(dt_bias + i_e, mask=in_e, other=0.0).to(tl.float32)
    size, _ = step_size(size, SOFTPLUS)
    x_t = tl.load(x + row * stride_xb + i_e, mask=in_e, other=0.0).to(tl.float32)
    B_t = tl.load(B + row * stride_Bb + i_n, mask=in_n, other=0.0).to(tl.float32)
    C_t = tl.load(C + row * stride_Cb + i_n, mask=in_n, other=0.0).to(tl.float32)
    at = state + row * stride_sb + i_e[:, None] * stride_se + i_n[None, :]
    after = tl.load(at, mask=inside, other=0.0) * tl.exp2(size[:, None] * rate * LOG2E)
    after += (size * x_t)[:, None] * B_t[None, :]
    tl.store(at, after, mask=inside)
    y_t = tl.sum(after * C_t[None, :], 1)
    if SKIP:
        y_t += tl.load(D + i_e, mask=in_e, other=0.0).to(tl.float32) * x_t
    if GATE:
        y_t *= silu(tl.load(z + row * stride_zb + i_e, mask=in_e, other=0.0).to(tl.float32))
    tl.store(y + row * e + i_e, y_t.to(y.dtype.element_ty), mask=in_e)


_TILE = 4  # tokens that are loaded before the first of them is worked on
_CELLS = 512  # of the state of one program: one warp, sixteen to a thread
_SEGMENT = 256  # tokens of a segment that are worth a second pass over them


def forward(x, dt, A, B, C, D, z, dt_bias, initial_state, reset, lengths, dt_softplus, chunk_len):
    x, dt, B, C, z = (None if t is None else rows(t) for t in (x, dt, B, C, z))
    b, l, e = x.shape
    n = A.shape[1]
    with device_of(x):
        cut = _Cut(x, n, chunk_len or _TILE)
        y, final = torch.empty(b, l, e, dtype=x.dtype, device=x.device), cut.empty(b, 1, e, n)
        chunks = triton.cdiv(l, chunk_len) if chunk_len else 0
        states = cut.empty(b, chunks, n, e)
        begins = None if initial_state is None else initial_state.to(torch.float32).contiguous()

        def launch(initial, final, total, output):
            _forward_kernel[(cut.programs,)](
                x, dt, A, B, C, D, absent(z, x), dt_bias, initial, absent(reset, x), lengths, y, final, total, states,
                l, e, n, cut.per_segment, cut.segments, chunks, chunk_len,
                *x.stride()[:2], *dt.stride()[:2], *A.stride(), *B.stride()[:2], *C.stride()[:2], *_strides(z),
                *_strides(reset),
                OUTPUT=output, STORE=output and chunks > 0, SOFTPLUS=dt_softplus, BIAS=dt_bias is not None,
                SKIP=D is not None, GATE=z is not None, INITIAL=initial is not None, RESET=reset is not None,
                LENGTHS=lengths is not None, T=_TILE, BE=cut.BE, BN=cut.BN, num_warps=1,
            )  # fmt: skip

        if cut.segments == 1:
            launch(begins, final, None, True)
            return y, final[:, 0], states
        ends, total = cut.empty(b, cut.segments, e, n), cut.empty(b, cut.segments, e, n)
        launch(None, ends, total, False)
        begins, last = pass_states(ends, total, begins, reverse=False)
        launch(begins, torch.empty_like(ends), None, True)
    return y, last, states


def backward(dy, dfinal, states, x, dt, A, B, C, D, z, dt_bias, initial_state, reset, lengths, dt_softplus, chunk_len):
    dy, x, dt, B, C, z = (None if t is None else rows(t) for t in (dy, x, dt, B, C, z))
    b, l, e = x.shape
    n = A.shape[1]
    flags = {
        "SOFTPLUS": dt_softplus, "BIAS": dt_bias is not None, "GATE": z is not None, "RESET": reset is not None,
        "LENGTHS": lengths is not None,
    }  # fmt: skip
    with device_of(x):
        cut = _Cut(x, n, chunk_len)
        flags |= {"BE": cut.BE, "BN": cut.BN}
        sizes = (cut.per_segment, cut.segments)
        after = dfinal.to(torch.float32).contiguous()
        if cut.segments > 1:
            ends, total = cut.empty(b, cut.segments, e, n), cut.empty(b, cut.segments, e, n)
            _adjoint_kernel[(cut.programs,)](
                dy, dt, A, C, z, dt_bias, reset, lengths, ends, total, l, e, n, *sizes,
                *dy.stride()[:2], *dt.stride()[:2], *A.stride(), *C.stride()[:2], *_strides(z), *_strides(reset),
                **flags, num_warps=1,
            )  # fmt: skip
            after, _ = pass_states(ends, total, after, reverse=True)
        dx, ddt, dz = (None if t is None else torch.empty(b, l, e, dtype=t.dtype, device=x.device) for t in (x, dt, z))
        dB, dC = (cut.empty(cut.blocks, b, l, n) for _ in range(2))
        before, dA = (cut.empty(b, cut.segments, e, n) for _ in range(2))
        dD, dbias = (cut.empty(b, cut.segments, e) for _ in range(2))
        scratch = cut.empty(cut.programs, chunk_len // _TILE, cut.BE, cut.BN)
        _backward_kernel[(cut.programs,)](
            dy, x, dt, A, B, C, D, absent(z, x), dt_bias, absent(reset, x), lengths, states, after,
            dx, ddt, dA, dB, dC, dD, dz, dbias, before, scratch, b, l, e, n, *sizes, states.shape[1],
            *dy.stride()[:2], *x.stride()[:2], *dt.stride()[:2], *A.stride(), *B.stride()[:2], *C.stride()[:2],
            *_strides(z), *_strides(reset),
            SKIP=D is not None, T=_TILE, TILES=chunk_len // _TILE, **flags, num_warps=1,
        )  # fmt: skip
    grads = (
        (dx, x), (ddt, dt), (dA.sum((0, 1)), A), (dB.sum(0), B), (dC.sum(0), C), (dD.sum((0, 1)), D), (dz, z),
        (dbias.sum((0, 1)), dt_bias), (before[:, 0], initial_state),
    )  # fmt: skip
    return tuple(x.new_empty(0) if t is None else grad.to(t.dtype) for grad, t in grads)


def step(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, log_A):
    b, e, n = state.shape
    x, dt, B, C, z = (None if t is None else rows(t) for t in (x, dt, B, C, z))
    memory = rows(state)
    y = torch.empty(b, e, dtype=x.dtype, device=x.device)
    cells = 2048 if state.numel() > 8192 * processors_of(x) else 256
    BN = block(n, 1)
    BE = max(1, cells // BN)
    with device_of(x):
        _step_kernel[(b * triton.cdiv(e, BE),)](
            memory, x, dt, A, B, C, D, z, dt_bias, y, e, n, *memory.stride()[:2], x.stride(0), dt.stride(0),
            *A.stride(), B.stride(0), C.stride(0), 0 if z is None else z.stride(0),
            SOFTPLUS=dt_softplus, BIAS=dt_bias is not None, SKIP=D is not None, GATE=z is not None, LOG_A=log_A,
            BE=BE, BN=BN, num_warps=max(1, cells // 512),
        )  # fmt: skip
    if memory is not state:
        state.copy_(memory)
    return y


def _strides(t: Tensor | None) -> tuple[int, int]:
    return (0, 0) if t is None else (t.stride(0), t.stride(1))


class _Cut:
    """How the work is cut: blocks of channels, and segments of l that are whole tiles."""

    def __init__(self, x: Tensor, n: int, tile: int):
        b, l, e = x.shape
        self.x, self.tile = x, tile
        self.BN = block(n, 1)
        self.BE = max(1, _CELLS // self.BN)
        self.blocks = triton.cdiv(e, self.BE)
        segments = segments_of(b * self.blocks, 8 * processors_of(x), l, _SEGMENT)
        self.per_segment = triton.cdiv(triton.cdiv(l, segments), tile) * tile
        self.segments = triton.cdiv(l, self.per_segment)
        self.programs = b * self.blocks * self.segments

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=self.x.device)

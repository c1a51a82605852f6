"""The selective scan's forward pass on Hopper: three groups of warps side by side, l walked once, no splitting.

    h_t = a_t h_{t-1} + u_t B_t,  a_t = exp(dt_t A),  u_t = dt_t x_t;  y_t = (h_t . C_t + D x_t) silu(z_t)

The special-function unit is what the scan waits for: one exponential for each number of the state and token. So the
warps of `_scan` do nothing else than the recurrence. `_prepare` gives them tiles of T tokens with everything done that
is done once per channel and token: softplus, dt x, the change to float32. `_finish` takes h . C from them and does the
rest. Tiles go through a ring of two in shared memory. How many numbers of the state a thread holds (`_Form`) follows
from the number of channels, so that few channels still use the whole GPU.

Within a tile, sizes and inputs lie in groups of four tokens that one load brings, and h . C is left in parts, one from
each thread that holds states of the channel. To keep those accesses free of bank conflicts, channels are permuted:
row r of the state is channel r % (BE / CV) * CV + r // (BE / CV) of the block.
"""

from dataclasses import dataclass

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from longwave.ops.gluon_math import exp2, silu, softplus, widen
from longwave.ops.selective_scan import triton as portable
from longwave.ops.triton_math import absent, block, device_of, processors_of, rows

_LOG2E = gl.constexpr(1.4426950408889634)


@gluon.jit
def _column(v, k: gl.constexpr, layout: gl.constexpr):
    """Column k of (m, 4)."""
    even, odd = gl.split(gl.reshape(v, [v.shape[0], 2, 2]))
    first, second = gl.split(even if k % 2 == 0 else odd)
    return gl.convert_layout(first if k < 2 else second, layout, assert_trivial=True)


@gluon.jit
def _join(a, b, c, d):
    """Four matrices along a new first axis."""
    x = gl.join(gl.join(a, c), gl.join(b, d))
    return gl.permute(gl.reshape(x, [a.shape[0], a.shape[1], 4]), (2, 0, 1))


@gluon.jit
def _group(inputs, B_tile, C_tile, g: gl.constexpr, of_state: gl.constexpr, of_steps: gl.constexpr):
    """Of the four tokens of group g: u (BE, 4), and tuples of B and of C."""
    B, C = (), ()
    for k in gl.static_range(4):
        B = B + (B_tile.index(4 * g + k).load(gl.SliceLayout(0, of_state)),)
        C = C + (C_tile.index(4 * g + k).load(gl.SliceLayout(0, of_state)),)
    return inputs.index(g).load(gl.SliceLayout(1, of_steps)), B, C


@gluon.jit
def _decays(size, rate, of_state: gl.constexpr, RESET: gl.constexpr):
    decays = ()
    for k in gl.static_range(4):
        decay = exp2(_column(size, k, gl.SliceLayout(1, of_state))[:, None] * rate)
        if RESET:
            decay = gl.maximum(decay, 0.0)  # 0 where the size is not a number
        decays = decays + (decay,)
    return decays


@gluon.jit
def _scan(
    A, initial, final, states, sizes, inputs, B_tiles, C_tiles, parts, full, done, taken,
    row, channel, tiles, l, e, n, chunks, stride_Ae, stride_An,
    INITIAL: gl.constexpr, PER_STATE: gl.constexpr, RESET: gl.constexpr,
    W: gl.constexpr, T: gl.constexpr, BE: gl.constexpr, N: gl.constexpr, NS: gl.constexpr, CV: gl.constexpr,
):  # fmt: skip
    """The recurrence. Exponentials and loads are one group of tokens ahead of the products that need them.

    PER_STATE: tokens between the states that are stored, a divisor or a multiple of T, or 0 for none.
    """
    LN: gl.constexpr = N // NS
    G: gl.constexpr = T // 4
    YG: gl.constexpr = 4 if NS == 8 else 8  # groups whose h . C is stored at once: each store waits for all warps
    of_state: gl.constexpr = gl.BlockedLayout([1, NS], [32 // LN, LN], [W, 1], [0, 1])
    of_steps: gl.constexpr = gl.BlockedLayout([1, 1, 4], [32 // LN, LN, 1], [W, 1, 1], [2, 0, 1])
    of_channels: gl.constexpr = gl.SliceLayout(1, of_state)
    line: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    cube: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [3, 2, 1, 0])
    r = gl.arange(0, BE, layout=of_channels)
    i_e = channel + r % (BE // CV) * CV + r // (BE // CV)
    i_n = gl.arange(0, N, layout=gl.SliceLayout(0, of_state))
    inside = (i_e < e)[:, None] & (i_n < n)[None, :]
    rate = gl.load(A + i_e[:, None] * stride_Ae + i_n[None, :] * stride_An, mask=inside, other=0.0)
    rate = rate.to(gl.float32) * _LOG2E
    cell = row * e * n + i_e[:, None] * n + i_n[None, :]
    state = gl.zeros([BE, N], gl.float32, of_state)
    if INITIAL:
        state = gl.load(initial + cell, mask=inside, other=0.0)
    to_state = states + row * chunks * n * e + i_n[None, :] * e + i_e[:, None]
    left = tiles * 0  # tiles until states are stored
    mbarrier.wait(full.index(0), 0)
    size_tile = sizes.index(0)._reinterpret(gl.float32, [G, BE, 4], flat)
    u, B, C = _group(
        inputs.index(0)._reinterpret(gl.float32, [G, BE, 4], flat),
        B_tiles.index(0)._reinterpret(gl.float32, [T, N], line),
        C_tiles.index(0)._reinterpret(gl.float32, [T, N], line), 0, of_state, of_steps,
    )  # fmt: skip
    decays = _decays(size_tile.index(0).load(gl.SliceLayout(1, of_steps)), rate, of_state, RESET)
    size = size_tile.index(1).load(gl.SliceLayout(1, of_steps))
    for i in range(tiles):
        stage, other = i % 2, (i + 1) % 2
        if PER_STATE > T:
            if left == 0:
                gl.store(to_state, state, mask=inside)
                to_state += n * e
                left = PER_STATE // T
            left -= 1
        part_tile = parts.index(stage)._reinterpret(gl.float32, [G // YG, YG, LN, BE, 4], cube)
        groups = ()
        for g in gl.static_range(G):
            if PER_STATE > 0 and PER_STATE <= T and 4 * g % PER_STATE == 0:
                gl.store(to_state, state, mask=inside & (i * T + 4 * g < l))
                to_state += n * e
            if g == G - 2:
                mbarrier.wait(full.index(other), (i + 1) // 2 & 1, pred=i + 1 < tiles)
            size_tile = sizes.index(stage if g + 2 < G else other)._reinterpret(gl.float32, [G, BE, 4], flat)
            next_size = size_tile.index((g + 2) % G).load(gl.SliceLayout(1, of_steps))
            at = stage if g + 1 < G else other
            next_u, next_B, next_C = _group(
                inputs.index(at)._reinterpret(gl.float32, [G, BE, 4], flat),
                B_tiles.index(at)._reinterpret(gl.float32, [T, N], line),
                C_tiles.index(at)._reinterpret(gl.float32, [T, N], line), (g + 1) % G, of_state, of_steps,
            )  # fmt: skip
            next_decays = _decays(size, rate, of_state, RESET)
            y = ()
            for k in gl.static_range(4):
                state = gl.fma(state, decays[k], _column(u, k, of_channels)[:, None] * B[k][None, :])
                y = y + (gl.sum(gl.reshape(state * C[k][None, :], [BE, LN, NS]), 2),)
            groups = groups + (gl.permute(_join(y[0], y[1], y[2], y[3]), (2, 1, 0)),)  # (LN, BE, 4)
            u, B, C, decays, size = next_u, next_B, next_C, next_decays, next_size
            if g == 0:
                mbarrier.wait(taken.index(stage), i // 2 & 1 ^ 1)
            if g % YG == YG - 1:
                part_tile.index(g // YG).store(_stack(groups))
                groups = ()
            if e < 0:  # never: it keeps the compiler from moving exponentials back to where they are needed
                gl.thread_barrier()
        gl.thread_barrier()
        mbarrier.arrive(done.index(stage), count=1)
    gl.store(final + cell, state, mask=inside)


@gluon.jit
def _stack(groups):
    """Four or eight (a, b, 4) along a new first axis."""
    if len(groups) == 4:
        x = gl.join(gl.join(groups[0], groups[2]), gl.join(groups[1], groups[3]))
    else:
        even = gl.join(gl.join(groups[0], groups[4]), gl.join(groups[2], groups[6]))
        odd = gl.join(gl.join(groups[1], groups[5]), gl.join(groups[3], groups[7]))
        x = gl.join(even, odd)
    shape: gl.constexpr = [groups[0].shape[0], groups[0].shape[1], groups[0].shape[2], len(groups)]
    return gl.permute(gl.reshape(x, shape), (3, 0, 1, 2))


@gluon.jit
def _tile(p, first, t, i, stride, end, width):
    """Rows first + t, columns i; 0 from `end` on."""
    at = p + first.to(gl.int64) * stride + (t[:, None] * stride + i[None, :])
    return gl.load(at, mask=(first + t < end)[:, None] & (i < width)[None, :], other=0.0)


@gluon.jit
def _prepare(
    x, dt, B, C, dt_bias, reset, sizes, inputs, B_tiles, C_tiles, full, done,
    channel, tiles, end, e, n, stride_xl, stride_tl, stride_Bl, stride_Cl, stride_rl,
    SOFTPLUS: gl.constexpr, BIAS: gl.constexpr, RESET: gl.constexpr,
    T: gl.constexpr, BE: gl.constexpr, N: gl.constexpr, CV: gl.constexpr,
):  # fmt: skip
    """Step sizes, dt x, B and C of each tile, in float32."""
    CL: gl.constexpr = BE // CV
    of_tile: gl.constexpr = gl.BlockedLayout([4, CV], [32 // CL, CL], [4, 1], [1, 0])
    of_B: gl.constexpr = gl.BlockedLayout([1, 4], [128 // N, N // 4], [4, 1], [1, 0])
    t = gl.arange(0, T, layout=gl.SliceLayout(1, of_tile))
    i_e = channel + gl.arange(0, BE, layout=gl.SliceLayout(0, of_tile))
    t_B = gl.arange(0, T, layout=gl.SliceLayout(1, of_B))
    i_n = gl.arange(0, N, layout=gl.SliceLayout(0, of_B))
    bias = gl.zeros([BE], gl.float32, gl.SliceLayout(0, of_tile))
    if BIAS:
        bias = gl.load(dt_bias + i_e, mask=i_e < e, other=0.0).to(gl.float32)
    first = tiles * 0
    x_t, dt_t = _tile(x, first, t, i_e, stride_xl, end, e), _tile(dt, first, t, i_e, stride_tl, end, e)
    B_t, C_t = _tile(B, first, t_B, i_n, stride_Bl, end, n), _tile(C, first, t_B, i_n, stride_Cl, end, n)
    for i in range(tiles):
        stage = i % 2
        size = widen(dt_t) + bias[None, :]
        if SOFTPLUS:
            size = softplus(size)
        size = gl.where((first + t < end)[:, None], size, 0.0)
        u = size * widen(x_t)
        if RESET:
            begins = gl.load(reset + (first + t).to(gl.int64) * stride_rl, mask=first + t < end, other=0) != 0
            size = gl.where(begins[:, None], float("nan"), size)  # a decay of 0
        B_now, C_now = widen(B_t), widen(C_t)
        first += T  # the next tile is on its way while this one waits
        x_t, dt_t = _tile(x, first, t, i_e, stride_xl, end, e), _tile(dt, first, t, i_e, stride_tl, end, e)
        B_t, C_t = _tile(B, first, t_B, i_n, stride_Bl, end, n), _tile(C, first, t_B, i_n, stride_Cl, end, n)
        mbarrier.wait(done.index(stage), i // 2 & 1 ^ 1)
        sizes.index(stage).store(gl.permute(gl.reshape(size, [T // 4, 4, CL, CV]), (0, 3, 2, 1)))
        inputs.index(stage).store(gl.permute(gl.reshape(u, [T // 4, 4, CL, CV]), (0, 3, 2, 1)))
        B_tiles.index(stage).store(B_now)
        C_tiles.index(stage).store(C_now)
        gl.thread_barrier()
        mbarrier.arrive(full.index(stage), count=1)


@gluon.jit
def _finish(
    x, D, z, y, parts, done, taken,
    channel, tiles, l, end, e, stride_xl, stride_zl,
    SKIP: gl.constexpr, GATE: gl.constexpr, LENGTHS: gl.constexpr,
    T: gl.constexpr, BE: gl.constexpr, LN: gl.constexpr, CV: gl.constexpr,
):  # fmt: skip
    """The sum of the parts of h . C, D x, the gate, and the store."""
    CL: gl.constexpr = BE // CV
    of_tile: gl.constexpr = gl.BlockedLayout([4, CV], [32 // CL, CL], [4, 1], [1, 0])
    of_parts: gl.constexpr = gl.BlockedLayout(
        [1, LN, CV, 1, 4], [32 // CL, 1, 1, CL, 1], [4, 1, 1, 1, 1], [4, 3, 2, 1, 0]
    )
    t = gl.arange(0, T, layout=gl.SliceLayout(1, of_tile))
    i_e = channel + gl.arange(0, BE, layout=gl.SliceLayout(0, of_tile))
    first = tiles * 0
    if SKIP:
        skip = gl.load(D + i_e, mask=i_e < e, other=0.0).to(gl.float32)
        x_t = _tile(x, first, t, i_e, stride_xl, end, e)
    if GATE:
        z_t = _tile(z, first, t, i_e, stride_zl, end, e)
    for i in range(tiles):
        stage = i % 2
        after = first + T
        if SKIP:
            own = skip[None, :] * widen(x_t)
            x_t = _tile(x, after, t, i_e, stride_xl, end, e)
        if GATE:
            gate = silu(widen(z_t), y.dtype.element_ty == gl.float32)
            z_t = _tile(z, after, t, i_e, stride_zl, end, e)
        mbarrier.wait(done.index(stage), i // 2 & 1)
        out = gl.permute(gl.sum(parts.index(stage).load(of_parts), 1), (0, 3, 2, 1))
        gl.thread_barrier()
        mbarrier.arrive(taken.index(stage), count=1)
        out = gl.convert_layout(gl.reshape(out, [T, BE]), of_tile, assert_trivial=True)
        if SKIP:
            out += own
        if GATE:
            out *= gate
        if LENGTHS:
            out = gl.where((first + t < end)[:, None], out, 0.0)
        to = y + first.to(gl.int64) * e + (t[:, None] * e + i_e[None, :])
        gl.store(to, out.to(y.dtype.element_ty), mask=(first + t < l)[:, None] & (i_e < e)[None, :])
        first = after


@gluon.jit
def _forward_kernel(
    x, dt, A, B, C, D, z, dt_bias, initial, reset, lengths, y, final, states,
    l, e, n, chunks,
    stride_xb, stride_xl, stride_tb, stride_tl, stride_Ae, stride_An, stride_Bb, stride_Bl, stride_Cb, stride_Cl,
    stride_zb, stride_zl, stride_rb, stride_rl,
    PER_STATE: gl.constexpr, SOFTPLUS: gl.constexpr, BIAS: gl.constexpr, SKIP: gl.constexpr, GATE: gl.constexpr,
    INITIAL: gl.constexpr, RESET: gl.constexpr, LENGTHS: gl.constexpr,
    W: gl.constexpr, T: gl.constexpr, BE: gl.constexpr, N: gl.constexpr, NS: gl.constexpr, CV: gl.constexpr,
):  # fmt: skip
    blocks = gl.cdiv(e, BE)
    row = (gl.program_id(0) // blocks).to(gl.int64)
    channel = gl.program_id(0) % blocks * BE
    tiles = gl.cdiv(l, T)
    end = l
    if LENGTHS:
        end = gl.load(lengths + row).to(gl.int32)
    of_B: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    of_tile: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [3, 2, 1, 0])
    of_parts: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [4, 3, 2, 1, 0])
    sizes = gl.allocate_shared_memory(gl.float32, [2, T // 4, CV, BE // CV, 4], of_tile)
    inputs = gl.allocate_shared_memory(gl.float32, [2, T // 4, CV, BE // CV, 4], of_tile)
    B_tiles = gl.allocate_shared_memory(gl.float32, [2, T, N], of_B)
    C_tiles = gl.allocate_shared_memory(gl.float32, [2, T, N], of_B)
    parts = gl.allocate_shared_memory(gl.float32, [2, T // 4, N // NS, CV, BE // CV, 4], of_parts)
    full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    done = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    taken = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for k in gl.static_range(2):
        mbarrier.init(full.index(k), count=1)
        mbarrier.init(done.index(k), count=1)
        mbarrier.init(taken.index(k), count=1)
    x += row * stride_xb
    gl.warp_specialize(
        [
            (_scan, (
                A, initial, final, states, sizes, inputs, B_tiles, C_tiles, parts, full, done, taken,
                row, channel, tiles, l, e, n, chunks, stride_Ae, stride_An,
                INITIAL, PER_STATE, RESET, W, T, BE, N, NS, CV,
            )),
            (_prepare, (
                x, dt + row * stride_tb, B + row * stride_Bb, C + row * stride_Cb, dt_bias, reset + row * stride_rb,
                sizes, inputs, B_tiles, C_tiles, full, done,
                channel, tiles, end, e, n, stride_xl, stride_tl, stride_Bl, stride_Cl, stride_rl,
                SOFTPLUS, BIAS, RESET, T, BE, N, CV,
            )),
            (_finish, (
                x, D, z + row * stride_zb, y + row * l * e, parts, done, taken,
                channel, tiles, l, end, e, stride_xl, stride_zl, SKIP, GATE, LENGTHS, T, BE, N // NS, CV,
            )),
        ],
        [4, 4], [96, 96],
    )  # fmt: skip


@dataclass(frozen=True)
class _Form:
    """W warps that scan, NS numbers of the state in each thread of theirs, T tokens in a tile.

    `cost`: how long a token takes, in the unit of the others.
    """

    W: int
    NS: int
    T: int
    cost: int

    def channels(self, N: int) -> int:
        return 32 * self.W * self.NS // N


_FORMS = _Form(W=8, NS=8, T=16, cost=150), _Form(W=4, NS=4, T=32, cost=55), _Form(W=4, NS=2, T=64, cost=38)


def forward(x, dt, A, B, C, D, z, dt_bias, initial_state, reset, lengths, dt_softplus, chunk_len):
    x, dt, B, C, z, D, dt_bias = (None if t is None else rows(t) for t in (x, dt, B, C, z, D, dt_bias))
    b, l, e = x.shape
    n = A.shape[1]
    N, processors = block(n), processors_of(x)
    form = min(_FORMS, key=lambda form: triton.cdiv(_programs(b, e, N, form), processors) * form.cost)
    # Channels too few to fill a quarter of the GPU are better off with l cut into segments.
    alone = l > 2048 and 4 * _programs(b, e, N, form) < processors
    fits = N <= 32 and chunk_len % 4 == 0 and (chunk_len % form.T == 0 or form.T % chunk_len == 0)
    if alone or not fits or x.numel() == 0:
        return portable.forward(x, dt, A, B, C, D, z, dt_bias, initial_state, reset, lengths, dt_softplus, chunk_len)
    with device_of(x):
        y = torch.empty(b, l, e, dtype=x.dtype, device=x.device)
        final = torch.empty(b, e, n, dtype=torch.float32, device=x.device)
        chunks = triton.cdiv(l, chunk_len) if chunk_len else 0
        states = torch.empty(b, chunks, n, e, dtype=torch.float32, device=x.device)
        initial = None if initial_state is None else initial_state.to(torch.float32).contiguous()
        BE = form.channels(N)
        _forward_kernel[(_programs(b, e, N, form),)](
            x, dt, A, B, C, D, absent(z, x), dt_bias, initial, absent(reset, x), lengths, y, final, states,
            l, e, n, chunks,
            *x.stride()[:2], *dt.stride()[:2], *A.stride(), *B.stride()[:2], *C.stride()[:2],
            *portable._strides(z), *portable._strides(reset),
            PER_STATE=chunk_len, SOFTPLUS=dt_softplus, BIAS=dt_bias is not None, SKIP=D is not None, GATE=z is not None,
            INITIAL=initial is not None, RESET=reset is not None, LENGTHS=lengths is not None,
            W=form.W, T=form.T, BE=BE, N=N, NS=form.NS, CV=form.T * BE // 512,
            num_warps=form.W, maxnreg=128 if form.W == 8 else None,
        )  # fmt: skip
    return y, final, states


def _programs(b: int, e: int, N: int, form: _Form) -> int:
    return b * triton.cdiv(e, form.channels(N))

"""The short convolution on a GPU: each program reads a tile of tokens and channels, w times over from the cache.

Position s < 0 is slot w - 1 + s of the window before x. An input reaches the d-th output after it unless a document
begins in between. The backward pass computes what the activation was given again; its sums over tokens, for the
weight and the bias, are written per tile and added up in a fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from longwave.ops.triton_math import block, device_of, rows


@triton.jit
def _inputs(x, window, at, channel, end, e, stride_xl, W: tl.constexpr, WINDOW: tl.constexpr):
    """The inputs at positions `at` (BT, 1) of these channels (1, BC), 0 past the end; in float32."""
    inside = channel < e
    value = tl.load(x + at.to(tl.int64) * stride_xl + channel, mask=(at >= 0) & (at < end) & inside, other=0.0)
    if WINDOW:
        before = tl.load(window + (at + (W - 1)) * e + channel, mask=(at < 0) & (at > -W) & inside, other=0.0)
        value = tl.where(at < 0, before.to(value.dtype), value)
    return value.to(tl.float32)


@triton.jit
def _begins(reset, at, end, stride_rl, RESET: tl.constexpr):
    """Does a document begin at these positions?"""
    if RESET:
        return tl.load(reset + at.to(tl.int64) * stride_rl, mask=(at >= 0) & (at < end), other=0) != 0
    return at != at


@triton.jit
def _sums(
    x, window, weight, bias, reset, at, channel, end, e, stride_xl, stride_we, stride_ww, stride_rl,
    W: tl.constexpr, BIAS: tl.constexpr, WINDOW: tl.constexpr, RESET: tl.constexpr,
):  # fmt: skip
    """bias + sum_k weight_k x_{t-(w-1)+k} at tokens `at`."""
    taps = tl.load(weight + channel * stride_we + (W - 1) * stride_ww, mask=channel < e, other=0.0).to(tl.float32)
    total = taps * _inputs(x, window, at, channel, end, e, stride_xl, W, WINDOW)
    cut = at != at
    for d in tl.static_range(1, W):
        cut = cut | _begins(reset, at - (d - 1), end, stride_rl, RESET)
        taps = tl.load(weight + channel * stride_we + (W - 1 - d) * stride_ww, mask=channel < e, other=0.0)
        value = _inputs(x, window, at - d, channel, end, e, stride_xl, W, WINDOW)
        total += tl.where(cut, 0.0, taps.to(tl.float32) * value)
    if BIAS:
        total += tl.load(bias + channel, mask=channel < e, other=0.0).to(tl.float32)
    return total


@triton.jit
def _forward_kernel(
    x, window, weight, bias, reset, lengths, y, l, e, tiles,
    stride_xb, stride_xl, stride_we, stride_ww, stride_rb, stride_rl,
    SILU: tl.constexpr, W: tl.constexpr, BIAS: tl.constexpr, WINDOW: tl.constexpr, RESET: tl.constexpr,
    LENGTHS: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(e, BC)
    program = tl.program_id(0)
    row = (program // (blocks * tiles)).to(tl.int64)
    at = (program // blocks % tiles) * BT + tl.arange(0, BT)[:, None]
    channel = (program % blocks) * BC + tl.arange(0, BC)[None, :]
    end = tl.load(lengths + row).to(tl.int32) if LENGTHS else l
    total = _sums(
        x + row * stride_xb, window + row * (W - 1) * e, weight, bias, reset + row * stride_rb, at, channel, end, e,
        stride_xl, stride_we, stride_ww, stride_rl, W, BIAS, WINDOW, RESET,
    )  # fmt: skip
    if SILU:
        total = total / (1.0 + tl.exp(-total))
    total = tl.where(at < end, total, 0.0)
    tl.store(y + (row * l + at) * e + channel, total.to(y.dtype.element_ty), mask=(at < l) & (channel < e))


@triton.jit
def _window_kernel(
    x, window, reset, lengths, final, l, e, stride_xb, stride_xl, stride_rb, stride_rl,
    W: tl.constexpr, WINDOW: tl.constexpr, RESET: tl.constexpr, LENGTHS: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """The last w - 1 inputs before the end, 0 for those of an earlier document."""
    blocks = tl.cdiv(e, BC)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    channel = (tl.program_id(0) % blocks) * BC + tl.arange(0, BC)[None, :]
    end = tl.load(lengths + row).to(tl.int32) if LENGTHS else l
    at = tl.zeros((1, 1), tl.int32) + end
    cut = at != at
    for d in tl.static_range(1, W):
        value = _inputs(x + row * stride_xb, window + row * (W - 1) * e, at - d, channel, end, e, stride_xl, W, WINDOW)
        to = final + (row * (W - 1) + (W - 1 - d)) * e + channel
        tl.store(to, tl.where(cut, 0.0, value).to(final.dtype.element_ty), mask=channel < e)
        cut = cut | _begins(reset + row * stride_rb, at - d, end, stride_rl, RESET)


@triton.jit
def _backward_kernel(
    dy, dfinal, x, window, weight, bias, reset, lengths, dx, dwindow, dweight, dbias, l, e, tiles,
    stride_yb, stride_yl, stride_xb, stride_xl, stride_we, stride_ww, stride_rb, stride_rl,
    SILU: tl.constexpr, W: tl.constexpr, BIAS: tl.constexpr, WINDOW: tl.constexpr, RESET: tl.constexpr,
    LENGTHS: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(e, BC)
    program = tl.program_id(0)
    row, tile = (program // (blocks * tiles)).to(tl.int64), program // blocks % tiles
    at = tile * BT - (W - 1) + tl.arange(0, BT)[:, None]
    channel = (program % blocks) * BC + tl.arange(0, BC)[None, :]
    inside = channel < e
    end = tl.load(lengths + row).to(tl.int32) if LENGTHS else l
    x += row * stride_xb
    window += row * (W - 1) * e
    reset += row * stride_rb
    dy += row * stride_yb
    part = (row * tiles + tile) * e + channel

    slot = at - (end - (W - 1))
    grad = tl.load(
        dfinal + (row * (W - 1) + slot) * e + channel, mask=(slot >= 0) & (slot < W - 1) & inside, other=0.0
    ).to(tl.float32)
    cut = at != at
    for d in tl.static_range(1, W - 1):  # a document that begins between an input and the end hides it
        cut = cut | _begins(reset, at + d, end, stride_rl, RESET)
    grad = tl.where(cut, 0.0, grad)

    cut = at != at
    for d in tl.static_range(W):
        to = at + d
        dsum = tl.load(dy + to.to(tl.int64) * stride_yl + channel, mask=(to >= 0) & (to < end) & inside, other=0.0).to(
            tl.float32
        )
        if SILU:
            total = _sums(
                x, window, weight, bias, reset, to, channel, end, e, stride_xl, stride_we, stride_ww, stride_rl,
                W, BIAS, WINDOW, RESET,
            )  # fmt: skip
            share = 1.0 / (1.0 + tl.exp(-total))
            dsum *= share * (1.0 + total * (1.0 - share))
        if d > 0:
            cut = cut | _begins(reset, to, end, stride_rl, RESET)
        taps = tl.load(weight + channel * stride_we + (W - 1 - d) * stride_ww, mask=inside, other=0.0)
        reached = tl.where(cut, 0.0, dsum)
        grad += reached * taps.to(tl.float32)
        value = _inputs(x, window, at, channel, end, e, stride_xl, W, WINDOW)
        tl.store(dweight + part * W + (W - 1 - d), tl.sum(reached * value, 0)[None, :], mask=inside)
        if BIAS and d == 0:
            tl.store(dbias + part, tl.sum(dsum, 0)[None, :], mask=inside)
    tl.store(
        dx + (row * l + at) * e + channel,
        tl.where(at < end, grad, 0.0).to(dx.dtype.element_ty),
        mask=(at >= 0) & (at < l) & inside,
    )
    if WINDOW:
        to = dwindow + (row * (W - 1) + at + (W - 1)) * e + channel
        tl.store(to, grad.to(dwindow.dtype.element_ty), mask=(at < 0) & inside)


@triton.jit
def _step_kernel(
    window, x, weight, bias, y, e, stride_sb, stride_sw, stride_xb, stride_we, stride_ww,
    SILU: tl.constexpr, W: tl.constexpr, BIAS: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(e, BC)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    channel = (tl.program_id(0) % blocks) * BC + tl.arange(0, BC)
    inside = channel < e
    new = tl.load(x + row * stride_xb + channel, mask=inside, other=0.0)
    total = new.to(tl.float32) * tl.load(weight + channel * stride_we + (W - 1) * stride_ww, mask=inside, other=0.0).to(
        tl.float32
    )
    if BIAS:
        total += tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    for k in tl.static_range(W - 1):
        slot = window + row * stride_sb + k * stride_sw + channel
        held = tl.load(slot, mask=inside, other=0.0)
        taps = tl.load(weight + channel * stride_we + k * stride_ww, mask=inside, other=0.0)
        total += held.to(tl.float32) * taps.to(tl.float32)
        if k > 0:
            tl.store(slot - stride_sw, held, mask=inside)
    if W > 1:
        slot = window + row * stride_sb + (W - 2) * stride_sw + channel
        tl.store(slot, new.to(window.dtype.element_ty), mask=inside)
    if SILU:
        total = total / (1.0 + tl.exp(-total))
    tl.store(y + row * e + channel, total.to(y.dtype.element_ty), mask=inside)


_TOKENS, _CHANNELS = 32, 64  # of a tile


def forward(x, weight, bias, silu, initial_state, reset, lengths):
    x = rows(x)
    b, l, e = x.shape
    w = weight.shape[1]
    window = _window(initial_state, x)
    tiles, BC = triton.cdiv(l, _TOKENS), min(_CHANNELS, block(e))
    y, final = torch.empty(b, l, e, dtype=x.dtype, device=x.device), x.new_empty(b, w - 1, e)
    flags = {
        "W": w, "WINDOW": window is not None, "RESET": reset is not None, "LENGTHS": lengths is not None, "BC": BC,
        "num_warps": 4,
    }  # fmt: skip
    held = (x if window is None else window, x if reset is None else reset)  # never read where they stand for nothing
    with device_of(x):
        _forward_kernel[(b * tiles * triton.cdiv(e, BC),)](
            x, held[0], weight, bias, held[1], lengths, y, l, e, tiles,
            *x.stride()[:2], *weight.stride(), *_strides(reset),
            SILU=silu, BIAS=bias is not None, BT=_TOKENS, **flags,
        )  # fmt: skip
        if w > 1:
            _window_kernel[(b * triton.cdiv(e, BC),)](
                x, held[0], held[1], lengths, final, l, e, *x.stride()[:2], *_strides(reset), **flags
            )
    return y, final


def backward(dy, dfinal, x, weight, bias, silu, initial_state, reset, lengths):
    x, dy = rows(x), rows(dy)
    b, l, e = x.shape
    w = weight.shape[1]
    window = _window(initial_state, x)
    tiles, BC = triton.cdiv(l + w - 1, _TOKENS), min(_CHANNELS, block(e))
    dx, dwindow = torch.empty(b, l, e, dtype=x.dtype, device=x.device), x.new_zeros(b, w - 1, e)
    dweight = torch.empty(b * tiles, e, w, dtype=torch.float32, device=x.device)
    dbias = torch.empty(b * tiles, e, dtype=torch.float32, device=x.device)
    held = (x if window is None else window, x if reset is None else reset)
    with device_of(x):
        _backward_kernel[(b * tiles * triton.cdiv(e, BC),)](
            dy, dfinal.contiguous(), x, held[0], weight, bias, held[1], lengths, dx, dwindow, dweight, dbias,
            l, e, tiles, *dy.stride()[:2], *x.stride()[:2], *weight.stride(), *_strides(reset),
            SILU=silu, W=w, BIAS=bias is not None, WINDOW=window is not None, RESET=reset is not None,
            LENGTHS=lengths is not None, BT=_TOKENS, BC=BC, num_warps=4,
        )  # fmt: skip
    dbias = weight.new_empty(e) if bias is None else dbias.sum(0).to(weight.dtype)
    return dx, dweight.sum(0).to(weight.dtype), dbias, dwindow


def step(state, x, weight, bias, silu):
    x, memory = rows(x), rows(state)
    b, e = x.shape
    y = torch.empty(b, e, dtype=x.dtype, device=x.device)
    BC = min(256, block(e))
    with device_of(x):
        _step_kernel[(b * triton.cdiv(e, BC),)](
            memory, x, weight, bias, y, e, *memory.stride()[:2], x.stride(0), *weight.stride(),
            SILU=silu, W=weight.shape[1], BIAS=bias is not None, BC=BC, num_warps=2,
        )  # fmt: skip
    if memory is not state:
        state.copy_(memory)
    return y


def _window(initial_state: Tensor | None, x: Tensor) -> Tensor | None:
    return None if initial_state is None else initial_state.to(x.dtype).contiguous()


def _strides(reset: Tensor | None) -> tuple[int, ...]:
    return (0, 0) if reset is None else reset.stride()

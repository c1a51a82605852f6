"""The short convolution on a GPU: a program walks a strip of tokens, the last inputs of its channels in registers.

Position s < 0 is slot w - 1 + s of the window before x. `age` counts the tokens before one in its document, up to
w - 1: an input reaches the d-th output after it if that output's age is at least d. The backward pass computes what the
activation was given again, and holds the gradients of the last w inputs until all their outputs have passed. Its sums
over tokens, for the weight and the bias, are written per strip and added up in a fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from longwave.ops.triton_math import absent, block, device_of, processors_of, rows, sigmoid, silu


@triton.jit
def _input(x, window, t, channel, end, e, stride_xl, W: tl.constexpr, WINDOW: tl.constexpr):
    """The input at position t, as it is stored; 0 from the end on."""
    value = tl.load(
        x + tl.cast(t, tl.int64) * stride_xl + channel, mask=channel < tl.where((t >= 0) & (t < end), e, 0), other=0.0
    )
    if WINDOW:
        before = tl.load(
            window + (t + (W - 1)) * e + channel, mask=channel < tl.where((t < 0) & (t > -W), e, 0), other=0.0
        )
        value = tl.where(t < 0, before.to(value.dtype), value)
    return value


@triton.jit
def _older(age, reset, t, end, stride_rl, W: tl.constexpr, RESET: tl.constexpr):
    """The age of token t, from that of the one before it."""
    age = tl.minimum(age + 1, W - 1)
    if RESET:
        begins = tl.load(reset + tl.cast(t, tl.int64) * stride_rl, mask=(t >= 0) & (t < end), other=0)
        age = tl.where(begins != 0, 0, age)
    return age


@triton.jit
def _before(
    x, window, reset, first, channel, end, e, stride_xl, stride_rl,
    W: tl.constexpr, WINDOW: tl.constexpr, RESET: tl.constexpr,
):  # fmt: skip
    """The w - 1 inputs before position `first`, in float32, and the age of the last of them."""
    held, age = (), tl.zeros((), tl.int32) + (W - 1)
    for k in tl.static_range(W - 1):
        t = first - (W - 1) + k
        held = held + (_input(x, window, t, channel, end, e, stride_xl, W, WINDOW).to(tl.float32),)
        age = _older(age, reset, t, end, stride_rl, W, RESET)
    return held, age


@triton.jit
def _taps(weight, bias, channel, e, stride_we, stride_ww, W: tl.constexpr, BIAS: tl.constexpr):
    """The weights of distance 0, 1, ..., and the bias."""
    taps = ()
    for d in tl.static_range(W):
        at = weight + channel * stride_we + (W - 1 - d) * stride_ww
        taps = taps + (tl.load(at, mask=channel < e, other=0.0).to(tl.float32),)
    offset = tl.zeros(channel.shape, tl.float32)
    if BIAS:
        offset = tl.load(bias + channel, mask=channel < e, other=0.0).to(tl.float32)
    return taps, offset


@triton.jit
def _sum(taps, offset, now, held, age, W: tl.constexpr, RESET: tl.constexpr):
    """bias + sum_d taps_d x_{t-d} over the inputs of t's document; `held` has the oldest first."""
    total = offset + taps[0] * now
    for d in tl.static_range(1, W):
        term = taps[d] * held[W - 1 - d]
        if RESET:
            term = tl.where(age >= d, term, 0.0)
        total += term
    return total


@triton.jit
def _rest(held, COUNT: tl.constexpr):
    """All of `held` but the first."""
    rest = ()
    for k in tl.static_range(1, COUNT):
        rest = rest + (held[k],)
    return rest


@triton.jit
def _forward_kernel(
    x, window, weight, bias, reset, lengths, y, l, e, strips,
    stride_xb, stride_xl, stride_we, stride_ww, stride_rb, stride_rl,
    SILU: tl.constexpr, W: tl.constexpr, BIAS: tl.constexpr, WINDOW: tl.constexpr, RESET: tl.constexpr,
    LENGTHS: tl.constexpr, STRIP: tl.constexpr, T: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(e, BC)
    program = tl.program_id(0)
    row, first = (program // (blocks * strips)).to(tl.int64), (program // blocks % strips) * STRIP
    channel = (program % blocks) * BC + tl.arange(0, BC)
    end = tl.load(lengths + row).to(tl.int32) if LENGTHS else l
    x += row * stride_xb
    window += row * (W - 1) * e
    reset += row * stride_rb
    y += row * l * e
    taps, offset = _taps(weight, bias, channel, e, stride_we, stride_ww, W, BIAS)
    held, age = _before(x, window, reset, first, channel, end, e, stride_xl, stride_rl, W, WINDOW, RESET)
    for start in range(first, tl.minimum(first + STRIP, l), T):
        inputs = ()
        for k in tl.static_range(T):
            inputs = inputs + (_input(x, window, start + k, channel, end, e, stride_xl, W, False),)
        for k in tl.static_range(T):
            t, now = start + k, inputs[k].to(tl.float32)
            age = _older(age, reset, t, end, stride_rl, W, RESET)
            total = _sum(taps, offset, now, held, age, W, RESET)
            held = _rest(held + (now,), W)
            if SILU:
                total = silu(total)
            if LENGTHS:
                total = tl.where(t < end, total, 0.0)
            to = y + tl.cast(t, tl.int64) * e + channel
            tl.store(to, total.to(y.dtype.element_ty), mask=channel < tl.where(t < l, e, 0))


@triton.jit
def _window_kernel(
    x, window, reset, lengths, final, l, e, stride_xb, stride_xl, stride_rb, stride_rl,
    W: tl.constexpr, WINDOW: tl.constexpr, RESET: tl.constexpr, LENGTHS: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """The last w - 1 inputs before the end, 0 for those of an earlier document."""
    blocks = tl.cdiv(e, BC)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    channel = (tl.program_id(0) % blocks) * BC + tl.arange(0, BC)
    end = tl.load(lengths + row).to(tl.int32) if LENGTHS else tl.zeros((), tl.int32) + l
    held, age = _before(
        x + row * stride_xb, window + row * (W - 1) * e, reset + row * stride_rb, end, channel, end, e, stride_xl,
        stride_rl, W, WINDOW, RESET,
    )  # fmt: skip
    for k in tl.static_range(W - 1):
        value = tl.where(age >= W - 2 - k, held[k], 0.0).to(final.dtype.element_ty)
        tl.store(final + (row * (W - 1) + k) * e + channel, value, mask=channel < e)


@triton.jit
def _backward_tile(
    dy, dfinal, x, window, reset, dx, dwindow, taps, offset, held, age, waiting, sums, sum_bias,
    start, first, end, channel, l, e, stride_yl, stride_xl, stride_rl,
    SILU: tl.constexpr, W: tl.constexpr, BIAS: tl.constexpr, WINDOW: tl.constexpr, RESET: tl.constexpr,
    COUNTED: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """T outputs from `start` on. The inputs that they are the last to reach are done, but for those before `first`.

    COUNTED: they are the strip's own, whose share in the sums is its to add.
    """
    inputs, grads = (), ()
    for k in tl.static_range(T):
        t = start + k
        inputs = inputs + (_input(x, window, t, channel, end, e, stride_xl, W, WINDOW),)
        at = dy + tl.cast(t, tl.int64) * stride_yl + channel
        grads = grads + (tl.load(at, mask=channel < tl.where((t >= 0) & (t < end), e, 0), other=0.0),)
    for k in tl.static_range(T):
        t, now, grad = start + k, inputs[k].to(tl.float32), grads[k].to(tl.float32)
        age = _older(age, reset, t, end, stride_rl, W, RESET)
        if SILU:
            total = _sum(taps, offset, now, held, age, W, RESET)
            share = sigmoid(total)
            grad *= share + total * (share - share * share)
        waiting = waiting + (taps[0] * grad,)
        reached, added = (), ()
        for d in tl.static_range(W - 1, 0, -1):
            to, own = taps[d] * grad, grad * held[W - 1 - d]
            if RESET:
                to, own = tl.where(age >= d, to, 0.0), tl.where(age >= d, own, 0.0)
            reached = reached + (waiting[W - 1 - d] + to,)
            added = added + (sums[W - 1 - d] + own,)
        waiting = reached + (waiting[W - 1],)
        if COUNTED:
            sums = added + (sums[W - 1] + grad * now,)
            if BIAS:
                sum_bias += grad
        s = t - (W - 1)
        done = waiting[0]
        slot = s - (end - (W - 1))
        if (slot >= 0) & (slot < W - 1):
            last = tl.load(dfinal + slot * e + channel, mask=channel < e, other=0.0).to(tl.float32)
            done += tl.where(age >= W - 1, last, 0.0)
        tl.store(
            dx + tl.cast(s, tl.int64) * e + channel,
            done.to(dx.dtype.element_ty),
            mask=channel < tl.where((s >= first) & (s >= 0) & (s < l), e, 0),
        )
        if WINDOW:
            to_window = channel < tl.where((s >= first) & (s < 0), e, 0)
            tl.store(dwindow + (s + (W - 1)) * e + channel, done.to(dwindow.dtype.element_ty), mask=to_window)
        waiting = _rest(waiting, W)
        held = _rest(held + (now,), W)
    return held, age, waiting, sums, sum_bias


@triton.jit
def _backward_kernel(
    dy, dfinal, x, window, weight, bias, reset, lengths, dx, dwindow, parts, l, e, strips,
    stride_yb, stride_yl, stride_xb, stride_xl, stride_we, stride_ww, stride_rb, stride_rl,
    SILU: tl.constexpr, W: tl.constexpr, BIAS: tl.constexpr, WINDOW: tl.constexpr, RESET: tl.constexpr,
    LENGTHS: tl.constexpr, STRIP: tl.constexpr, T: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """A strip of tokens as inputs; those of the first one begin with the window. Outputs reach w - 1 tokens further."""
    blocks = tl.cdiv(e, BC)
    program = tl.program_id(0)
    row, strip = (program // (blocks * strips)).to(tl.int64), program // blocks % strips
    first = strip * STRIP - (W - 1)
    channel = (program % blocks) * BC + tl.arange(0, BC)
    end = tl.load(lengths + row).to(tl.int32) if LENGTHS else l
    x += row * stride_xb
    window += row * (W - 1) * e
    reset += row * stride_rb
    dy += row * stride_yb
    dx += row * l * e
    dwindow += row * (W - 1) * e
    dfinal += row * (W - 1) * e
    taps, offset = _taps(weight, bias, channel, e, stride_we, stride_ww, W, BIAS)
    held, age = _before(x, window, reset, first, channel, end, e, stride_xl, stride_rl, W, WINDOW, RESET)
    zero = tl.zeros((BC,), tl.float32)
    waiting, sums, sum_bias = (), (), zero
    for d in tl.static_range(W):
        sums = sums + (zero,)
        if d > 0:
            waiting = waiting + (zero,)  # gradients of the last w - 1 inputs, the oldest first
    for start in range(first, first + STRIP, T):
        held, age, waiting, sums, sum_bias = _backward_tile(
            dy, dfinal, x, window, reset, dx, dwindow, taps, offset, held, age, waiting, sums, sum_bias,
            start, first, end, channel, l, e, stride_yl, stride_xl, stride_rl,
            SILU, W, BIAS, WINDOW, RESET, True, T,
        )  # fmt: skip
    _backward_tile(
        dy, dfinal, x, window, reset, dx, dwindow, taps, offset, held, age, waiting, sums, sum_bias,
        first + STRIP, first, end, channel, l, e, stride_yl, stride_xl, stride_rl,
        SILU, W, BIAS, WINDOW, RESET, False, W - 1,
    )  # fmt: skip
    at = parts + (row * strips + strip) * ((W + 1) * e) + channel
    for k in tl.static_range(W):
        tl.store(at + k * e, sums[k], mask=channel < e)
    tl.store(at + W * e, sum_bias, mask=channel < e)


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
        total = silu(total)
    tl.store(y + row * e + channel, total.to(y.dtype.element_ty), mask=inside)


_STRIP, _BACKWARD_STRIP = 32, 256  # tokens that a program walks, backward at most
_TILE, _BACKWARD_TILE = 16, 8  # tokens that are loaded before the first of them is worked on
_CHANNELS = 128


def forward(x, weight, bias, silu, initial_state, reset, lengths):
    x = rows(x)
    b, l, e = x.shape
    window = _window(initial_state, x)
    y, final = torch.empty(b, l, e, dtype=x.dtype, device=x.device), x.new_empty(b, weight.shape[1] - 1, e)
    strips, flags = triton.cdiv(l, _STRIP), _flags(weight, window, reset, lengths, e)
    held = (absent(window, x), absent(reset, x))
    with device_of(x):
        _forward_kernel[(b * strips * triton.cdiv(e, flags["BC"]),)](
            x, held[0], weight, bias, held[1], lengths, y, l, e, strips,
            *x.stride()[:2], *weight.stride(), *_strides(reset),
            SILU=silu, BIAS=bias is not None, STRIP=_STRIP, T=_TILE, **flags,
        )  # fmt: skip
        _window_kernel[(b * triton.cdiv(e, flags["BC"]),)](
            x, held[0], held[1], lengths, final, l, e, *x.stride()[:2], *_strides(reset), **flags
        )
    return y, final


def backward(dy, dfinal, x, weight, bias, silu, initial_state, reset, lengths):
    x, dy = rows(x), rows(dy)
    b, l, e = x.shape
    w = weight.shape[1]
    window = _window(initial_state, x)
    flags = _flags(weight, window, reset, lengths, e)
    blocks, strip = triton.cdiv(e, flags["BC"]), _BACKWARD_STRIP
    while strip > _STRIP and b * blocks * triton.cdiv(l, strip) < 16 * processors_of(x):
        strip //= 2
    strips = triton.cdiv(l + w - 1, strip)
    dx, dwindow = torch.empty(b, l, e, dtype=x.dtype, device=x.device), x.new_zeros(b, w - 1, e)
    parts = torch.empty(b * strips, w + 1, e, dtype=torch.float32, device=x.device)
    held = (absent(window, x), absent(reset, x))
    with device_of(x):
        _backward_kernel[(b * strips * blocks,)](
            dy, dfinal.contiguous(), x, held[0], weight, bias, held[1], lengths, dx, dwindow, parts,
            l, e, strips, *dy.stride()[:2], *x.stride()[:2], *weight.stride(), *_strides(reset),
            SILU=silu, BIAS=bias is not None, STRIP=strip, T=_BACKWARD_TILE, **flags,
        )  # fmt: skip
    *dweight, dbias = parts.sum(0).to(weight.dtype)
    return dx, torch.stack(dweight, 1), dbias, dwindow


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


def _flags(weight, window, reset, lengths, e: int) -> dict:
    return {
        "W": weight.shape[1], "WINDOW": window is not None, "RESET": reset is not None,
        "LENGTHS": lengths is not None, "BC": min(_CHANNELS, block(e)), "num_warps": 1,
    }  # fmt: skip

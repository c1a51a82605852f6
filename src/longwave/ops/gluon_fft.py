"""Fourier transforms inside one Gluon program: radix steps in registers, exchanged through shared memory in between.

Complex numbers are two tuples of tensors, real and imaginary parts, one pair per number of the radix: a step is then
plain arithmetic of registers. `RADICES` (r1, r2, ..) split the index t, its leading digit first; a step turns its digit
into one of the frequency, whose place it takes, so that frequency k = k1 + r1 k2 + r1 r2 k3 + .. ends at the place
((k1 r2 + k2) r3 + k3) ..; `inverse` takes them from there, and nothing is ever put in order. A tensor's elements run
over the digits that are not in the tuple, and over `BE` sequences side by side, fastest.

Cooley and Tukey, "An algorithm for the machine calculation of complex Fourier series", 1965; the twist: see `turns`.
"""

import functools
import math

import numpy as np
import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.constexpr_function
def cosine(k, n):
    return math.cos(2 * math.pi * k / n)


@gluon.constexpr_function
def sine(k, n):
    return math.sin(2 * math.pi * k / n)


@gluon.constexpr_function
def first(radices):
    return radices[0]


@gluon.constexpr_function
def rest(radices):
    return radices[1:]


@gluon.constexpr_function
def last(radices):
    return radices[-1]


@gluon.constexpr_function
def count(radices):
    return len(radices)


@gluon.constexpr_function
def below_first(radices):
    """How many places a first digit spans among those of all digits but the last."""
    return math.prod(radices[1:-1])


@gluon.constexpr_function
def flat_layout(vec, warps):
    """Of the elements of a tuple's tensors: `vec` neighbours to a thread, then its lanes, its warps, and again."""
    return gl.BlockedLayout([vec], [32], [warps], [0])


@gluon.constexpr_function
def _digit_layout(radix, vec, warps):
    return gl.BlockedLayout([vec, radix, 2], [32, 1, 1], [warps, 1, 1], [2, 1, 0])


@gluon.constexpr_function
def index_layout(shape, vec, warps):
    """`flat_layout` of elements that are told apart by several indices, the last one fastest."""
    bits = []
    for axis in reversed(range(len(shape))):
        for bit in range(shape[axis].bit_length() - 1):
            bits.append([(1 << bit) * (axis == k) for k in range(len(shape))])
    nothing, v, w = [0] * len(shape), vec.bit_length() - 1, warps.bit_length() - 1
    lanes, of_warps = bits[v : v + 5], bits[v + 5 : v + 5 + w]
    lanes, of_warps = lanes + [nothing] * (5 - len(lanes)), of_warps + [nothing] * (w - len(of_warps))
    return gl.DistributedLinearLayout(bits[:v] + bits[v + 5 + w :], lanes, of_warps, [], list(shape))


@gluon.jit
def _step(re, im, R: gl.constexpr, SIGN: gl.constexpr):
    """sum_t x_t exp(SIGN 2 pi i t k / R) for k = 0..R-1."""
    if R == 1:
        return re, im
    else:
        HALF: gl.constexpr = R // 2
        even_re, even_im = _step(re[0::2], im[0::2], HALF, SIGN)
        odd_re, odd_im = _step(re[1::2], im[1::2], HALF, SIGN)
        low_re, low_im, high_re, high_im = (), (), (), ()
        for k in gl.static_range(HALF):
            u, v = odd_re[k], odd_im[k]
            if k == 0:
                p, q = u, v
            elif 4 * k == R:
                p, q = -SIGN * v, SIGN * u
            elif 8 * k == R:
                p, q = (u - SIGN * v) * cosine(1, 8), (v + SIGN * u) * cosine(1, 8)
            elif 8 * k == 3 * R:
                p, q = (u + SIGN * v) * -cosine(1, 8), (SIGN * u - v) * cosine(1, 8)
            else:
                p = u * cosine(k, R) - v * (SIGN * sine(k, R))
                q = u * (SIGN * sine(k, R)) + v * cosine(k, R)
            low_re, low_im = low_re + (even_re[k] + p,), low_im + (even_im[k] + q,)
            high_re, high_im = high_re + (even_re[k] - p,), high_im + (even_im[k] - q,)
        return low_re + high_re, low_im + high_im


@gluon.jit
def _pack(parts, R: gl.constexpr, M: gl.constexpr):
    """R tensors (M,) -> (M, R)."""
    if R == 1:
        return parts[0].reshape([M, 1])
    else:
        HALF: gl.constexpr = R // 2
        return gl.join(_pack(parts[0::2], HALF, M), _pack(parts[1::2], HALF, M)).reshape([M, R])


@gluon.jit
def _unpack(whole, R: gl.constexpr, M: gl.constexpr, VEC: gl.constexpr):
    """(M, R) -> R tensors (M,)."""
    if R == 1:
        return (gl.convert_layout(whole.reshape([M]), flat_layout(VEC, gl.num_warps()), assert_trivial=True),)
    else:
        HALF: gl.constexpr = R // 2
        even, odd = whole.reshape([M, HALF, 2]).split()
        evens, odds = _unpack(even, HALF, M, VEC), _unpack(odd, HALF, M, VEC)
        parts = ()
        for k in gl.static_range(HALF):
            parts = parts + (evens[k], odds[k])
        return parts


@gluon.jit
def _exchange(re, im, P: gl.constexpr, R: gl.constexpr, NEXT: gl.constexpr, Q: gl.constexpr, VEC: gl.constexpr):
    """R tensors over (P, NEXT, Q) -> NEXT tensors over (P, R, Q)."""
    whole = gl.join(_pack(re, R, P * NEXT * Q), _pack(im, R, P * NEXT * Q))
    whole = whole.reshape([P, NEXT, Q, R, 2]).permute([0, 3, 2, 1, 4]).reshape([P * R * Q, NEXT, 2])
    re_whole, im_whole = gl.convert_layout(whole, _digit_layout(NEXT, VEC, gl.num_warps())).split()
    return _unpack(re_whole, NEXT, P * R * Q, VEC), _unpack(im_whole, NEXT, P * R * Q, VEC)


@gluon.jit
def _turn(re, im, table, plane, R: gl.constexpr, P: gl.constexpr, SIZE: gl.constexpr, BE: gl.constexpr,
          VEC: gl.constexpr, SIGN: gl.constexpr):  # fmt: skip
    """Times table[k, t], or its conjugate: k the digit in the tuple, t < SIZE what is left of the index below it."""
    flat: gl.constexpr = flat_layout(VEC, gl.num_warps())
    indices: gl.constexpr = index_layout([P, SIZE, BE], VEC, gl.num_warps())
    at = table + gl.arange(0, SIZE, layout=gl.SliceLayout(0, gl.SliceLayout(2, indices)))
    turned_re, turned_im = (), ()
    for k in gl.static_range(R):
        c = gl.load(at + k * SIZE)[None, :, None]
        s = SIGN * gl.load(at + k * SIZE + plane)[None, :, None]
        u = gl.convert_layout(re[k].reshape([P, SIZE, BE]), indices, assert_trivial=True)
        v = gl.convert_layout(im[k].reshape([P, SIZE, BE]), indices, assert_trivial=True)
        p, q = (u * c - v * s).reshape([P * SIZE * BE]), (u * s + v * c).reshape([P * SIZE * BE])
        turned_re = turned_re + (gl.convert_layout(p, flat, assert_trivial=True),)
        turned_im = turned_im + (gl.convert_layout(q, flat, assert_trivial=True),)
    return turned_re, turned_im


@gluon.jit
def forward(re, im, table, plane, RADICES: gl.constexpr, P: gl.constexpr, SIZE: gl.constexpr, BE: gl.constexpr,
            VEC: gl.constexpr):  # fmt: skip
    """The first digit's tuple over (P, SIZE, BE), P transforms -> the last digit's, over (P, the other digits, BE)."""
    R: gl.constexpr = first(RADICES)
    re, im = _step(re, im, R, -1)
    if count(RADICES) == 1:
        return re, im
    else:
        NEXT: gl.constexpr = first(rest(RADICES))
        re, im = _turn(re, im, table, plane, R, P, SIZE, BE, VEC, 1)
        re, im = _exchange(re, im, P, R, NEXT, SIZE // NEXT * BE, VEC)
        return forward(re, im, table + R * SIZE, plane, rest(RADICES), P * R, SIZE // NEXT, BE, VEC)


@gluon.jit
def inverse(re, im, table, plane, RADICES: gl.constexpr, P: gl.constexpr, SIZE: gl.constexpr, BE: gl.constexpr,
            VEC: gl.constexpr):  # fmt: skip
    """What `forward` was given, from what it returned, times the transform's size."""
    R: gl.constexpr = first(RADICES)
    if count(RADICES) > 1:
        NEXT: gl.constexpr = first(rest(RADICES))
        re, im = inverse(re, im, table + R * SIZE, plane, rest(RADICES), P * R, SIZE // NEXT, BE, VEC)
        re, im = _exchange(re, im, P, NEXT, R, SIZE // NEXT * BE, VEC)
        re, im = _turn(re, im, table, plane, R, P, SIZE, BE, VEC, -1)
    return _step(re, im, R, 1)


@gluon.jit
def frequency(place, r: gl.constexpr, RADICES: gl.constexpr):
    """The frequency that `forward` leaves at `place`, of the elements, in number r of the last digit's tuple."""
    R: gl.constexpr = first(RADICES)
    if count(RADICES) == 1:
        return r
    else:
        below: gl.constexpr = below_first(RADICES)
        return place // below + R * frequency(place % below, r, rest(RADICES))


@functools.cache
def turns(radices: tuple[int, ...], device: torch.device, *, twisted: bool = False, columns: int = 0) -> Tensor:
    """(2, m): the real and imaginary parts of what `forward` multiplies by, step after step.

    `twisted`: of a transform whose input t carries exp(2 pi i t / 4n) besides, so that products of spectra are products
    modulo z^n - i, which carry 2n real points in n complex ones. The digit in the first tuple brings its part itself.
    `columns`: at the end stand exp(-2 pi i k / m) for k = 0..m-1, m the last radix times so many columns.
    """
    size, angles = math.prod(radices), []
    for radix in radices[:-1]:
        below = np.arange(size // radix)
        angle = -np.outer(np.arange(radix), below) / size
        if twisted and not angles:
            angle = angle + below / (4 * size)
        angles.append(angle.ravel())
        size //= radix
    between = np.arange(columns * radices[-1])
    angle = 2 * np.pi * np.concatenate([*angles, -between / max(1, len(between))])
    return torch.from_numpy(np.stack([np.cos(angle), np.sin(angle)]).astype(np.float32)).to(device)

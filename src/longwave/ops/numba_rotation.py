"""Rotation of pairs of channels inside Numba kernels, on transposed blocks: tokens along the contiguous axis.

A pair is (2 j, 2 j + 1), or with `halves` (j, j + n / 2); the first s pairs are rotated, the rest of the n channels is
left as it is. Angles are summed up in float64, so that a long document costs them nothing.
"""

import math

import numpy as np

from longwave.ops.numba_chunks import row_of
from longwave.ops.numba_math import cos_sin, jit

_TWO_PI = 2 * math.pi


@jit
def unit_circle(angles, cos, sin):
    """cos and sin (q,) of the float64 `angles` (q,), in the dtype of the results."""
    one = cos.dtype.type(1)
    for i in range(len(angles)):
        cos[i], sin[i] = cos_sin(cos.dtype.type(wrapped(angles[i])), one)


@jit
def wrapped(angle):
    """The angle in [-pi, pi] that differs by whole turns. One that is small already stays as it is."""
    return angle - _TWO_PI * np.rint(angle / _TWO_PI)


@jit
def turn(rates, dt, q_wide, angle, sums, cos, sin):
    """angle (s,) <- angle + rate dt, token after token, with the cos and sin (s, q_wide) met on the way."""
    size = len(dt)
    for j in range(len(angle)):
        rate, total = row_of(rates, j, q_wide), angle[j]
        for i in range(size):
            total += np.float64(rate[i]) * np.float64(dt[i])
            sums[i] = total
        unit_circle(sums[:size], row_of(cos, j, q_wide)[:size], row_of(sin, j, q_wide)[:size])
        angle[j] = wrapped(total)


@jit
def turn_back(dangles, rates, dt, q_wide, dangle, drates, ddt):
    """The backward of `turn`: from dangles (s, q_wide) and the gradient of the last angle, that of the first, in place.

    Adds to drates (s, q_wide) and ddt (size,).
    """
    for j in range(len(dangle)):
        grads, rate, drate = row_of(dangles, j, q_wide), row_of(rates, j, q_wide), row_of(drates, j, q_wide)
        total = dangle[j]
        for i in range(len(dt) - 1, -1, -1):
            total += grads[i]
            drate[i] += total * dt[i]
            ddt[i] += total * rate[i]
        dangle[j] = total


@jit
def _pair(j, n, halves):
    return (j, j + n // 2) if halves else (2 * j, 2 * j + 1)


@jit
def rotate(source, bias, cos, sin, s, size, q_wide, halves, out):
    """out (n, q_wide) <- source + bias (n,), rotated."""
    n = len(bias)
    for j in range(s):
        k0, k1 = _pair(j, n, halves)
        u0, u1, b0, b1 = row_of(source, k0, q_wide), row_of(source, k1, q_wide), bias[k0], bias[k1]
        o0, o1, c, d = row_of(out, k0, q_wide), row_of(out, k1, q_wide), row_of(cos, j, q_wide), row_of(sin, j, q_wide)
        for i in range(size):
            first, second = u0[i] + b0, u1[i] + b1
            o0[i] = first * c[i] - second * d[i]
            o1[i] = first * d[i] + second * c[i]
    for k in range(n):
        if _is_left(k, n, s, halves):
            u, o, b0 = row_of(source, k, q_wide), row_of(out, k, q_wide), bias[k]
            for i in range(size):
                o[i] = u[i] + b0


@jit
def _is_left(k, n, s, halves):
    """Is channel k in no rotated pair?"""
    return (k if k < n // 2 else k - n // 2) >= s if halves else k >= 2 * s


@jit
def rotate_token(u, cos, sin, halves):
    """One token, u (n,), in place, by cos and sin (s,)."""
    for j in range(len(cos)):
        k0, k1 = _pair(j, len(u), halves)
        first, second = u[k0], u[k1]
        u[k0] = first * cos[j] - second * sin[j]
        u[k1] = first * sin[j] + second * cos[j]


@jit
def rotate_back(grads, rotated, cos, sin, s, size, q_wide, halves, dangles, dbias, dsource):
    """The backward of `rotate`: adds to dangles (s, q_wide), dbias (n,) and dsource (n, q_wide). Changes `grads`."""
    n = len(dbias)
    for j in range(s):
        k0, k1 = _pair(j, n, halves)
        g0, g1, r0, r1 = (
            row_of(grads, k0, q_wide),
            row_of(grads, k1, q_wide),
            row_of(rotated, k0, q_wide),
            row_of(rotated, k1, q_wide),
        )
        c, d, dangle = row_of(cos, j, q_wide), row_of(sin, j, q_wide), row_of(dangles, j, q_wide)
        for i in range(size):
            first, second = g0[i], g1[i]
            dangle[i] += second * r0[i] - first * r1[i]
            g0[i] = first * c[i] + second * d[i]
            g1[i] = second * c[i] - first * d[i]
    for k in range(n):
        g, out, total = row_of(grads, k, q_wide), row_of(dsource, k, q_wide), 0.0
        for i in range(size):
            out[i] += g[i]
            total += g[i]
        dbias[k] += total

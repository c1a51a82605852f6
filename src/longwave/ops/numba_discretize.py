"""`discretize_diagonal` for Numba kernels, with its derivatives: rows of channels, vectorised.

For x' = A x + B u with complex diagonal A, z = dt A, and one input for each step: Abar, and F with Bbar = F B.

    zoh        Abar = exp(z)                     F = dt phi(z), phi(z) = (exp(z) - 1) / z
    bilinear   Abar = (1 + z/2) / (1 - z/2)      F = dt / (1 - z/2)
    euler      Abar = 1 + z                      F = dt
    dirac      Abar = exp(z)                     F = 1
"""

from typing import Any

import numba
import numpy as np
from numba import types
from numba.extending import overload

from longwave.ops.numba_math import OPTIONS, cos_sin, exp, jit

METHODS = ("zoh", "bilinear", "euler", "dirac")
ZOH, BILINEAR, EULER, DIRAC = range(4)

# Below these sizes of z, phi and its slope are taken by their series: the quotients would lose digits.
_SERIES_BELOW = {np.float32: 0.5, np.float64: 0.125}
_TERMS = 10

# LLVM vectorises no loop that calls a function, and by itself inlines only small ones.
_INLINE: Any = OPTIONS | {"forceinline": True}
_inline: Any = numba.njit(**_INLINE)


@jit
def discretize(method, dt, A, Abar, F):
    """One step for all of A (2, n, e): Abar and F (2, n, e), for dt (e,). Axis 0: real and imaginary part."""
    one, half = dt.dtype.type(1), dt.dtype.type(0.5)
    for k in range(A.shape[1]):
        a, b, x, y, p, q = A[0, k], A[1, k], Abar[0, k], Abar[1, k], F[0, k], F[1, k]
        if method == ZOH:
            for c in range(len(dt)):
                size = exp(dt[c] * a[c])
                cosine, sine = cos_sin(dt[c], b[c])
                x[c], y[c] = size * cosine, size * sine
                re, im = phi(dt[c] * a[c], dt[c] * b[c], x[c], y[c])
                p[c], q[c] = dt[c] * re, dt[c] * im
        elif method == DIRAC:
            for c in range(len(dt)):
                size = exp(dt[c] * a[c])
                cosine, sine = cos_sin(dt[c], b[c])
                x[c], y[c] = size * cosine, size * sine
                p[c], q[c] = one, one - one
        elif method == BILINEAR:
            for c in range(len(dt)):
                re, im = half * dt[c] * a[c], half * dt[c] * b[c]
                scale = dt[c] / ((one - re) * (one - re) + im * im)
                p[c], q[c] = scale * (one - re), scale * im
                # (1 + z/2) / (1 - z/2) = 1 + A F, which near 1 rounds but once.
                x[c] = one + (a[c] * p[c] - b[c] * q[c])
                y[c] = a[c] * q[c] + b[c] * p[c]
        else:
            for c in range(len(dt)):
                x[c], y[c] = one + dt[c] * a[c], dt[c] * b[c]
                p[c], q[c] = dt[c], one - one


@jit
def derivatives(method, dt, A, Abar, dAbar, dF, dF_dA):
    """What `discretize` comes to per unit of dt and of A, all (2, n, e).

    dAbar is V with d Abar / d dt = A V and d Abar / d A = dt V; dF is d F / d dt, and dF_dA is d F / d A.
    """
    one, half = dt.dtype.type(1), dt.dtype.type(0.5)
    for k in range(A.shape[1]):
        x, y, v, w = Abar[0, k], Abar[1, k], dAbar[0, k], dAbar[1, k]
        f, g, s, t = dF[0, k], dF[1, k], dF_dA[0, k], dF_dA[1, k]
        a, b = A[0, k], A[1, k]
        if method == ZOH:
            for c in range(len(dt)):
                v[c], w[c] = x[c], y[c]
                f[c], g[c] = x[c], y[c]
                re, im = phi_slope(dt[c] * a[c], dt[c] * b[c], x[c], y[c])
                s[c], t[c] = dt[c] * dt[c] * re, dt[c] * dt[c] * im
        elif method == DIRAC:
            for c in range(len(dt)):
                v[c], w[c] = x[c], y[c]
                f[c] = g[c] = s[c] = t[c] = one - one
        elif method == BILINEAR:
            for c in range(len(dt)):
                re, im = half * dt[c] * a[c], half * dt[c] * b[c]
                inverse = one / ((one - re) * (one - re) + im * im)
                re, im = inverse * (one - re), inverse * im  # 1 / (1 - z/2)
                v[c], w[c] = re * re - im * im, (re + re) * im
                f[c], g[c] = v[c], w[c]
                s[c], t[c] = half * dt[c] * dt[c] * v[c], half * dt[c] * dt[c] * w[c]
        else:
            for c in range(len(dt)):
                v[c] = f[c] = one
                w[c] = g[c] = s[c] = t[c] = one - one


def phi(re, im, exp_re, exp_im) -> Any:
    """(exp(z) - 1) / z, the mean of exp(s z) over s in [0, 1]; given exp(z)."""


def phi_slope(re, im, exp_re, exp_im) -> Any:
    """The derivative of phi: (exp(z) - phi(z)) / z."""


@overload(phi, jit_options=_INLINE)
def _phi(re, im, exp_re, exp_im):
    one, c, limit = _series(re, [1 / (k + 1) for k in range(1, _TERMS)])

    def phi_of(re, im, exp_re, exp_im):
        square = re * re + im * im
        small = square < limit
        inverse = one / (one if small else square)
        above = exp_re - one
        p, q = (above * re + exp_im * im) * inverse, (exp_im * re - above * im) * inverse
        x, y = _horner(re, im, one, c)
        return x if small else p, y if small else q

    return phi_of


@overload(phi_slope, jit_options=_INLINE)
def _phi_slope(re, im, exp_re, exp_im):
    one, c, limit = _series(re, [(k + 1) / (k * (k + 2)) for k in range(1, _TERMS)])
    half = one / 2

    def phi_slope_of(re, im, exp_re, exp_im):
        square = re * re + im * im
        small = square < limit
        inverse = one / (one if small else square)
        p, q = phi(re, im, exp_re, exp_im)
        p, q = exp_re - p, exp_im - q
        p, q = (p * re + q * im) * inverse, (q * re - p * im) * inverse
        x, y = _horner(re, im, half, c)
        return x if small else p, y if small else q

    return phi_slope_of


def _series(number, ratios):
    """1, the ratios of successive terms of a power series, and the bound of |z|^2."""
    dtype = np.float32 if number == types.float32 else np.float64
    return dtype(1), tuple(dtype(ratio) for ratio in ratios), dtype(_SERIES_BELOW[dtype] ** 2)


@_inline
def _horner(re, im, first, c):
    """first (1 + c_0 z (1 + c_1 z (...))). Written out: LLVM vectorises no loop that has another in it."""
    x, y = first + re * c[8] * first, im * c[8] * first
    x, y = first + (re * x - im * y) * c[7], (re * y + im * x) * c[7]
    x, y = first + (re * x - im * y) * c[6], (re * y + im * x) * c[6]
    x, y = first + (re * x - im * y) * c[5], (re * y + im * x) * c[5]
    x, y = first + (re * x - im * y) * c[4], (re * y + im * x) * c[4]
    x, y = first + (re * x - im * y) * c[3], (re * y + im * x) * c[3]
    x, y = first + (re * x - im * y) * c[2], (re * y + im * x) * c[2]
    x, y = first + (re * x - im * y) * c[1], (re * y + im * x) * c[1]
    return first + (re * x - im * y) * c[0], (re * y + im * x) * c[0]

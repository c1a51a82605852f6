"""Convolutions inside Numba kernels: products of real polynomials of degree < 2n, modulo t^2n + 1, channel by channel.

A real polynomial u of degree < 2n is, modulo t^n - i, the complex polynomial of degree < n

    z_j = u_j + i u_{j+n}

and nothing is lost: the product of two of them modulo t^n - i holds, read back the same way, their product modulo
t^2n + 1. That is a linear convolution wherever the result stays below degree 2n, and n complex numbers do the work of a
real FFT of length 2n. The transform follows the factors of the modulus: with c^r = d,

    t^m - d = (t^{m/r} - c) (t^{m/r} - c w) ... (t^{m/r} - c w^{r-1}),     w = e^{2 pi i / r}

so a pass takes r points m/r apart, multiplies them by powers of c, which are the same throughout the block, and adds
them up as a DFT of length r. In the end there is one point for each root of t^n - i, in the order in which they come.
The product is taken point by point there, and the passes are undone. (Bernstein 2001, "Multidigit multiplication for
mathematicians", sections 3 to 5; the order of the points never needs undoing.)

A point is two vectors, real and imaginary parts, of `lanes` channels: time runs across vectors and never within one,
so that channels-last memory is read as it lies.
"""

import functools
from typing import NamedTuple

import numba
import numpy as np

from longwave.ops.numba_math import jit
from longwave.ops.numba_vectors import VECTOR_BYTES, add_vector, butterfly, copy_vector, correlate, multiply, sum_vector

_RESIDENT = 256  # points of a block that stays in the first-level cache through all its passes


class Plan(NamedTuple):
    """The passes of a transform of n points."""

    n: int
    radices: np.ndarray  # of each pass, int64
    first: np.ndarray  # where the roots of each pass begin
    roots: np.ndarray  # for each block of each pass c, c^2, ..., c^{r-1}, real and imaginary parts in turn


def lanes(dtype: np.dtype) -> int:
    """Channels that are transformed side by side."""
    return VECTOR_BYTES // np.dtype(dtype).itemsize


@functools.lru_cache(maxsize=64)
def plan(n: int, dtype: np.dtype) -> Plan:
    """The passes for n points; n has no prime factors but 2, 3 and 5. Long blocks take 3, 5 and 4, short ones 8."""
    radices, rest = [], n
    for r in (3, 5):
        while rest % r == 0:
            radices.append(r)
            rest //= r
    bits = rest.bit_length() - 1
    eights = bits // 3 - (bits % 3 == 1 and bits > 3)
    rest >>= 3 * eights
    radices += [4] * (rest.bit_length() // 2) if rest != 2 else [2]
    radices += [8] * eights
    angle, first, roots, begin = np.array([0.5 * np.pi]), [], [np.empty(0)], 0
    for r in radices:
        powers = np.exp(1j * np.outer(angle / r, np.arange(1, r)))
        first.append(begin)
        roots.append(powers.view(np.float64).ravel())
        begin += roots[-1].size
        angle = np.add.outer(angle, 2 * np.pi * np.arange(r)).ravel() / r
    return Plan(n, np.array(radices, np.int64), np.array(first, np.int64), np.concatenate(roots).astype(dtype))


@jit
def transform(z, n, radices, first, roots):
    """Replace n points, the coefficients of a polynomial, by its values at the roots."""
    _walk(z, z, n, radices, first, roots, True, False)


@jit
def untransform(z, n, radices, first, roots):
    """The way back, times n."""
    _walk(z, z, n, radices, first, roots, False, True)


@jit
def convolve(z, h, n, radices, first, roots):
    """Multiply the polynomial z by one whose transform is n h."""
    _walk(z, h, n, radices, first, roots, True, True)


@jit
def _walk(z, h, n, radices, first, roots, down, up):
    """The passes down, a product with h where there is also a way up, and the passes undone.

    Depth first, so that a block is in cache for all that is done with it: a pass runs when its block is entered, and
    is undone when its block is left. Blocks of `_RESIDENT` points and less run their passes in turn.
    """
    outer, size = 0, n
    while size > _RESIDENT:
        size //= radices[outer]
        outer += 1
    for at in range(0, n, size):
        around = n
        for level in range(outer):
            if down and at % around == 0:
                _pass(z, at, around, 1, level, at // around, radices, first, roots, False)
            around //= radices[level]
        if down:
            _down(z, at, size, outer, at // size, radices, first, roots)
        if down and up:
            for j in range(at, at + size):
                multiply(z, j, h, j, False)
        if up:
            _up(z, at, size, outer, at // size, radices, first, roots)
        end = at + size
        for level in range(outer - 1, -1, -1):
            around *= radices[level]
            if up and end % around == 0:
                _pass(z, end - around, around, 1, level, end // around - 1, radices, first, roots, True)


@jit
def multiply_conjugate(z, h, n):
    """z = z times the conjugate of h, n points."""
    for j in range(n):
        multiply(z, j, h, j, True)


@jit
def add_correlation(total, x, y, n):
    """total += x times the conjugate of y, n points."""
    for j in range(n):
        correlate(total, j, x, y)


@jit
def _down(z, at, n, level, block, radices, first, roots):
    """All passes from `level` on."""
    n_blocks = 1
    for i in range(level, len(radices)):
        _pass(z, at, n // n_blocks, n_blocks, i, block * n_blocks, radices, first, roots, False)
        n_blocks *= radices[i]


@jit
def _up(z, at, n, level, block, radices, first, roots):
    """The passes from `level` on undone, the last one first."""
    n_blocks = n
    for i in range(len(radices) - 1, level - 1, -1):
        n_blocks //= radices[i]
        _pass(z, at, n // n_blocks, n_blocks, i, block * n_blocks, radices, first, roots, True)


@jit
def _pass(z, at, n, n_blocks, level, block, radices, first, roots, inverse):
    """One pass over `n_blocks` blocks of n points each, the first of which is number `block` of its level."""
    r = radices[level]
    for i in range(n_blocks):
        start, c = at + i * n, first[level] + (block + i) * 2 * (r - 1)
        if r == 8:
            _butterflies(z, start, n // r, roots, c, 8, inverse)
        elif r == 4:
            _butterflies(z, start, n // r, roots, c, 4, inverse)
        elif r == 2:
            _butterflies(z, start, n // r, roots, c, 2, inverse)
        elif r == 3:
            _butterflies(z, start, n // r, roots, c, 3, inverse)
        else:
            _butterflies(z, start, n // r, roots, c, 5, inverse)


@numba.njit(inline="always")
def _butterflies(z, at, step, roots, c, r, inverse):
    if inverse:
        for j in range(at, at + step):
            butterfly(z, j, step, roots, c, r, True)
    else:
        for j in range(at, at + step):
            butterfly(z, j, step, roots, c, r, False)


@jit
def points(n, like):
    """Memory for n points in the dtype of the array `like`, aligned to vectors."""
    spare = VECTOR_BYTES // like.itemsize
    memory = np.empty(2 * n * spare + spare, like.dtype)
    begin = -(memory.ctypes.data // like.itemsize) % spare
    return memory[begin : begin + 2 * n * spare]


@jit
def place(w, n, z):
    """Where coefficient w < 2n of the real polynomial begins in z, n points."""
    size = VECTOR_BYTES // z.itemsize
    return 2 * w * size if w < n else (2 * (w - n) + 1) * size


@jit
def copy_row(to, to_at, source, at, width):
    """`width` elements; a whole vector where that is one."""
    if width * to.itemsize == VECTOR_BYTES:
        copy_vector(to, to_at, source, at)
    else:
        for c in range(width):
            to[to_at + c] = source[at + c]


@jit
def add_row(to, to_at, source, at, width):
    if width * to.itemsize == VECTOR_BYTES:
        add_vector(to, to_at, source, at)
    else:
        for c in range(width):
            to[to_at + c] += source[at + c]


@jit
def sum_row(to, to_at, source, at, factor, factor_at, other, other_at, width):
    """to = source + factor * other."""
    if width * to.itemsize == VECTOR_BYTES:
        sum_vector(to, to_at, source, at, factor, factor_at, other, other_at)
    else:
        for c in range(width):
            to[to_at + c] = source[at + c] + factor[factor_at + c] * other[other_at + c]

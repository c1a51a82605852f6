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
from typing import Any, NamedTuple

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from longwave.ops.numba_math import jit

VECTOR_BYTES = 64
_RESIDENT = 256  # points of a block that stays in the first-level cache through all its passes

_index = ir.IntType(64)
_intrinsic: Any = intrinsic
_prefer_literal: Any = intrinsic(prefer_literal=True)


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
                _multiply(z, j, h, j, False)
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
        _multiply(z, j, h, j, True)


@jit
def add_correlation(total, x, y, n):
    """total += x times the conjugate of y, n points."""
    for j in range(n):
        _add_correlation(total, j, x, y)


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
            _butterfly(z, j, step, roots, c, r, True)
    else:
        for j in range(at, at + step):
            _butterfly(z, j, step, roots, c, r, False)


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
        _copy_vector(to, to_at, source, at)
    else:
        for c in range(width):
            to[to_at + c] = source[at + c]


@jit
def add_row(to, to_at, source, at, width):
    if width * to.itemsize == VECTOR_BYTES:
        _add_vector(to, to_at, source, at)
    else:
        for c in range(width):
            to[to_at + c] += source[at + c]


@jit
def sum_row(to, to_at, source, at, factor, factor_at, other, other_at, width):
    """to = source + factor * other."""
    if width * to.itemsize == VECTOR_BYTES:
        _sum_vector(to, to_at, source, at, factor, factor_at, other, other_at)
    else:
        for c in range(width):
            to[to_at + c] = source[at + c] + factor[factor_at + c] * other[other_at + c]


class _Code:
    """Emits arithmetic on vectors and on complex numbers of two vectors."""

    def __init__(self, context: Any, builder: Any, signature: Any, args: Any, arrays: tuple[int, ...]):
        """`arrays`: which of the arguments are arrays; the methods count those."""
        self.builder = builder
        proxies = [cgutils.create_struct_proxy(signature.args[i])(context, builder, value=args[i]) for i in arrays]
        self.data = [proxy.data for proxy in proxies]
        self.scalar = self.data[0].type.pointee
        self.align = 4 if isinstance(self.scalar, ir.FloatType) else 8
        self.lanes = VECTOR_BYTES // self.align
        self.vector = ir.VectorType(self.scalar, self.lanes)
        self.fused = cgutils.get_or_insert_function(
            builder.module,
            ir.FunctionType(self.vector, [self.vector] * 3),
            f"llvm.fmuladd.v{self.lanes}f{8 * self.align}",
        )

    def constant(self, value: float) -> Any:
        return ir.Constant(self.vector, [float(value)] * self.lanes)

    def pointer(self, array: int, at: Any) -> Any:
        return self.builder.bitcast(self.builder.gep(self.data[array], [at]), self.vector.as_pointer())

    def point(self, array: int, j: Any) -> tuple[Any, Any]:
        """Addresses of the real and the imaginary part of point j."""
        at = self.builder.mul(j, ir.Constant(_index, 2 * self.lanes))
        return self.pointer(array, at), self.pointer(array, self.builder.add(at, ir.Constant(_index, self.lanes)))

    def load(self, pointers: tuple[Any, Any]) -> tuple[Any, Any]:
        re, im = (self.builder.load(pointer, align=self.align) for pointer in pointers)
        return re, im

    def load_vector(self, array: int, at: Any) -> Any:
        return self.builder.load(self.pointer(array, at), align=self.align)

    def store(self, z: tuple[Any, ...], pointers: tuple[Any, ...]) -> None:
        for value, pointer in zip(z, pointers, strict=True):
            self.builder.store(value, pointer, align=self.align)

    def spread(self, array: int, at: Any) -> Any:
        """One element in all lanes."""
        element = self.builder.load(self.builder.gep(self.data[array], [at]))
        undefined = ir.Constant(self.vector, ir.Undefined)
        one = self.builder.insert_element(undefined, element, ir.Constant(ir.IntType(32), 0))
        return self.builder.shuffle_vector(one, undefined, ir.Constant(ir.VectorType(ir.IntType(32), self.lanes), None))

    def add(self, x, y):
        return tuple(self.builder.fadd(a, b) for a, b in zip(x, y, strict=True))

    def sub(self, x, y):
        return tuple(self.builder.fsub(a, b) for a, b in zip(x, y, strict=True))

    def fma(self, a, b, c):
        return self.builder.call(self.fused, [a, b, c])

    def add_scaled(self, x, factor, y):
        """x + factor y for a real vector `factor`."""
        return tuple(self.fma(factor, b, a) for a, b in zip(x, y, strict=True))

    def multiply(self, x, y):
        (a, b), (c, d) = x, y
        re = self.fma(a, c, self.builder.fneg(self.builder.fmul(b, d)))
        return re, self.fma(a, d, self.builder.fmul(b, c))

    def conjugate(self, x):
        return x[0], self.builder.fneg(x[1])

    def dft(self, z: list) -> list:
        """sum_q z_q e^{2 pi i p q / r} for p = 0..r-1."""
        return {2: self._dft2, 3: self._dft3, 4: self._dft4, 5: self._dft5, 8: self._dft8}[len(z)](*z)

    def _dft2(self, a, b):
        return [self.add(a, b), self.sub(a, b)]

    def _around(self, x, y):
        """x + i y and x - i y."""
        (a, b), (c, d) = x, y
        builder = self.builder
        return (builder.fsub(a, d), builder.fadd(b, c)), (builder.fadd(a, d), builder.fsub(b, c))

    def _dft4(self, a, b, c, d):
        (even, odd), (both, apart) = self._dft2(a, c), self._dft2(b, d)
        first, last = self._around(odd, apart)
        return [self.add(even, both), first, self.sub(even, both), last]

    def _dft3(self, a, b, c):
        both, apart = self._dft2(b, c)
        middle = self.add_scaled(a, self.constant(-0.5), both)
        apart = tuple(self.builder.fmul(self.constant(np.sqrt(0.75)), x) for x in apart)
        return [self.add(a, both), *self._around(middle, apart)]

    def _dft8(self, *z):
        """Two of length 4, of the even and of the odd ones, the latter times powers of w = (1 + i) / sqrt 2."""
        even, odd = self._dft4(*z[::2]), self._dft4(*z[1::2])
        (a, b), (c, d), builder = odd[1], odd[3], self.builder
        turned = builder.fsub(a, b), builder.fadd(a, b)  # sqrt 2 w times the first
        third = builder.fadd(c, d), builder.fsub(d, c)  # -sqrt 2 w^3 times the third
        (z0, z4), (z2, z6) = self._dft2(even[0], odd[0]), self._around(even[2], odd[2])
        plus, minus = self.constant(np.sqrt(0.5)), self.constant(-np.sqrt(0.5))
        z1, z5 = (self.add_scaled(even[1], factor, turned) for factor in (plus, minus))
        z7, z3 = (self.add_scaled(even[3], factor, third) for factor in (plus, minus))
        return [z0, z1, z2, z3, z4, z5, z6, z7]

    def _dft5(self, a, b, c, d, e):
        (outer, outer_apart), (inner, inner_apart) = self._dft2(b, e), self._dft2(c, d)
        c1, c2 = (self.constant(np.cos(0.4 * np.pi * q)) for q in (1, 2))
        s1, s2 = (self.constant(np.sin(0.4 * np.pi * q)) for q in (1, 2))
        zero = (self.constant(0.0), self.constant(0.0))
        x1 = self.add_scaled(self.add_scaled(a, c1, outer), c2, inner)
        x2 = self.add_scaled(self.add_scaled(a, c2, outer), c1, inner)
        y1 = self.add_scaled(self.add_scaled(zero, s2, inner_apart), s1, outer_apart)
        minus = self.constant(-np.sin(0.4 * np.pi))
        y2 = self.add_scaled(self.add_scaled(zero, minus, inner_apart), s2, outer_apart)
        (z1, z4), (z2, z3) = self._around(x1, y1), self._around(x2, y2)
        return [self.add(self.add(a, outer), inner), z1, z2, z3, z4]


@_prefer_literal
def _butterfly(typingctx, z, j, step, roots, c, radix, inverse):
    """Points j, j + step, ...: times the powers of c, then their DFT; or that undone, but for a factor `radix`."""
    if not isinstance(radix, types.IntegerLiteral) or not isinstance(inverse, types.BooleanLiteral):
        return None

    def generate(context, builder, signature, args):
        code = _Code(context, builder, signature, args, (0, 3))
        j, step, c, r = args[1], args[2], args[4], radix.literal_value
        places = [code.point(0, builder.add(j, builder.mul(step, ir.Constant(_index, q)))) for q in range(r)]
        if inverse.literal_value:  # the inverse is the DFT of the numbers with real and imaginary parts swapped
            places = [place[::-1] for place in places]
        points = [code.load(place) for place in places]
        powers = [
            tuple(code.spread(1, builder.add(c, ir.Constant(_index, 2 * q + part))) for part in (0, 1))
            for q in range(r - 1)
        ]

        def turned(points):
            return [points[0], *(code.multiply(p, w) for p, w in zip(points[1:], powers, strict=True))]

        points = turned(code.dft(points)) if inverse.literal_value else code.dft(turned(points))
        for point, place in zip(points, places, strict=True):
            code.store(point, place)
        return context.get_dummy_value()

    return types.void(z, j, step, roots, c, radix, inverse), generate


@_prefer_literal
def _multiply(typingctx, z, j, h, k, conjugate):
    """z[j] *= h[k], or by its conjugate."""
    if not isinstance(conjugate, types.BooleanLiteral):
        return None

    def generate(context, builder, signature, args):
        code = _Code(context, builder, signature, args, (0, 2))
        place, factor = code.point(0, args[1]), code.load(code.point(1, args[3]))
        if conjugate.literal_value:
            factor = code.conjugate(factor)
        code.store(code.multiply(code.load(place), factor), place)
        return context.get_dummy_value()

    return types.void(z, j, h, k, conjugate), generate


@_intrinsic
def _add_correlation(typingctx, total, j, x, y):
    """total[j] += x[j] times the conjugate of y[j]."""

    def generate(context, builder, signature, args):
        code = _Code(context, builder, signature, args, (0, 2, 3))
        place, x, y = (code.point(array, args[1]) for array in range(3))
        product = code.multiply(code.load(x), code.conjugate(code.load(y)))
        code.store(code.add(code.load(place), product), place)
        return context.get_dummy_value()

    return types.void(total, j, x, y), generate


@_intrinsic
def _copy_vector(typingctx, to, to_at, source, at):
    def generate(context, builder, signature, args):
        code = _Code(context, builder, signature, args, (0, 2))
        code.store((code.load_vector(1, args[3]),), (code.pointer(0, args[1]),))
        return context.get_dummy_value()

    return types.void(to, to_at, source, at), generate


@_intrinsic
def _add_vector(typingctx, to, to_at, source, at):
    def generate(context, builder, signature, args):
        code = _Code(context, builder, signature, args, (0, 2))
        total = builder.fadd(code.load_vector(0, args[1]), code.load_vector(1, args[3]))
        code.store((total,), (code.pointer(0, args[1]),))
        return context.get_dummy_value()

    return types.void(to, to_at, source, at), generate


@_intrinsic
def _sum_vector(typingctx, to, to_at, source, at, factor, factor_at, other, other_at):
    def generate(context, builder, signature, args):
        code = _Code(context, builder, signature, args, (0, 2, 4, 6))
        source, factor, other = (code.load_vector(i, args[2 * i + 1]) for i in (1, 2, 3))
        code.store((code.fma(factor, other, source),), (code.pointer(0, args[1]),))
        return context.get_dummy_value()

    return types.void(to, to_at, source, at, factor, factor_at, other, other_at), generate

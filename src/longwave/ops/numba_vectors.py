"""Arithmetic on vectors of channels for `numba_fft.py`, as LLVM code: Numba itself has no vectors.

A point is two vectors, real and imaginary parts, of VECTOR_BYTES each.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

VECTOR_BYTES = 64

_index = ir.IntType(64)
_intrinsic: Any = intrinsic
_prefer_literal: Any = intrinsic(prefer_literal=True)


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
def butterfly(typingctx, z, j, step, roots, c, radix, inverse):
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
def multiply(typingctx, z, j, h, k, conjugate):
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
def correlate(typingctx, total, j, x, y):
    """total[j] += x[j] times the conjugate of y[j]."""

    def generate(context, builder, signature, args):
        code = _Code(context, builder, signature, args, (0, 2, 3))
        place, x, y = (code.point(array, args[1]) for array in range(3))
        product = code.multiply(code.load(x), code.conjugate(code.load(y)))
        code.store(code.add(code.load(place), product), place)
        return context.get_dummy_value()

    return types.void(total, j, x, y), generate


@_intrinsic
def copy_vector(typingctx, to, to_at, source, at):
    def generate(context, builder, signature, args):
        code = _Code(context, builder, signature, args, (0, 2))
        code.store((code.load_vector(1, args[3]),), (code.pointer(0, args[1]),))
        return context.get_dummy_value()

    return types.void(to, to_at, source, at), generate


@_intrinsic
def add_vector(typingctx, to, to_at, source, at):
    def generate(context, builder, signature, args):
        code = _Code(context, builder, signature, args, (0, 2))
        total = builder.fadd(code.load_vector(0, args[1]), code.load_vector(1, args[3]))
        code.store((total,), (code.pointer(0, args[1]),))
        return context.get_dummy_value()

    return types.void(to, to_at, source, at), generate


@_intrinsic
def sum_vector(typingctx, to, to_at, source, at, factor, factor_at, other, other_at):
    def generate(context, builder, signature, args):
        code = _Code(context, builder, signature, args, (0, 2, 4, 6))
        source, factor, other = (code.load_vector(i, args[2 * i + 1]) for i in (1, 2, 3))
        code.store((code.fma(factor, other, source),), (code.pointer(0, args[1]),))
        return context.get_dummy_value()

    return types.void(to, to_at, source, at, factor, factor_at, other, other_at), generate

"""Small matrix products inside Numba kernels: C += A B on flat arrays, for blocks that lie in cache.

A may have any strides; B and C have contiguous rows of `p` elements, p a multiple of `COLUMNS`. The work is done in
register tiles of ROWS x COLUMNS elements, written as LLVM vector operations. Sums run over k in order, so the result
depends neither on the number of threads nor on the other rows.
"""

from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from longwave.ops.numba_math import jit

# A tile of 8 x 2 vectors needs 32 vector registers, 4 x 2 makes do with 16.
_WIDE = bool(llvm.get_host_cpu_features().get("avx512f"))
ROWS = 8 if _WIDE else 4
_VECTOR_BYTES = 64 if _WIDE else 32
_VECTORS = 2
COLUMNS = _VECTORS * _VECTOR_BYTES // 4
"""Tile width in float32. Two float64 tiles fill it, so that one padding serves both."""


@jit
def padded(size, multiple):
    """The least multiple that is at least `size`."""
    return -(-size // multiple) * multiple


@jit
def add_product(a, a0, a_row, a_column, b, b0, c, c0, rows, inner, p):  # noqa: PLR0913
    """c[i, j] += sum_k a[i, k] b[k, j] for i < rows, k < inner, j < p, from the offsets a0, b0, c0 on.

    a[i, k] stands at a0 + i * a_row + k * a_column; the rows of b and c are p apart.
    """
    whole = rows // ROWS * ROWS
    for j in range(0, p, _tile_columns(c)):
        for i in range(0, whole, ROWS):
            _tile(a, a0 + i * a_row, a_row, a_column, b, b0 + j, c, c0 + i * p + j, p, inner, ROWS, False)
        for i in range(whole, rows):
            _tile(a, a0 + i * a_row, a_row, a_column, b, b0 + j, c, c0 + i * p + j, p, inner, 1, False)


@jit
def add_lower_product(a, a0, a_row, a_column, b, b0, c, c0, rows, p):
    """As `add_product`, with a (rows, rows) taken as lower triangular: what stands above its diagonal is not read."""
    whole = rows // ROWS * ROWS
    for j in range(0, p, _tile_columns(c)):
        for i in range(0, whole, ROWS):
            _tile(a, a0 + i * a_row, a_row, a_column, b, b0 + j, c, c0 + i * p + j, p, i, ROWS, True)
        for i in range(whole, rows):
            _tile(a, a0 + i * a_row, a_row, a_column, b, b0 + j, c, c0 + i * p + j, p, i, 1, True)


@intrinsic
def _tile_columns(typingctx: Any, array: Any) -> Any:
    def codegen(context, builder, signature, args):
        return ir.Constant(ir.IntType(64), _lanes(signature.args[0]) * _VECTORS)

    return types.int64(array), codegen


def _lanes(array: Any) -> int:
    return _VECTOR_BYTES * 8 // array.dtype.bitwidth


@intrinsic(prefer_literal=True)
def _tile(typingctx, a, a0, a_row, a_column, b, b0, c, c0, p, inner, rows, triangle):  # noqa: PLR0913
    """One tile of C += A B: `rows` rows of A over k < inner and, for a triangle, over inner <= k <= inner + row."""
    n_rows, with_triangle = rows.literal_value, triangle.literal_value

    def codegen(context, builder, signature, args):
        sizes = dict(zip(("a0", "a_row", "a_column", "b0", "c0", "p"), (*args[1:4], args[5], args[7], args[8])))
        a_array, b_array, c_array = signature.args[0], signature.args[4], signature.args[6]
        data = [
            cgutils.create_struct_proxy(ty)(context, builder, value=value).data
            for ty, value in ((a_array, args[0]), (b_array, args[4]), (c_array, args[6]))
        ]
        _emit(builder, data, sizes, args[9], n_rows, with_triangle, _lanes(c_array))
        return context.get_dummy_value()

    return types.void(a, a0, a_row, a_column, b, b0, c, c0, p, inner, rows, triangle), codegen


def _emit(builder, data, sizes, inner, n_rows, triangle, lanes) -> None:
    scalar = data[2].type.pointee
    vector = ir.VectorType(scalar, lanes)
    align = 4 if isinstance(scalar, ir.FloatType) else 8  # bytes of one element
    fma = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(vector, [vector] * 3), f"llvm.fmuladd.v{lanes}f{8 * align}"
    )
    index = ir.IntType(64)

    def at(array, offset):
        return builder.gep(data[array], [offset])

    def vector_at(array, offset):
        pointer = at(array, offset)
        return [
            builder.bitcast(builder.gep(pointer, [ir.Constant(index, v * lanes)]), vector.as_pointer())
            for v in range(_VECTORS)
        ]

    def step(k, sums, first_row):
        """Add column k of A times row k of B to the rows from first_row on."""
        b_offset = builder.add(sizes["b0"], builder.mul(k, sizes["p"]))
        b_row = [builder.load(pointer, align=align) for pointer in vector_at(1, b_offset)]
        a_offset = builder.add(sizes["a0"], builder.mul(k, sizes["a_column"]))
        for i in range(first_row, n_rows):
            pointer = at(0, builder.add(a_offset, builder.mul(ir.Constant(index, i), sizes["a_row"])))
            one = builder.insert_element(
                ir.Constant(vector, ir.Undefined), builder.load(pointer), ir.Constant(ir.IntType(32), 0)
            )
            spread = builder.shuffle_vector(
                one, ir.Constant(vector, ir.Undefined), ir.Constant(ir.VectorType(ir.IntType(32), lanes), None)
            )
            sums[i] = [builder.call(fma, [spread, b, s]) for b, s in zip(b_row, sums[i], strict=True)]

    c_pointers = [
        vector_at(2, builder.add(sizes["c0"], builder.mul(ir.Constant(index, i), sizes["p"]))) for i in range(n_rows)
    ]
    start = [[builder.load(pointer, align=align) for pointer in row] for row in c_pointers]

    before = builder.block
    head = builder.append_basic_block("tile.head")
    body = builder.append_basic_block("tile.body")
    after = builder.append_basic_block("tile.after")
    builder.branch(head)

    builder.position_at_end(head)
    k = builder.phi(index)
    k.add_incoming(ir.Constant(index, 0), before)
    phis = [[builder.phi(vector) for _ in row] for row in start]
    for row, values in zip(phis, start, strict=True):
        for phi, value in zip(row, values, strict=True):
            phi.add_incoming(value, before)
    builder.cbranch(builder.icmp_signed("<", k, inner), body, after)

    builder.position_at_end(body)
    sums = [list(row) for row in phis]
    step(k, sums, 0)
    k.add_incoming(builder.add(k, ir.Constant(index, 1)), builder.block)
    for row, values in zip(phis, sums, strict=True):
        for phi, value in zip(row, values, strict=True):
            phi.add_incoming(value, builder.block)
    builder.branch(head)

    builder.position_at_end(after)
    sums = [list(row) for row in phis]
    if triangle:
        for i in range(n_rows):
            step(builder.add(inner, ir.Constant(index, i)), sums, i)
    for pointers, values in zip(c_pointers, sums, strict=True):
        for pointer, value in zip(pointers, values, strict=True):
            builder.store(value, pointer, align=align)

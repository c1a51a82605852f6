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
COLUMNS = _VECTORS * _VECTOR_BYTES // 4  # of a float32 tile; two float64 tiles fill it, so one padding serves both

_index, _int32 = ir.IntType(64), ir.IntType(32)
# Their own types describe what they are outside a kernel, not inside.
_intrinsic: Any = intrinsic
_prefer_literal: Any = intrinsic(prefer_literal=True)


@jit
def padded(size, multiple):
    """The least multiple that is at least `size`."""
    return -(-size // multiple) * multiple


@jit
def add_product(a, a_row, a_column, b, c, rows, inner, p):
    """c[i, j] += sum_k a[i, k] b[k, j] for i < rows, k < inner, j < p.

    a[i, k] stands at i * a_row + k * a_column; the rows of b and c are p apart.
    """
    whole = rows // ROWS * ROWS
    for j in range(0, p, _tile_columns(c)):
        for i in range(0, whole, ROWS):
            _tile(a, i * a_row, a_row, a_column, b, j, c, i * p + j, p, inner, ROWS, False)
        for i in range(whole, rows):
            _tile(a, i * a_row, a_row, a_column, b, j, c, i * p + j, p, inner, 1, False)


@jit
def add_lower_product(a, a_row, a_column, b, c, rows, p):
    """As `add_product`, with a (rows, rows) taken as lower triangular: what is above its diagonal is not read."""
    whole = rows // ROWS * ROWS
    for j in range(0, p, _tile_columns(c)):
        for i in range(0, whole, ROWS):
            _tile(a, i * a_row, a_row, a_column, b, j, c, i * p + j, p, i, ROWS, True)
        for i in range(whole, rows):
            _tile(a, i * a_row, a_row, a_column, b, j, c, i * p + j, p, i, 1, True)


@_intrinsic
def _tile_columns(typingctx, array):
    """Columns of a tile in the array's dtype."""

    def generate(context, builder, signature, args):
        return ir.Constant(_index, _lanes(signature.args[0]) * _VECTORS)

    return types.int64(array), generate


def _lanes(array: Any) -> int:
    return _VECTOR_BYTES * 8 // array.dtype.bitwidth


@_prefer_literal
def _tile(typingctx, a, a0, a_row, a_column, b, b0, c, c0, p, inner, rows, triangle):
    """One tile of C += A B from the offsets a0, b0, c0 on: `rows` rows of A over k < inner and, for a triangle, over
    inner <= k <= inner + i in row i.
    """

    def generate(context, builder, signature, args):
        data = {
            name: cgutils.create_struct_proxy(signature.args[i])(context, builder, value=args[i]).data
            for name, i in (("a", 0), ("b", 4), ("c", 6))
        }
        sizes = dict(zip(("a0", "a_row", "a_column"), args[1:4], strict=True))
        sizes |= {"b0": args[5], "c0": args[7], "p": args[8], "inner": args[9]}
        _emit(builder, data, sizes, rows.literal_value, triangle.literal_value, _lanes(signature.args[6]))
        return context.get_dummy_value()

    return types.void(a, a0, a_row, a_column, b, b0, c, c0, p, inner, rows, triangle), generate


def _emit(builder: Any, data: dict, sizes: dict, n_rows: int, triangle: bool, lanes: int) -> None:
    """Load the tile of C, add to it in registers, column by column of A, and store it."""
    scalar = data["c"].type.pointee
    vector = ir.VectorType(scalar, lanes)
    align = 4 if isinstance(scalar, ir.FloatType) else 8  # bytes of one element
    fma = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(vector, [vector] * 3), f"llvm.fmuladd.v{lanes}f{8 * align}"
    )
    undefined = ir.Constant(vector, ir.Undefined)
    first_lane = ir.Constant(ir.VectorType(_int32, lanes), None)

    def vectors_at(array: str, offset: Any) -> list[Any]:
        pointer = builder.gep(data[array], [offset])
        steps = [builder.gep(pointer, [ir.Constant(_index, v * lanes)]) for v in range(_VECTORS)]
        return [builder.bitcast(step, vector.as_pointer()) for step in steps]

    def add_column(k: Any, sums: list[list[Any]], first_row: int) -> None:
        """Add column k of A times row k of B to the rows from first_row on."""
        b_row = vectors_at("b", builder.add(sizes["b0"], builder.mul(k, sizes["p"])))
        b_row = [builder.load(pointer, align=align) for pointer in b_row]
        a_at = builder.add(sizes["a0"], builder.mul(k, sizes["a_column"]))
        for i in range(first_row, n_rows):
            place = builder.add(a_at, builder.mul(ir.Constant(_index, i), sizes["a_row"]))
            element = builder.load(builder.gep(data["a"], [place]))
            spread = builder.insert_element(undefined, element, ir.Constant(_int32, 0))
            spread = builder.shuffle_vector(spread, undefined, first_lane)
            sums[i] = [builder.call(fma, [spread, b, s]) for b, s in zip(b_row, sums[i], strict=True)]

    rows_at = [builder.add(sizes["c0"], builder.mul(ir.Constant(_index, i), sizes["p"])) for i in range(n_rows)]
    pointers = [vectors_at("c", at) for at in rows_at]
    start = [[builder.load(pointer, align=align) for pointer in row] for row in pointers]

    before, head, body, after = builder.block, *(builder.append_basic_block(f"tile.{i}") for i in range(3))
    builder.branch(head)
    builder.position_at_end(head)
    k = builder.phi(_index)
    k.add_incoming(ir.Constant(_index, 0), before)
    sums = [[builder.phi(vector) for _ in row] for row in start]
    builder.cbranch(builder.icmp_signed("<", k, sizes["inner"]), body, after)

    builder.position_at_end(body)
    added = [list(row) for row in sums]
    add_column(k, added, 0)
    k.add_incoming(builder.add(k, ir.Constant(_index, 1)), body)
    for i, row in enumerate(sums):
        for v, phi in enumerate(row):
            phi.add_incoming(start[i][v], before)
            phi.add_incoming(added[i][v], body)
    builder.branch(head)

    builder.position_at_end(after)
    for i in range(n_rows if triangle else 0):
        add_column(builder.add(sizes["inner"], ir.Constant(_index, i)), sums, i)
    for row, values in zip(pointers, sums, strict=True):
        for pointer, value in zip(row, values, strict=True):
            builder.store(value, pointer, align=align)

"""bfloat16 in Numba kernels, which know no such type: memory is read and written as its uint16 bits.

`widen` and `narrow` go by the type of what they are given, so that one kernel serves every dtype; `NUMBERS` says the
same by torch's dtype, for kernels that are made for one.
"""

from typing import Any, NamedTuple

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload

from longwave.ops.numba_math import OPTIONS

_intrinsic: Any = intrinsic  # its own type describes the code generator, not the function that kernels call


@_intrinsic
def widen_bfloat16(typingctx, bits):
    """The float32 value of a bfloat16 given as its uint16 bits."""

    def generate(context, builder, signature, args):
        word = builder.zext(args[0], ir.IntType(32))
        return builder.bitcast(builder.shl(word, ir.Constant(ir.IntType(32), 16)), ir.FloatType())

    return types.float32(types.uint16), generate


@_intrinsic
def narrow_bfloat16(typingctx, value):
    """The uint16 bits of the bfloat16 nearest to a float32, ties to even; NaN stays NaN."""

    def generate(context, builder, signature, args):
        i32 = ir.IntType(32)
        bits = builder.bitcast(args[0], i32)
        odd = builder.and_(builder.lshr(bits, ir.Constant(i32, 16)), ir.Constant(i32, 1))
        rounded = builder.add(bits, builder.add(odd, ir.Constant(i32, 0x7FFF)))
        is_nan = builder.fcmp_unordered("uno", args[0], args[0])
        found = builder.select(is_nan, ir.Constant(i32, 0x7FC00000), rounded)
        return builder.trunc(builder.lshr(found, ir.Constant(i32, 16)), ir.IntType(16))

    return types.uint16(types.float32), generate


def widen(value):
    """The number that an element stands for: float32 for bfloat16 bits, otherwise itself."""


def narrow(value, memory):
    """What to store in `memory`, an array, for the number `value`."""


@overload(widen, jit_options=OPTIONS, inline="always")
def _widen(value):
    return (lambda value: widen_bfloat16(value)) if value == types.uint16 else (lambda value: value)


@overload(narrow, jit_options=OPTIONS, inline="always")
def _narrow(value, memory):
    if memory.dtype == types.uint16:
        return lambda value, memory: narrow_bfloat16(value)
    return lambda value, memory: value


@numba.njit(inline="always")
def _same(value):
    return value


class Number(NamedTuple):
    """How a dtype lies in memory, and how a kernel computes with it."""

    stored: type
    computed: type
    widen: Any
    narrow: Any


NUMBERS = {
    torch.float32: Number(np.float32, np.float32, _same, _same),
    torch.float64: Number(np.float64, np.float64, _same, _same),
    torch.bfloat16: Number(np.uint16, np.float32, widen_bfloat16, narrow_bfloat16),
}

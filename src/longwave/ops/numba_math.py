"""Elementary functions for Numba kernels that LLVM can vectorise: exp2, exp, cos_sin, sigmoid, silu, silu_slope,
softplus.

float32 gets branch-free polynomials (relative error 1e-7 to 3e-7; results below about 1e-38 become 0).
Anything else gets the exact functions of libm. NaN comes out as NaN in both.

LLVM vectorises a loop that calls them when it is innermost and runs over contiguous memory, in functions
compiled with `jit`.
"""

import math
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core.compiler import Compiler
from numba.extending import intrinsic, overload

# Without "nnan" and "ninf": NaN and infinity keep their meaning. Division as numpy has it: Python's check for a
# zero divisor is a branch, which stops vectorisation.
OPTIONS: Any = {"fastmath": {"contract", "nsz", "arcp", "reassoc"}, "error_model": "numpy"}
jit: Any = numba.njit(nogil=True, cache=True, **OPTIONS)


class _Disjoint(Compiler):
    def __init__(self, typingctx, targetctx, library, args, return_type, flags, locals):
        flags.noalias = True
        super().__init__(typingctx, targetctx, library, args, return_type, flags, locals)


# For loops over more than a few arrays, which LLVM vectorises only if it knows that none of them overlap: functions of
# such arrays, inlined where they are called. The caller promises that what is written overlaps nothing.
disjoint: Any = numba.njit(pipeline_class=_Disjoint, forceinline=True, **OPTIONS)

# 2^(1+f) on [-1/2, 1/2]: minimax in relative error (9e-8) among polynomials exact at 0, so that a decay
# near 1 is not biased: an error there grows with the length of the memory.
_EXP2 = (2.0, 1.386294007, 0.4804448485, 0.1110146717, 0.01934302598, 0.002652945463)
_LOG2E = 1.4426950408889634
_LOG2E_HIGH = float(np.float32(_LOG2E))
_LOG2E_LOW = _LOG2E - _LOG2E_HIGH
# Adding this to t leaves round(t) + 126 in the low bits of the sum.
_ROUND = 1.5 * 2**23 + 126
_WHOLE = 1.5 * 2**23  # leaves round(t)
# 2 atanh(r) / r in powers of r^2 for r in [0, 1/3]: minimax, relative error 4e-9.
_ATANH = (2.0, 0.6666631698608398, 0.40024909377098083, 0.27960601449012756, 0.2817833721637726)

# 2/pi and pi/2, each as a float32 and what it lacks.
_QUARTERS = float(np.float32(2 / math.pi))
_QUARTERS_LOW = 2 / math.pi - _QUARTERS
_QUARTER = float(np.float32(math.pi / 2))
# sin(pi/2 r) / r less _QUARTER, and (cos(pi/2 r) - 1) / r^2, in powers of r^2 for |r| <= 1/2: minimax in relative error
# (4e-9 and 2e-9), the first among those exact at 0.
_SIN = (math.pi / 2 - _QUARTER, -0.645963630198, 0.0796814128062, -0.00460483418196)
_COS = (-1.23370055209, 0.253669583367, -0.0208632350975, 0.000911073365927)

_f32 = ir.FloatType()
_i32 = ir.IntType(32)


def _const(value: float) -> ir.Constant:
    return ir.Constant(_f32, float(np.float32(value)))


def _fma(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """a*b + c, in one rounding where the machine can. A call, so that LLVM does not reorder the terms."""
    function = builder.module.declare_intrinsic("llvm.fmuladd", [_f32], ir.FunctionType(_f32, [_f32] * 3))
    return builder.call(function, [a, b, c])


def _exp2_float32(builder: Any, x: Any, factor: tuple[float, float]) -> Any:
    """2^(x * (factor[0] + factor[1])) = 2^(n-1) * 2^(1+f), where n is the nearest integer and f the rest."""
    high, low = (_const(part) for part in factor)
    bound_low, bound_high = _const(-126.3 / factor[0]), _const(129.0 / factor[0])
    # A NaN compares false and so stays.
    x = builder.select(builder.fcmp_ordered("<", x, bound_low), bound_low, x)
    x = builder.select(builder.fcmp_ordered(">", x, bound_high), bound_high, x)

    # Flags of their own keep Numba from adding "reassoc", under which (t + round) - round is t.
    shifted = _fma(builder, x, high, _const(_ROUND))
    n = builder.fsub(shifted, _const(_ROUND), flags=("nsz",))
    f = _fma(builder, x, high, builder.fneg(n))
    if factor[1]:
        f = _fma(builder, x, low, f)
    result = _polynomial(builder, f, _EXP2)
    exponent = builder.shl(builder.bitcast(shifted, _i32), ir.Constant(_i32, 23))
    scale = builder.bitcast(exponent, _f32)  # 2^(n-1), or 0 for n = -126
    return builder.fmul(result, scale)


@intrinsic
def _exp2_intrinsic(typingctx, x):
    return types.float32(types.float32), lambda ctx, builder, sig, args: _exp2_float32(builder, args[0], (1.0, 0.0))


@intrinsic
def _exp_intrinsic(typingctx, x):
    factor = (_LOG2E_HIGH, _LOG2E_LOW)
    return types.float32(types.float32), lambda ctx, builder, sig, args: _exp2_float32(builder, args[0], factor)


def _cos_sin_float32(builder: Any, step: Any, rate: Any) -> tuple[Any, Any]:
    """With step * rate = pi/2 (k + r) for the nearest integer k: cosine and sine of pi/2 r, turned by k quarters.

    The product is not rounded, and r has all its digits as long as k has at most 22 bits. Beyond, the results only stay
    within their bounds.
    """
    high = builder.fmul(rate, _const(_QUARTERS), flags=("nsz",))
    low = _fma(builder, rate, _const(_QUARTERS), builder.fneg(high))
    low = _fma(builder, rate, _const(_QUARTERS_LOW), low)
    first, k = _nearest(builder, step, high)
    r = _fma(builder, step, low, _fma(builder, step, high, builder.fneg(k)))
    second, k = _nearest(builder, r, _const(1.0))  # `low` may have led past one half
    r = builder.fsub(r, k, flags=("nsz",))
    for bound, sign in ((-0.5, "<"), (0.5, ">")):
        r = builder.select(builder.fcmp_ordered(sign, r, _const(bound)), _const(bound), r)

    square = builder.fmul(r, r)
    sine = builder.fmul(r, _polynomial(builder, square, _SIN))
    sine = _fma(builder, r, _const(_QUARTER), sine)
    cosine = _fma(builder, square, _polynomial(builder, square, _COS), _const(1.0))
    quarters = builder.add(builder.bitcast(first, _i32), builder.bitcast(second, _i32))  # its last bits are those of k
    odd = builder.trunc(quarters, ir.IntType(1))
    cosine, sine = builder.select(odd, sine, cosine), builder.select(odd, cosine, sine)
    after = builder.add(quarters, ir.Constant(_i32, 1))
    return _negate_if(builder, cosine, after), _negate_if(builder, sine, quarters)


def _nearest(builder: Any, x: Any, factor: Any) -> tuple[Any, Any]:
    """The integer nearest to x * factor; and before it, a number in whose last bits it stands."""
    shifted = _fma(builder, x, factor, _const(_WHOLE))
    return shifted, builder.fsub(shifted, _const(_WHOLE), flags=("nsz",))


def _negate_if(builder: Any, x: Any, bits: Any) -> Any:
    """-x where the second bit is set."""
    sign = builder.and_(builder.shl(bits, ir.Constant(_i32, 30)), ir.Constant(_i32, 0x80000000))
    return builder.bitcast(builder.xor(builder.bitcast(x, _i32), sign), _f32)


def _polynomial(builder: Any, x: Any, coefficients: tuple[float, ...]) -> Any:
    result = _const(coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        result = _fma(builder, result, x, _const(coefficient))
    return result


@intrinsic
def _cos_sin_intrinsic(typingctx, step, rate):
    pair = types.UniTuple(types.float32, 2)

    def generate(context, builder, signature, args):
        return context.make_tuple(builder, pair, _cos_sin_float32(builder, *args))

    return pair(types.float32, types.float32), generate


def exp2(x):
    """2^x."""
    return math.exp2(x)


def exp(x):
    """e^x."""
    return math.exp(x)


def cos_sin(step, rate):
    """Cosine and sine of step * rate. In float32 the product is not rounded before whole turns are taken off."""
    return math.cos(step * rate), math.sin(step * rate)


def sigmoid(x):
    """1 / (1 + e^-x)."""
    return type(x)(1) / (type(x)(1) + exp(-x))


def silu(x):
    """x / (1 + e^-x)."""
    return x * sigmoid(x)


def silu_slope(x):
    """The derivative of silu."""
    s = sigmoid(x)
    return s * (1 + x * sigmoid(-x))


def softplus(x):
    """log(1 + e^x), and x above 20, as torch has it."""
    return x if x > 20 else math.log1p(math.exp(x))


@overload(exp2)
def _exp2(x):
    if x == types.float32:
        return lambda x: _exp2_intrinsic(x)  # pyright: ignore[reportCallIssue]
    return lambda x: np.exp2(x)


@overload(exp)
def _exp(x):
    if x == types.float32:
        return lambda x: _exp_intrinsic(x)  # pyright: ignore[reportCallIssue]
    return lambda x: np.exp(x)


@overload(cos_sin)
def _cos_sin(step, rate):
    if step == types.float32 and rate == types.float32:
        return lambda step, rate: _cos_sin_intrinsic(step, rate)  # pyright: ignore[reportCallIssue]
    return lambda step, rate: (math.cos(step * rate), math.sin(step * rate))


@overload(sigmoid, jit_options=OPTIONS)
def _sigmoid(x):
    one = np.float32(1) if x == types.float32 else 1.0
    return lambda x: one / (one + exp(-x))


@overload(silu, jit_options=OPTIONS)
def _silu(x):
    return lambda x: x * sigmoid(x)


@overload(silu_slope, jit_options=OPTIONS)
def _silu_slope(x):
    zero, one = (np.float32(0), np.float32(1)) if x == types.float32 else (0.0, 1.0)

    def silu_slope_any(x):
        # sigmoid(x) and sigmoid(-x), the larger and the smaller, neither by a subtraction from 1.
        u = exp(-x if x > zero else x)
        large = one / (one + u)
        small = u * large
        s = large if x > zero else small
        rest = small if x > zero else large
        return s * (one + x * rest)

    return silu_slope_any


@overload(softplus, jit_options=OPTIONS)
def _softplus(x):
    if x != types.float32:
        return lambda x: x if x > 20.0 else np.log1p(np.exp(x))
    zero, two = np.float32(0), np.float32(2)
    c0, c1, c2, c3, c4 = (np.float32(c) for c in _ATANH)

    def softplus_float32(x):
        # max(x, 0) + log1p(u) with u = e^-|x|, and log1p(u) = 2 atanh(u / (2 + u)). A NaN comes in through u.
        positive = x if x > zero else zero
        u = exp(-x if x > zero else x)
        r = u / (two + u)
        s = r * r
        return positive + r * (c0 + s * (c1 + s * (c2 + s * (c3 + s * c4))))

    return softplus_float32

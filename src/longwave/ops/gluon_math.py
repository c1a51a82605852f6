"""Device functions that the Hopper forms of several operators share, written in Gluon."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def exp2(x):
    """2^x by the special-function unit; results below 2^-126 are 0."""
    return gl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def softplus(x):
    """log(1 + exp(x)) to 3e-7 of itself, with one special function: log(1 + u) / u by a polynomial on [0, 1]."""
    u = exp2(-gl.abs(x) * 1.4426950408889634)
    p = 0.17745186388492584 + u * (-0.10768090933561325 + u * (0.044089049100875854 - u * 0.008539042435586452))
    p = 0.9999998211860657 + u * (-0.4999740421772003 + u * (0.3327547609806061 + u * (-0.2449544370174408 + u * p)))
    return gl.maximum(x, 0.0) + u * p


@gluon.jit
def sigmoid(x):
    """1 / (1 + exp(-x)), with two special functions."""
    return gl.inline_asm_elementwise(
        """{ .reg .f32 u;
        mul.ftz.f32 u, $1, 0fBFB8AA3B;
        ex2.approx.ftz.f32 u, u;
        add.ftz.f32 u, u, 0f3F800000;
        rcp.approx.ftz.f32 $0, u; }""",
        "=f,f",
        [x],
        dtype=gl.float32,
        is_pure=True,
        pack=1,
    )


@gluon.jit
def silu(x, EXACT: gl.constexpr):
    """x sigmoid(x); unless EXACT with the approximate hyperbolic tangent, which serves 16-bit results."""
    if EXACT:
        return x / (1.0 + exp2(x * -1.4426950408889634))
    half = 0.5 * x
    tanh = gl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [half], dtype=gl.float32, is_pure=True, pack=1)
    return half + half * tanh


@gluon.jit
def widen(x):
    """To float32. Of a register with two bfloat16 numbers each takes one instruction, where a plain cast takes two."""
    if x.dtype == gl.bfloat16:
        return gl.inline_asm_elementwise(
            "{ shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000; }",
            "=r,=r,r",
            [x],
            dtype=gl.float32,
            is_pure=True,
            pack=2,
        )
    return x.to(gl.float32)

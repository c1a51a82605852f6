"""Public functions of kernel generation, and their registration."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from longwave.ops.checks import check_shape, state_dtype
from longwave.ops.register import Impl, define, use_kernel
from longwave.ops.ssm_kernel import reference


def vandermonde_kernel(C: Tensor, dtA: Tensor, l: int, *, impl: Impl = "fused") -> Tensor:
    """The convolution kernel of a diagonal state space: K_t = 2 Re sum_n C_n exp(t dtA_n) for t = 0..l-1.

    C (m, e, n, 2) and dtA (e, n, 2): pairs of real and imaginary part, one for each conjugate pair of modes; the m
    kernels of a channel share its modes. C is C Bbar for x_t = Abar x_{t-1} + Bbar u_t and y_t = C x_t, and dtA the
    logarithm of Abar.

    Returns K (m, e, l) in float32 (float64 for C in float64); 16-bit inputs are widened. Differentiable in C and dtA,
    once. Phases t Im(dtA) are exact however long they get. Memory beside K does not grow with l. Raises ValueError or
    TypeError for shapes and dtypes that do not fit.

    Source: Gu et al., "On the Parameterization and Initialization of Diagonal State Space Models", 2022,
    arXiv:2206.11893, section 3.2.
    """
    _check_modes("vandermonde_kernel", "C", C, "dtA", dtA)
    if l < 1:
        raise ValueError(f"vandermonde_kernel: l must be at least 1, got {l}")
    if use_kernel("vandermonde_kernel", impl, C):
        return _VandermondeKernel.apply(C, dtA, l)
    return reference.vandermonde_kernel(C, dtA, l)


def vandermonde_state(
    u: Tensor,
    B: Tensor,
    dtA: Tensor,
    *,
    initial_state: Tensor | None = None,
    lengths: Tensor | None = None,
    impl: Impl = "fused",
) -> Tensor:
    """The state that a diagonal state space has after a whole sequence of evenly spaced tokens.

        x = exp(l dtA) x_0 + sum_{s<l} exp((l-1-s) dtA) B u_s

    u (b, l, e) real; B (e, n, 2), the discretised Bbar; dtA (e, n, 2), the logarithm of Abar; `initial_state` x_0
    (b, e, n, 2), zeros if None. `lengths` (b,) int64: row i ends after lengths[i] tokens, and nothing behind is read.

    Returns (b, e, n, 2) in float32 (float64 for float64), differentiable once in u, B, dtA and `initial_state`. What a
    convolution by `vandermonde_kernel` needs to hand over to the recurrence. No b l e n numbers are held. Raises
    ValueError or TypeError for shapes and dtypes that do not fit.
    """
    b, l, e = u.shape
    _check_modes("vandermonde_state", "B", B[None], "dtA", dtA)
    check_shape("vandermonde_state", "B", B, (e, *dtA.shape[1:]), "(e, n, 2)")
    check_shape("vandermonde_state", "initial_state", initial_state, (b, *dtA.shape), "(b, e, n, 2)")
    check_shape("vandermonde_state", "lengths", lengths, (b,), "(b,)")
    fused = use_kernel("vandermonde_state", impl, u)
    sums = (_Moments.apply if fused else reference.moments)(newest_first(u, lengths), dtA)  # (b, e, n, 2)
    final = _times(sums, B)
    if initial_state is None:
        return final
    ends = torch.full((b,), l, device=u.device) if lengths is None else lengths
    return final + _times(initial_state, _power(dtA, ends).to(sums.dtype))


def cauchy_kernel(v: Tensor, z: Tensor, w: Tensor, *, impl: Impl = "fused") -> Tensor:
    """The generating function of a DPLR state space: sum_n v_n / (z - w_n) + conj(v_n) / (z - conj(w_n)).

    v (m, e, n, 2), w (e, n, 2), z (l, 2): pairs of real and imaginary part; the m kernels of a channel share its poles
    w. No z may equal a pole. An infinite z gives 0.

    Returns (m, e, l, 2) in float32 (float64 for v in float64); 16-bit inputs are widened. Differentiable in v and w,
    once; z, the nodes at which it is taken, gets no gradient. Raises ValueError or TypeError for shapes and dtypes that
    do not fit.

    Source: Gu et al., "Efficiently Modeling Long Sequences with Structured State Spaces", 2022, arXiv:2111.00396,
    algorithm 1.
    """
    _check_modes("cauchy_kernel", "v", v, "w", w)
    check_shape("cauchy_kernel", "z", z, (z.shape[0], 2), "(l, 2)")
    # Beyond, the square of its size would overflow. The sum is 0 to within rounding there.
    far = 1e150 if state_dtype(v.dtype) is torch.float64 else 1e18
    z = z.detach().clamp(-far, far)
    if use_kernel("cauchy_kernel", impl, v):
        return _CauchyKernel.apply(v, z, w)
    return reference.cauchy_kernel(v, z, w)


def _check_modes(op: str, weights_name: str, weights: Tensor, modes_name: str, modes: Tensor) -> None:
    if modes.ndim != 3 or modes.shape[-1] != 2:
        raise ValueError(f"{op}: {modes_name} must be (e, n, 2), got {tuple(modes.shape)}; see torch.view_as_real")
    check_shape(op, weights_name, weights, (weights.shape[0], *modes.shape), "(m, e, n, 2)")
    for name, tensor in ((weights_name, weights), (modes_name, modes)):
        if not tensor.is_floating_point():
            raise TypeError(f"{op}: {name} must be floating point pairs, got {tensor.dtype}; see torch.view_as_real")


def newest_first(u: Tensor, lengths: Tensor | None) -> Tensor:
    """u (b, l, e) -> (b, e, l): each row's last token first, and zeros behind its first."""
    if lengths is None:
        return u.flip(1).transpose(1, 2)
    age = torch.arange(u.shape[1], device=u.device)
    at = (lengths[:, None] - 1 - age)[..., None]  # (b, l, 1)
    turned = u.gather(1, at.clamp(min=0).expand(u.shape))
    return torch.where(at >= 0, turned, 0.0).transpose(1, 2)


def _power(dtA: Tensor, t: Tensor) -> Tensor:
    """exp(t dtA) for t (b,): (b, e, n, 2)."""
    wide = torch.float32 if dtA.device.type == "mps" else torch.float64
    return torch.view_as_real(torch.exp(t[:, None, None] * torch.view_as_complex(dtA.to(wide).contiguous())))


def _times(x: Tensor, y: Tensor) -> Tensor:
    """The product of complex numbers that are given as pairs."""
    dtype = torch.promote_types(state_dtype(x.dtype), y.dtype)
    x, y = (torch.view_as_complex(t.to(dtype).contiguous()) for t in (x, y))
    return torch.view_as_real(x * y)


def _conj(x: Tensor) -> Tensor:
    return torch.view_as_real(torch.view_as_complex(x.contiguous()).conj_physical())


def _fake_moments(f, dtA, weighted):
    sums = dtA.new_empty(f.shape[0], *dtA.shape, dtype=state_dtype(f.dtype))
    return sums, sums.new_empty(sums.shape if weighted else 0)


_vandermonde = define(
    "vandermonde_kernel_forward(Tensor C, Tensor dtA, SymInt l) -> Tensor",
    fake=lambda C, dtA, l: C.new_empty(*C.shape[:2], l, dtype=state_dtype(C.dtype)),
    cpu="longwave.ops.ssm_kernel.cpu:vandermonde",
    cuda="longwave.ops.ssm_kernel.triton:vandermonde",
)
_moments = define(
    # The sums over t of f_t exp(t dtA), and if `weighted` of t f_t exp(t dtA), both (m, e, n, 2).
    "vandermonde_state_forward(Tensor f, Tensor dtA, bool weighted) -> (Tensor, Tensor)",
    fake=_fake_moments,
    cpu="longwave.ops.ssm_kernel.cpu:moments",
    cuda="longwave.ops.ssm_kernel.triton:moments",
)
_cauchy = define(
    "cauchy_kernel_forward(Tensor v, Tensor z, Tensor w) -> Tensor",
    fake=lambda v, z, w: v.new_empty(*v.shape[:2], *z.shape, dtype=state_dtype(v.dtype)),
    cpu="longwave.ops.ssm_kernel.cpu:cauchy",
    cuda="longwave.ops.ssm_kernel.triton:cauchy",
)
_cauchy_backward = define(
    "cauchy_kernel_backward(Tensor dk, Tensor v, Tensor z, Tensor w) -> (Tensor, Tensor)",
    fake=lambda dk, v, z, w: (v.new_empty(v.shape), w.new_empty(w.shape)),
    cpu="longwave.ops.ssm_kernel.cpu:cauchy_backward",
    cuda="longwave.ops.ssm_kernel.triton:cauchy_backward",
)


# Sums over time, `_Moments`, and kernels are each other's transpose, and so each other's gradient.
class _VandermondeKernel(torch.autograd.Function):
    @staticmethod
    def forward(ctx, C, dtA, l):
        ctx.save_for_backward(C, dtA)
        return _vandermonde(C, dtA, l)

    @staticmethod
    @once_differentiable
    def backward(ctx, dK):  # pyright: ignore[reportIncompatibleMethodOverride]
        C, dtA = ctx.saved_tensors
        sums, weighted = _moments(dK, dtA, ctx.needs_input_grad[1])
        dC = 2 * _conj(sums)
        ddtA = 2 * _conj(_times(C, weighted).sum(0)) if ctx.needs_input_grad[1] else None
        return dC.to(C.dtype), None if ddtA is None else ddtA.to(dtA.dtype), None


class _Moments(torch.autograd.Function):
    @staticmethod
    def forward(ctx, f, dtA):
        sums, weighted = _moments(f, dtA, ctx.needs_input_grad[1])
        ctx.save_for_backward(dtA, weighted)
        ctx.l, ctx.dtype = f.shape[2], f.dtype
        return sums

    @staticmethod
    @once_differentiable
    def backward(ctx, dsums):  # pyright: ignore[reportIncompatibleMethodOverride]
        dtA, weighted = ctx.saved_tensors
        df = _vandermonde(_conj(dsums), dtA, ctx.l) / 2
        ddtA = _times(dsums, _conj(weighted)).sum(0) if ctx.needs_input_grad[1] else None
        return df.to(ctx.dtype), None if ddtA is None else ddtA.to(dtA.dtype)


class _CauchyKernel(torch.autograd.Function):
    @staticmethod
    def forward(ctx, v, z, w):
        ctx.save_for_backward(v, z, w)
        return _cauchy(v, z, w)

    @staticmethod
    @once_differentiable
    def backward(ctx, dk):  # pyright: ignore[reportIncompatibleMethodOverride]
        v, z, w = ctx.saved_tensors
        dv, dw = _cauchy_backward(dk, v, z, w)
        return dv, None, dw

"""Public functions of the short convolution, and their registration."""

import torch
from torch import Tensor

from longwave.ops.causal_conv1d import reference
from longwave.ops.checks import check_documents, check_shape
from longwave.ops.register import Impl, define, use_kernel


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    reset: Tensor | None = None,
    lengths: Tensor | None = None,
    impl: Impl = "fused",
) -> tuple[Tensor, Tensor]:
    """Depthwise causal convolution of width w, with the window carried in and out.

        y_t = f(bias + sum_{k<w} weight[:, k] * x_{t-(w-1)+k})

    x (b, l, e); weight (e, w); bias (e,) or None; activation None or "silu". `initial_state` (b, w-1, e) holds the
    inputs before x, zeros if None. `reset` (b, l) bool: True starts a document; it sees no earlier input. `lengths`
    (b,) int64: tokens from lengths[i] on leave row i's state alone and give y = 0.

    Returns y (b, l, e) in x's dtype and the final window (b, w-1, e) in x's dtype, both differentiable. Accumulates in
    float32 (float64 for float64). Raises ValueError or TypeError for shapes and dtypes that do not fit.
    """
    b, l, e = x.shape
    _check(weight, bias, activation, e)
    check_shape("causal_conv1d", "initial_state", initial_state, (b, weight.shape[1] - 1, e), "(b, w-1, e)")
    check_documents("causal_conv1d", reset, lengths, b, l)
    if use_kernel("causal_conv1d", impl, x):
        return _CausalConv1d.apply(x, weight, bias, activation == "silu", initial_state, reset, lengths)
    return reference.causal_conv1d(x, weight, bias, activation, initial_state, reset, lengths)


def causal_conv1d_step(
    state: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None, *, activation: str | None = None
) -> Tensor:
    """One token: x (b, e) -> y (b, e). `state` (b, w-1, e), the inputs before x, is shifted in place. No gradient."""
    b, e = x.shape
    _check(weight, bias, activation, e)
    check_shape("causal_conv1d_step", "state", state, (b, weight.shape[1] - 1, e), "(b, w-1, e)")
    if use_kernel("causal_conv1d_step", "fused", x):
        return _step(state, x, weight, bias, activation == "silu")
    y, final = reference.causal_conv1d(x[:, None], weight, bias, activation, state, None, None)
    state.copy_(final)
    return y[:, 0]


def _check(weight: Tensor, bias: Tensor | None, activation: str | None, e: int) -> None:
    check_shape("causal_conv1d", "weight", weight, (e, weight.shape[-1]), "(e, w)")
    check_shape("causal_conv1d", "bias", bias, (e,), "(e,)")
    if activation not in (None, "silu"):
        raise ValueError(f"causal_conv1d: activation must be None or 'silu', got {activation!r}")


def _fake_forward(x, weight, bias, silu, initial_state, reset, lengths):
    return torch.empty_like(x, memory_format=torch.contiguous_format), x.new_empty(
        x.shape[0], weight.shape[1] - 1, x.shape[2]
    )


def _fake_backward(dy, dfinal, x, weight, bias, silu, initial_state, reset, lengths):
    b, l, e = x.shape
    return (
        x.new_empty(b, l, e),
        weight.new_empty(weight.shape),
        weight.new_empty(e),
        x.new_empty(b, weight.shape[1] - 1, e),
    )


_forward = define(
    "causal_conv1d_forward(Tensor x, Tensor weight, Tensor? bias, bool silu, Tensor? initial_state, Tensor? reset, "
    "Tensor? lengths) -> (Tensor, Tensor)",
    fake=_fake_forward,
    cpu="longwave.ops.causal_conv1d.cpu:forward",
    cuda="longwave.ops.causal_conv1d.triton:forward",
)
_backward = define(
    "causal_conv1d_backward(Tensor dy, Tensor dfinal, Tensor x, Tensor weight, Tensor? bias, bool silu, "
    "Tensor? initial_state, Tensor? reset, Tensor? lengths) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_fake_backward,
    cpu="longwave.ops.causal_conv1d.cpu:backward",
    cuda="longwave.ops.causal_conv1d.triton:backward",
)
_step = define(
    "causal_conv1d_step(Tensor(a!) state, Tensor x, Tensor weight, Tensor? bias, bool silu) -> Tensor",
    fake=lambda state, x, weight, bias, silu: torch.empty_like(x),
    cpu="longwave.ops.causal_conv1d.cpu:step",
    cuda="longwave.ops.causal_conv1d.triton:step",
    step=True,
)


class _CausalConv1d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, silu, initial_state, reset, lengths):
        ctx.save_for_backward(x, weight, bias, initial_state, reset, lengths)
        ctx.silu = silu
        return _forward(x, weight, bias, silu, initial_state, reset, lengths)

    @staticmethod
    def backward(ctx, dy, dfinal):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight, bias, initial_state, reset, lengths = ctx.saved_tensors
        dx, dweight, dbias, dinitial = _backward(dy, dfinal, x, weight, bias, ctx.silu, initial_state, reset, lengths)
        return (
            dx,
            dweight,
            None if bias is None else dbias.to(bias.dtype),
            None,
            None if initial_state is None else dinitial.to(initial_state.dtype),
            None,
            None,
        )

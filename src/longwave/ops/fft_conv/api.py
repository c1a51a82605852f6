"""Public functions of the long convolution, and their registration."""

from typing import NamedTuple

import torch
from torch import Tensor

from longwave.ops.checks import check_documents, check_shape, state_dtype
from longwave.ops.fft_conv import reference
from longwave.ops.register import Impl, define, on_hopper, use_kernel


class FilterSpectrum(NamedTuple):
    """A filter and its transform, for `fft_conv` in place of the filter. Made by `filter_spectrum`; for inference."""

    kernel: Tensor  # (e, k)
    points: Tensor  # in the kernels' own layout


def fft_conv(
    x: Tensor,
    kernel: Tensor | FilterSpectrum,
    *,
    D: Tensor | None = None,
    initial_state: Tensor | None = None,
    reset: Tensor | None = None,
    lengths: Tensor | None = None,
    chunk_len: int | None = None,
    impl: Impl = "fused",
) -> tuple[Tensor, Tensor]:
    """Causal convolution of every channel with a filter of its own, of any length k.

        y_t = sum_{j<k} kernel[:, j] * x_{t-j} + D * x_t

    x (b, l, e); kernel (e, k), or a `FilterSpectrum`; D (e,) or None. `initial_state` (b, k-1, e) holds the inputs
    before x, zeros if None. `reset` (b, l) bool: True starts a document; it sees no earlier input. `lengths` (b,)
    int64: tokens from lengths[i] on leave row i's state alone and give y = 0.

    The fused form multiplies spectra, in O(l log l). `chunk_len`: tokens to a transform (overlap-save); the working
    memory is then O(k + chunk_len) whatever l is. None: as many as are fastest. The last bits of y depend on it.

    Returns y (b, l, e) in x's dtype and the last k-1 inputs (b, k-1, e) in x's dtype, both differentiable, in x,
    kernel, D and initial_state. Computes in float32 (float64 for float64). A spectrum has rounding errors relative to
    the largest of its inputs, later ones of the same document included; what is infinite or NaN spreads to all of it.
    Raises ValueError or TypeError for shapes and dtypes that do not fit, and for a gradient through a FilterSpectrum.
    """
    b, l, e = x.shape
    points = None
    if isinstance(kernel, FilterSpectrum):
        _check_spectrum(kernel, x, (x, D, initial_state), chunk_len)
        kernel, points = kernel
    _check("fft_conv", kernel, D, e)
    check_shape("fft_conv", "initial_state", initial_state, (b, kernel.shape[1] - 1, e), "(b, k-1, e)")
    check_documents("fft_conv", reset, lengths, b, l)
    if chunk_len is not None and chunk_len < 1:
        raise ValueError(f"fft_conv: chunk_len must be None or at least 1, got {chunk_len}")
    if use_kernel("fft_conv", impl, x):
        return _FFTConv.apply(x, kernel, points, D, initial_state, reset, lengths, chunk_len)
    return reference.fft_conv(x, kernel, D, initial_state, reset, lengths)


@torch.no_grad()
def filter_spectrum(kernel: Tensor, l: int, *, chunk_len: int | None = None) -> FilterSpectrum:
    """The transform of kernel (e, k), once for many calls of `fft_conv` with up to about `l` tokens each.

    Longer sequences are cut into blocks of that size; shorter ones cost as much as one block.
    `chunk_len` as in `fft_conv`. Takes 4 e (k + l) bytes in float32, up to a fifth more for a good size, on Hopper
    up to twice as much for a power of two. Later changes of `kernel` do not reach it.
    """
    _check("filter_spectrum", kernel, None, len(kernel))
    kernel = kernel.detach().to(state_dtype(kernel.dtype), copy=True)
    if l < 1 or (chunk_len is not None and chunk_len < 1):
        raise ValueError(f"filter_spectrum: l and chunk_len must be at least 1, got l={l}, chunk_len={chunk_len}")
    points = kernel.new_empty(0)
    if use_kernel("fft_conv", "fused", kernel):
        points = _spectrum(kernel, l, chunk_len)
    return FilterSpectrum(kernel, points)


def fft_conv_step(
    state: Tensor, x: Tensor, kernel: Tensor, *, D: Tensor | None = None, length: Tensor | None = None
) -> Tensor:
    """One token: x (b, e) -> y (b, e), by the sum over the inputs it holds. No gradient.

    `state` (b, k-1, e), the inputs before x, is shifted in place. With `length` (b,) int64 it is a buffer (b, m, e) of
    any m, which holds row i's inputs from its start on: x is written behind the first length[i] of them, and `length`
    itself is left to the caller. It must be below m and k: what does not fit raises ValueError on the CPU.

    Fastest where `kernel.t()` is contiguous.
    """
    b, e = x.shape
    _check("fft_conv_step", kernel, D, e)
    m = kernel.shape[1] - 1 if length is None else state.shape[1]
    check_shape("fft_conv_step", "state", state, (b, m, e), "(b, k-1, e)" if length is None else "(b, m, e)")
    check_shape("fft_conv_step", "length", length, (b,), "(b,)")
    if use_kernel("fft_conv_step", "fused", x):
        return _step(state, x, kernel, D, length)
    return reference.fft_conv_step(state, x, kernel, D, length)


def _check(op: str, kernel: Tensor, D: Tensor | None, e: int) -> None:
    if kernel.ndim != 2 or kernel.shape[0] != e or not kernel.shape[1]:
        raise ValueError(f"{op}: kernel must be (e, k) with e = {e} and k >= 1, got {tuple(kernel.shape)}")
    check_shape(op, "D", D, (e,), "(e,)")


def _check_spectrum(
    filter: FilterSpectrum, x: Tensor, inputs: tuple[Tensor | None, ...], chunk_len: int | None
) -> None:
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
        raise ValueError("fft_conv: a FilterSpectrum has no gradient; pass the kernel itself, or use torch.no_grad()")
    if filter.points.dtype != state_dtype(x.dtype):
        raise TypeError(f"fft_conv: x in {x.dtype} needs a {state_dtype(x.dtype)} spectrum, got {filter.points.dtype}")
    if chunk_len is not None:
        raise ValueError(f"fft_conv: chunk_len={chunk_len} is given to filter_spectrum, which fixes the block's size")


def _fake_forward(x, kernel, points, D, initial_state, reset, lengths, chunk_len):
    return torch.empty_like(x, memory_format=torch.contiguous_format), x.new_empty(
        x.shape[0], kernel.shape[1] - 1, x.shape[2]
    )


def _fake_backward(dy, dfinal, x, kernel, D, initial_state, reset, lengths, chunk_len):
    history = 0 if initial_state is None else initial_state.shape[1]
    return (
        x.new_empty(x.shape),
        kernel.new_empty(kernel.shape),
        kernel.new_empty(x.shape[2]),
        x.new_empty(x.shape[0], history, x.shape[2]),
    )


_forward = define(
    "fft_conv_forward(Tensor x, Tensor kernel, Tensor? points, Tensor? D, Tensor? initial_state, Tensor? reset, "
    "Tensor? lengths, int? chunk_len) -> (Tensor, Tensor)",
    fake=_fake_forward,
    cpu="longwave.ops.fft_conv.cpu:forward",
    cuda="longwave.ops.fft_conv.triton:forward",
    hopper="longwave.ops.fft_conv.hopper:forward",
)
_backward = define(
    "fft_conv_backward(Tensor dy, Tensor? dfinal, Tensor x, Tensor kernel, Tensor? D, Tensor? initial_state, "
    "Tensor? reset, Tensor? lengths, int? chunk_len) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_fake_backward,
    cpu="longwave.ops.fft_conv.cpu:backward",
    cuda="longwave.ops.fft_conv.triton:backward",
    hopper="longwave.ops.fft_conv.hopper:backward",
)
_step = define(
    "fft_conv_step(Tensor(a!) state, Tensor x, Tensor kernel, Tensor? D, Tensor? length) -> Tensor",
    fake=lambda state, x, kernel, D, length: torch.empty_like(x),
    cpu="longwave.ops.fft_conv.cpu:step",
    cuda="longwave.ops.fft_conv.triton:step",
    step=True,
)


def _spectrum(kernel: Tensor, l: int, chunk_len: int | None) -> Tensor:
    if kernel.is_cuda and on_hopper(kernel.device):
        from longwave.ops.fft_conv.hopper import spectrum
    elif kernel.is_cuda:
        from longwave.ops.fft_conv.triton import spectrum
    else:
        from longwave.ops.fft_conv.cpu import spectrum
    return spectrum(kernel, l, chunk_len)


class _FFTConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, kernel, points, D, initial_state, reset, lengths, chunk_len):
        ctx.save_for_backward(x, kernel, D, initial_state, reset, lengths)
        ctx.chunk_len = chunk_len
        ctx.set_materialize_grads(False)
        return _forward(x, kernel, points, D, initial_state, reset, lengths, chunk_len)

    @staticmethod
    def backward(ctx, dy, dfinal):  # pyright: ignore[reportIncompatibleMethodOverride]
        x, kernel, D, initial_state, reset, lengths = ctx.saved_tensors
        dy = torch.zeros_like(x) if dy is None else dy
        dx, dkernel, dD, dinitial = _backward(dy, dfinal, x, kernel, D, initial_state, reset, lengths, ctx.chunk_len)
        return (
            dx,
            dkernel,
            None,
            None if D is None else dD.to(D.dtype),
            None if initial_state is None else dinitial.to(initial_state.dtype),
            None,
            None,
            None,
        )

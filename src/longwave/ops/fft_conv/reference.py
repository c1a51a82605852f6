"""The definition: y_t = sum_{j<k} kernel[:, j] x_{t-j} + D x_t; inputs of earlier documents count as zero.

A plain sum over the taps, O(l k): it is the short convolution's, with the taps in the other order.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from longwave.ops.causal_conv1d import reference as short
from longwave.ops.checks import state_dtype


def fft_conv(
    x: Tensor,  # (b, l, e)
    kernel: Tensor,  # (e, k)
    D: Tensor | None,  # (e,)
    initial_state: Tensor | None,  # (b, k-1, e)
    reset: Tensor | None,  # (b, l)
    lengths: Tensor | None,  # (b,)
) -> tuple[Tensor, Tensor]:
    kernel = kernel.to(state_dtype(x.dtype))
    if D is not None:
        kernel = kernel + pad(D.to(kernel.dtype)[:, None], (0, kernel.shape[1] - 1))  # the skip adds to the first tap
    return short.causal_conv1d(x, kernel.flip(1), None, None, initial_state, reset, lengths)


def fft_conv_step(state: Tensor, x: Tensor, kernel: Tensor, D: Tensor | None, length: Tensor | None) -> Tensor:
    """state (b, m, e), x (b, e); see the public function."""
    (b, m, _), dtype = state.shape, state_dtype(x.dtype)
    taps = kernel.t().to(dtype)  # (k, e)
    if length is None:
        inputs, taps = torch.cat([state, x[:, None]], 1), taps.flip(0)
        state.copy_(inputs[:, 1:])
    else:
        state[torch.arange(b, device=x.device), length] = x.to(state.dtype)
        back = length[:, None] - torch.arange(m, device=x.device)  # (b, m)
        inputs, taps = state, taps[back.clamp(0, len(taps) - 1)] * (back >= 0)[..., None]
    y = (inputs.to(dtype) * taps).sum(1)
    return (y if D is None else y + D.to(dtype) * x.to(dtype)).to(x.dtype)

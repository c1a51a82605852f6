"""The definition: y_t = f(bias + sum_k weight[:, k] * x_{t-(w-1)+k}); inputs of earlier documents count as zero."""

import torch
from torch import Tensor
from torch.nn.functional import silu

from longwave.ops.checks import state_dtype


def causal_conv1d(
    x: Tensor,  # (b, l, e)
    weight: Tensor,  # (e, w)
    bias: Tensor | None,  # (e,)
    activation: str | None,
    initial_state: Tensor | None,  # (b, w-1, e)
    reset: Tensor | None,  # (b, l)
    lengths: Tensor | None,  # (b,)
) -> tuple[Tensor, Tensor]:
    b, l, e = x.shape
    w = weight.shape[1]
    dtype = state_dtype(x.dtype)
    window = x.new_zeros(b, w - 1, e) if initial_state is None else initial_state.to(x.dtype)
    inputs = torch.cat([window, x], dim=1)  # (b, w-1+l, e)
    document = torch.zeros(b, w - 1 + l, dtype=torch.long, device=x.device)
    if reset is not None:
        document[:, w - 1 :] = reset.cumsum(1)

    y = x.new_zeros(b, l, e, dtype=dtype) if bias is None else bias.to(dtype).expand(b, l, e)
    for k in range(w):
        seen = (document[:, k : k + l] == document[:, w - 1 :]).unsqueeze(-1)  # (b, l, 1)
        y = y + weight[:, k].to(dtype) * inputs[:, k : k + l].to(dtype) * seen
    if activation == "silu":
        y = silu(y)

    end = torch.full((b,), l, device=x.device) if lengths is None else lengths
    if lengths is not None:
        y = torch.where(torch.arange(l, device=x.device)[:, None] < end[:, None, None], y, 0.0)
    tail = end[:, None] + torch.arange(w - 1, device=x.device)  # (b, w-1): the last w-1 inputs before `end`
    last = document.gather(1, (end + w - 2).clamp(min=0)[:, None])
    same = document.gather(1, tail) == last
    final_state = inputs.gather(1, tail[..., None].expand(b, w - 1, e)) * same[..., None]
    return y.to(x.dtype), final_state

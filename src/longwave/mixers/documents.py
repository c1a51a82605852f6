"""Where documents lie in rows that are padded on the right (`lengths`) and packed (`reset`)."""

import torch
from torch import Tensor


def padding(l: int, lengths: Tensor) -> Tensor:
    """(b, l) bool: True at tokens from lengths[i] on."""
    return torch.arange(l, device=lengths.device) >= lengths[:, None]


def without_padding(x: Tensor, lengths: Tensor | None) -> Tensor:
    """x (b, l, ...) with zeros for padding, whatever stands there, infinities and NaN included."""
    if lengths is None:
        return x
    mask = padding(x.shape[1], lengths)  # (b, l)
    return x.masked_fill(mask.view(*mask.shape, *[1] * (x.ndim - 2)), 0)


def mirror(b: int, l: int, reset: Tensor | None, lengths: Tensor | None, device: torch.device) -> Tensor:
    """(b, l) int64: for each token the place of its mirror image within its document; padding keeps its place."""
    time = torch.arange(l, device=device).expand(b, l)
    lengths = time.new_full((b,), l) if lengths is None else lengths
    begins = time == 0 if reset is None else reset | (time == 0)
    begin = torch.where(begins, time, 0).cummax(1).values
    next_begin = torch.cat([torch.where(begins, time, l)[:, 1:], time.new_full((b, 1), l)], 1)
    end = next_begin.flip(1).cummin(1).values.flip(1).minimum(lengths[:, None])
    return torch.where(time < lengths[:, None], begin + end - 1 - time, time)

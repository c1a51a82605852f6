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


def apart(x: Tensor, reset: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
    """Packed documents in rows of their own: x (b, l, d) -> (n, longest, d), padded on the right, and lengths (n,).

    In reading order: those of row 0 from left to right, then those of row 1. A row of length 0 has none.
    """
    b, l, _ = x.shape
    time = torch.arange(l, device=x.device).expand(b, l)
    real = (time < l if lengths is None else time < lengths[:, None]).flatten()
    begins = (reset | (time == 0)).flatten() & real
    first = begins.nonzero()[:, 0]  # (n,)
    sizes = (begins.cumsum(0) - 1)[real].bincount(minlength=len(first))
    longest = int(sizes.max()) if len(first) else 1
    places = first[:, None] + torch.arange(longest, device=x.device)
    return x.flatten(0, 1)[places.clamp(max=b * l - 1)], sizes

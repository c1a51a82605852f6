"""Which tokens of a piece make a token of a tier at a p-th of the rate, and which of its tokens speak to them.

A document's tokens form groups of p from its first one on, wherever pieces and rows are cut. A group that is complete
makes one token below; what that token says is heard by the p tokens after the group.
"""

from typing import NamedTuple, Self

import torch
from torch import Tensor

from longwave.mixers.documents import padding


class Alignment(NamedTuple):
    """Of a piece of l tokens after a window of the p-1 before it; m is the most groups that can end in it."""

    groups: Tensor  # (b, m, p) places in [window, piece] of each group's tokens
    low_lengths: Tensor  # (b,) groups that end here, of the m
    low_reset: Tensor | None  # (b, m) those that are the first of their document; None: no document begins here
    sources: Tensor  # (b, l) places in [queue, m times p outputs] of what each token hears
    silent: Tensor  # (b, l) those that hear nothing: their document has no complete group yet
    window: Tensor  # (b, p-1) places in [window, piece] of the next piece's window
    seen: Tensor  # (b,) tokens of the current document after the piece
    begun: Tensor | None  # (b,) rows whose document has begun here, and no group of it is complete; None: none can

    @classmethod
    def of(cls, p: int, l: int, seen: Tensor, reset: Tensor | None, lengths: Tensor | None) -> Self:
        """seen (b,) tokens of the current document before the piece; reset (b, l) bool; lengths (b,) int64."""
        b, m = len(seen), (p - 1 + l) // p
        time = torch.arange(l, device=seen.device).expand(b, l)
        lengths = time.new_full((b,), l) if lengths is None else lengths
        real = ~padding(l, lengths)
        place = seen[:, None] + time  # (b, l) in the document
        if reset is not None:
            latest = torch.where(reset, time, -1).cummax(1).values
            place = torch.where(latest < 0, place, time - latest)
        ends = ((place + 1) % p == 0) & real
        count = ends.cumsum(1)  # (b, l) groups that have ended, this token included
        low_lengths = count[:, -1]
        slot = torch.where(ends, count - 1, m)
        at = torch.zeros(b, m + 1, dtype=time.dtype, device=time.device).scatter(1, slot, time)[:, :m]  # (b, m)
        after = torch.where(lengths > 0, place.gather(1, (lengths - 1).clamp(min=0)[:, None])[:, 0] + 1, seen)
        return cls(
            groups=at[..., None] + torch.arange(p, device=time.device),
            low_lengths=low_lengths,
            low_reset=None if reset is None else place.gather(1, at) == p - 1,
            sources=(count - ends.long()) * p + place % p,
            silent=place < p,
            window=lengths[:, None] + torch.arange(p - 1, device=time.device),
            seen=after,
            begun=None if reset is None else (reset & real).any(1) & (after < p),
        )


def joined(before: Tensor, x: Tensor) -> Tensor:
    """before and x, one after the other in time, in the wider of their dtypes."""
    return torch.cat([before, x], 1)


def take(x: Tensor, places: Tensor) -> Tensor:
    """x (b, l, d), places (b, k) -> (b, k, d)."""
    return x.take_along_dim(places[..., None], 1)

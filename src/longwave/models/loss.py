"""Cross entropy over a large vocabulary, in memory that does not grow with the number of tokens."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from longwave.errors import UsageError

MAX_LOGITS = 2**24  # held at once: 64 MiB in float32


def linear_cross_entropy(
    head: Callable[[Tensor], Tensor],
    hidden: Tensor,
    targets: Tensor,
    *,
    vocab_size: int,
    ignore_index: int = -100,
    reduction: str = "mean",
    max_logits: int = MAX_LOGITS,
) -> Tensor:
    """cross_entropy(head(hidden), targets) without ever holding all logits.

    hidden (..., d), targets (...) int64, head: (n, d) -> (n, v), a module that may be wrapped. Works on as many tokens
    at a time as give `max_logits` logits; where that takes more than one part, the backward pass computes each part's
    logits anew (one more product with the head). Logits count in float32 at least. Targets equal to `ignore_index`
    count nothing; "mean" is over the others, and nan if there are none, as in torch.

    Returns a scalar, or (...) for reduction "none". Raises UsageError for an unknown reduction, ValueError for shapes
    that do not fit.
    """
    if reduction not in ("mean", "sum", "none"):
        raise UsageError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    if hidden.shape[:-1] != targets.shape:
        raise ValueError(f"targets must be {tuple(hidden.shape[:-1])}, one per token, got {tuple(targets.shape)}")

    def part_loss(hidden: Tensor, targets: Tensor) -> Tensor:
        logits = head(hidden)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        kind = "none" if reduction == "none" else "sum"
        return cross_entropy(logits, targets, ignore_index=ignore_index, reduction=kind)

    flat, flat_targets = hidden.flatten(0, -2), targets.flatten()  # (n, d), (n,)
    at_once = max(1, max_logits // vocab_size)
    if len(flat) <= at_once:
        losses = [part_loss(flat, flat_targets)]
    else:
        parts = zip(flat.split(at_once), flat_targets.split(at_once), strict=True)
        losses = [checkpoint(part_loss, *part, use_reentrant=False) for part in parts]
    if reduction == "none":
        return torch.cat(losses).view(targets.shape)
    total = torch.stack(losses).sum()
    return total / (targets != ignore_index).sum() if reduction == "mean" else total

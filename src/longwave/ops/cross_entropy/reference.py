"""Cross entropy and its gradient as they are defined."""

import torch
from torch import Tensor

from longwave.ops.checks import state_dtype


@torch.no_grad()
def cross_entropy_(logits: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
    wide = logits.to(state_dtype(logits.dtype))
    counts = targets != ignore_index
    chosen = torch.where(counts, targets, 0)[:, None]
    losses = torch.logsumexp(wide, -1) - wide.gather(1, chosen)[:, 0]
    gradient = torch.softmax(wide, -1).scatter_add(1, chosen, -torch.ones_like(wide[:, :1]))
    logits.copy_(torch.where(counts[:, None], gradient, 0))
    return torch.where(counts, losses, 0)


def losses_like(logits: Tensor) -> Tensor:
    """An empty tensor for the losses."""
    return logits.new_empty(len(logits), dtype=state_dtype(logits.dtype))

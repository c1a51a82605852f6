"""Cross entropy on the CPU: torch's own vectorised log-softmax, and as few passes over the logits as that leaves."""

import torch
from torch import Tensor
from torch.nn.functional import log_softmax

from longwave.ops.checks import state_dtype


def cross_entropy_(logits: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
    log_p = log_softmax(logits, -1, dtype=state_dtype(logits.dtype))
    ignored = targets == ignore_index
    chosen = targets.masked_fill(ignored, 0)[:, None]
    losses = -log_p.gather(1, chosen)[:, 0]
    gradient = log_p.exp_()
    gradient.scatter_add_(1, chosen, -torch.ones_like(gradient[:, :1]))
    logits.copy_(gradient.masked_fill_(ignored[:, None], 0))
    return losses.masked_fill_(ignored, 0)

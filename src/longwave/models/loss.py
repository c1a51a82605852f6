"""Losses: cross entropy over a large vocabulary, in memory that does not grow with the tokens; and those of heads."""

from collections.abc import Callable
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from longwave.errors import UsageError
from longwave.mixers.linear import Linear

MAX_LOGITS = 2**25  # made at once: 128 MiB in float32

Part = Callable[[Tensor, Tensor], Tensor]
"""hidden (n, d), targets (n,) -> their loss, summed or (n,)."""


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

    hidden (..., d), targets (...) int64, head: (n, d) -> (n, v), called as a module, so that it may be wrapped. Works
    on as many tokens at a time as give `max_logits` logits. Where that takes more than one part, a plain nn.Linear
    forms its gradients along with the loss; under torch.compile, for reduction "none" and for any other head the
    backward pass computes each part's logits anew (one more product with the head). Logits count in float32 at least.
    Targets equal to `ignore_index` count nothing; "mean" is over the others, and nan if there are none, as in torch.

    Returns a scalar, or (...) for reduction "none". Raises UsageError for an unknown reduction, ValueError for shapes
    that do not fit.
    """
    if reduction not in ("mean", "sum", "none"):
        raise UsageError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    if hidden.shape[:-1] != targets.shape:
        raise ValueError(f"targets must be {tuple(hidden.shape[:-1])}, one per token, got {tuple(targets.shape)}")

    def part_loss(hidden: Tensor, targets: Tensor) -> Tensor:
        logits = wide(head(hidden))
        kind = "none" if reduction == "none" else "sum"
        return cross_entropy(logits, targets, ignore_index=ignore_index, reduction=kind)

    flat, flat_targets = hidden.flatten(0, -2), targets.flatten()  # (n, d), (n,)
    at_once = max(1, max_logits // vocab_size)
    if len(flat) <= at_once:
        loss = part_loss(flat, flat_targets)
    elif reduction != "none" and torch.is_grad_enabled() and _is_plain(head):
        weights = [weight for weight in head.parameters() if weight.requires_grad]
        loss = _SumOfParts.apply(part_loss, at_once, flat, flat_targets, *weights)
    else:
        parts = zip(flat.split(at_once), flat_targets.split(at_once), strict=True)
        losses = [checkpoint(part_loss, *part, use_reentrant=False) for part in parts]
        loss = torch.cat(losses) if reduction == "none" else torch.stack(losses).sum()
    if reduction == "none":
        return loss.view(targets.shape)
    return loss / (targets != ignore_index).sum() if reduction == "mean" else loss


def info_nce(first: Tensor, second: Tensor, temperature: float = 0.05) -> Tensor:
    """Contrastive loss of vectors (n, d) in pairs: each is to find its partner among all n, in both directions.

    van den Oord et al. 2018, arXiv:1807.03748, equation 4, with dot products, symmetric as in Radford et al. 2021,
    arXiv:2103.00020. Nats.
    """
    scores = wide(first) @ wide(second).T / temperature  # (n, n)
    partner = torch.arange(len(scores), device=scores.device)
    return (cross_entropy(scores, partner) + cross_entropy(scores.T, partner)) / 2


def squared_error(y: Tensor, targets: Tensor) -> Tensor:
    """Mean squared error over the targets that are not NaN; nan if there are none. Shapes must be equal."""
    if y.shape != targets.shape:
        raise ValueError(f"targets must be {tuple(y.shape)}, got {tuple(targets.shape)}")
    known = ~targets.isnan()
    error = wide(y).masked_fill(~known, 0) - targets.masked_fill(~known, 0)
    return error.square().sum() / known.sum()


def wide(x: Tensor) -> Tensor:
    """x in float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _is_plain(head: Callable[[Tensor], Tensor]) -> TypeGuard[nn.Linear]:
    """Whether its parameters are all that its output depends on: no adapter, hook, parametrization or sharding."""
    if not isinstance(head, nn.Linear) or type(head) not in (nn.Linear, Linear):
        return False
    return not (head._forward_hooks or head._forward_pre_hooks or torch.compiler.is_compiling())


class _SumOfParts(torch.autograd.Function):
    """The sum of `part_loss` over parts. Its gradients are formed with it, part by part; backward scales them."""

    @staticmethod
    def forward(ctx: Any, part_loss: Part, at_once: int, hidden: Tensor, targets: Tensor, *weights: Tensor):
        wants_hidden = hidden.requires_grad
        total, d_hidden, d_weights = 0.0, [], None
        for part, part_targets in zip(hidden.split(at_once), targets.split(at_once), strict=True):
            part = part.detach().requires_grad_(wants_hidden)
            with torch.enable_grad():
                loss = part_loss(part, part_targets)
            wanted = (part, *weights) if wants_hidden else weights
            with torch.autocast(hidden.device.type, enabled=False):
                gradients = list(torch.autograd.grad(loss, wanted)) if wanted else []
            total = total + loss.detach()
            if wants_hidden:
                d_hidden.append(gradients.pop(0))
            d_weights = (
                gradients if d_weights is None else [a.add_(b) for a, b in zip(d_weights, gradients, strict=True)]
            )
        ctx.wants_hidden = wants_hidden
        ctx.save_for_backward(*([torch.cat(d_hidden)] if wants_hidden else []), *(d_weights or []))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        gradients = [gradient * d_loss.to(gradient.dtype) for gradient in ctx.saved_tensors]
        d_hidden = gradients.pop(0) if ctx.wants_hidden else None
        return None, None, d_hidden, None, *gradients

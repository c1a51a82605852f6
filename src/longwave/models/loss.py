"""Losses: cross entropy over a large vocabulary, in memory that does not grow with the tokens; and those of heads."""

from collections.abc import Callable
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import cross_entropy, linear
from torch.utils.checkpoint import checkpoint

from longwave.errors import UsageError
from longwave.mixers.linear import Linear
from longwave.ops.cross_entropy import cross_entropy_

MAX_LOGITS = {False: 2**25, True: 2**28}
"""Made at once, on the CPU and on a GPU, where fewer parts are faster: 128 MiB in float32, 512 MiB in bfloat16."""


def linear_cross_entropy(
    head: Callable[[Tensor], Tensor],
    hidden: Tensor,
    targets: Tensor,
    *,
    vocab_size: int,
    ignore_index: int = -100,
    reduction: str = "mean",
    max_logits: int | None = None,
) -> Tensor:
    """cross_entropy(head(hidden), targets) without ever holding all logits.

    hidden (..., d), targets (...) int64, head: (n, d) -> (n, v), called as a module, so that it may be wrapped. Works
    on as many tokens at a time as give `max_logits` logits, None leaving that to the device. Where that takes more than
    one part, a plain nn.Linear forms its gradients along with the loss; under torch.compile, for reduction "none" and
    for any other head the backward pass computes each part's logits anew (one more product with the head). Logits count
    in float32 at least. Targets equal to `ignore_index` count nothing; "mean" is over the others, and nan if there are
    none, as in torch.

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
    at_once = max(1, (max_logits or MAX_LOGITS[flat.is_cuda]) // vocab_size)
    if len(flat) <= at_once:
        loss = part_loss(flat, flat_targets)
    elif reduction != "none" and torch.is_grad_enabled() and _is_plain(head):
        loss = _SumOfParts.apply(at_once, ignore_index, flat, flat_targets, head.weight, head.bias)
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
    """The sum of the losses over parts. Its gradients are formed with it, part by part; backward scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        at_once: int,
        ignore_index: int,
        hidden: Tensor,
        targets: Tensor,
        weight: Tensor,
        bias: Tensor | None,
    ):
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        wanted = ctx.needs_input_grad[2], ctx.needs_input_grad[4], ctx.needs_input_grad[5]
        total, d_hidden, d_weight, d_bias = 0.0, [], None, None
        with torch.autocast(device, enabled=False):
            W, offset = weight.to(dtype), None if bias is None else bias.to(dtype)
            for part, part_targets in zip(hidden.split(at_once), targets.split(at_once), strict=True):
                x = part.to(dtype)
                d_logits = linear(x, W, offset)  # (n, v), the logits until the next line
                total = total + cross_entropy_(d_logits, part_targets, ignore_index=ignore_index).sum()
                if wanted[0]:
                    d_hidden.append((d_logits @ W).to(hidden.dtype))
                if wanted[1]:
                    d_weight = _sum(d_weight, d_logits.T @ x, weight)
                if wanted[2] and bias is not None:
                    d_bias = _sum(d_bias, d_logits.sum(0), bias)
        ctx.save_for_backward(torch.cat(d_hidden) if d_hidden else None, d_weight, d_bias)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_loss: Tensor):  # pyright: ignore[reportIncompatibleMethodOverride]
        gradients = (None if g is None else g * d_loss.to(g.dtype) for g in ctx.saved_tensors)
        d_hidden, d_weight, d_bias = gradients
        return None, None, d_hidden, None, d_weight, d_bias


def _sum(total: Tensor | None, part: Tensor, like: Tensor) -> Tensor:
    """The gradient of a parameter so far, in its dtype."""
    return part.to(like.dtype) if total is None else total.add_(part)

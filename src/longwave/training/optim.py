"""AdamW's parameter groups and the learning-rate schedule."""

import math

import torch
from torch import nn

from longwave.training.config import Optim


def adamw(model: nn.Module, config: Optim.Config) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101) with weight decay on the matrices of `model` only.

    Parameters marked `_lr_scale` learn at that part of the rate: those of S4 and its kin that set time scales, as its
    authors train them (Gu et al. 2022, arXiv:2206.11893).
    """
    decayed, free = decay_groups(model)
    groups = []
    for parameters, weight_decay in ((decayed.values(), config.weight_decay), (free.values(), 0.0)):
        for scale in sorted({lr_scale(parameter) for parameter in parameters}, reverse=True):
            members = [parameter for parameter in parameters if lr_scale(parameter) == scale]
            groups.append({"params": members, "weight_decay": weight_decay, "lr_scale": scale})
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def decay_groups(model: nn.Module) -> tuple[dict[str, nn.Parameter], dict[str, nn.Parameter]]:
    """The parameters that are decayed and those that are not, by name; frozen ones are in neither.

    Not decayed: those marked `_no_weight_decay` (A_log, D, dt_bias, whose zero means nothing), vectors (biases, the
    weights of norms) and embeddings, of which most rows see no gradient in a step and would only shrink.
    """
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    decayed, free = {}, {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            marked = getattr(parameter, "_no_weight_decay", False)
            spared = marked or parameter.ndim < 2 or id(parameter) in embeddings
            (free if spared else decayed)[name] = parameter
    return decayed, free


def lr_scale(parameter: nn.Parameter) -> float:
    """The part of the learning rate that a parameter is marked with; 1 without a mark."""
    return getattr(parameter, "_lr_scale", 1.0)


def lr_factor(progress: float, config: Optim.Config) -> float:
    """The learning rate at `progress` (0 to 1 of the run), as a part of `config.lr`.

    cosine: Loshchilov and Hutter 2017, arXiv:1608.03983, without restarts. wsd: Hu et al. 2024, arXiv:2404.06395, with
    the 1 - sqrt decay of Haegele et al. 2024, arXiv:2405.18392.
    """
    if progress < config.warmup:
        return progress / config.warmup
    if config.schedule == "cosine":
        part = (progress - config.warmup) / (1 - config.warmup) if config.warmup < 1 else 1.0
        return config.final + (1 - config.final) * (1 + math.cos(math.pi * min(part, 1))) / 2
    if config.schedule == "wsd" and progress > 1 - config.decay:
        part = (progress - 1 + config.decay) / config.decay
        return config.final + (1 - config.final) * (1 - math.sqrt(min(part, 1)))
    return 1.0


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]

"""A training step of any torch model."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy


class TorchTrainable:
    """`loss(tokens (1, l), targets (1, l))` gives the mean cross entropy of `model`."""

    def __init__(self, model: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], *, autocast: bool):
        self.model, self._loss, self._autocast = model, loss, autocast

    def train_step(self, tokens: list[int], targets: list[int]) -> float:
        self.model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=self._autocast):
            loss = self._loss(torch.tensor([tokens]), torch.tensor([targets]))
        loss.backward()
        return loss.item()

    def gradient_norm(self) -> float:
        return torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None]).item()

    def close(self) -> None:
        del self.model, self._loss


def loss_of_logits(logits: Tensor, targets: Tensor) -> Tensor:
    """logits (1, l, v), targets (1, l), in float32 as transformers' own loss is."""
    return cross_entropy(logits[0].float(), targets[0])

"""A training step of any torch model."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from longwave.bench.peers import Place


class TorchTrainable:
    """`loss(tokens (b, l), targets (b, l))` gives the mean cross entropy of `model`."""

    def __init__(self, model: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], place: Place, *, autocast: bool):
        self.model, self._loss, self._device, self._autocast = model, loss, place.device, autocast
        self._optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1, fused=True)

    def train_step(self, tokens: Tensor, targets: Tensor) -> float:
        self.model.zero_grad()
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._autocast):
            loss = self._loss(tokens.to(self._device), targets.to(self._device))
        loss.backward()
        return loss.item()

    def update(self) -> None:
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self._optimizer.step()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def gradient_norm(self) -> float:
        return nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None]).item()

    def close(self) -> None:
        del self.model, self._loss, self._optimizer


def loss_of_logits(logits: Tensor, targets: Tensor) -> Tensor:
    """logits (b, l, v), targets (b, l), in float32 as transformers' own loss is."""
    return cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

"""longwave itself, as a user of its Python interface runs it."""

from pathlib import Path

import torch
from torch import Tensor

from longwave.bench.peers import AUTOCAST, Place
from longwave.bench.peers.torch_training import TorchTrainable
from longwave.hub.load import load
from longwave.models.state import State
from longwave.models.token_model import TokenModel


def open_peer(folder: Path, precision: str, place: Place) -> "Longwave":
    return Longwave(load(folder, dtype=precision, device=place.device).model.eval())


def open_trainable(folder: Path, precision: str, place: Place) -> TorchTrainable:
    model = load(folder, dtype="float32", device=place.device).model.train()
    return TorchTrainable(model, model.loss, place, autocast=precision == AUTOCAST)


class Longwave:
    """Logits are computed for the last token alone."""

    def __init__(self, model: TokenModel):
        self.model = model
        self._state: State | None = None
        self._device = next(model.parameters()).device

    @torch.inference_mode()
    def prefill(self, tokens: list[int]) -> Tensor:
        hidden, self._state = self.model.hidden(torch.tensor([tokens], device=self._device))
        return self.model.head(hidden[0, -1]).float().cpu()

    begin = prefill

    @torch.inference_mode()
    def step(self, token: int) -> Tensor:
        assert self._state is not None
        return self.model.step(torch.tensor([token], device=self._device), self._state)[0].float().cpu()

    def close(self) -> None:
        del self.model, self._state

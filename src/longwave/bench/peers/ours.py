"""longwave itself, as a user of its Python interface runs it."""

from pathlib import Path

import torch
from torch import Tensor

from longwave.bench.peers import AUTOCAST
from longwave.bench.peers.torch_training import TorchTrainable
from longwave.hub.load import load
from longwave.models.state import State
from longwave.models.token_model import TokenModel


def open_peer(folder: Path, precision: str, n_threads: int) -> "Longwave":
    return Longwave(load(folder, dtype=precision).model.eval())


def open_trainable(folder: Path, precision: str, n_threads: int) -> TorchTrainable:
    model = load(folder, dtype="float32").model.train()
    return TorchTrainable(model, model.loss, autocast=precision == AUTOCAST)


class Longwave:
    """Logits are computed for the last token alone."""

    def __init__(self, model: TokenModel):
        self.model = model
        self._state: State | None = None

    @torch.inference_mode()
    def prefill(self, tokens: list[int]) -> Tensor:
        hidden, self._state = self.model.hidden(torch.tensor([tokens]))
        return self.model.head(hidden[0, -1]).float()

    begin = prefill

    @torch.inference_mode()
    def step(self, token: int) -> Tensor:
        assert self._state is not None
        return self.model.step(torch.tensor([token]), self._state)[0].float()

    def close(self) -> None:
        del self.model, self._state

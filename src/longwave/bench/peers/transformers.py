"""transformers' own models of the folder: its plain torch path, the only one it has on a CPU."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.models.mamba2.configuration_mamba2 import Mamba2Config
from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan
from transformers.utils import logging

from longwave.bench.peers import AUTOCAST, Place
from longwave.bench.peers.torch_training import TorchTrainable, loss_of_logits

logging.set_verbosity_error()
logging.disable_progress_bar()


def open_peer(folder: Path, precision: str, place: Place) -> "Transformers":
    return Transformers(_load(folder, getattr(torch, precision)).eval())


def open_trainable(folder: Path, precision: str, place: Place) -> TorchTrainable:
    model = _load(folder, torch.float32).train()

    def loss(tokens: Tensor, targets: Tensor) -> Tensor:
        return loss_of_logits(model(tokens, use_cache=False).logits, targets)

    return TorchTrainable(model, loss, place, autocast=precision == AUTOCAST)


def ssd(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, dt_bias: Tensor, dt_softplus: bool, **_: Any
) -> Tensor:
    """Blocks of matrix products, in the chunk length of its configurations; arguments as those of our `ssd`."""
    return mamba2_chunk_scan(x, dt, A, B, C, Mamba2Config().chunk_size, D=D, dt_bias=dt_bias, dt_softplus=dt_softplus)


class Transformers:
    """Logits are computed for the last token alone."""

    def __init__(self, model: Any):
        self.model = model
        self._cache: Any = None

    def prefill(self, tokens: list[int]) -> Tensor:
        self._cache = None
        return self._feed(tokens)

    begin = prefill

    def step(self, token: int) -> Tensor:
        return self._feed([token])

    @torch.inference_mode()
    def _feed(self, tokens: list[int]) -> Tensor:
        out = self.model(torch.tensor([tokens]), cache_params=self._cache, use_cache=True, logits_to_keep=1)
        self._cache = out.cache_params
        return out.logits[0, -1].float()

    def close(self) -> None:
        del self.model, self._cache


def _load(folder: Path, dtype: torch.dtype) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)

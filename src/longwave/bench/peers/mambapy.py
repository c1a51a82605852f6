"""mambapy's Mamba with the folder's weights. (Its language model cannot be imported without CUDA kernels.)"""

import json
from pathlib import Path
from typing import Any

import torch
from mambapy.mamba import Mamba, MambaConfig, RMSNorm  # pyright: ignore[reportMissingImports]
from mambapy.pscan import pscan  # pyright: ignore[reportMissingImports]
from safetensors.torch import load_file
from torch import Tensor, nn

from longwave.bench.peers import Place
from longwave.bench.peers.torch_training import TorchTrainable, loss_of_logits


def open_peer(folder: Path, precision: str, place: Place) -> "MambaPy":
    return MambaPy(_load(folder).eval())


def open_trainable(folder: Path, precision: str, place: Place) -> TorchTrainable:
    model = _load(folder).train()
    return TorchTrainable(model, lambda tokens, targets: loss_of_logits(model(tokens), targets), place, autocast=False)


def selective_scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, **_: Any) -> Tensor:
    """Its parallel scan over the whole sequence at once; arguments as those of our `selective_scan`."""
    decay = torch.exp(dt[..., None] * A)  # (b, l, e, n)
    states = pscan(decay, (dt * x)[..., None] * B[:, :, None, :])
    return (states @ C[..., None])[..., 0] + D * x


class MambaPy:
    """Its parallel form returns no state, so `begin` goes token by token."""

    def __init__(self, model: "_Model"):
        self.model = model
        self._caches: list = []

    @torch.inference_mode()
    def prefill(self, tokens: list[int]) -> Tensor:
        return self.model.head(self.model.hidden(torch.tensor([tokens]))[0, -1])

    def begin(self, tokens: list[int]) -> Tensor:
        config = self.model.mamba.config
        self._caches = [(None, torch.zeros(1, config.d_inner, config.d_conv - 1)) for _ in range(config.n_layers)]
        return [self.step(token) for token in tokens][-1]

    @torch.inference_mode()
    def step(self, token: int) -> Tensor:
        model = self.model
        x, self._caches = model.mamba.step(model.embeddings(torch.tensor([token])), self._caches)  # (1, d)
        return model.head(model.norm_f(x)[0])

    def close(self) -> None:
        del self.model, self._caches


class _Model(nn.Module):
    """Embedding, mambapy's layers, norm and tied head, named as in the folder."""

    def __init__(self, vocab_size: int, config: MambaConfig):
        super().__init__()
        self.embeddings = nn.Embedding(vocab_size, config.d_model)
        self.mamba = Mamba(config)
        self.norm_f = RMSNorm(config.d_model, config.rms_norm_eps)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.hidden(tokens))

    def hidden(self, tokens: Tensor) -> Tensor:
        return self.norm_f(self.mamba(self.embeddings(tokens)))

    def head(self, hidden: Tensor) -> Tensor:
        return hidden @ self.embeddings.weight.T


def _load(folder: Path) -> _Model:
    settings = json.loads((folder / "config.json").read_text())
    config = MambaConfig(
        d_model=settings["hidden_size"],
        n_layers=settings["num_hidden_layers"],
        dt_rank=settings["time_step_rank"],
        d_state=settings["state_size"],
        expand_factor=settings["expand"],
        d_conv=settings["conv_kernel"],
        rms_norm_eps=settings["layer_norm_epsilon"],
        bias=settings["use_bias"],
        conv_bias=settings["use_conv_bias"],
    )
    model = _Model(settings["vocab_size"], config)
    stored = {key.removeprefix("backbone."): value for key, value in load_file(folder / "model.safetensors").items()}
    model.load_state_dict({key.replace("layers.", "mamba.layers.", 1): value for key, value in stored.items()})
    return model

"""mamba_ssm's kernels, CUDA and Triton, behind the arguments of our operators; and its language model."""

import json
import math
from pathlib import Path
from typing import Any

import torch
from mamba_ssm.models.config_mamba import MambaConfig  # pyright: ignore[reportMissingImports]
from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel  # pyright: ignore[reportMissingImports]
from mamba_ssm.ops.selective_scan_interface import selective_scan_fn  # pyright: ignore[reportMissingImports]
from mamba_ssm.ops.triton.layernorm_gated import rmsnorm_fn  # pyright: ignore[reportMissingImports]
from mamba_ssm.ops.triton.mamba3.mamba3_siso_combined import (  # pyright: ignore[reportMissingImports]
    mamba3_siso_combined,
)
from mamba_ssm.ops.triton.selective_state_update import selective_state_update  # pyright: ignore[reportMissingImports]
from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined  # pyright: ignore[reportMissingImports]
from safetensors.torch import load_file
from torch import Tensor

from longwave.bench.calls import Adapted, Inputs
from longwave.bench.peers import AUTOCAST, Place
from longwave.bench.peers.torch_training import TorchTrainable, loss_of_logits

CHUNK = 256  # of SSD, as its models have


def _rows(*tensors: Tensor) -> list[Tensor]:
    """(b, l, ...) -> (b, ..., l), time innermost in memory."""
    return [tensor.movedim(1, -1).contiguous() for tensor in tensors]


def _scan_native(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, dt_bias: Tensor, dt_softplus: bool
) -> Inputs:
    u, delta, B, C, z = _rows(x, dt, B, C, z)
    return {"u": u, "delta": delta, "A": A, "B": B, "C": C, "D": D, "z": z} | {
        "delta_bias": dt_bias,
        "delta_softplus": dt_softplus,
    }


selective_scan = Adapted(_scan_native, lambda **native: selective_scan_fn(**native).transpose(1, 2))


def _ssd_native(chunk_len: int | None, **inputs: Any) -> Inputs:
    return inputs | {"chunk_size": chunk_len or CHUNK}


ssd = Adapted(_ssd_native, mamba_chunk_scan_combined)


def _mamba3_native(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    trap: Tensor,
    angles: Tensor,
    B_bias: Tensor,
    C_bias: Tensor,
    D: Tensor,
    z: Tensor,
    **_: Any,
) -> Inputs:
    """For one rank. It takes the sigmoid of trap and pi times the tanh of the angles, which it wants for each head."""
    h = x.shape[2]
    ADT, DT, Trap = _rows(A * dt, dt, trap.logit().to(x.dtype))
    pre_tanh = torch.atanh(angles / math.pi).to(x.dtype)
    return {
        "Q": C.squeeze(2),
        "K": B.squeeze(2),
        "V": x,
        "ADT": ADT,
        "DT": DT,
        "Trap": Trap,
        "Q_bias": C_bias.squeeze(1),
        "K_bias": B_bias.squeeze(1),
        "Angles": pre_tanh[:, :, None].expand(-1, -1, h, -1).contiguous(),
        "D": D,
        "Z": z,
    }


mamba3_scan = Adapted(_mamba3_native, mamba3_siso_combined)


def gated_rms_norm(
    x: Tensor, weight: Tensor, z: Tensor, eps: float, group_size: int | None, norm_before_gate: bool
) -> Tensor:
    return rmsnorm_fn(x, weight, None, z=z, eps=eps, group_size=group_size, norm_before_gate=norm_before_gate)


def _step_native(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    dt_softplus: bool,
    **_: Any,
) -> Inputs:
    """One dt, A and D of a head for all its channels: expanded, which its kernel knows."""
    h, p, n = state.shape[1:]
    return {
        "state": state,
        "x": x,
        "dt": dt[..., None].expand(-1, -1, p),
        "A": A[:, None, None].expand(h, p, n),
        "B": B,
        "C": C,
        "D": D[:, None].expand(h, p),
        "dt_bias": dt_bias[:, None].expand(h, p),
        "dt_softplus": dt_softplus,
    }


ssd_step = Adapted(_step_native, selective_state_update)


def open_trainable(folder: Path, precision: str, place: Place) -> TorchTrainable:
    """Its model with the folder's weights, residual and norm fused."""
    settings = json.loads((folder / "config.json").read_text())
    config = MambaConfig(
        d_model=settings["hidden_size"],
        n_layer=settings["num_hidden_layers"],
        vocab_size=settings["vocab_size"],
        ssm_cfg=_layer(settings),
        residual_in_fp32=settings["residual_in_fp32"],
        pad_vocab_size_multiple=1,
        tie_embeddings=settings["tie_word_embeddings"],
    )
    model = MambaLMHeadModel(config, device=place.device)
    stored = load_file(folder / "model.safetensors", device=str(place.device))
    stored["backbone.embedding.weight"] = stored.pop("backbone.embeddings.weight")
    stored.setdefault("lm_head.weight", stored["backbone.embedding.weight"])
    model.load_state_dict(stored)

    def loss(tokens: Tensor, targets: Tensor) -> Tensor:
        return loss_of_logits(model(tokens).logits, targets)

    return TorchTrainable(model.train(), loss, place, autocast=precision == AUTOCAST)


def _layer(settings: dict[str, Any]) -> dict[str, Any]:
    """What it calls a layer's configuration."""
    shared = {
        "d_state": settings["state_size"],
        "d_conv": settings["conv_kernel"],
        "expand": settings["expand"],
        "bias": settings["use_bias"],
        "conv_bias": settings["use_conv_bias"],
    }
    if settings["model_type"] == "mamba":
        return shared | {"layer": "Mamba1", "dt_rank": settings["time_step_rank"]}
    return shared | {
        "layer": "Mamba2",
        "headdim": settings["head_dim"],
        "ngroups": settings["n_groups"],
        "chunk_size": CHUNK,
    }

"""transformers' `mamba`: Mamba in every layer."""

from collections.abc import Mapping
from typing import Any

from longwave.hub import backbone
from longwave.hub.backbone import ALIASES, WEIGHTS, rename
from longwave.hub.settings import inexpressible, setting, size
from longwave.mixers.mamba import Mamba
from longwave.models.language_model import LanguageModel

__all__ = ["ALIASES", "WEIGHTS", "config_from", "config_to", "matches", "rename"]

MODEL_TYPE, ARCHITECTURE = "mamba", "MambaForCausalLM"
DEFAULTS = {"vocab_size": 50280, "hidden_size": 768, "num_hidden_layers": 32, "tie_word_embeddings": True}


def matches(config: Mapping[str, Any]) -> bool:
    return config.get("model_type") == MODEL_TYPE


def config_from(config: Mapping[str, Any]) -> LanguageModel.Config:
    return backbone.config_from(config, Mamba.Config(**mixer_from(config)), ARCHITECTURE, DEFAULTS)


def config_to(model: LanguageModel.Config) -> dict[str, Any]:
    mixer = backbone.only_mixer(model, Mamba.Config, MODEL_TYPE)
    if mixer.inner_norm is not None:
        inexpressible(MODEL_TYPE, "no inner norms", f"inner_norm={mixer.inner_norm!r}")
    return backbone.config_to(model, MODEL_TYPE, ARCHITECTURE) | mixer_to(model, mixer)


def mixer_from(config: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of Mamba.Config. `intermediate_size`, where it is given, wins over `expand`."""
    expand = size(config, "expand", 2)
    d_inner = size(config, "intermediate_size", expand * size(config, "hidden_size", DEFAULTS["hidden_size"]))
    automatic = config.get("time_step_rank") in (None, "auto")
    return {
        "d_state": size(config, "state_size", 16),
        "d_conv": size(config, "conv_kernel", 4),
        "expand": expand,
        "d_inner": d_inner,
        "dt_rank": "auto" if automatic else size(config, "time_step_rank", 1),
        "dt_min": setting(config, "time_step_min", float, 1e-3),
        "dt_max": setting(config, "time_step_max", float, 1e-1),
        "dt_init_floor": setting(config, "time_step_floor", float, 1e-4),
        "bias": setting(config, "use_bias", bool, False),
        "conv_bias": setting(config, "use_conv_bias", bool, True),
    }


def mixer_to(model: LanguageModel.Config, mixer: Mamba.Config) -> dict[str, Any]:
    return {
        "state_size": mixer.d_state,
        "conv_kernel": mixer.d_conv,
        "expand": mixer.expand,
        "intermediate_size": mixer.d_inner or mixer.expand * model.d_model,
        "time_step_rank": mixer.dt_rank,
        "time_step_min": mixer.dt_min,
        "time_step_max": mixer.dt_max,
        "time_step_floor": mixer.dt_init_floor,
        "use_bias": mixer.bias,
        "use_conv_bias": mixer.conv_bias,
    }

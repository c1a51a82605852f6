"""transformers' `falcon_mamba`: Mamba with weightless norms on dt, B and C in every layer."""

from collections.abc import Mapping
from typing import Any

from longwave.hub import backbone
from longwave.hub.backbone import ALIASES, WEIGHTS, rename
from longwave.hub.mamba import DEFAULTS, mixer_from, mixer_to
from longwave.hub.settings import inexpressible, setting
from longwave.mixers.mamba import Mamba
from longwave.models.language_model import LanguageModel

__all__ = ["ALIASES", "WEIGHTS", "config_from", "config_to", "matches", "rename"]

MODEL_TYPE, ARCHITECTURE = "falcon_mamba", "FalconMambaForCausalLM"


def matches(config: Mapping[str, Any]) -> bool:
    return config.get("model_type") == MODEL_TYPE


def config_from(config: Mapping[str, Any]) -> LanguageModel.Config:
    eps = setting(config, "mixer_rms_eps", float, 1e-6)
    mixer = Mamba.Config(**mixer_from(config), inner_norm="weightless", inner_norm_eps=eps)
    return backbone.config_from(config, mixer, ARCHITECTURE, DEFAULTS)


def config_to(model: LanguageModel.Config) -> dict[str, Any]:
    mixer = backbone.only_mixer(model, Mamba.Config, MODEL_TYPE)
    if mixer.inner_norm != "weightless":
        inexpressible(MODEL_TYPE, "inner_norm='weightless'", f"inner_norm={mixer.inner_norm!r}")
    config = backbone.config_to(model, MODEL_TYPE, ARCHITECTURE) | mixer_to(model, mixer)
    return config | {"mixer_rms_eps": mixer.inner_norm_eps}

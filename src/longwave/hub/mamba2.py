"""transformers' `mamba2`: Mamba-2 in every layer."""

from collections.abc import Mapping
from typing import Any

from longwave.errors import UsageError
from longwave.hub import backbone
from longwave.hub.backbone import ALIASES, WEIGHTS, rename
from longwave.hub.settings import expansion, hold, limits, one_norm_eps, setting, size
from longwave.mixers.mamba2 import Mamba2
from longwave.models.language_model import LanguageModel

__all__ = ["ALIASES", "WEIGHTS", "config_from", "config_to", "matches", "rename"]

MODEL_TYPE, ARCHITECTURE = "mamba2", "Mamba2ForCausalLM"
DEFAULTS = {"vocab_size": 32768, "hidden_size": 4096, "num_hidden_layers": 64, "tie_word_embeddings": False}


def matches(config: Mapping[str, Any]) -> bool:
    return config.get("model_type") == MODEL_TYPE


def config_from(config: Mapping[str, Any]) -> LanguageModel.Config:
    d_head, n_heads = size(config, "head_dim", 64), size(config, "num_heads", 128)
    d_model, expand = size(config, "hidden_size", DEFAULTS["hidden_size"]), size(config, "expand", 2)
    if n_heads * d_head != expand * d_model:
        raise UsageError(
            f"config.json: num_heads {n_heads} times head_dim {d_head} must be "
            f"expand {expand} times hidden_size {d_model}"
        )
    mixer = Mamba2.Config(
        d_state=size(config, "state_size", 128),
        d_conv=size(config, "conv_kernel", 4),
        expand=expand,
        d_head=d_head,
        n_groups=size(config, "n_groups", 8),
        dt_min=setting(config, "time_step_min", float, 1e-3),
        dt_max=setting(config, "time_step_max", float, 1e-1),
        dt_init_floor=setting(config, "time_step_floor", float, 1e-4),
        dt_limit=limits(config, "time_step_limit"),
        norm_eps=setting(config, "layer_norm_epsilon", float, 1e-5),
        bias=setting(config, "use_bias", bool, False),
        conv_bias=setting(config, "use_conv_bias", bool, True),
    )
    return backbone.config_from(config, mixer, ARCHITECTURE, DEFAULTS)


def config_to(model: LanguageModel.Config) -> dict[str, Any]:
    mixer = backbone.only_mixer(model, Mamba2.Config, MODEL_TYPE)
    expand = expansion(MODEL_TYPE, mixer, model.d_model)
    hold(MODEL_TYPE, mixer, "d_state d_conv expand d_inner d_head n_groups dt_limit norm_eps bias conv_bias")
    one_norm_eps(MODEL_TYPE, model, mixer)
    return backbone.config_to(model, MODEL_TYPE, ARCHITECTURE) | {
        "state_size": mixer.d_state,
        "conv_kernel": mixer.d_conv,
        "expand": expand,
        "head_dim": mixer.d_head,
        "num_heads": expand * model.d_model // mixer.d_head,
        "n_groups": mixer.n_groups,
        "time_step_min": mixer.dt_min,
        "time_step_max": mixer.dt_max,
        "time_step_floor": mixer.dt_init_floor,
        "time_step_limit": list(mixer.dt_limit),
        "use_bias": mixer.bias,
        "use_conv_bias": mixer.conv_bias,
    }

"""transformers' `bamba`: Mamba-2, attention that turns half of each head at a few layers, gated MLPs."""

from collections.abc import Mapping
from typing import Any

from longwave.hub import hybrid
from longwave.hub.hybrid import ALIASES, WEIGHTS
from longwave.hub.keys import Rename
from longwave.hub.settings import check_architecture, hold, refuse_unless, setting, size
from longwave.mixers.attention import Attention
from longwave.mixers.channel import SwiGLU
from longwave.mixers.mamba2 import Mamba2
from longwave.models.language_model import LanguageModel

__all__ = ["ALIASES", "WEIGHTS", "config_from", "config_to", "matches", "rename"]

MODEL_TYPE, ARCHITECTURE = "bamba", "BambaForCausalLM"


def matches(config: Mapping[str, Any]) -> bool:
    return config.get("model_type") == MODEL_TYPE


def config_from(config: Mapping[str, Any]) -> LanguageModel.Config:
    check_architecture(config, ARCHITECTURE)
    refuse_unless(config, hybrid.SUPPORTED)
    d_model = size(config, "hidden_size", 4096)
    ssm = Mamba2.Config(**hybrid.mamba2_from(config, size(config, "mamba_expand", 2) * d_model))
    rope = setting(config, "rope_parameters", dict, {})
    attention = Attention.Config(
        **hybrid.attention_from(config, d_model), rotary=setting(rope, "partial_rotary_factor", float, 0.5)
    )
    mlp = SwiGLU.Config(d_inner=size(config, "intermediate_size", 14336), bias=setting(config, "mlp_bias", bool, False))
    attention_at = setting(config, "attn_layer_indices", list, [])
    layers = ((attention if i in attention_at else ssm, mlp) for i in range(size(config, "num_hidden_layers", 32)))
    return LanguageModel.Config(
        vocab_size=size(config, "vocab_size", 128000),
        d_model=d_model,
        layers=tuple(slot for layer in layers for slot in layer),
        norm_eps=setting(config, "rms_norm_eps", float, 1e-5),
        tie_embeddings=setting(config, "tie_word_embeddings", bool, False),
    )


def config_to(model: LanguageModel.Config) -> dict[str, Any]:
    hold(MODEL_TYPE, model, hybrid.OUTER)
    mixers, channels = zip(*hybrid.pairs(model, MODEL_TYPE), strict=True)
    ssm, attention = hybrid.one_of_each(mixers, (Mamba2.Config, Attention.Config), MODEL_TYPE)
    (mlp,) = hybrid.one_of_each(channels, (SwiGLU.Config,), MODEL_TYPE)
    hold(MODEL_TYPE, mlp, "d_inner bias")
    attention = attention or Attention.Config(n_heads=1, rotary=0.5)
    written = hybrid.attention_to(model, attention, MODEL_TYPE, "rotary")
    written["rope_parameters"] |= {"partial_rotary_factor": attention.rotary}
    return {
        **hybrid.outer_to(model, MODEL_TYPE, ARCHITECTURE),
        "attn_layer_indices": [i for i, mixer in enumerate(mixers) if mixer == attention],
        "intermediate_size": mlp.width(model.d_model),
        "mlp_bias": mlp.bias,
        **hybrid.mamba2_to(model, ssm or Mamba2.Config(norm_eps=model.norm_eps), MODEL_TYPE),
        **written,
    }


def rename(model: LanguageModel.Config) -> Rename:
    return hybrid.rename(model, _inside)


def _inside(layer: Any) -> dict[str, str]:
    return {"": {Mamba2.Config: "mamba", Attention.Config: "self_attn"}.get(type(layer), "feed_forward")}

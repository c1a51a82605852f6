"""transformers' `falcon_h1`: in every layer Mamba-2 beside attention, then a gated MLP; multipliers everywhere."""

from collections.abc import Mapping
from typing import Any

from longwave.hub import hybrid
from longwave.hub.hybrid import ALIASES, WEIGHTS
from longwave.hub.keys import Rename
from longwave.hub.settings import check_architecture, hold, inexpressible, numbers, refuse, refuse_unless, setting, size
from longwave.mixers.attention import Attention
from longwave.mixers.channel import SwiGLU
from longwave.mixers.mamba2 import Mamba2
from longwave.mixers.parallel import Parallel
from longwave.models.language_model import LanguageModel

__all__ = ["ALIASES", "WEIGHTS", "config_from", "config_to", "matches", "rename"]

MODEL_TYPE, ARCHITECTURE = "falcon_h1", "FalconH1ForCausalLM"
ONES = (1.0,) * 5


def matches(config: Mapping[str, Any]) -> bool:
    return config.get("model_type") == MODEL_TYPE


def config_from(config: Mapping[str, Any]) -> LanguageModel.Config:
    check_architecture(config, ARCHITECTURE)
    refuse_unless(config, hybrid.SUPPORTED)
    d_model = size(config, "hidden_size", 4096)
    ssm, attention = _ssm_from(config, d_model), hybrid.attention_from(config, d_model)
    gate, down = numbers(config, "mlp_multipliers", (1.0, 1.0), "two numbers, of the gate and of the output")
    parallel = Parallel.Config(
        mixers=(ssm, Attention.Config(**attention, key_multiplier=_factor(config, "key_multiplier"))),
        in_multipliers=(_factor(config, "ssm_in_multiplier"), _factor(config, "attention_in_multiplier")),
        out_multipliers=(_factor(config, "ssm_out_multiplier"), _factor(config, "attention_out_multiplier")),
    )
    mlp = SwiGLU.Config(
        d_inner=size(config, "intermediate_size", 14336),
        gate_multiplier=gate,
        down_multiplier=down,
        bias=setting(config, "mlp_bias", bool, False),
    )
    return LanguageModel.Config(
        vocab_size=size(config, "vocab_size", 128000),
        d_model=d_model,
        layers=(parallel, mlp) * size(config, "num_hidden_layers", 32),
        norm_eps=setting(config, "rms_norm_eps", float, 1e-5),
        tie_embeddings=setting(config, "tie_word_embeddings", bool, False),
        embedding_multiplier=_factor(config, "embedding_multiplier"),
        logits_multiplier=_factor(config, "lm_head_multiplier"),
    )


def config_to(model: LanguageModel.Config) -> dict[str, Any]:
    hold(MODEL_TYPE, model, f"{hybrid.OUTER} embedding_multiplier logits_multiplier")
    layers = hybrid.pairs(model, MODEL_TYPE)
    parallel, mlp = layers[0]
    if not isinstance(parallel, Parallel.Config) or not isinstance(mlp, SwiGLU.Config) or len(set(layers)) > 1:
        inexpressible(MODEL_TYPE, "layers of a parallel and a swiglu, all alike", " and ".join(map(str, set(layers))))
    if [type(mixer) for mixer in parallel.mixers] != [Mamba2.Config, Attention.Config]:
        inexpressible(MODEL_TYPE, "mamba2 parallel to attention", parallel)
    ssm, attention = parallel.mixers
    hold(MODEL_TYPE, mlp, "d_inner gate_multiplier down_multiplier bias")
    ins, outs = parallel.in_multipliers or ONES, parallel.out_multipliers or ONES
    return {
        **hybrid.outer_to(model, MODEL_TYPE, ARCHITECTURE),
        "embedding_multiplier": model.embedding_multiplier,
        "lm_head_multiplier": model.logits_multiplier,
        **hybrid.mamba2_to(model, ssm, MODEL_TYPE, "norm norm_before_gate in_multipliers"),
        "mamba_d_ssm": ssm.d_inner or ssm.expand * model.d_model,
        "mamba_rms_norm": ssm.norm,
        "mamba_norm_before_gate": ssm.norm_before_gate,
        "projectors_bias": ssm.bias,
        "ssm_multipliers": list(ssm.in_multipliers or ONES),
        "ssm_in_multiplier": ins[0],
        "ssm_out_multiplier": outs[0],
        **hybrid.attention_to(model, attention, MODEL_TYPE, "key_multiplier"),
        "attention_in_multiplier": ins[1],
        "attention_out_multiplier": outs[1],
        "key_multiplier": attention.key_multiplier,
        "intermediate_size": mlp.width(model.d_model),
        "mlp_bias": mlp.bias,
        "mlp_multipliers": [mlp.gate_multiplier, mlp.down_multiplier],
    }


def rename(model: LanguageModel.Config) -> Rename:
    return hybrid.rename(model, _inside)


def _inside(layer: Any) -> dict[str, str]:
    return (
        {".parts.0": "mamba", ".parts.1": "self_attn"} if isinstance(layer, Parallel.Config) else {"": "feed_forward"}
    )


def _ssm_from(config: Mapping[str, Any], d_model: int) -> Mamba2.Config:
    usual = size(config, "mamba_expand", 2) * d_model if "mamba_d_ssm" in config else 1024
    fields = hybrid.mamba2_from(config, size(config, "mamba_d_ssm", usual))
    if setting(config, "projectors_bias", bool, False) != fields["bias"]:
        refuse("projectors_bias", config["projectors_bias"], f"the same bias as mamba_proj_bias, {fields['bias']}")
    factors = numbers(config, "ssm_multipliers", ONES, "five numbers, of z, x, B, C and dt")
    return Mamba2.Config(
        **fields,
        norm=setting(config, "mamba_rms_norm", bool, False),
        norm_before_gate=setting(config, "mamba_norm_before_gate", bool, True),
        in_multipliers=None if factors == ONES else factors,  # pyright: ignore[reportArgumentType]
    )


def _factor(config: Mapping[str, Any], key: str) -> float:
    return setting(config, key, float, 1.0)

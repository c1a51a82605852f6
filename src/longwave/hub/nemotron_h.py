"""transformers' `nemotron_h`: one mixer per layer, Mamba-2, attention without positions, an MLP or experts."""

import math
from collections.abc import Mapping
from typing import Any

from longwave.errors import UsageError
from longwave.hub.hybrid import ALIASES, WEIGHTS, heads_from, least_dt, one_of_each, unturned_to
from longwave.hub.settings import (
    TRANSFORMERS,
    check_architecture,
    hold,
    inexpressible,
    limits,
    one_norm_eps,
    refuse,
    refuse_unless,
    setting,
    size,
)
from longwave.mixers.attention import Attention
from longwave.mixers.channel import MLP
from longwave.mixers.mamba2 import Mamba2
from longwave.mixers.moe import MoE
from longwave.models.language_model import LanguageModel

__all__ = ["ALIASES", "WEIGHTS", "config_from", "config_to", "matches", "rename"]

MODEL_TYPE, ARCHITECTURE = "nemotron_h", "NemotronHForCausalLM"

PATTERN = {"M": "linear_attention", "*": "full_attention", "-": "mlp", "E": "moe"}
OLDER = {"mamba": "linear_attention", "attention": "full_attention"}
NAMES = {Mamba2.Config: "linear_attention", Attention.Config: "full_attention", MLP.Config: "mlp", MoE.Config: "moe"}
OTHER_KEYS = {
    "mamba_n_groups": "n_groups",
    "mamba_d_conv": "conv_kernel",
    "mamba_dt_limit": "time_step_limit",
    "mamba_dt_min": "time_step_min",
    "mamba_dt_max": "time_step_max",
    "mamba_dt_init_floor": "time_step_floor",
    "mamba_conv_bias": "use_conv_bias",
}

_SUPPORTED = TRANSFORMERS | {
    "mamba_hidden_act": ("silu", "swish"),
    "mlp_hidden_act": ("relu2",),
    "attention_bias": (False,),
    "sliding_window": (None,),
    "num_nextn_predict_layers": (0, None),
}


def matches(config: Mapping[str, Any]) -> bool:
    return config.get("model_type") == MODEL_TYPE


def config_from(config: Mapping[str, Any]) -> LanguageModel.Config:
    check_architecture(config, ARCHITECTURE)
    config = {OTHER_KEYS.get(key, key): value for key, value in config.items()}
    refuse_unless(config, _SUPPORTED)
    names = _layer_names(config)
    makers = {"linear_attention": _ssm_from, "full_attention": _attention_from, "mlp": _mlp_from, "moe": _moe_from}
    layers = {name: makers[name](config) for name in set(names)}
    return LanguageModel.Config(
        vocab_size=size(config, "vocab_size", 131072),
        d_model=size(config, "hidden_size", 4096),
        layers=tuple(layers[name] for name in names),
        norm_eps=setting(config, "layer_norm_epsilon", float, 1e-5),
        tie_embeddings=setting(config, "tie_word_embeddings", bool, False),
        residual_fp32=setting(config, "residual_in_fp32", bool, False),
    )


def config_to(model: LanguageModel.Config) -> dict[str, Any]:
    hold(MODEL_TYPE, model, "vocab_size d_model layers norm_eps tie_embeddings residual_fp32")
    layers = filter(None, one_of_each(model.layers, tuple(NAMES), MODEL_TYPE))
    makers = {Mamba2.Config: _ssm_to, Attention.Config: _attention_to, MLP.Config: _mlp_to, MoE.Config: _moe_to}
    config = {
        "model_type": MODEL_TYPE,
        "architectures": [ARCHITECTURE],
        "vocab_size": model.vocab_size,
        "hidden_size": model.d_model,
        "layers_block_type": [NAMES[type(layer)] for layer in model.layers],
        "layer_norm_epsilon": model.norm_eps,
        "tie_word_embeddings": model.tie_embeddings,
        "residual_in_fp32": model.residual_fp32,
    }
    for layer in layers:
        written = makers[type(layer)](model, layer)
        if config.get("mlp_bias", written.get("mlp_bias")) != written.get("mlp_bias", config.get("mlp_bias")):
            inexpressible(MODEL_TYPE, "one bias for mlp and the shared expert", "two")
        config |= written
    return config


def rename(model: LanguageModel.Config) -> dict[str, str]:
    names = {"embedding": "backbone.embeddings", "norm_f": "backbone.norm_f", "lm_head": "lm_head"}
    for i, layer in enumerate(model.layers):
        ours, theirs = f"layers.{i}", f"backbone.layers.{i}"
        names[ours] = theirs
        names |= {f"{ours}.mixer.{a}": f"{theirs}.mixer.{b}" for a, b in _inside(layer).items()}
    return names


def _inside(layer: Any) -> dict[str, str]:
    """Names within a layer that are not as here."""
    if isinstance(layer, MLP.Config):
        return {"fc1": "up_proj", "fc2": "down_proj"}
    if not isinstance(layer, MoE.Config):
        return {}
    parts = {f"experts.{i}": f"experts.{i}" for i in range(layer.n_experts)} | {"shared": "shared_experts"}
    linears = {f"{a}.{c}": f"{b}.{d}" for a, b in parts.items() for c, d in _inside(MLP.Config()).items()}
    router = {"router": "gate", "router.correction_bias": "gate.e_score_correction_bias"}
    return linears | router | {"latent_down": "fc1_latent_proj", "latent_up": "fc2_latent_proj"}


def _layer_names(config: Mapping[str, Any]) -> list[str]:
    """What each layer is, in the newer words. The list goes before the pattern, as in transformers."""
    pattern = setting(config, "hybrid_override_pattern", str, "ME*-")
    names = setting(config, "layers_block_type", list, [PATTERN.get(letter, letter) for letter in pattern])
    names = [OLDER.get(name, name) for name in names]
    for name in names:
        if name not in PATTERN.values():
            refuse("a layer of type", name, f"{', '.join(PATTERN.values())}, or {' '.join(PATTERN)} in a pattern")
    if not names:
        raise UsageError("config.json: layers_block_type names no layer")
    return names


def _ssm_from(config: Mapping[str, Any]) -> Mamba2.Config:
    """transformers clamps dt to time_step_min in its full forward, and takes no notice of time_step_limit."""
    if (limit := limits(config, "time_step_limit")) != (0.0, math.inf):
        refuse("time_step_limit", limit, "(0, inf), as transformers' nemotron_h has it whatever this says")
    d_head, dt_min = size(config, "mamba_head_dim", 64), setting(config, "time_step_min", float, 1e-3)
    return Mamba2.Config(
        d_state=size(config, "ssm_state_size", 128),
        d_conv=size(config, "conv_kernel", 4),
        d_inner=size(config, "mamba_num_heads", 128) * d_head,
        d_head=d_head,
        n_groups=size(config, "n_groups", 8),
        dt_min=dt_min,
        dt_max=setting(config, "time_step_max", float, 1e-1),
        dt_init_floor=setting(config, "time_step_floor", float, 1e-4),
        dt_limit=(dt_min, math.inf),
        norm_eps=setting(config, "layer_norm_epsilon", float, 1e-5),
        bias=setting(config, "use_bias", bool, False),
        conv_bias=setting(config, "use_conv_bias", bool, True),
    )


def _ssm_to(model: LanguageModel.Config, mixer: Mamba2.Config) -> dict[str, Any]:
    hold(MODEL_TYPE, mixer, "d_state d_conv expand d_inner d_head n_groups dt_limit norm_eps bias conv_bias")
    one_norm_eps(MODEL_TYPE, model, mixer)
    return {
        "ssm_state_size": mixer.d_state,
        "conv_kernel": mixer.d_conv,
        "mamba_num_heads": (mixer.d_inner or mixer.expand * model.d_model) // mixer.d_head,
        "mamba_head_dim": mixer.d_head,
        "n_groups": mixer.n_groups,
        "time_step_min": least_dt(mixer, MODEL_TYPE),
        "time_step_max": mixer.dt_max,
        "time_step_floor": mixer.dt_init_floor,
        "use_bias": mixer.bias,
        "use_conv_bias": mixer.conv_bias,
    }


def _attention_from(config: Mapping[str, Any]) -> Attention.Config:
    return Attention.Config(**heads_from(config, size(config, "hidden_size", 4096), d_head=128), rotary=0.0)


def _attention_to(model: LanguageModel.Config, mixer: Attention.Config) -> dict[str, Any]:
    return unturned_to(model, mixer, MODEL_TYPE)


def _mlp_from(config: Mapping[str, Any]) -> MLP.Config:
    return _squared(size(config, "intermediate_size", 21504), setting(config, "mlp_bias", bool, False))


def _mlp_to(model: LanguageModel.Config, mlp: MLP.Config) -> dict[str, Any]:
    return {"intermediate_size": _width(model, mlp), "mlp_bias": mlp.bias}


def _moe_from(config: Mapping[str, Any]) -> MoE.Config:
    d_latent = size(config, "moe_latent_size", 1) if config.get("moe_latent_size") is not None else None
    bias = setting(config, "mlp_bias", bool, False)
    if d_latent and bias:
        refuse("mlp_bias with moe_latent_size", bias, "latent projections without bias")
    return MoE.Config(
        n_experts=size(config, "n_routed_experts", 8),
        top_k=size(config, "num_experts_per_tok", 2),
        expert=_squared(size(config, "moe_intermediate_size", 7688), False),
        shared=_squared(size(config, "moe_shared_expert_intermediate_size", 7688), bias),
        router="sigmoid",
        n_groups=size(config, "n_group", 1),
        top_groups=size(config, "topk_group", 1),
        normalise=setting(config, "norm_topk_prob", bool, True),
        scale=setting(config, "routed_scaling_factor", float, 1.0),
        d_latent=d_latent,
    )


def _moe_to(model: LanguageModel.Config, moe: MoE.Config) -> dict[str, Any]:
    hold(MODEL_TYPE, moe, "n_experts top_k expert shared router n_groups top_groups normalise scale d_latent balance")
    expert, shared = moe.expert, moe.shared
    if moe.router != "sigmoid":
        inexpressible(MODEL_TYPE, "router='sigmoid'", f"router={moe.router!r}")
    if not isinstance(expert, MLP.Config) or not isinstance(shared, MLP.Config) or expert.bias:
        inexpressible(MODEL_TYPE, "an mlp as shared expert, and mlps without bias as experts", moe)
    return {
        "n_routed_experts": moe.n_experts,
        "num_experts_per_tok": moe.top_k,
        "moe_intermediate_size": _width(model, expert, moe.d_latent),
        "moe_shared_expert_intermediate_size": _width(model, shared),
        "mlp_bias": shared.bias,
        "n_group": moe.n_groups,
        "topk_group": moe.top_groups,
        "norm_topk_prob": moe.normalise,
        "routed_scaling_factor": moe.scale,
        "moe_latent_size": moe.d_latent,
    }


def _squared(d_inner: int, bias: bool) -> MLP.Config:
    return MLP.Config(d_inner=d_inner, activation="relu2", bias=bias)


def _width(model: LanguageModel.Config, mlp: MLP.Config, d_model: int | None = None) -> int:
    if mlp.activation != "relu2":
        inexpressible(MODEL_TYPE, "activation='relu2'", f"activation={mlp.activation!r}")
    return mlp.width(d_model or model.d_model)

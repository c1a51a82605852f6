"""transformers' `granitemoehybrid`: Mamba-2 and attention, experts beside a shared MLP or that alone, multipliers."""

from collections.abc import Mapping
from typing import Any

from longwave.errors import UsageError
from longwave.hub import hybrid
from longwave.hub.hybrid import ALIASES, WEIGHTS
from longwave.hub.keys import Rename, stacked
from longwave.hub.settings import check_architecture, hold, inexpressible, refuse, refuse_unless, setting, size
from longwave.mixers.attention import Attention
from longwave.mixers.channel import SwiGLU
from longwave.mixers.mamba2 import Mamba2
from longwave.mixers.moe import MoE
from longwave.models.language_model import LanguageModel

__all__ = ["ALIASES", "WEIGHTS", "config_from", "config_to", "matches", "rename"]

MODEL_TYPE, ARCHITECTURE = "granitemoehybrid", "GraniteMoeHybridForCausalLM"

_SUPPORTED = hybrid.SUPPORTED | {
    "position_embedding_type": (None, "nope", "rope"),
    "normalization_function": ("rmsnorm",),
}
_LAYERS = {"linear_attention": "mamba", "full_attention": "attention"}


def matches(config: Mapping[str, Any]) -> bool:
    return config.get("model_type") == MODEL_TYPE


def config_from(config: Mapping[str, Any]) -> LanguageModel.Config:
    check_architecture(config, ARCHITECTURE)
    refuse_unless(config, _SUPPORTED)
    eps = setting(config, "rms_norm_eps", float, 1e-6)
    d_model = size(config, "hidden_size", 4096)
    mixers = {
        "mamba": Mamba2.Config(**hybrid.mamba2_from(config, size(config, "mamba_expand", 2) * d_model, eps)),
        "attention": Attention.Config(
            **hybrid.attention_from(config, d_model, None),
            rotary=1.0 if config.get("position_embedding_type") == "rope" else 0.0,
            scale=setting(config, "attention_multiplier", float, 1.0),
        ),
    }
    channel, divisor = _channel_from(config), setting(config, "logits_scaling", float, 1.0)
    if divisor <= 0:
        raise UsageError(f"config.json: logits_scaling must be above 0, got {divisor}")
    return LanguageModel.Config(
        vocab_size=size(config, "vocab_size", 32000),
        d_model=d_model,
        layers=tuple(slot for kind in _kinds(config) for slot in (mixers[kind], channel)),
        norm_eps=eps,
        tie_embeddings=setting(config, "tie_word_embeddings", bool, False),
        embedding_multiplier=setting(config, "embedding_multiplier", float, 1.0),
        residual_multiplier=setting(config, "residual_multiplier", float, 1.0),
        logits_multiplier=1 / divisor,
    )


def config_to(model: LanguageModel.Config) -> dict[str, Any]:
    hold(MODEL_TYPE, model, f"{hybrid.OUTER} embedding_multiplier residual_multiplier logits_multiplier")
    mixers, channels = zip(*hybrid.pairs(model, MODEL_TYPE), strict=True)
    ssm, attention = hybrid.one_of_each(mixers, (Mamba2.Config, Attention.Config), MODEL_TYPE)
    mlp, moe = hybrid.one_of_each(channels, (SwiGLU.Config, MoE.Config), MODEL_TYPE)
    if mlp and moe:
        inexpressible(MODEL_TYPE, "experts in every layer or in none", "both")
    return {
        **hybrid.outer_to(model, MODEL_TYPE, ARCHITECTURE),
        "layer_types": ["full_attention" if mixer == attention else "linear_attention" for mixer in mixers],
        "embedding_multiplier": model.embedding_multiplier,
        "residual_multiplier": model.residual_multiplier,
        "logits_scaling": 1 / model.logits_multiplier,
        **hybrid.mamba2_to(model, ssm or Mamba2.Config(norm_eps=model.norm_eps), MODEL_TYPE),
        **_attention_to(model, attention or Attention.Config(n_heads=1)),
        **_channel_to(model, mlp or moe),
    }


def rename(model: LanguageModel.Config) -> Rename:
    names = hybrid.rename(model, _inside, ("input_layernorm", "post_attention_layernorm"), "norm")
    for slot, layer in enumerate(model.layers):
        if isinstance(layer, MoE.Config):
            ours, theirs = f"layers.{slot}.mixer.experts", f"model.layers.{slot // 2}.block_sparse_moe"
            for i in range(layer.n_experts):
                for a, b in _FUSED.items():
                    names[f"{ours}.{i}.{a}"] = stacked(f"{theirs}.{b}", layer.n_experts)
    return names


_FUSED = {"gate_proj": "input_linear", "up_proj": "input_linear", "down_proj": "output_linear"}


def _inside(layer: Any) -> dict[str, str]:
    if isinstance(layer, MoE.Config):
        shared = {f".shared.{a}": f"shared_mlp.{b}" for a, b in _FUSED.items()}
        return {".router": "block_sparse_moe.router.layer", **shared}
    if isinstance(layer, SwiGLU.Config):
        return {f".{a}": f"shared_mlp.{b}" for a, b in _FUSED.items()}
    return {"": "mamba" if isinstance(layer, Mamba2.Config) else "self_attn"}


def _kinds(config: Mapping[str, Any]) -> list[str]:
    """What each layer mixes with, "mamba" or "attention", the words of older files."""
    n_layers = size(config, "num_hidden_layers", 32)
    given = config.get("layer_types") or config.get("layers_block_type") or ["mamba"] * n_layers
    kinds = [_LAYERS.get(kind, kind) for kind in given]
    for kind in kinds:
        if kind not in _LAYERS.values():
            refuse("a layer of type", kind, " and ".join(_LAYERS))
    if len(kinds) != n_layers:
        refuse(f"layer_types of {len(kinds)} layers with num_hidden_layers", n_layers, "a type for each layer")
    return kinds


def _channel_from(config: Mapping[str, Any]) -> SwiGLU.Config | MoE.Config:
    shared = SwiGLU.Config(d_inner=size(config, "shared_intermediate_size", 1024))
    n_experts = setting(config, "num_local_experts", int, 8)
    if not n_experts:
        return shared
    return MoE.Config(
        n_experts=n_experts,
        top_k=size(config, "num_experts_per_tok", 2),
        expert=SwiGLU.Config(d_inner=size(config, "intermediate_size", 11008)),
        shared=shared,
        router="topk_softmax",
    )


def _channel_to(model: LanguageModel.Config, channel: SwiGLU.Config | MoE.Config) -> dict[str, Any]:
    if isinstance(channel, SwiGLU.Config):
        return {"num_local_experts": 0, "num_experts_per_tok": 0, "shared_intermediate_size": _width(model, channel)}
    hold(MODEL_TYPE, channel, "n_experts top_k expert shared router balance")
    if channel.router != "topk_softmax":
        inexpressible(MODEL_TYPE, "router='topk_softmax'", f"router={channel.router!r}")
    return {
        "num_local_experts": channel.n_experts,
        "num_experts_per_tok": channel.top_k,
        "intermediate_size": _width(model, channel.expert),
        "shared_intermediate_size": _width(model, channel.shared),
    }


def _width(model: LanguageModel.Config, mlp: Any) -> int:
    if not isinstance(mlp, SwiGLU.Config):
        inexpressible(MODEL_TYPE, "swiglu experts and a shared one", mlp)
    hold(MODEL_TYPE, mlp, "d_inner")
    return mlp.width(model.d_model)


def _attention_to(model: LanguageModel.Config, mixer: Attention.Config) -> dict[str, Any]:
    if mixer.rotary not in (0, 1):
        inexpressible(MODEL_TYPE, "attention of rotary 0 or 1", f"rotary={mixer.rotary}")
    written = hybrid.attention_to(model, mixer, MODEL_TYPE, "rotary scale")
    scale = written["head_dim"] ** -0.5 if mixer.scale is None else mixer.scale
    position = "rope" if mixer.rotary else None
    return written | {"attention_multiplier": scale, "position_embedding_type": position}

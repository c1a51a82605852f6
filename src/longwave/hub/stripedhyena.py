"""StripedHyena and Evo-1: modal Hyena blocks with rotary attention among them, each followed by a gated MLP.

Folders as published on the hub (model_type "stripedhyena"), and the settings of the `stripedhyena` package without one.
"""

from collections.abc import Collection, Mapping
from typing import Any

import torch

from longwave.errors import UsageError
from longwave.hub import hybrid
from longwave.hub.keys import Rename
from longwave.hub.settings import check_architecture, hold, inexpressible, refuse, refuse_unless, setting, size
from longwave.mixers.attention import Attention
from longwave.mixers.channel import SwiGLU
from longwave.mixers.hyena_modal import HyenaModal
from longwave.models.language_model import LanguageModel

MODEL_TYPE, ARCHITECTURE = "stripedhyena", "StripedHyenaModelForCausalLM"
WEIGHTS = "model.safetensors"
PREFIX = "backbone."

_SUPPORTED = {
    "smeared_gqa": (False,),
    "hyena_filter_groups": (1,),
    "final_norm": (True,),
    "mlp_activation": ("silu", "gelu"),
    "long_fir_threshold": (None,),
    "bidirectional": (False,),
    "quantization_config": (None,),
}
# What is left out of a config.json means one thing on the hub, another to the package, which reads its own settings.
_HUB_DEFAULTS = {
    "inner_mlp_size": 14336,
    "proj_groups": 4,
    "qkv_proj_bias": False,
    "mha_out_proj_bias": False,
    "rotary_emb_base": 500_000.0,
    "use_flash_rmsnorm": True,
}


def matches(config: Mapping[str, Any]) -> bool:
    return config.get("model_type", MODEL_TYPE) == MODEL_TYPE and "attn_layer_idxs" in config


def ALIASES(names: Collection[str]) -> dict[str, str | None]:
    """The package's own files name tensors without the hub's prefix. Rotary frequencies are computed, not loaded."""
    whole = {name: name if name.startswith(PREFIX) else PREFIX + name for name in names}
    return {name: None if full.endswith(".rotary_emb.inv_freq") else full for name, full in whole.items()}


def config_from(config: Mapping[str, Any]) -> LanguageModel.Config:
    check_architecture(config, ARCHITECTURE)
    refuse_unless(config, _SUPPORTED)
    if "model_type" in config:
        config = _HUB_DEFAULTS | dict(config)
    d_model, n_blocks = size(config, "hidden_size", 4096), size(config, "num_layers", 32)
    attention_at = setting(config, "attn_layer_idxs", list, [])
    hyena_at = setting(config, "hyena_layer_idxs", list, [])
    for i in range(n_blocks):
        if i not in attention_at + hyena_at:
            raise UsageError(f"config.json: layer {i} of {n_blocks} is in neither attn_layer_idxs nor hyena_layer_idxs")
    attention = _attention_from(config, d_model) if attention_at else None
    hyena, mlp = _hyena_from(config), _mlp_from(config, d_model)
    layers = (layer for i in range(n_blocks) for layer in (attention if i in attention_at else hyena, mlp))
    fused = setting(config, "use_flash_rmsnorm", bool, False)  # that kernel has eps within the root
    return LanguageModel.Config(
        vocab_size=size(config, "vocab_size", 32000),
        d_model=d_model,
        layers=tuple(layers),
        norm="rms" if fused else "rms_outer_eps",
        norm_eps=setting(config, "eps", float, 1e-5),
        tie_embeddings=setting(config, "tie_embeddings", bool, False),
    )


def _hyena_from(config: Mapping[str, Any]) -> HyenaModal.Config:
    by_head = setting(config, "column_split_hyena", bool, True)
    return HyenaModal.Config(
        n_heads=size(config, "num_attention_heads", 32) if by_head else 1,
        d_state=size(config, "state_size", 2),
        d_conv=size(config, "short_filter_length", 3),
        conv_bias=setting(config, "short_filter_bias", bool, True),
    )


def _attention_from(config: Mapping[str, Any], d_model: int) -> Attention.Config:
    n_heads, n_groups = size(config, "num_attention_heads", 32), size(config, "proj_groups", 1)
    if n_heads % n_groups or d_model % n_heads:
        raise UsageError(
            f"config.json: proj_groups {n_groups} must divide num_attention_heads {n_heads}, "
            f"and that must divide hidden_size {d_model}"
        )
    if n_groups > 1 and setting(config, "column_split", bool, False):
        refuse("column_split", True, "False where proj_groups is above 1")
    stretched = setting(config, "use_interpolated_rotary_pos_emb", bool, False)
    return Attention.Config(
        n_heads=n_heads,
        n_kv_heads=n_heads // n_groups,
        d_head=d_model // n_heads,
        rotary_base=setting(config, "rotary_emb_base", float, 10_000.0),
        rotary_scaling=setting(config, "rotary_emb_scaling_factor", float, 1.0) if stretched else 1.0,
        qkv_bias=setting(config, "qkv_proj_bias", bool, True),
        out_bias=setting(config, "mha_out_proj_bias", bool, True),
    )


def _mlp_from(config: Mapping[str, Any], d_model: int) -> SwiGLU.Config:
    multiple = size(config, "inner_size_multiple_of", 64) * size(config, "model_parallel_size", 1)
    usual = -(-(8 * d_model // 3) // multiple) * multiple
    activation: Any = setting(config, "mlp_activation", str, "silu")
    return SwiGLU.Config(d_inner=size(config, "inner_mlp_size", usual), activation=activation)


def config_to(model: LanguageModel.Config) -> dict[str, Any]:
    hold(MODEL_TYPE, model, "vocab_size d_model layers norm norm_eps tie_embeddings")
    if model.norm == "layer":
        inexpressible(MODEL_TYPE, "norm='rms' or 'rms_outer_eps'", "norm='layer'")
    pairs = hybrid.pairs(model, MODEL_TYPE)
    hyena, attention = hybrid.one_of_each(
        [mixer for mixer, _ in pairs], (HyenaModal.Config, Attention.Config), MODEL_TYPE
    )
    (mlp,) = hybrid.one_of_each([mlp for _, mlp in pairs], (SwiGLU.Config,), MODEL_TYPE)
    hold(MODEL_TYPE, mlp, "d_inner activation")
    return {
        "model_type": MODEL_TYPE,
        "architectures": [ARCHITECTURE],
        "vocab_size": model.vocab_size,
        "hidden_size": model.d_model,
        "num_filters": model.d_model,
        "inner_mlp_size": mlp.width(model.d_model),
        "mlp_activation": mlp.activation,
        "num_layers": len(pairs),
        "attn_layer_idxs": [i for i, (mixer, _) in enumerate(pairs) if mixer == attention],
        "hyena_layer_idxs": [i for i, (mixer, _) in enumerate(pairs) if mixer == hyena],
        "hyena_filter_groups": 1,
        "eps": model.norm_eps,
        "use_flash_rmsnorm": model.norm == "rms",
        "tie_embeddings": model.tie_embeddings,
        "final_norm": True,
        "model_parallel_size": 1,
        "max_seqlen": 32768,
        **_mixers_to(model, hyena, attention),
    }


def _mixers_to(
    model: LanguageModel.Config, hyena: HyenaModal.Config | None, attention: Attention.Config | None
) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    if hyena is not None:
        settings |= {
            "num_attention_heads": hyena.n_heads,
            "column_split_hyena": True,
            "state_size": hyena.d_state,
            "short_filter_length": hyena.d_conv,
            "short_filter_bias": hyena.conv_bias,
        }
    if attention is None:
        return settings
    hold(MODEL_TYPE, attention, "n_heads n_kv_heads d_head rotary_base rotary_scaling qkv_bias out_bias")
    with torch.device("meta"):
        sizes = Attention(model.d_model, attention)
    if sizes.n_heads * sizes.d_head != model.d_model:
        inexpressible(MODEL_TYPE, "heads that fill d_model", f"{sizes.n_heads} heads of {sizes.d_head}")
    if hyena is not None and hyena.n_heads not in (1, sizes.n_heads):
        inexpressible(MODEL_TYPE, "one n_heads", f"{hyena.n_heads} in hyena_modal, {sizes.n_heads} in attention")
    return settings | {
        "num_attention_heads": sizes.n_heads,
        "column_split_hyena": hyena is not None and hyena.n_heads == sizes.n_heads,
        "proj_groups": sizes.n_heads // sizes.n_kv_heads,
        "rotary_emb_base": attention.rotary_base,
        "use_interpolated_rotary_pos_emb": attention.rotary_scaling != 1,
        "rotary_emb_scaling_factor": attention.rotary_scaling,
        "qkv_proj_bias": attention.qkv_bias,
        "mha_out_proj_bias": attention.out_bias,
    }


def rename(model: LanguageModel.Config) -> Rename:
    names = {"embedding": "embedding_layer", "norm_f.weight": "norm.scale", "lm_head": "unembed"}
    for slot, layer in enumerate(model.layers):
        ours, block = f"layers.{slot}", f"blocks.{slot // 2}"
        names[f"{ours}.norm.weight"] = f"{block}.post_norm.scale" if slot % 2 else f"{block}.pre_norm.scale"
        names |= {f"{ours}.mixer{a}": f"{block}{b}" for a, b in _inside(layer).items()}
    return {ours: PREFIX + theirs for ours, theirs in names.items()}


def _inside(layer: Any) -> dict[str, str]:
    """Names within a layer. Queries, keys and values are one tensor there; a Hyena block's tensors lie in the block."""
    if isinstance(layer, SwiGLU.Config):
        return {".gate_proj": ".mlp.l1", ".up_proj": ".mlp.l2", ".down_proj": ".mlp.l3"}
    if isinstance(layer, Attention.Config):
        qkv = dict.fromkeys((".q_proj", ".k_proj", ".v_proj"), ".inner_mha_cls.Wqkv")
        return qkv | {".o_proj": ".inner_mha_cls.out_proj"}
    return {"": ""}

"""The format of the state-spaces repositories: Mamba, Mamba-2 and Mamba-3, hybrids with attention, Transformers.

A block is a mixer and, with d_intermediate, a gated MLP: one or two of longwave's residual slots. The blocks named by
attn_layer_idx have attention as their mixer.

Mamba-3's decay has had two activations in the published code, and its configs do not say which. A key of ours in
ssm_cfg, A_activation, does: "heavy_tail", the newer one, unless it says "softplus". The published code ignores it.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from longwave.hub.settings import (
    expansion,
    hold,
    inexpressible,
    limits,
    refuse,
    refuse_unknown,
    refuse_unless,
    setting,
    size,
)
from longwave.mixers.attention import Attention
from longwave.mixers.channel import SwiGLU
from longwave.mixers.mamba import Mamba
from longwave.mixers.mamba2 import Mamba2
from longwave.mixers.mamba3 import ACTIVATIONS, Mamba3
from longwave.models.language_model import LanguageModel

WEIGHTS = "pytorch_model.bin"
ALIASES: dict[str, str] = {}

NORM_EPS = 1e-5  # the format has no word for it
MLP_MULTIPLE = 128  # its gated MLP rounds d_intermediate up to a multiple of this
FAMILY = "state_spaces"

OPTIONS = (
    "d_model d_intermediate n_layer vocab_size ssm_cfg attn_layer_idx attn_cfg rms_norm residual_in_fp32 "
    "fused_add_norm pad_vocab_size_multiple tie_embeddings"
)
MAMBA_OPTIONS = (
    "layer d_state d_conv expand dt_rank dt_min dt_max dt_init dt_scale dt_init_floor conv_bias bias use_fast_path"
)
MAMBA2_OPTIONS = (
    "layer d_state d_conv conv_init expand headdim d_ssm ngroups A_init_range D_has_hdim rmsnorm norm_before_gate "
    "dt_min dt_max dt_init_floor dt_limit bias conv_bias chunk_size use_mem_eff_path"
)
MAMBA3_OPTIONS = (
    "layer d_state expand headdim ngroups rope_fraction dt_min dt_max dt_init_floor A_floor A_activation "
    "is_outproj_norm is_mimo mimo_rank fuse_pregate_headwise_norm chunk_size dropout"
)
ROPE_FRACTIONS = (0.5, 1.0)
MAMBA3_FIELDS = "d_state expand d_inner d_head n_groups mimo_rank rope_fraction A_activation A_floor norm"
MAMBA2_FIELDS = "d_state d_conv expand d_inner d_head n_groups dt_limit D_per_channel norm_before_gate bias conv_bias"
ATTENTION_OPTIONS = (
    "num_heads num_heads_kv head_dim mlp_dim qkv_proj_bias out_proj_bias softmax_scale causal d_conv rotary_emb_dim "
    "rotary_emb_base rotary_emb_interleaved"
)


def matches(config: Mapping[str, Any]) -> bool:
    return {"d_model", "n_layer"} <= set(config) and not {"model_type", "d_inner", "layer"} & set(config)


def config_from(config: Mapping[str, Any]) -> LanguageModel.Config:
    refuse_unknown(config, OPTIONS, FAMILY)
    d_model, n_blocks = size(config, "d_model", 2560), size(config, "n_layer", 64)
    attention_at = setting(config, "attn_layer_idx", list, [])
    ssm = ssm_from(setting(config, "ssm_cfg", dict, {}), d_model)
    attention = attention_from(setting(config, "attn_cfg", dict, {}), d_model) if attention_at else None
    d_mlp = setting(config, "d_intermediate", int, 0)
    mlp = (SwiGLU.Config(d_inner=_up(d_mlp, MLP_MULTIPLE)),) if d_mlp else ()
    blocks = ((attention if i in attention_at else ssm, *mlp) for i in range(n_blocks))
    return LanguageModel.Config(
        vocab_size=_up(size(config, "vocab_size", 50277), size(config, "pad_vocab_size_multiple", 8)),
        d_model=d_model,
        layers=tuple(layer for block in blocks for layer in block),
        norm="rms" if setting(config, "rms_norm", bool, True) else "layer",
        norm_eps=NORM_EPS,
        tie_embeddings=setting(config, "tie_embeddings", bool, True),
        residual_fp32=setting(config, "residual_in_fp32", bool, True),
    )


def config_to(model: LanguageModel.Config) -> dict[str, Any]:
    hold(FAMILY, model, "vocab_size d_model layers norm tie_embeddings residual_fp32")
    if model.norm not in ("rms", "layer"):
        inexpressible(FAMILY, "norm='rms' or 'layer'", f"norm={model.norm!r}")
    mixers, d_mlp = _blocks(model)
    attention = {layer for layer in mixers if isinstance(layer, Attention.Config)}
    ssm = set(mixers) - attention
    for kinds in (attention, ssm):
        if len(kinds) > 1:
            inexpressible(FAMILY, "SSM layers all alike and attention layers all alike", " and ".join(map(str, kinds)))
    return {
        "d_model": model.d_model,
        "d_intermediate": d_mlp,
        "n_layer": len(mixers),
        "vocab_size": model.vocab_size,
        "ssm_cfg": ssm_to(ssm.pop(), model.d_model) if ssm else {},
        "attn_layer_idx": [i for i, layer in enumerate(mixers) if layer in attention],
        "attn_cfg": attention_to(attention.copy().pop(), model.d_model) if attention else {},
        "rms_norm": model.norm == "rms",
        "residual_in_fp32": model.residual_fp32,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": math.gcd(model.vocab_size, 8),
        "tie_embeddings": model.tie_embeddings,
    }


def rename(model: LanguageModel.Config) -> dict[str, str]:
    names = {"embedding": "backbone.embedding"}
    block = -1
    for slot, layer in enumerate(model.layers):
        mlp = isinstance(layer, SwiGLU.Config)
        block += not mlp
        ours, theirs = f"layers.{slot}", f"backbone.layers.{block}"
        names[f"{ours}.norm"] = f"{theirs}.norm2" if mlp else f"{theirs}.norm"
        names |= {f"{ours}.mixer{a}": f"{theirs}.{b}" for a, b in _inside(layer).items()}
    return names | {"norm_f": "backbone.norm_f", "lm_head": "lm_head"}


def _inside(layer: Any) -> dict[str, str]:
    """Names within a layer. Queries, keys and values are one tensor there, and so are the halves of a gated MLP."""
    if isinstance(layer, SwiGLU.Config):
        return {".up_proj": "mlp.fc1", ".gate_proj": "mlp.fc1", ".down_proj": "mlp.fc2"}
    if isinstance(layer, Attention.Config):
        qkv = dict.fromkeys((".q_proj", ".k_proj", ".v_proj"), "mixer.in_proj")
        return qkv | {".o_proj": "mixer.out_proj"}
    return {"": "mixer"}


def _blocks(model: LanguageModel.Config) -> tuple[Sequence[Any], int]:
    """The mixer of each block, and the width of their MLPs, 0 for none."""
    slots = list(model.layers)
    mixers, mlps = slots, []
    if any(isinstance(layer, SwiGLU.Config) for layer in slots):
        mixers, mlps = slots[::2], slots[1::2]
    for layer in mixers:
        if not isinstance(layer, (Mamba.Config, Mamba2.Config, Mamba3.Config, Attention.Config)):
            inexpressible(FAMILY, "mamba, mamba2, mamba3 or attention, each followed by a swiglu or none", layer)
    if not mlps:
        return mixers, 0
    for layer in mlps:
        if layer != mlps[0] or not isinstance(layer, SwiGLU.Config) or layer.bias or len(mlps) != len(mixers):
            inexpressible(FAMILY, "a swiglu without bias after every mixer, all alike", layer)
    hold(FAMILY, mlps[0], "d_inner")
    d_mlp = mlps[0].width(model.d_model)
    if d_mlp % MLP_MULTIPLE:
        inexpressible(FAMILY, f"MLPs of a multiple of {MLP_MULTIPLE} channels", d_mlp)
    return mixers, d_mlp


def ssm_from(ssm: Mapping[str, Any], d_model: int) -> Mamba.Config | Mamba2.Config | Mamba3.Config:
    layer = setting(ssm, "layer", str, "Mamba1")
    if layer not in ("Mamba1", "Mamba2", "Mamba3"):
        refuse("ssm_cfg layer", layer, "'Mamba1', 'Mamba2' and 'Mamba3'")
    shared = {
        "expand": size(ssm, "expand", 2),
        "dt_min": setting(ssm, "dt_min", float, 1e-3),
        "dt_max": setting(ssm, "dt_max", float, 1e-1),
        "dt_init_floor": setting(ssm, "dt_init_floor", float, 1e-4),
    }
    if layer == "Mamba3":
        return _mamba3_from(ssm, shared)
    shared |= {
        "d_conv": size(ssm, "d_conv", 4),
        "bias": setting(ssm, "bias", bool, False),
        "conv_bias": setting(ssm, "conv_bias", bool, True),
    }
    if layer == "Mamba1":
        refuse_unknown(ssm, MAMBA_OPTIONS, "ssm_cfg of Mamba1")
        automatic = ssm.get("dt_rank") in (None, "auto")
        rank = "auto" if automatic else size(ssm, "dt_rank", 1)
        return Mamba.Config(**shared, d_state=size(ssm, "d_state", 16), dt_rank=rank)
    refuse_unknown(ssm, MAMBA2_OPTIONS, "ssm_cfg of Mamba2")
    refuse_unless(ssm, {"rmsnorm": (True,), "d_ssm": (None, shared["expand"] * d_model)}, "ssm_cfg ")
    return Mamba2.Config(
        **shared,
        d_state=size(ssm, "d_state", 128),
        d_head=size(ssm, "headdim", 64),
        n_groups=size(ssm, "ngroups", 1),
        dt_limit=limits(ssm, "dt_limit"),
        D_per_channel=setting(ssm, "D_has_hdim", bool, False),
        norm_before_gate=setting(ssm, "norm_before_gate", bool, False),
        norm_eps=NORM_EPS,
    )


def _mamba3_from(ssm: Mapping[str, Any], shared: Mapping[str, Any]) -> Mamba3.Config:
    refuse_unknown(ssm, MAMBA3_OPTIONS, "ssm_cfg of Mamba3")
    refuse_unless(ssm, {"rope_fraction": ROPE_FRACTIONS, "A_activation": ACTIVATIONS}, "ssm_cfg ")
    return Mamba3.Config(
        **shared,
        d_state=size(ssm, "d_state", 128),
        d_head=size(ssm, "headdim", 64),
        n_groups=size(ssm, "ngroups", 1),
        mimo_rank=size(ssm, "mimo_rank", 4) if setting(ssm, "is_mimo", bool, False) else None,
        rope_fraction=setting(ssm, "rope_fraction", float, 0.5),
        A_activation=ssm.get("A_activation", "heavy_tail"),
        A_floor=setting(ssm, "A_floor", float, 1e-4),
        norm=setting(ssm, "is_outproj_norm", bool, False),
        norm_eps=NORM_EPS,
    )


def _mamba3_to(mixer: Mamba3.Config) -> dict[str, Any]:
    if mixer.rope_fraction not in ROPE_FRACTIONS:
        inexpressible(FAMILY, "rope_fraction=0.5 or 1.0", f"rope_fraction={mixer.rope_fraction}")
    hold(FAMILY, mixer, MAMBA3_FIELDS)
    rank = mixer.mimo_rank or 1
    return {
        "d_state": mixer.d_state,
        "headdim": mixer.d_head,
        "ngroups": mixer.n_groups,
        "is_mimo": mixer.mimo_rank is not None,
        "mimo_rank": rank,
        "rope_fraction": mixer.rope_fraction,
        "A_activation": mixer.A_activation,
        "A_floor": mixer.A_floor,
        "is_outproj_norm": mixer.norm,
        "chunk_size": max(1, 64 // rank),  # what its authors recommend
    }


def ssm_to(mixer: Mamba.Config | Mamba2.Config | Mamba3.Config, d_model: int) -> dict[str, Any]:
    shared = {
        "expand": expansion(FAMILY, mixer, d_model),
        "dt_min": mixer.dt_min,
        "dt_max": mixer.dt_max,
        "dt_init_floor": mixer.dt_init_floor,
    }
    if isinstance(mixer, Mamba3.Config):
        return {"layer": "Mamba3", **shared} | _mamba3_to(mixer)
    shared |= {
        "d_state": mixer.d_state,
        "d_conv": mixer.d_conv,
        "bias": mixer.bias,
        "conv_bias": mixer.conv_bias,
    }
    if isinstance(mixer, Mamba.Config):
        if mixer.inner_norm is not None:
            inexpressible(FAMILY, "no inner norms", f"inner_norm={mixer.inner_norm!r}")
        return {"layer": "Mamba1", **shared, "dt_rank": mixer.dt_rank}
    hold(FAMILY, mixer, MAMBA2_FIELDS)
    return {
        "layer": "Mamba2",
        **shared,
        "headdim": mixer.d_head,
        "ngroups": mixer.n_groups,
        "dt_limit": list(mixer.dt_limit),
        "D_has_hdim": mixer.D_per_channel,
        "norm_before_gate": mixer.norm_before_gate,
    }


def attention_from(attn: Mapping[str, Any], d_model: int) -> Attention.Config:
    refuse_unknown(attn, ATTENTION_OPTIONS, "attn_cfg")
    # `causal` is false by default there.
    alike = {"mlp_dim": (0,), "d_conv": (0, None), "rotary_emb_interleaved": (False,)}
    refuse_unless({"causal": False} | dict(attn), {"causal": (True,), **alike}, "attn_cfg ")
    n_heads = size(attn, "num_heads", 0)
    d_head = size(attn, "head_dim", d_model // n_heads)
    return Attention.Config(
        n_heads=n_heads,
        n_kv_heads=size(attn, "num_heads_kv", n_heads),
        d_head=d_head,
        rotary=_share(setting(attn, "rotary_emb_dim", int, 0), d_head),
        rotary_base=setting(attn, "rotary_emb_base", float, 10_000.0),
        scale=setting(attn, "softmax_scale", float, 0.0) or None,
        qkv_bias=setting(attn, "qkv_proj_bias", bool, True),
        out_bias=setting(attn, "out_proj_bias", bool, True),
    )


def attention_to(config: Attention.Config, d_model: int) -> dict[str, Any]:
    hold(FAMILY, config, "n_heads n_kv_heads d_head rotary rotary_base scale qkv_bias out_bias")
    with torch.device("meta"):
        sizes = Attention(d_model, config)
    return {
        "causal": True,
        "num_heads": sizes.n_heads,
        "num_heads_kv": sizes.n_kv_heads,
        "head_dim": sizes.d_head,
        "rotary_emb_dim": sizes.d_rotary,
        "rotary_emb_base": config.rotary_base,
        "softmax_scale": config.scale,
        "qkv_proj_bias": config.qkv_bias,
        "out_proj_bias": config.out_bias,
    }


def _share(dimensions: int, d_head: int) -> float:
    """The share that Attention multiplies by d_head and cuts to an integer, so never a rounding error too low."""
    share = dimensions / d_head
    return share if int(d_head * share) == dimensions else math.nextafter(share, 1.0)


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple

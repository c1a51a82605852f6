"""transformers' `zamba2`: Mamba-2 layers, some of which call on one of a few shared Transformers, adapted to them."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from longwave.errors import UsageError
from longwave.hub.hybrid import ALIASES, WEIGHTS, least_dt
from longwave.hub.settings import (
    TRANSFORMERS,
    check_architecture,
    expansion,
    hold,
    inexpressible,
    refuse,
    refuse_unless,
    rotary_base,
    setting,
    size,
)
from longwave.mixers.attention import Attention
from longwave.mixers.mamba2 import Mamba2
from longwave.mixers.shared import Shared
from longwave.models.language_model import LanguageModel

__all__ = ["ALIASES", "WEIGHTS", "config_from", "config_to", "matches", "rename"]

MODEL_TYPE, ARCHITECTURE = "zamba2", "Zamba2ForCausalLM"

SSM_NORM_EPS = 1e-5  # in its mixers, whatever rms_norm_eps says
NAMES = {"linear_attention": "M", "mamba": "M", "hybrid": "H"}  # the second as older folders have it
USUAL = "M" + 7 * "MMMMMH" + "MMMMH" + "MMMH" + "MM"

_SUPPORTED = TRANSFORMERS | {
    "hidden_act": ("gelu",),
    "use_conv_bias": (True,),
    "use_long_context": (False, None),
    "tie_word_embeddings": (True,),  # transformers shares nothing at all where this is false
}


def matches(config: Mapping[str, Any]) -> bool:
    return config.get("model_type") == MODEL_TYPE


def config_from(config: Mapping[str, Any]) -> LanguageModel.Config:
    check_architecture(config, ARCHITECTURE)
    refuse_unless(config, _SUPPORTED)
    d_model, n_blocks = size(config, "hidden_size", 2560), size(config, "num_mem_blocks", 1)
    ssm, calls = _ssm_from(config, d_model), 0
    layers: list[Any] = []
    for letter in _pattern(config):
        layers.append(ssm if letter == "M" else _shared_from(config, d_model, ssm, calls % n_blocks))
        calls += letter == "H"
    return LanguageModel.Config(
        vocab_size=size(config, "vocab_size", 32000),
        d_model=d_model,
        layers=tuple(layers),
        norm_eps=setting(config, "rms_norm_eps", float, 1e-5),
        tie_embeddings=True,
    )


def config_to(model: LanguageModel.Config) -> dict[str, Any]:
    hold(MODEL_TYPE, model, "vocab_size d_model layers norm_eps")
    shared = [layer for layer in model.layers if isinstance(layer, Shared.Config)]
    ssm = {layer.mixer if isinstance(layer, Shared.Config) else layer for layer in model.layers}
    if len(ssm) > 1 or not isinstance(next(iter(ssm)), Mamba2.Config):
        inexpressible(MODEL_TYPE, "mamba2 in every layer, all alike", " and ".join(map(str, ssm)))
    n_blocks = len({layer.index for layer in shared})
    if [layer.index for layer in shared] != [i % max(n_blocks, 1) for i in range(len(shared))]:
        inexpressible(MODEL_TYPE, "shared layers whose index goes round", f"{[layer.index for layer in shared]}")
    if len({replace(layer, index=0) for layer in shared}) > 1:
        inexpressible(MODEL_TYPE, "shared layers all alike", " and ".join(map(str, set(shared))))
    written = _ssm_to(model, ssm.pop())
    if shared:
        bias = written["add_bias_linear"]
        if shared[0].bias != bias:
            inexpressible(MODEL_TYPE, "one bias for mamba2 and shared", f"{bias} and {shared[0].bias}")
        written |= _shared_to(model, shared[0])
    return {
        "model_type": MODEL_TYPE,
        "architectures": [ARCHITECTURE],
        "vocab_size": model.vocab_size,
        "hidden_size": model.d_model,
        "num_hidden_layers": len(model.layers),
        "layers_block_type": ["hybrid" if layer in shared else "linear_attention" for layer in model.layers],
        "num_mem_blocks": max(n_blocks, 1),
        "rms_norm_eps": model.norm_eps,
        "tie_word_embeddings": True,
        "hidden_act": "gelu",
        **written,
    }


def rename(model: LanguageModel.Config) -> dict[str, str]:
    names = {"embedding": "model.embed_tokens", "norm_f": "model.final_layernorm", "lm_head": "lm_head"}
    first: dict[int, int] = {}
    calls = 0
    for i, layer in enumerate(model.layers):
        ours, theirs = f"layers.{i}", f"model.layers.{i}"
        if not isinstance(layer, Shared.Config):
            names |= {f"{ours}.norm": f"{theirs}.input_layernorm", f"{ours}.mixer": f"{theirs}.mamba"}
            continue
        decoder = f"{theirs}.mamba_decoder"
        names |= {f"{ours}.norm": f"{decoder}.input_layernorm", f"{ours}.mixer": f"{decoder}.mamba"}
        names[f"{ours}.transformer.linear"] = f"{theirs}.linear"
        owner = f"model.layers.{first.setdefault(layer.index, i)}.shared_transformer"
        names |= {f"{ours}.transformer.{a}": f"{owner}.{b}" for a, b in _inside(calls).items()}
        calls += 1
    return names


def _inside(call: int) -> dict[str, str]:
    """Names within a shared Transformer, as the layer has them that is number `call` to call on any of them."""
    attention, mlp = "self_attn", "feed_forward"
    names = {
        "norm": "input_layernorm",
        "attention.o_proj": f"{attention}.o_proj",
        "norm_mlp": "pre_ff_layernorm",
        "down_proj": f"{mlp}.down_proj",
    }
    adapted = {f"attention.{x}_proj": (f"{attention}.{x}_proj", f"{attention}.linear_{x}_adapter_list") for x in "qkv"}
    adapted["gate_up_proj"] = f"{mlp}.gate_up_proj", f"{mlp}.gate_up_proj_adapter_list"
    for ours, (base, adapters) in adapted.items():
        names |= {
            f"{ours}.base": base,
            f"{ours}.down": f"{adapters}.{call}.0",
            f"{ours}.up": f"{adapters}.{call}.1",
        }
    return names


def _pattern(config: Mapping[str, Any]) -> str:
    """A letter for each layer: M, Mamba-2 alone, or H, Mamba-2 with what a shared Transformer says."""
    names = setting(config, "layers_block_type", list, [])
    for name in names:
        if name not in NAMES:
            refuse("a layer of type", name, ", ".join(NAMES))
    return "".join(NAMES[name] for name in names) or USUAL


def _ssm_from(config: Mapping[str, Any], d_model: int) -> Mamba2.Config:
    """transformers clamps dt to time_step_min in its full forward."""
    expand, n_heads = size(config, "mamba_expand", 2), size(config, "n_mamba_heads", 8)
    if expand * d_model % n_heads:
        raise UsageError(
            f"config.json: n_mamba_heads {n_heads} must divide mamba_expand {expand} times hidden_size {d_model}"
        )
    dt_min, bias = setting(config, "time_step_min", float, 1e-3), setting(config, "add_bias_linear", bool, False)
    return Mamba2.Config(
        d_state=size(config, "mamba_d_state", 64),
        d_conv=size(config, "mamba_d_conv", 4),
        expand=expand,
        d_head=expand * d_model // n_heads,
        n_groups=size(config, "mamba_ngroups", 1),
        dt_min=dt_min,
        dt_max=setting(config, "time_step_max", float, 1e-1),
        dt_init_floor=setting(config, "time_step_floor", float, 1e-4),
        dt_limit=(dt_min, math.inf),
        norm_eps=SSM_NORM_EPS,
        bias=bias,
    )


def _ssm_to(model: LanguageModel.Config, mixer: Mamba2.Config) -> dict[str, Any]:
    hold(MODEL_TYPE, mixer, "d_state d_conv expand d_inner d_head n_groups dt_limit norm_eps bias")
    expand = expansion(MODEL_TYPE, mixer, model.d_model)
    if mixer.norm_eps != SSM_NORM_EPS:
        inexpressible(MODEL_TYPE, f"norm_eps={SSM_NORM_EPS} in its mixers", f"norm_eps={mixer.norm_eps}")
    return {
        "mamba_d_state": mixer.d_state,
        "mamba_d_conv": mixer.d_conv,
        "mamba_expand": expand,
        "n_mamba_heads": expand * model.d_model // mixer.d_head,
        "mamba_ngroups": mixer.n_groups,
        "time_step_min": least_dt(mixer, MODEL_TYPE),
        "time_step_max": mixer.dt_max,
        "time_step_floor": mixer.dt_init_floor,
        "add_bias_linear": mixer.bias,
    }


def _shared_from(config: Mapping[str, Any], d_model: int, ssm: Mamba2.Config, index: int) -> Shared.Config:
    n_heads = size(config, "num_attention_heads", 32)
    if 2 * d_model % n_heads:
        raise UsageError(f"config.json: num_attention_heads {n_heads} must divide twice hidden_size {d_model}")
    d_head = 2 * d_model // n_heads
    attention = Attention.Config(
        n_heads=n_heads,
        n_kv_heads=size(config, "num_key_value_heads", n_heads),
        d_head=d_head,
        rotary=1.0 if setting(config, "use_mem_rope", bool, False) else 0.0,
        rotary_base=rotary_base(config),
        scale=(d_head / 2) ** -0.5,
    )
    return Shared.Config(
        mixer=ssm,
        index=index,
        attention=attention,
        d_inner=size(config, "intermediate_size", 4 * d_model),
        rank=size(config, "adapter_rank", 128),
        attention_adapters=setting(config, "use_shared_attention_adapter", bool, False),
        bias=ssm.bias,
    )


def _shared_to(model: LanguageModel.Config, shared: Shared.Config) -> dict[str, Any]:
    attention = shared.attention
    hold(MODEL_TYPE, attention, "n_heads n_kv_heads d_head rotary rotary_base scale")
    with torch.device("meta"):
        sizes = Attention(2 * model.d_model, attention)
    scale = (sizes.d_head / 2) ** -0.5
    if sizes.n_heads * sizes.d_head != 2 * model.d_model or attention.scale != scale or attention.rotary not in (0, 1):
        inexpressible(MODEL_TYPE, f"attention of 2 d_model channels, scale={scale} and rotary 0 or 1", attention)
    if shared.rank is None:
        inexpressible(MODEL_TYPE, "an adapter in every shared layer", "rank=None")
    return {
        "num_attention_heads": sizes.n_heads,
        "num_key_value_heads": sizes.n_kv_heads,
        "use_mem_rope": attention.rotary == 1,
        "rope_parameters": {"rope_type": "default", "rope_theta": attention.rotary_base},
        "intermediate_size": shared.d_inner or 4 * model.d_model,
        "adapter_rank": shared.rank,
        "use_shared_attention_adapter": shared.attention_adapters,
    }

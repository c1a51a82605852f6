"""What transformers' hybrids share: layers of a mixer and a feed-forward block, in the keys of Bamba and its heirs.

A layer is two of longwave's residual slots, with `input_layernorm` and `pre_ff_layernorm`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from longwave.errors import UsageError
from longwave.hub.keys import Layout
from longwave.hub.settings import TRANSFORMERS, hold, inexpressible, limits, one_norm_eps, rotary_base, setting, size
from longwave.mixers.attention import Attention
from longwave.mixers.mamba2 import Mamba2
from longwave.models.language_model import LanguageModel

WEIGHTS = "model.safetensors"
ALIASES: dict[str, str] = {}

OUTER = "vocab_size d_model layers norm_eps tie_embeddings"
"""What every one of them says of the model around its layers."""

SUPPORTED = TRANSFORMERS | {"hidden_act": ("silu", "swish")}


def outer_to(model: LanguageModel.Config, model_type: str, architecture: str) -> dict[str, Any]:
    """What the families with gated MLPs say of the model around its layers."""
    return {
        "model_type": model_type,
        "architectures": [architecture],
        "vocab_size": model.vocab_size,
        "hidden_size": model.d_model,
        "num_hidden_layers": len(model.layers) // 2,
        "rms_norm_eps": model.norm_eps,
        "tie_word_embeddings": model.tie_embeddings,
        "hidden_act": "silu",
    }


def pairs(model: LanguageModel.Config, family: str) -> list[tuple[Any, Any]]:
    """(mixer, feed-forward block) of each layer."""
    if len(model.layers) % 2:
        inexpressible(family, "layers of a mixer and a feed-forward block", f"{len(model.layers)} slots")
    return list(zip(model.layers[::2], model.layers[1::2], strict=True))


def one_of_each(layers: Sequence[Any], kinds: Sequence[type], family: str) -> list[Any]:
    """The configuration that the layers of each kind have, None where there are none.

    Raises UsageError for a layer of another kind, and unless those of a kind are alike.
    """
    found: dict[type, Any] = {}
    for layer in layers:
        if type(layer) not in kinds:
            inexpressible(family, " or ".join(kind.kind for kind in kinds) + " here", layer)  # pyright: ignore
        if found.setdefault(type(layer), layer) != layer:
            inexpressible(family, f"{layer.kind} layers all alike", f"{layer} and {found[type(layer)]}")
    return [found.get(kind) for kind in kinds]


def rename(
    model: LanguageModel.Config,
    inside: Callable[[Any], Mapping[str, str]],
    norms: tuple[str, str] = ("input_layernorm", "pre_ff_layernorm"),
    last: str = "final_layernorm",
) -> dict[str, str | Layout]:
    """`inside(layer)`: {module within a slot's mixer, "" for the mixer itself: its name within the published layer}."""
    names: dict[str, str | Layout] = {
        "embedding": "model.embed_tokens",
        "norm_f": f"model.{last}",
        "lm_head": "lm_head",
    }
    for slot, layer in enumerate(model.layers):
        ours, theirs = f"layers.{slot}", f"model.layers.{slot // 2}"
        names[f"{ours}.norm"] = f"{theirs}.{norms[slot % 2]}"
        names |= {f"{ours}.mixer{a}": f"{theirs}.{b}" for a, b in inside(layer).items()}
    return names


def mamba2_from(config: Mapping[str, Any], d_inner: int, eps: float = 1e-5) -> dict[str, Any]:
    """Fields of Mamba2.Config. `eps` is the family's default."""
    n_heads = size(config, "mamba_n_heads", 128)
    automatic = config.get("mamba_d_head") in (None, "auto")
    d_head = d_inner // n_heads if automatic else size(config, "mamba_d_head", 64)
    if n_heads * d_head != d_inner:
        raise UsageError(
            f"config.json: mamba_n_heads {n_heads} times mamba_d_head {d_head} must be the inner width {d_inner}"
        )
    return {
        "d_state": size(config, "mamba_d_state", 256),
        "d_conv": size(config, "mamba_d_conv", 4),
        "expand": size(config, "mamba_expand", 2),
        "d_inner": d_inner,
        "d_head": d_head,
        "n_groups": size(config, "mamba_n_groups", 1),
        "dt_limit": limits(config, "time_step_limit"),
        "norm_eps": setting(config, "rms_norm_eps", float, eps),
        "bias": setting(config, "mamba_proj_bias", bool, False),
        "conv_bias": setting(config, "mamba_conv_bias", bool, True),
    }


def mamba2_to(model: LanguageModel.Config, mixer: Mamba2.Config, family: str, words: str = "") -> dict[str, Any]:
    """`words`: fields that the family has beside those named here."""
    d_inner = mixer.d_inner or mixer.expand * model.d_model
    hold(family, mixer, f"d_state d_conv expand d_inner d_head n_groups dt_limit norm_eps bias conv_bias {words}")
    one_norm_eps(family, model, mixer)
    return {
        "mamba_n_heads": d_inner // mixer.d_head,
        "mamba_d_head": mixer.d_head,
        "mamba_d_state": mixer.d_state,
        "mamba_d_conv": mixer.d_conv,
        "mamba_expand": mixer.expand,
        "mamba_n_groups": mixer.n_groups,
        "time_step_limit": list(mixer.dt_limit),
        "mamba_proj_bias": mixer.bias,
        "mamba_conv_bias": mixer.conv_bias,
    }


def least_dt(mixer: Mamba2.Config, family: str) -> float:
    """Of families that clamp dt to time_step_min, and above to nothing."""
    low, high = mixer.dt_limit
    if low <= 0 or high < math.inf:
        inexpressible(family, "a dt_limit from above 0 to infinity", f"dt_limit={mixer.dt_limit}")
    return low


def heads_from(
    config: Mapping[str, Any], d_model: int, n_kv_heads: int | None = 8, d_head: int | None = None
) -> dict[str, Any]:
    """The sizes in Attention.Config. `n_kv_heads` and `d_head` are the family's defaults.

    transformers takes n_kv_heads for n_heads where config.json says null, and by default where the family says None.
    """
    n_heads = size(config, "num_attention_heads", 32)
    usual = n_heads if n_kv_heads is None or "num_key_value_heads" in config else n_kv_heads
    return {
        "n_heads": n_heads,
        "n_kv_heads": size(config, "num_key_value_heads", usual),
        "d_head": size(config, "head_dim", d_head or d_model // n_heads),
    }


def heads_to(model: LanguageModel.Config, mixer: Attention.Config) -> dict[str, Any]:
    with torch.device("meta"):
        sizes = Attention(model.d_model, mixer)
    return {
        "num_attention_heads": sizes.n_heads,
        "num_key_value_heads": sizes.n_kv_heads,
        "head_dim": sizes.d_head,
    }


def attention_from(config: Mapping[str, Any], d_model: int, n_kv_heads: int | None = 8) -> dict[str, Any]:
    """Fields of Attention.Config; `n_kv_heads` as `heads_from` has it."""
    bias = setting(config, "attention_bias", bool, False)
    heads = heads_from(config, d_model, n_kv_heads)
    return heads | {"rotary_base": rotary_base(config), "qkv_bias": bias, "out_bias": bias}


def attention_to(model: LanguageModel.Config, mixer: Attention.Config, family: str, words: str = "") -> dict[str, Any]:
    """`words`: fields that the family has beside those named here."""
    hold(family, mixer, f"n_heads n_kv_heads d_head rotary_base qkv_bias out_bias {words}")
    if mixer.qkv_bias != mixer.out_bias:
        inexpressible(family, "qkv_bias and out_bias alike", f"{mixer.qkv_bias} and {mixer.out_bias}")
    return heads_to(model, mixer) | {
        "rope_parameters": {"rope_type": "default", "rope_theta": mixer.rotary_base},
        "attention_bias": mixer.qkv_bias,
    }


def unturned_to(model: LanguageModel.Config, mixer: Attention.Config, family: str) -> dict[str, Any]:
    """Of families whose attention has neither positions nor bias."""
    hold(family, mixer, "n_heads n_kv_heads d_head rotary rotary_base")
    if mixer.rotary:
        inexpressible(family, "attention of rotary=0.0", f"rotary={mixer.rotary}")
    return heads_to(model, mixer)

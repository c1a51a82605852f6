"""Hyena language models as safari and HyenaDNA have them: Hyena layers, each followed by an MLP.

A folder holds config.json, the arguments of that code's model, and weights.ckpt, a Lightning checkpoint.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from longwave.errors import LongwaveError
from longwave.hub import hybrid
from longwave.hub.keys import Layout, Rename
from longwave.hub.settings import hold, inexpressible, refuse_unknown, refuse_unless, setting, size
from longwave.mixers.channel import MLP
from longwave.mixers.hyena import Hyena
from longwave.models.language_model import LanguageModel

WEIGHTS = "weights.ckpt"
FAMILY = "hyena"
PREFIX = "model."

OPTIONS = (
    "_name_ d_model n_layer d_inner vocab_size layer attn_layer_idx attn_cfg max_position_embeddings resid_dropout "
    "embed_dropout layer_norm_epsilon initializer_cfg fused_mlp fused_dropout_add_ln residual_in_fp32 "
    "pad_vocab_size_multiple checkpoint_mixer checkpoint_mlp return_hidden_state dropout_cls"
)
LAYER_OPTIONS = (
    "_name_ d_model l_max order filter_order local_order num_heads inner_factor num_blocks fused_bias_fc outer_mixing "
    "dropout filter_dropout filter_cls post_order_ffn jit_filter short_filter_order activation "
    "return_state filter_args "
)
FILTER_OPTIONS = (
    "emb_dim w modulate shift fast_decay_pct slow_decay_pct target num_inner_mlps normalized bias seq_len order "
    "fused_fft_conv lr lr_pos_emb wd modulation_lr"
)
_SUPPORTED = {"_name_": ("lm",), "attn_layer_idx": (None, []), "max_position_embeddings": (0,)}
_LAYER_SUPPORTED = {
    "_name_": ("hyena",),
    "order": (2,),  # above 2, safari and its standalone version order the filters' channels differently
    "local_order": (3,),  # what HyenaDNA calls the width of the short filter, and never reads
    "num_heads": (1,),
    "inner_factor": (1,),
    "num_blocks": (1,),
    "outer_mixing": (False,),
    "filter_cls": ("hyena-filter",),
    "post_order_ffn": (False,),
    "activation": ("id",),
    "modulate": (True,),
    "normalized": (False,),
    "bias": (True,),
}


def matches(config: Mapping[str, Any]) -> bool:
    layer = config.get("layer")
    return (
        "model_type" not in config and isinstance(layer, dict) and ("l_max" in layer or layer.get("_name_") == FAMILY)
    )


def ALIASES(names: Collection[str]) -> dict[str, str | None]:
    """Models trained with checkpointing name the mixer and the MLP `mixer.layer` and `mlp.layer`.

    What Lightning keeps of a run's metrics is no weight.
    """
    return {name: None if "_torchmetrics." in name else _respelled(name) for name in names}


def _respelled(name: str) -> str:
    return PREFIX + re.sub(r"\.(mixer|mlp)\.layer\.", r".\1.", name.removeprefix(PREFIX))


def config_from(config: Mapping[str, Any]) -> LanguageModel.Config:
    refuse_unknown(config, OPTIONS, FAMILY)
    refuse_unless(config, _SUPPORTED)
    d_model, multiple = size(config, "d_model", 0), size(config, "pad_vocab_size_multiple", 1)
    block = (_layer_from(setting(config, "layer", dict, {})), MLP.Config(d_inner=size(config, "d_inner", 4 * d_model)))
    return LanguageModel.Config(
        vocab_size=-(-size(config, "vocab_size", 0) // multiple) * multiple,
        d_model=d_model,
        layers=block * size(config, "n_layer", 0),
        norm="layer",
        norm_eps=setting(config, "layer_norm_epsilon", float, 1e-5),
        residual_fp32=setting(config, "residual_in_fp32", bool, False),
    )


def _layer_from(layer: Mapping[str, Any]) -> Hyena.Config:
    """safari nests the options of the filter in `filter_args`. What is left out is as HyenaDNA has it."""
    nested = setting(layer, "filter_args", dict, {})
    refuse_unknown(layer, LAYER_OPTIONS + FILTER_OPTIONS, "layer")
    refuse_unknown(nested, FILTER_OPTIONS, "layer filter_args")
    layer = {name: value for name, value in nested.items() if name not in ("order", "seq_len")} | dict(layer)
    refuse_unless(layer, _LAYER_SUPPORTED, "layer ")
    return Hyena.Config(
        l_max=size(layer, "l_max", 0),
        d_conv=size(layer, "short_filter_order", 3),
        d_filter=size(layer, "filter_order", 64),
        d_position=size(layer, "emb_dim", 3),
        n_inner=setting(layer, "num_inner_mlps", int, 2),
        frequency=setting(layer, "w", float, 1.0),
        fast_decay=setting(layer, "fast_decay_pct", float, 0.3),
        slow_decay=setting(layer, "slow_decay_pct", float, 1.5),
        decay_target=setting(layer, "target", float, 1e-2),
        shift=setting(layer, "shift", float, 0.05),  # safari: 0
    )


def config_to(model: LanguageModel.Config) -> dict[str, Any]:
    hold(FAMILY, model, "vocab_size d_model layers norm norm_eps residual_fp32")
    if model.norm != "layer":
        inexpressible(FAMILY, "norm='layer'", f"norm={model.norm!r}")
    pairs = hybrid.pairs(model, FAMILY)
    (layer,) = hybrid.one_of_each([mixer for mixer, _ in pairs], (Hyena.Config,), FAMILY)
    (mlp,) = hybrid.one_of_each([mlp for _, mlp in pairs], (MLP.Config,), FAMILY)
    hold(FAMILY, mlp, "d_inner")
    hold(FAMILY, layer, "l_max d_conv d_filter d_position n_inner frequency fast_decay slow_decay decay_target shift")
    return {
        "_name_": "lm",
        "d_model": model.d_model,
        "n_layer": len(pairs),
        "d_inner": mlp.width(model.d_model),
        "vocab_size": model.vocab_size,
        "layer": {
            "_name_": FAMILY,
            "l_max": layer.l_max,
            "order": 2,
            "filter_order": layer.d_filter,
            "short_filter_order": layer.d_conv,
            "emb_dim": layer.d_position,
            "num_inner_mlps": layer.n_inner,
            "w": layer.frequency,
            "modulate": True,
            "fast_decay_pct": layer.fast_decay,
            "slow_decay_pct": layer.slow_decay,
            "target": layer.decay_target,
            "shift": layer.shift,
        },
        "layer_norm_epsilon": model.norm_eps,
        "residual_in_fp32": model.residual_fp32,
        "pad_vocab_size_multiple": 1,
    }


def rename(model: LanguageModel.Config) -> Rename:
    backbone = f"{PREFIX}backbone"
    names: dict[str, str | Layout] = {
        "embedding": f"{backbone}.embeddings.word_embeddings",
        "norm_f": f"{backbone}.ln_f",
        "lm_head": f"{PREFIX}lm_head",
    }
    for slot, layer in enumerate(model.layers):
        ours, block = f"layers.{slot}", f"{backbone}.layers.{slot // 2}"
        names[f"{ours}.norm"] = f"{block}.norm{slot % 2 + 1}"
        names[f"{ours}.mixer"] = f"{block}.{'mlp' if slot % 2 else 'mixer'}"
        if isinstance(layer, Hyena.Config):
            mlp = "mixer.filter_fn.implicit_filter"
            names[f"{ours}.{mlp}.1"] = _sines(f"{block}.{mlp}", layer.n_inner + 1)
    return names


def _sines(mlp: str, n: int) -> Layout:
    """One vector of frequencies, stored after each of the first n linear layers."""
    names = tuple(f"{mlp}.{2 * i + 1}" for i in range(n))

    def unpack(theirs: Sequence[Tensor], shapes: Sequence[torch.Size]) -> Sequence[Tensor]:
        for name, other in zip(names, theirs, strict=True):
            if not torch.equal(other, theirs[0]):
                raise LongwaveError(f"{name}.freq differs from {names[0]}.freq; the sines of a filter share one")
        return theirs[:1]

    return Layout(names, lambda ours: list(ours) * n, unpack)

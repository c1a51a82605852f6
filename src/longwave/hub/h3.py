"""H3 language models: H3 layers with attention at a few places, each followed by an MLP.

The published folders hold model.pt alone. A config.json beside it has the arguments of that code's SSMLMHeadModel; for
a model without attention the shapes of the tensors tell them.
"""

import json
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from longwave.errors import LongwaveError, UsageError
from longwave.hub import hybrid
from longwave.hub.keys import Rename
from longwave.hub.settings import hold, inexpressible, refuse, refuse_unknown, refuse_unless, setting, size
from longwave.hub.state_spaces import attention_from, attention_to
from longwave.mixers.attention import Attention
from longwave.mixers.channel import MLP
from longwave.mixers.h3 import H3
from longwave.models.language_model import LanguageModel

WEIGHTS = "model.pt"
FAMILY = "h3"

OPTIONS = (
    "d_model n_layer d_inner vocab_size ssm_cfg attn_layer_idx attn_cfg max_position_embeddings resid_dropout "
    "embed_dropout layer_norm_epsilon initializer_cfg fused_mlp fused_dropout_add_ln residual_in_fp32 "
    "pad_vocab_size_multiple"
)
SSM_OPTIONS = (
    "mode measure d_state l_max head_dim use_fast_fftconv dropout dt_min dt_max deterministic lr n_ssm verbose "
    "measure_args rank channels disc real_type bandlimit force_real"
)
_SSM_SUPPORTED = {
    "mode": ("diag",),
    "l_max": (None,),
    "n_ssm": (None,),
    "channels": (1,),
    "disc": ("bilinear", "zoh"),
    "real_type": ("exp",),
    "bandlimit": (None,),
    "force_real": (False,),
}

EMBEDDING = "backbone.embeddings.word_embeddings"


def matches(config: Mapping[str, Any]) -> bool:
    needed = {"d_model", "n_layer", "d_inner", "vocab_size"}
    return needed <= set(config) and not {"model_type", "layer"} & set(config)


def ALIASES(names: Collection[str]) -> dict[str, str | None]:
    """Older checkpoints call the backbone s4seq.encoder; with an ln_0 they number the norms from there, in one row:
    ln_0, layer 0's norm1 and norm2, layer 1's norm1, ... Training runs put 'model.' before every name."""
    found: dict[str, str | None] = {name: _respelled(name) for name in names}
    if "backbone.ln_0.weight" not in found.values():
        return found
    n_layers = _n_layers(filter(None, found.values()))
    return {name: _renumbered(new, n_layers) if new else new for name, new in found.items()}


def _respelled(name: str) -> str | None:
    name = re.sub(r"^s4seq\.encoder\.", "backbone.", name.removeprefix("model."))
    name = re.sub(r"^embedding\.", f"{EMBEDDING}.", name)
    name = re.sub(r"^backbone\.norm\.", "backbone.ln_f.", name)
    return None if name.endswith(".rotary_emb.inv_freq") else name


def _renumbered(name: str, n_layers: int) -> str:
    norm = re.fullmatch(r"backbone\.(?:ln_0|layers\.(\d+)\.norm([12]))\.(weight|bias)", name)
    if norm is None:
        return name
    layer, which, part = norm.groups()
    place = 0 if layer is None else 2 * int(layer) + int(which)
    return f"backbone.{'ln_f' if place == 2 * n_layers else f'layers.{place // 2}.norm{place % 2 + 1}'}.{part}"


def _n_layers(names: Iterable[str]) -> int:
    found = (re.match(r"backbone\.layers\.(\d+)\.", name) for name in names)
    return 1 + max((int(match[1]) for match in found if match), default=-1)


def config_of(shapes: Mapping[str, tuple[int, ...]], where: str) -> dict[str, Any]:
    """The settings of a model with these tensors, by the names of `rename`.

    Raises LongwaveError if it is no H3 model, and UsageError that names what shapes do not tell: into how many heads
    attention is cut, and whether it is rotary.
    """
    n_layers = _n_layers(shapes)
    layers = [f"backbone.layers.{i}" for i in range(n_layers)]
    h3 = next((layer for layer in layers if f"{layer}.mixer.kernel.kernel.B" in shapes), None)
    if f"{EMBEDDING}.weight" not in shapes or f"{h3}.mlp.fc1.weight" not in shapes:
        raise LongwaveError(
            f"{where} has no config.json, and {WEIGHTS} holds no H3 model, whose shapes would tell its settings; "
            "put the config.json of the model beside it"
        )
    (vocab_size, d_model), (n_heads, n_modes, *_) = shapes[f"{EMBEDDING}.weight"], shapes[f"{h3}.mixer.kernel.kernel.B"]
    config = {
        "d_model": d_model,
        "n_layer": n_layers,
        "d_inner": shapes[f"{h3}.mlp.fc1.weight"][0],
        "vocab_size": vocab_size,
        "ssm_cfg": {"mode": "diag", "measure": "diag-lin", "d_state": 2 * n_modes, "head_dim": d_model // n_heads},
        "attn_layer_idx": [i for i, layer in enumerate(layers) if f"{layer}.mixer.Wqkv.weight" in shapes],
    }
    if config["attn_layer_idx"]:
        raise UsageError(
            f"{where} has no config.json, and shapes do not tell num_heads and rotary_emb_dim of its attention. "
            "As published, num_heads is 12 (125M), 16 (355M, 1.3B) or 20 (2.7B), and rotary_emb_dim 0, but 64 in 2.7B "
            f"with 2 attention layers. Write config.json, with them for the nulls: {_to_fill_in(config)}"
        )
    return config


def _to_fill_in(config: Mapping[str, Any]) -> str:
    return json.dumps(dict(config) | {"attn_cfg": {"num_heads": None, "rotary_emb_dim": None}})


def config_from(config: Mapping[str, Any]) -> LanguageModel.Config:
    refuse_unknown(config, OPTIONS, FAMILY)
    refuse_unless(config, {"max_position_embeddings": (0,)})
    d_model, n_blocks = size(config, "d_model", 0), size(config, "n_layer", 0)
    attention_at = setting(config, "attn_layer_idx", list, [])
    ssm = _ssm_from(setting(config, "ssm_cfg", dict, {}))
    attention_settings = {"causal": True} | setting(config, "attn_cfg", dict, {})
    attention = attention_from(attention_settings, d_model) if attention_at else None
    mlp = MLP.Config(d_inner=size(config, "d_inner", 0))
    layers = (layer for i in range(n_blocks) for layer in (attention if i in attention_at else ssm, mlp))
    multiple = size(config, "pad_vocab_size_multiple", 1)
    return LanguageModel.Config(
        vocab_size=-(-size(config, "vocab_size", 0) // multiple) * multiple,
        d_model=d_model,
        layers=tuple(layers),
        norm="layer",
        norm_eps=setting(config, "layer_norm_epsilon", float, 1e-5),
        residual_fp32=setting(config, "residual_in_fp32", bool, False),
    )


def _ssm_from(ssm: Mapping[str, Any]) -> H3.Config:
    refuse_unknown(ssm, SSM_OPTIONS, "ssm_cfg")
    refuse_unless(ssm, _SSM_SUPPORTED, "ssm_cfg ")
    d_head = size(ssm, "head_dim", 1)
    if d_head > 1 and setting(ssm, "use_fast_fftconv", bool, False):
        # That kernel orders the channels of its output differently.
        refuse("ssm_cfg use_fast_fftconv", True, "False where head_dim is above 1")
    discretization: Any = setting(ssm, "disc", str, "bilinear")
    return H3.Config(
        d_state=size(ssm, "d_state", 64),
        d_head=d_head,
        dt_min=setting(ssm, "dt_min", float, 1e-3),
        dt_max=setting(ssm, "dt_max", float, 1e-1),
        discretization=discretization,
    )


def config_to(model: LanguageModel.Config) -> dict[str, Any]:
    hold(FAMILY, model, "vocab_size d_model layers norm norm_eps residual_fp32")
    if model.norm != "layer":
        inexpressible(FAMILY, "norm='layer'", f"norm={model.norm!r}")
    pairs = hybrid.pairs(model, FAMILY)
    ssm, attention = hybrid.one_of_each([mixer for mixer, _ in pairs], (H3.Config, Attention.Config), FAMILY)
    (mlp,) = hybrid.one_of_each([mlp for _, mlp in pairs], (MLP.Config,), FAMILY)
    hold(FAMILY, mlp, "d_inner")
    ssm_cfg = ssm and {
        "mode": "diag",
        "measure": "diag-lin",
        "d_state": ssm.d_state,
        "head_dim": ssm.d_head,
        "dt_min": ssm.dt_min,
        "dt_max": ssm.dt_max,
        "disc": ssm.discretization,
    }
    return {
        "d_model": model.d_model,
        "n_layer": len(pairs),
        "d_inner": mlp.width(model.d_model),
        "vocab_size": model.vocab_size,
        "ssm_cfg": ssm_cfg or {},
        "attn_layer_idx": [i for i, (mixer, _) in enumerate(pairs) if mixer == attention],
        "attn_cfg": attention_to(attention, model.d_model) if attention else {},
        "layer_norm_epsilon": model.norm_eps,
        "residual_in_fp32": model.residual_fp32,
        "pad_vocab_size_multiple": 1,
    }


def rename(model: LanguageModel.Config) -> Rename:
    names = {"embedding": EMBEDDING, "norm_f": "backbone.ln_f", "lm_head": "lm_head"}
    for slot, layer in enumerate(model.layers):
        ours, block = f"layers.{slot}", f"backbone.layers.{slot // 2}"
        names[f"{ours}.norm"] = f"{block}.norm{slot % 2 + 1}"
        names[f"{ours}.mixer"] = f"{block}.{'mlp' if slot % 2 else 'mixer'}"
        if isinstance(layer, Attention.Config):
            names |= {f"{ours}.mixer.{part}_proj": f"{block}.mixer.Wqkv" for part in "qkv"}
            names[f"{ours}.mixer.o_proj"] = f"{block}.mixer.out_proj"
    return names

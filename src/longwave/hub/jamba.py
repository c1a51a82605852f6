"""transformers' `jamba`: Mamba with learned inner norms, attention without positions now and then, MLPs and experts."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from longwave.errors import UsageError
from longwave.hub import hybrid
from longwave.hub.hybrid import ALIASES, WEIGHTS
from longwave.hub.keys import Rename
from longwave.hub.settings import check_architecture, expansion, hold, inexpressible, refuse_unless, setting, size
from longwave.mixers.attention import Attention
from longwave.mixers.channel import SwiGLU
from longwave.mixers.mamba import Mamba
from longwave.mixers.moe import MoE
from longwave.models.language_model import LanguageModel

__all__ = ["ALIASES", "WEIGHTS", "config_from", "config_to", "matches", "rename"]

MODEL_TYPE, ARCHITECTURE = "jamba", "JambaForCausalLM"

_SUPPORTED = hybrid.SUPPORTED | {"mamba_inner_layernorms": (True,), "sliding_window": (None,)}


def matches(config: Mapping[str, Any]) -> bool:
    return config.get("model_type") == MODEL_TYPE


def config_from(config: Mapping[str, Any]) -> LanguageModel.Config:
    check_architecture(config, ARCHITECTURE)
    refuse_unless(config, _SUPPORTED)
    d_model, eps = size(config, "hidden_size", 4096), setting(config, "rms_norm_eps", float, 1e-6)
    ssm, attention = _ssm_from(config, eps), Attention.Config(**hybrid.heads_from(config, d_model), rotary=0.0)
    mlp = SwiGLU.Config(d_inner=size(config, "intermediate_size", 14336))
    n_experts = size(config, "num_experts", 16)
    top_k = size(config, "num_experts_per_tok", 2)
    moe = MoE.Config(n_experts=n_experts, top_k=top_k, expert=mlp, router="softmax_topk") if n_experts > 1 else mlp
    n_layers = size(config, "num_hidden_layers", 32)
    with_attention, with_experts = _chosen(config, "attn_layer", 8, 4), _chosen(config, "expert_layer", 2, 1)
    layers = ((attention if with_attention(i) else ssm, moe if with_experts(i) else mlp) for i in range(n_layers))
    return LanguageModel.Config(
        vocab_size=size(config, "vocab_size", 65536),
        d_model=d_model,
        layers=tuple(slot for layer in layers for slot in layer),
        norm_eps=eps,
        tie_embeddings=setting(config, "tie_word_embeddings", bool, False),
    )


def config_to(model: LanguageModel.Config) -> dict[str, Any]:
    hold(MODEL_TYPE, model, hybrid.OUTER)
    mixers, channels = zip(*hybrid.pairs(model, MODEL_TYPE), strict=True)
    ssm, attention = hybrid.one_of_each(mixers, (Mamba.Config, Attention.Config), MODEL_TYPE)
    mlp, moe = hybrid.one_of_each(channels, (SwiGLU.Config, MoE.Config), MODEL_TYPE)
    return {
        **hybrid.outer_to(model, MODEL_TYPE, ARCHITECTURE),
        **_period("attn_layer", [mixer == attention for mixer in mixers]),
        **_period("expert_layer", [channel == moe for channel in channels]),
        **_ssm_to(model, ssm or Mamba.Config(inner_norm="learned", inner_norm_eps=model.norm_eps)),
        **hybrid.unturned_to(model, attention or Attention.Config(n_heads=1, rotary=0.0), MODEL_TYPE),
        **_channels_to(model, mlp, moe),
    }


def rename(model: LanguageModel.Config) -> Rename:
    return hybrid.rename(model, _inside)


def _inside(layer: Any) -> dict[str, str]:
    names = {Mamba.Config: "mamba", Attention.Config: "self_attn"}
    return {"": names.get(type(layer), "feed_forward")}


def _chosen(config: Mapping[str, Any], what: str, period: int, offset: int) -> Callable[[int], bool]:
    """Whether layer i is one of those that come once in a period, given the family's defaults."""
    period, offset = size(config, f"{what}_period", period), setting(config, f"{what}_offset", int, offset)
    if not 0 <= offset < period:
        raise UsageError(f"config.json: {what}_offset must be in 0..{period - 1}, got {offset}")
    return lambda i: i % period == offset


def _period(what: str, chosen: Sequence[bool]) -> dict[str, int]:
    """The way back of `_chosen`. A period longer than the model stands for a layer that comes once, or never."""
    n = len(chosen)
    for period in range(1, n + 2):
        offset = chosen.index(True) if True in chosen else n
        if offset < period and all(is_chosen == (i % period == offset) for i, is_chosen in enumerate(chosen)):
            return {f"{what}_period": period, f"{what}_offset": offset}
    at = [i for i, is_chosen in enumerate(chosen) if is_chosen]
    inexpressible(MODEL_TYPE, f"{what}s at a fixed distance", f"them at {at}")


def _ssm_from(config: Mapping[str, Any], eps: float) -> Mamba.Config:
    automatic = config.get("mamba_dt_rank") in (None, "auto")
    return Mamba.Config(
        d_state=size(config, "mamba_d_state", 16),
        d_conv=size(config, "mamba_d_conv", 4),
        expand=size(config, "mamba_expand", 2),
        dt_rank="auto" if automatic else size(config, "mamba_dt_rank", 1),
        inner_norm="learned",
        inner_norm_eps=eps,
        bias=setting(config, "mamba_proj_bias", bool, False),
        conv_bias=setting(config, "mamba_conv_bias", bool, True),
    )


def _ssm_to(model: LanguageModel.Config, mixer: Mamba.Config) -> dict[str, Any]:
    if mixer.inner_norm != "learned" or mixer.inner_norm_eps != model.norm_eps:
        given = f"inner_norm={mixer.inner_norm!r}, inner_norm_eps={mixer.inner_norm_eps}"
        inexpressible(MODEL_TYPE, f"inner_norm='learned', inner_norm_eps={model.norm_eps}", given)
    return {
        "mamba_d_state": mixer.d_state,
        "mamba_d_conv": mixer.d_conv,
        "mamba_expand": expansion(MODEL_TYPE, mixer, model.d_model),
        "mamba_dt_rank": mixer.dt_rank,
        "mamba_proj_bias": mixer.bias,
        "mamba_conv_bias": mixer.conv_bias,
    }


def _channels_to(model: LanguageModel.Config, mlp: SwiGLU.Config | None, moe: MoE.Config | None) -> dict[str, Any]:
    one = mlp or (moe.expert if moe else None)
    if moe:
        hold(MODEL_TYPE, moe, "n_experts top_k expert router balance")
        if moe.router != "softmax_topk" or moe.n_experts < 2 or moe.expert != one:
            inexpressible(MODEL_TYPE, "at least 2 experts, each like the mlps, and router='softmax_topk'", moe)
    if not isinstance(one, SwiGLU.Config):
        inexpressible(MODEL_TYPE, "experts of kind swiglu", one)
    hold(MODEL_TYPE, one, "d_inner")
    experts = {"num_experts": moe.n_experts, "num_experts_per_tok": moe.top_k} if moe else {"num_experts": 1}
    return {"intermediate_size": one.width(model.d_model), **experts}

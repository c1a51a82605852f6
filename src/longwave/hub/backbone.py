"""What transformers' pure families share: `backbone.layers.i.{norm, mixer}`, one kind of mixer in every layer."""

from collections.abc import Mapping
from typing import Any, TypeVar

from longwave.hub.settings import TRANSFORMERS, check_architecture, hold, inexpressible, refuse_unless, setting, size
from longwave.models.language_model import LanguageModel

WEIGHTS = "model.safetensors"
ALIASES = {"backbone.embedding.weight": "backbone.embeddings.weight"}

MixerConfig = TypeVar("MixerConfig")

_SUPPORTED = TRANSFORMERS | {"hidden_act": ("silu", "swish")}


def config_from(
    config: Mapping[str, Any], mixer: Any, architecture: str, defaults: Mapping[str, Any]
) -> LanguageModel.Config:
    """A model of `mixer` alone. `defaults` are those of the family."""
    check_architecture(config, architecture)
    refuse_unless(config, _SUPPORTED)
    return LanguageModel.Config(
        vocab_size=size(config, "vocab_size", defaults["vocab_size"]),
        d_model=size(config, "hidden_size", defaults["hidden_size"]),
        layers=(mixer,) * size(config, "num_hidden_layers", defaults["num_hidden_layers"]),
        norm="rms",
        norm_eps=setting(config, "layer_norm_epsilon", float, 1e-5),
        tie_embeddings=setting(config, "tie_word_embeddings", bool, defaults["tie_word_embeddings"]),
        residual_fp32=setting(config, "residual_in_fp32", bool, True),
    )


def config_to(model: LanguageModel.Config, model_type: str, architecture: str) -> dict[str, Any]:
    hold(model_type, model, "vocab_size d_model layers norm_eps tie_embeddings residual_fp32")
    return {
        "model_type": model_type,
        "architectures": [architecture],
        "vocab_size": model.vocab_size,
        "hidden_size": model.d_model,
        "num_hidden_layers": len(model.layers),
        "layer_norm_epsilon": model.norm_eps,
        "tie_word_embeddings": model.tie_embeddings,
        "residual_in_fp32": model.residual_fp32,
        "hidden_act": "silu",
    }


def only_mixer(model: LanguageModel.Config, kind: type[MixerConfig], family: str) -> MixerConfig:
    """The mixer of every layer. Raises UsageError unless all layers are of one `kind` and alike."""
    first = model.layers[0]
    for i, layer in enumerate(model.layers):
        if not isinstance(layer, kind) or layer != first:
            inexpressible(family, "layers of one kind, all alike", f"{layer} as layer {i}")
    return first


def rename(model: LanguageModel.Config) -> dict[str, str]:
    layers = {f"layers.{i}": f"backbone.layers.{i}" for i in range(len(model.layers))}
    return {"embedding": "backbone.embeddings", **layers, "norm_f": "backbone.norm_f", "lm_head": "lm_head"}

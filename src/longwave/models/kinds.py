"""The models that write tokens, by the `kind` in their config.json."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from longwave.config import nearest
from longwave.errors import UsageError
from longwave.models.heads import HEADS
from longwave.models.language_model import LanguageModel
from longwave.models.sashimi import SaShiMi
from longwave.models.saving import read_settings
from longwave.models.token_model import TokenModel

TOKEN_MODELS: dict[str, type[TokenModel]] = {
    "language_model": LanguageModel,
    "sashimi": SaShiMi,
}
TokenModelConfig = LanguageModel.Config | SaShiMi.Config


def config_from(settings: Mapping[str, Any]) -> TokenModelConfig:
    """The configuration in the settings of a config.json. Raises UsageError for an unknown kind or key."""
    return _model(settings).Config.from_dict(settings)  # pyright: ignore[reportAttributeAccessIssue]


def build(config: TokenModelConfig) -> TokenModel:
    """The model of a configuration, freshly drawn."""
    return TOKEN_MODELS[config.kind](config)


def load(folder: str | Path, *, device: torch.device | str = "cpu") -> TokenModel:
    """The model that its `save` wrote, of any kind. Raises as `LanguageModel.load` does."""
    return _model(read_settings(folder)).load(folder, device=device)


def _model(settings: Any) -> type[TokenModel]:
    kind = settings.get("kind", LanguageModel.Config.kind) if isinstance(settings, Mapping) else None
    if kind in HEADS:
        raise UsageError(f"a {kind} is a head and writes no tokens; longwave.models.heads.load(folder) reads it")
    if kind not in TOKEN_MODELS:
        raise UsageError(f"config.json: {kind!r} is no kind of model.{nearest(str(kind), TOKEN_MODELS)}")
    return TOKEN_MODELS[kind]

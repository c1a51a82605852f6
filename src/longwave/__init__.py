"""State space sequence models and their hybrids. Names are imported when first used, so `import longwave` is free."""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "LanguageModel": "longwave.models.language_model",
    "SSM": "longwave.models.ssm",
    "State": "longwave.models.state",
    "TextModel": "longwave.generate.text_model",
    "load": "longwave.hub.load",
    "train": "longwave.training.loop",
}
__all__ = ["SSM", "LanguageModel", "State", "TextModel", "load", "train"]

if TYPE_CHECKING:
    from longwave.generate.text_model import TextModel
    from longwave.hub.load import load
    from longwave.models.language_model import LanguageModel
    from longwave.models.ssm import SSM
    from longwave.models.state import State
    from longwave.training.loop import train


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'longwave' has no attribute {name!r}; it has {', '.join(__all__)}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])

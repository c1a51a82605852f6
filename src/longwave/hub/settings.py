"""Reading another library's config.json: its keys and defaults, the types checked, and what longwave lacks refused."""

import math
from collections.abc import Mapping
from typing import Any, NoReturn, TypeVar

from longwave.config import nearest
from longwave.errors import UsageError

T = TypeVar("T")

OWN_FORMAT = "model.save(folder) keeps every model"


def setting(config: Mapping[str, Any], key: str, kind: type[T], default: T) -> T:
    """`config[key]`, or the default where it is absent or null. Raises UsageError unless it is a `kind`."""
    value = config.get(key)
    if value is None:
        return default
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise UsageError(f"config.json: {key} must be {kind.__name__}, got {value!r}")
    return value


def size(config: Mapping[str, Any], key: str, default: int) -> int:
    """A setting that counts something, so at least 1."""
    value = setting(config, key, int, default)
    if value < 1:
        raise UsageError(f"config.json: {key} must be at least 1, got {value}")
    return value


def limits(config: Mapping[str, Any], key: str) -> tuple[float, float]:
    """(low, high), by default (0, inf)."""
    value = config.get(key)
    value = [0.0, math.inf] if value is None else value
    if not isinstance(value, list) or len(value) != 2 or not all(type(end) in (int, float) for end in value):
        raise UsageError(f"config.json: {key} must be two numbers, low and high, got {value!r}")
    return float(value[0]), float(value[1])


def refuse(option: str, value: Any, supported: str) -> NoReturn:
    raise UsageError(f"config.json: {option} {value!r} is not supported; longwave has {supported}")


def refuse_unless(config: Mapping[str, Any], supported: Mapping[str, tuple[Any, ...]], where: str = "") -> None:
    """Raise UsageError if a key is there with a value other than those listed, naming both."""
    for key, values in supported.items():
        if key in config and config[key] not in values:
            refuse(where + key, config[key], " or ".join(map(repr, values)))


def refuse_unknown(config: Mapping[str, Any], known: str, where: str) -> None:
    """Raise UsageError on a key that is not a word of `known`: it may change what the model computes."""
    for key in config:
        if key not in known.split():
            raise UsageError(f"config.json: {where} has an unknown option {key!r}.{nearest(key, known.split())}")


def inexpressible(family: str, holds: str, value: Any) -> NoReturn:
    """Raise UsageError: a model that a foreign format has no words for."""
    raise UsageError(f"the {family} format has {holds}, and this model has {value}; {OWN_FORMAT}")

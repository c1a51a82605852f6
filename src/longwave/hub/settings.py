"""Reading another library's config.json: its keys and defaults, the types checked, and what longwave lacks refused."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NoReturn, TypeVar

from longwave.config import nearest
from longwave.errors import UsageError

T = TypeVar("T")

OWN_FORMAT = "model.save(folder) keeps every model"
TRANSFORMERS: dict[str, tuple[Any, ...]] = {"quantization_config": (None,), "per_layer_config": (None,)}
"""For `refuse_unless`: what any of transformers' config.json may have and longwave lacks."""

IMMATERIAL = " A_min A_max dt_min dt_max dt_init_floor init_std chunk_len"


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
    low, high = numbers(config, key, (0.0, math.inf), "two numbers, low and high")
    return low, high


def numbers(config: Mapping[str, Any], key: str, default: tuple[float, ...], what: str) -> tuple[float, ...]:
    """A list of as many numbers as the default has; `what` they are is for the error."""
    value = config.get(key)
    if value is None:
        return default
    if not isinstance(value, list) or len(value) != len(default) or not all(type(x) in (int, float) for x in value):
        raise UsageError(f"config.json: {key} must be {what}, got {value!r}")
    return tuple(map(float, value))


def rotary_base(config: Mapping[str, Any], default: float = 10_000.0) -> float:
    """transformers' rope_theta, by itself or in rope_parameters. Raises UsageError for scaled rotary embedding."""
    rope = setting(config, "rope_parameters", dict, {}) or setting(config, "rope_scaling", dict, {})
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        refuse("rope_type", kind, "'default'")
    return setting(rope, "rope_theta", float, setting(config, "rope_theta", float, default))


def refuse(option: str, value: Any, supported: str) -> NoReturn:
    raise UsageError(f"config.json: {option} {value!r} is not supported; longwave has {supported}")


def refuse_unless(config: Mapping[str, Any], supported: Mapping[str, tuple[Any, ...]], where: str = "") -> None:
    """Raise UsageError if a key is there with a value other than those listed, naming both."""
    for key, values in supported.items():
        if key in config and config[key] not in values:
            refuse(where + key, config[key], " or ".join(map(repr, values)))


def check_architecture(config: Mapping[str, Any], architecture: str) -> None:
    """Raise UsageError for a head other than the language model's."""
    architectures = setting(config, "architectures", list, [architecture])
    if architecture not in architectures:
        refuse("architecture", ", ".join(map(str, architectures)), architecture)


def refuse_unknown(config: Mapping[str, Any], known: str, where: str) -> None:
    """Raise UsageError on a key that is not a word of `known`: it may change what the model computes."""
    for key in config:
        if key not in known.split():
            raise UsageError(f"config.json: {where} has an unknown option {key!r}.{nearest(key, known.split())}")


def hold(family: str, config: Any, words: str) -> None:
    """Raise UsageError unless all fields of a configuration but those in `words` have their defaults.

    Fields that matter only before training, or to speed, may have any value: no format keeps them all.
    """
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name not in (words + IMMATERIAL).split() and value != field.default:
            given = f"{field.name}={value!r}"
            inexpressible(family, f"a {config.kind} of {field.name}={field.default!r}", given)


def expansion(family: str, mixer: Any, d_model: int) -> int:
    """The inner width of a mixer over `d_model`. Raises UsageError unless that is whole."""
    d_inner = mixer.d_inner or mixer.expand * d_model
    if d_inner % d_model:
        inexpressible(family, f"d_inner a multiple of d_model={d_model}", f"d_inner={d_inner}")
    return d_inner // d_model


def one_norm_eps(family: str, model: Any, mixer: Any) -> None:
    """Raise UsageError unless the norms in the mixers have the eps of those around them."""
    if mixer.norm_eps != model.norm_eps:
        inexpressible(family, "one norm_eps", f"{model.norm_eps}, and {mixer.norm_eps} in its mixers")


def inexpressible(family: str, holds: str, value: Any) -> NoReturn:
    """Raise UsageError: a model that a foreign format has no words for."""
    raise UsageError(f"the {family} format has {holds}, and this model has {value}; {OWN_FORMAT}")

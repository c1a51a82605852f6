"""Frozen dataclasses to JSON and back. Unknown keys raise and suggest the nearest one.

A configuration is a frozen, keyword-only dataclass. One that stands for a layer has a class attribute `kind`, which
is written beside its fields, so that `[{"kind": "mamba2", "d_state": 64}, ...]` can be read back.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from longwave.errors import UsageError


def nearest(word: str, known: Iterable[str]) -> str:
    """' Did you mean 'x'?' or, when nothing is close, the list of what is known. Begins with a space."""
    known = sorted(known)
    close = difflib.get_close_matches(word, known, n=1)
    return f" Did you mean {close[0]!r}?" if close else f" Known: {', '.join(known) or 'none'}."


def to_dict(config: Any) -> Any:
    """Plain JSON values of a configuration, `kind` first where it has one. Fields equal to their default are kept."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        kind = getattr(config, "kind", None)
        named = {} if kind is None else {"kind": kind}
        return named | {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, (list, tuple)):
        return [to_dict(item) for item in config]
    if isinstance(config, Mapping):
        return {key: to_dict(value) for key, value in config.items()}
    return config


def from_dict(cls: type, data: Any, kinds: Mapping[str, type] | None = None, where: str = "") -> Any:
    """Build `cls` (a configuration class) from JSON values.

    `kinds` maps the `kind` of a nested layer to its configuration class. Raises UsageError on an unknown key, an
    unknown kind or a missing value, naming the place and the nearest known word.
    """
    where = where or cls.__qualname__
    if not isinstance(data, Mapping):
        raise UsageError(f"{where}: expected an object of settings, got {data!r}.")
    data = dict(data)
    kind = data.pop("kind", None)
    if kind is not None and kind != getattr(cls, "kind", None):
        raise UsageError(f"{where}: kind {kind!r} does not belong here; expected {getattr(cls, 'kind', 'none')!r}.")
    hints = typing.get_type_hints(cls)
    fields = {f.name: f for f in dataclasses.fields(cls)}
    for key in data:
        if key not in fields:
            raise UsageError(f"{where}: unknown key {key!r}.{nearest(key, fields)}")
    values = {key: _value(hints[key], value, kinds or {}, f"{where}.{key}") for key, value in data.items()}
    try:
        return cls(**values)
    except TypeError as error:
        raise UsageError(f"{where}: {error}.") from error


def _value(hint: Any, value: Any, kinds: Mapping[str, type], where: str) -> Any:
    """One field's value: dataclasses are built, lists become tuples, everything else is passed on."""
    if isinstance(value, Mapping) and "kind" in value:
        if value["kind"] not in kinds:
            raise UsageError(f"{where}: unknown kind {value['kind']!r}.{nearest(str(value['kind']), kinds)}")
        return from_dict(kinds[value["kind"]], value, kinds, where)
    if isinstance(value, (list, tuple)):
        inner = [arg for arg in typing.get_args(hint) if arg is not Ellipsis] or [Any]
        return tuple(_value(inner[0], item, kinds, f"{where}[{i}]") for i, item in enumerate(value))
    for option in _options(hint):
        if dataclasses.is_dataclass(option) and isinstance(value, Mapping):
            return from_dict(typing.cast(type, option), value, kinds, where)
    return value


def _options(hint: Any) -> tuple[Any, ...]:
    """The members of a union, or the hint alone."""
    return typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)

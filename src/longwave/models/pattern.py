"""A model's layers as one line of text and back: 'mamba2*3 attention mamba2*3'."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from longwave.config import nearest
from longwave.errors import UsageError
from longwave.models.blocks import layer_configs


def layers_from(pattern: str) -> tuple[Any, ...]:
    """One default configuration per residual slot, from kinds and counts: 'mamba2*3 attention' is three and one.

    A group may be repeated, and hold others: '((mamba2 swiglu)*7 attention swiglu)*4'. A layer of layers has its own
    right behind its name: 'parallel(mamba2 attention)'. Raises UsageError for a word that is no kind of layer.
    """
    kinds = layer_configs()
    open_groups: list[list[Any]] = [[]]
    names: list[str] = []  # of the layer that each open group belongs to, "" for none
    last: list[Any] = []  # what a count would repeat
    for word in re.findall(r"[^\s*()]+\(?|[()]|\*\d+|\S", pattern):
        if word.endswith("("):
            names.append(_known(word[:-1], kinds) if len(word) > 1 else "")
            open_groups.append([])
            last = []
        elif word == ")" and len(open_groups) > 1 and open_groups[-1]:
            last, name = open_groups.pop(), names.pop()
            last = [_around(kinds[name], last)] if name else last
            open_groups[-1] += last
        elif word[0] == "*" and len(word) > 1 and last:
            whole, count = open_groups[-1], int(word[1:])
            whole[len(whole) - len(last) :] = last * count
            last = []
        elif word[0] in "()*":
            raise _unreadable(pattern)
        else:
            last = [kinds[_known(word, kinds)]()]
            open_groups[-1] += last
    if len(open_groups) > 1:
        raise _unreadable(pattern)
    return tuple(open_groups[0])


def _known(word: str, kinds: Mapping[str, type]) -> str:
    if word not in kinds:
        raise UsageError(f"there is no layer {word!r}.{nearest(word, kinds)}")
    return word


def _around(config: Any, parts: list[Any]) -> Any:
    """The configuration of a layer around these: of several mixers, or of one."""
    fields = {field.name for field in dataclasses.fields(config)}
    if "mixers" in fields:
        return config(mixers=tuple(parts))
    if "mixer" in fields and len(parts) == 1:
        return config(mixer=parts[0])
    holds = "one layer" if "mixer" in fields else "no layers"
    raise UsageError(f"{config.kind} holds {holds}, got {len(parts)}; {config.kind} (...) with a space is two words")


def _unreadable(pattern: str) -> UsageError:
    return UsageError(f"cannot read the layers {pattern!r}; write them like 'mamba2*3 attention (mamba2 swiglu)*2'")


def pattern_of(layers: Sequence[Any]) -> str:
    """The kinds of these layer configurations in the shortest text that `layers_from` reads.

    Their other settings are left out.
    """
    return _shortest(tuple(map(_word, layers)))


def _word(layer: Any) -> str:
    """The kind, and of a layer around others theirs: 'parallel(mamba2 attention)'."""
    inner = getattr(layer, "mixers", None) or [getattr(layer, "mixer", None)]
    return layer.kind if inner == [None] else f"{layer.kind}({pattern_of(inner)})"


@cache
def _shortest(kinds: tuple[str, ...]) -> str:
    """Built from the end: at each place either one word and what follows it, or a repeated group and what follows."""
    texts = [""] * (len(kinds) + 1)  # of kinds[i:]
    for i in reversed(range(len(kinds))):
        ways = [f"{kinds[i]} {texts[i + 1]}"]
        for size in range(1, (len(kinds) - i) // 2 + 1):
            count = _repeats(kinds[i:], size)
            if count > 1:
                group = _shortest(kinds[i : i + size])
                group = group if size == 1 else f"({group})"
                ways.append(f"{group}*{count} {texts[i + size * count]}")
        texts[i] = min(ways, key=len).rstrip()
    return texts[0]


def _repeats(kinds: Sequence[str], size: int) -> int:
    """How many times in a row the first `size` come."""
    count = 1
    while kinds[size * count : size * (count + 1)] == kinds[:size]:
        count += 1
    return count

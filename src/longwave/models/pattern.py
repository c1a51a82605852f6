"""A model's layers as one line of text and back: 'mamba2*3 attention mamba2*3'."""

import re
from collections.abc import Sequence
from typing import Any

from longwave.config import nearest
from longwave.errors import UsageError
from longwave.models.blocks import layer_configs


def layers_from(pattern: str) -> tuple[Any, ...]:
    """One default configuration per residual slot, from kinds and counts: 'mamba2*3 attention' is three and one.

    A group may be repeated: '(mamba2 swiglu)*12'. Raises UsageError for a word that is no kind of layer.
    """
    kinds = layer_configs()
    layers: list[Any] = []
    for group, kind, count in re.findall(r"(?:\(([^()]*)\)|([^\s*()]+))(?:\*(\d+))?|\S", pattern):
        if not (group or kind):
            raise UsageError(
                f"cannot read the layers {pattern!r}; write them like 'mamba2*3 attention (mamba2 swiglu)*2'"
            )
        if kind and kind not in kinds:
            raise UsageError(f"there is no layer {kind!r}.{nearest(kind, kinds)}")
        layers += (layers_from(group) if group else (kinds[kind](),)) * int(count or 1)
    return tuple(layers)


def pattern_of(layers: Sequence[Any]) -> str:
    """The kinds of these layer configurations, as `layers_from` reads them. Their other settings are left out."""
    kinds = [layer.kind for layer in layers]
    words = []
    while kinds:
        groups = [(size, _repeats(kinds, size)) for size in range(1, len(kinds) // 2 + 1)]
        # The one that covers most by being repeated; of those that cover as much, the shortest.
        size, count = max(groups, key=lambda group: group[0] * group[1] if group[1] > 1 else 0, default=(1, 1))
        words.append(" ".join(kinds[:size]) if size == 1 else f"({' '.join(kinds[:size])})")
        words[-1] += f"*{count}" if count > 1 else ""
        kinds = kinds[size * count :]
    return " ".join(words)


def _repeats(kinds: Sequence[str], size: int) -> int:
    """How many times in a row the first `size` come."""
    count = 1
    while kinds[size * count : size * (count + 1)] == kinds[:size]:
        count += 1
    return count

"""A model's layers as one line of text, for command lines: 'mamba2*3 attention mamba2*3'."""

import re
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

"""Mathematics on tensors: no parameters. One folder per operator; `OPS` names the public functions."""

from collections.abc import Callable
from typing import Any

from longwave.ops.causal_conv1d import causal_conv1d

OPS: dict[str, Callable[..., Any]] = {
    "causal_conv1d": causal_conv1d,
}

"""A projection of a few rows, as decoding needs it: bound by reading the weights."""

from longwave.ops.linear_step.api import linear_step

__all__ = ["linear_step"]

"""Root-mean-square norm with an optional SiLU gate."""

from longwave.ops.gated_rms_norm.api import gated_rms_norm

__all__ = ["gated_rms_norm"]

"""Short depthwise causal convolution with a carried window."""

from longwave.ops.causal_conv1d.api import causal_conv1d, causal_conv1d_step

__all__ = ["causal_conv1d", "causal_conv1d_step"]

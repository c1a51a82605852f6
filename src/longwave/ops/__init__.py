"""Mathematics on tensors: no parameters. One folder per operator; `OPS` names the public functions."""

from collections.abc import Callable
from typing import Any

from longwave.ops.causal_conv1d import causal_conv1d
from longwave.ops.diagonal_scan import diagonal_scan
from longwave.ops.fft_conv import fft_conv
from longwave.ops.gated_rms_norm import gated_rms_norm
from longwave.ops.mamba3_scan import mamba3_scan
from longwave.ops.selective_scan import selective_scan
from longwave.ops.ssd import ssd

OPS: dict[str, Callable[..., Any]] = {
    "causal_conv1d": causal_conv1d,
    "diagonal_scan": diagonal_scan,
    "fft_conv": fft_conv,
    "gated_rms_norm": gated_rms_norm,
    "mamba3_scan": mamba3_scan,
    "selective_scan": selective_scan,
    "ssd": ssd,
}

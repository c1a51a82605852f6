"""Waveforms as samples of a few levels, and back: what a SaShiMi reads and writes."""

import math
from typing import Literal

import torch
from torch import Tensor

Law = Literal["mu", "linear"]


def quantize(wave: Tensor, levels: int = 256, law: Law = "mu") -> Tensor:
    """wave, any shape, in -1..1 (values beyond are clipped) -> int64 in 0..levels-1.

    "linear": even steps. "mu": even steps of sign(x) ln(1 + mu |x|) / ln(1 + mu), mu = levels - 1, fine where it is
    quiet (ITU-T G.711; van den Oord et al. 2016, arXiv:1609.03499, section 2.2).
    """
    wave = wave.clamp(-1, 1)
    if law == "mu":
        wave = wave.sign() * (wave.abs() * (levels - 1)).log1p() / math.log(levels)
    return ((wave + 1) / 2 * (levels - 1)).round().long()


def dequantize(samples: Tensor, levels: int = 256, law: Law = "mu") -> Tensor:
    """The float32 wave in -1..1 that stands for these samples."""
    wave = samples.to(torch.float32) / (levels - 1) * 2 - 1
    if law == "mu":
        wave = wave.sign() * (wave.abs() * math.log(levels)).expm1() / (levels - 1)
    return wave

"""Causal convolution with filters as long as the sequence."""

from longwave.ops.fft_conv.api import FilterSpectrum, fft_conv, fft_conv_step, filter_spectrum

__all__ = ["FilterSpectrum", "fft_conv", "fft_conv_step", "filter_spectrum"]

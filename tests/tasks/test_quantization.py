"""Levels: every one stands for itself, and no wave is further from its level than half a step."""

import math

import pytest
import torch
from torch.testing import assert_close

from longwave.tasks.quantization import dequantize, quantize


@pytest.mark.parametrize("law", ["mu", "linear"])
@pytest.mark.parametrize("levels", [2, 16, 256])
def test_levels_stand_for_themselves(law, levels):
    samples = torch.arange(levels)
    wave = dequantize(samples, levels, law)
    assert wave[0] == -1
    assert wave[-1] == pytest.approx(1)
    assert torch.equal(quantize(wave, levels, law), samples)
    assert_close(wave, -wave.flip(0))
    assert quantize(torch.tensor([-3.0, 7.0]), levels, law).tolist() == [0, levels - 1]


def test_linear_steps_are_even():
    wave = torch.linspace(-1, 1, 999)
    assert (dequantize(quantize(wave, 256, "linear"), 256, "linear") - wave).abs().max() <= 1 / 255 + 1e-6


def test_mu_law_is_fine_where_it_is_quiet():
    wave = torch.linspace(-1, 1, 9999, dtype=torch.float64)
    compressed = wave.sign() * (1 + 255 * wave.abs()).log() / math.log(256)
    assert torch.equal(quantize(wave), ((compressed + 1) * 127.5).round().long())
    error = (dequantize(quantize(wave)) - wave).abs()
    assert error[wave.abs() < 0.01].max() < 0.002 < error.max()

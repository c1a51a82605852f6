"""The Triton kernels on a CUDA device, against the float64 reference on the CPU. Run with `-m gpu`."""

import importlib.util

import pytest
import torch
from test_ops import CASES, DTYPES, STATEFUL, inputs, samples, within_budget

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
CASES = [case for case in CASES if importlib.util.find_spec(f"longwave.ops.{case[0]}.triton") is not None]
FULL = {  # blocks of the sizes that models have
    "ssd": {"b": 2, "l": 300, "h": 8, "p": 64, "g": 1, "n": 128, "dt_softplus": True},
    "mamba3_scan": {"b": 2, "l": 300, "h": 8, "p": 64, "r": 1, "g": 1, "n": 128, "s": 32, "z": True},
    "selective_scan": {"b": 2, "l": 300, "e": 64, "n": 16, "dt_softplus": True},
    "causal_conv1d": {"b": 2, "l": 300, "e": 200, "w": 4, "activation": "silu"},
    "diagonal_scan": {"b": 2, "l": 300, "e": 64, "n": 32},
    "fft_conv": {"b": 2, "l": 3000, "e": 64, "k": 3000, "D": True},
    "gated_rms_norm": {"b": 2, "l": 60, "e": 1536, "gate": True},
}


@pytest.mark.parametrize("context", [(), ("state", "reset", "lengths")], ids=["plain", "context"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "i"), CASES)
def test_error_budget(name, i, dtype, context):
    context = context if (name, i) in STATEFUL else ()
    within_budget(name, inputs(name, i, dtype, **dict.fromkeys(context, True)), dtype, "cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FULL)
def test_error_budget_at_full_size(name, dtype):
    within_budget(name, samples(name).make(FULL[name], dtype), dtype, "cuda")

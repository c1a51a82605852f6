"""The Hopper forms where the shapes of other tests do not take them: segments of l, blocks of channels. `-m gpu`."""

import importlib

import pytest
import torch
from test_ops import cast, error, moved, outputs, samples

from longwave.ops.register import on_hopper

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
SHAPES = {
    "ssd": {"b": 3, "l": 330, "h": 4, "p": 128, "g": 2, "n": 128, "dt_softplus": True},
    "mamba3_scan": {"b": 3, "l": 330, "h": 4, "p": 128, "r": 1, "g": 2, "n": 128, "s": 48, "z": True},
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("context", [False, True], ids=["plain", "context"])
@pytest.mark.parametrize("name", SHAPES)
def test_segments(name, context, dtype, monkeypatch):
    if not on_hopper(torch.device("cuda")):
        pytest.skip("not a Hopper GPU with a tested Triton")
    form = importlib.import_module(f"longwave.ops.{name}.hopper")
    monkeypatch.setattr(form, "_SEGMENT_CHUNKS", 1)
    monkeypatch.setattr(form, "_SEGMENTS", 2)
    shape = SHAPES[name]
    kwargs = samples(name).make(shape, dtype)
    kwargs["initial_state"] = samples(name).initial_state(shape, dtype)
    if context:
        kwargs["reset"] = torch.rand(shape["b"], shape["l"]) < 0.02
        kwargs["lengths"] = torch.tensor([shape["l"], 0, 200])
    truth = outputs(name, cast(kwargs, torch.float64, grad=False), "reference")
    same = outputs(name, kwargs, "reference")
    kernel = outputs(name, moved(kwargs, "cuda"), "fused")
    for value, exact, ours in zip(same, truth, kernel, strict=True):
        rounding = torch.finfo(dtype).eps * exact.norm().item()
        assert error(ours.cpu().double(), exact) <= 2 * error(value.double(), exact) + rounding

"""Mamba-3's scan on a CUDA device at the sizes of models, with state, documents, padding and groups. Run with `-m gpu`.

`test_gpu_kernels.py` has the small shapes, which the Hopper forms leave to the portable ones.
"""

from typing import Any

import pytest
import torch
from test_ops import cast, moved, samples, tensors, within_budget

from longwave.ops import OPS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
BASE: dict[str, Any] = {"b": 2, "l": 150, "h": 4, "p": 64, "r": 1, "g": 1, "n": 128, "s": 32, "z": True}
CASES: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "state": ({}, ("state",)),
    "documents": ({"b": 3, "l": 200, "g": 2}, ("state", "reset")),
    "padding": ({"b": 3, "l": 200, "s": 16}, ("state", "lengths")),
    "both": ({"b": 3, "l": 130, "s": 8, "z": False}, ("state", "reset", "lengths")),
    "bare": ({"l": 64, "bias": False, "D": False, "z": False}, ()),
    "many heads": ({"b": 1, "l": 70, "h": 64}, ("state",)),
}


def inputs(case: str, dtype: torch.dtype) -> dict[str, Any]:
    changes, context = CASES[case]
    shape = BASE | changes
    kwargs = samples("mamba3_scan").make(shape, dtype)
    b, l = shape["b"], shape["l"]
    g = torch.Generator().manual_seed(3)
    if "state" in context:
        kwargs["initial_state"] = samples("mamba3_scan").initial_state(shape, dtype)
    if "reset" in context:
        kwargs["reset"] = torch.rand(b, l, generator=g) < 0.03
    if "lengths" in context:
        kwargs["lengths"] = torch.tensor([l - 37, 0, l])[:b]
    return kwargs


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_error_budget(case, dtype):
    within_budget("mamba3_scan", inputs(case, dtype), dtype, "cuda")


def test_padding_cannot_leak():
    kwargs = moved(cast(inputs("padding", torch.bfloat16), torch.bfloat16), "cuda")
    b, l = kwargs["x"].shape[:2]
    padding = torch.arange(l, device="cuda") >= kwargs["lengths"][:, None]
    poisoned = dict(kwargs)
    for key, value in tensors(kwargs).items():
        if value.shape[:2] == (b, l):
            mask = padding.view(b, l, *[1] * (value.ndim - 2))
            poisoned[key] = torch.where(mask, torch.nan, value.detach()).requires_grad_()
    y, final = OPS["mamba3_scan"](**poisoned)
    torch.stack([out.float().sum() for out in (y, *final)]).sum().backward()
    for key, value in tensors(poisoned).items():
        assert value.grad is not None, key
        assert torch.isfinite(value.grad).all(), key


def test_the_backward_is_deterministic():
    kwargs = moved(cast(inputs("both", torch.bfloat16), torch.bfloat16), "cuda")
    leaves = tensors(kwargs)
    y, _ = OPS["mamba3_scan"](**kwargs)
    once, again = (
        torch.autograd.grad(y.float().square().sum(), list(leaves.values()), retain_graph=True) for _ in "12"
    )
    for key, a, b in zip(leaves, once, again, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, msg=key)

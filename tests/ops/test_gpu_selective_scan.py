"""The selective scan's Hopper forms at sizes that the operators' own shapes do not reach. Run with `-m gpu`."""

import pytest
import torch
from test_ops import DTYPES, samples, within_budget

from longwave.ops import selective_scan

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
SHAPES = (
    {"b": 1, "l": 1100, "e": 136, "n": 16, "dt_softplus": True},  # split along l
    {"b": 3, "l": 16, "e": 264, "n": 16, "z": False, "D": False, "dt_bias": False},
    {"b": 2, "l": 77, "e": 128, "n": 16, "dt_softplus": True},
    {"b": 1, "l": 1, "e": 8, "n": 16},
)


@pytest.mark.parametrize("context", [False, True], ids=["plain", "context"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"b{shape['b']} l{shape['l']} e{shape['e']}")
def test_error_budget(shape, dtype, context):
    kwargs = samples("selective_scan").make(shape, dtype)
    b, l = shape["b"], shape["l"]
    if context:
        g = torch.Generator().manual_seed(l)
        kwargs["initial_state"] = samples("selective_scan").initial_state(shape, dtype)
        kwargs["reset"] = torch.rand(b, l, generator=g) < 0.05
        kwargs["lengths"] = torch.randint(l // 2, l + 1, (b,), generator=g)
    within_budget("selective_scan", kwargs, dtype, "cuda")


def test_views_and_a_broadcast_gradient():
    """B and C are views of one projection in a model, x and z of another; the gradient of a sum has no strides."""
    shape = {"b": 2, "l": 40, "e": 128, "n": 16}
    made = samples("selective_scan").make(shape, torch.bfloat16, "cuda")
    xz = torch.cat([made["x"], made["z"]], -1)
    BC = torch.cat([made["B"][..., :4], made["B"], made["C"]], -1)  # B starts at 8 bytes: no multiple of 16
    views = dict(zip("xzBC", (*xz.split(128, -1), *BC.split((4, 16, 16), -1)[1:]), strict=True))
    found = []
    for kwargs in (made, made | views):
        leaves = {k: v.detach().clone() if kwargs is made else v.detach() for k, v in kwargs.items() if k in views}
        leaves = {k: v.requires_grad_() for k, v in leaves.items()}
        y, _ = selective_scan(**kwargs | leaves)
        found.append((y, *torch.autograd.grad(y.sum(), list(leaves.values()))))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)

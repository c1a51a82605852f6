"""What the Hopper form of ssd's backward cuts up: pairs of chunks, pairs of heads, parts of the heads of a group."""

import pytest
import torch
from test_ops import within_budget

from longwave.ops import ssd
from longwave.ops.ssd import samples

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
SHAPES = {
    "one token": {"b": 2, "l": 1, "h": 2, "p": 64, "g": 1, "n": 64},
    "one chunk": {"b": 2, "l": 64, "h": 3, "p": 64, "g": 3, "n": 128, "D": None},
    "an odd number of chunks": {"b": 2, "l": 150, "h": 4, "p": 64, "g": 2, "n": 64, "D": "hp", "dt_limit": (0.01, 0.3)},
    "all heads in one program": {"b": 34, "l": 130, "h": 4, "p": 64, "g": 1, "n": 128},
}


def kwargs(shape, dtype):
    return samples.make({"dt_softplus": True, **shape}, dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_error_budget(shape, dtype):
    within_budget("ssd", kwargs(shape, dtype), dtype, "cuda")


def test_error_budget_with_documents_and_lengths():
    shape = {"b": 3, "l": 290, "h": 4, "p": 64, "g": 2, "n": 128}
    reset = torch.zeros(3, 290, dtype=torch.bool)
    reset[0, [5, 63, 64, 200]] = reset[1, [127, 128]] = True
    context = {
        "initial_state": samples.initial_state(shape, torch.bfloat16),
        "reset": reset,
        "lengths": torch.tensor([290, 129, 40]),
    }
    within_budget("ssd", kwargs(shape, torch.bfloat16) | context, torch.bfloat16, "cuda")


def test_views_and_garbage_behind_the_lengths_change_nothing():
    def gradients(x, dt, A, B, C, dy, lengths):
        inputs = [t.detach().requires_grad_() for t in (x, dt, A, B, C)]
        y, _ = ssd(*inputs, lengths=lengths, dt_softplus=True)
        return torch.autograd.grad(y, inputs, dy)

    given = samples.make({"b": 2, "l": 200, "h": 4, "p": 64, "g": 1, "n": 128}, torch.bfloat16, "cuda")
    x, dt, A, B, C = (given[name] for name in ("x", "dt", "A", "B", "C"))
    lengths = torch.tensor([100, 200], device="cuda")
    dy = torch.randn_like(x)
    expected = gradients(x, dt, A, B, C, dy, lengths)
    packed = torch.cat([x.flatten(2), B.flatten(2), C.flatten(2)], 2)
    packed[0, 100:] = float("nan")
    dy[0, 100:] = float("nan")
    x, B, C = packed.split([256, 128, 128], 2)
    x, B, C = x.unflatten(2, (4, 64)), B.unflatten(2, (1, 128)), C.unflatten(2, (1, 128))
    for got, same in zip(gradients(x, dt, A, B, C, dy, lengths), expected, strict=True):
        assert torch.equal(got, same)

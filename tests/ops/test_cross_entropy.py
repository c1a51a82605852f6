import math

import pytest
import torch
from torch.nn.functional import cross_entropy

from longwave.ops.cross_entropy import cross_entropy_
from longwave.ops.cross_entropy.samples import SHAPES, make

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def truth(logits, targets):
    """Losses, and the gradient of their sum, by torch in float64."""
    wide = logits.double().requires_grad_()
    losses = cross_entropy(wide, targets, reduction="none")
    return losses.detach(), torch.autograd.grad(losses.sum(), wide)[0]


def within_budget(logits, targets, run):
    """At most twice the error of the reference in the same dtype, and one rounding."""
    same = logits.clone()
    reference = cross_entropy_(same, targets, impl="reference"), same
    for true, found, other in zip(truth(logits, targets), run(logits.clone(), targets), reference, strict=True):
        rounding = torch.finfo(found.dtype).eps * true.norm()
        assert (found.double() - true).norm() <= 2 * (other.double() - true).norm() + rounding


def fused(logits, targets):
    return cross_entropy_(logits, targets), logits


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_budget(shape, dtype):
    within_budget(*make(shape, dtype).values(), fused)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_triton(shape, dtype):
    """Under the interpreter, or on the GPU if there is one."""
    kernel = pytest.importorskip("longwave.ops.cross_entropy.triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    within_budget(*make(shape, dtype, device).values(), lambda x, t: (kernel.cross_entropy_(x, t, -100), x))


@pytest.mark.parametrize("impl", ["fused", "reference", "triton"])
def test_large_logits_and_ignored_rows(impl):
    """exp(1e4) would overflow; a row that is ignored has a gradient of exactly 0."""
    logits = torch.tensor([[1e4, 0.0, -1e4], [3.0, 2.0, 1.0], [0.0, 0.0, -1e4]])
    targets = torch.tensor([1, 7, 0])
    if impl == "triton":
        kernel = pytest.importorskip("longwave.ops.cross_entropy.triton")
        device = "cuda" if torch.cuda.is_available() else "cpu"
        logits, targets = logits.to(device), targets.to(device)
        losses = kernel.cross_entropy_(logits, targets, 7)
    else:
        losses = cross_entropy_(logits, targets, ignore_index=7, impl=impl)
    expected = torch.tensor([[1.0, -1.0, 0.0], [0.0, 0.0, 0.0], [-0.5, 0.5, 0.0]])
    torch.testing.assert_close(logits.cpu(), expected)
    torch.testing.assert_close(losses.cpu(), torch.tensor([1e4, 0.0, math.log(2)]))


def test_shapes_are_checked():
    with pytest.raises(ValueError, match=r"logits must be \(n, v\) = \(3, 5\), got \(2, 5\)"):
        cross_entropy_(torch.zeros(2, 5), torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="contiguous"):
        cross_entropy_(torch.zeros(5, 2).T, torch.zeros(2, dtype=torch.int64))

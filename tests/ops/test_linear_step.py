import pytest
import torch

from longwave.ops.linear_step import linear_step
from longwave.ops.linear_step.samples import SHAPES, make


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_budget(shape, dtype):
    inputs = make(shape, dtype)
    truth = torch.nn.functional.linear(*(None if v is None else v.double() for v in inputs.values()))
    same = linear_step(**inputs, impl="reference").double()
    y = linear_step(**inputs)
    assert y.dtype == dtype
    rounding = torch.finfo(dtype).eps * truth.norm()
    assert (y.double() - truth).norm() <= 2 * (same - truth).norm() + rounding


def test_strided_weights_and_inputs():
    weight = torch.randn(20, 64)[::2, :48]
    x = torch.randn(2, 96)[:, ::2]
    torch.testing.assert_close(linear_step(x, weight), x @ weight.t(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(linear_step(x, weight.t().contiguous().t()), x @ weight.t(), rtol=1e-5, atol=1e-5)


def test_float32_rows_with_bfloat16_weights():
    x, weight = torch.randn(1, 64), torch.randn(32, 64).bfloat16()
    torch.testing.assert_close(linear_step(x, weight), x @ weight.float().t(), rtol=1e-5, atol=1e-5)


def test_shapes_are_checked():
    with pytest.raises(ValueError, match=r"weight must be \(n, k\) = \(4, 7\), got \(4, 6\)"):
        linear_step(torch.zeros(1, 7), torch.zeros(4, 6))

"""What is special to the short convolution: torch's own as the oracle, and the one-token step."""

import pytest
import torch
from torch.nn.functional import conv1d, silu

from longwave.ops.causal_conv1d import causal_conv1d, causal_conv1d_step


@pytest.mark.parametrize("w", [1, 2, 4, 7])
def test_is_torchs_convolution(w):
    x, weight, bias = torch.randn(2, 75, 130), torch.randn(130, w), torch.randn(130)
    expected = conv1d(x.transpose(1, 2), weight[:, None], bias, padding=w - 1, groups=130)[..., :75].transpose(1, 2)
    y, window = causal_conv1d(x, weight, bias)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        causal_conv1d(x, weight, bias, activation="silu")[0], silu(expected), rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(window, x[:, 75 - (w - 1) :], rtol=0, atol=0)


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("w", [1, 2, 4, 5])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_steps_are_the_sequence(dtype, w, bias, activation):
    x, weight = torch.randn(3, 9, 34).to(dtype), torch.randn(34, w)
    offset = torch.randn(34) if bias else None
    state = torch.randn(3, w - 1, 34).to(dtype)
    y, window = causal_conv1d(x, weight, offset, activation=activation, initial_state=state)
    steps = [causal_conv1d_step(state, x[:, t], weight, offset, activation=activation) for t in range(9)]
    tolerance = {"rtol": 0, "atol": 4 * torch.finfo(dtype).eps * float(y.abs().max())}
    torch.testing.assert_close(torch.stack(steps, 1), y, **tolerance)
    torch.testing.assert_close(state, window, rtol=0, atol=0)


def test_step_writes_into_a_view():
    states = torch.zeros(2, 5, 3, 8).transpose(1, 2)  # not contiguous
    x, weight = torch.randn(2, 8), torch.randn(8, 4)
    causal_conv1d_step(states[:, :, 1], x, weight)
    torch.testing.assert_close(states[:, -1, 1], x, rtol=0, atol=0)
    assert states[:, :, 0].abs().sum() == 0


def test_unknown_activation_is_named():
    with pytest.raises(ValueError, match="'relu'"):
        causal_conv1d(torch.zeros(1, 1, 1), torch.zeros(1, 4), activation="relu")

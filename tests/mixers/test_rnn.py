"""LSTM and GRU against torch.nn's."""

from itertools import pairwise

import pytest
import torch
from torch import nn

from longwave.mixers import GRU, LSTM

PAIRS = [(LSTM, nn.LSTM), (GRU, nn.GRU)]


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
@pytest.mark.parametrize("bias", [True, False])
def test_equals_torch(ours, theirs, bias):
    mixer, expected = ours(12, ours.Config(bias=bias)), theirs(12, 12, bias=bias, batch_first=True)
    mixer.load_state_dict(expected.state_dict())
    x = torch.randn(3, 9, 12)
    y, state = mixer(x)
    z, hidden = expected(x)
    torch.testing.assert_close(y, z)
    torch.testing.assert_close([t[None] for t in state], list(hidden if isinstance(hidden, tuple) else (hidden,)))


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_wider_state_is_projected(ours, theirs):
    mixer, expected = ours(8, ours.Config(d_hidden=20)), theirs(8, 20, batch_first=True)
    expected.load_state_dict({k: v for k, v in mixer.state_dict().items() if k != "out_proj.weight"})
    x = torch.randn(2, 5, 8)
    torch.testing.assert_close(mixer(x)[0], expected(x)[0] @ mixer.out_proj.weight.T)


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_many_short_documents(ours, theirs):
    """The packed path against nn.GRU called on each document alone."""
    mixer, alone = ours(6).double(), theirs(6, 6, batch_first=True).double()
    alone.load_state_dict(mixer.state_dict())
    b, l = 4, 40
    x, reset = torch.randn(b, l, 6, dtype=torch.float64), torch.rand(b, l) < 0.3
    y, _ = mixer(x, reset=reset)
    for i in range(b):
        bounds = sorted({0, *reset[i].nonzero()[:, 0].tolist(), l})
        expected = [alone(x[i : i + 1, a:z])[0] for a, z in pairwise(bounds)]
        torch.testing.assert_close(y[i : i + 1], torch.cat(expected, 1))


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_drawn_as_torch_draws(ours, theirs):
    torch.manual_seed(0)
    expected = theirs(10, 10)
    mixer = ours(10)
    torch.manual_seed(0)
    mixer.reset_parameters()
    torch.testing.assert_close(mixer.state_dict(), expected.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize("ours", [LSTM, GRU])
def test_states_are_float32_in_a_bfloat16_model(ours):
    mixer = ours(8).bfloat16()
    y, state = mixer(torch.randn(2, 3, 8, dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16
    assert {t.dtype for t in state} == {t.dtype for t in mixer.init_state(2)} == {torch.float32}

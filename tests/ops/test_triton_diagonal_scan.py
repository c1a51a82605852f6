"""What is special to the diagonal scan in Triton: l in segments, every method, long memories. See test_triton.py."""

import importlib.util

import pytest
import torch
from test_ops import cast, inputs, within_budget

from longwave.ops.diagonal_scan import api, diagonal_scan, diagonal_scan_step, samples

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs Triton", allow_module_level=True)

torch.set_num_threads(1)

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
pytestmark = [pytest.mark.gpu] if ON_GPU else []


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    """The module of the kernels, to which CPU tensors go as well."""
    from longwave.ops.diagonal_scan import triton

    if not ON_GPU:
        for launcher in ("forward", "backward", "step"):
            monkeypatch.setattr(api, f"_{launcher}", getattr(triton, launcher))
    return triton


@pytest.mark.parametrize("form", ["outputs", "states"])
def test_segments_of_l_make_no_difference(kernels, monkeypatch, form):
    passed, hand_on = [], kernels._pass
    monkeypatch.setattr(kernels, "_SEGMENT", 8)
    monkeypatch.setattr(
        kernels, "_pass", lambda *given, reverse: passed.append(reverse) or hand_on(*given, reverse=reverse)
    )
    shape = {"b": 2, "l": 40, "e": 3, "n": 2, "states": form == "states"}
    kwargs = samples.make(shape, torch.float32)
    kwargs["initial_state"] = samples.initial_state(shape, torch.float32)
    kwargs["reset"] = torch.rand(2, 40) < 0.05
    kwargs["lengths"] = torch.tensor([40, 37])
    within_budget("diagonal_scan", {k: _to(v) for k, v in kwargs.items()}, torch.float32, DEVICE)
    assert set(passed) == {True, False}


@pytest.mark.parametrize("states", [False, True], ids=["outputs", "states"])
@pytest.mark.parametrize("regular", [False, True], ids=["irregular", "regular"])
@pytest.mark.parametrize("method", api.METHODS)
def test_methods(method, regular, states):
    shape = {"b": 2, "l": 9, "e": 3, "n": 2, "method": method, "regular": regular, "states": states}
    kwargs = samples.make(shape, torch.float32)
    kwargs["A"][0, 0] = 0.0  # at which zoh divides 0 by 0
    kwargs["lengths"] = torch.tensor([9, 5])
    within_budget("diagonal_scan", kwargs, torch.float32, DEVICE)


def test_long_memory():
    """A decay of 10000 tokens: what it is off by adds up."""
    l, rate = 200, 1e-4
    A = torch.tensor([[[-rate, 0.0]]], device=DEVICE)
    one, u = torch.tensor([[[1.0, 0.0]]], device=DEVICE), torch.ones(1, l, 1, device=DEVICE)
    y, _ = diagonal_scan(u, torch.ones_like(u), A, one, one)
    exact, _ = diagonal_scan(*(t.double() for t in (u, u, A, one, one)), impl="reference")
    torch.testing.assert_close(y.double(), exact, rtol=2**-24 * l, atol=0)


def test_steps_without_b_and_c():
    kwargs = {k: _to(v) for k, v in inputs("diagonal_scan", 5, torch.float32, state=True).items()}
    state, method = kwargs.pop("initial_state"), kwargs["method"]
    y, _ = diagonal_scan(**kwargs, initial_state=state, impl="reference")
    wide = torch.stack([state, state], 2)[:, :, 0]  # a view with gaps, updated in place
    for t in range(4):
        stepped = diagonal_scan_step(wide, kwargs["u"][:, t], kwargs["dt"][:, t], kwargs["A"], method=method)
        torch.testing.assert_close(stepped, y[:, t], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(wide, y[:, 3], rtol=1e-5, atol=1e-6)


def test_backward_is_deterministic():
    kwargs = {k: _to(v) for k, v in cast(inputs("diagonal_scan", 3, torch.float32), torch.float32).items()}
    leaves = [v.detach().requires_grad_() for v in kwargs.values() if isinstance(v, torch.Tensor)]
    names = [k for k, v in kwargs.items() if isinstance(v, torch.Tensor)]

    def grads():
        y, final = diagonal_scan(**kwargs | dict(zip(names, leaves, strict=True)))
        return torch.autograd.grad(y.square().sum() + final.sum(), leaves)

    for first, second in zip(grads(), grads(), strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=0)


def _to(value):
    return value.to(DEVICE) if isinstance(value, torch.Tensor) else value

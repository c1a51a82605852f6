"""What is special to the selective scan: closed forms, other libraries, extremes, the one-token step."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import softplus

from longwave.ops.selective_scan import samples, selective_scan, selective_scan_step

SHAPE = {"b": 2, "l": 75, "e": 70, "n": 5, "dt_softplus": True}  # more than two chunks of time and a block of channels


def constant(l: int, rate: float, dt: float, e: int = 3, n: int = 2, dtype=torch.float32) -> dict[str, Tensor]:
    """x = B = C = 1, so that each of the n states is the sum of dt q^j with q = exp(-rate dt)."""
    return {
        "x": torch.ones(1, l, e, dtype=dtype),
        "dt": torch.full((1, l, e), dt, dtype=dtype),
        "A": torch.full((e, n), -rate, dtype=dtype),
        "B": torch.ones(1, l, n, dtype=dtype),
        "C": torch.ones(1, l, n, dtype=dtype),
    }


def geometric(l: int, rate: float, dt: float) -> float:
    return dt * math.expm1(-rate * dt * l) / math.expm1(-rate * dt)


def loop(kwargs: dict[str, Any], state: Tensor, reset: Tensor, lengths: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The recurrence for one number after the other, in numpy's float64."""
    a = {k: v.double().numpy() if isinstance(v, Tensor) else v for k, v in kwargs.items()}
    (b, l, e), n = a["x"].shape, a["A"].shape[1]
    h, y = state.double().numpy().copy(), np.zeros((b, l, e))
    for i in range(b):
        for t in range(int(lengths[i])):
            if reset[i, t]:
                h[i] = 0
            dt = np.logaddexp(0, a["dt"][i, t] + a["dt_bias"])
            for k in range(n):
                h[i, :, k] = np.exp(dt * a["A"][:, k]) * h[i, :, k] + dt * a["x"][i, t] * a["B"][i, t, k]
                y[i, t] += h[i, :, k] * a["C"][i, t, k]
            z = a["z"][i, t]
            y[i, t] = (y[i, t] + a["D"] * a["x"][i, t]) * z / (1 + np.exp(-z))
    return y, h


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-13)], ids=str)
def test_numpy_loop(dtype, tolerance):
    kwargs, state = samples.make(SHAPE, dtype), samples.initial_state(SHAPE, dtype)
    reset = torch.zeros(2, 75, dtype=torch.bool)
    reset[0, [0, 31, 32, 33]] = reset[1, 64] = True
    lengths = torch.tensor([75, 66])
    y, final = selective_scan(**kwargs, initial_state=state, reset=reset, lengths=lengths)
    expected_y, expected_final = loop(kwargs, state, reset, lengths)
    assert np.abs(y.double().numpy() - expected_y).max() <= tolerance * np.abs(expected_y).max()
    assert np.abs(final.double().numpy() - expected_final).max() <= tolerance * np.abs(expected_final).max()


@pytest.mark.parametrize(
    ("rate", "dt", "l"), [(0.01, 0.01, 20_000), (0.001, 0.1, 500), (0.5, 0.1, 500), (40.0, 0.1, 500)]
)
def test_closed_form(rate, dt, l):
    """From memories of 10000 tokens to none. A decay is off by at most half an ulp below 1, once for each token."""
    kwargs = constant(l, rate, dt)
    y, final = selective_scan(**kwargs)
    exact_rate, exact_dt = -kwargs["A"][0, 0].double().item(), kwargs["dt"][0, 0, 0].double().item()
    expected = torch.tensor([geometric(t + 1, exact_rate, exact_dt) for t in range(l)]).double()
    tolerance = 2**-24 * (10 + min(l, 1 / (rate * dt)))
    torch.testing.assert_close(y[0, :, 1].double(), 2 * expected, rtol=tolerance, atol=0)
    torch.testing.assert_close(final[0, 2, 1].double(), expected[-1], rtol=tolerance, atol=0)


def test_gradient_closed_form():
    """d/dx of the last output is dt q^(l-1-t), for each of the n states."""
    kwargs = constant(100, 0.5, 0.1, dtype=torch.float64)
    kwargs["x"].requires_grad_()
    y, _ = selective_scan(**kwargs)
    y[0, -1, 0].backward()
    expected = 2 * 0.1 * torch.exp(-0.05 * torch.arange(99, -1, -1).double())
    torch.testing.assert_close(kwargs["x"].grad[0, :, 0], expected, rtol=1e-12, atol=0)
    assert (kwargs["x"].grad[0, :, 1:] == 0).all()


def test_strong_decay_forgets_at_once():
    kwargs = samples.make(SHAPE, torch.float32) | {"z": None, "D": None, "dt_bias": None}
    kwargs["A"] = torch.full_like(kwargs["A"], -1e30)
    for tensor in (kwargs["x"], kwargs["dt"]):
        tensor.requires_grad_()
    y, final = selective_scan(**kwargs)
    entry = softplus(kwargs["dt"]) * kwargs["x"]
    expected = entry * (kwargs["B"] * kwargs["C"]).sum(-1, keepdim=True)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(final, entry[:, -1, :, None] * kwargs["B"][:, -1, None, :], rtol=1e-5, atol=1e-6)
    for ours, truth in zip(
        torch.autograd.grad(y.sum(), (kwargs["x"], kwargs["dt"])),
        torch.autograd.grad(expected.sum(), (kwargs["x"], kwargs["dt"])),
        strict=True,
    ):
        torch.testing.assert_close(ours, truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_step_of_size_zero_changes_nothing(dtype):
    """dt = -200 is softplus 0: the state stays as it is, to the bit in float32, and no gradient is lost or NaN."""
    kwargs = samples.make(SHAPE, dtype) | {"z": None, "D": None, "dt_bias": None}
    kwargs["dt"] = torch.full_like(kwargs["dt"], -200.0).requires_grad_()
    state = samples.initial_state(SHAPE, dtype).requires_grad_()
    y, final = selective_scan(**kwargs, initial_state=state)
    torch.testing.assert_close(final, state, rtol=0, atol=0)
    torch.testing.assert_close(
        y.double(), torch.einsum("ben,bln->ble", state.double(), kwargs["C"].double()), rtol=0.01, atol=0.03
    )
    d_dt, d_state = torch.autograd.grad(final.sum(), (kwargs["dt"], state))
    assert (d_state == 1).all()
    assert (d_dt.abs() <= 1e-30).all()


def test_nan_stays_in_its_channel_and_document():
    kwargs = samples.make(SHAPE, torch.float32)
    kwargs["x"][0, 20, 3] = math.nan
    reset = torch.zeros(2, 75, dtype=torch.bool)
    reset[0, 50] = True
    for tensor in (kwargs["x"], kwargs["dt"]):
        tensor.requires_grad_()
    y, final = selective_scan(**kwargs, reset=reset)
    bad = torch.zeros(y.shape, dtype=torch.bool)
    bad[0, 20:50, 3] = True
    assert (y.isnan() == bad).all()
    assert final.isfinite().all()
    y[0, 50:].sum().backward()
    assert kwargs["x"].grad.isfinite().all()
    assert kwargs["dt"].grad[0, 50:].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    "shape", [SHAPE, {"b": 3, "l": 6, "e": 300, "n": 35, "D": False, "z": False, "dt_bias": False}]
)
def test_steps_equal_the_sequence(shape, dtype):
    kwargs, state = samples.make(shape, dtype), samples.initial_state(shape, dtype)
    y, final = selective_scan(**kwargs, initial_state=state)
    b, l = shape["b"], shape["l"]
    for t in range(l):
        token = {k: v[:, t] if isinstance(v, Tensor) and v.ndim == 3 else v for k, v in kwargs.items()}
        assert token["x"].shape == (b, shape["e"])
        out = selective_scan_step(state, **token)
        assert out.dtype == dtype
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(out, y[:, t], rtol=20 * eps, atol=20 * eps * y.abs().max().item())
    torch.testing.assert_close(state, final, rtol=1e-5, atol=1e-5)


def test_step_takes_strided_views():
    shape = SHAPE | {"l": 1}
    kwargs = {
        k: v[:, 0] if isinstance(v, Tensor) and v.ndim == 3 else v
        for k, v in samples.make(shape, torch.float32).items()
    }
    plain = samples.initial_state(shape, torch.float32)
    wide = torch.full((2, 70, 11), math.nan)
    strided = wide[:, :, 1::2]
    strided.copy_(plain)
    views = {k: torch.stack([v, v], -1)[..., 0] if isinstance(v, Tensor) else v for k, v in kwargs.items()}
    torch.testing.assert_close(
        selective_scan_step(strided, **views), selective_scan_step(plain, **kwargs), rtol=0, atol=0
    )
    torch.testing.assert_close(strided, plain, rtol=0, atol=0)
    assert wide[:, :, ::2].isnan().all()


def test_step_is_a_registered_operator():
    kwargs = samples.make(SHAPE | {"l": 1}, torch.float32)
    token = [v[:, 0] if isinstance(v, Tensor) and v.ndim == 3 else v for v in kwargs.values()]
    torch.library.opcheck(torch.ops.longwave.selective_scan_step, (torch.zeros(2, 70, 5), *token, False))


def test_against_mambapy():
    mamba = pytest.importorskip("mambapy.mamba")
    torch.manual_seed(0)
    block = mamba.MambaBlock(mamba.MambaConfig(d_model=12, n_layers=1, d_state=7))
    shape = {"b": 2, "l": 50, "e": 24, "n": 7}
    kwargs = samples.make(shape, torch.float32) | {"z": None, "dt_bias": None}
    for tensor in (t for t in kwargs.values() if isinstance(t, Tensor)):
        tensor.requires_grad_()
    ours, _ = selective_scan(**kwargs)
    theirs = block.selective_scan_seq(*(kwargs[name] for name in ("x", "dt", "A", "B", "C", "D")))
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    names = ("x", "dt", "A", "B", "C", "D")
    weight = torch.randn(ours.shape)
    for name, mine, other in zip(
        names,
        torch.autograd.grad(ours, [kwargs[n] for n in names], weight),
        torch.autograd.grad(theirs, [kwargs[n] for n in names], weight),
        strict=True,
    ):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


def test_against_transformers():
    """Its loop over tokens, which has every part but initial states and documents."""
    modeling = pytest.importorskip("transformers.models.mamba.modeling_mamba")
    kwargs = samples.make(SHAPE, torch.float64)
    names = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias")
    leaves = [kwargs[name].requires_grad_() for name in names]
    x, dt, B, C, z = (kwargs[name].transpose(1, 2) for name in ("x", "dt", "B", "C", "z"))
    y, final = modeling.mamba_selective_scan(
        x, dt, kwargs["A"], B, C, kwargs["D"], z, kwargs["dt_bias"], delta_softplus=True, return_last_state=True
    )
    theirs, ours = (y.transpose(1, 2), final), selective_scan(**kwargs)
    weights = [torch.randn_like(t) for t in ours]
    found = [*ours, *torch.autograd.grad(ours, leaves, weights)]
    expected = [*theirs, *torch.autograd.grad(theirs, leaves, weights)]
    # B enters there in float32.
    for name, mine, other in zip(("y", "final state", *names), found, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


def test_the_same_bits_on_any_number_of_threads():
    def results(n_threads: int) -> list[Tensor]:
        torch.set_num_threads(n_threads)
        kwargs = samples.make(SHAPE | {"e": 200}, torch.float32)
        leaves = [v.requires_grad_() for v in kwargs.values() if isinstance(v, Tensor)]
        y, final = selective_scan(**kwargs)
        return [y.detach(), final.detach(), *torch.autograd.grad(y.sum() + final.sum(), leaves)]

    before = torch.get_num_threads()
    try:
        for one, three in zip(results(1), results(3), strict=True):
            assert torch.equal(one, three)
    finally:
        torch.set_num_threads(before)


def test_backward_keeps_a_state_for_every_32_tokens():
    kwargs = samples.make(SHAPE | {"l": 100}, torch.float32)
    kwargs["x"].requires_grad_()
    given = {v.data_ptr() for v in kwargs.values() if isinstance(v, Tensor)}
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        selective_scan(**kwargs)
    extra = [t.shape for t in kept if t.data_ptr() not in given]
    assert extra == [(2, 4, 5, 70)]


def test_double_backward_is_refused():
    kwargs = samples.make(SHAPE, torch.float64)
    kwargs["x"].requires_grad_()
    y, _ = selective_scan(**kwargs)
    (dx,) = torch.autograd.grad(y.square().sum(), kwargs["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_errors_name_the_value():
    kwargs = samples.make(SHAPE, torch.float32)
    with pytest.raises(ValueError, match=r"A must be \(e, n\) = \(70, 5\), got \(71, 5\)"):
        selective_scan(**kwargs | {"A": torch.zeros(71, 5)})
    with pytest.raises(ValueError, match=r"B must be \(b, l, n\) = \(2, 75, 5\), got \(2, 75, 6\)"):
        selective_scan(**kwargs | {"B": torch.zeros(2, 75, 6)})
    with pytest.raises(TypeError, match=r"x must be floating point, got torch.int64; pass x.float\(\)"):
        selective_scan(**kwargs | {"x": torch.zeros(2, 75, 70, dtype=torch.int64)})
    with pytest.raises(ValueError, match=r"initial_state must be \(b, e, n\) = \(2, 70, 5\), got \(2, 5, 70\)"):
        selective_scan(**kwargs, initial_state=torch.zeros(2, 5, 70))
    token = {k: v[:, 0] if isinstance(v, Tensor) and v.ndim == 3 else v for k, v in kwargs.items()}
    with pytest.raises(TypeError, match=r"state must be torch.float32 for x in torch.float32, got torch.bfloat16"):
        selective_scan_step(torch.zeros(2, 70, 5, dtype=torch.bfloat16), **token)
    with pytest.raises(ValueError, match=r"C must be \(b, n\) = \(2, 5\), got \(2, 4\)"):
        selective_scan_step(torch.zeros(2, 70, 5), **token | {"C": torch.zeros(2, 4)})


def test_a_step_takes_log_A():
    x, dt, B, C = torch.randn(2, 6), torch.rand(2, 6), torch.randn(2, 3), torch.randn(2, 3)
    A_log, state = torch.randn(6, 3), torch.randn(2, 6, 3)
    expected_state = state.clone()
    expected = selective_scan_step(expected_state, x, dt, -A_log.exp(), B, C)
    torch.testing.assert_close(selective_scan_step(state, x, dt, A_log, B, C, log_A=True), expected)
    torch.testing.assert_close(state, expected_state)

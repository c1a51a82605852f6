"""What is special to the diagonal scan: a loop over numbers, closed forms, extremes, steps that repeat, one token."""

import cmath
import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy.linalg import expm
from torch import Tensor

from longwave.ops.diagonal_scan import diagonal_scan, diagonal_scan_step, samples

METHODS = ("zoh", "bilinear", "euler", "dirac")
SHAPE = {"b": 2, "l": 75, "e": 19, "n": 3}  # more than two chunks of time and a block of channels
STATES = {"b": 2, "l": 75, "e": 33, "n": 2, "states": True}  # more than a block of lanes


def pairs(*values: complex, dtype: torch.dtype = torch.float64) -> Tensor:
    """(1, n, 2)."""
    return torch.view_as_real(torch.tensor([values], dtype=torch.complex128)).to(dtype)


def discretized(method: str, A: complex, dt: float) -> tuple[complex, complex]:
    """Abar, and Bbar for B = 1, by the textbook."""
    z = dt * A
    return {
        "zoh": (cmath.exp(z), (cmath.exp(z) - 1) / A),
        "bilinear": ((1 + z / 2) / (1 - z / 2), dt / (1 - z / 2)),
        "euler": (1 + z, dt + 0j),
        "dirac": (cmath.exp(z), 1 + 0j),
    }[method]


def loop(kwargs: dict[str, Any], state: Tensor, reset: Tensor, lengths: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The recurrence for one mode after the other: y and the state, complex where they are."""
    a = {k: v.double().numpy() for k, v in kwargs.items() if isinstance(v, Tensor)}
    c = {k: a[k] @ np.array([1, 1j]) for k in ("A", "B", "C") if k in a}
    (b, l, e), n = a["dt"].shape, c["A"].shape[1]
    h = state.double().numpy() @ np.array([1, 1j])
    u = a["u"] if "B" in c else a["u"] @ np.array([1, 1j])
    y = np.zeros((b, l, e) if "B" in c else (b, l, e, n), dtype=complex)
    for i in range(b):
        for t in range(int(lengths[i])):
            for j in range(e):
                for k in range(n):
                    Abar, Bbar = discretized(kwargs["method"], c["A"][j, k], a["dt"][i, t, j])
                    before = 0 if reset[i, t] else h[i, j, k]
                    if "B" in c:
                        h[i, j, k] = Abar * before + Bbar * c["B"][j, k] * u[i, t, j]
                        y[i, t, j] += 2 * (c["C"][j, k] * h[i, j, k]).real
                    else:
                        h[i, j, k] = y[i, t, j, k] = Abar * before + Bbar * u[i, t, j, k]
                if "B" in c:
                    y[i, t, j] += a["D"][j] * u[i, t, j]
    return y, h


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-13)], ids=str)
@pytest.mark.parametrize("shape", [SHAPE, STATES], ids=["outputs", "states"])
@pytest.mark.parametrize("method", METHODS)
def test_loop_over_numbers(method, shape, dtype, tolerance):
    kwargs = samples.make(shape | {"method": method}, dtype)
    state = samples.initial_state(shape, dtype)
    reset = torch.zeros(2, 75, dtype=torch.bool)
    reset[0, [0, 31, 32, 33]] = reset[1, 64] = True
    lengths = torch.tensor([75, 66])
    y, final = diagonal_scan(**kwargs, initial_state=state, reset=reset, lengths=lengths)
    expected_y, expected_final = loop(kwargs, state, reset, lengths)
    found_y = y.double().numpy() if y.ndim == 3 else y.double().numpy() @ np.array([1, 1j])
    found_final = final.double().numpy() @ np.array([1, 1j])
    assert np.abs(found_y - expected_y).max() <= tolerance * np.abs(expected_y).max()
    assert np.abs(found_final - expected_final).max() <= tolerance * np.abs(expected_final).max()


def test_irregular_stamps_by_the_matrix_exponential():
    """x' = [[-s, -w], [w, -s]] x + [1, 0]' u with u held: exp of ((A, B), (0, 0)), once for each gap."""
    g = torch.Generator().manual_seed(0)
    dt, u = torch.rand(1, 40, 1, generator=g).double() * 3, torch.randn(1, 40, 1, generator=g).double()
    rotation, x, expected = np.array([[-0.1, -2.0, 1.0], [2.0, -0.1, 0.0], [0.0, 0.0, 0.0]]), np.zeros(2), []
    for gap, value in zip(dt.flatten().tolist(), u.flatten().tolist(), strict=True):
        both = expm(gap * rotation)
        x = both[:2, :2] @ x + both[:2, 2] * value
        expected.append(2 * x[0])
    one = pairs(1.0)
    y, final = diagonal_scan(u, dt, pairs(-0.1 + 2j), one, one)
    np.testing.assert_allclose(y.flatten().numpy(), expected, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(final.flatten().numpy(), x, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("rate", "dt", "l"), [(0.01, 0.01, 20_000), (0.5, 0.1, 500), (40.0, 0.1, 500)])
@pytest.mark.parametrize("method", ["zoh", "dirac"])
def test_closed_form_of_a_decay(method, rate, dt, l):
    """From memories of 10000 tokens to none. A decay is off by at most half an ulp below 1, once for each token."""
    A, one, steps = pairs(-rate, dtype=torch.float32), pairs(1.0, dtype=torch.float32), torch.full((1, l, 1), dt)
    y, _ = diagonal_scan(torch.ones(1, l, 1), steps, A, one, one, method=method)
    exact_rate, exact_dt = -A[0, 0, 0].double().item(), steps[0, 0, 0].double().item()
    reached = -torch.expm1(-exact_rate * exact_dt * torch.arange(1, l + 1, dtype=torch.float64))
    scale = 1 / exact_rate if method == "zoh" else -1 / math.expm1(-exact_rate * exact_dt)
    tolerance = 2**-24 * (10 + min(l, 1 / (rate * dt)))
    torch.testing.assert_close(y[0, :, 0].double(), 2 * scale * reached, rtol=tolerance, atol=0)


@pytest.mark.parametrize("dt", [0.37, 1e4])
def test_a_rotation_neither_grows_nor_slips(dt):
    """A pulse and 20000 turns by an angle of up to 10000 radians: each rounds the state by an ulp, more or less."""
    l = 20_000
    A, u, steps = pairs(1.0j, dtype=torch.float32), torch.zeros(1, l, 1, 1, 2), torch.full((1, l, 1), dt)
    u[0, 0, 0, 0, 0] = 1
    y, _ = diagonal_scan(u, steps, A, method="dirac")
    turns = torch.arange(l, dtype=torch.float64) * steps[0, 0, 0].double()
    expected = torch.stack([turns.cos(), turns.sin()], dim=-1)
    assert (y[0, :, 0, 0].double() - expected).norm(dim=-1).max() <= 2**-24 * l


@pytest.mark.parametrize("method", METHODS)
def test_short_steps_keep_their_digits(method):
    """One token, |dt A| = 1e-5: (exp(z) - 1) / A taken as it stands would have two digits left."""
    A, one = pairs(-1 + 3j, -2 - 1j, dtype=torch.float32), pairs(1.0, 1.0, dtype=torch.float32)
    dt = torch.full((1, 1, 1), 3e-6)
    _, final = diagonal_scan(torch.ones(1, 1, 1), dt, A, one, one, method=method)
    for k, mode in enumerate((-1 + 3j, -2 - 1j)):
        z = mode * dt.double().item()
        mean = 1 + z / 2 + z * z / 6
        expected = {"zoh": dt.double().item() * mean, "dirac": 1.0}.get(method)
        expected = discretized(method, mode, dt.double().item())[1] if expected is None else expected
        assert abs(complex(*final[0, 0, k].tolist()) - expected) <= 2e-7 * abs(expected)


@pytest.mark.parametrize("method", METHODS)
def test_an_integrator(method):
    """A = 0: Abar = 1 and Bbar = dt B, with gradients, that of A included."""
    g = torch.Generator().manual_seed(0)
    u, dt = torch.randn(1, 20, 2, generator=g).double(), torch.rand(1, 20, 2, generator=g).double()
    A, one = torch.zeros(2, 3, 2).double(), pairs(1.0, 1.0, 1.0).expand(2, 3, 2)
    y, _ = diagonal_scan(u, dt, A, one, one, method=method)
    expected = 6 * (u if method == "dirac" else dt * u).cumsum(1)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    inputs = [t.clone().requires_grad_() for t in (u, dt, A)]
    for impl in ("fused", "reference"):

        def function(u: Tensor, dt: Tensor, A: Tensor, impl: Any = impl) -> Tensor:
            return diagonal_scan(u, dt, A, one, one, method=method, impl=impl)[0]

        assert torch.autograd.gradcheck(function, tuple(inputs), fast_mode=True)


def gradients(kwargs: dict[str, Any]) -> dict[str, Tensor]:
    inputs = {k: v.clone().requires_grad_() for k, v in kwargs.items() if isinstance(v, Tensor)}
    y, final = diagonal_scan(**kwargs | inputs)
    up = torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(y.dtype)
    return dict(zip(inputs, torch.autograd.grad([y, final], list(inputs.values()), [up, final.detach()]), strict=True))


@pytest.mark.parametrize("shape", [SHAPE, STATES], ids=["outputs", "states"])
@pytest.mark.parametrize("method", METHODS)
def test_steps_that_repeat(method, shape):
    """Abar is kept while dt stays, in all lanes; here it stays, changes, and changes in one channel alone."""
    kwargs = samples.make(shape | {"method": method}, torch.float64)
    dt = kwargs["dt"]
    dt[:, :10], dt[:, 10:50] = dt[:, :1], dt[:, 10:11]
    dt[1, 20:60, 3] = torch.linspace(0.1, 0.3, 40, dtype=torch.float64)
    expected = gradients(kwargs | {"impl": "reference"})
    for key, value in gradients(kwargs).items():
        assert (value - expected[key]).abs().max() <= 1e-12 * expected[key].abs().max(), key


def test_one_step_size_for_all_tokens_need_not_be_stored():
    kwargs = samples.make(SHAPE, torch.float32)
    shared = kwargs["dt"][:1, :1].expand(2, 75, 19)
    assert shared.stride()[:2] == (0, 0)
    y, final = diagonal_scan(**kwargs | {"dt": shared})
    stored_y, stored_final = diagonal_scan(**kwargs | {"dt": shared.contiguous()})
    torch.testing.assert_close(y, stored_y, rtol=0, atol=0)
    torch.testing.assert_close(final, stored_final, rtol=0, atol=0)


@pytest.mark.parametrize("shape", [SHAPE, STATES], ids=["outputs", "states"])
def test_threads_do_not_matter(shape):
    kwargs, before = samples.make(shape, torch.float32), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = gradients(kwargs)
        torch.set_num_threads(3)
        together = gradients(kwargs)
    finally:
        torch.set_num_threads(before)
    for key, value in alone.items():
        torch.testing.assert_close(together[key], value, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [SHAPE | {"l": 9}, STATES | {"l": 9}], ids=["outputs", "states"])
@pytest.mark.parametrize("method", METHODS)
def test_step_by_step(method, shape, dtype):
    kwargs = samples.make(shape | {"method": method}, dtype)
    start = samples.initial_state(shape, dtype)
    y, final = diagonal_scan(**kwargs, initial_state=start)
    rest = {k: v for k, v in kwargs.items() if k not in ("u", "dt")}
    wide = torch.cat([start, torch.full_like(start, torch.nan)], dim=2)
    state = wide[:, :, : shape["n"]]  # not contiguous
    ys = [diagonal_scan_step(state, kwargs["u"][:, t], kwargs["dt"][:, t], **rest) for t in range(9)]
    for ours, truth in ((torch.stack(ys, 1), y), (state, final)):
        assert (ours - truth).abs().max() <= 10 * torch.finfo(truth.dtype).eps * truth.abs().max()
    assert wide[:, :, shape["n"] :].isnan().all()


def test_wrong_arguments_are_named():
    kwargs = samples.make(SHAPE, torch.float32)
    with pytest.raises(ValueError, match="B and C go together, got only B"):
        diagonal_scan(**kwargs | {"C": None})
    with pytest.raises(ValueError, match="the states come out"):
        diagonal_scan(**samples.make(STATES, torch.float32) | {"D": torch.zeros(33)})
    with pytest.raises(ValueError, match="one of zoh, bilinear, euler, dirac, got 'tustin'"):
        diagonal_scan(**kwargs | {"method": "tustin"})
    with pytest.raises(ValueError, match=r"u must be \(b, l, e, n, 2\) without B and C = \(2, 75, 19, 3, 2\)"):
        diagonal_scan(kwargs["u"], kwargs["dt"], kwargs["A"])
    with pytest.raises(ValueError, match=r"dt must be \(b, l, e\) = \(2, 75, 19\), got \(2, 75, 1\)"):
        diagonal_scan(**kwargs | {"dt": kwargs["dt"][..., :1]})
    with pytest.raises(TypeError, match=r"complex64; see torch\.view_as_real"):
        diagonal_scan(**kwargs | {"B": torch.zeros(19, 3, 2, dtype=torch.complex64)})
    token = {k: v[:, 0] if k in ("u", "dt") else v for k, v in kwargs.items()}
    with pytest.raises(TypeError, match=r"state must be torch.float32 for u in torch.float32, got torch.float64"):
        diagonal_scan_step(torch.zeros(2, 19, 3, 2, dtype=torch.float64), **token)

"""S4: its kernel, its O(n) recurrence and its dense form, against one another and against numpy and scipy."""

import numpy as np
import pytest
import torch
from mixer_cases import shake
from views import modes, recurrence, stamps

from longwave.errors import UsageError
from longwave.mixers import LTI, S4

torch.set_num_threads(1)


def small(**options):
    """Six channels with three systems; only the system, unless asked."""
    options = {"d_state": 8, "n_ssm": 3, "gelu": False, "glu": False} | options
    mixer = S4(6, S4.Config(**options)).double()
    shake(mixer)
    return mixer


def dense(mixer):
    """Lambda - P P* of every channel over all n modes, in numpy."""
    copies = 6 // mixer.n_ssm
    Lambda = -np.exp(mixer.A_real.detach().numpy()) - 1j * mixer.A_imag.detach().numpy()
    Lambda = np.stack([Lambda, Lambda.conj()], -1).reshape(mixer.n_ssm, -1)
    P = modes(mixer.P)  # (r, n_ssm, n)
    A = np.stack([np.diag(row) for row in Lambda]) - np.einsum("rsi,rsj->sij", P, P.conj())
    D = np.zeros(6) if mixer.D is None else mixer.D.detach().numpy()
    return np.concatenate([A] * copies), np.concatenate([modes(mixer.B)] * copies), modes(mixer.C), D


def steps(mixer, dt):
    return dt[..., None].numpy() * np.exp(mixer.inv_dt.detach().numpy())


@pytest.mark.parametrize("init", ["legs", "legt"])
@pytest.mark.parametrize("discretization", ["zoh", "bilinear"])
def test_irregular_stamps(discretization, init):
    """Exact in the sense of the rule: by scipy's matrix exponential under zoh, by a dense solve under bilinear."""
    mixer = small(discretization=discretization, init=init, skip=init == "legs")
    u, dt = torch.randn(2, 16, 6, dtype=torch.float64), stamps(2, 16)
    expected, states = recurrence(*dense(mixer), u, steps(mixer, dt), discretization)
    y, state = mixer(u, dt=dt)
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-10)
    np.testing.assert_allclose(modes(state.ssm), states, rtol=0, atol=1e-10)


@pytest.mark.parametrize("dt", [1.0, 0.4])
@pytest.mark.parametrize("init", ["legs", "legt"])
@pytest.mark.parametrize("discretization", ["zoh", "bilinear"])
def test_views_equal_the_recurrence(discretization, init, dt):
    mixer, u = small(discretization=discretization, init=init), torch.randn(2, 15, 6, dtype=torch.float64)
    even = torch.full((2, 15), dt, dtype=torch.float64)
    expected, states = recurrence(*dense(mixer), u, steps(mixer, even), discretization)
    state = mixer.init_state(2)
    stepped = torch.stack([mixer.step(u[:, t], state, dt=dt) for t in range(15)], 1)
    for y, after in (mixer.convolution(u, dt=dt), mixer.recurrent(u, dt=dt), (stepped, state)):
        torch.testing.assert_close(y, expected, rtol=0, atol=1e-9)
        np.testing.assert_allclose(modes(after.ssm), states, rtol=0, atol=1e-9)


@pytest.mark.parametrize("discretization", ["zoh", "bilinear"])
def test_is_lti_with_its_dense_A(discretization):
    upper = small(discretization=discretization, glu=True, gelu=True)
    lower = LTI(6, LTI.Config(d_state=8, discretization=discretization)).double()
    with torch.no_grad():
        A, B, C = upper.dense()  # in steps of dt
        dt = upper.inv_dt.exp()
        lower.A.copy_(A / dt[:, None, None])
        lower.B.copy_(B / dt[:, None])
        lower.C.copy_(C)
    shared = {name: upper.state_dict()[name] for name in ("inv_dt", "D", "output_linear.weight", "output_linear.bias")}
    lower.load_state_dict(shared, strict=False)
    u, dt = torch.randn(2, 20, 6, dtype=torch.float64), stamps(2, 20)
    for view in ({}, {"dt": 0.3}, {"dt": dt}, {"reset": torch.rand(2, 20) < 0.2}):
        (y, state), (z, other) = upper(u, **view), lower(u, **view)
        torch.testing.assert_close(z, y, rtol=0, atol=1e-9)
        torch.testing.assert_close(other.ssm, state.ssm.flatten(-2), rtol=0, atol=1e-9)


@pytest.mark.parametrize("init", ["legs", "legt"])
def test_views_agree_in_float32_at_length(init):
    """The published size, 4096 tokens: the kernel by Cauchy, token by token, with a duration each, and in steps."""
    torch.manual_seed(0)
    mixer, u = S4(4, S4.Config(init=init, gelu=False, glu=False)), torch.randn(1, 4096, 4)
    with torch.no_grad():
        y, state = mixer.convolution(u)
        views = [mixer.recurrent(u), mixer.continuous(u, torch.ones(1, 4096))]
        stepped_state = mixer.init_state(1)
        stepped = torch.stack([mixer.step(u[:, t], stepped_state) for t in range(4096)], 1)
        exact, exact_state = mixer.double().convolution(u.double())
    for other, after in views:
        torch.testing.assert_close(other, y, rtol=0, atol=1e-5)
        torch.testing.assert_close(after, state, rtol=0, atol=1e-5)
    torch.testing.assert_close(stepped, y, rtol=0, atol=1e-5 * float(exact.abs().max()))  # its state rests in float32
    torch.testing.assert_close(y.double(), exact, rtol=0, atol=5e-6)
    torch.testing.assert_close(state.ssm.double(), exact_state.ssm, rtol=0, atol=5e-6)


@pytest.mark.parametrize("l", [1, 2, 7, 64, 1000])
def test_the_kernel_is_exact_at_any_length(l):
    """C Abar^t Bbar by powers of the dense matrix. There is no length at which the kernel was trained."""
    mixer = small(dt_min=0.05, dt_max=0.5)
    with torch.no_grad():
        kernel = mixer._system(1.0).kernel(l)
    A, B, C, _ = dense(mixer)
    for i in range(6):
        dt, eye = np.exp(mixer.inv_dt[i].item()), np.eye(8)
        inverse = np.linalg.inv(eye - dt / 2 * A[i])
        Abar, x, expected = inverse @ (eye + dt / 2 * A[i]), inverse @ B[i] * dt, []
        for _ in range(l):
            expected.append((C[i] @ x).real)
            x = Abar @ x
        np.testing.assert_allclose(kernel[i], expected, rtol=0, atol=1e-10)


def test_begins_as_hippo():
    """The complex basis is another view of the same matrix: LegS's eigenvalues -1, ..., -n, and its response."""
    mixer = S4(2, S4.Config(d_state=8, n_ssm=1)).double()
    A, B, _ = (t.detach().numpy() for t in mixer.dense())
    dt = np.exp(mixer.inv_dt.detach().numpy())
    np.testing.assert_allclose(np.sort(np.linalg.eigvals(A[0] / dt[0]).real), -np.arange(8.0, 0, -1), rtol=1e-3)
    # The sum of B*A^k B is the same in any orthonormal basis; the real form of a pair is one, but for sqrt(2).
    n = np.arange(8)
    root = np.sqrt(2 * n + 1)
    legs = -np.tril(np.outer(root, root), -1) - np.diag(n + 1)
    for k in range(4):
        ours = 2 * B[0] @ np.linalg.matrix_power(A[0], k) @ B[0] / dt[0] ** (k + 2)
        np.testing.assert_allclose(ours, root @ np.linalg.matrix_power(legs, k) @ root, rtol=1e-5)


def test_another_rate():
    """The rule is of second order: half the step, a quarter of the distance from the exact answer."""
    mixer = small(skip=False, dt_min=0.02, dt_max=0.1)
    exact = small(skip=False, discretization="zoh")
    exact.load_state_dict(mixer.state_dict())

    def run(model, every):
        t = (torch.arange(round(60 / every), dtype=torch.float64) + 0.5) * every  # the middle of each step
        y, _ = model(torch.sin(t / 4).pow(3)[None, :, None].expand(1, -1, 6), dt=every)
        return y[:, round(1 / every) - 1 :: round(1 / every)]

    truth = run(exact, 1 / 32)
    errors = [((run(mixer, every) - truth).norm() / truth.norm()).item() for every in (1.0, 0.5, 0.25)]
    assert errors[0] < 0.1
    assert errors[1] < errors[0] / 3
    assert errors[2] < errors[1] / 3


def test_held_signal_at_twice_the_rate():
    mixer, u = small(discretization="zoh"), torch.randn(2, 30, 6, dtype=torch.float64)
    y, state = mixer(u)
    fine, fine_state = mixer(u.repeat_interleave(2, dim=1), dt=0.5)
    torch.testing.assert_close(fine[:, 1::2], y, rtol=0, atol=1e-11)
    torch.testing.assert_close(fine_state, state, rtol=0, atol=1e-11)


def test_packed_documents_in_either_view():
    mixer, u = small(init="legt"), torch.randn(3, 14, 6, dtype=torch.float64)
    before = mixer(torch.randn(3, 4, 6, dtype=torch.float64))[1]
    reset = torch.rand(3, 14) < 0.2
    reset[0] = False
    lengths = torch.tensor([14, 0, 9])
    y, state = mixer.convolution(u, before, reset=reset, lengths=lengths)
    other, other_state = mixer.recurrent(u, before, reset=reset, lengths=lengths)
    real = torch.arange(14) < lengths[:, None]
    torch.testing.assert_close(y[real], other[real])
    torch.testing.assert_close(state, other_state)


def test_sizes_and_marks():
    mixer = S4(32, S4.Config(d_state=64))
    assert mixer.state_bytes(9) == 4 * 32 * 64
    shapes = {name: tuple(p.shape) for name, p in mixer.named_parameters() if "output" not in name}
    assert shapes == {
        "inv_dt": (32,),
        "D": (32,),
        "A_real": (32, 32),
        "A_imag": (32, 32),
        "B": (32, 32, 2),
        "P": (1, 32, 32, 2),
        "C": (32, 32, 2),
    }
    slow = {"inv_dt", "A_real", "A_imag", "B", "P"}
    assert {name for name, p in mixer.named_parameters() if hasattr(p, "_no_weight_decay")} == slow
    assert {name for name, p in mixer.named_parameters() if getattr(p, "_lr_scale", 1.0) == 0.25} == slow
    assert {name for name, p in mixer.half().named_parameters() if p.dtype == torch.float32} == {*slow, "C", "D"}


def test_bad_settings():
    with pytest.raises(UsageError, match="'bilinear' or 'zoh', got 'euler'"):
        S4.Config(discretization="euler")
    with pytest.raises(UsageError, match="'legs' or 'legt', got 'lin'"):
        S4.Config(init="lin")
    with pytest.raises(UsageError, match="s4: d_state must be even, for conjugate pairs, got 5"):
        S4.Config(d_state=5)

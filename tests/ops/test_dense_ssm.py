"""The dense system's products against its recurrence, one token after the other."""

import pytest
import torch

from longwave.ops.dense_ssm import DenseSystem, krylov

torch.set_num_threads(1)


def system(d=3, n=4):
    Abar = torch.randn(d, n, n, dtype=torch.float64)
    Abar = Abar / torch.linalg.matrix_norm(Abar, 2)[:, None, None]
    return DenseSystem(Abar, *torch.randn(2, d, n, dtype=torch.float64))


def recurrence(s, u, state):
    states = [state]
    for t in range(u.shape[1]):
        states.append(torch.einsum("dij,bdj->bdi", s.Abar, states[-1]) + s.Bbar * u[:, t, :, None])
    return torch.stack(states, 1)  # (b, l + 1, d, n)


@pytest.mark.parametrize("l", [1, 2, 3, 15, 16, 17, 100])
def test_equals_the_recurrence(l):
    s, u = system(), torch.randn(2, l, 3, dtype=torch.float64)
    zero, state = torch.zeros(2, 3, 4, dtype=torch.float64), torch.randn(2, 3, 4, dtype=torch.float64)
    states = recurrence(s, u, state)
    torch.testing.assert_close(s.final_state(u, state), states[:, -1])
    torch.testing.assert_close(s.final_state(u), recurrence(s, u, zero)[:, -1])
    lengths = torch.tensor([l // 2, l])
    torch.testing.assert_close(s.final_state(u, state, lengths), states[[0, 1], lengths])
    empty = torch.zeros(2, dtype=torch.int64)
    torch.testing.assert_close(s.final_state(u, state, empty), state)

    left = recurrence(s, torch.zeros_like(u), state)[:, 1:]
    torch.testing.assert_close(s.response(state, l), torch.einsum("bldn,dn->bld", left, s.C))
    pulse = torch.zeros(1, l, 3, dtype=torch.float64)
    pulse[:, 0] = 1
    answered = recurrence(s, pulse, zero[:1])[:, 1:]
    torch.testing.assert_close(s.kernel(l), torch.einsum("bldn,dn->bdl", answered, s.C)[0])


def test_gradients():
    s, u, state = system(2, 3), torch.randn(2, 7, 2, dtype=torch.float64), torch.randn(2, 2, 3, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (*s, u, state)]

    def outputs(Abar, Bbar, C, u, state):
        s = DenseSystem(Abar, Bbar, C)
        return s.kernel(5), s.response(state, 7), s.final_state(u, state, torch.tensor([7, 4]))

    assert torch.autograd.gradcheck(outputs, leaves, fast_mode=True)


def test_krylov():
    M, v = torch.randn(2, 3, 3, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    rows, power = krylov(M, v, 5)
    for j in range(5):
        expected = torch.linalg.matrix_power(M, j) @ v[..., None]
        torch.testing.assert_close(rows[:, j], expected[..., 0])
    torch.testing.assert_close(power, torch.linalg.matrix_power(M, 8))

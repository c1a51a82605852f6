"""Layers in the repositories' names: fixtures of their keys and shapes, values by the published formulas in numpy."""

import numpy as np
import pytest
import torch
from torch.nn.functional import gelu

from longwave.errors import LongwaveError, UsageError
from longwave.hub.s4 import KINDS, layer_state_dict, load_layer
from longwave.mixers import LTI, S4, S4D, S5

D, N, S = 6, 4, 3  # channels, modes, systems


def published(kind, rank=1):
    """Random tensors with the names and shapes of the repositories, float64."""
    g = torch.Generator().manual_seed(3)

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    if kind == "s4d_minimal":
        return {
            "D": normal(D),
            "kernel.C": normal(D, N, 2),
            "kernel.log_dt": normal(D) - 3,
            "kernel.log_A_real": normal(D, N) - 0.7,
            "kernel.A_imag": 3 * normal(D, N),
            "output_linear.0.weight": normal(2 * D, D, 1),
            "output_linear.0.bias": normal(2 * D),
        }
    if kind == "s5":
        return {
            "norm.scale": normal(D),
            "norm.bias": normal(D),
            "seq.Lambda_re": -normal(N).abs(),
            "seq.Lambda_im": 3 * normal(N),
            "seq.B": normal(N, D, 2),
            "seq.C": normal(D, N, 2),
            "seq.D": normal(D),
            "seq.log_step": normal(N, 1) - 3,
            "out2.kernel": normal(D, D),
            "out2.bias": normal(D),
        }
    tensors = {
        "layer.D": normal(1, D),
        "layer.kernel.C": normal(1, D, N, 2),
        "layer.kernel.inv_dt": normal(D, 1) - 3,
        "layer.kernel.B": normal(1, S, N, 2),
        "layer.kernel.A_real": normal(S, N) - 0.7,
        "layer.kernel.A_imag": 3 * normal(S, N),
        "output_linear.0.weight": normal(2 * D, D),
        "output_linear.0.bias": normal(2 * D),
    }
    if kind == "s4":
        tensors |= {"layer.kernel.P": normal(rank, S, N, 2), "layer.kernel.l_kernel": torch.tensor(0)}
    return tensors


def complex_(tensor):
    return torch.view_as_complex(tensor).numpy()


def system(tensors):
    """dt (d,), Lambda (d, n), B (d, n), C (d, n) of S4Block's names, channel i with system i % S."""
    kernel = {name.removeprefix("layer.kernel."): t for name, t in tensors.items()}
    copies = [i % S for i in range(D)]
    Lambda = -np.exp(kernel["A_real"].numpy()) - 1j * kernel["A_imag"].numpy()
    dt = np.exp(kernel["inv_dt"].numpy()[:, 0])
    return dt, Lambda[copies], complex_(kernel["B"])[0][copies], complex_(kernel["C"])[0]


def s4_kernel(tensors, l):
    """K_t for t < l by S4's formulas (its algorithm 1): C~ and the roots of unity, rank by inverting I + r11."""
    dt, Lambda, B, C = system(tensors)
    P = complex_(tensors["layer.kernel.P"])[:, [i % S for i in range(D)]]
    omega = np.exp(-2j * np.pi * np.arange(l) / l) * (1 + 1e-12)  # off -1, where z is infinite
    z, K = 2 * (1 - omega) / (1 + omega), []
    for i in range(D):
        left, right = np.stack([B[i], *P[:, i]]), np.stack([C[i], *P[:, i].conj()])
        v = left[:, None] * right * dt[i]
        w = dt[i] * Lambda[i]
        r = (v[..., None] / (z - w[:, None])).sum(2) + (v.conj()[..., None] / (z - w.conj()[:, None])).sum(2)
        inverse = np.linalg.inv(np.eye(len(P)) + r[1:, 1:].transpose(2, 0, 1))
        low_rank = np.einsum("jl,ljk,kl->l", r[0, 1:], inverse, r[1:, 0])
        K.append(np.fft.ifft((r[0, 0] - low_rank) * 2 / (1 + omega)).real)
    return np.stack(K)


def impulse_response(mixer, l):
    """What the mixer's system answers to 1, 0, 0, ...; without D and what follows."""
    with torch.no_grad():
        return mixer._system(1.0).kernel(l).numpy()


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("length", [16, 50])
def test_s4_with_a_stored_length(rank, length):
    """C~ of the file, at its own length, gives the published kernel; ours has no length in it."""
    tensors = published("s4", rank) | {"layer.kernel.l_kernel": torch.tensor(length)}
    mixer = load_layer(tensors, "s4")
    np.testing.assert_allclose(impulse_response(mixer, length), s4_kernel(tensors, length), rtol=0, atol=1e-8)
    assert mixer.config.rank == rank
    again = layer_state_dict(mixer, l_kernel=length)
    assert set(again) == set(tensors)
    torch.testing.assert_close(again, tensors)


def test_s4_of_any_length_is_the_same_layer():
    """The published code doubles a kernel that is too short: C~ of 2 l is C~ of l times I + Abar^l. Here it's one C."""
    plain = load_layer(published("s4"), "s4")
    for length in (8, 32, 64):
        stored = layer_state_dict(plain, l_kernel=length)
        np.testing.assert_allclose(s4_kernel(stored, length), impulse_response(plain, length), rtol=0, atol=1e-8)
        torch.testing.assert_close(load_layer(stored, "s4").C, plain.C)
        x = torch.randn(1, 100, D, dtype=torch.float64)
        torch.testing.assert_close(load_layer(stored, "s4")(x)[0], plain(x)[0])


def s4d_kernel(dt, A, B, C, l):
    Abar, Bbar = np.exp(dt[:, None] * A), (np.exp(dt[:, None] * A) - 1) / A * B
    return 2 * np.stack([(C * Bbar * Abar**t).sum(1).real for t in range(l)], 1)


def block(tensors, K, D, x):
    """GLU of output_linear over gelu(K * u + D u)."""
    y = D * x
    for t in range(x.shape[1]):
        y[:, t] += sum(torch.from_numpy(K[:, j]) * x[:, t - j] for j in range(t + 1))
    weight = tensors["output_linear.0.weight"].view(2 * len(K), len(K))
    value, gate = (gelu(y) @ weight.T + tensors["output_linear.0.bias"]).chunk(2, -1)
    return value * torch.sigmoid(gate)


@pytest.mark.parametrize("kind", ["s4", "s4d", "s4d_minimal"])
def test_the_whole_layer(kind):
    tensors, x = published(kind), torch.randn(2, 20, D, dtype=torch.float64)
    if kind == "s4":
        tensors["layer.kernel.l_kernel"] = torch.tensor(20)
        K, skip = s4_kernel(tensors, 20), tensors["layer.D"][0]
    elif kind == "s4d":
        K, skip = s4d_kernel(*system(tensors), 20), tensors["layer.D"][0]
    else:
        A = -np.exp(tensors["kernel.log_A_real"].numpy()) + 1j * tensors["kernel.A_imag"].numpy()
        dt, C = np.exp(tensors["kernel.log_dt"].numpy()), complex_(tensors["kernel.C"])
        K, skip = s4d_kernel(dt, A, 1, C, 20), tensors["D"]
    y, _ = load_layer(tensors, kind)(x)
    torch.testing.assert_close(y, block(tensors, K, skip, x))


def test_the_whole_s5_layer():
    tensors, x = published("s5"), torch.randn(2, 15, D, dtype=torch.float64)
    Lambda = tensors["seq.Lambda_re"].numpy() + 1j * tensors["seq.Lambda_im"].numpy()
    step = np.exp(tensors["seq.log_step"].numpy()[:, 0])
    Abar = np.exp(step * Lambda)
    Bbar = ((Abar - 1) / Lambda)[:, None] * complex_(tensors["seq.B"])
    y = tensors["seq.D"] * x
    for i in range(2):
        state = np.zeros(N, complex)
        for t in range(15):
            state = Abar * state + Bbar @ x[i, t].numpy()
            y[i, t] += torch.from_numpy(2 * (complex_(tensors["seq.C"]) @ state).real)
    g = gelu(y, approximate="tanh")
    gate = torch.sigmoid(g @ tensors["out2.kernel"] + tensors["out2.bias"])
    torch.testing.assert_close(load_layer(tensors, "s5")(x)[0], g * gate)
    torch.testing.assert_close(load_layer(tensors, "s5", activation="half_glu2")(x)[0], y * gate)
    whole = load_layer(tensors, "s5", conj_sym=False, clip_eigs=True)
    assert whole.config.d_state == N


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_back_bit_for_bit(kind, dtype):
    tensors = {"model.0." + k: v.to(dtype) if v.is_floating_point() else v for k, v in published(kind).items()}
    mixer = load_layer(tensors | {"model.1.layer.D": torch.zeros(1)}, kind, prefix="model.0.")
    again = layer_state_dict(mixer, kind, prefix="model.0.")
    norms = {name: tensor for name, tensor in tensors.items() if "norm" in name}
    torch.testing.assert_close(again | norms, tensors, rtol=0, atol=0)
    assert all(tensor.dtype == tensors[name].dtype for name, tensor in again.items())


def test_marks_and_training_go_on():
    mixer = load_layer({k: v.float() if v.is_floating_point() else v for k, v in published("s4").items()}, "s4")
    assert mixer.A_real._no_weight_decay
    assert mixer.P._lr_scale == 0.25
    mixer(torch.randn(1, 9, D))[0].sum().backward()
    assert all(p.grad is not None for p in mixer.parameters())


def test_a_system_alone_has_no_projection():
    tensors = {name: t for name, t in published("s4d").items() if "output" not in name}
    mixer = load_layer(tensors, "s4d", gelu=False, discretization="bilinear")
    assert mixer.output_linear is None
    assert mixer.config.discretization == "bilinear"
    assert set(layer_state_dict(mixer)) == set(tensors)


def test_what_does_not_fit_is_listed():
    tensors = published("s4")
    del tensors["layer.kernel.A_imag"]
    tensors |= {"layer.kernel.inv_dt": torch.zeros(D, N), "layer.kernel.omega": torch.zeros(3)}
    with pytest.raises(LongwaveError) as caught:
        load_layer(tensors, "s4", prefix="")
    for words in (
        "the layer '', read as s4,",
        "3 differ",
        f"layer.kernel.inv_dt: expected [{D}, 1], found [{D}, {N}]",
        f"layer.kernel.A_imag: expected [{S}, {N}], missing",
        "layer.kernel.omega: not expected, found [3]",
        "one dt for all",
    ):
        assert words in str(caught.value)


def test_bad_requests():
    with pytest.raises(UsageError, match=r"'s4e'.*Did you mean 's4"):
        load_layer({}, "s4e")
    with pytest.raises(UsageError, match=r"'s4' have no setting 'glue'.*'glu'"):
        load_layer({}, "s4", glue=True)
    with pytest.raises(LongwaveError, match=r"'m\.', read as s4d, has no tensor layer\.kernel\.C"):
        load_layer(published("s4d"), "s4d", prefix="m.")
    with pytest.raises(LongwaveError, match=r"kernel\.C with 4 axes, \[1, 6, 4, 2\]; expected 3"):
        load_layer({"kernel.C": torch.zeros(1, D, N, 2)}, "s4d_minimal")
    with pytest.raises(LongwaveError, match="rank 5; longwave has rank 1 and 2"):
        load_layer(published("s4", rank=5), "s4")
    with pytest.raises(UsageError, match="s4d layers are S4D, got S4"):
        layer_state_dict(S4(4), "s4d")
    with pytest.raises(UsageError, match="of discretization='bilinear', got discretization='zoh'"):
        layer_state_dict(S4(4, S4.Config(discretization="zoh")))
    with pytest.raises(UsageError, match="an A for each of 4 channels, got n_ssm=2"):
        layer_state_dict(S4D(4, S4D.Config(n_ssm=2)), "s4d_minimal")
    with pytest.raises(UsageError, match="of skip=True, got skip=False"):
        layer_state_dict(S5(4, S5.Config(skip=False)))
    with pytest.raises(UsageError, match="no layers of kind 'lti'"):
        layer_state_dict(LTI(4, LTI.Config(d_state=2)))

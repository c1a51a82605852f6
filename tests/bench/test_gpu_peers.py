"""Peers that need a GPU, replaced by functions of the same signature: what goes in and what comes out fits ours."""

import importlib
import math
import sys
from types import ModuleType

import pytest
import torch
from torch.testing import assert_close

from longwave import ops
from longwave.bench.calls import Adapted, outcome
from longwave.ops.causal_conv1d import samples as conv_samples
from longwave.ops.gated_rms_norm import samples as norm_samples
from longwave.ops.mamba3_scan import samples as mamba3_samples
from longwave.ops.selective_scan import samples as scan_samples
from longwave.ops.ssd import samples as ssd_samples
from longwave.ops.ssd import ssd_step

ROWS = {"b": 2, "l": 7}


@pytest.fixture
def fake(monkeypatch):
    """fake(peer, {"package.module": {name: function}}): the peer's module, with these in place of the library's."""

    def install(peer, modules):
        for path, names in modules.items():
            parts = path.split(".")
            for i in range(1, len(parts) + 1):
                name = ".".join(parts[:i])
                if name not in sys.modules or getattr(sys.modules[name], "__file__", None):
                    module = ModuleType(name)
                    module.__path__ = []
                    monkeypatch.setitem(sys.modules, name, module)
            vars(sys.modules[path]).update(names)
        name = f"longwave.bench.peers.{peer}"
        monkeypatch.delitem(sys.modules, name, raising=False)
        module = importlib.import_module(name)
        monkeypatch.delitem(sys.modules, name)  # for those that come after
        return module

    return install


def selective_scan_fn(u, delta, A, B, C, D, z, delta_bias, delta_softplus):
    """u, delta, z (b, e, l), B, C (b, n, l), all contiguous."""
    assert all(t.is_contiguous() for t in (u, delta, B, C, z))
    x, dt, B, C, z = (t.transpose(1, 2) for t in (u, delta, B, C, z))
    y, _ = ops.selective_scan(x, dt, A, B, C, D=D, z=z, dt_bias=delta_bias, dt_softplus=delta_softplus)
    return y.transpose(1, 2)


def mamba_chunk_scan_combined(x, dt, A, B, C, chunk_size, **options):
    assert chunk_size == 256
    return ops.ssd(x, dt, A, B, C, **options)[0]


def mamba3_siso_combined(Q, K, V, ADT, DT, Trap, Q_bias, K_bias, Angles, D, Z):
    """ADT, DT, Trap (b, h, l); Angles (b, l, h, s); trap before the sigmoid, angles before pi tanh."""
    assert Angles.is_contiguous()
    ADT, DT, Trap = (t.transpose(1, 2) for t in (ADT, DT, Trap))
    return ops.mamba3_scan(
        V,
        DT,
        ADT / DT,
        K[:, :, None],
        Q[:, :, None],
        Trap.sigmoid(),
        math.pi * Angles.mean(2).tanh(),
        B_bias=K_bias[:, None],
        C_bias=Q_bias[:, None],
        D=D,
        z=Z,
    )[0]


def rmsnorm_fn(x, weight, bias, z, eps, group_size, norm_before_gate):
    assert bias is None
    return ops.gated_rms_norm(x, weight, z, eps=eps, group_size=group_size, norm_before_gate=norm_before_gate)


def selective_state_update(state, x, dt, A, B, C, D, dt_bias, dt_softplus):
    """Everything for each channel; its kernel knows one dt for each head by strides of 0."""
    assert dt.stride(-1) == A.stride(-1) == A.stride(-2) == dt_bias.stride(-1) == 0
    return ssd_step(state, x, dt[..., 0], A[:, 0, 0], B, C, D=D[:, 0], dt_bias=dt_bias[:, 0], dt_softplus=dt_softplus)


MAMBA_SSM = {
    "mamba_ssm.models.config_mamba": {"MambaConfig": None},
    "mamba_ssm.models.mixer_seq_simple": {"MambaLMHeadModel": None},
    "mamba_ssm.ops.selective_scan_interface": {"selective_scan_fn": selective_scan_fn},
    "mamba_ssm.ops.triton.layernorm_gated": {"rmsnorm_fn": rmsnorm_fn},
    "mamba_ssm.ops.triton.mamba3.mamba3_siso_combined": {"mamba3_siso_combined": mamba3_siso_combined},
    "mamba_ssm.ops.triton.selective_state_update": {"selective_state_update": selective_state_update},
    "mamba_ssm.ops.triton.ssd_combined": {"mamba_chunk_scan_combined": mamba_chunk_scan_combined},
}


def agree(peer, ours, inputs):
    """Outputs and the gradients of all that goes in, as through ours, also where it is given its native arguments."""
    found, truth = (outcome(call, inputs, backward=True).results for call in (peer, ours))
    assert set(found) == set(truth)
    for what, value in truth.items():
        assert_close(found[what], value, rtol=1e-4, atol=1e-5, msg=lambda m, what=what: f"{what}: {m}")
    if isinstance(peer, Adapted):
        assert_close(peer.call(**peer.native(**inputs)), truth["y"], rtol=1e-4, atol=1e-5)


def first(op):
    return lambda **inputs: op(**inputs)[0]


@pytest.mark.parametrize(
    ("name", "samples", "shape"),
    [
        ("selective_scan", scan_samples, {"e": 6, "n": 4, "dt_softplus": True}),
        ("ssd", ssd_samples, {"h": 4, "p": 3, "g": 2, "n": 5, "dt_softplus": True}),
        ("mamba3_scan", mamba3_samples, {"h": 2, "p": 4, "r": 1, "g": 1, "n": 6, "s": 2, "z": True}),
    ],
)
def test_mamba_ssm(name, samples, shape, fake):
    inputs = samples.make(ROWS | shape, torch.float32)
    agree(getattr(fake("mamba_ssm", MAMBA_SSM), name), first(ops.OPS[name]), inputs)


def test_mamba_ssm_gated_rms_norm(fake):
    inputs = norm_samples.make(ROWS | {"e": 12, "gate": True, "group_size": 6}, torch.float32)
    agree(fake("mamba_ssm", MAMBA_SSM).gated_rms_norm, ops.gated_rms_norm, inputs)


def test_mamba_ssm_step(fake):
    shape = {"b": 2, "l": 1, "h": 4, "p": 3, "g": 2, "n": 5, "dt_softplus": True}
    inputs = ssd_samples.make(shape, torch.float32)
    inputs |= {key: inputs[key][:, 0] for key in ("x", "dt", "B", "C")}
    del inputs["chunk_len"]
    inputs["state"] = ssd_samples.initial_state(shape, torch.float32)
    found, truth = (
        outcome(call, inputs, backward=False).results
        for call in (fake("mamba_ssm", MAMBA_SSM).ssd_step, lambda **inputs: ssd_step(**inputs))
    )
    assert_close(found, truth)
    assert not torch.equal(truth["state"], inputs["state"])


def test_causal_conv1d(fake):
    def causal_conv1d_fn(x, weight, bias, activation):
        assert x.stride(1) == 1  # channels last, as (b, e, l)
        return ops.causal_conv1d(x.transpose(1, 2), weight, bias, activation=activation)[0].transpose(1, 2)

    peer = fake("causal_conv1d", {"causal_conv1d": {"causal_conv1d_fn": causal_conv1d_fn}})
    inputs = conv_samples.make(ROWS | {"e": 6, "w": 4, "activation": "silu"}, torch.float32)
    agree(peer.causal_conv1d, first(ops.causal_conv1d), inputs)


def test_fla(fake):
    def chunk_simple_gla(q, k, v, g, scale):
        """h_t = exp(g_t) h_{t-1} + v_t k_t^T for each head; y_t = h_t q_t."""
        state, ys = 0.0, []
        for t in range(q.shape[1]):
            state = g[:, t].exp()[..., None, None] * state + v[:, t, :, :, None] * k[:, t, :, None, :]
            ys.append((state @ q[:, t, :, :, None])[..., 0])
        return scale * torch.stack(ys, 1), None

    def causal_conv1d(x, weight, bias, activation):
        return ops.causal_conv1d(x, weight, bias, activation=activation)

    fla = fake(
        "fla",
        {
            "fla.modules.causal_conv1d": {"causal_conv1d": causal_conv1d},
            "fla.ops.simple_gla": {"chunk_simple_gla": chunk_simple_gla},
        },
    )
    inputs = ssd_samples.make(ROWS | {"h": 4, "p": 3, "g": 2, "n": 5, "dt_softplus": True}, torch.float32)
    agree(fla.ssd, first(ops.ssd), inputs)
    inputs = conv_samples.make(ROWS | {"e": 6, "w": 4, "activation": "silu"}, torch.float32)
    agree(fla.causal_conv1d, first(ops.causal_conv1d), inputs)

"""`longwave doctor`: every kernel is checked, and a wrong one is found."""

import importlib
import json

import pytest
import torch

from longwave.cli import doctor, kernel_check
from longwave.ops import OPS

BESIDES = {"linear_step", "ssm_kernel"}
BESIDES |= {
    f"{name}_step" for name in ("causal_conv1d", "diagonal_scan", "fft_conv", "mamba3_scan", "selective_scan", "ssd")
}


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(doctor, "IMPORTS", "print('not measured')")


def test_all_is_well(longwave):
    done = longwave("doctor", "--json")
    assert done.status == 0
    found = json.loads(done.out)
    assert set(found["kernels"]) == set(OPS) | BESIDES
    assert all(check["ok"] and check["error"] > 0 for check in found["kernels"].values())
    assert found["import"].startswith("torch ")
    assert "torch 2" in found["packages"]


def test_text(longwave, quick):
    out = longwave("doctor").out
    assert all(f"\n{name} " in out for name in BESIDES)
    assert out.count("ok ") == len(OPS) + len(BESIDES)
    assert "WRONG" not in out


def test_a_wrong_kernel_is_named(longwave, quick, monkeypatch):
    def wrong(impl="fused", **inputs):
        y = OPS["gated_rms_norm"](**inputs, impl=impl)
        return y + 1e-4 if impl == "fused" else y

    monkeypatch.setattr(kernel_check, "OPS", OPS | {"gated_rms_norm": wrong})
    done = longwave("doctor")
    assert done.status == 1
    assert done.complaint.startswith("wrong kernels: gated_rms_norm in Numba;")
    assert "WRONG: result: error" in done.out


def test_a_wrong_step_is_named(longwave, quick, monkeypatch):
    from longwave.ops.ssd.api import ssd_step

    def forgetful(state, x, dt, A, B, C, *, D=None, dt_bias=None, dt_softplus=False, dt_limit=(0.0, float("inf"))):
        y = ssd_step(state, x, dt, A, B, C, D=D, dt_bias=dt_bias, dt_softplus=dt_softplus, dt_limit=dt_limit)
        state.mul_(0.999)
        return y

    monkeypatch.setattr(importlib.import_module("longwave.ops.ssd"), "ssd_step", forgetful)
    assert longwave("doctor").complaint.startswith("wrong kernels: ssd_step in Numba;")


def test_advice(longwave, quick, monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "check_kernels", lambda device: [])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # the tests run on one thread
    monkeypatch.setattr(doctor.os, "sched_getaffinity", lambda _: range(8))
    monkeypatch.setattr(doctor, "FEW_GB", 1e9)
    lines = json.loads(longwave("doctor", "--json").out)["advice"]
    assert "1 threads for 8 cores: unset OMP_NUM_THREADS" in lines
    assert any("export LONGWAVE_CACHE=" in line for line in lines)


def test_no_folder_for_compiled_kernels(longwave, quick, monkeypatch):
    from longwave.ops import register

    def refuse(module):
        raise RuntimeError(f"cannot cache function '_ages': no locator available for file {module!r}")

    launch = register._launcher("longwave.ops.causal_conv1d.cpu:forward")
    monkeypatch.setattr(register.importlib, "import_module", refuse)
    with pytest.raises(register.LongwaveError, match=r"export NUMBA_CACHE_DIR=~/\.numba"):
        launch()


def test_what_a_gpu_is_asked_for_finds_a_wrong_gradient():
    """On the CPU here: in bfloat16, with gradients, in the sizes that the GPU's fastest forms take."""
    norm, device = OPS["gated_rms_norm"], torch.device("cpu")
    assert kernel_check._check_on_gpu("gated_rms_norm", norm, device).ok

    def wrong(impl="fused", **inputs):
        y = norm(**inputs, impl=impl)
        return y + 0.2 * (y - y.detach()) if impl == "fused" else y

    check = kernel_check._check_on_gpu("gated_rms_norm", wrong, device)
    assert not check.ok
    assert check.worst.startswith("the gradient of")


def test_nothing_is_said_of_operators_without_a_kernel_for_gpus(monkeypatch):
    monkeypatch.setattr(kernel_check, "has_gpu_kernel", lambda op: False)
    assert list(kernel_check.check_kernels(torch.device("cuda"))) == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_all_is_well_on_a_gpu():
    checks = list(kernel_check.check_kernels(torch.device("cuda")))
    assert {check.name for check in checks} > set(OPS)
    assert all(check.ok for check in checks), [check for check in checks if not check.ok]
    assert {check.form for check in checks} <= {"Triton", "Gluon", "Gluon and Triton", "torch"}

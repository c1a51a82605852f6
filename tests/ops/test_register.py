"""Which form of an operator runs where."""

import sys

import pytest
import torch

from longwave.errors import LongwaveError
from longwave.ops import register

GPU = torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch):
    """gpu(capability, version): a machine with that GPU and that Triton."""

    def make(capability, version):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(register, "_triton_version", lambda: version)
        register.on_hopper.cache_clear()

    yield make
    register.on_hopper.cache_clear()


@pytest.mark.parametrize(
    ("capability", "version", "hopper"),
    [((9, 0), (3, 6), True), ((9, 0), (3, 5), False), ((9, 0), (3, 7), False), ((8, 0), (3, 6), False)],
)
def test_hopper_forms_run_on_hopper_with_a_tested_triton(gpu, capability, version, hopper):
    gpu(capability, version)
    assert register.on_hopper(GPU) == hopper


def test_words_for_what_runs(gpu):
    gpu((9, 0), (3, 6))
    assert "Gluon for" in register.gpu_forms(GPU)
    assert "ssd_forward" in register.gpu_forms(GPU)
    register.on_hopper.cache_clear()
    gpu((9, 0), (3, 7))
    assert "tested with Triton 3.6 to 3.6" in register.gpu_forms(GPU)
    register.on_hopper.cache_clear()
    gpu((8, 6), (3, 6))
    assert register.gpu_forms(GPU) == "Triton on the GPU"


def test_without_triton_the_way_out_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    monkeypatch.delitem(sys.modules, "longwave.ops.ssd.triton", raising=False)
    with pytest.raises(LongwaveError, match="pip install triton"):
        register._launcher("longwave.ops.ssd.triton:forward")()


def test_float64_on_a_gpu_takes_the_reference():
    class Tensor:
        device, dtype = torch.device("cuda", 0), torch.float64

    assert not register.use_kernel("ssd", "fused", Tensor())  # pyright: ignore[reportArgumentType]
    Tensor.dtype = torch.bfloat16
    assert register.use_kernel("ssd", "fused", Tensor())  # pyright: ignore[reportArgumentType]
    assert not register.use_kernel("ssd", "reference", Tensor())  # pyright: ignore[reportArgumentType]

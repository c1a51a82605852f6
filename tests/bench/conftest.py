import sys

import pytest
import torch

from longwave.bench.timing import Harness
from longwave.mixers import Mamba, Mamba2
from longwave.models.language_model import LanguageModel

MIXERS = {"mamba": Mamba.Config(d_state=8), "mamba2": Mamba2.Config(d_state=16, d_head=32)}


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def block(monkeypatch):
    """block(package, module): the package looks as if not installed, and the module that imports it is read anew."""

    def hide(package, module):
        for name in [package, *(name for name in sys.modules if name.startswith(f"{package}."))]:
            monkeypatch.setitem(sys.modules, name, None)
        monkeypatch.delitem(sys.modules, f"longwave.bench.peers.{module}", raising=False)

    return hide


@pytest.fixture
def ungated():
    return Harness(Harness.Config(runs=1), None)


@pytest.fixture
def toy():
    """toy("mamba") is a preset shrunk: 2 layers, d_model 64, vocabulary 256."""
    return lambda kind: LanguageModel.Config(vocab_size=256, d_model=64, layers=(MIXERS[kind],) * 2, residual_fp32=True)

"""On a CUDA device: the kernels hold to the contract of tests/ops, and everything works there. Run with `-m gpu`."""

import importlib
from pathlib import Path

import pytest
import torch

import longwave
from longwave.mixers import MIXERS, Attention, Mamba, Mamba2, SwiGLU
from longwave.ops import OPS
from longwave.tasks.text import Text
from longwave.training.config import Train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.filterwarnings("ignore:longwave has no .* kernel"),
    pytest.mark.filterwarnings("ignore:RNN module weights are not part of single contiguous chunk"),
]


@pytest.mark.parametrize("name", OPS)
def test_operators_agree_with_the_cpu(name):
    samples = importlib.import_module(f"longwave.ops.{name}.samples")
    for shape in samples.SHAPES:
        found = [OPS[name](**samples.make(shape, torch.float64, device)) for device in ("cuda", "cpu")]
        for ours, truth in zip(*(f if isinstance(f, tuple) else (f,) for f in found), strict=True):
            assert ours.device.type == "cuda"
            torch.testing.assert_close(ours.cpu(), truth, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kind", MIXERS)
def test_mixers_step_as_they_run(kind):
    config = MIXERS[kind].Config(**{"attention": {"n_heads": 4}, "mamba2": {"d_head": 8}}.get(kind, {}))
    mixer = MIXERS[kind](32, config).to("cuda")
    x = torch.randn(2, 9, 32, device="cuda")
    with torch.backends.cudnn.flags(allow_tf32=False):  # cuDNN's LSTM and GRU round to 10 bits otherwise
        whole, _ = mixer(x)
    state = mixer.init_state(2, length=9, device="cuda")
    with torch.no_grad():
        steps = torch.stack([mixer.step(x[:, t], state) for t in range(9)], 1)
    torch.testing.assert_close(steps, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_train_save_load_generate(tmp_path, dtype):
    layers = (Mamba2.Config(d_head=8, d_state=16), SwiGLU.Config(), Attention.Config(n_heads=4), Mamba.Config())
    config = Train.Config(
        model=longwave.LanguageModel.Config(vocab_size=257, d_model=32, layers=layers),
        task=Text.Config(paths=(str(Path(longwave.__file__).parent),), seq_len=64, cache_dir=str(tmp_path / "cache")),
        out=str(tmp_path / "run"),
        steps=6,
        batch_size=4,
        dtype=dtype,
        sample_tokens=8,
    )
    model = longwave.train(config)
    assert next(model.model.parameters()).device.type == "cuda"
    told = model.complete("def ", max_tokens=12, temperature=0)
    again = longwave.load(tmp_path / "run", device="cuda").complete("def ", max_tokens=12, temperature=0)
    assert told.tokens == again.tokens
    told.state.save(tmp_path / "state")
    state = longwave.State.load(tmp_path / "state", model.model)
    assert model.complete("x", max_tokens=4, temperature=0, state=state).tokens

"""A run small enough for a test: a hybrid of 16 channels on a text written for it."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from longwave.mixers import Attention, Mamba2, SwiGLU
from longwave.models.language_model import LanguageModel
from longwave.tasks.text import Text
from longwave.training.config import Optim, Train

LAYERS = (
    Mamba2.Config(d_state=8, d_head=8),
    SwiGLU.Config(d_inner=16),
    Attention.Config(n_heads=2, d_head=8),
)


@pytest.fixture(autouse=True)
def _one_thread():
    """Models this small gain nothing from a second one, and suffer where cores are shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def corpus(tmp_path) -> Path:
    path = tmp_path / "corpus.txt"
    words = ["state", "space", "scan", "gate", "chunk", "wave", "long"]
    draw = random.Random(0)
    path.write_text(" ".join(draw.choice(words) for _ in range(2000)))
    return path


@pytest.fixture
def make(tmp_path, corpus) -> Callable[..., Train.Config]:
    """make(steps=..., ...) -> Train.Config. Equal arguments give equal configurations."""

    def build(**changes) -> Train.Config:
        task = Text.Config(paths=(str(corpus),), seq_len=32, split="tail", cache_dir=str(tmp_path / "cache"))
        values = dict(
            model=LanguageModel.Config(vocab_size=257, d_model=16, layers=LAYERS),
            task=task,
            optim=Optim.Config(lr=3e-3),
            out=str(tmp_path / "run"),
            steps=4,
            batch_size=2,
            eval_every=0,
            checkpoint_every=0,
            sample_tokens=4,
            device="cpu",
        )
        return Train.Config(**(values | changes))

    return build

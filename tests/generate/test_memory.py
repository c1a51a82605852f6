"""Decoding takes no more memory at token 20,000 than at token 100, save for what attention has to keep."""

import gc
import resource
from pathlib import Path

import pytest
import torch

from longwave.generate.text_model import TextModel
from longwave.mixers.attention import Attention
from longwave.mixers.mamba import Mamba
from longwave.mixers.mamba2 import Mamba2
from longwave.models.language_model import LanguageModel


def text_model(*layers) -> TextModel:
    torch.manual_seed(0)
    return TextModel(LanguageModel(LanguageModel.Config(vocab_size=64, d_model=32, layers=layers)), None)


def test_state_space_models_keep_the_same_bytes_however_much_is_said():
    model = text_model(Mamba.Config(), Mamba2.Config(d_state=16, d_head=16))
    stream = model.generate([1], max_tokens=400)
    sizes = {stream.state.nbytes for _ in stream}
    assert sizes == {model.model.state_bytes(1)}


def test_attention_keeps_what_state_bytes_says_and_little_room_beside():
    model = text_model(Attention.Config(n_heads=2), Mamba2.Config(d_state=16, d_head=16))
    stream = model.generate([1], max_tokens=700)
    for n, _ in enumerate(stream, 1):
        if n % 100 == 0:
            held = stream._decoder._state.nbytes  # with the room for tokens to come
            assert stream.state.nbytes == model.model.state_bytes(1 + n)
            assert model.model.state_bytes(n) <= held <= model.model.state_bytes(1 + n + max(64, n // 8))


@pytest.mark.slow
def test_memory_of_the_process_is_flat_from_token_100_to_20_000(capsys):
    if not Path("/proc/self/statm").exists():
        pytest.skip("reads /proc/self/statm, which this system lacks")
    model = text_model(Mamba.Config(), Mamba2.Config(d_state=16, d_head=16))
    resident = {}
    for n, _ in enumerate(model.generate([1], max_tokens=20_000, seed=0), 1):
        if n in (100, 1_000, 20_000):
            gc.collect()
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            resident[n] = pages * resource.getpagesize()
    with capsys.disabled():
        print("\nresident MiB at token", {n: round(size / 2**20, 2) for n, size in resident.items()})
    assert resident[20_000] - resident[100] < 2 * 2**20

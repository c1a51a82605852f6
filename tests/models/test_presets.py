"""Published sizes have the published numbers of parameters."""

import pytest
import torch

from longwave.models.language_model import LanguageModel
from longwave.models.presets import PRESETS

# Of the published checkpoints of state-spaces/mamba-*.
PUBLISHED = {
    "mamba-130m": 129_135_360,
    "mamba-370m": 371_516_416,
    "mamba-790m": 793_204_224,
    "mamba-1.4b": 1_372_178_432,
    "mamba-2.8b": 2_768_345_600,
}


def exact(name: str) -> int:
    """Parameters, counted from the papers' block diagrams."""
    d, layers = {
        "130m": (768, 24), "370m": (1024, 48), "780m": (1536, 48), "1.3b": (2048, 48), "2.7b": (2560, 64),
    }[name.split("-")[1]]  # fmt: skip
    e, n, w = 2 * d, 128, 4
    h, channels = e // 64, e + 2 * n
    block = d * (2 * e + 2 * n + h) + channels * (w + 1) + 3 * h + e + e * d
    return 50288 * d + layers * (d + block) + d


def transformer(d: int, layers: int, hidden: int) -> int:
    return 50288 * d + layers * (2 * d + 4 * d * d + 3 * d * hidden) + d


TRANSFORMERS = {
    "transformerpp-125m": transformer(768, 12, 2048),
    "transformerpp-350m": transformer(1024, 24, 2816),
    "transformerpp-760m": transformer(1536, 24, 4096),
    "transformerpp-1.3b": transformer(2048, 24, 5504),
    "transformerpp-2.7b": transformer(2560, 32, 6912),
}


def build(name):
    with torch.device("meta"):
        return LanguageModel(PRESETS[name]())


@pytest.mark.parametrize("name", PRESETS)
def test_parameter_count(name):
    count = build(name).parameter_count()
    expected = PUBLISHED.get(name) or TRANSFORMERS.get(name) or exact(name)
    assert count == expected
    size = float(name.split("-")[1][:-1]) * {"m": 1e6, "b": 1e9}[name[-1]]
    assert abs(count / size - 1) < 0.035


@pytest.mark.parametrize(("name", "oracle"), [("mamba-130m", "MambaConfig"), ("mamba2-130m", "Mamba2Config")])
def test_the_other_library_s_shapes(name, oracle):
    """transformers' model of the published configuration has as many parameters in as many tensors."""
    transformers = pytest.importorskip("transformers")
    common = {"hidden_size": 768, "num_hidden_layers": 24, "tie_word_embeddings": True}
    more = {"mamba-130m": {"vocab_size": 50280, "state_size": 16}, "mamba2-130m": {
        "vocab_size": 50288, "state_size": 128, "n_groups": 1, "num_heads": 24, "head_dim": 64}}[name]  # fmt: skip
    with torch.device("meta"):
        other = transformers.AutoModelForCausalLM.from_config(getattr(transformers, oracle)(**common, **more))
    ours = build(name)
    assert sum(p.numel() for p in other.parameters()) == ours.parameter_count()
    shapes = [sorted(tuple(p.shape) for p in model.parameters()) for model in (ours, other)]
    assert shapes[0] == shapes[1]


def test_state_of_published_sizes():
    """Layers x (3 inputs of the convolution in bfloat16, the recurrent state in float32); keys and values."""
    assert build("mamba-130m").state_bytes(10**6, torch.bfloat16) == 24 * (3 * 1536 * 2 + 1536 * 16 * 4)
    assert build("mamba2-2.7b").state_bytes(1, torch.bfloat16) == 64 * (3 * (5120 + 256) * 2 + 5120 * 128 * 4)
    assert build("transformerpp-125m").state_bytes(1000, torch.bfloat16) == 12 * 2 * 768 * 1000 * 2


@pytest.mark.parametrize("name", ["mamba-130m", "mamba2-130m", "transformerpp-125m"])
def test_flops_are_twice_the_parameters_and_the_scan(name):
    model = build(name)
    vectors = sum(p.numel() for p in model.parameters() if p.ndim < 2)
    per_token = model.flops(1) / 2 / (model.parameter_count() - vectors)
    assert 1 <= per_token < 1.1

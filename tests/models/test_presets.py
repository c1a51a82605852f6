"""Published sizes have the published numbers of parameters, and keep the published amount of state."""

import pytest
import torch

from longwave.mixers import Attention, Mamba, Mamba2, MoE, SwiGLU
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


def h3(d: int, layers: int, attention: int) -> int:
    """Per H3 layer 4 projections, 2 x 64 taps, 32 complex modes (A, B, C) with a dt, two D; LayerNorms and biases."""
    h3_layer = 4 * (d + 1) * d + d * (2 * 64 + 3 * 32 * 2 + 1 + 2)
    block = 4 * d + 2 * 4 * d * d + 5 * d
    return 50264 * d + layers * block + (layers - attention) * h3_layer + attention * 4 * (d + 1) * d + 2 * d


H3 = {
    "h3-125m": 126_387_456,  # as its README prints
    "h3-355m": h3(1024, 24, 2),
    "h3-1.3b": h3(2048, 24, 2),
    "h3-2.7b": h3(2560, 32, 3),
}
# In billions, as published.
CARDS = {
    "falcon-h1-0.5b": "0.5",
    "nemotron-h-4b": "4",
    "nemotron-h-8b": "8",
    "nemotron-3-nano-30b": "31.6",
    "zamba2-7b": "7.4",
}
HYENA_DNA = {
    "hyenadna-tiny-1k": "0.44",
    "hyenadna-tiny-1k-d256": "1.64",
    "hyenadna-tiny-16k-d128": "0.44",
    "hyenadna-small-32k": "3.28",
    "hyenadna-medium-160k": "6.55",
    "hyenadna-medium-450k": "6.55",
    "hyenadna-large-1m": "6.55",
}
HYBRIDS = ["jamba-v0.1", "bamba-9b", "stripedhyena-7b", "evo-1-8k", "evo-1-131k", *H3, *CARDS, *HYENA_DNA]


def build(name):
    return on_meta(PRESETS[name]())


def on_meta(config):
    with torch.device("meta"):
        return LanguageModel(config)


@pytest.mark.parametrize("name", [name for name in PRESETS if name not in HYBRIDS])
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


def test_hybrids_have_the_shapes_of_the_other_library_s():
    """transformers' defaults for Jamba are v0.1's; its Bamba differs from the published one where it is said here."""
    transformers = pytest.importorskip("transformers")
    bamba = {"vocab_size": 128256, "mamba_d_state": 128, "attn_layer_indices": [9, 18, 27]}
    for name, config in (("jamba-v0.1", transformers.JambaConfig()), ("bamba-9b", transformers.BambaConfig(**bamba))):
        with torch.device("meta"):
            other = transformers.AutoModelForCausalLM.from_config(config)
        ours = build(name)
        assert sum(p.numel() for p in other.parameters()) == ours.parameter_count()
        active = {"jamba-v0.1": 12e9, "bamba-9b": 9.78e9}[name]
        assert ours.active_parameter_count() == pytest.approx(active, rel=0.02)
    assert build("jamba-v0.1").parameter_count() == pytest.approx(52e9, rel=0.01)


@pytest.mark.parametrize("name", CARDS)
def test_parameters_of_hybrids(name):
    billions = build(name).parameter_count() / 1e9
    assert f"{billions:.{len(CARDS[name].partition('.')[2])}f}" == CARDS[name]


@pytest.mark.parametrize("name", H3)
def test_parameters_of_h3(name):
    assert build(name).parameter_count() == H3[name]
    assert h3(768, 12, 1) == H3["h3-125m"]


def test_parameters_and_state_of_stripedhyena():
    """7.65e9 and 6.45e9 parameters; per Hyena block 3 d (w-1) inputs in bfloat16 and 8 d n bytes."""
    hyena, evo = build("stripedhyena-7b"), build("evo-1-8k")
    assert f"{hyena.parameter_count() / 1e9:.2f}" == "7.65"
    assert f"{evo.parameter_count() / 1e9:.2f}" == "6.45"
    assert hyena.state_bytes(0, torch.bfloat16) == 16 * (3 * 4096 * 2 * 2 + 8 * 4096 * 2) == 1.75 * 2**20
    assert evo.state_bytes(0, torch.bfloat16) == 29 * (3 * 4096 * 2 * 2 + 8 * 4096 * 8)
    assert hyena.state_bytes(1000, torch.bfloat16) - hyena.state_bytes(0, torch.bfloat16) == 16 * 2 * 1024 * 2 * 1000
    assert build("evo-1-131k").parameter_count() == evo.parameter_count()


def transformer_of(n_kv_heads: int, channel, vocab_size: int = 32000) -> LanguageModel:
    """The frame of Llama 2 7B, Mistral 7B and Mixtral 8x7B: 32 layers, 32 heads of 128."""
    attention = Attention.Config(n_heads=32, n_kv_heads=n_kv_heads)
    layers = (attention, channel) * 32
    return on_meta(LanguageModel.Config(vocab_size=vocab_size, d_model=4096, layers=layers, tie_embeddings=False))


LLAMA = transformer_of(32, SwiGLU.Config(d_inner=11008))
MISTRAL = transformer_of(8, SwiGLU.Config(d_inner=14336))
MIXTRAL = transformer_of(8, MoE.Config(n_experts=8, top_k=2, expert=SwiGLU.Config(d_inner=14336)))


def test_mixture_of_experts_of_published_size():
    assert LLAMA.parameter_count() == LLAMA.active_parameter_count() == 6_738_415_616
    assert MISTRAL.parameter_count() == 7_241_732_096
    assert MIXTRAL.parameter_count() == 46_702_792_704
    assert MIXTRAL.active_parameter_count() == 12_879_925_248


def test_keys_and_values_at_256k_tokens_are_those_of_jamba_s_table_1():
    """arXiv:2403.19887, table 1: 16 bit; Llama-2 128 GB, Mistral and Mixtral 32 GB, Jamba 4 GB."""
    length, gib = 256 * 1024, 2**30
    assert LLAMA.state_bytes(length, torch.bfloat16) == 128 * gib
    assert MISTRAL.state_bytes(length, torch.bfloat16) == 32 * gib
    assert MIXTRAL.state_bytes(length, torch.bfloat16) == 32 * gib
    jamba = build("jamba-v0.1")
    attention = [block.mixer for block in jamba.layers if isinstance(block.mixer, Attention)]
    assert sum(mixer.state_bytes(length, torch.bfloat16) for mixer in attention) == 4 * gib
    constant = 28 * (3 * 8192 * 2 + 8192 * 16 * 4)
    assert jamba.state_bytes(length, torch.bfloat16) == 4 * gib + constant


@pytest.mark.parametrize(
    ("name", "mib", "kib_per_token"),
    [
        ("mamba-130m", "2.5", 0),
        ("mamba-2.8b", "22.5", 0),
        ("mamba2-2.7b", "163", 0),
        ("jamba-v0.1", "15.8", 16),
        ("bamba-9b", "118", 12),
        ("transformerpp-2.7b", "0", 320),
    ],
)
def test_state_of_published_sizes(name, mib, kib_per_token):
    """Other libraries keep as many inputs of a convolution as it is wide, the last of them for nothing: one more."""
    model = build(name)
    spare = sum(
        block.mixer.conv1d.in_channels * 2 for block in model.layers if isinstance(block.mixer, (Mamba, Mamba2))
    )
    begun = model.state_bytes(0, torch.bfloat16)
    assert f"{(begun + spare) / 2**20:.{len(mib.partition('.')[2])}f}" == mib
    assert model.state_bytes(1000, torch.bfloat16) - begun == kib_per_token * 1024 * 1000


def test_state_is_counted_to_the_byte():
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


@pytest.mark.parametrize(("name", "millions"), HYENA_DNA.items())
def test_hyena_dna(name, millions):
    """The cards' counts leave out what is not trained: the positions that filters are computed from."""
    model = build(name)
    fixed = sum(p.numel() for key, p in model.named_parameters() if ".pos_emb." in key or key.endswith(".deltas"))
    assert f"{(model.parameter_count() - fixed) / 1e6:.2f}" == millions
    assert model.layers[0].mixer.config.l_max >= {"1k": 1024, "1m": 10**6}.get(name.split("-")[2], 16_384)

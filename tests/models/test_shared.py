"""Layers that call on a shared Transformer: against the formula, what they share and what they do not."""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import gelu
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from longwave.errors import UsageError
from longwave.mixers import MLP, Attention, Mamba2, Shared
from longwave.models.language_model import LanguageModel

SSM = Mamba2.Config(d_state=8, d_head=16)
SHARED = Shared.Config(mixer=SSM, attention=Attention.Config(n_heads=4), d_inner=24, rank=3, attention_adapters=True)
OTHER = replace(SHARED, index=1, mixer=Mamba2.Config(d_state=4, d_head=8))
LAYERS = (SSM, SHARED, OTHER, SHARED, OTHER)


def rms(x, weight):
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def projected(layer, x):
    return x @ layer.base.weight.T + x @ layer.down.weight.T @ layer.up.weight.T


def attention(a, x):
    """Causal attention without a kernel, positions or grouped keys."""
    b, l, _ = x.shape
    q, k, v = (projected(p, x).view(b, l, a.n_heads, a.d_head) for p in (a.q_proj, a.k_proj, a.v_proj))
    scores = torch.einsum("blhp,bshp->bhls", q, k) / a.d_head**0.5
    scores = scores.masked_fill(torch.ones(l, l, dtype=torch.bool).triu(1), -torch.inf)
    return torch.einsum("bhls,bshp->blhp", scores.softmax(-1), v).flatten(2) @ a.o_proj.weight.T


def told(t, x, embedded):
    a = attention(t.attention, rms(torch.cat([x, embedded], -1), t.norm.weight))
    gate, up = projected(t.gate_up_proj, rms(a, t.norm_mlp.weight)).chunk(2, -1)
    return (gelu(gate) * up) @ t.down_proj.weight.T @ t.linear.weight.T


def test_a_layer_is_its_formula(build, tokens):
    shared = replace(SHARED, attention=Attention.Config(n_heads=4, rotary=0.0))
    model = build(layers=(SSM, shared, shared)).double()
    embedded = x = model.embedding(tokens)
    x = x + model.layers[0].mixer(rms(x, model.layers[0].norm.weight))[0]
    for block in model.layers[1:]:
        inner = rms(x + told(block.transformer, x, embedded), block.norm.weight)
        x = x + block.mixer(inner)[0]
    assert_close(model.hidden(tokens)[0], rms(x, model.norm_f.weight))


def common(block):
    t = block.transformer
    parts = (t.norm, t.attention.k_proj.base, t.attention.o_proj, t.norm_mlp, t.gate_up_proj.base, t.down_proj)
    return [part.weight for part in parts]


def own(block):
    t = block.transformer
    return [block.norm.weight, block.mixer.in_proj.weight, t.linear.weight, t.attention.k_proj.up.weight]


def assert_shared(model):
    _, *blocks = model.layers
    for a, b in ((0, 2), (1, 3)):
        assert all(x is y for x, y in zip(common(blocks[a]), common(blocks[b]), strict=True))
    for a, b in ((0, 1), (0, 3)):
        assert not any(x is y for x, y in zip(common(blocks[a]), common(blocks[b]), strict=True))
    assert len({id(x) for block in blocks for x in own(block)}) == 4 * len(own(blocks[0]))


def test_layers_of_one_index_share_whatever_becomes_of_the_model(build, tmp_path):
    model = build(layers=LAYERS)
    assert_shared(model)
    assert_shared(model.bfloat16().float())
    model.save(tmp_path)
    assert_shared(LanguageModel.load(tmp_path))
    with torch.device("meta"):
        empty = LanguageModel(model.config)
    empty.to_empty(device="cpu").reset_parameters()
    assert_shared(empty)
    assert all(parameter.isfinite().all() for parameter in empty.parameters())


def test_shared_weights_are_stored_and_counted_once(build, tmp_path):
    from safetensors.torch import load_file

    model = build(layers=LAYERS)
    model.save(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert sum(tensor.numel() for tensor in stored.values()) == model.parameter_count()
    assert "layers.1.transformer.down_proj.weight" in stored
    assert "layers.3.transformer.down_proj.weight" not in stored
    assert "layers.3.transformer.gate_up_proj.up.weight" in stored


def test_adapters_start_as_nothing():
    torch.manual_seed(0)
    layers = (SHARED, SHARED)
    model = LanguageModel(LanguageModel.Config(vocab_size=61, d_model=32, layers=layers))
    plain = LanguageModel(
        replace(model.config, layers=tuple(replace(layer, rank=None, attention_adapters=False) for layer in layers))
    )
    missing = plain.load_state_dict(model.state_dict(), strict=False)
    assert not missing.missing_keys
    tokens = torch.randint(0, 61, (1, 9))
    assert_close(plain(tokens)[0], model(tokens)[0])


def test_gradients_of_all_calls_add_up(build, tokens):
    model = build(layers=LAYERS)
    model.loss(tokens[:, :-1], tokens[:, 1:]).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_state_and_flops_are_counted(build, tokens):
    model = build(layers=LAYERS)
    ssm, other = Mamba2(32, SSM), Mamba2(32, OTHER.mixer)
    kv = 2 * 64 * 4 * 17  # 2 d_model channels of keys and of values, float32
    assert model.state_bytes(17) == 3 * ssm.state_bytes(17) + 2 * other.state_bytes(17) + 4 * kv
    with FlopCounterMode(display=False) as counter:
        model(tokens[:1])
    counts = counter.get_flop_counts()["Global"]
    products = sum(n for op, n in counts.items() if str(op) in ("aten.mm", "aten.addmm"))
    pairs = 4 * (4 * 64) * 17 * 18 // 2  # 4 layers, 64 channels
    assert model.flops(17) == products + pairs + sum(beside(block.mixer, 17) for block in model.layers)


def beside(mixer, length):
    """What Mamba-2 does beside its projections."""
    e, n, h = mixer.d_inner, mixer.config.d_state, mixer.n_heads
    return length * (2 * mixer.conv1d.weight.numel() + 5 * e * n + 3 * e + 2 * h)


def test_what_does_not_fit_is_refused():
    with pytest.raises(UsageError, match="layers of index 0 differ"):
        LanguageModel(LanguageModel.Config(vocab_size=61, d_model=32, layers=(SHARED, replace(SHARED, d_inner=28))))
    with pytest.raises(UsageError, match=r"mixer is MLP.Config\("):
        replace(SHARED, mixer=MLP.Config())
    with pytest.raises(UsageError, match=r"attention must be an Attention\.Config, got None"):
        replace(SHARED, attention=None)
    with pytest.raises(UsageError, match="index must be at least 0, got -1"):
        replace(SHARED, index=-1)

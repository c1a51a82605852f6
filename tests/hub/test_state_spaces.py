"""The state-spaces format, against transformers' mixers and a plain float64 form of its attention and MLP blocks."""

import json
import math

import pytest
import torch
from torch.nn.functional import layer_norm, silu, softmax

from longwave.errors import UsageError
from longwave.hub import state_spaces
from longwave.hub.export import export
from longwave.hub.load import load
from longwave.mixers import LSTM, MLP, Attention, Mamba, Mamba2, SwiGLU
from longwave.models.language_model import LanguageModel

D, VOCAB = 32, 93  # padded to 96


def write(folder, tensors, **config):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"d_model": D, "vocab_size": VOCAB, **config}))
    torch.save(tensors, folder / "pytorch_model.bin")
    return folder


def read(folder):
    return torch.load(folder / "pytorch_model.bin", weights_only=True)


@torch.no_grad()
def our_logits(folder, tokens, dtype=None):
    return load(folder, dtype=dtype).model(tokens)[0]


def random(*shape, around=0.0):
    return around + 0.2 * torch.randn(*shape, dtype=torch.float64)


def mixer_shapes(layer):
    """The tensors of a mixer, from the published scheme, for d_inner 64."""
    conv = {"Mamba1": 64, "Mamba2": 64 + 2 * 2 * 16}.get(layer, 0)
    shared = {"conv1d.weight": (conv, 1, 4), "conv1d.bias": (conv,), "out_proj.weight": (D, 64)}
    if layer == "Mamba1":
        projections = {"in_proj.weight": (128, D), "x_proj.weight": (2 + 32, 64), "dt_proj.weight": (64, 2)}
        return shared | projections | {"dt_proj.bias": (64,), "A_log": (64, 16), "D": (64,)}
    if layer == "Mamba2":
        heads = {"A_log": (8,), "D": (8,), "dt_bias": (8,)}
        return shared | heads | {"in_proj.weight": (64 + conv + 8, D), "norm.weight": (64,)}
    return {
        "in_proj.weight": (8 * (4 + 2 * 2), D),
        "in_proj.bias": (64,),
        "out_proj.weight": (D, 32),
        "out_proj.bias": (D,),
    }


def scheme(layers, d_mlp=0, norm_bias=False):
    """All tensors of a tied model with these mixers."""
    norms = ["norm"] + (["norm2"] if d_mlp else [])
    shapes = {"backbone.embedding.weight": (96, D), "lm_head.weight": (96, D), "backbone.norm_f.weight": (D,)}
    for i, layer in enumerate(layers):
        inner = {f"mixer.{name}": shape for name, shape in mixer_shapes(layer).items()}
        inner |= {f"{norm}.weight": (D,) for norm in norms}
        inner |= {"mlp.fc1.weight": (2 * d_mlp, D), "mlp.fc2.weight": (D, d_mlp)} if d_mlp else {}
        shapes |= {f"backbone.layers.{i}.{name}": shape for name, shape in inner.items()}
    if norm_bias:
        shapes |= {name.replace("weight", "bias"): (D,) for name in shapes if "norm" in name and "mixer" not in name}
    return shapes


def fill(shapes):
    tensors = {
        name: random(*shape, around=float("norm" in name and "weight" in name)) for name, shape in shapes.items()
    }
    return tensors | {"lm_head.weight": tensors["backbone.embedding.weight"]}


@pytest.mark.parametrize("model_type", ["mamba", "mamba2"])
def test_renamed_tensors_of_transformers_give_its_logits(peer, truth, tmp_path, model_type):
    theirs, folder = peer(model_type)
    names = {name: name.replace("embeddings", "embedding") for name in theirs.state_dict()}
    tensors = {names[name]: tensor for name, tensor in theirs.state_dict().items()}
    ssm = {"d_state": 8, "dt_rank": 4}
    if model_type == "mamba2":
        ssm = {"layer": "Mamba2", "d_state": 16, "headdim": 8, "ngroups": 2}
    config = {"n_layer": 2, "ssm_cfg": ssm, "vocab_size": 97, "pad_vocab_size_multiple": 1}
    tied = model_type == "mamba"
    written = write(tmp_path / "theirs", tensors, tie_embeddings=tied, **config)
    tokens = torch.randint(0, 97, (2, 21))
    expected = truth(theirs, tokens)
    torch.testing.assert_close(our_logits(written, tokens), expected, atol=1e-5, rtol=0)

    export(load(folder), tmp_path / "ours", "state_spaces")
    ours = read(tmp_path / "ours")
    assert list(sorted(ours)) == sorted(tensors)
    assert all(torch.equal(ours[name], tensor) for name, tensor in tensors.items())
    torch.testing.assert_close(our_logits(tmp_path / "ours", tokens), expected, atol=1e-5, rtol=0)


def norm(x, tensors, name, rms):
    weight, bias = tensors[f"{name}.weight"], tensors.get(f"{name}.bias")
    return x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight if rms else layer_norm(x, (D,), weight, bias)


def attention(x, tensors, rotary):
    """4 query heads over 2 key heads of 8, the first `rotary` dimensions of each turned as complex numbers."""
    b, l, _ = x.shape
    q, k, v = (x @ tensors["in_proj.weight"].T + tensors["in_proj.bias"]).split([32, 16, 16], dim=-1)
    half = rotary // 2
    turn = torch.polar(
        torch.ones(l, 1, half, dtype=torch.float64),
        torch.arange(l)[:, None, None] * 10_000.0 ** (-torch.arange(half, dtype=torch.float64) / max(half, 1)),
    )

    def rotate(heads):
        turned = torch.complex(heads[..., :half], heads[..., half:rotary]) * turn
        return torch.cat([turned.real, turned.imag, heads[..., rotary:]], dim=-1)

    q, k, v = (heads.view(b, l, -1, 8) for heads in (q, k, v))
    q, k, v = rotate(q), rotate(k).repeat_interleave(2, 2), v.repeat_interleave(2, 2)
    scores = torch.einsum("blhp,bmhp->bhlm", q, k) / math.sqrt(8)
    scores = scores.masked_fill(torch.ones(l, l, dtype=torch.bool).triu(1), -math.inf)
    y = torch.einsum("bhlm,bmhp->blhp", softmax(scores, -1), v).flatten(2)
    return y @ tensors["out_proj.weight"].T + tensors["out_proj.bias"]


def mamba2_mixer(x, tensors):
    from transformers import Mamba2Config
    from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

    sizes = {"hidden_size": D, "num_heads": 8, "head_dim": 8, "state_size": 16, "n_groups": 2, "chunk_size": 8}
    mixer = Mamba2Mixer(Mamba2Config(**sizes, num_hidden_layers=1), layer_idx=0).double()
    mixer.load_state_dict(tensors)
    return mixer(x.double())


@torch.no_grad()
def expected_logits(tokens, tensors, layers, *, rotary=0, rms=True):
    x = tensors["backbone.embedding.weight"][tokens]
    for i, layer in enumerate(layers):
        prefix = f"backbone.layers.{i}."
        block = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        mixer = {name.removeprefix("mixer."): tensor for name, tensor in block.items() if name.startswith("mixer.")}
        inner = norm(x, block, "norm", rms)
        x = x + (attention(inner, mixer, rotary) if layer == "attention" else mamba2_mixer(inner, mixer))
        if "mlp.fc1.weight" in block:
            up, gate = (norm(x, block, "norm2", rms) @ block["mlp.fc1.weight"].T).chunk(2, dim=-1)
            x = x + (up * silu(gate)) @ block["mlp.fc2.weight"].T
    return norm(x, tensors, "backbone.norm_f", rms) @ tensors["lm_head.weight"].T


SSM = {"layer": "Mamba2", "d_state": 16, "headdim": 8, "ngroups": 2}
ATTENTION = {"causal": True, "num_heads": 4, "num_heads_kv": 2}
HYBRIDS = {
    "one slot": (["Mamba2", "attention", "Mamba2"], 0, {"rotary": 8}),
    "partly rotary": (["attention", "Mamba2"], 0, {"rotary": 4}),
    "with MLPs": (["Mamba2", "attention"], 128, {"rotary": 0}),
    "a Transformer with LayerNorm": (["attention", "attention"], 128, {"rotary": 8, "rms": False}),
}


@pytest.mark.parametrize(("layers", "d_mlp", "options"), HYBRIDS.values(), ids=HYBRIDS)
def test_hybrids(tmp_path, layers, d_mlp, options):
    rms = options.get("rms", True)
    shapes = scheme(layers, d_mlp, norm_bias=not rms)
    tensors = fill(shapes)
    config = {
        "n_layer": len(layers),
        "ssm_cfg": SSM,
        "attn_layer_idx": [i for i, layer in enumerate(layers) if layer == "attention"],
        "attn_cfg": ATTENTION | {"rotary_emb_dim": options["rotary"]},
        "d_intermediate": d_mlp and d_mlp - 28,
        "rms_norm": rms,
    }
    folder = write(tmp_path / "theirs", tensors, **config)
    tokens = torch.randint(0, VOCAB, (2, 13))
    expected = expected_logits(tokens, tensors, layers, **options)
    tolerance = 1e-5 if "Mamba2" in layers else 1e-9  # transformers' mixer computes in float32 whatever it is given
    torch.testing.assert_close(our_logits(folder, tokens), expected, atol=tolerance, rtol=0)
    single = our_logits(folder, tokens, "float32").double()
    torch.testing.assert_close(single, expected, atol=1e-5, rtol=1e-5)

    export(load(folder), tmp_path / "ours", "state_spaces")
    ours = read(tmp_path / "ours")
    assert {name: tuple(tensor.shape) for name, tensor in ours.items()} == shapes
    assert all(torch.equal(ours[name], tensor) for name, tensor in tensors.items())
    assert load(tmp_path / "ours").model.config == load(folder).model.config


@pytest.mark.parametrize("layer", ["Mamba1", "Mamba2"])
def test_names_and_shapes_are_the_published_ones(tmp_path, layer):
    mixer = Mamba.Config() if layer == "Mamba1" else Mamba2.Config(d_state=16, d_head=8, n_groups=2)
    model = LanguageModel(LanguageModel.Config(vocab_size=96, d_model=D, layers=(mixer, mixer)))
    export(model, tmp_path, "state_spaces")
    assert {name: tuple(tensor.shape) for name, tensor in read(tmp_path).items()} == scheme([layer, layer])
    assert load(tmp_path).model.config == model.config
    assert (tmp_path / "pytorch_model.bin").stat().st_size < 4 * model.parameter_count() + 20_000, (
        "the head is stored twice"
    )


PUBLISHED = {
    "d_model": 2560,
    "d_intermediate": 0,
    "n_layer": 64,
    "vocab_size": 50277,
    "ssm_cfg": {"layer": "Mamba2"},
    "attn_layer_idx": [],
    "attn_cfg": {},
    "rms_norm": True,
    "residual_in_fp32": True,
    "fused_add_norm": True,
    "pad_vocab_size_multiple": 16,
    "tie_embeddings": True,
}


def test_a_published_config():
    model = state_spaces.config_from(PUBLISHED)
    assert model.vocab_size == 50288
    assert model.layers == (Mamba2.Config(),) * 64
    assert model.residual_fp32
    assert model.tie_embeddings


def test_options_of_the_mixers():
    mamba = {"d_state": 8, "d_conv": 3, "expand": 3, "dt_rank": 5, "dt_max": 1, "bias": True, "conv_bias": False}
    assert state_spaces.ssm_from(mamba | {"use_fast_path": False}, D) == Mamba.Config(
        d_state=8, d_conv=3, expand=3, dt_rank=5, dt_max=1.0, bias=True, conv_bias=False
    )
    mamba2 = {"headdim": 16, "dt_limit": [0.1, math.inf], "D_has_hdim": True, "norm_before_gate": True, "d_ssm": 64}
    assert state_spaces.ssm_from({"layer": "Mamba2"} | mamba2, D) == Mamba2.Config(
        d_head=16, dt_limit=(0.1, math.inf), D_per_channel=True, norm_before_gate=True
    )


@pytest.mark.parametrize("d_rotary", range(0, 99, 2))
def test_any_rotary_width_survives_its_share(d_rotary):
    attn = {"causal": True, "num_heads": 1, "head_dim": 98, "rotary_emb_dim": d_rotary}
    config = state_spaces.attention_from(attn, D)
    assert state_spaces.attention_to(config, D)["rotary_emb_dim"] == d_rotary


REFUSED = {
    "Mamba4": {"ssm_cfg": {"layer": "Mamba4"}},
    "d_ssm 32": {"ssm_cfg": {"layer": "Mamba2", "d_ssm": 32}},
    "rmsnorm False": {"ssm_cfg": {"layer": "Mamba2", "rmsnorm": False}},
    "'dt_rnk'": {"ssm_cfg": {"dt_rnk": 3}},
    "attn_cfg d_conv 4": {"attn_layer_idx": [0], "attn_cfg": ATTENTION | {"d_conv": 4}},
    "attn_cfg mlp_dim 64": {"attn_layer_idx": [0], "attn_cfg": ATTENTION | {"mlp_dim": 64}},
    "attn_cfg causal False": {"attn_layer_idx": [0], "attn_cfg": {"num_heads": 4}},
    "num_heads": {"attn_layer_idx": [0], "attn_cfg": {"causal": True}},
    "rotary_emb_interleaved True": {"attn_layer_idx": [0], "attn_cfg": ATTENTION | {"rotary_emb_interleaved": True}},
    "'moe'": {"moe": 8},
    "n_layer must be int": {"n_layer": "four"},
}


@pytest.mark.parametrize(("named", "options"), REFUSED.items(), ids=REFUSED)
def test_what_we_lack_is_refused_by_name_before_any_weight_is_read(tmp_path, named, options):
    (tmp_path / "config.json").write_text(json.dumps({"d_model": D, "n_layer": 2} | options))
    with pytest.raises(UsageError) as error:
        load(tmp_path)  # there are no weights
    words = str(error.value).replace("'", "").replace(":", "")
    assert all(word.strip("'") in words for word in named.split()), words


INEXPRESSIBLE = {
    "lstm": (LSTM.Config(),),
    "mlp": (Mamba2.Config(d_head=8), MLP.Config()),
    "d_state=8": (Mamba2.Config(d_head=8), Mamba2.Config(d_head=8, d_state=8)),
    "window=4": (Attention.Config(d_head=8, window=4),),
    "inner_norm='learned'": (Mamba.Config(inner_norm="learned"),),
    "norm_eps=0.1": (Mamba2.Config(d_head=8, norm_eps=0.1),),
    "d_inner=48": (Mamba.Config(d_inner=48),),
    "100": (Mamba.Config(), SwiGLU.Config(d_inner=100)),
    "swiglu": (Mamba.Config(), SwiGLU.Config(d_inner=128), Mamba.Config()),
    "SwiGLU": (SwiGLU.Config(d_inner=128), Mamba.Config()),
}


@pytest.mark.parametrize(("named", "layers"), INEXPRESSIBLE.items(), ids=INEXPRESSIBLE)
def test_what_the_format_lacks_is_refused_with_nothing_written(tmp_path, named, layers):
    model = LanguageModel(LanguageModel.Config(vocab_size=96, d_model=D, layers=layers))
    with pytest.raises(UsageError) as error:
        export(model, tmp_path / "new", "state_spaces")
    assert named.lower() in str(error.value).lower()
    assert "model.save" in str(error.value)
    assert not (tmp_path / "new").exists()

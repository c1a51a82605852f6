"""The hyena format: its published names and shapes, a plain float64 form of the model, and training checkpoints."""

import json
import math
import pickle

import pytest
import torch
from torch.nn.functional import gelu, layer_norm

from longwave.errors import LongwaveError, UsageError
from longwave.hub import hyena
from longwave.hub.export import export
from longwave.hub.load import find_family, load
from longwave.mixers import MLP, Hyena, Mamba2
from longwave.models.language_model import LanguageModel

D, L_MAX, N_LAYERS, D_MLP, FILTER, POSITION = 16, 40, 2, 40, 8, 5
VOCAB = 12  # padded to 16

# As LongSafari/hyenadna-* have it.
PUBLISHED = {
    "_name_": "lm",
    "d_model": D,
    "n_layer": N_LAYERS,
    "d_inner": D_MLP,
    "vocab_size": VOCAB,
    "resid_dropout": 0.0,
    "embed_dropout": 0.1,
    "fused_mlp": False,
    "fused_dropout_add_ln": False,
    "residual_in_fp32": True,
    "pad_vocab_size_multiple": 8,
    "checkpoint_mixer": False,
    "checkpoint_mlp": False,
    "return_hidden_state": True,
    "layer": {
        "_name_": "hyena",
        "emb_dim": POSITION,
        "filter_order": FILTER,
        "local_order": 3,
        "l_max": L_MAX,
        "modulate": True,
        "w": 10,
        "lr": 6e-4,
        "wd": 0.0,
        "lr_pos_emb": 0.0,
    },
}


def scheme():
    """All tensors, from the published scheme."""
    shapes = {"backbone.embeddings.word_embeddings.weight": (16, D), "lm_head.weight": (16, D)}
    shapes |= {f"backbone.ln_f.{part}": (D,) for part in ("weight", "bias")}
    mixer = {
        "in_proj.weight": (3 * D, D), "in_proj.bias": (3 * D,), "out_proj.weight": (D, D), "out_proj.bias": (D,),
        "short_filter.weight": (3 * D, 1, 3), "short_filter.bias": (3 * D,), "filter_fn.bias": (D,),
        "filter_fn.pos_emb.z": (1, L_MAX, POSITION), "filter_fn.pos_emb.t": (1, L_MAX, 1),
        "filter_fn.implicit_filter.0.weight": (FILTER, POSITION), "filter_fn.implicit_filter.0.bias": (FILTER,),
        "filter_fn.implicit_filter.1.freq": (1, FILTER),
        "filter_fn.implicit_filter.2.weight": (FILTER, FILTER), "filter_fn.implicit_filter.2.bias": (FILTER,),
        "filter_fn.implicit_filter.3.freq": (1, FILTER),
        "filter_fn.implicit_filter.4.weight": (FILTER, FILTER), "filter_fn.implicit_filter.4.bias": (FILTER,),
        "filter_fn.implicit_filter.5.freq": (1, FILTER),
        "filter_fn.implicit_filter.6.weight": (D, FILTER), "filter_fn.modulation.deltas": (1, 1, D),
    }  # fmt: skip
    mlp = {"fc1.weight": (D_MLP, D), "fc1.bias": (D_MLP,), "fc2.weight": (D, D_MLP), "fc2.bias": (D,)}
    norms = {f"norm{i}.{part}": (D,) for i in (1, 2) for part in ("weight", "bias")}
    block = norms | {f"mixer.{k}": v for k, v in mixer.items()} | {f"mlp.{k}": v for k, v in mlp.items()}
    blocks = {f"backbone.layers.{i}.{name}": shape for i in range(N_LAYERS) for name, shape in block.items()}
    return {f"model.{name}": shape for name, shape in (shapes | blocks).items()}


def fill():
    tensors = {name: 0.3 * torch.randn(shape) + ("norm" in name) for name, shape in scheme().items()}
    for name in tensors:
        if name.endswith(".t"):
            tensors[name] = torch.linspace(0, 1, L_MAX)[None, :, None]
        elif name.endswith(".deltas"):
            tensors[name] = torch.linspace(math.log(0.01) / 1.5, math.log(0.01) / 0.3, D)[None, None]
        elif name.endswith((".3.freq", ".5.freq")):
            tensors[name] = tensors[f"{name[:-6]}1.freq"]
    return tensors | {"model.lm_head.weight": tensors["model.backbone.embeddings.word_embeddings.weight"]}


def write(folder, tensors, config=PUBLISHED, file="weights.ckpt"):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    torch.save({"state_dict": tensors} if file.endswith(".ckpt") else tensors, folder / file)
    return folder


@torch.no_grad()
def expected_logits(tokens, tensors, shift=0.05):
    """Token by token sums in float64."""
    t = {name.removeprefix("model."): tensor.double() for name, tensor in tensors.items()}
    x = t["backbone.embeddings.word_embeddings.weight"][tokens]
    l = tokens.shape[1]

    def linear(u, name):
        return u @ t[f"{name}.weight"].T + t[f"{name}.bias"]

    def norm(u, name):
        return layer_norm(u, (D,), t[f"{name}.weight"], t[f"{name}.bias"])

    for i in range(N_LAYERS):
        block = f"backbone.layers.{i}"
        fn = f"{block}.mixer.filter_fn"
        h = t[f"{fn}.pos_emb.z"][0]
        for j in (0, 2, 4):
            h = torch.sin(t[f"{fn}.implicit_filter.{j + 1}.freq"] * linear(h, f"{fn}.implicit_filter.{j}"))
        h = h @ t[f"{fn}.implicit_filter.6.weight"].T
        h = h * (torch.exp(-t[f"{fn}.pos_emb.t"][0] * t[f"{fn}.modulation.deltas"][0].abs()) + shift)
        u = linear(norm(x, f"{block}.norm1"), f"{block}.mixer.in_proj")
        u = torch.cat([torch.zeros(len(u), 2, 3 * D), u], 1)
        taps = t[f"{block}.mixer.short_filter.weight"][:, 0]
        z = sum(taps[:, k] * u[:, k : k + l] for k in range(3)) + t[f"{block}.mixer.short_filter.bias"]
        x0, x1, v = z.split(D, dim=-1)
        v = v * x1
        v = torch.stack([sum(h[j] * v[:, s - j] for j in range(s + 1)) for s in range(l)], 1) + t[f"{fn}.bias"] * v
        x = x + linear(v * x0, f"{block}.mixer.out_proj")
        hidden = gelu(linear(norm(x, f"{block}.norm2"), f"{block}.mlp.fc1"), approximate="tanh")
        x = x + linear(hidden, f"{block}.mlp.fc2")
    return norm(x, "backbone.ln_f") @ t["lm_head.weight"].T


@torch.no_grad()
def our_logits(folder, tokens):
    return load(folder).model(tokens)[0]


def test_a_published_folder(tmp_path):
    tensors = fill()
    folder = write(tmp_path / "theirs", tensors)
    tokens = torch.randint(0, VOCAB, (2, 33))
    expected = expected_logits(tokens, tensors)
    torch.testing.assert_close(our_logits(folder, tokens).double(), expected, atol=1e-5, rtol=1e-5)

    model = load(folder).model
    export(model, tmp_path / "ours", "hyena")
    ours = torch.load(tmp_path / "ours" / "weights.ckpt", weights_only=True)["state_dict"]
    assert {name: tuple(tensor.shape) for name, tensor in ours.items()} == scheme()
    assert all(torch.equal(ours[name], tensor) for name, tensor in tensors.items())
    assert load(tmp_path / "ours").model.config == model.config
    torch.testing.assert_close(our_logits(tmp_path / "ours", tokens), our_logits(folder, tokens), rtol=0, atol=0)


def with_layers(tensors):
    return {name.replace(".mixer.", ".mixer.layer.").replace(".mlp.", ".mlp.layer."): t for name, t in tensors.items()}


def without_prefix(tensors):
    return {name.removeprefix("model."): tensor for name, tensor in tensors.items()}


def with_metrics(tensors):
    return tensors | {"val_torchmetrics.num_tokens.count": torch.zeros(())}


@pytest.mark.parametrize("spelled", [with_layers, without_prefix, with_metrics])
@pytest.mark.parametrize("file", ["weights.ckpt", "pytorch_model.bin"])
def test_other_spellings(tmp_path, spelled, file):
    tensors = fill()
    expected = load(write(tmp_path / "plain", tensors)).model.state_dict()
    found = load(write(tmp_path / "other", spelled(tensors), file=file)).model.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


RAN = []


def ran(what):
    RAN.append(what)


class Callback:
    """What a run's checkpoint holds beside the weights."""

    def __reduce__(self):
        return ran, ("ran",)


def test_a_training_checkpoint_runs_no_code(tmp_path):
    tensors = fill()
    folder = write(tmp_path / "run", tensors)
    checkpoint = {"epoch": 3, "callbacks": [Callback()], "hyper_parameters": {"x": Callback()}, "state_dict": tensors}
    torch.save(checkpoint, folder / "weights.ckpt")
    assert torch.equal(load(folder).model.embedding.weight, tensors["model.lm_head.weight"])
    assert RAN == []
    torch.load(folder / "weights.ckpt", weights_only=False)
    assert RAN == ["ran", "ran"], "the checkpoint would have run code"


def test_weights_that_are_other_objects_are_refused(tmp_path):
    folder = write(tmp_path / "run", fill())
    torch.save({"state_dict": {"model.lm_head.weight": Callback()}}, folder / "weights.ckpt")
    with pytest.raises(LongwaveError, match="does not hold named tensors alone"):
        load(folder)
    (folder / "weights.ckpt").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(LongwaveError, match="damaged, or holds other objects"):
        load(folder)


def test_sines_that_differ_are_refused(tmp_path):
    tensors = fill()
    name = "model.backbone.layers.1.mixer.filter_fn.implicit_filter.5.freq"
    with pytest.raises(LongwaveError, match=r"layers\.1\.mixer\.filter_fn\.implicit_filter\.5\.freq differs"):
        load(write(tmp_path / "bad", tensors | {name: tensors[name] + 1}))


def test_options_of_the_layer():
    layer = {"l_max": 9, "filter_order": 6, "w": 14, "shift": 0.0, "target": 0.1, "num_inner_mlps": 3}
    config = PUBLISHED | {"layer": {"_name_": "hyena"} | layer, "residual_in_fp32": False}
    model = hyena.config_from(config)
    expected = Hyena.Config(l_max=9, d_filter=6, frequency=14.0, decay_target=0.1, n_inner=3)
    assert model.layers == (expected, MLP.Config(d_inner=D_MLP)) * N_LAYERS
    nested = {"_name_": "hyena", "l_max": 9, "filter_args": {"emb_dim": 7, "order": 16, "seq_len": 9}}
    assert hyena.config_from(PUBLISHED | {"layer": nested}).layers[0] == Hyena.Config(l_max=9, d_position=7, shift=0.05)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"attn_layer_idx": [1]}, r"attn_layer_idx \[1\]"),
        ({"max_position_embeddings": 8}, "max_position_embeddings 8"),
        ({"layer": PUBLISHED["layer"] | {"order": 3}}, "layer order 3"),
        ({"layer": PUBLISHED["layer"] | {"modulate": False}}, "layer modulate False"),
        ({"layer": PUBLISHED["layer"] | {"bidirectional": True}}, "unknown option 'bidirectional'"),
        ({"d_modle": 3}, "unknown option 'd_modle'.*d_model"),
    ],
)
def test_what_is_not_supported_is_named(tmp_path, change, named):
    folder = write(tmp_path / "theirs", {}, PUBLISHED | change)
    with pytest.raises(UsageError, match=named):
        load(folder)


def test_without_d_inner_the_mlp_is_four_times_as_wide():
    config = {name: value for name, value in PUBLISHED.items() if name != "d_inner"}
    assert find_family(config) is hyena
    assert hyena.config_from(config).layers[1].d_inner == 4 * config["d_model"]


def test_what_the_format_cannot_express(tmp_path):
    def model(**options):
        layers = (Hyena.Config(l_max=8, **options), MLP.Config())
        return LanguageModel(LanguageModel.Config(vocab_size=8, d_model=8, layers=layers, norm="layer"))

    with pytest.raises(UsageError, match="order=3"):
        export(model(order=3), tmp_path, "hyena")
    with pytest.raises(UsageError, match="bias=False"):
        export(model(bias=False), tmp_path, "hyena")
    other = LanguageModel.Config(vocab_size=8, d_model=8, layers=(Mamba2.Config(d_head=8), MLP.Config()), norm="layer")
    with pytest.raises(UsageError, match="hyena"):
        export(LanguageModel(other), tmp_path, "hyena")
    assert not list(tmp_path.iterdir())

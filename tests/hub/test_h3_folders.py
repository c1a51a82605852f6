"""H3's folders, against the model written out in float64: convolutions as sums over the past, attention as softmax."""

import json
import math

import pytest
import torch
from torch.nn.functional import gelu, layer_norm

from longwave.errors import LongwaveError, UsageError
from longwave.hub import h3
from longwave.hub.export import export
from longwave.hub.load import load, model_config
from longwave.mixers import H3, LSTM, MLP, Attention
from longwave.models.language_model import LanguageModel

D, N, HIDDEN, VOCAB = 16, 6, 40, 93  # padded to 96
SSM = {"mode": "diag", "measure": "diag-lin", "d_state": N}
CONFIG = {"d_model": D, "d_inner": HIDDEN, "vocab_size": VOCAB, "pad_vocab_size_multiple": 8}


def shapes(layers, p=1):
    """All tensors, from the published scheme; `layers` says "h3" or "attention"."""
    h = D // p
    linear = {"weight": (D, D), "bias": (D,)}
    found = {"backbone.embeddings.word_embeddings.weight": (96, D), "lm_head.weight": (96, D)}
    found |= {"backbone.ln_f.weight": (D,), "backbone.ln_f.bias": (D,)}
    for i, layer in enumerate(layers):
        inner = {f"norm{j}.{part}": (D,) for j in (1, 2) for part in ("weight", "bias")}
        inner |= {
            "mlp.fc1.weight": (HIDDEN, D),
            "mlp.fc1.bias": (HIDDEN,),
            "mlp.fc2.weight": (D, HIDDEN),
            "mlp.fc2.bias": (D,),
        }
        if layer == "attention":
            inner |= {"mixer.Wqkv.weight": (3 * D, D), "mixer.Wqkv.bias": (3 * D,)}
            inner |= {f"mixer.out_proj.{part}": shape for part, shape in linear.items()}
        else:
            for name in ("q_proj", "k_proj", "v_proj", "output_linear"):
                inner |= {f"mixer.{name}.{part}": shape for part, shape in linear.items()}
            inner |= {
                "mixer.ssm_k_kernel.kernel.B": (D, N),
                "mixer.ssm_k_kernel.kernel.C": (1, D, N),
                "mixer.ssm_k_D": (D,),
                "mixer.kernel.kernel.C": (1, h, N // 2, 2),
                "mixer.kernel.kernel.log_dt": (h,),
                "mixer.kernel.kernel.B": (h, N // 2, 2),
                "mixer.kernel.kernel.inv_A_real": (h, N // 2),
                "mixer.kernel.kernel.A_imag": (h, N // 2),
                "mixer.D": (h,),
            }
        found |= {f"backbone.layers.{i}.{name}": shape for name, shape in inner.items()}
    return found


def fill(layers, p=1):
    tensors = {}
    for name, shape in shapes(layers, p).items():
        norm = "norm" in name or "ln_f" in name
        around = float(norm and name.endswith("weight")) - 3.0 * name.endswith("log_dt")
        tensors[name] = around + 0.2 * torch.randn(shape, dtype=torch.float64)
    return tensors | {"lm_head.weight": tensors["backbone.embeddings.word_embeddings.weight"]}


def write(folder, tensors, config=None):
    folder.mkdir()
    torch.save(tensors, folder / "model.pt")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


@torch.no_grad()
def our_logits(folder, tokens, dtype=None):
    """Whole, and as a prompt of 4 tokens with steps after it."""
    model = load(folder, dtype=dtype).model
    whole, _ = model(tokens)
    _, state = model(tokens[:, :4])
    state = state.reserve(tokens.shape[1])
    steps = [model.step(token, state) for token in tokens[:, 4:].unbind(1)]
    torch.testing.assert_close(torch.stack(steps, 1), whole[:, 4:], atol=1e-5, rtol=0)
    return whole


def convolved(kernel, u):
    """y_t = sum_j kernel_j u_{t-j} for kernel (e, l) and u (b, l, e)."""
    l = u.shape[1]
    return torch.stack([(kernel[:, : t + 1].flip(1).T * u[:, : t + 1]).sum(1) for t in range(l)], dim=1)


def h3_layer(x, w, p):
    (b, l, _), h = x.shape, D // p
    q, k, v = (x @ w[f"{name}_proj.weight"].T + w[f"{name}_proj.bias"] for name in "qkv")
    taps = torch.zeros(D, max(l, N), dtype=x.dtype)
    for j in range(N):
        taps[:, j] = (w["ssm_k_kernel.kernel.B"][:, : N - j] * w["ssm_k_kernel.kernel.C"][0, :, j:]).sum(1)
    k = convolved(taps, k) + w["ssm_k_D"] * k
    dt = w["kernel.kernel.log_dt"].exp()[:, None]
    A = torch.complex(-w["kernel.kernel.inv_A_real"].exp(), w["kernel.kernel.A_imag"])
    B, C = torch.view_as_complex(w["kernel.kernel.B"]), torch.view_as_complex(w["kernel.kernel.C"][0])
    decay, into = (1 + dt * A / 2) / (1 - dt * A / 2), dt * B / (1 - dt * A / 2)
    kernel = torch.stack([2 * (C * into * decay**t).real.sum(1) for t in range(l)], dim=1)  # (h, l)
    k, v, q = (part.view(b, l, h, p) for part in (k, v, q))
    y = torch.zeros(b, l, p, h, dtype=x.dtype)
    for i in range(p):
        for j in range(p):
            product = k[..., i] * v[..., j]
            y[:, :, j] += q[..., i] * (convolved(kernel, product) + w["D"] * product)
    return y.flatten(2) @ w["output_linear.weight"].T + w["output_linear.bias"]


def attention(x, w, rotary):
    """2 heads of 8, the first `rotary` dimensions of each turned as complex numbers."""
    b, l, _ = x.shape
    q, k, v = (x @ w["Wqkv.weight"].T + w["Wqkv.bias"]).view(b, l, 3, 2, 8).unbind(2)
    half = rotary // 2
    angle = torch.arange(l)[:, None] * 10_000.0 ** (-torch.arange(half, dtype=torch.float64) / max(half, 1))

    def turned(heads):
        pairs = torch.complex(heads[..., :half], heads[..., half:rotary]) * torch.exp(1j * angle)[:, None]
        return torch.cat([pairs.real, pairs.imag, heads[..., rotary:]], dim=-1)

    scores = torch.einsum("blhp,bmhp->bhlm", turned(q), turned(k)) / math.sqrt(8)
    weights = (scores + torch.full((l, l), -math.inf).triu(1)).softmax(-1)
    y = torch.einsum("bhlm,bmhp->blhp", weights, v).flatten(2)
    return y @ w["out_proj.weight"].T + w["out_proj.bias"]


@torch.no_grad()
def expected_logits(tokens, tensors, layers, p=1, rotary=0):
    def norm(x, name):
        return layer_norm(x, (D,), tensors[f"{name}.weight"], tensors[f"{name}.bias"])

    x = tensors["backbone.embeddings.word_embeddings.weight"][tokens]
    for i, layer in enumerate(layers):
        block = f"backbone.layers.{i}"
        w = {name.removeprefix(f"{block}.mixer."): tensor for name, tensor in tensors.items() if name.startswith(block)}
        inner = norm(x, f"{block}.norm1")
        x = x + (attention(inner, w, rotary) if layer == "attention" else h3_layer(inner, w, p))
        inner = norm(x, f"{block}.norm2") @ tensors[f"{block}.mlp.fc1.weight"].T + tensors[f"{block}.mlp.fc1.bias"]
        x = (
            x
            + gelu(inner, approximate="tanh") @ tensors[f"{block}.mlp.fc2.weight"].T
            + tensors[f"{block}.mlp.fc2.bias"]
        )
    return norm(x, "backbone.ln_f") @ tensors["lm_head.weight"].T


MODELS = {
    "H3-125M": (["h3", "attention", "h3"], 1, 0),
    "H3-2.7B, 2 attention layers": (["attention", "h3", "attention"], 1, 4),
    "heads of two": (["h3", "attention"], 2, 0),
}


@pytest.mark.parametrize(("layers", "p", "rotary"), MODELS.values(), ids=MODELS)
def test_logits_are_those_of_the_model_written_out(tmp_path, layers, p, rotary):
    tensors = fill(layers, p)
    attn = {"num_heads": 2, "rotary_emb_dim": rotary} if rotary else {"num_heads": 2}
    at = [i for i, layer in enumerate(layers) if layer == "attention"]
    config = CONFIG | {"n_layer": len(layers), "ssm_cfg": SSM | {"head_dim": p}, "attn_layer_idx": at, "attn_cfg": attn}
    folder = write(tmp_path / "theirs", tensors, config)
    tokens = torch.randint(0, VOCAB, (2, 13))
    expected = expected_logits(tokens, tensors, layers, p, rotary)
    torch.testing.assert_close(our_logits(folder, tokens), expected, atol=1e-9, rtol=0)
    torch.testing.assert_close(our_logits(folder, tokens, "float32").double(), expected, atol=1e-5, rtol=0)

    export(load(folder), tmp_path / "ours", "h3")
    ours = torch.load(tmp_path / "ours" / "model.pt", weights_only=True)
    assert {name: tuple(tensor.shape) for name, tensor in ours.items()} == shapes(layers, p)
    assert all(torch.equal(ours[name], tensor) for name, tensor in tensors.items())
    assert model_config(tmp_path / "ours") == model_config(folder)


def older(tensors, n_layers):
    """The names of early checkpoints: the norm after each sublayer, the first one apart."""
    order = [f"layers.{i}.norm{j}" for i in range(n_layers) for j in (1, 2)] + ["ln_f"]
    old = ["ln_0"] + [f"layers.{i}.norm{j}" for i in range(n_layers) for j in (1, 2)]
    new_to_old = {f"backbone.{new}.{part}": f"s4seq.encoder.{was}.{part}"
                  for new, was in zip(order, old, strict=True) for part in ("weight", "bias")}  # fmt: skip
    new_to_old["backbone.embeddings.word_embeddings.weight"] = "embedding.weight"
    return {new_to_old.get(name, name.replace("backbone.", "s4seq.encoder.")): t for name, t in tensors.items()}


SPELLINGS = {
    "as published": lambda tensors: tensors,
    "older": lambda tensors: older(tensors, 2),
    "older, the final norm alone": lambda tensors: {
        name.replace("backbone.ln_f", "s4seq.encoder.norm"): tensor for name, tensor in tensors.items()
    },
    "a training run's": lambda tensors: {
        "state_dict": {f"model.{name}": tensor for name, tensor in tensors.items()},
        "epoch": 3,
    },
    "with rotary frequencies": lambda tensors: tensors | {"backbone.layers.1.mixer.rotary_emb.inv_freq": torch.ones(4)},
}


@pytest.mark.parametrize("spell", SPELLINGS.values(), ids=SPELLINGS)
def test_every_spelling_gives_the_same_model_without_a_config(tmp_path, spell):
    """The shapes tell all of a model without attention."""
    tensors = fill(["h3", "h3"], 2)
    folder = write(tmp_path / "theirs", spell(tensors))
    tokens = torch.randint(0, VOCAB, (2, 9))
    torch.testing.assert_close(
        our_logits(folder, tokens), expected_logits(tokens, tensors, ["h3", "h3"], 2), atol=1e-9, rtol=0
    )
    mixer, mlp = H3.Config(d_state=N, d_head=2), MLP.Config(d_inner=HIDDEN)
    assert model_config(folder) == LanguageModel.Config(
        vocab_size=96, d_model=D, layers=(mixer, mlp) * 2, norm="layer", tie_embeddings=True
    )


def test_without_a_config_what_shapes_do_not_tell_is_asked_for(tmp_path):
    layers = ["h3", "attention"]
    tensors = fill(layers)
    folder = write(tmp_path / "theirs", tensors)
    with pytest.raises(UsageError, match="do not tell num_heads and rotary_emb_dim") as error:
        load(folder)
    given = str(error.value)[str(error.value).index("{") :]
    (folder / "config.json").write_text(given.replace("null", "2", 1).replace("null", "0"))
    tokens = torch.randint(0, VOCAB, (1, 9))
    torch.testing.assert_close(our_logits(folder, tokens), expected_logits(tokens, tensors, layers), atol=1e-9, rtol=0)


def test_another_model_without_a_config(tmp_path):
    folder = write(tmp_path / "theirs", {"weight": torch.ones(3)})
    with pytest.raises(LongwaveError, match=r"no config.json, and model.pt holds no H3 model"):
        load(folder)


REFUSED = {
    "ssm_cfg mode 'nplr'": {"ssm_cfg": {"mode": "nplr"}},
    "ssm_cfg l_max 1024": {"ssm_cfg": {"l_max": 1024}},
    "ssm_cfg use_fast_fftconv True": {"ssm_cfg": {"use_fast_fftconv": True, "head_dim": 8}},
    "ssm_cfg disc 'dss'": {"ssm_cfg": {"disc": "dss"}},
    "unknown option 'd_sate'": {"ssm_cfg": {"d_sate": 8}},
    "max_position_embeddings 2048": {"max_position_embeddings": 2048},
    "unknown option 'glu_act'": {"glu_act": True},
    "causal False": {"attn_layer_idx": [0], "attn_cfg": {"num_heads": 2, "causal": False}},
    "num_heads": {"attn_layer_idx": [0]},
}


@pytest.mark.parametrize(("named", "options"), REFUSED.items(), ids=REFUSED)
def test_what_we_lack_is_refused_by_name_before_any_weight_is_read(tmp_path, named, options):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"n_layer": 2} | options))
    with pytest.raises(UsageError) as error:
        load(tmp_path)  # there are no weights
    assert named in str(error.value)


@pytest.mark.parametrize(
    ("named", "layers", "options"),
    [
        ("LSTM", (LSTM.Config(), MLP.Config()), {}),
        ("activation='relu2'", (H3.Config(), MLP.Config(activation="relu2")), {}),
        ("window=4", (Attention.Config(d_head=8, window=4), MLP.Config()), {}),
        ("key_multiplier=2.0", (Attention.Config(d_head=8, key_multiplier=2.0), MLP.Config()), {}),
        ("norm='rms'", (H3.Config(), MLP.Config()), {"norm": "rms"}),
        ("tie_embeddings=False", (H3.Config(), MLP.Config()), {"tie_embeddings": False}),
    ],
)
def test_what_the_format_lacks_is_refused(tmp_path, named, layers, options):
    config = LanguageModel.Config(vocab_size=96, d_model=D, layers=layers, **({"norm": "layer"} | options))
    with pytest.raises(UsageError) as error:
        export(LanguageModel(config), tmp_path / "new", "h3")
    assert named in str(error.value)
    assert not (tmp_path / "new").exists()


def test_a_published_config():
    """Of H3-125M, as generate_text_h3.py sets it."""
    model = h3.config_from(
        {
            "d_model": 768,
            "n_layer": 12,
            "d_inner": 3072,
            "vocab_size": 50257,
            "ssm_cfg": {"mode": "diag", "measure": "diag-lin"},
            "attn_layer_idx": [6],
            "attn_cfg": {"num_heads": 12},
            "pad_vocab_size_multiple": 8,
        }
    )
    mlp = MLP.Config(d_inner=3072)
    attention = Attention.Config(n_heads=12, n_kv_heads=12, d_head=64, rotary=0.0, qkv_bias=True, out_bias=True)
    assert model.layers == (H3.Config(), mlp) * 6 + (attention, mlp) + (H3.Config(), mlp) * 5
    assert (model.vocab_size, model.norm, model.norm_eps, model.tie_embeddings) == (50264, "layer", 1e-5, True)

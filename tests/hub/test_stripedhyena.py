"""StripedHyena's folders against the published package; a stand-in takes the place of flash_attn, which it needs."""

import json
import sys
import types

import pytest
import stripedhyena.model
import torch
from safetensors.torch import load_file, save_file
from stripedhyena.utils import dotdict
from torch import nn

from longwave.errors import LongwaveError, UsageError
from longwave.hub import stripedhyena as family
from longwave.hub.export import export
from longwave.hub.load import load, model_config
from longwave.mixers import LSTM, Attention, HyenaModal, SwiGLU
from longwave.models.language_model import LanguageModel

SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_filters": 32,
    "num_layers": 3,
    "attn_layer_idxs": [1],
    "hyena_layer_idxs": [0, 2],
    "short_filter_length": 3,
    "num_attention_heads": 4,
    "short_filter_bias": True,
    "eps": 0.01,
    "hyena_filter_groups": 1,
    "model_parallel_size": 1,
    "final_norm": True,
    "use_flash_attn": True,
    "use_flashfft": False,
    "prefill_style": "fft",
}
FOLDERS = {
    "StripedHyena-7B": {
        "state_size": 2,
        "proj_groups": 2,
        "rotary_emb_base": 500_000,
        "tie_embeddings": False,
        "inner_mlp_size": 48,
        "mha_out_proj_bias": False,
        "qkv_proj_bias": False,
        "use_flash_rmsnorm": True,
    },
    "Evo-1": {
        "state_size": 8,
        "proj_groups": 1,
        "tie_embeddings": True,
        "inner_mlp_size": None,
        "inner_size_multiple_of": 16,
        "mha_out_proj_bias": True,
        "qkv_proj_bias": True,
        "use_flash_rmsnorm": False,
        "column_split": True,
        "mlp_activation": "gelu",
    },
    "Evo-1 of 131k": {
        "state_size": 8,
        "tie_embeddings": True,
        "inner_size_multiple_of": 16,
        "mlp_activation": "gelu",
        "use_interpolated_rotary_pos_emb": True,
        "rotary_emb_scaling_factor": 16,
    },
    "Hyena blocks alone": {
        "state_size": 3,
        "tie_embeddings": False,
        "column_split_hyena": False,
        "attn_layer_idxs": [],
        "hyena_layer_idxs": [0, 1, 2],
        "short_filter_length": 4,
    },
}
every_folder = pytest.mark.parametrize("options", FOLDERS.values(), ids=FOLDERS)


class MHA(nn.Module):
    """Rotary grouped-query attention, written out with complex numbers."""

    def __init__(
        self, embed_dim, num_heads, num_heads_kv, rotary_emb_dim, qkv_proj_bias, rotary_emb_base, out_proj_bias, **_
    ):
        super().__init__()
        self.heads, self.heads_kv, self.p, self.stretch = num_heads, num_heads_kv, rotary_emb_dim, 1.0
        self.Wqkv = nn.Linear(embed_dim, (num_heads + 2 * num_heads_kv) * rotary_emb_dim, bias=qkv_proj_bias)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=out_proj_bias)
        self.rotary_emb = nn.Module()
        self.frequency = rotary_emb_base ** (-torch.arange(0, rotary_emb_dim, 2) / rotary_emb_dim)
        self.rotary_emb.register_buffer("inv_freq", self.frequency)

    def forward(self, x, inference_params=None):
        b, l, _ = x.shape
        half = self.p // 2
        position = torch.arange(l) / self.stretch
        turn = torch.exp(1j * position[:, None] * self.frequency)[:, None]
        q, k, v = self.Wqkv(x).view(b, l, -1, self.p).split([self.heads, self.heads_kv, self.heads_kv], 2)
        q, k = (torch.complex(head[..., :half], head[..., half:]) * turn for head in (q, k))
        k, v = (head.repeat_interleave(self.heads // self.heads_kv, 2) for head in (k, v))
        scores = torch.einsum("blhp,bmhp->bhlm", q, k.conj()).real / self.p**0.5
        weights = (scores + torch.full((l, l), -torch.inf).triu(1)).softmax(-1)
        return self.out_proj(torch.einsum("bhlm,bmhp->blhp", weights, v).flatten(2))


def stretch(mha, kwargs_new_rope):
    mha.stretch = kwargs_new_rope["scaling_factor"]


@pytest.fixture
def published(monkeypatch, tmp_path):
    """published(options): the package's model, and a folder with its settings and weights as the hub has them."""
    monkeypatch.setattr(stripedhyena.model, "MHA", MHA, raising=False)
    monkeypatch.setattr(stripedhyena.model, "swap_mha_rope", stretch, raising=False)
    norm = types.ModuleType("flash_attn.ops.rms_norm")
    vars(norm)["rms_norm"] = lambda x, scale, eps: x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * scale
    for name in ("flash_attn", "flash_attn.ops"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, norm.__name__, norm)

    def make(options):
        dtypes = dict.fromkeys(("params_dtype", "attn_block_dtype", "mlp_dtype", "hyena_block_dtype"), torch.float32)
        theirs = stripedhyena.model.StripedHyena(dotdict(SMALL | options | dtypes)).eval()
        with torch.no_grad():
            for name, parameter in theirs.named_parameters():
                # Residues are published as 2 B C dt, so small; logits of order 1.
                small = name.endswith("residues") or "embed" in name
                parameter.mul_(0.1 if small else 1.0).add_(0.05 * torch.randn_like(parameter))
                if name.endswith("poles"):
                    poles = torch.view_as_complex(parameter)
                    poles.copy_(torch.polar(1 - 0.5 * torch.rand(poles.shape) ** 4, 6.28 * torch.rand(poles.shape)))
        tensors = {f"backbone.{name}": tensor for name, tensor in theirs.state_dict().items()}
        if options["tie_embeddings"]:
            del tensors["backbone.unembed.weight"]
        folder = tmp_path / "theirs"
        folder.mkdir()
        save_file(tensors, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(SMALL | options))
        return theirs, folder

    return make


@every_folder
@torch.no_grad()
def test_logits_are_the_package_s_whole_in_pieces_and_stepped(published, options):
    theirs, folder = published(options)
    tokens = torch.randint(0, 97, (2, 40))
    expected = theirs(tokens)[0]
    model = load(folder).model
    whole, _ = model(tokens)
    torch.testing.assert_close(whole, expected, atol=1e-5, rtol=0)
    first, state = model(tokens[:, :27])
    torch.testing.assert_close(first, expected[:, :27], atol=1e-5, rtol=0)
    state = state.reserve(13)  # prefill, then recurrent decoding
    steps = torch.stack([model.step(tokens[:, t], state) for t in range(27, 40)], 1)
    torch.testing.assert_close(steps, expected[:, 27:], atol=1e-5, rtol=0)


@every_folder
def test_what_we_write_is_what_was_published(published, options, tmp_path):
    _, folder = published(options)
    model = load(folder).model
    export(model, tmp_path / "ours", "stripedhyena")
    stored = load_file(folder / "model.safetensors")
    ours = load_file(tmp_path / "ours" / "model.safetensors")
    assert set(ours) == {name for name in stored if not name.endswith("inv_freq")}
    assert all(torch.equal(tensor, stored[name]) for name, tensor in ours.items())
    assert model_config(tmp_path / "ours") == model_config(folder)


def test_the_package_s_own_file_is_read(published, tmp_path):
    """Names without the hub's prefix, a pickle, the tied head twice."""
    theirs, folder = published(FOLDERS["Evo-1"])
    expected = load(folder).model.state_dict()
    (folder / "model.safetensors").unlink()
    torch.save(theirs.state_dict(), folder / "pytorch_model.bin")
    for name, tensor in load(folder).model.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_missing_tensors_are_listed(published):
    _, folder = published(FOLDERS["Evo-1"])
    tensors = load_file(folder / "model.safetensors")
    del tensors["backbone.blocks.0.filter.poles"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(LongwaveError, match=r"backbone.blocks.0.filter.poles: expected \[32, 8, 1, 2\], missing"):
        load(folder)


def test_poles_stay_in_float32_beside_bfloat16(published):
    _, folder = published(FOLDERS["Evo-1"])
    tensors = load_file(folder / "model.safetensors")
    wide = ("poles", "residues")
    save_file({k: t if k.endswith(wide) else t.bfloat16() for k, t in tensors.items()}, folder / "model.safetensors")
    loaded = load(folder).model.state_dict()
    assert loaded["layers.0.mixer.projections.weight"].dtype == torch.bfloat16
    for name in wide:
        assert torch.equal(loaded[f"layers.0.mixer.filter.{name}"], tensors[f"backbone.blocks.0.filter.{name}"])


HUB = {
    "model_type": "stripedhyena",
    "attn_layer_idxs": list(range(1, 32, 2)),
    "hyena_layer_idxs": list(range(0, 33, 2)),
}


def test_a_published_config():
    """StripedHyena-Hessian-7B's; on the hub what is left out has the values of that model."""
    model = family.config_from(HUB)
    assert model == family.config_from(
        HUB | {"inner_mlp_size": 14336, "proj_groups": 4, "rotary_emb_base": 500_000, "state_size": 2, "eps": 1e-5}
    )
    hyena = HyenaModal.Config(n_heads=32, d_state=2)
    attention = Attention.Config(n_heads=32, n_kv_heads=8, d_head=128, rotary_base=500_000.0)
    assert model.layers == (hyena, SwiGLU.Config(d_inner=14336), attention, SwiGLU.Config(d_inner=14336)) * 16
    assert (model.vocab_size, model.d_model, model.norm, model.norm_eps) == (32000, 4096, "rms", 1e-5)
    assert not model.tie_embeddings


REFUSED = {
    "smeared_gqa True": {"smeared_gqa": True},
    "hyena_filter_groups 256": {"hyena_filter_groups": 256},
    "final_norm False": {"final_norm": False},
    "mlp_activation 'relu'": {"mlp_activation": "relu"},
    "long_fir_threshold 128": {"long_fir_threshold": 128},
    "column_split True": {"column_split": True, "proj_groups": 4},
    "architecture 'Other'": {"architectures": ["Other"]},
    "layer 31 of 32": {"attn_layer_idxs": [1]},
    "proj_groups 3 must divide num_attention_heads 32": {"proj_groups": 3},
    "state_size must be int": {"state_size": "two"},
}


@pytest.mark.parametrize(("named", "options"), REFUSED.items(), ids=REFUSED)
def test_what_we_lack_is_refused_by_name_before_any_weight_is_read(tmp_path, named, options):
    indices = {"hyena_layer_idxs": list(range(31))} if named.startswith("layer") else {}
    (tmp_path / "config.json").write_text(json.dumps(HUB | indices | options))
    for read in (load, model_config):
        with pytest.raises(UsageError) as error:
            read(tmp_path)  # there are no weights
        assert named in str(error.value)


MLP = SwiGLU.Config(d_inner=64)
INEXPRESSIBLE = {
    "LSTM": (LSTM.Config(), MLP),
    "window=4": (Attention.Config(n_heads=4, window=4), MLP),
    "rotary=0.5": (Attention.Config(n_heads=4, rotary=0.5), MLP),
    "4 heads of 16": (Attention.Config(n_heads=4, d_head=16), MLP),
    "alike": (HyenaModal.Config(d_state=2), MLP, HyenaModal.Config(d_state=3), MLP),
    "2 in hyena_modal, 4 in attention": (HyenaModal.Config(n_heads=2), MLP, Attention.Config(n_heads=4), MLP),
    "bias=True": (HyenaModal.Config(), SwiGLU.Config(bias=True)),
    "1 slots": (HyenaModal.Config(),),
}


@pytest.mark.parametrize(("named", "layers"), INEXPRESSIBLE.items(), ids=INEXPRESSIBLE)
def test_what_the_format_lacks_is_refused(tmp_path, named, layers):
    model = LanguageModel(LanguageModel.Config(vocab_size=97, d_model=32, layers=layers))
    with pytest.raises(UsageError) as error:
        export(model, tmp_path / "new", "stripedhyena")
    assert named in str(error.value)
    assert not (tmp_path / "new").exists()

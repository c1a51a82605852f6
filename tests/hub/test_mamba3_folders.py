"""Mamba-3 in the state-spaces format: names and shapes as published, and read by the JAX library to equal logits."""

import json
import os
import warnings

import numpy as np
import pytest
import torch

from longwave.errors import UsageError
from longwave.hub import state_spaces
from longwave.hub.export import export
from longwave.hub.load import load
from longwave.mixers import Mamba3
from longwave.models.language_model import LanguageModel

D, H, P, N = 32, 4, 16, 16
OPTIONS = {"d_state": N, "d_head": P}


def scheme(r=1, g=1, s=4, mimo=False, norm=False):
    """The published names and shapes of a tied model of one layer of 64 inner channels."""
    mixer = {
        "in_proj.weight": (2 * 64 + 2 * r * g * N + 3 * H + s, D),
        "dt_bias": (H,),
        "B_bias": (H, r, N),
        "C_bias": (H, r, N),
        "B_norm.weight": (N,),
        "C_norm.weight": (N,),
        "D": (H,),
        "out_proj.weight": (D, 64),
    }
    mixer |= dict.fromkeys(("mimo_x", "mimo_z", "mimo_o"), (H, r, P)) if mimo else {}
    mixer |= {"norm.weight": (64,)} if norm else {}
    shapes = {"backbone.embedding.weight": (96, D), "lm_head.weight": (96, D), "backbone.norm_f.weight": (D,)}
    return (
        shapes | {"backbone.layers.0.norm.weight": (D,)} | {f"backbone.layers.0.mixer.{k}": v for k, v in mixer.items()}
    )


def model(**options):
    config = LanguageModel.Config(vocab_size=96, d_model=D, layers=(Mamba3.Config(**OPTIONS, **options),))
    made = LanguageModel(config)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return made


FOLDERS = {
    "siso": ({}, {}),
    "softplus": ({"A_activation": "softplus", "A_floor": 0.1}, {}),
    "groups": ({"n_groups": 2, "rope_fraction": 1.0, "norm": True}, {"g": 2, "s": 8, "norm": True}),
    "mimo": ({"mimo_rank": 2}, {"r": 2, "mimo": True}),
}


@pytest.mark.parametrize(("options", "sizes"), FOLDERS.values(), ids=FOLDERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_names_and_tensors_go_both_ways(tmp_path, options, sizes, dtype):
    ours = model(**options).to(dtype)
    export(ours, tmp_path, "state_spaces")
    tensors = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == scheme(**sizes)
    again = load(tmp_path).model
    assert again.config == ours.config
    found = again.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in ours.state_dict().items())
    assert all(found[name].dtype == tensor.dtype for name, tensor in ours.state_dict().items())


def test_an_independent_reader_gives_the_same_logits(tmp_path):
    """mamba3-jax reads the tensors by their published names."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from flax import nnx
        from mamba3_jax.modeling import Mamba3Config, Mamba3ForCausalLM
        from mamba3_jax.params import load_pytorch_weights

    export(model(mimo_rank=2, norm=True, n_groups=2), tmp_path, "state_spaces")
    config = json.loads((tmp_path / "config.json").read_text())
    ssm = config["ssm_cfg"]
    theirs = Mamba3ForCausalLM(
        Mamba3Config(
            vocab_size=config["vocab_size"],
            hidden_size=config["d_model"],
            num_hidden_layers=config["n_layer"],
            tie_word_embeddings=config["tie_embeddings"],
            state_size=ssm["d_state"],
            head_dim=ssm["headdim"],
            expand=ssm["expand"],
            ngroups=ssm["ngroups"],
            rope_fraction=ssm["rope_fraction"],
            A_floor=ssm["A_floor"],
            is_mimo=ssm["is_mimo"],
            mimo_rank=ssm["mimo_rank"],
            is_outproj_norm=ssm["is_outproj_norm"],
        ),
        rngs=nnx.Rngs(0),
    )
    tensors = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    load_pytorch_weights(theirs, {name: tensor.numpy() for name, tensor in tensors.items()}, strict=True)
    tokens = torch.randint(0, 96, (2, 13))
    with torch.no_grad():
        logits, _ = load(tmp_path).model(tokens)
    expected = nnx.jit(lambda theirs, tokens: theirs(tokens)["logits"])(theirs, np.asarray(tokens))
    torch.testing.assert_close(logits, torch.from_numpy(np.array(expected)), atol=5e-6, rtol=0)


def test_the_activation_of_A_is_the_newer_one_unless_told():
    assert state_spaces.ssm_from({"layer": "Mamba3"}, D) == Mamba3.Config()
    told = state_spaces.ssm_from({"layer": "Mamba3", "A_activation": "softplus"}, D)
    assert told == Mamba3.Config(A_activation="softplus")
    with pytest.raises(UsageError, match=r"A_activation 'exp'.*'heavy_tail' or 'softplus'"):
        state_spaces.ssm_from({"layer": "Mamba3", "A_activation": "exp"}, D)


def test_options_of_the_published_code():
    """mimo_rank is 4 by default there, and means nothing without is_mimo."""
    ssm = {"layer": "Mamba3", "d_state": 64, "headdim": 32, "ngroups": 2, "rope_fraction": 1, "A_floor": 1e-3}
    ssm |= {"is_outproj_norm": True, "fuse_pregate_headwise_norm": False, "chunk_size": 16, "mimo_rank": 2}
    sizes = {"d_state": 64, "d_head": 32, "n_groups": 2}
    expected = Mamba3.Config(**sizes, rope_fraction=1.0, A_floor=1e-3, norm=True)
    assert state_spaces.ssm_from(ssm, D) == expected
    assert state_spaces.ssm_from({"layer": "Mamba3", "is_mimo": True}, D) == Mamba3.Config(mimo_rank=4)


@pytest.mark.parametrize("options", [{"rope_fraction": 0.25}, {"norm_eps": 1e-6}], ids=str)
def test_what_the_format_lacks(tmp_path, options):
    with pytest.raises(UsageError, match=next(iter(options))):
        export(model(**options), tmp_path / "new", "state_spaces")
    assert not (tmp_path / "new").exists()


def test_what_we_lack():
    for named, options in {"d_conv": {"d_conv": 4}, "rope_fraction 0.3": {"rope_fraction": 0.3}}.items():
        with pytest.raises(UsageError, match=named):
            state_spaces.ssm_from({"layer": "Mamba3"} | options, D)

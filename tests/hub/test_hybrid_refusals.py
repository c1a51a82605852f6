"""falcon_h1, nemotron_h and zamba2: what is refused by name, before any weight is read or anything is written."""

import math
from dataclasses import replace

import pytest
import torch

from longwave.errors import UsageError
from longwave.hub.export import export
from longwave.hub.load import find_family
from longwave.mixers import GRU, MLP, Attention, Mamba2, MoE, Parallel, Shared, SwiGLU
from longwave.models.language_model import LanguageModel


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"model_type": "falcon_h1", "projectors_bias": True},
            "projectors_bias True is not supported; longwave has the",
        ),
        ({"model_type": "falcon_h1", "ssm_multipliers": [1.0, 2.0]}, r"five numbers, of z, x, B, C and dt, got \[1.0,"),
        ({"model_type": "falcon_h1", "mamba_d_head": 100}, "times mamba_d_head 100 must be the inner width 1024"),
        ({"model_type": "falcon_h1", "rope_scaling": {"rope_type": "yarn"}}, "rope_type 'yarn' is not supported"),
        ({"model_type": "falcon_h1", "hidden_act": "relu"}, "hidden_act 'relu' is not supported"),
        ({"model_type": "nemotron_h", "hybrid_override_pattern": "MX"}, "a layer of type 'X' is not supported"),
        ({"model_type": "nemotron_h", "layers_block_type": []}, "names no layer"),
        ({"model_type": "nemotron_h", "time_step_limit": [0.0, 0.1]}, r"time_step_limit \(0.0, 0.1\) is not supported"),
        ({"model_type": "nemotron_h", "num_nextn_predict_layers": 1}, "num_nextn_predict_layers 1 is not supported"),
        ({"model_type": "nemotron_h", "mlp_hidden_act": "silu"}, "mlp_hidden_act 'silu' is not supported"),
        ({"model_type": "nemotron_h", "moe_latent_size": 8, "mlp_bias": True}, "mlp_bias with moe_latent_size True"),
        ({"model_type": "zamba2", "use_long_context": True}, "use_long_context True is not supported"),
        ({"model_type": "zamba2", "tie_word_embeddings": False}, "tie_word_embeddings False is not supported"),
        ({"model_type": "zamba2", "layers_block_type": ["mamba", "moe"]}, "a layer of type 'moe' is not supported"),
        ({"model_type": "zamba2", "n_mamba_heads": 7}, "n_mamba_heads 7 must divide mamba_expand 2 times hidden_size"),
        ({"model_type": "zamba2", "architectures": ["Zamba2Model"]}, "architecture 'Zamba2Model' is not supported"),
    ],
)
def test_options_are_refused_by_name(config, message):
    with pytest.raises(UsageError, match=message):
        find_family(config).config_from(config)


SSM, ABOVE = Mamba2.Config(d_head=8), Mamba2.Config(d_head=8, dt_limit=(1e-3, math.inf))
ATTENTION, UNTURNED = Attention.Config(n_heads=2), Attention.Config(n_heads=2, rotary=0.0)
SQUARED = MLP.Config(activation="relu2", bias=False)
CALLER = Shared.Config(mixer=ABOVE, attention=Attention.Config(n_heads=4, scale=0.5))
BOTH = Parallel.Config(mixers=(SSM, ATTENTION))
MOE = MoE.Config(expert=SQUARED, shared=SQUARED, router="sigmoid")


@pytest.mark.parametrize(
    ("format", "layers", "message"),
    [
        ("falcon_h1", (BOTH,), "layers of a mixer and a feed-forward block, and this model has 1 slots"),
        ("falcon_h1", (SSM, SwiGLU.Config()), "layers of a parallel and a swiglu, all alike"),
        ("falcon_h1", (replace(BOTH, mixers=(ATTENTION, SSM)), SwiGLU.Config()), "mamba2 parallel to attention"),
        (
            "falcon_h1",
            (BOTH, SwiGLU.Config(activation="gelu")),
            "activation='silu', and this model has activation='gelu'",
        ),
        (
            "falcon_h1",
            (replace(BOTH, mixers=(replace(SSM, D_per_channel=True), ATTENTION)), SwiGLU.Config()),
            "D_per_ch",
        ),
        ("nemotron_h", (ABOVE, GRU.Config()), "mamba2 or attention or mlp or moe here, and this model has GRU"),
        ("nemotron_h", (ABOVE, replace(ABOVE, d_state=4)), "mamba2 layers all alike"),
        ("nemotron_h", (SSM,), r"a dt_limit from above 0 to infinity, and this model has dt_limit=\(0.0, inf\)"),
        ("nemotron_h", (ATTENTION,), r"attention of rotary=0.0, and this model has rotary=1.0"),
        ("nemotron_h", (MLP.Config(),), "activation='relu2', and this model has activation='gelu'"),
        ("nemotron_h", (replace(SQUARED, bias=True), MOE), "one bias for mlp and the shared expert"),
        (
            "nemotron_h",
            (replace(MOE, router="topk_softmax"),),
            "router='sigmoid', and this model has router='topk_soft",
        ),
        ("nemotron_h", (replace(ABOVE, norm=False),), "norm=True, and this model has norm=False"),
        ("mamba2", (replace(SSM, norm=False),), "norm=True, and this model has norm=False"),
        (
            "mamba2",
            (replace(SSM, in_multipliers=(1.0, 2.0, 1.0, 1.0, 1.0)),),
            "in_multipliers=None, and this model has",
        ),
        ("zamba2", (ABOVE, UNTURNED), "mamba2 in every layer, all alike"),
        ("zamba2", (replace(CALLER, index=1), CALLER), r"whose index goes round, and this model has \[1, 0\]"),
        ("zamba2", (CALLER, replace(CALLER, index=1, rank=3)), "shared layers all alike"),
        ("zamba2", (replace(CALLER, rank=None),), "an adapter in every shared layer, and this model has rank=None"),
        ("zamba2", (replace(CALLER, attention=Attention.Config(n_heads=4)),), "2 d_model channels, scale=0.5"),
        ("zamba2", (replace(CALLER, bias=True),), "one bias for mamba2 and shared, and this model has False and True"),
    ],
)
def test_what_a_format_cannot_say_is_refused(format, layers, message, tmp_path):
    with torch.device("meta"):
        model = LanguageModel(LanguageModel.Config(vocab_size=9, d_model=16, layers=layers))
    with pytest.raises(UsageError, match=message):
        export(model, tmp_path / "new", format)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("format", ["mamba2", "falcon_h1", "nemotron_h", "zamba2"])
def test_multipliers_of_the_model_are_not_lost(format, tmp_path):
    layers = {"mamba2": (SSM,), "falcon_h1": (BOTH, SwiGLU.Config()), "nemotron_h": (ABOVE,), "zamba2": (CALLER,)}[
        format
    ]
    with torch.device("meta"):
        model = LanguageModel(LanguageModel.Config(vocab_size=9, d_model=16, layers=layers, residual_multiplier=0.5))
    with pytest.raises(UsageError, match=r"residual_multiplier=1\.0, and this model has residual_multiplier=0\.5"):
        export(model, tmp_path / "new", format)

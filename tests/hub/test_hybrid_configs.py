"""config.json of jamba, bamba and granitemoehybrid as published folders have it, and what is refused by name."""

import dataclasses
import json
import re
from typing import Any

import pytest

from longwave.errors import UsageError
from longwave.hub import FORMATS
from longwave.hub.export import export
from longwave.hub.load import load, model_config
from longwave.mixers import GRU, MLP, Attention, Mamba, Mamba2, MoE, SwiGLU
from longwave.models.language_model import LanguageModel
from longwave.models.presets import PRESETS

# The keys of the published config.json that matter, in the spelling of their time.
JAMBA = {
    "model_type": "jamba",
    "architectures": ["JambaForCausalLM"],
    "attn_layer_offset": 4,
    "attn_layer_period": 8,
    "calc_logits_for_entire_prompt": False,
    "expert_layer_offset": 1,
    "expert_layer_period": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "mamba_conv_bias": True,
    "mamba_d_conv": 4,
    "mamba_d_state": 16,
    "mamba_dt_rank": 256,
    "mamba_expand": 2,
    "mamba_inner_layernorms": True,
    "mamba_proj_bias": False,
    "num_attention_heads": 32,
    "num_experts": 16,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "vocab_size": 65536,
}
BAMBA = {
    "model_type": "bamba",
    "architectures": ["BambaForCausalLM"],
    "attn_layer_indices": [9, 18, 27],
    "attn_rotary_emb": 64,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "mamba_chunk_size": 256,
    "mamba_d_conv": 4,
    "mamba_d_head": 64,
    "mamba_d_state": 128,
    "mamba_expand": 2,
    "mamba_n_groups": 1,
    "mamba_n_heads": 128,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "vocab_size": 128256,
}
GRANITE = {
    "model_type": "granitemoehybrid",
    "architectures": ["GraniteMoeHybridForCausalLM"],
    "attention_multiplier": 0.0078125,
    "embedding_multiplier": 12,
    "hidden_size": 1536,
    "intermediate_size": 512,
    "layer_types": ["mamba"] * 5 + ["attention"] + ["mamba"] * 4,
    "logits_scaling": 6,
    "mamba_d_head": 64,
    "mamba_d_state": 128,
    "mamba_expand": 2,
    "mamba_n_groups": 1,
    "mamba_n_heads": 48,
    "normalization_function": "rmsnorm",
    "num_attention_heads": 12,
    "num_experts_per_tok": 6,
    "num_hidden_layers": 10,
    "num_key_value_heads": 4,
    "num_local_experts": 62,
    "position_embedding_type": "nope",
    "residual_multiplier": 0.22,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "shared_intermediate_size": 1024,
    "tie_word_embeddings": True,
    "vocab_size": 100352,
}
PUBLISHED = {"jamba": JAMBA, "bamba": BAMBA, "granitemoehybrid": GRANITE}


def plain(config):
    """With settings spelt out that are left to the presets' defaults, so that the two compare equal."""
    mixers = {
        Mamba.Config: lambda m: dataclasses.replace(m, dt_rank="auto" if m.dt_rank == 256 else m.dt_rank),
        Mamba2.Config: lambda m: dataclasses.replace(m, d_inner=None),
        Attention.Config: lambda m: dataclasses.replace(m, d_head=None),
    }
    layers = tuple(mixers.get(type(layer), lambda m: m)(layer) for layer in config.layers)
    return dataclasses.replace(config, layers=layers)


@pytest.mark.parametrize(("family", "preset"), [("jamba", "jamba-v0.1"), ("bamba", "bamba-9b")])
def test_published_configurations_are_the_presets(family, preset):
    assert plain(FORMATS[family].config_from(PUBLISHED[family])) == plain(PRESETS[preset]())


def test_a_published_granite_configuration():
    config: Any = FORMATS["granitemoehybrid"].config_from(GRANITE)
    assert [type(layer) for layer in config.layers[::2]] == [Mamba2.Config] * 5 + [Attention.Config] + [
        Mamba2.Config
    ] * 4
    attention, moe = config.layers[10:12]
    assert (attention.rotary, attention.scale, attention.n_kv_heads) == (0.0, 1 / 128, 4)
    assert (moe.n_experts, moe.top_k, moe.router) == (62, 6, "topk_softmax")
    assert (moe.expert, moe.shared) == (SwiGLU.Config(d_inner=512), SwiGLU.Config(d_inner=1024))
    assert (config.embedding_multiplier, config.residual_multiplier, config.logits_multiplier) == (12, 0.22, 1 / 6)
    assert FORMATS["granitemoehybrid"].config_to(config)["logits_scaling"] == 6


@pytest.mark.parametrize("family", ["jamba", "bamba", "granitemoehybrid", "falcon_h1", "nemotron_h"])
def test_null_key_value_heads_are_as_many_as_heads(family):
    config = {"model_type": family, "num_attention_heads": 16, "num_key_value_heads": None, "attn_layer_indices": [0]}
    config |= {"layer_types": ["full_attention"], "num_hidden_layers": 1} if family == "granitemoehybrid" else {}
    layers = FORMATS[family].config_from(config).layers
    parts = [part for layer in layers for part in getattr(layer, "mixers", (layer,))]
    assert {part.n_kv_heads for part in parts if isinstance(part, Attention.Config)} == {16}


@pytest.mark.parametrize("family", PUBLISHED)
def test_there_and_back(family):
    config = FORMATS[family].config_from(PUBLISHED[family])
    written = FORMATS[family].config_to(config)
    assert FORMATS[family].config_from(json.loads(json.dumps(written))) == config


@pytest.mark.parametrize(
    ("family", "changes", "named"),
    [
        ("jamba", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ("jamba", {"architectures": ["JambaForSequenceClassification"]}, "JambaForSequenceClassification"),
        ("jamba", {"mamba_inner_layernorms": False}, "mamba_inner_layernorms False"),
        ("jamba", {"sliding_window": 4096}, "sliding_window 4096"),
        ("jamba", {"attn_layer_offset": 8}, r"attn_layer_offset must be in 0\.\.7, got 8"),
        ("jamba", {"num_experts_per_tok": 17}, "top_k=17"),
        ("jamba", {"quantization_config": {"bits": 4}}, "quantization_config"),
        ("bamba", {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_type 'yarn'"),
        ("bamba", {"hidden_act": "relu"}, "hidden_act 'relu'"),
        ("bamba", {"mamba_n_heads": 100}, "mamba_n_heads 100 times mamba_d_head 64"),
        ("bamba", {"attn_layer_indices": "9"}, "attn_layer_indices must be list"),
        ("granitemoehybrid", {"position_embedding_type": "alibi"}, "position_embedding_type 'alibi'"),
        ("granitemoehybrid", {"layer_types": ["lstm"] * 10}, "a layer of type 'lstm'"),
        ("granitemoehybrid", {"num_hidden_layers": 11}, "layer_types of 10 layers with num_hidden_layers 11"),
        ("granitemoehybrid", {"logits_scaling": 0}, "logits_scaling must be above 0, got 0"),
    ],
)
def test_what_longwave_lacks_is_refused_before_any_weight_is_read(tmp_path, family, changes, named):
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED[family] | changes))
    for refuse in (model_config, load):  # there are no weights to read
        with pytest.raises(UsageError, match=named):
            refuse(tmp_path)


SWIGLU, LEARNED = SwiGLU.Config(d_inner=24), Mamba.Config(inner_norm="learned", inner_norm_eps=1e-5)
EXPERTS = MoE.Config(expert=SWIGLU)
ATTENTION = Attention.Config(n_heads=2)


@pytest.mark.parametrize(
    ("family", "layers", "options", "named"),
    [
        ("jamba", (Mamba.Config(), SWIGLU), {}, "has inner_norm='learned'"),
        ("jamba", (LEARNED,), {}, "1 slots"),
        ("jamba", (LEARNED, EXPERTS), {}, "router='softmax_topk'"),
        ("jamba", (LEARNED, SWIGLU, ATTENTION, SWIGLU), {}, "rotary=1.0"),
        ("jamba", (LEARNED, SWIGLU, Mamba2.Config(d_head=8), SWIGLU), {}, "mamba or attention here"),
        ("jamba", (LEARNED, SWIGLU, LEARNED, MLP.Config()), {}, "swiglu or moe here"),
        (
            "jamba",
            (LEARNED, SWIGLU, dataclasses.replace(ATTENTION, rotary=0.0), SWIGLU, LEARNED, SWIGLU) * 2
            + (dataclasses.replace(ATTENTION, rotary=0.0), SWIGLU) * 2,
            {},
            "attn_layers at a fixed distance",
        ),
        ("bamba", (Mamba2.Config(d_head=8), SWIGLU), {"norm": "layer"}, "norm='rms'"),
        ("bamba", (Mamba2.Config(d_head=8), SWIGLU), {"logits_multiplier": 2.0}, "logits_multiplier=1.0"),
        ("bamba", (Mamba2.Config(d_head=8), SWIGLU, Mamba2.Config(d_head=4), SWIGLU), {}, "mamba2 layers all alike"),
        ("bamba", (Mamba2.Config(d_head=8, norm_eps=1e-3), SWIGLU), {}, "one norm_eps"),
        ("bamba", (GRU.Config(), SWIGLU), {}, "mamba2 or attention here"),
        ("granitemoehybrid", (ATTENTION, EXPERTS), {}, "a shared one"),
        ("granitemoehybrid", (ATTENTION, SWIGLU, ATTENTION, EXPERTS), {}, "experts in every layer or in none"),
        ("granitemoehybrid", (Attention.Config(n_heads=2, rotary=0.5), SWIGLU), {}, "rotary=0.5"),
        ("granitemoehybrid", (ATTENTION, SWIGLU), {"norm_position": "sandwich"}, "norm_position='sandwich'"),
    ],
)
def test_what_a_format_has_no_words_for_is_refused(tmp_path, family, layers, options, named):
    config = LanguageModel.Config(vocab_size=31, d_model=16, layers=layers, **options)
    with pytest.raises(UsageError, match=re.escape(named)):
        export(LanguageModel(config), tmp_path / "folder", family)
    assert not (tmp_path / "folder").exists()

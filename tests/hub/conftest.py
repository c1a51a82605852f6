"""Tiny random models made by transformers, and its full forward, never its cached path, as the truth."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch

SIZES = {
    "mamba": {"hidden_size": 32, "state_size": 8, "num_hidden_layers": 2, "time_step_rank": 4},
    "falcon_mamba": {"hidden_size": 32, "state_size": 8, "num_hidden_layers": 2, "time_step_rank": 4},
    "mamba2": {
        "hidden_size": 32,
        "state_size": 16,
        "num_hidden_layers": 2,
        "num_heads": 8,
        "head_dim": 8,
        "n_groups": 2,
        "chunk_size": 8,
    },
    "jamba": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_experts": 4,
        "attn_layer_period": 4,
        "attn_layer_offset": 2,
        "mamba_d_state": 8,
        "mamba_dt_rank": 4,
    },
    "bamba": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "attn_layer_indices": [1],
        "mamba_n_heads": 8,
        "mamba_n_groups": 2,
        "mamba_d_state": 16,
        "mamba_chunk_size": 8,
    },
    "granitemoehybrid": {
        "hidden_size": 32,
        "intermediate_size": 24,
        "shared_intermediate_size": 40,
        "num_hidden_layers": 3,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_local_experts": 4,
        "mamba_n_heads": 8,
        "mamba_n_groups": 2,
        "mamba_d_state": 16,
        "mamba_chunk_size": 8,
        "embedding_multiplier": 1.5,
        "residual_multiplier": 2.0,
        "attention_multiplier": 0.25,
        "logits_scaling": 3.0,
    },
    "falcon_h1": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "mamba_d_ssm": 48,
        "mamba_n_heads": 6,
        "mamba_n_groups": 2,
        "mamba_d_state": 16,
        "mamba_chunk_size": 8,
    },
    "nemotron_h": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "hybrid_override_pattern": "M-M*E",
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "ssm_state_size": 16,
        "mamba_num_heads": 6,
        "mamba_head_dim": 8,
        "n_groups": 2,
        "chunk_size": 8,
        "n_routed_experts": 4,
        "moe_intermediate_size": 24,
        "moe_shared_expert_intermediate_size": 40,
    },
    "zamba2": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 6,
        "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid", "hybrid", "mamba"],
        "num_mem_blocks": 2,
        "num_attention_heads": 4,
        "mamba_d_state": 16,
        "n_mamba_heads": 8,
        "mamba_ngroups": 2,
        "chunk_size": 8,
        "adapter_rank": 4,
        "use_mem_rope": True,
        "use_shared_attention_adapter": True,
    },
}


@pytest.fixture(scope="session", autouse=True)
def _quiet():
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)


@pytest.fixture
def peer(tmp_path):
    """peer(model_type, dtype, **options): transformers' model, all tensors perturbed, and the folder it saved."""

    def make(model_type, dtype=torch.float32, shake=0.1, **options):
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.for_model(model_type, vocab_size=97, **(SIZES[model_type] | options))
        model = AutoModelForCausalLM.from_config(config, experts_implementation="eager").eval()  # in float64 too
        with torch.no_grad():
            for tensor in model.state_dict().values():
                tensor.add_(shake * torch.randn_like(tensor))
        folder = tmp_path / model_type
        model.to(dtype).save_pretrained(folder)
        return model, folder

    return make


@pytest.fixture(scope="session")
def truth():
    """truth(model, tokens): the logits of a model of transformers."""

    @torch.no_grad()
    def logits(model, tokens):
        return model(tokens, use_cache=False).logits

    return logits

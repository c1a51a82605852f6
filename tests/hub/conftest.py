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
}


@pytest.fixture(scope="session", autouse=True)
def _quiet():
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)


@pytest.fixture
def peer(tmp_path):
    """peer(model_type, dtype, **options): transformers' model, all parameters perturbed, and the folder it saved."""

    def make(model_type, dtype=torch.float32, **options):
        from transformers import AutoConfig, AutoModelForCausalLM

        config = AutoConfig.for_model(model_type, vocab_size=97, **(SIZES[model_type] | options))
        model = AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
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

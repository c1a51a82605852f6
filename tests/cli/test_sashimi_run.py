"""A SaShiMi where a language model may stand: trained, resumed, inspected, sampled and scored from its folder."""

import json
from pathlib import Path

import pytest
import torch

import longwave as lw
from longwave.config import to_dict
from longwave.errors import UsageError
from longwave.hub.export import export
from longwave.mixers import GRU
from longwave.models.sashimi import SaShiMi

CONFIG = SaShiMi.Config(vocab_size=257, d_model=8, n_layers=1, pool=(4,), mixer=GRU.Config())


def test_from_a_configuration_to_text(longwave, corpus):
    Path("sashimi.json").write_text(json.dumps(to_dict(CONFIG)))
    common = ("train", "--text", corpus, "--model", "sashimi.json", "--batch-size", 2, "--task.seq-len", 30)
    done = longwave(*common, "--steps", 6, "--eval-tokens", 500, "--sample-tokens", 5)
    assert done.status == 0, done.err
    assert longwave(*common, "--steps", 8, "--eval-tokens", 500, "--resume", "auto").status == 0
    found = json.loads(longwave("inspect", "runs/longwave", "--length", 100, "--json").out)
    assert found["config"] == json.loads(json.dumps(to_dict(CONFIG)))
    model = lw.load("runs/longwave")
    assert isinstance(model.model, SaShiMi)
    assert found["lengths"][0]["state_bytes"] == model.model.state_bytes(100)
    assert found["parameters"] == model.model.parameter_count()
    assert longwave("generate", "runs/longwave", "state", "--max-tokens", 9, "--seed", 1).status == 0
    assert model.score("wave space").n_bytes == 10
    assert next(iter(lw.load("runs/longwave", dtype="bfloat16").model.parameters())).dtype == torch.bfloat16
    with pytest.raises(UsageError, match="the mamba format has language models, and this model has kind"):
        export(model, "elsewhere", "mamba")


def test_an_unknown_kind(longwave, corpus):
    Path("model.json").write_text(json.dumps(to_dict(CONFIG) | {"kind": "sashimmi"}))
    done = longwave("train", "--text", corpus, "--model", "model.json", "--steps", 1)
    assert done.status == 2
    assert "'sashimmi' is no kind of model. Did you mean 'sashimi'?" in done.complaint

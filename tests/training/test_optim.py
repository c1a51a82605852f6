import math

import pytest
import torch
from torch import nn

from longwave.errors import UsageError
from longwave.mixers import CHANNELS, MIXERS
from longwave.models.language_model import LanguageModel
from longwave.training.config import Optim
from longwave.training.optim import adamw, decay_groups, lr_factor, set_lr

DECAYED = {
    "mamba": {"in_proj.weight", "conv1d.weight", "x_proj.weight", "dt_proj.weight", "out_proj.weight"},
    "mamba2": {"in_proj.weight", "conv1d.weight", "out_proj.weight"},
}


@pytest.mark.parametrize("kind", sorted(MIXERS | CHANNELS))
def test_what_is_decayed_in_every_mixer(kind):
    layer = (MIXERS | CHANNELS)[kind](64)
    decayed, free = decay_groups(layer)
    assert set(decayed) | set(free) == {name for name, parameter in layer.named_parameters() if parameter.requires_grad}
    assert not set(decayed) & set(free)
    for name in decayed:
        leaf = name.rpartition(".")[2]
        assert leaf not in ("A_log", "D", "dt_bias")
        assert "bias" not in leaf
        assert "norm" not in name
    for name, parameter in free.items():
        assert parameter.ndim < 2 or getattr(parameter, "_no_weight_decay", False), name
        assert not name.endswith("proj.weight"), name
    assert set(decayed) == DECAYED.get(kind, set(decayed))


@pytest.mark.parametrize("tied", [True, False])
def test_norms_and_embeddings_of_a_model_are_spared(tied, make):
    config = make().model
    model = LanguageModel(LanguageModel.Config(vocab_size=30, d_model=16, layers=config.layers, tie_embeddings=tied))
    decayed, free = decay_groups(model)
    embeddings = {f"{name}.weight" for name, m in model.named_modules() if isinstance(m, nn.Embedding)}
    assert embeddings
    assert embeddings <= set(free)
    assert all(parameter.ndim >= 2 for parameter in decayed.values())
    assert set(decayed) | set(free) == {name for name, _ in model.named_parameters()}


def test_a_step_without_gradient_decays_matrices_alone():
    layer = MIXERS["mamba2"](64)
    optimizer = adamw(layer, Optim.Config(lr=0.1, weight_decay=0.5))
    before = {name: p.detach().clone() for name, p in layer.named_parameters()}
    for p in layer.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in layer.named_parameters():
        scale = 1 - 0.1 * 0.5 if name in DECAYED["mamba2"] else 1.0
        torch.testing.assert_close(p.detach(), before[name] * scale)


def test_cosine_against_its_closed_form():
    config = Optim.Config(schedule="cosine", warmup=0.1, final=0.2)
    assert lr_factor(0.0, config) == 0
    assert lr_factor(0.05, config) == pytest.approx(0.5)
    assert lr_factor(0.1, config) == pytest.approx(1)
    for t in (0.25, 0.5, 0.75, 1.0):
        expected = 0.2 + 0.8 * math.cos(math.pi * t / 2) ** 2  # half-angle form
        assert lr_factor(0.1 + 0.9 * t, config) == pytest.approx(expected)
    assert lr_factor(1.0, config) == pytest.approx(0.2)


def test_wsd_against_its_closed_form():
    config = Optim.Config(schedule="wsd", warmup=0.1, decay=0.4, final=0.0)
    assert [lr_factor(t, config) for t in (0.1, 0.3, 0.6)] == [1, 1, 1]
    for part in (0.25, 0.5, 1.0):
        assert lr_factor(0.6 + 0.4 * part, config) == pytest.approx(1 - part**0.5)
    assert lr_factor(0.99, Optim.Config(schedule="constant")) == 1
    assert lr_factor(1.0, Optim.Config(schedule="wsd", warmup=0.0, decay=0.0)) == 1
    assert lr_factor(1.0, Optim.Config(schedule="cosine", warmup=1.0, decay=0.0)) == pytest.approx(0.1)


@pytest.mark.parametrize(("bad", "value"), [({"lr": -1.0}, "-1.0"), ({"warmup": 0.9}, "0.9"), ({"clip": -2.0}, "-2.0")])
def test_bad_values_are_printed(bad, value):
    with pytest.raises(UsageError, match=value):
        Optim.Config(**bad)


def test_time_scales_learn_at_their_part_of_the_rate():
    mixer = MIXERS["s4d"](8)
    slow = [name for name, parameter in mixer.named_parameters() if getattr(parameter, "_lr_scale", 1.0) != 1.0]
    assert any("inv_dt" in name or "log_dt" in name for name in slow)
    optimizer = adamw(mixer, Optim.Config(lr=1.0))
    set_lr(optimizer, 0.1)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in mixer.named_parameters():
        assert rates[id(parameter)] == pytest.approx(
            0.1 * (mixer.get_parameter(slow[0])._lr_scale if name in slow else 1)
        )

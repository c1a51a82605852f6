"""Mixers side by side: the sum of what each gives alone, a state of states, settings within settings."""

import pytest
import torch
from mixer_cases import shake

from longwave.errors import UsageError
from longwave.mixers import MLP, Attention, Mamba2, Parallel
from longwave.models.language_model import LanguageModel
from longwave.models.state import State

SSM, ATTENTION = Mamba2.Config(d_state=4, d_head=8), Attention.Config(n_heads=2)
CONFIG = Parallel.Config(mixers=(SSM, ATTENTION), in_multipliers=(0.5, 3.0), out_multipliers=(2.0, -1.0))


def model():
    made = LanguageModel(LanguageModel.Config(vocab_size=11, d_model=16, layers=(CONFIG, SSM)))
    shake(made)
    return made


def test_the_sum_of_its_parts():
    mixer, x = Parallel(16, CONFIG), torch.randn(2, 7, 16)
    shake(mixer)
    ssm, attention = Mamba2(16, SSM), Attention(16, ATTENTION)
    weights = mixer.state_dict()
    for part, name in ((ssm, "parts.0."), (attention, "parts.1.")):
        part.load_state_dict({key.removeprefix(name): w for key, w in weights.items() if key.startswith(name)})
    torch.testing.assert_close(mixer(x)[0], 2 * ssm(x / 2)[0] - attention(3 * x)[0])
    assert mixer.state_bytes(9) == ssm.state_bytes(9) + attention.state_bytes(9)
    assert mixer.flops(9) == ssm.flops(9) + attention.flops(9)


@torch.no_grad()
def test_a_state_of_states_is_a_value_and_a_file(tmp_path):
    lm, tokens = model(), torch.randint(0, 11, (2, 6))
    _, state = lm(tokens)
    state.reserve(4).save(tmp_path / "s")
    back = State.load(tmp_path / "s", lm)
    assert torch.equal(lm(tokens, back)[0], lm(tokens, state)[0])
    assert state.nbytes == 2 * lm.state_bytes(6)
    kept, copy = state.clone(), state.reserve(1)
    lm.step(tokens[:, 0], copy)
    torch.testing.assert_close(state.layers, kept.layers, rtol=0, atol=0)
    swapped = state.index_select([1, 0]).layers[0].parts
    torch.testing.assert_close(swapped[0].ssm, state.layers[0].parts[0].ssm.flip(0), rtol=0, atol=0)
    torch.testing.assert_close(swapped[1].k, state.layers[0].parts[1].k.flip(0), rtol=0, atol=0)


def test_names_in_a_state_file_tell_the_parts(tmp_path):
    from safetensors import safe_open

    model().init_state(1, length=2).save(tmp_path / "s")
    with safe_open(tmp_path / "s", "pt") as file:
        assert {"layers.0.parts.0.ssm", "layers.0.parts.1.k", "layers.1.ssm"} <= set(file.keys())


def test_settings_within_settings_survive_a_folder(tmp_path):
    lm = model()
    lm.save(tmp_path)
    assert LanguageModel.load(tmp_path).config == lm.config


def test_every_output_projection_begins_small():
    torch.manual_seed(0)
    deep = LanguageModel(LanguageModel.Config(vocab_size=11, d_model=16, layers=(CONFIG,) * 16))
    torch.manual_seed(0)
    alone = Parallel(16, CONFIG)
    for part, name in ((0, "out_proj"), (1, "o_proj")):
        begun = getattr(deep.layers[0].mixer.parts[part], name).weight.std()
        assert begun < 0.5 * getattr(alone.parts[part], name).weight.std()


def test_what_is_no_mixer_is_refused():
    with pytest.raises(UsageError, match=r"mixers must be a tuple of at least one configuration, got \(\)"):
        Parallel.Config(mixers=())
    with pytest.raises(UsageError, match=r"mixers\[1\] is MLP.Config\(.*no mixer's configuration"):
        Parallel.Config(mixers=(SSM, MLP.Config()))
    with pytest.raises(UsageError, match=r"out_multipliers must have a factor for each of the 2 mixers, got \(1.0,\)"):
        Parallel.Config(mixers=(SSM, ATTENTION), out_multipliers=(1.0,))
    with pytest.raises(UsageError, match=r"unknown kind 'mamba22'\. Did you mean 'mamba2'"):
        LanguageModel.Config.from_dict(
            {"vocab_size": 11, "d_model": 16, "layers": [{"kind": "parallel", "mixers": [{"kind": "mamba22"}]}]}
        )

"""Residual slots: where the norm lies, what the multipliers scale, what reaches the mixer."""

import json

import pytest
import torch
from torch.testing import assert_close

from longwave.config import to_dict
from longwave.errors import UsageError
from longwave.mixers import Mamba2
from longwave.models.blocks import NORM_POSITIONS, Block, Stack
from longwave.models.language_model import LanguageModel
from longwave.models.loss import linear_cross_entropy

MULTIPLIERS = ("embedding_multiplier", "residual_multiplier", "logits_multiplier")


def rms(x, weight, eps):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def formula(block, x, a, eps):
    def norm(x):
        return rms(x, block.norm.weight, eps)

    def mixer(x):
        return block.mixer(x)[0]

    return {
        "pre": lambda: x + a * mixer(norm(x)),
        "post": lambda: norm(x + a * mixer(x)),
        "res_post": lambda: x + a * norm(mixer(x)),
        "sandwich": lambda: x + a * rms(mixer(norm(x)), block.norm_out.weight, eps),
    }[block.norm_position]()


def test_a_norm_with_eps_outside_the_root():
    block = Block(16, Mamba2.Config(d_state=4, d_head=8), norm="rms_outer_eps", norm_eps=0.1).double()
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    with torch.no_grad():
        block.norm.weight.mul_(torch.rand(16))
    expected = x / (x.square().mean(-1, keepdim=True).sqrt() + 0.1) * block.norm.weight
    assert_close(block.norm(x), expected)
    assert block.norm(x.bfloat16()).dtype == torch.bfloat16
    zero = torch.zeros(1, 1, 16, dtype=torch.float64, requires_grad=True)
    block.norm(zero).sum().backward()
    assert zero.grad is not None
    assert zero.grad.isfinite().all()


@pytest.mark.parametrize("position", NORM_POSITIONS)
def test_a_block_is_its_formula_whole_and_stepped(position):
    block = Block(
        16, Mamba2.Config(d_state=4, d_head=8), norm_eps=0.1, norm_position=position, residual_multiplier=0.3
    ).double()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    y, _ = block(x)
    assert_close(y, formula(block, x, 0.3, 0.1))
    state = block.mixer.init_state(2)
    assert_close(torch.stack([block.step(token, state) for token in x.unbind(1)], dim=1), y)
    assert {name.partition(".")[0] for name, _ in block.named_parameters()} == (
        {"norm", "mixer", "norm_out"} if position == "sandwich" else {"norm", "mixer"}
    )


@pytest.mark.parametrize("position", NORM_POSITIONS)
@torch.no_grad()
def test_models_of_every_position_step_save_and_load(build, tokens, tmp_path, position):
    model = build("hybrid", norm_position=position, residual_multiplier=0.5, embedding_multiplier=3.0)
    whole, _ = model(tokens)
    state = model.init_state(3, length=17)
    stepped = torch.stack([model.step(column, state) for column in tokens.unbind(1)], dim=1)
    assert_close(stepped, whole, atol=2e-5, rtol=2e-5)
    model.save(tmp_path)
    assert torch.equal(LanguageModel.load(tmp_path)(tokens)[0], whole)
    assert (build("hybrid", norm_position=position, residual_fp32=True).bfloat16()(tokens)[0]).dtype == torch.bfloat16


def test_multipliers_scale_embedding_residual_and_logits(build, tokens):
    plain = build("mamba2").double()
    scaled = build("mamba2", embedding_multiplier=3.0, residual_multiplier=0.25, logits_multiplier=0.125).double()
    scaled.load_state_dict(plain.state_dict())
    x = 3 * plain.embedding(tokens)
    for block in plain.layers:
        x = x + 0.25 * block.mixer(block.norm(x))[0]
    expected = 0.125 * plain.norm_f(x) @ plain.embedding.weight.T
    assert_close(scaled(tokens)[0], expected)
    assert_close(scaled.head(scaled.hidden(tokens)[0]), expected)
    state = scaled.init_state(3)
    assert_close(torch.stack([scaled.step(column, state) for column in tokens.unbind(1)], dim=1), expected.detach())


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_loss_in_parts_honours_the_logits_multiplier(build, tokens, reduction, monkeypatch):
    model = build("mamba2", logits_multiplier=0.125, tie_embeddings=False).double()
    logits = model(tokens)[0]
    expected = torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens, reduction=reduction)

    def in_parts(*args, **options):
        return linear_cross_entropy(*args, **options, max_logits=61 * 5)

    monkeypatch.setattr("longwave.models.token_model.linear_cross_entropy", in_parts)
    loss = model.loss(tokens, tokens, reduction=reduction)
    assert_close(loss, expected)
    weights = list(model.parameters())
    for a, b in zip(
        torch.autograd.grad(loss.sum(), weights), torch.autograd.grad(expected.sum(), weights), strict=True
    ):
        assert_close(a, b)


def test_multipliers_of_one_change_no_bit(build, tokens):
    model = build("hybrid", **dict.fromkeys(MULTIPLIERS, 1.0))
    x = model.embedding(tokens)
    for block in model.layers:
        y = block.mixer(block.norm(x))
        x = x + (y[0] if block.carries_state else y)
    assert torch.equal(model(tokens)[0], model.lm_head(model.norm_f(x)))


def test_configurations_from_before_these_options_load(build):
    settings = json.loads(json.dumps(to_dict(build("hybrid").config)))
    for name in (*MULTIPLIERS, "norm_position"):
        del settings[name]
    assert LanguageModel.Config.from_dict(settings) == build("hybrid").config


def test_an_unknown_position_is_refused(build):
    with pytest.raises(UsageError, match=r"norm_position must be 'pre' or 'post' or .*, got 'middle'"):
        build("mamba", norm_position="middle")


def test_dt_reaches_the_mixer_when_given(monkeypatch):
    block = Block(16, Mamba2.Config(d_state=4, d_head=8))
    given = []

    def forward(x, state, **options):
        given.append(options.get("dt", "absent"))
        return x, state

    with pytest.raises(UsageError, match="mamba2 takes no dt"):
        block(torch.randn(1, 3, 16), dt=2.0)
    monkeypatch.setattr(block, "takes_dt", True)
    monkeypatch.setattr(block.mixer, "forward", forward)
    monkeypatch.setattr(block.mixer, "step", lambda x, state, **options: forward(x, state, **options)[0])
    stack, x = Stack([block]), torch.randn(1, 3, 16)
    for options in ({}, {"dt": 2.0}):
        stack(x, **options)
        stack.step(x[:, 0], stack.init_state(1, 0, None, None), **options)
    assert given == ["absent", "absent", 2.0, 2.0]

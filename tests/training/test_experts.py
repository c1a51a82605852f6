"""Training with a mixture of experts: its balance loss, experts that no token chose, runs that go on."""

import dataclasses
from typing import Any

import pytest
import torch

from longwave.hub.run_folder import complete_checkpoints
from longwave.mixers import Mamba2, MoE, SwiGLU
from longwave.mixers.moe import balance_loss, record_routing
from longwave.models.language_model import LanguageModel
from longwave.training.job import Job
from longwave.training.loop import train


def model_of(**options: Any):
    moe = MoE.Config(expert=SwiGLU.Config(d_inner=16), **options)
    return LanguageModel.Config(vocab_size=257, d_model=16, layers=(Mamba2.Config(d_state=8, d_head=8), moe))


@pytest.mark.parametrize("accumulation", [1, 2])
def test_gradients_are_those_of_both_losses_and_the_loss_is_that_of_the_tokens(make, accumulation):
    job: Any = Job(make(model=model_of(balance=0.5), batch_size=2, accumulation=accumulation))
    loss = job.gradients(0)
    gradient = job.model.layers[1].mixer.router.weight.grad.clone()
    job.model.zero_grad()
    batches = [job.task.batch(0, micro, 2, accumulation) for micro in range(accumulation)]
    total = torch.zeros(())
    for batch in batches:  # all as long as each other: no row is padded
        with record_routing(job.model) as routed:
            own = job.model.loss(batch.tokens, batch.targets, reset=batch.reset) / accumulation
        (own + balance_loss(routed) / accumulation).backward()
        total += own.detach()
    torch.testing.assert_close(loss, total)
    torch.testing.assert_close(job.model.layers[1].mixer.router.weight.grad, gradient)


def test_the_load_evens_out_by_it(make):
    def share_of_the_busiest(balance):
        job: Any = Job(make(model=model_of(balance=balance, n_experts=4, top_k=1)))
        with torch.no_grad():
            job.model.layers[1].mixer.router.weight[0].add_(1.0)
        for step in range(30):
            job.gradients(step)
            job.optimizer.step()
        with record_routing(job.model) as routed:
            job.gradients(99)
        tokens = routed[0].routing.load().tokens
        return (tokens.max() / tokens.sum()).item()

    assert share_of_the_busiest(1.0) < share_of_the_busiest(0.0)


def test_two_halves_equal_the_whole_though_experts_were_idle(make, tmp_path):
    model = model_of(n_experts=64, top_k=1, router="sigmoid")
    whole = make(model=model, steps=4, out=str(tmp_path / "whole"))
    expected = train(whole).model.state_dict()
    half = make(model=model, steps=4, out=str(tmp_path / "half"), checkpoint_every=2)
    train(half)
    first, last = complete_checkpoints(half.out)
    resumed = dataclasses.replace(half, resume=str(first), out=str(tmp_path / "again"))
    actual = train(resumed).model.state_dict()
    assert first != last
    assert all(torch.equal(actual[name], expected[name]) for name in expected)

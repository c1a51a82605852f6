from pathlib import Path

import pytest
import torch

from longwave.training import memory
from longwave.training.dry_run import dry_run
from longwave.training.job import Job


def test_figures_are_counted_or_measured(make):
    config = make(steps=1000, accumulation=2)
    run = dry_run(config)
    model = Job(config).model
    assert run.parameters == sum(p.numel() for p in model.parameters())
    assert run.parameter_bytes == 4 * run.parameters
    assert run.gradient_bytes == run.parameter_bytes
    scalars = 4 * len(list(model.parameters()))  # AdamW's step counters
    assert run.optimizer_bytes == 2 * run.parameter_bytes + scalars
    assert run.flops_per_token == 3 * model.flops(32) / 32
    assert run.tokens_per_step == 2 * 2 * 32
    assert run.steps == 1000
    assert run.seconds == pytest.approx(1000 * run.step_seconds)
    assert f"{run.parameters:,}" in str(run)
    assert not Path(config.out).exists(), "nothing is written"


def test_minutes_give_an_estimated_number_of_steps(make):
    run = dry_run(make(steps=None, minutes=2.0))
    assert run.seconds == 120
    assert run.steps == max(round(120 / run.step_seconds), 1)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux can reset the peak")
def test_the_peak_is_measured():
    device = torch.device("cpu")
    memory.reset_peak(device)
    before = memory.held(device)
    block = torch.ones(50_000_000)  # 200 MB
    size = block.nbytes
    del block
    assert memory.peak(device) - before == pytest.approx(size, rel=0.05)
    memory.reset_peak(device)
    assert memory.peak(device) - before < size / 2

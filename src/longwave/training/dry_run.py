"""What a run will take: counted from the model, or measured in three steps. Nothing is written."""

import time
from dataclasses import dataclass

import torch

from longwave.tasks.progress import clock
from longwave.training import memory
from longwave.training.config import Train
from longwave.training.flops import flops_per_token
from longwave.training.job import Job
from longwave.training.live import thousands
from longwave.training.optim import decay_groups
from longwave.training.progress import Budget, Progress


@dataclass(frozen=True)
class DryRun:
    """Sizes in bytes, times in seconds."""

    device: str
    parameters: int
    decayed_parameters: int
    """Those that weight decay applies to."""
    flops_per_token: float
    """Forward and backward."""
    parameter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    activation_bytes: int
    """Measured: growth of the memory held during a step, less the gradients."""
    peak_bytes: int
    """Measured: the most the process (CPU) or the device (GPU) held, everything included."""
    tokens_per_step: int
    first_step_seconds: float
    """With the compilation of kernels."""
    step_seconds: float
    """Mean of the steps after it."""
    steps: int
    seconds: float
    """Steps and time of the whole run, without evaluations."""

    def __str__(self) -> str:
        speed = self.tokens_per_step / self.step_seconds
        rows = [
            ("device", self.device),
            ("parameters", f"{self.parameters:,} ({self.decayed_parameters:,} with weight decay)"),
            ("training FLOPs per token", thousands(self.flops_per_token)),
            ("memory of parameters", _mib(self.parameter_bytes)),
            ("memory of gradients", _mib(self.gradient_bytes)),
            ("memory of the optimiser", _mib(self.optimizer_bytes)),
            ("memory of activations", f"{_mib(self.activation_bytes)} (measured)"),
            ("peak of all", f"{_mib(self.peak_bytes)} (measured)"),
            ("first step", f"{self.first_step_seconds:.2f} s, kernels compiled"),
            ("step", f"{self.step_seconds:.3g} s for {self.tokens_per_step:,} tokens: {thousands(speed)} tok/s"),
            ("speed", f"{thousands(speed * self.flops_per_token)}FLOP/s"),
            ("run", f"{self.steps:,} steps, {thousands(self.steps * self.tokens_per_step)} tokens"),
            ("ETA", f"{clock(self.seconds)} without evaluations"),
        ]
        return "\n".join(f"{name:<26}{value}" for name, value in rows)


def dry_run(config: Train.Config) -> DryRun:
    """Build everything, do three steps, and say what the run would take. Raises as `train` does."""
    budget = Budget(config.steps, config.minutes, Progress())
    job = Job(config)
    seconds = [_step(job, 0)]
    job.optimizer.zero_grad()
    memory.reset_peak(job.device)
    before = memory.held(job.device)
    seconds += [_step(job, 1), _step(job, 2)]
    peak = memory.peak(job.device)
    parameters = list(job.model.parameters())
    gradients = sum(p.grad.nbytes for p in parameters if p.grad is not None)
    moments = (value for values in job.optimizer.state.values() for value in values.values())
    step_seconds = sum(seconds[1:]) / 2
    run_seconds = budget.seconds_left(Progress(), step_seconds)
    return DryRun(
        device=str(job.device),
        parameters=sum(p.numel() for p in parameters),
        decayed_parameters=sum(p.numel() for p in decay_groups(job.model)[0].values()),
        flops_per_token=flops_per_token(job.model, config.task.seq_len),
        parameter_bytes=sum(p.nbytes for p in parameters),
        gradient_bytes=gradients,
        optimizer_bytes=sum(value.nbytes for value in moments),
        activation_bytes=max(peak - before - gradients, 0),
        peak_bytes=peak,
        tokens_per_step=job.tokens_per_step,
        first_step_seconds=seconds[0],
        step_seconds=step_seconds,
        steps=max(round(run_seconds / step_seconds), 1),
        seconds=run_seconds,
    )


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"


def _step(job: Job, step: int) -> float:
    started = time.perf_counter()
    job.gradients(step).item()
    job.optimizer.step()
    if job.device.type == "cuda":
        torch.cuda.synchronize(job.device)
    return time.perf_counter() - started

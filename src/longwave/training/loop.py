"""The training loop."""

import math
import time

import torch
from torch.nn.utils import clip_grad_norm_

from longwave.config import to_dict
from longwave.errors import LongwaveError
from longwave.generate.text_model import TextModel
from longwave.hub.run_folder import complete_checkpoints
from longwave.models.pattern import pattern_of
from longwave.training import checkpoint
from longwave.training.config import Train
from longwave.training.environment import command, environment, how_to_resume
from longwave.training.flops import flops_per_token, peak_flops
from longwave.training.interrupt import Interrupt, Interrupted
from longwave.training.job import Job
from longwave.training.live import Live, thousands
from longwave.training.log import Log
from longwave.training.nonfinite import first_nonfinite
from longwave.training.optim import lr_factor, set_lr
from longwave.training.progress import Budget, Progress
from longwave.training.report import write_report


def train(config: Train.Config) -> TextModel:
    """Train a language model on text; return it with its tokenizer.

    `config.out` receives checkpoints (each a model folder for `longwave.load`), log.jsonl and report.html. Two runs of
    one configuration in steps are equal bit for bit on one device, and so is a run that was interrupted and resumed.

    Raises UsageError for a configuration that cannot be run or resumed, LongwaveError when the loss is not finite or
    the disk is full, and Interrupted after Ctrl-C, with everything up to that step saved.
    """
    origin = checkpoint.find(config)
    job = Job(config, origin)
    progress = checkpoint.restore(origin, job.model, job.optimizer, config) if origin else Progress()
    budget = Budget(config.steps, config.minutes, progress)
    cost, peak = flops_per_token(job.model, config.task.seq_len), peak_flops(job.device, config.dtype)
    with (
        checkpoint.full_disk_in_one_line(config.out),
        Log(config.out, progress.step) as log,
        Live(budget, cost, peak) as live,
        Interrupt() as interrupt,
    ):
        log.write("start", progress.step, **_facts(job))
        live.note(_introduction(job))
        if origin:
            live.note(f"resumed from {origin}")
        last = budget.spent(progress)
        if last:
            live.note(f"nothing left to do: step {progress.step} was the last. A larger --steps or --minutes goes on")
        while not last:
            started = time.perf_counter()
            lr = config.optim.lr * lr_factor(budget.fraction(progress), config.optim)
            set_lr(job.optimizer, lr)
            loss = job.gradients(progress.step).item()
            norm = clip_grad_norm_(job.model.parameters(), config.optim.clip or math.inf).item()
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise LongwaveError(_explain(job, progress.step, loss))
            job.optimizer.step()

            seconds = time.perf_counter() - started
            progress.step += 1
            progress.tokens += job.tokens_per_step
            budget.tick(progress)
            log.write("step", progress.step, loss=loss, lr=lr, grad_norm=norm, tokens=progress.tokens, seconds=seconds)
            live.update(progress, loss, job.tokens_per_step, seconds)

            last = budget.spent(progress)
            stop = None if last else interrupt.signal_number
            if not stop and _due(progress.step, config.eval_every, last):
                bits_per_byte, n_bytes = job.bits_per_byte()
                progress.evaluated(bits_per_byte)
                log.write("eval", progress.step, bits_per_byte=bits_per_byte, n_bytes=n_bytes)
                if config.sample_tokens:
                    log.write("sample", progress.step, text=_sample(job))
                live.note(f"step {progress.step}: {bits_per_byte:.3f} bits per byte on {n_bytes:,} held-out bytes")
            if stop or _due(progress.step, config.checkpoint_every, last):
                folder = checkpoint.save(job.text_model, job.optimizer, progress, config)
                log.write("checkpoint", progress.step, folder=str(folder))
                write_report(config.out)
            if stop:
                raise Interrupted(
                    f"stopped after step {progress.step}, saved in {folder}. Go on with {how_to_resume()}",
                    stop,
                )
    job.model.eval()
    return job.text_model


def _due(step: int, every: int, last: bool) -> bool:
    return last or (every > 0 and step % every == 0)


def _facts(job: Job) -> dict:
    """What the report says about the run as a whole."""
    return {
        "config": to_dict(job.config),
        "parameters": sum(parameter.numel() for parameter in job.model.parameters()),
        "flops_per_token": flops_per_token(job.model, job.config.task.seq_len),
        "environment": environment(job.device),
        "command": command(),
    }


def _introduction(job: Job) -> str:
    """Two lines: the text, and the model and what it runs on."""
    layers, parameters = pattern_of(job.model.config.layers), thousands(job.model.parameter_count())
    threads = f" with {torch.get_num_threads()} threads" if job.device.type == "cpu" else ""
    return f"text: {job.task.summary}\nmodel: {layers}, {parameters} parameters, on {job.device}{threads}"


def _sample(job: Job) -> str:
    config = job.config
    job.model.eval()
    return job.text_model.complete(config.sample_prompt, max_tokens=config.sample_tokens, seed=config.seed).text


def _explain(job: Job, step: int, loss: float) -> str:
    job.loss = job.model.loss  # hooks want the modules as they are, not compiled
    where = first_nonfinite(job.model, lambda: job.gradients(step))
    what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient is not finite (loss {loss:.4g})"
    present = complete_checkpoints(job.config.out)
    safe = f"The newest checkpoint is {present[-1]}. " if present else ""
    return f"step {step + 1}: {what}. It begins in {where}. {safe}Try a lower --optim.lr or a longer --optim.warmup"

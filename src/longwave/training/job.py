"""What a run works on: task, model and optimiser on their device, and the gradients of one step."""

import dataclasses
import math
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import Tensor

from longwave.config import nearest
from longwave.errors import UsageError
from longwave.generate.text_model import TextModel
from longwave.mixers.moe import balance_loss, record_routing
from longwave.models import kinds
from longwave.models.presets import PRESETS
from longwave.tasks.text import IGNORE, Batch, Text
from longwave.training.config import Train
from longwave.training.optim import adamw


class Job:
    """Built from a configuration alone; the weights come from `checkpoint` where one is given, else from the seed."""

    def __init__(self, config: Train.Config, checkpoint: Path | None = None):
        self.config = config
        self.device = pick_device(config.device)
        self.task = Text(config.task)
        torch.manual_seed(config.seed)
        if checkpoint:
            self.model = kinds.load(checkpoint)
        else:
            self.model = kinds.build(model_config(config.model, self.task.tokenizer.vocab_size))
        self.model.to(self.device)
        self.text_model = TextModel(self.model, self.task.tokenizer)
        self.optimizer = adamw(self.model, config.optim)
        self.loss = torch.compile(self.model.loss) if config.compile else self.model.loss

    @property
    def tokens_per_step(self) -> int:
        return self.config.batch_size * self.config.accumulation * self.config.task.seq_len

    def gradients(self, step: int) -> Tensor:
        """Put the gradients of step number `step` into the parameters; return its loss, nats per token, as a scalar.

        The gradients are also those of the experts' balance loss, if there are experts; the loss returned is without.
        A pure function of the weights and the step: the batches are, and torch's randomness is seeded from it. Passes
        are weighted by the tokens they predict, so that accumulation equals one larger batch.
        """
        torch.manual_seed((self.config.seed << 32) + step)
        self.model.train()
        self.optimizer.zero_grad()
        size, passes = self.config.batch_size, self.config.accumulation
        batches = [self.task.batch(step, micro, size, passes) for micro in range(passes)]
        n = max(sum(int((batch.targets != IGNORE).sum()) for batch in batches), 1)
        total = torch.zeros((), device=self.device)
        for batch in batches:
            with record_routing(self.model) as routed:
                loss = self._summed_loss(batch) / n
            share = int((batch.targets != IGNORE).sum()) / n
            (loss + share * balance_loss(routed)).backward()
            total += loss.detach()
        return total

    @torch.no_grad()
    def bits_per_byte(self) -> tuple[float, int]:
        """Bits per byte of the held-out text, and the bytes of it that were read: those that its targets stand for."""
        self.model.eval()
        nats, n_bytes = 0.0, 0
        for batch in self.task.validation(self.config.batch_size, self.config.eval_tokens or None):
            nats += self._summed_loss(batch).item()
            n_bytes += batch.n_bytes
        return nats / math.log(2) / n_bytes, n_bytes

    def _summed_loss(self, batch: Batch) -> Tensor:
        tokens, targets, reset = (tensor.to(self.device, non_blocking=True) for tensor in batch[:3])
        with self._precision():
            return self.loss(tokens, targets, reset=reset, ignore_index=IGNORE, reduction="sum")

    def _precision(self) -> AbstractContextManager:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.dtype == "bfloat16")


def pick_device(name: str) -> torch.device:
    """The device called `name`; auto is the first CUDA device, else the CPU. Raises UsageError if it is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(
            f"device {name!r} is not to be had ({str(error).splitlines()[0]}); try --device cpu"
        ) from error
    return device


def model_config(model: kinds.TokenModelConfig | str, vocab_size: int) -> kinds.TokenModelConfig:
    """A preset by name, with the tokenizer's vocabulary; a configuration as it is, if that vocabulary fits in."""
    if isinstance(model, str):
        if model not in PRESETS:
            raise UsageError(f"there is no model preset {model!r}.{nearest(model, PRESETS)}")
        return dataclasses.replace(PRESETS[model](), vocab_size=vocab_size)
    return model

"""What a training run is told. The command line maps flags onto these fields: `--optim.lr` sets `optim.lr`."""

from dataclasses import dataclass, field
from typing import Literal

from longwave.errors import UsageError
from longwave.models.kinds import TokenModelConfig
from longwave.tasks.text import Text


class Optim:
    """AdamW, its learning-rate schedule and clipping (`training/optim.py`)."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        lr: float = 1e-3
        """Peak learning rate."""

        schedule: Literal["cosine", "wsd", "constant"] = "cosine"
        """Shape after the warm-up: half a cosine, warm-up/stable/decay (wsd), or constant."""

        warmup: float = 0.02
        """Part of the run (0 to 1) in which the rate rises in a straight line from 0."""

        decay: float = 0.2
        """wsd: part of the run (0 to 1) at its end in which the rate falls."""

        final: float = 0.1
        """Rate at the end of the run, as a part of `lr`. Ignored by constant."""

        betas: tuple[float, float] = (0.9, 0.95)
        """AdamW's decay rates of the first and second moment."""

        eps: float = 1e-8
        """AdamW's epsilon."""

        weight_decay: float = 0.1
        """Decoupled weight decay, of matrices only: not of A_log, D, dt_bias, norms, biases and embeddings."""

        clip: float = 1.0
        """Largest norm of all gradients together; longer ones are scaled down to it. 0 leaves them alone."""

        def __post_init__(self) -> None:
            if self.lr <= 0:
                raise UsageError(f"lr must be above 0, got {self.lr}")
            if not (0 <= self.warmup <= 1 and 0 <= self.decay <= 1 and self.warmup + self.decay <= 1):
                raise UsageError(
                    f"warmup and decay are parts of the run: each 0 to 1 and together at most 1, "
                    f"got {self.warmup} and {self.decay}"
                )
            for name in ("final", "weight_decay", "clip"):
                if getattr(self, name) < 0:
                    raise UsageError(f"{name} must be 0 or more, got {getattr(self, name)}")


class Train:
    """A training run (`training/loop.py`)."""

    @dataclass(frozen=True, kw_only=True)
    class Config:
        model: TokenModelConfig | str
        """A model's configuration, or the name of a preset, which then takes the tokenizer's vocabulary size."""

        task: Text.Config
        """The text to learn and how it is cut into batches."""

        optim: Optim.Config = field(default_factory=Optim.Config)
        """The optimiser and its schedule."""

        out: str = "runs/longwave"
        """Folder of the run: checkpoints, log.jsonl, report.html."""

        steps: int | None = None
        """Length of the run in optimiser steps. Two runs of equal steps on one device are equal bit for bit."""

        minutes: float | None = None
        """Length of the run in minutes; the schedule then follows the clock. With `steps` too, the first to end."""

        batch_size: int = 8
        """Sequences in one forward pass."""

        accumulation: int = 1
        """Forward passes whose gradients make one step: a step sees batch_size * accumulation sequences."""

        seed: int = 0
        """Seed of the initial weights and of all randomness in training."""

        device: str = "auto"
        """cpu, cuda, cuda:1, ...; auto takes the first GPU, else the CPU."""

        dtype: Literal["float32", "bfloat16"] = "float32"
        """Precision of activations. Parameters, moments and recurrent states stay in float32 (autocast)."""

        compile: bool = False
        """Run the loss through torch.compile. The first step then takes longer, sometimes minutes."""

        eval_every: int = 200
        """Steps between evaluations on the held-out split; there is always one at the end. 0: only that one."""

        eval_tokens: int = 100_000
        """Held-out tokens that an evaluation reads, the same ones each time, spread evenly. 0: all of them."""

        checkpoint_every: int = 200
        """Steps between checkpoints; there is always one at the end. 0: only that one."""

        keep: int = 2
        """Newest checkpoints that stay; older ones are deleted."""

        sample_prompt: str = ""
        """Text that the samples in the report continue; empty: they begin a document."""

        sample_tokens: int = 200
        """Length of the sample written after each evaluation, in tokens. 0: no samples."""

        resume: str | None = None
        """auto: go on from the newest checkpoint in `out`, if there is one. A folder: go on from that checkpoint."""

        def __post_init__(self) -> None:
            for name in ("batch_size", "accumulation", "keep"):
                if getattr(self, name) < 1:
                    raise UsageError(f"{name} must be at least 1, got {getattr(self, name)}")
            for name in ("eval_every", "eval_tokens", "checkpoint_every", "sample_tokens"):
                if getattr(self, name) < 0:
                    raise UsageError(f"{name} must be 0 or more, got {getattr(self, name)}")
            if not 0 <= self.seed < 2**31:
                raise UsageError(f"seed must lie in 0..{2**31 - 1}, got {self.seed}")
            for name in ("steps", "minutes"):
                value = getattr(self, name)
                if value is not None and value <= 0:
                    raise UsageError(f"{name} must be above 0, got {value}")

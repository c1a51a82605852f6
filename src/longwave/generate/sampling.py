"""Draw the next token: greedy, or from the model's distribution after a penalty, a temperature and filters."""

import dataclasses
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from longwave.config import nearest
from longwave.errors import UsageError

_FIRST_SORTED = 64  # how many of the likeliest tokens top-p sorts first; eight times as many until they suffice


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a token is drawn. Each default leaves the model's distribution as it is.

    The order is: repetition penalty, temperature, top-k, top-p, min-p. Raises UsageError for a value out of range.
    """

    temperature: float = 1.0
    """Logits are divided by it; 0 is greedy: the likeliest token, the lowest id among equals."""
    top_k: int = 0
    """Keep the k likeliest tokens (Fan et al. 2018, section 5); 0 keeps all."""
    top_p: float = 1.0
    """Keep the fewest likeliest tokens that hold this share of what top-k left (Holtzman et al. 2020, eq. 2)."""
    min_p: float = 0.0
    """Keep tokens at least this many times as likely as the likeliest one (Nguyen et al. 2024, section 3)."""
    repetition_penalty: float = 1.0
    """Above 1, tokens that this call has drawn before become less likely (Keskar et al. 2019, section 4.1)."""
    seed: int | None = None
    """Same seed, same tokens; None draws differently every time."""

    def __post_init__(self) -> None:
        _need("temperature", self.temperature, 0 <= self.temperature < math.inf, "a number from 0 up; 0 is greedy")
        _need("top_k", self.top_k, isinstance(self.top_k, int) and self.top_k >= 0, "a whole number; 0 keeps all")
        _need("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1; 1 keeps all")
        _need("min_p", self.min_p, 0 <= self.min_p <= 1, "from 0 to 1; 0 keeps all")
        penalty = self.repetition_penalty
        _need("repetition_penalty", penalty, 0 < penalty < math.inf, "a number above 0; 1 is no penalty")

    def replace(self, **options: Any) -> "Sampling":
        """A copy with some values changed. Raises UsageError for an unknown name."""
        known = [field.name for field in dataclasses.fields(self)]
        for name in options:
            if name not in known:
                raise UsageError(f"unknown sampling option {name!r}.{nearest(name, known)}")
        return dataclasses.replace(self, **options)


def _need(name: str, value: Any, ok: bool, rule: str) -> None:
    if not ok:
        raise UsageError(f"{name} must be {rule}; got {value!r}")


def penalise(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Divide the logits x_i (b, v) of seen tokens, a mask (b, v), by `penalty` if positive, multiply them if negative.

    The rule of CTRL (Keskar et al. 2019, section 4.1), p_i ~ exp(x_i / (T I(i in g))), with one departure that
    the field has adopted: dividing a negative logit would make its token likelier, so that one is multiplied.
    """
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def candidates(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor | None]:
    """What may be drawn from logits (b, v), v >= 1, at a temperature above 0.

    Returns probabilities (b, m) in float64, which sum to 1 and are 0 for what a filter took away, and the m ids (b, m)
    they belong to, or None for all v ids in order. Sorts no more of the vocabulary than the filters need.
    """
    ids = None
    if 0 < sampling.top_k < logits.shape[-1]:
        logits, ids = logits.topk(sampling.top_k)
    logits = logits.double()
    # The difference first: at a tiny temperature the quotient of the logit itself would overflow.
    probabilities = ((logits - logits.amax(-1, keepdim=True)) / sampling.temperature).softmax(-1)
    if sampling.top_p < 1:
        probabilities, kept = _nucleus(probabilities, sampling.top_p)
        ids = kept if ids is None else ids.gather(-1, kept)
    if sampling.min_p > 0:
        probabilities = probabilities * (probabilities >= sampling.min_p * probabilities.amax(-1, keepdim=True))
    return probabilities / probabilities.sum(-1, keepdim=True), ids


def _nucleus(probabilities: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """The greatest of probabilities (b, v) and their indices; 0 for those that come after the share is reached."""
    v = probabilities.shape[-1]
    m = min(_FIRST_SORTED, v)
    while True:
        top, indices = probabilities.topk(m)
        reached = top.cumsum(-1)
        if m == v or bool((reached[:, -1] >= top_p).all()):
            return top * (reached - top < top_p), indices
        m = min(8 * m, v)


def pick(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """Index (b,) of the entry of probabilities (b, m) in whose share of [0, 1) `uniform` (b,) lies; never one of 0."""
    cumulative = probabilities.cumsum(-1)
    target = uniform[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True).squeeze(-1)


class Sampler:
    """Draws tokens for the rows of a batch. Each row has its own random stream, and does not depend on the others.

    `seeds` holds a seed, or None, per row; `v` is the number of ids that may be drawn. One number of a row's stream
    is spent per token. The repetition penalty counts the tokens drawn here, not those of the prompt: a conversation
    carried over as a state then goes on exactly as one that was never interrupted.
    """

    def __init__(self, sampling: Sampling, seeds: Sequence[int | None], v: int, device: torch.device):
        self._sampling = sampling
        self._streams = [random.Random(seed) for seed in seeds]
        self._seen = None
        if sampling.repetition_penalty != 1:
            self._seen = torch.zeros(len(seeds), v, dtype=torch.bool, device=device)

    def __call__(self, logits: Tensor) -> Tensor:
        """logits (b, v) -> tokens (b,) int64."""
        if self._seen is not None:
            logits = penalise(logits, self._seen, self._sampling.repetition_penalty)
        tokens = self._draw(logits)
        if self._seen is not None:
            self._seen.scatter_(1, tokens[:, None], True)
        return tokens

    def keep(self, rows: Sequence[int]) -> None:
        """Go on with these rows only."""
        self._streams = [self._streams[row] for row in rows]
        if self._seen is not None:
            self._seen = self._seen[list(rows)]

    def _draw(self, logits: Tensor) -> Tensor:
        if self._sampling.temperature == 0:
            return logits.argmax(-1)
        uniform = [stream.random() for stream in self._streams]
        probabilities, ids = candidates(logits, self._sampling)
        chosen = pick(probabilities, torch.tensor(uniform, dtype=torch.float64, device=logits.device))
        return chosen if ids is None else ids.gather(-1, chosen[:, None]).squeeze(-1)

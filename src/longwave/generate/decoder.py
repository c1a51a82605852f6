"""Token by token: draw the next token of every row, feed it, and keep the state that has taken it in."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from longwave.errors import LongwaveError, UsageError
from longwave.generate.prefill import prefill
from longwave.generate.sampling import Sampler, Sampling
from longwave.models.state import State
from longwave.models.token_model import TokenModel

_BLOCK = 64  # attention layers make room for this many tokens, or an eighth of what they hold, at a time


class Draw(NamedTuple):
    """A token drawn, with natural logarithms of probabilities in the model's own distribution.

    That is the softmax of the logits over the whole vocabulary, before penalty, temperature and filters.
    """

    token: int
    logprob: float
    alternatives: tuple[tuple[int, float], ...]
    """(token, logprob) of the likeliest tokens, the likeliest first; as many as were asked for."""


class Decoder:
    """b rows of tokens drawn from a model after their prompts, together and yet as each would be alone.

    `draw()` draws the next token of every row; `state` has taken in every prompt and every token drawn, the last one
    included. That one is fed when either needs it, so the model makes no step too many. A row that has said enough is
    handed out by `release`, and the others go on without it.

    `prompts` are b lists of at least one token id. They go on from `state`, a State of b rows, or of one that serves
    them all, which is left as it was. `sampling.seed` seeds row 0, and the next seed each further row. `n_ids`: draw
    only ids below it (None: any of the vocabulary). `logprobs`: how many alternatives each Draw lists. Not
    differentiable. Raises UsageError as `prefill` does.
    """

    def __init__(
        self,
        model: TokenModel,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling | None = None,
        *,
        state: State | None = None,
        chunk_len: int = 512,
        logprobs: int = 0,
        n_ids: int | None = None,
    ):
        self.model = model
        v = model.config.vocab_size
        if not 0 <= logprobs <= v:
            raise UsageError(f"logprobs must be from 0 to the vocabulary's {v}, got {logprobs}")
        self._logprobs = logprobs
        self._n_ids = n_ids or v
        self._logits, self._state = prefill(model, prompts, state, chunk_len=chunk_len)
        self._pending: Tensor | None = None  # (b,) tokens drawn and not yet fed
        self._room = 0
        sampling = sampling or Sampling()
        first = sampling.seed
        seeds = [None if first is None else first + row for row in range(len(prompts))]
        self._sampler = Sampler(sampling, seeds, self._n_ids, self._logits.device)

    def draw(self) -> list[Draw]:
        """The next token of every row. Raises LongwaveError if the logits are not finite."""
        with torch.no_grad():
            self._feed()
            logits = self._logits.float()
            logprobs = logits.log_softmax(-1)  # (b, v)
            if not logprobs.amax(-1).isfinite().all():
                raise LongwaveError(
                    "the model's logits are not finite: its weights are damaged, or its dtype is too narrow for them; "
                    "try float32"
                )
            self._pending = tokens = self._sampler(logits[:, : self._n_ids])
            chosen = logprobs.gather(-1, tokens[:, None]).squeeze(-1)  # (b,)
            return [
                Draw(token, logprob, alternatives)
                for token, logprob, alternatives in zip(
                    tokens.tolist(), chosen.tolist(), self._alternatives(logprobs), strict=True
                )
            ]

    @property
    def state(self) -> State:
        """All rows' state, a copy."""
        with torch.no_grad():
            self._feed()
            return self._state.reserve(0)

    def release(self, rows: Sequence[int]) -> list[State]:
        """Take these rows out: their states, one row each, yours to keep. The others keep their order."""
        if not rows:
            return []
        with torch.no_grad():
            self._feed()
        released = [self._state.index_select([row]).reserve(0) for row in rows]
        keep = [row for row in range(len(self._logits)) if row not in rows]
        self._state, self._logits = self._state.index_select(keep), self._logits[keep]
        self._sampler.keep(keep)
        return released

    def _feed(self) -> None:
        if self._pending is None:
            return
        if self._room == 0:
            self._room = max(_BLOCK, int(self._state.position.max()) // 8)
            self._state = self._state.reserve(self._room)
        self._logits = self.model.step(self._pending, self._state)  # (b, v)
        self._room -= 1
        self._pending = None

    def _alternatives(self, logprobs: Tensor) -> list[tuple[tuple[int, float], ...]]:
        values, ids = logprobs.topk(self._logprobs)  # each (b, alternatives), the likeliest first
        pairs = zip(ids.tolist(), values.tolist(), strict=True)
        return [tuple(zip(*row, strict=True)) for row in pairs]

"""How likely a model finds a text, token by token, in memory that does not grow with its length."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from longwave.models.loss import linear_cross_entropy
from longwave.models.token_model import TokenModel


@dataclass(frozen=True)
class Score:
    """Natural logarithm of each token's probability given all before it; the likelihood of the text as a whole."""

    tokens: list[int]
    logprobs: list[float | None]
    """One per token. The first is None where the tokenizer has no end-of-document token to begin from."""
    n_bytes: int | None
    """UTF-8 bytes of the tokens that have a log-probability; None without a tokenizer."""

    @property
    def total(self) -> float:
        """Sum of the log-probabilities, in nats."""
        return math.fsum(logprob for logprob in self.logprobs if logprob is not None)

    @property
    def bits_per_byte(self) -> float | None:
        """Bits of information per byte of text, -log2 p / bytes; lower is better. None without bytes to divide by."""
        return -self.total / math.log(2) / self.n_bytes if self.n_bytes else None


def token_logprobs(model: TokenModel, tokens: Sequence[int], *, chunk_len: int = 512) -> Tensor:
    """Log-probabilities (l - 1,) float32 of tokens[1:], each given all before it, on the CPU. No gradient.

    The model reads `chunk_len` tokens at a time and carries its state from one chunk to the next.
    """
    device = next(model.parameters()).device
    state, scored = None, [torch.empty(0)]
    with torch.no_grad():
        for start in range(0, len(tokens) - 1, chunk_len):
            chunk = torch.tensor(tokens[start : start + chunk_len + 1], device=device)  # (l + 1,)
            hidden, state = model.hidden(chunk[None, :-1], state)  # (1, l, d)
            losses = linear_cross_entropy(
                model.head, hidden[0], chunk[1:], vocab_size=model.config.vocab_size, reduction="none"
            )
            scored.append(-losses.float().cpu())
    return torch.cat(scored)

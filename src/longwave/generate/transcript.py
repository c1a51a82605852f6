"""From tokens drawn to text said: whole characters, stop strings, and when to finish."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from longwave.errors import UsageError
from longwave.generate.decoder import Draw
from longwave.generate.stop import StopText
from longwave.models.state import State
from longwave.tasks.tokenizer import Tokenizer

FinishReason = Literal["length", "stop", "end"]


@dataclass(frozen=True)
class Piece:
    """One drawn token and the text that can be said by now: `str(piece)`.

    The text is empty while a token completes no character, or only what may be the beginning of a stop string; it comes
    with a later piece then. The texts of all pieces joined are the text of the completion.
    """

    text: str
    token: int
    logprob: float
    """Natural log-probability in the model's own distribution, before penalty, temperature and filters."""
    alternatives: tuple[tuple[int, float], ...] = ()
    """(token, logprob) of the likeliest tokens, as many as `logprobs` asked for."""
    finish_reason: FinishReason | None = None
    """Set on the last piece: "length" (max_tokens), "stop" (a stop string) or "end" (the end-of-document token)."""

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Completion:
    """What was said after a prompt, and the state to go on from."""

    text: str
    """Without the stop string and the end-of-document token."""
    tokens: list[int]
    """Every token drawn, those of the stop string and the end-of-document token included."""
    logprobs: list[float]
    """Natural log-probability of each token in the model's own distribution."""
    alternatives: list[tuple[tuple[int, float], ...]]
    """For each token (token, logprob) of the likeliest, as many as `logprobs` asked for."""
    finish_reason: FinishReason
    state: State
    """Of one row. It has taken in what came before, the prompt and exactly `tokens`."""

    def __str__(self) -> str:
        return self.text


class Transcript:
    """One row's text as its tokens are drawn. Without a tokenizer it stays empty, and only `max_tokens` ends it.

    `finish_reason` is None until there is one. Raises UsageError for stop strings without a tokenizer.
    """

    def __init__(self, tokenizer: Tokenizer | None, stop: str | Sequence[str], max_tokens: int):
        if max_tokens < 0:
            raise UsageError(f"max_tokens must be 0 or more, got {max_tokens}")
        if tokenizer is None and stop:
            raise UsageError(f"stop {stop!r} needs a tokenizer, and this model came without; leave stop out")
        self._decoder = tokenizer.stream() if tokenizer else None
        self._end = tokenizer.end if tokenizer else None
        self._stop = StopText(stop)
        self._left = max_tokens
        self.finish_reason: FinishReason | None = None if max_tokens else "length"

    def add(self, draw: Draw) -> Piece:
        """Take in a token; the piece says what can be said now."""
        self._left -= 1
        text = ""
        if draw.token == self._end:
            self.finish_reason = "end"
        elif self._decoder is not None:
            text = self._stop.push(self._decoder.push(draw.token))
        if self._left == 0 and self.finish_reason is None:
            self.finish_reason = "length"
        if self.finish_reason and self._decoder is not None:
            text += self._stop.push(self._decoder.flush()) + self._stop.flush()
        if self._stop.hit:
            self.finish_reason = "stop"
        return Piece(text, draw.token, draw.logprob, draw.alternatives, self.finish_reason)

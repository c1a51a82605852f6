"""A language model and its tokenizer: text in, text out, and the state to go on from."""

import operator
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import torch

from longwave.errors import UsageError
from longwave.generate.decoder import Decoder
from longwave.generate.prefill import check_prompts
from longwave.generate.sampling import Sampling
from longwave.generate.score import Score, token_logprobs
from longwave.generate.transcript import Completion, FinishReason, Piece, Transcript
from longwave.models.state import State
from longwave.models.token_model import TokenModel
from longwave.tasks.tokenizer import Tokenizer

Prompt = str | Sequence[int]
_MOST_PADDING = 1024  # by which a published model's vocabulary may exceed its tokenizer's, to reach a round size


class TextModel:
    """A language model with its tokenizer. `longwave.load(path)` returns one.

    `tokenizer` may be None, for a checkpoint that came without: then prompts are token ids, and pieces hold ids alone.
    Raises UsageError if the tokenizer's vocabulary does not fit the model's, and for a model with bidirectional layers,
    which cannot say what comes next.

        model = longwave.load("runs/hello")
        for piece in model.generate("The sea", temperature=0.8, seed=0):
            print(piece, end="", flush=True)

    An empty prompt stands for the end-of-document token, after which a document begins; with no such token, or where
    a state is to be continued, it is refused. Options of `generate`, `complete` and `complete_batch`:

    - max_tokens: draw at most this many; 0 only takes in the prompt.
    - stop: a string, or several, at which to stop. They are not said, and may span tokens.
    - state: a State to go on from; it is not changed. From a file: `State.load(path, model.model)`.
    - logprobs: list this many of the likeliest tokens beside the one drawn.
    - chunk_len: take in prompts this many tokens at a time. Bounds memory; does not change the result.
    - sampling: a Sampling; its fields may be given as keywords as well: temperature, top_k, top_p, min_p,
      repetition_penalty, seed. Those given as keywords win.

    All raise UsageError for an option that is unknown or out of range, a token that is not in the vocabulary, or text
    where there is no tokenizer, and LongwaveError if the model's logits are not finite.
    """

    def __init__(self, model: TokenModel, tokenizer: Tokenizer | None):
        v = model.config.vocab_size
        if tokenizer is not None and not 0 <= v - tokenizer.vocab_size < _MOST_PADDING:
            raise UsageError(
                f"the tokenizer has {tokenizer.vocab_size} tokens and the model {v}; they do not belong together. "
                "Use the tokenizer that the model was trained with"
            )
        if not model.causal:
            raise UsageError(
                "a model with bidirectional layers sees what it would have to foretell, and writes no text; "
                "LanguageModel.load(folder) loads it, and longwave.models.heads puts it to use"
            )
        self.model = model
        self.tokenizer = tokenizer

    def generate(
        self,
        prompt: Prompt,
        *,
        max_tokens: int = 256,
        stop: str | Sequence[str] = (),
        state: State | None = None,
        logprobs: int = 0,
        chunk_len: int = 512,
        sampling: Sampling | None = None,
        **options: Any,
    ) -> "Stream":
        """Say what comes after `prompt`, text or token ids, piece by piece."""
        transcript = Transcript(self.tokenizer, stop, max_tokens)
        decoder = self._decoder([prompt], state, logprobs, chunk_len, sampling, options)
        return Stream(decoder, transcript)

    def complete(self, prompt: Prompt, **options: Any) -> Completion:
        """What comes after `prompt`, at once. Options as for `generate`."""
        return self.complete_batch([prompt], **options)[0]

    def complete_batch(
        self,
        prompts: Sequence[Prompt],
        *,
        max_tokens: int = 256,
        stop: str | Sequence[str] = (),
        state: State | None = None,
        logprobs: int = 0,
        chunk_len: int = 512,
        sampling: Sampling | None = None,
        **options: Any,
    ) -> list[Completion]:
        """What comes after each prompt, of any lengths. Row i is what `complete(prompts[i], seed=seed + i)` returns.

        `state` holds one row per prompt, or a single row that every prompt goes on from. A row that is done takes no
        part in the work any longer.
        """
        if isinstance(prompts, str):
            raise UsageError(f"complete_batch takes a list of prompts, got one text, {prompts[:40]!r}; use complete")
        if not prompts:
            return []
        transcripts = [Transcript(self.tokenizer, stop, max_tokens) for _ in prompts]
        decoder = self._decoder(prompts, state, logprobs, chunk_len, sampling, options)
        pieces: list[list[Piece]] = [[] for _ in prompts]
        states: dict[int, State] = {}
        rows = list(range(len(prompts)))  # which prompt each row of the decoder belongs to
        while True:
            done = [row for row in rows if transcripts[row].finish_reason]
            states |= zip(done, decoder.release([rows.index(row) for row in done]), strict=True)
            rows = [row for row in rows if row not in states]
            if not rows:
                return [_completion(pieces[row], transcripts[row], states[row]) for row in range(len(prompts))]
            for row, draw in zip(rows, decoder.draw(), strict=True):
                pieces[row].append(transcripts[row].add(draw))

    def score(self, text: Prompt, *, chunk_len: int = 512) -> Score:
        """The log-probability of each token of `text` (text or token ids), and bits per byte.

        The text is taken as a document of its own: its first token follows an end-of-document token, or has no
        log-probability where the tokenizer has none. Memory does not grow with the length of the text, save for the
        state of attention layers. Raises UsageError for an empty text or a token that is not in the vocabulary.
        """
        tokens = self._encode(text)
        if not tokens:
            raise UsageError("there is nothing to score in an empty text; give at least one token")
        check_prompts(self.model, [tokens], chunk_len)
        start = [] if self._end is None else [self._end]
        logprobs: list[float | None] = [None] * (1 - len(start))
        logprobs += token_logprobs(self.model, [*start, *tokens], chunk_len=chunk_len).tolist()
        n_bytes = None
        if self.tokenizer is not None:
            scored = tokens[1 - len(start) :]
            n_bytes = len((text if isinstance(text, str) and start else self.tokenizer.decode(scored)).encode())
        return Score(tokens, logprobs, n_bytes)

    def save(self, folder: str | Path) -> None:
        """Write the model and the tokenizer to `folder`, which `longwave.load` reads."""
        self.model.save(folder)
        if self.tokenizer is not None:
            self.tokenizer.save(folder)

    def to(self, device: torch.device | str) -> Self:
        """Move the model to `device`, in place. Returns self."""
        self.model.to(device)
        return self

    @property
    def _end(self) -> int | None:
        return None if self.tokenizer is None else self.tokenizer.end

    def _encode(self, prompt: Prompt) -> list[int]:
        if not isinstance(prompt, str):
            return _token_ids(prompt)
        if self.tokenizer is None:
            raise UsageError(
                f"this model came without a tokenizer and cannot read {prompt[:40]!r}; put its tokenizer.json into the "
                "folder, or give token ids"
            )
        return self.tokenizer.encode(prompt)

    def _decoder(
        self,
        prompts: Sequence[Prompt],
        state: State | None,
        logprobs: int,
        chunk_len: int,
        sampling: Sampling | None,
        options: dict[str, Any],
    ) -> Decoder:
        ids = [self._encode(prompt) for prompt in prompts]
        if state is None and self._end is not None:
            ids = [row or [self._end] for row in ids]
        return Decoder(
            self.model,
            ids,
            (sampling or Sampling()).replace(**options),
            state=state,
            chunk_len=chunk_len,
            logprobs=logprobs,
            n_ids=self.tokenizer.vocab_size if self.tokenizer else None,
        )


class Stream(Iterator[Piece]):
    """Pieces as they are drawn. `state` has at any moment taken in the prompt and every token drawn so far."""

    def __init__(self, decoder: Decoder, transcript: Transcript):
        self._decoder = decoder
        self._transcript = transcript

    def __next__(self) -> Piece:
        if self._transcript.finish_reason:
            raise StopIteration
        return self._transcript.add(self._decoder.draw()[0])

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why the last piece was the last; None while there is more to come."""
        return self._transcript.finish_reason

    @property
    def state(self) -> State:
        """A State of one row to go on from; a copy, which does not change when the stream goes on."""
        return self._decoder.state


def _token_ids(prompt: Sequence[int]) -> list[int]:
    try:
        return [operator.index(token) for token in prompt]
    except TypeError as error:
        raise UsageError(f"a prompt is text or token ids, got {prompt!r}; for several, use complete_batch") from error


def _completion(pieces: list[Piece], transcript: Transcript, state: State) -> Completion:
    assert transcript.finish_reason is not None
    return Completion(
        text="".join(map(str, pieces)),
        tokens=[piece.token for piece in pieces],
        logprobs=[piece.logprob for piece in pieces],
        alternatives=[piece.alternatives for piece in pieces],
        finish_reason=transcript.finish_reason,
        state=state,
    )

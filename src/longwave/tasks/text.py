"""Next-token prediction on text: files, folders and JSONL of any size, packed so that no document sees another."""

import functools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from longwave.config import nearest
from longwave.errors import UsageError
from longwave.tasks.packing import cache_folder, open_corpus
from longwave.tasks.sources import find_sources
from longwave.tasks.split import Part, Split, Windows, split_corpus
from longwave.tasks.tokenizer import load_tokenizer

IGNORE = -100
"""Target that the loss passes over."""


class Batch(NamedTuple):
    """Rows that stand for themselves: each begins with the state of a fresh sequence."""

    tokens: Tensor
    """(b, l) int64."""

    targets: Tensor
    """(b, l) int64: the next token; IGNORE where that would be the first of another document."""

    reset: Tensor
    """(b, l) bool: the token is the first of a document (or of the held-out tail)."""

    n_bytes: int
    """Bytes of text that the targets stand for. The end of a document is a target that stands for none."""


class Text:
    """Windows of seq_len tokens of a corpus, to train on and to measure on.

    Documents are packed one after another, each ended by the tokenizer's end if it has one, and parted by `reset`.
    `validation` covers the held-out text once, so with `loss` summed in nats over its batches,
    bits per byte = loss / ln 2 / sum of n_bytes is exact, and comparable between tokenizers.
    """

    @dataclass(frozen=True, kw_only=True)
    class Config:
        kind: ClassVar[str] = "text"

        paths: tuple[str, ...] = ("stdlib",)
        """Files, folders, JSONL files, and texts at hand: stdlib (Python's own sources), shakespeare (the plays)."""

        tokenizer: str = "bytes"
        """bytes, or the path of a tokenizer.json or of a folder that holds one."""

        seq_len: int = 512
        """Tokens in a row of a batch."""

        val_fraction: float = 0.05
        """Part of the text, in bytes, that is held out for evaluation: above 0, at most 0.5."""

        split: Split = "auto"
        """What is held out: whole documents (document), or the end of the text (tail). auto: documents, from 20 on."""

        jsonl_field: str = "text"
        """Field that holds the text in a line of a .jsonl or .ndjson file."""

        seed: int = 0
        """Seed of the order of batches. The held-out text does not depend on it."""

        cache_dir: str | None = None
        """Where tokenised text is kept; else $LONGWAVE_CACHE, else $XDG_CACHE_HOME/longwave, else ~/.cache/longwave."""

        def __post_init__(self) -> None:
            paths = (self.paths,) if isinstance(self.paths, (str, os.PathLike)) else self.paths
            object.__setattr__(self, "paths", tuple(os.fspath(path) for path in paths))
            if self.seq_len < 1:
                raise UsageError(f"seq_len must be at least 1, got {self.seq_len}")
            if not 0 < self.val_fraction <= 0.5:
                raise UsageError(f"val_fraction must be above 0 and at most 0.5, got {self.val_fraction}")
            if self.split not in get_args(Split):
                raise UsageError(f"unknown split {self.split!r}.{nearest(self.split, get_args(Split))}")
            if self.seed < 0:
                raise UsageError(f"seed must be 0 or more, got {self.seed}")

    def __init__(self, config: Config | None = None):
        """Reads, tokenises and caches the text if the cache has not got it.

        Raises UsageError for paths, tokenizers and files that cannot be used and for too little text, LongwaveError
        when the cache cannot be written.
        """
        self.config = config = config or Text.Config()
        tokenizer = load_tokenizer(config.tokenizer)
        if tokenizer is None:
            raise UsageError(f"the folder {config.tokenizer} has no tokenizer.json; name one that has, or use bytes")
        self.tokenizer = tokenizer
        sources = find_sources(config.paths)
        self._corpus = open_corpus(sources, tokenizer, config.jsonl_field, cache_folder(config.cache_dir))
        self._train, self._held_out = split_corpus(self._corpus, config.val_fraction, config.split)
        self._check_size("text to train on", self._train)
        self._check_size("held-out text", self._held_out)
        self._n_windows = self._train.n_tokens // config.seq_len  # in an epoch

    def batch(self, step: int, micro: int, size: int, micros: int = 1) -> Batch:
        """`size` rows to train on: batch number `micro` (from 0) of the `micros` that make step number `step`.

        A pure function of its arguments and the configuration. In each epoch a new tiling of the whole text is visited
        in a new order, each window once. Raises ValueError when micro is not in 0..micros - 1.
        """
        if not 0 <= micro < micros:
            raise ValueError(f"micro must lie in 0..micros - 1 = {micros - 1}, got {micro}; pass micros=")
        number = (step * micros + micro) * size + np.arange(size)
        first = np.array([self._window(*divmod(int(i), self._n_windows)) for i in number])
        return _batch(self._train.windows(first, self.config.seq_len + 1))

    def validation(self, size: int = 8, tokens: int | None = None) -> Iterator[Batch]:
        """The held-out text from its beginning to its end, in batches of `size` rows or, the last, fewer.

        Every token but the first of each document is a target once. With `tokens`, about so many of them only: every
        k-th window, always the same ones.
        """
        n, seq_len = self._held_out.n_tokens, self.config.seq_len
        every = 1 if tokens is None else max(n // max(tokens, seq_len), 1)
        first = np.arange(0, n - 1, seq_len * every)
        for rows in range(0, len(first), size):
            wanted = first[rows : rows + size]
            fitting = np.minimum(wanted, n - 1 - seq_len)
            seen = np.arange(seq_len) < (wanted - fitting)[:, None]  # the last window begins in the one before
            yield _batch(self._held_out.windows(fitting, seq_len + 1), seen)

    @property
    def bytes_per_token(self) -> float:
        """Mean number of bytes of text that a token stands for, ends of documents counted in."""
        return self._corpus.n_bytes / len(self._corpus.tokens)

    @property
    def summary(self) -> str:
        """One line: how much text, how much of it is held out, what was left out of it."""
        train, held = self._train, self._held_out
        notes = "".join(f"; {n} {what}" for what, n in self._corpus.notes.items())
        return (
            f"{(train.n_bytes + held.n_bytes) / 1e6:.1f} MB in {len(self._corpus.documents)} documents, "
            f"{train.n_tokens} tokens to train on, {held.n_tokens} held out{notes}"
        )

    def _window(self, epoch: int, i: int) -> int:
        """Position of the first token of the window that is visited as number `i` of an epoch."""
        offset, order = _epoch(self.config.seed, epoch, self._train.n_tokens, self._n_windows)
        return (offset + int(order[i]) * self.config.seq_len) % self._train.n_tokens

    def _check_size(self, what: str, part: Part) -> None:
        need = self.config.seq_len + 1
        if part.n_tokens < need:
            raise UsageError(
                f"the {what} has {part.n_tokens} tokens (of {len(self._corpus.tokens)} in "
                f"{len(self._corpus.documents)} documents), fewer than the {need} of one window of seq_len + 1; "
                f"give more text, a seq_len of at most {max(part.n_tokens - 1, 1)}, or another val_fraction "
                f"(now {self.config.val_fraction})"
            )


@functools.lru_cache(maxsize=2)  # a batch may lie across the border of two epochs
def _epoch(seed: int, epoch: int, n_tokens: int, n_windows: int) -> tuple[int, np.ndarray]:
    """Where an epoch's tiling begins in the circle of the text, and the order (n_windows,) in which it is visited."""
    random = np.random.default_rng((seed, epoch))
    return int(random.integers(n_tokens)), random.permutation(n_windows)


def _batch(windows: Windows, ignore: np.ndarray | bool = False) -> Batch:
    """Windows (b, l + 1) as tokens and next tokens, of which those where `ignore` (b, l) is True are no targets."""
    skip = windows.begins[:, 1:] | ignore
    return Batch(
        torch.from_numpy(windows.tokens[:, :-1].copy()),
        torch.from_numpy(np.where(skip, IGNORE, windows.tokens[:, 1:])),
        torch.from_numpy(windows.begins[:, :-1].copy()),
        int(np.where(skip, 0, windows.widths[:, 1:]).sum()),
    )

"""Part a corpus into text to train on and text to measure on, and read windows of either."""

from typing import Literal, NamedTuple

import numpy as np

from longwave.errors import UsageError
from longwave.tasks.packing import Corpus

Split = Literal["document", "tail", "auto"]

AUTO_DOCUMENTS = 20
"""Different documents from which on `auto` holds out whole ones."""

_SCAN = 1 << 20  # tokens looked through at a time


class Windows(NamedTuple):
    """Stretches of a part, one a row."""

    tokens: np.ndarray
    """(b, l) int64."""

    begins: np.ndarray
    """(b, l) bool: first token of a document, or of the part."""

    widths: np.ndarray
    """(b, l) int64: bytes of text that each token stands for."""


class Part:
    """Stretches of a corpus (documents, in order), laid end to end. Positions count from 0 and run in a circle."""

    def __init__(self, corpus: Corpus, starts: np.ndarray, stops: np.ndarray, n_bytes: int):
        """`starts`, `stops` (k,): first token of each stretch and the one after its last. `n_bytes`: of their text."""
        self._corpus, self._starts, self.n_bytes = corpus, starts, n_bytes
        ends = np.cumsum(stops - starts)
        self._begins = ends - (stops - starts)  # positions of the first tokens
        self.n_tokens = int(ends[-1]) if len(ends) else 0
        self.n_stretches = len(starts)

    def windows(self, first: np.ndarray, length: int) -> Windows:
        """`length` tokens from each of the positions `first` (b,) on."""
        positions = (first[:, None] + np.arange(length)) % self.n_tokens  # (b, l)
        stretch = np.searchsorted(self._begins, positions, side="right") - 1
        offset = positions - self._begins[stretch]
        where = self._starts[stretch] + offset
        tokens = np.asarray(self._corpus.tokens[where], np.int64)
        return Windows(tokens, offset == 0, self._corpus.widths(where))


def split_corpus(corpus: Corpus, val_fraction: float, how: Split) -> tuple[Part, Part]:
    """The part to train on and the part held out, about `val_fraction` of the text's bytes.

    Neither depends on the tokenizer or on a seed, so that results with different ones can be compared. Documents of
    equal content stay on one side when whole documents are held out. Raises UsageError when there is only one content.
    """
    if how == "auto":
        how = "document" if len(np.unique(corpus.documents["digest"])) >= AUTO_DOCUMENTS else "tail"
    return _by_document(corpus, val_fraction) if how == "document" else _by_tail(corpus, val_fraction)


def _by_document(corpus: Corpus, val_fraction: float) -> tuple[Part, Part]:
    """Documents in the order of their content's digest, which is as good as random, until there is enough.

    One that would be more than enough by itself is never held out, unless all are: then the shortest is.
    """
    _, content = np.unique(corpus.documents["digest"], return_inverse=True)
    sizes = np.bincount(content, weights=corpus.documents["n_bytes"])
    if len(sizes) < 2:
        raise UsageError(
            'split="document" holds out whole documents, but the corpus is a single one (or copies of it); '
            'use split="tail", or give more documents'
        )
    enough = val_fraction * sizes.sum()
    fits = sizes <= enough
    if not fits.any():
        fits[np.argmin(sizes)] = True
    before = np.cumsum(sizes * fits) - sizes
    held = (fits & (before < enough))[content]
    starts, stops, n_bytes = _stretches(corpus)
    return (
        Part(corpus, starts[~held], stops[~held], int(n_bytes[~held].sum())),
        Part(corpus, starts[held], stops[held], int(n_bytes[held].sum())),
    )


def _by_tail(corpus: Corpus, val_fraction: float) -> tuple[Part, Part]:
    """The last tokens, from the one on in which the bytes to train on are reached, mostly amid a document."""
    starts, stops, n_bytes = _stretches(corpus)
    reached = np.cumsum(n_bytes)
    target = int((1 - val_fraction) * reached[-1])
    i = int(np.searchsorted(reached, target, side="right"))  # the document that is cut
    cut, inside = _token_at(corpus, int(starts[i]), int(stops[i]), target - int(reached[i] - n_bytes[i]))
    before, after = starts < cut, stops > cut
    trained = int(reached[i] - n_bytes[i]) + inside
    return (
        Part(corpus, starts[before], np.minimum(stops[before], cut), trained),
        Part(corpus, np.maximum(starts[after], cut), stops[after], int(reached[-1]) - trained),
    )


def _stretches(corpus: Corpus) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """First token, token after the last, and bytes of text of every document, each (k,)."""
    starts = np.array(corpus.documents["start"])
    return starts, np.append(starts[1:], len(corpus.tokens)), np.array(corpus.documents["n_bytes"])


def _token_at(corpus: Corpus, start: int, stop: int, target: int) -> tuple[int, int]:
    """Of the tokens start..stop - 1, the one that holds byte number `target` of their text, and the bytes before it."""
    before = 0
    for begin in range(start, stop, _SCAN):
        reached = before + np.cumsum(corpus.widths(slice(begin, min(begin + _SCAN, stop))))
        if reached[-1] > target:
            i = int(np.searchsorted(reached, target, side="right"))
            return begin + i, int(reached[i - 1]) if i else before
        before = int(reached[-1])
    return stop, before

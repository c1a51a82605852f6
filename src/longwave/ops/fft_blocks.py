"""How a long convolution is cut, on any device: documents, and blocks of tokens with a transform of 2n real points."""

import functools
from collections.abc import Callable, Iterator

import numpy as np


@functools.cache
def good_size(least: int) -> int:
    """The least n >= `least` of the form 2^a, 3 2^a, 5 2^a, 9 2^a or 15 2^a."""
    return min(m << max(0, (-(-least // m) - 1).bit_length()) for m in (1, 3, 5, 9, 15))


def block_size(
    taps: int,
    length: int,
    chunk_len: int | None,
    cost: Callable[[int], float],
    size: Callable[[int], int] = good_size,
) -> tuple[int, int]:
    """Tokens to a block, and n, for documents of `length` tokens: 2n points must hold taps - 1 + q inputs.

    `cost` of n is that of a transform and its way back; `size` gives the least n that there is a transform for.
    """

    def q_of(n: int) -> int:
        return min(length, 2 * n - (taps - 1))

    if chunk_len is not None:
        n = size(-(-(taps - 1 + min(chunk_len, length)) // 2))
        return min(chunk_len, q_of(n)), n
    n = size(-(-(taps - 1 + length) // 2))
    sizes = [n]
    while (n := size(n // 2)) < sizes[-1] and n >= 8 and 2 * n >= taps:
        sizes.append(n)
    n = min(sizes, key=lambda n: (-(-length // q_of(n)) + 0.5) * cost(n))  # the half is the filter's
    return q_of(n), n


def documents_of(reset: np.ndarray, ends: np.ndarray, first: int) -> np.ndarray:
    """(n, 4): row, start, end of each document, and the time of the first input that it sees.

    That is its start, but `first` for one that goes on from the initial state, whose inputs stand at times below 0.
    """
    found = []
    for row, end in enumerate(ends):
        starts = np.flatnonzero(reset[row, :end])
        seen = starts
        if end and (not len(starts) or starts[0]):
            starts, seen = np.append(0, starts), np.append(first, seen)
        stops = np.append(starts[1:], end)[: len(starts)]
        found.append(np.stack([np.full(len(starts), row), starts, stops, seen], 1))
    return np.concatenate(found).astype(np.int64) if found else np.empty((0, 4), np.int64)


def groups_of(documents: np.ndarray, k: int) -> Iterator[tuple[np.ndarray, int, int]]:
    """Documents of like length, that length, and how many of the filter's k taps they need."""
    longest = int((documents[:, 2] - documents[:, 1]).max(initial=0))
    # Lengths are rounded up to a power of two, so that packed rows need few different transforms.
    length = np.minimum(1 << np.ceil(np.log2(documents[:, 2] - documents[:, 1])).astype(np.int64), longest)
    from_state = documents[:, 3] < 0
    taps = np.where(from_state, k, np.minimum(k, length))
    for m, t in sorted(set(zip(length.tolist(), taps.tolist(), strict=True))):
        yield documents[(length == m) & (taps == t)], m, t

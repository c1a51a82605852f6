"""Turn ids into text one at a time, so that no piece ends in half a character."""

import codecs
from collections.abc import Callable, Container
from typing import Protocol

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class TextStream(Protocol):
    """An incremental decoder. The pieces it returns, joined, are the text of the whole."""

    def push(self, token: int) -> str:
        """Take in one id; return the text that is certain by now, perhaps none."""
        ...

    def flush(self) -> str:
        """The end: return what was held back, and start afresh."""
        ...


class ByteStream:
    """For ids that are bytes; others stand for no text."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        return self._decoder.decode(bytes((token,))) if 0 <= token < 256 else ""

    def flush(self) -> str:
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return text


class WindowStream:
    """For any decoder of lists of ids.

    Decodes a window that begins at a point where a character was complete, at least one token back, because decoders
    treat a text's first token differently (a leading space is dropped, a word piece is not joined). Text that ends in
    U+FFFD may be a character that is still incomplete, and is held back.

    The pieces add up to the decoded whole, with one exception: decoders with byte fallback (Llama) give up a whole run
    of byte tokens when one of them is invalid; here its valid characters before that one have been said, and stay.
    """

    LONGEST = 64  # tokens without a complete character at their end: garbage, which must not make each push slower
    OVERLAP = 8  # a character has 4 bytes, so decoding from 8 tokens back finds its place again

    def __init__(self, decode: Callable[[list[int]], str], spoken: Container[int]):
        """`decode` turns ids into text, and passes over those that are not in `spoken`."""
        self._decode, self._spoken = decode, spoken
        self._restart()

    def push(self, token: int) -> str:
        if token not in self._spoken:
            return ""
        self._window.append(token)
        text = self._decode(self._window)
        if not text.endswith(REPLACEMENT):
            piece = text[self._said :]
            self._keep(self._window[self._pending :], said=None)
            return piece
        if len(self._window) - self._pending > self.LONGEST:
            piece = text[self._said : -1]
            self._keep(self._window[-self.OVERLAP :], said=-1)
            return piece
        certain = text.rstrip(REPLACEMENT)
        piece = certain[self._said :]
        self._said = max(self._said, len(certain))
        return piece

    def flush(self) -> str:
        piece = self._decode(self._window)[self._said :] if self._window else ""
        self._restart()
        return piece

    def _restart(self) -> None:
        self._window: list[int] = []
        self._pending = 0  # index in the window of the first token since a character was complete
        self._said = 0  # characters of the decoded window that were returned

    def _keep(self, window: list[int], said: int | None) -> None:
        """Go on from the window's last tokens, of whose text everything up to the slice end `said` was returned."""
        self._window, self._pending = window, len(window)
        self._said = len(self._decode(window)[:said])

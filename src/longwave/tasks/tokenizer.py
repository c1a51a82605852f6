"""Text to ids and back: bytes, or any file of the `tokenizers` library."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from longwave.errors import UsageError
from longwave.models.saving import write_text
from longwave.tasks.incremental import REPLACEMENT, ByteStream, TextStream, WindowStream

END = "<|endoftext|>"
ENDS = (END, "</s>", "<eos>", "<|end_of_text|>", "<|eos|>", "[EOS]", "<|im_end|>", "[SEP]")
"""Usual names of the end of a document, the likeliest first."""


class Encoded(NamedTuple):
    """A piece of a corpus as ids."""

    ids: np.ndarray
    """(l,) ids."""

    widths: np.ndarray | None
    """(l,) bytes of the text that each id stands for, which add up to the piece's; None: one each."""

    replaced: int
    """Byte sequences that are not UTF-8 and were read as U+FFFD."""


class Tokenizer(Protocol):
    """What the library asks of a tokenizer. Ids lie in 0..vocab_size - 1."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def end(self) -> int | None:
        """Id that ends every document, or None. Decodes to nothing."""
        ...

    @property
    def fingerprint(self) -> str:
        """Equal for tokenizers that turn every text into the same ids."""
        ...

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without an end or a beginning added. A lone surrogate, which UTF-8 cannot hold, reads '?'."""
        ...

    def encode_pieces(self, pieces: Sequence[bytes]) -> list[Encoded]:
        """Ids of many pieces of UTF-8 text at once, each for itself."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids. Special ids and ids beyond the vocabulary stand for no text; invalid UTF-8 reads U+FFFD."""
        ...

    def stream(self) -> TextStream:
        """A new incremental decoder: push(id) -> str, flush() -> str."""
        ...

    def save(self, folder: str | Path) -> None:
        """Write tokenizer.json and tokenizer_config.json, as `load_tokenizer` and transformers read them."""
        ...


class ByteTokenizer:
    """Every byte is its own id; 256 ends a document."""

    vocab_size = 257
    end = 256
    fingerprint = "bytes"

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8", "replace"))

    def encode_pieces(self, pieces: Sequence[bytes]) -> list[Encoded]:
        return [Encoded(np.frombuffer(piece, np.uint8), None, 0) for piece in pieces]

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(i for i in ids if 0 <= i < 256).decode("utf-8", "replace")

    def stream(self) -> TextStream:
        return ByteStream()

    def save(self, folder: str | Path) -> None:
        _save(_bytes_as_file(), "bytes", END, folder)


class FileTokenizer:
    """A tokenizer of the `tokenizers` library. Padding and truncation set in its file are switched off."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, end: str | None = None):
        """`end`: the token that ends a document; None takes the first of ENDS that the vocabulary has, if any.

        Raises UsageError if the vocabulary lacks `end`.
        """
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self._tokenizer = tokenizer
        vocab = tokenizer.get_vocab(with_added_tokens=True)
        if end is not None and end not in vocab:
            raise UsageError(f"the tokenizer has no token {end!r} to end documents with; name one of its own")
        self._end = end if end is not None else next((name for name in ENDS if name in vocab), None)
        self.end = None if self._end is None else vocab[self._end]
        self.vocab_size = max(vocab.values(), default=-1) + 1  # ids may have gaps
        added = tokenizer.get_added_tokens_decoder()
        self._spoken = set(vocab.values()) - {i for i, token in added.items() if token.special} - {self.end}

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(f"{self.end} {self._tokenizer.to_str()}".encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        text = text.encode("utf-8", "replace").decode()
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_pieces(self, pieces: Sequence[bytes]) -> list[Encoded]:
        texts = [piece.decode("utf-8", "replace") for piece in pieces]
        encodings = self._tokenizer.encode_batch(texts, add_special_tokens=False)
        return [
            Encoded(np.array(encoding.ids, np.int64), _widths(text, encoding.offsets), _replaced(piece, text))
            for piece, text, encoding in zip(pieces, texts, encodings, strict=True)
        ]

    def decode(self, ids: Iterable[int]) -> str:
        return self._tokenizer.decode([i for i in ids if i in self._spoken])

    def stream(self) -> TextStream:
        return WindowStream(self.decode, self._spoken)

    def save(self, folder: str | Path) -> None:
        _save(self._tokenizer, "file", self._end, folder)


def train_bpe(texts: Iterable[str], vocab_size: int) -> FileTokenizer:
    """A byte-level BPE (Radford et al. 2019) learnt from texts, which encodes any text without loss.

    `vocab_size` counts the 256 bytes and <|endoftext|> (id 0) in; a short text may give fewer. Raises UsageError below
    257.
    """
    if vocab_size < 257:
        raise UsageError(f"a byte-level BPE has at least 257 tokens (256 bytes and the end), got {vocab_size}")
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[END],
        show_progress=False,
    )
    tokenizer.train_from_iterator((text.encode("utf-8", "replace").decode() for text in texts), trainer)
    return FileTokenizer(tokenizer, END)


def load_tokenizer(source: str | Path, end: str | None = None) -> Tokenizer | None:
    """The tokenizer "bytes", or that of a file of the `tokenizers` library, or that of a folder, None if it has none.

    `end` names the token that ends a document; else tokenizer_config.json beside the file may (`eos_token`), else it is
    one of ENDS. Raises UsageError on a path that does not exist and on a file that is no tokenizer.
    """
    if source == "bytes":
        return ByteTokenizer()
    path = Path(source).expanduser()
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.exists():
        if path.is_dir():
            return None
        raise UsageError(f'there is no tokenizer {str(source)!r}; give "bytes", a tokenizer.json or a folder with one')
    settings = _settings(file)
    if settings.get("kind") == "bytes":
        return ByteTokenizer()
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing narrower
        raise UsageError(
            f"{file} is not a file of the tokenizers library ({error}); give its tokenizer.json"
        ) from error
    named = settings.get("eos_token")
    named = named.get("content") if isinstance(named, dict) else named
    known = isinstance(named, str) and tokenizer.token_to_id(named) is not None
    return FileTokenizer(tokenizer, end if end is not None else named if known else None)


def _settings(file: Path) -> dict:
    """What tokenizer_config.json says, if the tokenizer's file has one beside it."""
    beside = file.with_name("tokenizer_config.json")
    if file.name != "tokenizer.json" or not beside.exists():
        return {}
    try:
        settings = json.loads(beside.read_bytes())
    except ValueError as error:
        raise UsageError(f"{beside} is not JSON ({error}); fetch it again, or take it away") from error
    return settings if isinstance(settings, dict) else {}


def _save(tokenizer: tokenizers.Tokenizer, kind: str, end: str | None, folder: str | Path) -> None:
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "tokenizer.json", tokenizer.to_str(pretty=True))
    settings = {"kind": kind, "tokenizer_class": "PreTrainedTokenizerFast"}
    settings |= {} if end is None else {"eos_token": end}
    write_text(folder / "tokenizer_config.json", json.dumps(settings, indent=2) + "\n")


def _bytes_as_file() -> tokenizers.Tokenizer:
    """The byte tokenizer as a byte-level BPE without merges, so that other programs can read a byte model's text."""
    # Byte-level BPE writes a byte as the character of that number where it is visible, else as the next from 256 on.
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in visible]
    vocab = {chr(byte): byte for byte in visible} | {chr(256 + i): byte for i, byte in enumerate(hidden)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END])
    return tokenizer


def _widths(text: str, offsets: list[tuple[int, int]]) -> np.ndarray:
    """Bytes of UTF-8 that each token stands for, from the characters (begin, end) that it covers.

    What no token covers (dropped blanks) counts with the next token, or the last. Of several tokens within one
    character, the first has all its bytes.
    """
    ends = np.fromiter((end for _, end in offsets), np.int64, len(offsets))
    if not ends.size:
        return ends
    size = len(text)
    if not text.isascii():
        data = np.frombuffer(text.encode(), np.uint8)
        size = data.size
        begins = np.flatnonzero((data & 0xC0) != 0x80)  # UTF-8 marks the later bytes of a character with 10xxxxxx
        ends = np.append(begins, size)[ends]
    ends = np.maximum.accumulate(ends)
    ends[-1] = size
    return np.diff(ends, prepend=0)


def _replaced(data: bytes, text: str) -> int:
    return text.count(REPLACEMENT) - data.count(REPLACEMENT.encode())

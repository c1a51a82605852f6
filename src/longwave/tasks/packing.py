"""A corpus as ids on disk: written once for a set of files and a tokenizer, then mapped into memory."""

import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from longwave.errors import LongwaveError, UsageError
from longwave.tasks.documents import Piece, read_pieces
from longwave.tasks.progress import ProgressLine
from longwave.tasks.sources import Source
from longwave.tasks.tokenizer import Encoded, Tokenizer

FORMAT = 1
"""Raise it when the files below, or what is written into them, change."""

DOCUMENT = np.dtype([("start", "<i8"), ("n_bytes", "<i8"), ("digest", "<u8")])
_WIDTH = np.dtype("<u4")
_BATCH = 4 << 20  # bytes that are tokenised at once


class Corpus:
    """The ids of all documents, one after another, each ended by the tokenizer's end.

    `tokens` (n,) uint16 or uint32; `documents` (k,) of DOCUMENT: index of the first token, bytes of text, digest of the
    content. Both are memory-mapped.
    """

    def __init__(self, folder: Path, tokenizer: Tokenizer):
        about = json.loads((folder / "about.json").read_bytes())
        self.tokens = np.memmap(folder / "tokens.bin", _id_type(tokenizer), mode="r")
        self.documents = np.memmap(folder / "documents.bin", DOCUMENT, mode="r")
        widths = folder / "widths.bin"
        self._widths = np.memmap(widths, _WIDTH, mode="r") if widths.stat().st_size else None
        self._end = tokenizer.end
        self.notes: dict[str, int] = about["notes"]
        if len(self.tokens) != about["n_tokens"] or len(self.documents) != about["n_documents"]:
            raise LongwaveError(f"the token cache {folder} is damaged; delete that folder and run again")

    def widths(self, where: slice | np.ndarray) -> np.ndarray:
        """Bytes of text that each of the chosen tokens stands for; none for an end."""
        if self._widths is None:
            return np.asarray(self.tokens[where] != self._end, np.int64)
        return np.asarray(self._widths[where], np.int64)

    @property
    def n_bytes(self) -> int:
        """Bytes of text in all documents."""
        return int(self.documents["n_bytes"].sum())


def open_corpus(sources: Sequence[Source], tokenizer: Tokenizer, jsonl_field: str, cache: Path) -> Corpus:
    """The corpus of these files, from the cache or packed now.

    It is packed in a folder of its own and renamed when complete, so a run that is killed leaves nothing half done, and
    of two that pack at once the first to finish wins. Raises UsageError for text that cannot be used and LongwaveError
    when the cache cannot be written.
    """
    folder = cache / "text" / _key(sources, tokenizer, jsonl_field)
    try:
        if not folder.is_dir():
            folder.parent.mkdir(parents=True, exist_ok=True)
            draft = Path(tempfile.mkdtemp(prefix=".draft-", dir=folder.parent))
            try:
                _pack(draft, sources, tokenizer, jsonl_field)
                _move(draft, folder)
            finally:
                shutil.rmtree(draft, ignore_errors=True)
        return Corpus(folder, tokenizer)
    except OSError as error:
        raise LongwaveError(
            f"cannot keep tokens in {folder.parent}: {error.strerror or error}; "
            "name a folder with room in LONGWAVE_CACHE or cache_dir"
        ) from error


def cache_folder(chosen: str | None) -> Path:
    """`chosen`, else $LONGWAVE_CACHE, else longwave/ in the user's cache."""
    chosen = chosen or os.environ.get("LONGWAVE_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "longwave"


def _key(sources: Sequence[Source], tokenizer: Tokenizer, jsonl_field: str) -> str:
    key = hashlib.sha256(repr((FORMAT, tokenizer.fingerprint, jsonl_field)).encode())
    for source in sources:
        key.update(repr((os.path.realpath(source.path), source.size, source.modified)).encode())
    return key.hexdigest()[:32]


def _move(draft: Path, folder: Path) -> None:
    try:
        draft.rename(folder)
    except OSError:
        if not folder.is_dir():  # else another process has packed the same meanwhile
            raise


def _pack(draft: Path, sources: Sequence[Source], tokenizer: Tokenizer, jsonl_field: str) -> None:
    notes: Counter[str] = Counter()
    n_bytes = sum(source.size for source in sources)
    with (
        open(draft / "tokens.bin", "wb") as tokens,
        open(draft / "widths.bin", "wb") as widths,
        open(draft / "documents.bin", "wb") as documents,
        ProgressLine("tokenising", n_bytes) as progress,
    ):
        writer = _Writer(tokens, widths, documents, tokenizer)
        for pieces in _batches(read_pieces(sources, jsonl_field, notes, progress)):
            encoded = tokenizer.encode_pieces([piece.data for piece in pieces])
            for piece, code in zip(pieces, encoded, strict=True):
                writer.add(piece, code)
                if code.replaced:
                    notes["invalid UTF-8 sequences read as U+FFFD"] += code.replaced
    if not writer.n_tokens:
        found = ", ".join(f"{n} {what}" for what, n in notes.items()) or "nothing but blanks"
        raise UsageError(f"no text in {len(sources)} files ({found}); name files or folders with text in them")
    about = {"n_tokens": writer.n_tokens, "n_documents": writer.n_documents, "notes": notes}
    (draft / "about.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    for what, n in notes.items():
        print(f"longwave: {n} {what}", file=sys.stderr)


def _batches(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    batch: list[Piece] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece.data)
        if size >= _BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class _Writer:
    """Writes ids, the bytes they stand for, and where documents begin."""

    def __init__(self, tokens: BinaryIO, widths: BinaryIO, documents: BinaryIO, tokenizer: Tokenizer):
        self._tokens, self._widths, self._documents = tokens, widths, documents
        self._id_type, self._end = _id_type(tokenizer), tokenizer.end
        self.n_tokens = self.n_documents = 0
        self._has_widths = False
        self._begin()

    def add(self, piece: Piece, code: Encoded) -> None:
        self._digest.update(piece.data)
        self._write(code.ids, code.widths)
        self._n_bytes += len(piece.data) if code.widths is None else int(code.widths.sum())
        if piece.last:
            self._finish()

    def _begin(self) -> None:
        self._start, self._n_bytes = self.n_tokens, 0
        self._digest = hashlib.blake2b(digest_size=8)

    def _finish(self) -> None:
        if self.n_tokens > self._start:
            if self._end is not None:
                self._write(np.array([self._end]), np.zeros(1, np.int64) if self._has_widths else None)
            digest = int.from_bytes(self._digest.digest(), "little")
            self._documents.write(np.array((self._start, self._n_bytes, digest), DOCUMENT).tobytes())
            self.n_documents += 1
        self._begin()

    def _write(self, ids: np.ndarray, widths: np.ndarray | None) -> None:
        self._tokens.write(ids.astype(self._id_type).tobytes())
        self.n_tokens += len(ids)
        if widths is not None:
            self._has_widths = True
            self._widths.write(widths.astype(_WIDTH).tobytes())


def _id_type(tokenizer: Tokenizer) -> np.dtype:
    return np.dtype("<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4")

"""Read the documents of a corpus, a piece at a time: a plain file is one document, a line of JSONL is one."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from longwave.errors import UsageError
from longwave.tasks.progress import ProgressLine
from longwave.tasks.sources import Source, find_sources, readable

PIECE = 1 << 20
"""Bytes of a plain file that are read at a time."""

_SNIFF = 8192
_CONTROLS = bytes(set(range(32)) - set(b"\t\n\v\f\r\b\x1b"))


class Piece(NamedTuple):
    """Part of a document, cut where a line or at least a character ends."""

    data: bytes
    last: bool
    """Ends its document."""


def read_pieces(
    sources: Iterable[Source], jsonl_field: str, notes: Counter[str], progress: ProgressLine
) -> Iterator[Piece]:
    """The documents of the sources, in order, in pieces that fit in memory. Empty documents are passed over.

    Counts in `notes` what is left out. Raises UsageError for a binary or empty file that the user named, and for a line
    of JSONL that is no JSON object with a text in `jsonl_field`.
    """
    for source in sources:
        with readable(source.path), open(source.path, "rb") as file:
            head = file.read(_SNIFF)
            if looks_binary(head):
                _refuse_or_count(source, "binary file", notes)
                progress.add(source.size)
                continue
            if not head and source.given:
                raise UsageError(f"{source.path} is empty; name a file with text in it")
            file.seek(0)
            is_jsonl = source.path.suffix.lower() in (".jsonl", ".ndjson")
            pieces = _jsonl(file, source.path, jsonl_field) if is_jsonl else _plain(file)
            before = 0
            for piece in pieces:
                yield piece
                progress.add(file.tell() - before)
                before = file.tell()


def read_texts(paths: Iterable[str], jsonl_field: str = "text") -> Iterator[str]:
    """Documents of files, folders and built-in texts as str, for `train_bpe`; long ones in pieces of about 1 MiB."""
    sources = find_sources(paths)
    with ProgressLine("reading text", sum(source.size for source in sources)) as progress:
        for piece in read_pieces(sources, jsonl_field, Counter(), progress):
            yield piece.data.decode("utf-8", "replace")


def looks_binary(head: bytes) -> bool:
    """Whether a file that begins with `head` is no text: it has a zero byte, or more than 2% control characters.

    Legacy 8-bit encodings pass as text; UTF-16 and compressed files do not.
    """
    controls = len(head) - len(head.translate(None, _CONTROLS))
    return b"\0" in head or controls > 0.02 * len(head)


def _refuse_or_count(source: Source, what: str, notes: Counter[str]) -> None:
    if source.given:
        raise UsageError(
            f"{source.path} is a {what}, not text; unpack it or convert it to UTF-8 text first, or name another file"
        )
    notes[f"{what}s left out"] += 1


def _plain(file: BinaryIO) -> Iterator[Piece]:
    held = file.read(PIECE)
    while ahead := file.read(PIECE):
        cut = _border(held)
        yield Piece(held[:cut], last=False)
        held = held[cut:] + ahead
    if held:
        yield Piece(held, last=True)


def _border(data: bytes) -> int:
    """Where to cut: after the last line end, else before the last space, else where a character of UTF-8 begins.

    No more than PIECE bytes are left for the next piece.
    """
    for cut in (data.rfind(b"\n") + 1, data.rfind(b" ")):
        if cut > 0 and len(data) - cut <= PIECE:
            return cut
    for back in range(1, min(4, len(data))):
        if data[-back] & 0xC0 == 0xC0:  # first byte of a character of several bytes
            return len(data) - back
        if data[-back] < 0x80:
            break
    return len(data)


def _jsonl(file: BinaryIO, path: Path, field: str) -> Iterator[Piece]:
    # readline, not iteration, so that file.tell() stays true
    for number, line in enumerate(iter(file.readline, b""), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise UsageError(f"{path}:{number}: not JSON ({error}); mend or delete this line") from error
        text = record.get(field) if isinstance(record, dict) else None
        if not isinstance(text, str):
            found = ", ".join(record) if isinstance(record, dict) else type(record).__name__
            raise UsageError(
                f"{path}:{number}: no text in the field {field!r} (found: {found or 'nothing'}); set jsonl_field"
            )
        if text:
            # Lone surrogates become invalid UTF-8 here, which the tokenizer treats as it does that of files.
            yield Piece(text.encode("utf-8", "surrogatepass"), last=True)

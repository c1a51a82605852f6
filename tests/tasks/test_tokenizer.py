import inspect
import json

import numpy as np
import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers

from longwave.errors import UsageError
from longwave.tasks.incremental import WindowStream
from longwave.tasks.tokenizer import ByteTokenizer, FileTokenizer, load_tokenizer, train_bpe

few = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
unicode = st.text(st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from(" \u00e9\u65e5\U0001f600\ufffd")))


def streamed(tokenizer, ids):
    stream = tokenizer.stream()
    pieces = [stream.push(i) for i in ids]
    return [*pieces, stream.flush()]


@few
@given(unicode)
def test_bytes_round_trip(text):
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert bytes(ids) == text.encode()
    assert tokenizer.decode([*ids, tokenizer.end]) == text


@few
@given(text=unicode)
def test_bpe_round_trip(bpe, text):
    assert bpe.decode([*bpe.encode(text), bpe.end]) == text


@few
@given(text=unicode, name=st.sampled_from(["bytes", "bpe", "sentencepiece", "wordpiece"]))
def test_stream_is_decode(request, text, name):
    tokenizer = ByteTokenizer() if name == "bytes" else request.getfixturevalue(name)
    ids = tokenizer.encode(text)
    assert "".join(streamed(tokenizer, ids)) == tokenizer.decode(ids)


@few
@given(ids=st.lists(st.integers(-1, 800)))
def test_stream_is_decode_for_any_ids(bpe, ids):
    """Ids that no text has: broken characters, ends amid the text, ids beyond the vocabulary."""
    assert "".join(streamed(bpe, ids)) == bpe.decode(ids)
    ids = [i % 300 for i in ids]
    assert "".join(streamed(ByteTokenizer(), ids)) == ByteTokenizer().decode(ids)


@few
@given(ids=st.lists(st.integers(0, 255), min_size=1), n=st.integers(0, 300))
def test_stream_of_long_garbage_is_decode(bpe, ids, n):
    broken = bpe.encode("\u00e9")[0]  # the first byte of two
    assert bpe.decode([broken]) == "\ufffd"
    ids = [broken] * n + ids
    assert "".join(streamed(bpe, ids)) == bpe.decode(ids)


def test_stream_of_endless_garbage_decodes_short_windows():
    longest = 0

    def decode(ids):
        nonlocal longest
        longest = max(longest, len(ids))
        return "\ufffd" * len(ids)

    stream = WindowStream(decode, range(10))
    said = "".join(stream.push(7) for _ in range(1000)) + stream.flush()
    assert said == "\ufffd" * 1000
    assert longest < 100


@pytest.mark.parametrize("name", ["bytes", "bpe"])
def test_stream_says_characters_as_soon_as_they_are_whole(request, name):
    tokenizer = ByteTokenizer() if name == "bytes" else request.getfixturevalue(name)
    text = "a \U0001f600\U0001f600 \u65e5b"
    ids = tokenizer.encode(text)
    said, stream = "", tokenizer.stream()
    for n, token in enumerate(ids, 1):
        said += stream.push(token)
        assert said == tokenizer.decode(ids[:n]).rstrip("\ufffd")
    assert said == text


def test_stream_says_each_character_of_byte_fallback(sentencepiece):
    ids = sentencepiece.encode("a \U0001f600\u65e5b")
    pieces = streamed(sentencepiece, ids)
    first = pieces.index("\U0001f600")
    assert "".join(pieces[: first - 3]) == "a "
    assert pieces[first - 3 :] == ["", "", "", "\U0001f600", "", "", "\u65e5", "b", ""]


def test_flush_tells_what_is_incomplete_and_starts_afresh(bpe):
    for tokenizer in (ByteTokenizer(), bpe):
        stream = tokenizer.stream()
        whole = tokenizer.encode("\u65e5")
        assert [stream.push(i) for i in whole[:-1]] == [""] * (len(whole) - 1)
        assert stream.flush() == "\ufffd"
        assert "".join(map(stream.push, tokenizer.encode("ok"))) == "ok"
        assert stream.flush() == ""


def test_lone_surrogates_do_not_stop_a_prompt(bpe):
    for tokenizer in (ByteTokenizer(), bpe):
        assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a?b"


@few
@given(text=unicode, name=st.sampled_from(["bpe", "sentencepiece", "wordpiece"]))
def test_widths_add_up_to_the_text(request, text, name):
    tokenizer = request.getfixturevalue(name)
    (code,) = tokenizer.encode_pieces([text.encode()])
    assert code.ids.tolist() == tokenizer.encode(text)
    assert code.replaced == 0
    assert (code.widths >= 0).all()
    assert code.widths.sum() == (len(text.encode()) if len(code.ids) else 0)


def test_widths_are_the_bytes_of_each_token(bpe):
    """Against the tokens' own spelling, in which byte-level BPE has one character per byte."""
    text = "def f(x):\n    return '\u00e9t\u00e9' + \"\u65e5\u672c\"  # \U0001f600\n"
    (code,) = bpe.encode_pieces([text.encode()])
    spelt = np.cumsum([len(bpe._tokenizer.id_to_token(i)) for i in code.ids])
    characters = np.cumsum([len(character.encode()) for character in text])
    begun = np.searchsorted(characters, spelt)  # the character that holds each token's last byte
    assert np.cumsum(code.widths).tolist() == characters[begun].tolist()


def test_invalid_utf8_is_replaced_and_counted(bpe):
    real = "\ufffd".encode()
    (code,) = bpe.encode_pieces([b"a\xffb\xe6\x97" + real])
    assert bpe.decode(code.ids.tolist()) == "a\ufffdb\ufffd\ufffd"
    assert code.replaced == 2


def test_trained_bpe(bpe):
    assert bpe.vocab_size == 700
    assert bpe.decode([bpe.end]) == ""
    text = inspect.getsource(json)
    assert len(bpe.encode(text)) < 0.6 * len(text)
    with pytest.raises(UsageError, match="256"):
        train_bpe(["text"], 256)


def test_saved_and_loaded(bpe, tmp_path):
    text = "def f(): return '\u00e9'"
    for name, tokenizer in {"bytes": ByteTokenizer(), "bpe": bpe}.items():
        tokenizer.save(tmp_path / name)
        loaded = load_tokenizer(tmp_path / name)
        assert type(loaded) is type(tokenizer)
        assert loaded.fingerprint == tokenizer.fingerprint
        assert (loaded.end, loaded.vocab_size) == (tokenizer.end, tokenizer.vocab_size)
        assert loaded.encode(text) == tokenizer.encode(text)


@few
@given(data=st.binary())
def test_saved_bytes_are_bytes_to_other_programs(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "saved-bytes"
    if not folder.exists():
        ByteTokenizer().save(folder)
    other = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert other.decode(list(data)) == data.decode("utf-8", "replace")
    text = data.decode("utf-8", "replace")
    assert other.encode(text).ids == ByteTokenizer().encode(text)


def test_transformers_reads_saved_tokenizers(bpe, tmp_path):
    transformers = pytest.importorskip("transformers")
    for tokenizer in (ByteTokenizer(), bpe):
        folder = tmp_path / type(tokenizer).__name__
        tokenizer.save(folder)
        other = transformers.AutoTokenizer.from_pretrained(folder)
        text = "class A: '\u00e9\U0001f600'"
        assert other(text)["input_ids"] == tokenizer.encode(text)
        assert other.eos_token_id == tokenizer.end
        assert len(other) == tokenizer.vocab_size


def word_level(words, **ids):
    vocab = {word: i for i, word in enumerate(words)} | ids
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token=words[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def test_end_is_named_or_guessed():
    assert FileTokenizer(word_level(["a", "b"])).end is None
    assert FileTokenizer(word_level(["a", "[SEP]", "</s>"])).end == 2
    assert FileTokenizer(word_level(["a", "b", "</s>"]), end="b").end == 1
    with pytest.raises(UsageError, match="'<eos>'"):
        FileTokenizer(word_level(["a"]), end="<eos>")


def test_end_is_read_from_the_folder(tmp_path):
    word_level(["a", "</s>", "<stop>"]).save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).end == 1
    for named in ("<stop>", {"content": "<stop>"}):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": named}))
        assert load_tokenizer(tmp_path).end == 2
        assert load_tokenizer(tmp_path / "tokenizer.json").end == 2
    assert load_tokenizer(tmp_path, end="a").end == 0
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<missing>"}))
    assert load_tokenizer(tmp_path).end == 1


def test_vocab_size_covers_every_id():
    assert FileTokenizer(word_level(["a", "b"], far=9)).vocab_size == 10


def test_padding_truncation_and_templates_of_a_file_do_not_reach_a_corpus(tmp_path):
    tokenizer = word_level(["a", "b", "[SEP]"])
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing("$A [SEP]", special_tokens=[("[SEP]", 2)])
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=8)
    tokenizer.save(str(tmp_path / "any.json"))
    loaded = load_tokenizer(tmp_path / "any.json")
    assert loaded.encode("a b a b") == [0, 1, 0, 1]
    assert [code.ids.tolist() for code in loaded.encode_pieces([b"a b a b", b"b"])] == [[0, 1, 0, 1], [1]]


def test_what_is_no_tokenizer(tmp_path):
    assert load_tokenizer(tmp_path) is None
    with pytest.raises(UsageError, match="'nowhere'"):
        load_tokenizer("nowhere")
    (tmp_path / "tokenizer.json").write_text('{"broken"')
    with pytest.raises(UsageError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(UsageError, match=r"tokenizer_config\.json"):
        load_tokenizer(tmp_path)

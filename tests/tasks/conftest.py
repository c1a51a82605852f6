import email
import json
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from longwave.tasks.documents import read_texts
from longwave.tasks.tokenizer import FileTokenizer, train_bpe

PACKAGES = tuple(str(Path(package.__file__).parent) for package in (json, email))


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LONGWAVE_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def packages():
    """Real text: the sources of two packages of the standard library, a few hundred kilobytes in some 25 documents."""
    return PACKAGES


@pytest.fixture(scope="session")
def bpe():
    return train_bpe(read_texts(PACKAGES), 700)


@pytest.fixture(scope="session")
def sentencepiece():
    """As Llama's: a space is a visible sign in front of a word, unknown characters are byte tokens."""
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=["<unk>", "<s>", "</s>", *fallback], limit_alphabet=60, show_progress=False
    )
    tokenizer.train_from_iterator((text[:2000] for text in read_texts(PACKAGES)), trainer)
    written = json.loads(tokenizer.to_str())
    written["added_tokens"] = [token for token in written["added_tokens"] if token["content"] not in fallback]
    return FileTokenizer(tokenizers.Tokenizer.from_str(json.dumps(written)))


@pytest.fixture(scope="session")
def wordpiece():
    """As BERT's: lower case, word pieces, blanks dropped."""
    tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=600, special_tokens=["[UNK]", "[SEP]"], show_progress=False)
    tokenizer.train_from_iterator(read_texts(PACKAGES), trainer)
    return FileTokenizer(tokenizer)

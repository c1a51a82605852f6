"""Input that cannot be used: one line that says what and how to mend it, and nothing that was saved is lost."""

import errno
import json
import os
import pickle
import resource
import signal
import zipfile

import pytest
import torch

from longwave.hub.load import load

STEP = ("--model", "mamba", "--d-model", 16, "--steps", 1)


def usage(done, *expected: str) -> None:
    assert done.status == 2
    assert done.out == ""
    assert all(text in done.complaint for text in expected), done.err


def failure(done, *expected: str) -> None:
    assert done.status == 1
    assert all(text in done.complaint for text in expected), done.err


# Text


def test_missing_text(longwave):
    usage(longwave("train", *STEP, "--text", "letters.txt"), "'letters.txt'", "stdlib")
    usage(longwave("train", *STEP, "--text", "sdtlib"), "Did you mean 'stdlib'?")


def test_binary_text(longwave, tmp_path):
    (tmp_path / "a.gz").write_bytes(b"\x1f\x8b\0\0" * 100)
    usage(longwave("train", *STEP, "--text", "a.gz"), "a.gz is a binary file, not text", "unpack it")
    usage(longwave("train", *STEP, "--text", "a.gz", "--bpe", 300), "a.gz is a binary file, not text")


def test_empty_text(longwave, tmp_path):
    (tmp_path / "empty.txt").touch()
    (tmp_path / "folder").mkdir()
    usage(longwave("train", *STEP, "--text", "empty.txt"), "empty.txt is empty; name a file with text in it")
    usage(longwave("train", *STEP, "--text", "folder"), "no file in folder; name a file or folder with text")


def test_too_little_text(longwave, tmp_path):
    (tmp_path / "short.txt").write_text("a short text " * 10)
    usage(longwave("train", *STEP, "--text", "short.txt"), "fewer than the 513", "give more text")


def test_unreadable_text(longwave, tmp_path, monkeypatch):
    (tmp_path / "secret.txt").write_text("secret " * 100)
    real = open

    def refuse(path, *arguments, **options):
        if str(path).endswith("secret.txt"):  # as for any user but root, for whom a mode is no hindrance
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return real(path, *arguments, **options)

    monkeypatch.setattr("builtins.open", refuse)
    usage(longwave("train", *STEP, "--text", "secret.txt"), "cannot read secret.txt: Permission denied")


def test_jsonl_without_the_field(longwave, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "text"}\n')
    usage(longwave("train", *STEP, "--text", "a.jsonl"), "a.jsonl:1: no text in the field 'text' (found: body)")


# Configurations


def test_model_file_with_an_unknown_key(longwave, tmp_path, model):
    settings = json.loads((model / "config.json").read_text())
    settings["layers"][0]["d_sate"] = 8
    (tmp_path / "mine.json").write_text(json.dumps(settings))
    usage(longwave("train", "--model", "mine.json", "--steps", 1), "unknown key 'd_sate'. Did you mean 'd_state'?")
    (model / "config.json").write_text(json.dumps(settings))
    usage(longwave("generate", model, "x"), "unknown key 'd_sate'. Did you mean 'd_state'?")


@pytest.mark.parametrize("text", ["{", "[]", '{"kind": "language_model"}', '{"kind": "language_model", "layers": 3}'])
def test_model_file_that_is_no_model(longwave, tmp_path, text):
    (tmp_path / "mine.json").write_text(text)
    usage(longwave("train", "--model", "mine.json", "--steps", 1))


def test_missing_model_file(longwave):
    usage(longwave("train", "--model", "mine.json", "--steps", 1), "cannot read mine.json: No such file")


# Checkpoints


def test_no_checkpoint(longwave, tmp_path, corpus):
    (tmp_path / "empty").mkdir()
    usage(longwave("generate", "nowhere", "x"), "there is no folder nowhere; check the path")
    usage(longwave("generate", "state-spaces/mamba-130m-hf", "x"), "hf download state-spaces/mamba-130m-hf")
    usage(longwave("generate", "empty", "x"), "empty has no config.json")
    usage(longwave("generate", corpus, "x"), "corpus.txt is a file; name the folder")


def test_truncated_checkpoint(longwave, model):
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    failure(longwave("generate", model, "x"), "model.safetensors", "copy the file again")
    failure(longwave("inspect", model), "model.safetensors", "copy the file again")
    (model / "config.json").write_text('{"kind": "lang')
    failure(longwave("generate", model, "x"), "config.json", "copy the file again")


def test_newest_checkpoint_damaged(longwave, corpus):
    """The one before it is taken."""
    words = ["train", "--text", corpus, *STEP[:4], "--steps", 2, "--checkpoint-every", 1, "--out", "run"]
    assert longwave(*words, "--task.seq-len", 32, "--sample-tokens", 0).status == 0
    newest = "run/checkpoints/step-00000002/model.safetensors"
    with open(newest, "r+b") as file:
        file.truncate(100)
    assert longwave("generate", "run", "x", "--max-tokens", 1).status == 0


def test_foreign_checkpoint(longwave, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": 8}')
    usage(longwave("generate", tmp_path, "x"), "'llama' are not supported")
    (tmp_path / "config.json").write_text('{"name": "my project", "version": 3}')
    usage(longwave("inspect", tmp_path), "of no format known here (its keys: name, version)")


def test_checkpoint_of_another_shape(longwave, model):
    settings = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(settings | {"d_model": 32}))
    failure(longwave("generate", model, "x"), "does not fit its model", "embedding.weight: expected [257, 32]")


class Evil:
    def __reduce__(self):
        return (os.mkdir, ("unpickled",))


def test_foreign_pickle_is_not_run(longwave, tmp_path, model):
    assert longwave("export", model, "theirs", "--format", "state_spaces").status == 0
    weights = tmp_path / "theirs" / "pytorch_model.bin"
    torch.save({"weight": torch.zeros(1), "evil": Evil()}, weights)
    failure(longwave("generate", "theirs", "x"), "pytorch_model.bin", "longwave does not unpickle")
    weights.write_bytes(pickle.dumps(Evil()))
    failure(longwave("import", "theirs", "mine"), "pytorch_model.bin", "longwave does not unpickle")
    with zipfile.ZipFile(weights, "w") as file:
        file.writestr("readme.txt", "no checkpoint")
    failure(longwave("generate", "theirs", "x"), "pytorch_model.bin")
    assert not (tmp_path / "unpickled").exists()
    assert not (tmp_path / "mine").exists()


# Tokenizers


def test_missing_tokenizer(longwave, model):
    (model / "tokenizer.json").unlink()
    usage(longwave("generate", model, "a text"), "came without a tokenizer", "'a text'", "tokenizer.json")


def test_tokenizer_that_does_not_match(longwave, model, tmp_path, corpus):
    from longwave.tasks.tokenizer import train_bpe

    train_bpe([corpus.read_text()], 270).save(model)
    usage(longwave("generate", model, "x"), "270 tokens and the model 257", "do not belong together")
    usage(longwave("train", *STEP, "--task.tokenizer", "nowhere.json"), "there is no tokenizer 'nowhere.json'")
    usage(longwave("train", *STEP, "--task.tokenizer", corpus), "corpus.txt is not a file of the tokenizers library")
    usage(longwave("train", *STEP, "--task.tokenizer", tmp_path), "no tokenizer.json")


def test_broken_tokenizer(longwave, model):
    (model / "tokenizer_config.json").unlink()
    (model / "tokenizer.json").write_text('{"model": ')
    usage(longwave("generate", model, "x"), "tokenizer.json is not a file of the tokenizers library")


# Prompts and states


def test_prompt_that_is_no_text(longwave, trained):
    usage(longwave("generate", trained, stdin=b"\x7fELF\xd0\0"), "standard input is no UTF-8 text", "convert it")


def test_state_files(longwave, trained, model, tmp_path, corpus):
    words = ("generate", trained, "x", "--max-tokens", 1)
    longwave(*words, "--state-out", "a.state")
    failure(longwave(*words, "--state-in", "none.state"), "cannot read none.state", "there is no such file")
    failure(longwave(*words, "--state-in", corpus), "cannot read", "corpus.txt")
    failure(longwave(*words, "--state-in", model / "model.safetensors"), "holds no state")
    usage(longwave("inspect", model / "model.safetensors"), "holds no state")
    usage(longwave("generate", trained, "--state-in", "a.state"), "--state-in needs something to go on with")
    data = (tmp_path / "a.state").read_bytes()
    (tmp_path / "a.state").write_bytes(data[:-8])
    failure(longwave(*words, "--state-in", "a.state"), "a.state", "copy the file again")
    failure(longwave("inspect", "a.state"), "a.state", "copy the file again")


def test_state_of_another_model(longwave, trained, corpus):
    longwave("train", "--text", corpus, *STEP, "--task.seq-len", 32, "--sample-tokens", 0, "--out", "other")
    assert longwave("generate", "other", "x", "--max-tokens", 1, "--state-out", "other.state").status == 0
    done = longwave("generate", trained, "x", "--state-in", "other.state")
    failure(done, "the state of another model: 1 mamba, d_model 16", "this one is 2 mamba, d_model 16")


# Disks


@pytest.fixture
def full_disk(monkeypatch):
    def refuse(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", refuse)  # where a file system that allocates late says so
        yield


@pytest.fixture
def small_files():
    """No file may grow beyond 4 KB: a write that the system itself refuses."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_full_disk_keeps_the_old_state(longwave, trained, tmp_path, request):
    words = ("generate", trained, "x", "--max-tokens", 1, "--json", "--state-out", "a.state")
    longwave(*words)
    before = (tmp_path / "a.state").read_bytes()
    request.getfixturevalue("full_disk")
    done = longwave(*words)
    failure(done, "cannot write a.state: [Errno 28] No space left on device", "its disk has room")
    assert (tmp_path / "a.state").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["a.state"]


def test_files_that_cannot_grow(longwave, trained, corpus, small_files, tmp_path):
    failure(longwave("generate", trained, "x", "--max-tokens", 1, "--state-out", "a.state"), "cannot write a.state")
    failure(longwave("import", trained, "mine"), "model.safetensors", "File too large")
    done = longwave("train", "--text", corpus, *STEP, "--bpe", 270, "--out", "run")
    failure(done, "cannot write run/bpe-270/tokenizer.json", "File too large")
    assert list(tmp_path.rglob("*.state")) == list(tmp_path.rglob("tokenizer.json")) == []
    assert list(tmp_path.rglob("*.safetensors")) == []


def test_full_disk_keeps_the_old_checkpoint(longwave, corpus, monkeypatch):
    words = ["train", "--text", corpus, *STEP[:4], "--task.seq-len", 32, "--sample-tokens", 0, "--out", "run"]
    assert longwave(*words, "--steps", 1).status == 0

    def refuse(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr("longwave.training.checkpoint._sync", refuse)
        done = longwave(*words, "--steps", 2, "--resume", "auto")
    assert done.status == 1
    last = done.err.splitlines()[-1]
    assert last.startswith("longwave: the disk that holds run is full; run/checkpoints/step-00000001 is intact")
    assert load("run").complete("x", max_tokens=1).tokens
    assert longwave(*words, "--steps", 2, "--resume", "auto").status == 0


# Runs


def test_a_run_is_not_overwritten(longwave, corpus, trained):
    words = ("train", "--text", corpus, *STEP, "--out", trained)
    usage(longwave(*words), "already holds a run, up to step-00000002", "--resume auto")
    before = sorted(trained.rglob("*"))
    usage(longwave("demo", "--out", trained), "holds a run of another model than the demo's; name another --out")
    usage(longwave(*words, "--bpe", 300), "already holds a run")
    assert [path for path in sorted(trained.rglob("*")) if "bpe" not in str(path)] == before


def test_what_is_read_is_not_replaced(longwave, model, trained):
    usage(longwave("export", model, model, "--format", "mamba"), "would be replaced; name another folder")
    usage(longwave("import", trained, trained / "checkpoints" / "step-00000002"), "would be replaced")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler

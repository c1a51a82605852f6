"""One small run, trained once by the command itself, and a way to call the command in this process."""

import io
import random
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from longwave.cli import run


class Done(NamedTuple):
    status: int
    out: str
    err: str

    @property
    def complaint(self) -> str:
        """The only line on standard error."""
        (line,) = self.err.splitlines()
        assert line.startswith("longwave: ")
        return line.removeprefix("longwave: ")


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch, caches):
    """Each test runs in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LONGWAVE_CACHE", str(caches))
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def caches(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def longwave(capfd, monkeypatch) -> Callable[..., Done]:
    """longwave("train", ..., stdin=b""): run the command line here."""

    def call(*arguments: object, stdin: bytes = b"") -> Done:
        capfd.readouterr()
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        status = run([str(argument) for argument in arguments])
        return Done(status, *capfd.readouterr())

    return call


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "corpus.txt"
    draw = random.Random(0)
    path.write_text(
        " ".join(draw.choice(["state", "space", "scan", "gate", "chunk", "wave", "long"]) for _ in range(2000))
    )
    return path


@pytest.fixture(scope="session")
def trained(tmp_path_factory, corpus, caches) -> Path:
    """The folder of a run of two steps: mamba, 16 channels, bytes."""
    out = tmp_path_factory.mktemp("runs") / "trained"
    words = ["train", "--text", str(corpus), "--model", "mamba*2", "--d-model", "16", "--steps", "2", "--device", "cpu"]
    words += ["--batch-size", "2", "--task.seq-len", "32", "--sample-tokens", "4"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LONGWAVE_CACHE", str(caches))
        assert run([*words, "--out", str(out)]) == 0
    return out


@pytest.fixture
def model(trained, tmp_path) -> Path:
    """A model folder of one's own, to spoil."""
    from longwave.hub.load import load

    load(trained).save(tmp_path / "model")
    return tmp_path / "model"

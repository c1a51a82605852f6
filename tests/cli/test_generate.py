"""`longwave generate`: what is printed, what is kept, and what happens when it is stopped."""

import json
import math
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import longwave as lw
from longwave.generate.text_model import Stream
from longwave.models.language_model import LanguageModel
from longwave.models.state import State

DRAW = ("--seed", 3, "--max-tokens", 12)


@pytest.fixture(scope="module")
def loaded(trained):
    return lw.load(trained)


def signal_at(piece: int, monkeypatch) -> None:
    """Let Ctrl-C arrive while that piece is being drawn."""
    before, drawn = Stream.__next__, []

    def draw(stream):
        drawn.append(stream)
        if len(drawn) == piece:
            signal.raise_signal(signal.SIGINT)
        return before(stream)

    monkeypatch.setattr(Stream, "__next__", draw)


def test_text_is_that_of_the_library(longwave, trained, loaded):
    done = longwave("generate", trained, "state ", *DRAW, "--temperature", 0.8, "--top-k", 40)
    assert done.status == 0
    assert done.out == loaded.complete("state ", seed=3, max_tokens=12, temperature=0.8, top_k=40).text + "\n"


def test_json(longwave, trained, loaded):
    done = json.loads(longwave("generate", trained, "state ", *DRAW, "--json").out)
    expected = loaded.complete("state ", seed=3, max_tokens=12)
    assert done == {
        "text": expected.text,
        "tokens": expected.tokens,
        "logprobs": expected.logprobs,
        "finish_reason": "length",
    }


def test_logprobs(longwave, trained, loaded):
    rows = longwave("generate", trained, "state ", *DRAW, "--logprobs").out.splitlines()
    expected = loaded.complete("state ", seed=3, max_tokens=12)
    assert [int(row.split()[1]) for row in rows] == expected.tokens
    assert all(
        math.isclose(float(row.split()[0]), p, abs_tol=1e-4) for row, p in zip(rows, expected.logprobs, strict=True)
    )


def test_prompt_from_standard_input(longwave, trained):
    argument = longwave("generate", trained, "é\nstate", *DRAW)
    assert longwave("generate", trained, *DRAW, stdin="é\nstate".encode()) == argument


def test_stop_takes_line_ends_and_leaves_other_backslashes(longwave, trained, monkeypatch):
    stops = []
    monkeypatch.setattr("longwave.generate.text_model.Transcript", lambda _, stop, n: stops.append(stop) or 1 / 0)
    longwave("generate", trained, "x", "--stop", "\\n\\t", "--stop", "C:\\users")
    assert stops == [["\n\t", "C:\\users"]]


def test_state_is_carried_over(longwave, trained, loaded):
    first = longwave("generate", trained, "state ", *DRAW, "--state-out", "a.state", "--json")
    second = longwave("generate", trained, " and", "--state-in", "a.state", *DRAW, "--state-out", "a.state", "--json")
    tokens = json.loads(first.out)["tokens"]
    expected = loaded.complete([*b"state ", *tokens, *b" and"], seed=3, max_tokens=12)
    assert json.loads(second.out)["tokens"] == expected.tokens
    assert State.load("a.state", loaded.model).position.item() == expected.state.position.item()


def test_ctrl_c_between_tokens_keeps_the_state(longwave, trained, loaded, monkeypatch):
    whole = json.loads(longwave("generate", trained, "state ", *DRAW, "--json").out)["tokens"]
    with monkeypatch.context() as patch:
        signal_at(5, patch)
        done = longwave("generate", trained, "state ", *DRAW, "--json", "--state-out", "a.state")
    assert done.status == 130
    assert done.complaint == "stopped after 5 tokens; go on with --state-in a.state"
    assert json.loads(done.out)["tokens"] == whole[:5]
    assert json.loads(done.out)["finish_reason"] is None
    assert State.load("a.state", loaded.model).position.item() == len("state ") + 5
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_while_the_prompt_is_read_leaves_the_old_state(longwave, trained, monkeypatch):
    longwave("generate", trained, "state ", *DRAW, "--state-out", "a.state")
    before = Path("a.state").read_bytes()
    monkeypatch.setattr(LanguageModel, "hidden", lambda *_, **__: signal.raise_signal(signal.SIGINT))
    done = longwave("generate", trained, " and", "--state-in", "a.state", "--state-out", "a.state")
    assert (done.status, done.complaint) == (130, "stopped")
    assert Path("a.state").read_bytes() == before


def test_a_reader_that_goes_away_keeps_the_state(trained, tmp_path, loaded):
    command = [sys.executable, "-m", "longwave", "generate", trained, "state ", "--max-tokens", "1000000"]
    command += ["--state-out", "a.state", "--temperature", "0", "--device", "cpu"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.read(1)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(60) == 141
    process.stderr.close()
    assert State.load(tmp_path / "a.state", loaded.model).position.item() > len("state ")


def test_a_prompt_of_200_000_tokens_is_read_in_chunks(longwave, trained, loaded, monkeypatch):
    """Neither what is held at once nor the state grows with it."""
    lengths, before = [], LanguageModel.hidden

    def hidden(model, tokens, *arguments, **options):
        lengths.append(tokens.shape[1])
        return before(model, tokens, *arguments, **options)

    monkeypatch.setattr(LanguageModel, "hidden", hidden)
    done = longwave("generate", trained, "--max-tokens", 1, "--state-out", "a.state", stdin=b"long wave " * 20_000)
    assert done.status == 0
    assert sum(lengths) == 200_000
    assert max(lengths) == 512
    state = State.load("a.state", loaded.model)
    assert state.position.item() == 200_001
    assert state.nbytes == loaded.model.state_bytes(1)

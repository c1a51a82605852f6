"""Every example runs at toy size."""

import subprocess
import sys
from pathlib import Path

import pytest

import longwave
from longwave.generate.text_model import TextModel
from longwave.mixers import Mamba
from longwave.tasks.tokenizer import ByteTokenizer

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, EXAMPLES / name, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    config = longwave.LanguageModel.Config(vocab_size=257, d_model=16, layers=(Mamba.Config(d_state=4),))
    folder = tmp_path_factory.mktemp("model")
    TextModel(longwave.LanguageModel(config), ByteTokenizer()).save(folder)
    return folder


def test_adding_problem():
    assert "step 3: mean squared error" in run("adding_problem.py", "--steps", "3", "--length", "20")


def test_fork_a_state(folder):
    told = run("fork_a_state.py", str(folder), str(EXAMPLES / "fork_a_state.py"))
    assert "the state takes" in told
    assert told.count("\n0: ") == told.count("\n2: ") == 1


@pytest.mark.parametrize("times", [(), ("--no-times",)])
def test_irregular_series(times):
    assert "step 3: mean squared error" in run("irregular_series.py", "--steps", "3", "--length", "20", *times)


def test_all_are_tested():
    here = Path(__file__).read_text(encoding="utf-8")
    assert all(f'"{path.name}"' in here for path in EXAMPLES.glob("*.py"))

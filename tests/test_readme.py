"""Every block of the README runs, in order, in one folder. Lengths in minutes become two steps."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README.read_text(encoding="utf-8"), re.M | re.S)
PYTHON = [body for language, body in BLOCKS if language == "python"]
COMMANDS = [
    line.partition("#")[0].strip()
    for language, body in BLOCKS
    if not language
    for line in body.splitlines()
    if line.startswith("longwave ")
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("readme")
    shutil.copy(README, folder)
    return folder


def run(arguments: list[str], folder: Path) -> None:
    done = subprocess.run(arguments, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_there_are_blocks():
    assert len(PYTHON) >= 4
    assert len(COMMANDS) >= 6


def test_python_blocks(folder):
    for block in PYTHON:
        run([sys.executable, "-c", block], folder)


def test_commands(folder):
    for command in COMMANDS:
        words = shlex.split(re.sub(r"--minutes \S+", "--steps 2 --batch-size 1 --task.seq-len 32", command))
        run([sys.executable, "-m", *words], folder)


def test_links_lead_somewhere():
    for link in re.findall(r"\]\(([^)#]+)\)", README.read_text(encoding="utf-8")):
        assert link.startswith("https://") or (README.parent / link).exists(), link

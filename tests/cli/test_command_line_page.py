"""docs/command-line.md: its commands can be typed, its model can be built, and it leaves no verb out."""

import importlib
import json
import re
import shlex
from pathlib import Path

import pytest
import torch

from longwave.cli import VERBS
from longwave.models.language_model import LanguageModel

PAGE = (Path(__file__).parents[2] / "docs" / "command-line.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^longwave (.*)$", PAGE, re.M)


def test_there_are_commands():
    assert len(COMMANDS) >= 7
    assert {line.split()[0] for line in COMMANDS} == {"train", "generate"}


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_can_be_typed(line):
    verb, *words = shlex.split(line.partition(" < ")[0])
    app = importlib.import_module(f"longwave.cli.{verb}").app
    _, bound, unused = app.parse_args(words, exit_on_error=False, print_error=False)
    assert not unused
    if "--" in words:
        assert bound.arguments["prompt"] == words[-1]


def test_model_can_be_built():
    (block,) = re.findall(r"```json\n(.*?)```", PAGE, re.S)
    model = LanguageModel(LanguageModel.Config.from_dict(json.loads(block)))
    assert model(torch.zeros(1, 5, dtype=torch.long))[0].shape == (1, 5, 257)


def test_widths_are_as_told(longwave, corpus):
    words = ["train", "--text", corpus, "--steps", 1, "--batch-size", 1, "--task.seq-len", 16, "--dry-run"]
    assert longwave(*words, "--model", "mamba2", "--d-model", 32).status == 0
    assert longwave(*words, "--model", "mamba2 attention", "--d-model", 64).status == 0
    assert longwave(*words, "--model", "mamba2 attention", "--d-model", 96).status == 2


def test_every_verb_is_there():
    assert all(f"`{verb}`" in PAGE for verb in VERBS)

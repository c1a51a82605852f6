import sys

import pytest
import torch

from longwave.training.environment import command, environment, how_to_resume


@pytest.mark.parametrize("program", ["/home/me/.venv/bin/longwave", "/usr/lib/longwave/__main__.py", "longwave.exe"])
@pytest.mark.parametrize("resume", [[], ["--resume", "auto"], ["--resume=runs/x"]])
def test_the_command_of_a_run(monkeypatch, program, resume):
    monkeypatch.setattr(sys, "argv", [program, "train", "--text", "my notes", *resume, "--steps", "5"])
    assert command() == "longwave train --text 'my notes' --steps 5"
    assert how_to_resume() == "longwave train --text 'my notes' --steps 5 --resume auto"


def test_a_program_of_ones_own(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["fit.py", "8"])
    assert command() == "python fit.py 8"
    assert how_to_resume() == 'the same configuration and resume="auto"'


def test_environment_names_versions_and_hardware():
    found = environment(torch.device("cpu"))
    assert found["torch"] == torch.__version__
    assert found["threads"].startswith(f"{torch.get_num_threads()} of")
    assert all(isinstance(value, str) and value for value in found.values())

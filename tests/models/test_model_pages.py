"""Pages about models: their blocks run, one after the other, and print what they say."""

import contextlib
import io
import re
from pathlib import Path

import pytest
import torch

DOCS = Path(__file__).parents[2] / "docs"


@pytest.mark.parametrize("page", ["heads.md", "sashimi.md", "choosing-a-mixer.md"])
def test_every_block_prints_what_it_says(page):
    torch.set_num_threads(1)
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL)
    names: dict = {}
    for block in blocks:
        beside = re.findall(r"^print\(.*\)  +# (.*)$", block, re.MULTILINE)
        said = beside + re.findall(r"^# (.*)$", block, re.MULTILINE)
        assert said
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile(block, page, "exec"), names)
        assert printed.getvalue().splitlines() == said

"""docs/mixers: a page for each mixer, whose example runs and prints what it says."""

import contextlib
import io
import re
from pathlib import Path

import pytest

from longwave.mixers import CALLERS, CHANNELS, ENCODERS, MIXERS

PAGES = Path(__file__).parents[2] / "docs" / "mixers"
LAYERS = MIXERS | CHANNELS | ENCODERS | CALLERS


def test_every_mixer_has_a_page():
    assert {page.stem for page in PAGES.glob("*.md")} == {*LAYERS, "README"}


def test_every_mixer_has_a_row_in_the_tables():
    rows = re.findall(r"^\| \[(\w+)\]\(\1\.md\) \| `(\w+)` \|", (PAGES / "README.md").read_text(), re.M)
    assert dict(rows) == {kind: layer.__name__ for kind, layer in LAYERS.items()}
    rows = re.findall(r"^\| (`\w+`.*?) \| (`\w+`.*?) \|", (PAGES.parents[1] / "README.md").read_text(), re.M)
    found = [pair for row in rows for pair in zip(*(re.findall(r"`(\w+)`", cell) for cell in row), strict=True)]
    assert sorted((kind, name) for name, kind in found) == sorted(
        (kind, layer.__name__) for kind, layer in LAYERS.items()
    )


@pytest.mark.parametrize("kind", LAYERS)
def test_the_example_prints_what_it_says(kind):
    (example,) = re.findall(r"```python\n(.*?)```", (PAGES / f"{kind}.md").read_text(), re.DOTALL)
    said = re.findall(r"^print\(.*\)  +# (.*)$", example, re.MULTILINE)
    assert len(said) >= 2
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(example, f"{kind}.md", "exec"), {})
    assert printed.getvalue().splitlines() == said

import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "text.md"


def test_every_block_of_the_page_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 4
    names: dict = {}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    said = capsys.readouterr().out
    assert "torch.Size([8, 256])" in said
    bits = float(re.search(r"([\d.]+) bits per byte", said)[1])
    assert 0 < bits < 8

import re
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "training.md"


def test_every_block_of_the_page_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 3
    names: dict = {}
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    assert (tmp_path / "runs/hello/report.html").exists()
    steps = sorted(folder.name for folder in (tmp_path / "runs/hello/checkpoints").iterdir())
    assert steps == ["step-00000006", "step-00000008"]
    assert re.search(r"^parameters +\d", capsys.readouterr().out, re.MULTILINE)

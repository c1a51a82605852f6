"""The run's log: one JSON object a line, in <out>/log.jsonl."""

import json
import math
from pathlib import Path
from typing import Any, TextIO

from longwave.models.saving import write_text


def read_log(out: str | Path) -> list[dict[str, Any]]:
    """All whole lines of a run's log. A last line that a killed process left unfinished is passed over."""
    path = Path(out) / "log.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [entry for line in lines if (entry := _parse(line)) is not None]


class Log:
    """Appends entries. Opened at a step, it first drops what an earlier process wrote after that step's checkpoint."""

    def __init__(self, out: str | Path, step: int):
        path = Path(out) / "log.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [entry for entry in read_log(out) if entry["step"] <= step] if step else []
        write_text(path, "".join(json.dumps(entry) + "\n" for entry in kept))
        self._file: TextIO = path.open("a", encoding="utf-8")

    def __enter__(self) -> "Log":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, event: str, step: int, **values: Any) -> None:
        """One line: what happened (start, step, eval, sample, checkpoint), after how many steps, and its numbers."""
        self._file.write(json.dumps(_strict({"event": event, "step": step, **values}), allow_nan=False) + "\n")
        self._file.flush()


def _strict(value: Any) -> Any:
    """Infinity, which a setting may hold and JSON has no word for, as text."""
    if isinstance(value, dict):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _parse(line: str) -> dict[str, Any] | None:
    try:
        return json.loads(line)
    except ValueError:
        return None

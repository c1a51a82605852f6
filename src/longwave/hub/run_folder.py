"""A training run's folder: <out>/checkpoints/step-*, each a model folder with a trainer.json beside the weights."""

import json
from pathlib import Path


def complete_checkpoints(out: str | Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first; none if `out` is no run's folder."""
    return [folder for folder in sorted((Path(out) / "checkpoints").glob("step-*")) if is_complete(folder)]


def is_complete(folder: Path) -> bool:
    """True for a checkpoint whose files all have the sizes that were written down when it was saved."""
    try:
        sizes = json.loads((folder / "trainer.json").read_text(encoding="utf-8"))["files"]
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return False

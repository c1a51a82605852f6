"""What a model is trained to do: data, targets and what a result is measured in. One file per task."""

from longwave.tasks.text import Text

TASKS: dict[str, type] = {"text": Text}

__all__ = ["TASKS", "Text"]

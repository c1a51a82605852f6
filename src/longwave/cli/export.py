"""`longwave export`: a model in somebody else's format."""

from pathlib import Path

from longwave.cli.options import make_app
from longwave.hub.export import export as write
from longwave.hub.load import load

app = make_app(
    "export",
    ("longwave export runs/notes hf/ --format mamba2", "longwave export mine/ official/ --format state_spaces"),
)


@app.default
def export(model: str, target: Path, *, format: str) -> None:
    """Write a model so that another library loads it.

    Parameters
    ----------
    model
        Folder of a model or of a training run.
    target
        Folder to write.
    format
        mamba, mamba2 or falcon_mamba (transformers), or state_spaces (mamba_ssm).
    """
    write(load(model), target, format)
    print(f"{target}: written as {format}")

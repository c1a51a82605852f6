"""`longwave export`: a model in somebody else's format."""

from pathlib import Path
from typing import Literal

from longwave.cli.options import check_target, make_app, print_json
from longwave.hub.export import export as write
from longwave.hub.load import load

app = make_app(
    "export",
    (
        "longwave export runs/notes hf/ --format mamba2",
        "longwave export mine/ official/ --format state_spaces --dtype float16",
    ),
)


@app.default
def export(
    model: str,
    target: Path,
    *,
    format: str,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    json: bool = False,
) -> None:
    """Write a model so that another library loads it.

    Parameters
    ----------
    model
        Folder of a model or of a training run.
    target
        Folder to write.
    format
        mamba, mamba2 or falcon_mamba (transformers), or state_spaces (mamba_ssm).
    dtype
        Precision to store; else that of the model.
    json
        End with one line of JSON.
    """
    check_target(model, target)
    write(load(model, dtype=dtype), target, format)
    if json:
        print_json({"folder": str(target), "format": format})
    else:
        print(f"{target}: written as {format}")

"""`longwave import`: somebody else's checkpoint to a longwave folder."""

from pathlib import Path
from typing import Literal

from longwave.cli.inspect import pattern
from longwave.cli.options import make_app
from longwave.hub.load import load

app = make_app(
    "import",
    ("longwave import mamba-130m-hf/ mine/", "longwave import mamba2-2.7b/ mine/ --dtype bfloat16"),
)


@app.default
def import_(source: str, target: Path, *, dtype: Literal["float32", "bfloat16", "float16"] | None = None) -> None:
    """Read a checkpoint of another library and write it as a longwave folder: configuration, weights, tokenizer.

    Parameters
    ----------
    source
        Folder with config.json and safetensors or pytorch_model.bin (mamba, mamba2, falcon_mamba; state-spaces' own).
    target
        Folder to write.
    dtype
        Precision to store; by default that of the source.
    """
    model = load(source, dtype=dtype)
    model.save(target)
    print(f"{target}: {pattern(model.model.config)}, {model.model.parameter_count():,} parameters")
    if model.tokenizer is None:
        print("the source has no tokenizer.json: put one into the folder to use text")

"""`longwave import`: somebody else's checkpoint to a longwave folder."""

from pathlib import Path
from typing import Literal

from longwave.cli.options import check_target, make_app, print_json
from longwave.errors import UsageError
from longwave.generate.text_model import TextModel
from longwave.hub.load import load
from longwave.models.pattern import pattern_of
from longwave.tasks.tokenizer import load_tokenizer

app = make_app(
    "import",
    (
        "longwave import mamba-130m-hf/ mine/",
        "longwave import mamba2-2.7b/ mine/ --tokenizer gpt-neox/ --dtype bfloat16",
    ),
)


@app.default
def import_(
    source: str,
    target: Path,
    *,
    tokenizer: str | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    json: bool = False,
) -> None:
    """Read a checkpoint of another library and write it as a longwave folder: configuration, weights, tokenizer.

    Parameters
    ----------
    source
        Folder with config.json and safetensors or pytorch_model.bin (mamba, mamba2, falcon_mamba; state-spaces' own).
    target
        Folder to write.
    tokenizer
        A tokenizer.json, a folder with one, or bytes; else that of the source, if it has one.
    dtype
        Precision to store; else that of the source.
    json
        End with one line of JSON.
    """
    check_target(source, target)
    model = load(source, dtype=dtype)
    if tokenizer:
        own = load_tokenizer(tokenizer)
        if own is None:
            raise UsageError(f"the folder {tokenizer} has no tokenizer.json; name one that has")
        model = TextModel(model.model, own)
    model.save(target)
    layers, parameters = pattern_of(model.model.config.layers), model.model.parameter_count()
    if json:
        has_tokenizer = model.tokenizer is not None
        print_json({"folder": str(target), "layers": layers, "parameters": parameters, "tokenizer": has_tokenizer})
        return
    print(f"{target}: {layers}, {parameters:,} parameters")
    if model.tokenizer is None:
        print("the source has no tokenizer.json; import it with --tokenizer to use text")

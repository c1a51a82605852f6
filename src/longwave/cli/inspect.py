"""`longwave inspect`: a model's layers, parameters, FLOPs and state size, without running it; or a state's file."""

import json as jsonlib
import math
from pathlib import Path
from typing import Annotated, Literal

import torch
from cyclopts import Parameter

from longwave.cli.options import make_app, print_json
from longwave.config import nearest, to_dict
from longwave.errors import UsageError
from longwave.hub.folder import find_folder, open_weights
from longwave.hub.load import DTYPES, model_config
from longwave.models import kinds
from longwave.models.pattern import pattern_of
from longwave.models.presets import PRESETS
from longwave.models.saving import open_safetensors
from longwave.models.token_model import TokenModel

app = make_app(
    "inspect",
    ("longwave inspect mamba2-130m --dtype bfloat16", "longwave inspect runs/notes --length 4096 131072"),
    (f"Presets: {', '.join(PRESETS)}.",),
)


@app.default
def inspect(
    model: str,
    *,
    length: Annotated[tuple[int, ...], Parameter(consume_multiple=True)] = (1024, 16384, 262144),
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    json: bool = False,
) -> None:
    """Show the pattern of layers, parameters, forward FLOPs and state bytes; or what a state's file has seen.

    Parameters
    ----------
    model
        A preset; a folder of a model, of a training run, or of a checkpoint of another library; or a state's file.
    length
        Tokens seen, for FLOPs and state size.
    dtype
        Count bytes in this precision; else in that of the weights.
    json
        One line of JSON.
    """
    if Path(model).is_file():
        _inspect_state(Path(model), json)
        return
    if wrong := [n for n in length if n < 1]:
        raise UsageError(f"--length must be at least 1, got {wrong[0]}")
    config, stored = _find(model)
    with torch.device("meta"):
        empty = kinds.build(config).to(DTYPES[dtype] if dtype else stored)
    described = describe(empty, length)
    if json:
        print_json(described | {"config": to_dict(config)})
        return
    weights = f"{described['weight_bytes'] / 2**20:,.1f} MiB in {described['dtype']}"
    print(f"{model}: {described['layers']}")
    print(f"d_model {config.d_model}, vocabulary {config.vocab_size:,}")
    active = described["active_parameters"]
    active = f" ({active:,} work on a token)" if active < described["parameters"] else ""
    print(f"{described['parameters']:,} parameters{active}, {weights}\n")
    print(f"{'tokens':>10}  {'forward GFLOPs':>14}  {'state MiB':>10}")
    for row in described["lengths"]:
        print(f"{row['length']:>10,}  {row['flops'] / 1e9:>14,.1f}  {row['state_bytes'] / 2**20:>10,.2f}")


def describe(model: TokenModel, lengths: tuple[int, ...]) -> dict:
    """What `inspect` shows, as plain values. FLOPs and state bytes are of one sequence."""
    return {
        "layers": pattern_of(model.config.layers),
        "parameters": model.parameter_count(),
        "active_parameters": model.active_parameter_count(),
        "weight_bytes": sum(parameter.nbytes for parameter in model.parameters()),
        "dtype": str(model.embedding.weight.dtype).removeprefix("torch."),
        "lengths": [{"length": n, "flops": model.flops(n), "state_bytes": model.state_bytes(n)} for n in lengths],
    }


def _find(model: str) -> tuple[kinds.TokenModelConfig, torch.dtype]:
    """The configuration, and the dtype that the largest of the stored tensors has."""
    if model in PRESETS and not Path(model).exists():
        return PRESETS[model](), torch.float32
    if not Path(model).exists() and "/" not in model:
        raise UsageError(f"there is no preset or folder {model!r}.{nearest(model, PRESETS)}")
    config = model_config(model)
    largest = max(open_weights(find_folder(model)).values(), key=lambda tensor: math.prod(tensor.shape))
    return config, largest.read().dtype


def _inspect_state(path: Path, json: bool) -> None:
    tensors, header = open_safetensors(path)
    if header.get("longwave") != "state":
        raise UsageError(f"{path} holds no state; give a file of --state-out, or the folder of a model")
    described = {
        "model": header["fingerprint"],
        "tokens": jsonlib.loads(header["counters"])["position"],
        "bytes": sum(tensor.read().nbytes for tensor in tensors.values()),
    }
    if json:
        print_json(described)
        return
    seen = ", ".join(f"{n:,}" for n in described["tokens"])
    print(f"{path}: the state of {described['model']}\nafter {seen} tokens, {described['bytes']:,} bytes")

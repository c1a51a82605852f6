"""`longwave inspect`: a model's layers, parameters, FLOPs and state size, without running it."""

import itertools
from pathlib import Path

import torch

from longwave.cli.options import make_app, print_json
from longwave.config import nearest, to_dict
from longwave.errors import UsageError
from longwave.hub.load import load
from longwave.models.language_model import LanguageModel
from longwave.models.presets import PRESETS

app = make_app("inspect", ("longwave inspect mamba2-130m", "longwave inspect runs/notes --length 4096 --length 131072"))


@app.default
def inspect(model: str, *, length: tuple[int, ...] = (1024, 16384, 262144), json: bool = False) -> None:
    """Show the pattern of layers, parameters, forward FLOPs and state bytes.

    Parameters
    ----------
    model
        A preset, or a folder of a model, of a training run, or of a checkpoint of another library.
    length
        Tokens seen, for FLOPs and state size; may be given several times.
    json
        One line of JSON.
    """
    found = _load(model)
    described = describe(found, length)
    if json:
        print_json(described | {"config": to_dict(found.config)})
        return
    print(f"{model}: {described['layers']}")
    print(f"vocabulary {found.config.vocab_size:,}, d_model {found.config.d_model}, weights {described['dtype']}")
    print(f"parameters {described['parameters']:,}\n")
    print(f"{'tokens':>10}  {'forward GFLOPs':>14}  {'state MiB':>10}")
    for row in described["lengths"]:
        print(f"{row['length']:>10,}  {row['flops'] / 1e9:>14,.1f}  {row['state_bytes'] / 2**20:>10,.2f}")


def describe(model: LanguageModel, lengths: tuple[int, ...]) -> dict:
    """What `inspect` shows, as plain values. FLOPs and bytes are of one sequence."""
    return {
        "layers": pattern(model.config),
        "parameters": model.parameter_count(),
        "dtype": str(model.embedding.weight.dtype).removeprefix("torch."),
        "lengths": [{"length": n, "flops": model.flops(n), "state_bytes": model.state_bytes(n)} for n in lengths],
    }


def pattern(config: LanguageModel.Config) -> str:
    """The layers in order, repeats counted: '3 mamba2, 1 attention, 3 mamba2'."""
    return ", ".join(
        f"{len(list(run))} {kind}" for kind, run in itertools.groupby(layer.kind for layer in config.layers)
    )


def _load(model: str) -> LanguageModel:
    if model in PRESETS and not Path(model).exists():
        with torch.device("meta"):
            return LanguageModel(PRESETS[model]())
    if not Path(model).exists() and "/" not in model:
        raise UsageError(f"there is no preset or folder {model!r}.{nearest(model, PRESETS)}")
    return load(model).model

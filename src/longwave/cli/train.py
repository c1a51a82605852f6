"""`longwave train`: a language model on your own files."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Group, Parameter

from longwave.cli.options import chosen, make_app, options_of, print_json, read_json
from longwave.config import nearest
from longwave.errors import UsageError
from longwave.hub.run_folder import complete_checkpoints
from longwave.models import kinds
from longwave.models.blocks import LAYERS
from longwave.models.language_model import LanguageModel
from longwave.models.pattern import layers_from
from longwave.models.presets import PRESETS
from longwave.tasks.documents import read_texts
from longwave.tasks.text import Text
from longwave.tasks.tokenizer import load_tokenizer, train_bpe
from longwave.training.checkpoint import read_progress
from longwave.training.config import Train
from longwave.training.dry_run import dry_run as probe
from longwave.training.loop import train as run_training

MODEL, TEXT, RUN, OPTIM = (
    Group(name, sort_key=i) for i, name in enumerate(("Model", "Text", "Run", "Optimiser and schedule"))
)
RunOptions = options_of(Train.Config, without=("model", "task"), groups={"optim": OPTIM})
TextOptions = options_of(Text.Config, without=("paths",))
DEFAULT_MODEL = "mamba2*3 attention mamba2*3"
DEFAULT_WIDTH = 256

app = make_app(
    "train",
    (
        "longwave train --text notes/ essays.jsonl --minutes 10 --out runs/notes",
        'longwave train --text src/ --model "(mamba2 mlp)*6" --d-model 384 --steps 900',
        "longwave train --text src/ --model mamba2-130m --bpe 8000 --steps 9 --dry-run",
    ),
    (f"Presets: {', '.join(PRESETS)}.", f"Layers: {', '.join(LAYERS)}."),
)


@app.default
def train(
    *,
    text: Annotated[tuple[str, ...], Parameter(consume_multiple=True, group=TEXT)] = ("stdlib",),
    bpe: Annotated[int | None, Parameter(group=TEXT)] = None,
    task: Annotated[TextOptions, Parameter(group=TEXT)] = TextOptions(),  # pyright: ignore[reportInvalidTypeForm]  # noqa: B008
    model: Annotated[str, Parameter(group=MODEL)] = DEFAULT_MODEL,
    d_model: Annotated[int | None, Parameter(group=MODEL, show_default=str(DEFAULT_WIDTH))] = None,
    run: Annotated[RunOptions, Parameter(name="*", group=RUN)] = RunOptions(),  # pyright: ignore[reportInvalidTypeForm]  # noqa: B008
    dry_run: Annotated[bool, Parameter(group=RUN)] = False,
    json: Annotated[bool, Parameter(group=RUN)] = False,
) -> None:
    """Train a language model on text: checkpoints, a log and report.html go to --out.

    Ctrl-C saves; `--resume auto` goes on where a run stopped, bit for bit.

    Parameters
    ----------
    text
        Files, folders, .jsonl files; or texts at hand: stdlib (Python's own sources), shakespeare.
    bpe
        Train a byte-pair tokenizer of this many tokens on the text and use it in place of bytes.
    model
        A preset, a config.json, or layers: "mamba2*3 attention (mamba2 swiglu)*2".
    d_model
        Width of a model given as layers.
    dry_run
        Print parameters, FLOPs, memory and an estimate of the time from three steps, and stop.
    json
        End with one line of JSON.
    """
    settings = chosen(task)
    with _tokenizer(text, settings, bpe, None if dry_run else Path(run.out)) as settings["tokenizer"]:
        config = run_config(model, d_model, Text.Config(paths=text, **settings), chosen(run))
        if dry_run:
            found = probe(config)
            print_json(vars(found)) if json else print(found)
            return
        run_training(config)
    newest = complete_checkpoints(config.out)[-1]
    if json:
        print_json({"out": config.out, "checkpoint": str(newest)} | vars(read_progress(newest)))
    else:
        print(f'model: {newest}\nreport: {config.out}/report.html\ntry: longwave generate {config.out} "..."')


def run_config(model: str, d_model: int | None, task: Text.Config, run: dict[str, Any]) -> Train.Config:
    """The training configuration of a model named on the command line."""
    return Train.Config(model=_model_config(model, d_model, task.tokenizer), task=task, **run)


def _model_config(model: str, d_model: int | None, tokenizer: str) -> kinds.TokenModelConfig | str:
    is_file = model.endswith(".json")
    if d_model is not None and (is_file or model in PRESETS):
        raise UsageError(f"--d-model {d_model} is for a model given as layers; {model} has a width of its own")
    if model in PRESETS:
        return model
    if is_file:
        return kinds.config_from(read_json(Path(model)))
    if "-" in model and " " not in model:
        raise UsageError(f"there is no preset {model!r}.{nearest(model, PRESETS)}")
    layers = layers_from(model)
    loaded = load_tokenizer(tokenizer)
    if loaded is None:
        raise UsageError(f"{tokenizer} holds no tokenizer.json; give a file, a folder with one, or bytes")
    width = DEFAULT_WIDTH if d_model is None else d_model
    return LanguageModel.Config(vocab_size=loaded.vocab_size, d_model=width, layers=layers)


@contextlib.contextmanager
def _tokenizer(
    text: tuple[str, ...], settings: dict[str, Any], vocab_size: int | None, out: Path | None
) -> Iterator[str]:
    """The tokenizer to use: as set, or trained on the text and kept in the run's folder (None: nowhere).

    That of a run that has checkpoints is taken as it is.
    """
    if vocab_size is None:
        yield settings["tokenizer"]
        return
    if settings["tokenizer"] != "bytes":
        raise UsageError(f"--bpe {vocab_size} and --task.tokenizer {settings['tokenizer']} exclude one another")
    with tempfile.TemporaryDirectory() as nowhere:
        folder = (out or Path(nowhere)) / f"bpe-{vocab_size}"
        if not (out and complete_checkpoints(out) and (folder / "tokenizer.json").exists()):
            train_bpe(read_texts(text, settings["jsonl_field"]), vocab_size).save(folder)
        yield str(folder)

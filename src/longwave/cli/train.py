"""`longwave train`: a language model on your own files."""

from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from longwave.cli.options import chosen, make_app, options_of, print_json, read_json
from longwave.config import nearest
from longwave.errors import UsageError
from longwave.hub.run_folder import complete_checkpoints
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

RunOptions = options_of(Train.Config, without=("model", "task"))
TextOptions = options_of(Text.Config, without=("paths",))
DEFAULT_MODEL = "mamba2*3 attention mamba2*3"

app = make_app(
    "train",
    (
        "longwave train --text notes/ essays.jsonl --minutes 10 --out runs/notes",
        'longwave train --text shakespeare --model "(mamba2 swiglu)*6" --d-model 384 --steps 2000 --optim.lr 2e-3',
        "longwave train --text src/ --model mamba2-130m --bpe 8000 --steps 100 --dry-run",
    ),
)


@app.default
def train(
    *,
    text: Annotated[tuple[str, ...], Parameter(consume_multiple=True)] = ("stdlib",),
    model: str = DEFAULT_MODEL,
    d_model: int = 256,
    bpe: int | None = None,
    task: TextOptions = TextOptions(),  # pyright: ignore[reportInvalidTypeForm]  # noqa: B008
    run: Annotated[RunOptions, Parameter(name="*")] = RunOptions(),  # pyright: ignore[reportInvalidTypeForm]  # noqa: B008
    dry_run: bool = False,
    json: bool = False,
) -> None:
    """Train a language model on text: checkpoints, a log and report.html go to --out.

    Ctrl-C saves; `--resume auto` goes on where a run stopped, bit for bit.

    Parameters
    ----------
    text
        Files, folders, .jsonl files; or texts at hand: stdlib (Python's own sources), shakespeare.
    model
        A preset (mamba2-130m, ...), a config.json, or layers: "mamba2*3 attention mamba2*3".
    d_model
        Width of a model given as layers.
    bpe
        Train a byte-pair tokenizer of this many tokens on the text, instead of bytes.
    dry_run
        Print parameters, FLOPs, memory and an estimate of the time from three steps, and stop.
    json
        End with one line of JSON.
    """
    settings = chosen(task)
    if bpe:
        settings["tokenizer"] = _trained_bpe(text, settings, bpe, Path(run.out))
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


def run_config(model: str, d_model: int, task: Text.Config, run: dict[str, Any]) -> Train.Config:
    """The training configuration of a model named on the command line."""
    return Train.Config(model=_model_config(model, d_model, task.tokenizer), task=task, **run)


def _model_config(model: str, d_model: int, tokenizer: str) -> LanguageModel.Config | str:
    if model in PRESETS:
        return model
    if model.endswith(".json"):
        return LanguageModel.Config.from_dict(read_json(Path(model)))
    words = model.replace("(", " ").replace(")", " ").split()
    if len(words) == 1 and "-" in model:
        raise UsageError(f"there is no preset {model!r}.{nearest(model, PRESETS)}")
    loaded = load_tokenizer(tokenizer)
    if loaded is None:
        raise UsageError(f"{tokenizer} holds no tokenizer.json; give a file, a folder with one, or bytes")
    return LanguageModel.Config(vocab_size=loaded.vocab_size, d_model=d_model, layers=layers_from(model))


def _trained_bpe(text: tuple[str, ...], settings: dict[str, Any], vocab_size: int, out: Path) -> str:
    """The folder of a tokenizer trained on the text; the one that is there already when a run is resumed."""
    folder = out / f"bpe-{vocab_size}"
    if not (folder / "tokenizer.json").exists():
        train_bpe(read_texts(text, settings["jsonl_field"]), vocab_size).save(folder)
    return str(folder)

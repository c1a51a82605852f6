"""`longwave demo`: train a small hybrid on real text for about a minute, and let it speak."""

import shutil
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from longwave.cli.options import make_app, print_json
from longwave.cli.train import run_config
from longwave.errors import UsageError
from longwave.hub.load import model_config
from longwave.hub.run_folder import complete_checkpoints
from longwave.tasks.text import Text
from longwave.training.checkpoint import read_progress
from longwave.training.config import Optim, Train
from longwave.training.job import pick_device
from longwave.training.loop import train as run_training

PROMPTS = {"stdlib": "def ", "shakespeare": "KING. "}

app = make_app("demo", ("longwave demo", "longwave demo --text shakespeare --minutes 5"))


@app.default
def demo(
    *,
    text: Annotated[tuple[str, ...], Parameter(consume_multiple=True)] = ("stdlib",),
    minutes: float = 1.0,
    out: str = "runs/demo",
    seed: int = 0,
    device: str = "auto",
    dtype: Literal["float32", "bfloat16"] = "float32",
    resume: Literal["auto"] | None = None,
    json: bool = False,
) -> None:
    """Train a byte-level hybrid (Mamba-2 and one attention layer), write checkpoint and report, and stream a sample.

    Parameters
    ----------
    text
        stdlib (the sources of the Python that runs this), shakespeare (extra `demo`), or files and folders of your own.
    minutes
        Time to train, evaluation and the first step's compilation not counted.
    out
        Folder of the run. An earlier demo there is replaced.
    seed
        Seed of the initial weights, of training and of the sample.
    device
        cpu, cuda, cuda:1, ...; auto takes the first GPU, else the CPU.
    dtype
        Precision of activations.
    resume
        auto: go on with an earlier demo that was stopped.
    json
        End with one line of JSON instead of the sample.
    """
    prompt = PROMPTS.get(text[0], "\n")
    config = run_config(
        "mamba2*2 attention mamba2*2",
        192,
        Text.Config(paths=text, seq_len=256, val_fraction=0.01),
        {
            "optim": Optim.Config(lr=4e-3, warmup=0.05, final=0.05),
            "minutes": minutes,
            "batch_size": 8,
            "out": out,
            "seed": seed,
            "device": device,
            "dtype": dtype,
            "eval_every": 0,
            "eval_tokens": 32_768,
            "checkpoint_every": 100,
            "sample_prompt": prompt,
            "resume": resume,
        },
    )
    if resume is None:
        _remove_earlier_demo(config)
    model = run_training(config)
    newest = complete_checkpoints(out)[-1]
    if json:
        print_json({"out": out, "checkpoint": str(newest)} | vars(read_progress(newest)))
        return
    print(f"\nmodel: {newest}\nreport: {out}/report.html\n\nA sample, streamed from the model:\n\n{prompt}", end="")
    for piece in model.generate(prompt, max_tokens=400, temperature=0.7, min_p=0.05, seed=seed):
        print(piece, end="", flush=True)
    print(f'\n\ngo on with: longwave generate {out} "{prompt.strip()}"')


def _remove_earlier_demo(config: Train.Config) -> None:
    """Make room for a demo that can run, where an earlier one was. Any other run stays, and is an error."""
    out = Path(config.out)
    if complete_checkpoints(out) and model_config(out) != config.model:
        raise UsageError(f"{out} holds a run of another model than the demo's; name another --out")
    pick_device(config.device)
    Text(config.task)
    for name in ("checkpoints", "log.jsonl", "report.html"):
        path = out / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)

"""Checkpoints: folders that are complete or absent, whenever the process dies.

    <out>/checkpoints/step-00000200/
        config.json  model.safetensors  tokenizer files     a model folder, as longwave.load takes it
        optimizer.safetensors                               moments, by the parameter's name
        trainer.json                                        progress, configuration, size of every file

A checkpoint is written to a hidden folder, forced to the disk and then renamed, so its name appears in one step. The
sizes in trainer.json tell a complete one from one that was damaged later. Nothing is pickled. Randomness needs no place
in it: the loop seeds torch from the step.
"""

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from longwave.config import to_dict
from longwave.errors import LongwaveError, UsageError
from longwave.generate.text_model import TextModel
from longwave.hub.run_folder import complete_checkpoints, is_complete
from longwave.models.saving import open_safetensors, write_safetensors, write_text
from longwave.training.config import Train
from longwave.training.progress import Progress

FREE_KEYS = {
    "out", "steps", "minutes", "device", "compile", "eval_every", "eval_tokens", "checkpoint_every", "keep",
    "sample_prompt", "sample_tokens", "resume",
}  # fmt: skip
"""Settings that may change when a run goes on: those that do not touch the steps, and the length, which may grow."""


def save(text_model: TextModel, optimizer: torch.optim.Optimizer, progress: Progress, config: Train.Config) -> Path:
    """Write the checkpoint of `progress.step`, delete those beyond `config.keep`, return its folder."""
    folder = _home(config.out) / f"step-{progress.step:08d}"
    draft = folder.with_name(f".{folder.name}-{os.getpid()}")
    try:
        draft.mkdir(parents=True)
        text_model.save(draft)
        write_safetensors(draft / "optimizer.safetensors", _optimizer_tensors(text_model.model, optimizer), {})
        sizes = {path.name: path.stat().st_size for path in sorted(draft.iterdir())}
        trainer = {"progress": asdict(progress), "config": to_dict(config), "files": sizes}
        write_text(draft / "trainer.json", json.dumps(trainer, indent=1))
        for path in (*draft.iterdir(), draft):
            _sync(path)
        if folder.exists():  # damaged: a complete one would have been resumed from
            shutil.rmtree(folder)
        draft.rename(folder)
        _sync(folder.parent)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    _delete_old(config.out, config.keep)
    return folder


def find(config: Train.Config) -> Path | None:
    """The checkpoint that `config.resume` means, None to begin afresh. UsageError where that loses a run."""
    present = complete_checkpoints(config.out)
    if config.resume is None:
        if present:
            raise UsageError(
                f"{config.out} already holds a run, up to {present[-1].name}: "
                "go on with --resume auto, or name another --out"
            )
        return None
    if config.resume == "auto":
        return present[-1] if present else None
    folder = Path(config.resume)
    if not is_complete(folder):
        hint = (
            f"; complete ones there: {', '.join(map(str, complete_checkpoints(folder)))}"
            if complete_checkpoints(folder)
            else ""
        )
        raise UsageError(f"{folder} is not a complete checkpoint of a training run{hint}")
    if present and read_progress(present[-1]).step > read_progress(folder).step:
        raise UsageError(f"{config.out} holds {present[-1].name}, newer than {folder}: name another --out")
    return folder


def restore(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, config: Train.Config) -> Progress:
    """Fill `optimizer` over `model` (already loaded from `folder`) and return the progress.

    Raises UsageError naming every setting that matters and differs from the checkpoint's.
    """
    _check_same(_trainer(folder)["config"], json.loads(json.dumps(to_dict(config))), folder)
    stored, _ = open_safetensors(folder / "optimizer.safetensors")
    _load_optimizer(model, optimizer, {name: tensor.read() for name, tensor in stored.items()}, folder)
    return read_progress(folder)


def read_progress(folder: Path) -> Progress:
    """How far the run of a complete checkpoint had come."""
    return Progress(**_trainer(folder)["progress"])


@contextlib.contextmanager
def full_disk_in_one_line(out: str | Path) -> Iterator[None]:
    """Turn 'no space left' from any file of the run into a LongwaveError that says what is safe."""
    try:
        yield
    except (OSError, LongwaveError) as error:
        if not any(_is_full_disk(cause) for cause in (error, error.__cause__)):
            raise
        present = complete_checkpoints(out)
        safe = f"{present[-1]} is intact" if present else "no checkpoint had been written yet"
        raise LongwaveError(
            f"the disk that holds {out} is full; {safe}. Make room, then go on with --resume auto"
        ) from error


def _is_full_disk(error: BaseException | None) -> bool:
    known = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return known or "No space left on device" in str(error)  # safetensors gives the text alone


def _home(out: str | Path) -> Path:
    return Path(out) / "checkpoints"


def _trainer(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "trainer.json").read_text(encoding="utf-8"))


def _delete_old(out: str | Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints, and what killed processes left half written."""
    kept = complete_checkpoints(out)[-keep:]
    for folder in _home(out).iterdir():
        if folder.name.startswith(".step-") or (folder.name.startswith("step-") and folder < kept[0]):
            shutil.rmtree(folder)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _names(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[str]:
    """Names of the optimiser's parameters, in the order in which its state_dict numbers them."""
    by_id = {id(parameter): name for name, parameter in model.named_parameters()}
    return [by_id[id(parameter)] for group in optimizer.param_groups for parameter in group["params"]]


def _optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    names = _names(model, optimizer)
    state = optimizer.state_dict()["state"]
    return {f"{names[i]}.{key}": value for i, values in state.items() for key, value in values.items()}


def _load_optimizer(
    model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], folder: Path
) -> None:
    index = {name: i for i, name in enumerate(_names(model, optimizer))}
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        name, _, moment = key.rpartition(".")
        if name not in index:
            raise LongwaveError(f"{folder}/optimizer.safetensors has moments of {name!r}, which the model lacks")
        state.setdefault(index[name], {})[moment] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _check_same(saved: dict[str, Any], asked: dict[str, Any], folder: Path) -> None:
    before, now = _flat(saved), _flat(asked)
    changed = [
        f"{key} was {before.get(key)!r}, now {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and key.split(".")[0] not in FREE_KEYS
    ]
    if changed:
        raise UsageError(
            f"{folder} comes from a run with other settings: {'; '.join(changed)}. "
            "Give the old ones, or begin afresh in another --out"
        )


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested objects and lists as one level of dotted keys."""
    if not isinstance(value, (dict, list)):
        return {prefix: value}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    return {key: leaf for name, item in items for key, leaf in _flat(item, f"{prefix}.{name}".lstrip(".")).items()}

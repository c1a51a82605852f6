"""A model folder on disk: its config.json, and its tensors by name, with shapes known before any tensor is read."""

import json
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longwave.errors import LongwaveError, UsageError
from longwave.hub import inert_pickle
from longwave.hub.run_folder import complete_checkpoints
from longwave.models.saving import Stored, first_line, open_safetensors

WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "model.pt",
    "weights.ckpt",
)


def find_folder(path: str | Path) -> Path:
    """`path` as a folder that exists; of a training run, its newest checkpoint. Raises UsageError with the way out."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        return next(reversed(complete_checkpoints(folder)), folder)
    if folder.exists():
        raise UsageError(f"{path} is a file; name the folder that holds config.json and the weights: {folder.parent}")
    published = str(path).count("/") == 1 and not str(path).startswith((".", "~", "/"))
    download = f", or fetch a published model first: hf download {path} --local-dir {folder.name}" if published else ""
    raise UsageError(f"there is no folder {path}; check the path{download}")


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json. Infinity and NaN are read bare and in transformers' spelling {"__float__": "Infinity"}.

    Raises UsageError if there is none, LongwaveError if it is not an object of JSON.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise UsageError(f"{folder} has no config.json; a model folder holds config.json beside its weights")
    config = _read_json(file)
    if not isinstance(config, dict):
        raise LongwaveError(f"{file} holds a {type(config).__name__}, not an object of settings; copy the file again")
    return config


def open_weights(folder: Path) -> dict[str, Stored]:
    """Every tensor of the folder, by name: safetensors or pytorch_model.bin, whole or sharded, model.pt, weights.ckpt.

    Nothing but tensors is unpickled: of a training run's checkpoint (.ckpt), what else it holds is passed over.
    Raises LongwaveError on a missing, truncated or foreign file.
    """
    name = next((name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    if name is None:
        raise LongwaveError(f"{folder} has no weights; expected one of {', '.join(WEIGHT_FILES)}")
    if not name.endswith(".json"):
        return _open_file(folder / name)
    weight_map = _read_weight_map(folder / name)
    shards = {shard: _open_file(folder / shard) for shard in sorted(set(weight_map.values()))}
    for key, shard in weight_map.items():
        if key not in shards[shard]:
            raise LongwaveError(f"{folder / name} places {key} in {shard}, which lacks it; copy the folder again")
    return {key: shards[shard][key] for key, shard in weight_map.items()}


def _read_json(file: Path) -> Any:
    def plain(data: dict[str, Any]) -> Any:
        return float(data["__float__"]) if set(data) == {"__float__"} else data

    try:
        return json.loads(file.read_text(encoding="utf-8"), object_hook=plain)
    except (ValueError, OSError) as error:  # a ValueError also where the text is not UTF-8
        raise LongwaveError(f"{file} cannot be read as JSON: {first_line(error)}; copy the file again") from error


def _read_weight_map(file: Path) -> dict[str, str]:
    """Tensor name to shard name. A shard lies in the same folder: an index may not point elsewhere."""
    index = _read_json(file)
    weight_map = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise LongwaveError(f"{file} has no 'weight_map'; copy the file again")
    for shard in weight_map.values():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise LongwaveError(f"{file} names the shard {shard!r}, which is no plain file name; it will not be opened")
    return weight_map


def _open_file(file: Path) -> dict[str, Stored]:
    return open_safetensors(file)[0] if file.suffix == ".safetensors" else _open_pickle(file)


def _unpickle(file: Path) -> Any:
    # What torch wrote before 1.6 is no zip archive, and cannot be mapped.
    is_zip = zipfile.is_zipfile(file)
    if file.suffix == ".ckpt" and is_zip:
        return torch.load(file, map_location="cpu", weights_only=False, pickle_module=inert_pickle, mmap=True)
    return torch.load(file, map_location="cpu", weights_only=True, mmap=is_zip)


def _open_pickle(file: Path) -> dict[str, Stored]:
    if not file.is_file():
        raise LongwaveError(f"cannot read {file}: there is no such file; copy the folder again")
    try:
        tensors = _unpickle(file)
    except Exception as error:  # on foreign bytes the unpickler raises whatever it stumbles over
        raise LongwaveError(
            f"cannot read {file}: it is damaged, or holds other objects than tensors, which longwave does not "
            "unpickle. Copy the file again, or convert it to safetensors where you trust it"
        ) from error
    if isinstance(tensors, dict) and isinstance(tensors.get("state_dict"), dict):
        tensors = tensors["state_dict"]  # a checkpoint of a training run, as Lightning writes it
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise LongwaveError(
            f"{file} does not hold named tensors alone; torch.save(model.state_dict(), ...) writes such a file"
        )
    return {name: Stored(tuple(tensor.shape), lambda tensor=tensor: tensor) for name, tensor in tensors.items()}

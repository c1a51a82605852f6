"""A text model from a folder: longwave's own, or of any of `FORMATS`."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from longwave.config import nearest
from longwave.errors import LongwaveError, UsageError
from longwave.generate.text_model import TextModel
from longwave.hub import FORMATS, h3
from longwave.hub.family import Family
from longwave.hub.folder import find_folder, open_weights, read_config
from longwave.hub.keys import to_ours
from longwave.models import kinds
from longwave.models.saving import Stored, fill
from longwave.models.token_model import TokenModel
from longwave.tasks.tokenizer import load_tokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def load(path: str | Path, *, dtype: torch.dtype | str | None = None, device: torch.device | str = "cpu") -> TextModel:
    """The model in a folder, with its tokenizer, which is None where the folder has no tokenizer.json.

    The folder is longwave's own or of one of `FORMATS`, as its config.json says; the weights are safetensors or
    pytorch_model.bin, whole or sharded, and nothing but tensors is unpickled. `dtype`: that of the weights, by default
    the one they are stored in; the parameters that set the decay are float32 at least.

    Raises UsageError for a path, a family or an option that is not supported, before any weight is read, and
    LongwaveError for damaged files and for tensors that do not fit, naming ten of them.
    """
    folder, wanted = find_folder(path), _dtype(dtype)
    config = _config(folder)
    if _is_own(config):
        model = kinds.load(folder, device=device)
        model = model if wanted is None else model.to(wanted)
    else:
        model = _load_foreign(find_family(config), config, folder, wanted, device)
    return TextModel(model, load_tokenizer(folder))


def model_config(path: str | Path) -> kinds.TokenModelConfig:
    """The configuration of the model that `load` would load. Reads no weights. Raises as `load` does."""
    config = _config(find_folder(path))
    return kinds.config_from(config) if _is_own(config) else find_family(config).config_from(config)


def _config(folder: Path) -> dict[str, Any]:
    """config.json, or, beside a model.pt alone, what the shapes of its tensors tell: H3 is published like that."""
    if (folder / "config.json").is_file() or not (folder / h3.WEIGHTS).is_file():
        return read_config(folder)
    stored = _respelled(open_weights(folder), h3)
    return h3.config_of({name: tensor.shape for name, tensor in stored.items()}, str(folder))


def _is_own(config: Mapping[str, Any]) -> bool:
    return "kind" in config


def find_family(config: Mapping[str, Any]) -> Family:
    """The format that a config.json belongs to. Raises UsageError that names what it is instead."""
    for family in FORMATS.values():
        if family.matches(config):
            return family
    if "model_type" in config:
        model_type = str(config["model_type"])
        raise UsageError(f"config.json: models of type {model_type!r} are not supported.{nearest(model_type, FORMATS)}")
    keys = ", ".join(sorted(config)[:8]) or "none"
    raise UsageError(f"config.json is of no format known here (its keys: {keys}).{nearest('', FORMATS)}")


def _dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if isinstance(dtype, str) and dtype not in DTYPES:
        raise UsageError(f"dtype {dtype!r} is unknown.{nearest(dtype, DTYPES)}")
    return DTYPES[dtype] if isinstance(dtype, str) else dtype


def _load_foreign(
    family: Family,
    config: Mapping[str, Any],
    folder: Path,
    dtype: torch.dtype | None,
    device: torch.device | str,
) -> TokenModel:
    model_config = family.config_from(config)
    with torch.device("meta"):
        model = kinds.build(model_config)
    rename = family.rename(model_config)
    stored = _respelled(open_weights(folder), family)
    embedding, head = f"{rename['embedding']}.weight", f"{rename['lm_head']}.weight"
    if model_config.tie_embeddings:
        stored = _without_tied_head(stored, embedding, head, folder)
    model.to(dtype or _stored_dtype(stored, embedding))
    fill(model, to_ours(model, stored, rename, str(folder)), str(folder), device)
    return model


def _respelled(stored: Mapping[str, Stored], family: Family) -> dict[str, Stored]:
    """The tensors under the names that the family's `rename` knows."""
    aliases = family.ALIASES(stored) if callable(family.ALIASES) else family.ALIASES
    named = ((aliases.get(name, name), tensor) for name, tensor in stored.items())
    return {name: tensor for name, tensor in named if name is not None}


def _without_tied_head(stored: dict[str, Stored], embedding: str, head: str, folder: Path) -> dict[str, Stored]:
    """A tied head may be stored a second time. Raises LongwaveError if it is another matrix after all."""
    if head in stored and embedding in stored and not torch.equal(stored[head].read(), stored[embedding].read()):
        raise LongwaveError(
            f"{folder}: config.json ties {head} to {embedding}, but the two differ; "
            "if the model has a head of its own, set tie_word_embeddings (tie_embeddings) to false there"
        )
    return {name: tensor for name, tensor in stored.items() if name != head}


def _stored_dtype(stored: Mapping[str, Stored], embedding: str) -> torch.dtype:
    """The dtype of the embedding speaks for the folder."""
    if embedding in stored and (dtype := stored[embedding].read().dtype) in DTYPES.values():
        return dtype
    return torch.float32

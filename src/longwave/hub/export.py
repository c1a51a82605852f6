"""A model to a folder that other programs load: the way back of `load`."""

import json
from pathlib import Path
from typing import Any

import torch

from longwave.config import nearest
from longwave.errors import LongwaveError, UsageError
from longwave.generate.text_model import TextModel
from longwave.hub import FORMATS
from longwave.hub.folder import WEIGHT_FILES
from longwave.hub.keys import to_published
from longwave.hub.settings import inexpressible
from longwave.models.language_model import LanguageModel
from longwave.models.saving import first_line, replacing, write_safetensors, write_text
from longwave.models.token_model import TokenModel
from longwave.tasks.tokenizer import Tokenizer


def export(model: TextModel | TokenModel, folder: str | Path, format: str) -> None:
    """Write config.json, the weights in their dtypes, and the tokenizer if there is one, as `format` has them.

    `format` is a key of `FORMATS`. Other files in the folder stay. Raises UsageError, with nothing written, for an
    unknown format, a model that it cannot express, and a folder that holds weights under other names; LongwaveError
    when the folder cannot be written.
    """
    if format not in FORMATS:
        raise UsageError(f"unknown format {format!r}.{nearest(format, FORMATS)}")
    family = FORMATS[format]
    model, tokenizer = (model.model, model.tokenizer) if isinstance(model, TextModel) else (model, None)
    if not isinstance(model.config, LanguageModel.Config):
        inexpressible(format, "language models", f"kind {model.config.kind!r}")
    config, rename = family.config_to(model.config), family.rename(model.config)
    if "model_type" in config:
        config |= _for_transformers(model, tokenizer)
    folder = _make_folder(Path(folder), family.WEIGHTS)
    tensors = to_published(model, rename)
    if not family.WEIGHTS.endswith(".safetensors"):
        if model.config.tie_embeddings:  # readers of state dicts expect both names
            tensors[f"{rename['lm_head']}.weight"] = tensors[f"{rename['embedding']}.weight"]
        checkpoint = family.WEIGHTS.endswith(".ckpt")
        _write_pickle(folder / family.WEIGHTS, {"state_dict": tensors} if checkpoint else tensors)
    else:
        write_safetensors(folder / family.WEIGHTS, tensors, {"format": "pt"})
    write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")
    if tokenizer is not None:
        tokenizer.save(folder)


def _for_transformers(model: TokenModel, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """What transformers reads beside the architecture. Ids left out would be those of another tokenizer."""
    end = None if tokenizer is None else tokenizer.end
    dtype = str(model.embedding.weight.dtype).removeprefix("torch.")
    return {"dtype": dtype, "bos_token_id": None, "eos_token_id": end, "pad_token_id": None}


def _make_folder(folder: Path, weights: str) -> Path:
    """The folder, made if need be. Raises UsageError if it holds other weights, which a reader might prefer to ours."""
    others = [name for name in WEIGHT_FILES if name != weights and (folder / name).exists()]
    if others:
        raise UsageError(
            f"{folder} holds {', '.join(others)}, which readers may take in place of {weights}; name an empty folder"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LongwaveError(f"cannot make the folder {folder}: {error.strerror}; name another") from error
    return folder


def _write_pickle(path: Path, tensors: dict[str, Any]) -> None:
    with replacing(path) as temporary:
        try:
            torch.save(tensors, temporary)
        except RuntimeError as error:  # how torch reports that a write failed
            raise OSError(first_line(error)) from error

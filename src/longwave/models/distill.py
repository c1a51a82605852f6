"""A model whose Hyena layers have become modal: for decoding with a state of constant size."""

from dataclasses import replace

import torch

from longwave.errors import UsageError
from longwave.mixers import Hyena
from longwave.mixers.hyena_distill import Distillation, distill
from longwave.models.language_model import LanguageModel
from longwave.models.pattern import pattern_of


@torch.no_grad()
def distill_model(
    model: LanguageModel, d_state: int, *, verbose: bool = True
) -> tuple[LanguageModel, dict[int, Distillation]]:
    """A copy of `model` with every Hyena layer distilled (`mixers/hyena_distill.py`), and {layer: its error}.

    `verbose` prints each layer's error as it is found. Raises UsageError where there is no Hyena layer, or one that
    `distill` refuses.
    """
    tensors, layers, reports = model.state_dict(), list(model.config.layers), {}
    for i, block in enumerate(model.layers):
        if not isinstance(block.mixer, Hyena):
            continue
        modal, reports[i] = distill(block.mixer, d_state, verbose=False)
        if verbose:
            print(f"layer {i}: {reports[i]}", flush=True)
        layers[i], place = modal.config, f"layers.{i}.mixer."
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(place)}
        tensors |= {place + name: tensor for name, tensor in modal.state_dict().items()}
    if not reports:
        raise UsageError(
            f"distill_model: layers of kind hyena are distilled, and this model has {pattern_of(layers)!r}"
        )
    weight = model.embedding.weight
    distilled = LanguageModel(replace(model.config, layers=tuple(layers))).to(weight.device, weight.dtype)
    distilled.load_state_dict(tensors)
    return distilled.train(model.training), reports

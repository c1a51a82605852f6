"""SaShiMi as its authors' standalone code names it (models/sashimi/sashimi.py of S4's repository), and back.

That code is a backbone: its checkpoints hold whatever the training run had around it, and no config.json. What is read
here is a state dict, whose shapes tell the sizes; the tensors of the embedding and the head are named by the caller.
Pools and MLPs are convolutions of width 1 there, S4 layers as `longwave.hub.s4` has them.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from longwave.errors import LongwaveError, UsageError
from longwave.hub.s4 import layer_state_dict, load_layer
from longwave.models.sashimi import SaShiMi
from longwave.models.saving import Stored, check_shapes, fill

REMEDY = "Give the prefix of the backbone's names, and those of the embedding and the head"


def load_sashimi(
    tensors: Mapping[str, Tensor],
    *,
    prefix: str = "",
    embedding: str | None = None,
    head: str | None = None,
    vocab_size: int | None = None,
    **settings: Any,
) -> SaShiMi:
    """The model whose backbone `tensors` holds under names that begin with `prefix`; other names are not looked at.

    `embedding` names the tensor (v, d) of the embedding, `head` begins the names of the head's weight and bias. Where
    they are not given they are drawn anew, for `vocab_size` levels. `settings` are those of the S4 layers that weights
    do not tell (`discretization`, of diagonal ones).

    Raises LongwaveError, the first ten missing, left over and mis-shaped tensors listed, for tensors of another model;
    UsageError where neither `embedding` nor `vocab_size` says how many levels there are.
    """
    found = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    around = {"embedding.weight": embedding, "lm_head.weight": head and f"{head}.weight"}
    around = {ours: name for ours, name in (around | {"lm_head.bias": head and f"{head}.bias"}).items() if name}
    found = {name: tensor for name, tensor in found.items() if prefix + name not in around.values()}
    if missing := [name for name in around.values() if name not in tensors]:
        raise LongwaveError(f"there is no tensor {missing[0]}; {REMEDY}")
    if embedding is not None:
        vocab_size = len(tensors[embedding])
    if vocab_size is None:
        raise UsageError("without the embedding's tensor, say how many levels samples have: vocab_size=256")
    where = f"the backbone {prefix!r}"
    config = _config(found, vocab_size, where, settings)
    model = SaShiMi(config).to(found["norm.weight"].dtype)
    plain = dict(_plain(model))
    mixers = dict(_mixers(model))
    rest = {name: tensor for name, tensor in found.items() if not name.startswith(tuple(mixers.values()))}
    parameters = dict(model.named_parameters())
    expected = {theirs: _published(parameters[ours]).shape for ours, theirs in plain.items()}
    check_shapes(expected, {name: tuple(tensor.shape) for name, tensor in rest.items()}, where, REMEDY)
    ours = {name: tensor.detach() for name, tensor in parameters.items() if name.startswith(("embedding", "lm_head"))}
    ours |= {name: tensors[theirs] for name, theirs in around.items()}
    ours |= {name: found[theirs].view(parameters[name].shape) for name, theirs in plain.items()}
    for block, theirs in mixers.items():
        mixer = load_layer(found, config.mixer.kind, prefix=theirs, **settings)
        ours |= {f"{block}.{name}": parameter.detach() for name, parameter in mixer.named_parameters()}
    fill(model, {name: Stored(tuple(tensor.shape), lambda t=tensor: t) for name, tensor in ours.items()}, where)
    return model


@torch.no_grad()
def sashimi_state_dict(
    model: SaShiMi,
    *,
    prefix: str = "",
    embedding: str = "embedding.weight",
    head: str = "head",
    l_kernel: int = 0,
) -> dict[str, Tensor]:
    """The weights of `model` under the authors' names: the inverse of `load_sashimi`. `l_kernel` as for `hub.s4`.

    Raises UsageError for a model that the authors' code does not have, such as one with another mixer than S4 or S4D.
    """
    if model.config.mixer.kind not in ("s4", "s4d") or model.config.norm_eps != 1e-5:
        raise UsageError(
            "the authors' SaShiMi has blocks of s4 or s4d and norm_eps=1e-05, and this model has "
            f"{model.config.mixer.kind} and {model.config.norm_eps}; model.save(folder) keeps every model"
        )
    parameters = dict(model.named_parameters())
    named = {prefix + theirs: _published(parameters[ours]) for ours, theirs in _plain(model)}
    for block, theirs in _mixers(model):
        mixer: Any = model.get_submodule(block)
        named |= layer_state_dict(mixer, prefix=prefix + theirs, l_kernel=l_kernel)
    return named | {
        embedding: model.embedding.weight.detach(),
        f"{head}.weight": model.lm_head.weight.detach(),
        f"{head}.bias": model.lm_head.bias.detach(),
    }


def _config(found: Mapping[str, Tensor], vocab_size: int, where: str, settings: Mapping[str, Any]) -> SaShiMi.Config:
    """What the shapes tell."""
    pools = [name for name in found if re.fullmatch(r"d_layers\.\d+\.linear\.weight", name)]
    pools.sort(key=lambda name: int(name.split(".")[1]))
    if not pools or "norm.weight" not in found:
        raise LongwaveError(f"{where} is no SaShiMi: it has no d_layers.*.linear.weight and norm.weight. {REMEDY}")
    widths, factors = [len(found["norm.weight"])], []
    for name in pools:
        factors.append(found[name].shape[1] // widths[-1])
        widths.append(found[name].shape[0])
    n_blocks = 1 + max((int(name.split(".")[1]) for name in found if name.startswith("c_layers.")), default=-1)
    mlp = found.get("c_layers.1.layer.ff.0.0.weight")
    kind = "s4" if "c_layers.0.layer.layer.kernel.P" in found else "s4d"
    mixer = load_layer(found, kind, prefix="c_layers.0.layer.", **settings).config
    if mixer.n_ssm == widths[-1]:  # one for each channel, in the wider and the narrower tiers
        mixer = dataclasses.replace(mixer, n_ssm=None)
    return SaShiMi.Config(
        vocab_size=vocab_size,
        d_model=widths[0],
        n_layers=n_blocks // (1 if mlp is None else 2),
        pool=tuple(factors),
        expand=widths[1] // widths[0],
        ff=0 if mlp is None else len(mlp) // widths[-1],
        unet=not pools[0].startswith("d_layers.0."),
        mixer=mixer,
    )


def _mixers(model: SaShiMi) -> Iterator[tuple[str, str]]:
    """Where the S4 layers are: the module of ours, and how the names of its tensors begin there."""
    for name, module in model.layers.named_modules():  # pyright: ignore[reportAttributeAccessIssue]
        if name.endswith(".mixer") and type(module.config) is type(model.config.mixer):
            yield f"layers.{name}", f"{name.removesuffix('.mixer')}.layer."


def _plain(model: SaShiMi) -> Iterator[tuple[str, str]]:
    """Parameters of the backbone beside the S4 layers: their names here and there."""
    mixers = tuple(f"{block}." for block, _ in _mixers(model))
    for name, _ in model.named_parameters():
        if name.startswith(("embedding.", "lm_head.", *mixers)):
            continue
        theirs = name.removeprefix("layers.").replace("norm_f.", "norm.")
        yield name, theirs.replace(".mixer.fc1.", ".layer.ff.0.0.").replace(".mixer.fc2.", ".layer.ff.2.")


def _published(parameter: Tensor) -> Tensor:
    """A parameter in the shape that it has there: products with a matrix are convolutions of width 1."""
    return parameter.detach()[..., None] if parameter.ndim == 2 else parameter.detach()

"""Published tensor names and a model's parameters: which is which, and moving tensors across.

A family gives `rename`: {module of ours: its published name}, such as {"layers.0.mixer": "backbone.layers.0.mixer"}.
The longest module that begins a parameter's name decides. Modules that share a published name are parts of one tensor,
joined along the rows in the order in which `rename` lists them.
"""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from longwave.errors import LongwaveError
from longwave.models.saving import Stored, check_shapes


def published_names(names: Iterable[str], rename: Mapping[str, str]) -> dict[str, list[str]]:
    """{published name: the parameters of ours that it holds, in order}."""
    place = {module: i for i, module in enumerate(rename)}
    parts: dict[str, list[tuple[int, str]]] = {}
    for name in names:
        module = name
        while module not in rename:
            module, dot, _ = module.rpartition(".")
            assert dot, f"the family has no published name for {name}"
        parts.setdefault(rename[module] + name[len(module) :], []).append((place[module], name))
    return {published: [name for _, name in sorted(held)] for published, held in parts.items()}


def to_ours(model: nn.Module, stored: Mapping[str, Stored], rename: Mapping[str, str], where: str) -> dict[str, Stored]:
    """The stored tensors under the names of `model`'s parameters, in their dtypes.

    Every name and shape is checked first. Raises LongwaveError that lists the first ten that do not fit; on reading,
    that a tensor is not floating-point.
    """
    parameters = dict(model.named_parameters())
    names = published_names(parameters, rename)
    shapes = {
        published: (sum(len(parameters[name]) for name in held), *parameters[held[0]].shape[1:])
        for published, held in names.items()
    }
    check_shapes(shapes, {name: tensor.shape for name, tensor in stored.items()}, where)
    ours: dict[str, Stored] = {}
    for published, held in names.items():
        begin = 0
        for name in held:
            like = parameters[name]
            ours[name] = _part(published, stored[published], begin, like)
            begin += len(like)
    return ours


def to_published(model: nn.Module, rename: Mapping[str, str]) -> dict[str, Tensor]:
    """The parameters of `model` under their published names."""
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return {
        published: parameters[held[0]] if len(held) == 1 else torch.cat([parameters[name] for name in held])
        for published, held in published_names(parameters, rename).items()
    }


def _part(published: str, whole: Stored, begin: int, like: Tensor) -> Stored:
    """The rows of a stored tensor that make up one parameter, in its dtype."""

    def read() -> Tensor:
        tensor = whole.read()
        if not tensor.is_floating_point():
            raise LongwaveError(f"{published} is stored as {tensor.dtype}; longwave reads floating-point weights alone")
        return tensor[begin : begin + len(like)].to(like.dtype)

    return Stored(tuple(like.shape), read)

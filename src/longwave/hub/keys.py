"""Published tensors and a model's parameters: which is which, and moving numbers across.

A family gives `rename`: {module of ours: its published name}, such as {"layers.0.mixer": "backbone.layers.0.mixer"}.
The longest module that begins a parameter's name decides; what follows it is appended to the published name. Modules
that share a published name are parts of one tensor, joined along the rows in the order in which `rename` lists them.
Where the numbers lie in any other way, a `Layout` takes the place of the name.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from longwave.errors import LongwaveError
from longwave.models.saving import Stored, check_shapes


class Layout(NamedTuple):
    """Some parameters of ours, in the order of `rename`, and some published tensors that hold the same numbers.

    Both functions work on meta tensors too: from them come the shapes that are expected of the published tensors.
    """

    names: tuple[str, ...]
    pack: Callable[[Sequence[Tensor]], Sequence[Tensor]]  # ours -> those called `names`
    unpack: Callable[[Sequence[Tensor], Sequence[torch.Size]], Sequence[Tensor]]  # those -> ours, of the shapes given


Rename = Mapping[str, str | Layout]


def rows(name: str) -> Layout:
    """Ours joined along the rows; what a name alone means."""
    return Layout((name,), _join, lambda theirs, shapes: _split(theirs[0], shapes))


def stacked(name: str, n: int) -> Layout:
    """Ours joined along the rows, the whole cut into n matrices behind each other: (n, rows / n, ...)."""

    def pack(ours: Sequence[Tensor]) -> Sequence[Tensor]:
        return [_join(ours)[0].unflatten(0, (n, -1))]

    return Layout((name,), pack, lambda theirs, shapes: _split(theirs[0].flatten(0, 1), shapes))


def _join(ours: Sequence[Tensor]) -> Sequence[Tensor]:
    return [ours[0] if len(ours) == 1 else torch.cat(list(ours))]


def _split(whole: Tensor, shapes: Sequence[torch.Size]) -> Sequence[Tensor]:
    return whole.split([shape[0] for shape in shapes])


class _Group(NamedTuple):
    layout: Layout  # with the full names of tensors
    ours: list[str]


def _groups(names: Iterable[str], rename: Rename) -> list[_Group]:
    """The parameters of ours that go together, in order, and how they are published."""
    place = {module: i for i, module in enumerate(rename)}
    found: dict[tuple[str, ...], tuple[Layout, list[tuple[int, str]]]] = {}
    for name in names:
        module = name
        while module not in rename:
            module, dot, _ = module.rpartition(".")
            assert dot, f"the family has no published name for {name}"
        published = rename[module]
        layout = rows(published) if isinstance(published, str) else published
        full = tuple(published + name[len(module) :] for published in layout.names)
        found.setdefault(full, (layout._replace(names=full), []))[1].append((place[module], name))
    return [_Group(layout, [name for _, name in sorted(held)]) for layout, held in found.values()]


def to_ours(
    model: nn.Module, stored: Mapping[str, Stored], rename: Rename, where: str, *remedy: str
) -> dict[str, Stored]:
    """The stored tensors under the names of `model`'s parameters, in their dtypes.

    Every name and shape is checked first. Raises LongwaveError that lists the first ten that do not fit, and ends with
    `remedy` (as `check_shapes`); on reading, that a tensor is not floating-point.
    """
    parameters = dict(model.named_parameters())
    groups = _groups(parameters, rename)
    expected: dict[str, tuple[int, ...]] = {}
    for layout, held in groups:
        packed = layout.pack([torch.empty(parameters[name].shape, device="meta") for name in held])
        expected |= {name: tuple(tensor.shape) for name, tensor in zip(layout.names, packed, strict=True)}
    check_shapes(expected, {name: tensor.shape for name, tensor in stored.items()}, where, *remedy)
    ours: dict[str, Stored] = {}
    for group in groups:
        likes = [parameters[name] for name in group.ours]
        ours |= {name: _part(group.layout, stored, likes, i) for i, name in enumerate(group.ours)}
    return ours


def to_published(model: nn.Module, rename: Rename) -> dict[str, Tensor]:
    """The parameters of `model` under their published names."""
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    published: dict[str, Tensor] = {}
    for layout, held in _groups(parameters, rename):
        published |= dict(zip(layout.names, layout.pack([parameters[name] for name in held]), strict=True))
    return published


def _part(layout: Layout, stored: Mapping[str, Stored], likes: Sequence[Tensor], i: int) -> Stored:
    """The parameter number i of a group, in its dtype; `likes` are all of them."""

    def read() -> Tensor:
        theirs = [_read(name, stored[name]) for name in layout.names]
        tensor = layout.unpack(theirs, [like.shape for like in likes])[i]
        assert tensor.shape == likes[i].shape, f"{layout.names} unpacks to {tensor.shape}, not {likes[i].shape}"
        return tensor.to(likes[i].dtype)

    return Stored(tuple(likes[i].shape), read)


def _read(name: str, stored: Stored) -> Tensor:
    tensor = stored.read()
    if not tensor.is_floating_point():
        raise LongwaveError(f"{name} is stored as {tensor.dtype}; longwave reads floating-point weights alone")
    return tensor

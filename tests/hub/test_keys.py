"""Published names and layouts: every way in which tensors of ours and theirs can hold the same numbers."""

import pytest
import torch
from torch import nn

from longwave.errors import LongwaveError
from longwave.hub.keys import Layout, rows, stacked, to_ours, to_published
from longwave.models.saving import Stored


def held(tensors):
    return {name: Stored(tuple(tensor.shape), lambda tensor=tensor: tensor) for name, tensor in tensors.items()}


def model_of(**shapes):
    model = nn.Module()
    for name, shape in shapes.items():
        child = nn.Module()
        child.weight = nn.Parameter(torch.randn(shape))
        model.add_module(name, child)
    return model


HALVES = Layout(
    ("first", "second"),
    lambda ours: list(ours[0].chunk(2)),
    lambda theirs, shapes: [torch.cat(list(theirs))],
)
TURNED = Layout(("t",), lambda ours: [ours[0].mT], lambda theirs, shapes: [theirs[0].mT])
TWICE = Layout(("x", "y"), lambda ours: [ours[0], ours[0]], lambda theirs, shapes: [theirs[0]])
CASES = {
    "rows": ({"b": "whole", "a": "whole"}, {"a": (2, 3), "b": (4, 3)}, {"whole.weight": lambda m: cat(m, "b", "a")}),
    "rows, spelt out": ({"a": rows("whole")}, {"a": (2, 3)}, {"whole.weight": lambda m: m.a.weight}),
    "stacked": (
        dict.fromkeys("abcd", stacked("e", 2)),
        dict.fromkeys("abcd", (3, 5)),
        {"e.weight": lambda m: torch.stack([cat(m, "a", "b"), cat(m, "c", "d")])},
    ),
    "several make one": (
        {"a": HALVES},
        {"a": (6, 2)},
        {"first.weight": lambda m: m.a.weight[:3], "second.weight": lambda m: m.a.weight[3:]},
    ),
    "transposed": ({"a": TURNED}, {"a": (6, 2)}, {"t.weight": lambda m: m.a.weight.T}),
    "stored twice": ({"a": TWICE}, {"a": (2, 2)}, {"x.weight": lambda m: m.a.weight, "y.weight": lambda m: m.a.weight}),
    "a parameter by its whole name": ({"a.weight": "w"}, {"a": (2,)}, {"w": lambda m: m.a.weight}),
}
every_case = pytest.mark.parametrize(("rename", "shapes", "expected"), CASES.values(), ids=CASES)


def cat(model, *names):
    return torch.cat([getattr(model, name).weight for name in names])


@every_case
def test_out_and_back(rename, shapes, expected):
    model = model_of(**shapes)
    published = to_published(model, rename)
    assert set(published) == set(expected)
    for name, tensor in published.items():
        assert torch.equal(tensor, expected[name](model))
    stored = held({name: tensor.double() for name, tensor in published.items()})
    for name, tensor in to_ours(model, stored, rename, "here").items():
        assert tensor.shape == model.get_parameter(name).shape
        assert tensor.read().dtype == torch.float32
        assert torch.equal(tensor.read(), model.get_parameter(name))


@every_case
def test_shapes_are_checked_before_a_tensor_is_read(rename, shapes, expected):
    model = model_of(**shapes)

    def unread():
        raise AssertionError("read too early")

    stored = {name: Stored((*tensor.shape, 1), unread) for name, tensor in to_published(model, rename).items()}
    first = next(iter(stored))
    with pytest.raises(LongwaveError, match=f"{first}: expected .*, found .*, 1\\]"):
        to_ours(model, stored, rename, "here")


def test_integers_are_no_weights():
    model = model_of(a=(6, 2))
    stored = held({"first.weight": torch.zeros(3, 2), "second.weight": torch.zeros(3, 2, dtype=torch.int8)})
    with pytest.raises(LongwaveError, match=r"second.weight is stored as torch.int8"):
        to_ours(model, stored, {"a": HALVES}, "here")["a.weight"].read()

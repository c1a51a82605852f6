"""Tensors of more than 2^31 elements, and more rows than a CUDA grid's second axis takes. Run with `-m gpu`.

No reference runs at such sizes. So all rows but the last two hold zeros, and those two are compared with a run of their
own, whose errors other tests bound. An address that wraps around reads zeros, or writes where nothing is read.
"""

import gc

import pytest
import torch
from test_ops import flattened, samples, tensors

from longwave.ops import OPS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
ROW = {  # one row of the batch
    "causal_conv1d": {"l": 256, "e": 1024, "w": 4, "activation": "silu"},
    "diagonal_scan": {"l": 256, "e": 1024, "n": 4},
    "fft_conv": {"l": 256, "e": 1024, "k": 256, "D": True},
    "gated_rms_norm": {"l": 256, "e": 1024, "gate": True},
    "mamba3_scan": {"l": 256, "h": 16, "p": 64, "r": 1, "g": 1, "n": 64, "s": 16, "z": True},
    "selective_scan": {"l": 256, "e": 1024, "n": 16, "dt_softplus": True},
    "ssd": {"l": 256, "h": 16, "p": 64, "g": 1, "n": 64, "dt_softplus": True},
}
SHORT = {  # rows of two tokens, of which there are many
    "causal_conv1d": {"l": 2, "e": 8, "w": 4},
    "diagonal_scan": {"l": 2, "e": 8, "n": 3},
    "fft_conv": {"l": 2, "e": 8, "k": 5},
    "gated_rms_norm": {"l": 2, "e": 8, "gate": True},
    "mamba3_scan": {"l": 2, "h": 1, "p": 8, "r": 1, "g": 1, "n": 8, "s": 2},
    "selective_scan": {"l": 2, "e": 8, "n": 16, "dt_softplus": True},
    "ssd": {"l": 2, "h": 1, "p": 8, "g": 1, "n": 8},
}


def batched(name, shape, rows):
    """The arguments of two rows, and the same at the end of `rows` rows of zeros."""
    dtype = torch.bfloat16
    few = samples(name).make({"b": 2} | shape, dtype, "cuda")
    many = dict(few)
    for key, value in tensors(few).items():
        if value.shape[:2] == (2, shape["l"]):
            many[key] = value.new_zeros(rows, *value.shape[1:])
            many[key][-2:] = value
    return few, many


def assert_equal(value, expected):
    """Up to the order in which sums are taken, which may follow from the number of rows."""
    assert torch.isfinite(value).all()
    assert (value.double() - expected.double()).norm() <= torch.finfo(torch.bfloat16).eps * expected.double().norm()


@pytest.fixture(autouse=True)
def memory():
    gc.collect()
    torch.cuda.empty_cache()
    yield
    gc.collect()
    torch.cuda.empty_cache()


@pytest.mark.parametrize("name", ROW)
def test_outputs_of_more_elements_than_int32_counts(name):
    first = next(iter(samples(name).make({"b": 1} | ROW[name], torch.bfloat16).values()))
    few, many = batched(name, ROW[name], 2**31 // first.numel() + 3)
    with torch.no_grad():
        for value, expected in zip(flattened(OPS[name](**many)), flattened(OPS[name](**few)), strict=True):
            assert_equal(value[-2:], expected)
            assert torch.equal(value[0], value[1])  # rows of zeros are all alike


@pytest.mark.parametrize("name", ROW)
def test_gradients_of_more_elements_than_int32_counts(name):
    first = next(iter(samples(name).make({"b": 1} | ROW[name], torch.bfloat16).values()))
    few, many = batched(name, ROW[name], 2**31 // first.numel() + 3)
    found = []
    for kwargs in (many, few):
        leaves = {k: v.requires_grad_() for k, v in tensors(kwargs).items()}
        y = flattened(OPS[name](**kwargs))[0]
        dy = torch.zeros_like(y)
        dy[-2:] = torch.linspace(-1, 1, dy[-2:].numel(), device="cuda").view_as(dy[-2:])
        found.append(dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), dy), strict=True)))
        del y, dy
    for key, expected in found[1].items():
        value = found[0][key]
        assert_equal(value if value.shape == expected.shape else value[-2:], expected)


@pytest.mark.parametrize("name", SHORT)
def test_more_rows_than_65535(name):
    few, many = batched(name, SHORT[name], 70_000)
    for value, expected in zip(flattened(OPS[name](**many)), flattened(OPS[name](**few)), strict=True):
        assert_equal(value[-2:], expected)


def test_a_row_of_more_elements_than_int32_counts():
    """selective_scan of one row whose last tokens lie beyond 2^31 elements; the state forgets within 2,000 tokens."""
    l, e, n = 2**20 + 4096, 2048, 16
    parts = samples("selective_scan").make({"b": 1, "l": 4096, "e": e, "n": n}, torch.bfloat16, "cuda")
    whole = dict(parts)
    for key in ("x", "dt", "z", "B", "C"):
        whole[key] = parts[key].new_zeros(1, l, parts[key].shape[2])
        whole[key][:, -4096:] = parts[key]
    with torch.no_grad():
        value, expected = OPS["selective_scan"](**whole), OPS["selective_scan"](**parts)
    assert_equal(value[0][:, -2048:], expected[0][:, -2048:])
    assert_equal(value[1], expected[1])

"""What is special to gated_rms_norm: other libraries, closed forms, extremes."""

import pytest
import torch

from longwave.ops.gated_rms_norm import gated_rms_norm
from longwave.ops.gated_rms_norm.samples import make

SHAPE = {"b": 2, "l": 30, "e": 48, "gate": True}


@pytest.mark.parametrize("group_size", [48, 12])
def test_equals_transformers(group_size):
    modeling = pytest.importorskip("transformers.models.mamba2.modeling_mamba2")
    kwargs = make(SHAPE, torch.float32)
    norm = modeling.MambaRMSNormGated(48, group_size, eps=1e-5)
    norm.weight.data = kwargs["weight"]
    ours = gated_rms_norm(**kwargs | {"group_size": group_size})
    torch.testing.assert_close(ours, norm(kwargs["x"], kwargs["z"]), rtol=1e-5, atol=1e-6)


def test_without_a_gate_is_torch_rms_norm():
    kwargs = make(SHAPE | {"gate": False}, torch.float64)
    truth = torch.nn.functional.rms_norm(kwargs["x"], (48,), kwargs["weight"], 1e-5)
    torch.testing.assert_close(gated_rms_norm(**kwargs), truth, rtol=1e-12, atol=1e-12)


def test_norm_before_gate_is_the_norm_times_the_gate():
    kwargs = make(SHAPE, torch.float64)
    norm = torch.nn.functional.rms_norm(kwargs["x"], (48,), kwargs["weight"], 1e-5)
    truth = norm * torch.nn.functional.silu(kwargs["z"])
    ours = gated_rms_norm(**kwargs | {"norm_before_gate": True})
    torch.testing.assert_close(ours, truth, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("before", [False, True])
def test_groups_are_independent(before):
    kwargs = make(SHAPE, torch.float32) | {"group_size": 12, "norm_before_gate": before}
    whole = gated_rms_norm(**kwargs)
    for start in range(0, 48, 12):
        part = {k: v[..., start : start + 12] if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
        torch.testing.assert_close(gated_rms_norm(**part), whole[..., start : start + 12], rtol=0, atol=0)


def test_mean_square_of_the_result_is_one():
    x = 1000 * torch.randn(5, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = gated_rms_norm(x, eps=0.0)
    torch.testing.assert_close(y.square().mean(-1), torch.ones(5, dtype=torch.float64), rtol=1e-12, atol=0)


@pytest.mark.parametrize("shape", [(48,), (3, 48), (2, 3, 4, 48), (0, 48)])
def test_any_leading_axes(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    y = gated_rms_norm(x, eps=1e-5)
    torch.testing.assert_close(y, torch.nn.functional.rms_norm(x, (48,), eps=1e-5), rtol=1e-12, atol=1e-12)
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == shape


def test_slices_of_one_projection():
    """x and z as a fused projection gives them, and a gradient that is a broadcast scalar."""
    projection = torch.randn(2, 30, 100, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    projection.requires_grad_()
    weight = make(SHAPE, torch.float64)["weight"]
    grads = []
    for impl in ("fused", "reference"):
        y = gated_rms_norm(projection[..., 50:98], weight, projection[..., 1:49], eps=1e-5, impl=impl)
        grads.append(torch.autograd.grad(y.sum(), projection)[0])
    torch.testing.assert_close(*grads, rtol=1e-11, atol=1e-12)


def test_nan_stays_in_its_group():
    kwargs = make(SHAPE, torch.float32) | {"group_size": 12}
    clean = gated_rms_norm(**kwargs)
    kwargs["x"][0, 3, 13] = torch.nan
    y = gated_rms_norm(**kwargs)
    assert y[0, 3, 12:24].isnan().all()
    y[0, 3, 12:24] = clean[0, 3, 12:24]
    torch.testing.assert_close(y, clean, rtol=0, atol=0)


def test_large_and_small_values():
    """A gate that is shut or wide open, and a row of zeros."""
    x = torch.ones(3, 16)
    z = torch.tensor([-200.0, 200.0, 0.0])[:, None].expand(3, 16)
    y = gated_rms_norm(x, None, z, eps=1e-5)
    torch.testing.assert_close(y, torch.tensor([0.0, 1.0, 0.0])[:, None].expand(3, 16), rtol=1e-6, atol=1e-30)


def test_same_on_any_number_of_threads():
    kwargs = make({"b": 2, "l": 500, "e": 200, "gate": True}, torch.float32)
    leaves = [kwargs[name].requires_grad_() for name in ("x", "weight", "z")]
    before, results = torch.get_num_threads(), []
    try:
        for n in (1, 3):
            torch.set_num_threads(n)
            y = gated_rms_norm(**kwargs)
            results.append((y, *torch.autograd.grad(y.square().sum(), leaves)))
    finally:
        torch.set_num_threads(before)
    for one, three in zip(*results, strict=True):
        torch.testing.assert_close(one, three, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"group_size": 13}, "e = 48, got 13"),
        ({"weight": torch.ones(47)}, r"got \(47,\)"),
        ({"z": torch.ones(2, 30, 1)}, r"got \(2, 30, 1\)"),
    ],
)
def test_errors_name_the_value(change, message):
    with pytest.raises(ValueError, match=message):
        gated_rms_norm(**make(SHAPE, torch.float32) | change)

"""Every operator, over its shapes and dtypes: the kernel against the float64 reference, and section 4's contract."""

import importlib
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from longwave.mixers.nested import map_named, named_tensors
from longwave.ops import OPS

CASES = [(name, i) for name in OPS for i in range(len(importlib.import_module(f"longwave.ops.{name}.samples").SHAPES))]
STATEFUL = [
    case for case in CASES if hasattr(importlib.import_module(f"longwave.ops.{case[0]}.samples"), "initial_state")
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def samples(name: str):
    return importlib.import_module(f"longwave.ops.{name}.samples")


def inputs(name: str, i: int, dtype: torch.dtype = torch.float32, **context: bool) -> dict[str, Any]:
    """Keyword arguments of shape i; `context` asks for state, reset, lengths."""
    shape = samples(name).SHAPES[i]
    kwargs = samples(name).make(shape, dtype)
    b, l = shape["b"], shape["l"]
    g = torch.Generator().manual_seed(i)
    if context.get("state"):
        kwargs["initial_state"] = samples(name).initial_state(shape, dtype)
    if context.get("reset"):
        kwargs["reset"] = torch.rand(b, l, generator=g) < 0.1
    if context.get("lengths"):
        kwargs["lengths"] = torch.randint(0, l + 1, (b,), generator=g)
    return kwargs


def holds_tensors(value: Any) -> bool:
    return isinstance(value, Tensor) or hasattr(value, "_fields")  # a state may be several


def tensors(kwargs: dict[str, Any]) -> dict[str, Tensor]:
    named = (named_tensors(v, k) for k, v in kwargs.items() if holds_tensors(v))
    return {k: v for found in named for k, v in found.items() if v.is_floating_point()}


def replaced(kwargs: dict[str, Any], new: dict[str, Tensor]) -> dict[str, Any]:
    """The same arguments with `new` for the tensors of these names."""
    return {
        k: map_named(lambda name, tensor: new.get(name, tensor), v, k) if holds_tensors(v) else v
        for k, v in kwargs.items()
    }


def cast(kwargs: dict[str, Any], dtype: torch.dtype, grad: bool = True) -> dict[str, Any]:
    return replaced(kwargs, {k: v.detach().to(dtype).requires_grad_(grad) for k, v in tensors(kwargs).items()})


def moved(kwargs: dict[str, Any], device: str) -> dict[str, Any]:
    """The same arguments on `device`, their tensors leaves again."""
    new = {k: v.detach().to(device).requires_grad_(v.requires_grad) for k, v in tensors(kwargs).items()}
    others = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in kwargs.items()}
    return replaced(others, new)


def one_token(kwargs: dict[str, Any]) -> tuple[dict[str, Any], Any]:
    """The arguments of the operator's step for the first token of these, and the state it goes on from."""
    b, l = next(iter(kwargs.values())).shape[:2]
    kept = {k: v for k, v in kwargs.items() if k not in ("initial_state", "chunk_len")}
    token = {k: v[:, 0] if isinstance(v, Tensor) and v.shape[:2] == (b, l) else v for k, v in kept.items()}
    return token, kwargs["initial_state"]


def flattened(out: Any) -> tuple[Tensor, ...]:
    return (out,) if isinstance(out, Tensor) else tuple(tensor for part in out for tensor in flattened(part))


def outputs(name: str, kwargs: dict[str, Any], impl: str) -> tuple[Tensor, ...]:
    return flattened(OPS[name](**kwargs, impl=impl))


def results(name: str, kwargs: dict[str, Any], impl: str) -> dict[str, Tensor]:
    """Outputs, and the gradient of a fixed random projection of them for every floating-point input, in float64."""
    out = outputs(name, kwargs, impl)
    g = torch.Generator().manual_seed(7)
    weights = [torch.randn(o.shape, generator=g).to(o.device, o.dtype) for o in out]
    leaves = {k: v for k, v in tensors(kwargs).items() if v.requires_grad}
    grads = torch.autograd.grad(out, list(leaves.values()), weights)
    found = {f"output {i}": o for i, o in enumerate(out)}
    found |= {f"gradient of {k}": v for k, v in zip(leaves, grads, strict=True)}
    return {k: v.detach().cpu().double() for k, v in found.items()}


def error(x: Tensor, truth: Tensor) -> float:
    assert x.shape == truth.shape
    assert torch.isfinite(x).all()
    return (x - truth).norm().item()


def within_budget(name: str, kwargs: dict[str, Any], dtype: torch.dtype, device: str = "cpu") -> None:
    """The kernel's error against float64 is at most twice the same-dtype reference's, plus one rounding."""
    truth = results(name, cast(kwargs, torch.float64), "reference")
    same = results(name, cast(kwargs, dtype), "reference")
    kernel = results(name, moved(cast(kwargs, dtype), device), "fused")
    for key, value in truth.items():
        rounding = torch.finfo(dtype).eps * value.norm().item()
        assert error(kernel[key], value) <= 2 * error(same[key], value) + rounding, key


@pytest.mark.parametrize("context", [(), ("state", "reset", "lengths")], ids=["plain", "context"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "i"), CASES)
def test_error_budget(name, i, dtype, context):
    if (name, i) not in STATEFUL:
        context = ()
    within_budget(name, inputs(name, i, dtype, **dict.fromkeys(context, True)), dtype)


@pytest.mark.parametrize(("name", "i"), CASES)
def test_float64_kernel_is_the_reference(name, i):
    context = {"state": True, "reset": True, "lengths": True} if (name, i) in STATEFUL else {}
    kwargs = cast(inputs(name, i, torch.float64, **context), torch.float64)
    kernel, truth = results(name, kwargs, "fused"), results(name, kwargs, "reference")
    for key, value in truth.items():
        torch.testing.assert_close(kernel[key], value, rtol=1e-9, atol=1e-11, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize(("name", "i"), CASES)
def test_gradcheck(name, i):
    kwargs = cast(inputs(name, i, torch.float64), torch.float64)
    leaves = {k: v for k, v in tensors(kwargs).items() if v.requires_grad}

    def function(*values: Tensor):
        return outputs(name, replaced(kwargs, dict(zip(leaves, values, strict=True))), "fused")

    assert torch.autograd.gradcheck(function, tuple(leaves.values()), fast_mode=True)


@pytest.mark.parametrize("name", OPS)
def test_compiles_as_one_graph(name):
    kwargs = cast(inputs(name, 1, state=(name, 1) in STATEFUL), torch.float32)
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(**kwargs):
        return outputs(name, kwargs, "fused")

    for ours, eager in zip(compiled(**kwargs), outputs(name, kwargs, "fused"), strict=True):
        torch.testing.assert_close(ours, eager, rtol=0, atol=0)
    sum(o.float().sum() for o in compiled(**kwargs)).backward()
    assert all(torch.isfinite(v.grad).all() for v in tensors(kwargs).values())


@pytest.mark.parametrize(("name", "i"), [(name, i) for name, i in STATEFUL if samples(name).SHAPES[i]["l"] > 1])
def test_pieces_equal_whole(name, i):
    shape = samples(name).SHAPES[i]
    kwargs = inputs(name, i, torch.float64, state=True, reset=True)
    b, l = shape["b"], shape["l"]
    whole, final = OPS[name](**kwargs)
    state, pieces, cuts = kwargs["initial_state"], [], [0, 1, 1 + (l - 1) // 3, l]
    for start, end in itertools.pairwise(cuts):
        if start == end:
            continue
        part = {
            k: v[:, start:end] if isinstance(v, Tensor) and v.ndim > 1 and v.shape[:2] == (b, l) else v
            for k, v in kwargs.items()
        }
        y, state = OPS[name](**part | {"initial_state": state})
        pieces.append(y)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(state, final, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("name", "i"), STATEFUL)
def test_strided_views(name, i):
    """Slices of a wider tensor, as a fused projection gives them, and a broadcast batch."""
    kwargs = inputs(name, i)
    wide = {
        k: torch.cat([v, v.flip(-1), v], -1)[..., v.shape[-1] :][..., : v.shape[-1]].flip(-1)
        for k, v in tensors(kwargs).items()
    }
    views = {
        k: torch.cat([torch.full_like(v, torch.nan), v], -1)[..., v.shape[-1] :] for k, v in tensors(kwargs).items()
    }
    expected = outputs(name, kwargs, "fused")
    for ours, truth in zip(outputs(name, replaced(kwargs, views), "fused"), expected, strict=True):
        torch.testing.assert_close(ours, truth, rtol=0, atol=0)
    for ours, truth in zip(outputs(name, replaced(kwargs, wide), "fused"), expected, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", OPS)
def test_unknown_impl_is_named(name):
    with pytest.raises(ValueError, match="'fast'"):
        OPS[name](**inputs(name, 0), impl="fast")


@pytest.mark.parametrize(("name", "i"), [case for case in STATEFUL if case[1] == 1])
def test_documents_are_checked(name, i):
    kwargs = inputs(name, i)
    shape = samples(name).SHAPES[i]
    with pytest.raises(ValueError, match=r"reset must be \(b, l\)"):
        OPS[name](**kwargs, reset=torch.zeros(shape["b"], shape["l"] + 1, dtype=torch.bool))
    with pytest.raises(TypeError, match="int64"):
        OPS[name](**kwargs, lengths=torch.zeros(shape["b"], dtype=torch.int32))


@pytest.mark.parametrize(("name", "i"), STATEFUL)
def test_padding_cannot_leak(name, i):
    """NaN behind the lengths reaches neither outputs, state nor gradients."""
    kwargs = cast(inputs(name, i, lengths=True), torch.float32, grad=False)
    shape = samples(name).SHAPES[i]
    b, l = shape["b"], shape["l"]
    padding = torch.arange(l) >= kwargs["lengths"][:, None]
    poisoned = dict(kwargs)
    for key, value in tensors(kwargs).items():
        if value.shape[:2] == (b, l):
            poisoned[key] = torch.where(padding.view(b, l, *[1] * (value.ndim - 2)), torch.nan, value).requires_grad_()
    y, final = OPS[name](**poisoned)
    expected_y, expected_final = OPS[name](**kwargs)
    torch.testing.assert_close(y, expected_y, rtol=0, atol=0)
    torch.testing.assert_close(final, expected_final, rtol=0, atol=0)
    assert (y[padding] == 0).all()
    torch.stack([out.sum() for out in flattened((y, final))]).sum().backward()
    for value in poisoned.values():
        if isinstance(value, Tensor) and value.requires_grad:
            assert torch.isfinite(value.grad).all()
            assert (value.grad[padding] == 0).all()


@pytest.mark.parametrize("name", OPS)
def test_opcheck(name):
    """The registered operators' schemas and fakes agree with what they do."""
    kwargs = inputs(name, 1, state=(name, 1) in STATEFUL)
    calls: list[tuple[Any, tuple]] = []

    class Record(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "longwave":
                calls.append((func, args))
            return func(*args, **(kwargs or {}))

    with Record():
        results(name, cast(kwargs, torch.float32), "fused")
    assert len(calls) >= 2
    for op, args in calls:
        detached = [a.detach() if isinstance(a, Tensor) else a for a in args]
        torch.library.opcheck(op, detached, test_utils=("test_schema", "test_faketensor"))

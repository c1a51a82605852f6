"""Kernel generation: closed forms, phases beside mpmath, its transpose, the state after a convolution, memory."""

import math
import subprocess
import sys
from typing import Any

import mpmath
import numpy as np
import pytest
import torch
from torch import Tensor

from longwave.ops.diagonal_scan import diagonal_scan
from longwave.ops.ssm_kernel import cauchy_kernel, samples, vandermonde_kernel, vandermonde_state

CASES = range(len(samples.SHAPES))
STATE = {"b": 3, "l": 200, "e": 5, "n": 4}


def state_inputs(dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    g = torch.Generator().manual_seed(0)
    b, l, e, n = STATE.values()
    modes = samples.make({"m": b, "e": e, "n": n, "l": l}, torch.float64)
    return {
        "u": torch.randn(b, l, e, generator=g).to(dtype),
        "B": torch.randn(e, n, 2, generator=g).to(dtype),
        "dtA": modes["dtA"].to(dtype),
        "initial_state": modes["C"].to(dtype),
        "lengths": torch.tensor([200, 0, 131]),
    }


def pairs(x: np.ndarray) -> Tensor:
    return torch.from_numpy(np.stack([x.real, x.imag], -1))


def numbers(x: Tensor) -> np.ndarray:
    return x.detach().double().numpy() @ np.array([1, 1j])


def leaves(kwargs: dict[str, Any]) -> dict[str, Tensor]:
    return {k: v.requires_grad_() for k, v in kwargs.items() if isinstance(v, Tensor) and v.is_floating_point()}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1.5e-7), (torch.float64, 1.7e-14)], ids=str)
@pytest.mark.parametrize("l", [16384, 65536])
def test_phases_are_exact(l, dtype, tolerance):
    """Two million radians. In float32, phases t Im(dtA) would be off by a tenth; in float64, by 2e-10.

    In float64 what remains is 150 steps of the recurrences, which round by 2^-53.
    """
    modes = torch.tensor([[-1e-6, 31.4159], [-3e-5, -0.731], [0.0, 19.37]], dtype=dtype)
    weights = torch.eye(3, dtype=dtype)[:, None, :, None] * torch.tensor([0.8, -0.6], dtype=dtype)  # (m, 1, n, 2)
    K = vandermonde_kernel(weights, modes[None], l)[:, 0].double()
    times = [1, 100, l // 3, l // 2 - 1, l - 1]
    with mpmath.workdps(60):
        for k, (re, im) in enumerate(modes.double().tolist()):
            weight = mpmath.mpc(*weights[k, 0, k].double().tolist())
            for t in times:
                exact = 2 * (weight * mpmath.exp(t * mpmath.mpc(re, im))).real
                assert abs(K[k, t].item() - float(exact)) <= 2 * tolerance


@pytest.mark.parametrize("l", [1, 128, 1000, 128 * 128 + 3])
def test_geometric_series(l):
    """One real mode of size q and weight 1/2: K_t = q^t."""
    C = torch.tensor([0.5, 0.0], dtype=torch.float64).expand(1, 1, 1, 2)
    dtA = torch.tensor([math.log(0.9999), 0.0], dtype=torch.float64).expand(1, 1, 2)
    expected = 0.9999 ** torch.arange(l, dtype=torch.float64)
    torch.testing.assert_close(vandermonde_kernel(C, dtA, l)[0, 0], expected, rtol=2e-12, atol=0)


@pytest.mark.parametrize("i", CASES)
def test_plain_product(i):
    kwargs = samples.make(samples.SHAPES[i], torch.float64)
    powers = np.exp(numbers(kwargs["dtA"])[..., None] * np.arange(kwargs["l"]))
    expected = 2 * np.einsum("men,enl->mel", numbers(kwargs["C"]), powers).real
    for impl in ("fused", "reference"):
        K = vandermonde_kernel(**kwargs, impl=impl)
        torch.testing.assert_close(K, torch.from_numpy(expected), rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("i", CASES)
def test_error_budget(i):
    """Twice the error of the definition in float32, whose exponentials are exact to the last bit; and one rounding."""

    def results(dtype: torch.dtype, impl: Any) -> list[Tensor]:
        kwargs = samples.make(samples.SHAPES[i], torch.float32)
        inputs = [kwargs[k].to(dtype).requires_grad_() for k in ("C", "dtA")]
        K = vandermonde_kernel(*inputs, kwargs["l"], impl=impl)
        up = torch.randn(K.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
        return [K.detach().double(), *(g.double() for g in torch.autograd.grad(K, inputs, up))]

    truth, same = results(torch.float64, "reference"), results(torch.float32, "reference")
    for exact, plain, ours in zip(truth, same, results(torch.float32, "fused"), strict=True):
        rounding = 2**-23 * exact.norm()
        assert (ours - exact).norm() <= 2 * (plain - exact).norm() + rounding


@pytest.mark.parametrize("i", CASES)
def test_gradients(i):
    kwargs = samples.make(samples.SHAPES[i], torch.float64)
    l = kwargs.pop("l")
    inputs = leaves(kwargs)
    assert torch.autograd.gradcheck(
        lambda *values: vandermonde_kernel(*values, l), tuple(inputs.values()), fast_mode=True
    )


def test_only_the_gradient_that_is_asked_for():
    kwargs = samples.make(samples.SHAPES[1], torch.float64)
    kwargs["C"].requires_grad_()
    vandermonde_kernel(**kwargs).sum().backward()
    both = samples.make(samples.SHAPES[1], torch.float64)
    leaves(both)
    vandermonde_kernel(**both).sum().backward()
    torch.testing.assert_close(kwargs["C"].grad, both["C"].grad, rtol=1e-12, atol=1e-12)
    assert kwargs["dtA"].grad is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_inputs_are_widened(dtype):
    kwargs = samples.make(samples.SHAPES[1], dtype)
    found, wide = vandermonde_kernel(**kwargs), vandermonde_kernel(kwargs["C"].float(), kwargs["dtA"], kwargs["l"])
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wide, rtol=0, atol=0)
    kwargs = samples.make_cauchy(samples.SHAPES[1], dtype)
    found, wide = cauchy_kernel(**kwargs), cauchy_kernel(**kwargs | {"v": kwargs["v"].float()})
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, wide, rtol=0, atol=0)


def test_faded_modes_end_in_zeros():
    """What is too small for float32 is 0, not subnormal, which would be slow."""
    C = torch.tensor([0.5, 0.0]).expand(1, 1, 1, 2)
    K = vandermonde_kernel(C, torch.tensor([-0.1, 0.0]).expand(1, 1, 2), 5000)[0, 0]
    assert (K[:800] > 0).all()
    assert (K[1400:] == 0).all()


@pytest.mark.parametrize("impl", ["fused", "reference"])
def test_state_is_that_of_the_recurrence(impl):
    inputs = state_inputs()
    ones = torch.ones(inputs["u"].shape, dtype=torch.float64)
    _, expected = diagonal_scan(
        inputs["u"],
        ones,
        inputs["dtA"],
        inputs["B"],
        inputs["B"],
        method="dirac",
        initial_state=inputs["initial_state"],
        lengths=inputs["lengths"],
        impl="reference",
    )
    final = vandermonde_state(**inputs, impl=impl)
    torch.testing.assert_close(final, expected, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(final[1], inputs["initial_state"][1], rtol=0, atol=0)


def test_state_in_pieces():
    inputs = state_inputs()
    inputs.pop("lengths")
    state = inputs.pop("initial_state")
    whole = vandermonde_state(**inputs, initial_state=state)
    for piece in inputs["u"].split([1, 120, 79], dim=1):
        state = vandermonde_state(**inputs | {"u": piece}, initial_state=state)
    torch.testing.assert_close(state, whole, rtol=1e-11, atol=1e-12)


def test_state_gradients():
    inputs = state_inputs()
    inputs["u"] = inputs["u"][:, :40].contiguous()
    inputs["lengths"] = torch.tensor([40, 0, 17])
    values = leaves(inputs)

    def function(*tensors: Tensor) -> Tensor:
        return vandermonde_state(**inputs | dict(zip(values, tensors, strict=True)))

    assert torch.autograd.gradcheck(function, tuple(values.values()), fast_mode=True)


def test_state_ignores_padding():
    inputs = state_inputs(torch.float32)
    behind = torch.arange(STATE["l"])[:, None] >= inputs["lengths"][:, None, None]
    expected = vandermonde_state(**inputs)
    inputs["u"] = torch.where(behind, torch.nan, inputs["u"]).requires_grad_()
    final = vandermonde_state(**inputs)
    torch.testing.assert_close(final, expected, rtol=0, atol=0)
    final.sum().backward()
    gradient = inputs["u"].grad
    assert gradient is not None
    assert torch.isfinite(gradient).all()
    assert (gradient[behind.expand_as(gradient)] == 0).all()


def cauchy_inputs(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """v (2, 3, 5), z (300,), w (3, 5), complex."""
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.standard_normal(shape) + 1j * rng.standard_normal(shape)  # noqa: E731
    return draw(2, 3, 5), 1j * rng.standard_normal(300), -0.5 + 1j * rng.standard_normal((3, 5))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-14)], ids=str)
@pytest.mark.parametrize("impl", ["fused", "reference"])
def test_cauchy_definition(impl, dtype, tolerance):
    v, z, w = (pairs(x).to(dtype) for x in cauchy_inputs())
    weights, nodes, poles = numbers(v), numbers(z), numbers(w)
    expected = (weights[..., None] / (nodes - poles[..., None])).sum(2)
    expected = expected + (weights.conj()[..., None] / (nodes - poles.conj()[..., None])).sum(2)
    found = numbers(cauchy_kernel(v, z, w, impl=impl))
    assert np.abs(found - expected).max() <= tolerance * np.abs(expected).max()


def test_cauchy_is_the_transform_of_vandermonde():
    """sum_t K_t s^-t over all t is s C / (s - exp(a)), summed over modes and conjugates."""
    kwargs = samples.make({"m": 1, "e": 2, "n": 3, "l": 20_000}, torch.float64)
    kwargs["dtA"][..., 0] = -0.01
    nodes = 1.001 * np.exp(1j * np.linspace(0, 3, 20))
    transform = vandermonde_kernel(**kwargs).numpy() @ (nodes ** -np.arange(20_000)[:, None])
    poles = pairs(np.exp(numbers(kwargs["dtA"])))
    found = numbers(cauchy_kernel(kwargs["C"], pairs(nodes), poles)) * nodes
    np.testing.assert_allclose(found, transform, rtol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("impl", ["fused", "reference"])
def test_cauchy_at_infinity(impl, dtype):
    v, z, w = (pairs(x).to(dtype) for x in cauchy_inputs())
    z[0], z[1], z[2] = torch.inf, torch.tensor([0.0, -torch.inf]), torch.finfo(dtype).max
    v.requires_grad_(), w.requires_grad_()
    k = cauchy_kernel(v, z, w, impl=impl)
    assert (k[:, :, :3].abs() < 1e-15).all()
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(k.sum(), [v, w]))


def test_cauchy_gradients():
    v, z, w = (pairs(x) for x in cauchy_inputs())
    v.requires_grad_(), w.requires_grad_()
    assert torch.autograd.gradcheck(lambda v, w: cauchy_kernel(v, z, w), (v, w), fast_mode=True)
    z.requires_grad_()
    cauchy_kernel(v, z, w).sum().backward()
    assert z.grad is None


def test_memory_does_not_grow_with_length():
    """The process grows by the kernel that it returns and, forward or backward, by less than 1 MiB beside it."""
    code = """
import resource, torch
from longwave.ops.ssm_kernel import samples
from longwave.ops.ssm_kernel.cpu import moments, vandermonde
torch.set_num_threads(2)
inputs = samples.make({"m": 1, "e": 64, "n": 32, "l": 1}, torch.float32)
def peak():
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
kept = [vandermonde(inputs["C"], inputs["dtA"], 2048)]
moments(kept[0], inputs["dtA"], True)
for l in (4096, 16384, 65536):
    start = peak()
    kept.append(vandermonde(inputs["C"], inputs["dtA"], l))
    moments(kept[-1], inputs["dtA"], True)
    print(peak() - start - kept[-1].nbytes)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    beside = [int(word) for word in done.stdout.split()]
    assert len(beside) == 3
    assert max(beside) < 2**20, beside


@pytest.mark.parametrize("function", ["vandermonde", "state", "cauchy"])
def test_compiles_as_one_graph_and_tells_the_truth_about_itself(function):
    calls = {
        "vandermonde": (vandermonde_kernel, samples.make(samples.SHAPES[1], torch.float32)),
        "state": (vandermonde_state, state_inputs(torch.float32)),
        "cauchy": (cauchy_kernel, samples.make_cauchy(samples.SHAPES[1], torch.float32)),
    }
    op, kwargs = calls[function]
    inputs = leaves({k: v for k, v in kwargs.items() if k != "z"})
    torch._dynamo.reset()
    compiled = torch.compile(lambda **kwargs: op(**kwargs), fullgraph=True, backend="aot_eager")
    eager = op(**kwargs)
    torch.testing.assert_close(compiled(**kwargs), eager, rtol=1e-6, atol=1e-6)
    expected = torch.autograd.grad(eager.sum(), list(inputs.values()))
    found = torch.autograd.grad(compiled(**kwargs).sum(), list(inputs.values()))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)

    seen: list[tuple[Any, tuple]] = []

    class Record(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "longwave":
                seen.append((func, args))
            return func(*args, **(kwargs or {}))

    with Record():
        torch.autograd.grad(op(**kwargs).sum(), list(inputs.values()))
    assert len(seen) == 2
    for operator, args in seen:
        detached = [a.detach() if isinstance(a, Tensor) else a for a in args]
        torch.library.opcheck(operator, detached, test_utils=("test_schema", "test_faketensor"))


def test_wrong_arguments_are_named():
    kwargs = samples.make(samples.SHAPES[1], torch.float32)
    with pytest.raises(ValueError, match=r"C must be \(m, e, n, 2\) = \(2, 7, 4, 2\), got \(2, 7, 3, 2\)"):
        vandermonde_kernel(**kwargs | {"C": kwargs["C"][:, :, 1:]})
    with pytest.raises(ValueError, match=r"dtA must be \(e, n, 2\), got \(7, 4\); see torch.view_as_real"):
        vandermonde_kernel(**kwargs | {"dtA": kwargs["dtA"][..., 0]})
    with pytest.raises(TypeError, match="complex64"):
        vandermonde_kernel(**kwargs | {"C": torch.zeros(2, 7, 4, 2, dtype=torch.complex64)})
    with pytest.raises(ValueError, match="at least 1, got 0"):
        vandermonde_kernel(**kwargs | {"l": 0})
    with pytest.raises(ValueError, match="'fast'"):
        vandermonde_kernel(**kwargs, impl="fast")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match=r"lengths must be \(b,\) = \(3,\), got \(2,\)"):
        vandermonde_state(**state_inputs() | {"lengths": torch.tensor([1, 2])})
    with pytest.raises(ValueError, match=r"z must be \(l, 2\)"):
        cauchy_kernel(**samples.make_cauchy(samples.SHAPES[1], torch.float32) | {"z": torch.zeros(9, 3)})

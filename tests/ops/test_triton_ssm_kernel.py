"""Kernel generation in Triton: under its interpreter on the CPU, or on a GPU where there is one (`-m gpu`)."""

import importlib.util

import pytest
import torch

from longwave.ops.ssm_kernel import api, cauchy_kernel, samples, vandermonde_kernel, vandermonde_state

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs Triton", allow_module_level=True)

torch.set_num_threads(1)

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
pytestmark = [pytest.mark.gpu] if ON_GPU else []
SHAPES = [*samples.SHAPES, {"m": 2, "e": 24, "n": 32, "l": 16384}] if ON_GPU else samples.SHAPES
FORMS = {
    "vandermonde": (vandermonde_kernel, samples.make, ("C", "dtA")),
    "cauchy": (cauchy_kernel, samples.make_cauchy, ("v", "w")),
}


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    """The module of the kernels, to which CPU tensors go as well."""
    from longwave.ops.ssm_kernel import triton

    if not ON_GPU:
        for launcher in ("vandermonde", "moments", "cauchy", "cauchy_backward"):
            monkeypatch.setattr(api, f"_{launcher}", getattr(triton, launcher))
    return triton


def results(form, shape, dtype, impl="reference", device="cpu"):
    """The kernel and its gradients, in float64, for three draws: a pole near a node outweighs all others."""
    draws = [_draw(form, shape, dtype, impl, device, seed) for seed in range(3)]
    return [torch.stack(found) for found in zip(*draws, strict=True)]


def _draw(form, shape, dtype, impl, device, seed):
    function, make, names = FORMS[form]
    given = make(shape, torch.float32, seed=seed)
    given = {k: v.to(device, dtype) if isinstance(v, torch.Tensor) else v for k, v in given.items()}
    leaves = [given[name].requires_grad_() for name in names]
    out = function(**given, impl=impl)
    up = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)
    return [t.detach().cpu().double() for t in (out, *torch.autograd.grad(out, leaves, up))]


def within_budget(form, shape):
    found = results(form, shape, torch.float32, "fused", DEVICE)
    same, truth = (results(form, shape, dtype) for dtype in (torch.float32, torch.float64))
    for ours, plain, exact in zip(found, same, truth, strict=True):
        assert torch.isfinite(ours).all()
        assert (ours - exact).norm() <= 2 * (plain - exact).norm() + 2**-23 * exact.norm()


@pytest.mark.parametrize("i", range(len(SHAPES)))
@pytest.mark.parametrize("form", FORMS)
def test_error_budget(form, i):
    within_budget(form, SHAPES[i])


def test_runs_of_l_make_no_difference(kernels, monkeypatch):
    """One channel: sums over l are cut."""
    monkeypatch.setattr(kernels, "_SUMS_LADDER", {"Q": 16, "FINE": 4})
    monkeypatch.setattr(kernels, "_SUMS", {"BI": 16, "BN": 16, "num_warps": 4})
    for form in FORMS:
        within_budget(form, {"m": 1, "e": 1, "n": 2, "l": 1500})


def test_phases_are_exact():
    """Up to two million radians, which float32 has to 1/8. A power of K is a product of four, and C of two of them."""
    l = 65536
    modes = torch.tensor([[-1e-6, 31.4159], [-3e-5, -0.731], [0.0, 19.37]], device=DEVICE)
    C = torch.eye(3, device=DEVICE)[:, None, :, None] * torch.tensor([0.8, -0.6], device=DEVICE)  # (m, 1, n, 2)
    K = vandermonde_kernel(C, modes[None], l).double()
    exact = vandermonde_kernel(C.double(), modes[None].double(), l, impl="reference")
    assert (K - exact).abs().max() <= 2 * 4e-7


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_state(dtype):
    """Rows of unequal length, NaN behind them, and gradients."""
    b, l, e, n = 3, 150, 5, 4
    modes = samples.make({"m": b, "e": e, "n": n, "l": l}, torch.float32)
    u, lengths = torch.randn(b, l, e).to(dtype), torch.tensor([150, 0, 81])
    u[2, 81:] = torch.nan
    found = []
    for device, wide, impl in ((DEVICE, dtype, "fused"), ("cpu", torch.float64, "reference")):
        leaves = [t.to(device, wide).requires_grad_() for t in (u, modes["C"][0])]
        leaves += [t.to(device, wide if wide == torch.float64 else torch.float32).requires_grad_()
                   for t in (modes["dtA"], modes["C"])]  # fmt: skip
        ends = lengths.to(device)
        state = vandermonde_state(*leaves[:3], initial_state=leaves[3], lengths=ends, impl=impl)
        grads = torch.autograd.grad(state.square().sum(), leaves)
        found.append([t.detach().cpu().double() for t in (state, *grads)])
    for ours, exact in zip(*found, strict=True):
        torch.testing.assert_close(ours, exact, rtol=0, atol=4 * torch.finfo(dtype).eps * float(exact.abs().max()))

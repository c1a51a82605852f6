"""The long convolution's form for GPUs, on the CPU or on a GPU where there is one (`-m gpu`). See test_triton.py."""

import importlib.util

import pytest
import torch
from test_fft_conv import inputs, oracle

from longwave.ops.fft_conv import FilterSpectrum, api, fft_conv, fft_conv_step, reference

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs Triton", allow_module_level=True)

torch.set_num_threads(1)

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
pytestmark = [pytest.mark.gpu] if ON_GPU else []
# A GPU's float64 goes to the reference.
DTYPE = torch.float32 if ON_GPU else torch.float64
CLOSE = {"rtol": 0, "atol": 3e-6} if ON_GPU else {"rtol": 1e-12, "atol": 1e-12}


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    """The module of the GPU's form, to which CPU tensors go as well."""
    from longwave.ops.fft_conv import triton

    if not ON_GPU:
        for launcher in ("forward", "backward", "step", "spectrum"):
            monkeypatch.setattr(api, f"_{launcher}", getattr(triton, launcher))
    return triton


def given(b, l, e, k):
    x, kernel = inputs(b, l, e, k)
    context = {"D": torch.randn(e), "initial_state": torch.randn(b, k - 1, e), "reset": torch.rand(b, l) < 0.05}
    context["lengths"] = torch.randint(0, l + 1, (b,))
    return _to(x), _to(kernel), {name: _to(value) for name, value in context.items()}


def _to(value):
    return value.to(DEVICE, DTYPE if value.is_floating_point() else value.dtype)


@pytest.mark.parametrize("k", [1, 2, 9, 200])
@pytest.mark.parametrize("l", [1, 7, 100])
def test_any_length_and_any_filter(l, k):
    x, kernel = inputs(2, l, 3, k)
    y, state = fft_conv(_to(x), _to(kernel))
    torch.testing.assert_close(y.cpu().double(), oracle(x, kernel), **CLOSE)
    seen = torch.cat([torch.zeros(2, k - 1, 3), x], 1)
    torch.testing.assert_close(state.cpu().double(), seen[:, l:].to(DTYPE).double(), rtol=0, atol=0)


@pytest.mark.parametrize("left_out", ["", "reset", "initial_state", "lengths"])
@pytest.mark.parametrize("chunk_len", [None, 1, 5, 1000])
def test_gradients_are_the_references(chunk_len, left_out):
    """Blocks, documents, a state from before, and rows of unequal length."""
    x, kernel, context = given(3, 90, 5, 23)
    context.pop(left_out, None)
    leaves = [t.requires_grad_() for t in (x, kernel, *context.values()) if t.is_floating_point()]
    found = []
    for options in ({"chunk_len": chunk_len}, {"impl": "reference"}):
        out = fft_conv(x, kernel, **context, **options)
        up = [torch.randn(o.shape, generator=torch.Generator().manual_seed(1)).to(o) for o in out]
        found.append([*out, *torch.autograd.grad(out, leaves, up)])
    for ours, truth in zip(*found, strict=True):
        scale = 1 + truth.detach().abs().max().item()
        torch.testing.assert_close(ours, truth, rtol=0, atol=CLOSE["atol"] * scale)


@pytest.mark.parametrize("l", [1, 50, 300])
@pytest.mark.parametrize("for_l", [1, 128])
def test_cached_filter(kernels, l, for_l):
    x, kernel, context = given(2, l, 19, 31)
    cached = FilterSpectrum(kernel, kernels.spectrum(kernel, for_l, None))
    for documents in ({}, {"reset": context.pop("reset")}):
        for ours, truth in zip(
            fft_conv(x, cached, **context, **documents), fft_conv(x, kernel, **context, **documents), strict=True
        ):
            torch.testing.assert_close(ours, truth, **CLOSE)


def test_blocks_where_the_filter_is_short(kernels):
    """A short filter is not carried through one transform as long as the sequence."""
    q, n = kernels.block_size(64, 1 << 20, None, kernels._cost)
    assert 2 * n < 1 << 18
    assert q == 2 * n - 63


@pytest.mark.parametrize("k", [1, 2, 12])
def test_steps_are_the_sequence(k):
    x, kernel = (t.to(DEVICE, torch.float32) for t in inputs(3, 9, 70, k))
    D, state = torch.randn(70, device=DEVICE), torch.randn(3, k - 1, 70, device=DEVICE)
    y, final = fft_conv(x, kernel, D=D, initial_state=state)
    steps = [fft_conv_step(state, x[:, t], kernel, D=D) for t in range(9)]
    torch.testing.assert_close(torch.stack(steps, 1), y, rtol=0, atol=2e-6)
    torch.testing.assert_close(state, final, rtol=0, atol=0)


@pytest.mark.parametrize("m", [16, 300])
def test_steps_into_a_buffer_with_room(m):
    """Rows of unequal length, one of them full, which on a GPU cannot raise and is left alone; the sum in parts."""
    kernel = (torch.randn(20, m + 5) / m**0.5).to(DEVICE)
    state, length = torch.randn(3, m, 20, device=DEVICE), torch.tensor([0, m - 3, m // 2], device=DEVICE)
    expected, D = state.clone(), torch.randn(20, device=DEVICE)
    wide = torch.cat([state, state], 2)[..., :20]  # a view with gaps, updated in place
    for _ in range(3):
        token = torch.randn(3, 20, device=DEVICE)
        y = fft_conv_step(wide, token, kernel, D=D, length=length)
        truth = reference.fft_conv_step(expected, token, kernel, D, length)
        torch.testing.assert_close(y, truth, rtol=1e-5, atol=2e-6)
        length += 1
    torch.testing.assert_close(wide, expected, rtol=0, atol=0)
    fft_conv_step(wide, token, kernel, D=D, length=length)
    torch.testing.assert_close(wide[1], expected[1], rtol=0, atol=0)

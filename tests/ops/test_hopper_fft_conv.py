"""The long convolution's kernels for Hopper, run by numpy (see numpy_gluon.py). On a GPU: test_gpu_fft_conv.py."""

import importlib.util

import numpy as np
import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("needs Triton", allow_module_level=True)

import numpy_gluon
from test_ops import cast, error

from longwave.ops import gluon_fft
from longwave.ops.fft_conv import FilterSpectrum, api, fft_conv, hopper, hopper_kernels, hopper_long

torch.set_num_threads(1)


def _cos_sin(quarter, rest):
    phase = (quarter + rest) * (np.pi / 2)
    return np.cos(phase), None, np.sin(phase)


@pytest.fixture
def forms(monkeypatch):
    """Send the operator's calls on the CPU to Hopper's launchers; transforms of at most 32 numbers in one program."""
    short, long, _ = numpy_gluon.kernels(hopper_kernels, hopper_long, gluon_fft, _cos_sin=_cos_sin)
    for module, kernels in ((hopper_kernels, short), (hopper_long, long)):
        for name, kernel in kernels.items():
            monkeypatch.setattr(module, name, kernel)
    for launcher in ("forward", "backward", "spectrum"):
        monkeypatch.setattr(api, f"_{launcher}", getattr(hopper, launcher))
    monkeypatch.setattr(hopper, "_RADICES", {8: (4, 2), 16: (2, 2, 4), 32: (8, 4), 64: (4, 4, 4), 128: (8, 16)})
    hopper._plan.cache_clear()

    def use(form):
        monkeypatch.setattr(hopper, "_LONGEST", 64 if form == "in one program" else 32)
        monkeypatch.setattr(hopper, "_CHUNK", 1 << 16 if form == "chunk after chunk" else 1 << 10)

    yield use
    hopper._plan.cache_clear()


def results(given, up, **options):
    """y, the final state, and the gradients of what is given, through the results that `up` names."""
    leaves = {name: t.clone().requires_grad_() for name, t in given.items() if t.is_floating_point()}
    found = dict(zip(("y", "final"), fft_conv(**given | leaves, **options), strict=True))
    gradients = torch.autograd.grad([found[name] for name in up], list(leaves.values()), list(up.values()))
    return found | {f"d{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}


@pytest.mark.parametrize("form", ["in one program", "in passes", "chunk after chunk"])
@pytest.mark.parametrize(
    ("l", "k", "options", "context"),
    [
        (60, 60, {}, ()),
        (90, 20, {}, ()),
        (10, 30, {}, ("initial_state",)),
        (40, 1, {}, ()),
        (150, 70, {"chunk_len": 30}, ()),
        (150, 40, {"chunk_len": 50}, ("initial_state", "lengths")),
        (70, 70, {}, ("initial_state", "lengths", "reset")),
    ],
)
@pytest.mark.parametrize("through", [("y",), ("y", "final")])
def test_every_block(forms, form, l, k, options, context, through):
    forms(form)
    b, e = 2, 3
    given = {"x": torch.randn(b, l, e), "kernel": torch.randn(e, k), "D": torch.randn(e)}
    given |= {"initial_state": torch.randn(b, k - 1, e), "reset": torch.rand(b, l) < 0.05}
    given["lengths"] = torch.randint(0, l + 1, (b,))
    given = {name: t for name, t in given.items() if name in ("x", "kernel", "D", *context)}
    up = {"y": torch.randn(b, l, e), "final": torch.randn(b, k - 1, e)}
    up = {name: up[name] for name in through}
    truth = results(cast(given, torch.float64), cast(up, torch.float64), impl="reference")
    for name, ours in results(given, up, **options).items():
        assert error(ours, truth[name]) <= 1e-6 * (1 + truth[name].norm().item()), name


@pytest.mark.parametrize("form", ["in one program", "in passes", "chunk after chunk"])
@pytest.mark.parametrize("for_l", [20, 90])
def test_cached_filter(forms, form, for_l):
    forms(form)
    x, kernel, D = torch.randn(2, 70, 3), torch.randn(3, 40), torch.randn(3)
    cached = FilterSpectrum(kernel, hopper.spectrum(kernel, for_l, None))
    y, _ = fft_conv(x, cached, D=D)
    torch.testing.assert_close(y, fft_conv(x, kernel, D=D, impl="reference")[0], rtol=0, atol=2e-5)

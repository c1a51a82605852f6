"""The long convolution on a GPU at sizes that test_gpu_kernels.py does not reach, against float64 FFTs. `-m gpu`."""

import pytest
import torch
from torch.fft import irfft, rfft
from torch.nn.functional import pad

from longwave.ops.fft_conv import fft_conv, filter_spectrum

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
BUDGET = {torch.float32: 5e-7, torch.bfloat16: 4e-3, torch.float16: 6e-4}


def truth(x, kernel, D, initial_state, lengths):
    """The operator, in one FFT."""
    b, l, e = x.shape
    k = kernel.shape[1]
    real = (torch.arange(l, device=x.device) < lengths[:, None])[..., None]
    inputs = torch.cat([initial_state, torch.where(real, x, 0)], 1)
    n = inputs.shape[1] + k
    y = irfft(rfft(inputs, n, dim=1) * rfft(kernel, n).t(), n, dim=1)[:, k - 1 : k - 1 + l] + D * x
    padded = pad(inputs, (0, 0, 0, 1))
    at = lengths[:, None] + torch.arange(k - 1, device=x.device)
    return torch.where(real, y, 0), padded.gather(1, at[..., None].expand(b, k - 1, e))


def close(found, expected, budget):
    for ours, true in zip(found, expected, strict=True):
        assert (ours - true).norm() <= budget * true.norm()


@pytest.mark.parametrize("dtype", BUDGET, ids=str)
@pytest.mark.parametrize(
    ("l", "k", "chunk_len"),
    [
        (1, 5000, None),
        (2048, 2048, None),
        (5000, 5000, None),
        (20_000, 300, None),
        (9000, 7000, 4000),
        (70_000, 66_000, None),
    ],
)
def test_long_rows(l, k, chunk_len, dtype):
    """State and gradients as well; channels that fill no block, and inputs with gaps between them."""
    g = torch.Generator("cuda").manual_seed(l)
    b, e = 2, 21

    def random(*size):
        return torch.randn(*size, generator=g, device="cuda").to(dtype)

    wide = random(b, l, 2 * e).requires_grad_()
    kernel, D, state = (t.requires_grad_() for t in (random(e, k) / k**0.5, random(e), random(b, k - 1, e)))
    lengths = torch.tensor([l - l // 3, l], device="cuda")
    leaves = (wide, kernel, D, state)
    context = {"initial_state": state, "lengths": lengths}
    out = fft_conv(wide[..., :e], kernel, D=D, chunk_len=chunk_len, **context)
    up = [random(*t.shape) for t in out]
    found = [*out, *torch.autograd.grad(out, leaves, up)]
    exact = [t.detach().double().requires_grad_() for t in leaves]
    expected = truth(exact[0][..., :e], *exact[1:], lengths)
    expected = [*expected, *torch.autograd.grad(expected, exact, [t.double() for t in up])]
    close(found, expected, BUDGET[dtype])
    again = fft_conv(wide[..., :e], kernel, D=D, chunk_len=chunk_len, **context)
    for one, other in zip(found, [*again, *torch.autograd.grad(again, leaves, up)], strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(("l", "for_l"), [(300, 300), (300, 3000), (9000, 300), (9000, 9000)])
def test_cached_filters(l, for_l):
    x, kernel = torch.randn(2, l, 40, device="cuda"), torch.randn(40, 600, device="cuda") / 600**0.5
    with torch.no_grad():
        y, _ = fft_conv(x, filter_spectrum(kernel, for_l))
    close([y], [fft_conv(x.double(), kernel.double())[0]], BUDGET[torch.float32])

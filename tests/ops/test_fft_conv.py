"""What is special to the long convolution: every size and block, numpy as the oracle, cached filters, steps, memory."""

import numpy as np
import pytest
import torch

from longwave.ops import fft_blocks, numba_fft
from longwave.ops.fft_conv import fft_conv, fft_conv_step, filter_spectrum, reference

torch.set_num_threads(1)


def inputs(b, l, e, k, dtype=torch.float64):
    return torch.randn(b, l, e, dtype=dtype), torch.randn(e, k, dtype=dtype) / k**0.5


def oracle(x, kernel):
    """numpy's sum over the taps, channel by channel."""
    rows = [[np.convolve(u, h)[: len(u)] for u, h in zip(row.T, kernel.numpy(), strict=True)] for row in x.numpy()]
    return torch.from_numpy(np.array(rows)).transpose(1, 2)


@pytest.mark.parametrize("k", [1, 2, 9, 64, 200])
@pytest.mark.parametrize("l", [1, 2, 7, 64, 100])
def test_any_length_and_any_filter(l, k):
    x, kernel = inputs(2, l, 3, k)
    y, state = fft_conv(x, kernel)
    torch.testing.assert_close(y, oracle(x, kernel), rtol=1e-12, atol=1e-12)
    seen = torch.cat([torch.zeros(2, k - 1, 3), x], 1)
    torch.testing.assert_close(state, seen[:, seen.shape[1] - (k - 1) :], rtol=0, atol=0)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 6, 8, 16, 15, 45, 96, 320, 512, 720, 1024])
def test_transform_evaluates_at_the_roots(n):
    """The values at the roots of t^n - i, each once, in whatever order."""
    lanes = numba_fft.VECTOR_BYTES // 8
    plan = numba_fft.plan(n, np.dtype(np.float64))
    rng = np.random.default_rng(0)
    z = numba_fft.points(n, np.empty(0))
    z[:] = rng.standard_normal(len(z))
    re, im = z.reshape(n, 2, lanes).copy().transpose(1, 0, 2)
    numba_fft.transform(z, *plan)
    values = z.reshape(n, 2, lanes).transpose(1, 0, 2)
    roots = np.exp(1j * (np.pi / 2 + 2 * np.pi * np.arange(n)) / n)
    expected = np.vander(roots, n, increasing=True) @ (re + 1j * im)
    for c in range(lanes):
        distance = np.abs((values[0] + 1j * values[1])[:, None, c] - expected[None, :, c])
        assert sorted(distance.argmin(1)) == list(range(n))
        assert distance.min(1).max() < 1e-11 * n


@pytest.mark.parametrize("least", [1, 2, 7, 11, 17, 33, 1000, 1025, 2048, 4097, 100_001])
def test_good_sizes_waste_little(least):
    n = fft_blocks.good_size(least)
    assert least <= n < 1.26 * least + 1
    for prime in (2, 3, 5):
        while n % prime == 0:
            n //= prime
    assert n == 1


@pytest.mark.parametrize("chunk_len", [1, 5, 64, 1000])
def test_chunks_are_the_whole(chunk_len):
    x, kernel = inputs(2, 90, 17, 23)
    state, D = torch.randn(2, 22, 17, dtype=torch.float64), torch.randn(17, dtype=torch.float64)
    reset = torch.rand(2, 90) < 0.05
    given = {"D": D, "initial_state": state, "reset": reset}
    y, final = fft_conv(x, kernel, **given)
    z, other = fft_conv(x, kernel, **given, chunk_len=chunk_len)
    torch.testing.assert_close(z, y, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(other, final, rtol=0, atol=0)


@pytest.mark.parametrize("l", [1, 10, 50, 300])
@pytest.mark.parametrize("for_l", [1, 50, 128])
def test_cached_filter(l, for_l):
    x, kernel = inputs(2, l, 19, 31)
    cached = filter_spectrum(kernel, for_l)
    given = {"D": torch.randn(19).double(), "initial_state": torch.randn(2, 30, 19).double()}
    given |= {"reset": torch.rand(2, l) < 0.05, "lengths": torch.randint(0, l + 1, (2,))}
    expected = fft_conv(x, kernel, **given)
    kernel.zero_()  # does not reach the cached filter
    for ours, truth in zip(fft_conv(x, cached, **given), expected, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-11, atol=1e-11)


def test_cached_filter_is_for_inference():
    x, kernel = inputs(1, 8, 2, 4)
    cached = filter_spectrum(kernel, 8)
    with pytest.raises(ValueError, match="no gradient; pass the kernel itself"):
        fft_conv(x.requires_grad_(), cached)
    with torch.no_grad():
        fft_conv(x, cached)
    with pytest.raises(ValueError, match="chunk_len=4 is given to filter_spectrum"):
        fft_conv(x.detach(), cached, chunk_len=4)
    with pytest.raises(TypeError, match=r"float32 spectrum, got torch\.float64"):
        fft_conv(x.detach().float(), cached)


def test_future_reaches_the_past_by_rounding_alone():
    """A circular convolution of too short a length would bring later tokens around to the first ones."""
    x, kernel = inputs(1, 257, 16, 257, torch.float32)
    changed = x.clone()
    changed[:, 200:] += 1.0
    y, z = fft_conv(x, kernel)[0], fft_conv(changed, kernel)[0]
    assert (z - y)[:, :200].abs().max() < 2e-6
    assert (z - y)[:, 200:].abs().max() > 0.1


def test_float32_is_as_good_as_torchs_fft():
    x, kernel = inputs(1, 2048, 32, 2048, torch.float32)
    truth = torch.fft.irfft(torch.fft.rfft(x.double(), 4096, 1) * torch.fft.rfft(kernel.double(), 4096).T, 4096, 1)
    theirs = torch.fft.irfft(torch.fft.rfft(x, 4096, 1) * torch.fft.rfft(kernel, 4096).T, 4096, 1)
    errors = [(y[:, :2048] - truth[:, :2048]).norm() for y in (fft_conv(x, kernel)[0], theirs)]
    assert errors[0] < 1.5 * errors[1]


def test_results_do_not_depend_on_threads():
    x, kernel = inputs(5, 40, 20, 11, torch.float32)
    x.requires_grad_()
    kernel.requires_grad_()

    def run():
        y, _ = fft_conv(x, kernel)
        return y, *torch.autograd.grad(y.square().sum(), (x, kernel))

    one = run()
    torch.set_num_threads(3)
    try:
        three = run()
    finally:
        torch.set_num_threads(1)
    for a, b in zip(one, three, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("k", [1, 2, 12])
def test_steps_are_the_sequence(dtype, k):
    x, kernel = inputs(3, 9, 70, k)
    x, D = x.to(dtype), torch.randn(70)
    state = torch.randn(3, k - 1, 70).to(dtype)
    y, final = fft_conv(x, kernel.float(), D=D, initial_state=state)
    steps = [fft_conv_step(state, x[:, t], kernel.float(), D=D) for t in range(9)]
    tolerance = {"rtol": 0, "atol": 8 * torch.finfo(dtype).eps * float(y.abs().max())}
    torch.testing.assert_close(torch.stack(steps, 1), y, **tolerance)
    torch.testing.assert_close(state, final, rtol=0, atol=0)


@pytest.mark.parametrize("device_form", [True, False])
def test_steps_into_a_buffer_with_room(device_form):
    """Rows of unequal length: each is the convolution of what it holds."""
    step = reference.fft_conv_step if device_form else lambda s, x, h, D, n: fft_conv_step(s, x, h, D=D, length=n)
    x, kernel = inputs(3, 12, 20, 30)
    state, length = torch.zeros(3, 16, 20, dtype=torch.float64), torch.tensor([0, 4, 1])
    for i, n in enumerate(length):
        state[i, :n] = x[i, :n]
    D = torch.randn(20, dtype=torch.float64)
    for _ in range(8):
        token = torch.stack([x[i, n] for i, n in enumerate(length)])
        y = step(state, token, kernel, D, length)
        for i, n in enumerate(length):
            whole, _ = fft_conv(x[i : i + 1, : n + 1], kernel, D=D)
            torch.testing.assert_close(y[i], whole[0, n], rtol=1e-11, atol=1e-11)
        length += 1
    torch.testing.assert_close(state[1, :12], x[1], rtol=0, atol=0)


def test_step_without_room_is_refused():
    state, kernel = torch.zeros(2, 4, 3), torch.randn(3, 6)
    with pytest.raises(ValueError, match="length=4 leaves no room in a state of 4 and a filter of 6"):
        fft_conv_step(state, torch.ones(2, 3), kernel, length=torch.tensor([1, 4]))
    with pytest.raises(ValueError, match="length=2 leaves no room in a state of 4 and a filter of 2"):
        fft_conv_step(state, torch.ones(2, 3), kernel[:, :2], length=torch.tensor([1, 2]))
    assert not state.any()


def test_step_writes_into_a_view():
    states = torch.zeros(2, 5, 3, 8).transpose(1, 2)  # not contiguous
    fft_conv_step(states[:, :, 1], torch.ones(2, 8), torch.ones(8, 4))
    assert (states[:, -1, 1] == 1).all()
    assert states[:, :, 0].abs().sum() == 0


def test_filter_of_another_width_is_named():
    with pytest.raises(ValueError, match=r"kernel must be \(e, k\) with e = 3 and k >= 1, got \(4, 5\)"):
        fft_conv(torch.zeros(1, 2, 3), torch.zeros(4, 5))
    with pytest.raises(ValueError, match="chunk_len must be None or at least 1, got 0"):
        fft_conv(torch.zeros(1, 2, 3), torch.zeros(3, 5), chunk_len=0)


def test_working_memory_does_not_grow_with_the_length():
    """With chunk_len, the points that a tile takes are those of one block, whatever l is."""
    from longwave.ops.fft_conv import cpu

    sizes = {cpu._sizes(64, l, 192, torch.float32)[1].n for l in (192, 10_000, 10_000_000)}
    assert sizes == {fft_blocks.good_size((63 + 192 + 1) // 2)}

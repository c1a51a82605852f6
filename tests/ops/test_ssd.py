"""What is special to ssd: independent definitions, extremes of decay, documents, the step."""

import itertools

import numpy as np
import pytest
import torch

from longwave.ops.ssd import ssd, ssd_step
from longwave.ops.ssd.samples import SHAPES, initial_state, make

ROW = {"b": 2, "l": 70, "h": 4, "p": 8, "g": 2, "n": 16, "dt_softplus": True}


def in_numpy(x, dt, A, B, C, D, dt_bias, initial_state):
    """The recurrence in float64, element by element; dt is the step size before its bias and softplus."""
    b, l, h, p = x.shape
    g = B.shape[2]
    y, state = np.zeros((b, l, h, p)), initial_state.copy()
    for i in range(b):
        for t in range(l):
            for j in range(h):
                size = np.log1p(np.exp(dt[i, t, j] + dt_bias[j]))
                b_t, c_t = B[i, t, j // (h // g)], C[i, t, j // (h // g)]
                state[i, j] = np.exp(size * A[j]) * state[i, j] + size * np.outer(x[i, t, j], b_t)
                y[i, t, j] = state[i, j] @ c_t + D[j] * x[i, t, j]
    return y, state


@pytest.mark.parametrize("impl", ["fused", "reference"])
def test_equals_a_loop_in_numpy(impl):
    kwargs = make(ROW, torch.float64)
    state = initial_state(ROW, torch.float64)
    names = ("x", "dt", "A", "B", "C", "D", "dt_bias")
    truth_y, truth_state = in_numpy(*(kwargs[name].numpy() for name in names), state.numpy())
    y, final = ssd(**kwargs, initial_state=state, impl=impl)
    np.testing.assert_allclose(y.numpy(), truth_y, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(final.numpy(), truth_state, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("g", [1, 2, 4])
def test_equals_transformers(g):
    """The chunked torch path of another library, which materialises everything per head."""
    modeling = pytest.importorskip("transformers.models.mamba2.modeling_mamba2")
    chunk_scan = modeling.mamba2_chunk_scan
    kwargs = make(ROW | {"g": g}, torch.float32)
    kwargs["dt_limit"] = (0.01, 0.08)
    x, dt, A, B, C = (kwargs[name] for name in ("x", "dt", "A", "B", "C"))
    rest = {name: kwargs[name] for name in ("D", "dt_bias", "dt_softplus", "dt_limit")}
    truth_y, truth_state = chunk_scan(x, dt, A, B, C, 16, **rest, return_final_states=True)
    y, final = ssd(**kwargs)
    torch.testing.assert_close(y, truth_y, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(final, truth_state, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("chunk_len", [1, 7, 8, 64, 1000])
def test_chunk_length_does_not_matter(chunk_len):
    kwargs = {k: v for k, v in make(ROW, torch.float64).items() if k != "chunk_len"}
    leaves = [kwargs[name].requires_grad_() for name in ("x", "dt", "A", "B", "C", "D", "dt_bias")]
    results = []
    for q in (None, chunk_len):
        y, final = ssd(**kwargs, chunk_len=q)
        grads = torch.autograd.grad(y.square().sum() + final.square().sum(), leaves)
        results.append((y, final, *grads))
    for ours, truth in zip(*results, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_steps_equal_the_sequence(shape, dtype):
    kwargs = make(shape, dtype)
    state = initial_state(shape, dtype)
    y, final = ssd(**kwargs, initial_state=state)
    sequence = {name: kwargs.pop(name) for name in ("x", "dt", "B", "C")}
    kwargs.pop("chunk_len")
    stepped = [ssd_step(state, **{k: v[:, t] for k, v in sequence.items()}, **kwargs) for t in range(shape["l"])]
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-11, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(torch.stack(stepped, 1), y, rtol=tolerance, atol=tolerance)
    tolerance = min(tolerance, 1e-5)
    torch.testing.assert_close(state, final, rtol=tolerance, atol=tolerance)


def test_step_updates_a_strided_state_in_place():
    kwargs = make(ROW, torch.float32)
    token = {name: kwargs.pop(name)[:, 0] for name in ("x", "dt", "B", "C")}
    kwargs.pop("chunk_len")
    dense = initial_state(ROW, torch.float32)
    wide = torch.zeros(2, 4, 8, 32)
    view = wide[..., ::2]
    view.copy_(dense)
    torch.testing.assert_close(ssd_step(view, **token, **kwargs), ssd_step(dense, **token, **kwargs), rtol=0, atol=0)
    torch.testing.assert_close(view, dense, rtol=0, atol=0)
    assert (wide[..., 1::2] == 0).all()


@pytest.mark.parametrize("a", [-1e-6, -1e-3, -1.0, -30.0, -1000.0])
def test_weak_and_strong_decay(a):
    """float32 within twice the error of the float32 recurrence, for decays from one to nothing at all."""
    kwargs = make(ROW | {"l": 150, "dt_bias": False}, torch.float32)
    kwargs["A"] = torch.full((4,), a)
    state = initial_state(ROW, torch.float32)
    in_float64 = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
    truth = ssd(**in_float64, initial_state=state.double(), impl="reference")
    same = ssd(**kwargs, initial_state=state, impl="reference")
    kernel = ssd(**kwargs, initial_state=state)
    for ours, reference, exact in zip(kernel, same, truth, strict=True):
        budget = 2 * (reference - exact).norm() + torch.finfo(torch.float32).eps * exact.norm()
        assert (ours - exact).norm() <= budget


def test_a_decay_in_closed_form():
    """x, B, C of one, dt of one: y_t is the geometric sum of e^A."""
    l, a = 200, -0.01
    one = torch.ones(1, l, 1, 1)
    y, final = ssd(one, one[..., 0], torch.tensor([a]), one, one)
    ratio = np.exp(a)
    truth = torch.tensor((1 - ratio ** np.arange(1, l + 1)) / (1 - ratio))
    torch.testing.assert_close(y.flatten().double(), truth, rtol=1e-5, atol=0)
    torch.testing.assert_close(final.flatten().double(), truth[-1:], rtol=1e-5, atol=0)


def test_steps_of_no_size():
    """dt of -200 before the softplus: the state stays, bit for bit, and only D x comes out of nothing."""
    kwargs = make(ROW, torch.float32)
    kwargs["dt"] = torch.full_like(kwargs["dt"], -200.0).requires_grad_()
    state = initial_state(ROW, torch.float32)
    _, final = ssd(**kwargs, initial_state=state)
    torch.testing.assert_close(final, state, rtol=0, atol=0)
    y, _ = ssd(**kwargs)
    torch.testing.assert_close(y, kwargs["D"][:, None] * kwargs["x"], rtol=0, atol=0)
    (gradient,) = torch.autograd.grad(y.sum(), kwargs["dt"])
    assert (gradient == 0).all()


def test_no_gradient_where_dt_is_clamped():
    kwargs = make(ROW, torch.float64) | {"dt_limit": (0.02, 0.05)}
    kwargs["dt"].requires_grad_()
    sizes = torch.nn.functional.softplus(kwargs["dt"] + kwargs["dt_bias"])
    clamped = (sizes < 0.02) | (sizes > 0.05)
    (gradient,) = torch.autograd.grad(ssd(**kwargs)[0].square().sum(), kwargs["dt"])
    assert 0 < clamped.sum() < clamped.numel()
    assert (gradient[clamped] == 0).all()
    assert (gradient[~clamped] != 0).all()


def test_packed_documents_equal_separate_ones():
    """One row of three documents gives, bit for bit in float64's budget, what each gives alone; so do gradients."""
    kwargs = make(ROW | {"b": 1, "l": 90}, torch.float64)
    sequence = {name: kwargs.pop(name).requires_grad_() for name in ("x", "dt", "B", "C")}
    cuts = [0, 1, 40, 90]
    reset = torch.zeros(1, 90, dtype=torch.bool)
    reset[0, cuts[1:-1]] = True
    packed, final = ssd(**sequence, **kwargs, reset=reset)
    pieces = [
        ssd(**{k: v[:, start:end] for k, v in sequence.items()}, **kwargs) for start, end in itertools.pairwise(cuts)
    ]
    separate = torch.cat([y for y, _ in pieces], 1)
    torch.testing.assert_close(packed, separate, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(final, pieces[-1][1], rtol=1e-11, atol=1e-12)
    ours = torch.autograd.grad(packed.square().sum(), sequence.values())
    truth = torch.autograd.grad(separate.square().sum(), sequence.values())
    for a, b in zip(ours, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("t", [0, 5, 20, 66])
def test_nan_reaches_the_later_tokens_of_its_document_only(t):
    kwargs = make(ROW, torch.float32)
    clean, _ = ssd(**kwargs, reset=torch.arange(70).eq(50).repeat(2, 1))
    kwargs["x"][0, t] = torch.nan
    y, final = ssd(**kwargs, reset=torch.arange(70).eq(50).repeat(2, 1))
    end = 50 if t < 50 else 70
    assert y[0, t:end].isnan().all()
    assert final[0].isnan().all() == (end == 70)
    torch.testing.assert_close(y[0, :t], clean[0, :t], rtol=0, atol=0)
    torch.testing.assert_close(y[0, end:], clean[0, end:], rtol=0, atol=0)
    torch.testing.assert_close(y[1], clean[1], rtol=0, atol=0)


def test_same_on_any_number_of_threads():
    kwargs = make(ROW | {"h": 12}, torch.float32)
    leaves = [kwargs[name].requires_grad_() for name in ("x", "dt", "A", "B", "C", "D", "dt_bias")]
    before, results = torch.get_num_threads(), []
    try:
        for n in (1, 3):
            torch.set_num_threads(n)
            y, final = ssd(**kwargs)
            results.append((y, final, *torch.autograd.grad(y.sum() + final.sum(), leaves)))
    finally:
        torch.set_num_threads(before)
    for one, three in zip(*results, strict=True):
        torch.testing.assert_close(one, three, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dt_limit": (0.2, 0.1)}, r"\(0.2, 0.1\)"),
        ({"chunk_len": 0}, "got 0"),
        ({"A": torch.zeros(5)}, r"A must be \(h,\) = \(4,\), got \(5,\)"),
        ({"D": torch.zeros(4, 3)}, r"got \(4, 3\)"),
        ({"B": torch.zeros(2, 70, 3, 16), "C": torch.zeros(2, 70, 3, 16)}, "h = 4, got g = 3"),
        ({"initial_state": torch.zeros(2, 4, 16, 8)}, r"\(b, h, p, n\)"),
    ],
)
def test_errors_name_the_value(change, message):
    with pytest.raises(ValueError, match=message):
        ssd(**make(ROW, torch.float32) | change)


def test_step_refuses_a_state_in_16_bits():
    kwargs = make(ROW, torch.bfloat16)
    token = {name: kwargs.pop(name)[:, 0] for name in ("x", "dt", "B", "C")}
    kwargs.pop("chunk_len")
    with pytest.raises(TypeError, match="bfloat16"):
        ssd_step(torch.zeros(2, 4, 8, 16, dtype=torch.bfloat16), **token, **kwargs)

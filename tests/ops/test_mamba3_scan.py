"""What is special to mamba3_scan: independent definitions, extremes of decay and angle, documents, the step."""

import cmath
import itertools
import math

import numpy as np
import pytest
import torch

from longwave.ops.mamba3_scan import Mamba3ScanState, mamba3_scan, mamba3_scan_step
from longwave.ops.mamba3_scan.samples import SHAPES, initial_state, make
from longwave.ops.ssd import ssd

ROW = {"b": 2, "l": 70, "h": 4, "p": 8, "r": 1, "g": 2, "n": 16, "s": 3, "z": True}
RANKS = ROW | {"l": 40, "r": 3, "mimo": True, "pairs": "halves"}
SEQUENCE = ("x", "dt", "A", "B", "C", "trap", "angles", "z")


def in_numpy(kwargs, state):
    """The recurrence in float64, element by element, with each rotated pair as one complex number."""
    values = {name: t.numpy() if isinstance(t, torch.Tensor) else t for name, t in kwargs.items()}
    x, dt, A, B, C, trap, rates, z = (values[name] for name in SEQUENCE)
    b, l, h, p = x.shape
    r, g, n = B.shape[2:]
    one = np.ones((h, r, p))
    up, gate, down = (one if values[name] is None else values[name] for name in ("mimo_x", "mimo_z", "mimo_o"))
    halves = values["pairs"] == "halves"
    y = np.zeros((b, l, h, p))
    angle, ssm, k_before, v_before = (t.numpy().copy() for t in state)

    def turned(row, phases):
        out = row.copy()
        for j, phase in enumerate(phases):
            first, second = (j, j + n // 2) if halves else (2 * j, 2 * j + 1)
            number = complex(row[first], row[second]) * cmath.exp(1j * phase)
            out[first], out[second] = number.real, number.imag
        return out

    for i, t, j in itertools.product(range(b), range(l), range(h)):
        step, share = dt[i, t, j], trap[i, t, j]
        decay = math.exp(step * A[i, t, j])
        angle[i, j] += step * rates[i, t]
        ssm[i, j] *= decay
        for o in range(r):
            k = turned(B[i, t, o, j // (h // g)] + values["B_bias"][j, o], angle[i, j])
            ssm[i, j] += (1 - share) * step * decay * np.outer(v_before[i, j] * up[j, o], k_before[i, o, j])
            ssm[i, j] += share * step * np.outer(x[i, t, j] * up[j, o], k)
            k_before[i, o, j] = k
        v_before[i, j] = x[i, t, j]
        for o in range(r):
            q = turned(C[i, t, o, j // (h // g)] + values["C_bias"][j, o], angle[i, j])
            out = ssm[i, j] @ q + values["D"][j] * x[i, t, j] * up[j, o]
            gated = z[i, t, j] * gate[j, o]
            y[i, t, j] += down[j, o] * out * gated / (1 + np.exp(-gated))
    return y, angle, ssm, k_before, v_before


@pytest.mark.parametrize("shape", [ROW, RANKS], ids=["one", "ranks"])
@pytest.mark.parametrize("impl", ["fused", "reference"])
def test_equals_a_loop_in_numpy(shape, impl):
    kwargs, state = make(shape, torch.float64), initial_state(shape, torch.float64)
    y, final = mamba3_scan(**kwargs, initial_state=state, impl=impl)
    truth, angle, *rest = in_numpy(kwargs, state)
    np.testing.assert_allclose(y.numpy(), truth, rtol=1e-10, atol=1e-11)
    turns = (angle - final.angle.numpy()) / (2 * math.pi)
    np.testing.assert_allclose(turns, np.round(turns), atol=1e-11)
    assert final.angle.abs().max() <= math.pi
    for ours, expected in zip(final[1:], rest, strict=True):
        np.testing.assert_allclose(ours.numpy(), expected, rtol=1e-10, atol=1e-11)


def test_without_rotation_and_with_trap_1_it_is_ssd():
    """trap = 1 leaves the exponential rule alone: Mamba-2, if A is the same for all tokens."""
    kwargs = make(ROW | {"bias": False, "z": False}, torch.float64)
    A, D = -torch.rand(4, dtype=torch.float64), kwargs["D"]
    x, dt, B, C = (kwargs[name] for name in ("x", "dt", "B", "C"))
    kwargs |= {"A": A.expand_as(dt), "trap": torch.ones_like(dt), "angles": torch.zeros_like(kwargs["angles"])}
    y, final = mamba3_scan(**kwargs)
    expected, state = ssd(x, dt, A, B[:, :, 0], C[:, :, 0], D=D)
    torch.testing.assert_close(y, expected, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(final.ssm, state, rtol=1e-11, atol=1e-12)


def test_parity():
    """What rotation is for: half a turn for each 1 among the inputs, and the sign read out is the parity so far."""
    bits = torch.randint(0, 2, (3, 300), generator=torch.Generator().manual_seed(0))
    one = torch.ones(3, 300, 1)
    x, B = torch.zeros(3, 300, 1, 1), torch.zeros(3, 300, 1, 1, 2)
    x[:, 0], B[:, 0, ..., 0] = 1.0, 1.0  # one impulse, at the first token
    C = torch.tensor([1.0, 0.0]).expand(3, 300, 1, 1, 2)
    turns = torch.where(torch.arange(300) > 0, bits, 0)[..., None]
    y, _ = mamba3_scan(x, one, -1e-30 * one, B, C, one, math.pi * turns)
    expected = 1.0 - 2.0 * (turns[..., 0].cumsum(1) % 2)
    torch.testing.assert_close(y.flatten(1), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", [ROW, RANKS], ids=["one", "ranks"])
@pytest.mark.parametrize("chunk_len", [1, 7, 1000])
def test_chunk_length_does_not_matter(shape, chunk_len):
    kwargs = {k: v for k, v in make(shape, torch.float64).items() if k != "chunk_len"}
    leaves = [v.requires_grad_() for v in kwargs.values() if isinstance(v, torch.Tensor)]
    results = []
    for q in (None, chunk_len):
        y, final = mamba3_scan(**kwargs, chunk_len=q)
        total = y.square().sum() + sum(t.square().sum() for t in final)
        results.append((y, *final, *torch.autograd.grad(total, leaves)))
    for ours, truth in zip(*results, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_steps_equal_the_sequence(shape, dtype):
    kwargs, state = make(shape, dtype), initial_state(shape, dtype)
    y, final = mamba3_scan(**kwargs, initial_state=state)
    kwargs.pop("chunk_len")
    sequence = {name: kwargs.pop(name) for name in SEQUENCE}
    tokens = ({k: None if v is None else v[:, t] for k, v in sequence.items()} for t in range(shape["l"]))
    stepped = torch.stack([mamba3_scan_step(state, **token, **kwargs) for token in tokens], 1)
    # In bfloat16 each step rounds the k that it leaves behind.
    tolerance = {torch.float32: 3e-6, torch.float64: 1e-13, torch.bfloat16: 1e-2}[dtype]
    scale = y.abs().max().item()
    torch.testing.assert_close(stepped, y, rtol=0, atol=tolerance * scale)
    for ours, whole in zip(state, final, strict=True):
        torch.testing.assert_close(ours, whole, rtol=tolerance, atol=tolerance)


def test_step_updates_strided_states_in_place():
    kwargs = make(ROW, torch.float32)
    kwargs.pop("chunk_len")
    token = {name: kwargs.pop(name)[:, 0] for name in SEQUENCE}
    dense = initial_state(ROW, torch.float32)
    wide = [torch.zeros(*t.shape[:-1], 2 * t.shape[-1]) for t in dense]
    views = Mamba3ScanState(*(t[..., ::2] for t in wide))
    for view, t in zip(views, dense, strict=True):
        view.copy_(t)
    ours, expected = (mamba3_scan_step(state, **token, **kwargs) for state in (views, dense))
    torch.testing.assert_close(ours, expected, rtol=0, atol=0)
    torch.testing.assert_close(tuple(views), tuple(dense), rtol=0, atol=0)
    assert all((t[..., 1::2] == 0).all() for t in wide)


@pytest.mark.parametrize("rate", [1e-6, 1.0, 1000.0])
@pytest.mark.parametrize("a", [-1e-6, -1.0, -1000.0])
def test_weak_and_strong_decay_slow_and_fast_turns(a, rate):
    """float32 within twice the error of the float32 recurrence."""
    kwargs = make(ROW | {"l": 150}, torch.float32)
    kwargs["A"] = torch.full_like(kwargs["A"], a)
    kwargs["angles"] = rate * kwargs["angles"]
    state = initial_state(ROW, torch.float32)
    exact = Mamba3ScanState(*(t.double() for t in state))
    in_float64 = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}
    truth = mamba3_scan(**in_float64, initial_state=exact, impl="reference")
    same = mamba3_scan(**kwargs, initial_state=state, impl="reference")
    kernel = mamba3_scan(**kwargs, initial_state=state)
    pairs = zip((kernel[0], kernel[1].ssm), (same[0], same[1].ssm), (truth[0], truth[1].ssm), strict=True)
    for ours, reference, expected in pairs:
        budget = 2 * (reference - expected).norm() + torch.finfo(torch.float32).eps * expected.norm()
        assert (ours - expected).norm() <= budget


def test_angles_of_a_long_document_are_exact():
    """The angle after 100 000 equal steps, against the product in float64."""
    l, dt, rate = 100_000, 0.05, 2.7
    one = torch.ones(1, l, 1)
    u, pair = torch.ones(1, l, 1, 1), torch.ones(1, l, 1, 1, 2)
    _, final = mamba3_scan(u, dt * one, -one, pair, pair, one, rate * one)
    expected = l * np.float64(np.float32(dt)) * np.float64(np.float32(rate))
    assert abs(cmath.exp(1j * final.angle.item()) - cmath.exp(1j * expected)) < 1e-6


@pytest.mark.parametrize("shape", [ROW, RANKS], ids=["one", "ranks"])
def test_packed_documents_equal_separate_ones(shape):
    """One row of three documents gives what each gives alone; so do gradients."""
    kwargs = make(shape | {"b": 1, "l": 60}, torch.float64)
    sequence = {name: kwargs.pop(name).requires_grad_() for name in SEQUENCE}
    cuts = [0, 1, 40, 60]
    reset = torch.zeros(1, 60, dtype=torch.bool)
    reset[0, cuts[1:-1]] = True
    packed, final = mamba3_scan(**sequence, **kwargs, reset=reset)
    pieces = [
        mamba3_scan(**{k: v[:, start:end] for k, v in sequence.items()}, **kwargs)
        for start, end in itertools.pairwise(cuts)
    ]
    separate = torch.cat([y for y, _ in pieces], 1)
    torch.testing.assert_close(packed, separate, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(final, pieces[-1][1], rtol=1e-11, atol=1e-12)
    ours = torch.autograd.grad(packed.square().sum(), sequence.values())
    truth = torch.autograd.grad(separate.square().sum(), sequence.values())
    torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("t", [0, 5, 66])
def test_nan_reaches_the_later_tokens_of_its_document_only(t):
    kwargs, reset = make(ROW, torch.float32), torch.arange(70).eq(50).repeat(2, 1)
    clean, _ = mamba3_scan(**kwargs, reset=reset)
    kwargs["x"][0, t] = torch.nan
    y, final = mamba3_scan(**kwargs, reset=reset)
    end = 50 if t < 50 else 70
    assert y[0, t:end].isnan().all()
    assert final.ssm[0].isnan().all() == (end == 70)
    torch.testing.assert_close(y[0, :t], clean[0, :t], rtol=0, atol=0)
    torch.testing.assert_close(y[0, end:], clean[0, end:], rtol=0, atol=0)
    torch.testing.assert_close(y[1], clean[1], rtol=0, atol=0)


def test_same_on_any_number_of_threads():
    kwargs = make(RANKS | {"h": 12}, torch.float32)
    leaves = [v.requires_grad_() for v in kwargs.values() if isinstance(v, torch.Tensor)]
    before, results = torch.get_num_threads(), []
    try:
        for n in (1, 3):
            torch.set_num_threads(n)
            y, final = mamba3_scan(**kwargs)
            results.append((y, *final, *torch.autograd.grad(y.sum() + final.ssm.sum(), leaves)))
    finally:
        torch.set_num_threads(before)
    for one, three in zip(*results, strict=True):
        torch.testing.assert_close(one, three, rtol=0, atol=0)


def test_ranks_stay_where_they_are_not_summed():
    kwargs = make(RANKS, torch.float64)
    down = kwargs.pop("mimo_o")
    y, _ = mamba3_scan(**kwargs)
    assert y.shape == (2, 40, 3, 4, 8)
    summed, _ = mamba3_scan(**kwargs, mimo_o=down)
    torch.testing.assert_close(torch.einsum("blrhp,hrp->blhp", y, down), summed)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chunk_len": 0}, "got 0"),
        ({"A": torch.zeros(2, 70, 5)}, r"A must be \(b, l, h\) = \(2, 70, 4\), got \(2, 70, 5\)"),
        ({"B_bias": torch.zeros(4, 16)}, r"\(h, r, n\) = \(4, 1, 16\), got \(4, 16\)"),
        ({"angles": torch.zeros(2, 70, 9)}, "s = 9 angles need 2 s <= n.*n = 16"),
        ({"pairs": "thirds"}, "'thirds'"),
        ({"B": torch.zeros(2, 70, 1, 3, 16), "C": torch.zeros(2, 70, 1, 3, 16)}, "h = 4, got g = 3"),
        ({"mimo_o": torch.zeros(4, 8)}, r"mimo_o must be \(h, r, p\)"),
    ],
)
def test_errors_name_the_value(change, message):
    with pytest.raises(ValueError, match=message):
        mamba3_scan(**make(ROW, torch.float32) | change)


def test_states_are_checked():
    kwargs = make(ROW, torch.bfloat16)
    state = initial_state(ROW, torch.bfloat16)
    with pytest.raises(ValueError, match=r"initial_state.k must be \(b, r, h, n\)"):
        mamba3_scan(**kwargs, initial_state=state._replace(k=state.k[:, 0]))
    kwargs.pop("chunk_len")
    token = {name: kwargs.pop(name)[:, 0] for name in SEQUENCE}
    with pytest.raises(TypeError, match=r"ssm in torch\.bfloat16"):
        mamba3_scan_step(state._replace(ssm=state.ssm.bfloat16()), **token, **kwargs)

"""What every mixer promises, over MIXERS and their options: one sequence, however it is cut, padded or packed."""

import json
import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mixer_cases import CASES, PLAIN, D, assert_same_state, build, held, leaves, row
from safetensors.torch import load, save
from torch.utils.flop_counter import FlopCounterMode

from longwave.config import from_dict, to_dict
from longwave.errors import UsageError
from longwave.mixers import CHANNELS, MIXERS
from longwave.mixers.nested import map_tensors, reserve, tensors

torch.set_num_threads(1)
every_case = pytest.mark.parametrize("case", CASES)
few = settings(max_examples=6, deadline=None, derandomize=True)
B, L = 3, 11


def test_every_mixer_has_a_case():
    assert {kind for kind, _ in CASES.values()} == set(MIXERS)


def test_kinds_are_the_keys():
    for kind, cls in {**MIXERS, **CHANNELS}.items():
        assert cls.Config.kind == kind


cuts = st.lists(st.integers(1, L - 1), unique=True, max_size=4).map(lambda c: [0, *sorted(c), L])
resets = st.lists(st.booleans(), min_size=B * L, max_size=B * L).map(lambda r: torch.tensor(r).view(B, L))
lengths = st.lists(st.integers(0, L), min_size=B, max_size=B).map(torch.tensor)


@every_case
@given(cut=cuts, reset=st.none() | resets, lengths=st.none() | lengths)
@few
def test_whole_equals_pieces(case, cut, reset, lengths):
    mixer, x = build(case), torch.randn(B, L, D, dtype=torch.float64)
    whole, expected = mixer(x, reset=reset, lengths=lengths)
    state, ys = mixer.init_state(B), []
    for a, z in pairwise(cut):
        part = None if lengths is None else (lengths - a).clamp(0, z - a)
        y, state = mixer(x[:, a:z], state, reset=None if reset is None else reset[:, a:z], lengths=part)
        ys.append(y)
    real = torch.ones(B, L, dtype=torch.bool) if lengths is None else torch.arange(L) < lengths[:, None]
    torch.testing.assert_close(torch.cat(ys, 1)[real], whole[real])
    assert_same_state(state, expected)


@every_case
@given(reset=st.none() | resets, lengths=st.none() | lengths)
@few
def test_steps_go_on_from_any_state(case, reset, lengths):
    mixer, x = build(case), torch.randn(B, L, D, dtype=torch.float64)
    more = torch.randn(B, 9, D, dtype=torch.float64)
    _, state = mixer(x, reset=reset, lengths=lengths)
    expected, expected_state = mixer(more, state)
    stepped = reserve(state, 9)
    y = torch.stack([mixer.step(more[:, t], stepped) for t in range(9)], 1)
    torch.testing.assert_close(y, expected)
    assert not y.requires_grad
    assert_same_state(stepped, expected_state)


@every_case
def test_steps_from_nothing_equal_the_whole_in_float32(case):
    mixer, x = build(case, torch.float32), torch.randn(2, L, D)
    whole, expected = mixer(x)
    state = mixer.init_state(2, length=L)
    y = torch.stack([mixer.step(x[:, t], state) for t in range(L)], 1)
    torch.testing.assert_close(y, whole, atol=1e-5, rtol=1e-5)
    assert_same_state(state, expected, atol=1e-5, rtol=1e-5)


@every_case
def test_causal(case):
    mixer, x = build(case), torch.randn(2, L, D, dtype=torch.float64)
    y, _ = mixer(x)
    for t in (0, 4, L - 1):
        changed = x.clone()
        changed[:, t] += 1.0
        z, _ = mixer(changed)
        torch.testing.assert_close(z[:, :t], y[:, :t])
        assert (z[:, t] - y[:, t]).abs().max() > 1e-6


@every_case
def test_rows_are_independent(case):
    mixer, x = build(case), torch.randn(4, L, D, dtype=torch.float64)
    reset = torch.rand(4, L) < 0.2
    y, state = mixer(x, reset=reset)
    for i in range(4):
        alone, alone_state = mixer(x[i : i + 1], reset=reset[i : i + 1])
        torch.testing.assert_close(alone, y[i : i + 1])
        assert_same_state(row(state, i), alone_state)


@every_case
def test_packed_equals_separate(case):
    """Documents of 1, 4 and 6 tokens in one row; a state from an earlier text is given, and must not reach them."""
    mixer, x = build(case), torch.randn(1, L, D, dtype=torch.float64)
    _, before = mixer(torch.randn(1, 3, D, dtype=torch.float64))
    reset = torch.zeros(1, L, dtype=torch.bool)
    reset[0, [0, 1, 5]] = True
    packed, state = mixer(x, before, reset=reset)
    documents = [mixer(x[:, a:z]) for a, z in ((0, 1), (1, 5), (5, L))]
    torch.testing.assert_close(packed, torch.cat([y for y, _ in documents], 1))
    more = torch.randn(1, 4, D, dtype=torch.float64)
    torch.testing.assert_close(mixer(more, state)[0], mixer(more, documents[-1][1])[0])


@every_case
@pytest.mark.parametrize("from_state", [False, True])
def test_padded_equals_alone(case, from_state):
    mixer, x = build(case), torch.randn(4, L, D, dtype=torch.float64)
    before = mixer(torch.randn(4, 3, D, dtype=torch.float64))[1] if from_state else mixer.init_state(4)
    lengths = torch.tensor([L, 0, 1, 6])
    reset = torch.rand(4, L) < 0.2
    for i, n in enumerate(lengths):
        x[i, n:] = 1e3
        reset[i, n:] = True
    y, state = mixer(x, before, reset=reset, lengths=lengths)
    assert y.isfinite().all()
    for i, n in enumerate(lengths):
        alone, alone_state = row(before, i), row(before, i)
        if n:
            alone, alone_state = mixer(x[i : i + 1, :n], row(before, i), reset=reset[i : i + 1, :n])
            torch.testing.assert_close(y[i : i + 1, :n], alone)
        assert_same_state(row(state, i), alone_state)


@every_case
def test_no_gradient_from_padding(case):
    mixer, x = build(case), torch.randn(2, L, D, dtype=torch.float64, requires_grad=True)
    lengths = torch.tensor([4, 0])
    y, state = mixer(x, lengths=lengths)
    (y[0, :4].sum() + sum(t.sum() for t in tensors(state) if t.is_floating_point())).backward()
    assert x.grad is not None
    assert x.grad[0, :4].abs().sum() > 0
    assert not x.grad[0, 4:].any()
    assert not x.grad[1].any()


@every_case
def test_all_rows_empty(case):
    mixer, x = build(case), torch.randn(2, 3, D, dtype=torch.float64)
    _, before = mixer(x)
    _, state = mixer(x, before, lengths=torch.zeros(2, dtype=torch.int64))
    assert_same_state(state, before)


@every_case
def test_state_is_differentiable(case):
    mixer, x = build(case), torch.randn(2, L, D, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, L, D, dtype=torch.float64)
    whole = torch.autograd.grad((mixer(x)[0] * weight).sum(), leaves(mixer, x))
    first, state = mixer(x[:, :4])
    second, _ = mixer(x[:, 4:], state)
    pieces = torch.autograd.grad((torch.cat([first, second], 1) * weight).sum(), leaves(mixer, x))
    torch.testing.assert_close(pieces, whole)


@every_case
def test_forward_leaves_the_state_it_was_given(case):
    mixer, x = build(case), torch.randn(2, L, D, dtype=torch.float64)
    _, state = mixer(x)
    kept = [t.clone() for t in tensors(state)]
    _, after = mixer(x, state, reset=torch.rand(2, L) < 0.3, lengths=torch.tensor([5, 9]))
    mixer.step(x[:, 0], reserve(after, 1))
    torch.testing.assert_close(tensors(state), kept, rtol=0, atol=0)


@every_case
def test_a_step_changes_the_state_in_place(case):
    mixer = build(case)
    state = mixer.init_state(2, length=1)
    addresses, zeros = [t.data_ptr() for t in tensors(state)], [t.clone() for t in tensors(state)]
    mixer.step(torch.randn(2, D, dtype=torch.float64), state)
    assert [t.data_ptr() for t in tensors(state)] == addresses
    assert any((t != z).any() for t, z in zip(tensors(state), zeros, strict=True))


@every_case
def test_configuration_survives_json(case):
    kind, options = CASES[case]
    config = MIXERS[kind].Config(**options)
    kinds = {kind: cls.Config for kind, cls in MIXERS.items()}
    assert from_dict(MIXERS[kind].Config, json.loads(json.dumps(to_dict(config))), kinds) == config


@every_case
def test_parameters_survive_a_file(case):
    mixer, x = build(case), torch.randn(2, L, D, dtype=torch.float64)
    other = build(case)
    assert not torch.equal(other(x)[0], mixer(x)[0])
    other.load_state_dict(load(save(mixer.state_dict())))
    torch.testing.assert_close(other(x)[0], mixer(x)[0], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("case", "documents"),
    [(case, False) for case in PLAIN] + [(case, True) for case in PLAIN if case not in ("lstm", "gru")],
)
def test_compiles_whole(case, documents):
    """The baselines pack documents by value, which breaks the graph, as their docstring says."""
    torch._dynamo.reset()
    mixer, x = build(case, torch.float32), torch.randn(2, 6, D, requires_grad=True)
    given = {"reset": torch.rand(2, 6) < 0.3, "lengths": torch.tensor([6, 2])} if documents else {}
    state = mixer(torch.randn(2, 3, D))[1] if documents else None
    state = map_tensors(torch.detach, state)
    compiled = torch.compile(mixer, fullgraph=True, backend="aot_eager")
    results = [forward(x, state, **given) for forward in (mixer, compiled)]
    for (y, _), (z, _) in [results]:
        torch.testing.assert_close(z, y)
        grads = [torch.autograd.grad(out.square().sum(), leaves(mixer, x)) for out in (y, z)]
        torch.testing.assert_close(grads[1], grads[0], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("case", PLAIN)
def test_steps_compile_whole(case):
    torch._dynamo.reset()
    mixer, x = build(case, torch.float32), torch.randn(3, 2, D)
    step = torch.compile(mixer.step, fullgraph=True, backend="aot_eager")
    states = [mixer.init_state(2, length=3) for _ in range(2)]
    for token in x:
        torch.testing.assert_close(step(token, states[0]), mixer.step(token, states[1]))
    assert_same_state(*states)


@every_case
def test_bfloat16_autocast(case):
    mixer, x = build(case, torch.float32), torch.randn(2, L, D, requires_grad=True)
    exact, _ = mixer(x)
    with torch.autocast("cpu", torch.bfloat16):
        y, state = mixer(x)
        fresh = mixer.init_state(2, length=L)
        steps = torch.stack([mixer.step(x[:, t].detach(), fresh) for t in range(L)], 1)
        assert held(fresh) == 2 * mixer.state_bytes(L)
    assert [t.dtype for t in tensors(fresh)] == [t.dtype for t in tensors(state)]
    scale = exact.abs().max().item()
    torch.testing.assert_close(y.float(), exact, atol=0.05 * scale, rtol=0)
    torch.testing.assert_close(steps.float(), exact, atol=0.05 * scale, rtol=0)
    for grad in torch.autograd.grad(y.float().square().mean(), leaves(mixer, x)):
        assert grad.isfinite().all()


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_bytes_are_counted(case, dtype):
    mixer = build(case, torch.float32).to(dtype)
    for length in (1, 4, 5, 6, 20):
        assert held(mixer.init_state(2, length=length)) == 2 * mixer.state_bytes(length)
        assert held(mixer(torch.randn(2, length, D, dtype=dtype))[1]) == 2 * mixer.state_bytes(length)


@every_case
def test_flops_are_counted(case):
    mixer, x = build(case, torch.float32), torch.randn(1, 7, D)
    with FlopCounterMode(display=False) as counter:
        if CASES[case][0] in ("lstm", "gru"):  # their sequence kernel hides its products, their cells do not
            state = mixer.init_state(1)
            for t in range(7):
                mixer.step(x[:, t], state)
        else:
            mixer(x)
    counts = counter.get_flop_counts().get("Global", {})
    products = sum(n for op, n in counts.items() if str(op) in ("aten.mm", "aten.addmm", "longwave.linear_step"))
    assert mixer.flops(7) == products + beside_products(mixer, 7)


def beside_products(mixer, length):
    """The convolution and the scan per token, or attention's pairs, written out."""
    kind, config = mixer.config.kind, mixer.config
    if kind == "attention":
        seen = sum(min(i + 1, config.window or length) for i in range(length))
        return 2 * 2 * mixer.n_heads * mixer.d_head * seen
    if kind in ("lstm", "gru"):
        return 0
    if kind == "mamba3":
        e, n, r = mixer.d_inner, config.d_state, config.mimo_rank or 1
        mimo = 0 if config.mimo_rank is None else e * r * (1 + 2)  # mimo_x, mimo_o
        state = e * n * (1 + 2 * r + 2 * r + 2 * r)  # decay, k before, k now, q
        return length * (state + e * r * (1 + 1 + 2) + mixer.n_heads * 4 + mimo)
    if kind == "lti" or (kind == "s4" and config.discretization == "zoh"):
        return length * mixer.d_model * (2 * config.d_state * (config.d_state + 1 + 1) + 2 * config.skip)
    if kind == "s4":
        # Lambda, B, inverse, sum, C, P P*
        modes = config.d_state // 2 * (6 + 4 + 6 + 2 + 4 + config.rank * 2 * (4 + 4))
        return length * mixer.d_model * (modes + 2 * config.skip)
    if kind == "s5":
        return length * (len(mixer.Lambda_re) * (6 + 6 + 2) + 2 * mixer.d_model)
    if kind == "s4d":
        modes = config.d_state // 2 * (6 + 4 + 4)  # Abar x, + Bbar u, 2 Re C x
        return length * mixer.d_model * (modes + 2 * config.skip)
    if kind == "parallel":
        return sum(beside_products(part, length) for part in mixer.parts)
    if kind == "h3":
        products = mixer.d_model * config.d_head
        return length * (2 * mixer.d_model * config.d_state + products * (config.d_state // 2 * (6 + 4 + 4) + 2))
    if kind == "hyena":
        conv = 2 * mixer.short_filter.weight.numel()
        transforms = 3 * (5 / 2) * (2 * length) * math.log2(2 * length)
        return length * conv + (config.order - 1) * mixer.d_model * (round(transforms) + 6 * length)
    if kind == "hyena_modal":
        conv = 2 * mixer.filter.short_filter_weight.numel()
        return length * (conv + mixer.filter.poles[..., 0].numel() * (6 + 1 + 4) + 2 * mixer.d_model)
    conv = 2 * mixer.conv1d.weight.numel()
    e, n = mixer.d_inner, config.d_state
    if kind == "mamba":
        return length * (conv + e * n * (1 + 1 + 1 + 2 + 2) + e * (1 + 2))
    return length * (conv + e * n * (1 + 2 + 2) + e * (1 + 2) + mixer.n_heads * (1 + 1))


@every_case
def test_initialises_from_the_meta_device(case):
    kind, options = CASES[case]
    cls = MIXERS[kind]
    usual = cls(D, cls.Config(**options))
    with torch.device("meta"):
        mixer = cls(D, cls.Config(**options))
    assert all(parameter.is_meta for parameter in mixer.parameters())
    mixer.to_empty(device="cpu")
    for parameter in mixer.parameters():
        torch.nn.init.constant_(parameter, torch.nan)
    for module in (mixer, usual):
        torch.manual_seed(3)
        module.reset_parameters()
    torch.testing.assert_close(dict(mixer.named_parameters()), dict(usual.named_parameters()), rtol=0, atol=0)
    assert all(parameter.isfinite().all() for parameter in mixer.parameters())
    assert marked(mixer) == marked(usual)


def marked(mixer):
    return {name for name, parameter in mixer.named_parameters() if getattr(parameter, "_no_weight_decay", False)}


def test_settings_out_of_range_are_refused():
    with pytest.raises(UsageError, match="d_state must be at least 1, got 0"):
        MIXERS["mamba"].Config(d_state=0)
    with pytest.raises(UsageError, match=r"dt_min=0\.2, dt_max=0\.1"):
        MIXERS["mamba2"].Config(dt_min=0.2)
    with pytest.raises(UsageError, match="gru: d_hidden must be at least 1, got -2"):
        MIXERS["gru"].Config(d_hidden=-2)

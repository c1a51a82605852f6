"""Hyena against its definition written out in float64, the end of its filters, and the filters it keeps."""

import copy
import math

import pytest
import torch
from mixer_cases import shake

from longwave.errors import UsageError
from longwave.mixers import Hyena

D, L_MAX = 6, 24


def make(dtype=torch.float64, **options):
    mixer = Hyena(D, Hyena.Config(**{"l_max": L_MAX, "d_filter": 8} | options)).to(dtype)
    shake(mixer)
    return mixer


def filters(tensors, config):
    """(order-1, d, l_max), from the tensors of the published scheme."""
    z, t = tensors["filter_fn.pos_emb.z"][0], tensors["filter_fn.pos_emb.t"][0]
    sine = tensors["filter_fn.implicit_filter.1.freq"]
    h = z
    for i in range(config.n_inner + 1):
        name = f"filter_fn.implicit_filter.{2 * i}"
        h = torch.sin(sine * (h @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"]))
    h = h @ tensors[f"filter_fn.implicit_filter.{2 * config.n_inner + 2}.weight"].T
    h = h * (torch.exp(-t * tensors["filter_fn.modulation.deltas"][0].abs()) + config.shift)
    return h.T.view(config.order - 1, D, config.l_max)


def written_out(mixer, x):
    tensors, config = mixer.state_dict(), mixer.config
    l = x.shape[1]
    u = x @ tensors["in_proj.weight"].T + tensors["in_proj.bias"]
    w, short = config.d_conv, tensors["short_filter.weight"][:, 0]
    z = torch.zeros_like(u) + tensors["short_filter.bias"]
    for t in range(l):
        for k in range(min(w, t + 1)):
            z[:, t] += short[:, w - 1 - k] * u[:, t - k]
    *gates, v = z.split(D, dim=-1)
    skip = tensors["filter_fn.bias"].view(config.order - 1, D)
    for o, h in enumerate(filters(tensors, config)):
        v = v * gates[config.order - 1 - o]
        v = torch.stack([sum(h[:, j] * v[:, t - j] for j in range(t + 1)) + skip[o] * v[:, t] for t in range(l)], 1)
    return (gates[0] * v) @ tensors["out_proj.weight"].T + tensors["out_proj.bias"]


@pytest.mark.parametrize(
    "options",
    [{}, {"order": 3, "shift": 0.05, "n_inner": 0}, {"order": 4, "d_position": 7, "frequency": 10.0, "d_conv": 5}],
)
def test_equals_the_definition(options):
    mixer, x = make(**options), torch.randn(2, L_MAX, D, dtype=torch.float64)
    torch.testing.assert_close(mixer(x)[0], written_out(mixer, x))
    torch.testing.assert_close(mixer(x[:, :7])[0], written_out(mixer, x[:, :7]))


def test_float32_is_within_rounding():
    mixer, x = make(torch.float32), torch.randn(2, L_MAX, D)
    expected = written_out(mixer.double(), x.double())
    torch.testing.assert_close(mixer.float()(x)[0].double(), expected, atol=1e-5, rtol=1e-5)


def test_starts_as_published():
    mixer = Hyena(4, Hyena.Config(l_max=100, d_position=5, frequency=10.0, d_filter=8))
    positions = mixer.filter_fn.pos_emb
    t = 37
    expected = [t / 99, *(f(k * 2 * math.pi * t / 100) for f in (math.cos, lambda a: -math.sin(a)) for k in (1e-4, 1))]
    torch.testing.assert_close(positions.z[0, t], torch.tensor(expected))
    torch.testing.assert_close(positions.t[0, t], torch.tensor([t / 99]))
    deltas = mixer.filter_fn.modulation.deltas[0, 0]
    torch.testing.assert_close(deltas[[0, -1]], torch.log(torch.tensor(0.01)) / torch.tensor([1.5, 0.3]))
    assert not positions.t.requires_grad
    assert (mixer.filter_fn.implicit_filter.get_submodule("1").freq == 10).all()


def test_names_and_shapes_are_the_published_ones():
    found = {name: tuple(tensor.shape) for name, tensor in make().state_dict().items()}
    assert found == {
        "in_proj.weight": (3 * D, D), "in_proj.bias": (3 * D,), "out_proj.weight": (D, D), "out_proj.bias": (D,),
        "short_filter.weight": (3 * D, 1, 3), "short_filter.bias": (3 * D,), "filter_fn.bias": (D,),
        "filter_fn.pos_emb.z": (1, L_MAX, 3), "filter_fn.pos_emb.t": (1, L_MAX, 1),
        "filter_fn.implicit_filter.0.weight": (8, 3), "filter_fn.implicit_filter.0.bias": (8,),
        "filter_fn.implicit_filter.1.freq": (1, 8),
        "filter_fn.implicit_filter.2.weight": (8, 8), "filter_fn.implicit_filter.2.bias": (8,),
        "filter_fn.implicit_filter.4.weight": (8, 8), "filter_fn.implicit_filter.4.bias": (8,),
        "filter_fn.implicit_filter.6.weight": (D, 8), "filter_fn.modulation.deltas": (1, 1, D),
    }  # fmt: skip


def test_a_document_ends_with_the_filters():
    mixer, x = make(), torch.randn(2, L_MAX + 1, D, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"25 tokens, more than l_max=24.*reset the state"):
        mixer(x)
    _, state = mixer(x[:, :20])
    with pytest.raises(ValueError, match="l_max=24"):
        mixer(x[:, 20:], state)
    _, state = mixer(x[:, 20:24], state)
    assert state.capacity == L_MAX
    with pytest.raises(ValueError, match="25 tokens, more than l_max=24"):
        mixer.step(x[:, 24], state)
    with pytest.raises(ValueError, match="25 tokens, more than l_max=24"):
        mixer.step(x[:, 24], state.reserve(5))


def test_documents_may_be_many():
    """Three documents and padding in one row that is longer than the filters; the state keeps the last one alone."""
    mixer, x = make(), torch.randn(2, 60, D, dtype=torch.float64)
    reset = torch.zeros(2, 60, dtype=torch.bool)
    reset[:, [20, 40]] = True
    lengths = torch.tensor([60, 25])
    y, state = mixer(x, reset=reset, lengths=lengths)
    torch.testing.assert_close(y[:1, 40:], mixer(x[:1, 40:])[0])
    torch.testing.assert_close(y[1:, 20:25], mixer(x[1:, 20:25])[0])
    assert state.length.tolist() == [20, 5]
    assert state.capacity == L_MAX
    assert state.reserve(0).capacity == 20
    assert not state.history[1, 5:].any()


def test_step_without_room_says_how_to_make_it():
    mixer = make()
    _, state = mixer(torch.randn(2, 5, D, dtype=torch.float64))
    kept = [t.clone() for t in state]
    with pytest.raises(ValueError, match=r"state.reserve\(n\) first; it holds 5 tokens in 5 slots"):
        mixer.step(torch.randn(2, D, dtype=torch.float64), state)
    torch.testing.assert_close(list(state), kept, rtol=0, atol=0)


def test_length_is_checked_when_compiled():
    mixer = make()
    compiled = torch.compile(mixer, fullgraph=True, backend="eager")
    with torch.no_grad(), pytest.raises(RuntimeError, match="l_max=24"):
        compiled(torch.randn(1, L_MAX + 1, D, dtype=torch.float64))


@pytest.mark.parametrize("change", ["in place", "replaced", "loaded"])
def test_filters_are_kept_until_a_parameter_changes(change):
    mixer, x = make(), torch.randn(1, 9, D, dtype=torch.float64)
    with torch.no_grad():
        mixer(x)
        kept = mixer.filter_fn.filters(9)[0]
        mixer(x)
        assert mixer.filter_fn.filters(9)[0].data_ptr() == kept.data_ptr()
        if change == "in place":
            mixer.filter_fn.implicit_filter.get_submodule("1").freq.mul_(2)
        elif change == "replaced":
            mixer.filter_fn.pos_emb.z = torch.nn.Parameter(mixer.filter_fn.pos_emb.z + 1)
        else:
            mixer.load_state_dict(make().state_dict())
        torch.testing.assert_close(mixer(x)[0], written_out(mixer, x))
        mixer.float()
        assert mixer.filter_fn.filters(9)[0].dtype == torch.float32
    assert copy.deepcopy(mixer).filter_fn._made is None


def test_filters_stay_in_float32():
    mixer = make(torch.float32)
    exact = mixer.filter_fn.filters(L_MAX)[0]
    mixer.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(mixer.filter_fn.filters(L_MAX)[0], exact, rtol=0, atol=0)
    assert mixer.in_proj.weight.dtype == torch.bfloat16


def test_bad_options():
    with pytest.raises(UsageError, match="order must be at least 2, got 1"):
        Hyena.Config(order=1)
    with pytest.raises(UsageError, match="d_position must be odd and at least 3, got 4"):
        Hyena.Config(d_position=4)
    with pytest.raises(UsageError, match="l_max must be at least 1, got 0"):
        Hyena.Config(l_max=0)
    with pytest.raises(UsageError, match=r"got 0\.01, 0\.3 and 0"):
        Hyena.Config(slow_decay=0)

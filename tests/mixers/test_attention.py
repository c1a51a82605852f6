"""Attention against a softmax written out, and its ring of keys and values."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mixer_cases import shake
from transformers.models.llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRotaryEmbedding

from longwave.errors import UsageError
from longwave.mixers import Attention

D = 24


def make(**options):
    mixer = Attention(D, Attention.Config(**options)).double()
    shake(mixer)
    return mixer


def softmax_attention(m, x, reset):
    """One query and one head at a time; the rotation as a product of complex numbers."""
    b, l, _ = x.shape
    h, h_kv, p, r = m.n_heads, m.n_kv_heads, m.d_head, m.d_rotary
    q = m.q_proj(x).view(b, l, h, p)
    k = m.k_proj(x).view(b, l, h_kv, p)
    v = m.v_proj(x).view(b, l, h_kv, p)
    scale = m.config.key_multiplier * (m.config.scale or 1 / math.sqrt(p))
    y = torch.zeros(b, l, h, p, dtype=x.dtype)
    for i in range(b):
        for t in range(l):
            start = max([s for s in range(t + 1) if reset[i, s]], default=0)
            first = max(start, t - m.config.window + 1) if m.config.window else start
            for j in range(h):
                stretch = m.config.rotary_scaling
                query = turned(q[i, t, j], (t - start) / stretch, r, m.config.rotary_base)
                scores = [
                    scale * query @ turned(k[i, s, j * h_kv // h], (s - start) / stretch, r, m.config.rotary_base)
                    for s in range(first, t + 1)
                ]
                weights = torch.stack(scores).softmax(0)
                y[i, t, j] = weights @ v[i, first : t + 1, j * h_kv // h]
    return m.o_proj(y.flatten(2))


def turned(x, position, r, base):
    frequency = base ** (-torch.arange(0, r, 2, dtype=torch.float64) / r) if r else torch.zeros(0, dtype=torch.float64)
    pairs = torch.complex(x[: r // 2], x[r // 2 : r]) * torch.polar(torch.ones_like(frequency), position * frequency)
    return torch.cat([pairs.real, pairs.imag, x[r:]])


@pytest.mark.parametrize(
    "options",
    [
        {"n_heads": 2},
        {"n_heads": 3, "rotary": 0.0, "out_bias": True, "qkv_bias": True},
        {"n_heads": 4, "n_kv_heads": 2, "d_head": 8, "rotary": 0.25, "rotary_base": 100.0, "rotary_scaling": 3.0},
        {"n_heads": 4, "n_kv_heads": 1, "d_head": 4, "scale": 0.9, "window": 3, "key_multiplier": 2.5},
        {"d_head": 12, "window": 1},
        {"n_heads": 2, "window": 7},
    ],
)
@pytest.mark.parametrize("with_reset", [False, True])
def test_equals_softmax_written_out(options, with_reset):
    mixer, x = make(**options), torch.randn(2, 10, D, dtype=torch.float64)
    reset = torch.rand(2, 10) < (0.25 if with_reset else 0.0)
    y, _ = mixer(x, reset=reset if with_reset else None)
    torch.testing.assert_close(y, softmax_attention(mixer, x, reset))


def test_equals_transformers():
    config = LlamaConfig(
        hidden_size=32, num_attention_heads=4, num_key_value_heads=2, head_dim=8, rope_theta=1000.0, num_hidden_layers=1
    )
    config._attn_implementation = "eager"
    theirs = LlamaAttention(config, layer_idx=0)
    ours = Attention(32, Attention.Config(n_heads=4, n_kv_heads=2, rotary_base=1000.0))
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, 17, 32)
    positions = LlamaRotaryEmbedding(config)(x, torch.arange(17)[None])
    mask = torch.full((17, 17), -torch.inf).triu(1)[None, None]
    expected, _ = theirs(x, position_embeddings=positions, attention_mask=mask)
    torch.testing.assert_close(ours(x)[0], expected, atol=2e-6, rtol=1e-5)


@given(
    window=st.none() | st.integers(1, 6),
    calls=st.lists(st.tuples(st.sampled_from(["forward", "step", "reserve"]), st.integers(0, 5)), max_size=8),
)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_ring_holds_the_last_tokens(window, calls):
    """Whatever the calls: slot i % capacity holds token i, for the tokens that a window needs."""
    mixer = make(n_heads=2, rotary=0.0, window=window)
    state, inputs = mixer.init_state(1), torch.empty(1, 0, D, dtype=torch.float64)
    for call, n in calls:
        x = torch.randn(1, max(n, 1), D, dtype=torch.float64)
        if call == "reserve":
            state = state.reserve(n)
            assert state.capacity == min(inputs.shape[1] + n, window or 1000)
            continue
        if call == "forward":
            _, state = mixer(x, state)
        else:
            x, state = x[:, :1], state.reserve(1 + n)
            mixer.step(x[:, 0], state)
        inputs = torch.cat([inputs, x], 1)
    n = inputs.shape[1]
    assert state.length.item() == n
    assert state.capacity <= (window or 1000)
    v = mixer.v_proj(inputs).view(n, 2, D // 2)
    for i in range(max(0, n - (window or n)), n):
        torch.testing.assert_close(state.v[0, i % state.capacity], v[i])


def test_step_without_room_says_how_to_make_it():
    mixer = make(n_heads=2)
    _, state = mixer(torch.randn(2, 5, D, dtype=torch.float64))
    kept = [t.clone() for t in state]
    with pytest.raises(ValueError, match=r"state.reserve\(n\) first; it holds 5 tokens in 5 slots"):
        mixer.step(torch.randn(2, D, dtype=torch.float64), state)
    torch.testing.assert_close(list(state), kept, rtol=0, atol=0)
    with pytest.raises(ValueError, match="0 tokens in 0 slots"):
        mixer.step(torch.randn(2, D, dtype=torch.float64), mixer.init_state(2))


def test_step_without_room_is_caught_when_compiled():
    mixer = make(n_heads=2)
    state = mixer.init_state(2)
    step = torch.compile(mixer.step, fullgraph=True, backend="eager")
    # The outer no_grad puts the grad mode back: an error inside a compiled function leaves it as it was there.
    with torch.no_grad(), pytest.raises(RuntimeError, match=r"state.reserve\(n\)"):
        step(torch.randn(2, D, dtype=torch.float64), state)


def test_a_full_window_never_needs_room():
    mixer = make(n_heads=2, window=4)
    state = mixer.init_state(1, length=100)
    assert state.capacity == 4
    for _ in range(20):
        mixer.step(torch.randn(1, D, dtype=torch.float64), state)
    assert state.length.item() == 20


def test_rows_of_unequal_length_step_together():
    mixer, x = make(n_heads=2, window=6), torch.randn(3, 9, D, dtype=torch.float64)
    lengths = torch.tensor([9, 2, 0])
    _, state = mixer(x, lengths=lengths)
    state = state.reserve(3)
    more = torch.randn(3, 3, D, dtype=torch.float64)
    y = torch.stack([mixer.step(more[:, t], state) for t in range(3)], 1)
    for i, n in enumerate(lengths):
        alone, _ = mixer(torch.cat([x[i : i + 1, :n], more[i : i + 1]], 1))
        torch.testing.assert_close(y[i : i + 1], alone[:, n:])


def test_heads_from_the_width():
    assert (Attention(256).n_heads, Attention(256).d_head) == (4, 64)
    mixer = Attention(256, Attention.Config(n_heads=8))
    assert (mixer.n_heads, mixer.n_kv_heads, mixer.d_head) == (8, 8, 32)
    assert Attention(256, Attention.Config(d_head=16)).n_heads == 16
    assert Attention(250, Attention.Config(n_heads=4, d_head=32)).o_proj.weight.shape == (250, 128)


def test_bad_options():
    with pytest.raises(UsageError, match="d_model=100 is not a multiple of d_head=64"):
        Attention(100)
    with pytest.raises(UsageError, match="n_kv_heads=3 must divide n_heads=4"):
        Attention(64, Attention.Config(n_heads=4, n_kv_heads=3))
    with pytest.raises(UsageError, match=r"rotary=0\.5 x d_head=6 = 3"):
        Attention(24, Attention.Config(n_heads=4, rotary=0.5))
    with pytest.raises(UsageError, match="between 0 and 1, got 32"):
        Attention.Config(rotary=32)
    with pytest.raises(UsageError, match="window must be at least 1, got 0"):
        Attention.Config(window=0)

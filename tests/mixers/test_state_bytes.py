"""Bytes of one sequence's state, by formulas in the settings: a number takes c in the compute dtype, s in float32."""

from typing import Any

import pytest
import torch
from mixer_cases import CASES, D, build

from longwave.mixers import MIXERS


def inner(config: Any) -> int:
    return config.d_inner or config.expand * D


def heads(config: Any) -> tuple[int, int]:
    """(h_kv, p)"""
    n_heads = config.n_heads or D // config.d_head
    return config.n_kv_heads or n_heads, config.d_head or D // n_heads


def mamba3(config: Any, t: int, c: int, s: int) -> int:
    e, p, n, r = inner(config), config.d_head, config.d_state, config.mimo_rank or 1
    angles = int(n * config.rope_fraction) // 2
    return s * (e // p * angles + e * n) + c * (r * e // p * n + e)


def attention(config: Any, t: int, c: int, s: int) -> int:
    h_kv, p = heads(config)
    return 2 * h_kv * p * min(t, config.window or t) * c


FORMULAS = {
    "mamba": lambda f, t, c, s: inner(f) * (f.d_conv - 1) * c + inner(f) * f.d_state * s,
    "mamba2": lambda f, t, c, s: (
        (inner(f) + 2 * f.n_groups * f.d_state) * (f.d_conv - 1) * c + inner(f) * f.d_state * s
    ),
    "mamba3": mamba3,
    "h3": lambda f, t, c, s: D * (f.d_state - 1) * c + D * f.d_head * f.d_state * s,
    "hyena": lambda f, t, c, s: ((f.order - 1) * min(t, f.l_max) + (f.d_conv - 1) * (f.order + 1)) * D * c,
    "hyena_modal": lambda f, t, c, s: 3 * D * (f.d_conv - 1) * c + 2 * D * f.d_state * s,
    "lti": lambda f, t, c, s: D * f.d_state * s,
    "s4": lambda f, t, c, s: D * f.d_state * s,
    "s4d": lambda f, t, c, s: D * f.d_state * s,
    "s5": lambda f, t, c, s: (1 if f.conj_sym else 2) * f.d_state * s,
    "attention": attention,
    "lstm": lambda f, t, c, s: 2 * (f.d_hidden or D) * s,
    "gru": lambda f, t, c, s: (f.d_hidden or D) * s,
    "parallel": lambda f, t, c, s: sum(FORMULAS[part.kind](part, t, c, s) for part in f.mixers),
}


def test_every_mixer_has_a_formula_and_a_case():
    assert FORMULAS.keys() == MIXERS.keys() == {kind for kind, _ in CASES.values()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_state_bytes_are_the_formula(case, dtype):
    mixer = build(case, torch.float32).to(dtype)
    for length in (1, 7, 1000):
        expected = FORMULAS[mixer.config.kind](mixer.config, length, dtype.itemsize, 4)
        assert mixer.state_bytes(length) == mixer.state_bytes(length, dtype) == expected

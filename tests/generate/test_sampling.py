"""Sampling against exact probabilities, computed here in plain float64 from the definitions in the papers."""

import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longwave.errors import UsageError
from longwave.generate.sampling import Sampler, Sampling, candidates, penalise, pick

torch.set_num_threads(1)


def expected(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """The filtered distribution of one row, by sorting everything, filter after filter."""
    p = np.exp((logits - logits.max()) / sampling.temperature)
    p /= p.sum()
    order = np.argsort(-p, kind="stable")
    if sampling.top_k:
        p[order[sampling.top_k :]] = 0
        p /= p.sum()
    before = 0.0
    for token in order:
        share = p[token]
        if before >= sampling.top_p:
            p[token] = 0
        before += share
    p /= p.sum()
    p[p < sampling.min_p * p.max()] = 0
    return p / p.sum()


def distribution(logits: torch.Tensor, sampling: Sampling) -> np.ndarray:
    """Our filtered distribution over all ids, (b, v)."""
    probabilities, ids = candidates(logits, sampling)
    if ids is None:
        return probabilities.numpy()
    return torch.zeros(logits.shape, dtype=torch.float64).scatter(-1, ids, probabilities).numpy()


@settings(max_examples=150, deadline=None)
@given(
    v=st.sampled_from([1, 2, 7, 63, 65, 700]),
    scale=st.sampled_from([0.01, 1.0, 6.0]),
    temperature=st.floats(0.05, 5),
    top_k=st.integers(0, 800),
    top_p=st.floats(0.01, 1),
    min_p=st.floats(0, 1),
    seed=st.integers(0, 2**31),
)
def test_filters_equal_their_definition(v, scale, temperature, top_k, top_p, min_p, seed):
    logits = np.random.default_rng(seed).normal(size=(3, v)).astype(np.float32) * scale
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    ours = distribution(torch.from_numpy(logits), sampling)
    for row in range(3):
        np.testing.assert_allclose(ours[row], expected(logits[row].astype(np.float64), sampling), rtol=1e-9, atol=1e-12)


def test_each_filter_by_hand():
    logits = torch.tensor([[0.5, 0.25, 0.15, 0.1]], dtype=torch.float64).log()
    cases = [
        (Sampling(), [0.5, 0.25, 0.15, 0.1]),
        (Sampling(temperature=0.5), [0.25 / 0.345, 0.0625 / 0.345, 0.0225 / 0.345, 0.01 / 0.345]),
        (Sampling(top_k=2), [2 / 3, 1 / 3, 0, 0]),
        (Sampling(top_p=0.6), [2 / 3, 1 / 3, 0, 0]),  # 0.5 does not reach it yet
        (Sampling(top_p=0.01), [1, 0, 0, 0]),
        (Sampling(min_p=0.29), [5 / 9, 2.5 / 9, 1.5 / 9, 0]),
        (Sampling(top_k=2, top_p=0.6), [1, 0, 0, 0]),  # top-p is a share of what top-k left
        (Sampling(top_p=0.6, min_p=0.51), [1, 0, 0, 0]),
    ]
    for sampling, wanted in cases:
        np.testing.assert_allclose(distribution(logits, sampling)[0], wanted, rtol=1e-12, err_msg=str(sampling))


def test_equal_logits_keep_exactly_k():
    probabilities, ids = candidates(torch.zeros(2, 100), Sampling(top_k=7))
    assert ids is not None
    assert (probabilities > 0).sum(-1).tolist() == [7, 7]
    assert [len(set(row)) for row in ids.tolist()] == [7, 7]


def test_top_p_sorts_as_much_as_a_flat_distribution_needs():
    v = 5000
    sampling = Sampling(top_p=0.9)
    ours = distribution(torch.linspace(0, 1e-3, v)[None], sampling)[0]
    np.testing.assert_allclose(
        ours, expected(np.linspace(0, 1e-3, v, dtype=np.float32).astype(float), sampling), rtol=1e-9
    )
    assert 4400 < np.count_nonzero(ours) < 4600


@pytest.mark.parametrize("options", [{}, {"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.2}], ids=str)
def test_shares_of_the_unit_interval_are_the_probabilities(options):
    n = 20_000
    logits = torch.randn(1, 12, generator=torch.Generator().manual_seed(3))
    probabilities, ids = candidates(logits, Sampling(**options))
    uniform = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    chosen = pick(probabilities.expand(n, -1).contiguous(), uniform)
    tokens = chosen if ids is None else ids[0][chosen]
    shares = np.bincount(tokens.numpy(), minlength=12) / n
    wanted = expected(logits[0].double().numpy(), Sampling(**options))
    np.testing.assert_allclose(shares, wanted, atol=1.01 / n)
    assert set(np.flatnonzero(shares)) == set(np.flatnonzero(wanted))


@pytest.mark.parametrize("uniform", [0.0, 0.5, math.nextafter(1.0, 0.0)])
def test_what_a_filter_took_away_is_never_picked(uniform):
    probabilities = torch.tensor([[0.0, 0.3, 0.0, 0.7, 0.0], [0.0, 0.0, 1.0, 0.0, 0.0]], dtype=torch.float64)
    chosen = pick(probabilities, torch.full((2,), uniform, dtype=torch.float64))
    assert chosen.tolist() == [1 if uniform == 0 else 3, 2]


def test_greedy_takes_the_lowest_id_among_equals_and_spends_nothing():
    sampler = Sampler(Sampling(temperature=0), [None, None], 4, torch.device("cpu"))
    assert sampler(torch.tensor([[0.0, 2.0, 2.0, 1.0], [3.0, 0.0, 3.0, 3.0]])).tolist() == [1, 0]


def test_temperatures_near_zero_are_greedy_without_overflow():
    logits = torch.tensor([[-30.0, 30.0, 29.0]])
    for temperature in (5e-324, 1e-300, 1e-40, 1e-3):
        assert distribution(logits, Sampling(temperature=temperature))[0].tolist() == [0, 1, 0]


def draws(sampler: Sampler, logits: torch.Tensor, n: int) -> list[list[int]]:
    return [sampler(logits).tolist() for _ in range(n)]


def test_a_seed_draws_the_same_again_whatever_the_other_rows_do():
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    cpu = torch.device("cpu")
    together = draws(Sampler(Sampling(), [5, 6, 7], 50, cpu), logits, 40)
    assert together == draws(Sampler(Sampling(), [5, 6, 7], 50, cpu), logits, 40)
    assert together != draws(Sampler(Sampling(), [5, 6, 8], 50, cpu), logits, 40)
    for row in range(3):
        alone = draws(Sampler(Sampling(), [5 + row], 50, cpu), logits[row : row + 1], 40)
        assert [step[row] for step in together] == [step[0] for step in alone]


def test_rows_kept_go_on_with_their_own_streams_and_penalties():
    sampling = Sampling(repetition_penalty=1.5)
    logits = torch.randn(3, 20, generator=torch.Generator().manual_seed(0))
    cpu = torch.device("cpu")
    whole = draws(Sampler(sampling, [1, 2, 3], 20, cpu), logits, 20)
    sampler = Sampler(sampling, [1, 2, 3], 20, cpu)
    assert draws(sampler, logits, 8) == whole[:8]
    sampler.keep([0, 2])
    assert draws(sampler, logits[[0, 2]], 12) == [[step[0], step[2]] for step in whole[8:]]


def test_the_stream_is_one_uniform_number_per_token():
    logits = torch.tensor([[0.5, 0.25, 0.15, 0.1]]).log()
    stream = random.Random(11)
    drawn = [row[0] for row in draws(Sampler(Sampling(seed=11), [11], 4, torch.device("cpu")), logits, 50)]
    assert drawn == [np.searchsorted(np.cumsum([0.5, 0.25, 0.15, 0.1]), stream.random(), "right") for _ in range(50)]


def test_penalty_follows_ctrl_for_positive_logits_and_pushes_negative_ones_down():
    logits = torch.tensor([[2.0, 1.0, -1.0, 0.0], [2.0, 1.0, -1.0, 0.0]], dtype=torch.float64)
    seen = torch.tensor([[True, False, True, True], [False, False, False, False]])
    assert penalise(logits, seen, 1.25).tolist() == [[1.6, 1.0, -1.25, 0.0], [2.0, 1.0, -1.0, 0.0]]
    # CTRL, section 4.1: p_i ~ exp(x_i / (T I(i in g))), I = theta for tokens of g and 1 otherwise
    x, temperature, theta = np.array([2.0, 1.0, 0.5]), 0.7, 1.25
    wanted = np.exp(x / (temperature * np.array([theta, 1.0, theta])))
    penalised = penalise(torch.tensor(x)[None], torch.tensor([[True, False, True]]), theta)
    ours = distribution(penalised, Sampling(temperature=temperature))
    np.testing.assert_allclose(ours[0], wanted / wanted.sum(), rtol=1e-12)


def test_penalty_counts_what_was_drawn():
    sampler = Sampler(Sampling(temperature=0, repetition_penalty=2.0), [None], 3, torch.device("cpu"))
    logits = torch.tensor([[4.0, 3.0, 1.0]])
    assert [row[0] for row in draws(sampler, logits, 4)] == [0, 1, 0, 0]  # 4; 3 > 2; 2 > 1.5; the same


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.5),
        ("temperature", math.inf),
        ("temperature", math.nan),
        ("top_k", -1),
        ("top_k", 2.5),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("min_p", -0.1),
        ("min_p", 2.0),
        ("repetition_penalty", 0.0),
    ],
)
def test_values_out_of_range_are_refused_by_name_and_value(name, value):
    with pytest.raises(UsageError, match=f"{name} must be .*{value}"):
        Sampling(**{name: value})


def test_an_unknown_option_suggests_the_nearest():
    with pytest.raises(UsageError, match=r"'temprature'\. Did you mean 'temperature'"):
        Sampling().replace(temprature=1.0)
    assert Sampling(top_k=3).replace(seed=1) == Sampling(top_k=3, seed=1)

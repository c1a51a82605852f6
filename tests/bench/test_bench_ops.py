import dataclasses
import json

import pytest
import torch

from longwave.bench import ops
from longwave.bench.cases import CASES
from longwave.bench.floor import Cost, Floor, cost
from longwave.errors import LongwaveError, UsageError


@pytest.mark.parametrize("name", CASES)
def test_every_case_runs_and_agrees(name, ungated):
    case = CASES[name]
    said = []
    found = json.loads(json.dumps(ops.run([name], ungated, sizes="small", say=said.append)))
    labels = [f"{name}, forward", f"{name}, forward + backward"] if case.backward else [name]
    assert [result["case"] for result in found["cases"]] == labels
    for result, text in zip(found["cases"], said, strict=False):
        for who, figure in result["figures"].items():
            assert figure["accepted"] == 1
            assert figure["median"] > 0
            assert figure["of_floor"] == pytest.approx(result["floor"]["seconds"] / figure["median"])
            assert result["times_faster"]["longwave"][who] == pytest.approx(
                figure["median"] / result["figures"]["longwave"]["median"]
            )
            assert who in text
    named = {what.split(": ")[1] for what in found["missing"]} | set(found["cases"][0]["figures"])
    assert named == set(case.contenders) | {who for who, _, _ in case.peers}


@pytest.mark.parametrize("name", ["selective_scan", "ssd_step"])
def test_a_wrong_contender_is_not_timed(name, ungated, monkeypatch):
    case = CASES[name]

    def wrong(**inputs):
        return case.contenders["longwave"](**inputs) * 1.01

    monkeypatch.setitem(CASES, name, dataclasses.replace(case, contenders=case.contenders | {"wrong": wrong}))
    monkeypatch.setattr(
        ungated, "measure", lambda case, runs: {"": ops.Figure((1.0,))} if "" in runs else pytest.fail("timed")
    )
    with pytest.raises(LongwaveError, match=r"wrong and longwave differ by 1\.0e-02"):
        ops.run([name], ungated, sizes="small")


def test_a_wrong_gradient_is_found():
    case = CASES["gated_rms_norm"]

    def wrong(**inputs):
        y = case.contenders["longwave"](**inputs)
        return y + (y - y.detach()) * 0.1  # the same values, other gradients

    inputs = case.make(case.small, torch.float32)
    with pytest.raises(LongwaveError, match=r"differ by 1\.0e-01"):
        ops.check("gated_rms_norm", case, case.contenders | {"wrong": wrong}, inputs)


def test_a_missing_peer_is_named(ungated, block):
    block("mambapy", "mambapy")
    said = []
    found = ops.run(["selective_scan"], ungated, sizes="small", say=said.append)
    assert "pip install mambapy" in found["missing"]["selective_scan: mambapy pscan"]
    assert "mambapy pscan: not measured: pip install mambapy" in said[-1]
    assert "mambapy pscan" not in found["cases"][0]["figures"]


def test_an_unknown_case(ungated):
    with pytest.raises(UsageError, match="Did you mean 'ssd'"):
        ops.run(["sdd"], ungated)


def test_what_a_call_costs():
    """x (1, 4), weight (3, 4), y (1, 3) in float32: 4 (4 + 12 + 3) bytes; with a state of 5, that twice more."""
    inputs = {"x": torch.zeros(1, 4), "weight": torch.zeros(3, 4), "bias": None}
    y = torch.zeros(1, 3)
    assert cost(inputs, y, 24, backward=False) == Cost(76, 24)
    assert cost(inputs, y, 24, backward=True) == Cost(3 * 64 + 2 * 12, 72)
    assert cost(inputs | {"state": torch.zeros(5)}, y, 24, backward=False) == Cost(76 + 2 * 20, 24)


def test_the_floor_is_the_slower_bound():
    assert Floor(2.0, 1.0).share(4.0) == 0.5
    assert Floor(1.0, 3.0).seconds == 3.0
    assert Floor(None, 1.0).share(4.0) is None
    assert Floor(2.0, 1.0).share(None) is None

import dataclasses
import json

import pytest
import torch

from longwave.bench import ops
from longwave.bench.calls import Adapted, backward, forward, forward_and_backward, forward_for_training, outcome
from longwave.bench.cases import CASES
from longwave.bench.cuda_cases import CUDA_CASES
from longwave.bench.floor import Cost, Floor, Peaks, Work, cost
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
        ungated, "measure", lambda case, runs, *_: {"": ops.Figure((1.0,))} if "" in runs else pytest.fail("timed")
    )
    found = ops.run([name], ungated, sizes="small")
    assert f"{name}: wrong and longwave differ by 1.0e-02 in" in found["wrong"][name]
    assert found["cases"] == []


def test_a_wrong_gradient_is_found():
    case = CASES["gated_rms_norm"]

    def wrong(**inputs):
        y = case.contenders["longwave"](**inputs)
        return y + (y - y.detach()) * 0.1  # the same values, other gradients

    inputs = case.make(case.small, torch.float32)
    with pytest.raises(LongwaveError, match=r"differ by 1\.0e-01 in the gradient of"):
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
    y, work = torch.zeros(1, 3), Work(24, 48, 7)
    assert cost(inputs, y, work, "forward") == Cost(76, 24, 7)
    assert cost(inputs, y, work, "forward for training") == Cost(76, 24, 7)
    assert cost(inputs, y, work, "backward") == Cost(2 * 64 + 12, 48, 7)
    assert cost(inputs, y, work, "forward + backward") == Cost(3 * 64 + 2 * 12, 72, 14)
    assert cost(inputs | {"state": torch.zeros(5)}, y, work, "forward") == Cost(76 + 2 * 20, 24, 7)


def test_the_floor_is_the_slowest_bound():
    assert Floor(2.0, 1.0).share(4.0) == 0.5
    assert Floor(1.0, 3.0).seconds == 3.0
    assert Floor(1.0, 3.0, 4.0).bound == "exponentials"
    assert Floor(None, 1.0).share(4.0) is None
    assert Floor(2.0, 1.0).share(None) is None
    assert Floor.of(Cost(8, 6, 0), 2.0, Peaks(3.0)) == Floor(2.0, 2.0, 0.0)
    assert Floor.of(Cost(8, 6, 1), 2.0, Peaks(3.0)).seconds is None  # how fast exponentials are was not measured


@pytest.mark.parametrize("name", CUDA_CASES)
def test_every_case_for_a_gpu_runs_and_agrees(name, ungated, monkeypatch):
    """At its small size, here on the CPU, in the directions that a GPU is timed in."""
    monkeypatch.setitem(ops.CASES_ON, "cpu", CUDA_CASES)
    monkeypatch.setitem(ops._DIRECTIONS, "cpu", ops._DIRECTIONS["cuda"])
    case = CUDA_CASES[name]
    found = ops.run([name], ungated, sizes="small", peers=False)
    assert found["wrong"] == found["missing"] == {}
    directions = ["forward", "forward for training", "backward"] if case.backward else [None]
    assert [result["case"] for result in found["cases"]] == [f"{name}, {d}" if d else name for d in directions]
    for result in found["cases"]:
        able = set(case.contenders) - (set() if result["case"].endswith("forward") else set(case.forward_only))
        assert set(result["figures"]) == able
        counted = case.exponentials(case.small) == 0  # the speed of exponentials is measured on a GPU
        assert (result["floor"]["seconds"] is not None) == counted


def test_an_operator_means_all_its_cases(ungated):
    assert list(ops._picked(["ssd"], CUDA_CASES)) == [
        "ssd b8 l4096",
        "ssd b2 l16384",
        "ssd b1 l131072",
        "ssd b1 l2048 graph",
    ]
    assert list(ops._picked(["fft_conv"], CASES)) == ["fft_conv"]
    with pytest.raises(UsageError, match="Did you mean 'ssd_step'"):
        ops._picked(["ssd_stp"], CUDA_CASES)


def test_a_contender_that_raises_is_named_and_the_rest_goes_on(ungated, monkeypatch):
    def broken(**inputs):
        raise RuntimeError("no kernel\nfor this")

    case = CASES["gated_rms_norm"]

    class OnlyForward(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            return y.clone()

        @staticmethod
        def backward(ctx, dy):
            raise RuntimeError("no backward")

    def one_way(**inputs):
        return OnlyForward.apply(case.contenders["longwave"](**inputs))

    contenders = case.contenders | {"broken": broken, "one way": one_way}
    monkeypatch.setitem(CASES, "gated_rms_norm", dataclasses.replace(case, contenders=contenders))
    found = ops.run(["gated_rms_norm"], ungated, sizes="small")
    assert found["missing"] == {
        "gated_rms_norm: broken": "RuntimeError: no kernel for this",
        "gated_rms_norm: one way, backward": "RuntimeError: no backward",
    }
    forward, both = (set(result["figures"]) for result in found["cases"])
    assert forward == set(case.contenders) | {"one way"}
    assert both == set(case.contenders)


def test_a_kernel_of_ours_that_raises_fails_its_case_alone(ungated, monkeypatch):
    def broken(**inputs):
        raise RuntimeError("no")

    case = CASES["gated_rms_norm"]
    broken_case = dataclasses.replace(case, contenders=case.contenders | {"longwave": broken})
    monkeypatch.setitem(CASES, "gated_rms_norm", broken_case)
    found = ops.run(["gated_rms_norm", "linear_step"], ungated, sizes="small")
    assert found["wrong"] == {"gated_rms_norm": "gated_rms_norm: longwave failed: RuntimeError: no"}
    assert [result["case"] for result in found["cases"]] == ["linear_step"]


def test_only_the_call_of_an_adapted_contender_is_timed():
    """Its inputs are made its own once, before; its results and gradients are those of the arguments of ours."""
    made = []

    def native(x, weight):
        made.append(1)
        return {"root": x.sqrt(), "weight": weight}

    contender = Adapted(native, lambda root, weight: root * root * weight)
    inputs = [{"x": torch.rand(3) + 1, "weight": torch.rand(3)}]
    results = outcome(contender, inputs[0], backward=True).results
    torch.testing.assert_close(results["y"], inputs[0]["x"] * inputs[0]["weight"])
    weights = torch.linspace(-1, 1, 3)
    torch.testing.assert_close(results["the gradient of x"], inputs[0]["weight"] * weights)
    made.clear()
    for direction in (forward, forward_for_training, backward, forward_and_backward):
        run = direction(contender, inputs)
        assert made.pop() == 1
        run(0), run(1)
        assert made == []


def test_backward_alone_gives_the_gradients():
    x = torch.rand(3)
    run = backward(lambda x: x * x, [{"x": x}, {"x": 2 * x}])
    (first,), (again,), (other,) = run(0), run(2), run(1)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert x.grad is None
    assert not x.requires_grad


def test_the_summary_is_a_table_for_a_page():
    figures = {"longwave": {"median": 2e-5, "of_floor": 0.5}, "peer": {"median": 5e-5, "of_floor": 0.2}}
    floor = {"seconds": 1e-5, "bound": "memory"}
    result = {"case": "op b1, forward", "figures": figures, "times_faster": {"longwave": {"peer": 2.5}}, "floor": floor}
    assert ops.summary([result]).splitlines() == [
        "| operator, shape | longwave, us | others, us (ratio) | floor, us | share of it |",
        "| --- | --- | --- | --- | --- |",
        "| op b1, forward | 20 | peer 50 (2.5x) | 10, memory | 50.0% |",
    ]

import dataclasses
import json

import pytest
import torch

from longwave.bench.cases import CASES
from longwave.cli import run
from longwave.models.presets import PRESETS


def test_ops_ends_with_one_line_of_json(capsys):
    command = "bench ops --op linear_step --op gated_rms_norm --sizes small --runs 1 --no-gate"
    assert run(command.split()) == 0
    out = capsys.readouterr().out
    *tables, last = out.splitlines()
    found = json.loads(last)
    assert found["benchmark"] == "ops"
    assert found["settings"] == {"runs": 1, "limit": 0.06, "patience": 600.0, "gate": False, "seed": 0}
    assert {"processor", "threads", "torch", "numba"} <= set(found["machine"])
    assert "gated_rms_norm, forward + backward" in "\n".join(tables)


def test_first_calls_end_the_tables(capsys):
    command = "bench ops --op gated_rms_norm --sizes small --runs 1 --no-gate --no-peers --first-call"
    assert run(command.split()) == 0
    *tables, last = capsys.readouterr().out.splitlines()
    assert any(line.startswith("gated_rms_norm: torch rms_norm") for line in tables)
    assert json.loads(last)["cases"][0]["checked"]["longwave"]["first_call"] > 0


def test_a_disagreement_is_the_end_with_status_1(capsys, monkeypatch):
    case = CASES["linear_step"]
    wrong = case.contenders | {"wrong": lambda **inputs: case.contenders["longwave"](**inputs) * 1.01}
    monkeypatch.setitem(CASES, "linear_step", dataclasses.replace(case, contenders=wrong))
    command = "bench ops --op linear_step --op gated_rms_norm --sizes small --runs 1 --no-gate --no-peers"
    assert run(command.split()) == 1
    told = capsys.readouterr()
    found = json.loads(told.out.splitlines()[-1])
    assert [result["case"].split(",")[0] for result in found["cases"]] == ["gated_rms_norm"] * 2
    assert set(found["wrong"]) == {"linear_step"}
    assert "linear_step: wrong and longwave differ" in told.err


def test_model_as_json_alone_with_the_gate(capsys, monkeypatch, toy):
    monkeypatch.setitem(PRESETS, "toy", lambda: toy("mamba"))
    command = (
        "bench model toy --peers mambapy --prefill 8 --prefill 16 --decode 0 --train 0 --runs 1 --limit 0.99 --json"
    )
    assert run(command.split()) == 0
    out = capsys.readouterr().out
    found = json.loads(out)
    assert out.count("\n") == 1
    assert [case["case"] for case in found["cases"]] == ["prefill 8", "prefill 16"]
    assert (found["model"], found["settings"]["gate"]) == ("toy", True)


def test_threads_are_set(capsys, monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    command = "bench ops --op linear_step --sizes small --runs 1 --no-gate --json --threads 3"
    assert run(command.split()) == 0
    assert asked == [3]


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("bench ops --op sdd", "Did you mean 'ssd'"),
        ("bench ops --runs 0", "got 0"),
        ("bench ops --threads 0", "got 0"),
        ("bench ops --device tpu7", "device 'tpu7' is not to be had"),
        ("bench model mamba-130m --batch 0", "got 0"),
        ("bench model mamba-13m", "Did you mean 'mamba-130m'"),
        ("bench model transformerpp-125m --no-gate", "not of attention, swiglu"),
        ("bench model mamba-130m --peers vllm", "vllm"),
    ],
)
def test_wrong_usage_is_one_line(command, said, capsys):
    assert run(command.split()) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1

"""Timing on a GPU: how calls are counted, with a clock of our own; and, with `-m gpu`, against a known bandwidth."""

from contextlib import nullcontext

import pytest
import torch

from longwave.bench import cuda_timing, ops
from longwave.bench.cuda_timing import FEWEST, MOST, Captured, Flushed
from longwave.bench.timing import Harness

gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


class Gpu:
    """A GPU whose clock stands still but for the work it is given."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        self.wiped = 0
        monkeypatch.setattr(cuda_timing, "_mark", lambda: self.now)
        monkeypatch.setattr(cuda_timing, "_seconds", lambda started, ended: ended - started)
        monkeypatch.setattr(cuda_timing, "_more_than_the_cache", lambda device: self)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())

    def fill_(self, value):
        self.now += 1.0  # writing over the cache, which must not count
        self.wiped += 1

    def call(self, seconds):
        seen = []

        def run(i):
            seen.append(i)
            self.now += seconds(len(seen)) if callable(seconds) else seconds

        return run, seen


def test_the_median_call_between_two_events(monkeypatch):
    machine = Gpu(monkeypatch)
    call, seen = machine.call(lambda n: 9.0 if n == 1 else 0.5 if n == 8 else 0.01)  # compiling; something else once
    run = Flushed(call, at_least=0.1, device=torch.device("cuda"))
    assert run() == pytest.approx(0.01)
    assert seen == [0, 0, *range(FEWEST), *range(10)]
    assert machine.wiped == FEWEST + FEWEST + 10
    assert run() == pytest.approx(0.01)
    assert len(seen) == 2 + FEWEST + 10 + 10


def test_the_cache_is_written_over_for_longer_than_launching_takes(monkeypatch):
    machine = Gpu(monkeypatch)
    host = iter([0.0, 2.1])  # seconds before and after the launch; a filling takes 1
    monkeypatch.setattr(cuda_timing.time, "perf_counter", lambda: next(host))
    call, seen = machine.call(0.01)
    run = Flushed(call, at_least=0.1, device=torch.device("cuda"))
    assert run() == pytest.approx(0.01)
    assert machine.wiped == FEWEST + 4 * (FEWEST + 10)  # 1.5 times 2.1 seconds
    assert len(seen) == 2 + FEWEST + 10


@pytest.mark.parametrize(("seconds", "calls"), [(1e-9, MOST), (0.05, FEWEST), (0.01, 10)])
def test_as_many_calls_as_fill_the_time(seconds, calls):
    assert cuda_timing._calls_for(0.1, [seconds, seconds, 9 * seconds]) == calls


def test_exponentials_are_taken_and_counted():
    """Under Triton's interpreter, or on the GPU if there is one."""
    exponentials = pytest.importorskip("longwave.bench.exponentials").exponentials
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    y, n = exponentials(programs=2, rounds=3, device=device)
    assert n == 4 * 3 * 2 * 128
    x = torch.arange(256)[:, None] / 1e9 + torch.tensor([0.0, 0.25, 0.5, 0.75])
    for _ in range(3):
        x = torch.exp2(-x)
    torch.testing.assert_close(y.cpu(), x.sum(-1))


def test_a_graph_is_captured_once_and_shared_out(monkeypatch):
    machine = Gpu(monkeypatch)

    class Graph:
        def replay(self):
            machine.now += 0.4

    run = Captured(lambda i: None, calls=4, at_least=2.0, device=torch.device("cuda"))
    captured = []
    monkeypatch.setattr(run, "_captured", lambda: captured.append(1) or Graph())
    assert run() == pytest.approx(0.1)
    assert run() == pytest.approx(0.1)
    assert captured == [1]
    assert machine.now == pytest.approx(0.4 * (FEWEST + 5 + 5))


@pytest.mark.parametrize("mark", [pytest.param(None, marks=gpu)])
def test_on_a_gpu_both_clocks_agree_on_a_large_copy(mark):
    a = torch.rand(2, 2**26, device="cuda")
    device = torch.device("cuda")
    flushed = Flushed(lambda i: torch.neg(a[0], out=a[1]), 0.02, device)
    captured = Captured(lambda i: torch.neg(a[0], out=a[1]), 4, 0.02, device)
    assert flushed() == pytest.approx(captured(), rel=0.1)
    assert 2e11 < a.nbytes / flushed() < 2e13  # bytes per second


@pytest.mark.parametrize("name", [pytest.param(name, marks=gpu) for name in ops.CUDA_CASES])
def test_on_a_gpu_every_case_runs_and_agrees(name):
    found = ops.run([name], Harness(Harness.Config(runs=1), None), device="cuda", sizes="small", peers=False)
    assert found["wrong"] == found["missing"] == {}
    for result in found["cases"]:
        assert all(figure["median"] > 0 and figure["of_floor"] > 0 for figure in result["figures"].values())

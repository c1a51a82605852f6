"""Seconds of a call on a GPU, between two events on its stream: the clock of the host would time the launches."""

import math
import statistics
import time
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

FEWEST, MOST = 3, 200  # calls of one run


class Flushed:
    """Median seconds of one call of `call(i)`, the cache filled with something else before each.

    A run has as many calls as fill `at_least` seconds, between FEWEST and MOST; its first call is not counted. The host
    launches ahead: the cache is written over for longer than it takes to launch a call, so that what is timed is the
    GPU's work and the gaps between its kernels.
    """

    def __init__(self, call: Callable[[int], object], at_least: float, device: torch.device):
        self._call, self._at_least, self._device = call, at_least, device
        self._waste = _more_than_the_cache(device)
        self._calls, self._fillings = 0, 1

    def __call__(self) -> float:
        with torch.cuda.device(self._device):
            if not self._calls:
                self._call(0)
                self._fillings = self._needed_fillings()
                self._calls = _calls_for(self._at_least, self._times(FEWEST))
            return statistics.median(self._times(self._calls))

    def _needed_fillings(self) -> int:
        """How often the cache is to be written over while the host launches a call."""
        torch.cuda.synchronize()
        marks = [_mark()]
        for i in range(FEWEST):
            self._waste.fill_(i)
            marks.append(_mark())
        started = time.perf_counter()
        self._call(0)
        launching = time.perf_counter() - started
        torch.cuda.synchronize()
        filling = min(_seconds(*pair) for pair in pairwise(marks))
        return max(1, math.ceil(1.5 * launching / filling))

    def _times(self, calls: int) -> list[float]:
        torch.cuda.synchronize()
        marks = []
        for i in range(calls):
            for _ in range(self._fillings):
                self._waste.fill_(i)
            started = _mark()
            self._call(i)
            marks.append((started, _mark()))
        torch.cuda.synchronize()
        return [_seconds(*pair) for pair in marks]


class Captured:
    """Median seconds of one call of `call(i)` in a CUDA graph of `calls` calls in a row, for what launches bound.

    The cache is not emptied: `call` takes turns among copies of its inputs if they are to come from memory.
    """

    def __init__(self, call: Callable[[int], object], calls: int, at_least: float, device: torch.device):
        self._call, self._calls, self._at_least, self._device = call, calls, at_least, device
        self._graph: torch.cuda.CUDAGraph | None = None
        self._replays = 0

    def __call__(self) -> float:
        with torch.cuda.device(self._device):
            if self._graph is None:
                self._graph = self._captured()
                self._replays = _calls_for(self._at_least, self._times(FEWEST))
            return statistics.median(self._times(self._replays)) / self._calls

    def _captured(self) -> torch.cuda.CUDAGraph:
        """All on a stream of its own, the first calls too: backward runs on the stream of its forward."""
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for i in range(self._calls):
                self._call(i)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=stream):
            for i in range(self._calls):
                self._call(i)
        return graph

    def _times(self, replays: int) -> list[float]:
        assert self._graph is not None
        torch.cuda.synchronize()
        marks = [_mark()]
        for _ in range(replays):
            self._graph.replay()
            marks.append(_mark())
        torch.cuda.synchronize()
        return [_seconds(*pair) for pair in pairwise(marks)]


def _calls_for(at_least: float, seconds: list[float]) -> int:
    return min(MOST, max(FEWEST, round(at_least / max(statistics.median(seconds), 1e-9))))


def _more_than_the_cache(device: torch.device) -> Tensor:
    """Memory of five times the size of the second-level cache."""
    return torch.empty(5 * torch.cuda.get_device_properties(device).L2_cache_size, dtype=torch.uint8, device=device)


def _mark() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _seconds(started: torch.cuda.Event, ended: torch.cuda.Event) -> float:
    return started.elapsed_time(ended) / 1e3  # from milliseconds

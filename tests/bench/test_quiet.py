import time

import pytest

from longwave.bench import spin
from longwave.bench.quiet import GapProbe
from longwave.errors import LongwaveError


def test_lost_share_counts_gaps_and_nothing_else(monkeypatch):
    """Ten looks 0.1 ms apart, then a gap of 3 ms, in 4 ms."""
    looks = iter([0.0, *(1e-4 * i for i in range(1, 11)), 4e-3])
    monkeypatch.setattr(spin.time, "perf_counter", lambda: next(looks))
    assert spin.lost_share(4e-3) == pytest.approx(3 / 4)


def test_probe_takes_its_time_on_every_core_and_leaves_nothing_behind():
    with GapProbe() as probe:
        probe()  # the processes start
        started = time.perf_counter()
        share = probe()
        assert time.perf_counter() - started >= probe.SECONDS
        assert 0 <= share < 1
        spinners = probe._spinners
    assert [spinner.returncode for spinner in spinners] == [0] * len(spinners)


def test_probe_says_when_a_process_died():
    with GapProbe() as probe:
        probe._spinners[0].kill()
        probe._spinners[0].wait()
        with pytest.raises(LongwaveError, match="status -9"):
            probe()

import statistics
import time

import pytest

from longwave.bench.timing import Figure, Harness, Repeated, ratio
from longwave.errors import UsageError


class Machine:
    """A clock that runs only while something is done, and a probe that tells a prepared story, then quiet."""

    def __init__(self, shares=()):
        self.now, self.shares, self.log = 0.0, list(shares), []

    def clock(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds
        self.log.append("sleep")

    def probe(self):
        self.now += 0.25
        return self.shares.pop(0) if self.shares else 0.0

    def contender(self, name, seconds):
        seconds = iter(seconds)

        def run():
            took = next(seconds)
            self.now += took
            self.log.append(name)
            return took

        return run

    def harness(self, **config):
        return Harness(Harness.Config(**config), self.probe, clock=self.clock, sleep=self.sleep)


def test_contenders_take_turns_and_first_runs_do_not_count():
    machine = Machine()
    contenders = {"a": machine.contender("a", [9, 1, 3, 2]), "b": machine.contender("b", [9, 4, 6, 5])}
    figures = machine.harness(runs=3).measure("case", contenders)
    assert machine.log == ["a", "b", "a", "b", "a", "b", "a", "b"]
    assert figures == {"a": Figure((1, 3, 2)), "b": Figure((4, 6, 5))}
    assert figures["a"].to_dict() == {"median": 2, "min": 1, "max": 3, "accepted": 3}
    assert ratio(figures["b"], figures["a"]) == 2.5


def test_a_run_counts_only_between_two_quiet_probes():
    # quiet, run, noisy: rejected; noisy, noisy, quiet, run, quiet: accepted; run, quiet: accepted
    machine = Machine([0.0, 0.5, 0.07, 0.0, 0.0, 0.06])
    figures = machine.harness(runs=2).measure("case", {"a": machine.contender("a", [9, 1, 2, 3])})
    assert figures["a"].seconds == (2, 3)
    assert machine.log == ["a", "a", "sleep", "sleep", "a", "a"]


def test_one_that_lacks_runs_goes_on_alone():
    machine = Machine([0.0, 0.0, 0.9, 0.0])
    contenders = {"a": machine.contender("a", [9, 1]), "b": machine.contender("b", [9, 2, 3])}
    figures = machine.harness(runs=1).measure("case", contenders)
    assert figures == {"a": Figure((1,)), "b": Figure((3,))}


def test_patience_ends_a_noisy_case_without_figures():
    machine = Machine([0.9] * 1000)
    contenders = {"a": machine.contender("a", [1]), "b": machine.contender("b", [1])}
    figures = machine.harness(runs=3, patience=20).measure("case", contenders)
    assert figures["a"].median is None
    assert figures["a"].to_dict() == {"median": None, "min": None, "max": None, "accepted": 0}
    assert ratio(figures["b"], figures["a"]) is None
    assert 20 <= machine.now < 22


def test_patience_leaves_the_runs_accepted_so_far():
    machine = Machine()
    figures = machine.harness(runs=5, patience=30).measure("case", {"a": machine.contender("a", [10] * 6)})
    assert figures["a"].seconds == (10, 10)


def test_without_a_gate_every_run_counts():
    harness = Harness(Harness.Config(runs=4), None)
    figures = harness.measure("case", {"a": Machine().contender("a", [9, 1, 2, 3, 4])})
    assert figures["a"].seconds == (1, 2, 3, 4)
    assert figures["a"].median == statistics.median([1, 2, 3, 4])


def test_repeated_calls_fill_the_time_and_count_on(monkeypatch):
    machine, seen = Machine(), []
    monkeypatch.setattr(time, "perf_counter", machine.clock)

    def call(i):
        seen.append(i)
        machine.now += 0.01

    run = Repeated(call, at_least=0.05)
    assert run() == pytest.approx(0.01)
    assert len(seen) == 1
    assert run() == pytest.approx(0.01)
    assert len(seen) == 1 + 1 + 5  # one more to learn how many fill the time
    run()
    assert seen == list(range(12))


@pytest.mark.parametrize(
    ("options", "said"), [({"runs": 0}, "got 0"), ({"limit": 6}, "got 6"), ({"patience": 0}, "got 0")]
)
def test_bad_settings(options, said):
    with pytest.raises(UsageError, match=said):
        Harness.Config(**options)

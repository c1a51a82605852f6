import time

import pytest

from longwave.errors import UsageError
from longwave.training.progress import Budget, Progress


def test_steps_alone_make_the_schedule_a_function_of_the_step():
    progress = Progress()
    budget = Budget(10, None, progress)
    progress.seconds = 1e9  # the clock must not matter
    for step in range(10):
        progress.step = step
        assert not budget.spent(progress)
        assert budget.fraction(progress) == pytest.approx((step + 0.5) / 10)
    progress.step = 10
    assert budget.spent(progress)


def test_minutes_follow_the_clock():
    budget = Budget(None, 1.0, Progress())
    progress = Progress(step=10, seconds=30.0)
    assert budget.fraction(progress) == pytest.approx((30 + 1.5) / 60)  # the middle of a step of 3 s
    assert budget.seconds_left(progress, 3.0) == pytest.approx(30)
    assert not budget.spent(progress)
    assert budget.spent(Progress(step=11, seconds=60.0))


def test_the_first_of_both_ends_the_run():
    budget = Budget(100, 1.0, Progress())
    assert budget.spent(Progress(step=100, seconds=1.0))
    assert budget.spent(Progress(step=1, seconds=61.0))
    assert budget.fraction(Progress(step=50, seconds=0.0)) == pytest.approx(0.505)
    assert budget.seconds_left(Progress(step=90, seconds=0.0), 2.0) == pytest.approx(20)


def test_the_clock_starts_with_the_first_tick_and_goes_on_where_it_was():
    progress = Progress(step=5, seconds=40.0)
    budget = Budget(None, 1.0, progress)
    time.sleep(0.05)
    budget.tick(progress)
    assert progress.seconds == 40.0
    time.sleep(0.05)
    budget.tick(progress)
    assert progress.seconds >= 40.05


def test_best_is_the_lowest():
    progress = Progress()
    for step, bits in enumerate((3.0, 2.0, 2.5)):
        progress.step = step
        progress.evaluated(bits)
    assert (progress.bits_per_byte, progress.best_bits_per_byte, progress.best_step) == (2.5, 2.0, 1)


def test_no_length_says_how_to_give_one():
    with pytest.raises(UsageError, match="--minutes"):
        Budget(None, None, Progress())


@pytest.mark.parametrize(
    "bad", [{"seed": 2**31}, {"batch_size": 0}, {"keep": 0}, {"eval_every": -3}, {"minutes": 0.0}, {"steps": -7}]
)
def test_bad_settings_are_printed(make, bad):
    (name, value), *_ = bad.items()
    with pytest.raises(UsageError, match=rf"{name} must .*{value}"):
        make(**bad)

import pytest

from longwave.bench.table import number, table, times


@pytest.mark.parametrize(
    ("value", "said"),
    [(None, "-"), (0, "0"), (1234.5, "1,230"), (0.012345, "0.0123"), (99.96, "100"), (2.0, "2"), (1e-7, "0.0000001")],
)
def test_numbers_have_three_digits(value, said):
    assert number(value) == said


def test_times():
    assert (times(None), times(12.345)) == ("-", "12.3x")


def test_columns_line_up():
    assert table(["", "ms"], [["a", "1"], ["long", "1,000"]]).splitlines() == [
        "         ms",
        "a         1",
        "long  1,000",
    ]

"""Tables: names to the left, numbers to the right."""

from collections.abc import Sequence


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest entry, the first aligned to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    return "\n".join(_line(row, widths) for row in (header, *rows))


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table for a page of Markdown."""
    lines = (header, ["---"] * len(header), *rows)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def number(value: float | None, digits: int = 3) -> str:
    """`value` to three significant digits without exponent, a dash where there is none."""
    if value is None:
        return "-"
    if value == 0:
        return "0"
    return f"{float(f'{value:.{digits}g}'):,.12f}".rstrip("0").rstrip(".")


def times(value: float | None) -> str:
    """2.5 -> 2.5x."""
    return "-" if value is None else f"{number(value)}x"


def _line(row: Sequence[str], widths: Sequence[int]) -> str:
    name, *numbers = row
    aligned = (f"{word:>{width}}" for word, width in zip(numbers, widths[1:], strict=True))
    return "  ".join((f"{name:<{widths[0]}}", *aligned)).rstrip()

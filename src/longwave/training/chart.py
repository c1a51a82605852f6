"""Line charts as inline SVG. Colours come from the page's CSS variables, so they follow its light or dark mode."""

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

WIDTH, HEIGHT = 640, 260
LEFT, RIGHT, TOP, BOTTOM = 58, 28, 12, 34  # margins
MOST_POINTS = 400  # of one line; more would not be seen


class Line(NamedTuple):
    name: str
    points: Sequence[tuple[float, float]]
    """(x, y), x rising."""
    style: str = "line"
    """A class of the page's style sheet: line, faint or marked (with a dot and its value at every point)."""


def line_chart(title: str, x_name: str, lines: Sequence[Line]) -> str:
    """One chart with axes from the data; '' where no line has a point."""
    thinned = [line._replace(points=thin(line.points)) for line in lines if line.points]
    if not thinned:
        return ""
    xs = [x for line in thinned for x, _ in line.points]
    ys = [y for line in thinned for _, y in line.points]
    x_ticks, y_ticks = ticks(min(xs), max(xs)), ticks(min(ys), max(ys))
    x_low, x_high = min(xs), max(max(xs), min(xs) + 1e-9)
    y_low, y_high = min(y_ticks[0], min(ys)), max(y_ticks[-1], max(ys))

    def place(x: float, y: float) -> tuple[float, float]:
        right = (x - x_low) / (x_high - x_low)
        up = (y - y_low) / ((y_high - y_low) or 1)
        return LEFT + right * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">']
    for y in y_ticks:
        _, v = place(x_low, y)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{v:.1f}" y2="{v:.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{v + 4:.1f}" text-anchor="end">{y:g}</text>')
    for x in (x for x in x_ticks if x_low <= x <= x_high):
        u, _ = place(x, y_low)
        parts.append(f'<text x="{u:.1f}" y="{HEIGHT - 14}" text-anchor="middle">{x:g}</text>')
    parts.append(f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 1}" text-anchor="end">{escape(x_name)}</text>')
    for line in thinned:
        placed = [place(x, y) for x, y in line.points]
        path = " ".join(f"{u:.1f},{v:.1f}" for u, v in placed)
        parts.append(f'<polyline class="{line.style}" points="{path}"><title>{escape(line.name)}</title></polyline>')
        if line.style == "marked":
            parts += [
                f'<circle class="dot" cx="{u:.1f}" cy="{v:.1f}" r="4"><title>{x_name} {x:g}: {y:.4g}</title></circle>'
                for (u, v), (x, y) in zip(placed, line.points, strict=True)
            ]
    parts.append("</svg>")
    return f"<figure><figcaption>{escape(title)}</figcaption>{''.join(parts)}</figure>"


def thin(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most MOST_POINTS points: means of equal stretches."""
    size = math.ceil(len(points) / MOST_POINTS)
    stretches = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(x for x, _ in s) / len(s), sum(y for _, y in s) / len(s)) for s in stretches]


def smooth(points: Sequence[tuple[float, float]], memory: float = 0.97) -> list[tuple[float, float]]:
    """Exponential running mean, without the bias towards its start."""
    mean, weight, result = 0.0, 0.0, []
    for x, y in points:
        mean, weight = memory * mean + (1 - memory) * y, memory * weight + 1 - memory
        result.append((x, mean / weight))
    return result


def ticks(low: float, high: float) -> list[float]:
    """About five round numbers that span low to high."""
    span = (high - low) or abs(high) or 1.0
    rough = span / 5
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * m for m in (1, 2, 2.5, 5, 10) if unit * m >= rough * 0.999)
    first, last = math.floor(low / step), math.ceil(high / step)
    return [round(i * step, 12) for i in range(first, last + 1)]

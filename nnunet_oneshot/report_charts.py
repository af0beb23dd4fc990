"""Small charts as SVG text, for a page that needs no network and no script."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 360, 220, 46, 34, 24
Point = tuple[float, float]


def line_chart(title: str, points: Sequence[Point], x_name: str) -> str:
    """Points joined by a line; x are whole numbers such as rounds."""
    scale = _Scale(points)
    path = " ".join(f"{scale.x(x):.1f},{scale.y(y):.1f}" for x, y in points)
    dots = "".join(_dot(scale, p) for p in points)
    line = f'<polyline points="{path}" fill="none" stroke="#0072b2" stroke-width="2"/>'
    return _frame(title, scale, x_name, line + dots)


def scatter_chart(title: str, points: Sequence[Point], x_name: str) -> str:
    """Points, and the diagonal where x equals y."""
    scale = _Scale([*points, *((v, v) for p in points for v in p)])
    low, high = scale.low_x, scale.high_x
    diagonal = (
        f'<line x1="{scale.x(low):.1f}" y1="{scale.y(low):.1f}" x2="{scale.x(high):.1f}" y2="{scale.y(high):.1f}" '
        'stroke="#999" stroke-dasharray="4 3"/>'
    )
    return _frame(title, scale, x_name, diagonal + "".join(_dot(scale, p) for p in points))


def histogram(title: str, values: Sequence[float], x_name: str, bins: int = 12) -> str:
    """How many values lie where."""
    low, high = min(values), max(values)
    step = (high - low) / bins or 1.0
    counts = [0] * bins
    for value in values:
        counts[min(int((value - low) / step), bins - 1)] += 1
    scale = _Scale([(low, 0), (low + bins * step, max(counts))])
    bars = "".join(_bar(scale, low + i * step, step, count) for i, count in enumerate(counts))
    return _frame(title, scale, x_name, bars)


class _Scale:
    """From values to pixels."""

    def __init__(self, points: Sequence[Point]) -> None:
        xs, ys = zip(*points, strict=True)
        self.low_x, self.high_x = _widened(min(xs), max(xs))
        self.low_y, self.high_y = _widened(min(ys), max(ys))

    def x(self, value: float) -> float:
        return LEFT + (WIDTH - LEFT - 10) * (value - self.low_x) / (self.high_x - self.low_x)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * (value - self.low_y) / (self.high_y - self.low_y)


def _widened(low: float, high: float) -> Point:
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _dot(scale: _Scale, point: Point) -> str:
    return f'<circle cx="{scale.x(point[0]):.1f}" cy="{scale.y(point[1]):.1f}" r="3" fill="#0072b2" fill-opacity=".7"/>'


def _bar(scale: _Scale, begin: float, step: float, count: int) -> str:
    left, right, top = scale.x(begin), scale.x(begin + step), scale.y(count)
    height = scale.y(0) - top
    return f'<rect x="{left:.1f}" y="{top:.1f}" width="{right - left - 1:.1f}" height="{height:.1f}" fill="#0072b2"/>'


def _frame(title: str, scale: _Scale, x_name: str, content: str) -> str:
    """Axes with their ends, a title and a name around what is drawn."""
    texts = [
        (LEFT, 14, "start", title),
        ((LEFT + WIDTH) / 2, HEIGHT - 4, "middle", x_name),
        (LEFT - 4, scale.y(scale.low_y), "end", f"{scale.low_y:.3g}"),
        (LEFT - 4, scale.y(scale.high_y) + 8, "end", f"{scale.high_y:.3g}"),
        (LEFT, HEIGHT - BOTTOM + 14, "start", f"{scale.low_x:.3g}"),
        (WIDTH - 10, HEIGHT - BOTTOM + 14, "end", f"{scale.high_x:.3g}"),
    ]
    labels = "".join(f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="{a}">{escape(t)}</text>' for x, y, a, t in texts)
    floor = HEIGHT - BOTTOM
    axes = f'<path d="M{LEFT} {TOP}V{floor}H{WIDTH - 10}" fill="none" stroke="#555"/>'
    name = escape(title, quote=True)
    return f'<svg role="img" aria-label="{name}" width="{WIDTH}" height="{HEIGHT}">{axes}{content}{labels}</svg>'

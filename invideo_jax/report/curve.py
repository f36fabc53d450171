"""Line charts as SVG text: a chart is one function call, a string, and sharp at any size."""

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

_COLOURS = ("#2563eb", "#ea580c", "#059669", "#9333ea", "#dc2626", "#0891b2")
_FONT = "font-family='system-ui,-apple-system,Segoe UI,Roboto,Helvetica,Arial,sans-serif'"
_MOST_POINTS = 1000


class Line(NamedTuple):
    """One line of a chart; a point that is not finite leaves a gap.

    Attributes:
        name: for the legend; '' has no entry there.
        x: increasing numbers from 0 on; the axis starts at 0.
        y: as many numbers.
        dots: draw the points themselves too (few measurements, like evaluations).
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    dots: bool = False


def chart(
    lines: Sequence[Line],
    *,
    title: str,
    x_label: str = "step",
    reference: tuple[float, str] | None = None,
    width: int = 720,
    height: int = 300,
) -> str:
    """Draws lines over common axes.

    Args:
        lines: what to draw; those without a finite point are left out.
        title: above the chart.
        x_label: below the axis.
        reference: a height to mark by a dashed line, and its name.
        width, height: pixels.

    Returns:
        An `<svg>` element, also good as a file; '' when there is nothing to draw.
    """
    lines = [line for line in lines if any(map(math.isfinite, line.y))]
    if not lines:
        return ""
    xs = [x for line in lines for x in line.x]
    ys = [y for line in lines for y in line.y if math.isfinite(y)]
    ys += [reference[0]] if reference else []
    x_range = (0, max(max(xs), 1))
    x_ticks, y_ticks = ticks(*x_range, 7), ticks(min(ys), max(ys), 5)
    y_range = (min(y_ticks[0], min(ys)), max(y_ticks[-1], max(ys)))
    left, right, top, bottom = 64, 26, 44, 42
    at_x = lambda x: left + (x - x_range[0]) / (x_range[1] - x_range[0]) * (width - left - right)
    at_y = lambda y: (
        height - bottom - (y - y_range[0]) / (y_range[1] - y_range[0]) * (height - top - bottom)
    )
    parts = [
        f"<rect width='{width}' height='{height}' fill='#ffffff'/>",
        _text(left - 44, 20, title, size=14, colour="#0f172a", weight=600),
        _text((left + width - right) / 2, height - 8, x_label, anchor="middle"),
    ]
    for y in y_ticks:
        parts.append(_rule(left, at_y(y), width - right, at_y(y), "#e2e8f0"))
        parts.append(_text(left - 8, at_y(y) + 4, _number(y, y_ticks), anchor="end"))
    for x in (x for x in x_ticks if x_range[0] <= x <= x_range[1]):
        parts.append(_rule(at_x(x), height - bottom, at_x(x), height - bottom + 5, "#94a3b8"))
        parts.append(_text(at_x(x), height - bottom + 18, _number(x, x_ticks), anchor="middle"))
    parts.append(_rule(left, height - bottom, width - right, height - bottom, "#94a3b8"))
    if reference:
        y = at_y(reference[0])
        parts.append(_rule(left, y, width - right, y, "#64748b", dash="5 4"))
        parts.append(_text(width - right - 2, y - 5, reference[1], anchor="end"))
    for line, colour in zip(lines, _cycle(len(lines))):
        parts.append(_drawn(line, colour, at_x, at_y))
    parts.append(_legend(lines, width - right))
    body = "\n".join(parts)
    return (
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width} {height}' width='{width}' "
        f"height='{height}' role='img' aria-label='{escape(title, quote=True)}'>\n{body}\n</svg>"
    )


def ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers (steps of 1, 2 or 5 times a power of ten) that enclose low..high."""
    if not high > low:
        pad = abs(low) * 0.05 or 1.0
        low, high = low - pad, high + pad
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(s * power for s in (1, 2, 5, 10) if s * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def _number(value: float, among: Sequence[float]) -> str:
    """A tick's label: with as many decimals as its neighbours need, or as a power of ten."""
    step = among[1] - among[0]
    size = max(abs(v) for v in among)
    if size >= 1e6 or size < 1e-3:
        return f"{value:.3g}" if value else "0"
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    return f"{value:,.{decimals}f}"


def _drawn(line: Line, colour: str, at_x, at_y) -> str:
    """The path of one line, thinned when there are far more points than pixels."""
    every = max(1, math.ceil(len(line.x) / _MOST_POINTS))
    points = list(zip(line.x, line.y))
    points = points[::every] + (points[-1:] if (len(points) - 1) % every else [])
    path, pen = [], "M"
    for x, y in points:
        if math.isfinite(y):
            path.append(f"{pen}{at_x(x):.1f} {at_y(y):.1f}")
        pen = "L" if math.isfinite(y) else "M"
    drawn = (
        f"<path d='{' '.join(path)}' fill='none' stroke='{colour}' stroke-width='2' "
        "stroke-linejoin='round' stroke-linecap='round'/>"
    )
    if line.dots or len(points) == 1:
        drawn += "".join(
            f"<circle cx='{at_x(x):.1f}' cy='{at_y(y):.1f}' r='3.5' fill='{colour}' stroke='#fff'/>"
            for x, y in points
            if math.isfinite(y)
        )
    return drawn


def _legend(lines: Sequence[Line], right: float) -> str:
    """Names of the lines, right-aligned in the title's row; widths are estimated at 6.6 pixels a letter."""
    parts, x = [], right
    for line, colour in reversed(list(zip(lines, _cycle(len(lines))))):
        if not line.name:
            continue
        x -= 6.6 * len(line.name)
        parts.append(_text(x, 20, line.name))
        parts.append(_rule(x - 22, 16, x - 6, 16, colour, width=3))
        x -= 38
    return "".join(parts)


def _cycle(count: int) -> list[str]:
    return [_COLOURS[i % len(_COLOURS)] for i in range(count)]


def _rule(x1, y1, x2, y2, colour: str, *, width: int = 1, dash: str = "") -> str:
    dashes = f" stroke-dasharray='{dash}'" if dash else ""
    return (
        f"<line x1='{x1:.1f}' y1='{y1:.1f}' x2='{x2:.1f}' y2='{y2:.1f}' stroke='{colour}' "
        f"stroke-width='{width}'{dashes}/>"
    )


def _text(
    x, y, text: str, *, anchor: str = "start", size: int = 12, colour: str = "#475569", weight=400
) -> str:
    return (
        f"<text x='{x:.1f}' y='{y:.1f}' {_FONT} font-size='{size}' font-weight='{weight}' "
        f"fill='{colour}' text-anchor='{anchor}'>{escape(text)}</text>"
    )

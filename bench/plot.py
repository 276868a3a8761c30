"""Charts as one SVG each, for the README, light and dark: lines on logarithmic axes, and bars."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

WIDTH, HEIGHT = 720, 380
LEFT, RIGHT, TOP, BOTTOM = 64, 176, 48, 48
COLOURS = {"whole": "#b3261e", "stored": "#c77700", "vllm": "#5b6b7a", "qvsplit": "#0b7a4b"}
NAMES = {
    "whole": "the full model", "stored": "a prefill a question", "vllm": "vLLM, prefix cache", "qvsplit": "qvsplit",
}  # fmt: skip


STYLE = (
    "<style>text{fill:#1f2328}.axis{stroke:#8c959f;stroke-width:.7}.back{fill:#fff}"
    "@media(prefers-color-scheme:dark){text{fill:#e6edf3}.axis{stroke:#6e7681}.back{fill:#0d1117}}</style>"
)
BARS = {
    "usual": ("#b3261e", "the usual script"), "plain": ("#c77700", "plain transformers, written well"),
    "qvsplit": ("#0b7a4b", "qvsplit"), "limit": ("#5b6b7a", "the limit: torch's matrix product"),
}  # fmt: skip


def bars(groups: Mapping[str, Mapping[str, float]], *, title: str, unit: str) -> str:
    """SVG of a bar a contender, group by group, each value behind its bar."""
    left, step = 250, 34
    height = 56 + sum(30 + step * len(values) for values in groups.values())
    scale = (WIDTH - left - 150) / max(value for values in groups.values() for value in values.values())
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'font-family="system-ui, sans-serif" font-size="13"><title>{escape(title)}</title>',
        STYLE,
        f'<rect class="back" width="{WIDTH}" height="{height}" rx="8"/>',
        f'<text x="20" y="28" font-size="15" font-weight="600">{escape(title)}</text>',
    ]
    y = 44
    for group, values in groups.items():
        parts.append(f'<text x="20" y="{y + 16}" font-weight="600">{escape(group)}</text>')
        y += 24
        for name, value in values.items():
            colour, words = BARS[name]
            end = left + value * scale + 10
            parts += [
                f'<text x="{left - 12}" y="{y + 16}" text-anchor="end">{escape(words)}</text>',
                f'<rect x="{left}" y="{y}" width="{value * scale:.1f}" height="23" rx="3" fill="{colour}"/>',
                f'<text x="{end:.1f}" y="{y + 16}" font-weight="600">{value:,.0f} {escape(unit)}</text>',
            ]
            y += step
        y += 6
    return "\n".join([*parts, "</svg>"]) + "\n"


def lines(series: Mapping[str, Sequence[tuple[float, float]]], *, title: str, x: str, y: str) -> str:
    """SVG of (x, y) points a series; every x that occurs is a tick, and every power of ten on the y axis."""
    xs = sorted({point[0] for points in series.values() for point in points})
    ys = [point[1] for points in series.values() for point in points]
    low, high = math.floor(math.log10(min(ys))), math.ceil(math.log10(max(ys)))

    def at(px: float, py: float) -> tuple[float, float]:
        across = (math.log10(px) - math.log10(xs[0])) / (math.log10(xs[-1]) - math.log10(xs[0]))
        up = (math.log10(py) - low) / (high - low)
        return LEFT + across * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'font-family="system-ui, sans-serif" font-size="13"><title>{escape(title)}</title>',
        STYLE,
        f'<rect class="back" width="{WIDTH}" height="{HEIGHT}" rx="8"/>',
        f'<text x="{LEFT}" y="26" font-size="15" font-weight="600">{escape(title)}</text>',
    ]
    for power in range(low, high + 1):
        _, py = at(xs[0], 10.0**power)
        parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{py:.1f}" y2="{py:.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{py + 4:.1f}" text-anchor="end">{10.0**power:g} s</text>')
    for value in xs:
        px, _ = at(value, 10.0**low)
        parts.append(f'<text x="{px:.1f}" y="{HEIGHT - BOTTOM + 20}" text-anchor="middle">{value:g}</text>')
    parts.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x)}</text>')
    taken: list[float] = []
    for name, points in sorted(series.items(), key=lambda one: -one[1][-1][1]):
        path = " ".join(f"{px:.1f},{py:.1f}" for px, py in (at(*point) for point in points))
        parts.append(f'<polyline points="{path}" fill="none" stroke="{COLOURS[name]}" stroke-width="2.5"/>')
        parts += [
            f'<circle cx="{px:.1f}" cy="{py:.1f}" r="3.5" fill="{COLOURS[name]}"/>'
            for px, py in (at(*point) for point in points)
        ]
        _, py = at(*points[-1])
        py = max([py, *(other + 32 for other in taken)])
        taken.append(py)
        parts.append(
            f'<text x="{WIDTH - RIGHT + 12}" y="{py + 1:.1f}" font-weight="600">{escape(NAMES[name])}</text>'
            f'<text x="{WIDTH - RIGHT + 12}" y="{py + 16:.1f}">{points[-1][1]:.3g} s</text>'
        )
    return "\n".join([*parts, "</svg>"]) + "\n"

"""What comparisons and cards are drawn with: one quiet page, curves and tables, no scripts."""

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

COLORS = (
    "#2f6fde",
    "#d9730d",
    "#0f8b6f",
    "#9b4dca",
    "#c2384e",
    "#5a6b7b",
    "#b08900",
    "#0b88a8",
    "#7a5c3e",
)
WIDTH, HEIGHT = 460, 240
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 10, 26  # around the axes


class Curve(NamedTuple):
    """A line, and the band around it."""

    label: str
    color: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()


def chart(curves: Sequence[Curve], x_label: str = "step") -> str:
    """Curves over common axes as SVG."""
    curves = [_finite(curve) for curve in curves]
    curves = [curve for curve in curves if curve.x]
    if not curves:
        return ""
    xs = [x for curve in curves for x in curve.x]
    ys = [y for curve in curves for part in (curve.y, curve.low, curve.high) for y in part]
    (x0, x1), (y0, y1) = _range(xs), _range(ys)
    place_x = lambda x: LEFT + (x - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT)
    place_y = lambda y: HEIGHT - BOTTOM - (y - y0) / (y1 - y0) * (HEIGHT - TOP - BOTTOM)
    points = lambda x, y: " ".join(
        f"{place_x(a):.1f},{place_y(b):.1f}" for a, b in zip(x, y, strict=True)
    )
    parts = []
    for tick in _ticks(y0, y1):
        at = place_y(tick)
        parts.append(
            f"<line class=rule x1={LEFT} x2={WIDTH - RIGHT} y1={at:.1f} y2={at:.1f} />"
            f"<text x={LEFT - 6} y={at + 3.5:.1f} text-anchor=end>{tick:g}</text>"
        )
    room = WIDTH - RIGHT - 8 * len(x_label)  # where the axis is named
    for tick in (tick for tick in _ticks(x0, x1) if place_x(tick) < room):
        parts.append(
            f"<text x={place_x(tick):.1f} y={HEIGHT - 10} text-anchor=middle>{tick:,g}</text>"
        )
    for curve in curves:
        if curve.low:
            around = points(curve.x, curve.high) + " " + points(curve.x[::-1], curve.low[::-1])
            parts.append(f'<polygon points="{around}" fill="{curve.color}" opacity=".14" />')
        parts.append(
            f'<polyline points="{points(curve.x, curve.y)}" fill=none stroke="{curve.color}" '
            "stroke-width=1.8 stroke-linejoin=round />"
        )
        if len(curve.x) < 30:
            parts += [
                f'<circle cx={place_x(a):.1f} cy={place_y(b):.1f} r=2.4 fill="{curve.color}" />'
                for a, b in zip(curve.x, curve.y, strict=True)
            ]
    keys = "".join(
        f'<span><i style="background:{curve.color}"></i>{escape(curve.label)}</span>'
        for curve in curves
        if curve.label
    )
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role=img>{"".join(parts)}'
        f"<text x={WIDTH - RIGHT} y={HEIGHT - 10} text-anchor=end>{escape(x_label)}</text>"
        f"</svg><div class=keys>{keys}</div>"
    )


def figure(title: str, drawing: str) -> str:
    """A drawing under its title."""
    return f"<figure><figcaption>{escape(title)}</figcaption>{drawing}</figure>"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; cells are HTML already."""
    line = lambda cells, tag: "<tr>" + "".join(f"<{tag}>{c}</{tag}>" for c in cells) + "</tr>"
    body = "".join(line(row, "td") for row in rows)
    top = f"<thead>{line(head, 'th')}</thead>" if head else ""
    return f"<div class=scroll><table>{top}<tbody>{body}</tbody></table></div>"


def page(title: str, body: str) -> str:
    """A whole HTML page that needs nothing else."""
    return _PAGE.replace("TITLE", escape(title)).replace("BODY", body, 1)


def _finite(curve: Curve) -> Curve:
    """Without the points that cannot be drawn."""
    good = [n for n, y in enumerate(curve.y) if math.isfinite(y)]
    pick = lambda values: [values[n] for n in good] if values else []
    return curve._replace(
        x=pick(curve.x), y=pick(curve.y), low=pick(curve.low), high=pick(curve.high)
    )


def _range(values: Sequence[float]) -> tuple[float, float]:
    """The ends of an axis, a little beyond the values."""
    low, high = min(values), max(values)
    if low == high:
        return low - 0.5, high + 0.5
    margin = 0.04 * (high - low)
    return (low - margin if low < 0 or low - margin >= 0 else 0.0), high + margin


def _ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers between the ends."""
    rough = (high - low) / count
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= rough)
    first = math.ceil(low / step)
    return [round(n * step, 10) for n in range(first, math.floor(high / step) + 1)]


_PAGE = """<!doctype html>
<html lang=en>
<meta charset=utf-8>
<meta name=viewport content="width=device-width, initial-scale=1">
<title>TITLE</title>
<style>
:root { color-scheme: light dark; --paper: #faf9f7; --sheet: #fff; --ink: #23272f; --faint: #6b7280;
  --line: #e7e5e1; --soft: #f3f1ed; --good: #0f7a5a; --bad: #c2263b; --bad-soft: #fdecee }
@media (prefers-color-scheme: dark) { :root { --paper: #14161a; --sheet: #1c1f25; --ink: #e6e6e3;
  --faint: #9aa1ac; --line: #2d3138; --soft: #23272e; --good: #4cc79f; --bad: #ff7285;
  --bad-soft: #3a1e24 } }
* { box-sizing: border-box }
body { margin: 0 auto; padding: 3.2rem clamp(1rem, 4vw, 3rem) 5rem; max-width: 68rem;
  background: var(--paper); color: var(--ink); font: 16px/1.6 system-ui, sans-serif }
h1 { margin: 0 0 .4rem; font-size: 2.1rem; letter-spacing: -.025em; line-height: 1.2 }
h2 { margin: 3.2rem 0 .9rem; font-size: 1.2rem; letter-spacing: -.01em }
p { max-width: 46rem; margin: .4rem 0 }
.lead, small, figcaption, .faint { color: var(--faint) }
.tiles { display: grid; gap: 1px; margin: 2rem 0 0; padding: 0; background: var(--line);
  border: 1px solid var(--line); border-radius: 12px; overflow: hidden;
  grid-template-columns: repeat(auto-fit, minmax(8rem, 1fr)) }
.tiles div { background: var(--sheet); padding: .9rem 1.1rem }
dt { color: var(--faint); font-size: .8rem }
dd { margin: 0; font-size: 1.35rem; font-weight: 600; font-variant-numeric: tabular-nums }
dd small { display: block; font-weight: 400; font-size: .78rem }
.grid { display: grid; gap: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr)) }
figure, .scroll, details, .card { margin: 0; background: var(--sheet);
  border: 1px solid var(--line); border-radius: 12px }
figure { padding: .9rem 1rem .7rem }
figcaption { font-size: .85rem; padding-bottom: .4rem }
svg { display: block; width: 100%; height: auto }
svg text { fill: var(--faint); font: 10.5px system-ui, sans-serif }
svg .rule { stroke: var(--line) }
.keys { display: flex; flex-wrap: wrap; gap: .2rem 1rem; font-size: .78rem; color: var(--faint) }
.keys i { display: inline-block; width: .9rem; height: 3px; margin: 0 .4rem .2rem 0;
  border-radius: 2px }
.scroll { overflow-x: auto }
table { border-collapse: collapse; width: 100%; font-size: .88rem;
  font-variant-numeric: tabular-nums }
th, td { text-align: left; padding: .5rem .9rem; vertical-align: top }
th { color: var(--faint); font-weight: 500; font-size: .8rem; white-space: nowrap }
tbody tr + tr, thead + tbody tr { border-top: 1px solid var(--line) }
code, pre, .mono { font: .82rem/1.55 ui-monospace, monospace; overflow-wrap: anywhere }
pre { margin: 0; padding: 1rem; overflow-x: auto; white-space: pre-wrap }
details { padding: .7rem 1rem; margin-bottom: .6rem }
summary { cursor: pointer; font-weight: 500 }
.good { color: var(--good) } .bad { color: var(--bad); font-weight: 600 }
tr:has(.bad) { background: var(--bad-soft) }
.verdict { font-size: 1.05rem; margin: 1rem 0 }
.card { padding: 1rem 1.2rem; margin-bottom: .8rem }
.card h3 { margin: 0 0 .5rem; font-size: .9rem; font-weight: 600 }
.said { display: grid; grid-template-columns: 5.5rem 1fr; gap: .35rem 1rem; font-size: .92rem }
.said b { color: var(--faint); font-weight: 500; font-size: .78rem; padding-top: .15rem }
.strip { display: flex; flex-wrap: wrap; gap: 2px; margin-top: .1rem }
.strip span { font: .76rem/1.5 ui-monospace, monospace; padding: 0 .22rem; border-radius: 4px;
  white-space: pre; background: var(--soft) }
.bar { display: flex; height: 10px; border-radius: 5px; overflow: hidden; background: var(--soft) }
.bar i { display: block }
</style>
<h1>TITLE</h1>
BODY
"""

"""The matrix as a table for the terminal and as a page with a chart."""

from __future__ import annotations

import math
from html import escape
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table

from bitwright.bench.html import page, table

if TYPE_CHECKING:
    from bitwright.claims.matrix import Matrix, MatrixRow

COLUMNS = ("version", "score", "drop [95 %]", "speed", "bytes", "bit operations", "trained = shipped", "smaller")
_SPEED, _SMALLER = COLUMNS.index("speed"), COLUMNS.index("smaller")
_STYLE = """
figure { margin: 1rem 0; max-width: 52rem; } figure svg { width: 100%; height: auto; min-width: 34rem; }
svg text { paint-order: stroke; stroke: var(--paper); stroke-width: 4px; stroke-linejoin: round; }
"""


def _cells(found: Matrix, row: MatrixRow) -> list[str]:
    base = found.rows[0]
    percent = base.score.p is not None
    factor, form = (100, ".2f") if percent else (1, ".4g")
    drop = (
        "{:+{f}} [{:+{f}}, {:+{f}}]".format(
            *(factor * x for x in (row.score.drop, row.score.low, row.score.high)), f=form
        )
        if row is not base
        else ""
    )
    return [
        row.name,
        f"{factor * row.score.after:{form}}" + (" %" if percent else ""),
        drop,
        str(row.speed or ""),
        f"{row.bytes:,}",
        f"{row.bops:.3g}",
        "" if row is base else "exact" if row.equal else "differs",
        f"{base.bytes / max(row.bytes, 1):.1f}x",
    ]


def to_table(found: Matrix) -> Table:
    """The rows for a terminal of 80 columns: speeds without their spread."""
    made = Table(title=f"{found.model}: one model, {len(found.rows)} versions", box=box.SIMPLE_HEAD, show_edge=False)
    made.padding = (0, 1, 0, 0)
    for index, name in enumerate(COLUMNS[:_SMALLER]):
        made.add_column(name.replace(" ", "\n"), justify="left" if index == 0 else "right", no_wrap=True)
    for row in found.rows:
        cells = _cells(found, row)
        cells[_SPEED] = cells[_SPEED].partition(" (")[0]
        made.add_row(*cells[:_SMALLER])
    return made


def to_html(found: Matrix) -> str:
    """The page: table, chart, and how the rows were made."""
    parts = [
        table(list(COLUMNS), [_cells(found, row) for row in found.rows], {0}),
        "<h2>Score lost against stored size</h2>",
        _chart(found),
        "<h2>How these were made</h2>",
        *(f"<p>{escape(note)}</p>" for note in found.notes),
    ]
    return page(f"{found.model}: float, quantized, trained, mixed", parts, _STYLE)


_LEFT, _TOP, _WIDTH, _HEIGHT = 64, 16, 600, 300
_SOFT, _DASHED = 'stroke="var(--line)"', 'stroke="var(--soft)" stroke-dasharray="3 3"'


def _chart(found: Matrix) -> str:
    """A labelled point with its interval for each row; lower is better, and so is further left."""
    rows = found.rows
    factor, unit = (100, " in points") if rows[0].score.p is not None else (1, "")
    most = max(row.bytes for row in rows)
    low = min(0.0, *(row.score.low for row in rows)) * factor
    span = (max(0.0, *(row.score.high for row in rows)) * factor - low) or 1.0

    def x(size: float) -> float:
        return _LEFT + size / most * _WIDTH

    def y(drop: float) -> float:
        return _TOP + _HEIGHT - (drop * factor - low) / span * _HEIGHT

    vertical = [(y(value / factor), f"{value:+.3g}") for value in _ticks(low, low + span)]
    horizontal = [(x(size), _size(size)) for size in _ticks(0, most)]
    parts = [*_axes(vertical, horizontal), _line(_LEFT, _LEFT + _WIDTH, y(0), y(0), _DASHED)]
    places = _apart([x(row.bytes) for row in rows], 9)
    labels = _apart([y(row.score.drop) for row in rows], 17)
    for row, place, label in zip(rows, places, labels, strict=True):
        heights = [y(value) for value in (row.score.drop, row.score.low, row.score.high)]
        parts.append(_point(row.name, place, heights, label, last=row.bytes > 0.8 * most))
    caption = (
        f"Vertical: score lost{unit}, with its 95 % interval. Horizontal: stored bytes; versions of one size stand "
        "side by side."
    )
    height = _TOP + _HEIGHT + 32
    label = 'role="img" aria-label="score lost against stored bytes"'
    svg = f'<svg viewBox="0 0 {_LEFT + _WIDTH + 60} {height}" {label}>{"".join(parts)}</svg>'
    return f'<figure><div class="scroll">{svg}</div><figcaption><p>{escape(caption)}</p></figcaption></figure>'


def _axes(vertical: list[tuple[float, str]], horizontal: list[tuple[float, str]]) -> list[str]:
    """Marks and numbers on the left and below."""
    bottom, parts = _TOP + _HEIGHT, []
    for at, text in vertical:
        parts.append(_line(_LEFT - 5, _LEFT, at, at, _SOFT))
        parts.append(f'<text class="soft" text-anchor="end" x="{_LEFT - 9}" y="{at + 4:.1f}">{text}</text>')
    for at, text in horizontal:
        parts.append(_line(at, at, bottom, bottom + 5, _SOFT))
        parts.append(f'<text class="soft" text-anchor="middle" x="{at:.1f}" y="{bottom + 20}">{text}</text>')
    return [_line(_LEFT, _LEFT + _WIDTH, bottom, bottom, _SOFT), _line(_LEFT, _LEFT, _TOP, bottom, _SOFT), *parts]


def _line(x1: float, x2: float, y1: float, y2: float, style: str) -> str:
    return f'<line x1="{x1:.1f}" x2="{x2:.1f}" y1="{y1:.1f}" y2="{y2:.1f}" {style}/>'


def _point(name: str, x: float, heights: list[float], label: float, *, last: bool) -> str:
    drop, low, high = heights
    side, anchor = (x - 14, "end") if last else (x + 16, "start")
    return (
        _line(x, x, low, high, 'stroke="var(--accent)" stroke-width="2"')
        + f'<circle cx="{x:.1f}" cy="{drop:.1f}" r="5" fill="var(--accent)"/>'
        + _line(x, side, drop, label, 'stroke="var(--soft)"')
        + f'<text text-anchor="{anchor}" x="{side:.1f}" y="{label + 4:.1f}">{escape(name)}</text>'
    )


def _apart(places: list[float], gap: float) -> list[float]:
    """The places, moved up by as much as it takes for them to lie ``gap`` apart.

    >>> _apart([100.0, 50.0, 52.0], 17)
    [100.0, 50.0, 67.0]
    """
    found, last = list(places), -math.inf
    for index in sorted(range(len(places)), key=places.__getitem__):
        found[index] = last = max(places[index], last + gap)
    return found


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers within a range, about five.

    >>> _ticks(-0.93, 1.93)
    [-0.5, 0.0, 0.5, 1.0, 1.5]
    """
    rough = (high - low) / 5
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * times for times in (1, 2, 5, 10) if unit * times >= rough * 0.8)
    return [round(count * step, 12) for count in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _size(count: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f}"

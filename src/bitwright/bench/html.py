"""The report as one self-contained HTML page: inline style, pictures drawn as SVG, no script, nothing fetched."""

from __future__ import annotations

from html import escape

from bitwright.bench.report import COLUMNS, LayerBits, Report, Row, cells, filled

# One colour per width, dark = few bits; distinct in lightness, so that they survive colour blindness and print.
_COLOURS = {
    32: "#d9dee4",
    16: "#b9c7d6",
    8: "#7fa8cf",
    7: "#739ec8",
    6: "#6894c1",
    5: "#5a84b4",
    4: "#3f6fa6",
}
_DARKEST = {3: "#2c5384", 2: "#183a63", 1: "#0b2342"}

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2733; --soft: #5b6b7b; --line: #dfe5eb; --paper: #fff; --accent: #3f6fa6; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --soft: #9fb0c0; --line: #2c3945; --paper: #11181f; --accent: #7fa8cf; } }
body { font: 15px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 68rem;
  margin: 2.5rem auto; padding: 0 1.25rem; }
h1 { font-size: 1.6rem; margin: 0 0 .5rem; } h2 { font-size: 1.1rem; margin: 2.25rem 0 .6rem; }
p, li { color: var(--soft); max-width: 46rem; } .scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .5rem .75rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th { color: var(--soft); font-weight: 600; } th:first-child, td:first-child { text-align: left; }
td.text, th.text { text-align: left; }
svg { display: block; } svg text { fill: var(--ink); font: 12px system-ui, sans-serif; }
svg .soft { fill: var(--soft); }
.legend span { display: inline-block; margin-right: 1.1rem; color: var(--soft); }
.legend i { display: inline-block; width: .8rem; height: .8rem; margin-right: .35rem; border-radius: 2px;
  vertical-align: -1px; }
"""


def to_html(report: Report) -> str:
    """The whole page."""
    parts = [*(f"<p>{escape(note)}</p>" for note in report.notes), _table(report)]
    if any(row.drop for row in report.rows):
        parts += ["<h2>Score lost, with its 95 % interval</h2>", _drops(report)]
    if len(sized := [row for row in report.rows if row.bytes]) > 1:
        parts += ["<h2>Stored bytes</h2>", _bars(sized)]
    if report.bits:
        parts += ["<h2>Bits per layer</h2>", _legend(report), _bit_map(report)]
    return page(report.title, parts)


def page(title: str, parts: list[str], style: str = "") -> str:
    """A self-contained page of these parts, which are HTML already; ``style`` is added to the common one."""
    head = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title><style>{_STYLE}{style}</style></head><body>",
        f"<h1>{escape(title)}</h1>",
    ]
    return "\n".join([*head, *parts, "</body></html>\n"])


def table(head: list[str], rows: list[list[str]], text: set[int]) -> str:
    """A table that scrolls where it is too wide; columns in ``text`` hold words, the others numbers."""
    kind = ["text" if i in text else "" for i in range(len(head))]
    tops = "".join(f'<th class="{kind[i]}">{escape(name)}</th>' for i, name in enumerate(head))
    body = [
        "<tr>" + "".join(f'<td class="{kind[i]}">{escape(cell)}</td>' for i, cell in enumerate(row)) + "</tr>"
        for row in rows
    ]
    return f'<div class="scroll"><table><thead><tr>{tops}</tr></thead><tbody>{"".join(body)}</tbody></table></div>'


def _table(report: Report) -> str:
    kept = filled(report)
    rows = [[cells(row, percent=report.percent)[i] for i in kept] for row in report.rows]
    return table([COLUMNS[i] for i in kept], rows, {place for place, i in enumerate(kept) if i >= 5})


def _svg(width: float, height: float, parts: list[str]) -> str:
    return f'<div class="scroll"><svg width="{width}" height="{height}" role="img">{"".join(parts)}</svg></div>'


def _drops(report: Report) -> str:
    """A dot with its interval per row, on one axis that contains zero."""
    rows = [row for row in report.rows if row.drop]
    factor, unit = (100, " points") if report.percent else (1, "")
    low = min(0.0, *(row.drop.low for row in rows if row.drop)) * factor
    high = max(0.0, *(row.drop.high for row in rows if row.drop)) * factor
    left, width, step = 170, 560, 30
    span = (high - low) or 1.0

    def x(value: float) -> float:
        return left + (value * factor - low) / span * width

    height = step * len(rows) + 34
    parts = [
        f'<line x1="{x(0):.1f}" x2="{x(0):.1f}" y1="4" y2="{height - 28}" stroke="var(--soft)" stroke-dasharray="3 3"/>'
    ]
    for index, row in enumerate(rows):
        assert row.drop
        y = step * index + 20
        parts.append(
            f'<text x="0" y="{y + 4}">{escape(row.name)}</text>'
            f'<line x1="{x(row.drop.low):.1f}" x2="{x(row.drop.high):.1f}" y1="{y}" y2="{y}" stroke="var(--accent)" '
            f'stroke-width="2.5"/><circle cx="{x(row.drop.drop):.1f}" cy="{y}" r="5" fill="var(--accent)"/>'
        )
    for value in sorted({low, 0.0, high}):
        parts.append(
            f'<text class="soft" text-anchor="middle" x="{x(value / factor):.1f}" y="{height - 8}">'
            f"{value:+.2f}{unit}</text>"
        )
    return _svg(left + width + 90, height, parts)


def _bars(rows: list[Row]) -> str:
    largest = max(row.bytes or 0 for row in rows)
    left, width, step = 170, 460, 28
    parts = []
    for index, row in enumerate(rows):
        size, y = row.bytes or 0, step * index + 4
        length = max(1.0, size / largest * width)
        parts.append(
            f'<text x="0" y="{y + 15}">{escape(row.name)}</text>'
            f'<rect x="{left}" y="{y}" width="{length:.1f}" height="20" rx="2" fill="var(--accent)"/>'
            f'<text class="soft" x="{left + length + 8:.1f}" y="{y + 15}">'
            f"{size:,} ({largest / max(size, 1):.1f}x smaller)</text>"
        )
    return _svg(left + width + 220, step * len(rows) + 8, parts)


def colour(bits: int) -> str:
    """Fill colour for a width in bits; darker means fewer."""
    return {**_COLOURS, **_DARKEST}.get(bits, _COLOURS[32])


def _legend(report: Report) -> str:
    widths = {
        bits for layers in report.bits.values() for layer in layers for bits in (layer.weight, layer.input) if bits
    }
    items = "".join(
        f'<span><i style="background:{colour(bits)}"></i>{"float" if bits == 32 else f"{bits} bits"}</span>'
        for bits in sorted(widths, reverse=True)
    )
    return (
        f'<p class="legend">{items}Left half of a cell: weight, right half: input. A residual add has only inputs.</p>'
    )


def _bit_map(report: Report) -> str:
    """One row per version, one cell per layer: left half the weight's bits, right half the input's."""
    paths = list(dict.fromkeys(layer.path for layers in report.bits.values() for layer in layers))
    left, cell, step = 170, max(26, min(54, 760 // len(paths))), 34
    parts = []
    for row, (name, layers) in enumerate(report.bits.items()):
        y = row * step + 4
        parts.append(f'<text x="0" y="{y + 17}">{escape(name)}</text>')
        for layer in layers:
            parts.append(_cell(layer, left + paths.index(layer.path) * cell, y, cell - 3))
    bottom = len(report.bits) * step + 14
    for index, path in enumerate(paths):
        x = left + index * cell + cell / 2
        parts.append(f'<text class="soft" transform="translate({x:.1f},{bottom}) rotate(40)">{escape(path)}</text>')
    height = bottom + 20 + 5 * max(len(path) for path in paths)
    return _svg(left + len(paths) * cell + 110, height, parts)


def _cell(layer: LayerBits, x: float, y: float, width: float) -> str:
    title = f"<title>{escape(layer.path)}: weight {layer.weight or '-'}, input {layer.input} bits</title>"
    half = width / 2
    if not layer.weight:
        return f'<g>{title}<rect x="{x}" y="{y}" width="{width}" height="26" rx="2" fill="{colour(layer.input)}"/></g>'
    return (
        f'<g>{title}<rect x="{x}" y="{y}" width="{half}" height="26" fill="{colour(layer.weight)}"/>'
        f'<rect x="{x + half}" y="{y}" width="{half}" height="26" fill="{colour(layer.input)}"/></g>'
    )

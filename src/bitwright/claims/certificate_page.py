"""The page of a certificate: the answer first, then what it rests on."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from bitwright.bench.html import page, table

if TYPE_CHECKING:
    from bitwright.claims.certificate import Certificate

_STYLE = """
.verdict { font-size: 1.15rem; color: var(--ink); border-left: .3rem solid var(--accent); padding: .3rem .9rem; }
.verdict.bad { border-color: #c0453b; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(14rem, 1fr)); gap: .9rem; margin: 1.4rem 0; }
.cards div { border: 1px solid var(--line); border-radius: .5rem; padding: .8rem 1rem; }
.cards b { display: block; font-size: 1.25rem; font-variant-numeric: tabular-nums; } .cards span { color: var(--soft); }
td.text:last-child { white-space: normal; min-width: 12rem; }
dl { display: grid; grid-template-columns: minmax(7rem, max-content) 1fr; gap: .3rem 1rem; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
figure { margin: 1rem 0; max-width: 30rem; } figure svg { width: 100%; height: auto; }
"""


def to_html(found: Certificate) -> str:
    """The whole page."""
    parts = [
        _verdict(found),
        f'<div class="cards">{"".join(_cards(found))}</div>',
        "<h2>Drop of the score, with its 95 % interval</h2>",
        _interval(found),
        *(f"<p>{escape(text)}</p>" for text in _how_sure(found)),
        "<h2>Items</h2>",
        _splits(found),
        "<h2>What each tensor became, and why</h2>",
        _sites(found),
        "<h2>What stayed float</h2>",
        _kept(found),
        "<h2>Where, and with what</h2>",
        _origin(found),
    ]
    return page(f"Certificate of {found.model} for target {found.target}", parts, _STYLE)


class _Unit:
    """Scores of 0 and 1 are shown in percent, their differences in points."""

    def __init__(self, found: Certificate) -> None:
        self.percent = found.score.p is not None

    def score(self, value: float) -> str:
        return f"{100 * value:.2f} %" if self.percent else f"{value:.4g}"

    def drop(self, value: float) -> str:
        return f"{100 * value:+.2f} points" if self.percent else f"{value:+.4g}"

    def limit(self, value: float) -> str:
        return f"{100 * value:g} points" if self.percent else f"{value:g}"


def _verdict(found: Certificate) -> str:
    unit, claim = _Unit(found), found.claim
    if claim.max_drop is None:
        text = f"No limit was claimed. The score drops by at most {unit.drop(found.score.upper)}, with 95 % confidence."
        return f'<p class="verdict">{escape(text)}</p>'
    limit = unit.limit(claim.max_drop)
    if claim.holds:
        text = f"The score drops by less than {limit}, with {claim.confidence:.0%} confidence."
    else:
        text = f"That the score drops by less than {limit} does not hold: it drops by {unit.drop(found.score.drop)}."
    return f'<p class="verdict{"" if claim.holds else " bad"}">{escape(text)}</p>'


def _cards(found: Certificate) -> list[str]:
    unit, score, size, speed = _Unit(found), found.score, found.size, found.latency
    equal = found.equality
    parity = "not checked" if equal is None else "equal, bit for bit" if equal.equal else "differs"
    first = "" if equal is None or equal.equal else f", first in {equal.layer or 'the output'}"
    cards = [
        (f"{unit.score(score.before)} → {unit.score(score.after)}", f"score, float → shipped, {score.items:,} items"),
        (f"{size.original / max(size.shipped, 1):.1f}x smaller", f"{size.original:,} → {size.shipped:,} bytes"),
        (
            "not measured" if speed is None else f"{speed.ratio:.2f}x as fast",
            "latency"
            if speed is None
            else f"{speed.low:.2f} to {speed.high:.2f} in 80 % of {speed.rounds} alternating rounds, "
            f"{speed.items} items, threads: {found.environment.threads}",
        ),
        (parity, "trained against shipped" + ("" if equal is None else f", {equal.items:,} items{first}")),
    ]
    if (onnx := found.exported) is not None:
        note = f"same answers in ONNX Runtime, {onnx.items:,} items, largest difference {onnx.max_abs:.3g}"
        cards.append((f"{100 * onnx.same_answers:.2f} %", note))
    return [f"<div><b>{escape(head)}</b><span>{escape(text)}</span></div>" for head, text in cards]


def _interval(found: Certificate) -> str:
    """The drop and its interval on one axis, with zero and the limit."""
    unit, score, limit = _Unit(found), found.score, found.claim.max_drop
    marks = [(0.0, "no drop"), *([] if limit is None else [(limit, "limit")])]
    values = [score.low, score.high, *(value for value, _ in marks)]
    low, span = min(values), (max(values) - min(values)) or 1.0

    def x(value: float) -> float:
        return 30 + (value - low) / span * 360

    parts = []
    for value, name in marks:
        parts.append(
            f'<line x1="{x(value):.1f}" x2="{x(value):.1f}" y1="20" y2="64" stroke="var(--soft)" '
            f'stroke-dasharray="3 3"/><text class="soft" text-anchor="middle" x="{x(value):.1f}" y="14">{name}</text>'
        )
    parts.append(
        f'<line x1="{x(score.low):.1f}" x2="{x(score.high):.1f}" y1="44" y2="44" stroke="var(--accent)" '
        f'stroke-width="3"/><circle cx="{x(score.drop):.1f}" cy="44" r="6" fill="var(--accent)"/>'
    )
    told = f"{unit.drop(score.drop)}, 95 % interval {unit.drop(score.low)} to {unit.drop(score.high)}"
    parts.append(f'<text text-anchor="middle" x="210" y="88">{escape(told)}</text>')
    return f'<figure><svg viewBox="0 0 420 96" role="img" aria-label="drop">{"".join(parts)}</svg></figure>'


_METHODS = {
    "exact": "the smallest exact limit, since few items differ",
    "normal": "the normal approximation of paired scores",
    "bootstrap": "a bootstrap over items",
    "betting": "a betting bound, which holds for any scores in their range",
}


def _how_sure(found: Certificate) -> list[str]:
    unit, score = _Unit(found), found.score
    method = _METHODS.get(score.method, score.method)
    texts = [
        f"At most {unit.drop(score.upper)} with 95 % confidence (one-sided), by {method}: of {score.items:,} items the "
        f"shipped model loses {score.lost:,} and gains {score.gained:,}."
    ]
    if score.p is not None:
        shown = "shows a change" if score.p < 0.05 else "shows no change, which is no proof that there is none"
        texts.append(f"McNemar's exact test {shown} (p = {score.p:.3g}).")
    return texts


def _splits(found: Certificate) -> str:
    rows = [
        [name, f"{split.items:,}", f"{split.repeated:,}", split.digest[:16]] for name, split in found.splits.items()
    ]
    note = (
        "No test item is in one of the other splits."
        if len(rows) > 1
        else "No other data was named: that the test items are new was not checked."
    )
    return table(["split", "items", "repeated", "digest"], rows, {0, 3}) + f"<p>{escape(note)}</p>"


def _sites(found: Certificate) -> str:
    measured = found.harm is not None
    rows = []
    for site in found.sites:
        harm = "" if site.harm is None else f"{site.harm:.2e} ± {site.error:.0e}"
        numbers = [harm, "" if site.rank is None else str(site.rank)] if measured else []
        rows.append([site.site, site.spec, *numbers, site.why])
    head = ["tensor", "spec", *(["harm alone", "rank"] if measured else []), "why"]
    text = {0, 1, len(head) - 1}
    note = ""
    if found.harm is not None:
        told = f"Harm: {found.harm.method}, in {found.harm.unit}, of this spec at this tensor alone; rank 1 harms most."
        note = f"<p>{escape(told)}</p>"
    return note + table(head, rows, text)


def _kept(found: Certificate) -> str:
    total = f"{found.size.kept_float:,} of {found.size.shipped:,} bytes."
    rows = [[kept.path, f"{kept.bytes:,}", kept.why] for kept in found.kept_float]
    return f"<p>{total}</p>" + (table(["tensor", "bytes", "why"], rows, {0, 2}) if rows else "")


def _origin(found: Certificate) -> str:
    where, digests = found.environment, found.digests
    lines = {
        "issued": found.issued,
        "versions": f"bitwright {where.bitwright}, torch {where.torch}, Python {where.python}",
        "processor": f"{where.processor}, {where.threads} threads, {', '.join(where.features) or 'no native kernels'}",
        "seed": str(where.seed),
        "bytes of the file": f"{found.size.file:,}",
        "shipped weights": digests.shipped,
        "float weights": digests.original,
        "plan": digests.plan,
        "ONNX file": "" if found.exported is None else f"{found.exported.file}, {found.exported.sha256}",
        "this certificate": found.digest,
    }
    items = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in lines.items() if text)
    check = (
        "bitwright verify certificate.json checks the digest, and measures again what it is given model and data for."
    )
    return f"<dl>{items}</dl><p>{escape(check)}</p>"

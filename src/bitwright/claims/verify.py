"""`verify`: measure again what a certificate says, and tell line by line what holds.

Three answers are possible: a line holds, it no longer holds, or it was not checked, because the model or data for it
was not given, or because it holds on another machine only.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import nn

from bitwright.bench.measure import model_bytes
from bitwright.claims.certificate import Certificate
from bitwright.claims.certify import (
    claimed,
    digest_of_plan,
    environment,
    equality,
    exported,
    kept_in_float,
    latency,
    site_records,
)
from bitwright.claims.paired import Paired
from bitwright.claims.scores import Score, compared
from bitwright.claims.splits import TEST, Inputs, digest_of_weights, first_entry, splits_of
from bitwright.errors import CertificateError
from bitwright.flow.checkpoint import file_bytes
from bitwright.flow.prepare import plan_of

State = Literal["holds", "no longer holds", "not checked"]

_NEAR = 1e-9  # sums of the same scores in another order


@dataclass(frozen=True, slots=True)
class Line:
    """One statement of a certificate, whether it holds, and what was found."""

    what: str
    state: State
    detail: str

    def __str__(self) -> str:
        return f"{self.what}: {self.state}" + (f" ({self.detail})" if self.detail else "")


@dataclass(frozen=True, slots=True)
class Verification:
    """All lines; ``holds`` says that none of them no longer holds."""

    lines: tuple[Line, ...]

    @property
    def holds(self) -> bool:
        """Whether everything that was checked holds."""
        return all(line.state != "no longer holds" for line in self.lines)

    def __str__(self) -> str:
        return "\n".join(map(str, self.lines))


def verify(
    certificate: Certificate | str | Path,
    model: nn.Module | None = None,
    shipped: nn.Module | None = None,
    test: Iterable[Any] | None = None,
    score: Score | None = None,
    *,
    seen: Mapping[str, Iterable[Any]] | None = None,
    inputs: Inputs = first_entry,
    score_range: tuple[float, float] | None = None,
    simulated: nn.Module | None = None,
    onnx: str | Path | None = None,
    rounds: int = 0,
) -> Verification:
    """Check a certificate against the models and data that are given; arguments as in `certify`.

    Raises `CertificateError` for a file that was edited after it was issued, or is no certificate.
    """
    if not isinstance(certificate, Certificate):
        certificate = Certificate.load(certificate)
    batches = None if test is None else list(test)
    first = inputs(batches[0]) if batches else None
    lines = [
        Line("content", "holds", f"nothing was edited, digest {certificate.digest[:16]}"),
        *_model_lines(certificate, model, shipped),
        *_split_lines(certificate, batches, seen or {}, inputs),
        *_score_lines(certificate, model, shipped, batches, score, score_range),
        *_equality_lines(certificate, simulated, shipped, batches, inputs),
        *_export_lines(certificate, shipped, onnx, first),
        *_latency_lines(certificate, model, shipped, first, rounds),
        *_environment_lines(certificate),
    ]
    return Verification(tuple(lines))


def _same(what: str, said: object, found: object, detail: str = "") -> Line:
    if said == found:
        return Line(what, "holds", detail or str(found)[:60])
    return Line(what, "no longer holds", detail or f"it was {str(said)[:60]}, it is {str(found)[:60]}")


def _model_lines(said: Certificate, model: nn.Module | None, shipped: nn.Module | None) -> Iterator[Line]:
    if model is None:
        yield Line("float weights", "not checked", "pass the float model")
    else:
        yield _same("float weights", said.digests.original, digest_of_weights(model))
        yield _same("bytes of the float model", said.size.original, model_bytes(model))
    if shipped is None:
        yield Line("shipped weights, plan, bytes, what stayed float", "not checked", "pass the shipped model")
        return
    plan = plan_of(shipped)
    changed = _changed_sites(said, {record.site: record.spec for record in site_records(plan)})
    yield _same("shipped weights", said.digests.shipped, digest_of_weights(shipped))
    yield _same("plan", said.digests.plan, digest_of_plan(plan), changed)
    yield _same("bytes of the shipped model", said.size.shipped, model_bytes(shipped))
    yield _same("bytes of its file", said.size.file, file_bytes(shipped))
    kept = kept_in_float(shipped)
    yield _same(
        "what stayed float", said.kept_float, kept, f"{len(kept)} tensors, {sum(k.bytes for k in kept):,} bytes"
    )


def _changed_sites(said: Certificate, specs: Mapping[str, str]) -> str:
    """The first site whose spec is another one."""
    before = {record.site: record.spec for record in said.sites}
    for site in dict.fromkeys((*before, *specs)):
        was, now = before.get(site, "no site"), specs.get(site, "no site")
        if was != now:
            return f"{site} was {was}, it is {now}"
    return f"{len(specs)} sites"


def _split_lines(said: Certificate, test: list[Any] | None, seen: Mapping[str, Any], inputs: Inputs) -> Iterator[Line]:
    names = [name for name in said.splits if name != TEST]
    if test is None:
        yield Line("test items, and that they are new", "not checked", "pass the test")
        return
    try:
        found = splits_of(test, seen, inputs)
    except CertificateError as cause:
        yield Line("test items, and that they are new", "no longer holds", str(cause))
        return
    for name in (TEST, *names):
        if name not in found:
            yield Line(f"items of {name!r}", "not checked", "pass them in seen")
            continue
        was, now = said.splits[name], found[name]
        detail = (
            f"{now.items:,} items" if was == now else f"it was {was.items:,} items {was.digest[:16]}, now they are "
        )
        detail += "" if was == now else f"{now.items:,} items {now.digest[:16]}"
        yield _same(f"items of {name!r}", was, now, detail)


def _score_lines(
    said: Certificate,
    model: nn.Module | None,
    shipped: nn.Module | None,
    test: list[Any] | None,
    score: Score | None,
    score_range: tuple[float, float] | None,
) -> Iterator[Line]:
    if model is None or shipped is None or not test or score is None:
        yield Line("drop and claim", "not checked", "pass both models, the test and the score")
        return
    found, was = compared(model, shipped, test, score, score_range), said.score
    yield _near("score of the float model", was.before, found.before)
    yield _near("score of the shipped model", was.after, found.after)
    ends = all(abs(a - b) <= _NEAR for a, b in zip(_interval(was), _interval(found), strict=True))
    detail = _told(found) if ends else f"it was {_told(was)}, it is {_told(found)}"
    yield Line("drop", "holds" if ends else "no longer holds", detail)
    if said.claim.max_drop is not None:
        yield _claim(said, found)


def _claim(said: Certificate, found: Paired) -> Line:
    limit = said.claim.max_drop
    assert limit is not None
    what = f"the drop is below {limit:g} with {said.claim.confidence:.0%} confidence"
    try:
        holds = claimed(found, limit).holds
    except CertificateError as cause:
        return Line(what, "no longer holds", str(cause))
    if not said.claim.holds:
        return Line(f"not shown: {what}", "no longer holds" if holds else "holds", f"at most {found.upper:+.4f}")
    return Line(what, "holds" if holds else "no longer holds", f"at most {found.upper:+.4f}")


def _near(what: str, said: float, found: float) -> Line:
    near = abs(said - found) <= _NEAR
    return Line(what, "holds", f"{found:.6g}") if near else _same(what, said, found)


def _interval(score: Paired) -> tuple[float, ...]:
    return score.drop, score.low, score.high, score.upper


def _told(score: Paired) -> str:
    return f"{score.drop:+.4f} [{score.low:+.4f}, {score.high:+.4f}] on {score.items:,} items"


def _equality_lines(
    said: Certificate, simulated: nn.Module | None, shipped: nn.Module | None, test: list[Any] | None, inputs: Inputs
) -> Iterator[Line]:
    if said.equality is None:
        return
    what = "trained = shipped, bit for bit" if said.equality.equal else "trained and shipped differ"
    if simulated is None or shipped is None or not test:
        yield Line(what, "not checked", "pass the simulated and the shipped model, and the test")
        return
    found = equality(simulated, shipped, [inputs(batch) for batch in test])
    detail = (
        f"equal on {found.items:,} items" if found.equal else f"the first that differs is {found.layer or 'output'}"
    )
    yield _same(what, said.equality, found, detail)


def _export_lines(said: Certificate, shipped: nn.Module | None, onnx: str | Path | None, batch: Any) -> Iterator[Line]:
    if said.exported is None:
        return
    if onnx is None:
        yield Line("ONNX file", "not checked", "pass the file")
        return
    try:
        content = Path(onnx).read_bytes()
    except OSError as cause:
        raise CertificateError(f"cannot read {onnx}: {cause}") from cause
    yield _same("ONNX file", said.exported.sha256, hashlib.sha256(content).hexdigest())
    if shipped is None or batch is None:
        yield Line("same answers in ONNX Runtime", "not checked", "pass the shipped model and the test")
        return
    found = exported(shipped, onnx, batch)
    yield _near("same answers in ONNX Runtime", said.exported.same_answers, found.same_answers)


def _latency_lines(
    said: Certificate, model: nn.Module | None, shipped: nn.Module | None, batch: Any, rounds: int
) -> Iterator[Line]:
    if said.latency is None:
        return
    now, was = environment(), said.environment
    here, there = (now.processor, now.threads), (was.processor, was.threads)
    if here != there:
        yield Line(
            "latency", "not checked", f"it holds on {there[0]}, {there[1]} threads; this is {here[0]}, {here[1]}"
        )
    elif not rounds or model is None or shipped is None or batch is None:
        yield Line("latency", "not checked", "pass both models, the test, and rounds")
    else:
        found = latency(model, shipped, batch, rounds)
        overlap = found.low <= said.latency.high and said.latency.low <= found.high
        detail = f"it was {_range(said.latency)}, it is {_range(found)}"
        yield Line("latency", "holds" if overlap else "no longer holds", detail)


def _range(measured: Any) -> str:
    return f"{measured.ratio:.2f}x ({measured.low:.2f}-{measured.high:.2f})"


def _environment_lines(said: Certificate) -> Iterator[Line]:
    """Versions are no claim; where they differ, small differences of scores are explained by them."""
    was, now = said.environment, environment()
    names = ("bitwright", "torch", "processor", "features")
    others = [f"{name} was {getattr(was, name)}, is {getattr(now, name)}" for name in names]
    others = [text for name, text in zip(names, others, strict=True) if getattr(was, name) != getattr(now, name)]
    if others:
        yield Line("same versions and machine", "not checked", "; ".join(others))
    else:
        yield Line("same versions and machine", "holds", f"bitwright {now.bitwright}, torch {now.torch}")

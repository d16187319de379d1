"""`Certificate`: what is claimed of a shipped model, and everything that the claim rests on, as one value.

Its file is JSON with sorted keys and a ``digest`` over the canonical text of all the rest. Whoever edits a number
must edit the digest too; against that no digest helps, but `verify`, which measures again.
"""

from __future__ import annotations

import hashlib
import json
import math
import types
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from bitwright.bench.report import write_text
from bitwright.claims import certificate_page
from bitwright.claims.paired import Paired
from bitwright.claims.splits import Split
from bitwright.errors import CertificateError

SCHEMA = 1


@dataclass(frozen=True, slots=True)
class Claim:
    """That the drop of all items that could come is at most ``max_drop``, with this confidence; None claims nothing."""

    max_drop: float | None
    confidence: float
    holds: bool | None


@dataclass(frozen=True, slots=True)
class Equality:
    """Whether the simulated and the shipped model return the same bits on ``items``; the first layer that differs."""

    equal: bool
    items: int
    layer: str


@dataclass(frozen=True, slots=True)
class Exported:
    """An ONNX file, and how far ONNX Runtime is from the shipped model on ``items`` (``sqnr`` None: no difference)."""

    file: str
    sha256: str
    bytes: int
    items: int
    same_answers: float
    max_abs: float
    sqnr: float | None


@dataclass(frozen=True, slots=True)
class Size:
    """Bytes: tensors of the float model, tensors of the shipped model, the latter's file, and what stayed float."""

    original: int
    shipped: int
    file: int
    kept_float: int


@dataclass(frozen=True, slots=True)
class Latency:
    """Milliseconds per call, and how many times faster the shipped model is: median, 10 and 90 % of the rounds."""

    original_ms: float
    shipped_ms: float
    ratio: float
    low: float
    high: float
    rounds: int
    items: int


@dataclass(frozen=True, slots=True)
class Kept:
    """A stored tensor that stayed float: what it costs in bytes, and why."""

    path: str
    bytes: int
    why: str


@dataclass(frozen=True, slots=True)
class SiteRecord:
    """The spec of a site and its reason; harm with standard error, and its rank among the sites (1: largest harm)."""

    site: str
    spec: str
    why: str
    harm: float | None
    error: float | None
    rank: int | None


@dataclass(frozen=True, slots=True)
class Measured:
    """What the harm of sites was measured with: method, unit, and digests of data and plan."""

    method: str
    unit: str
    data: str
    plan: str


@dataclass(frozen=True, slots=True)
class Environment:
    """Versions, processor, kernels' instruction sets, threads, torch's seed."""

    bitwright: str
    torch: str
    python: str
    processor: str
    features: tuple[str, ...]
    threads: int
    seed: int


@dataclass(frozen=True, slots=True)
class Digests:
    """SHA-256 of the float weights, the shipped weights and the plan's text."""

    original: str
    shipped: str
    plan: str


@dataclass(frozen=True, slots=True)
class Certificate:
    """What is claimed of a shipped model, and what the claim rests on. None means: not checked, not measured.

    Make one with `certify`, keep it with ``save(path)``, look at it with ``to_html()``, check it with `verify`.
    """

    model: str
    target: str
    issued: str
    claim: Claim
    score: Paired
    splits: Mapping[str, Split]
    size: Size
    digests: Digests
    environment: Environment
    sites: tuple[SiteRecord, ...]
    kept_float: tuple[Kept, ...]
    equality: Equality | None = None
    exported: Exported | None = None
    latency: Latency | None = None
    harm: Measured | None = None
    schema: int = SCHEMA

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical JSON text of everything in it."""
        return _digest(asdict(self))

    def to_json(self) -> str:
        """The text of the file: sorted keys, and the digest."""
        return json.dumps(asdict(self) | {"digest": self.digest}, indent=1, sort_keys=True, allow_nan=False) + "\n"

    def to_html(self) -> str:
        """One page that a person wants to read, with nothing fetched from elsewhere."""
        return certificate_page.to_html(self)

    def save(self, path: str | Path) -> None:
        """Write the JSON file, under a temporary name first; raises `CertificateError` when it cannot be written."""
        try:
            write_text(Path(path), self.to_json())
        except OSError as cause:
            raise CertificateError(f"cannot write {path}: {cause}") from cause

    @classmethod
    def load(cls, path: str | Path) -> Certificate:
        """Read a file; raises `CertificateError` for one that was edited, is damaged, or is no certificate."""
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError, CertificateError) as cause:
            raise CertificateError(f"{path}: {cause}") from cause

    @classmethod
    def from_json(cls, text: str) -> Certificate:
        """The certificate of a text that `to_json` wrote; raises `CertificateError` when any value was changed."""
        try:
            data = json.loads(text, object_pairs_hook=_no_key_twice, parse_constant=_no_constant)
        except (ValueError, RecursionError) as cause:
            raise CertificateError(f"it is no JSON text that bitwright wrote: {cause}") from cause
        if not isinstance(data, dict) or not isinstance(data.get("digest"), str):
            raise CertificateError("it is no certificate: it has no digest; make one with bitwright certify")
        said = data.pop("digest")
        if said != (found := _digest(data)):
            raise CertificateError(
                f"it was edited after it was issued: its content has the digest {found[:16]}..., it says "
                f"{said[:16]}...; nothing in it can be relied on, issue it anew"
            )
        if data.get("schema") != SCHEMA:
            raise CertificateError(
                f"it has schema {data.get('schema')!r}, this version reads {SCHEMA}; use the version of bitwright that "
                "issued it"
            )
        return _read(cls, data, "certificate")


def _digest(content: dict[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key appears twice")
    return found


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no number")


def _read(kind: Any, value: Any, place: str) -> Any:
    """The value of a declared type from its JSON form; raises `CertificateError` that names the place."""
    if get_origin(kind) is types.UnionType:
        [kind] = [option for option in get_args(kind) if option is not types.NoneType]
        return None if value is None else _read(kind, value, place)
    if is_dataclass(kind) and isinstance(kind, type) and isinstance(value, dict):
        hints, names = get_type_hints(kind), {field.name for field in fields(kind)}
        if set(value) == names:
            return kind(**{name: _read(hints[name], value[name], f"{place}.{name}") for name in names})
    elif get_origin(kind) is tuple and isinstance(value, list):
        return tuple(_read(get_args(kind)[0], entry, f"{place}[{i}]") for i, entry in enumerate(value))
    elif get_origin(kind) is Mapping and isinstance(value, dict):
        return {name: _read(get_args(kind)[1], entry, f"{place}.{name}") for name, entry in value.items()}
    elif kind is float and type(value) in (int, float) and math.isfinite(value):
        return value
    elif kind in (int, str, bool) and type(value) is kind:
        return value
    raise CertificateError(f"{place} is {str(value)[:60]!r}, which is not what this version writes there")

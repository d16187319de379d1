"""`Target`: what a deployment place can run, as data.

A target is a TOML file in ``targets/``; a new place is a new file. It validates plans and decides whether residual
adds are quantized there.
"""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib import resources
from importlib.resources.abc import Traversable

from bitwright.errors import PlanError
from bitwright.numerics.spec import QuantSpec


def spelled(spec: QuantSpec | None) -> str:
    """Text of a site's decision: the spec, or ``float``."""
    return "float" if spec is None else str(spec)


@dataclass(frozen=True, slots=True)
class Support:
    """One operator with the weight and input specs (glob patterns over their text) that run there."""

    op: str
    weight: tuple[str, ...]
    input: tuple[str, ...]

    def covers(self, op: str, weight: QuantSpec | None, input: QuantSpec | None) -> bool:
        """Whether this row runs the given pair."""
        texts = ((self.weight, spelled(weight)), (self.input, spelled(input)))
        return op == self.op and all(any(fnmatchcase(text, p) for p in patterns) for patterns, text in texts)


@dataclass(frozen=True, slots=True)
class Target:
    """A deployment place: its supported pairs, and whether it wants residual adds quantized.

    ``refuses`` names kinds of modules (see `plan.site.OPERATORS`) that it has no form for, whatever their products.
    """

    name: str
    description: str
    supports: tuple[Support, ...]
    quantizes_adds: bool
    refuses: tuple[str, ...] = ()

    def covers(self, op: str, weight: QuantSpec | None, input: QuantSpec | None) -> bool:
        """Whether some row runs this operator with these specs.

        >>> get_target("cpu").covers("linear", QuantSpec.parse("int4/channel"), QuantSpec.parse("uint8/asym"))
        True
        """
        return any(row.covers(op, weight, input) for row in self.supports)

    def has(self, op: str) -> bool:
        """Whether some row runs this operator at all."""
        return any(row.op == op for row in self.supports)

    def choices(self, op: str) -> str:
        """The supported pairs of one operator, for messages."""
        return "; ".join(
            f"weight {' '.join(row.weight)} with input {' '.join(row.input)}" for row in self.supports if row.op == op
        )


def target_names() -> list[str]:
    """Names of all known targets, sorted.

    >>> target_names()
    ['cpu', 'onnxruntime']
    """
    return sorted(entry.name.removesuffix(".toml") for entry in _folder().iterdir() if entry.name.endswith(".toml"))


def get_target(name: str) -> Target:
    """The target called ``name``; raises `PlanError` that lists the known ones."""
    if name not in target_names():
        raise PlanError(f"unknown target {name!r}; known targets: {', '.join(target_names())}")
    data = tomllib.loads((_folder() / f"{name}.toml").read_text())
    rows = tuple(Support(row["op"], tuple(row["weight"]), tuple(row["input"])) for row in data["supports"])
    return Target(data["name"], data["description"], rows, data["quantizes_adds"], tuple(data.get("refuses", ())))


def _folder() -> Traversable:
    return resources.files("bitwright.plan") / "targets"

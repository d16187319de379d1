"""`Plan`: the whole decision and nothing but decisions, as a flat TOML file.

One line per site in ``[sites]``; a line may also be a glob pattern, which overrides the sites above it (later wins).
``[folds]`` and ``[shared]`` hold the structure that recording the model found (which batch norm folds into which
convolution, which sites share one quantizer), ``[why]`` the reason for each decision. A plan and a state dict are all
that passes between stages, so any stage can be stopped, read with an editor and resumed.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from torch import nn

from bitwright.errors import BitwrightError, PlanError
from bitwright.numerics.spec import QuantSpec
from bitwright.plan.presets import propose
from bitwright.plan.site import Site, check_preparable, matching
from bitwright.plan.step import Step, Value, as_step
from bitwright.plan.target import get_target, spelled
from bitwright.plan.validate import validate

VERSION = 1
DEFAULT_OBSERVERS = {"weight": "mse", "input": "mse"}
DEFAULT_RANGES = {"weight": "lsq", "input": "lsq"}

Rules = Mapping[str, "str | QuantSpec | None"]


@dataclass
class Plan:
    """What every site becomes (None = stays float, said aloud), for which target, with which observers and steps."""

    target: str
    sites: dict[Site, QuantSpec | None]
    observers: dict[str, str] = field(default_factory=lambda: dict(DEFAULT_OBSERVERS))
    ranges: dict[str, str] = field(default_factory=lambda: dict(DEFAULT_RANGES))
    folds: dict[str, str] = field(default_factory=dict)
    shared: dict[Site, Site] = field(default_factory=dict)
    why: dict[Site, str] = field(default_factory=dict)
    steps: tuple[Step, ...] = ()

    @classmethod
    def preset(
        cls,
        name: str,
        model: nn.Module,
        example: Any,
        *,
        target: str = "cpu",
        sites: Rules | None = None,
        observers: Mapping[str, str] | None = None,
        ranges: Mapping[str, str] | None = None,
        steps: Iterable[Step | str | Mapping[str, Value]] = (),
    ) -> Plan:
        """The plan that preset ``name`` gives for ``model``, found by running it once on ``example``.

        ``example`` is one batch of inputs: a tensor, a tuple of positional or a dict of keyword arguments. ``sites``
        are rules applied on top, as in `with_sites`; ``observers`` and ``ranges`` say how ranges are found by
        calibration and move in training, for all or by patterns over sites (see `observer` and `range_rule`); ``steps``
        are what calibration does beside choosing ranges (see `plan.step`).
        Raises `PlanError` or `ModelError` when the result could not run.

        >>> import torch
        >>> net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> plan = Plan.preset("w8a8", net, torch.zeros(1, 8))
        >>> print(plan.explain("2.weight"))
        2.weight: float
          why: the classifier stays in float by default
        """
        check_preparable(model)
        found = propose(name, model, example, get_target(target), sites or {})
        plan = cls(
            target,
            found.sites,
            {**DEFAULT_OBSERVERS, **(observers or {})},
            {**DEFAULT_RANGES, **(ranges or {})},
            found.folds,
            found.shared,
            found.why,
            tuple(as_step(step) for step in steps),
        ).with_sites(sites or {})
        validate(plan, model)
        return plan

    def with_sites(self, rules: Rules) -> Plan:
        """A new plan with glob rules applied in order, later ones winning; None or ``"float"`` keeps a site in float.

        Raises `PlanError` with near names for a pattern that matches nothing.
        """
        sites, why = dict(self.sites), dict(self.why)
        for pattern, value in rules.items():
            spec = read_spec(value)
            for site in matching(pattern, sites):
                sites[site], why[site] = spec, f"rule {pattern!r}"
        shared = {site: leader for site, leader in self.shared.items() if sites[site] == sites[leader]}
        folds = {conv: norm for conv, norm in self.folds.items() if sites.get(Site(conv, "weight")) is not None}
        return replace(self, sites=sites, why=why, shared=shared, folds=folds)

    def observer(self, site: Site) -> str:
        """How the range of a site is found: the last line of ``[observers]`` that selects it, as in `range_rule`.

        >>> Plan("cpu", {}, {"weight": "mse", "input": "mse", "act.*": "fixed:0,1"}).observer(Site("act", "input"))
        'fixed:0,1'
        """
        kind, observer = "weight" if site.is_weight else "input", ""
        if site.slot == "probs" and self.range_rule(site) == "fixed":
            kind, observer = "probs", "fixed:0,1"
        return _last_line(self.observers, site, kind, observer)

    def range_rule(self, site: Site) -> str:
        """How the range of a site moves in training: the last line of ``[ranges]`` that selects it.

        Lines are ``weight`` and ``input`` (all stored tensors, all activations) or patterns over sites.

        >>> Plan("cpu", {}, ranges={"input": "lsq", "*.input": "lsq+"}).range_rule(Site("fc", "input"))
        'lsq+'
        """
        kind, rule = "weight" if site.is_weight else "input", ""
        if site.slot == "probs":  # probabilities lie in [0, 1]: nothing to learn, unless a pattern says so
            kind, rule = "probs", "fixed"
        return _last_line(self.ranges, site, kind, rule)

    def explain(self, site: str | Site) -> str:
        """The decision for one site and its reason; raises `PlanError` with near names for an unknown site."""
        found = matching(str(site), self.sites)
        if len(found) > 1:
            raise PlanError(f"{str(site)!r} selects {len(found)} sites ({found[0]}, {found[1]}, ...); name one")
        [site] = found
        spec = self.sites[site]
        lines = [f"{site}: {spelled(spec)}"]
        if site in self.why:
            lines.append(f"why: {self.why[site]}")
        if spec is not None and not spec.dynamic:
            lines.append(f"range: {self.observer(site)}")
            lines.append(f"in training: {self.range_rule(site)}")
        if site in self.shared:
            lines.append(f"shares the quantizer of {self.shared[site]}")
        if site.is_weight and site.path in self.folds:
            lines.append(f"holds batch norm {self.folds[site.path]}")
        return "\n  ".join(lines)

    def save(self, path: str | Path) -> None:
        """Write the TOML file (to a temporary name first, then renamed)."""
        path = Path(path)
        temporary = path.with_name(path.name + ".part")
        temporary.write_text(self.to_toml(), encoding="utf-8")
        temporary.replace(path)

    def to_toml(self) -> str:
        """The text of the plan file."""
        tables: dict[str, dict[str, str]] = {
            "observers": self.observers,
            "ranges": self.ranges,
            "sites": {str(site): spelled(spec) for site, spec in self.sites.items()},
            "folds": self.folds,
            "shared": {str(site): str(leader) for site, leader in self.shared.items()},
            "why": {str(site): why for site, why in self.why.items()},
        }
        lines = [f"version = {VERSION}", f"target = {_quoted(self.target)}"]
        for name, table in tables.items():
            lines += [
                "",
                f"[{name}]",
                *(f"{_quoted(key)} = {_quoted(value)}" for key, value in table.items()),
            ]
        for step in self.steps:
            options = {"name": step.name, **step.options}
            lines += ["", "[[steps]]", *(f"{key} = {json.dumps(value)}" for key, value in options.items())]
        return "\n".join(lines) + "\n"

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan file; raises `PlanError` that names the file and the line's key."""
        path = Path(path)
        try:
            return cls.from_toml(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, BitwrightError) as cause:
            raise PlanError(f"cannot read plan {path}: {cause}") from cause

    @classmethod
    def from_toml(cls, text: str) -> Plan:
        """The plan that a text describes."""
        try:
            data = tomllib.loads(text)
        except (tomllib.TOMLDecodeError, RecursionError) as cause:
            raise PlanError(f"not a TOML text: {cause}") from cause
        known = {"version", "target", "observers", "ranges", "sites", "folds", "shared", "why", "steps"}
        unknown = set(data) - known
        if unknown or data.get("version") != VERSION:
            raise PlanError(
                f"expected version = {VERSION} and the tables observers, ranges, sites, folds, shared, why, steps; "
                f"found version = {data.get('version')!r} and {', '.join(sorted(unknown)) or 'no other tables'}"
            )
        plan = cls(
            get_target(data.get("target", "cpu")).name,
            {},
            {**DEFAULT_OBSERVERS, **_table(data, "observers")},
            {**DEFAULT_RANGES, **_table(data, "ranges")},
            _table(data, "folds"),
            {Site.parse(site): Site.parse(leader) for site, leader in _table(data, "shared").items()},
            {Site.parse(site): why for site, why in _table(data, "why").items()},
            _steps(data),
        )
        for key, value in _table(data, "sites").items():
            spec = read_spec(value)
            if any(mark in key for mark in "*?["):
                for site in matching(key, plan.sites):
                    plan.sites[site], plan.why[site] = spec, f"rule {key!r}"
            else:
                plan.sites[Site.parse(key)] = spec
        named = [("shared", site) for pair in plan.shared.items() for site in pair]
        named += [("folds", Site(conv, "weight")) for conv in plan.folds]
        for table, site in named:
            if site not in plan.sites:
                raise PlanError(f"[{table}] names {site}, which is not in [sites]")
        return plan.with_sites({})


def read_spec(value: str | QuantSpec | None) -> QuantSpec | None:
    """A decision from its text; None and ``"float"`` mean float."""
    if value is None or isinstance(value, QuantSpec):
        return value
    return None if value == "float" else QuantSpec.parse(value)


def _last_line(table: Mapping[str, str], site: Site, kind: str, default: str) -> str:
    lines = [text for line, text in table.items() if line == kind or str(site) == line or fnmatchcase(str(site), line)]
    return lines[-1] if lines else default


def _table(data: dict[str, Any], name: str) -> dict[str, str]:
    table = data.get(name, {})
    if not isinstance(table, dict) or not all(isinstance(value, str) for value in table.values()):
        raise PlanError(f'[{name}] must hold lines of the form "key" = "text"')
    return table


def _steps(data: dict[str, Any]) -> tuple[Step, ...]:
    steps = data.get("steps", [])
    if not isinstance(steps, list):
        raise PlanError("steps are written as [[steps]], one table each, with a name")
    return tuple(as_step(step) for step in steps)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")  # TOML refuses a raw DEL, JSON does not

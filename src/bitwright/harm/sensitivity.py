"""`sensitivity`: the harm that each spec does at each site, alone, everything else in float.

A weight is quantized by the line itself: a model is prepared and calibrated in which only that site has a spec, with
the steps of the plan, so that the harm is that of the rounding which will be used. An activation is replaced on its way
into its module. The result is one small file, which can be read, edited, and continued after a kill.

======== ========================================================================= ========= =================
method   harm                                                                      unit      needs
======== ========================================================================= ========= =================
loss     rise of the user's loss                                                   of loss   ``loss``
kl       ``KL(float || quantized)`` of the softmax of the outputs, in float64      nats
sqnr     noise power of the outputs over signal power                              ratio
fisher   ``1/2 E sum g^2 d^2``: gradients of single samples, change d of the site  of loss   one backward pass
hessian  ``1/2 tr(H) / n |d|^2``, HAWQ's Omega: Hessian H of the site, n elements  of loss   second derivatives
======== ========================================================================= ========= =================

``loss`` and ``kl`` are measured, the others are proxies: see `agreement`. ``fisher`` and ``hessian`` take the user's
loss, or without one the model's own answers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitwright.costs.choices import Specs
from bitwright.errors import SearchError
from bitwright.flow.digest import digest
from bitwright.graph.dataflow import call, evaluating
from bitwright.harm import fisher, hessian_harm, measured
from bitwright.harm.alone import Forward
from bitwright.harm.measured import Loss
from bitwright.plan.plan import Plan, read_spec
from bitwright.plan.site import Site, matching
from bitwright.plan.target import spelled

METHODS = {
    "loss": "of the loss",
    "kl": "nats",
    "sqnr": "noise power over signal power",
    "fisher": "of the loss",
    "hessian": "of the loss",
}
MEASURED = ("loss", "kl")
CURVATURE = {"fisher": fisher.harms, "hessian": hessian_harm.harms}


@dataclass(frozen=True, slots=True)
class Harm:
    """Harm of one spec at one site, the mean over batches, and its standard error."""

    site: str
    spec: str
    harm: float
    error: float


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """Harm per site and spec, and what it was measured with: ``data`` and ``plan`` are digests.

    ``rank`` is the Spearman correlation with measured harm where that was looked at (`agreement`).
    """

    method: str
    unit: str
    data: str
    plan: str
    batches: int
    rows: tuple[Harm, ...] = ()
    rank: float | None = None

    @property
    def table(self) -> dict[tuple[str, str], Harm]:
        """Rows by site and spec."""
        return {(row.site, row.spec): row for row in self.rows}

    @property
    def sites(self) -> dict[str, list[str]]:
        """The specs of each site, in the order they were asked for."""
        found: dict[str, list[str]] = {}
        for row in self.rows:
            found.setdefault(row.site, []).append(row.spec)
        return found

    def save(self, path: str | Path) -> None:
        """Write the JSON file (to a temporary name first, then renamed); raises `SearchError` where it cannot."""
        path = Path(path)
        part = path.with_name(path.name + ".part")
        head = {key: value for key, value in asdict(self).items() if key != "rows"}
        lines = ",\n".join(f"  {json.dumps(asdict(row))}" for row in self.rows)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            part.write_text(json.dumps(head)[:-1] + f', "rows": [\n{lines}\n]}}\n', encoding="utf-8")
            part.replace(path)
        except OSError as cause:
            raise SearchError(f"cannot write the harm file {path}: {cause}; name another place for it") from cause

    @classmethod
    def load(cls, path: str | Path) -> Sensitivity:
        """Read the file; raises `SearchError` that names it when it is damaged."""
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
            rows = tuple(Harm(**row) for row in data.pop("rows"))
            found = cls(**data, rows=rows)
            if not all(math.isfinite(row.harm) and math.isfinite(row.error) for row in rows):
                raise ValueError("a harm is no number")
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as cause:
            raise SearchError(f"cannot read sensitivity {path}: {cause}; delete the file to measure anew") from cause
        return found


def sensitivity(
    model: nn.Module,
    plan: Plan,
    batches: Sequence[Any],
    specs: Specs,
    *,
    method: str = "kl",
    loss: Loss | None = None,
    forward: Forward = call,
    work: str | Path | None = None,
    on_row: Callable[[Harm, int, int], None] = lambda row, done, total: None,
) -> Sensitivity:
    """Harm of each of ``specs`` at the sites that its pattern selects, alone; ``plan`` gives observers, folds, steps.

    ``model`` is the float model, ``loss(model, batch)`` the mean over the items of a batch. ``float`` is a spec too; it
    does no harm. Sites that share a quantizer count as one, under the name of their leader. With ``work`` rows are
    written there one by one, and the same call goes on after the last. ``on_row(row, done, total)`` shows progress.
    Raises `SearchError` for fewer than two batches (no standard error), an unknown method, a loss that is missing or
    not finite, activations that are not a positional argument of their module, and a file of another search.
    """
    batches = list(batches)
    _check(method, loss, batches)
    wanted = [(site, text) for site, texts in _wanted(plan, specs).items() for text in texts]
    blank = Sensitivity(method, METHODS[method], digest(batches), digest(plan.to_toml()), len(batches))
    found = _resumed(blank, work)
    floats = [(str(site), text) for site, text in wanted if text == "float" and (str(site), text) not in found.table]
    found = replace(found, rows=(*found.rows, *(Harm(*each, 0.0, 0.0) for each in floats)))
    todo = [(site, text) for site, text in wanted if (str(site), text) not in found.table]
    with evaluating(model):
        measure = CURVATURE.get(method, partial(measured.harms, method))
        rows = measure(model, plan, batches, todo, loss, forward) if todo else ()
        for done, (site, text, values) in enumerate(rows, len(wanted) - len(todo) + 1):
            row = _row(site, text, values)
            found = replace(found, rows=(*found.rows, row))
            on_row(row, done, len(wanted))
            if work is not None:
                found.save(work)
    table = found.table
    return replace(found, rows=tuple(table[str(site), text] for site, text in wanted))


def _check(method: str, loss: Loss | None, batches: Sequence[Any]) -> None:
    if method not in METHODS:
        raise SearchError(f"method is one of {', '.join(METHODS)}; got {method!r}")
    if method == "loss" and loss is None:
        raise SearchError("method 'loss' needs loss(model, batch); without labels use method 'kl'")
    if len(batches) < 2:
        raise SearchError(f"a standard error needs at least 2 batches, got {len(batches)}; split the data")


def _wanted(plan: Plan, specs: Specs) -> dict[Site, list[str]]:
    """Specs in their canonical spelling, by the leader of the sites that share a quantizer."""
    found: dict[Site, list[str]] = {}
    for pattern, texts in specs.items():
        for site in matching(pattern, plan.sites):
            leader = plan.shared.get(site, site)
            found[leader] = list(dict.fromkeys(spelled(read_spec(text)) for text in texts))
    return found


def _resumed(blank: Sensitivity, work: str | Path | None) -> Sensitivity:
    if work is None or not Path(work).exists():
        return blank
    found = Sensitivity.load(work)
    for name in ("method", "data", "plan", "batches"):
        was, now = getattr(found, name), getattr(blank, name)
        if was != now:
            raise SearchError(f"{work} has other {name}: it was {was}, now {now}; choose another file")
    return found


def _row(site: Site, text: str, values: Tensor) -> Harm:
    if not values.isfinite().all():
        raise SearchError(f"{site} as {text}: the harm is not finite on some batch; look at the loss and at the data")
    return Harm(str(site), text, values.mean().item(), values.std().item() / math.sqrt(len(values)))


def harm_of_whole(
    model: nn.Module, batches: Sequence[Any], method: str = "kl", loss: Loss | None = None, forward: Forward = call
) -> tuple[Callable[[nn.Module], Tensor], str]:
    """A function that gives the harm of a changed model on each batch, ``[batches]`` in float64, and its unit.

    ``method`` is ``kl``, ``loss`` or ``sqnr``: curvature says nothing of a whole model. Raises `SearchError` for
    others, for a loss that is missing, and for fewer than 2 batches.
    """
    batches = list(batches)
    if method in CURVATURE:
        raise SearchError(f"{method} is no harm of a whole model; measure kl, loss or sqnr")
    _check(method, loss, batches)
    see, compare = measured.seeing(method, loss, forward), measured.comparing(method)
    with torch.no_grad(), evaluating(model):
        base = [see(model, batch) for batch in batches]

    def harm(changed: nn.Module) -> Tensor:
        with torch.no_grad(), evaluating(changed):
            values = [compare(b, see(changed, batch)) for b, batch in zip(base, batches, strict=True)]
        return torch.tensor(values, dtype=torch.float64)

    return harm, METHODS[method]

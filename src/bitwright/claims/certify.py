"""`certify`: measure everything that a certificate says, on items that no step before has seen."""

from __future__ import annotations

import hashlib
import math
import platform
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from bitwright.bench.measure import measure, model_bytes
from bitwright.claims.certificate import (
    Certificate,
    Claim,
    Digests,
    Environment,
    Equality,
    Exported,
    Kept,
    Latency,
    Measured,
    SiteRecord,
    Size,
)
from bitwright.claims.paired import CONFIDENCE, Paired
from bitwright.claims.scores import Score, compared
from bitwright.claims.splits import Inputs, digest_of_weights, first_entry, splits_of
from bitwright.costs.fingerprint import fingerprint
from bitwright.errors import CertificateError
from bitwright.export.parity import parity
from bitwright.flow.checkpoint import file_bytes
from bitwright.flow.convert import is_converted
from bitwright.flow.coverage import coverage
from bitwright.flow.evaluate import outputs_of
from bitwright.flow.prepare import plan_of
from bitwright.graph.dataflow import call, evaluating
from bitwright.harm.sensitivity import Sensitivity
from bitwright.kernels.cpu import cpu_features
from bitwright.nn.layer import Simulated
from bitwright.plan.plan import Plan
from bitwright.plan.site import Site
from bitwright.plan.target import spelled


def certify(
    model: nn.Module,
    shipped: nn.Module,
    test: Iterable[Any],
    score: Score,
    *,
    max_drop: float | None = None,
    seen: Mapping[str, Iterable[Any]] | None = None,
    inputs: Inputs = first_entry,
    score_range: tuple[float, float] | None = None,
    simulated: nn.Module | None = None,
    onnx: str | Path | None = None,
    sensitivity: Sensitivity | None = None,
    rounds: int = 0,
) -> Certificate:
    """What a shipped model loses against ``model``, the float one, on items that no step before has seen.

    ``score(model, batch) -> [items]`` is larger for better answers and is asked for every batch of ``test``;
    ``inputs(batch)`` is what the model sees of a batch. ``seen`` holds all other data that had a part in the model, by
    name ("training", "calibration", "search"): an item of the test in one of them is an error. With ``max_drop``, in
    units of the score, the certificate claims with 95 % confidence that the drop is below it.

    ``simulated`` is compared with ``shipped`` bit for bit on the whole test, the file ``onnx`` in ONNX Runtime on its
    first batch; ``rounds`` of alternating runs on that batch give the latency; ``sensitivity`` is the harm that the
    allocation was made from. Raises `CertificateError` for splits that overlap, scores that are NaN or change when
    asked again, and for a claim that more items could show: it says how many.
    """
    batches = list(test)
    if not is_converted(shipped):
        raise CertificateError("only a converted model can be certified; call bitwright.convert first")
    splits = splits_of(batches, seen or {}, inputs)
    found = compared(model, shipped, batches, score, score_range)
    _check_items(found.items, splits["test"].items)
    plan, (first, *_) = plan_of(shipped), [inputs(batch) for batch in batches]
    kept = kept_in_float(shipped)
    return Certificate(
        model=type(model).__name__,
        target=plan.target,
        issued=datetime.now(UTC).isoformat(timespec="seconds"),
        claim=claimed(found, max_drop),
        score=found,
        splits=splits,
        size=Size(model_bytes(model), model_bytes(shipped), file_bytes(shipped), sum(entry.bytes for entry in kept)),
        digests=Digests(digest_of_weights(model), digest_of_weights(shipped), digest_of_plan(plan)),
        environment=environment(),
        sites=site_records(plan, sensitivity),
        kept_float=kept,
        equality=None if simulated is None else equality(simulated, shipped, [inputs(batch) for batch in batches]),
        exported=None if onnx is None else exported(shipped, onnx, first),
        latency=latency(model, shipped, first, rounds) if rounds else None,
        harm=None if sensitivity is None else _source(sensitivity),
    )


def _check_items(scores: int, items: int) -> None:
    if scores != items:
        raise CertificateError(
            f"score(model, batch) gave {scores:,} scores for {items:,} items of the test; give one per item (of a "
            "sequence, the mean), or pass inputs=function whose tensors have items first"
        )


def _source(sensitivity: Sensitivity) -> Measured:
    return Measured(sensitivity.method, sensitivity.unit, sensitivity.data, sensitivity.plan)


def claimed(found: Paired, max_drop: float | None) -> Claim:
    """Whether the drop is shown to be below ``max_drop``.

    Raises `CertificateError` where these items leave it open although more of them could show it.
    """
    if max_drop is None:
        return Claim(None, CONFIDENCE, None)
    if not math.isfinite(max_drop):
        raise CertificateError(f"max_drop is a limit in units of the score, got {max_drop}")
    holds = found.upper < max_drop
    if not holds and (needed := found.needed(max_drop)) is not None:
        raise CertificateError(
            f"a drop below {max_drop:g} cannot be shown with {found.items:,} items: it is {found.drop:+.4f} on them, "
            f"and at most {found.upper:+.4f} with {CONFIDENCE:.0%} confidence ({found.lost} items lost, {found.gained} "
            f"gained). About {needed:,} such items would show it: pass more, or allow a larger drop"
        )
    return Claim(max_drop, CONFIDENCE, holds)


def digest_of_plan(plan: Plan) -> str:
    """SHA-256 of the text of a plan."""
    return hashlib.sha256(plan.to_toml().encode()).hexdigest()


def kept_in_float(shipped: nn.Module) -> tuple[Kept, ...]:
    """Stored tensors that stayed float, the largest first."""
    rows = [Kept(row.path, row.bytes, row.why) for row in coverage(shipped) if row.format == "float" and row.bytes]
    return tuple(sorted(rows, key=lambda row: -row.bytes))


def site_records(plan: Plan, sensitivity: Sensitivity | None = None) -> tuple[SiteRecord, ...]:
    """Spec and reason of every site, with harm and its rank where the ``sensitivity`` has them."""
    table = {} if sensitivity is None else sensitivity.table

    def harm_of(site: Site) -> Any:
        spec = spelled(plan.sites[site])
        return table.get((str(site), spec)) or table.get((str(plan.shared.get(site, site)), spec))

    rows = {site: harm_of(site) for site in plan.sites}
    order = sorted({row.harm for row in rows.values() if row is not None}, reverse=True)
    return tuple(
        SiteRecord(str(site), spelled(spec), plan.why.get(site, ""), None, None, None)
        if (row := rows[site]) is None
        else SiteRecord(
            str(site), spelled(spec), plan.why.get(site, ""), row.harm, row.error, 1 + order.index(row.harm)
        )
        for site, spec in plan.sites.items()
    )


def equality(simulated: nn.Module, shipped: nn.Module, batches: Sequence[Any]) -> Equality:
    """Compare two models bit for bit on batches of inputs; where they differ, name the first layer that does."""
    items = 0
    with torch.no_grad(), evaluating(simulated), evaluating(shipped):
        for batch in batches:
            one, other = _outputs(simulated, batch), _outputs(shipped, batch)
            items += len(one[0]) if one[0].dim() else 1
            if len(one) != len(other) or not all(torch.equal(a, b) for a, b in zip(one, other, strict=True)):
                return Equality(False, items, _first_difference(simulated, shipped, batch))
    return Equality(True, items, "")


def _outputs(model: nn.Module, batch: Any) -> list[Tensor]:
    found = [leaf for leaf in tree_leaves(call(model, batch)) if isinstance(leaf, Tensor)]
    if not found:
        raise CertificateError(
            f"{type(model).__name__} returned no tensors, so there is nothing to compare bit for bit"
        )
    return found


def _first_difference(simulated: nn.Module, shipped: nn.Module, batch: Any) -> str:
    paths = [path for path, module in simulated.named_modules() if path and isinstance(module, Simulated)]
    one, other = outputs_of(simulated, batch, paths), outputs_of(shipped, batch, paths)
    ran = [path for path in one if path in other]  # in the order in which they ran
    return next((path for path in ran if not torch.equal(one[path], other[path])), "")


def exported(shipped: nn.Module, path: str | Path, batch: Any) -> Exported:
    """An ONNX file and how far ONNX Runtime is from the shipped model on one batch of inputs."""
    found = parity(shipped, path, batch)
    content = Path(path).read_bytes()
    items = len(next(leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)))
    sqnr = None if found.output.max_abs == 0 else found.output.sqnr
    return Exported(
        Path(path).name, hashlib.sha256(content).hexdigest(), len(content), items, found.argmax_agreement,
        found.output.max_abs, sqnr,
    )  # fmt: skip


def latency(model: nn.Module, shipped: nn.Module, batch: Any, rounds: int) -> Latency:
    """Time both models in alternation on one batch of inputs, on torch's number of threads."""
    base, other = measure({"float": model, "shipped": shipped}, batch, rounds=rounds)
    items = next((len(leaf) for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.dim()), 1)
    speed = other.speed
    return Latency(1e3 * base.seconds, 1e3 * other.seconds, speed.median, speed.low, speed.high, rounds, items)


def environment() -> Environment:
    """This process: versions, processor, threads, torch's seed."""
    return Environment(
        version("bitwright"), torch.__version__, platform.python_version(), fingerprint()["processor"],
        tuple(sorted(cpu_features())), torch.get_num_threads(), torch.initial_seed(),
    )  # fmt: skip

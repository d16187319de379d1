"""`calibrate`: run batches, choose every scale, start to simulate."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from bitwright.errors import BitwrightError, CalibrationError
from bitwright.flow.prepare import plan_of
from bitwright.graph.dataflow import call, evaluating
from bitwright.nn.layer import Simulated, quantizer_name
from bitwright.nn.quantizer import Quantizer, Stage
from bitwright.numerics.spec import QuantSpec
from bitwright.observe import ranks
from bitwright.plan.site import OPERATORS, PRODUCTS, Site
from bitwright.plan.target import get_target, spelled


def calibrate(
    model: nn.Module,
    batches: Iterable[Any] = (),
    *,
    forward: Callable[[nn.Module, Any], Any] = call,
    unseen: Literal["raise", "dynamic"] = "raise",
) -> list[str]:
    """Choose all scales of a prepared model, in place: activations from ``batches``, weights from themselves.

    A batch is what the model takes (a tensor, a tuple of positional or a dict of keyword arguments); for other data
    pass ``forward``, e.g. ``lambda model, batch: model(batch[0])``. Plans without static activations need no batches.
    Runs in eval mode without gradients. Returns the paths of quantized modules that no batch reached (and experts of a
    mixture that no token reached, which use the ranges of the others): with
    ``unseen="dynamic"`` their activations take their range from each live tensor from now on, in model and plan; with
    ``"raise"`` they are an error. Raises `CalibrationError` for no batches, values that are not finite, batches that do
    not fit, and modules that never ran; the model then still computes in float.
    """
    if unseen not in ("raise", "dynamic"):
        raise CalibrationError(f"unseen must be 'raise' or 'dynamic', got {unseen!r}")
    plan_of(model)
    quantizers = [module for module in model.modules() if isinstance(module, Quantizer)]
    layers = {name: m for name, m in model.named_modules() if isinstance(m, Simulated)}
    if not layers:
        raise CalibrationError("this model has no simulated layers: it was converted already; calibrate before convert")
    static = [q for q in _inputs(layers.values()) if not q.spec.dynamic]
    _set_stage(quantizers, Stage.OBSERVE)
    try:
        with torch.no_grad(), evaluating(model), _counting(layers) as hits:
            with ranks.together():
                count = _run(model, batches, forward)
                if not count and static:
                    raise CalibrationError(
                        f"calibration got no batches, but {len(static)} activations have static ranges "
                        f"({static[0].site} first); pass at least one batch"
                    )
            missed = _missed(hits, needed=count > 0)
            if unseen == "raise":
                _refuse(missed, len(hits))
            _fall_back(model, layers, missed)
            for quantizer in _inputs(layers.values()):
                quantizer.finish()
            for layer in layers.values():
                for slot, weight in layer.quantized_weights().items():
                    quantizer = layer.quantizer(slot)
                    assert quantizer is not None
                    quantizer.fit(weight)
    except BaseException:
        _set_stage(quantizers, Stage.FLOAT)
        raise
    return missed + _unreached(layers)


def _run(model: nn.Module, batches: Iterable[Any], forward: Callable[[nn.Module, Any], Any]) -> int:
    count = 0
    for batch in batches:
        try:
            forward(model, batch)
        except BitwrightError as cause:
            raise type(cause)(f"batch {count}: {cause}") from cause
        except (RuntimeError, ValueError, TypeError, IndexError) as cause:
            shapes = [list(leaf.shape) for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]
            hint = ""
            if isinstance(batch, (tuple, list)):
                hint = "; its items were passed as separate arguments: for (input, label) batches pass "
                hint += "forward=lambda model, batch: model(batch[0])"
            raise CalibrationError(
                f"batch {count} with shapes {shapes} does not fit the model: {cause}{hint}"
            ) from cause
        count += 1
    return count


def _inputs(layers: Iterable[Simulated]) -> list[Quantizer]:
    """All quantizers of activations once, shared ones included once."""
    found = (child for layer in layers for child in layer.children() if isinstance(child, Quantizer))
    return list(dict.fromkeys(quantizer for quantizer in found if not quantizer.is_weight))


@contextmanager
def _counting(layers: Mapping[str, nn.Module]) -> Iterator[dict[str, int]]:
    hits = dict.fromkeys(layers, 0)

    def counter(name: str) -> Callable[..., None]:
        def count(*_: Any) -> None:
            hits[name] += 1

        return count

    hooks = [layer.register_forward_hook(counter(name)) for name, layer in layers.items()]
    try:
        yield hits
    finally:
        for hook in hooks:
            hook.remove()


def _missed(hits: dict[str, int], *, needed: bool) -> list[str]:
    """Layers that ran on no rank; ranks decide alike, or one would wait for the others forever."""
    counts = torch.tensor([*hits.values(), int(needed)])
    ranks.all_reduce(counts, dist.ReduceOp.SUM)
    return [name for name, count in zip(hits, counts.tolist(), strict=False) if not count] if counts[-1] else []


def _unreached(layers: Mapping[str, Simulated]) -> list[str]:
    """Parts of layers that ran on no rank."""
    own = [f"{path}: {part}" for path, layer in layers.items() for part in layer.unreached()]
    everywhere = set(own).intersection(*ranks.gathered(own))
    return [part for part in own if part in everywhere]


def _refuse(missed: list[str], total: int) -> None:
    if missed:
        raise CalibrationError(
            f"{len(missed)} of {total} quantized modules never ran during calibration: {', '.join(missed[:8])}"
            f"{', ...' if len(missed) > 8 else ''}; add batches that reach them, set their sites to 'float', or pass "
            "unseen='dynamic' to take their ranges from live tensors"
        )


def _fall_back(model: nn.Module, layers: Mapping[str, Simulated], missed: list[str]) -> None:
    """Make the activations of unseen layers dynamic, in the model and in its plan; a target may refuse that."""
    seen = {id(q) for q in _inputs(layer for name, layer in layers.items() if name not in missed)}
    plan, reason = plan_of(model), "no calibration batch reached it: its range comes from live tensors"
    sites, why = dict(plan.sites), dict(plan.why)
    fallen = [q for q in _inputs(layers[name] for name in missed) if id(q) not in seen and not q.spec.dynamic]
    for quantizer in fallen:
        quantizer.fall_back_to_dynamic()
        for site in (site for site in sites if _serves(layers, site, quantizer)):
            sites[site], why[site] = quantizer.spec, reason
            _check_target(plan.target, sites, site, layers[site.path])
    if fallen:
        model.bitwright_plan = replace(plan, sites=sites, why=why)  # type: ignore[assignment]


def _check_target(name: str, sites: Mapping[Site, QuantSpec | None], site: Site, layer: Simulated) -> None:
    """Raise `CalibrationError` where the target cannot run a layer with the range of a live tensor."""
    op = next(op for cls, op in OPERATORS.items() if isinstance(layer, cls))
    for product in PRODUCTS[op](layer):
        weight = None if product.weight is None else sites.get(Site(site.path, product.weight))
        if site.slot in product.inputs and not get_target(name).covers(product.op, weight, sites[site]):
            raise CalibrationError(
                f"{site}: no calibration batch reached it, and target {name} has no {product.op} kernel for "
                f"{spelled(sites[site])}; add batches that reach it, or set {site.path}.* to 'float'"
            )


def _serves(layers: Mapping[str, Simulated], site: Site, quantizer: Quantizer) -> bool:
    layer = layers.get(site.path)
    return layer is not None and getattr(layer, quantizer_name(site.slot), None) is quantizer


def _set_stage(quantizers: Iterable[Quantizer], stage: Stage) -> None:
    for quantizer in quantizers:
        quantizer.stage, quantizer.observer = stage, None

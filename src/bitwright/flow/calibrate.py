"""`calibrate`: run batches, choose every scale, start to simulate."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from bitwright.errors import BitwrightError, CalibrationError
from bitwright.flow.prepare import plan_of
from bitwright.graph.dataflow import call, evaluating
from bitwright.nn.elementwise import QAdd
from bitwright.nn.layer import QLayer
from bitwright.nn.quantizer import Quantizer, Stage
from bitwright.observe.histogram import all_reduce


def calibrate(
    model: nn.Module, batches: Iterable[Any] = (), *, forward: Callable[[nn.Module, Any], Any] = call
) -> None:
    """Choose all scales of a prepared model, in place: activations from ``batches``, weights from themselves.

    A batch is what the model takes (a tensor, a tuple of positional or a dict of keyword arguments); for other data
    pass ``forward``, e.g. ``lambda model, batch: model(batch[0])``. Plans without static activations need no batches.
    Runs in eval mode without gradients. Raises `CalibrationError` for no batches, values that are not finite,
    batches that do not fit, and modules that never ran; the model then still computes in float.
    """
    plan_of(model)
    quantizers = [module for module in model.modules() if isinstance(module, Quantizer)]
    layers = {name: m for name, m in model.named_modules() if isinstance(m, (QLayer, QAdd))}
    if not layers:
        raise CalibrationError("this model has no simulated layers: it was converted already; calibrate before convert")
    static = [q for q in _inputs(layers.values()) if not q.spec.dynamic]
    _set_stage(quantizers, Stage.OBSERVE)
    try:
        with torch.no_grad(), evaluating(model), _counting(layers) as hits:
            count = _run(model, batches, forward)
            if not count and static:
                raise CalibrationError(
                    f"calibration got no batches, but {len(static)} activations have static ranges "
                    f"({static[0].site} first); pass at least one batch"
                )
            _check_hits(hits, needed=count > 0)
            for quantizer in _inputs(layers.values()):
                quantizer.finish()
            for layer in layers.values():
                if isinstance(layer, QLayer) and layer.weight_quantizer is not None:
                    layer.weight_quantizer.fit(layer.folded()[0])
    except BaseException:
        _set_stage(quantizers, Stage.FLOAT)
        raise


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


def _inputs(layers: Iterable[nn.Module]) -> list[Quantizer]:
    """All input quantizers once, shared ones included once."""
    found: dict[int, Quantizer] = {}
    for layer in layers:
        names = ("input_quantizer_0", "input_quantizer_1") if isinstance(layer, QAdd) else ("input_quantizer",)
        for quantizer in (getattr(layer, name) for name in names):
            if quantizer is not None:
                found[id(quantizer)] = quantizer
    return list(found.values())


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


def _check_hits(hits: dict[str, int], *, needed: bool) -> None:
    """Every layer must have run on some rank; ranks decide alike, or one would wait for the others forever."""
    counts = torch.tensor([*hits.values(), int(needed)])
    all_reduce(counts, dist.ReduceOp.SUM)
    missed = [name for name, count in zip(hits, counts.tolist(), strict=False) if not count]
    if missed and counts[-1]:
        raise CalibrationError(
            f"{len(missed)} of {len(hits)} quantized modules never ran during calibration: {', '.join(missed[:8])}"
            f"{', ...' if len(missed) > 8 else ''}; add batches that reach them, or set their sites to 'float'"
        )


def _set_stage(quantizers: Iterable[Quantizer], stage: Stage) -> None:
    for quantizer in quantizers:
        quantizer.stage, quantizer.observer = stage, None

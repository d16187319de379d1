"""AWQ (Lin 2024): channels with large inputs get finer weights, then weights are clipped where that helps the output.

Scaling (section 3.2): ``s = mean|X|^a`` at every fold point, clamped to at least 1e-4 and divided by ``sqrt(max s *
min s)``; a out of 0, 0.05 .. 0.95 is that with the least error of the products with quantized weights. Clipping: the
weights that share a scale are clipped to 1.0 .. 0.5 of their largest magnitude, whatever gives the least error of the
part of the output that they make. The weight itself is clipped, so calibration finds the narrower range, which as every
range contains 0. Layers whose outputs meet in the scores of attention are not clipped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bitwright.algorithms.lockstep import Forward
from bitwright.algorithms.outcome import Outcome
from bitwright.algorithms.products import Seen, product_error, quantized_layers, rounded, watch
from bitwright.algorithms.scaling import find_points, fold, linears_of, rows_of_weight, store_rows, width_of
from bitwright.graph.foldable import FoldPoint, query_and_key
from bitwright.nn.layer import QLayer
from bitwright.nn.quantizer import Quantizer
from bitwright.plan.step import Value

STEP = "awq"
_GRID = [i / 20 for i in range(20)]
_SHRINK = [1 - i / 20 for i in range(11)]
_LEAST = 1e-4


def awq(model: nn.Module, batches: Sequence[Any], forward: Forward, options: Mapping[str, Value]) -> list[Outcome]:
    """Scale at all fold points in front of quantized linear layers, then clip their weights (``clip``)."""
    flow, points, refused = find_points(model, batches[0], forward)
    groups = {paths: layers for paths in [p.consumers for p in points] if (layers := quantized_layers(model, paths))}
    alone = {paths: layers for paths in refused if (layers := quantized_layers(model, paths))}
    seen = watch(model, batches, forward, [paths[0] for paths in (*groups, *alone)])
    found: list[Outcome] = []
    for point in reversed(points):  # a source's own input is judged with the rows that it has in the end
        if point.consumers in groups and point.consumers[0] in seen:
            found.append(_scaled(model, point, groups[point.consumers], seen[point.consumers[0]]))
        else:
            reason = "no batch reached it" if point.consumers in groups else "no layer behind it is quantized"
            found.append(Outcome(STEP, point.source, skipped=reason))
    found.reverse()
    scores = query_and_key(flow, model, linears_of(model)) if options["clip"] else set()
    for paths, layers in (*groups.items(), *alone.items()):
        unscaled = [f"not scaled: {refused[paths]}"] if paths in refused else []
        for path, layer in layers.items():
            unclipped = ["not clipped: its output goes into the scores of attention"] if path in scores else []
            if options["clip"] and path not in scores and paths[0] in seen:
                found.append(_clipped(path, layer, seen[paths[0]].sample, "".join(unscaled)))
            elif unscaled or unclipped:
                found.append(Outcome(STEP, path, skipped="; ".join(unscaled + unclipped)))
    return found


def _scaled(model: nn.Module, point: FoldPoint, layers: Mapping[str, QLayer], seen: Seen) -> Outcome:
    """Fold the best factors; what was seen is divided by them."""
    rows, channels = seen.sample, point.channels(width_of(model, point))
    before = product_error(rows, layers)
    factors = [importance(channels, seen.mean, a) for a in _GRID]
    errors = [product_error(rows, layers, s[channels], coarse=True) for s in factors]
    best = factors[min(range(len(errors)), key=errors.__getitem__)]
    after = product_error(rows, layers, best[channels])
    if after >= before:
        return Outcome(STEP, point.source, skipped="no factors lower the error of the quantized products")
    fold(model, point, best)
    seen.rows = [rows / best[channels]]
    return Outcome(STEP, point.source, before, after)


def importance(channels: Tensor, mean: Tensor, a: float) -> Tensor:
    """``mean|X|^a`` per channel of the source ``[c]``, at least 1e-4, its largest times its smallest being 1.

    ``channels [k]`` says which channel of the source each input channel is.

    >>> importance(torch.arange(3), torch.tensor([1.0, 4.0, 16.0]), 0.5)
    tensor([0.5000, 1.0000, 2.0000])
    """
    means = torch.zeros(int(channels.max()) + 1).scatter_reduce(0, channels, mean, "mean", include_self=False)
    scale = (means**a).clamp(min=_LEAST)
    return scale / (scale.max() * scale.min()).sqrt()


def _clipped(path: str, layer: QLayer, x: Tensor, note: str) -> Outcome:
    quantizer = layer.weight_quantizer
    assert quantizer is not None
    weight = rows_of_weight(layer)
    clipped, before, after, power = clip(weight, quantizer, x)
    store_rows(layer, clipped)
    return Outcome(STEP, path, before / max(power, 1e-30), after / max(power, 1e-30), note=note)


def clip(weight: Tensor, quantizer: Quantizer, x: Tensor) -> tuple[Tensor, float, float, float]:
    """``weight [o, k]`` clipped; summed squared errors of ``x [n, k] @ weight.T`` before and after; its sum of squares.

    The error of the output is counted per range of weights that share a scale, as if the others had none.
    """
    spec = quantizer.spec
    size = spec.granularity.size or weight.shape[1]
    grams = torch.einsum("ngi,ngj->gij", *[x.unflatten(-1, (-1, size))] * 2)

    def errors(found: Tensor) -> Tensor:
        noise = (found - weight).unflatten(-1, (-1, size))
        each = (torch.einsum("ogi,gij->ogj", noise, grams) * noise).sum(-1, keepdim=True)
        return each.sum((0, 1), keepdim=True) if spec.granularity.kind == "tensor" else each

    parts = weight.unflatten(-1, (-1, size))
    most = parts.abs().amax((0, 1, 2) if spec.granularity.kind == "tensor" else (2,), keepdim=True)
    best, least = weight, torch.full_like(errors(weight), torch.inf)
    for factor in _SHRINK:
        trial = parts.clamp(-factor * most, factor * most).flatten(1)
        error = errors(rounded(trial, quantizer, coarse=True))
        best = torch.where((error < least), trial.view_as(parts), best.view_as(parts)).view_as(weight)
        least = torch.minimum(error, least)
    before, after = errors(rounded(weight, quantizer)), errors(rounded(best, quantizer))
    best = torch.where(after < before, best.view_as(parts), parts).view_as(weight)
    power = (x @ weight.T).square().sum().item()
    return best, before.sum().item(), torch.minimum(before, after).sum().item(), power

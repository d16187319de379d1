"""SmoothQuant (Xiao 2023): the outliers of an activation's channels are moved into the weights that multiply them.

``s_j = max|X_j|^a / max_o |W_oj|^(1 - a)`` (equation 4), both clamped to at least 1e-5; the maximum over the weights is
that of all quantized layers that read the input. See `graph.foldable` for where this folds without another operation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bitwright.algorithms.lockstep import Forward
from bitwright.algorithms.outcome import Outcome
from bitwright.algorithms.products import Seen, product_error, quantized_layers, watch
from bitwright.algorithms.scaling import find_points, fold, rows_of_weight, width_of
from bitwright.graph.foldable import FoldPoint
from bitwright.nn.layer import QLayer
from bitwright.plan.step import Value

STEP = "smoothquant"
_LEAST = 1e-5
_GRID = [round(0.05 * i, 2) for i in range(21)]


def smoothquant(
    model: nn.Module, batches: Sequence[Any], forward: Forward, options: Mapping[str, Value]
) -> list[Outcome]:
    """Fold factors of strength ``alpha`` at all fold points in front of layers whose input and weight are quantized.

    With ``search`` each point takes the strength, out of 0 to 1 by 0.05, with the least error of the quantized products
    on some of the calibration's rows; points where none improves on no factors at all stay as they are.
    """
    alpha, search = float(options["alpha"]), bool(options["search"])
    _, points, refused = find_points(model, batches[0], forward)
    layers = {point: _smoothable(model, point.consumers) for point in points}
    seen = watch(model, batches, forward, [point.consumers[0] for point in points if layers[point]])
    found: list[Outcome] = []
    for point in reversed(points):  # a source's own input is balanced with the rows that it has in the end
        if point.consumers[0] not in seen:
            reason = "no batch reached it" if layers[point] else "no layer behind it has both operands quantized"
            found.append(Outcome(STEP, point.source, skipped=reason))
            continue
        found.append(_smooth(model, point, layers[point], seen[point.consumers[0]], _GRID if search else [alpha]))
    return found[::-1] + [
        Outcome(STEP, path, skipped=reason) for paths, reason in refused.items() for path in _smoothable(model, paths)
    ]


def _smoothable(model: nn.Module, paths: Sequence[str]) -> dict[str, QLayer]:
    return {path: m for path, m in quantized_layers(model, paths).items() if m.input_quantizer is not None}


def _smooth(
    model: nn.Module, point: FoldPoint, layers: Mapping[str, QLayer], seen: Seen, grid: Sequence[float]
) -> Outcome:
    rows, channels = seen.sample, point.channels(width_of(model, point))
    factors = [smoothing(channels, seen.most, layers, alpha) for alpha in grid]
    errors = [product_error(rows, layers, s[channels], coarse=True) for s in factors] if len(grid) > 1 else [0.0]
    best = factors[min(range(len(grid)), key=errors.__getitem__)]
    before, after = product_error(rows, layers), product_error(rows, layers, best[channels])
    if len(grid) > 1 and after >= before:
        return Outcome(STEP, point.source, skipped="no strength lowers the error of the quantized products")
    fold(model, point, best)
    return Outcome(STEP, point.source, before, after)


def smoothing(channels: Tensor, most: Tensor, layers: Mapping[str, QLayer], alpha: float) -> Tensor:
    """``max|X|^a / max|W|^(1 - a)`` per channel of the source ``[c]``; ``channels [k]`` says which each input is."""
    width = int(channels.max()) + 1
    heaviest = torch.stack([rows_of_weight(layer).abs().amax(0) for layer in layers.values()]).amax(0)
    most, heaviest = (
        torch.zeros(width).scatter_reduce(0, channels, values, "amax").clamp(min=_LEAST) for values in (most, heaviest)
    )
    return most**alpha / heaviest ** (1 - alpha)

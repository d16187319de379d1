"""What a group of linear layers that read one tensor computes with quantized operands, and how far off that is.

Ranges are not chosen yet when this is asked: operands are quantized with the ranges that calibration would choose for
them, by the observers of the plan.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from bitwright.algorithms.lockstep import Forward
from bitwright.algorithms.scaling import rows_of_weight
from bitwright.graph.dataflow import evaluating
from bitwright.nn.layer import QLayer
from bitwright.nn.quantizer import Quantizer
from bitwright.numerics.affine import choose_qparams, live_qparams, simulate
from bitwright.numerics.qtensor import snap_scale
from bitwright.numerics.spec import QuantSpec
from bitwright.observe import ranks
from bitwright.observe.fit import weight_qparams
from bitwright.observe.observer import make_observer

ROWS = 1024
"""On how many rows of its input a group of layers is judged, spread over all batches."""
_SHRINK = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)


@dataclass
class Seen:
    """The input of a layer over all batches: the largest and the mean magnitude per channel, and some of its rows."""

    most: Tensor
    total: Tensor
    count: int = 0
    rows: list[Tensor] = field(default_factory=list)

    @property
    def mean(self) -> Tensor:
        """Mean magnitude per channel ``[k]``."""
        return (self.total / max(self.count, 1)).float()

    @property
    def sample(self) -> Tensor:
        """The rows kept ``[n, k]``."""
        return torch.cat(self.rows)


def watch(model: nn.Module, batches: Sequence[Any], forward: Forward, paths: Iterable[str]) -> dict[str, Seen]:
    """What reaches the linear layers at ``paths`` in float on all ranks; those that no batch reaches are left out."""
    seen: dict[str, Seen] = {}
    each = math.ceil(ROWS / ranks.sums(len(batches))[0])
    generator = torch.Generator().manual_seed(0)

    def look(path: str, x: Tensor) -> None:
        x = x.detach().float().reshape(-1, x.shape[-1])
        if not len(x):
            return
        found = seen.setdefault(path, Seen(torch.zeros(x.shape[1]), torch.zeros(x.shape[1], dtype=torch.double)))
        found.most = torch.maximum(found.most, x.abs().amax(0))
        found.total += x.abs().double().sum(0)
        found.count += len(x)
        found.rows.append(x[torch.randperm(len(x), generator=generator)[:each]].clone())

    def looking(path: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, args: look(path, args[0])

    hooks = [model.get_submodule(path).register_forward_pre_hook(looking(path)) for path in paths]
    try:
        with torch.no_grad(), evaluating(model):
            for batch in batches:
                forward(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    return _of_all_ranks(seen)


def _of_all_ranks(seen: dict[str, Seen]) -> dict[str, Seen]:
    found: dict[str, Seen] = {}
    for path, own in (pair for part in ranks.gathered(seen) for pair in part.items()):
        if path not in found:
            found[path] = own
            continue
        both = found[path]
        both.most = torch.maximum(both.most, own.most)
        both.total += own.total
        both.count += own.count
        both.rows += own.rows
    return found


def quantized_layers(model: nn.Module, paths: Iterable[str]) -> dict[str, QLayer]:
    """Those of the layers at ``paths`` whose weight is quantized."""
    layers = {path: model.get_submodule(path) for path in paths}
    return {path: m for path, m in layers.items() if isinstance(m, QLayer) and m.weight_quantizer is not None}


def rounded(weight: Tensor, quantizer: Quantizer, *, coarse: bool = False) -> Tensor:
    """``weight [o, k]`` as the quantizer would simulate it once calibrated; ``coarse`` searches its range roughly."""
    spec = quantizer.spec
    if coarse and quantizer.observer_name == "mse" and spec.format.is_integer:
        return _coarsely(weight, spec)
    qparams = weight_qparams(weight, spec, quantizer.observer_name)
    if spec.scale is not None:
        qparams = replace(qparams, scale=snap_scale(qparams.scale, spec))
    return simulate(weight, spec, qparams)


def _coarsely(x: Tensor, spec: QuantSpec) -> Tensor:
    """``x`` simulated with the best, per range, of a few ranges inside its extremes."""
    blocks, shape = spec.granularity.blocks(x), spec.granularity.scale_shape(x.shape)
    low, high = blocks.amin(-1).view(shape), blocks.amax(-1).view(shape)
    best, least = x, torch.full((*blocks.shape[:-1], 1), torch.inf)
    for factor in _SHRINK:
        trial = simulate(x, spec, choose_qparams(low * factor, high * factor, spec))
        error = spec.granularity.blocks((trial - x).square()).sum(-1, keepdim=True)
        better = (error < least).expand(blocks.shape).reshape(x.shape)
        best, least = torch.where(better, trial, best), torch.minimum(error, least)
    return best


def passed_on(x: Tensor, quantizer: Quantizer | None, *, coarse: bool = False) -> Tensor:
    """``x`` as an input quantizer would simulate it once calibrated on it; ``coarse`` as in `rounded`."""
    if quantizer is None:
        return x
    spec = quantizer.spec
    if spec.dynamic:
        return simulate(x, spec, live_qparams(x, spec))
    if coarse and quantizer.observer_name == "mse" and spec.format.is_integer:
        return _coarsely(x, spec)
    observer = make_observer(quantizer.observer_name)
    observer.update(x)
    return simulate(x, spec, observer.qparams(spec))


def product_error(
    x: Tensor, layers: Mapping[str, QLayer], scale: Tensor | None = None, *, coarse: bool = False
) -> float:
    """Squared error of the products of all ``layers`` with ``x [n, k]``, relative to their squares.

    ``scale [k]`` divides the input and multiplies the weights before they are quantized. ``coarse`` is for comparing
    many scales: where ranges are searched for, it tries a few only.
    """
    shared: dict[int, Tensor] = {}
    noise = power = 0.0
    for layer in layers.values():
        assert layer.weight_quantizer is not None
        weight = rows_of_weight(layer)
        wanted = x @ weight.T
        if (key := id(layer.input_quantizer)) not in shared:
            shared[key] = passed_on(x if scale is None else x / scale, layer.input_quantizer, coarse=coarse)
        codes = rounded(weight if scale is None else weight * scale, layer.weight_quantizer, coarse=coarse)
        noise += (shared[key] @ codes.T - wanted).square().sum().item()
        power += wanted.square().sum().item()
    return noise / max(power, 1e-30)

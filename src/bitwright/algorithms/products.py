"""What a group of linear layers that read one tensor computes with quantized operands, and how far off that is.

Ranges are not chosen yet when this is asked: operands are quantized with the ranges that calibration would choose for
them, by the observers of the plan.
"""

from __future__ import annotations

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
    """What reaches the linear layers at ``paths`` in float; those that no batch reaches are left out."""
    seen: dict[str, Seen] = {}
    generator = torch.Generator().manual_seed(0)

    def look(path: str, x: Tensor) -> None:
        x = x.detach().float().reshape(-1, x.shape[-1])
        if not len(x):
            return
        found = seen.setdefault(path, Seen(torch.zeros(x.shape[1]), torch.zeros(x.shape[1], dtype=torch.double)))
        found.most = torch.maximum(found.most, x.abs().amax(0))
        found.total += x.abs().double().sum(0)
        found.count += len(x)
        found.rows.append(x[torch.randperm(len(x), generator=generator)[: -(-ROWS // len(batches))]].clone())

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
    return seen


def quantized_layers(model: nn.Module, paths: Iterable[str]) -> dict[str, QLayer]:
    """Those of the layers at ``paths`` whose weight is quantized."""
    layers = {path: model.get_submodule(path) for path in paths}
    return {path: m for path, m in layers.items() if isinstance(m, QLayer) and m.weight_quantizer is not None}


def rounded(weight: Tensor, quantizer: Quantizer, *, coarse: bool = False) -> Tensor:
    """``weight [o, k]`` as the quantizer would simulate it once calibrated; ``coarse`` searches its range roughly."""
    spec = quantizer.spec
    found = quantizer.observer_name if not coarse or quantizer.observer_name != "mse" else "minmax"
    best = _simulated(weight, quantizer, found)
    if not coarse or found == quantizer.observer_name or not spec.format.is_integer:
        return best
    return _coarsely(weight, quantizer, best)


def _simulated(weight: Tensor, quantizer: Quantizer, observer: str) -> Tensor:
    qparams = weight_qparams(weight, quantizer.spec, observer)
    if quantizer.spec.scale is not None:
        qparams = replace(qparams, scale=snap_scale(qparams.scale, quantizer.spec))
    return simulate(weight, quantizer.spec, qparams)


def _coarsely(weight: Tensor, quantizer: Quantizer, best: Tensor) -> Tensor:
    """The least squared error, per range, of a few ranges inside the extremes."""
    spec = quantizer.spec
    blocks, shape = spec.granularity.blocks(weight), spec.granularity.scale_shape(weight.shape)
    low, high = blocks.amin(-1).view(shape), blocks.amax(-1).view(shape)
    least = spec.granularity.blocks((best - weight).square()).sum(-1, keepdim=True)
    for factor in _SHRINK[1:]:
        trial = simulate(weight, spec, choose_qparams(low * factor, high * factor, spec))
        error = spec.granularity.blocks((trial - weight).square()).sum(-1, keepdim=True)
        better = (error < least).expand(blocks.shape).reshape(weight.shape)
        best, least = torch.where(better, trial, best), torch.minimum(error, least)
    return best


def passed_on(x: Tensor, quantizer: Quantizer | None) -> Tensor:
    """``x`` as an input quantizer would simulate it once calibrated on it."""
    if quantizer is None:
        return x
    if quantizer.spec.dynamic:
        return simulate(x, quantizer.spec, live_qparams(x, quantizer.spec))
    observer = make_observer(quantizer.observer_name)
    observer.update(x)
    return simulate(x, quantizer.spec, observer.qparams(quantizer.spec))


def product_error(
    x: Tensor, layers: Mapping[str, QLayer], scale: Tensor | None = None, *, coarse: bool = False
) -> float:
    """Squared error of the products of all ``layers`` with ``x [n, k]``, relative to their squares.

    ``scale [k]`` divides the input and multiplies the weights before they are quantized.
    """
    shared: dict[int, Tensor] = {}
    noise = power = 0.0
    for layer in layers.values():
        assert layer.weight_quantizer is not None
        weight = rows_of_weight(layer)
        wanted = x @ weight.T
        if (key := id(layer.input_quantizer)) not in shared:
            shared[key] = passed_on(x if scale is None else x / scale, layer.input_quantizer)
        codes = rounded(weight if scale is None else weight * scale, layer.weight_quantizer, coarse=coarse)
        noise += (shared[key] @ codes.T - wanted).square().sum().item()
        power += wanted.square().sum().item()
    return noise / max(power, 1e-30)

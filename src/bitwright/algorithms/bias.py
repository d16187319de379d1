"""Bias correction (Nagel 2019, section 4.2): what quantization adds to a channel's mean goes into its bias.

Layers without a bias and without a batch norm that has one are left alone: a new parameter would be a key that no
checkpoint of the float model has.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from bitwright.algorithms.layers import Layer, NotApplicableError, add_to_bias
from bitwright.algorithms.lockstep import Forward, computing_in_float
from bitwright.graph.dataflow import record
from bitwright.graph.paths import Path, paths
from bitwright.nn.layer import QLayer
from bitwright.observe import ranks
from bitwright.plan.step import Value

_KEEPS_THE_MEAN = frozenset(
    "identity dropout dropout1d dropout2d dropout3d contiguous clone detach float to type_as view reshape flatten "
    "squeeze unsqueeze pad".split()
)
_AVERAGES = ("mean", "avg_pool", "adaptive_avg_pool")


@torch.no_grad()
def bias_correction(layer: Layer, options: Mapping[str, Value]) -> None:
    """Empirical: ``b -= E[y_q - y]`` per output channel, on the calls of a layer whose prefix was corrected before."""
    total, count = torch.zeros(()), 0
    for found, wanted in zip(layer.outputs(), layer.float_outputs(), strict=True):
        noise = channels_last(found - wanted, layer)
        total = total + noise.double().sum(0)
        count += len(noise)
    total, [rows] = ranks.total(total), ranks.sums(count)
    add_to_bias(layer.module, rounding_of_bias(layer.module) - total / max(rows, 1))


def rounding_of_bias(module: QLayer) -> Tensor | float:
    """What rounding to the accumulator's grid adds to the bias now, float64; a new bias will be rounded anew."""
    bias = module.folded()[1]
    held = module.on_grid(bias)
    return 0.0 if bias is None or held is None else held.double() - bias.double()


def channels_last(out: Tensor, layer: Layer) -> Tensor:
    """``[n, o]``: one row per output position."""
    axis = -1 if layer.module.weight.dim() == 2 else 1 - layer.module.weight.dim()
    return out.movedim(axis, -1).reshape(-1, out.shape[axis])


def analytic_bias_correction(
    model: nn.Module, batch: Any, forward: Forward
) -> Callable[[Layer, Mapping[str, Value]], None]:
    """Data-free: ``b -= dW E[x]``, with E[x] from the batch norm whose outputs the layer reads through its activation.

    It takes a channel as normal with mean beta and deviation gamma, and no notice of zero padding; ``batch`` only shows
    the dataflow. Returns the method for one layer; what it needs of all norms is read now, before a layer changes.
    """
    with computing_in_float(model):
        flow = ranks.first(record(model, batch, forward))
    means = {path.second: _expected_input(path, model) for path in paths(flow, model)}

    @torch.no_grad()
    def correct(layer: Layer, options: Mapping[str, Value]) -> None:
        mean = means.get(layer.path, "its input was not recorded")
        if isinstance(mean, str):
            raise NotApplicableError(mean)
        change = layer.quantizer.simulate(layer.weight) - layer.weight
        if not change.any():
            raise NotApplicableError(
                "its weight lies on the grid of its codes: chosen codes say nothing about rounding"
            )
        groups = getattr(layer.module, "groups", 1)
        columns = change.double().reshape(groups, len(change) // groups, len(mean) // groups, -1)
        add_to_bias(layer.module, -(columns * mean.view(groups, 1, -1, 1)).sum((2, 3)).flatten())

    return correct


def _expected_input(path: Path, model: nn.Module) -> Tensor | str:
    """E[x] per channel of the layer before, float64, or why it is not known."""
    if path.reason:
        return path.reason
    source = model.get_submodule(path.first)
    if not isinstance(source, QLayer) or not source.norm or source.norm[0].weight is None:
        return f"{path.first} has no batch norm that tells how its outputs are distributed"
    acts = [i for i, name in enumerate(path.between) if name not in _KEEPS_THE_MEAN and not name.startswith(_AVERAGES)]
    names = [path.between[i] for i in acts]
    if names not in ([], ["relu"], ["relu6"]):
        return f"{' and '.join(names)} lie between; the mean behind them is known for one relu or relu6"
    if acts and any(name.startswith(_AVERAGES) for name in path.between[: acts[0]]):
        return f"an average before the {names[0]} has another deviation than gamma"
    norm = source.norm[0]
    mean, deviation = norm.bias.detach().double(), norm.weight.detach().double().abs()
    if not names:
        return mean
    return expected_clipped(mean, deviation, math.inf if names == ["relu"] else 6.0)


def expected_clipped(mean: Tensor, deviation: Tensor, most: float = math.inf) -> Tensor:
    """``E[min(max(x, 0), most)]`` for normal x (Nagel 2019, appendix C); for ``most`` infinite that of a ReLU.

    With phi and Phi the normal density and distribution, ``a = -mean / deviation``, ``b = (most - mean) / deviation``:
    ``mean (Phi(b) - Phi(a)) + deviation (phi(a) - phi(b)) + most (1 - Phi(b))``.

    >>> round(expected_clipped(torch.tensor(0.3), torch.tensor(0.7)).item(), 5)
    0.45452
    """
    deviation = deviation.clamp(min=1e-20)
    low, high = -mean / deviation, (most - mean) / deviation
    inside = torch.special.ndtr(high) - torch.special.ndtr(low)
    expected = mean * inside + deviation * (_density(low) - _density(high))
    return expected if most == math.inf else expected + most * torch.special.ndtr(-high)


def _density(x: Tensor) -> Tensor:
    return (-0.5 * x.square()).exp() / math.sqrt(2 * math.pi)

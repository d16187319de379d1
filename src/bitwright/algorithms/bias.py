"""Bias correction (Nagel 2019, section 4.2): what quantization adds to a channel's mean goes into its bias."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from bitwright.algorithms.layers import Layer, add_to_bias
from bitwright.plan.step import Value


@torch.no_grad()
def bias_correction(layer: Layer, options: Mapping[str, Value]) -> None:
    """Empirical: ``b -= E[y_q - y]`` per output channel, on the calls of a layer whose prefix was corrected before."""
    total, count = torch.zeros(()), 0
    for found, wanted in zip(layer.outputs(), layer.float_outputs(), strict=True):
        noise = _channels_last(found - wanted, layer)
        total = total + noise.double().sum(0)
        count += len(noise)
    add_to_bias(layer.module, -(total / max(count, 1)).float())


def _channels_last(out: Tensor, layer: Layer) -> Tensor:
    """``[n, o]``: one row per output position."""
    axis = -1 if layer.module.weight.dim() == 2 else 1 - layer.module.weight.dim()
    return out.movedim(axis, -1).reshape(-1, out.shape[axis])

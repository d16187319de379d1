"""Ranges of weights follow the batch norm that is folded into them.

What is quantized is ``W f`` with ``f = gamma / sqrt(running_var + eps)``, so a range ``s`` belongs to one size of f.
Every step moves gamma and the running variance. Left to its own small gradient, the range of a channel whose gamma
shrinks soon covers one code; one whose gamma grows clips, and since the running variance is measured on what the
clipped layer gives, f then runs away. Hence ``s <- s |f after| / |f before|`` per channel after each step: codes change
with W and the learned part of the range, as if W were quantized before the fold. Ranges per tensor and of tied weights
serve several f and do not follow. When statistics freeze, gamma does too: beside frozen ranges a step on it is one on
all codes of its channel.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from bitwright.nn.layer import QLayer
from bitwright.nn.norm import factor_of
from bitwright.nn.quantizer import Quantizer
from bitwright.train.groups import unsharded

FLOOR = 1e-4
"""The smallest size of f that a range follows: below it a channel is dead, and its range would underflow."""


def folded_gammas(model: nn.Module) -> Iterator[nn.Parameter]:
    """The gammas that are part of a quantized weight."""
    for layer, _ in _layers(model):
        gamma = layer.norm[0].weight
        if gamma is not None:
            yield gamma


@torch.no_grad()
def factors(model: nn.Module) -> list[Tensor]:
    """The sizes of f of every layer with a folded norm and a range per channel, float64 `[o]`, in order of modules."""
    layers = [layer for layer, _ in _followers(model)]
    if not layers:  # gathering shards is dear
        return []
    with unsharded(model):
        return [factor_of(layer.norm[0]).abs().clamp(min=FLOOR) for layer in layers]


@torch.no_grad()
def follow(model: nn.Module, before: list[Tensor]) -> None:
    """Multiply the ranges of weights by what their `factors` have grown by since ``before``."""
    for (_, quantizer), old, new in zip(_followers(model), before, factors(model), strict=True):
        growth = (new / old).float()
        for part in (quantizer.scale, quantizer.offset):
            if part is not None:
                own: Tensor = growth.view(-1, *[1] * (part.dim() - 1))
                if isinstance(part, DTensor):
                    own = distribute_tensor(own, part.device_mesh, part.placements)
                part.mul_(own)


def _layers(model: nn.Module) -> Iterator[tuple[QLayer, Quantizer]]:
    for layer in model.modules():
        if isinstance(layer, QLayer) and layer.norm and layer.weight_quantizer is not None:
            yield layer, layer.weight_quantizer


def _followers(model: nn.Module) -> Iterator[tuple[QLayer, Quantizer]]:
    for layer, quantizer in _layers(model):
        own = quantizer.consumers == 1 and quantizer.spec.granularity.kind != "tensor"
        if own and quantizer.scale is not None:
            yield layer, quantizer

"""Learned ranges under Adam: its step becomes one of the range's logarithm.

Adam divides a gradient by its own size, so it moves a scale of 0.001 as far as a weight of 0.1: by the learning rate.
A few steps destroy the scale. Here a step that Adam would take on a scale is one on its logarithm, which is how
trained thresholds are learned with Adam (TQT, Jain 2020, section 3.2): ``s <- s * exp(GAIN * step)``. An offset moves
by the same share of its range's width. SGD, whose step has the size of the gradient, is left alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bitwright.nn.quantizer import Quantizer
from bitwright.train.groups import quantizers_of

GAIN = 20.0  # a learning rate of 5e-5 moves a range by at most 0.1 % per step
_LARGEST = 0.1  # and no rate by more than a factor exp(0.1)

_NORMALIZING = ("adam", "adafactor", "lion", "rmsprop", "adagrad", "adadelta", "rprop", "sophia", "lamb")


def normalizes(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the steps of an optimizer do not depend on the size of the gradient, told by its name.

    >>> parameter = nn.Parameter(torch.ones(1))
    >>> normalizes(torch.optim.AdamW([parameter])), normalizes(torch.optim.SGD([parameter]))
    (True, False)
    """
    names = [cls.__name__.lower() for cls in type(optimizer).__mro__]
    return any(part in name for name in names for part in _NORMALIZING)


def make_relative(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Let every later step of ``optimizer`` move the learned ranges of ``model`` relatively, if it normalizes."""
    optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
    if getattr(optimizer, "bitwright_relative", None) is model or not normalizes(optimizer):
        return
    before: list[tuple[Quantizer, Tensor, Tensor | None]] = []

    @torch.no_grad()
    def remember(*_: Any) -> None:
        before[:] = [
            (q, q.scale.clone(), None if q.offset is None else q.offset.clone())
            for q in quantizers_of(model)
            if q.scale is not None and q.scale.requires_grad and q.scale.grad is not None
        ]

    @torch.no_grad()
    def rescale(*_: Any) -> None:
        for quantizer, scale, offset in before:
            assert quantizer.scale is not None
            quantizer.scale.copy_(scale * (_limited(quantizer.scale - scale)).exp())
            if offset is not None and quantizer.offset is not None:
                fmt = quantizer.spec.format
                width = scale * (fmt.qmax - fmt.qmin)
                quantizer.offset.copy_(offset + width * _limited(quantizer.offset - offset))

    optimizer.register_step_pre_hook(remember)
    optimizer.register_step_post_hook(rescale)
    optimizer.bitwright_relative = model  # type: ignore[attr-defined]


def _limited(step: Tensor) -> Tensor:
    return (GAIN * step).clamp(-_LARGEST, _LARGEST)

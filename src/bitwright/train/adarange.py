"""`step`: the checks of adaptive ranges, every `nn.adarange.EVERY` training steps.

Call it once per training step, after `Schedule.apply` and before the forward. What the modes are, and when they change,
is written in `nn.adarange`. In a distributed run the first process decides for all, so all of them call it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bitwright.nn.adarange import (
    DRIFT,
    DWELL,
    EVERY,
    PATIENCE,
    STEADY,
    AdaRange,
    decided_range,
    limits,
    most_clipped,
    relative_change,
)
from bitwright.nn.quantizer import Quantizer
from bitwright.nn.tracker import range_ends
from bitwright.numerics.affine import choose_qparams
from bitwright.numerics.spec import QParams, QuantSpec


@torch.no_grad()
def step(model: nn.Module, *, learn: bool = True) -> None:
    """Count a training step for every adaptive range, check those whose turn it is, and set what their ranges train.

    ``learn`` says whether a range may go over to be learned now; the schedule's joint phase allows it. Frozen ranges
    (`Quantizer.freeze_range`) neither count nor change.
    """
    for quantizer, tracker in adaptive(model):
        if quantizer.freeze_range:
            _train(quantizer, False)
            continue
        tracker.counters[1:3] += 1
        if int(tracker.counters[1]) >= EVERY and int(tracker.rows):
            _check(quantizer, tracker, learn)
        _train(quantizer, learn and tracker.learning)


def adaptive(model: nn.Module) -> Iterator[tuple[Quantizer, AdaRange]]:
    """Every quantizer with an adaptive range, once, and its state."""
    for module in model.modules():
        if isinstance(module, Quantizer) and isinstance(module.tracker, AdaRange):
            yield module, module.tracker


def _train(quantizer: Quantizer, value: bool) -> None:
    for parameter in (quantizer.scale, quantizer.offset):
        if parameter is not None and parameter.requires_grad is not value:
            parameter.requires_grad_(value)
            parameter.grad = None  # a stale gradient would still move it


def _check(quantizer: Quantizer, tracker: AdaRange, learn: bool) -> None:
    qparams = quantizer.qparams
    assert qparams is not None
    held = range_ends(qparams, quantizer.spec)
    found, clipped = _measured(tracker, qparams, quantizer.spec)
    learning, votes, since = tracker.learning, int(tracker.counters[3]), int(tracker.counters[2])
    if learning:
        drifted = relative_change(held, found) > DRIFT or clipped > most_clipped(quantizer.spec.format.bits)
        votes = votes + 1 if drifted else 0
    else:
        votes = votes + 1 if relative_change(tracker.decided, found) < STEADY else 0
        quantizer.move_to(choose_qparams(found[:1], found[1:], quantizer.spec))
    if votes >= PATIENCE and since >= DWELL and (learning or learn):
        learning, votes, since = not learning, 0, 0
    tracker.decided.copy_(found)
    tracker.rows.zero_()
    tracker.counters.copy_(torch.tensor([int(learning), 0, since, votes]))


def _measured(tracker: AdaRange, qparams: QParams, spec: QuantSpec) -> tuple[Tensor, float]:
    """The range that tracking decides for now, and the share of values that the range in use clips."""
    values, (low, high) = tracker.values(), limits(qparams, spec)
    clipped = ((values < low) | (values > high)).float().mean().view(1)
    measured = torch.cat([decided_range(values, tracker.ends, spec), clipped])
    if dist.is_available() and dist.is_initialized():
        dist.broadcast(measured, 0)
    return measured[:2], measured[2].item()

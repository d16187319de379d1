"""`Training`: what training a version of a model needs, as one value."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from bitwright.train.schedule import Schedule


@dataclass(frozen=True)
class Training:
    """What a trained version needs: ``loss(model, batch)``, batches, a schedule, data to choose the best state by."""

    loss: Callable[[nn.Module, Any], Tensor]
    batches: Sequence[Any]
    schedule: Schedule
    validation: Sequence[Any] = ()

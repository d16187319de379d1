"""`LossScale`: the automaton that keeps float16 gradients from underflowing (Micikevicius 2018, section 3.2)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.tensor import DTensor


@dataclass
class LossScale:
    """A factor on the loss: doubled after ``patience`` good steps, halved on infinite gradients.

    >>> scale = LossScale(8.0, patience=2)
    >>> [(scale.update(finite), scale.factor)[1] for finite in (True, True, False, False)]
    [8.0, 16.0, 8.0, 4.0]
    """

    factor: float = 65536.0
    patience: int = 2000
    good_steps: int = 0

    def update(self, finite: bool) -> None:
        """Take in whether the gradients of a step were finite; a step whose gradients were not must be skipped."""
        self.good_steps = self.good_steps + 1 if finite else 0
        if not finite:
            self.factor *= 0.5
        elif self.good_steps == self.patience:
            self.factor, self.good_steps = self.factor * 2.0, 0

    def unscale(self, model: nn.Module) -> None:
        """Divide all gradients by the factor, before they are clipped."""
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad.div_(self.factor)


def finite_gradients(model: nn.Module) -> bool:
    """Whether no gradient (no shard of it that is here) holds NaN or infinity."""
    grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    local = [grad.to_local() if isinstance(grad, DTensor) else grad for grad in grads]
    sums = [grad.detach().abs().sum(dtype=torch.float64) for grad in local]  # float64 cannot overflow here
    return not sums or bool(torch.isfinite(torch.stack(sums)).all())

"""`History`: what a training run did; `Best`: the best state it saw."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from bitwright.errors import TrainingError
from bitwright.train.groups import prepared_part
from bitwright.train.parallel import mean_over_ranks


@dataclass
class History:
    """What training did.

    ``losses`` has one entry per step, ``scores`` (step, score) pairs, ``best_step`` is the step whose weights were
    kept. ``skipped`` are the steps that changed nothing because a loss or gradient was not finite; ``clamped`` counts
    scales that an optimizer step had made (almost) zero or negative and that were put back to float32 epsilon.
    """

    losses: list[float] = field(default_factory=list)
    scores: list[tuple[int, float]] = field(default_factory=list)
    best_step: int = 0
    skipped: list[int] = field(default_factory=list)
    clamped: int = 0

    @property
    def best_score(self) -> float:
        """Score of the kept model; NaN without a score function."""
        return dict(self.scores).get(self.best_step, math.nan)

    def state_dict(self) -> dict[str, Any]:
        """Everything as numbers and tensors."""
        return {**vars(self), "losses": torch.tensor(self.losses, dtype=torch.float64)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict`."""
        vars(self).update(state, losses=state["losses"].tolist())


class Best:
    """The best state dict so far, on its own memory; without ``score`` nothing is kept but the last step's number."""

    def __init__(self, model: nn.Module, score: Callable[[nn.Module], float] | None, history: History) -> None:
        self.model, self.score, self.history = prepared_part(model), score, history
        self.scored = model.module if isinstance(model, DistributedDataParallel) else model
        self.state: dict[str, Tensor] | None = None

    def consider(self, step: int) -> None:
        """Score the model after ``step`` steps (the mean over ranks) and keep it if it is the best."""
        if self.score is None:
            self.history.best_step = step
            return
        self.scored.eval()
        device = next(self.model.parameters()).device
        value = mean_over_ranks(float(self.score(self.scored)), device)
        if math.isnan(value):
            raise TrainingError(f"score returned NaN at step {step}; it must return a number, larger is better")
        best = self.history.best_score
        self.history.scores.append((step, value))
        if self.state is None or value > best:
            self.history.best_step = step
            self.state = {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()}

    def restore(self) -> None:
        """Put the best state into the model."""
        if self.state is not None:
            self.model.load_state_dict(self.state)

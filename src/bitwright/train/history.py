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
from bitwright.observe.ranks import world_size
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


Score = Callable[[nn.Module], float | Tensor]
_CHANCE = 1.645  # standard errors: one-sided, 95 %


class Best:
    """The state dict to keep so far, on its own memory; without ``score`` only the last step's number is kept.

    A score that is one number is compared as it is. From scores of single items ``[items]`` chance is told from
    progress: the state with the highest of many noisy scores is often a lucky one from the middle of training, so a
    later state is kept unless its items are worse than those of the highest score with 95 % confidence (paired), or
    worse on average than the start.
    """

    def __init__(self, model: nn.Module, score: Score | None, history: History) -> None:
        self.model, self.score, self.history = prepared_part(model), score, history
        self.scored = model.module if isinstance(model, DistributedDataParallel) else model
        self.state: dict[str, Tensor] | None = None
        self.highest: Tensor | None = None  # items of the highest score

    def consider(self, step: int) -> None:
        """Score the model after ``step`` steps (the mean over ranks) and keep it if it is the best."""
        if self.score is None:
            self.history.best_step = step
            return
        self.scored.eval()
        device = next(self.model.parameters()).device
        items = torch.as_tensor(self.score(self.scored), dtype=torch.float64, device=device).flatten()
        value = mean_over_ranks(items.mean().item(), device)
        if math.isnan(value):
            raise TrainingError(f"score returned NaN at step {step}; it must return a number, larger is better")
        scores = [score for _, score in self.history.scores]
        self.history.scores.append((step, value))
        if not scores or value > max(scores) or (value >= scores[0] and self._by_chance(items, device)):
            self.history.best_step = step
            self.state = {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()}
        if not scores or value > max(scores):
            self.highest = items

    def _by_chance(self, items: Tensor, device: torch.device) -> bool:
        """Whether items may be worse than those of the highest score by chance only."""
        if items.numel() < 2 or self.highest is None or items.shape != self.highest.shape:
            return False
        gain = items - self.highest
        mean = mean_over_ranks(gain.mean().item(), device)
        variance = mean_over_ranks((gain.var() / gain.numel()).item(), device) / world_size()
        return mean + _CHANCE * math.sqrt(variance) >= 0

    def state_dict(self) -> dict[str, Any]:
        """The kept state and what later ones are compared with."""
        return {"state": self.state, "highest": self.highest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict`."""
        self.state, self.highest = state["state"], state["highest"]

    def restore(self) -> None:
        """Put the best state into the model."""
        if self.state is not None:
            self.model.load_state_dict(self.state)

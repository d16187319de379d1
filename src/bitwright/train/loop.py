"""`train`: a plain loop over a `Schedule` that keeps the best model seen, the calibrated start included."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bitwright.errors import TrainingError
from bitwright.train.schedule import Schedule


@dataclass
class History:
    """What training did: the loss of every step, (step, score) pairs, and the step whose weights were kept."""

    losses: list[float] = field(default_factory=list)
    scores: list[tuple[int, float]] = field(default_factory=list)
    best_step: int = 0

    @property
    def best_score(self) -> float:
        """Score of the kept model; NaN without a score function."""
        return dict(self.scores).get(self.best_step, math.nan)


def train(
    model: nn.Module,
    loss: Callable[[nn.Module, Any], Tensor],
    batches: Iterable[Any],
    *,
    schedule: Schedule,
    optimizer: torch.optim.Optimizer | None = None,
    score: Callable[[nn.Module], float] | None = None,
    score_every: int | None = None,
    on_step: Callable[[int, float], None] | None = None,
) -> History:
    """Quantization-aware training of a prepared and calibrated model, in place.

    ``loss(model, batch)`` returns a scalar; ``batches`` (a list or DataLoader, iterated again when exhausted) yields
    what it takes. ``score(model)``, larger is better, is asked at the start, every ``score_every`` steps (default: a
    tenth of the schedule) and at the end; the model ends with the best state seen, so never below its calibrated
    start. Score on data that is kept apart from the final test. ``on_step(step, loss)`` is for progress. An
    interrupt leaves the best state so far in the model. Raises `TrainingError` for a loss that is not finite and for
    batches that run out.
    """
    history = History()
    optimizer = schedule.optimizer(model) if optimizer is None else optimizer
    best = _Best(model, score, history)
    every = score_every or max(1, schedule.steps // 10)
    schedule.apply(model, 0, optimizer)
    best.consider(0)
    try:
        for step, batch in enumerate(_endless(batches, schedule.steps)):
            model.train()
            schedule.apply(model, step, optimizer)
            optimizer.zero_grad(set_to_none=True)
            value = loss(model, batch)
            _check_loss(value, step)
            value.backward()
            _clip_scales(optimizer)
            optimizer.step()
            history.losses.append(value.item())
            if on_step is not None:
                on_step(step, history.losses[-1])
            if (step + 1) % every == 0 or step + 1 == schedule.steps:
                best.consider(step + 1)
    finally:
        best.restore()
        model.eval()
    return history


class _Best:
    """The best state dict so far, on its own memory."""

    def __init__(self, model: nn.Module, score: Callable[[nn.Module], float] | None, history: History) -> None:
        self.model, self.score, self.history = model, score, history
        self.state: dict[str, Tensor] | None = None

    def consider(self, step: int) -> None:
        if self.score is None:
            self.history.best_step = step
            return
        self.model.eval()
        value = float(self.score(self.model))
        if math.isnan(value):
            raise TrainingError(f"score returned NaN at step {step}; it must return a number, larger is better")
        best = self.history.best_score
        self.history.scores.append((step, value))
        if self.state is None or value > best:
            self.history.best_step = step
            self.state = {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()}

    def restore(self) -> None:
        if self.state is not None:
            self.model.load_state_dict(self.state)


def _endless(batches: Iterable[Any], steps: int) -> Iterator[Any]:
    done = 0
    while done < steps:
        before = done
        for batch in batches:
            yield batch
            done += 1
            if done == steps:
                return
        if done == before:
            raise TrainingError(
                f"batches ran out after {done} of {steps} steps; pass a list or a DataLoader, which can be read again"
            )


def _check_loss(value: Tensor, step: int) -> None:
    if not isinstance(value, Tensor) or value.numel() != 1:
        raise TrainingError("loss(model, batch) must return a scalar tensor")
    if not value.requires_grad:
        raise TrainingError("loss has no gradient: is the forward inside torch.no_grad, or is everything frozen?")
    if not torch.isfinite(value):
        raise TrainingError(f"the loss is {value.item()} at step {step}; lower Schedule(lr=...) or check the batch")


def _clip_scales(optimizer: torch.optim.Optimizer) -> None:
    """Gradients of scales are clipped to norm 1: one wild batch must not move a range far."""
    scales = [p for p in optimizer.param_groups[-1]["params"] if p.grad is not None]
    if len(optimizer.param_groups) == 3 and scales:
        torch.nn.utils.clip_grad_norm_(scales, 1.0)

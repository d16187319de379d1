"""`Run`: everything that changes while `bitwright.train` runs, and what one step does to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bitwright.errors import NumericsError, TrainingError
from bitwright.train.amp import LossScale, finite_gradients
from bitwright.train.groups import ranges_of
from bitwright.train.history import Best, History, Score
from bitwright.train.parallel import any_rank
from bitwright.train.precision import own_bits, set_own_bits
from bitwright.train.schedule import Schedule
from bitwright.train.step import StepRules
from bitwright.train.stream import Stream

MOST_SKIPPED = 50  # in a row: beyond that nothing is learned any more

Loss = Callable[[nn.Module, Any], Tensor]


class Run:
    """One training run; ``done`` optimizer steps (skipped ones included) lie behind it."""

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        stream: Stream,
        schedule: Schedule,
        optimizer: torch.optim.Optimizer | None,
        score: Score | None,
        *,
        skip: bool,
        autocast: torch.dtype | None,
    ) -> None:
        schedule.check(model, optimizer)
        self.model, self.loss, self.stream, self.schedule = model, loss, stream, schedule
        self.skip, self.autocast = skip, autocast
        self.optimizer = schedule.optimizer(model) if optimizer is None else optimizer
        self.rules = StepRules(model, schedule, self.optimizer)
        self.prepared = self.rules.model
        self.history = History()
        self.best = Best(model, score, self.history)
        self.loss_scale = LossScale() if autocast is torch.float16 else None
        self.device = next(model.parameters()).device
        self.done = 0

    def consider(self) -> None:
        """Score the model, unless it has other bits than its plan or was scored at this step."""
        if self.done == self.schedule.steps:
            set_own_bits(self.prepared)
        scored = self.history.scores and self.history.scores[-1][0] == self.done
        if not scored and own_bits(self.prepared):
            self.best.consider(self.done)

    def restore_best(self) -> None:
        """Leave the best state, with the bits of the plan, in the model."""
        set_own_bits(self.prepared)
        self.best.restore()

    def step(self) -> None:
        """Read a batch and take one optimizer step; the loss goes to the history."""
        batch = self.stream.next(self.schedule.steps)
        self.model.train()
        self.rules.before(self.done)
        before = self._movable()
        self.optimizer.zero_grad(set_to_none=True)
        value, problem = self._backward(batch)
        if problem is None:
            self.rules.gradients()
            self.optimizer.step()
            self.rules.after(self.done)
        else:
            with torch.no_grad():
                for tensor, old in before:
                    tensor.copy_(old)
            self._skip(problem)
        self.history.losses.append(value)
        self.history.clamped = self.rules.clamped
        self.done += 1

    def _backward(self, batch: Any) -> tuple[float, str | None]:
        """The loss, and what is wrong with it or its gradients (on any rank)."""
        try:
            with torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None):
                value = self.loss(self.model, batch)
        except NumericsError as error:  # a live range met NaN or infinity
            any_rank(True, self.device)
            if not self.skip:
                raise
            return float("nan"), str(error)
        _check_loss(value)
        here = bool(torch.isfinite(value))
        if any_rank(not here, self.device):
            return value.item(), "the loss of another rank is not finite" if here else f"the loss is {value.item()}"
        factor = 1.0 if self.loss_scale is None else self.loss_scale.factor
        (value * factor if self.loss_scale is not None else value).backward()
        finite = not any_rank(not finite_gradients(self.model), self.device)
        if self.loss_scale is not None:
            self.loss_scale.unscale(self.model)
            self.loss_scale.update(finite)
        return value.item(), None if finite else "a gradient is NaN or infinite"

    def _skip(self, problem: str) -> None:
        overflow = self.loss_scale is not None and "gradient" in problem
        if not (self.skip or overflow):
            raise TrainingError(f"{problem} at step {self.done}; lower Schedule(lr=...) or check the batch")
        self.history.skipped.append(self.done)
        if self.history.skipped[-MOST_SKIPPED:] == list(range(self.done + 1 - MOST_SKIPPED, self.done + 1)):
            raise TrainingError(
                f"{problem} at step {self.done}, as in the {MOST_SKIPPED - 1} steps before; check the data"
            )

    def _movable(self) -> list[tuple[Tensor, Tensor]]:
        """What a forward alone can move (statistics, and ranges that follow the data), with copies."""
        found = [*self.model.buffers(), *ranges_of(self.prepared)]
        return [(tensor, tensor.detach().clone()) for tensor in found]

    def state_dict(self) -> dict[str, Any]:
        """The state of this rank, random numbers excepted."""
        return {
            "done": self.done,
            "model": self.prepared.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "history": self.history.state_dict(),
            "best": self.best.state_dict(),
            "rules": self.rules.state_dict(),
            "loss_scale": None if self.loss_scale is None else vars(self.loss_scale),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict`."""
        self.done = state["done"]
        self.prepared.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.history.load_state_dict(state["history"])
        self.best.load_state_dict(state["best"])
        self.rules.load_state_dict(state["rules"])
        if self.loss_scale is not None:
            vars(self.loss_scale).update(state["loss_scale"])


def _check_loss(value: Tensor) -> None:
    if not isinstance(value, Tensor) or value.numel() != 1:
        raise TrainingError("loss(model, batch) must return a scalar tensor")
    if not value.requires_grad:
        raise TrainingError("loss has no gradient: is the forward inside torch.no_grad, or is everything frozen?")

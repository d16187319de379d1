"""`ScheduleCallback`: a `Schedule` inside the Trainer of Lightning."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

from bitwright.errors import MissingExtraError, TrainingError
from bitwright.train.history import Best, History, Score
from bitwright.train.precision import own_bits, set_own_bits
from bitwright.train.schedule import Schedule
from bitwright.train.step import StepRules

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError as cause:
    raise MissingExtraError("lightning", "lightning", "training with the Trainer of Lightning") from cause


class ScheduleCallback(Callback):
    """Applies ``schedule`` at every optimizer step and, with ``score`` (larger is better), keeps the best state seen.

    The prepared model is the LightningModule or one of its attributes. Its ``configure_optimizers`` returns
    ``schedule.optimizer(model)`` or an optimizer over ``bitwright.param_groups(model)``, and no scheduler::

        Trainer(max_steps=schedule.steps, callbacks=[ScheduleCallback(schedule)])

    ``score(model)`` gets the prepared model at the start, every ``score_every`` optimizer steps (default: a tenth) and
    at the end. What it remembers travels in Lightning's own checkpoints. Raises `TrainingError` when the Trainer takes
    another number of steps than the schedule, or several optimizers.
    """

    def __init__(self, schedule: Schedule, *, score: Score | None = None, score_every: int | None = None) -> None:
        self.schedule, self.score = schedule, score
        self.score_every = score_every or max(1, schedule.steps // 10)
        self.history = History()
        self.rules: StepRules | None = None
        self.best: Best | None = None
        self._loaded: dict[str, Any] = {}
        self._done, self._begun = 0, -1

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check that Trainer, optimizer and schedule fit, and score the start."""
        planned = trainer.estimated_stepping_batches
        if planned != self.schedule.steps or len(trainer.optimizers) != 1:
            raise TrainingError(
                f"the Trainer takes {planned} steps with {len(trainer.optimizers)} optimizers, "
                f"the schedule {self.schedule.steps} with one; make them equal"
            )
        [optimizer] = trainer.optimizers
        self.schedule.check(pl_module, optimizer)
        self.rules, self.best = (
            StepRules(pl_module, self.schedule, optimizer),
            Best(pl_module, self.score, self.history),
        )
        self.best.scored = self.rules.model
        self._done = trainer.global_step
        if self._loaded:
            self.rules.load_state_dict(self._loaded["rules"])
            self.history.load_state_dict(self._loaded["history"])
            self.best.load_state_dict(self._loaded["best"])
        else:
            self.best.consider(self._done)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Set what trains in the next optimizer step, once per step however many batches it has."""
        assert self.rules is not None
        if trainer.global_step != self._begun:
            self._begun = trainer.global_step
            self.rules.model.train()
            self.rules.before(self._begun)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Clip the gradients of ranges."""
        assert self.rules is not None
        self.rules.gradients()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After an optimizer step, keep scales positive, and score the model where it is due."""
        assert self.rules is not None
        assert self.best is not None
        if trainer.global_step == self._done:  # gradients are being accumulated
            return
        self.rules.after(self._done)
        self._done, self.history.clamped = trainer.global_step, self.rules.clamped
        due = self._done % self.score_every == 0 and self._done != self.schedule.steps
        if due and own_bits(self.rules.model):
            self.best.consider(self._done)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Score the end and leave the best state in the model."""
        assert self.rules is not None
        assert self.best is not None
        set_own_bits(self.rules.model)
        self.best.consider(self._done)
        self.best.restore()
        self.rules.model.eval()

    def state_dict(self) -> dict[str, Any]:
        """What Lightning stores with its checkpoints."""
        if self.rules is None or self.best is None:
            return {}
        return {
            "rules": self.rules.state_dict(),
            "history": self.history.state_dict(),
            "best": self.best.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Kept until training starts."""
        self._loaded = state_dict

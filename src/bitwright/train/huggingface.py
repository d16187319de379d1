"""`ScheduleCallback`: a `Schedule` inside the Trainer of transformers."""

from __future__ import annotations

from typing import Any

from bitwright.errors import MissingExtraError, TrainingError
from bitwright.train.history import Best, History, Score
from bitwright.train.precision import own_bits, set_own_bits
from bitwright.train.schedule import Schedule
from bitwright.train.step import StepRules

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ImportError as cause:
    raise MissingExtraError("transformers", "transformers", "training with the Trainer of transformers") from cause


class ScheduleCallback(TrainerCallback):
    """Applies ``schedule`` at every optimizer step and, with ``score`` (larger is better), keeps the best state seen.

    Pass it with the optimizer of the schedule; the learning rate is the schedule's, whatever scheduler the Trainer
    makes::

        Trainer(model, args, train_dataset=..., callbacks=[ScheduleCallback(schedule)],
                optimizers=(schedule.optimizer(model), None))

    ``score(model)`` is asked at the start, every ``score_every`` optimizer steps (default: a tenth) and at the end. The
    model is left in eval mode. Raises `TrainingError` when the Trainer takes another number of steps than the schedule.
    """

    def __init__(self, schedule: Schedule, *, score: Score | None = None, score_every: int | None = None) -> None:
        self.schedule, self.score = schedule, score
        self.score_every = score_every or max(1, schedule.steps // 10)
        self.history = History()
        self.rules: StepRules | None = None
        self.best: Best | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check that Trainer, optimizer and schedule fit, and score the start."""
        if state.max_steps != self.schedule.steps:
            raise TrainingError(
                f"the Trainer takes {state.max_steps} steps, the schedule {self.schedule.steps}; make them equal"
            )
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        self.schedule.check(model, getattr(optimizer, "optimizer", optimizer))
        self.rules, self.best = StepRules(model, self.schedule, optimizer), Best(model, self.score, self.history)
        self.best.consider(state.global_step)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Set what trains in the next optimizer step."""
        assert self.rules is not None
        self.rules.model.train()
        self.rules.before(state.global_step)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Clip the gradients of ranges."""
        assert self.rules is not None
        self.rules.gradients()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Keep scales positive."""
        assert self.rules is not None
        self.rules.after(state.global_step)
        self.history.clamped = self.rules.clamped

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Score the model where it is due."""
        assert self.rules is not None
        assert self.best is not None
        due = state.global_step % self.score_every == 0 and state.global_step != self.schedule.steps
        if due and own_bits(self.rules.model):
            self.best.consider(state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Score the end and leave the best state in the model."""
        assert self.rules is not None
        assert self.best is not None
        set_own_bits(self.rules.model)
        self.best.consider(state.global_step)
        self.best.restore()
        self.rules.model.eval()

"""`StepRules`: what a `Schedule` asks for around each optimizer step, whoever writes the loop.

`bitwright.train`, the callbacks for Trainer and Lightning, and loops of users call the same three methods:
``before(step)``, then forward and backward, ``gradients()``, then the optimizer's step, ``after(step)``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from bitwright.errors import TrainingError
from bitwright.numerics.affine import EPS
from bitwright.train import adarange
from bitwright.train.folded import factors, follow
from bitwright.train.groups import prepared_part, ranges_of, scales_of
from bitwright.train.oscillation import OscillationTracker
from bitwright.train.parallel import average_gradients, average_statistics, is_sharded
from bitwright.train.precision import formats_of, restore_formats
from bitwright.train.schedule import Phase, Schedule


class StepRules:
    """The rules of ``schedule`` for ``model`` (or the prepared part of it), with what they have to remember.

    ``clamped`` counts scales that the optimizer had driven below float32 epsilon and that were put back there.
    """

    def __init__(
        self,
        model: nn.Module,
        schedule: Schedule,
        optimizer: torch.optim.Optimizer | None = None,
        *,
        max_norm: float = 1.0,
    ) -> None:
        self.model, self.schedule, self.optimizer = prepared_part(model), schedule, optimizer
        self.max_norm = max_norm
        self.clamped = 0
        self.factors: list[Tensor] | None = None  # of folded norms, between `before` and `after` of one step
        self.tracker: OscillationTracker | None = None
        if schedule.oscillation is not None:
            if is_sharded(model):
                raise TrainingError("Schedule(oscillation=...) needs whole weights; leave it out for sharded models")
            self.tracker = OscillationTracker(schedule.oscillation)

    def before(self, step: int) -> Phase:
        """Apply the schedule and let adaptive ranges choose their mode; before the forward."""
        phase = self.schedule.apply(self.model, step, self.optimizer)
        adarange.step(self.model, learn=phase is Phase.JOINT)
        self.factors = None if self.schedule.norms_frozen(step) else factors(self.model)
        return phase

    def gradients(self) -> None:
        """Average the gradients of learned ranges over ranks and clip them to norm ``max_norm``; after the backward.

        One wild batch must not move a range far.
        """
        learned = [p for p in ranges_of(self.model) if p.requires_grad]
        average_gradients(learned)
        found = [p for p in learned if p.grad is not None]
        if found:
            torch.nn.utils.clip_grad_norm_(found, self.max_norm)

    @torch.no_grad()
    def after(self, step: int) -> None:
        """Keep scales positive and in step with folded norms, ranks equal, what oscillates fixed; after the step."""
        phase = self.schedule.phase(step)
        if not self.schedule.norms_frozen(step):
            average_statistics(self.model)
        if self.factors is not None:
            follow(self.model, self.factors)
        if phase is Phase.JOINT:
            self.clamped += _clamp(scales_of(self.model))
        if self.tracker is not None:
            self.tracker.step(self.model, freeze=phase is Phase.FINETUNE)

    def state_dict(self) -> dict[str, Any]:
        """Everything remembered between steps beside the model's own state."""
        phase = getattr(self.model, "bitwright_phase", None)
        return {
            "phase": None if phase is None else phase.value,
            "sensitive": list(getattr(self.model, "bitwright_sensitive", [])),
            "trainable": sorted(getattr(self.model, "bitwright_trainable", ())),
            "clamped": self.clamped,
            "formats": formats_of(self.model),
            "weights": {} if self.tracker is None else self.tracker.weights,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict`."""
        model: Any = self.model
        model.bitwright_phase = None if state["phase"] is None else Phase(state["phase"])
        model.bitwright_sensitive = list(state["sensitive"])
        model.bitwright_trainable = frozenset(state["trainable"])
        self.clamped = state["clamped"]
        restore_formats(self.model, state["formats"])
        if self.tracker is not None:
            device = next(self.model.parameters()).device
            self.tracker.weights = {
                name: {key: value.to(device) for key, value in seen.items()} for name, seen in state["weights"].items()
            }


def _clamp(scales: list[nn.Parameter]) -> int:
    if not scales:
        return 0
    own = [scale.to_local() if isinstance(scale, DTensor) else scale for scale in scales]
    low = int(torch.stack([(scale < EPS).sum() for scale in own]).sum())
    if low:
        for scale in own:
            scale.clamp_(min=EPS)
    return low

"""`Schedule`: the three phases of quantization-aware training, usable in any loop.

========= ====== ================== ============= ================= ================
phase     share  weights            ranges        batch norm stats  who trains
========= ====== ================== ============= ================= ================
WARMUP    25 %   train              fixed         updating          everything
JOINT     50 %   train              by their rule updating          everything
FINETUNE  25 %   sensitive layers   frozen        frozen            sensitive layers
========= ====== ================== ============= ================= ================

The rule of a range (LSQ, LSQ+, PACT, EMA, AdaRange) is the plan's, see `nn.ranges`. A norm that is folded into a weight
is part of the weight's range: `train.folded` keeps both in step, and its gamma is frozen with its statistics. The
learning rate starts at 1 % of the original training's initial rate and falls along a cosine to 0.01 % of it.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from bitwright.errors import TrainingError
from bitwright.nn.layer import QLayer, Simulated
from bitwright.train.folded import folded_gammas
from bitwright.train.groups import (
    check_optimizer,
    check_ready,
    param_groups,
    prepared_part,
    quantizers_of,
    ranges_of,
    trainable_names,
    weight_errors,
)
from bitwright.train.oscillation import Oscillation
from bitwright.train.precision import Precision, set_bits
from bitwright.train.relative import make_relative


class Phase(enum.Enum):
    """Where a step stands in the schedule."""

    WARMUP = "warm-up"
    JOINT = "joint"
    FINETUNE = "fine-tune"


@dataclass(frozen=True, slots=True)
class Schedule:
    """Phases and learning rate over ``steps`` optimizer steps.

    ``lr`` is the initial rate of the *original* training (QAT uses 1 % to 0.01 % of it). ``shares`` are the lengths
    of the three phases. ``ramp`` is the share of steps over which the rate rises linearly at the start. In the last
    phase the layers that make up the first ``keep`` of the summed sensitivity go on training; ``sensitivity`` maps
    module paths to scores, by default the relative squared error of each quantized weight. ``freeze_norms`` is the
    share of steps after which batch norm statistics stay (default: the end of the joint phase; it may come earlier).
    ``precision`` changes bits on the way (`Progressive`, `Cyclic`), ``oscillation`` freezes weights that flip between
    two codes (`Oscillation`). Raises `TrainingError` for values that make no sense.

    >>> schedule = Schedule(steps=100, lr=0.1)
    >>> [schedule.phase(step).value for step in (0, 30, 99)]
    ['warm-up', 'joint', 'fine-tune']
    """

    steps: int
    lr: float = 0.1
    shares: tuple[float, float, float] = (0.25, 0.5, 0.25)
    ramp: float = 0.02
    keep: float = 0.8
    sensitivity: Mapping[str, float] | None = None
    freeze_norms: float | None = None
    precision: Precision | None = None
    oscillation: Oscillation | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "shares", tuple(self.shares))
        if self.sensitivity is not None:
            object.__setattr__(self, "sensitivity", dict(self.sensitivity))  # later changes must not reach a run
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            raise TrainingError(f"a schedule needs at least 1 step, got {self.steps}")
        total = sum(self.shares)
        if len(self.shares) != 3 or not min(self.shares) >= 0 or not math.isclose(total, 1.0, abs_tol=1e-6):
            raise TrainingError(f"the shares of the three phases must add up to 1, got {self.shares}")
        if not 0 < self.lr < math.inf or not 0 < self.keep <= 1 or not 0 <= self.ramp < 1:
            raise TrainingError(
                f"expected lr > 0, 0 < keep <= 1, 0 <= ramp < 1; got {self.lr}, {self.keep}, {self.ramp}"
            )
        for path, score in (self.sensitivity or {}).items():
            if not 0 <= score < math.inf:
                raise TrainingError(f"a sensitivity is finite and not negative, got {score} for {path!r}")
        self._check_ends()

    def _check_ends(self) -> None:
        """What changes ranges or statistics must have ended when the last phase freezes them."""
        end = self.shares[0] + self.shares[1] + 1e-6
        if self.freeze_norms is not None and not 0 <= self.freeze_norms <= end:
            raise TrainingError(
                f"freeze_norms must lie between 0 and the end of the joint phase ({end:.3g}), got {self.freeze_norms}"
            )
        if self.precision is not None and self.precision.until > end:
            raise TrainingError(
                f"bits must not change after the joint phase, which ends at {end:.3g}; got until={self.precision.until}"
            )

    def phase(self, step: int) -> Phase:
        """The phase of a step (0-based); steps past the end stay in the last phase."""
        if step < 0:
            raise TrainingError(f"steps count from 0, got {step}")
        joint, finetune = self._ends()
        return Phase.WARMUP if step < joint else Phase.JOINT if step < finetune else Phase.FINETUNE

    def _ends(self) -> tuple[int, int]:
        joint, finetune = (round(sum(self.shares[:n]) * self.steps) for n in (1, 2))
        return joint, finetune

    def norms_frozen(self, step: int) -> bool:
        """Whether batch norm statistics stay as they are at a step."""
        end = self._ends()[1]
        return step >= (end if self.freeze_norms is None else min(end, round(self.freeze_norms * self.steps)))

    def lr_at(self, step: int) -> float:
        """Learning rate of a step: linear ramp, then cosine from ``0.01 * lr`` to ``0.0001 * lr``."""
        start, end = 0.01 * self.lr, 0.0001 * self.lr
        progress = min(max(step, 0) / max(self.steps - 1, 1), 1.0)
        rate = end + (start - end) * 0.5 * (1 + math.cos(math.pi * progress))
        ramp = int(self.ramp * self.steps)
        return rate * (step + 1) / (ramp + 1) if step < ramp else rate

    def optimizer(self, model: nn.Module, *, momentum: float = 0.9, weight_decay: float = 1e-4) -> torch.optim.SGD:
        """SGD over `param_groups`; under Adam, learned ranges move as `train.relative` says."""
        return torch.optim.SGD(param_groups(model, weight_decay), lr=self.lr_at(0), momentum=momentum)

    def apply(self, model: nn.Module, step: int, optimizer: torch.optim.Optimizer | None = None) -> Phase:
        """Set what trains, what is frozen, the bits and the learning rate for a step.

        Call it before every step (or epoch); ``model.train()`` and ``model.eval()`` may be called before or after. The
        schedule decides what trains: ``requires_grad`` that you toggle between steps is set again. Parameters that were
        frozen before the first call stay frozen.

        Raises `TrainingError` for a model that is not prepared and calibrated, for an optimizer that was built for
        another model or before `prepare`, and inside ``torch.no_grad``.
        """
        model = prepared_part(model)
        check_ready(model)
        phase = self.phase(step)
        if getattr(model, "bitwright_phase", None) is not phase:
            self.check(model, optimizer)
            sensitive = self.sensitive_layers(model) if phase is Phase.FINETUNE else []
            model.bitwright_sensitive, model.bitwright_phase = sensitive, phase  # type: ignore[assignment]
        self._select(model, phase, self.norms_frozen(step))
        _freeze_norms(model, self.norms_frozen(step))
        if self.precision is not None:
            set_bits(model, self.precision, step, self.steps)
        if optimizer is not None:
            make_relative(model, optimizer)
            for group in optimizer.param_groups:
                _set_rate(group, self.lr_at(step))
        return phase

    def check(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Raise what `apply` raises, and change nothing."""
        if not torch.is_grad_enabled():
            raise TrainingError("Schedule.apply was called without gradients; leave torch.no_grad to train")
        model = prepared_part(model)
        check_ready(model)
        known = dict(model.named_modules())
        for path in self.sensitivity or ():
            if path not in known:
                raise TrainingError(f"Schedule(sensitivity=...) names {path!r}, but the model has no such module")
        if optimizer is not None:
            check_optimizer(model, optimizer, ranges=self.shares[1] > 0)

    def _select(self, model: nn.Module, phase: Phase, norms_frozen: bool) -> None:
        trainable, ranges = trainable_names(model), {id(parameter) for parameter in ranges_of(model)}
        paths: Any = model.bitwright_sensitive
        kept = {id(parameter) for path in paths for parameter in _own_parameters(model, path)}
        fixed = {id(gamma) for gamma in folded_gammas(model)} if norms_frozen else set()
        for name, parameter in model.named_parameters():
            if id(parameter) in ranges:
                _set_trainable(parameter, phase is Phase.JOINT)
            else:
                moves = name in trainable and id(parameter) not in fixed
                _set_trainable(parameter, moves and (phase is not Phase.FINETUNE or id(parameter) in kept))
        for quantizer in quantizers_of(model):
            quantizer.freeze_range = phase is not Phase.JOINT

    def sensitive_layers(self, model: nn.Module) -> list[str]:
        """Paths of the layers that go on training in the last phase, most sensitive first."""
        scores = dict(self.sensitivity) if self.sensitivity is not None else weight_errors(model)
        total, found, summed = sum(scores.values()), [], 0.0
        for path, score in sorted(scores.items(), key=lambda item: -item[1]):
            if summed >= self.keep * total and found:
                break
            found.append(path)
            summed += score
        return found


def _own_parameters(model: nn.Module, path: str) -> Iterator[nn.Parameter]:
    layer = model.get_submodule(path)
    return layer.own_parameters() if isinstance(layer, Simulated) else layer.parameters(recurse=False)


def _set_trainable(parameter: nn.Parameter, value: bool) -> None:
    if parameter.requires_grad is not value:
        parameter.requires_grad_(value)
    if not value:
        parameter.grad = None  # a stale gradient would still move it


def _set_rate(group: dict[str, Any], rate: float) -> None:
    if isinstance(group["lr"], torch.Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate


def _freeze_norms(model: nn.Module, frozen: bool) -> None:
    """Frozen statistics stay whatever ``model.train()`` does: norms that no layer holds leave training as they run."""
    for module in model.modules():
        if isinstance(module, QLayer):
            module.freeze_norm = frozen
        if isinstance(module, _BatchNorm):
            hooks = [key for key, hook in module._forward_pre_hooks.items() if hook is _stay_in_eval]
            if frozen:
                module.eval()
            if frozen and not hooks:
                module.register_forward_pre_hook(_stay_in_eval)
            for key in () if frozen else hooks:
                del module._forward_pre_hooks[key]


def _stay_in_eval(module: nn.Module, _: Any) -> None:
    module.eval()

"""`Schedule`: the three phases of quantization-aware training, usable in any loop.

========= ====== ================== ============= ================= ================
phase     share  weights            scales        batch norm stats  who trains
========= ====== ================== ============= ================= ================
WARMUP    25 %   train              fixed         updating          everything
JOINT     50 %   train              learned (LSQ) updating          everything
FINETUNE  25 %   sensitive layers   frozen        frozen            sensitive layers
========= ====== ================== ============= ================= ================

The learning rate starts at 1 % of the original training's initial rate and falls along a cosine to 0.01 % of it.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from bitwright.errors import TrainingError
from bitwright.flow.prepare import plan_of
from bitwright.nn.layer import QLayer
from bitwright.nn.quantizer import Quantizer, Stage


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
    module paths to scores, by default the relative squared error of each quantized weight.

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

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise TrainingError(f"a schedule needs at least 1 step, got {self.steps}")
        if min(self.shares) < 0 or not math.isclose(sum(self.shares), 1.0, abs_tol=1e-6):
            raise TrainingError(f"the shares of the three phases must add up to 1, got {self.shares}")
        if not self.lr > 0 or not 0 < self.keep <= 1 or not 0 <= self.ramp < 1:
            raise TrainingError(
                f"expected lr > 0, 0 < keep <= 1, 0 <= ramp < 1; got {self.lr}, {self.keep}, {self.ramp}"
            )

    def phase(self, step: int) -> Phase:
        """The phase of a step (0-based); steps past the end stay in the last phase."""
        joint, finetune = (round(sum(self.shares[:n]) * self.steps) for n in (1, 2))
        return Phase.WARMUP if step < joint else Phase.JOINT if step < finetune else Phase.FINETUNE

    def lr_at(self, step: int) -> float:
        """Learning rate of a step: linear ramp, then cosine from ``0.01 * lr`` to ``0.0001 * lr``."""
        start, end = 0.01 * self.lr, 0.0001 * self.lr
        progress = min(max(step, 0) / max(self.steps - 1, 1), 1.0)
        rate = end + (start - end) * 0.5 * (1 + math.cos(math.pi * progress))
        ramp = int(self.ramp * self.steps)
        return rate * (step + 1) / (ramp + 1) if step < ramp else rate

    def optimizer(self, model: nn.Module, *, momentum: float = 0.9, weight_decay: float = 1e-4) -> torch.optim.SGD:
        """SGD over `param_groups`; Adam would rescale away the gradient gain of learned scales."""
        return torch.optim.SGD(param_groups(model, weight_decay), lr=self.lr_at(0), momentum=momentum)

    def apply(self, model: nn.Module, step: int, optimizer: torch.optim.Optimizer | None = None) -> Phase:
        """Set what trains, what is frozen and the learning rate for a step.

        Call it before every step (or epoch), after ``model.train()``.

        Raises `TrainingError` for a model that is not prepared and calibrated.
        """
        _check_ready(model)
        phase = self.phase(step)
        if getattr(model, "bitwright_phase", None) is not phase:
            self._enter(model, phase)
        if phase is Phase.FINETUNE:
            for module in model.modules():
                if isinstance(module, _BatchNorm):  # those that no layer holds: model.train() has set them updating
                    module.eval()
        if optimizer is not None:
            for group in optimizer.param_groups:
                group["lr"] = self.lr_at(step)
        return phase

    def _enter(self, model: nn.Module, phase: Phase) -> None:
        _check_paths(model, self.sensitivity or ())
        trainable = _trainable(model)
        sensitive = set(self.sensitive_layers(model)) if phase is Phase.FINETUNE else set()
        kept = {id(parameter) for path in sensitive for parameter in _own_parameters(model, path)}
        scales = {id(parameter) for parameter in _scales(model)}
        for name, parameter in model.named_parameters():
            if id(parameter) in scales:
                _set_trainable(parameter, phase is Phase.JOINT)
            elif name in trainable:
                _set_trainable(parameter, phase is not Phase.FINETUNE or id(parameter) in kept)
        for module in model.modules():
            if isinstance(module, QLayer):
                module.freeze_norm = phase is Phase.FINETUNE
        model.bitwright_phase = phase  # type: ignore[assignment]

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


@torch.no_grad()
def weight_errors(model: nn.Module) -> dict[str, float]:
    """``{path: |Q(W) - W|^2 / |W|^2}`` for every layer with a quantized weight."""
    errors = {}
    for path, module in model.named_modules():
        if isinstance(module, QLayer) and module.weight_quantizer is not None:
            weight = module.folded()[0]
            noise = (module.weight_quantizer.simulate(weight) - weight).square().sum()
            errors[path] = (noise / weight.square().sum().clamp(min=1e-30)).item()
    return errors


def param_groups(model: nn.Module, weight_decay: float = 1e-4) -> list[dict[str, object]]:
    """Three optimizer groups: weights (with decay), biases and norms (without), quantizer scales (without).

    Scales are listed although they train only in the joint phase. Parameters that you froze yourself are left out.
    """
    scales = list(_scales(model))
    taken = {id(parameter) for parameter in scales}
    trainable = _trainable(model)
    own = [p for name, p in model.named_parameters() if name in trainable and id(p) not in taken]
    return [
        {"params": [p for p in own if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in own if p.dim() <= 1], "weight_decay": 0.0},
        {"params": scales, "weight_decay": 0.0},
    ]


def _scales(model: nn.Module) -> Iterator[nn.Parameter]:
    """Every learnable scale once; float formats have none, codebooks keep theirs fixed."""
    seen: set[int] = set()
    for module in model.modules():
        if isinstance(module, Quantizer) and module.scale is not None and module.spec.format.is_integer:
            if id(module.scale) not in seen:
                seen.add(id(module.scale))
                yield module.scale


def _trainable(model: nn.Module) -> frozenset[str]:
    """Names of the parameters that were trainable when training was set up: what the user froze stays frozen."""
    names = getattr(model, "bitwright_trainable", None)
    if names is None:
        names = frozenset(name for name, p in model.named_parameters() if p.requires_grad)
        model.bitwright_trainable = names  # type: ignore[assignment]
    return names


def _own_parameters(model: nn.Module, path: str) -> Iterator[nn.Parameter]:
    layer = model.get_submodule(path)
    yield from layer.parameters(recurse=False)
    if isinstance(layer, QLayer) and layer.norm:
        yield from layer.norm[0].parameters()


def _set_trainable(parameter: nn.Parameter, value: bool) -> None:
    parameter.requires_grad_(value)
    if not value:
        parameter.grad = None  # a stale gradient would still move it


def _check_paths(model: nn.Module, paths: Iterable[str]) -> None:
    known = dict(model.named_modules())
    for path in paths:
        if path not in known:
            raise TrainingError(f"Schedule(sensitivity=...) names {path!r}, but the model has no such module")


def _check_ready(model: nn.Module) -> None:
    plan_of(model)
    quantizers = [module for module in model.modules() if isinstance(module, Quantizer)]
    if not quantizers:
        raise TrainingError("this model has no simulated layers: it was converted already; train the prepared model")
    waiting = [q.site for q in quantizers if q.stage is not Stage.SIMULATE]
    if waiting:
        raise TrainingError(f"{waiting[0]} has no scale yet; call bitwright.calibrate before training")

"""The versions of a model that `matrix` compares: calibrated, trained, and with bits that differ by layer."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map

from bitwright.algorithms.pipeline import calibrate
from bitwright.claims.scores import Score, scores_of
from bitwright.costs.cost import layer_cost, plan_bytes, work_of
from bitwright.errors import SearchError
from bitwright.flow.prepare import prepare
from bitwright.plan.plan import Plan
from bitwright.plan.step import Step
from bitwright.search.budget import Budget
from bitwright.search.mixed import mixture, with_allocation
from bitwright.search.sensitivity import sensitivity
from bitwright.train.loop import train
from bitwright.train.schedule import Schedule

BITS = (2, 3, 4, 5, 6, 8)


@dataclass(frozen=True)
class Training:
    """What the trained version needs: ``loss(model, batch)``, batches, a schedule, data to choose the best state by."""

    loss: Callable[[nn.Module, Any], Tensor]
    batches: Sequence[Any]
    schedule: Schedule
    validation: Sequence[Any] = ()


@dataclass(frozen=True)
class Contenders:
    """Makes simulated versions of one float model from one set of calibration inputs.

    The second of the two ``presets`` is the narrow one: that is trained, and its bytes are the limit of the mixed one.
    """

    model: nn.Module
    inputs: Sequence[Any]
    presets: tuple[str, str]
    steps: tuple[Step | str, ...]
    target: str
    training: Training | None
    score: Score
    work: Path | None

    def check(self) -> None:
        """Raise now what would end the last version: `SearchError` for too little data and for other presets."""
        if len(self.inputs) < 2:
            raise SearchError(
                f"mixed precision needs at least 2 calibration batches, got {len(self.inputs)}; split them"
            )
        choices_of(self._plan(self.presets[1]))

    def makers(self) -> dict[str, Callable[[], nn.Module]]:
        """Functions that make the versions, by name, from the cheapest to the most expensive one."""
        found: dict[str, Callable[[], nn.Module]] = {
            f"PTQ {preset}": lambda preset=preset: self._calibrated(self._plan(preset)) for preset in self.presets
        }
        if self.training is not None:
            found[f"QAT {self.presets[1]}"] = self._trained
        return found | {f"mixed {self.presets[1]}": self._mixed}

    def _plan(self, preset: str) -> Plan:
        return Plan.preset(preset, self.model, self.inputs[0], target=self.target, steps=self.steps)

    def _calibrated(self, plan: Plan) -> nn.Module:
        prepared = prepare(self.model, plan)
        calibrate(prepared, self.inputs)
        return prepared

    def _trained(self) -> nn.Module:
        assert self.training is not None
        how, prepared = self.training, self._calibrated(self._plan(self.presets[1]))

        def judge(model: nn.Module) -> Tensor:
            return scores_of(model, "the trained model", how.validation, self.score)

        place = None if self.work is None else self.work / "training"
        score = judge if how.validation else None
        train(prepared, how.loss, how.batches, schedule=how.schedule, score=score, checkpoint=place)
        return prepared

    def _mixed(self) -> nn.Module:
        plan = self._plan(self.presets[1])
        limit = plan_bytes(self.model, plan)
        place = None if self.work is None else self.work / "harm.json"
        harm = sensitivity(self.model, plan, self.inputs, choices_of(plan), work=place)
        found = mixture(self.model, plan, one_item(self.inputs[0]), harm).allocate(Budget(bytes=limit))
        return self._calibrated(
            with_allocation(plan, found, f"chosen by allocation: least harm within {limit:,} bytes")
        )


def choices_of(plan: Plan) -> dict[str, list[str]]:
    """Every weight with an integer spec, and that spec at all of `BITS`.

    Raises `SearchError` for a plan without such weights.
    """
    found = {}
    for site, spec in plan.sites.items():
        if site.is_weight and spec is not None and re.match(r"int\d+/", str(spec)):
            found[str(site)] = [re.sub(r"^int\d+", f"int{bits}", str(spec)) for bits in BITS]
    if not found:
        raise SearchError("mixed precision needs weights with integer specs, and the preset gives none; use w4a8, w4a4")
    return found


def one_item(batch: Any) -> Any:
    """The first item of a batch of inputs."""
    return tree_map(lambda leaf: leaf[:1] if isinstance(leaf, Tensor) and leaf.dim() else leaf, batch)


def bit_operations(model: nn.Module, plan: Plan | None, example: Any) -> float:
    """Multiplications times both widths in bits, over one forward on ``example``; without a plan those of float.

    >>> import torch
    >>> bit_operations(nn.Sequential(nn.Linear(8, 4)), None, torch.zeros(1, 8)) == 8 * 4 * 32 * 32
    True
    """
    modules, sites, total = dict(model.named_modules()), {} if plan is None else plan.sites, 0.0
    for path, work in work_of(model, example).items():
        own = {site.slot: spec for site, spec in sites.items() if site.path == path}
        total += layer_cost(modules[path], work, own).bops
    return total

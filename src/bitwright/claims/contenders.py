"""The versions of a model that `matrix` compares: calibrated, trained, and with bits that differ by layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from bitwright.algorithms.pipeline import calibrate
from bitwright.claims.scores import Score, scores_of
from bitwright.costs.cost import layer_cost, plan_bytes, work_of
from bitwright.flow.prepare import prepare
from bitwright.harm.sensitivity import sensitivity
from bitwright.plan.plan import Plan
from bitwright.plan.step import Step
from bitwright.search.budget import Budget
from bitwright.search.mixed import choices_of, mixture, one_item
from bitwright.search.mixed_trials import mixed, split
from bitwright.train.loop import train
from bitwright.train.training import Training


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
        split(self.inputs)
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
        """The best plan of the narrow one's bytes as a whole on the last third of the inputs, calibrated on all."""
        plan, (inputs, judge) = self._plan(self.presets[1]), split(self.inputs)
        places = [None if self.work is None else self.work / name for name in ("harm.json", "trials")]
        harm = sensitivity(self.model, plan, inputs, choices_of(plan), work=places[0])
        choices = mixture(self.model, plan, one_item(inputs[0]), harm)
        limit = Budget(bytes=plan_bytes(self.model, plan))
        found = mixed(self.model, plan, inputs, choices, limit, judge=judge, work=places[1])
        return self._calibrated(found.best.plan)


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

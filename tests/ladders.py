"""A small search that the tests share, and the same one as a program: ``python ladders.py FOLDER``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bitwright.plan.plan import Plan
from bitwright.search.journal import Trial
from bitwright.search.judge import PairedJudge, PointJudge
from bitwright.search.ladder import Climb, Goal, Rung, Task, candidates, climb, known_rungs

RUNGS = known_rungs(("nearest", "bias correction"))


class Net(nn.Sequential):
    """A classifier whose last layer stays in float; three hidden layers can be moved to 8 bits."""

    def __init__(self) -> None:
        widths, layers = (16, 48, 48, 48, 48, 4), []
        for inputs, outputs in pairwise(widths):
            layers += [nn.Linear(inputs, outputs), nn.ReLU()]
        super().__init__(*layers[:-1])


def made(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    net = Net().eval()
    for layer in net:
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_normal_(layer.weight)  # torch's own start gives next to constant answers
            nn.init.zeros_(layer.bias)
    return net


def data(count: int = 4, seed: int = 1, size: int = 64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, 16, generator=generator) for _ in range(count)]


def labelled(model: nn.Module, count: int = 40, seed: int = 2) -> list[tuple[Tensor, Tensor]]:
    """Batches of 100 items; the answers are the model's own, so that its score is 1."""
    with torch.no_grad():
        return [(x, model(x).argmax(1)) for x in data(count, seed, 100)]


def right(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (model(batch[0]).argmax(1) == batch[1]).float()


def accuracy(model: nn.Module) -> Callable[[nn.Module], float]:
    batches = labelled(model, 10)
    return lambda m: torch.cat([right(m, batch) for batch in batches]).mean().item()


def task(model: nn.Module, goal: Goal, preset: str = "w4a4", **changes: Any) -> Task:
    batches = changes.pop("batches", data())
    plan = Plan.preset(preset, model, batches[0], observers={"weight": "minmax", "input": "minmax"}, **changes)
    return Task(model, plan, batches, batches[0], goal)


def paired(model: nn.Module, max_drop: float | None = 0.1, rungs: Sequence[Rung] = RUNGS, **changes: Any) -> Climb:
    """A climb that scores items."""
    this = task(model, Goal(max_drop), **{k: changes.pop(k) for k in ("preset", "batches") if k in changes})
    evaluation, score = changes.pop("evaluation", labelled(model)), changes.pop("score", right)
    judge = PairedJudge(model, score, evaluation, max_drop, (0.0, 1.0), candidates(this.plan, rungs))
    return climb(this, judge, rungs, **changes)


def pointwise(model: nn.Module, goal: Goal, rungs: Sequence[Rung] = RUNGS, **changes: Any) -> Climb:
    """A climb that compares two numbers."""
    this = task(model, goal, **{k: changes.pop(k) for k in ("preset",) if k in changes})
    return climb(this, PointJudge(model, accuracy(model), goal.max_drop), rungs, **changes)


def told(trials: Sequence[Trial]) -> list[tuple[Any, ...]]:
    """What trials found, without the time they took."""
    return [(t.name, t.holds, t.score, t.drop, t.low, t.high, t.items, t.bytes, t.error) for t in trials]


if __name__ == "__main__":
    torch.set_num_threads(1)
    found = paired(made(), 0.02, work=Path(sys.argv[1]), say=lambda text: print(text, flush=True))
    torch.save({"model": found.model.state_dict(), "told": told(found.trials)}, Path(sys.argv[1]).with_suffix(".pt"))

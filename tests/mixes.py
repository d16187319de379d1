"""A small joint flow that the tests share, and the same one as a program: ``python mixes.py FOLDER PREFIX COUNT``.

The program kills itself, as ``kill -9`` does, at the COUNT-th line that starts with PREFIX.
"""

from __future__ import annotations

import os
import signal
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bitwright as bw
from bitwright.costs.cost import plan_bytes
from bitwright.joint import Mix, mix_model

SPECS = {"*.weight": [f"int{bits}/channel" for bits in (2, 4, 8)]}


def net() -> nn.Module:
    torch.manual_seed(0)
    layers = [m for a, b in pairwise((6, 12, 12, 5)) for m in (nn.Linear(a, b), nn.Dropout(0.1), nn.Tanh())]
    return nn.Sequential(*layers[:-2]).eval()


def data(count: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(16, 6, generator=generator) for _ in range(count)]


def labelled(model: nn.Module, count: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    with torch.no_grad():
        return [(x, model(x).argmax(1)) for x in data(count, seed)]


def right(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (model(batch[0]).argmax(1) == batch[1]).float()


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def plan_of(model: nn.Module) -> bw.Plan:
    sites = {"*.weight": "int4/channel", "*.input": "uint8/asym"}
    observers = {"weight": "minmax", "input": "minmax"}
    return bw.Plan.preset("w4a8", model, data(1, 1)[0], sites=sites, observers=observers)


def training(model: nn.Module, steps: int = 10, **changes: Any) -> bw.Training:
    schedule = bw.Schedule(steps=steps, lr=1.0)
    given = {"loss": loss, "batches": labelled(model, 4, 5), "schedule": schedule, "validation": labelled(model, 4, 6)}
    return bw.Training(**(given | changes))


def budget(model: nn.Module) -> bw.Budget:
    return bw.Budget(bytes=plan_bytes(model, plan_of(model)) - 40)


def run(folder: Path, **changes: Any) -> Mix:
    model = changes.pop("model", None) or net()
    given = {"specs": SPECS, "training": training(model), "work": folder} | changes
    plan, batches = given.pop("plan", plan_of(model)), given.pop("batches", data(6, 1))
    return mix_model(model, plan, batches, given.pop("budget", budget(model)), **given)


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, prefix, count = sys.argv[1:]
    seen: list[str] = []

    def say(text: str) -> None:
        seen.extend([text] if text.startswith(prefix) else [])
        if len(seen) == int(count):
            os.kill(os.getpid(), signal.SIGKILL)

    run(Path(folder), say=say)

"""A training run as a program: ``python resumable.py FOLDER KIND``; it can be killed and started again."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bitwright.plan.plan import Plan
from bitwright.train.loop import train
from bitwright.train.oscillation import Oscillation
from bitwright.train.precision import Progressive
from bitwright.train.schedule import Schedule
from nets import calibrated

STEPS = 40


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 6, 3, bias=False), nn.BatchNorm2d(6)
        self.drop, self.fc = nn.Dropout(0.3), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.drop(self.norm(self.conv(x)).relu().mean((2, 3))))


class Noisy(torch.utils.data.Dataset[Any]):
    """Random augmentation from all three global sources."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(5)
        self.x = torch.randn(50, 1, 6, 6, generator=generator)
        self.y = (self.x.mean((1, 2, 3)) > 0).long()

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> Any:
        noise = random.gauss(0, 0.1) + float(np.random.normal(0, 0.1)) + 0.1 * torch.randn(1)
        return self.x[index] + noise, self.y[index]


def batches(kind: str) -> Any:
    data = Noisy()
    if kind == "list":
        return [(data.x[i : i + 8], data.y[i : i + 8]) for i in range(0, 50, 8)]
    if kind == "epochs":

        def of(epoch: int) -> Any:
            order = torch.randperm(50, generator=torch.Generator().manual_seed(epoch))
            return ((data.x[part], data.y[part]) for part in order.split(8))

        return of
    generator = torch.Generator().manual_seed(9) if kind == "generator" else None
    return torch.utils.data.DataLoader(data, 8, shuffle=True, generator=generator)


def start() -> nn.Module:
    torch.manual_seed(1)
    net, x = Net(), Noisy().x
    plan = Plan.preset("w4a8", net, x[:2], sites={"fc.weight": "int4/channel", "fc.input": "uint8/asym"})
    return calibrated(net, plan, [x])


def schedule(**changes: Any) -> Schedule:
    extra = {"precision": Progressive((8, 6), 0.5), "oscillation": Oscillation(0.02, 0.1)}
    return Schedule(**{"steps": STEPS, "lr": 3.0, **extra, **changes})


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


@torch.no_grad()
def score(model: nn.Module) -> float:
    data = Noisy()
    return -F.cross_entropy(model(data.x), data.y).item()


def result(model: nn.Module, history: Any) -> dict[str, Any]:
    return {
        "model": model.state_dict(),
        "losses": history.losses,
        "scores": history.scores,
        "best": history.best_step,
        "draws": torch.rand(3),
    }


def main(folder: str, kind: str) -> None:
    torch.set_num_threads(1)
    model = start()
    torch.manual_seed(2), random.seed(2), np.random.seed(2)
    history = train(
        model,
        loss,
        batches(kind),
        schedule=schedule(),
        optimizer=torch.optim.Adam(_groups(model), 1e-3) if kind == "generator" else None,
        score=score,
        score_every=4,
        checkpoint=folder if folder else None,
        checkpoint_every=3,
        on_step=lambda step, _: print(step, flush=True),
    )
    torch.save(result(model, history), Path(folder).with_suffix(".pt"))


def _groups(model: nn.Module) -> Any:
    from bitwright.train.groups import param_groups

    return param_groups(model)


if __name__ == "__main__":
    main(*sys.argv[1:])

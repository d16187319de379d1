"""A net whose layers are timed, and the same measurement as a program: ``python latency_nets.py FOLDER``."""

from __future__ import annotations

import sys

import torch
from torch import Tensor, nn

import bitwright as bw
from bitwright.costs.stopwatch import Timing

WIDTHS = ["int2/channel", "int4/channel", "int8/channel"]
SPECS = {"blocks.*.weight": WIDTHS, "out.weight": WIDTHS}


class Net(nn.Module):
    """Two equal convolutions with folded batch norms, a residual add, two linear layers of one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.blocks = nn.Conv2d(3, 4, 1), nn.ModuleList()
        for _ in range(2):
            self.blocks.append(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)))
        self.one, self.two, self.out = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = (block(x) + x).relu()
        return self.out(self.two(self.one(x.mean((2, 3))).relu()).relu())


def net() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


def example() -> Tensor:
    return torch.randn(1, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def plan_of(model: nn.Module) -> bw.Plan:
    sites = {"out.weight": "int8/channel", "out.input": "uint8/asym"}
    return bw.Plan.preset("w8a8", model, example(), sites=sites, observers={"weight": "minmax", "input": "minmax"})


def main() -> None:
    torch.set_num_threads(1)

    def say(key: str, row: Timing, done: int, total: int) -> None:
        print(key, flush=True)

    model = net()
    bw.measure_machine(model, plan_of(model), example(), SPECS, cache=sys.argv[1], seconds=0.0, on_row=say)


if __name__ == "__main__":
    main()

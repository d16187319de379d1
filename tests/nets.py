"""What the tests of the upper layers share: two published architectures, and the straight line in short."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bitwright.flow.calibrate import calibrate
from bitwright.flow.convert import convert
from bitwright.flow.prepare import prepare
from bitwright.kernels.cpu import cpu_features
from bitwright.nn.layer import QLayer
from bitwright.numerics.spec import QuantSpec
from bitwright.plan.plan import Plan
from bitwright.plan.site import Site, slots_of
from bitwright.train.schedule import Schedule

# Sets of CPU features under which `convert` takes other kernels; only those that this machine can run.
FEATURES = {
    name: features
    for name, features in {
        "reference": frozenset[str](),
        "portable": frozenset({"native"}),
        "avx2": frozenset({"native", "avx2"}),
        "best": cpu_features(),
    }.items()
    if features <= cpu_features()
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny products on two threads take five times the processor time that they take on one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions; the shortcut subsamples and pads with zero channels (He 2016, option A)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.grow = outputs - inputs
        self.conv1 = nn.Conv2d(inputs, outputs, 3, 2 if self.grow else 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        inner = F.relu(self.bn1(self.conv1(x)))
        shortcut = x
        if self.grow:
            shortcut = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.grow // 2, self.grow // 2))
        return F.relu(self.bn2(self.conv2(inner)) + shortcut)


class ResNet20(nn.Module):
    """ResNet20 for 32x32 images with the parameter names of the published CIFAR-10 checkpoints."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*(ResidualBlock(16, 16) for _ in range(3)))
        self.layer2 = nn.Sequential(ResidualBlock(16, 32), ResidualBlock(32, 32), ResidualBlock(32, 32))
        self.layer3 = nn.Sequential(ResidualBlock(32, 64), ResidualBlock(64, 64), ResidualBlock(64, 64))
        self.linear = nn.Linear(64, 10)

    def features(self, x: Tensor) -> Tensor:
        """Everything before the mean, whose order of summation is a compiler's choice."""
        return self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.features(x).mean((2, 3)))


class ConvNorm(nn.Module):
    """A convolution with bias and a batch norm; stride 2 pads right and bottom only, as TensorFlow does."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        inside = 0 if stride == 2 else kernel // 2
        self.border = (0, 1, 0, 1) if stride == 2 else (0, 0, 0, 0)
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, inside, groups=groups)
        self.bn = nn.BatchNorm2d(outputs, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(F.pad(x, self.border)))


class MobileNetV1(nn.Module):
    """MobileNetV1 of width 0.25 for 96x96 images, with the parameter names of the MLPerf Tiny checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvNorm(3, 8, 3, 2)
        widths = (8, 16, 32, 32, 64, 64, 128, 128, 128, 128, 128, 128, 256, 256)
        strides = (1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1)
        self.blocks = nn.ModuleList()
        for inputs, outputs, stride in zip(widths, widths[1:], strides, strict=False):
            self.blocks.append(ConvNorm(inputs, inputs, 3, stride, groups=inputs))
            self.blocks.append(ConvNorm(inputs, outputs, 1))
        self.fc = nn.Linear(256, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        for block in self.blocks:
            x = F.relu(block(x))
        return self.fc(x.mean((2, 3)))


def layer_plan(layer: nn.Module, weight: str, input: str | None = None) -> Plan:
    """The plan of a model that is a single layer."""
    sites = [Site("", slot) for slot in slots_of(layer)]
    specs = {site: weight if site.is_weight else input for site in sites}
    sites = {site: QuantSpec.parse(text) if text else None for site, text in specs.items()}
    return Plan("cpu", sites, {"weight": "minmax", "input": "minmax"})  # a search for the range is slow


def calibrated(model: nn.Module, plan: Plan | str, batches: list[Any]) -> nn.Module:
    """A simulated copy of ``model`` in eval mode; ``plan`` may be the name of a preset."""
    plan = Plan.preset(plan, model, batches[0]) if isinstance(plan, str) else plan
    prepared = prepare(model, plan)
    calibrate(prepared, batches)
    return prepared.eval()


def trained(simulated: nn.Module, batches: Iterable[Any], steps: int = 10, lr: float = 1.0) -> nn.Module:
    """The same model after ``steps`` optimizer steps through all three phases, in eval mode."""
    schedule = Schedule(steps=steps, lr=lr)
    optimizer = schedule.optimizer(simulated)
    batches = list(batches)
    for step in range(steps):
        simulated.train()
        schedule.apply(simulated, step, optimizer)
        optimizer.zero_grad()
        (simulated(batches[step % len(batches)]) - 0.1).square().mean().backward()
        optimizer.step()
    return simulated.eval()


@torch.no_grad()
def unequal_kernels(simulated: nn.Module, inputs: Iterable[Tensor]) -> list[str]:
    """Feature sets under which the shipped model is not, bit for bit, the simulated one on some of ``inputs``."""
    expected = [(x, simulated(x)) for x in inputs]
    assert all(out.isfinite().all() for _, out in expected)
    assert expected[0][1].abs().max() > 0
    unequal = []
    for name, features in FEATURES.items():
        shipped = convert(simulated, features=features)
        if not all(torch.equal(shipped(x), out) for x, out in expected):
            unequal.append(name)
    return unequal


def layers_of(model: nn.Module) -> dict[str, QLayer]:
    """The simulated layers of a model, by path."""
    return {path: module for path, module in model.named_modules() if isinstance(module, QLayer)}


def largest(model: nn.Module, x: Tensor, function: Callable[[Tensor], Tensor] = torch.abs) -> float:
    """The largest value of a function of a model's output."""
    with torch.no_grad():
        return function(model(x)).max().item()

"""Claim: the two image models of MLPerf Tiny keep their answers at W8A8 and W4A8 without training.

ResNet8 (CIFAR-10) takes pixels from 0 to 255: 78 % of JPEG training images right, 9 % on pixels from 0 to 1 and 14 %
with the normalisation of torchvision's models. It was trained on the images before JPEG, of which it gets more right.
MobileNetV1 0.25 (visual wake words) takes 0 to 1. Its images are not here: JPEG CIFAR-10 resized to 96x96 stands in,
so the figures say how well the shipped model follows the float one on such pictures, nothing about finding persons
(which float sees on a few of them only: judge by SQNR before the share of same answers).

Calibration: 512 training images; measured on 2,000 test images. First convolution and classifier have 8 bits, residual
adds are quantized, weights have a scale per channel, at "one scale" one per tensor. Same answer: share of images with
the same largest output; SQNR: of the outputs, in dB. Writes results/tiny_models.json.

    python benchmarks/tiny_models.py [--threads 1]
"""

from __future__ import annotations

import argparse
import time
from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bitwright as bw
from bitwright.errors import CalibrationError
from data import MEAN, STD, jpeg_cifar10, shared
from models import ConvNorm, MobileNetV1
from results import write

CALIBRATION, TEST = 512, 2000
SETTINGS = {"W8A8": "int8/channel", "W4A8": "int4/channel", "W8A8, one scale": "int8"}
RECIPES: dict[str, tuple[str, ...]] = {
    "nearest": (),
    "gptq, bias": ("gptq", "bias_correction"),
    "gptq, repair": ("gptq", "affine_repair"),
}
RESCUE: dict[str, tuple[str, ...]] = {"nearest": (), "cle": ("cle",), "cle, bias": ("cle", "bias_correction")}


class ResNet8(nn.Module):
    """ResNet8 for CIFAR-10 pixels from 0 to 255 (MLPerf Tiny's image classification): three blocks, 78 K parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.c0, self.c1, self.c2 = ConvNorm(3, 16, 3, 1), ConvNorm(16, 16, 3, 1), ConvNorm(16, 16, 3, 1)
        self.c3, self.c4, self.c5 = ConvNorm(16, 32, 3, 2), ConvNorm(32, 32, 3, 1), shortcut(16, 32)
        self.c6, self.c7, self.c8 = ConvNorm(32, 64, 3, 2), ConvNorm(64, 64, 3, 1), shortcut(32, 64)
        self.fc = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.c0(x))
        x = F.relu(x + self.c2(F.relu(self.c1(x))))
        x = F.relu(self.c5(x) + self.c4(F.relu(self.c3(x))))
        x = F.relu(self.c8(x) + self.c7(F.relu(self.c6(x))))
        return self.fc(x.mean((2, 3)))


def shortcut(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(OrderedDict(conv=nn.Conv2d(inputs, outputs, 1, 2)))


def pixels(split: str, count: int) -> tuple[Tensor, Tensor]:
    """JPEG CIFAR-10 images with values from 0 to 255, and labels."""
    x, labels = jpeg_cifar10(split, count)
    return ((x * STD + MEAN) * 255).round(), labels


def on_scale(x: Tensor, top: float) -> Tensor:
    """``x``, if its values fill the range from 0 to ``top``; raises `CalibrationError` otherwise."""
    low, high = x.min().item(), x.max().item()
    if low < 0 or not 0.9 * top <= high <= top or not 0.2 * top < x.mean().item() < 0.8 * top:
        raise CalibrationError(f"the model takes values from 0 to {top:g}, found {low:g} to {high:g}")
    return x


def shipped(model: nn.Module, setting: str, steps: tuple[str, ...], calibration: Tensor) -> tuple[nn.Module, float]:
    """The shipped model after all steps, and the seconds that choosing took."""
    torch.manual_seed(0)
    ends = "int8" if setting.endswith("one scale") else "int8/channel"
    weights = {"*.weight": SETTINGS[setting], "fc.weight": ends}
    weights["c0.conv.weight" if isinstance(model, ResNet8) else "stem.conv.weight"] = ends
    sites = weights | {"*.input*": "uint8/asym"}
    prepared = bw.prepare(model, bw.Plan.preset("w8a8", model, calibration[:2], sites=sites, steps=steps))
    start = time.perf_counter()
    bw.calibrate(prepared, calibration.split(64))
    return bw.convert(prepared), time.perf_counter() - start


@torch.no_grad()
def outputs(model: nn.Module, x: Tensor) -> Tensor:
    return torch.cat([model(part) for part in x.split(250)])


def compared(
    name: str, model: nn.Module, calibration: Tensor, x: Tensor, labels: Tensor | None, recipes: dict[str, list[str]]
) -> dict[str, dict[str, float]]:
    """One line per setting and recipe: the shipped model against the float one."""
    wanted, rows = outputs(model, x), dict[str, dict[str, float]]()
    for setting, chosen in recipes.items():
        for recipe in chosen:
            packed, seconds = shipped(model, setting, (RECIPES | RESCUE)[recipe], calibration)
            found = outputs(packed, x)
            same = (found.argmax(1) == wanted.argmax(1)).float().mean().item()
            sqnr = 10 * torch.log10(wanted.square().sum() / (wanted - found).square().sum()).item()
            row = {"same": same, "sqnr": sqnr, "seconds": seconds}
            line = f"{name:12s} {setting:16s} {recipe:13s} same {100 * same:6.2f} %  SQNR {sqnr:5.1f} dB"
            if labels is not None:
                drop = bw.paired_drop(*((out.argmax(1) == labels).float() for out in (wanted, found)))
                row |= {"drop": drop.drop, "low": drop.low, "high": drop.high}
                line += f"  drop {drop}"
            print(f"{line}  {seconds:.0f} s", flush=True)
            rows[f"{setting} {recipe}"] = row
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    torch.set_num_threads(parser.parse_args().threads)
    resnet, mobilenet = ResNet8(), MobileNetV1()
    bw.load_weights(resnet, shared("mlperf_tiny") / "resnet8.pt").eval()
    bw.load_weights(mobilenet, shared("mlperf_tiny") / "vww_mobilenetv1_025.pt").eval()
    (calibration, _), (x, labels) = pixels("train", CALIBRATION), pixels("test", TEST)
    calibration, x = on_scale(calibration, 255), on_scale(x, 255)
    right = (outputs(resnet, x).argmax(1) == labels).float().mean().item()
    print(f"ResNet8 float: {100 * right:.2f} % of {TEST}")
    every = {setting: list(RECIPES) for setting in ("W8A8", "W4A8")}
    results = {"ResNet8 float": right, "ResNet8": compared("ResNet8", resnet, calibration, x, labels, every)}
    calibration, x = (on_scale(F.interpolate(part / 255, (96, 96), mode="bilinear"), 1) for part in (calibration, x))
    every["W8A8, one scale"] = list(RESCUE)
    results["MobileNetV1 float, persons"] = persons = outputs(mobilenet, x).argmax(1).float().mean().item()
    print(f"MobileNetV1 float: sees a person on {100 * persons:.2f} %")
    results["MobileNetV1"] = compared("MobileNetV1", mobilenet, calibration, x, None, every)
    write("tiny_models", {"images": TEST, **results})


if __name__ == "__main__":
    main()

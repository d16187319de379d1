"""README claim: what post-training recipes keep of ResNet20, from W8A8 to W2A8, without labels and without training.

Two sets of float weights: ``finetuned`` on the JPEG training images and calibrated on 512 of them, and ``published``,
trained and calibrated on lossless images, for which the test images are a shifted distribution. The first convolution
and the classifier have 8 bits, residual adds too ("sums too": in as few bits as activations), seed 0. Recipes were
chosen on 2,000 other training images (``--validation``); the 10,000 test images are read for the table alone. Drops are
paired with the float model. Writes results/ptq_resnet20.json after every row and continues from it.

    python benchmarks/ptq_resnet20.py [--weights published] [--only W4A8 W2A8] [--recipes nearest gptq] [--validation]
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import bitwright as bw
from data import jpeg_cifar10, normalised, shared
from models import CifarResNet
from resnet20 import batches_of
from results import FOLDER, write

CALIBRATION, VALIDATION = 512, 2000
SETTINGS = {
    "W8A8": ("int8/channel", "uint8/asym", "uint8/asym"),
    "W6A6": ("int6/channel", "uint6/asym", "uint8/asym"),
    "W4A8": ("int4/channel", "uint8/asym", "uint8/asym"),
    "W3A8": ("int3/channel", "uint8/asym", "uint8/asym"),
    "W4A4": ("int4/channel", "uint4/asym", "uint8/asym"),
    "W4A4, sums too": ("int4/channel", "uint4/asym", "uint4/asym"),
    "W3A3": ("int3/channel", "uint3/asym", "uint8/asym"),
    "W3A3, sums too": ("int3/channel", "uint3/asym", "uint3/asym"),
    "W2A8": ("int2/channel", "uint8/asym", "uint8/asym"),
}
"""Formats of weights, of the inputs of convolutions, and of the operands of residual adds."""
WEIGHTS = {"finetuned": "resnet20_jpeg_finetuned.pt", "published": "resnet20-12fca82f.th"}
RECIPES: dict[str, tuple[Any, ...]] = {
    "nearest": (),
    "bias": ("bias_correction",),
    "gptq, bias": ("gptq", "bias_correction"),
    "gptq, ranges, repair": ("gptq", {"name": "ranges", "by_output": True}, "affine_repair"),
    "blocks": ("brecq",),
}


def plan_of(model: nn.Module, setting: str, recipe: str, example: Tensor) -> bw.Plan:
    """First convolution and classifier at 8 bits."""
    weight, input, sums = SETTINGS[setting]
    sites = {
        "*.conv*.weight": weight,
        "*.conv*.input": input,
        "*.add_0.*": sums,
        "linear.weight": "int8/channel",
        "linear.input": "uint8/asym",
    }
    return bw.Plan.preset("w8a8", model, example, sites=sites, steps=RECIPES[recipe])


def calibrated(model: nn.Module, setting: str, recipe: str, calibration: Tensor) -> tuple[nn.Module, float]:
    """The prepared model after all steps of the recipe, and the seconds it took."""
    torch.manual_seed(0)
    prepared = bw.prepare(model, plan_of(model, setting, recipe, calibration[:2]))
    start = time.perf_counter()
    bw.calibrate(prepared, calibration.split(64))
    return prepared, time.perf_counter() - start


def answers(model: nn.Module, items: list[tuple[Tensor, Tensor]]) -> Tensor:
    with torch.no_grad():
        return torch.cat([model(x).argmax(1) for x, _ in items])


def lossless() -> Tensor:
    """The first training images as CIFAR-10 was published."""
    images = np.load(shared("cifar10_lossless4k") / "cifar10_lossless_4000.npz")["x"][:CALIBRATION]
    return normalised(images)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--weights", nargs="+", default=list(WEIGHTS))
    parser.add_argument("--only", nargs="+", default=list(SETTINGS))
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES))
    parser.add_argument("--validation", action="store_true", help="score 2,000 training images, write nothing")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    x, y = jpeg_cifar10("train", CALIBRATION + VALIDATION)
    held_out = batches_of(x[CALIBRATION:], y[CALIBRATION:])
    items = held_out if options.validation else batches_of(*jpeg_cifar10("test"))
    for name in options.weights:
        model = CifarResNet(20)
        bw.load_weights(model, shared("cifar10_resnet") / WEIGHTS[name]).eval()
        table(name, model, x[:CALIBRATION] if name == "finetuned" else lossless(), items, options)


def table(
    name: str, model: nn.Module, calibration: Tensor, items: list[tuple[Tensor, Tensor]], options: argparse.Namespace
) -> None:
    """One line per setting and recipe for one set of float weights."""
    wanted, labels = answers(model, items), torch.cat([y for _, y in items])
    float_scores = (wanted == labels).float()
    print(f"{name}, float: {100 * float_scores.mean():.2f} % of {len(float_scores)}")
    path = FOLDER / "ptq_resnet20.json"
    for setting in options.only:
        for recipe in options.recipes:
            results = json.loads(path.read_text()) if path.exists() else {}
            key = f"{name} {setting} {recipe}"
            if key in results and not options.validation:
                print(key, results[key])
                continue
            prepared, seconds = calibrated(model, setting, recipe, calibration)
            found = answers(bw.convert(prepared), items)
            drop, same = (
                bw.paired_drop(float_scores, (found == labels).float()),
                (found == wanted).float().mean().item(),
            )
            row = {"drop": drop.drop, "low": drop.low, "high": drop.high, "same": same, "seconds": seconds}
            print(key, f"drop {drop}, same answer on {100 * same:.2f} %, {seconds:.0f} s", flush=True)
            if not options.validation:
                results |= {f"{name} float": float_scores.mean().item(), "items": len(float_scores), key: row}
                write("ptq_resnet20", results)


if __name__ == "__main__":
    main()

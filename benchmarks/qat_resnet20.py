"""README claim: ResNet20 trained with quantization at W4A4, W3A3 and W2A4 against float training of the same length.

Every run starts from the same float model, sees the same 20,000 JPEG training images for 3 epochs (batch 128, flips and
shifts) and is distilled from the float start; the control does the same without quantizers. The first convolution and
the classifier have 8 bits, residual adds too. Calibration: 512 training images; validation (chooses the kept state):
2,000 others; the 10,000 test images are read once per run, after training. Drops are paired with the control of one
seed. Writes results/qat_resnet20.json after every run and continues from it.

The longer budget of the last command is for two and three bits on both sides (PACT, Choi 2018, table 2), with a control
of its own.

    python benchmarks/qat_resnet20.py [--seeds 0 1 2] [--only W2A4] [--validation-only]
    python benchmarks/qat_resnet20.py --seeds 0 --images 47488 --epochs 6 --only control W2A2 W3A3
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bitwright as bw
from bitwright.train.distill import distillation
from data import jpeg_cifar10, shared
from models import CifarResNet
from resnet20 import augmented, batches_of
from results import FOLDER, write

CALIBRATION, VALIDATION = 512, 2000
BODY = {
    "W4A4": ("int4/channel", "uint4/asym"),
    "W3A3": ("int3/channel", "uint3/asym"),
    "W2A4": ("int2/channel", "uint4/asym"),
    "W2A2": ("int2/channel", "uint2/asym"),
}
TABLE = ("control", "W4A4", "W3A3", "W2A4")
Batch = tuple[Tensor, Tensor, Tensor]


def loss_with(alpha: float, temperature: float) -> Callable[[nn.Module, Batch], Tensor]:
    """Cross entropy and distillation from the logits that the float start gives the same images."""

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        out = model(batch[0])
        hard, soft = F.cross_entropy(out, batch[1]), distillation(out, batch[2], temperature)
        return (1 - alpha) * hard + alpha * soft

    return loss


def simulated(model: nn.Module, setting: str, calibration: Tensor) -> nn.Module:
    weight, input = BODY[setting]
    sites = {
        "*.conv*.weight": weight,
        "*.conv*.input": input,
        "linear.weight": "int8/channel",
        "linear.input": "uint8/asym",
    }
    prepared = bw.prepare(model, bw.Plan.preset("w8a8", model, calibration[:2], sites=sites))
    bw.calibrate(prepared, calibration.split(128))
    return prepared


def train_float(
    model: nn.Module, loss: Callable[[nn.Module, Batch], Tensor], data: list[Batch], lr: float
) -> nn.Module:
    """The control: the same loss, batches and learning rates without quantizers."""
    schedule = bw.Schedule(steps=len(data), lr=lr)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=1e-4)
    model.train()
    for step, batch in enumerate(data):
        for group in optimizer.param_groups:
            group["lr"] = schedule.lr_at(step)
        optimizer.zero_grad()
        loss(model, batch).backward()
        optimizer.step()
    return model.eval()


@dataclass(frozen=True)
class Images:
    """The float start and disjoint parts of the images."""

    teacher: nn.Module
    calibration: Tensor
    validation: list[tuple[Tensor, Tensor]]
    train: tuple[Tensor, Tensor]
    test: list[tuple[Tensor, Tensor]]


def load(training: int) -> Images:
    teacher = CifarResNet(20)
    bw.load_weights(teacher, shared("cifar10_resnet") / "resnet20_jpeg_finetuned.pt").eval()
    x, y = jpeg_cifar10("train", CALIBRATION + VALIDATION + training)
    calibration, x, y = x[:CALIBRATION], x[CALIBRATION:], y[CALIBRATION:]
    validation = batches_of(x[:VALIDATION], y[:VALIDATION])
    return Images(teacher, calibration, validation, (x[VALIDATION:], y[VALIDATION:]), batches_of(*jpeg_cifar10("test")))


def batches(images: Images, seed: int, epochs: int) -> list[Batch]:
    """The augmented batches of a seed with the logits that the float start gives them."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [batch for _ in range(epochs) for batch in augmented(*images.train, 128, generator)]
    with torch.no_grad():
        return [(x, y, images.teacher(x)) for x, y in drawn]


def run(setting: str, images: Images, data: list[Batch], options: argparse.Namespace) -> dict[str, object]:
    """Train one setting, or the control, and score it on the test images."""
    start = time.perf_counter()
    loss = loss_with(options.alpha, options.temperature)
    row: dict[str, object] = {"steps": len(data)}
    if setting == "control":
        model = train_float(copy.deepcopy(images.teacher), loss, data, options.lr)
    else:
        prepared = simulated(images.teacher, setting, images.calibration)
        history = bw.train(
            prepared,
            loss,
            data,
            schedule=bw.Schedule(steps=len(data), lr=options.lr, shares=tuple(options.shares)),
            score=lambda m: bw.item_scores(m, images.validation),
            on_step=lambda step, value: print(f"\r{step} {value:.3f}", end="", flush=True),
        )
        row |= {"best step": history.best_step, "scores": history.scores}
        model = bw.convert(prepared)
        with torch.no_grad():
            row["trained == shipped"] = torch.equal(prepared.eval()(images.calibration), model(images.calibration))
    row |= {"seconds": time.perf_counter() - start, "validation": bw.evaluate(model, images.validation)}
    if not options.validation_only:
        row["right"] = bw.item_scores(model, images.test).to(torch.int8).tolist()
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--images", type=int, default=20_000, help="of the training split")
    parser.add_argument("--only", nargs="+", default=TABLE)
    parser.add_argument("--lr", type=float, default=1.0, help="original rate: QAT starts at 1 %% of it")
    parser.add_argument("--alpha", type=float, default=0.7, help="share of the distillation loss")
    parser.add_argument("--temperature", type=float, default=4.0)
    parser.add_argument("--shares", type=float, nargs=3, default=[0.05, 0.8, 0.15], help="of the three phases")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--validation-only", action="store_true", help="do not read the test images, write nothing")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    images = load(options.images)
    budget = "" if (options.images, options.epochs) == (20_000, 3) else f" {options.images} x {options.epochs}"
    path = FOLDER / "qat_resnet20.json"
    for seed in options.seeds:
        data = batches(images, seed, options.epochs)
        for setting in options.only:
            results = json.loads(path.read_text()) if path.exists() else {}
            key = f"{setting} seed {seed}{budget}"
            if key in results and not options.validation_only:
                continue
            torch.manual_seed(seed)
            row = run(setting, images, data, options)
            if not options.validation_only:  # read again: other processes may have written
                write("qat_resnet20", (json.loads(path.read_text()) if path.exists() else {}) | {key: row})
            print(f"\r{key}: { {name: value for name, value in row.items() if name != 'right'} }", flush=True)
    summarise(json.loads(path.read_text()) if path.exists() else {}, options, budget)


def summarise(results: dict[str, dict[str, object]], options: argparse.Namespace, budget: str) -> None:
    """Top-1 and paired drops against the control of the same seed; the interval covers the test images."""
    for setting in (name for name in options.only if name != "control"):
        for seed in options.seeds:
            rows = [results.get(f"{name} seed {seed}{budget}") for name in ("control", setting)]
            if None in rows:
                continue
            control, scores = (torch.tensor(row["right"], dtype=torch.float32) for row in rows if row is not None)
            drop = bw.paired_drop(control, scores)
            print(f"{setting} seed {seed}: {100 * scores.mean():.2f} of {100 * control.mean():.2f} %, drop {drop}")


if __name__ == "__main__":
    main()

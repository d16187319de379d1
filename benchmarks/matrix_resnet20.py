"""ResNet20 in float, quantized after training, trained with quantization, and mixed: one table, one page.

512 training images calibrate and measure harm, 2,000 others choose the best trained state, ``--images`` others train;
the 10,000 test images are scored once per row. Training is distilled from the float model. Rows are kept in
results/matrix_resnet20_work and the same call goes on after the last one; writes results/matrix_resnet20/matrix.json
and matrix.html.

    python benchmarks/matrix_resnet20.py [--narrow w4a4] [--images 20000] [--epochs 3] [--methods gptq affine_repair]
"""

from __future__ import annotations

import argparse

import torch
from rich.console import Console
from torch import Tensor, nn

import bitwright as bw
from data import jpeg_cifar10, shared
from models import CifarResNet
from qat_resnet20 import loss_with
from resnet20 import augmented, batches_of
from results import FOLDER

CALIBRATION, VALIDATION = 512, 2000


def right(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (model(batch[0]).argmax(1) == batch[1]).float()


def training_of(teacher: nn.Module, x: Tensor, y: Tensor, options: argparse.Namespace) -> bw.Training:
    """Augmented batches with the float model's logits; the first images only choose the best state."""
    validation, generator = batches_of(x[:VALIDATION], y[:VALIDATION]), torch.Generator().manual_seed(0)
    x, y = x[VALIDATION:], y[VALIDATION:]
    drawn = [batch for _ in range(options.epochs) for batch in augmented(x, y, 128, generator)]
    with torch.no_grad():
        batches = [(images, labels, teacher(images)) for images, labels in drawn]
    return bw.Training(loss_with(0.7, 4.0), batches, bw.Schedule(steps=len(batches), lr=1.0), validation)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--narrow", default="w4a4", help="preset that is trained, whose bytes the mixed row has")
    parser.add_argument("--images", type=int, default=20_000, help="of the training split")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--methods", nargs="*", default=["gptq", "affine_repair"], help="steps of calibration")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = CifarResNet(20)
    bw.load_weights(model, shared("cifar10_resnet") / "resnet20_jpeg_finetuned.pt").eval()
    x, y = jpeg_cifar10("train", CALIBRATION + VALIDATION + options.images)
    found = bw.matrix(
        model,
        x[:CALIBRATION].split(64),
        right,
        batches_of(*jpeg_cifar10("test")),
        training=training_of(model, x[CALIBRATION:], y[CALIBRATION:], options),
        presets=("w8a8", options.narrow),
        steps=options.methods,
        work=FOLDER / "matrix_resnet20_work",
        say=lambda text: print(text, flush=True),
    )
    found.save(FOLDER / "matrix_resnet20")
    Console().print(found.table())


if __name__ == "__main__":
    main()

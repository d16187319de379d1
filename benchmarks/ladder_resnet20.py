"""Claim of docs/ladder.md: the ladder finds a plan for ResNet20 within the limit on the drop, and says how sure it is.

Calibration: 512 training images. Evaluation, item by item: 6,000 other training images. The answer is then checked on
10,000 further training images that the search never saw. Writes results/ladder_resnet20.json.

    python benchmarks/ladder_resnet20.py [--max-drop 0.02] [--preset w4a4] [--recipes nearest gptq]
"""

from __future__ import annotations

import argparse
from dataclasses import asdict

import torch
from rich.console import Console
from torch import Tensor, nn

import bitwright as bw
from bitwright.search.table import trials_table
from data import jpeg_cifar10, shared
from models import CifarResNet
from resnet20 import batches_of
from results import write

CALIBRATION, EVALUATION, CHECK = 512, 6_000, 10_000


def right(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (model(batch[0]).argmax(1) == batch[1]).float()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--max-drop", type=float, default=0.02)
    parser.add_argument("--preset", default="w4a4")
    parser.add_argument("--recipes", nargs="+", default=["nearest", "bias correction", "gptq"])
    parser.add_argument("--work")
    args = parser.parse_args()
    torch.manual_seed(0)
    model = CifarResNet(20)
    bw.load_weights(model, shared("cifar10_resnet") / "resnet20_jpeg_finetuned.pt").eval()
    x, y = jpeg_cifar10("train", CALIBRATION + EVALUATION + CHECK)
    parts = x.split((CALIBRATION, EVALUATION, CHECK)), y.split((CALIBRATION, EVALUATION, CHECK))
    found = bw.quantize_model(
        model,
        parts[0][0].split(64),
        right,
        evaluation=batches_of(parts[0][1], parts[1][1], 200),
        max_drop=args.max_drop,
        preset=args.preset,
        recipes=args.recipes,
        work=args.work,
        on_trial=lambda line: print(line, flush=True),
    )
    Console(width=100).print(trials_table(found.trials, found.best))
    check = batches_of(parts[0][2], parts[1][2], 200)
    drop = bw.paired_drop(bw.item_scores(model, check), bw.item_scores(found.model, check))
    print(f"met: {found.met}, confidence {found.confidence}; on {CHECK:,} images that the search never saw: {drop}")
    rows = [{k: v for k, v in asdict(trial).items() if k != "seconds"} for trial in found.trials]
    write("ladder_resnet20", {"max_drop": args.max_drop, "met": found.met, "trials": rows, "check": asdict(drop)})


if __name__ == "__main__":
    main()

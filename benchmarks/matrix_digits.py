"""Table of docs/certificate.md: one small CNN in float, quantized after training, trained with quantization, mixed.

The demo's network and data: 900 images train it and calibrate, 297 choose the best trained state, 600 are scored.
Writes results/matrix_digits/matrix.json and matrix.html.

    python benchmarks/matrix_digits.py [--narrow w4a4] [--work FOLDER]
"""

from __future__ import annotations

import argparse
import time

import torch
from rich.console import Console

import bitwright as bw
from bitwright.demo import LR, QAT_STEPS, DigitNet, load_digits, loss, right, shifted_batches, train_float
from results import FOLDER


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--narrow", default="w4a4", help="preset that is trained, whose bytes the mixed row has")
    parser.add_argument("--work", help="folder that keeps finished rows")
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args()
    torch.manual_seed(0)
    start, data, model = time.perf_counter(), load_digits(), DigitNet()
    train_float(model, data, lambda: None)
    batches = shifted_batches(*data.train, -(-QAT_STEPS // 18), seed=2)
    training = bw.Training(loss, batches, bw.Schedule(steps=QAT_STEPS, lr=LR), data.validation)
    found = bw.matrix(
        model,
        data.train[0][:512].split(128),
        right,
        data.test,
        training=training,
        presets=("w8a8", options.narrow),
        work=options.work,
        rounds=options.rounds,
        say=lambda text: print(text, flush=True),
    )
    found.save(FOLDER / "matrix_digits")
    Console().print(found.table())
    print(f"{time.perf_counter() - start:.0f} s in all; wrote {FOLDER / 'matrix_digits'}")


if __name__ == "__main__":
    main()

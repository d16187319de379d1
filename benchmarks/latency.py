"""README claim: speed of converted int8 models against float PyTorch eager, in alternating runs.

ResNet-18-shaped (224x224, batch 1 and 8) and BERT-base-shaped (12 layers, 128 tokens, batch 1 and 8), random weights:
this times shapes, not accuracy. Writes results/latency.json.

    python benchmarks/latency.py [--rounds 20]
"""

from __future__ import annotations

import argparse

import torch
from torch import nn

import bitwright as bw
from models import Encoder, ResNet, settle_batchnorm
from results import write


def shipped(model: nn.Module, preset: str, example: torch.Tensor) -> nn.Module:
    prepared = bw.prepare(model, bw.Plan.preset(preset, model, example))
    bw.calibrate(prepared, [example])
    return bw.convert(prepared, inplace=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    rounds = parser.parse_args().rounds
    torch.manual_seed(0)
    torch.set_num_threads(2)
    cases = {
        "ResNet-18": (settle_batchnorm(ResNet(18), 4, 3, 224, 224), (3, 224, 224), ("w8a8",)),
        "BERT-base": (Encoder().eval(), (128, 768), ("w8a8", "w8a8-dynamic")),
    }
    results: dict[str, object] = {}
    for name, (model, shape, presets) in cases.items():
        example = torch.randn(8, *shape)
        models = {"float": model} | {preset: shipped(model, preset, example) for preset in presets}
        for batch in (1, 8):
            for row in bw.measure(models, example[:batch], rounds=rounds):
                print(
                    f"{name:10s} batch {batch} {row.name:13s} {1e3 * row.seconds:8.2f} ms  {row.speed}  {row.bytes:,} B"
                )
                key = f"{name} batch {batch} {row.name}"
                results[key] = {"ms": 1e3 * row.seconds, "speed": row.speed.median, "bytes": row.bytes} | {
                    "speed 10 %": row.speed.low,
                    "speed 90 %": row.speed.high,
                }
    write("latency", results)


if __name__ == "__main__":
    main()

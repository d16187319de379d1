"""Docs claim: how long the harm of 20 layers x {2, 3, 4, 6, 8} bits x weight and activation takes, on 512 images.

ResNet20: KL divergence, measured, and Fisher harm, both without labels, weights rounded to nearest; then KL divergence
with weights rounded by GPTQ. Prints and writes results/sensitivity_resnet20.json.

    python benchmarks/sensitivity_resnet20.py [--threads 2]
"""

from __future__ import annotations

import argparse
import time

import torch

import bitwright as bw
from data import jpeg_cifar10, shared
from models import CifarResNet
from results import write

IMAGES = 512
BITS = (2, 3, 4, 6, 8)
SPECS = {
    "*conv*.weight": [f"int{bits}/channel" for bits in BITS],
    "linear.weight": [f"int{bits}/channel" for bits in BITS],
    "*conv*.input": [f"uint{bits}/asym" for bits in BITS],
    "linear.input": [f"uint{bits}/asym" for bits in BITS],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = CifarResNet(20)
    bw.load_weights(model, shared("cifar10_resnet") / "resnet20_jpeg_finetuned.pt").eval()
    images, _ = jpeg_cifar10("train", IMAGES)
    results: dict[str, object] = {}
    for method, steps in (("kl", ()), ("fisher", ()), ("kl", ("gptq",))):
        sites = {"linear.weight": "int8/channel", "linear.input": "uint8/asym"}
        plan = bw.Plan.preset("w8a8", model, images[:2], sites=sites, steps=steps)
        start = time.perf_counter()
        found = bw.sensitivity(model, plan, list(images.split(64)), SPECS, method=method)
        name = " ".join((method, *steps))
        results[name] = {"rows": len(found.rows), "seconds": time.perf_counter() - start}
        print(f"{name}: {results[name]}", flush=True)
        write("sensitivity_resnet20", results)


if __name__ == "__main__":
    main()

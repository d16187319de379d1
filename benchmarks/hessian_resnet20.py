"""How long Hessian traces of ResNet20's 20 layers take, and how Omega ranks against measured harm.

512 training images with their labels, cross entropy. Traces of all layers with their standard errors over draws; top
eigenvalue of the whole Hessian with ``--eigenvalue``. Omega of {2, 3, 4, 5, 6, 8} bits at the 18 middle convolutions,
with labels and with the model's own answers, against the KL divergences of mixed_resnet20.py, which must have run: rank
correlation over all rows and among layers of one width. Writes results/hessian_resnet20.json.

    python benchmarks/hessian_resnet20.py [--rounding nearest gptq] [--threads 2] [--eigenvalue]
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bitwright as bw
from bitwright.harm.agreement import agreement, spearman
from bitwright.harm.hessian import top_eigenvalues, traces
from bitwright.harm.sensitivity import Sensitivity
from data import jpeg_cifar10, shared
from mixed_resnet20 import CALIBRATION, CHOICES, MIDDLE, plan_of, same_width
from models import CifarResNet
from resnet20 import batches_of
from results import FOLDER, write

LAYERS = ["conv1.weight", "layer*.conv*.weight", "linear.weight"]


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def images(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return model(batch[0])


def traced(model: nn.Module, batches: list[tuple[Tensor, Tensor]]) -> dict[str, object]:
    start = time.perf_counter()
    found = traces(model, batches, LAYERS, loss=loss, forward=images, precision=0.1)
    seconds = time.perf_counter() - start
    for name, trace in [*found.layers.items(), ("all", found.whole)]:
        print(f"{name:24s} trace {trace.value:9.3f} +- {trace.error:.3f}, average {trace.average:.2e}")
    print(f"{found.whole.draws} draws, {seconds:.0f} s", flush=True)
    return {"seconds": seconds, "layers": {name: asdict(trace) for name, trace in found.layers.items()}}


def ranked(
    model: nn.Module, plan: bw.Plan, batches: list[tuple[Tensor, Tensor]], rounding: str
) -> dict[str, dict[str, object]]:
    """Agreement of Omega with the measured divergences, with labels and without."""
    measured = Sensitivity.load(FOLDER / f"mixed_resnet20_kl_{rounding}.json")
    plan, found = replace(plan, steps=plan.steps[:1] if rounding == "gptq" else ()), {}
    for name, how in (("labels", loss), ("own answers", None)):
        start = time.perf_counter()
        proxy = bw.sensitivity(model, plan, batches, {MIDDLE: CHOICES}, method="hessian", loss=how, forward=images)
        seconds, proxy = time.perf_counter() - start, agreement(proxy, measured)
        within = [
            spearman(*[[of.table[k].harm for k in at] for of in (proxy, measured)]) for at in same_width(measured)
        ]
        print(
            f"{rounding}, {name}: ranks {proxy.rank:.3f}, of one width {min(within):.2f} to {max(within):.2f}; "
            f"{seconds:.0f} s",
            flush=True,
        )
        rows = {
            f"{row.site} {row.spec}": [row.harm, row.error, measured.table[row.site, row.spec].harm]
            for row in proxy.rows
        }
        found[f"{rounding}, {name}"] = {"rank": proxy.rank, "of one width": within, "seconds": seconds, "rows": rows}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounding", nargs="*", default=["nearest", "gptq"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--eigenvalue", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = CifarResNet(20)
    bw.load_weights(model, shared("cifar10_resnet") / "resnet20_jpeg_finetuned.pt").eval()
    x, y = jpeg_cifar10("train", CALIBRATION)
    batches = batches_of(x, y, 64)
    results: dict[str, object] = {"traces": traced(model, batches)}
    if options.eigenvalue:
        start = time.perf_counter()
        top = top_eigenvalues(model, batches, LAYERS, whole=True, loss=loss)[""]
        print(f"top eigenvalue {top}, {time.perf_counter() - start:.0f} s")
        results["top eigenvalue"] = asdict(top)
    plan = plan_of(model, x[:2], 4)
    for rounding in options.rounding:
        results |= ranked(model, plan, batches, rounding)
        write("hessian_resnet20", results)


if __name__ == "__main__":
    main()

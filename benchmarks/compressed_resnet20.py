"""Docs claim: ResNet20 whose weights take a thirteenth of their float bytes, against float training of the same length.

Formats of all weights, from 2 to 8 bits by layer, are allocated exactly by the harm of GPTQ's codes on 512 training
images (KL divergence, no labels); inputs and residual adds have 8. Then both, the mixed model and the float one, are
trained alike (`qat_resnet20`: distilled from the float start, flips and shifts; rates from 0.02 down) on 47,488 JPEG
training images, and their last states compared: the float start has learned all training images, so that a score on
some would speak for states near it. The 10,000 test images are read once. Both trainings are kept in
results/compressed_resnet20 and go on there after a kill; with ``--only`` two processes train one each, and a last call
takes both. Prints and writes results/compressed_resnet20.json.

    python benchmarks/compressed_resnet20.py [--factor 13] [--epochs 8] [--seed 0] [--only mixed] [--tiny]
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn

import bitwright as bw
from bitwright.costs.choices import module_at
from bitwright.costs.cost import plan_bytes, site_bytes
from bitwright.harm.sensitivity import Sensitivity
from bitwright.plan.site import Site
from mixed_resnet20 import CALIBRATION, VALIDATION
from qat_resnet20 import Batch, Images, load, loss_with
from resnet20 import augmented
from results import FOLDER, write

FORMATS = ("midrise2", "int2", "midrise3", "int3", "int4", "int5", "int6", "int8")
WEIGHTS = {name: [f"{form}/channel" for form in FORMATS] for name in ("*conv*.weight", "linear.weight")}
IMAGES, BATCH = 50_000 - CALIBRATION - VALIDATION, 128


def allocated(model: nn.Module, images: Images, factor: float) -> tuple[bw.Plan, float]:
    """The plan of least harm whose weights, scales included, have 1 / ``factor`` of their float bytes; that factor."""
    narrowest = {name: specs[0] for name, specs in WEIGHTS.items()}
    sites = {**narrowest, "linear.input": "uint8/asym"}
    plan = bw.Plan.preset("w8a8", model, images.calibration[:2], sites=sites, steps=["gptq"])
    weights = [site for site in plan.sites if site.is_weight]
    floats = sum(site_bytes(module_at(model, site.path), "weight", None) for site in weights)
    fixed = plan_bytes(model, plan) - stored(model, plan, weights)
    batches = list(images.calibration.split(64))
    harm = bw.sensitivity(model, plan, batches, WEIGHTS, work=FOLDER / "compressed_resnet20_harm.json")
    for bits in (2, 3):
        ratio = harm_ratio(harm, f"midrise{bits}", f"int{bits}")
        print(f"harm of midrise{bits} over that of int{bits}: {ratio:.2f}, geometric mean of {len(harm.sites)} layers")
    choices = bw.mixture(model, plan, images.calibration[:1], harm)
    found = choices.allocate(bw.Budget(bytes=fixed + floats / factor))
    mixed = bw.with_allocation(plan, found, f"least harm at a factor of {factor}")
    return mixed, floats / stored(model, mixed, weights)


def harm_ratio(harm: Sensitivity, one: str, other: str) -> float:
    """Harm of one format over that of another, geometric mean over layers."""
    table = harm.table
    ratios = [table[site, f"{one}/channel"].harm / table[site, f"{other}/channel"].harm for site in harm.sites]
    return statistics.geometric_mean(ratios)


def stored(model: nn.Module, plan: bw.Plan, weights: list[Site]) -> int:
    return sum(site_bytes(module_at(model, site.path), "weight", plan.sites[site]) for site in weights)


def epochs_of(images: Images, seed: int) -> Callable[[int], Iterator[Batch]]:
    """The augmented batches of an epoch, with the logits that the float start gives them."""

    def epoch(number: int) -> Iterator[Batch]:
        for x, y in augmented(*images.train, BATCH, torch.Generator().manual_seed(1000 * seed + number)):
            with torch.no_grad():
                logits = images.teacher(x)
            yield x, y, logits

    return epoch


def trained_float(
    model: nn.Module, epoch: Callable[[int], Iterator[Batch]], schedule: bw.Schedule, saved: Path | None
) -> nn.Module:
    """The control: the same loss, batches and learning rates without quantizers; goes on after the last epoch saved."""
    loss, step, number = loss_with(0.7, 4.0), 0, 0
    optimizer = torch.optim.SGD(model.parameters(), lr=schedule.lr_at(0), momentum=0.9, weight_decay=1e-4)
    if saved is not None and saved.exists():
        state = torch.load(saved, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        step, number = state["step"], state["number"]
    model.train()
    while step < schedule.steps:
        for batch in epoch(number):
            for group in optimizer.param_groups:
                group["lr"] = schedule.lr_at(step)
            optimizer.zero_grad()
            loss(model, batch).backward()
            optimizer.step()
            step += 1
        number += 1
        if saved is not None:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step, "number": number}
            saved.parent.mkdir(parents=True, exist_ok=True)
            torch.save(state, part := saved.with_suffix(".part"))
            part.replace(saved)
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--factor", type=float, default=13.0, help="float bytes of the weights over stored ones")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", choices=["mixed", "control"], help="train one of the two, score nothing")
    parser.add_argument("--tiny", action="store_true", help="few images and steps: whether it runs, no figures")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    images = load(2 * BATCH if options.tiny else IMAGES)
    plan, factor = allocated(images.teacher, images, options.factor)
    formats = {str(site): spec.format.name for site, spec in plan.sites.items() if site.is_weight and spec is not None}
    print(f"weights take 1 / {factor:.2f} of their float bytes; {', '.join(formats.values())}", flush=True)
    epoch = epochs_of(images, options.seed)
    steps = options.epochs * (len(images.train[0]) // BATCH)
    schedule = bw.Schedule(steps=steps, lr=2.0, shares=(0.05, 0.8, 0.15))
    name = f"{options.factor:g}x, {options.epochs} epochs, seed {options.seed}"
    work = FOLDER / "compressed_resnet20" / name.replace(", ", "_").replace(" ", "")
    saved = None if options.tiny else work.with_name(f"{work.name}_control.pt")
    if options.only != "control":
        torch.manual_seed(options.seed)
        prepared = bw.prepare(images.teacher, plan)
        bw.calibrate(prepared, images.calibration.split(128))
        bw.train(
            prepared,
            loss_with(0.7, 4.0),
            epoch,
            schedule=schedule,
            checkpoint=None if options.tiny else work,
            checkpoint_every=200,
            on_step=lambda step, value: print(f"\r{step} of {steps}: {value:.3f}", end="", flush=True),
        )
        shipped = bw.convert(prepared)
    if options.only != "mixed":
        control = trained_float(copy.deepcopy(images.teacher), epoch, schedule, saved)
    if options.tiny or options.only:
        return
    path: Path = FOLDER / "compressed_resnet20.json"
    scores = [bw.item_scores(model, images.test) for model in (control, shipped)]
    drop = bw.paired_drop(*scores)
    row = {"factor": factor, "formats": formats, "steps": steps, "drop": drop.drop, "low": drop.low, "high": drop.high}
    row |= {"control": scores[0].mean().item(), "bytes": plan_bytes(images.teacher, plan)}
    write("compressed_resnet20", (json.loads(path.read_text()) if path.exists() else {}) | {name: row})
    print(f"\r{name}: 1 / {factor:.2f}, control {100 * row['control']:.2f} %, drop {drop}")


if __name__ == "__main__":
    main()

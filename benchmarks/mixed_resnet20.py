"""README claim: bits that differ by layer, chosen exactly, against one width for all, at equal bytes, without training.

ResNet20. The harm of {2, 3, 4, 5, 6, 8} bits at each of the 18 middle convolutions is the KL divergence of the outputs
with that layer alone rounded by GPTQ, on 512 training images, without labels. The allocation has the bytes of the
uniform model as its budget. First convolution and classifier have 8 bits, activations and sums too. Both models are
then calibrated alike. Drops are paired with the float model, on 2,000 other training images; ``--test`` reads the
10,000 test images. Proxies look at 128 of the images. Sensitivities are kept in
results/mixed_resnet20_<method>_<rounding>.json and continued from there, scores in results/mixed_resnet20.json.

    python benchmarks/mixed_resnet20.py [--bits 4 3] [--rounding gptq nearest] [--test]
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from torch import Tensor, nn

import bitwright as bw
from bitwright.costs.cost import plan_bytes
from bitwright.harm.agreement import agreement, spearman
from bitwright.harm.sensitivity import Harm, Sensitivity
from bitwright.search.mixed import Mixture
from data import jpeg_cifar10, shared
from models import CifarResNet
from resnet20 import batches_of
from results import FOLDER, write

CALIBRATION, PROXY, VALIDATION = 512, 128, 2000
CHOICES = [f"int{bits}/channel" for bits in (2, 3, 4, 5, 6, 8)]
MIDDLE = "layer*.conv*.weight"
STEPS = ("gptq", "affine_repair")


def plan_of(model: nn.Module, example: Tensor, bits: int) -> bw.Plan:
    """One width for the middle convolutions, 8 bits elsewhere."""
    sites = {MIDDLE: f"int{bits}/channel", "linear.weight": "int8/channel", "linear.input": "uint8/asym"}
    return bw.Plan.preset("w8a8", model, example, sites=sites, steps=STEPS)


def harm_of(model: nn.Module, plan: bw.Plan, batches: list[Tensor], rounding: str, method: str) -> Sensitivity:
    plan = bw.Plan.from_toml(plan.to_toml())
    plan.steps = plan.steps[:1] if rounding == "gptq" else ()
    work: Path = FOLDER / f"mixed_resnet20_{method}_{rounding}.json"

    def show(row: Harm, done: int, total: int) -> None:
        print(f"{done} of {total}: {row.site} {row.spec}: {row.harm:.2e} +- {row.error:.0e}", flush=True)

    return bw.sensitivity(model, plan, batches, {MIDDLE: CHOICES}, method=method, work=work, on_row=show)


def same_width(found: Sensitivity) -> list[list[tuple[str, str]]]:
    """Rows of the file, by width."""
    return [[key for key in found.table if key[1] == spec] for spec in CHOICES]


def score(model: nn.Module, plan: bw.Plan, calibration: Tensor, items: list[tuple[Tensor, Tensor]]) -> Tensor:
    torch.manual_seed(0)
    prepared = bw.prepare(model, plan)
    bw.calibrate(prepared, calibration.split(64))
    return bw.item_scores(bw.convert(prepared), items)


def compare(
    model: nn.Module, found: Mixture, bits: int, calibration: Tensor, items: list[tuple[Tensor, Tensor]]
) -> dict[str, object]:
    """Scores of the uniform plan and of the mixed one of the same bytes."""
    uniform = plan_of(model, calibration[:2], bits)
    limit = plan_bytes(model, uniform)
    chosen = found.allocate(bw.Budget(bytes=limit))
    mixed = bw.with_allocation(uniform, chosen, f"least harm within {limit:,} bytes")
    assert plan_bytes(model, mixed) == chosen.cost.bytes <= limit
    before, row = bw.item_scores(model, items), {"bytes": limit, "mixed bytes": chosen.cost.bytes, "harm": chosen.harm}
    row["bits"] = {site: int(spec[3]) for site, spec in chosen.sites.items()}
    for name, plan in (("uniform", uniform), ("mixed", mixed)):
        start = time.perf_counter()
        drop = bw.paired_drop(before, score(model, plan, calibration, items))
        print(f"{bits} bits, {name}: drop {drop}, {time.perf_counter() - start:.0f} s", flush=True)
        row[name] = {"drop": drop.drop, "low": drop.low, "high": drop.high}
    print(f"  {limit:,} bytes, mixed {chosen.cost.bytes:,}; bits {list(row['bits'].values())}")  # type: ignore[attr-defined]
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3])
    parser.add_argument("--rounding", nargs="+", default=["gptq", "nearest"])
    parser.add_argument(
        "--proxy", nargs="*", default=["sqnr", "fisher"], help="whose ranks are compared with measured harm"
    )
    parser.add_argument("--test", action="store_true", help="read the test images, once")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = CifarResNet(20)
    bw.load_weights(model, shared("cifar10_resnet") / "resnet20_jpeg_finetuned.pt").eval()
    x, y = jpeg_cifar10("train", CALIBRATION + VALIDATION)
    calibration, validation = x[:CALIBRATION], batches_of(x[CALIBRATION:], y[CALIBRATION:])
    items = batches_of(*jpeg_cifar10("test")) if options.test else validation
    plan, split, path = (
        plan_of(model, calibration[:2], 4),
        "test" if options.test else "validation",
        FOLDER / "mixed_resnet20.json",
    )
    for rounding in options.rounding:
        harm = harm_of(model, plan, list(calibration.split(64)), rounding, "kl")
        results = json.loads(path.read_text()) if path.exists() else {}
        for method in options.proxy:
            proxy = agreement(harm_of(model, plan, list(calibration[:PROXY].split(64)), rounding, method), harm)
            within = [
                spearman(*[[of.table[key].harm for key in at] for of in (proxy, harm)]) for at in same_width(harm)
            ]
            print(f"{method}, {rounding}: ranks {proxy.rank:.3f}, of one width {min(within):.2f} to {max(within):.2f}")
            results[f"{method}, {rounding}"] = {"rank": proxy.rank, "of one width": within}
        found = bw.mixture(model, plan, calibration[:1], harm)
        for bits in options.bits:
            results[f"{split}, {bits} bits, harm by {rounding}"] = compare(model, found, bits, calibration, items)
        write("mixed_resnet20", results)


if __name__ == "__main__":
    main()

"""Docs claim: latency predicted from a table of layers against latency measured, on random mixed plans.

ResNet20 (32x32), ResNet-18 (224x224), MobileNetV1 0.25 (96x96) and BERT-base (128 tokens), batch 1, random weights.
Each layer ships with weights of 2, 3, 4 or 8 bits and inputs of 8 or in float, or in float altogether; adds stay in
float, so that no input must be what an add reads. Every plan draws its own shares of these, then a choice per layer.
Predictions come from `measure_machine`, which has not seen the plans; measurements are of the whole shipped models, in
turns. Prints and writes results/latency_model.json: mean absolute percentage error, Spearman rank correlation, range
of the latencies; then how far layers are predicted from others of their kind (`costs.learned`), each left out in turn.
Tables are kept in results/latency_tables; remove them to measure anew.

    python benchmarks/latency_model.py [--plans 20] [--threads 1] [--target onnxruntime] [--only ResNet20 ...] [--tiny]
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import bitwright as bw
from bitwright.costs.cost import Cost
from bitwright.costs.latencies import LatencyTable, table_path
from bitwright.costs.learned import learn
from bitwright.costs.runtimes import runtime_of, whole_run
from bitwright.costs.stopwatch import in_turns
from bitwright.costs.workload import Workload
from bitwright.harm.agreement import spearman
from bitwright.plan.site import ADD_SLOTS
from bitwright.search.budget import Allocation, Layer
from bitwright.search.speeds import speeds
from models import CifarResNet, Encoder, MobileNetV1, ResNet, settle_batchnorm
from results import FOLDER, write

WEIGHTS = ["int2/channel", "int3/channel", "int4/channel", "int8/channel", "float"]
INPUTS = ["uint8/asym", "float"]
TINY = ("CifarResNet tiny", "Encoder tiny")

CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "ResNet20": (lambda: settle_batchnorm(CifarResNet(20), 8, 3, 32, 32), (1, 3, 32, 32)),
    "ResNet-18": (lambda: settle_batchnorm(ResNet(18), 2, 3, 224, 224), (1, 3, 224, 224)),
    "MobileNetV1 0.25": (lambda: settle_batchnorm(MobileNetV1(), 8, 3, 96, 96), (1, 3, 96, 96)),
    "BERT-base": (lambda: Encoder().eval(), (1, 128, 768)),
    "CifarResNet tiny": (lambda: settle_batchnorm(CifarResNet(8), 8, 3, 8, 8), (1, 3, 8, 8)),
    "Encoder tiny": (lambda: Encoder(1, 32, 2).eval(), (1, 8, 32)),
}


def drawn(layers: list[Layer], plan: bw.Plan, generator: random.Random) -> Allocation:
    """A random choice for each layer; this plan's own shares of all specs, equal specs at sites that share one."""
    shares = {spec: generator.expovariate(1.0) for spec in (*WEIGHTS, *INPUTS)}
    leaders = {str(site): str(leader) for site, leader in plan.shared.items()}
    found: dict[str, str] = {}
    cost = Cost()
    for layer in layers:
        names = [leaders.get(site, site) for site in layer.sites]
        fitting = [
            choice
            for choice in layer.choices
            if all(found.get(name, spec) == spec for name, spec in zip(names, choice.specs, strict=True))
        ]
        weights = [math.prod(shares[spec] for spec in choice.specs) for choice in fitting]
        [choice] = generator.choices(fitting, weights)
        found |= dict(zip(names, choice.specs, strict=True))
        found |= dict(zip(layer.sites, choice.specs, strict=True))
        cost += choice.cost
    sites = {site: found[site] for layer in layers for site in layer.sites}
    return Allocation(sites, 0.0, cost)


def validate(
    model: nn.Module, example: Tensor, count: int, seconds: float, cache: Path, target: str
) -> dict[str, float]:
    """Predicted and measured latency of ``count`` random plans where ``target`` runs them."""
    plan = bw.Plan.preset("w8a8", model, example, target=target)
    plan = plan.with_sites({str(site): None for site in plan.sites if site.slot in ADD_SLOTS})
    paths = {site.path for site, spec in plan.sites.items() if site.slot == "weight" and spec is not None}
    specs = {
        f"{path}.{slot}": texts for path in sorted(paths) for slot, texts in (("weight", WEIGHTS), ("input", INPUTS))
    }
    table = bw.measure_machine(model, plan, example, specs, cache=cache, seconds=seconds)
    layers, generator = speeds(table, model, plan, example, specs), random.Random(0)
    rest = table.prices(model, plan, example, sorted(paths)).rest().latency
    allocations = [drawn(layers, plan, generator) for _ in range(count)]
    shipped = [Workload(model, bw.with_allocation(plan, found), example, ()).shipped for found in allocations]
    runs = [[whole_run(one, example, target)] for one in shipped]
    measured = [row.seconds for row in in_turns(runs, 0.01, 5 * seconds)]
    predicted = [found.cost.latency + rest for found in allocations]
    errors = [abs(p - m) / m for p, m in zip(predicted, measured, strict=True)]
    return {
        "MAPE": 100 * sum(errors) / count,
        "spearman": spearman(predicted, measured),
        "fastest ms": 1e3 * min(measured),
        "slowest ms": 1e3 * max(measured),
        "rest ms": 1e3 * rest,
        "plans": count,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plans", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--target", default="cpu", choices=["cpu", "onnxruntime"], help="what runs the plans")
    parser.add_argument("--only", nargs="+", choices=[name for name in CASES if name not in TINY])
    parser.add_argument("--cache", type=Path, default=FOLDER / "latency_tables", help="folder of latency tables")
    parser.add_argument("--tiny", action="store_true", help="small models and few calls: whether it runs, no figures")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    names = TINY if options.tiny else options.only or [name for name in CASES if name not in TINY]
    path = FOLDER / "latency_model.json"
    results: dict[str, object] = json.loads(path.read_text()) if path.exists() else {}
    for name in names:
        make, shape = CASES[name]
        count, seconds = (3, 0.01) if options.tiny else (options.plans, 1.0)
        row = validate(make(), torch.randn(*shape), count, seconds, options.cache, options.target)
        results[f"{name}, {runtime_of(options.target)}"] = row
        print(
            name, runtime_of(options.target), ", ".join(f"{key} {value:.4g}" for key, value in row.items()), flush=True
        )
    learned = learn(LatencyTable.load(table_path(options.cache)))
    results["left out"] = dict(sorted(learned.errors.items()))
    for kind, error in sorted(learned.errors.items()):
        print(f"left out: {100 * error:.0f} % {kind}")
    if not options.tiny:
        write("latency_model", results)


if __name__ == "__main__":
    main()

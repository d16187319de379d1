"""Docs claim: plans chosen by a limit on measured latency run as predicted; what they win over one width for all.

ResNet20, one image a call: weights of 8 or 4 bits or in float, inputs of 8 bits or in float, adds in float, the widest
plan all in float; scores are right answers on the 10,000 test images. MiniLM-L6, 16 sentences a call: weights of 8
bits per output or 4 in groups of 32, inputs of 8 bits per token, found in the call; scores are cosines to the float
embedding, 600 sentences. The harm of each spec is measured on other data, its time is that of the layer as it ships,
in a table measured here (kept in results/latency_tables; remove it to measure anew). The limits are shares of what the
widest plan is predicted to take; within each the least harm is chosen. Beside them stand the plans of one spec, and
the fastest of all. All are calibrated with GPTQ, shipped, timed in turns, and scored once, paired with the widest. A
host that changed its speed since the table was measured moves all of them: the second percentage compares times over
the widest's, predicted and measured. Prints and writes results/latency_budget.json.

    python benchmarks/latency_budget.py [--only ResNet20 MiniLM] [--limits 0.7 0.8 0.9] [--threads 1] [--tiny]
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import bitwright as bw
from bitwright.costs.stopwatch import in_turns
from bitwright.errors import SearchError
from bitwright.graph.dataflow import call
from bitwright.plan.site import ADD_SLOTS
from bitwright.search.budget import Allocation
from bitwright.search.mixed import Mixture
from results import FOLDER, write


@dataclass(frozen=True)
class Case:
    """A model, its widest plan and the specs beside it, data for calibration and harm, and scores of the items."""

    model: nn.Module
    plan: bw.Plan
    widest: bw.Plan
    specs: dict[str, list[str]]
    calibration: list[Any]
    example: Any
    scores: Callable[[nn.Module], Tensor]
    how: dict[str, Any] = field(default_factory=dict)
    forward: Callable[[nn.Module, Any], Any] = call


def resnet20(tiny: bool) -> Case:
    from data import jpeg_cifar10, shared
    from models import CifarResNet
    from resnet20 import batches_of

    model = CifarResNet(20)
    bw.load_weights(model, shared("cifar10_resnet") / "resnet20_jpeg_finetuned.pt").eval()
    x, _ = jpeg_cifar10("train", 512)
    images, labels = jpeg_cifar10("test", 500 if tiny else 10_000)
    items = batches_of(images, labels)
    plan = bw.Plan.preset("w8a8", model, x[:2], steps=("gptq",))
    plan = plan.with_sites({str(site): None for site in plan.sites if site.slot in ADD_SLOTS})
    quantized = {site: str(spec) for site, spec in plan.sites.items() if spec is not None and site not in plan.shared}
    specs = {str(site): [*["int4/channel"][: site.is_weight], own, "float"] for site, own in quantized.items()}
    widest = plan.with_sites(dict.fromkeys(specs))
    return Case(model, plan, widest, specs, list(x.split(64)), x[:1], lambda of: bw.item_scores(of, items))


def minilm(tiny: bool) -> Case:
    from minilm import Sentences, embeddings, pairs_of, tokenized

    model, train = Sentences().eval(), pairs_of("train")
    items = [sentence for one, two, _ in pairs_of("dev")[: 20 if tiny else 300] for sentence in (one, two)]
    batches = []
    with torch.no_grad():
        wanted = embeddings(model, items)
        for batch in tokenized(sorted((one for one, _, _ in train[: 32 if tiny else 128]), key=len), 16):
            batches.append((batch["input_ids"], batch["attention_mask"], model(**batch)))
    example = batches[len(batches) // 2][:2]
    sites = {"*embed*.weight": "int8/channel"}
    plan = bw.Plan.preset("w8a8-dynamic", model, example, sites=sites, steps=("gptq",))
    linear = [
        site for site, spec in plan.sites.items() if site.is_weight and spec is not None and "embed" not in site.path
    ]
    specs = {str(site): ["int4/group32", str(plan.sites[site])] for site in linear}

    def loss(changed: nn.Module, batch: Any) -> Tensor:
        return 1 - (changed(*batch[:2]) * batch[2]).sum(1).mean()

    @torch.no_grad()
    def scores(changed: nn.Module) -> Tensor:
        return (embeddings(changed, items) * wanted).sum(1).double()

    how = {"method": "loss", "loss": loss}
    return Case(model, plan, plan, specs, batches, example, scores, how, lambda of, batch: of(*batch[:2]))


CASES = {"ResNet20": resnet20, "MiniLM": minilm}


def choices(name: str, case: Case, seconds: float) -> Mixture:
    """Every layer's choices with their harm and their time on this machine."""
    work = FOLDER / f"latency_budget_{name}_harm.json"
    harm = bw.sensitivity(
        case.model, case.plan, case.calibration, case.specs, work=work, forward=case.forward, **case.how
    )
    cache = FOLDER / "latency_tables"
    table = bw.measure_machine(case.model, case.plan, case.example, harm.sites, cache=cache, seconds=seconds)
    return bw.mixture(case.model, case.plan, case.example, harm, latency=table)


def allocations(found: Mixture, case: Case, limits: list[float]) -> dict[str, Allocation]:
    """The widest plan, each other spec wherever it is a choice, the fastest plan, the least harm within each limit."""
    widest = found.of(case.widest)
    out = {"widest": widest}
    for spec in sorted({text for texts in case.specs.values() for text in texts}):
        uniform = {site: spec for site, texts in case.specs.items() if spec in texts}
        one = found.of(case.plan.with_sites(uniform))
        if one.sites not in [other.sites for other in out.values()]:
            out[f"all {spec}"] = one
    out["fastest"] = found.allocate(bw.Budget(), minimize="latency")
    for limit in limits:
        try:
            out[f"at most {limit:g}"] = found.allocate(bw.Budget(latency=limit * widest.cost.latency))
        except SearchError as error:
            print(f"at most {limit:g}: {error}")
    return out


def shipped(case: Case, plan: bw.Plan) -> nn.Module:
    if not any(plan.sites.values()):
        return case.model
    torch.manual_seed(0)
    prepared = bw.prepare(case.model, plan)
    bw.calibrate(prepared, case.calibration, forward=case.forward)
    return bw.convert(prepared)


def measured(name: str, case: Case, limits: list[float], seconds: float) -> dict[str, object]:
    """Predicted and measured latency, and what the scores lose against the widest plan, for each allocation."""
    found = allocations(choices(name, case, seconds), case, limits)
    models = [shipped(case, bw.with_allocation(case.plan, one)) for one in found.values()]
    timings = in_turns([[partial(call, one, case.example)] for one in models], 0.002, 30 * seconds)
    scores, rows = [case.scores(one) for one in models], {}
    widest = next(iter(found.values()))
    for (label, one), timed, score in zip(found.items(), timings, scores, strict=True):
        drop, predicted = bw.paired_drop(scores[0], score), one.cost.latency
        ratios = predicted / widest.cost.latency, timed.seconds / timings[0].seconds
        off = [100 * (timed.seconds / predicted - 1), 100 * (ratios[1] / ratios[0] - 1)]
        rows[label] = {
            "predicted ms": 1e3 * predicted, "measured ms": 1e3 * timed.seconds, "error": 1e3 * timed.error,
            "predicted ratio": ratios[0], "measured ratio": ratios[1], "sites": one.sites,
            "score": score.mean().item(), "drop": drop.drop, "low": drop.low, "high": drop.high,
        }  # fmt: skip
        print(f"{name}, {label}: predicted {1e3 * predicted:.3f} ms, measured {1e3 * timed.seconds:.3f} +- "
              f"{1e3 * timed.error:.3f} ({off[0]:+.1f} %); of the widest {ratios[0]:.3f}, measured {ratios[1]:.3f} "
              f"({off[1]:+.1f} %); score {score.mean().item():.4f}, drop {drop}", flush=True)  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--limits", type=float, nargs="+", default=[0.7, 0.8, 0.9])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tiny", action="store_true", help="few calls and items: whether it runs, no figures")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows: dict[str, object] = {
        name: measured(name, CASES[name](options.tiny), options.limits, 0.01 if options.tiny else 1.0)
        for name in options.only
    }
    if not options.tiny:
        write("latency_budget", rows)


if __name__ == "__main__":
    main()

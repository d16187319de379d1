"""Resident memory of shipped linear layers and convolutions against the bytes that `coverage` accounts for.

Each configuration runs in a process of its own: a stack of layers is simulated, converted in place and run
once. `resident` is what the process gives back when the shipped stack is deleted, `peak` the largest growth over the
simulated stack while `convert` ran. Writes results/memory.json. Linux only.

    python benchmarks/memory.py
    python benchmarks/memory.py int4/group32 int8/token/dynamic 8 4096
    python benchmarks/memory.py int4/channel uint8/asym 8 1024 conv
"""

from __future__ import annotations

import ctypes
import gc
import json
import subprocess
import sys

import torch
from torch import nn

import bitwright as bw
from bitwright.flow.calibrate import calibrate
from bitwright.flow.coverage import coverage
from bitwright.numerics.spec import QuantSpec
from bitwright.plan.plan import Plan
from bitwright.plan.site import Site
from overhead import memory
from results import write

FLOAT, TOKEN = "float", "int8/token/dynamic"
CONFIGURATIONS = (
    ("int8/channel", TOKEN), ("int8/group32", TOKEN), ("int4/channel", TOKEN), ("int4/group32", TOKEN),
    ("int4/group32", "uint8/token/asym/dynamic"), ("int3/channel", TOKEN), ("int3/group32", TOKEN),
    ("int2/group32", TOKEN), ("ternary/channel", TOKEN), ("int8/channel", FLOAT), ("int4/group32", FLOAT),
    ("nf4/group64", FLOAT), ("nf4/group64/scale(int8/group256)", FLOAT),
)  # fmt: skip
CONVOLUTIONS = tuple((f"{fmt}/channel", "uint8/asym") for fmt in ("int8", "int4", "int3", "int2", "ternary"))
WIDTHS = {"linear": 4096, "conv": 1024}


def resident() -> int:
    """Resident bytes of this process, without what the allocator only keeps."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return memory("VmRSS")


def layer(kind: str, width: int) -> nn.Module:
    """A linear layer ``width x width``, or a 3x3 convolution of as many channels."""
    if kind == "linear":
        return nn.Linear(width, width, bias=False)
    return nn.Conv2d(width, width, 3, padding=1, bias=False)


def example(kind: str, width: int) -> torch.Tensor:
    """Two rows, or a small image."""
    return torch.randn(2, width) if kind == "linear" else torch.randn(1, width, 7, 7)


def simulated(weight: str, input: str, layers: int, width: int, kind: str) -> nn.Module:
    """A stack of simulated layers."""
    model = nn.Sequential(*(layer(kind, width) for _ in range(layers)))
    specs = {"weight": QuantSpec.parse(weight), "input": None if input == FLOAT else QuantSpec.parse(input)}
    sites = {Site(str(number), slot): spec for number in range(layers) for slot, spec in specs.items()}
    prepared = bw.prepare(model, Plan("cpu", sites, {"weight": "minmax", "input": "minmax"}), inplace=True)
    calibrate(prepared, [example(kind, width)])
    return prepared


@torch.no_grad()
def measure(weight: str, input: str, layers: int, width: int, kind: str) -> dict[str, float]:
    """Bytes: accounted, resident, and the peak of `convert`."""
    model, x = simulated(weight, input, layers, width, kind), example(kind, width)[:1]
    before = resident()
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # resets VmHWM
    model = bw.convert(model, inplace=True)
    peak = memory("VmHWM") - before
    model(x)
    shipped, accounted = resident(), sum(row.bytes for row in coverage(model))
    del model
    held = shipped - resident()
    return {"accounted": accounted, "resident": held, "ratio": held / accounted, "peak": peak}


def main() -> None:
    """Measure one configuration, or all of them in processes of their own."""
    if len(sys.argv) > 1:
        weight, input, layers, width, kind = (*sys.argv[1:], "linear")[:5]
        print(json.dumps(measure(weight, input, int(layers), int(width), kind)))
        return
    results: dict[str, dict[str, dict[str, float]]] = {kind: {} for kind in WIDTHS}
    jobs = [("linear", *pair) for pair in CONFIGURATIONS] + [("conv", *pair) for pair in CONVOLUTIONS]
    for kind, weight, input in jobs:
        command = [sys.executable, __file__, weight, input, "8", str(WIDTHS[kind]), kind]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        results[kind][f"{weight}, {input}"] = found = json.loads(done.stdout)
        megabytes = {name: f"{value / 2**20:.1f} MiB" for name, value in found.items() if name != "ratio"}
        print(f"{kind} {weight}, {input}: {megabytes}, ratio {found['ratio']:.4f}", flush=True)
    write("memory", {"layers": 8, "width": WIDTHS, "bytes": results})


if __name__ == "__main__":
    main()

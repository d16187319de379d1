"""README claim: recording and calibrating need less than 1.3x the activation memory of the model itself.

Each task runs in a process of its own at ResNet-50 size, batch 8 at 224x224; the figure is the growth of the process's
peak memory over a plain forward of the same model. What allocators keep differs from process to process, so there are
several of each: medians, and the smallest and largest growth over the median forward. Writes results/overhead.json.

    python benchmarks/overhead.py [--processes 7]
"""

from __future__ import annotations

import argparse
import gc
import statistics
import subprocess
import sys
from pathlib import Path

import torch

import bitwright as bw
from models import ResNet
from results import write

TASKS = ("forward", "record", "calibrate")


def memory(field: str) -> int:
    """A field of /proc/self/status in bytes: VmRSS (resident now) or VmHWM (largest since the last reset)."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(field))


def growth(task: str) -> int:
    """Bytes by which the peak grows while ``task`` runs; the model, and what ``prepare`` makes, exist before."""
    torch.manual_seed(0)
    torch.set_num_threads(2)
    model, x = ResNet(50).eval(), torch.randn(8, 3, 224, 224)
    if task == "calibrate":
        model = bw.prepare(model, bw.Plan.preset("w8a8", model, x[:1]), inplace=True)
    with torch.no_grad():
        model(x[:1])
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM (Linux)
    before = memory("VmRSS")
    if task == "forward":
        with torch.no_grad():
            model(x)
    elif task == "record":
        bw.record(model, x)
    else:
        bw.calibrate(model, [x])
    return memory("VmHWM") - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, default=7)
    parser.add_argument("--task", choices=TASKS, help="only this one, in this process")
    options = parser.parse_args()
    if options.task:
        print(growth(options.task))
        return
    grown: dict[str, list[int]] = {task: [] for task in TASKS}
    for _ in range(options.processes):
        for task, sizes in grown.items():
            command = [sys.executable, __file__, "--task", task]
            sizes.append(int(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    forward = statistics.median(grown["forward"])
    results: dict[str, object] = {}
    for task, sizes in grown.items():
        low, middle, high = (size / forward for size in (min(sizes), statistics.median(sizes), max(sizes)))
        print(f"{task:10s} {middle * forward / 2**20:8.1f} MiB  {middle:.2f}x ({low:.2f} to {high:.2f})")
        results[task] = {"bytes": middle * forward, "ratio": middle, "low": low, "high": high}
    write("overhead", results)


if __name__ == "__main__":
    main()

"""README claim: recording and calibrating need less than 1.3x the activation memory of the model itself.

Each task runs in a process of its own at ResNet-50 size, batch 8 at 224x224; the figure is the growth of the process's
peak memory over a plain forward of the same model. Writes results/overhead.json.

    python benchmarks/overhead.py
"""

from __future__ import annotations

import gc
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
    if len(sys.argv) > 1:
        print(growth(sys.argv[1]))
        return
    runs = {
        task: subprocess.run([sys.executable, __file__, task], capture_output=True, text=True, check=True)
        for task in TASKS
    }
    grown = {task: int(run.stdout) for task, run in runs.items()}
    results: dict[str, object] = {}
    for task, size in grown.items():
        print(f"{task:10s} {size / 2**20:8.1f} MiB  {size / grown['forward']:.2f}x")
        results[task] = {"bytes": size, "ratio": size / grown["forward"]}
    write("overhead", results)


if __name__ == "__main__":
    main()

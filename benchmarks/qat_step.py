"""README claim: time and memory of one training step with quantization against float32 eager training, channels-last.

ResNet-18 for 32x32 images (batch 128) and a 6-layer BERT-shaped encoder (width 768, batch 8, 128 tokens), random
weights: this times shapes, not accuracy. W8A8 and W4A4 with learned scales (LSQ), SGD. Two modes: float32, and mixed
(integer forward, bfloat16 backward, by autocast). Each round times every variant once, in turn. Memory is what autograd
keeps for the backward, counted once per storage; the peak of the whole process is measured in a process per variant.
Writes results/qat_step_resnet.json and
qat_step_bert.json.

    python benchmarks/qat_step.py [--rounds 7] [--threads 2] [--model ResNet-18]
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bitwright as bw
from bitwright.train.step import StepRules
from models import CifarResNet18, Encoder
from results import write

VARIANTS = ("float32", "bf16 autocast", "w8a8", "w8a8 mixed", "w4a4", "w4a4 mixed", "w8a8 compiled")
JOINT = 50  # a step of the joint phase of 100: weights and scales learn


class Step:
    """A model, a batch and an optimizer: one call is one training step."""

    def __init__(self, name: str, variant: str) -> None:
        torch.manual_seed(0)
        if name == "ResNet-18":
            self.model: nn.Module = CifarResNet18().to(memory_format=torch.channels_last)
            self.x = torch.randn(128, 3, 32, 32).contiguous(memory_format=torch.channels_last)
            self.loss: Callable[[Tensor], Tensor] = lambda out: F.cross_entropy(out, torch.arange(128) % 10)
        else:
            self.model, self.x = Encoder(6), torch.randn(8, 128, 768)
            self.loss = lambda out: out.square().mean()
        self.model.train()
        self.rules: StepRules | None = None
        preset, _, mode = variant.partition(" ")
        self.narrow = mode in ("mixed", "autocast")
        if preset in ("w8a8", "w4a4"):
            self.model = bw.prepare(self.model, bw.Plan.preset(preset, self.model, self.x[:2]), inplace=True)
            bw.calibrate(self.model, [self.x[:8]])
            self.model.train()
            schedule = bw.Schedule(steps=100)
            self.optimizer: torch.optim.Optimizer = schedule.optimizer(self.model)
            self.rules = StepRules(self.model, schedule, self.optimizer)
            self.rules.before(JOINT)
        else:
            self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-4, momentum=0.9, weight_decay=1e-4)
        self.forward = torch.compile(self.model, fullgraph=True) if mode == "compiled" else self.model

    def __call__(self) -> None:
        if self.rules is not None:
            self.rules.before(JOINT)
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.narrow):
            loss = self.loss(self.forward(self.x).float())
        loss.backward()
        if self.rules is not None:
            self.rules.gradients()
        self.optimizer.step()
        if self.rules is not None:
            self.rules.after(JOINT)

    def kept_bytes(self) -> int:
        """Bytes that autograd keeps between forward and backward, parameters apart, each storage once."""
        own = {p.untyped_storage().data_ptr() for p in self.model.parameters()}
        kept: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            with torch.autocast("cpu", torch.bfloat16, enabled=self.narrow):
                loss = self.loss(self.forward(self.x).float())
        total = sum(kept.values())
        del loss
        return total


def peak_megabytes(name: str, variant: str, threads: int) -> float:
    """Peak resident memory of a process that does three steps, less that of the same process before the first."""
    command = [sys.executable, __file__, "--model", name, "--threads", str(threads), "--peak", variant]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def print_peak(name: str, variant: str) -> None:
    step = Step(name, variant)
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
    before = _resident("VmRSS")
    for _ in range(3):
        step()
    print(_resident("VmHWM") - before)


def _resident(field: str) -> float:
    """Megabytes of resident memory: now (VmRSS) or at most (VmHWM). A child's ru_maxrss would hold its parent's."""
    status = Path("/proc/self/status").read_text()
    return float(status.partition(f"{field}:")[2].split()[0]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--model", choices=["ResNet-18", "BERT, 6 layers"])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS))
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.peak:
        print_peak(options.model, options.peak)
        return
    for name in [options.model] if options.model else ["ResNet-18", "BERT, 6 layers"]:
        steps = {variant: Step(name, variant) for variant in options.variants}
        kept = {variant: step.kept_bytes() for variant, step in steps.items()}
        seconds: dict[str, list[float]] = {variant: [] for variant in steps}
        for step in steps.values():
            step()
        for _ in range(options.rounds):
            for variant, step in steps.items():
                start = time.perf_counter()
                step()
                seconds[variant].append(time.perf_counter() - start)
        for variant in steps:
            print(f"{name} {variant}: {1e3 * statistics.median(seconds[variant]):.0f} ms", flush=True)
        results: dict[str, object] = {}
        peaks = {variant: peak_megabytes(name, variant, options.threads) for variant in steps}
        for variant in steps:
            ratios = sorted(a / b for a, b in zip(seconds[variant], seconds["float32"], strict=True))
            row = {
                "ms": 1e3 * statistics.median(seconds[variant]),
                "time ratio": statistics.median(ratios),
                "lowest": ratios[0],
                "highest": ratios[-1],
                "kept MB": kept[variant] / 2**20,
                "kept ratio": kept[variant] / kept["float32"],
                "peak MB": peaks[variant],
                "peak ratio": peaks[variant] / peaks["float32"],
            }
            results[f"{name} {variant}"] = row
            print(
                f"{name:15s} {variant:14s} " + "  ".join(f"{key} {value:.2f}" for key, value in row.items()), flush=True
            )
        write(f"qat_step_{name.partition('-')[0].partition(',')[0].lower()}", results)


if __name__ == "__main__":
    main()

"""Where benchmark scripts write what they measured."""

from __future__ import annotations

import json
import platform
from pathlib import Path

import torch

from bitwright.kernels.cpu import BEST_ISA, ISA

FOLDER = Path(__file__).parent / "results"


def write(name: str, results: dict[str, object]) -> None:
    """``results/<name>.json`` with the machine's processor and its instruction set, threads and torch version."""
    FOLDER.mkdir(exist_ok=True)
    isa = next(name for name, number in ISA.items() if number == BEST_ISA)
    machine = {"processor": _processor(), "isa": isa, "threads": torch.get_num_threads(), "torch": torch.__version__}
    (FOLDER / f"{name}.json").write_text(json.dumps({"machine": machine, **results}, indent=1) + "\n")


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor()

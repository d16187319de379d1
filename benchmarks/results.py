"""Where benchmark scripts write what they measured."""

from __future__ import annotations

import json
import platform
from pathlib import Path

import torch

FOLDER = Path(__file__).parent / "results"


def write(name: str, results: dict[str, object]) -> None:
    """``results/<name>.json`` with the machine's processor, core count and torch version."""
    FOLDER.mkdir(exist_ok=True)
    machine = {"processor": _processor(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    (FOLDER / f"{name}.json").write_text(json.dumps({"machine": machine, **results}, indent=1) + "\n")


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor()

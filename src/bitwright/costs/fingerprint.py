"""Which machine this is, as far as latencies depend on it."""

from __future__ import annotations

import platform
import re
from importlib.metadata import version
from pathlib import Path

import torch

from bitwright.kernels.cpu import cpu_features

_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
_USUAL_CACHE = 32 << 20


def fingerprint() -> dict[str, str]:
    """Processor, instruction sets, threads and versions: what must be equal for a latency to hold.

    >>> sorted(fingerprint())
    ['bitwright', 'features', 'processor', 'threads', 'torch']
    """
    return {
        "processor": _processor(),
        "features": ", ".join(sorted(cpu_features())) or "no native kernels",
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "bitwright": version("bitwright"),
    }


def _processor(info: Path = Path("/proc/cpuinfo")) -> str:
    """Names of the cores as the system has them: x86 has model names, Arm numbers of parts, macOS its version."""
    text = info.read_text(encoding="utf-8", errors="replace") if info.exists() else ""
    names = re.findall(r"^(?:model name|CPU part)\s*:\s*(.+)$", text, re.MULTILINE)
    known = ", ".join(sorted({name.strip() for name in names}))
    return known or f"{platform.processor() or 'unknown'}, {platform.version()}"


def last_level_cache(folder: Path = _CACHES) -> int:
    """Bytes of the largest cache that core 0 sees; 32 MiB where the system does not say."""
    sizes = [path.read_text().strip() for path in folder.glob("index*/size")]
    matches = [re.fullmatch(r"(\d+)([KMG]?)", size) for size in sizes]
    return max((int(match[1]) * _UNITS[match[2]] for match in matches if match), default=_USUAL_CACHE)

"""What a device offers to the kernel table: the features that rows require."""

from __future__ import annotations

import importlib.util

import torch

from bitwright.kernels.cpu import cpu_features

_OLDEST = (8, 0)  # compute capability with bfloat16 and all integer products that the Triton rows use


def device_features(device: torch.device | str) -> frozenset[str]:
    """Features of a device: those of the CPU, ``cuda`` and ``triton`` of an NVIDIA GPU, none of any other device.

    ``triton`` needs the package and a GPU of compute capability 8.0 or later. The torch rows serve every device.

    >>> device_features("cpu") == cpu_features(), device_features("meta")
    (True, frozenset())
    """
    device = torch.device(device)
    if device.type == "cpu":
        return cpu_features()
    if device.type != "cuda" or torch.version.hip is not None:
        return frozenset()
    new = torch.cuda.get_device_capability(device) >= _OLDEST
    return frozenset({"cuda", "triton"} if new and importlib.util.find_spec("triton") is not None else {"cuda"})

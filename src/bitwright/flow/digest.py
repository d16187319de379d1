"""`digest`: a short text that tells data apart, to notice that a stored search belongs to other data."""

from __future__ import annotations

import zlib
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves


def digest(value: Any) -> str:
    """CRC-32 over the tensors, numbers and texts in nested lists, tuples and dicts; of other objects, their class.

    >>> digest([torch.zeros(2), 1]) == digest([torch.zeros(2), 1]) != digest([torch.zeros(3), 1])
    True
    """
    crc = 0
    for leaf in tree_leaves(value):
        crc = zlib.crc32(_bytes(leaf), crc)
    return f"{crc:08x}"


def _bytes(leaf: Any) -> bytes:
    if isinstance(leaf, Tensor):
        content = leaf.detach().cpu().contiguous()
        raw = content.reshape(-1).view(torch.uint8).numpy().tobytes() if content.numel() else b""
        return f"{leaf.dtype}{list(leaf.shape)}".encode() + raw
    if leaf is None or isinstance(leaf, (bool, int, float, str, bytes)):
        return repr(leaf).encode()
    return type(leaf).__qualname__.encode()

"""Nearest code in a table, for formats whose codes are not evenly spaced (NF4)."""

from __future__ import annotations

import torch
from torch import Tensor


def nearest_code(x: Tensor, codebook: tuple[float, ...]) -> Tensor:
    """Index of the codebook entry nearest to each value, as float32; a value half-way takes the lower entry.

    ``codebook`` is ascending. The decision points are the midpoints between neighbours, computed in float32.

    >>> nearest_code(torch.tensor([-2.0, 0.04, 0.9]), (-1.0, 0.0, 0.1, 1.0)).tolist()
    [0.0, 1.0, 3.0]
    """
    table = torch.tensor(codebook, dtype=torch.float32, device=x.device)
    return torch.bucketize(x.detach().contiguous(), (table[1:] + table[:-1]) / 2).float()

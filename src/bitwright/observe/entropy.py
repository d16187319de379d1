"""The clipping threshold that loses least information: KL divergence, by the rule of TensorRT's entropy calibrator.

Source: Migacz, "8-bit inference with TensorRT" (GTC 2017). For every candidate of i bins the clipped histogram P keeps
the counts beyond in its last bin, and Q is what few levels leave of the first i bins; the candidate with the smallest
KL(P || Q) is taken, the widest of equals.
"""

from __future__ import annotations

import torch
from torch import Tensor

BINS = 2048
_START = 128


def threshold_bins(counts: Tensor, levels: int) -> int:
    """Number of bins below the threshold, for the ``counts [n]`` of ``|x|`` in bins of equal width.

    ``levels`` is how many codes the magnitudes have: 2**(bits - 1) for signed codes, 2**bits for unsigned ones. The
    count of bin 0 is replaced by that of bin 1, since the zeros behind a ReLU would decide alone. Multiplying all
    counts by a constant changes nothing.

    >>> threshold_bins(torch.ones(2048), 128)
    2048
    """
    counts = counts.double().clone()
    counts[0] = counts[1] if len(counts) > 1 else counts[0]
    start = max(_START, levels)
    if len(counts) <= start or not counts.any():
        return len(counts)
    divergences = _divergences(counts / counts.sum(), torch.arange(start, len(counts) + 1), levels)
    return len(counts) - int(divergences.flip(0).argmin())


def _divergences(counts: Tensor, bins: Tensor, levels: int) -> Tensor:
    """KL(P || Q) for each of ``bins [m]``; infinite where Q is 0 and P is not. ``counts`` add up to 1.

    All sums over bins are differences of running sums at the edges of the levels, ``ceil(level * bins / levels)``.
    """
    mass, filled, entropy = (_running(part) for part in (counts, (counts > 0).double(), counts.xlogy(counts)))
    edges = -((-torch.arange(levels + 1) * bins.unsqueeze(1)) // levels)
    level_mass, level_filled = mass[edges].diff(dim=1), filled[edges].diff(dim=1)
    share = level_mass / level_filled.clamp(min=1)
    inside, last = mass[bins], counts[bins - 1]
    beyond = (1 - inside).clamp(min=0) * (bins < len(counts))
    p_log_p = entropy[bins - 1] + torch.xlogy(last + beyond, last + beyond)
    p_log_q = torch.xlogy(level_mass, share).sum(1) + torch.xlogy(beyond, torch.where(last > 0, share[:, -1], 0.0))
    return p_log_p - p_log_q + torch.where(inside > 0, inside.log(), torch.inf)


def _running(part: Tensor) -> Tensor:
    return torch.cat([part.new_zeros(1), part.cumsum(0)])

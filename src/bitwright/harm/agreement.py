"""How far a proxy of harm agrees with measured harm, by ranks; a proxy that does not is refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from bitwright.errors import SearchError
from bitwright.harm.sensitivity import MEASURED, Sensitivity

LEAST_RANK = 0.6
_FEWEST = 8


def ranks(values: Sequence[float]) -> Tensor:
    """Ranks from 0, equal values share the mean of theirs.

    >>> ranks([3.0, 1.0, 3.0]).tolist()
    [1.5, 0.0, 1.5]
    """
    x = torch.tensor(values, dtype=torch.float64)
    return ((x[:, None] > x).sum(1) + ((x[:, None] == x).sum(1) - 1) / 2).double()


def spearman(one: Sequence[float], other: Sequence[float]) -> float:
    """Correlation of ranks, in [-1, 1]; 0 where one of them is constant.

    >>> round(spearman([1.0, 2.0, 3.0], [10.0, 100.0, 1000.0]), 6)
    1.0
    """
    a, b = (x - x.mean() for x in (ranks(one), ranks(other)))
    return (a @ b / (a.norm() * b.norm()).clamp(min=1e-300)).item()


def agreement(proxy: Sensitivity, measured: Sensitivity) -> Sensitivity:
    """The proxy with its ``rank`` filled in: Spearman correlation with measured harm over the rows that both have.

    Rows of ``float`` say nothing: both give them 0. Raises `SearchError` for fewer than 8 common rows, and for a
    ``measured`` that is itself a proxy.
    """
    if measured.method not in MEASURED:
        raise SearchError(f"a proxy is compared with measured harm ({' or '.join(MEASURED)}), got {measured.method!r}")
    common = [key for key in proxy.table if key in measured.table and key[1] != "float"]
    if len(common) < _FEWEST:
        raise SearchError(f"the two have {len(common)} rows in common; {_FEWEST} are needed to compare ranks")
    pairs = [[of.table[key].harm for key in common] for of in (proxy, measured)]
    return replace(proxy, rank=spearman(*pairs))


def check(found: Sensitivity, least: float = LEAST_RANK) -> None:
    """Raise `SearchError` for a proxy whose rank correlation with measured harm is unknown or below ``least``."""
    if found.method in MEASURED:
        return
    if found.rank is None:
        raise SearchError(f"{found.method} is a proxy; compare it with measured harm first: agreement(proxy, measured)")
    if found.rank < least:
        raise SearchError(
            f"{found.method} has a rank correlation of {found.rank:.2f} with measured harm, below {least:g}; measure "
            "the harm instead, or pass a lower limit"
        )

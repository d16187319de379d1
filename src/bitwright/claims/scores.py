"""Scores of single items, from a score that may be asked again: ``score(model, batch) -> [items]``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bitwright.claims.paired import Paired, paired
from bitwright.errors import CertificateError
from bitwright.graph.dataflow import evaluating

Score = Callable[[nn.Module, Any], Any]


def compared(
    model: nn.Module, shipped: nn.Module, batches: Sequence[Any], score: Score, score_range: tuple[float, float] | None
) -> Paired:
    """Paired scores of two models on all batches; raises `CertificateError` for scores that are not repeatable."""
    before, after = scores_of(model, "the float model", batches, score), scores_of(shipped, "shipped", batches, score)
    if before.shape != after.shape:
        raise CertificateError(
            f"score(model, batch) gave {len(before):,} scores for the float model and {len(after):,} for the shipped "
            "one; it must give one per item"
        )
    return paired(before, after, score_range)


def scores_of(model: nn.Module, name: str, batches: Sequence[Any], score: Score) -> Tensor:
    """One score per item of all batches, ``[items]`` in float64; ``name`` is what errors call the model.

    Raises `CertificateError` for scores that are not finite, that differ when asked again, or are not one per item.
    """
    with torch.no_grad(), evaluating(model):
        parts = [_items(score(model, batch), name) for batch in batches]
        again = _items(score(model, batches[0]), name)
    scores = torch.cat(parts)
    if bad := scores.isnan().nonzero().flatten().tolist():
        raise CertificateError(f"the score of item {bad[0]} of {name} is NaN ({len(bad)} in all); a score is a number")
    if not bool(scores.isfinite().all()):
        number = int((~scores.isfinite()).nonzero()[0])
        raise CertificateError(f"the score of item {number} of {name} is {scores[number].item()}; clamp it to a range")
    if not torch.equal(again, parts[0]):
        raise CertificateError(
            f"score(model, batch) gave two answers for {name} on one batch; remove what is random in it (sampling, "
            "augmentation, dropout), or seed it inside the function"
        )
    return scores


def _items(found: Any, name: str) -> Tensor:
    if not isinstance(found, Tensor) or found.dim() != 1:
        shape = f"shape {list(found.shape)}" if isinstance(found, Tensor) else f"type {type(found).__name__}"
        raise CertificateError(f"score(model, batch) must return a tensor with one score per item, got {shape}, {name}")
    return found.detach().double().cpu()

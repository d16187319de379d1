"""Alternating latency measurement: models take turns, so that a drifting machine slows all of them alike."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bitwright.errors import NumericsError
from bitwright.graph.dataflow import call, evaluating

_SAMPLE_SECONDS = 0.004  # a sample repeats the call until it lasts about this long


@dataclass(frozen=True, slots=True)
class Ratio:
    """How many times faster than the first model: median over rounds, with the 10 % and 90 % quantiles."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f}x ({self.low:.2f}-{self.high:.2f})"


@dataclass(frozen=True, slots=True)
class Measurement:
    """One model's latency (median seconds per call), its speed relative to the first model, and its stored bytes."""

    name: str
    seconds: float
    speed: Ratio
    bytes: int


def measure(models: Mapping[str, nn.Module], example: Any, *, rounds: int = 30) -> list[Measurement]:
    """Time ``model(example)`` for each model in alternation, in eval mode without gradients, on torch's thread count.

    The first model is the base of all ratios; a ratio is taken within each round. Raises `NumericsError` without
    models.
    """
    if not models or rounds < 1:
        raise NumericsError("measuring needs at least one model and one round")
    times: dict[str, list[float]] = {name: [] for name in models}
    repeats = {name: _repeats(model, example) for name, model in models.items()}
    for _ in range(rounds):
        for name, model in models.items():
            times[name].append(_seconds(model, example, repeats[name]))
    base = torch.tensor(next(iter(times.values())), dtype=torch.float64)
    measured = []
    for name, model in models.items():
        sample = torch.tensor(times[name], dtype=torch.float64)
        low, median, high = (base / sample).quantile(torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)).tolist()
        measured.append(Measurement(name, sample.median().item(), Ratio(median, low, high), model_bytes(model)))
    return measured


def model_bytes(model: nn.Module) -> int:
    """Bytes of everything a model's file holds, shared tensors once.

    >>> model_bytes(nn.Linear(4, 2))
    40
    """
    tensors = {(t.data_ptr(), t.numel()): t.nbytes for t in model.state_dict().values()}
    return sum(tensors.values())


def _repeats(model: nn.Module, example: Any) -> int:
    _seconds(model, example, 2)
    return max(1, min(1000, round(_SAMPLE_SECONDS / max(_seconds(model, example, 1), 1e-7))))


def _seconds(model: nn.Module, example: Any, repeats: int) -> float:
    with torch.inference_mode(), evaluating(model):
        start = time.perf_counter()
        for _ in range(repeats):
            call(model, example)
        return (time.perf_counter() - start) / repeats

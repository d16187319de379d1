"""The median time of a call, with its standard error; candidates take turns call by call."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

_WARM_UP, _FEWEST, _USUAL = 3, 5, 30  # rounds
_SETTLE = 1  # untimed calls before each timed one


@dataclass(frozen=True, slots=True)
class Timing:
    """Median seconds of one call, the standard error of that median, and the number of calls.

    ``share`` is the processor time that this process got meanwhile over the time that passed, at most 1: on a machine
    that is busy with other things it is less, and the times are theirs too.
    """

    seconds: float
    error: float
    count: int
    share: float = 1.0


def timing(samples: Sequence[float], share: float = 1.0) -> Timing:
    """The median, and as its standard error half the span of the order statistics ``sqrt(n) / 2`` ranks around it.

    That holds for every distribution: the rank of the median among n samples has standard deviation ``sqrt(n) / 2``.

    >>> timing([5.0, 1.0, 2.0, 3.0, 4.0, 6.0, 7.0, 8.0, 9.0])
    Timing(seconds=5.0, error=1.5, count=9, share=1.0)
    """
    ordered, count = sorted(samples), len(samples)
    middle, width = (count - 1) / 2, math.sqrt(count) / 2

    def at(rank: float) -> float:
        below = math.floor(rank)
        above = min(below + 1, count - 1)
        return ordered[below] + (rank - below) * (ordered[above] - ordered[below])

    low, high = at(max(0.0, middle - width)), at(min(count - 1.0, middle + width))
    return Timing(at(middle), (high - low) / 2, count, share)


def in_turns(candidates: Sequence[Sequence[Callable[[], object]]], precision: float, seconds: float) -> list[Timing]:
    """Time of a call of each candidate, which is a list of equal copies that are called one after the other.

    A round times each candidate once, so that a drifting machine slows all of them alike; untimed calls before it see
    to it that code of this candidate, not of the one before, is what the caches hold. Rounds go on until every standard
    error is below ``precision`` times its median (at least 30), or for ``seconds`` per candidate (at least 5).
    """
    samples: list[list[float]] = [[] for _ in candidates]
    begin, worked = time.perf_counter(), time.process_time()
    end = begin + seconds * len(candidates)
    with torch.inference_mode():
        for turn in itertools.count():
            for own, copies in zip(samples, candidates, strict=True):
                first = turn * (_SETTLE + 1)
                *before, last = (copies[(first + at) % len(copies)] for at in range(_SETTLE + 1))
                for run in before:
                    run()
                start = time.perf_counter()
                last()
                taken = time.perf_counter() - start
                if turn >= _WARM_UP:
                    own.append(taken)
            rounds = turn + 1 - _WARM_UP
            if rounds >= _FEWEST and time.perf_counter() >= end:
                break
            if rounds >= _USUAL and rounds % 10 == 0 and _precise(samples, precision):
                break
    share = (time.process_time() - worked) / (time.perf_counter() - begin)
    return [timing(own, min(share, 1.0)) for own in samples]


def _precise(samples: Sequence[Sequence[float]], precision: float) -> bool:
    return all(found.error <= precision * found.seconds for found in map(timing, samples))

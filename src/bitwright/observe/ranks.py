"""What the ranks of a process group know together.

Calibration data may be split over ranks; what decides something must then come from all of it, or the models of the
ranks drift apart. Every function here is collective: all ranks call it, in the same order. Without a process group a
value is its own answer, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from bitwright.errors import BitwrightError, CalibrationError

T = TypeVar("T")
Number = TypeVar("Number", int, float)


def world_size() -> int:
    """Number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def all_reduce(x: Tensor, op: dist.ReduceOp.RedOpType) -> None:
    """`torch.distributed.all_reduce` in place where a process group exists, else nothing."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(x, op)


def gathered(value: T) -> list[T]:
    """The values of all ranks, in the order of ranks; they travel pickled.

    >>> gathered("mine")
    ['mine']
    """
    if world_size() == 1:
        return [value]
    found = [value] * world_size()
    dist.all_gather_object(found, value)
    return found


def first(value: T) -> T:
    """The value of rank 0: for what is learned from one example, which must be the same example for all."""
    if world_size() == 1:
        return value
    held = [value]
    dist.broadcast_object_list(held, src=0)
    return held[0]


def sums(*numbers: Number) -> list[Number]:
    """The sum over ranks of each number; integers stay exact.

    >>> sums(3, 0.5)
    [3, 0.5]
    """
    return [sum(column) for column in zip(*gathered(numbers), strict=True)]  # type: ignore[return-value]


def before(count: int) -> int:
    """The sum of the counts of the ranks before this one: where its data begins if all data stood in one row.

    >>> before(7)
    0
    """
    return 0 if world_size() == 1 else sum(gathered(count)[: dist.get_rank()])


def total(x: Tensor) -> Tensor:
    """The sum of a tensor over ranks, maybe in place; a rank with nothing to add may pass a tensor without elements."""
    if world_size() == 1:
        return x
    shape, dtype = max(gathered((tuple(x.shape), x.dtype)), key=lambda kind: math.prod(kind[0]))
    if not math.prod(shape):
        return x
    x = x.contiguous() if x.numel() else torch.zeros(shape, dtype=dtype, device=x.device)
    all_reduce(x, dist.ReduceOp.SUM)
    return x


def average_gradients(parameters: Iterable[Tensor]) -> None:
    """Replace gradients by their mean over ranks, in one exchange; a missing one counts as zero."""
    if world_size() == 1:
        return
    held = list(parameters)
    flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in held])
    all_reduce(flat, dist.ReduceOp.SUM)
    for parameter, part in zip(held, (flat / world_size()).split([p.numel() for p in held]), strict=True):
        parameter.grad = part.view_as(parameter).clone()


@contextmanager
def together(kind: type[BitwrightError] = CalibrationError) -> Iterator[None]:
    """What raises an error inside on one rank raises one on all; nothing inside may be collective.

    Where a rank raises ``kind``, all raise it with the text of the first that did. Of other errors each rank raises its
    own, and those that have none `CalibrationError`.
    """
    if world_size() == 1:
        yield
        return
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    failures = [
        (rank, *found)
        for rank, found in enumerate(gathered(failure and (not isinstance(failure, kind), str(failure))))
        if found
    ]
    if failure is not None and not isinstance(failure, kind):
        raise failure
    for rank, strange, text in sorted(failures, key=lambda found: not found[1]):
        raise (CalibrationError if strange else kind)(f"rank {rank}: {text}") from failure

"""`Samples`: the calls that reach a module as single rows, some of them held out, drawn in batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from bitwright.algorithms.layers import NotApplicableError
from bitwright.algorithms.lockstep import Call
from bitwright.observe import ranks

_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device)
HELD_OUT = 8
"""One row in so many is held out."""


@dataclass(frozen=True, slots=True)
class _Row:
    """The leaves of one call, tensors cut to one row of axis 0; rows of one shape can be joined."""

    leaves: list[Any]
    spec: TreeSpec
    joins: bool

    @property
    def shape(self) -> tuple[Any, ...]:
        return tuple(tuple(leaf.shape) if isinstance(leaf, Tensor) else leaf for leaf in self.leaves)


class Samples:
    """What reached a module, in rows: of axis 0 where all its tensors have that axis in common, else whole calls.

    Raises `NotApplicableError` for calls that hold state (a cache of keys and values) and for a single row.
    """

    def __init__(self, calls: Sequence[Call]) -> None:
        rows = [row for call in calls for row in _rows(call)]
        self.held = rows[HELD_OUT - 1 :: HELD_OUT] or rows[1:2]
        kept = {id(row) for row in self.held}
        groups: dict[tuple[Any, ...], list[_Row]] = {}
        for row in rows:
            if id(row) not in kept:
                groups.setdefault(row.shape, []).append(row)
        self.groups = list(groups.values())
        if not self.held or not self.groups:
            raise NotApplicableError(f"{len(rows)} row of data reached it; at least 2 are needed, one to be held out")
        self._sizes = torch.tensor([float(len(group)) for group in self.groups])

    def draw(self, size: int, generator: torch.Generator) -> Call:
        """A random batch of at most ``size`` rows (of one whole call, where calls cannot be cut)."""
        group = self.groups[int(torch.multinomial(self._sizes, 1, generator=generator))]
        count = size if group[0].joins else 1
        chosen = torch.randperm(len(group), generator=generator)[:count].tolist()
        return _joined([group[i] for i in chosen])

    def held_out(self, size: int) -> Iterator[Call]:
        """The rows that were never drawn, in batches of at most ``size``."""
        start = 0
        for i in range(1, len(self.held) + 1):
            count = size if self.held[start].joins else 1
            if i == len(self.held) or i - start == count or self.held[i].shape != self.held[start].shape:
                yield _joined(self.held[start:i])
                start = i


def first_tensor(tree: Any) -> Tensor:
    """The first tensor of an output: what a module passes on to the next."""
    return next(leaf for leaf in tree_flatten(tree)[0] if isinstance(leaf, Tensor))


def squared_error(calls: Iterable[Call], run: Callable[[Call], Any]) -> float:
    """Sum of squared differences from the float outputs, over the calls of all ranks."""
    with torch.no_grad():
        own = sum((first_tensor(run(call)) - first_tensor(call.float_output)).square().sum().item() for call in calls)
    return ranks.sums(own)[0]


def _rows(call: Call) -> list[_Row]:
    tree = (call.args, call.kwargs, call.float_args, call.float_kwargs, first_tensor(call.float_output))
    leaves, spec = tree_flatten(tree)
    strange = next((leaf for leaf in leaves if not isinstance(leaf, (Tensor, *_PLAIN))), None)
    if strange is not None:
        raise NotApplicableError(
            f"it is called with a {type(strange).__name__}, which may hold state (use_cache=False?)"
        )
    lengths = {len(leaf) if leaf.dim() > 1 else 0 for leaf in leaves if isinstance(leaf, Tensor)}
    if len(lengths) > 1 or 0 in lengths:
        return [_Row(leaves, spec, joins=False)]

    def cut(leaf: Any, i: int) -> Any:
        return leaf[i : i + 1] if isinstance(leaf, Tensor) else leaf

    return [_Row([cut(leaf, i) for leaf in leaves], spec, joins=True) for i in range(lengths.pop())]


def _joined(rows: Sequence[_Row]) -> Call:
    if len(rows) == 1:
        leaves = rows[0].leaves
    else:
        parts = zip(*(row.leaves for row in rows), strict=True)
        leaves = [torch.cat(part) if isinstance(part[0], Tensor) else part[0] for part in parts]
    return Call(*tree_unflatten([_in_layout(leaf) for leaf in leaves], rows[0].spec))


def _in_layout(leaf: Any) -> Any:
    """Images in channels-last memory: convolutions take a third of the time in it."""
    return leaf.contiguous(memory_format=torch.channels_last) if isinstance(leaf, Tensor) and leaf.dim() == 4 else leaf

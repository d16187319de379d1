"""`Shared`: what layers of one stored weight share, so that tied weights are laid out, counted and saved once.

Nothing here keeps a tensor alive: layers hold their constants, state dicts hold what they save.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

_Reference = tuple[weakref.ref[Tensor], int] | None


class Shared:
    """Tensors derived from one weight, by name, for as long as somebody else holds them unchanged."""

    def __init__(self) -> None:
        self._known: dict[Hashable, list[_Reference]] = {}

    def get(self, key: Hashable, make: Callable[[], Sequence[Tensor | None]]) -> list[Tensor | None]:
        """The tensors of a key; made where none are known, one is gone, or one was written to since."""
        known = _alive(self._known.get(key))
        if known is None:
            known = list(make())
            if any(part is not None and part.is_inference() for part in known):
                return known  # nobody counts how often those are written to, so they are not shared
            self._known[key] = [None if part is None else (weakref.ref(part), part._version) for part in known]
        return known

    def __reduce__(self) -> tuple[type[Shared], tuple[()]]:
        return Shared, ()  # copies of its layers derive tensors of their own


def _alive(references: list[_Reference] | None) -> list[Tensor | None] | None:
    if references is None:
        return None
    found: list[Tensor | None] = []
    for reference in references:
        part = None if reference is None else reference[0]()
        if reference is not None and (part is None or part._version != reference[1]):
            return None
        found.append(part)
    return found


_BY_SOURCE: Any = WeakIdKeyDictionary()


def shared_by(packed: Tensor, others: Sequence[Tensor]) -> Shared:
    """One and the same `Shared` for all layers that are made from these packed bytes, and from equal other parts."""
    if packed in _BY_SOURCE:
        version, seen, found = _BY_SOURCE[packed]
        same = version == packed._version and len(seen) == len(others)
        if same and all(torch.equal(a, b) for a, b in zip(seen, others, strict=True)):
            return found
    found = Shared()
    if packed.is_inference():
        return found
    _BY_SOURCE[packed] = (packed._version, [part.clone() for part in others], found)
    return found

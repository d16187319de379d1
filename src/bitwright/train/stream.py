"""`Stream`: batches without end, with a position that a run can be continued from."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bitwright.errors import TrainingError

Batches = Iterable[Any] | Callable[[int], Iterable[Any]]


class Stream:
    """Reads ``batches`` (or ``batches(epoch)``) again and again.

    The position is the epoch, the index in it, and the random state that the epoch started with: reading the epoch
    again from that state gives the same order, so the batches before the index can be skipped. A ``set_epoch`` of the
    loader's sampler is called with the epoch.
    """

    def __init__(self, batches: Batches) -> None:
        self.batches = batches
        self.epoch = self.index = self.read = 0
        self.random: dict[str, Any] = {}
        self._iterator: Iterator[Any] | None = None

    def next(self, steps: int) -> Any:
        """The next batch; raises `TrainingError` when an epoch has none. ``steps`` is for the message."""
        while True:
            if self._iterator is None:
                self.random = random_state(self._generator)
                self._iterator = self._open()
            try:
                batch = next(self._iterator)
            except StopIteration:
                if self.index == 0:
                    raise TrainingError(
                        f"batches ran out after {self.read} of {steps} steps; "
                        "pass a list or a DataLoader, which can be read again"
                    ) from None
                self._iterator, self.epoch, self.index = None, self.epoch + 1, 0
                continue
            self.index, self.read = self.index + 1, self.read + 1
            return batch

    def state_dict(self) -> dict[str, Any]:
        """The position."""
        return {"epoch": self.epoch, "index": self.index, "read": self.read, "random": self.random}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a position; set the random state of the run afterwards."""
        self.epoch, self.index, self.read, self.random = (state[key] for key in ("epoch", "index", "read", "random"))
        if self.random:
            set_random_state(self.random, self._generator)
            self._iterator = self._open()
            for skipped in range(self.index):
                if next(self._iterator, self) is self:
                    raise TrainingError(
                        f"epoch {self.epoch} now ends after {skipped} batches, but the run had read {self.index} "
                        "of it; continue with the same batches"
                    )

    def _open(self) -> Iterator[Any]:
        if not isinstance(self.batches, Iterable):
            return iter(self.batches(self.epoch))
        sampler = getattr(self.batches, "sampler", None)
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(self.epoch)  # type: ignore[union-attr]
        return iter(self.batches)

    @property
    def _generator(self) -> torch.Generator | None:
        """A loader's own source of randomness, which is not part of the global state."""
        found = getattr(self.batches, "generator", None)
        return found if isinstance(found, torch.Generator) else None


def random_state(generator: torch.Generator | None = None) -> dict[str, Any]:
    """The state of every source of randomness: torch, its CUDA devices, Python, NumPy, and ``generator``."""
    version, numbers, gauss = random.getstate()
    name, keys, *rest = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": [version, torch.tensor(numbers, dtype=torch.int64), gauss],
        "numpy": [str(name), torch.from_numpy(np.asarray(keys, dtype=np.int64)), *(float(value) for value in rest)],
    }
    return state if generator is None else {**state, "generator": generator.get_state()}


def set_random_state(state: dict[str, Any], generator: torch.Generator | None = None) -> None:
    """Set every source of randomness to a `random_state`."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(_ints(numbers)), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), int(position), int(has_gauss), cached))
    if generator is not None and "generator" in state:
        generator.set_state(state["generator"])


def _ints(values: Tensor) -> list[int]:
    return [int(value) for value in values.tolist()]

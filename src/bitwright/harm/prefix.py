"""What runs before the changed layer gives what it gave in the float model: it is recorded, and not computed again.

To measure one site alone the float model would run up to that site for each of its specs, on every batch. On average
that is half of all work. Here every module that ends before the site's layers begin returns its recorded output.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate, count
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

_MEMORY = 1 << 29  # bytes of recorded outputs; batches beyond that run the whole model

See = Callable[[nn.Module, Any], list[Tensor]]
Outputs = dict[str, list[Any]]


class Prefix:
    """Outputs of a model's modules on ``batches``, as many as one site at a time needs.

    ``see(model, batch)`` runs the model and returns what is compared. What is recorded for a site is tried on the model
    itself first: where ``see`` then returns other numbers on the first batch (modules with side effects), nothing is
    left out. The order of modules is taken from the first batch.
    """

    def __init__(self, model: nn.Module, batches: Sequence[Any], see: See) -> None:
        self.model, self.batches, self.see = model, batches, see
        self.begins, self.ends, self.base = _order(model, batches[0], see)
        self.outputs: list[Outputs] = [{} for _ in batches]

    def reach(self, paths: Sequence[str]) -> None:
        """Record what runs before the first call of any of ``paths``."""
        wanted = self._before(paths)
        used, outputs = 0, []
        for batch, known in zip(self.batches, self.outputs, strict=True):
            found = self._recorded(batch, known, wanted) if used < _MEMORY else {}
            used += sum(leaf.nbytes for leaf in tree_leaves(found) if isinstance(leaf, Tensor))
            outputs.append(found)
        self.outputs = outputs
        if wanted and not self._exact():
            self.outputs = [{} for _ in self.batches]

    def seen(self, changed: nn.Module) -> Iterator[list[Tensor]]:
        """What ``see`` returns of ``changed`` on each batch.

        Where a recorded module differs from that of the model (a step of the calibration has rescaled its weights) all
        of ``changed`` runs.
        """
        known = dict(changed.named_modules())
        paths = {path for found in self.outputs for path in found}
        same = all(path in known and _alike(known[path], self.model.get_submodule(path)) for path in paths)
        for batch, found in zip(self.batches, self.outputs, strict=True):
            with _returning([(known[path], outputs) for path, outputs in found.items()] if same else []):
                seen = self.see(changed, batch)
            yield seen

    def _before(self, paths: Sequence[str]) -> list[str]:
        """The outermost modules that have ended for the last time when the first of ``paths`` begins."""
        if not all(path in self.begins for path in paths):
            return []
        begin = min(self.begins[path] for path in paths)
        over = {path for path, end in self.ends.items() if end < begin}
        return [path for path in over if not over.intersection(_parents(path))]

    def _recorded(self, batch: Any, known: Outputs, wanted: Sequence[str]) -> Outputs:
        """What ``wanted`` return on ``batch``; what is ``known`` from an earlier site is not computed again."""
        found: Outputs = {path: known.get(path, []) for path in wanted}
        missing = [path for path in wanted if path not in known]
        if not missing:
            return found
        inside = {parent for path in missing for parent in _parents(path)}
        hooks = [self.model.get_submodule(path).register_forward_hook(_keeping(found[path])) for path in missing]
        try:
            with _returning([(self.model.get_submodule(path), known[path]) for path in known if path not in inside]):
                self.see(self.model, batch)
        finally:
            for hook in hooks:
                hook.remove()
        return found

    def _exact(self) -> bool:
        try:
            seen = next(self.seen(self.model))
        except Exception:  # a module that did not run has not left what a later one looks for
            return False
        return len(seen) == len(self.base) and all(map(torch.equal, seen, self.base))


def _order(model: nn.Module, batch: Any, see: See) -> tuple[dict[str, int], dict[str, int], list[Tensor]]:
    """When each module begins for the first time and ends for the last one, as counts; and what ``see`` returns."""
    begins: dict[str, int] = {}
    ends: dict[str, int] = {}
    clock = count()

    def begin(path: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            begins.setdefault(path, next(clock))

        return hook

    def end(path: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            ends[path] = next(clock)

        return hook

    modules = [(path, module) for path, module in model.named_modules() if path]
    hooks = [module.register_forward_pre_hook(begin(path)) for path, module in modules]
    hooks += [module.register_forward_hook(end(path)) for path, module in modules]
    try:
        return begins, ends, see(model, batch)
    finally:
        for hook in hooks:
            hook.remove()


def _parents(path: str) -> list[str]:
    """The paths of the modules that a module lies in, the nearest one last.

    >>> _parents("layer1.0.conv")
    ['layer1', 'layer1.0']
    """
    return list(accumulate(path.split(".")[:-1], "{}.{}".format))


def _copy(value: Any) -> Any:
    """Tensors on their own memory: models change their activations in place."""
    return tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, value)


def _keeping(outputs: list[Any]) -> Callable[..., None]:
    def hook(_: nn.Module, args: Any, output: Any) -> None:
        outputs.append(_copy(output))

    return hook


@contextmanager
def _returning(modules: Sequence[tuple[nn.Module, Sequence[Any]]]) -> Iterator[None]:
    """Inside the block the calls of each module return its outputs, one after the other."""
    own = [(module, vars(module).get("forward")) for module, _ in modules]
    try:
        for module, outputs in modules:
            module.forward = _next_of(outputs)
        yield
    finally:
        for module, forward in own:
            del module.forward
            if forward is not None:
                module.forward = forward


def _next_of(outputs: Sequence[Any]) -> Callable[..., Any]:
    left = iter(outputs)
    return lambda *_, **__: _copy(next(left))


def _alike(one: nn.Module, other: nn.Module) -> bool:
    """Whether two modules are of one class and have the same parameters and buffers."""
    a, b = one.state_dict(), other.state_dict()
    same = type(one) is type(other) and a.keys() == b.keys()
    return one is other or (same and all(torch.equal(a[name], b[name]) for name in a))

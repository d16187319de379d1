"""`visits`: stop at every layer of a running model, with the inputs of all batches at once.

Methods that choose the codes of a layer need its inputs as the quantized layers before it produce them, and what the
float model computes there. Running the model anew up to each layer costs the square of the depth. Here each batch runs
the model once, in a thread of its own that waits at every chosen module until it is that module's turn; one thread runs
at a time. Two runs per batch go through the same modules: one in float, which waits *behind* a module that is still
unchanged, and one in simulation, which waits *before* it. So any forward works, whatever its control flow, and memory
holds the activations alive at one place for all batches, nothing else.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from bitwright.graph.dataflow import evaluating
from bitwright.nn.quantizer import Quantizer, Stage
from bitwright.observe import ranks

Forward = Callable[[nn.Module, Any], Any]


@dataclass(frozen=True, slots=True)
class Call:
    """One batch at a module: arguments from the quantized prefix, those of the float model, and its float output."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    float_args: tuple[Any, ...]
    float_kwargs: dict[str, Any]
    float_output: Any


@dataclass(frozen=True, slots=True)
class Visit:
    """A module whose turn it is, with one `Call` per batch that reaches it. Change it now; later modules see that."""

    path: str
    module: nn.Module
    calls: list[Call]
    done: int
    total: int


class _Abandoned(BaseException):
    """Ends a waiting thread."""


class _Run:
    """One batch's forward in a thread that stops at modules."""

    def __init__(self, model: nn.Module, batch: Any, forward: Forward) -> None:
        self._go, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        self.at: str | None = None
        self.seen: Any = None
        self.error: BaseException | None = None
        self.finished = False
        self._abandoned = False
        self._thread = threading.Thread(target=self._work, args=(model, batch, forward), daemon=True)
        self._thread.start()

    def _work(self, model: nn.Module, batch: Any, forward: Forward) -> None:
        self._go.acquire()
        try:
            if not self._abandoned:
                _here.run = self
                with torch.no_grad():  # grad mode belongs to a thread
                    forward(model, batch)
        except _Abandoned:
            pass
        except BaseException as error:
            self.error = error
        self.at, self.seen, self.finished = None, None, True
        self._stopped.release()

    def resume(self) -> None:
        """Let the forward run to its next stop or its end; raises what it raised."""
        self._go.release()
        self._stopped.acquire()
        if self.error is not None:
            raise self.error

    def stop(self, path: str, seen: Any) -> None:
        """Called in the thread: wait at a module."""
        self.at, self.seen = path, seen
        self._stopped.release()
        self._go.acquire()
        self.seen = None
        if self._abandoned:
            raise _Abandoned

    def abandon(self) -> None:
        """End the thread wherever it waits."""
        self._abandoned = True
        if self._thread.is_alive():
            self._go.release()
            self._thread.join()


_here = threading.local()  # which run a thread belongs to


@dataclass
class _Hooks:
    """Stops the runs of both kinds at modules that were not visited yet."""

    modules: dict[str, nn.Module]
    floating: bool = False
    visited: set[str] = field(default_factory=set)

    def before(self, path: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        run: _Run | None = getattr(_here, "run", None)
        if run is not None and not self.floating and path not in self.visited:
            run.stop(path, (args, kwargs))

    def behind(self, path: str, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        run: _Run | None = getattr(_here, "run", None)
        if run is not None and self.floating and path not in self.visited:
            run.stop(path, (args, kwargs, out))

    @contextmanager
    def attached(self) -> Iterator[None]:
        handles = []
        for path, module in self.modules.items():
            handles += [
                module.register_forward_pre_hook(
                    lambda _, args, kwargs, path=path: self.before(path, args, kwargs), with_kwargs=True
                ),
                module.register_forward_hook(
                    lambda _, args, kwargs, out, path=path: self.behind(path, args, kwargs, out), with_kwargs=True
                ),
            ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def visits(
    model: nn.Module,
    batches: Sequence[Any],
    forward: Forward,
    paths: Iterable[str],
    floats: Mapping[nn.Parameter, Tensor] | None = None,
) -> Generator[Visit, None, None]:
    """Visit the modules at ``paths`` of a prepared, calibrated model in the order they run, in eval mode.

    ``floats`` are parameters of the float model that earlier steps have changed since.

    Modules must not contain each other and each runs once per forward (see `run_counts`). Those that no batch reaches
    are not visited. What the caller changes in a module, the simulated runs compute from then on.

    All ranks of a process group visit the same modules, on some of them maybe without a call: where their runs wait at
    different ones, that which comes first in ``paths``.
    """
    modules = {path: model.get_submodule(path) for path in paths}
    order = list(modules)
    hooks = _Hooks(modules)
    with evaluating(model), hooks.attached():
        floating, simulated = ([_Run(model, batch, forward) for batch in batches] for _ in range(2))
        try:
            while True:
                with ranks.together():
                    _advance(model, hooks, floating, floating=True, floats=floats or {})
                    _advance(model, hooks, simulated, floating=False, floats={})
                waiting = [order.index(run.at) for run in simulated if run.at is not None]
                turn = min(ranks.gathered(waiting[0] if waiting else len(order)))
                if turn == len(order):
                    return
                path = order[turn]
                yield Visit(path, modules[path], _calls(path, simulated, floating), len(hooks.visited), len(modules))
                hooks.visited.add(path)
        finally:
            for run in (*floating, *simulated):
                run.abandon()


def _calls(path: str, simulated: Sequence[_Run], floating: Sequence[_Run]) -> list[Call]:
    """The calls of the batches that wait at a module in both runs and compute something there."""
    both = [pair for pair in zip(simulated, floating, strict=True) if pair[0].at == path == pair[1].at]
    calls = [Call(*one.seen, *other.seen) for one, other in both]
    return [c for c in calls if any(isinstance(x, Tensor) and x.numel() for x in tree_leaves(c.float_output))]


def _advance(
    model: nn.Module, hooks: _Hooks, runs: list[_Run], *, floating: bool, floats: Mapping[nn.Parameter, Tensor]
) -> None:
    """Let every run go on that has not begun, or whose module was visited."""
    hooks.floating = floating
    with computing_in_float(model) if floating else nullcontext(), holding(floats):
        for run in runs:
            if not run.finished and (run.at is None or run.at in hooks.visited):
                run.resume()


@contextmanager
def computing_in_float(model: nn.Module) -> Iterator[None]:
    """Inside the block no quantizer simulates."""
    quantizers = [(module, module.stage) for module in model.modules() if isinstance(module, Quantizer)]
    for quantizer, _ in quantizers:
        quantizer.stage = Stage.FLOAT
    try:
        yield
    finally:
        for quantizer, stage in quantizers:
            quantizer.stage = stage


@contextmanager
def holding(values: Mapping[nn.Parameter, Tensor]) -> Iterator[None]:
    """Inside the block these parameters hold other values."""
    held = [(parameter, parameter.data) for parameter in values]
    try:
        for parameter, value in values.items():
            parameter.data = value
        yield
    finally:
        for parameter, value in held:
            parameter.data = value


def run_counts(model: nn.Module, batch: Any, forward: Forward, paths: Iterable[str]) -> Counter[str]:
    """How often each module at ``paths`` runs in one forward, in the order of the first runs."""
    counts: Counter[str] = Counter()

    def counter(path: str) -> Callable[..., None]:
        return lambda *_: counts.update((path,))

    handles = [model.get_submodule(path).register_forward_pre_hook(counter(path)) for path in paths]
    try:
        with torch.no_grad(), evaluating(model):
            forward(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return counts

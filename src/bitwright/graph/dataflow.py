"""Learn the dataflow of a model by running it once.

`record` runs one real forward in eval mode. Module hooks mark calls of leaf modules, a `TorchFunctionMode` marks
functional calls, and tensor identity draws the edges. Any Python control flow works, because nothing is traced
symbolically; what the example does not reach is simply not in the record. Only weak references to activations are
kept, so recording needs no more memory than the model itself; a model on the meta device can be recorded too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from bitwright.graph.calls import KINDS, kind_of
from bitwright.graph.experts import library_operator


@dataclass
class Node:
    """One call seen while recording.

    ``name`` is the module path or the function's name, ``inputs`` the indices of the nodes that produced its tensor
    arguments, in order (``sources`` has -1 where no call produced one). ``owner`` is the path of the innermost module
    whose forward made the call, ``ordinal`` counts the calls of one kind (see `graph.calls`) in one forward of that
    owner, and ``reads`` names the parameters that a function took as arguments.
    """

    index: int
    kind: Literal["input", "module", "function"]
    name: str
    inputs: tuple[int, ...] = ()
    users: list[int] = field(default_factory=list)
    shapes: tuple[tuple[int, ...], ...] = ()
    owner: str = ""
    ordinal: int = -1
    reads: tuple[str, ...] = ()
    sources: tuple[int, ...] = ()


@dataclass(frozen=True)
class Dataflow:
    """What one forward did: its calls in order, and which of them produced the model's outputs."""

    nodes: tuple[Node, ...]
    outputs: tuple[int, ...]

    def calls(self, path: str) -> list[Node]:
        """All calls of the leaf module at ``path``."""
        return [node for node in self.nodes if node.kind == "module" and node.name == path]


ADDS = KINDS["add"].recorded


class _Recorder(TorchFunctionMode):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.nodes: list[Node] = []
        self.producer = WeakIdKeyDictionary()
        self.parameters = {id(param): name for name, param in model.named_parameters(remove_duplicate=False)}
        self.owners: list[tuple[str, Counter[str]]] = []
        self.leaf_depth = 0

    def add(self, kind: Literal["input", "module", "function"], name: str, args: Any, out: Any) -> Node:
        node = Node(len(self.nodes), kind, name, owner=self.owners[-1][0] if self.owners else "")
        tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
        node.sources = tuple(self.producer[t] if t in self.producer else -1 for t in tensors)
        node.inputs = tuple(source for source in node.sources if source >= 0)
        node.shapes = tuple(tuple(t.shape) for t in tensors if t in self.producer)
        for source in set(node.inputs):
            self.nodes[source].users.append(node.index)
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self.producer[leaf] = node.index
        self.nodes.append(node)
        return node

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", str(func)).strip("_")
        if name == "add" and getattr(func, "__name__", "") == "add_":
            name = "add_"
        before = tree_leaves((args, kwargs))
        out = func(*args, **kwargs)
        if self.leaf_depth or name in ("set", "delete"):
            return out
        if any(isinstance(leaf, Tensor) for leaf in tree_leaves(out)):
            node = self.add("function", name, (args, kwargs), out)
            node.reads = tuple(self.parameters[id(leaf)] for leaf in before if id(leaf) in self.parameters)
            if (kind := kind_of(name)) and self.owners:
                node.ordinal = self.owners[-1][1][kind]
                self.owners[-1][1][kind] += 1
        return out


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode inside the block; each module's own mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def call(model: nn.Module, batch: Any) -> Any:
    """Run ``model`` on one batch of inputs: a tensor, a tuple or list of positional, or a dict of keyword arguments."""
    if isinstance(batch, dict):
        return model(**batch)
    if isinstance(batch, (tuple, list)) and not isinstance(batch, PackedSequence):
        return model(*batch)
    return model(batch)


def record(model: nn.Module, example: Any, forward: Callable[[nn.Module, Any], Any] = call) -> Dataflow:
    """Run ``model`` once on ``example`` (see `call`) in eval mode without gradients and write down what happened.

    ``forward`` runs it otherwise. In a prepared model the simulated modules are the leaves.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> [node.name for node in record(model, torch.zeros(1, 4)).nodes]
    ['input', '0', '1', '2']
    """
    recorder = _Recorder(model)
    hooks = [hook for name, module in model.named_modules() for hook in _hooks(recorder, name, module)]
    try:
        for leaf in tree_leaves(example):
            if isinstance(leaf, Tensor):
                recorder.add("input", "input", (), leaf)
        with torch.no_grad(), evaluating(model), recorder:
            out = forward(model, example)
    finally:
        for hook in hooks:
            hook.remove()
    results = [leaf for leaf in _tensors(out) if leaf in recorder.producer]
    return Dataflow(tuple(recorder.nodes), tuple(recorder.producer[leaf] for leaf in results))


def _tensors(out: Any) -> list[Tensor]:
    """Tensors of an output; dataclass-like outputs of model libraries are mappings or have ``__dict__``."""
    leaves = tree_leaves(out)
    for leaf in list(leaves):
        if is_dataclass(leaf):  # with or without slots
            leaves.extend(tree_leaves([getattr(leaf, part.name) for part in fields(leaf)]))
        elif not isinstance(leaf, Tensor) and hasattr(leaf, "__dict__"):
            leaves.extend(tree_leaves(list(vars(leaf).values())))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def _hooks(recorder: _Recorder, name: str, module: nn.Module) -> list[torch.utils.hooks.RemovableHandle]:
    opaque = isinstance(module, nn.MultiheadAttention) or library_operator(module) is not None
    opaque = opaque or hasattr(module, "quantized_weights")  # a simulated module: its children are quantizers
    if next(module.children(), None) is None or opaque:  # what they read are their own parameters

        def enter_leaf(module: nn.Module, args: Any) -> None:
            recorder.leaf_depth += 1

        def leave_leaf(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
            recorder.leaf_depth -= 1
            if recorder.leaf_depth == 0:
                recorder.add("module", name, (args, kwargs), out)

        return [
            module.register_forward_pre_hook(enter_leaf),
            module.register_forward_hook(leave_leaf, with_kwargs=True),
        ]

    def enter(module: nn.Module, args: Any) -> None:
        recorder.owners.append((name, Counter()))

    def leave(module: nn.Module, args: Any, out: Any) -> None:
        recorder.owners.pop()

    return [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]

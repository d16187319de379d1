"""Give functional adds a name, so that a plan can address them and a module can quantize them.

Only the module whose forward contains the add is touched. Its forward is traced with every child as a leaf (so no
transformer or detection code is ever traced), the chosen adds become calls of an `Add` child, and the module's class
becomes a subclass of itself with that forward. Parameters, keys, hooks and ``isinstance`` stay as they were.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn

from bitwright.errors import ModelError
from bitwright.graph.dataflow import evaluating


class Add(nn.Module):
    """``a + b`` as a module: a residual add that can be named in a plan.

    >>> Add()(torch.ones(2), torch.ones(2)).tolist()
    [2.0, 2.0]
    """

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """Sum of two tensors of one shape."""
        return a + b


class _ChildrenAreLeaves(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def _is_add(node: fx.Node) -> bool:
    return (node.op == "call_function" and node.target in (operator.add, operator.iadd, torch.add)) or (
        node.op == "call_method" and node.target in ("add", "add_", "__add__", "__iadd__", "__radd__")
    )


def _trace(module: nn.Module) -> fx.Graph:
    """The graph of one module's own forward, the same in train and eval mode."""
    graphs = []
    with evaluating(module):
        for training in (False, True):
            module.training = training
            graphs.append(_ChildrenAreLeaves().trace(module))
    if str(graphs[0]) != str(graphs[1]):
        raise ModelError("its forward differs between train and eval mode")
    return graphs[0]


def _tensor_adds(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if _is_add(node)]


def why_not_nameable(module: nn.Module, count: int) -> str:
    """Empty if the ``count`` adds in ``module.forward`` can be named, else the reason in a few words."""
    try:
        graph = _trace(module)
    except Exception as cause:
        return f"{type(module).__name__}.forward cannot be traced ({type(cause).__name__}: {cause})"
    adds = _tensor_adds(graph)
    if len(adds) != count:
        return f"{type(module).__name__}.forward shows {len(adds)} adds when traced and {count} when run"
    return next((reason for add in adds if (reason := _aliasing(add))), "")


def _aliasing(add: fx.Node) -> str:
    """An in-place add may only become an ordinary one if nobody looks at the overwritten tensor later."""
    in_place = add.target in (operator.iadd, "add_", "__iadd__")
    target = add.args[0]
    if in_place and isinstance(target, fx.Node) and any(user > add for user in target.users):
        return f"the in-place add {add.name} overwrites a tensor that is used again"
    return ""


def name_adds(module: nn.Module, ordinals: Iterable[int]) -> None:
    """Turn the adds number ``ordinals`` of ``module.forward`` into children ``add_0``, ``add_1``, ... in place.

    Raises `ModelError` when the forward cannot be traced or has no such add.
    """
    graph = _trace(module)
    adds = _tensor_adds(graph)
    for ordinal in ordinals:
        if ordinal >= len(adds):
            raise ModelError(
                f"{type(module).__name__}.forward has {len(adds)} adds, the plan names add_{ordinal}; "
                "make a new plan for this model"
            )
        node, name = adds[ordinal], f"add_{ordinal}"
        with graph.inserting_before(node):
            replacement = graph.call_module(name, node.args)
        node.replace_all_uses_with(replacement)
        graph.erase_node(node)
        module.add_module(name, Add())
    module.__class__ = _with_forward(type(module), graph)


def _with_forward(cls: type[nn.Module], graph: fx.Graph) -> type[nn.Module]:
    code = graph.python_code("self")
    namespace: dict[str, Any] = dict(code.globals)
    exec(compile(code.src, f"<{cls.__name__} with named adds>", "exec"), namespace)
    return type(cls.__name__, (cls,), {"forward": namespace["forward"], "__module__": cls.__module__})

"""Give functional adds, products, concatenations and attentions a name, so that a plan can address them.

Only the module whose forward contains the call is touched. Its forward is traced with every child as a leaf (so no
transformer or detection code is ever traced), the chosen calls become calls of a child (`graph.calls`), and the
module's class becomes a subclass of itself with that forward. Parameters, keys, hooks and ``isinstance`` stay as they
were.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from inspect import signature
from typing import Any

from torch import fx, nn

from bitwright.errors import ModelError
from bitwright.graph.calls import KINDS
from bitwright.graph.dataflow import evaluating
from bitwright.graph.routing import route_attention, why_not_routable

_IN_PLACE = (operator.iadd, "add_", "__iadd__")
_NEW_MEMORY = frozenset("add sub mul truediv div matmul cat relu gelu silu sigmoid mean sum pad interpolate".split())


def _recorded(operation: Callable[[Any, Any], Any]) -> Callable[[fx.Proxy, Any], fx.Proxy]:
    def method(self: fx.Proxy, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operation, (self, other), {})

    return method


class _InPlaceProxy(fx.Proxy):
    """A proxy that records ``a += b`` as it is, in place; a plain proxy records ``a = a + b``."""

    __iadd__ = _recorded(operator.iadd)
    __isub__ = _recorded(operator.isub)
    __imul__ = _recorded(operator.imul)
    __itruediv__ = _recorded(operator.itruediv)
    __ifloordiv__ = _recorded(operator.ifloordiv)
    __imod__ = _recorded(operator.imod)
    __ipow__ = _recorded(operator.ipow)
    __iand__ = _recorded(operator.iand)
    __ior__ = _recorded(operator.ior)
    __ixor__ = _recorded(operator.ixor)


class _ChildrenAreLeaves(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _InPlaceProxy(node, self)


def _is_call(node: fx.Node, kind: str) -> bool:
    calls = KINDS[kind]
    return (node.op == "call_function" and node.target in calls.functions) or (
        node.op == "call_method" and node.target in calls.methods
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
    optional = [str(node.target) for node in graphs[0].nodes if node.op == "placeholder" and node.args]
    if optional:  # a trace cannot tell an argument that was given from one that was left out
        raise ModelError(f"its forward has optional arguments ({', '.join(optional)})")
    return graphs[0]


def why_not_nameable(module: nn.Module, kind: str, count: int) -> str:
    """Empty if the ``count`` calls of one kind in ``module.forward`` can be named, else the reason in a few words."""
    if kind == "attention":
        return why_not_routable(module, count)
    try:
        graph = _trace(module)
    except Exception as cause:
        first, _, _ = str(cause).partition(". ")
        return f"{type(module).__name__}.forward cannot be traced ({type(cause).__name__}: {first})"
    calls = [node for node in graph.nodes if _is_call(node, kind)]
    if len(calls) != count:
        return f"{type(module).__name__}.forward shows {len(calls)} {kind}s when traced and {count} when run"
    return next((reason for i, call in enumerate(calls) if (reason := _unsafe(module, call, kind, i))), "")


def _unsafe(module: nn.Module, call: fx.Node, kind: str, ordinal: int) -> str:
    """Why a call cannot become ``self.<kind>_<ordinal>(...)``; empty if it can."""
    if hasattr(module, f"{kind}_{ordinal}"):
        return f"{type(module).__name__} has an attribute {kind}_{ordinal} already"
    try:
        signature(KINDS[kind].module.forward).bind(module, *call.args, **call.kwargs)
    except TypeError:
        return f"the {kind} {call.name} has keyword arguments ({', '.join(call.kwargs)})"
    return _aliasing(module, call) if call.target in _IN_PLACE else ""


def _aliasing(module: nn.Module, add: fx.Node) -> str:
    """An in-place add may only become an ordinary one if nobody looks at the overwritten memory later."""
    owner = add.args[0]
    while isinstance(owner, fx.Node) and not _makes_new_memory(module, owner):
        if owner.op in ("placeholder", "get_attr"):
            return f"the in-place add {add.name} overwrites {owner.target}, which belongs to the caller"
        owner = next(iter(owner.all_input_nodes), None)
    queue = [owner] if isinstance(owner, fx.Node) else []
    while queue:
        for user in queue.pop().users:
            if user > add:
                return f"the in-place add {add.name} overwrites a tensor that is used again"
            if user is not add and not _makes_new_memory(module, user):
                queue.append(user)
    return ""


def _makes_new_memory(module: nn.Module, node: fx.Node) -> bool:
    """Whether the result of ``node`` cannot be (a view of) its first argument; modules with parameters compute."""
    if node.op == "call_module":
        return next(module.get_submodule(str(node.target)).parameters(), None) is not None
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return name.strip("_") in _NEW_MEMORY and not name.endswith("_") and not node.kwargs.get("inplace", False)


def name_calls(module: nn.Module, kind: str, ordinals: Iterable[int]) -> None:
    """Turn calls of one kind in ``module.forward`` into children: ``add_0``, ``add_1``, ... in place, by ordinal.

    Attentions are routed, see `graph.routing`; name them last. Raises `ModelError` when the forward cannot be traced,
    has no such call, or it cannot be taken out of its place.
    """
    if kind == "attention":
        return route_attention(module, ordinals)
    graph = _trace(module)
    calls = [node for node in graph.nodes if _is_call(node, kind)]
    for ordinal in ordinals:
        if ordinal >= len(calls):
            raise ModelError(
                f"{type(module).__name__}.forward has {len(calls)} {kind}s, the plan names {kind}_{ordinal}; "
                "make a new plan for this model"
            )
        node, name, child = calls[ordinal], f"{kind}_{ordinal}", KINDS[kind].module
        if reason := _unsafe(module, node, kind, ordinal):
            raise ModelError(f"{type(module).__name__}.forward: {reason}; write it as bitwright.{child.__name__}")
        with graph.inserting_before(node):
            replacement = graph.call_module(name, node.args, node.kwargs)
        node.replace_all_uses_with(replacement)
        graph.erase_node(node)
        module.add_module(name, child())
    module.__class__ = _with_forward(type(module), graph)


def _with_forward(cls: type[nn.Module], graph: fx.Graph) -> type[nn.Module]:
    code = graph.python_code("self")
    namespace: dict[str, Any] = dict(code.globals)
    exec(compile(code.src, f"<{cls.__name__} with named calls>", "exec"), namespace)
    return type(cls.__name__, (cls,), {"forward": namespace["forward"], "__module__": cls.__module__})

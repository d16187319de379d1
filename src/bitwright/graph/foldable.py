"""Where a factor per channel can be moved from a tensor into the weights on both sides of it.

``(x / s) @ (W * s).T = x @ W.T``: a norm or a linear layer whose output only linear layers read takes ``1 / s``.
Between a linear layer and its readers may stand what is linear in it: views, the probabilities of attention (the value
projection), another factor (the gate of a gated feed-forward layer). Nothing is moved through a softmax or another
nonlinear function.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bitwright.graph.calls import KINDS, Attention, MatMul
from bitwright.graph.dataflow import Dataflow, Node
from bitwright.graph.patterns import is_view

_COPIES = ("repeat_interleave", "cat")  # heads that are shared; a cache that is empty yet


@dataclass(frozen=True, slots=True)
class FoldPoint:
    """``source`` absorbs a factor per channel that the ``consumers``, which read one tensor, multiply back.

    In grouped-query attention each head of ``head`` channels of the source feeds ``repeats`` heads of the consumers.
    """

    source: str
    consumers: tuple[str, ...]
    repeats: int = 1
    head: int = 1

    def channels(self, width: int) -> Tensor:
        """Which channel of the source each input channel of the consumers is, when the source has ``width``.

        >>> FoldPoint("v", ("o",), repeats=2, head=2).channels(4).tolist()
        [0, 1, 0, 1, 2, 3, 2, 3]
        """
        heads = torch.arange(width).view(-1, 1, self.head)
        return heads.expand(-1, self.repeats, -1).flatten()


def is_layer_norm(module: nn.Module | None) -> bool:
    """Whether a module is a layer norm or an RMS norm with a weight per channel, of torch or of a model library.

    >>> is_layer_norm(nn.LayerNorm(8)), is_layer_norm(nn.BatchNorm1d(8))
    (True, False)
    """
    weight = getattr(module, "weight", None)
    return type(module).__name__.endswith(("LayerNorm", "RMSNorm")) and isinstance(weight, Tensor) and weight.dim() == 1


def fold_points(
    flow: Dataflow, model: nn.Module, linears: Collection[str]
) -> tuple[list[FoldPoint], dict[tuple[str, ...], str]]:
    """Fold points in the order their tensors are made, and groups of linear layers that have none, with the reason.

    What is found is what the record suggests; a caller that needs certainty tries it on the model.

    >>> from bitwright.graph.dataflow import record
    >>> model = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> fold_points(record(model, torch.zeros(1, 4)), model, ["1", "3"])
    ([FoldPoint(source='0', consumers=('1',), repeats=1, head=1)], {('3',): "its input comes from '2'"})
    """
    groups: dict[int, list[str]] = {}
    for node in flow.nodes:
        if node.kind == "module" and node.name in linears and node.sources and node.sources[0] >= 0:
            groups.setdefault(_made_by(flow, model, node.sources[0]).index, []).append(node.name)
    points, refused = [], {}
    for index, paths in groups.items():
        found = _fold_point(flow, model, flow.nodes[index], tuple(paths), linears)
        if isinstance(found, FoldPoint):
            points.append(found)
        else:
            refused[tuple(paths)] = found
    return points, refused


def _fold_point(
    flow: Dataflow, model: nn.Module, origin: Node, paths: tuple[str, ...], linears: Collection[str]
) -> FoldPoint | str:
    if len({*paths}) < len(paths) or any(len(flow.calls(path)) > 1 for path in paths):
        return "it runs several times in one forward"
    module = _module(origin, model)
    for reader in _readers(flow, model, origin):
        if reader is None or reader.name not in paths:
            return f"its input also goes into {reader.name!r}" if reader else "its input is also an output of the model"
    if is_layer_norm(module):
        return FoldPoint(origin.name, paths) if len(flow.calls(origin.name)) == 1 else f"{origin.name!r} runs twice"
    for source, operand in _linear_operands(origin, module):
        before = _made_by(flow, model, source)
        if before.name not in linears or _readers(flow, model, before) != [origin]:
            continue
        if len(flow.calls(before.name)) == 1 and origin.name not in paths:
            wide, narrow = model.get_submodule(paths[0]), model.get_submodule(before.name)
            repeats, rest = divmod(features(wide)[1], features(narrow)[0])
            if repeats and not rest:
                return FoldPoint(before.name, paths, repeats, operand[-1] if repeats > 1 else 1)
    return f"its input comes from {origin.name!r}"


def features(module: nn.Module) -> tuple[int, int]:
    """Output and input channels of a linear layer; those of some libraries store the weight turned."""
    rows, columns = module.get_parameter("weight").shape
    return (rows, columns) if isinstance(module, nn.Linear) else (columns, rows)


def _linear_operands(node: Node, module: nn.Module | None) -> list[tuple[int, tuple[int, ...]]]:
    """Makers and shapes of the operands in which a call is linear, channel by channel."""
    shapes, known = iter(node.shapes), {}
    for place, source in enumerate(node.sources):
        if source >= 0:
            known[place] = source, next(shapes)
    name = node.name if node.kind == "function" else ""
    if isinstance(module, Attention) or name in KINDS["attention"].recorded:
        places = [2]
    elif isinstance(module, MatMul) or name in KINDS["matmul"].recorded:
        places = [1]
    else:
        places = [0, 1] if name == "mul" else []
    return [known[place] for place in places if place in known]


def query_and_key(flow: Dataflow, model: nn.Module, linears: Collection[str]) -> set[str]:
    """Linear layers whose output meets another in the scores of attention: the nearest above softmax or attention."""
    found: set[str] = set()
    for node in flow.nodes:
        module = _module(node, model)
        name = node.name if node.kind == "function" else ""
        if isinstance(module, Attention) or name in KINDS["attention"].recorded:
            starts = [source for source in node.sources[:2] if source >= 0]
        elif isinstance(module, nn.Softmax) or name == "softmax":
            starts = list(node.inputs)
        else:
            continue
        seen, queue = set(), list(starts)
        while queue:
            above = flow.nodes[queue.pop()]
            if above.index in seen:
                continue
            seen.add(above.index)
            if above.kind == "module" and above.name in linears:
                found.add(above.name)
            else:
                queue.extend(above.inputs)
    return found


def _module(node: Node, model: nn.Module) -> nn.Module | None:
    return model.get_submodule(node.name) if node.kind == "module" else None


def _passes_on(node: Node, model: nn.Module) -> bool:
    return is_view(node, model) or (node.kind == "function" and node.name in _COPIES)


def _made_by(flow: Dataflow, model: nn.Module, index: int) -> Node:
    """The call whose values a tensor holds, behind views and copies."""
    node = flow.nodes[index]
    while node.inputs and _passes_on(node, model):
        node = flow.nodes[node.inputs[-1]]
    return node


def _readers(flow: Dataflow, model: nn.Module, node: Node) -> list[Node | None]:
    """The calls that read a call's values, through views and copies, each once; None stands for the model's output."""
    found: dict[int, Node | None] = {}
    queue = [node]
    while queue:
        current = queue.pop()
        if current.index in flow.outputs:
            found[-1] = None
        for user in (flow.nodes[i] for i in current.users):
            if _passes_on(user, model):
                queue.append(user)
            else:
                found[user.index] = user
    return [found[index] for index in sorted(found)]

"""Which modules are reconstructed together: residual units and attention blocks of a prepared model.

A residual add joins two ways from a common tensor. The innermost module that holds both the add and all weighted layers
on these ways is a unit: a basic block, a bottleneck, half or all of a transformer layer. A unit inside another merges
into it, so a transformer layer whose two halves are modules of their own is one block; but a module with more than
`HALVES` units inside, or that many adds of its own, is a stage of the network and no block. Attention that lies in no
unit is a unit by itself. Layers in no unit stand alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from torch import nn

from bitwright.algorithms.lockstep import Forward, computing_in_float, run_counts
from bitwright.graph.calls import KINDS, Add, Attention
from bitwright.graph.dataflow import Dataflow, Node, record
from bitwright.graph.patterns import COMPUTING, ancestors

HALVES = 3
"""Self attention, cross attention and the feed-forward part: no layer has more residual adds."""


def find_blocks(model: nn.Module, batch: Any, forward: Forward, layers: Iterable[str]) -> dict[str, list[str]]:
    """``{path of a block: paths of its layers}`` for all ``layers`` of a prepared model; one alone is its own block.

    >>> from torch.nn import functional as F
    >>> import torch
    >>> from bitwright.graph.dataflow import call
    >>> class Unit(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.up, self.down = nn.Linear(4, 8), nn.Linear(8, 4)
    ...     def forward(self, x):
    ...         return x + self.down(F.relu(self.up(x)))
    >>> net = nn.Sequential(nn.Linear(2, 4), Unit(), Unit())
    >>> blocks = find_blocks(net, torch.zeros(1, 2), call, ["0", "1.up", "1.down", "2.up", "2.down"])
    >>> {path: len(inside) for path, inside in blocks.items()}
    {'0': 1, '1': 2, '2': 2}
    """
    with computing_in_float(model):
        flow = record(model, batch, forward)
        units = _merged(_residual_units(flow, model))
        units |= {path for path in _attentions(flow, model) if not any(_holds(unit, path) for unit in units)}
        counts = run_counts(model, batch, forward, sorted(units))
    units = {path for path in units if counts[path] == 1}
    found: dict[str, list[str]] = {}
    for layer in layers:
        found.setdefault(next((unit for unit in units if _holds(unit, layer)), layer), []).append(layer)
    return found


def _residual_units(flow: Dataflow, model: nn.Module) -> Counter[str]:
    """The innermost module of each residual add, with how many adds it has."""
    units: Counter[str] = Counter()
    for node in flow.nodes:
        if not _is_call(node, model, "add", Add) or len(node.inputs) != 2 or node.inputs[0] == node.inputs[1]:
            continue
        left, right = (ancestors(flow, source) for source in node.inputs)
        computing = [flow.nodes[i].name for i in left ^ right if _computes(flow.nodes[i], model)]
        if left & right and computing and node.shapes[0] == node.shapes[1]:
            units[_common([*computing, _place(node)])] += 1
    return units


def _attentions(flow: Dataflow, model: nn.Module) -> set[str]:
    nodes = [node for node in flow.nodes if _is_call(node, model, "attention", Attention)]
    return {_place(node).rpartition(".")[0] for node in nodes}


def _merged(units: Counter[str]) -> set[str]:
    """Units that do not contain each other, from the innermost outwards."""
    chosen: set[str] = set()
    for path in sorted(units, key=_depth, reverse=True):
        inside = {unit for unit in chosen if _holds(path, unit)}
        if len(inside) <= HALVES - 1 and units[path] <= HALVES:
            chosen = chosen - inside | {path}
    return chosen


def _is_call(node: Node, model: nn.Module, kind: str, cls: type[nn.Module]) -> bool:
    if node.kind == "module":
        return isinstance(model.get_submodule(node.name), cls)
    return node.kind == "function" and node.name in KINDS[kind].recorded


def _computes(node: Node, model: nn.Module) -> bool:
    return node.kind == "module" and isinstance(model.get_submodule(node.name), COMPUTING)


def _place(node: Node) -> str:
    """A path right below the module whose forward makes the call."""
    return node.name if node.kind == "module" else f"{node.owner}.{node.name}".removeprefix(".")


def _common(paths: list[str]) -> str:
    """The innermost module that holds all."""
    split = [path.split(".")[:-1] for path in paths]
    shared = []
    for parts in zip(*split, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared)


def _holds(unit: str, path: str) -> bool:
    return not unit or path.startswith(f"{unit}.")


def _depth(path: str) -> int:
    return path.count(".") + bool(path)

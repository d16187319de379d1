"""What lies between two layers: the calls that one layer's output passes on its way to the next one's input.

Rescaling a channel in one layer and undoing it in the next is exact where everything between is positively homogeneous,
``f(s x) = s f(x)`` for ``s > 0``, channel by channel, and nobody else reads the tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from bitwright.graph.dataflow import Dataflow, Node
from bitwright.graph.patterns import WEIGHTED

_ELEMENTWISE = frozenset("relu leaky_relu prelu dropout contiguous clone detach float to type_as".split())
_SPATIAL = frozenset(
    "mean amax pad interpolate view reshape flatten squeeze unsqueeze dropout1d dropout2d dropout3d max_pool1d "
    "max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d "
    "adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d".split()
)
_MODULES: dict[type[nn.Module], str] = {
    nn.ReLU: "relu",
    nn.LeakyReLU: "leaky_relu",
    nn.PReLU: "prelu",
    nn.ReLU6: "relu6",
    nn.Dropout: "dropout",
    nn.Dropout1d: "dropout1d",
    nn.Dropout2d: "dropout2d",
    nn.Dropout3d: "dropout3d",
    nn.Flatten: "flatten",
    nn.MaxPool1d: "max_pool1d",
    nn.MaxPool2d: "max_pool2d",
    nn.MaxPool3d: "max_pool3d",
    nn.AvgPool1d: "avg_pool1d",
    nn.AvgPool2d: "avg_pool2d",
    nn.AvgPool3d: "avg_pool3d",
    nn.AdaptiveAvgPool1d: "adaptive_avg_pool1d",
    nn.AdaptiveAvgPool2d: "adaptive_avg_pool2d",
    nn.AdaptiveAvgPool3d: "adaptive_avg_pool3d",
    nn.AdaptiveMaxPool1d: "adaptive_max_pool1d",
    nn.AdaptiveMaxPool2d: "adaptive_max_pool2d",
    nn.AdaptiveMaxPool3d: "adaptive_max_pool3d",
    nn.Upsample: "interpolate",
    nn.ZeroPad1d: "pad",
    nn.ZeroPad2d: "pad",
    nn.ZeroPad3d: "pad",
}


@dataclass(frozen=True, slots=True)
class Path:
    """How layer ``second`` gets its input.

    ``first`` is the layer whose output it is made of, ``between`` the names of the calls on the way, in order (modules
    under the name of their function, ``identity`` for those that do nothing), ``repeats`` how many neighbouring input
    features of ``second`` each channel of ``first`` fills (more than 1 behind a flatten). ``reason`` says why a
    channel cannot be followed that way; the rest then means nothing. ``shared`` names a second reader on the way.
    """

    second: str
    first: str = ""
    between: tuple[str, ...] = ()
    repeats: int = 1
    shared: str = ""
    reason: str = ""


def paths(flow: Dataflow, model: nn.Module) -> list[Path]:
    """The way to every linear layer and convolution, in the order they run.

    >>> import torch
    >>> from bitwright.graph.dataflow import record
    >>> net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2))
    >>> paths(record(net, torch.zeros(1, 3, 4, 4)), net)[1]
    Path(second='3', first='0', between=('relu', 'flatten'), repeats=4, shared='', reason='')
    """
    return [_path(flow, node, model) for node in flow.nodes if isinstance(_module(node, model), WEIGHTED)]


def homogeneous_pairs(flow: Dataflow, model: nn.Module) -> list[Path]:
    """`paths`, with a reason on each along which a channel's positive factor cannot pass unnoticed."""
    found = []
    for path in paths(flow, model):
        reason = path.reason or (f"{path.shared} reads the same tensor" if path.shared else "")
        stop = next((name for name in reversed(path.between) if name not in _ELEMENTWISE | _SPATIAL | {"identity"}), "")
        if not reason and stop == "relu6":
            reason = "relu6 lies between, which clips all channels at 6; where the model allows it, make it a relu"
        elif not reason and stop:
            reason = f"{stop} lies between, which is not positively homogeneous"
        found.append(Path(path.second, reason=reason) if reason else path)
    return found


def _path(flow: Dataflow, node: Node, model: nn.Module) -> Path:
    """The way back from a layer's call to the layer before it."""
    way = list(_back(flow, node, model))
    first, between = way[-1], way[-2:0:-1]
    source = _module(first, model)
    if len(flow.calls(node.name)) > 1:
        return Path(node.name, reason=f"it runs {len(flow.calls(node.name))} times in one forward")
    if first is node or not isinstance(source, WEIGHTED):
        return Path(node.name, reason=_why_no_layer(first))
    if len(flow.calls(first.name)) > 1:
        return Path(node.name, reason=f"its input comes from {first.name}, which runs several times in one forward")
    names = tuple(_name(call, model) for call in between)
    repeats = _repeats(source, model.get_submodule(node.name), [call.shapes[0] for call in (*between, node)], names)
    if not repeats:
        return Path(node.name, reason=f"the channels of {first.name} are not those of its input")
    return Path(node.name, first.name, names, repeats, _second_reader(flow, way))


def _back(flow: Dataflow, node: Node, model: nn.Module) -> Iterator[Node]:
    """``node`` and the calls before it, as far as each has one input only, up to one that holds a matrix."""
    yield node
    while len(node.inputs) == 1 and len(node.shapes) == 1:
        node = flow.nodes[node.inputs[0]]
        yield node
        module = _module(node, model)
        if module is not None and any(p.dim() > 1 for p in module.parameters()):
            return


def _why_no_layer(node: Node) -> str:
    if node.kind == "input":
        return "it reads the model's input"
    return f"its input comes from {node.name}" + (", which joins several tensors" if len(node.inputs) > 1 else "")


def _second_reader(flow: Dataflow, way: list[Node]) -> str:
    """Who else reads a tensor on the way; ``way`` leads back from the second layer."""
    for node, user in zip(way[1:], way, strict=False):
        others = [flow.nodes[index].name for index in node.users if index != user.index]
        if others or node.index in flow.outputs:
            return others[0] if others else "the caller of the model"
    return ""


def _repeats(first: Any, second: Any, shapes: list[tuple[int, ...]], names: tuple[str, ...]) -> int:
    """How many input features of ``second`` a channel of ``first`` fills; 0 where the shapes leave that open."""
    shape = shapes[-1]
    if isinstance(first, nn.Linear):
        same = isinstance(second, nn.Linear) and all(other == shape for other in shapes)
        channelwise = any(name == "prelu" for name in names) and len(shape) > 2
        return int(same and not channelwise and not any(name in _SPATIAL for name in names))
    channels, repeats = first.out_channels, 1
    for passed in shapes:
        if len(passed) < 2 or passed[0] != shape[0]:
            return 0
        if passed[1] != channels * repeats:
            if repeats > 1 or len(passed) > 2 or passed[1] % channels:
                return 0
            repeats = passed[1] // channels
    if isinstance(second, nn.Linear):
        return repeats if len(shape) == 2 else 0
    return int(repeats == 1 and len(shape) == len(second.kernel_size) + 2)


def _module(node: Node, model: nn.Module) -> nn.Module | None:
    return model.get_submodule(node.name) if node.kind == "module" else None


def _name(node: Node, model: nn.Module) -> str:
    module = _module(node, model)
    if module is None:
        return node.name
    return "identity" if isinstance(module, nn.Identity) else _MODULES.get(type(module), type(module).__name__)

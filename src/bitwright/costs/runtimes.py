"""What runs a shipped module: by the target of its plan, PyTorch with our kernels or ONNX Runtime on its export."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from bitwright.errors import SearchError
from bitwright.export.graph import lowbit_layers
from bitwright.export.onnx import require_onnx, to_onnx
from bitwright.export.parity import onnx_runner
from bitwright.graph.dataflow import call
from bitwright.lowbit.elementwise import LowbitAdd
from bitwright.lowbit.layer import LowbitLayer

Run = Callable[[], Any]
_ONNX = "onnxruntime"


def runtime_of(target: str) -> str:
    """What a time for a target depends on beside the machine: the runtime, and the version of one that is not ours.

    >>> runtime_of("cpu")
    'bitwright'
    """
    if target != _ONNX:
        return "bitwright"
    require_onnx()
    return f"ONNX Runtime {version('onnxruntime')}"


def whole_run(model: nn.Module, example: Any, target: str) -> Run:
    """A call of a shipped model on one batch."""
    if target != _ONNX:
        return partial(call, model, example)
    return onnx_runner(to_onnx(model, lowbit_layers(model), example), example)


def layer_runs(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], target: str, count: int) -> list[Run]:
    """Calls of equal copies of a layer, shipped or in float, which hold weights of their own.

    Raises `SearchError` for a layer that ONNX Runtime would get more than two tensors for.
    """
    if target != _ONNX:
        layers = [layer, *(copy.deepcopy(layer) for _ in range(count - 1))]
        return [partial(each.forward, *args, **kwargs) for each in layers]
    tensors = tuple(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
    if len(tensors) > 2:
        raise SearchError(
            f"{layer} takes {len(tensors)} tensors; with target {target} only layers of one or two can be timed: leave "
            "its sites out"
        )
    bare = _Bare(layer)
    shipped = any(isinstance(part, (LowbitLayer, LowbitAdd)) for part in bare.modules())
    proto = to_onnx(bare, lowbit_layers(bare) if shipped else {}, tensors)
    return [onnx_runner(proto, tensors) for _ in range(count)]


class _Bare(nn.Module):
    """A layer whose arguments have names, as the exporter wants them."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, input: Tensor, other: Tensor | None = None) -> Any:
        return self.layer(input) if other is None else self.layer(input, other)

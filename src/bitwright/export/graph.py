"""The neutral graph: a converted model in ONNX, in which every low-bit layer is one node, still to be written.

First half of an export. The user's own modules go through PyTorch's ONNX exporter; each low-bit layer is a `Hole`
there, an ONNX node of the private domain ``bitwright`` that carries the layer's path and nothing else. The second half
(`layers`) replaces the holes by standard nodes and writes the codes straight from the packed buffers, so no code ever
passes through a float, and no graph pass has to recognise what a layer was.
"""

from __future__ import annotations

import copy
import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map

from bitwright.errors import BitwrightError, ExportError
from bitwright.graph.dataflow import call, evaluating
from bitwright.lowbit.conv import LowbitConv
from bitwright.lowbit.elementwise import LowbitAdd
from bitwright.lowbit.embedding import LowbitEmbedding
from bitwright.lowbit.layer import LowbitLayer
from bitwright.lowbit.linear import LowbitLinear
from bitwright.lowbit.recurrent import LowbitRecurrent
from bitwright.nn.layer import Simulated

if TYPE_CHECKING:
    from onnx import ModelProto

DOMAIN = "bitwright"
OPSET = 21  # the first with 4-bit integers and blocked scales

Lowbit = LowbitLinear | LowbitConv | LowbitEmbedding | LowbitAdd


class Hole(nn.Module):
    """Stands for the low-bit layer at ``path`` while a model is traced: right shape, no numbers."""

    def __init__(self, path: str, layer: Lowbit) -> None:
        super().__init__()
        self.path = path
        self.layer = (layer,)  # in a tuple, so that its buffers stay out of the traced program

    def forward(self, input: Tensor, other: Tensor | None = None) -> Tensor:
        """One ``bitwright::Layer`` node; a convolution's padding with other values than zeros is done before it."""
        [layer] = self.layer
        if not isinstance(layer, LowbitConv):
            return self._node([input] if other is None else [input, other], _shape(layer, input))
        image = input
        if layer.prepad is not None and layer.prepad[1] != "constant":
            image = F.pad(image, layer.prepad[0], mode=layer.prepad[1])
        if image.dim() == layer.spatial + 2:
            return self._node([image], _conv_shape(layer, image))
        image = image.unsqueeze(0)
        return self._node([image], _conv_shape(layer, image)).squeeze(0)

    def _node(self, inputs: list[Tensor], shape: list[Any]) -> Tensor:
        attributes = {"path": self.path, "rank": inputs[0].dim()}
        return torch.onnx.ops.symbolic(
            f"{DOMAIN}::Layer", inputs, attributes, dtype=torch.float32, shape=shape, version=1
        )


def _shape(layer: Lowbit, x: Tensor) -> list[Any]:
    if isinstance(layer, LowbitAdd):
        return list(x.shape)
    return [*x.shape, layer.shape[1]] if isinstance(layer, LowbitEmbedding) else [*x.shape[:-1], layer.shape[0]]


def _conv_shape(layer: LowbitConv, image: Tensor) -> list[Any]:
    g, count, pads = layer.geometry, layer.spatial, zero_pads(layer)
    padding = [before + after for before, after in zip(pads[:count], pads[count:], strict=True)]
    sides = zip(
        image.shape[2:], padding, *(side[-count:] for side in (g.kernel_size, g.stride, g.dilation)), strict=True
    )
    sizes = [(size + pad - dilation * (k - 1) - 1) // stride + 1 for size, pad, k, stride, dilation in sides]
    return [image.shape[0], layer.shape[0], *sizes]


def zero_pads(layer: LowbitConv) -> list[int]:
    """Zeros that a convolution pads with: before each spatial axis, then after each."""
    if layer.prepad is None:
        return 2 * list(layer.geometry.padding[-layer.spatial :])
    sizes, mode = layer.prepad
    if mode != "constant":
        return 2 * layer.spatial * [0]
    return [*sizes[-2::-2], *sizes[::-2]]


def lowbit_layers(model: nn.Module) -> dict[str, Lowbit]:
    """The low-bit layers of a converted model by path; raises `ExportError` for a float or simulated model."""
    if any(isinstance(module, Simulated) for module in model.modules()):
        raise ExportError("this model simulates its low-bit layers; export what bitwright.convert(model) returns")
    found: dict[str, Lowbit] = {}
    for path, module in model.named_modules():
        if isinstance(module, (LowbitLinear, LowbitConv, LowbitEmbedding, LowbitAdd)):
            found[path] = module
            if isinstance(module, LowbitLayer) and module.weight_spec.scale is not None:
                raise ExportError(f"{path}: {module.weight_spec} has no ONNX form here; leave out /scale(...)")
        elif isinstance(module, (LowbitLayer, LowbitRecurrent)):
            raise ExportError(f"{path}: {type(module).__name__} has no ONNX form; set its sites to 'float'")
    if not found:
        raise ExportError(
            f"{type(model).__name__} has no low-bit layers; call bitwright.prepare, calibrate and convert first"
        )
    return found


def trace(model: nn.Module, layers: dict[str, Lowbit], example: Any) -> ModelProto:
    """The ONNX graph of ``model`` with a hole for each of ``layers``; dim 0 of every input is the dynamic ``batch``.

    Raises `ExportError` when the model cannot be traced or holds an operator that ONNX does not have.
    """
    args, kwargs = _arguments(example)
    _try(model, example)
    holes = {id(layer): Hole(path, layer) for path, layer in layers.items()}
    shell = copy.deepcopy(model, holes).eval().cpu()  # copies the model around the layers, never their codes
    dynamic = tree_map(_dynamic, kwargs or args)
    with _quietly(), torch.no_grad():
        program = _explained(
            "cannot be traced by torch.export with a dynamic batch size",
            lambda: torch.export.export(shell, args, kwargs, dynamic_shapes=dynamic, strict=False),
        )
        exported = _explained(
            "cannot be expressed in ONNX",
            lambda: torch.onnx.export(program, dynamo=True, opset_version=OPSET, verbose=False),
        )
        return exported.model_proto


def _try(model: nn.Module, example: Any) -> None:
    """Run the model once: holes have no numbers and would take inputs that the layers refuse."""
    try:
        with torch.no_grad(), evaluating(model):
            call(model, example)
    except (RuntimeError, ValueError, TypeError, IndexError, BitwrightError) as cause:
        shapes = [list(leaf.shape) for leaf in tree_leaves(example) if isinstance(leaf, Tensor)]
        raise ExportError(f"the example with shapes {shapes} does not fit the model: {cause}") from cause


def _arguments(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments on the CPU; a batch of one is doubled, since size 1 is traced as a constant."""
    sizes = {len(leaf) for leaf in tree_leaves(example) if isinstance(leaf, Tensor) and leaf.dim()}
    if len(sizes) != 1:
        found = f"found sizes {sorted(sizes)}" if sizes else "found no tensor with a dimension"
        raise ExportError(f"dim 0 of every input is the batch and must have one size in the example, {found}")

    def ready(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        leaf = leaf.detach().cpu()
        return torch.cat([leaf, leaf]) if sizes == {1} and leaf.dim() else leaf

    example = tree_map(ready, example)
    if isinstance(example, dict):
        return (), example
    return tuple(example) if isinstance(example, (tuple, list)) else (example,), {}


def _dynamic(leaf: Any) -> Any:
    return {0: torch.export.Dim("batch")} if isinstance(leaf, Tensor) and leaf.dim() else None


def _explained(what: str, run: Any) -> Any:
    """The result of ``run``; its failure as an `ExportError` with the cause at the root of the exporter's own."""
    try:
        return run()
    except Exception as failure:
        cause: BaseException = failure
        while cause.__cause__ is not None:
            cause = cause.__cause__
        lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
        reason = " ".join(lines[:3]) or type(cause).__name__
        raise ExportError(f"the model {what}: {type(cause).__name__}: {reason[:600]}") from failure


@contextmanager
def _quietly() -> Iterator[None]:
    """Without the exporter's prints, warnings and log lines; its errors still come through."""
    loggers = [logging.getLogger(name) for name in ("torch", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)

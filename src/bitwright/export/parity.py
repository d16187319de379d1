"""`parity`: how far ONNX Runtime is from the converted model, for the output and for every low-bit layer.

Codes and scales in a file are the model's own, so what differs is arithmetic: sums of floats in another order, biases
that ONNX Runtime rounds to int32 where it fuses a convolution, and the codes that such last bits flip further down.
Two sessions tell the two apart:

* The *output* comes from a session with ONNX Runtime's default optimisations, which is what a deployment gets.
* The *layers* come from a session without optimisations, since a value inside a fused operator cannot be read. It
  computes every node as the file states it: there a layer differs by the last bits of float sums, and by codes that
  such bits flipped in the layers before it.

Both run on the CPU with `settings` that a deployment should choose as well:
``session.qdq_matmulnbits_accuracy_level = 1`` (by default ONNX Runtime quantizes the float inputs of weight-only layers
to 8 bits), and on CPUs without VNNI ``session.x64quantprecision = 1`` (else sums of 8-bit products saturate there).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from bitwright.errors import ExportError
from bitwright.export.graph import lowbit_layers
from bitwright.export.onnx import require_onnx
from bitwright.export.writer import value_name
from bitwright.flow.evaluate import LayerDifference, difference, outputs_of
from bitwright.graph.dataflow import call, evaluating
from bitwright.kernels.cpu import cpu_features

if TYPE_CHECKING:
    from onnx import ModelProto
    from onnxruntime import InferenceSession


def settings() -> dict[str, str]:
    """Entries for `SessionOptions.add_session_config_entry` with which ONNX Runtime computes what the file states."""
    entries = {"session.qdq_matmulnbits_accuracy_level": "1"}
    if "avx512_vnni" not in cpu_features():
        entries["session.x64quantprecision"] = "1"
    return entries


@dataclass(frozen=True, slots=True)
class Parity:
    """Differences between a converted model and its file on one batch: by layer in order, and of the output.

    Layer differences include what the layers before them passed on. ``argmax_agreement`` is the share of rows whose
    largest output has the same index.
    """

    layers: list[LayerDifference]
    output: LayerDifference
    argmax_agreement: float

    def first_difference(self, tolerance: float = 1e-3) -> LayerDifference | None:
        """The first layer whose output differs by more than ``tolerance``, None if there is none."""
        return next((layer for layer in self.layers if layer.max_abs > tolerance), None)


def parity(model: nn.Module, path: str | Path, batch: Any) -> Parity:
    """Run a converted ``model`` and the file exported from it on one batch, and compare layer by layer.

    Raises `ExportError` when ``path`` cannot be run or was exported from another model.
    """
    expected = outputs_of(model, batch, lowbit_layers(model))
    with torch.no_grad(), evaluating(model):
        wanted = [leaf for leaf in tree_leaves(call(model, batch)) if isinstance(leaf, Tensor)]
    found = _layer_outputs(path, batch, expected)
    outputs = run_onnx(path, batch)
    if [out.shape for out in outputs] != [out.shape for out in wanted]:
        shapes = [list(out.shape) for out in outputs], [list(out.shape) for out in wanted]
        raise ExportError(f"{path} gives outputs {shapes[0]}, the model {shapes[1]}; it is the file of another model")
    return Parity(
        [difference(name, expected[name], found[name]) for name in expected],
        difference("output", _joined(wanted), _joined(outputs)),
        (wanted[0].argmax(-1) == outputs[0].argmax(-1)).double().mean().item(),
    )


def run_onnx(path: str | Path, batch: Any) -> list[Tensor]:
    """Outputs of an ONNX file on one batch (a tensor, a tuple or a dict), in ONNX Runtime with default optimisations.

    Raises `ExportError` when the file does not exist or does not take the batch.
    """
    return _run(_session(_loaded(path), optimized=True), batch, None)


def onnx_runner(proto: ModelProto, batch: Any) -> Callable[[], Any]:
    """A session of ONNX Runtime with default optimisations as a call without arguments that runs it on one batch."""
    session = _session(proto, optimized=True)
    return partial(session.run, None, _feeds(session, batch))


def _joined(outputs: Sequence[Tensor]) -> Tensor:
    return torch.cat([out.detach().double().flatten() for out in outputs])


def _layer_outputs(path: str | Path, batch: Any, layers: dict[str, Tensor]) -> dict[str, Tensor]:
    """Outputs of the layers, read from a copy of the file that has them as outputs."""
    from onnx import TensorProto, helper

    proto = _loaded(path)
    values = {name for node in proto.graph.node for name in node.output}
    names = {layer: _last_call(layer, values) for layer in layers}
    if missing := [layer for layer, name in names.items() if name not in values]:
        raise ExportError(f"{path} has no layer {missing[0]!r}; it is the file of another model")
    del proto.graph.output[:]
    outputs = dict.fromkeys(names.values())
    proto.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs)
    results = dict(zip(outputs, _run(_session(proto, optimized=False), batch, list(outputs)), strict=True))
    return {layer: results[name] for layer, name in names.items()}


def _last_call(layer: str, values: set[str]) -> str:
    """The value that holds a layer's output, of its last call if there are several."""
    name, count = value_name(layer, "output"), 2
    while (later := value_name(layer, value_name(f"call{count}", "output"))) in values:
        name, count = later, count + 1
    return name


def _loaded(path: str | Path) -> ModelProto:
    require_onnx()
    import onnx

    try:
        return onnx.load(str(path))
    except Exception as cause:
        raise ExportError(f"cannot read {path}: {cause}") from cause


def _session(proto: ModelProto, *, optimized: bool) -> InferenceSession:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 4  # what goes wrong is raised below
    for key, value in settings().items():
        options.add_session_config_entry(key, value)
    if not optimized:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        return onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as cause:
        raise ExportError(f"ONNX Runtime cannot load the file: {cause}") from cause


def _run(session: InferenceSession, batch: Any, names: list[str] | None) -> list[Tensor]:
    feeds = _feeds(session, batch)
    try:
        return [torch.from_numpy(out) for out in session.run(names, feeds)]
    except Exception as cause:
        raise ExportError(f"ONNX Runtime cannot run the file on this batch: {cause}") from cause


def _feeds(session: InferenceSession, batch: Any) -> dict[str, Any]:
    wanted = [entry.name for entry in session.get_inputs()]
    by_name = isinstance(batch, dict) and set(wanted) <= set(batch)
    leaves = [batch[name] for name in wanted] if by_name else tree_leaves(batch)
    tensors = [leaf.detach().cpu().contiguous().numpy() for leaf in leaves if isinstance(leaf, Tensor)]
    if len(tensors) != len(wanted):
        raise ExportError(
            f"the file takes {len(wanted)} inputs ({', '.join(wanted)}), the batch has {len(tensors)} tensors"
        )
    return dict(zip(wanted, tensors, strict=True))

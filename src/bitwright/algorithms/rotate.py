"""Rotation of the residual stream (QuaRot, Ashkboos 2024, section 4): no channel is an outlier afterwards.

An RMS norm without weight commutes with an orthogonal matrix: ``norm(x R) = norm(x) R``. So the weights of the norms
are multiplied into the linear layers behind them, every writer to the stream (embeddings, output projections) is
multiplied by R behind, and every reader by R in front; the model computes what it computed. The stream is found by
following the embeddings through additions; whatever else reads or writes it makes the method refuse the model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bitwright.algorithms.hadamard import orthogonal
from bitwright.algorithms.layers import NotApplicableError
from bitwright.algorithms.lockstep import Forward
from bitwright.algorithms.outcome import Outcome
from bitwright.algorithms.scaling import close, linears_of, outputs_of, restored, rows_of_weight, store_rows
from bitwright.graph.calls import Add
from bitwright.graph.dataflow import ADDS, Dataflow, Node, record
from bitwright.graph.foldable import is_layer_norm
from bitwright.graph.patterns import is_view
from bitwright.observe import ranks
from bitwright.plan.step import Value

STEP = "rotate"
_WITHIN = 1e-3  # of the largest output: float32 rounds differently in another basis


@dataclass
class Stream:
    """What touches the residual stream, by path: embeddings, linear layers that write, norms with their readers."""

    embeddings: dict[str, None] = field(default_factory=dict)
    writers: dict[str, None] = field(default_factory=dict)
    readers: dict[str, list[str]] = field(default_factory=dict)


def rotate(model: nn.Module, batches: Sequence[Any], forward: Forward, options: Mapping[str, Value]) -> list[Outcome]:
    """Rotate the residual stream by a Hadamard matrix with random signs (``seed``), or say why that cannot be done."""
    flow = ranks.first(record(model, batches[0], forward))
    try:
        stream = find_stream(flow, model)
        _check(model, stream)
        _turn(model, batches[0], forward, stream, int(options["seed"]))
    except NotApplicableError as reason:
        return [Outcome(STEP, "", skipped=str(reason))]
    parts = (*stream.embeddings, *stream.writers, *(path for paths in stream.readers.values() for path in paths))
    return [Outcome(STEP, path) for path in parts]


def find_stream(flow: Dataflow, model: nn.Module) -> Stream:
    """Follow the embeddings' outputs through views and additions; raises `NotApplicableError` for anything else."""
    stream, linears, seen = Stream(), linears_of(model), set()
    queue = [node for node in flow.nodes if isinstance(_module(node, model), nn.Embedding)]
    if not queue:
        raise NotApplicableError("no embedding begins a residual stream")
    for node in queue:
        _check_unshared(model, node.name)
        stream.embeddings[node.name] = None
    while queue:
        node = queue.pop()
        if node.index in seen:
            continue
        seen.add(node.index)
        if node.index in flow.outputs:
            raise NotApplicableError("the residual stream is an output of the model")
        for user in (flow.nodes[i] for i in node.users):
            if is_view(user, model):
                queue.append(user)
            elif _adds(user, model):
                _note_writers(flow, model, user, stream, linears)
                queue.append(user)
            elif is_layer_norm(_module(user, model)):
                stream.readers.setdefault(user.name, _readers(flow, model, user, linears))
            elif not type(_module(user, model)).__name__.endswith("RotaryEmbedding"):  # that reads its type alone
                raise NotApplicableError(f"{user.name!r} reads the residual stream without a norm before it")
    if not stream.readers:
        raise NotApplicableError("no norm reads the embeddings: there is no residual stream")
    return stream


def _note_writers(
    flow: Dataflow, model: nn.Module, add: Node, stream: Stream, linears: Mapping[str, nn.Module]
) -> None:
    """The operands of an addition are embeddings, linear layers and earlier additions of the stream."""
    if len(add.inputs) != 2 or -1 in add.sources:
        raise NotApplicableError(f"{add.name!r} adds a constant to the residual stream")
    for index in add.inputs:
        node = flow.nodes[index]
        while is_view(node, model) and node.inputs:
            node = flow.nodes[node.inputs[0]]
        if node.kind == "module" and node.name in linears:
            if len(node.users) > 1 or len(flow.calls(node.name)) > 1:
                raise NotApplicableError(f"{node.name!r} writes to the residual stream and elsewhere")
            stream.writers[node.name] = None
        elif not (isinstance(_module(node, model), nn.Embedding) or _adds(node, model)):
            raise NotApplicableError(f"{node.name!r} writes to the residual stream and is no linear layer")


def _readers(flow: Dataflow, model: nn.Module, norm: Node, linears: Mapping[str, nn.Module]) -> list[str]:
    if "RMSNorm" not in type(model.get_submodule(norm.name)).__name__:
        raise NotApplicableError(f"{norm.name!r} subtracts the mean, which does not commute with a rotation")
    found, queue = [], [norm]
    while queue:
        node = queue.pop()
        if node.index in flow.outputs:
            raise NotApplicableError(f"the output of {norm.name!r} is an output of the model")
        for user in (flow.nodes[i] for i in node.users):
            if is_view(user, model):
                queue.append(user)
            elif user.kind == "module" and user.name in linears and len(flow.calls(user.name)) == 1:
                found.append(user.name)
            else:
                raise NotApplicableError(f"{user.name!r} reads {norm.name!r} and is no linear layer of its own")
    return found


def _check(model: nn.Module, stream: Stream) -> None:
    for path in stream.readers:
        _check_unshared(model, path)
        if getattr(model.get_submodule(path), "bias", None) is not None:
            raise NotApplicableError(f"{path!r} has a bias, which the layers behind it cannot absorb")
    own = [model.get_submodule(path) for path in (*stream.embeddings, *stream.readers)]
    widths = {module.get_parameter("weight").shape[-1] for module in own}
    if len(widths) > 1:
        raise NotApplicableError(f"the residual stream has several widths: {sorted(widths)}")


def _check_unshared(model: nn.Module, path: str) -> None:
    weight = model.get_submodule(path).get_parameter("weight")
    if sum(p is weight for module in model.modules() for p in module.parameters(recurse=False)) > 1:
        raise NotApplicableError(
            f"{path!r} shares its weight with another module, but norms are multiplied into one of them only: give "
            "each its own copy first (tie_word_embeddings=False)"
        )


@torch.no_grad()
def _turn(model: nn.Module, batch: Any, forward: Forward, stream: Stream, seed: int) -> None:
    """Change all weights; where the model then computes something else, raise and leave them as they were."""
    width = model.get_submodule(next(iter(stream.readers))).get_parameter("weight").shape[0]
    matrix = orthogonal(width, torch.Generator().manual_seed(seed))
    paths = (*stream.embeddings, *stream.writers, *stream.readers, *(p for ps in stream.readers.values() for p in ps))
    before = outputs_of(model, batch, forward)
    with restored(model, paths):
        _multiply(model, stream, matrix)
        after = outputs_of(model, batch, forward)
    same = len(before) == len(after) and all(close(a, b, _WITHIN) for a, b in zip(after, before, strict=True))
    if not all(ranks.gathered(same)):
        raise NotApplicableError("the rotated model computes something else: its norms are not what they seem")
    _multiply(model, stream, matrix)


@torch.no_grad()
def _multiply(model: nn.Module, stream: Stream, matrix: Tensor) -> None:
    for path in stream.embeddings:
        weight = model.get_submodule(path).get_parameter("weight")
        weight.copy_(weight.double() @ matrix)
    for path in stream.writers:
        layer = model.get_submodule(path)
        store_rows(layer, matrix.T @ rows_of_weight(layer).double())
        if getattr(layer, "bias", None) is not None:
            layer.get_parameter("bias").copy_(layer.get_parameter("bias").double() @ matrix)
    for norm, paths in stream.readers.items():
        weight = model.get_submodule(norm).get_parameter("weight")
        for path in paths:
            layer = model.get_submodule(path)
            store_rows(layer, (rows_of_weight(layer).double() * weight.double()) @ matrix)
        weight.fill_(1.0)


def _adds(node: Node, model: nn.Module) -> bool:
    return (node.kind == "function" and node.name in ADDS) or isinstance(_module(node, model), Add)


def _module(node: Node, model: nn.Module) -> nn.Module | None:
    return model.get_submodule(node.name) if node.kind == "module" else None

"""`convert`: simulated modules -> shipped modules with packed codes."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from bitwright.errors import ModelError
from bitwright.flow.prepare import plan_of
from bitwright.kernels.cpu import cpu_features
from bitwright.kernels.table import Activation
from bitwright.lowbit.conv import LowbitConv
from bitwright.lowbit.elementwise import LowbitAdd
from bitwright.lowbit.embedding import LowbitEmbedding
from bitwright.lowbit.layer import LowbitLayer
from bitwright.lowbit.linear import LowbitLinear
from bitwright.nn.conv import geometry_of, prepad_of
from bitwright.nn.elementwise import QAdd
from bitwright.nn.layer import FoldedBatchNorm1d, FoldedBatchNorm2d, QLayer, Simulated
from bitwright.nn.quantizer import Quantizer, Stage
from bitwright.numerics.affine import encode
from bitwright.numerics.qtensor import QTensor, pack_rows
from bitwright.numerics.spec import QParams


def convert(model: nn.Module, *, inplace: bool = False, features: frozenset[str] | None = None) -> nn.Module:
    """The shipped model in eval mode: packed low-bit layers, no simulation, no float copy of a quantized weight.

    In eval mode its output equals the simulated model's bit for bit (contract C2). ``features`` restricts the
    kernels to those CPU features (default: this machine's; ``frozenset()`` takes the torch reference rows). Raises
    `ModelError` for a model that was not prepared and calibrated.
    """
    plan = plan_of(model)
    waiting = [q.site for q in model.modules() if isinstance(q, Quantizer) and q.stage is not Stage.SIMULATE]
    if waiting:
        raise ModelError(f"{waiting[0]} has no scale yet ({len(waiting)} sites in all); call bitwright.calibrate first")
    if not any(isinstance(module, Simulated) for module in model.modules()):
        raise ModelError("this model has no simulated layers: it was converted already")
    model = model if inplace else copy.deepcopy(model)
    features = cpu_features() if features is None else features
    packed: dict[tuple[int, int], QTensor] = {}
    shipped: dict[nn.Module, nn.Module | None] = {}
    for path, module in list(model.named_modules(remove_duplicate=False)):  # a module may be registered twice
        if module not in shipped:
            shipped[module] = _shipped(module, features, packed)
        if new := shipped[module]:
            _replace(model, path, new)
    model = shipped[model] or model
    model.bitwright_plan = plan  # type: ignore[assignment]
    return model.eval()


def is_converted(model: nn.Module) -> bool:
    """Whether a model holds shipped layers."""
    return any(isinstance(module, (LowbitLayer, LowbitAdd)) for module in model.modules())


def _shipped(module: nn.Module, features: frozenset[str], packed: dict[tuple[int, int], QTensor]) -> nn.Module | None:
    """The module that replaces ``module``, None if it stays."""
    if isinstance(module, (FoldedBatchNorm1d, FoldedBatchNorm2d)):
        return nn.Identity()
    if isinstance(module, QAdd):
        return LowbitAdd((_activation(module.input_0_quantizer), _activation(module.input_1_quantizer)), features)
    if not isinstance(module, QLayer):
        return None
    weight, bias = _pack_weight(module, packed)
    input = None if module.input_quantizer is None else _activation(module.input_quantizer)
    if isinstance(module, nn.Linear):
        return LowbitLinear(weight, bias, input, features)
    if isinstance(module, nn.Embedding):
        return LowbitEmbedding(weight, None, None, features)
    if isinstance(module, (nn.Conv1d, nn.Conv2d)):
        return LowbitConv(weight, bias, input, features, geometry_of(module), prepad_of(module))
    raise ModelError(f"{type(module).__name__} has no shipped form")


@torch.no_grad()
def _pack_weight(layer: QLayer, packed: dict[tuple[int, int], QTensor]) -> tuple[QTensor, Tensor | None]:
    """The layer's weight as stored (tied weights are packed once) and its float bias."""
    quantizer = layer.weight_quantizer
    assert quantizer is not None
    weight, bias = layer.folded()
    key = (id(layer.weight), id(quantizer))
    if key not in packed or layer.norm:
        qparams = quantizer.qparams
        assert qparams is not None
        codes = encode(weight, quantizer.spec, qparams)
        scale, zero_point = qparams.scale.detach().clone(), qparams.zero_point
        packed[key] = QTensor(
            pack_rows(codes, quantizer.spec),
            scale,
            None if zero_point is None else zero_point.clone(),
            quantizer.spec,
            tuple(weight.shape),
        )
    return packed[key], layer.on_grid(bias)


def _activation(quantizer: Quantizer) -> Activation:
    qparams = quantizer.qparams
    if qparams is not None:
        zero_point = qparams.zero_point
        qparams = QParams(qparams.scale.detach().clone(), None if zero_point is None else zero_point.clone())
    return Activation(quantizer.spec, qparams)


def _replace(model: nn.Module, path: str, new: nn.Module) -> None:
    if path:
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, new)

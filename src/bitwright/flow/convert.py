"""`convert`: simulated modules -> shipped modules with packed codes."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import torch
from torch import nn

from bitwright.errors import ModelError
from bitwright.flow.prepare import plan_of
from bitwright.flow.ship import SHIPPED, PackedOnce
from bitwright.kernels.device import device_features
from bitwright.lowbit.attention import LowbitOperation
from bitwright.lowbit.deferred import settle_outputs
from bitwright.lowbit.elementwise import LowbitAdd
from bitwright.lowbit.layer import LowbitLayer
from bitwright.nn.layer import Simulated, quantizer_name
from bitwright.nn.norm import FOLDED
from bitwright.nn.quantizer import Quantizer, Stage


def convert(model: nn.Module, *, inplace: bool = False, features: frozenset[str] | None = None) -> nn.Module:
    """The shipped model in eval mode: packed low-bit layers, no simulation, no float copy of a quantized weight.

    In eval mode its output equals the simulated model's bit for bit (contract C2). ``features`` restricts the
    kernels to those features (default: those of the device each module lies on; ``frozenset()`` takes the torch
    reference rows); a layer that later moves to another kind of device chooses anew. Raises `ModelError` for a model
    that was not prepared and calibrated.
    """
    plan = plan_of(model)
    waiting = [q.site for q in model.modules() if isinstance(q, Quantizer) and q.stage is not Stage.SIMULATE]
    if waiting:
        raise ModelError(f"{waiting[0]} has no scale yet ({len(waiting)} sites in all); call bitwright.calibrate first")
    if not any(isinstance(module, Simulated) for module in model.modules()):
        raise ModelError("this model has no simulated layers: it was converted already")
    model = model if inplace else copy.deepcopy(model, _read_only(model))
    packed = PackedOnce(_tied(model))
    paths: dict[nn.Module, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):  # a module may be registered twice
        paths.setdefault(module, []).append(path)
    while paths:  # one by one, so that each float layer is freed before the next is packed
        module = next(iter(paths))
        places = paths.pop(module)
        if new := _shipped(module, _features(module, features), packed):
            model = _replaced(model, places, new)
        del module
    model.bitwright_plan = plan  # type: ignore[assignment]
    model.register_forward_hook(settle_outputs)
    return model.eval()


def is_converted(model: nn.Module) -> bool:
    """Whether a model holds shipped layers."""
    return any(isinstance(module, (LowbitLayer, LowbitAdd, LowbitOperation)) for module in model.modules())


def _features(module: nn.Module, given: frozenset[str] | None) -> frozenset[str]:
    """The features given, else those of the device that a module lies on."""
    if given is not None:
        return given
    part = next(itertools.chain(module.parameters(), module.buffers()), None)
    return device_features(torch.device("cpu") if part is None else part.device)


def _shipped(module: nn.Module, features: frozenset[str], packed: PackedOnce) -> nn.Module | None:
    """The module that replaces ``module``, None if it stays."""
    if isinstance(module, tuple(FOLDED.values())):
        return nn.Identity()
    if not isinstance(module, Simulated):
        return None
    for kind, ship in SHIPPED.items():
        if isinstance(module, kind):
            return ship(module, features, packed)
    raise ModelError(f"{type(module).__name__} has no shipped form")


def _replaced(model: nn.Module, paths: list[str], new: nn.Module) -> nn.Module:
    """The model with a new module at some paths; the new module itself where one is the root."""
    for path in paths:
        if not path:
            return new
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, new)
    return model


def _owners(model: nn.Module) -> dict[int, list[bool]]:
    """For each parameter, by identity: whether each module that owns it quantizes it."""
    owners: dict[int, list[bool]] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(getattr(module, quantizer_name(name), None) is not None)
    return owners


def _tied(model: nn.Module) -> frozenset[int]:
    return frozenset(parameter for parameter, quantized in _owners(model).items() if len(quantized) > 1)


def _read_only(model: nn.Module) -> dict[int, Any]:
    """What a copy that is converted at once need not copy: the weights that become codes, by identity."""
    quantized = {parameter for parameter, by_owner in _owners(model).items() if all(by_owner)}
    return {id(parameter): parameter for parameter in model.parameters() if id(parameter) in quantized}

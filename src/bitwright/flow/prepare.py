"""`prepare`: plan + float model -> the same model, able to simulate.

Adds are named, classes swapped, batch norms folded into the forward of the layer before them, quantizers attached.
Until calibration the prepared model computes in float, what it computed before.
"""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from bitwright.errors import ModelError, PlanError
from bitwright.graph.rewrite import name_adds
from bitwright.nn.elementwise import QAdd
from bitwright.nn.layer import QLayer
from bitwright.nn.quantizer import Quantizer
from bitwright.nn.swap import swapped
from bitwright.plan.plan import Plan
from bitwright.plan.site import SLOTS, Site, check_preparable, operator_of
from bitwright.plan.validate import validate


def prepare(model: nn.Module, plan: Plan, *, inplace: bool = False) -> nn.Module:
    """The model with every site of ``plan`` ready to be calibrated; a copy unless ``inplace``.

    Raises `PlanError` when the plan does not fit the model or its target, `ModelError` for weights that are not finite
    and for models that cannot be prepared. Nothing is changed when it raises.

    >>> net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    >>> type(prepare(net, Plan.preset("w8a8", net, torch.zeros(1, 8)))[0]).__name__
    'QLinear'
    """
    check_preparable(model)
    if any(isinstance(module, (QLayer, QAdd)) for module in model.modules()):
        raise ModelError("this model is prepared already; prepare the float model")
    validate(plan, model)
    _check_weights(plan, model)
    model = model if inplace else copy.deepcopy(model)
    _name_adds(model, plan)
    quantizers = {site: _quantizer(model, plan, site) for site, spec in plan.sites.items() if spec is not None}
    for site, leader in plan.shared.items():
        if site in quantizers:
            quantizers[site] = quantizers[leader]
    for path in dict.fromkeys(site.path for site in quantizers):
        _swap(model.get_submodule(path), path, quantizers)
    for path, norm in plan.folds.items():
        _fold(model, path, norm)
    model.bitwright_plan = plan  # type: ignore[assignment]
    return model


def plan_of(model: nn.Module) -> Plan:
    """The plan a model was prepared with; raises `ModelError` for a model that was not."""
    plan = getattr(model, "bitwright_plan", None)
    if not isinstance(plan, Plan):
        raise ModelError(f"{type(model).__name__} was not prepared by bitwright; call bitwright.prepare(model, plan)")
    return plan


def _check_weights(plan: Plan, model: nn.Module) -> None:
    for site, spec in plan.sites.items():
        if site.is_weight and spec is not None:
            module = model.get_submodule(site.path)
            weight = module.get_parameter("weight")
            bad = int((~torch.isfinite(weight)).sum())
            if bad:
                raise ModelError(
                    f"{site}: {bad} of {weight.numel()} weights are NaN or infinite; repair the checkpoint"
                )
            if getattr(module, "max_norm", None) is not None:
                raise ModelError(
                    f"{site}: an embedding with max_norm rewrites its own weights; set the site to 'float'"
                )


def _name_adds(model: nn.Module, plan: Plan) -> None:
    owners: dict[str, list[int]] = {}
    modules = dict(model.named_modules())
    for site, spec in plan.sites.items():
        if site.slot == "input.0" and spec is not None and site.path not in modules:
            owner, _, leaf = site.path.rpartition(".")
            owners.setdefault(owner, []).append(int(leaf.removeprefix("add_")))
    for owner, ordinals in owners.items():
        try:
            name_adds(modules[owner], ordinals)
        except Exception as cause:
            raise PlanError(f"{owner or type(model).__name__}: cannot name its adds: {cause}") from cause


def _quantizer(model: nn.Module, plan: Plan, site: Site) -> Quantizer:
    spec = plan.sites[site]
    assert spec is not None
    shape = tuple(model.get_submodule(site.path).get_parameter("weight").shape) if site.is_weight else None
    return Quantizer(str(site), spec, shape, plan.observers["weight" if site.is_weight else "input"])


def _swap(module: nn.Module, path: str, quantizers: dict[Site, Quantizer]) -> None:
    op = operator_of(module)
    module.__class__ = swapped(module)
    if isinstance(module, QAdd):
        module.input_quantizer_0, module.input_quantizer_1 = (quantizers[Site(path, slot)] for slot in SLOTS["add"])
    elif isinstance(module, QLayer):
        assert op in SLOTS
        module.attach(quantizers.get(Site(path, "weight")), quantizers.get(Site(path, "input")))


def _fold(model: nn.Module, path: str, norm_path: str) -> None:
    layer, norm = model.get_submodule(path), model.get_submodule(norm_path)
    if not isinstance(layer, QLayer) or not isinstance(norm, _BatchNorm):
        raise PlanError(f"[folds] {path} = {norm_path}: expected a quantized layer and a batch norm")
    layer.fold(norm)

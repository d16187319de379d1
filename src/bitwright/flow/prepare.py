"""`prepare`: plan + float model -> the same model, able to simulate.

Adds are named, classes swapped, batch norms folded into the forward of the layer before them, quantizers attached.
Until calibration the prepared model computes in float, what it computed before.
"""

from __future__ import annotations

import copy
import re

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from bitwright.errors import ModelError, PlanError
from bitwright.graph.calls import Attention
from bitwright.graph.multihead import CHILD
from bitwright.graph.rewrite import name_calls
from bitwright.nn.attention import Probabilities
from bitwright.nn.layer import QLayer, Simulated
from bitwright.nn.quantizer import Quantizer
from bitwright.nn.swap import swapped
from bitwright.plan.plan import Plan
from bitwright.plan.site import FOLDING, Site, call_of, check_preparable, operator_of, rows_shape, slots_of
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
    if any(isinstance(module, Simulated) for module in model.modules()):
        raise ModelError("this model is prepared already; prepare the float model")
    validate(plan, model)
    _check_weights(plan, model)
    _check_structure(plan, model)
    _name_calls(model, plan, rehearse=True)
    model = model if inplace else copy.deepcopy(model)
    _name_calls(model, plan)
    quantizers = {site: _quantizer(model, plan, site) for site, spec in plan.sites.items() if spec is not None}
    for site, leader in plan.shared.items():
        if site in quantizers:
            quantizers[site] = quantizers[leader]
            quantizers[leader].consumers += 1
    for path in dict.fromkeys((*(site.path for site in quantizers), *_to_open(model, quantizers))):
        _swap(model.get_submodule(path), path, quantizers)
    for path, norm in plan.folds.items():
        _fold(model, path, norm)
    _leave_fused_paths(model)
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
            weight = module.get_parameter(site.slot)
            bad = int((~torch.isfinite(weight)).sum())
            if bad:
                raise ModelError(
                    f"{site}: {bad} of {weight.numel()} weights are NaN or infinite; repair the checkpoint"
                )
            if getattr(module, "max_norm", None) is not None:
                raise ModelError(
                    f"{site}: an embedding with max_norm rewrites its own weights; set the site to 'float'"
                )


def _check_structure(plan: Plan, model: nn.Module) -> None:
    """[folds] and [shared] were found by recording a model; they must hold for this one."""
    modules = dict(model.named_modules())
    for path, norm_path in plan.folds.items():
        layer, norm = modules[path], modules[norm_path]
        fits = isinstance(norm, _BatchNorm) and norm.track_running_stats and operator_of(layer) in FOLDING
        if not fits or norm.num_features != rows_shape(layer, "weight")[0]:
            raise PlanError(f"[folds] {path} = {norm_path}: {norm} cannot fold into {layer}; make a new plan")
        if list(plan.folds.values()).count(norm_path) > 1:
            raise PlanError(f"[folds] {path} = {norm_path}: a batch norm folds into one layer only; make a new plan")
    for site, leader in plan.shared.items():
        weights = [modules[s.path].get_parameter(s.slot) for s in (site, leader) if s.is_weight]
        if weights and not (len(weights) == 2 and weights[0] is weights[1]):
            raise PlanError(f"[shared] {site} = {leader}: these are not one tensor in this model; make a new plan")


def _name_calls(model: nn.Module, plan: Plan, *, rehearse: bool = False) -> None:
    """Name the functional calls of the plan; a rehearsal does it on shallow copies and only raises what there is."""
    owners: dict[str, dict[str, set[int]]] = {}
    modules = dict(model.named_modules())
    for site, spec in plan.sites.items():
        if spec is not None and site.path not in modules and (call := call_of(site.path)):
            owner, kind, ordinal = call
            if not re.fullmatch("0|[1-9][0-9]{0,5}", site.path.rpartition("_")[2]):
                raise PlanError(f"{site}: {kind}s are called {kind}_0, {kind}_1, ...; make a new plan")
            owners.setdefault(owner, {}).setdefault(kind, set()).add(ordinal)
    for owner, kinds in owners.items():
        module = modules[owner]
        if rehearse:
            module = copy.copy(module)
            module._modules = dict(module._modules)
        for kind in sorted(kinds, key=lambda kind: kind == "attention"):
            try:
                _name(module, kind, sorted(kinds[kind]))
            except Exception as cause:
                raise PlanError(f"{owner or type(model).__name__}: cannot name its {kind}s: {cause}") from cause


def _name(module: nn.Module, kind: str, ordinals: list[int]) -> None:
    if operator_of(module) == "multihead":
        if (kind, ordinals) != ("attention", [0]):
            raise ModelError(f"the products of nn.MultiheadAttention are {CHILD}")
        module.add_module(CHILD, Attention())
    else:
        name_calls(module, kind, ordinals)


def _quantizer(model: nn.Module, plan: Plan, site: Site) -> Quantizer:
    spec = plan.sites[site]
    assert spec is not None
    shape = rows_shape(model.get_submodule(site.path), site.slot) if site.is_weight else None
    known = site.slot == "probs" and plan.observer(site) == "fixed:0,1" and not spec.dynamic
    return (Probabilities if known else Quantizer)(str(site), spec, shape, plan.observer(site), plan.range_rule(site))


def _swap(module: nn.Module, path: str, quantizers: dict[Site, Quantizer]) -> None:
    slots = slots_of(module)
    module.__class__ = swapped(module)
    assert isinstance(module, Simulated)
    module.attach({slot: quantizers.get(Site(path, slot)) for slot in slots})


def _fold(model: nn.Module, path: str, norm_path: str) -> None:
    layer, norm = model.get_submodule(path), model.get_submodule(norm_path)
    assert isinstance(layer, QLayer)
    assert isinstance(norm, _BatchNorm)
    layer.fold(norm)


def _to_open(model: nn.Module, quantizers: dict[Site, Quantizer]) -> list[str]:
    """Attention modules with a quantized part: in float they would read its weights past the part itself."""
    paths = [path for path, module in model.named_modules() if operator_of(module) == "multihead"]
    return [path for path in paths if any(f"{site.path}.".startswith(f"{path}.".lstrip(".")) for site in quantizers)]


def _leave_fused_paths(model: nn.Module) -> None:
    """In eval mode torch hands the raw weights of an encoder layer to one fused kernel, past the layers inside it.

    Where those are quantized, that path is shut by the attributes that torch itself asks.
    """
    for module in model.modules():
        if isinstance(module, (nn.TransformerEncoder, nn.TransformerEncoderLayer)):
            if any(isinstance(child, Simulated) for child in module.modules()):
                module.activation_relu_or_gelu = 0  # type: ignore[assignment]
                module.use_nested_tensor = False  # type: ignore[assignment]

"""Presets: named starting points, and the walk over a recorded model that turns one into a decision per site.

A preset is five lines of data. What it leaves in float, and why, is written into the plan.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from bitwright.errors import ModelError, PlanError
from bitwright.graph import patterns
from bitwright.graph.calls import KINDS, kind_of
from bitwright.graph.dataflow import Dataflow, Node, record
from bitwright.graph.multihead import CHILD, SIDES
from bitwright.graph.rewrite import why_not_nameable
from bitwright.numerics.spec import QuantSpec
from bitwright.plan.groups import fitted
from bitwright.plan.site import (
    ADD_SLOTS,
    CONVOLUTIONS,
    PRODUCTS,
    Product,
    Site,
    operator_of,
    products_of,
    slots_of,
    unknown_subclass,
)
from bitwright.plan.target import Target

Pair = tuple[str | None, str | None]


@dataclass(frozen=True, slots=True)
class Preset:
    """Specs (weight, input) by operator; ``first`` for layers that see the raw input, None = like the others."""

    linear: Pair
    conv: Pair
    embedding: str
    add: str | None
    first: Pair | None = None

    def pair(self, op: str) -> Pair:
        """Specs (weight, input) of one operator; every kind of weighted product but convolution is a linear one."""
        if op in OPTIONAL:
            return None, None
        if op in ("embedding", "add"):
            return {"embedding": (self.embedding, None), "add": (None, self.add)}[op]
        return self.conv if op in CONVOLUTIONS else self.linear


PRESETS: dict[str, Preset] = {
    "w8a8": Preset(("int8/channel", "uint8/asym"), ("int8/channel", "uint8/asym"), "int8/channel", "uint8/asym"),
    "w8a8-dynamic": Preset(
        ("int8/channel", "int8/token/dynamic"), ("int8/channel", "uint8/asym/dynamic"), "int8/channel", None
    ),
    "w4a8": Preset(
        ("int4/channel", "uint8/asym"),
        ("int4/channel", "uint8/asym"),
        "int8/channel",
        "uint8/asym",
        first=("int8/channel", "uint8/asym"),
    ),
    "w4a4": Preset(
        ("int4/channel", "uint4/asym"),
        ("int4/channel", "uint4/asym"),
        "int8/channel",
        "uint8/asym",
        first=("int8/channel", "uint8/asym"),
    ),
    "w4a16": Preset(("int4/group128", None), ("int4/channel", None), "int8/channel", None),
    "nf4": Preset(("nf4/group64/scale(int8/group256)", None), ("nf4/channel", None), "int8/channel", None),
    "mxfp4": Preset(("mxfp4", None), ("fp4/channel", None), "int8/channel", None),
    "fp8": Preset(("fp8_e4m3/channel", None), ("fp8_e4m3/channel", None), "fp8_e4m3/channel", None),
    "fp16": Preset(("fp16", None), ("fp16", None), "fp16", None),
}


OPTIONAL = {
    "matmul": "products of two activations stay in float unless a rule gives them a spec",
    "cat": "concatenations stay in float unless a rule gives them a spec, one for all their tensors",
    "attention": "the products of attention stay in float unless a rule gives them a spec",
}
"""Operations of activations only, which no preset quantizes: on the CPU torch's fused float attention is faster than
integer products with a float softmax between them, and loses nothing. At 8 bits they cost little accuracy."""


@dataclass
class Proposal:
    """The parts of a plan that come from running the model: decisions, reasons and structure."""

    sites: dict[Site, QuantSpec | None] = field(default_factory=dict)
    why: dict[Site, str] = field(default_factory=dict)
    folds: dict[str, str] = field(default_factory=dict)
    shared: dict[Site, Site] = field(default_factory=dict)


def propose(name: str, model: nn.Module, example: Any, target: Target, rules: Mapping[str, object]) -> Proposal:
    """Run ``model`` once on ``example`` and give every site the preset's spec, or float with the reason.

    ``rules`` are the user's own site rules; they are applied later, here they only excuse unknown layer classes.
    Raises `PlanError` for an unknown preset, `ModelError` for unknown subclasses of known layers.
    """
    if name not in PRESETS:
        raise PlanError(f"unknown preset {name!r}; known presets: {', '.join(PRESETS)}")
    preset, flow, out = PRESETS[name], record(model, example), Proposal()
    kept = _without_kernel(model, target) | _kept_in_float(flow, model)
    first = patterns.first_layers(flow, model)
    for path, module in model.named_modules():
        if known := unknown_subclass(module):
            _keep_unknown(out, path, module, known, kept, rules)
        elif operator_of(module):
            _decide(out, name, preset, path, module, kept.get(path, ""), path in first)
    _add_residuals(out, flow, model, preset, target)
    _add_optional(out, flow, model)
    out.folds = {conv: norm for conv, norm in patterns.fold_batchnorms(flow, model).items() if _quantized(out, conv)}
    _share(out, flow, model)
    return out


def _without_kernel(model: nn.Module, target: Target) -> dict[str, str]:
    """``{path: reason}`` for weighted layers whose operator the target does not have at all."""
    kept = {
        path: f"target {target.name} has no {product.op} kernel"
        for path, module in model.named_modules()
        for product in products_of(module)
        if product.weight is not None and not target.has(product.op)
    }
    refused = {path: op for path, module in model.named_modules() if (op := operator_of(module)) in target.refuses}
    return kept | {path: f"target {target.name} has no form for {op} layers" for path, op in refused.items()}


def _kept_in_float(flow: Dataflow, model: nn.Module) -> dict[str, str]:
    """``{path: reason}`` for layers whose quantization would be bypassed, classifiers, and their tied twins."""
    kept = dict.fromkeys(patterns.classifiers(flow, model), "the classifier stays in float by default")
    for parameter, function in patterns.bypassed_parameters(flow).items():
        path, _, leaf = parameter.rpartition(".")
        if leaf == "weight" or leaf in slots_of(model.get_submodule(path)):
            kept[path] = f"its weight is read by {function} behind the module's back"
    owners: dict[int, list[str]] = {}
    for path, module in model.named_modules():
        if operator_of(module) and isinstance(weight := getattr(module, "weight", None), nn.Parameter):
            owners.setdefault(id(weight), []).append(path)
    for paths in owners.values():
        reason = next((kept[path] for path in paths if path in kept), None)
        for path in paths:
            if reason and path not in kept:
                kept[path] = f"tied to {next(p for p in paths if p in kept)}: {reason}"
    return kept


def _keep_unknown(
    out: Proposal,
    path: str,
    module: nn.Module,
    known: type,
    kept: dict[str, str],
    rules: Mapping[str, object],
) -> None:
    asked_float = any(fnmatchcase(f"{path}.weight", rule) and spec in (None, "float") for rule, spec in rules.items())
    if path not in kept and not asked_float:
        raise ModelError(
            f"{path} is {type(module).__name__}, a subclass of nn.{known.__name__} whose forward bitwright does not "
            f"know; register it with bitwright.register_module, or keep it in float with sites={{'{path}.*': 'float'}}"
        )
    for slot in ("weight", "input"):
        out.sites[Site(path, slot)] = None
        out.why[Site(path, slot)] = kept.get(path, f"{type(module).__name__} has no quantized form")


def _decide(out: Proposal, name: str, preset: Preset, path: str, module: nn.Module, kept: str, first: bool) -> None:
    for product in products_of(module):
        weight, input = preset.pair(product.op)
        why = OPTIONAL.get(operator_of(module) or "", f"preset {name}")
        if product.op in ("linear", *CONVOLUTIONS) and first and _meets_input(product) and preset.first is not None:
            (weight, input), why = preset.first, f"preset {name}: a layer that sees the raw input keeps 8 bits"
        if kept:
            weight, input, why = None, None, kept
        for slot in (product.weight, *product.inputs):
            if slot is None:
                continue
            site = Site(path, slot)
            spec = weight if site.is_weight else input
            out.sites[site], out.why[site] = None if spec is None else QuantSpec.parse(spec), why
            if site.is_weight and spec is not None:
                out.sites[site], changed = fitted(QuantSpec.parse(spec), module, slot)
                out.why[site] += f": {changed}" if changed else ""


def _meets_input(product: Product) -> bool:
    """Whether a product multiplies what its module is given; recurrent modules have others too."""
    return not any(re.match("hidden|projected|input_l[1-9]", slot) for slot in product.inputs)


def _add_residuals(out: Proposal, flow: Dataflow, model: nn.Module, preset: Preset, target: Target) -> None:
    for node in patterns.residual_adds(flow, model):
        owner = model.get_submodule(node.owner)
        count = _count(flow, node.owner, "add")
        spec, why = None if preset.add is None else QuantSpec.parse(preset.add), "residual add"
        if spec is not None:
            if patterns.feeds_layernorm(flow, node, model):
                spec, why = None, "residual add into a layer norm, which stays in float"
            elif not target.quantizes_adds:
                spec, why = None, f"target {target.name} does not quantize adds"
            elif reason := why_not_nameable(owner, "add", count):
                spec, why = None, f"residual add that cannot be named: {reason}; write it as bitwright.Add"
        path = _call_path(node)
        for slot in ADD_SLOTS:
            out.sites[Site(path, slot)], out.why[Site(path, slot)] = spec, why


def _add_optional(out: Proposal, flow: Dataflow, model: nn.Module) -> None:
    """Sites, in float, of products and concatenations of activations, for rules to switch on."""
    found = {kind: patterns.products(flow, kind, model) for kind in ("matmul", "attention")}
    found["cat"] = patterns.concatenations(flow, model)
    for kind, nodes in found.items():
        for node in nodes:
            count = _count(flow, node.owner, kind)
            reason = why_not_nameable(model.get_submodule(node.owner), kind, count)
            _keep_optional(out, _call_path(node), kind, reason)
    for path, module in model.named_modules():
        if operator_of(module) == "multihead":
            _keep_optional(out, f"{path}.{CHILD}".removeprefix("."), "attention", "")


def _keep_optional(out: Proposal, path: str, kind: str, reason: str) -> None:
    why = OPTIONAL[kind]
    if reason:
        why = f"{kind} that cannot be named: {reason}; write it as bitwright.{KINDS[kind].module.__name__}"
    for product in PRODUCTS[kind](None):
        for slot in product.inputs:
            out.sites[Site(path, slot)], out.why[Site(path, slot)] = None, why


def _count(flow: Dataflow, owner: str, kind: str) -> int:
    """How many calls of a kind one forward of ``owner`` makes."""
    return 1 + max(n.ordinal for n in flow.nodes if n.owner == owner and n.name in KINDS[kind].recorded)


def _call_path(node: Node) -> str:
    return f"{node.owner}.{kind_of(node.name)}_{node.ordinal}".removeprefix(".")


def _quantized(out: Proposal, path: str) -> bool:
    return out.sites.get(Site(path, "weight")) is not None


def _share(out: Proposal, flow: Dataflow, model: nn.Module) -> None:
    """Consumers of one tensor with one spec share one quantizer; so do tied weights, unless batch norms change them."""
    consumers: dict[int, list[Site]] = {}
    paths = [node.name if node.kind == "module" else _call_path(node) for node in flow.nodes]
    times = Counter(paths)
    for node, path in zip(flow.nodes, paths, strict=True):
        slots = _activation_slots(node, path, model)
        if times[path] > 1:
            continue
        for slot, source in zip(slots, node.sources, strict=False):
            site = Site(path, slot)
            if source >= 0 and (spec := out.sites.get(site)) is not None and not spec.dynamic:
                consumers.setdefault(source, []).append(site)
    weights: dict[tuple[int, str | None], list[Site]] = {}
    for site in out.sites:  # float ones too: a rule may quantize both ends of a tie later
        if site.is_weight and unknown_subclass(model.get_submodule(site.path)) is None:
            key = (id(getattr(model.get_submodule(site.path), site.slot)), out.folds.get(site.path))
            weights.setdefault(key, []).append(site)
    for group in (*consumers.values(), *weights.values()):
        for site in group[1:]:
            leader = next(other for other in group if out.sites[other] == out.sites[site])
            if leader != site:
                out.shared[site] = leader


def _activation_slots(node: Node, path: str, model: nn.Module) -> tuple[str, ...]:
    """Slots of a call's tensor arguments, in the order of its arguments, as far as they are known."""
    if node.kind != "module":
        return ADD_SLOTS
    slots = tuple(slot for slot in slots_of(model.get_submodule(path)) if not Site(path, slot).is_weight)
    return slots if slots in (("input",), ADD_SLOTS, SIDES) else ()

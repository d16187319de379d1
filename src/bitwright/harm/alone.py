"""One site quantized, everything else in float: for weights by the line itself, for activations by a hook."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from bitwright.algorithms.pipeline import FORESEEN, calibrate
from bitwright.costs.choices import sharing
from bitwright.errors import SearchError
from bitwright.flow.prepare import prepare
from bitwright.graph.dataflow import evaluating
from bitwright.nn.layer import QLayer, Simulated
from bitwright.nn.norm import factor_of
from bitwright.nn.quantizer import Quantizer, Stage
from bitwright.numerics.spec import QuantSpec
from bitwright.plan.plan import Plan
from bitwright.plan.site import Site

Forward = Callable[[nn.Module, Any], Any]

_ARGUMENTS = {"query": 0, "key": 1, "value": 2}
_INPUT = r"input(?:\.(\d+))?"


class Weights:
    """A model in float whose weights can be rounded one by one, with the steps of the plan.

    The layers before the only rounded one are in float, so steps that work on a layer are given its inputs, which are
    recorded once for all its specs. Other steps run the whole model.
    """

    def __init__(self, model: nn.Module, plan: Plan, batches: Sequence[Any], forward: Forward) -> None:
        self.model, self.plan, self.batches, self.forward = model, plan, batches, forward
        self._whole = any(step.method.moment != "layer" or step.name in FORESEEN for step in plan.steps)
        self._inputs: tuple[Site, list[_Calls]] | None = None

    def alone(self, site: Site, spec: str) -> nn.Module:
        """A calibrated copy in which only the weight at ``site`` has a spec."""
        prepared = self._prepared(site, spec)
        self._calibrate(prepared, site)
        return prepared

    @torch.no_grad()
    def change(self, site: Site, spec: str) -> Tensor:
        """What `alone` changes at the parameter of ``site``, in its own shape; a batch norm is divided out again."""
        floats = [step.name for step in self.plan.steps if step.method.moment == "float"]
        if floats:
            raise SearchError(
                f"step {floats[0]} rescales weights, so their change is no rounding error; measure 'kl' or 'loss'"
            )
        prepared = self._prepared(site, spec)
        module = prepared.get_submodule(site.path)
        assert isinstance(module, Simulated)
        before = module.quantized_weights()[site.slot].clone()
        factor = factor_of(module.norm[0]) if isinstance(module, QLayer) and module.norm else None
        self._calibrate(prepared, site)
        quantizer = module.quantizer(site.slot)
        assert quantizer is not None
        change = quantizer.simulate(module.quantized_weights()[site.slot]) - before
        if factor is not None:
            factor = factor.view(-1, *[1] * (change.dim() - 1)).float()
            change = torch.where(factor == 0, 0.0, change / factor)
        return module.from_rows(change)

    @torch.no_grad()
    def factor(self, site: Site, spec: str) -> Tensor | None:
        """What the weight of ``site`` is multiplied by before it is encoded, in its own shape; None for nothing."""
        module = self._prepared(site, spec).get_submodule(site.path)
        if not isinstance(module, QLayer) or not module.norm:
            return None
        rows = module.quantized_weights()[site.slot]
        factor = factor_of(module.norm[0]).view(-1, *[1] * (rows.dim() - 1)).float()
        return module.from_rows(factor.expand_as(rows))

    def _prepared(self, site: Site, spec: str) -> nn.Module:
        chosen = sharing(self.plan, site)
        sites = {other: QuantSpec.parse(spec) if other in chosen else None for other in self.plan.sites}
        return prepare(self.model, replace(self.plan, sites=sites).with_sites({}))

    def _calibrate(self, prepared: nn.Module, site: Site) -> None:
        if not self.plan.steps:
            calibrate(prepared, forward=self.forward)
        elif self._whole:
            calibrate(prepared, self.batches, forward=self.forward)
        else:
            if self._inputs is None or self._inputs[0] != site:
                paths = list(dict.fromkeys(other.path for other in sharing(self.plan, site)))
                self._inputs = site, [_calls(prepared, batch, self.forward, paths) for batch in self.batches]
            calibrate(prepared, self._inputs[1], forward=_called)


_Calls = list[tuple[str, tuple[Any, ...], dict[str, Any]]]


@torch.no_grad()
def _calls(model: nn.Module, batch: Any, forward: Forward, paths: Sequence[str]) -> _Calls:
    """The calls of modules in one forward, in order; arguments are copied: models change tensors in place."""
    found: _Calls = []

    def keep(path: str) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found.append((path, *tree_map(lambda x: x.clone() if isinstance(x, Tensor) else x, (args, kwargs))))

        return hook

    hooks = [model.get_submodule(path).register_forward_pre_hook(keep(path), with_kwargs=True) for path in paths]
    try:
        with evaluating(model):
            forward(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _called(model: nn.Module, calls: _Calls) -> None:
    for path, args, kwargs in calls:
        model.get_submodule(path)(*args, **kwargs)


class Activations:
    """A model in float whose activations can be looked at and quantized one by one; ranges are from ``batches``."""

    def __init__(
        self, model: nn.Module, plan: Plan, wanted: Sequence[tuple[Site, str]], batches: Sequence[Any], forward: Forward
    ) -> None:
        self.plan, self.model = plan, prepare(model, replace(plan, steps=())).eval()
        self.quantizers = {(site, text): self._quantizer(site, text) for site, text in wanted if not site.is_weight}
        with torch.no_grad():
            for quantizer in self.quantizers.values():
                quantizer.stage = Stage.OBSERVE
            sites = list(dict.fromkeys(site for site, _ in self.quantizers))
            with self.at(sites, self._observe):
                for batch in batches if sites else ():
                    forward(self.model, batch)
            for quantizer in self.quantizers.values():
                quantizer.finish()

    @contextmanager
    def alone(self, site: Site, spec: str) -> Iterator[nn.Module]:
        """The model with only this activation quantized."""
        quantizer = self.quantizers[site, spec]
        with self.at([site], lambda _, x: quantizer.simulate(x)):
            yield self.model

    @contextmanager
    def at(self, sites: Sequence[Site], function: Callable[[Site, Tensor], Tensor | None]) -> Iterator[None]:
        """Inside the block ``function`` sees each of these activations, and may return what takes its place."""
        hooks = []
        for leader in sites:
            for site in sharing(self.plan, leader):
                module = self.model.get_submodule(site.path)
                hooks.append(module.register_forward_pre_hook(_replacing(_argument(site), leader, function)))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @contextmanager
    def shifted(self) -> Iterator[dict[Site, list[tuple[Tensor, Tensor]]]]:
        """Inside the block each activation is met by a 0 that has a gradient, on its way into its modules.

        That gradient is what a change of the activation does there, and not where else the same tensor is read. Yields
        pairs of tensor and 0 by site, filled as the model runs.
        """
        seen: dict[Site, list[tuple[Tensor, Tensor]]] = {}

        def shift(site: Site, x: Tensor) -> Tensor:
            known = seen.setdefault(site, [])
            for other, offset in known:
                if other is x:
                    return x + offset
            known.append((x, torch.zeros_like(x).requires_grad_()))
            return x + known[-1][1]

        with self.at(list(dict.fromkeys(site for site, _ in self.quantizers)), shift):
            yield seen

    def _quantizer(self, site: Site, text: str) -> Quantizer:
        _argument(site)
        return Quantizer(str(site), QuantSpec.parse(text), None, self.plan.observer(site)).eval()

    def _observe(self, site: Site, x: Tensor) -> None:
        for (other, _), quantizer in self.quantizers.items():
            if other == site:
                quantizer.observe(x)


def passed_in(site: Site) -> bool:
    """Whether an activation is a positional argument of its module, which is where it can be looked at."""
    return site.slot in _ARGUMENTS or re.fullmatch(_INPUT, site.slot) is not None


def _argument(site: Site) -> int:
    """Which positional argument of its module an activation is."""
    if match := re.fullmatch(_INPUT, site.slot):
        return int(match[1] or 0)
    if not passed_in(site):
        raise SearchError(f"{site} lies inside its module; the harm of such an activation alone is not measured")
    return _ARGUMENTS[site.slot]


def _replacing(place: int, site: Site, function: Callable[[Site, Tensor], Tensor | None]) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if len(args) <= place or not isinstance(args[place], Tensor):
            raise SearchError(f"{site}: {type(module).__name__} got no tensor as positional argument {place}")
        new = function(site, args[place])
        return None if new is None else (*args[:place], new, *args[place + 1 :])

    return hook

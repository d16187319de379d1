"""What a shipped model does with an example: the calls of its layers, each with the key of its row in a latency table.

A key says everything that the time of a call depends on beside the machine: class, sizes and geometry of the module,
batch norm behind it, shapes, types and strides of the arguments, specs, among how many bytes of weights it lives, and
what runs it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from bitwright.costs.choices import module_at
from bitwright.costs.cost import Work, work_of
from bitwright.costs.fingerprint import last_level_cache
from bitwright.costs.runtimes import runtime_of
from bitwright.errors import SearchError
from bitwright.flow.calibrate import calibrate
from bitwright.flow.convert import convert
from bitwright.flow.digest import digest
from bitwright.flow.prepare import prepare
from bitwright.graph.dataflow import call, evaluating, record
from bitwright.lowbit.deferred import settle
from bitwright.lowbit.layer import LowbitLayer
from bitwright.numerics.spec import QuantSpec
from bitwright.plan.plan import DEFAULT_RANGES, Plan
from bitwright.plan.site import Site
from bitwright.plan.target import spelled

Specs = Mapping[str, QuantSpec | None]
_FAST = {"weight": "minmax", "input": "minmax"}  # ranges do not change times


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a module: its arguments."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __str__(self) -> str:
        named = [f"{name}={_described(value)}" for name, value in self.kwargs.items()]
        return ", ".join([*(_described(value) for value in self.args), *named])


@dataclass(frozen=True, slots=True)
class Load:
    """What a call does, by numbers: its kind, multiplications with additions, bytes of weights, elements in and out."""

    kind: str
    macs: int
    stored: int
    moved: int


class Workload:
    """The model as ``plan`` ships it, with ranges from ``example``, and the calls of some of its layers on ``example``.

    ``among`` is the power of two above the bytes of weights that pass between two calls of a layer: those of the whole
    model, but no more than twice the last-level cache, beyond which none of them is found there again.
    """

    def __init__(self, model: nn.Module, plan: Plan, example: Any, paths: Iterable[str]) -> None:
        self.model, self.plan, self.example = model, plan, example
        self.runtime = runtime_of(plan.target)
        quick = replace(plan, steps=(), observers=dict(_FAST), ranges=dict(DEFAULT_RANGES))
        prepared = prepare(model, quick)
        calibrate(prepared, [example])
        self.shipped = convert(prepared, inplace=True)
        bound = min(bytes_read(self.shipped), 2 * last_level_cache())
        self.among = 1 << max(bound - 1, 0).bit_length()
        self.calls = self._calls(dict.fromkeys(paths))

    @torch.no_grad()
    def _calls(self, paths: Iterable[str]) -> dict[str, list[Call]]:
        found: dict[str, list[Call]] = {path: [] for path in paths}
        modules = dict(self.shipped.named_modules())
        for path in found:
            if path not in modules:
                raise SearchError(f"{path} is no module of the shipped model: give its sites a spec in the plan first")

        def note(path: str) -> Any:
            return lambda module, args, kwargs: found[path].append(Call(*settle((args, kwargs))))

        hooks = [modules[path].register_forward_pre_hook(note(path), with_kwargs=True) for path in found]
        try:
            with evaluating(self.shipped):
                call(self.shipped, self.example)
        finally:
            for hook in hooks:
                hook.remove()
        return found

    @property
    def whole(self) -> str:
        """The key of the whole model: digest of what its forward does, of its parameters and of the plan; runtime."""
        nodes = [f"{node.name} {node.shapes}" for node in record(self.model, self.example).nodes]
        sizes = [f"{name} {list(tensor.shape)}" for name, tensor in self.model.state_dict().items()]
        sites = [f"{site} {spelled(spec)}" for site, spec in self.plan.sites.items()]
        folds = [f"{path} {norm}" for path, norm in self.plan.folds.items()]
        return f"whole {type(self.model).__name__} {digest([nodes, sizes, sites, folds])} in {self.runtime}"

    def decided(self, path: str) -> dict[str, QuantSpec | None]:
        """Specs of a layer by slot, as the plan decides."""
        return {site.slot: spec for site, spec in self.plan.sites.items() if site.path == path}

    def key(self, path: str, specs: Specs, made: Call) -> str:
        """The key of one call of the layer at ``path`` with these specs."""
        norm = self._norm(path)
        parts = [_signature(module_at(self.model, path)), "" if norm is None else _signature(norm), str(made)]
        chosen = ", ".join(f"{slot}={spelled(spec)}" for slot, spec in specs.items())
        return " | ".join([*(part for part in parts if part), chosen, f"among {self.among:,} bytes in {self.runtime}"])

    def load(self, path: str, specs: Specs, made: Call) -> Load:
        """What one call of the layer at ``path`` does with these specs."""
        module = module_at(self.model, path)
        work = work_of(module, made, lambda module, made: module(*made.args, **made.kwargs)).get("", Work(0, 0, 0))
        window, parts = getattr(module, "kernel_size", ""), getattr(module, "groups", 1)
        depthwise = "depthwise" if parts > 1 and parts == getattr(module, "in_channels", 0) else ""
        chosen = ", ".join(f"{slot}={spelled(spec)}" for slot, spec in specs.items())
        source = "memory" if self.among > last_level_cache() else "cache"
        kind = " ".join(
            [type(module).__name__, *filter(None, (str(window), depthwise)), chosen, f"from {source} in {self.runtime}"]
        )
        return Load(kind, work.macs, bytes_read(self.alone(path, specs, made)), work.inputs + work.outputs)

    def alone(self, path: str, specs: Specs, made: Call) -> nn.Module:
        """The layer at ``path`` by itself as it ships with these specs, its batch norm included."""
        norm = self._norm(path)
        alone = _Alone(copy.deepcopy(module_at(self.model, path)), copy.deepcopy(norm)).eval()
        sites = {Site("layer", slot): spec for slot, spec in specs.items()}
        if all(spec is None for spec in sites.values()):
            return alone
        folds = {} if norm is None else {"layer": "norm"}
        prepared = prepare(alone, Plan(self.plan.target, sites, dict(_FAST), folds=folds).with_sites({}), inplace=True)
        calibrate(prepared, [made], forward=lambda module, made: module(*made.args, **made.kwargs))
        return convert(prepared, inplace=True)

    def _norm(self, path: str) -> nn.Module | None:
        return self.model.get_submodule(self.plan.folds[path]) if path in self.plan.folds else None


class _Alone(nn.Module):
    """A layer and the batch norm behind it."""

    def __init__(self, layer: nn.Module, norm: nn.Module | None) -> None:
        super().__init__()
        self.layer, self.norm = layer, norm

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = self.layer(*args, **kwargs)
        return out if self.norm is None else self.norm(out)


def bytes_read(module: nn.Module) -> int:
    """Bytes of the constants that a forward reads: a shipped layer's own layout, the tensors of other modules."""
    total = 0
    for part in module.modules():
        if isinstance(part, LowbitLayer):
            own = [tensor for tensor in part.constants if tensor is not None]
        else:
            own = [*part.parameters(recurse=False), *part.buffers(recurse=False)]
        total += sum(tensor.nbytes for tensor in own)
    return total


def _signature(module: nn.Module) -> str:
    """Class, sizes and settings of a module.

    >>> _signature(nn.Linear(4, 2))
    'Linear(in_features=4, out_features=2, weight=[2, 4], bias=[2])'
    """
    settings = {name: value for name, value in vars(module).items() if name != "training" and _plain(value)}
    shapes = {name: list(tensor.shape) for name, tensor in module.named_parameters()}
    texts = [f"{name}={value!r}" for name, value in sorted(settings.items()) if not name.startswith("_")]
    return f"{type(module).__name__}({', '.join([*texts, *(f'{name}={shape}' for name, shape in shapes.items())])})"


def _plain(value: Any) -> bool:
    return isinstance(value, (bool, int, float, str)) or (isinstance(value, tuple) and all(map(_plain, value)))


def _described(value: Any) -> str:
    """An argument: type, shape and strides of tensors, plain values as they are.

    >>> _described([torch.zeros(1, 2), None]), _described(torch.zeros(2, 3).T)
    ('float32[1, 2], None', 'float32[3, 2] strides (1, 3)')
    """
    texts = []
    for leaf in tree_leaves(value):
        if isinstance(leaf, Tensor):
            strides = "" if leaf.is_contiguous() else f" strides {leaf.stride()}"
            texts.append(f"{str(leaf.dtype).removeprefix('torch.')}{list(leaf.shape)}{strides}")
        else:
            texts.append(repr(leaf) if leaf is None or _plain(leaf) else type(leaf).__name__)
    return ", ".join(texts)

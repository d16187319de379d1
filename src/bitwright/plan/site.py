"""`Site`: the address of a tensor that can be quantized, and the listing of all sites of a model.

``layer1.0.conv1.weight`` is the weight of that convolution, ``layer1.0.conv1.input`` the activation it consumes,
``layer1.0.add_0.input.1`` the second operand of a residual add.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from bitwright.errors import ModelError, PlanError
from bitwright.graph.rewrite import Add

# Which operator a module class is; classes match exactly, see `operator_of`.
OPERATORS: dict[type[nn.Module], str] = {
    nn.Linear: "linear",
    nn.Conv1d: "conv",
    nn.Conv2d: "conv",
    nn.Embedding: "embedding",
    Add: "add",
}

SLOTS = {
    "linear": ("weight", "input"),
    "conv": ("weight", "input"),
    "embedding": ("weight",),
    "add": ("input.0", "input.1"),
}

_KNOWN_SLOTS = ("input.0", "input.1", "weight", "input")


@dataclass(frozen=True, slots=True)
class Site:
    """One place where a tensor is quantized: module path and slot.

    >>> Site.parse("layer1.0.add_0.input.1")
    Site(path='layer1.0.add_0', slot='input.1')
    >>> str(Site("fc", "weight"))
    'fc.weight'
    """

    path: str
    slot: str

    def __str__(self) -> str:
        return f"{self.path}.{self.slot}" if self.path else self.slot

    @classmethod
    def parse(cls, text: str) -> Site:
        """Split a site's text at its slot; raises `PlanError` when it ends in none."""
        for slot in _KNOWN_SLOTS:
            if text == slot or text.endswith("." + slot):
                return cls(text.removesuffix(slot).removesuffix("."), slot)
        raise PlanError(f"{text!r} is not a site; a site ends in .weight, .input, .input.0 or .input.1")

    @property
    def is_weight(self) -> bool:
        """Whether the site is a stored tensor rather than an activation."""
        return self.slot == "weight"


def operator_of(module: nn.Module) -> str | None:
    """``linear``, ``conv``, ``embedding``, ``add``, or None for modules that have no quantized form.

    >>> operator_of(nn.Linear(2, 2)), operator_of(nn.ReLU())
    ('linear', None)
    """
    return OPERATORS.get(type(module))


def unknown_subclass(module: nn.Module) -> type[nn.Module] | None:
    """The known class that ``module`` derives from, when its own class is not known itself.

    A subclass may compute something else in its forward, so it is never quantized by guessing.
    """
    if type(module) in OPERATORS:
        return None
    return next((known for known in OPERATORS if isinstance(module, known)), None)


def matching(pattern: str, sites: Iterable[Site]) -> list[Site]:
    """Sites that a glob pattern or an exact name selects; raises `PlanError` with near names when there is none.

    >>> matching("fc.*", [Site("fc", "weight"), Site("fc", "input"), Site("stem", "input")])
    [Site(path='fc', slot='weight'), Site(path='fc', slot='input')]
    """
    sites = list(sites)
    found = [site for site in sites if str(site) == pattern or fnmatchcase(str(site), pattern)]
    if not found:
        near = difflib.get_close_matches(pattern, [str(site) for site in sites], n=3, cutoff=0.3)
        hint = f"near names: {', '.join(near)}" if near else "the model has no such sites"
        raise PlanError(f"{pattern!r} matches none of the {len(sites)} sites; {hint}")
    return found


def check_preparable(model: nn.Module) -> None:
    """Raise `ModelError` for models whose weights cannot be quantized: lazy, on meta, not float32, made by a hook."""
    for name, parameter in model.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise ModelError(f"{name} is a lazy parameter without a shape; run one batch through the model first")
        if parameter.is_meta:
            raise ModelError(f"{name} is on the meta device and holds no numbers; load its weights first")
        if parameter.is_floating_point() and parameter.dtype.itemsize != 4:
            raise ModelError(f"{name} is {parameter.dtype}; codes are defined on float32: call model.float() first")
    for path, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if "weight" in SLOTS.get(operator_of(module) or "", ()) and not isinstance(weight, nn.Parameter):
            raise ModelError(
                f"{path}.weight is computed by a hook (weight_norm, spectral_norm or pruning) and is not a parameter; "
                "make it permanent first, e.g. with torch.nn.utils.prune.remove or remove_weight_norm"
            )

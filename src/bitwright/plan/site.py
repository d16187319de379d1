"""`Site`: the address of a tensor that can be quantized, and the listing of all sites of a model.

``layer1.0.conv1.weight`` is the weight of that convolution, ``layer1.0.conv1.input`` the activation it consumes,
``layer1.0.add_0.input.1`` the second operand of a residual add.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from bitwright.errors import ModelError, PlanError
from bitwright.graph.calls import KINDS, Add, Attention, Cat, MatMul
from bitwright.graph.experts import library_operator
from bitwright.kernels.recurrent import recurrence_of
from bitwright.numerics.spec import QuantSpec

# Which operator a module class is; classes match exactly, see `operator_of`.
OPERATORS: dict[type[nn.Module], str] = {
    nn.Linear: "linear",
    nn.Conv1d: "conv",
    nn.Conv2d: "conv",
    nn.Conv3d: "conv3d",
    nn.ConvTranspose1d: "conv_transpose",
    nn.ConvTranspose2d: "conv_transpose",
    nn.ConvTranspose3d: "conv_transpose",
    nn.Embedding: "embedding",
    nn.EmbeddingBag: "embedding",
    nn.LSTM: "recurrent",
    nn.GRU: "recurrent",
    nn.MultiheadAttention: "multihead",
    NonDynamicallyQuantizableLinear: "linear",
    Add: "add",
    MatMul: "matmul",
    Cat: "cat",
    Attention: "attention",
}


@dataclass(frozen=True, slots=True)
class Product:
    """One operation of a module: the operator that computes it, its stored operand and its activations, as slots.

    The slot of a stored operand is the name of its parameter; None where there is none.
    """

    op: str
    weight: str | None
    inputs: tuple[str, ...]


def _recurrent(module: nn.RNNBase) -> tuple[Product, ...]:
    """Two linear products per layer and direction, of its input and of its hidden state; a third with ``proj_size``."""
    shape = recurrence_of(module)
    pairs = (pair for suffix in shape.suffixes for pair in shape.weights(suffix))
    return tuple(Product("linear", weight, (activation,)) for weight, activation in pairs)


def _multihead(module: nn.MultiheadAttention) -> tuple[Product, ...]:
    """The input projections; the output projection and the products of attention are children."""
    if module._qkv_same_embed_dim:
        return (Product("linear", "in_proj_weight", ("query", "key", "value")),)
    return tuple(Product("linear", f"{side[0]}_proj_weight", (side,)) for side in ("query", "key", "value"))


PRODUCTS: dict[str, Callable[[Any], tuple[Product, ...]]] = {
    "linear": lambda module: (Product("linear", "weight", ("input",)),),
    "in_out_linear": lambda module: (Product("linear", "weight", ("input",)),),
    "conv": lambda module: (Product("conv", "weight", ("input",)),),
    "conv3d": lambda module: (Product("conv3d", "weight", ("input",)),),
    "conv_transpose": lambda module: (Product("conv_transpose", "weight", ("input",)),),
    "embedding": lambda module: (Product("embedding", "weight", ()),),
    "recurrent": _recurrent,
    "multihead": _multihead,
    "experts": lambda module: (
        Product("linear", "gate_up_proj", ("input",)),
        Product("linear", "down_proj", ("hidden",)),
    ),
    "add": lambda module: (Product("add", None, ADD_SLOTS),),
    "matmul": lambda module: (Product("matmul", None, ADD_SLOTS),),
    "cat": lambda module: (Product("cat", None, ("input",)),),
    "attention": lambda module: (
        Product("matmul", None, ("query", "key")),
        Product("matmul", None, ("probs", "value")),
    ),
}
"""What a module of each operator computes; how many products there are may depend on the module."""

CONVOLUTIONS = ("conv", "conv3d", "conv_transpose")
FOLDING = ("linear", *CONVOLUTIONS)
"""Operators whose module can compute the batch norm behind it."""

ADD_SLOTS = ("input.0", "input.1")

_WEIGHT = r"weight(?:_(?:ih|hh|hr)_l\d+(?:_reverse)?)?|in_proj_weight|[qkv]_proj_weight|gate_up_proj|down_proj"
_ACTIVATION = r"input\.\d+|(?:input|hidden|projected)(?:_l\d+(?:_reverse)?)?|query|key|value|probs"
_SITE = re.compile(rf"(?:(?P<path>.*?)\.)?(?P<slot>{_WEIGHT}|{_ACTIVATION})", re.DOTALL)
_CALL = re.compile(rf"(?:(?P<owner>.*)\.)?(?P<kind>{'|'.join(KINDS)})_(?P<ordinal>\d{{1,9}})", re.DOTALL)


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
        match = _SITE.fullmatch(text)
        if match is None:
            raise PlanError(f"{text!r} is not a site; a site ends in a slot such as .weight, .input or .input.0")
        return cls(match["path"] or "", match["slot"])

    @property
    def is_weight(self) -> bool:
        """Whether the site is a stored tensor rather than an activation."""
        return re.fullmatch(_WEIGHT, self.slot) is not None


def call_of(path: str) -> tuple[str, str, int] | None:
    """Owner, kind and ordinal of a functional call that a path names; None for other paths.

    >>> call_of("layers.0.add_1"), call_of("layers.0")
    (('layers.0', 'add', 1), None)
    """
    match = _CALL.fullmatch(path)
    return None if match is None else (match["owner"] or "", match["kind"], int(match["ordinal"]))


def operator_of(module: nn.Module) -> str | None:
    """``linear``, ``conv``, ``embedding``, ``recurrent``, ``add`` ..., or None for modules that have no quantized form.

    >>> operator_of(nn.Linear(2, 2)), operator_of(nn.ReLU())
    ('linear', None)
    """
    return OPERATORS.get(type(module)) or library_operator(module)


def products_of(module: nn.Module) -> tuple[Product, ...]:
    """What a module computes with operands that can be quantized; nothing for modules without a quantized form.

    >>> products_of(nn.Linear(2, 2))
    (Product(op='linear', weight='weight', inputs=('input',)),)
    """
    op = operator_of(module)
    return PRODUCTS[op](module) if op else ()


def slots_of(module: nn.Module) -> tuple[str, ...]:
    """All slots of a module, weights before the activations they meet.

    >>> slots_of(nn.Embedding(2, 2)), slots_of(Add())
    (('weight',), ('input.0', 'input.1'))
    """
    slots = [slot for product in products_of(module) for slot in (product.weight, *product.inputs) if slot]
    return tuple(dict.fromkeys(slots))


def rows_shape(module: nn.Module, slot: str) -> tuple[int, ...]:
    """Shape of a weight as it is encoded, its output channel as axis 0; torch keeps that of a transposed one second.

    >>> rows_shape(nn.ConvTranspose2d(6, 8, 3, groups=2), "weight")
    (8, 3, 3, 3)
    """
    shape = tuple(module.get_parameter(slot).shape)
    if operator_of(module) == "in_out_linear":
        return shape[::-1]
    if operator_of(module) == "experts":
        return (shape[0] * shape[1], shape[2])
    if operator_of(module) != "conv_transpose":
        return shape
    groups: Any = module.groups
    return (shape[1] * groups, shape[0] // groups, *shape[2:])


def parts_of(module: nn.Module, slot: str) -> int:
    """Into how many equal parts, by rows, a weight is cut when it ships.

    >>> parts_of(nn.MultiheadAttention(8, 2), "in_proj_weight"), parts_of(nn.Linear(2, 2), "weight")
    (3, 1)
    """
    if slot == "in_proj_weight":
        return 3
    return module.get_parameter(slot).shape[0] if operator_of(module) == "experts" else 1


def scales_shape(spec: QuantSpec, module: nn.Module, slot: str) -> tuple[int, int]:
    """Shape of the row that the scales of a weight (of one part of it) are stored as.

    >>> scales_shape(QuantSpec.parse("nf4/group64/scale(int8/group16)"), nn.Linear(128, 8), "weight")
    (1, 16)
    """
    count = math.prod(spec.granularity.scale_shape(rows_shape(module, slot)))
    return 1, count // (1 if spec.granularity.kind == "tensor" else parts_of(module, slot))


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
        for product in products_of(module):
            if product.weight is None or isinstance(getattr(module, product.weight, None), nn.Parameter):
                continue
            raise ModelError(
                f"{path}.{product.weight} is computed by a hook (weight_norm, spectral_norm or pruning) and is not a "
                "parameter; make it permanent first, e.g. with torch.nn.utils.prune.remove or remove_weight_norm"
            )

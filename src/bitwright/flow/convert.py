"""`convert`: simulated modules -> shipped modules with packed codes."""

from __future__ import annotations

import copy

from torch import nn

from bitwright.errors import ModelError
from bitwright.flow.prepare import plan_of
from bitwright.flow.ship import SHIPPED
from bitwright.kernels.cpu import cpu_features
from bitwright.lowbit.attention import LowbitOperation
from bitwright.lowbit.elementwise import LowbitAdd
from bitwright.lowbit.layer import LowbitLayer
from bitwright.nn.layer import Simulated
from bitwright.nn.norm import FOLDED
from bitwright.nn.quantizer import Quantizer, Stage
from bitwright.numerics.qtensor import QTensor


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
    return any(isinstance(module, (LowbitLayer, LowbitAdd, LowbitOperation)) for module in model.modules())


def _shipped(module: nn.Module, features: frozenset[str], packed: dict[tuple[int, int], QTensor]) -> nn.Module | None:
    """The module that replaces ``module``, None if it stays."""
    if isinstance(module, tuple(FOLDED.values())):
        return nn.Identity()
    if not isinstance(module, Simulated):
        return None
    for kind, ship in SHIPPED.items():
        if isinstance(module, kind):
            return ship(module, features, packed)
    raise ModelError(f"{type(module).__name__} has no shipped form")


def _replace(model: nn.Module, path: str, new: nn.Module) -> None:
    if path:
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, new)

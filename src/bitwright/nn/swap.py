"""The table that says which simulated class replaces which float class.

Adding a layer: write ``class QThing(QLayer, Thing)`` with a forward, add a row here, its operator in
``plan/site.py``, its low-bit module in ``lowbit/``, and a case in the contract tests.
"""

from __future__ import annotations

from functools import cache

from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from bitwright.errors import ModelError
from bitwright.graph.calls import Add, Attention, Cat, MatMul
from bitwright.nn.attention import QAttention, QMatMul
from bitwright.nn.conv import QConv1d, QConv2d, QConv3d
from bitwright.nn.elementwise import QAdd, QCat
from bitwright.nn.embedding import QEmbedding, QEmbeddingBag
from bitwright.nn.experts import QExperts
from bitwright.nn.library import QInOutLinear
from bitwright.nn.linear import QLinear
from bitwright.nn.multihead import QMultiheadAttention
from bitwright.nn.recurrent import QGRU, QLSTM
from bitwright.nn.transposed import QConvTranspose1d, QConvTranspose2d, QConvTranspose3d
from bitwright.plan.site import OPERATORS, operator_of, unknown_subclass


class QOutProjection(QLinear, NonDynamicallyQuantizableLinear):
    """The output projection of `nn.MultiheadAttention`, a linear layer with a class of its own."""


SWAPS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: QLinear,
    nn.Conv1d: QConv1d,
    nn.Conv2d: QConv2d,
    nn.Conv3d: QConv3d,
    nn.ConvTranspose1d: QConvTranspose1d,
    nn.ConvTranspose2d: QConvTranspose2d,
    nn.ConvTranspose3d: QConvTranspose3d,
    nn.Embedding: QEmbedding,
    nn.EmbeddingBag: QEmbeddingBag,
    nn.LSTM: QLSTM,
    nn.GRU: QGRU,
    nn.MultiheadAttention: QMultiheadAttention,
    NonDynamicallyQuantizableLinear: QOutProjection,
    Add: QAdd,
    MatMul: QMatMul,
    Cat: QCat,
    Attention: QAttention,
}


LIBRARY_SWAPS: dict[str | None, type[nn.Module]] = {"in_out_linear": QInOutLinear, "experts": QExperts}
"""Mixins for classes of model libraries, by operator."""


@cache
def _joined(mixin: type[nn.Module], cls: type[nn.Module]) -> type[nn.Module]:
    return type(f"Q{cls.__name__}", (mixin, cls), {})


def register_module(cls: type[nn.Module]) -> type[nn.Module]:
    """Declare that a subclass of a known layer computes the same function as its base, so it may be quantized.

    Usable as a decorator. Raises `ModelError` when ``cls`` derives from no known layer or is known already.

    >>> @register_module
    ... class NamedLinear(nn.Linear):
    ...     pass
    >>> OPERATORS.pop(NamedLinear), SWAPS.pop(NamedLinear).__name__
    ('linear', 'QNamedLinear')
    """
    base = next((known for known in OPERATORS if issubclass(cls, known)), None)
    if base is None or base is cls or cls in SWAPS:
        raise ModelError(
            f"cannot register {cls.__name__}: {'it is known already' if base else 'no known layer is its base'}"
        )
    OPERATORS[cls] = OPERATORS[base]
    SWAPS[cls] = type(f"Q{cls.__name__}", (SWAPS[base], cls), {})
    return cls


def swapped(module: nn.Module) -> type[nn.Module]:
    """The simulated class for a module; raises `ModelError` for classes without one."""
    if (op := operator_of(module)) in LIBRARY_SWAPS:
        return _joined(LIBRARY_SWAPS[op], type(module))
    if type(module) not in SWAPS:
        known = unknown_subclass(module)
        detail = f"an unknown subclass of nn.{known.__name__}" if known else "which has no quantized form"
        raise ModelError(f"cannot quantize {type(module).__name__}, {detail}; see bitwright.register_module")
    return SWAPS[type(module)]

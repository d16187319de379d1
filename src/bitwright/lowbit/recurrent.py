"""`LowbitLSTM` and `LowbitGRU`: shipped recurrent layers, every weight of which is packed codes.

Each product is a child named after its weight's slot (``weight_ih_l0``), an ordinary `LowbitLinear` with the native
kernel for its specs, or an `nn.Linear` where the plan leaves the weight in float. The loop over time is the one that
`nn.recurrent` simulates with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

from bitwright.kernels import recurrent
from bitwright.kernels.recurrent import Product, Products, Recurrence, State
from bitwright.kernels.row import decoded_input
from bitwright.lowbit.linear import LowbitLinear
from bitwright.numerics.qtensor import dequantize


class LowbitRecurrent(nn.Module):
    """What `LowbitLSTM` and `LowbitGRU` share; ``parts`` holds the products by weight slot."""

    def __init__(self, shape: Recurrence, parts: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.shape = shape
        for slot, part in parts.items():
            self.add_module(slot, part)

    def forward(self, input: Tensor | PackedSequence, hx: Any = None) -> tuple[Tensor | PackedSequence, Tensor | State]:
        """Inputs, states and results of `nn.LSTM` and `nn.GRU`; raises `KernelError` for other shapes."""
        return recurrent.run(self.shape, self._products, input, hx, training=self.training)

    def _products(self, suffix: str, rows: Tensor, sizes: Sequence[int]) -> Products:
        found = [_product(self.get_submodule(slot)) for slot, _ in self.shape.weights(suffix)]
        return Products(*found, *[None] * (3 - len(found)))  # type: ignore[arg-type]

    def extra_repr(self) -> str:
        """Sizes, for ``print(model)``."""
        shape = self.shape
        flags = [name for name in ("batch_first", "bidirectional") if getattr(shape, name)]
        return ", ".join([f"{shape.input_size}, {shape.hidden_size}, num_layers={shape.num_layers}", *flags])


class LowbitLSTM(LowbitRecurrent):
    """Bit for bit what `nn.recurrent.QLSTM` simulates."""


class LowbitGRU(LowbitRecurrent):
    """Bit for bit what `nn.recurrent.QGRU` simulates."""


def _product(part: nn.Module) -> Product:
    """The part as a function; a weight that its kernel would decode at every call is decoded once per sequence.

    Simulation does the same, so float products agree bit for bit over all steps.
    """
    if isinstance(part, LowbitLinear) and part.kernel.name.startswith("linear/decode"):
        return partial(_decoded_product, part, dequantize(part.weight))
    return part


def _decoded_product(part: LowbitLinear, weight: Tensor, x: Tensor) -> Tensor:
    return F.linear(decoded_input(x, part.input), weight, part.bias)

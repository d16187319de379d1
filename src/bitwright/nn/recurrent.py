"""`QLSTM` and `QGRU`: recurrent layers whose products compute with codes.

Every site has one quantizer for all time steps, because the hidden state feeds back; each weight is encoded once per
forward. Gates, nonlinearities and the cell state stay in float32 (see `kernels.recurrent`, which shipped layers run
too). Gradients flow through time by ordinary autograd, through every encode with its straight-through rule.

Biases stay in float and are added to their own product. The grid of the accumulator, on which linear layers hold theirs
for runtimes that add in int32, would be a constraint without use here: the two accumulators of a gate have different
steps, so their sum is formed in float anyway.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bitwright.kernels import recurrent, reference
from bitwright.kernels.recurrent import Product, Products
from bitwright.kernels.reference import Codes, codes_of, largest_code
from bitwright.nn.layer import Simulated, integer_product
from bitwright.nn.quantizer import Quantizer, Stage
from bitwright.numerics.affine import live_qparams
from bitwright.numerics.ste import Learning, codes_with_gradient, simulated


class QRecurrent(Simulated, nn.RNNBase):
    """What `QLSTM` and `QGRU` share: products on codes for `kernels.recurrent`."""

    def forward(self, input: Any, hx: Any = None) -> Any:
        """Inputs, states and results of `nn.LSTM` and `nn.GRU`; raises `KernelError` for other shapes."""
        if all(q.stage is Stage.FLOAT for q in self.children() if isinstance(q, Quantizer)):
            return super().forward(input, hx)
        shape = recurrent.recurrence_of(self)
        seen: list[tuple[Quantizer, list[Tensor]]] = []
        out = recurrent.run(shape, partial(self._products, seen), input, hx, training=self.training)
        for quantizer, steps in seen:  # after the sequence, so that one scale serves all of its steps
            quantizer.observe(torch.cat(steps))
            if quantizer.stage is Stage.SIMULATE:
                quantizer.track(torch.cat(steps))
        return out

    def quantized_weights(self) -> dict[str, Tensor]:
        """The weights that have a quantizer, by slot."""
        slots = [slot for pair in self.pairs() for slot in pair[:1]]
        return {slot: getattr(self, slot) for slot in slots if self.quantizer(slot) is not None}

    def pairs(self) -> list[tuple[str, str]]:
        """Weight and activation slot of every product."""
        shape = recurrent.recurrence_of(self)
        return [pair for suffix in shape.suffixes for pair in shape.weights(suffix)]

    def bias_of(self, slot: str) -> Tensor | None:
        """The bias that the product of a weight adds; projections have none."""
        return getattr(self, slot.replace("weight", "bias"), None)

    def _products(
        self, seen: list[tuple[Quantizer, list[Tensor]]], suffix: str, rows: Tensor, sizes: Sequence[int]
    ) -> Products:
        """The products of one direction of one layer; what quantizers must look at is put into ``seen``."""
        found: list[Product | None] = []
        for weight, activation in recurrent.recurrence_of(self).weights(suffix):
            quantizer = self.quantizer(activation)
            product = self._product(weight, quantizer, len(sizes))
            if quantizer is not None and (quantizer.stage is Stage.OBSERVE or quantizer.rule.tracks):
                taken: list[Tensor] = []
                seen.append((quantizer, taken))
                product = partial(_noting, taken, product)
            found.append(product)
        return Products(*found, *[None] * (3 - len(found)))  # type: ignore[arg-type]

    def _product(self, slot: str, quantize_input: Quantizer | None, steps: int) -> Product:
        """``x -> x @ W.T + b`` with the weight encoded once."""
        weight, bias, quantize_weight = getattr(self, slot), self.bias_of(slot), self.quantizer(slot)
        if quantize_weight is None or quantize_weight.stage is not Stage.SIMULATE:
            return partial(F.linear, weight=weight, bias=bias)
        if quantize_input is None:
            return partial(F.linear, weight=quantize_weight.simulate(weight), bias=bias)
        learning = _learning(quantize_input, steps, weight.shape[1])
        if integer_product(quantize_weight, quantize_input):
            codes, encoded = quantize_weight(weight), _encoder(quantize_input, learning)
            return lambda x: reference.linear(encoded(x), codes, bias)
        values, decoded = quantize_weight.simulate(weight), _simulator(quantize_input, learning)
        return lambda x: F.linear(decoded(x), values, bias)


class QLSTM(QRecurrent, nn.LSTM):
    """`nn.LSTM` on codes: ``W_ih x`` and ``W_hh h`` are products of integers, the rest is float32."""


class QGRU(QRecurrent, nn.GRU):
    """`nn.GRU` on codes: ``W_ih x`` and ``W_hh h`` are products of integers, the rest is float32."""


def _noting(taken: list[Tensor], product: Product, x: Tensor) -> Tensor:
    taken.append(x.detach())
    return product(x)


def _encoder(quantizer: Quantizer, learning: Learning) -> Callable[[Tensor], Codes]:
    """``x -> codes``, with one range for all calls; live ranges are those of each call."""
    qparams, spec = quantizer.qparams, quantizer.spec
    if qparams is None:
        return lambda x: codes_of(x, spec, None)
    limit, scale, offset = largest_code(spec), quantizer.scale, quantizer.offset

    def encoded(x: Tensor) -> Codes:
        return Codes(codes_with_gradient(x, spec, qparams, learning, scale, offset), qparams.scale, limit)

    return encoded


def _simulator(quantizer: Quantizer, learning: Learning) -> Callable[[Tensor], Tensor]:
    """``x -> values of its codes``, for products that are computed in float."""
    qparams, spec, scale, offset = quantizer.qparams, quantizer.spec, quantizer.scale, quantizer.offset
    return lambda x: simulated(x, spec, qparams or live_qparams(x, spec), learning, scale, offset)


def _learning(quantizer: Quantizer, steps: int, features: int) -> Learning:
    """How a static range learns that serves all elements of a sequence.

    Were every step a sample of its own, the gradient of the scale, a sum over steps, would be too large by the root of
    their number (LSQ, Esser 2020, section 2.2).
    """
    return quantizer.learning(torch.empty(1, steps * features, device="meta"))

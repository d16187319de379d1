"""Weights that flip between two neighbouring codes: counted, dampened, and frozen in the last phase.

Nagel 2022 ("Overcoming oscillations in quantization-aware training"): a weight oscillates when its code changes in the
direction opposite to its last change (eq. 9); the frequency is an exponential average of these events (eq. 10); a
weight above the threshold is frozen at the rounded average of its codes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bitwright.errors import TrainingError
from bitwright.nn.layer import QLayer, Simulated
from bitwright.nn.norm import factor_of
from bitwright.nn.quantizer import Quantizer
from bitwright.numerics.affine import decode, encode
from bitwright.numerics.spec import QParams
from bitwright.train.groups import quantized_weights


@dataclass(frozen=True, slots=True)
class Oscillation:
    """Freeze weights whose codes flip back more often than ``threshold`` per step; ``momentum`` of the average.

    Costs one encoding of all weights per step, and 12 bytes of memory per weight.
    """

    threshold: float = 0.02
    momentum: float = 0.01

    def __post_init__(self) -> None:
        if not 0 < self.threshold < 1 or not 0 < self.momentum <= 1:
            raise TrainingError(
                f"expected 0 < threshold < 1 and 0 < momentum <= 1, got {self.threshold} and {self.momentum}"
            )


class OscillationTracker:
    """What is known about the flips of every integer weight, in tensors of its shape.

    ``codes`` of the last step, ``direction`` of their last change (-1, 0, 1), ``frequency`` of flips, ``average`` of
    the codes (where ``frozen``: the code that stays).
    """

    def __init__(self, rule: Oscillation) -> None:
        self.rule = rule
        self.weights: dict[str, dict[str, Tensor]] = {}

    @torch.no_grad()
    def step(self, model: nn.Module, *, freeze: bool) -> None:
        """Take in the codes after an optimizer step; with ``freeze``, hold what oscillates."""
        for name, layer, slot, weight, quantizer, qparams in _integer_weights(model):
            codes = encode(weight, quantizer.spec, qparams)
            seen = self.weights.setdefault(name, _start(codes))
            _count(seen, codes, self.rule.momentum)
            if freeze:
                new = (seen["frequency"] > self.rule.threshold) & ~seen["frozen"]
                seen["average"] = torch.where(new, seen["average"].round(), seen["average"])
                seen["frozen"] |= new
                if seen["frozen"].any():
                    _hold(layer, slot, seen, quantizer, qparams)

    @property
    def frozen(self) -> int:
        """How many weights are frozen."""
        return sum(int(seen["frozen"].sum()) for seen in self.weights.values())


def dampening(model: nn.Module) -> Tensor:
    """A loss that draws weights to the middle of their codes: ``sum |Q(w) - clip(w)|^2`` (Nagel 2022, eq. 6).

    Gradients reach the weights only. Add it to the task loss with a factor that grows from 0, about 1e-4 to 1e-2.
    """
    total = torch.zeros(())
    for _, _, _, weight, quantizer, qparams in _integer_weights(model):
        value = decode(encode(weight.detach(), quantizer.spec, qparams), quantizer.spec, qparams)
        fmt, ends = quantizer.spec.format, torch.ones_like(weight, dtype=torch.float32)
        low, high = (decode(ends * code, quantizer.spec, qparams) for code in (fmt.qmin, fmt.qmax))
        total = total.to(weight.device) + (value - weight.clamp(low, high)).square().sum()
    return total


def _integer_weights(model: nn.Module) -> Iterator[tuple[str, Simulated, str, Tensor, Quantizer, QParams]]:
    for path, layer, slot, weight, quantizer in quantized_weights(model):
        qparams = quantizer.qparams
        fmt = quantizer.spec.format
        if fmt.is_integer and fmt.bits <= 8 and qparams is not None:  # neighbours of 16 bits are all but equal
            yield f"{path}.{slot}", layer, slot, weight, quantizer, qparams


def _start(codes: Tensor) -> dict[str, Tensor]:
    return {
        "codes": codes.to(torch.int16),
        "direction": torch.zeros_like(codes, dtype=torch.int8),
        "frequency": torch.zeros_like(codes),
        "average": codes.clone(),
        "frozen": torch.zeros_like(codes, dtype=torch.bool),
    }


def _count(seen: dict[str, Tensor], codes: Tensor, momentum: float) -> None:
    change = (codes - seen["codes"]).sign().to(torch.int8)
    flipped = change * seen["direction"] < 0
    seen["frequency"].lerp_(flipped.float(), momentum)
    seen["average"] = torch.where(seen["frozen"], seen["average"], seen["average"].lerp(codes, momentum))
    seen["direction"] = torch.where(change != 0, change, seen["direction"])
    seen["codes"] = codes.to(torch.int16)


def _hold(layer: Simulated, slot: str, seen: dict[str, Tensor], quantizer: Quantizer, qparams: QParams) -> None:
    """Put frozen weights in the middle of their codes, whatever the optimizer, or a folded batch norm, did to them."""
    parameter, middle = layer.get_parameter(slot), decode(seen["average"], quantizer.spec, qparams)
    frozen, rows = seen["frozen"], layer.as_rows(parameter)
    if isinstance(layer, QLayer) and layer.norm:
        factor = factor_of(layer.norm[0]).float().view(-1, *[1] * (parameter.dim() - 1))
        frozen, middle = frozen & (factor.abs() > 1e-12), middle / factor
    parameter.copy_(layer.from_rows(torch.where(frozen, middle, rows)))

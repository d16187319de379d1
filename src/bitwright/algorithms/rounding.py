"""What takes a quantizer's place while a layer or block is reconstructed: weights and inputs that are not yet integers.

`SoftWeight` is AdaRound's weight, between its two neighbours on the grid; `FreeWeight` is AdaQuant's, which moves
anywhere and is rounded in every forward; `DroppedInput` passes a random part of an input on in float (QDrop). Each
calls its values floats (`FLOATS`), so a layer that holds one decodes instead of multiplying integers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bitwright.kernels import training
from bitwright.kernels.reference import Codes
from bitwright.nn.quantizer import Quantizer, Stage
from bitwright.numerics.formats import Format
from bitwright.numerics.spec import QParams, QuantSpec
from bitwright.numerics.ste import Learning, simulated

LOW, HIGH = -0.1, 1.1
"""The ends that the sigmoid is stretched to before it is clipped (gamma and zeta; Louizos 2018, AdaRound eq. 23)."""

FLOATS = QuantSpec(Format("float32", 32, 0, 0, dtype=torch.float32))
"""The spec of values that lie on no grid."""


def share_above(variable: Tensor) -> Tensor:
    """``h(V) = clamp(sigmoid(V) (zeta - gamma) + gamma, 0, 1)``: how far a weight lies above its lower neighbour.

    >>> share_above(torch.tensor([-5.0, 0.0, 5.0])).tolist()
    [0.0, 0.5, 1.0]
    """
    return (torch.sigmoid(variable) * (HIGH - LOW) + LOW).clamp(0.0, 1.0)


def variable_at(share: Tensor) -> Tensor:
    """The variable whose `share_above` is ``share``, in [0, 1]; finite at both ends.

    >>> share_above(variable_at(torch.tensor([0.0, 0.25, 1.0]))).tolist()
    [0.0, 0.25, 1.0]
    """
    return -torch.log((HIGH - LOW) / (share - LOW) - 1.0)


def sharpness(progress: float, warmup: float = 0.2, ends: tuple[float, float] = (20.0, 2.0)) -> float:
    """The regulariser's beta at ``progress`` in [0, 1], linear after the warm start; 0.0 (off) during it.

    >>> sharpness(0.1), sharpness(0.2), sharpness(1.0)
    (0.0, 20.0, 2.0)
    """
    if progress < warmup:
        return 0.0
    return ends[0] + (ends[1] - ends[0]) * (progress - warmup) / (1.0 - warmup)


class SoftWeight(nn.Module):
    """A weight ``s (clamp(floor(W / s) + z + h(V), qmin, qmax) - z)`` (AdaRound, Nagel 2020, eq. 22), V trained.

    Starts as the float weight (clipped to the range of its scale), ends as one of its two neighbours: `hard`.
    """

    spec, stage = FLOATS, Stage.SIMULATE

    def __init__(self, weight: Tensor, quantizer: Quantizer) -> None:
        super().__init__()
        qparams, fmt = quantizer.qparams, quantizer.spec.format
        assert qparams is not None
        self.scale = _like_weight(qparams.scale, quantizer.spec, weight)
        zero = (
            torch.zeros(1) if qparams.zero_point is None else _like_weight(qparams.zero_point, quantizer.spec, weight)
        )
        self.lowest, self.highest = fmt.qmin - zero, fmt.qmax - zero
        steps = weight.detach().float() / self.scale
        self.floor = steps.floor()
        self.variable = nn.Parameter(variable_at(steps - self.floor))

    def _values(self, above: Tensor) -> Tensor:
        return (self.floor + above).clamp(self.lowest, self.highest) * self.scale

    def simulate(self, weight: Tensor) -> Tensor:
        """Its values now; ``weight``, the module's own, is not looked at."""
        return self._values(share_above(self.variable))

    @torch.no_grad()
    def hard(self) -> Tensor:
        """The neighbour that it is nearer to: what is stored in the end."""
        return self._values((self.variable >= 0).float())

    def penalty(self, beta: float) -> Tensor:
        """``sum(1 - |2 h(V) - 1|**beta)``: 0 where every weight has decided (AdaRound eq. 24)."""
        return (1.0 - (2.0 * share_above(self.variable) - 1.0).abs().pow(beta)).sum()

    @torch.no_grad()
    def undecided(self) -> float:
        """The share of weights that lie clearly between their neighbours: h in (0.05, 0.95)."""
        above = share_above(self.variable)
        return ((above > 0.05) & (above < 0.95)).float().mean().item()


class FreeWeight(nn.Module):
    """A weight that moves anywhere, rounded in every forward, with its scale (AdaQuant, Hubara 2020, eq. 3)."""

    spec, stage = FLOATS, Stage.SIMULATE

    def __init__(self, weight: Tensor, quantizer: Quantizer) -> None:
        super().__init__()
        qparams = quantizer.qparams
        assert qparams is not None
        self.codes_spec, self.zero_point = quantizer.spec, qparams.zero_point
        self.weight = nn.Parameter(weight.detach().clone())
        self.scale = nn.Parameter(qparams.scale.clone(), requires_grad=quantizer.spec.scale is None)

    @property
    def qparams(self) -> QParams:
        """Its scale as learned so far, and its zero point."""
        return QParams(self.scale.detach().clamp(min=torch.finfo(torch.float32).eps), self.zero_point)

    def simulate(self, weight: Tensor) -> Tensor:
        """Its values now; ``weight``, the module's own, is not looked at."""
        learning = Learning("lsq") if self.scale.requires_grad else Learning()
        return simulated(self.weight, self.codes_spec, self.qparams, learning, self.scale, None)

    @torch.no_grad()
    def hard(self) -> Tensor:
        """What is stored in the end: its values now."""
        return self.simulate(self.weight)


class Drop:
    """Masks that choose a random share of the elements of tensors, cut out of one random string at random places.

    Drawing every mask anew would take longer than the convolution that it is for.
    """

    def __init__(self, share: float, seed: int) -> None:
        self.share, self.generator = share, torch.Generator().manual_seed(seed)
        self._string = torch.zeros(0)

    def mixed(self, values: Tensor, other: Tensor) -> Tensor:
        """``values``, dense in memory, with the chosen elements taken from ``other``."""
        if self.share <= 0.0:
            return values
        length = values.numel() + _PLACES
        if len(self._string) < length:
            string = torch.rand(length, generator=self.generator) < self.share
            self._string = string.to(values.device, values.dtype)
        place = int(torch.randint(_PLACES, (1,), generator=self.generator))
        mask = self._string.as_strided(values.shape, values.stride(), place)
        return torch.lerp(values, other, mask)


_PLACES = 1 << 16


class DroppedInput(nn.Module):
    """An input of which a random share of the elements stays float (QDrop, Wei 2022, eq. 10)."""

    spec, stage = FLOATS, Stage.SIMULATE

    def __init__(self, quantizer: Quantizer, drop: Drop) -> None:
        super().__init__()
        self.quantizer, self.drop = quantizer, drop

    def simulate(self, x: Tensor) -> Tensor:
        """The values of ``x``, some of them not rounded."""
        quantizer = self.quantizer
        fast = training.serves_values(x, quantizer.spec)
        values = training.values(x, quantizer.operand(x)) if fast else quantizer.simulate(x)
        return self.drop.mixed(values, x)

    def forward(self, x: Tensor) -> Codes:
        """The same, for operations that multiply codes by their scale."""
        return Codes(self.simulate(x), torch.ones(1), 1)


def _like_weight(per_scale: Tensor, spec: QuantSpec, weight: Tensor) -> Tensor:
    """One entry per scale, shaped to broadcast against the weight."""
    return per_scale.repeat_interleave(spec.granularity.size, -1) if spec.granularity.kind == "group" else per_scale

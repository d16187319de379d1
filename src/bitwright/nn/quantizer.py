"""`Quantizer`: the only state that a prepared model gains.

One quantizer serves one site (or several that consume the same tensor). It walks through three stages: FLOAT (after
``prepare``), OBSERVE (during ``calibrate``) and SIMULATE (afterwards, in training and evaluation).
"""

from __future__ import annotations

import enum
import math

import torch
from torch import Tensor, nn

from bitwright.errors import CalibrationError
from bitwright.kernels.reference import Codes, codes_of
from bitwright.numerics.affine import EPS, simulate
from bitwright.numerics.spec import QParams, QuantSpec
from bitwright.observe.fit import weight_qparams
from bitwright.observe.observer import Observer, make_observer


class Stage(enum.Enum):
    """What a quantizer does with the tensors that pass."""

    FLOAT = "float"
    OBSERVE = "observe"
    SIMULATE = "simulate"


class Quantizer(nn.Module):
    """Turns a tensor into codes by its spec, with a scale that was calibrated or is being learned.

    ``scale`` is a parameter (float32, at least one dimension; trained only while its ``requires_grad`` is set), with
    the shape of the spec's granularity; ``zero_point`` a buffer of the same shape or None. Dynamic specs have
    neither.
    """

    def __init__(self, site: str, spec: QuantSpec, shape: tuple[int, ...] | None, observer: str) -> None:
        super().__init__()
        self.site, self.spec, self.observer_name = site, spec, observer
        self.is_weight = shape is not None
        self.stage = Stage.FLOAT
        self.observer: Observer | None = None
        self.scale: nn.Parameter | None
        self.zero_point: Tensor | None
        if spec.dynamic:
            self.register_parameter("scale", None)
            self.register_buffer("zero_point", None)
            return
        scale_shape = (1,) if shape is None else spec.granularity.scale_shape(shape)
        self.scale = nn.Parameter(torch.ones(scale_shape), requires_grad=False)
        self.register_buffer("zero_point", None if spec.symmetric else torch.zeros(scale_shape))

    def extra_repr(self) -> str:
        """Site, spec and stage, for ``print(model)``."""
        return f"{self.site}: {self.spec}, {self.stage.value}"

    @property
    def qparams(self) -> QParams | None:
        """Scale (never below float32 epsilon) and zero point; None for dynamic specs."""
        if self.scale is None:
            return None
        return QParams(self.scale.clamp(min=EPS), self.zero_point)

    def observe(self, x: Tensor) -> None:
        """In stage OBSERVE, take in one activation; raises `CalibrationError` when it is not finite."""
        if self.stage is not Stage.OBSERVE or self.spec.dynamic:
            return
        if not torch.isfinite(x).all():
            bad = int((~torch.isfinite(x)).sum())
            raise CalibrationError(
                f"{self.site}: {bad} of {x.numel()} calibration values are NaN or infinite; "
                "clean the calibration data, or find the layer before it that overflows"
            )
        self.observer = self.observer or make_observer(self.observer_name)
        self.observer.update(x)

    def finish(self) -> None:
        """Take the scale from what was observed, on all ranks alike, and start to simulate."""
        if not self.spec.dynamic:
            observer = self.observer or make_observer(self.observer_name)  # a rank without data takes part all the same
            observer.reduce()
            try:
                self.set_qparams(observer.qparams(self.spec))
            except CalibrationError as cause:
                raise CalibrationError(f"{self.site}: {cause}") from cause
            self.observer = None
        self.stage = Stage.SIMULATE

    def fit(self, weight: Tensor) -> None:
        """Take the scale from a weight, and start to simulate."""
        self.set_qparams(weight_qparams(weight, self.spec, self.observer_name))
        self.stage = Stage.SIMULATE

    def set_qparams(self, qparams: QParams) -> None:
        """Store a scale and zero point, in place."""
        assert self.scale is not None
        with torch.no_grad():
            self.scale.copy_(qparams.scale)
            if self.zero_point is not None and qparams.zero_point is not None:
                self.zero_point.copy_(qparams.zero_point)

    def forward(self, x: Tensor) -> Codes:
        """Codes of ``x`` with straight-through gradients; the gradient of a learned scale is LSQ's."""
        return codes_of(x, self.spec, self.training_qparams(x))

    def simulate(self, x: Tensor) -> Tensor:
        """Values of the codes of ``x``, for products that are computed in float."""
        qparams = self.training_qparams(x)
        if qparams is None:
            codes = codes_of(x, self.spec, None)
            return codes.values * codes.scale
        return simulate(x, self.spec, qparams)

    def training_qparams(self, x: Tensor) -> QParams | None:
        """`qparams`, with a learned scale's gradient multiplied by ``1 / sqrt(N * qmax)`` (LSQ, section 2.2).

        N counts the elements that one scale serves: of a weight per channel or group, of an activation per sample.
        """
        qparams = self.qparams
        if qparams is None or not qparams.scale.requires_grad:
            return qparams
        parts = qparams.scale.numel() if self.is_weight else len(x)
        gain = 1.0 / math.sqrt(x.numel() / parts * max(self.spec.format.qmax, 1))
        frozen = qparams.scale.detach()
        return QParams(frozen + (qparams.scale - frozen) * gain, qparams.zero_point)

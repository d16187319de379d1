"""`Quantizer`: the only state that a prepared model gains.

One quantizer serves one site (or several that consume the same tensor). It walks through three stages: FLOAT (after
``prepare``), OBSERVE (during ``calibrate``) and SIMULATE (afterwards, in training and evaluation).
"""

from __future__ import annotations

import enum
import math
from dataclasses import replace

import torch
from torch import Tensor, nn

from bitwright.errors import CalibrationError, SpecError
from bitwright.kernels.reference import Codes, codes_of, largest_code
from bitwright.kernels.training import Operand
from bitwright.nn.ranges import RangeRule, get_rule
from bitwright.nn.tracker import Tracker, range_ends
from bitwright.numerics.affine import EPS, choose_qparams, live_qparams
from bitwright.numerics.formats import Format
from bitwright.numerics.qtensor import snap_scale
from bitwright.numerics.spec import QParams, QuantSpec
from bitwright.numerics.ste import Learning, codes_with_gradient, simulated
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
    the shape of the spec's granularity; ``zero_point`` a buffer of the same shape or None, ``codebook`` one with the
    table of a format with a fitted one (`fit` finds it, training leaves it). Where the rule learns an
    offset (LSQ+), ``offset`` is a parameter and the zero point follows from it in every forward. Dynamic specs have
    none of these. ``rule`` says how the range moves in training; ``tracker`` follows the data for rules that do, unless
    ``freeze_range`` is set. A range that only the data moves is no parameter: its ``scale`` is a buffer.
    ``consumers`` counts the layers that read the tensor through this quantizer.
    """

    tracker: Tracker | None

    def __init__(
        self, site: str, spec: QuantSpec, shape: tuple[int, ...] | None, observer: str, rule: str = "lsq"
    ) -> None:
        super().__init__()
        self.site, self.spec, self.observer_name = site, spec, observer
        self.rule: RangeRule = get_rule(rule)
        self.is_weight = shape is not None
        self.stage = Stage.FLOAT
        self.observer: Observer | None = None
        self.consumers, self.freeze_range = 1, False
        self.tracker = None
        self.scale: nn.Parameter | None
        self.offset: nn.Parameter | None
        self.zero_point: Tensor | None
        self.codebook: Tensor | None
        self.register_parameter("offset", None)
        self.register_buffer("zero_point", None)
        self.register_buffer("codebook", None)
        if spec.dynamic:
            self.register_parameter("scale", None)
        else:
            scale_shape = (1,) if shape is None else spec.granularity.scale_shape(shape)
            if self.rule.tracker is not None and not self.is_weight:
                self.tracker = self.rule.tracker()
            if self.tracker is not None and not self.rule.learns:  # sharding would lose what a forward writes to it
                self.register_buffer("scale", torch.ones(scale_shape))
            else:
                self.scale = nn.Parameter(torch.ones(scale_shape), requires_grad=False)
            if spec.format.fit:
                rows = scale_shape[:1] if spec.granularity.kind == "channel" else ()
                self.codebook = torch.zeros(*rows, spec.format.qmax + 1)
            if not spec.symmetric:
                self.zero_point = torch.zeros(scale_shape)
                if self.rule.learns_offset:
                    self.offset = nn.Parameter(torch.zeros(scale_shape), requires_grad=False)

    def extra_repr(self) -> str:
        """Site, spec and stage, for ``print(model)``."""
        return f"{self.site}: {self.spec}, {self.stage.value}"

    @property
    def qparams(self) -> QParams | None:
        """Scale, rounded to how it is stored, zero point and table, constants for autograd; None for dynamic specs."""
        raw = self.raw_qparams
        if raw is None or self.spec.scale is None:
            return raw
        return replace(raw, scale=snap_scale(raw.scale, self.spec))

    @property
    def raw_qparams(self) -> QParams | None:
        """`qparams` with the float scale (never below float32 epsilon) that quantized scales are rounded from."""
        if self.scale is None:
            return None
        scale, zero_point = self.scale.detach().clamp(min=EPS), self.zero_point
        if self.tracker is not None and zero_point is not None:
            zero_point = zero_point.clone()  # the next forward overwrites it, maybe before the backward of this one
        if self.offset is not None:
            fmt = self.spec.format
            zero_point = (-self.offset.detach() / scale).round().clamp(fmt.qmin, fmt.qmax)
        return QParams(scale, zero_point, self.codebook)

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

    def fall_back_to_dynamic(self) -> None:
        """Take the range from each live tensor instead: for an activation that calibration never saw."""
        self.spec = replace(self.spec, dynamic=True)
        self.scale, self.offset, self.zero_point, self.tracker = None, None, None, None

    def set_qparams(self, qparams: QParams) -> None:
        """Store a scale and zero point, in place; tracking begins anew from this range."""
        self.move_to(qparams)
        if self.tracker is not None:
            self.tracker.start(range_ends(qparams, self.spec))

    def move_to(self, qparams: QParams) -> None:
        """Store a scale, zero point and table, in place."""
        assert self.scale is not None
        with torch.no_grad():
            self.scale.copy_(qparams.scale)
            if self.codebook is not None and qparams.codebook is not None:
                self.codebook.copy_(qparams.codebook)
            if self.zero_point is not None and qparams.zero_point is not None:
                self.zero_point.copy_(qparams.zero_point)
                if self.offset is not None:
                    self.offset.copy_(-qparams.zero_point * qparams.scale)

    def set_format(self, fmt: Format) -> None:
        """Change the number of bits; the represented range stays: ``s_new = s_old * levels_old / levels_new``.

        Levels are qmax for symmetric and qmax - qmin for asymmetric formats. Raises `SpecError` for a format or spec
        that is not an integer one.
        """
        old, params = self.spec.format, self.raw_qparams
        if not (old.is_integer and fmt.is_integer):
            raise SpecError(f"{self.site}: bits change between integer formats only, not from {old} to {fmt}")
        self.spec = replace(self.spec, format=fmt)
        if params is None or old == fmt:
            return
        if params.zero_point is None:
            self.set_qparams(QParams(params.scale * (old.qmax / fmt.qmax)))
            return
        scale = params.scale * ((old.qmax - old.qmin) / (fmt.qmax - fmt.qmin))
        low = (old.qmin - params.zero_point) * params.scale
        self.set_qparams(QParams(scale, (fmt.qmin - (low / scale).round()).clamp(fmt.qmin, fmt.qmax)))

    def learning(self, x: Tensor) -> Learning:
        """The gradient rule of the range and its gain for ``x``; rule ``none`` while the scale is frozen.

        LSQ multiplies the gradient by ``1 / sqrt(N * qmax)`` (section 2.2), where N counts the elements that one scale
        serves: of a weight per channel or group, of an activation per sample.
        """
        if self.scale is None or not self.scale.requires_grad or not self.spec.format.is_integer:
            return Learning()
        qmax = max(self.spec.format.qmax, 1)
        if self.rule.gradient == "pact":  # d alpha = qmax d s: this gain gives the step that plain SGD on alpha takes
            return Learning("pact", 1.0 / qmax**2)
        parts = self.scale.numel() if self.is_weight else len(x)
        return Learning(self.rule.gradient, 1.0 / math.sqrt(max(x.numel() / parts, 1.0) * qmax))

    def forward(self, x: Tensor) -> Codes:
        """Codes of ``x`` with straight-through gradients; a learned range has the gradient of its rule."""
        self.track(x)
        qparams = self.qparams
        if qparams is None:
            return codes_of(x, self.spec, None)
        values = codes_with_gradient(x, self.spec, qparams, self.learning(x), self.scale, self.offset)
        return Codes(values, qparams.scale, largest_code(self.spec))

    @property
    def product_spec(self) -> QuantSpec:
        """The spec whose codes integer kernels multiply: its own, or that of the values of a table of whole numbers."""
        fmt = self.spec.format
        return replace(self.spec, format=fmt.integer) if fmt.is_table and fmt.integer is not None else self.spec

    def operand(self, x: Tensor) -> Operand:
        """How ``x`` enters a product of integers, for the training kernels; of a table, how its values do."""
        self.track(x)
        qparams = self.qparams or live_qparams(x, self.spec)
        learning = self.learning(x)
        learned = (None, None) if learning.rule == "none" else (self.scale, self.offset)
        return Operand(self.product_spec, qparams, learning, *learned)

    def simulate(self, x: Tensor) -> Tensor:
        """Values of the codes of ``x``, for products that are computed in float."""
        self.track(x)
        qparams = self.qparams or live_qparams(x, self.spec)
        return simulated(x, self.spec, qparams, self.learning(x), self.scale, self.offset)

    @torch.no_grad()
    def track(self, x: Tensor) -> None:
        """Let a rule that follows the data take note of a batch: in training mode only, and not while frozen."""
        tracker = self.tracker
        if tracker is None or not self.training or self.freeze_range:
            return
        tracker.update(x.detach(), self.consumers)
        if tracker.publishes:
            self.move_to(choose_qparams(tracker.ends[:1], tracker.ends[1:], self.spec))

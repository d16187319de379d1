"""The quantizer: three stages, one scale per share, nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bitwright.errors import CalibrationError
from bitwright.nn.quantizer import Quantizer, Stage
from bitwright.numerics.affine import EPS, decode, encode
from bitwright.numerics.spec import QuantSpec


def make(spec: str, shape: tuple[int, ...] | None = None, observer: str = "minmax") -> Quantizer:
    return Quantizer("fc.input", QuantSpec.parse(spec), shape, observer)


@pytest.mark.parametrize(
    ("spec", "shape", "scale"),
    [
        ("uint8/asym", None, (1,)),
        ("int8", (6, 4), (1,)),
        ("int4/channel", (6, 4), (6, 1)),
        ("int4/channel", (6, 4, 3, 3), (6, 1, 1, 1)),
        ("uint4/group2/asym", (6, 4), (6, 2)),
    ],
)
def test_scales_are_float32_parameters_with_dimensions_that_wait(
    spec: str, shape: tuple[int, ...], scale: object
) -> None:
    quantizer = make(spec, shape)
    assert isinstance(quantizer.scale, nn.Parameter)
    assert quantizer.scale.shape == scale
    assert quantizer.scale.dtype is torch.float32
    assert not quantizer.scale.requires_grad
    assert (quantizer.zero_point is None) == ("asym" not in spec)
    assert "zero_point" not in dict(quantizer.named_parameters())


def test_a_dynamic_quantizer_holds_no_numbers() -> None:
    quantizer = make("int8/token/dynamic")
    assert quantizer.state_dict() == {}
    assert quantizer.qparams is None
    quantizer.stage = Stage.OBSERVE
    quantizer.observe(torch.tensor([torch.nan]))  # nothing is calibrated, so nothing is checked
    assert quantizer.observer is None


def test_it_observes_in_one_stage_only() -> None:
    quantizer = make("uint8/asym")
    for stage in (Stage.FLOAT, Stage.SIMULATE):
        quantizer.stage = stage
        quantizer.observe(torch.tensor([-1.0, 2.0]))
        assert quantizer.observer is None
    quantizer.stage = Stage.OBSERVE
    quantizer.observe(torch.tensor([-1.0, 0.5]))
    quantizer.observe(torch.tensor([0.0, 1.55]))
    quantizer.finish()
    assert quantizer.stage is Stage.SIMULATE
    assert quantizer.observer is None
    assert quantizer.scale.item() == pytest.approx(2.55 / 255)
    assert quantizer.zero_point.item() == 100


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_values_that_are_not_finite_are_counted_and_named(bad: float) -> None:
    quantizer = make("uint8/asym")
    quantizer.stage = Stage.OBSERVE
    with pytest.raises(CalibrationError, match=r"fc\.input: 2 of 4 calibration values are NaN or infinite; clean"):
        quantizer.observe(torch.tensor([1.0, bad, bad, 0.0]))


def test_codes_and_values_follow_the_one_definition() -> None:
    weight = torch.randn(5, 8)
    for spec in ("int4/channel", "ternary/channel", "int8", "uint4/group4/asym", "nf4/channel", "fp16"):
        quantizer = make(spec, (5, 8), "mse")
        quantizer.fit(weight)
        assert quantizer.stage is Stage.SIMULATE
        codes = encode(weight, quantizer.spec, quantizer.qparams)
        assert torch.equal(quantizer.simulate(weight), decode(codes, quantizer.spec, quantizer.qparams))
        if quantizer.spec.format.is_integer and "group" not in spec:
            values, scale, limit = quantizer(weight)
            assert torch.equal(values, codes)
            assert torch.equal(scale, quantizer.scale)
            assert values.abs().max() <= limit


def test_a_scale_that_training_drove_to_zero_or_below_stays_usable() -> None:
    quantizer = make("int8")
    quantizer.stage = Stage.SIMULATE
    for scale in (0.0, -1.0):
        quantizer.scale.data.fill_(scale)
        assert quantizer.qparams.scale.item() == EPS
        assert quantizer(torch.tensor([0.0, 1.0, -1.0])).values.tolist() == [0, 127, -128]


def test_learning_a_scale_does_not_change_a_value() -> None:
    x = torch.cat([torch.randn(1, 500) * 3, torch.arange(-60, 60).view(1, -1) * 0.025], 1)
    for spec in ("uint4/asym", "int4", "int8/asym"):
        quantizer = make(spec)
        quantizer.stage = Stage.OBSERVE
        quantizer.observe(x / 2)
        quantizer.finish()
        quantizer.scale.data.fill_(0.05)
        fixed = quantizer(x)
        quantizer.scale.requires_grad_(True)
        learned = quantizer(x)
        assert torch.equal(learned.values, fixed.values)
        assert torch.equal(learned.scale, fixed.scale)
        assert learned.values.requires_grad
        assert not learned.scale.requires_grad  # the codes carry the whole gradient


def test_a_quantizer_says_what_it_is() -> None:
    assert repr(make("uint8/asym")) == "Quantizer(fc.input: uint8/asym, float)"

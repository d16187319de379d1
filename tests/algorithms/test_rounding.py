"""The stand-ins for quantizers: what they compute at the start, at the end, and the gradients between."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bitwright.algorithms.rounding import (
    Drop,
    DroppedInput,
    FreeWeight,
    SoftWeight,
    share_above,
    sharpness,
    variable_at,
)
from bitwright.kernels import training
from bitwright.nn.quantizer import Quantizer
from bitwright.numerics.affine import encode
from bitwright.numerics.spec import QParams, QuantSpec
from nets import one_thread  # noqa: F401


def quantizer_of(weight: torch.Tensor, spec: str, observer: str = "minmax") -> Quantizer:
    quantizer = Quantizer("w.weight", QuantSpec.parse(spec), tuple(weight.shape), observer)
    quantizer.fit(weight)
    return quantizer


def test_published_values_of_the_stretched_sigmoid() -> None:
    assert variable_at(torch.tensor(0.0)).item() == pytest.approx(-2.3979, abs=1e-4)
    share = torch.rand(1000, dtype=torch.float64)
    assert (share_above(variable_at(share)) - share).abs().max() < 1e-15


@pytest.mark.parametrize(
    "spec", ["int4/channel", "int3", "uint4/channel/asym", "int4/group8", "uint2/group8/asym", "ternary"]
)
def test_a_soft_weight_starts_as_the_float_weight_and_ends_on_a_neighbour(spec: str) -> None:
    torch.manual_seed(0)
    weight = torch.randn(6, 16)
    quantizer = quantizer_of(weight, spec)
    soft = SoftWeight(weight, quantizer)
    qparams = quantizer.qparams
    assert qparams is not None
    inside = weight.clamp(soft.lowest * soft.scale, soft.highest * soft.scale)  # a rounded zero point moves the range
    assert (soft.simulate(weight) - inside).abs().max() < 1e-5
    assert (inside - weight).abs().max() <= 0.5 * qparams.scale.max()
    assert torch.equal(quantizer.simulate(soft.hard()), soft.hard())
    start = encode(weight, quantizer.spec, qparams)
    assert (encode(soft.hard(), quantizer.spec, qparams) - start).abs().max() <= 1
    with torch.no_grad():
        soft.variable.copy_(torch.randn(6, 16).sign() * 50)
    ends = encode(soft.hard(), quantizer.spec, qparams)
    assert (ends - start).abs().max() == 1
    assert soft.undecided() == 0
    assert soft.penalty(2.0).item() == 0


def test_clipped_weights_and_weights_on_the_grid_stay_finite() -> None:
    weight = torch.tensor([[0.0, 0.5, -1.0, 9.0, -9.0, 3.5]])
    quantizer = quantizer_of(weight, "int4")
    quantizer.set_qparams(QParams(torch.tensor([0.5])))
    soft = SoftWeight(weight, quantizer)
    assert soft.variable.isfinite().all()
    wanted = torch.tensor([[0.0, 0.5, -1.0, 3.5, -4.0, 3.5]])
    assert torch.equal(soft.simulate(weight), wanted)
    assert torch.equal(soft.hard(), wanted)
    soft.simulate(weight).sum().backward()
    assert soft.variable.grad is not None
    assert soft.variable.grad[0, 3:5].tolist() == [0.0, 0.0]


def test_sharpness_falls_linearly_after_the_warm_start() -> None:
    assert [sharpness(p) for p in (0.0, 0.19, 0.2, 0.6, 1.0)] == pytest.approx([0.0, 0.0, 20.0, 11.0, 2.0])


def test_a_free_weight_starts_as_the_nearest_codes_and_learns_its_scale() -> None:
    torch.manual_seed(0)
    weight = torch.randn(6, 16)
    quantizer = quantizer_of(weight, "int3/channel")
    free = FreeWeight(weight, quantizer)
    assert torch.equal(free.hard(), quantizer.simulate(weight))
    free.simulate(weight).square().sum().backward()
    assert free.weight.grad is not None
    assert free.scale.grad is not None
    assert (free.scale.grad != 0).all()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_dropping_passes_a_share_of_the_elements_on_in_float(layout: torch.memory_format) -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 6, 9, 9).contiguous(memory_format=layout).requires_grad_()
    quantizer = Quantizer("x.input", QuantSpec.parse("uint3/asym"), None, "minmax")
    quantizer.set_qparams(QParams(torch.tensor([0.3]), torch.tensor([2.0])))
    assert quantizer.scale is not None
    quantizer.scale.requires_grad_()
    rounded = quantizer.simulate(x)
    part = DroppedInput(quantizer, Drop(0.25, 0))
    out = part.simulate(x)
    kept = out == x
    assert torch.equal(torch.where(kept, x, rounded), out)
    assert kept.float().mean().item() == pytest.approx(0.25, abs=0.03)
    assert not torch.equal(part.simulate(x) == x, kept)
    out.sum().backward()
    inside = (x >= -0.6) & (x <= 1.5)
    assert x.grad is not None
    assert torch.equal(x.grad, (inside | kept).float())


def test_dropping_nothing_computes_what_the_quantizer_computes() -> None:
    x = torch.randn(4, 5)
    quantizer = Quantizer("x.input", QuantSpec.parse("uint4/asym"), None, "minmax")
    quantizer.set_qparams(QParams(torch.tensor([0.2]), torch.tensor([7.0])))
    codes = DroppedInput(quantizer, Drop(0.0, 0))(x)
    assert torch.equal(codes.values * codes.scale, quantizer.simulate(x))


@pytest.mark.parametrize("rule", ["lsq", "lsq+", "fixed"])
def test_native_values_have_the_values_and_gradients_of_the_reference(rule: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 4, 5, 5)
    quantizer = Quantizer("x.input", QuantSpec.parse("uint3/asym"), None, "minmax", rule)
    quantizer.set_qparams(QParams(torch.tensor([0.31]), torch.tensor([3.0])))
    if not training.serves_values(x, quantizer.spec):
        pytest.skip("no native kernels")
    found = []
    for compute in (quantizer.simulate, lambda x: training.values(x, quantizer.operand(x))):
        leaf = x.clone().requires_grad_()
        learned = [
            p for p in (quantizer.scale, quantizer.offset) if isinstance(p, nn.Parameter) and quantizer.rule.learns
        ]
        for parameter in learned:
            parameter.requires_grad_().grad = None
        out = compute(leaf)
        (out * torch.arange(out.numel()).view(out.shape)).sum().backward()
        found.append((out.detach(), leaf.grad, *(parameter.grad for parameter in learned)))
    assert torch.equal(found[0][0], found[1][0])
    for wanted, got in zip(*found, strict=True):
        assert wanted is not None
        assert torch.allclose(wanted, got, rtol=1e-4)

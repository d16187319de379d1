"""AWQ: factors and clipping never lose to rounding to nearest, what is saved and what is not clipped."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from decoders import IDS, decoder, prepared, relative

import bitwright as bw
from bitwright.algorithms.awq import awq, clip, importance
from bitwright.algorithms.pipeline import outcomes
from bitwright.algorithms.products import product_error, quantized_layers, rounded, watch
from bitwright.graph.dataflow import call
from bitwright.nn.quantizer import Quantizer
from bitwright.numerics.spec import QuantSpec
from nets import one_thread  # noqa: F401

SITES = {"blocks.*.weight": "int3/group8"}


def test_no_strength_is_rounding_to_nearest() -> None:
    model = prepared(decoder(), IDS[0], "w4a16", sites=SITES)
    layers = quantized_layers(model, ["blocks.0.gate", "blocks.0.up"])
    rows = watch(model, IDS, call, ["blocks.0.gate"])["blocks.0.gate"]
    none = importance(torch.arange(32), rows.mean, 0.0)
    assert torch.equal(none, torch.ones(32))
    assert product_error(rows.sample, layers, none) == product_error(rows.sample, layers)


def test_factors_are_normalised_and_shared_heads_share_them() -> None:
    channels = torch.tensor([0, 1, 0, 1, 2, 3, 2, 3])
    mean = torch.tensor([1.0, 4.0, 3.0, 4.0, 16.0, 1.0, 16.0, 7.0])
    scale = importance(channels, mean, 0.5)
    assert torch.allclose(scale / scale[0], torch.tensor([2.0, 4.0, 16.0, 4.0]).sqrt() / 2**0.5)
    assert (scale.max() * scale.min()).item() == pytest.approx(1.0)


def test_factors_and_clipping_lower_the_error_and_the_float_model_stays() -> None:
    net = decoder()
    model = prepared(net, IDS[0], "w4a16", sites=SITES)
    found = awq(model, IDS, call, {"clip": False})
    assert [o.path for o in found if not o.skipped]
    assert all(o.after < o.before for o in found if not o.skipped)
    with torch.no_grad():
        assert relative(model(IDS[0]), net(IDS[0])) < 1e-10
    errors = []
    for steps in ((), ({"name": "awq", "clip": False},), ("awq",)):
        model = prepared(net, IDS[0], "w4a16", sites=SITES, steps=steps)
        bw.calibrate(model, IDS)
        with torch.no_grad():
            errors.append(relative(model(IDS[0]), net(IDS[0])))
    assert errors[2] < errors[1] < errors[0]
    clipped = {o.path: o for o in outcomes(model) if o.path.endswith(("gate", "down", "o", ".q", ".k"))}
    assert clipped["blocks.0.gate"].after < clipped["blocks.0.gate"].before
    assert clipped["blocks.0.q"].skipped == "not clipped: its output goes into the scores of attention"
    assert clipped["blocks.0.k"].skipped


@pytest.mark.parametrize("spec", ["int3/group8", "int4/channel", "uint3/group8/asym", "int3", "nf4/group8"])
def test_clipping_never_raises_the_error_and_the_range_follows(spec: str) -> None:
    generator = torch.Generator().manual_seed(4)
    weight = torch.randn(12, 16, generator=generator) ** 3
    weight[0] = weight[0].abs() + 1.0  # a range that would not contain 0
    x = torch.randn(200, 16, generator=generator) @ torch.randn(16, 16, generator=generator)
    quantizer = Quantizer("w", QuantSpec.parse(spec), (12, 16), "minmax")
    best, before, after, power = clip(weight, quantizer, x)
    assert after < before < power
    assert (best.abs() <= weight.abs()).all()
    assert not torch.equal(best, weight)
    quantizer.fit(best)
    assert torch.equal(quantizer.simulate(best), rounded(best, quantizer))
    assert quantizer.simulate(best).abs().max() <= best.abs().max() * 1.5


def test_what_was_folded_and_clipped_ships_and_is_saved(tmp_path: Path) -> None:
    net = decoder()
    model = prepared(net, IDS[0], "w4a8", sites={"blocks.*.weight": "int4/channel"}, steps=["awq"])
    bw.calibrate(model, IDS)
    with torch.no_grad():
        wanted = model.eval()(IDS[0])
        assert torch.equal(bw.convert(model)(IDS[0]), wanted)
        bw.save(model, tmp_path / "simulated")
        assert torch.equal(bw.load(tmp_path / "simulated", decoder())(IDS[0]), wanted)
        bw.save(bw.convert(model), tmp_path / "shipped")
        assert torch.equal(bw.load(tmp_path / "shipped", decoder())(IDS[0]), wanted)

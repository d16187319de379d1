"""Weights whose scales are quantized or whose table is fitted: trained, saved, loaded, and counted to the byte."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bitwright.errors import ExportError
from bitwright.export.onnx import export
from bitwright.flow.checkpoint import load, save
from bitwright.flow.convert import convert
from bitwright.flow.coverage import coverage
from bitwright.lowbit.layer import LowbitLayer
from bitwright.numerics.qtensor import QTensor, dequantize, quantize, snap_scale
from bitwright.numerics.spec import QuantSpec
from bitwright.plan.plan import Plan
from bitwright.train.loop import train
from bitwright.train.schedule import Schedule
from nets import calibrated, layer_plan, one_thread  # noqa: F401

SPECS = ["kmeans4/channel", "mxfp4", "nvfp4", "fp8_e4m3/channel", "nf4/group64/scale(int8/group4)", "int16/channel"]


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))


def plan_for(model: nn.Module, spec: str) -> Plan:
    return Plan.preset("w4a16", model, torch.zeros(1, 64), sites={"[024].weight": spec})


@pytest.mark.parametrize("spec", SPECS)
def test_an_mlp_learns_and_comes_back_from_its_file(spec: str, tmp_path: Path) -> None:
    x, target = torch.randn(64, 64), torch.randn(64, 4)
    model = net()
    simulated = calibrated(model, plan_for(model, spec), [x])
    tables = {name: t.clone() for name, t in simulated.named_buffers() if name.endswith("codebook")}
    assert bool(tables) == spec.startswith("kmeans")

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.mse_loss(model(batch[0]), batch[1])

    before = loss(simulated, (x, target)).item()
    train(simulated, loss, [(x, target)], schedule=Schedule(steps=30, lr=10.0))
    simulated.eval()
    assert loss(simulated, (x, target)).item() < 0.9 * before
    assert all(torch.equal(t, simulated.get_buffer(name)) for name, t in tables.items())
    shipped = convert(simulated)
    save(simulated, tmp_path / "simulated")
    save(shipped, tmp_path / "shipped")
    with torch.no_grad():
        expected = simulated(x)
        assert torch.equal(load(tmp_path / "simulated", net()).eval()(x), expected)
        assert torch.equal(convert(load(tmp_path / "simulated", net()))(x), shipped(x))
        assert torch.equal(load(tmp_path / "shipped", net())(x), shipped(x))
        assert torch.allclose(shipped(x), expected, atol=1e-5)
    for number in (0, 2, 4):
        layer = simulated[number]
        stored = quantize(layer.weight, layer.weight_quantizer.spec, layer.weight_quantizer.raw_qparams)
        assert torch.equal(dequantize(stored), layer.weight_quantizer.simulate(layer.weight))
        assert torch.equal(dequantize(stored), dequantize(shipped[number].weight))


def test_scales_are_rounded_once_and_learned_through_the_rounding() -> None:
    layer = nn.Linear(64, 16)
    simulated = calibrated(layer, layer_plan(layer, "int4/group16/scale(int8/group16)"), [])
    quantizer = simulated.weight_quantizer
    raw = quantizer.scale.detach().clone()
    found = quantizer.qparams.scale
    assert not torch.equal(found, raw)
    assert torch.equal(found, snap_scale(raw, quantizer.spec))
    assert torch.equal(quantizer.raw_qparams.scale, raw)
    quantizer.scale.requires_grad_(True)
    simulated(torch.randn(3, 64)).square().sum().backward()
    assert quantizer.scale.grad.abs().min() > 0


BITS = {  # bits per weight of 256 x 512 weights
    "mxfp4": 4.25,
    "nvfp4": 4.5 + 32 / (256 * 512),
    "nf4/group64": 4.5,
    "nf4/group64/scale(int8/group256)": 4 + 8 / 64 + 32 / (64 * 256),
    "kmeans4": 4 + 32 / (256 * 512) + 16 * 32 / (256 * 512),
    "kmeans4/channel": 4 + 32 / 512 + 16 * 32 / 512,
    "int16": 16 + 32 / (256 * 512),
}


@pytest.mark.parametrize("spec", BITS)
@pytest.mark.parametrize("kind", [nn.Linear, nn.Embedding])
def test_coverage_counts_every_bit(spec: str, kind: type[nn.Module], tmp_path: Path) -> None:
    layer = nn.Linear(512, 256, bias=False) if kind is nn.Linear else nn.Embedding(256, 512)
    plan = layer_plan(layer, spec)
    shipped = convert(calibrated(layer, plan, [torch.zeros(1, 512)] if kind is nn.Linear else [torch.tensor([1])]))
    [row] = coverage(shipped)
    assert row.bytes * 8 / row.elements == BITS[spec]
    assert row.format == str(QuantSpec.parse(spec))
    assert row.bytes == sum(t.nbytes for t in shipped.state_dict().values()) == shipped.weight.nbytes
    save(shipped, tmp_path / "model")
    again = load(tmp_path / "model", nn.Linear(512, 256, bias=False) if kind is nn.Linear else nn.Embedding(256, 512))
    assert torch.equal(dequantize(again.weight), dequantize(shipped.weight))


@pytest.mark.parametrize(
    "spec", ["mxfp4", "nf4/group8/scale(int8/group4)", "kmeans3/channel", "kmeans3/group8", "int16"]
)
def test_rows_of_an_embedding_of_any_shape(spec: str) -> None:
    layer = nn.Embedding(12, 32, padding_idx=0)
    simulated = calibrated(layer, layer_plan(layer, spec), [torch.tensor([1])])
    shipped = convert(simulated)
    table = dequantize(shipped.weight)
    for ids in (torch.randint(12, (2, 3, 4)), torch.tensor(5), torch.zeros(0, dtype=torch.long), torch.arange(12)):
        assert torch.equal(shipped(ids), F.embedding(ids, table))
        assert torch.equal(simulated(ids), F.embedding(ids, table))
    simulated(torch.tensor([[3, 4], [3, 5]])).sum().backward()
    assert layer.weight.grad is None
    assert simulated.weight.grad.abs().sum(1).nonzero().flatten().tolist() == [3, 4, 5]


@pytest.mark.parametrize(
    "spec", ["fp4/group16/scale(e8m0)", "nf4/group16/scale(int8/group4)", "kmeans3/channel", "kmeans3"]
)
def test_weights_that_ship_in_parts_keep_their_scales_and_tables(spec: str) -> None:
    attention = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True).eval()
    x = torch.randn(2, 5, 32)
    plan = Plan.preset("fp16", attention, x, sites={"*self_attn.in_proj_weight": spec})
    simulated = calibrated(attention, plan, [x])
    shipped = convert(simulated)
    quantizer, weight = simulated.self_attn.in_proj_weight_quantizer, simulated.self_attn.in_proj_weight
    parts = shipped.self_attn.in_proj_weight
    values = torch.cat([dequantize(part.weight) for part in parts])
    assert torch.equal(values, quantizer.simulate(weight).detach())
    assert all(isinstance(part.weight.scale, QTensor) == ("scale" in spec) for part in parts)
    with torch.no_grad():
        assert torch.allclose(shipped(x), simulated(x), atol=1e-5)


def test_a_group_of_scales_across_parts_is_refused() -> None:
    attention = nn.MultiheadAttention(32, 4)
    x = torch.randn(2, 5, 32)
    with pytest.raises(Exception, match="stores its scales as a row of 64: group96 needs a last axis divisible by 96"):
        Plan.preset("fp16", attention, (x, x, x), sites={"in_proj_weight": "nf4/group16/scale(int8/group96)"})


@pytest.mark.parametrize("preset", ["nf4", "mxfp4", "fp8"])
def test_weight_only_presets_run_end_to_end(preset: str, tmp_path: Path) -> None:
    words = nn.Sequential(nn.Embedding(20, 64), nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64), nn.Linear(64, 3))
    ids = torch.randint(20, (4, 6))
    simulated = calibrated(words, preset, [ids])
    shipped = convert(simulated)
    save(shipped, tmp_path / "model")
    again = load(tmp_path / "model", words)
    assert [str(m.weight_spec) for m in again.modules() if isinstance(m, LowbitLayer)] == {
        "nf4": ["int8/channel", *["nf4/group64/scale(int8/group256)"] * 2],
        "mxfp4": ["int8/channel", *["fp4/group32/scale(e8m0)"] * 2],
        "fp8": ["fp8_e4m3/channel"] * 3,
    }[preset]
    with torch.no_grad():
        assert torch.equal(again(ids), shipped(ids))
        assert torch.allclose(shipped(ids), simulated(ids), atol=1e-5)
        error = (shipped(ids) - words(ids)).square().mean() / words(ids).square().mean()
        assert 0 < error < 0.05


def test_export_refuses_quantized_scales_and_tables_by_name(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    model = net()
    for spec, message in (
        ("mxfp4", r"0: fp4/group32/scale\(e8m0\) has no ONNX form"),
        ("kmeans4", "kmeans4 has no ONNX"),
    ):
        shipped = convert(calibrated(model, plan_for(model, spec), [torch.zeros(1, 64)]))
        with pytest.raises(ExportError, match=message):
            export(shipped, tmp_path / "m.onnx", torch.zeros(1, 64))

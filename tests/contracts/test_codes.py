"""Contract C1: what is stored are exactly the codes that the last forward computed, for all the target lists."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from bitwright.errors import PlanError
from bitwright.flow.convert import convert
from bitwright.kernels import passes, reference
from bitwright.lowbit.layer import LowbitLayer
from bitwright.numerics import affine, ste
from bitwright.numerics.codebook import look_up
from bitwright.numerics.formats import FORMATS
from bitwright.numerics.packing import pack, unpack
from bitwright.numerics.qtensor import dequantize, quantize
from bitwright.numerics.spec import QuantSpec
from bitwright.plan.target import get_target
from nets import calibrated, layer_plan, one_thread, trained  # noqa: F401

LAYERS = {
    "linear": (lambda: nn.Linear(24, 7), torch.randn),
    "conv": (lambda: nn.Conv2d(6, 7, 3), torch.randn),
    "embedding": (lambda: nn.Embedding(9, 24), torch.zeros),
}
SHAPES = {"linear": (5, 24), "conv": (2, 6, 6, 5), "embedding": (9,)}
QUANTIZED_SCALES = [
    "fp4/group8/scale(e8m0)",
    "fp4/group8/scale(fp8_e4m3)",
    "nf4/group8/scale(int8/group3)",
    "int4/group8/asym/scale(uint8/asym)",
    "kmeans3/group8/scale(fp16)",
    "int8/channel/scale(int8)",
    "nf4/scale(fp8_e4m3)",
]


def listed() -> Iterator[tuple[str, str, str | None]]:
    """(operator, weight, input) for every weight of every row of the target; the inputs take turns."""
    granularities = ["", "/channel", "/group8"]
    weights = [f"{f}{g}{a}" for f in FORMATS for g in granularities for a in ("", "/asym")] + QUANTIZED_SCALES
    inputs = [None, "uint8/asym", "int8", "uint4/asym", "int8/token/dynamic", "uint8/asym/dynamic"]
    for op in LAYERS:
        for number, weight in enumerate(weights):
            for input in inputs[:1] + inputs[1 + number % 5 :][:1]:
                if runs(op, weight, input):
                    yield op, weight, input


def runs(op: str, weight: str, input: str | None) -> bool:
    if weight.partition("/scale")[0].endswith("asym") and not FORMATS[weight.partition("/")[0]].is_integer:
        return False
    if op == "conv" and "group" in weight:  # the target's patterns are wider than what a plan may ask
        return False
    return get_target("cpu").covers(op, QuantSpec.parse(weight), input and QuantSpec.parse(input))  # type: ignore[arg-type]


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Every result of `encode` and of its native form while simulating, in order; the conversion calls its own."""
    seen: list[Tensor] = []
    encode, weight_codes = affine.encode, passes._weight_codes

    def watched(*args: object) -> Tensor:
        codes = encode(*args)  # type: ignore[arg-type]
        seen.append(codes.detach().clone())
        return codes

    def watched_natively(*args: object) -> tuple[Tensor, Tensor]:
        codes, sums = weight_codes(*args)  # type: ignore[arg-type]
        seen.append(codes.float())
        return codes, sums

    for module in (affine, reference, ste):
        monkeypatch.setattr(module, "encode", watched)
    monkeypatch.setattr(passes, "_weight_codes", watched_natively)
    return seen


@pytest.mark.parametrize(("op", "weight", "input"), list(listed()), ids=str)
def test_stored_codes_are_those_of_the_last_forward(
    op: str, weight: str, input: str | None, encoded: list[Tensor]
) -> None:
    layer = LAYERS[op][0]()
    x = torch.arange(9) if op == "embedding" else torch.randn(SHAPES[op])
    x = x.abs() if input in ("uint8", "uint4") else x
    simulated = trained(calibrated(layer, layer_plan(layer, weight, input), [x]), [x], steps=4)
    encoded.clear()
    with torch.no_grad():
        simulated(x)
    codes = [found for found in encoded if found.shape == layer.weight.shape]
    shipped = convert(simulated)
    assert isinstance(shipped, LowbitLayer)
    stored = shipped.weight
    if stored.spec.format.is_table and len(codes) == 2:  # multiplied as integers: the values of the table are encoded
        assert torch.equal(codes.pop(), look_up(codes[0], stored.spec.format))
    assert len(codes) == 1
    assert torch.equal(stored.codes.float(), codes[0])
    if stored.spec.format.dtype is None:
        assert len(codes[0].unique()) > 1
    quantizer = simulated.weight_quantizer
    again = quantize(simulated.folded()[0], stored.spec, quantizer.raw_qparams)
    assert torch.equal(stored.packed, again.packed)
    assert torch.equal(stored.qparams.scale, again.qparams.scale)
    assert torch.equal(stored.qparams.scale, quantizer.qparams.scale)
    if quantizer.zero_point is not None:
        assert torch.equal(shipped.weight_zero_point, quantizer.zero_point)
    assert torch.equal(dequantize(stored), quantizer.simulate(simulated.folded()[0]).detach())


@pytest.mark.parametrize(("op", "weight", "input"), list(listed()), ids=str)
def test_packed_bytes_survive_unpacking(op: str, weight: str, input: str | None) -> None:
    layer = LAYERS[op][0]()
    x = torch.arange(9) if op == "embedding" else torch.randn(SHAPES[op])
    shipped = convert(calibrated(layer, layer_plan(layer, weight, input), [x]))
    assert isinstance(shipped, LowbitLayer)
    fmt, count = shipped.weight_spec.format, shipped.weight.codes[0].numel()
    assert shipped.packed.shape == (len(layer.weight), fmt.packed_bytes(count))
    assert torch.equal(pack(unpack(shipped.packed, fmt, count), fmt), shipped.packed)


def test_the_target_lists_every_integer_format_and_the_low_bit_ones() -> None:
    weights = {(op, weight) for op, weight, _ in listed()}
    for op in LAYERS:
        for fmt in ("int8", "int7", "int6", "int5", "int4", "int3", "int2", "ternary", "nf4"):
            assert (op, f"{fmt}/channel") in weights, (op, fmt)
        for fmt in ("kmeans2", "kmeans8", "quantile4", "int16", "uint16", "fp8_e4m3", "fp8_e5m2"):
            assert (op, f"{fmt}/channel") in weights, (op, fmt)
        assert (op, "int8/channel/scale(int8)") in weights, op
    assert {("linear", "int4/group8"), ("embedding", "nf4/group8"), ("linear", "fp16")} <= weights
    assert {(op, spec) for op in ("linear", "embedding") for spec in QUANTIZED_SCALES} <= weights


def test_what_a_pattern_lets_through_is_still_refused_for_convolutions() -> None:
    layer = nn.Conv2d(6, 7, 3)
    with pytest.raises(PlanError, match=r"weight: ternary/group8 groups need a 2-d weight, found \[7, 6, 3, 3\]"):
        calibrated(layer, layer_plan(layer, "ternary/group8"), [torch.zeros(1, 6, 4, 4)])


def test_codes_of_a_folded_convolution_are_those_of_the_folded_weight(encoded: list[Tensor]) -> None:
    net = nn.Sequential(nn.Conv2d(3, 5, 3, bias=False), nn.BatchNorm2d(5), nn.ReLU())
    x = torch.randn(6, 3, 7, 7)
    net.train()(x)
    simulated = trained(calibrated(net, "w4a4", [x]), [x])
    encoded.clear()
    with torch.no_grad():
        simulated(x)
    codes = next(found for found in encoded if found.shape == net[0].weight.shape)
    stored = convert(simulated)[0].weight
    assert torch.equal(stored.codes.float(), codes)
    norm = simulated[1]
    factor = (norm.weight / (norm.running_var + norm.eps).sqrt()).view(-1, 1, 1, 1)
    values = (simulated[0].weight * factor / stored.scale).round().clamp(-128, 127)  # type: ignore[operator]
    assert (values == codes).float().mean() > 0.95

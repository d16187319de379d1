"""Shipped layers: what they hold, what they leave out, and how they take their inputs."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bitwright.errors import KernelError
from bitwright.flow.convert import convert
from bitwright.graph.calls import Add
from bitwright.lowbit.conv import LowbitConv
from bitwright.lowbit.elementwise import LowbitAdd
from bitwright.lowbit.embedding import LowbitEmbedding
from bitwright.lowbit.layer import LowbitLayer
from bitwright.lowbit.linear import LowbitLinear
from bitwright.numerics.qtensor import dequantize, quantize
from bitwright.numerics.spec import QuantSpec
from bitwright.plan.plan import Plan
from models import TiedLayers
from nets import FEATURES, calibrated, layer_plan, one_thread  # noqa: F401


def ship(layer: nn.Module, weight: str, input: str | None, x: Tensor, features: str = "best") -> LowbitLayer:
    shipped = convert(calibrated(layer, layer_plan(layer, weight, input), [x]), features=FEATURES[features])
    assert isinstance(shipped, LowbitLayer)
    return shipped


@pytest.mark.parametrize("features", FEATURES)
@pytest.mark.parametrize(
    ("layer", "weight", "input", "kind", "names"),
    [
        (nn.Linear(6, 4), "int8/channel", "uint8/asym", LowbitLinear,
         "packed weight_scale bias input_scale input_zero_point"),
        (nn.Linear(6, 4, bias=False), "int8", "int8", LowbitLinear, "packed weight_scale input_scale"),
        (nn.Linear(6, 4), "uint4/group2/asym", None, LowbitLinear, "packed weight_scale weight_zero_point bias"),
        (nn.Linear(6, 4), "int8/channel", "int8/token/dynamic", LowbitLinear, "packed weight_scale bias"),
        (nn.Conv1d(3, 4, 2), "ternary/channel", "uint8", LowbitConv, "packed weight_scale bias input_scale"),
        (nn.Embedding(5, 6), "nf4/channel", None, LowbitEmbedding, "packed weight_scale"),
        (nn.Embedding(5, 6), "kmeans2/channel", None, LowbitEmbedding, "packed weight_scale weight_codebook"),
        (nn.Linear(6, 4), "nf4/group2/scale(int8)", None, LowbitLinear,
         "packed weight_scale_packed weight_scale_scale bias"),
        (nn.Linear(6, 4), "nf4/group2/scale(uint8/group2/asym)", None, LowbitLinear,
         "packed weight_scale_packed weight_scale_scale weight_scale_zero_point bias"),
        (nn.Linear(6, 4), "fp4/group2/scale(e8m0)", None, LowbitLinear, "packed weight_scale_packed bias"),
    ],
)  # fmt: skip
def test_only_packed_numbers_are_kept_and_saved(
    layer: nn.Module, weight: str, input: str | None, kind: type, names: str, features: str
) -> None:
    x = torch.arange(5) if kind is LowbitEmbedding else torch.rand(2, 3, 6)
    shipped = ship(layer, weight, input, x, features)
    assert type(shipped) is kind
    assert set(shipped.state_dict()) == set(names.split())
    assert shipped.packed.dtype is torch.uint8
    assert list(shipped.parameters()) == []
    assert shipped.packed.nbytes < layer.weight.nbytes / 3
    layout = {name for name, _ in shipped.named_buffers(remove_duplicate=False)} - set(shipped.state_dict())
    assert {"kernel_layout", "kernel_scale"} <= layout
    assert not any(value.is_floating_point() and value.numel() >= layer.weight.numel() for value in shipped.buffers())


def test_the_stored_weight_reads_back_as_codes_and_values() -> None:
    layer, x = nn.Conv2d(3, 4, 2), torch.randn(2, 3, 5, 5)
    shipped = ship(layer, "int4/channel", "uint8/asym", x)
    assert shipped.weight.codes.shape == layer.weight.shape
    assert shipped.weight.codes.abs().max() <= 8
    error = (dequantize(shipped.weight) - layer.weight).abs()
    assert (error <= shipped.weight_scale / 2 + 1e-6).all()


def test_an_embedding_row_is_within_half_a_step_of_the_float_row() -> None:
    layer = nn.Embedding(40, 16)
    for spec in ("int8/channel", "uint8/channel/asym", "uint4/channel/asym"):
        shipped = ship(layer, spec, None, torch.arange(40))
        rows = shipped(torch.arange(40))
        assert ((rows - layer.weight).abs() <= shipped.weight_scale / 2 + 1e-6).all()
        assert shipped(torch.tensor([[3, 3], [7, 0]])).shape == (2, 2, 16)
        bag = rows[:10].sum(0) - layer.weight[:10].sum(0)
        assert (bag.abs() <= shipped.weight_scale[:10].sum() / 2 + 1e-5).all()


@pytest.mark.parametrize("features", FEATURES)
def test_the_result_lies_in_memory_as_the_reference_says(features: str) -> None:
    x = torch.randn(2, 3, 6, 5)
    shipped = ship(nn.Conv2d(3, 4, 3), "int8/channel", "uint8/asym", x, features)
    assert shipped(x).is_contiguous(memory_format=torch.channels_last)
    assert shipped(x[0]).shape == (4, 4, 3)


def test_a_deep_copy_and_a_reload_compute_the_same() -> None:
    x = torch.randn(4, 12)
    shipped = ship(nn.Linear(12, 5), "int4/channel", "uint4/asym", x)
    twin = copy.deepcopy(shipped)
    other = ship(nn.Linear(12, 5), "int4/channel", "uint4/asym", x)
    assert not torch.equal(other(x), shipped(x))
    other.load_state_dict(shipped.state_dict())
    assert torch.equal(twin(x), shipped(x))
    assert torch.equal(other(x), shipped(x))
    assert torch.equal(other.kernel_layout, shipped.kernel_layout)


def test_no_gradient_state_is_carried_over() -> None:
    x = torch.randn(4, 12)
    simulated = calibrated(nn.Linear(12, 5), layer_plan(nn.Linear(1, 1), "int4/channel", "uint8/asym"), [x])
    simulated.weight_quantizer.scale.requires_grad_(True)
    simulated.input_quantizer.scale.requires_grad_(True)
    shipped = convert(simulated)
    assert not any(value.requires_grad for value in shipped.buffers())
    assert not shipped(x).requires_grad


@pytest.mark.parametrize("features", FEATURES)
def test_an_add_holds_two_scales_and_adds_values(features: str) -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right, self.add = nn.Linear(6, 6), nn.Linear(6, 6), Add()

        def forward(self, x: Tensor) -> Tensor:
            return self.add(self.left(x), self.right(x)).relu()

    net, x = Sum(), torch.randn(4, 6)
    plan = Plan.preset("w8a8", net, x).with_sites({"add.input.1": "int8"})
    add = convert(calibrated(net, plan, [x]), features=FEATURES[features]).add
    assert isinstance(add, LowbitAdd)
    assert set(add.state_dict()) == {"input_scale_0", "input_zero_point_0", "input_scale_1"}
    a, b = torch.rand(3, 6) - 0.5, torch.rand(3, 6) - 0.5
    assert (add(a, b) - (a + b)).abs().max() <= (add.input_scale_0 + add.input_scale_1).item() / 2 + 1e-6


def test_adding_different_shapes_is_refused_natively() -> None:
    if "portable" not in FEATURES:
        pytest.skip("bitwright._native is not built")
    inputs = convert_add()
    with pytest.raises(KernelError, match=r"add: shapes differ: \[2, 3\] and \[3\]"):
        inputs(torch.zeros(2, 3), torch.zeros(3))


def convert_add() -> nn.Module:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.add = nn.Linear(3, 3), Add()

        def forward(self, x: Tensor) -> Tensor:
            return self.add(F.relu(self.left(x)), x).relu()

    x = torch.randn(4, 3)
    return convert(calibrated(Sum(), "w8a8", [x])).add


def test_layers_that_share_a_weight_share_its_bytes() -> None:
    shipped = convert(calibrated(TiedLayers(), "w8a8", [torch.randn(4, 8)]))
    assert shipped.a.packed is shipped.b.packed
    assert shipped.a.weight_scale is shipped.b.weight_scale


def test_the_weight_of_a_layer_is_the_quantized_weight_of_the_model() -> None:
    layer, x = nn.Linear(12, 5), torch.randn(4, 12)
    spec = QuantSpec.parse("int4/channel")
    shipped, direct = ship(layer, "int4/channel", None, x), quantize(layer.weight, spec)
    assert torch.equal(shipped.packed, direct.packed)  # the plan of these tests asks for the extremes
    assert torch.equal(shipped.weight_scale, direct.qparams.scale)

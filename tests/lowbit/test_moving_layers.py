"""Shipped layers that move: each device has rows and layouts of its own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bitwright.flow.convert import convert
from bitwright.kernels.cpu import cpu_features
from bitwright.kernels.device import device_features
from bitwright.kernels.table import select
from bitwright.lowbit.layer import LowbitLayer
from bitwright.lowbit.linear import LowbitLinear
from nets import calibrated, layer_plan

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def shipped(weight: str, input: str | None, features: frozenset[str] | None = None) -> LowbitLinear:
    layer, x = nn.Linear(64, 9), torch.randn(4, 64)
    plan = layer_plan(layer, weight) if input is None else layer_plan(layer, weight, input)
    found = convert(calibrated(layer, plan, [x]), features=features)
    assert isinstance(found, LowbitLinear)
    return found


@pytest.mark.parametrize("features", [None, frozenset()])
def test_a_layer_that_was_nowhere_takes_the_row_of_its_device(features: frozenset[str] | None) -> None:
    layer, x = shipped("int4/channel", "uint8/asym", features), torch.randn(3, 64)
    state, expected = layer.state_dict(), layer(x)
    empty = layer.to("meta").to_empty(device="cpu")
    empty.load_state_dict(state)
    best = select("linear", layer.weight_spec, layer.input_spec, layer.shape, cpu_features())
    assert empty.kernel is best
    assert torch.equal(empty(x), expected)


def test_a_change_of_type_keeps_the_row() -> None:
    layer = shipped("int4/channel", None, frozenset())
    assert layer.double().kernel.name == "linear/decode"


@gpu
@pytest.mark.parametrize("input", ["uint8/asym", "int8/token/dynamic"])
@pytest.mark.parametrize("weight", ["int8/channel", "int4/group32", "ternary/channel"])
def test_integer_layers_compute_the_same_bits_on_a_gpu(weight: str, input: str) -> None:
    layer, x = shipped(weight, input), torch.randn(5, 64)
    expected = layer(x)
    moved = layer.to("cuda")
    assert moved.kernel.name == "linear/triton"
    assert torch.equal(moved(x.cuda()).cpu(), expected)
    assert torch.equal(moved.to("cpu")(x), expected)


@gpu
def test_a_model_on_a_gpu_is_converted_for_it() -> None:
    layer = nn.Linear(64, 9)
    simulated = calibrated(layer, layer_plan(layer, "int4/channel", "uint8/asym"), [torch.randn(4, 64)]).to("cuda")
    found, x = convert(simulated), torch.randn(5, 64, device="cuda")
    assert {m.kernel.name for m in found.modules() if isinstance(m, LowbitLayer)} == {"linear/triton"}
    assert "triton" in device_features("cuda")
    with torch.no_grad():
        assert torch.equal(found(x), simulated.eval()(x))

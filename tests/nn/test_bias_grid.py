import pytest
import torch
from torch import nn

from bitwright.flow.calibrate import calibrate
from bitwright.flow.convert import convert
from bitwright.flow.prepare import prepare
from bitwright.plan.plan import Plan


def prepared(input: str) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    x = torch.randn(32, 16)
    net = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 2))
    plan = Plan.preset("w8a8", net, x, sites={"0.weight": "int4/channel", "0.input": input})
    model = prepare(net, plan)
    calibrate(model, [x])
    return model, x


@pytest.mark.parametrize("input", ["uint8/asym", "uint4/asym", "int8"])
def test_the_bias_is_a_whole_number_of_accumulator_steps_in_training_and_in_the_file(input):
    model, _ = prepared(input)
    layer = model[0]
    step = (layer.input_quantizer.qparams.scale * layer.weight_quantizer.qparams.scale.view(-1)).detach()
    shipped = convert(model)[0].bias
    assert torch.equal(layer.on_grid(layer.bias), shipped)
    assert (shipped / step - (shipped / step).round()).abs().max() < 1e-4
    assert ((shipped - layer.bias).abs() <= step / 2 * 1.0001).all()
    assert not torch.equal(shipped, layer.bias)


def test_the_gradient_of_the_bias_passes_through_the_rounding():
    model, x = prepared("uint8/asym")
    model[0](x).sum().backward()
    assert torch.equal(model[0].bias.grad, torch.full((8,), 32.0))


def test_dynamic_inputs_keep_the_float_bias():
    model, _ = prepared("int8/token/dynamic")
    assert torch.equal(convert(model)[0].bias, model[0].bias)

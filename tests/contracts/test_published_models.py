"""C1 and C2 on published networks with their real weights: trained equals shipped, natively and by the reference."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from bitwright.flow.checkpoint import load_weights
from bitwright.flow.convert import convert
from bitwright.numerics.affine import encode
from bitwright.plan.plan import Plan
from nets import FEATURES, MobileNetV1, ResNet20, calibrated, layers_of, one_thread, trained  # noqa: F401

pytestmark = pytest.mark.shared_data

MEAN, STD = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)

PLANS = {
    "w8a8": ("w8a8", {}),
    "w4a4": ("w4a4", {}),
    "mixed": (
        "w8a8",
        {"*.1.conv1.weight": "int4/channel", "*.2.conv*.weight": "ternary/channel", "*.2.conv1.input": "uint4/asym"},
    ),
}


def images(folder: Path, count: int) -> Tensor:
    """Real CIFAR-10 training images, normalised as the network expects."""
    with np.load(folder / "cifar10_lossless4k" / "cifar10_lossless_4000.npz") as data:
        pixels = torch.from_numpy(data["x"][:count]).permute(0, 3, 1, 2).float() / 255
    return (pixels - MEAN) / STD


def resnet20(folder: Path) -> nn.Module:
    return load_weights(ResNet20(), folder / "cifar10_resnet" / "resnet20-12fca82f.th").eval()


def check_contracts(simulated: nn.Module, inputs: list[Tensor]) -> None:
    with torch.no_grad():
        expected = [simulated(x) for x in inputs]
        for name in ("reference", "best"):
            shipped = convert(simulated, features=FEATURES[name])
            for x, out in zip(inputs, expected, strict=True):
                assert torch.equal(shipped(x), out), name
            for path, layer in layers_of(simulated).items():
                quantizer = layer.weight_quantizer
                codes = encode(layer.folded()[0], quantizer.spec, quantizer.qparams)
                assert torch.equal(shipped.get_submodule(path).weight.codes.float(), codes), path


@pytest.mark.parametrize("name", PLANS)
def test_resnet20_ships_what_was_trained(shared_data: Path, name: str) -> None:
    x = images(shared_data, 24)
    preset, rules = PLANS[name]
    net = resnet20(shared_data)
    plan = Plan.preset(preset, net, x[:1], sites={**rules, "linear.*": "int8/channel", "linear.input": "uint8/asym"})
    assert len(plan.folds) == 19
    assert sum(site.slot == "input.0" and spec is not None for site, spec in plan.sites.items()) == 9
    simulated = trained(calibrated(net, plan, [x]), x.split(8), lr=0.1)
    check_contracts(simulated, [x[:8], x[8:9]])


@pytest.mark.parametrize(
    ("preset", "rules"),
    [
        ("w8a8", {}),
        ("w4a4", {}),
        ("w8a8", {"blocks.1?.conv.weight": "int4/channel", "blocks.2?.conv.weight": "ternary/channel"}),
    ],
    ids=str,
)
def test_mobilenet_ships_what_was_trained(shared_data: Path, preset: str, rules: dict[str, str]) -> None:
    net = load_weights(MobileNetV1(), shared_data / "mlperf_tiny" / "vww_mobilenetv1_025.pt").eval()
    x = torch.nn.functional.interpolate(images(shared_data, 6) * STD + MEAN, (96, 96))
    plan = Plan.preset(preset, net, x[:1], sites=rules)
    assert len(plan.folds) == 27
    simulated = trained(calibrated(net, plan, [x]), x.split(3), lr=0.1)
    check_contracts(simulated, [x[:3]])


def test_resnet20_at_8_bits_gives_the_answers_of_the_float_model(shared_data: Path) -> None:
    x = images(shared_data, 100)
    net = resnet20(shared_data)
    shipped = convert(calibrated(net, "w8a8", [x[:32]]))
    with torch.no_grad():
        assert (shipped(x).argmax(1) == net(x).argmax(1)).float().mean() >= 0.98


class Trunk(nn.Module):
    def __init__(self, net: ResNet20) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net.features(x)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler raises its own
def test_compiled_resnet20_features_equal_eager_ones(shared_data: Path) -> None:
    x = images(shared_data, 8)
    net = Trunk(resnet20(shared_data))
    plan = Plan.preset("w4a4", net, x, sites={"net.linear.*": "float"})
    simulated = trained(calibrated(net, plan, [x]), [x], lr=0.1)
    torch._dynamo.reset()
    with torch.no_grad():
        assert torch.equal(torch.compile(simulated)(x), simulated(x))

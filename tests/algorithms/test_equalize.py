"""Equalization and absorption: the float model computes the same, ranges become equal; where they must not act."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bitwright as bw
from bitwright.algorithms.equalize import absorb_high_bias, equalize
from bitwright.algorithms.outcome import Outcome
from bitwright.algorithms.pipeline import outcomes
from bitwright.graph.dataflow import call
from bitwright.nn.norm import factor_of
from nets import MobileNetV1, ResNet20, one_thread  # noqa: F401

TENSOR = {"*.weight": "int8", "*.input": "uint8/asym"}


def settled(net: nn.Module, x: Tensor) -> Any:
    """Batch norms with statistics of their own inputs and uneven channels, eval mode."""
    net.train()
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None
                module.weight.copy_((0.5 * torch.randn(module.num_features)).exp())
                module.bias.copy_(0.5 * torch.randn(module.num_features))
        net(x)
    return net.eval()


def prepared(net: nn.Module, x: Tensor, sites: dict[str, str] = TENSOR, steps: tuple[Any, ...] = ()) -> Any:
    return bw.prepare(net, bw.Plan.preset("w8a8", net, x, sites=sites, steps=steps))


def run(method: Callable[..., list[Outcome]], model: nn.Module, x: Tensor, **options: bool) -> dict[str, Outcome]:
    return {outcome.path: outcome for outcome in method(model, [x], call, options)}


def rows(layer: Any) -> Tensor:
    return layer.folded()[0].detach().abs().flatten(1).amax(1)


def columns(layer: Any) -> Tensor:
    return layer.folded()[0].detach().abs().transpose(0, 1).flatten(1).amax(1)


def difference(a: Tensor, b: Tensor) -> float:
    return ((a - b).abs().max() / a.abs().max()).item()


def test_both_ranges_become_the_geometric_mean() -> None:
    net = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4))
    with torch.no_grad():
        net[0].weight.mul_(torch.tensor([0.01, 0.1, 1.0, 10.0, 100.0]).view(-1, 1))
    x = torch.randn(32, 6)
    model, wanted = prepared(net, x), net(x)
    expected = (rows(model[0]) * columns(model[2])).sqrt()
    found = run(equalize, model, x)
    assert torch.allclose(rows(model[0]), expected, rtol=1e-5)
    assert torch.allclose(columns(model[2]), expected, rtol=1e-5)
    assert difference(wanted, model(x)) < 1e-5
    assert found["0"].skipped == "it reads the model's input"
    assert (found["2"].skipped, found["2"].note) == ("", "with 0")


@pytest.mark.parametrize(
    ("net", "shape", "pairs"),
    [(MobileNetV1, (4, 3, 96, 96), 27), (ResNet20, (4, 3, 32, 32), 9)],
    ids=["mobilenet", "resnet"],
)
def test_published_shapes_compute_the_same_in_float(net: type[nn.Module], shape: tuple[int, ...], pairs: int) -> None:
    x = torch.randn(shape)
    float_model = settled(net(), x)
    model = prepared(float_model, x)
    with torch.no_grad():
        before, rounding = model(x), difference(float_model(x), model(x))  # 28 random layers amplify that of folding
        found = run(equalize, model, x)
        assert difference(before, model(x)) < max(1e-5, 2 * rounding)
    assert sum(not outcome.skipped for outcome in found.values()) == pairs
    if net is ResNet20:
        assert "joins several tensors" in found["layer1.1.conv1"].skipped
        assert found["layer1.0.conv2"].note == "with layer1.0.conv1"
    else:
        layer, after = model.get_submodule("blocks.8.conv"), model.get_submodule("blocks.9.conv")
        assert torch.allclose(rows(layer), columns(after), rtol=0.05)


class Between(nn.Module):
    """Two convolutions with batch norms, and a way between them."""

    def __init__(self, way: Callable[[Tensor], Any], groups: int = 1, affine: bool = True) -> None:
        super().__init__()
        self.way = way
        self.first, self.norm = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4, affine=affine)
        self.second = nn.Conv2d(4, 8, 3, groups=groups)

    def forward(self, x: Tensor) -> Any:
        y = self.way(self.norm(self.first(x)))
        return (self.second(y[0]), *y[1:]) if isinstance(y, tuple) else self.second(y)


PASSING: dict[str, Callable[[Tensor], Any]] = {
    "relu": F.relu,
    "relu in place": lambda x: x.relu_(),
    "leaky": lambda x: F.leaky_relu(x, 0.1),
    "pools": lambda x: F.avg_pool2d(F.max_pool2d(F.relu(x), 2, 1), 2, 1),
    "nothing": lambda x: x,
    "zeros around": lambda x: F.pad(F.relu(x), (0, 1, 0, 1)),
    "dropout": lambda x: F.dropout(F.relu(x), 0.5, False),
}


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("way", PASSING.values(), ids=PASSING.keys())
def test_factors_pass_homogeneous_calls_and_groups(way: Callable[[Tensor], Any], groups: int) -> None:
    x = torch.randn(2, 3, 12, 12)
    net = settled(Between(way, groups), x)
    model = prepared(net, x)
    assert run(equalize, model, x)["second"].note == "with first"
    assert difference(net(x), model(x)) < 1e-5
    gain = rows(model.first) / columns(model.second) if groups == 1 else torch.ones(1)
    assert torch.allclose(gain, torch.ones(()), rtol=1e-3)


STOPPING: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "relu6": (F.relu6, "clips all channels at 6"),
    "gelu": (F.gelu, "gelu lies between"),
    "silu": (F.silu, "silu lies between"),
    "sigmoid": (torch.sigmoid, "sigmoid lies between"),
    "second consumer": (lambda x: (F.relu(x), x.sum()), "sum reads the same tensor"),
    "output": (lambda x: (x.relu(),) * 2, "the caller of the model reads the same tensor"),
    "residual add": (lambda x: x.relu() + x, "which joins several tensors"),
    "transpose": (lambda x: x.relu().flip(1), "flip lies between"),
    "constant border": (lambda x: F.pad(x.relu(), (1, 1), value=3.0), "the model would compute something else"),
}


@pytest.mark.parametrize(("way", "reason"), STOPPING.values(), ids=STOPPING.keys())
def test_pairs_that_factors_would_change_are_refused(way: Callable[[Tensor], Any], reason: str) -> None:
    x = torch.randn(2, 3, 12, 12)
    net = settled(Between(way), x)
    model = prepared(net, x)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert reason in run(equalize, model, x)["second"].skipped
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_norms_without_gamma_and_layers_in_float_are_refused() -> None:
    x = torch.randn(2, 3, 12, 12)
    model = prepared(settled_plain(Between(F.relu, affine=False), x), x)
    assert "has no gamma" in run(equalize, model, x)["second"].skipped
    model = prepared(settled(Between(F.relu), x), x, {**TENSOR, "second.*": "float"})
    assert run(equalize, model, x)["second"].skipped == "the weight of second stays float"


def settled_plain(net: nn.Module, x: Tensor) -> nn.Module:
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None
    net.train()(x)
    return net.eval()


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(5, 5) for _ in range(3))
        self.c.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x).relu()).relu())


def test_shared_weights_and_layers_that_run_twice_are_left_alone() -> None:
    x = torch.randn(8, 5)
    found = run(equalize, prepared(Tied(), x), x)
    assert "a shares a parameter" in found["b"].skipped
    assert "c shares a parameter" in found["c"].skipped
    layer = nn.Linear(5, 5)
    model = prepared(nn.Sequential(layer, nn.ReLU(), layer), x)
    assert "it runs 2 times" in model_reason(run(equalize, model, x))


def model_reason(found: dict[str, Outcome]) -> str:
    return next(outcome.skipped for outcome in found.values())


def test_flattened_channels_fill_neighbouring_features() -> None:
    x = torch.randn(4, 3, 10, 10)
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(96, 5))
    model = prepared(net, x)
    assert run(equalize, model, x)["4"].note == "with 0"
    assert difference(net(x), model(x)) < 1e-5
    by_channel = columns(model[4]).view(6, 16).amax(1)
    assert torch.allclose(by_channel, rows(model[0]), rtol=1e-5)


def test_dead_channels_keep_their_factor_and_silent_ones_stop_to_widen_the_next_layer() -> None:
    net = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3))
    with torch.no_grad():
        net[0].weight[1:3], net[0].bias[1], net[0].bias[2] = 0.0, 0.7, -0.7
        net[2].weight[:, 1:3], net[2].weight[0, 3] = 50.0, 0.0
    x = torch.randn(16, 6)
    model = prepared(net, x)
    run(equalize, model, x)
    assert columns(model[2])[1] == 50.0  # its bias would grow with the factor
    assert columns(model[2])[2] <= columns(model[2])[[0, 3]].max() * 1.001  # a ReLU behind a negative bias gives zeros
    assert difference(net(x), model(x)) < 1e-5


def test_channels_that_nobody_reads_stop_to_widen_the_layer_that_makes_them() -> None:
    net = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3))
    with torch.no_grad():
        net[0].weight[1] *= 100.0
        net[2].weight[:, 1] = 0.0
    x = torch.randn(16, 6)
    model = prepared(net, x)
    run(equalize, model, x)
    assert rows(model[0])[1] <= rows(model[0])[[0, 2, 3]].max() * 1.001
    assert difference(net(x), model(x)) < 1e-5


def shifted(padding: int = 0, relu: nn.Module | None = None) -> Any:
    """Channels that a ReLU never clips: beta far above 3 gamma."""
    torch.manual_seed(1)
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), relu or nn.ReLU(), nn.Conv2d(4, 5, 3, padding=padding)
    net = nn.Sequential(*layers, nn.BatchNorm2d(5))
    x = torch.rand(8, 3, 9, 9)
    net.train()(x)
    with torch.no_grad():
        net[1].weight.copy_(torch.tensor([0.1, -0.1, 0.2, 1.0]))
        net[1].bias.copy_(torch.tensor([5.0, 4.0, 3.0, 0.5]))
        for norm, mean in ((net[1], torch.zeros(4)), (net[4], torch.ones(5))):
            norm.running_mean.copy_(mean)
    return net.eval()


def test_absorption_is_exact_where_the_relu_never_clips() -> None:
    x = torch.rand(4, 3, 9, 9)
    net = shifted()
    model = prepared(net, x)
    spread = model[1].bias - 3 * model[1].weight.abs()
    wanted = net(x)
    found = run(absorb_high_bias, model, x, borders=False)
    assert found["3"].note == "75 % of the channels of 0"
    assert torch.allclose(model[1].bias, net[1].bias - spread.clamp(min=0), atol=1e-6)
    assert difference(wanted, model(x)) < 1e-5


def test_absorption_is_refused_where_the_next_layer_pads_or_has_no_norm_before_it() -> None:
    x = torch.rand(4, 3, 9, 9)
    net = shifted(padding=1)
    model = prepared(net, x)
    assert run(absorb_high_bias, model, x, borders=False)["3"].skipped == "zero padding lies between"
    assert difference(net(x), model(x)) < 1e-5
    run(absorb_high_bias, model, x, borders=True)
    inside = (slice(None), slice(None), slice(1, -1), slice(1, -1))
    assert difference(net(x)[inside], model(x)[inside]) < 1e-5
    assert difference(net(x), model(x)) > 1e-3
    plain = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
    found = run(absorb_high_bias, prepared(plain, torch.rand(2, 3)), torch.rand(2, 3), borders=False)
    assert "0 has no batch norm" in found["2"].skipped
    found = run(absorb_high_bias, prepared(shifted(relu=nn.GELU()), x), x, borders=False)
    assert "gelu" in found["3"].skipped.lower()


def uneven(places: list[tuple[Any, Any, Any]]) -> None:
    """Give the channels between a norm and the next layer very different sizes, but for those without weights."""
    with torch.no_grad():
        for before, norm, after in places:
            alive = (before.weight.flatten(1).norm(dim=1) * norm.weight).abs() > 1e-6
            factor = torch.where(alive, (1.5 * torch.randn(norm.num_features)).exp(), 1.0)
            norm.weight.mul_(factor)
            norm.bias.mul_(factor)
            after.weight.div_(factor.view([-1, 1, 1, 1] if after.groups > 1 else [1, -1, 1, 1]))


def noise(model: nn.Module, x: Tensor, wanted: Tensor) -> float:
    with torch.no_grad():
        return ((model(x) - wanted).norm() / (wanted - wanted.mean(0)).norm()).item()


def test_per_tensor_weights_of_a_badly_scaled_network_recover(tmp_path: Path) -> None:
    x, layers = torch.randn(16, 3, 16, 16), list[nn.Module]()
    for inputs, groups in ((3, 1), (16, 16), (16, 1), (16, 16)):
        layers += [nn.Conv2d(inputs, 16, 3, 1, 1, groups=groups), nn.BatchNorm2d(16), nn.ReLU()]
    net = nn.Sequential(*layers, nn.Conv2d(16, 4, 1))
    settled_plain(net, x)
    uneven([(net[i - 1], net[i], net[i + 2]) for i in (1, 4, 7, 10)])
    with torch.no_grad():
        wanted = net(x)
    errors = []
    for steps in ((), ("cle",)):
        model = prepared(net, x, steps=steps)
        bw.calibrate(model, x.split(8))
        errors.append(noise(model, x, wanted))
    assert errors[1] < 0.2 * errors[0]
    assert [outcome.skipped for outcome in outcomes(model)[1:]] == [""] * 4
    shipped = bw.convert(model)
    with torch.no_grad():
        assert torch.equal(model.eval()(x), shipped(x))
        for kind in (model, shipped):
            bw.save(kind, tmp_path / "saved")
            assert torch.equal(bw.load(tmp_path / "saved", net).eval()(x), kind(x))


def test_factors_of_folded_norms_go_into_gamma_and_beta() -> None:
    x = torch.randn(2, 3, 12, 12)
    model = prepared(settled(Between(F.relu), x), x)
    before = model.norm.weight.clone(), model.norm.bias.clone(), factor_of(model.norm)
    weight, variance = model.first.weight.clone(), model.norm.running_var.clone()
    run(equalize, model, x)
    assert torch.equal(model.first.weight, weight)
    assert torch.equal(model.norm.running_var, variance)
    assert torch.allclose(model.norm.weight / before[0], model.norm.bias / before[1], rtol=1e-4)
    assert torch.allclose((model.norm.weight / before[0]).double(), factor_of(model.norm) / before[2], rtol=1e-4)


def pictures(folder: Path, count: int) -> Tensor:
    """CIFAR-10 images as the person detector takes them: 96x96, values from 0 to 1."""
    with np.load(folder / "cifar10_lossless4k" / "cifar10_lossless_4000.npz") as data:
        pixels = torch.from_numpy(data["x"][:count]).permute(0, 3, 1, 2).float() / 255
    return F.interpolate(pixels, (96, 96), mode="bilinear")


@pytest.mark.slow
@pytest.mark.shared_data
def test_published_mobilenet_with_one_scale_per_weight(shared_data: Path) -> None:
    net = bw.load_weights(MobileNetV1(), shared_data / "mlperf_tiny" / "vww_mobilenetv1_025.pt").eval()
    images = pictures(shared_data, 264)
    calibration, x = images[:64], images[64:]
    with torch.no_grad():
        wanted = net(x)
        model = prepared(net, x[:2])
        equalize(model, [x[:8]], call, {})
        assert difference(wanted[:8], model(x[:8])) < 1e-5
    twin = copy.deepcopy(net)
    parts = [twin.stem, *twin.blocks]
    uneven([(one.conv, one.bn, two.conv) for one, two in itertools.pairwise(parts)])
    found = {}
    for name, start in (("uneven", twin), ("published", net)):
        for steps in ((), ("cle", "bias_correction")):
            model = prepared(start, x[:2], steps=steps)
            bw.calibrate(model, calibration.split(32))
            model.eval()
            with torch.no_grad():
                same = (model(x).argmax(1) == wanted.argmax(1)).float().mean().item()
            found[name, len(steps)] = same, -20 * math.log10(noise(model, x, wanted))
            print(name, steps, f"same {100 * same:.1f} %, {found[name, len(steps)][1]:.1f} dB")
    assert found["published", 2][1] > max(21.0, found["published", 0][1] + 6)
    assert found["published", 2][0] >= 0.98
    assert found["uneven", 0][1] < 3
    assert found["uneven", 2][1] > 20

"""Bytes are those of the file, operations those of the shapes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from bitwright.algorithms.pipeline import calibrate
from bitwright.bench.measure import model_bytes
from bitwright.costs.cost import Cost, Work, layer_cost, plan_bytes, site_bytes, work_of
from bitwright.errors import SearchError
from bitwright.flow.convert import convert
from bitwright.flow.coverage import coverage
from bitwright.flow.prepare import prepare
from bitwright.numerics.qtensor import quantize
from bitwright.numerics.spec import QuantSpec
from bitwright.plan.plan import Plan
from nets import ResNet20

FAST = {"weight": "minmax", "input": "minmax"}
IMAGE = torch.zeros(1, 3, 32, 32)
SPECS = [
    "int2/channel",
    "int3/channel",
    "int5/channel",
    "int8",
    "uint4/channel/asym",
    "int4/group16",
    "int6/group8/asym",
    "ternary/channel",
    "nf4/group16",
    "nf4/group16/scale(int8/group4)",
    "mxfp4",
    "nvfp4",
    "kmeans3/channel",
    "quantile4",
    "fp8_e4m3/channel",
    "fp16",
    "int16/channel",
]


@pytest.mark.parametrize("text", SPECS)
def test_bytes_of_a_weight_are_those_of_its_tensor(text: str) -> None:
    spec, layer = QuantSpec.parse(text), nn.Linear(64, 6)
    packed = quantize(layer.weight, spec)
    assert site_bytes(layer, "weight", spec) == packed.nbytes + (0 if spec.format.is_scaled else 4)


class Mixed(nn.Module):
    """Every kind of stored operand, two of them tied."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.one, self.two = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.two.weight = self.one.weight
        self.lstm, self.attention, self.out = nn.LSTM(8, 8), nn.MultiheadAttention(8, 2), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.lstm(self.two(self.one(self.into(x)).relu()))[0]
        return self.out(self.attention(x, x, x)[0].mean(0))


@pytest.mark.parametrize("preset", ["w8a8", "w4a8", "w4a4", "w4a16", "nf4", "fp16"])
def test_bytes_of_a_plan_are_those_of_the_shipped_model(preset: str) -> None:
    for net, example in ((Mixed(), torch.randn(5, 4, 6)), (ResNet20(), torch.randn(2, 3, 32, 32))):
        plan = Plan.preset(preset, net.eval(), example, observers=FAST)
        prepared = prepare(net, plan)
        calibrate(prepared, [example])
        shipped = convert(prepared)
        assert plan_bytes(net, plan) == model_bytes(shipped) == sum(row.bytes for row in coverage(shipped))


@pytest.mark.parametrize("net", [Mixed(), ResNet20()], ids=["mixed", "resnet"])
def test_a_site_decides_exactly_its_bytes(net: nn.Module) -> None:
    example = torch.randn(5, 4, 6) if isinstance(net, Mixed) else IMAGE
    plan = Plan.preset("w4a8", net, example, observers=FAST)
    before = plan_bytes(net, plan)
    sites = [site for site, spec in plan.sites.items() if spec is not None and site.is_weight and spec.format.bits == 4]
    sites = [site for site in sites if site not in plan.shared]
    assert len(sites) > 3
    for site in sites[:6]:
        module, old = net.get_submodule(site.path), plan.sites[site]
        together = [site, *(s for s, leader in plan.shared.items() if leader == site)]
        for text in ("int2/channel", "int5/channel", "int8"):
            spec = QuantSpec.parse(text)
            changed = replace(plan, sites={**plan.sites, **dict.fromkeys(together, spec)})
            difference = site_bytes(module, site.slot, spec) - site_bytes(module, site.slot, old)
            assert plan_bytes(net, changed) - before == difference, (site, text)


def test_ranges_of_activations_count() -> None:
    plan = Plan.preset("w8a8", nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), torch.zeros(1, 4))
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    sizes = {}
    for text in ("uint8/asym", "int8", "int8/dynamic"):
        sizes[text] = plan_bytes(net, plan.with_sites({"0.input": text})) - site_bytes(
            net[0], "input", QuantSpec.parse(text)
        )
    assert len(set(sizes.values())) == 1


def test_resnet20_has_its_published_number_of_operations() -> None:
    work = work_of(ResNet20(), IMAGE)
    assert (
        sum(layer.macs for layer in work.values()) == 40_551_040
    )  # 40.55 M with the classifier (He 2016: 0.27 M weights)
    assert work["layer2.0.conv1"] == Work(32 * 16 * 9 * 16 * 16, 16 * 32 * 32, 32 * 16 * 16)


def test_grouped_transposed_and_recurrent_layers_are_counted() -> None:
    grouped = nn.Conv2d(8, 16, 3, groups=4)
    assert work_of(grouped, torch.zeros(2, 8, 6, 6))[""].macs == 2 * 16 * 4 * 4 * 2 * 9
    transposed = nn.ConvTranspose2d(4, 6, 3)
    assert work_of(transposed, torch.zeros(1, 4, 5, 5))[""].macs == 4 * 5 * 5 * 6 * 9
    lstm = nn.LSTM(8, 8)
    assert work_of(lstm, torch.zeros(4, 2, 8))[""].macs == 4 * 2 * 32 * 16


def test_a_module_that_runs_twice_adds_up() -> None:
    layer = nn.Linear(4, 4)
    assert work_of(nn.Sequential(layer, layer), torch.zeros(1, 4))["0"] == Work(32, 4, 4)


def test_bit_operations_and_live_bytes() -> None:
    layer, work = nn.Linear(4, 2, bias=False), Work(8, 4, 2)
    cost = layer_cost(layer, work, {"weight": QuantSpec.parse("int4/channel"), "input": QuantSpec.parse("uint8/asym")})
    assert cost == Cost(bytes=2 * 2 + 2 * 4 + 8, bops=8 * 4 * 8, live=4 + 8)
    assert layer_cost(layer, work, {"weight": None, "input": None}).bops == 8 * 32 * 32


def test_costs_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(SearchError, match="latency nan"):
        Cost(latency=float("nan"))

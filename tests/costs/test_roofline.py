"""Rooflines are the slower of two parts; described machines are complete and name their sources."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import bitwright as bw
from bitwright.costs.cost import Work, layer_cost
from bitwright.costs.roofline import get_machine, machine_names
from bitwright.errors import SearchError
from bitwright.harm.sensitivity import Harm, Sensitivity
from bitwright.numerics.spec import QuantSpec
from bitwright.search.mixed import mixture

INT8, INT4, UINT8 = (QuantSpec.parse(text) for text in ("int8/channel", "int4/channel", "uint8/asym"))
FILE = """
name = "mine"
description = "a test"
bandwidth = 1e9
source = "made up"
energy = "45nm"
[[rates]]
weight = ["int*"]
input = ["uint8"]
runs_as = "int8"
peak = 4e9
source = "made up"
"""


@pytest.mark.parametrize("name", machine_names())
def test_described_machines_are_complete(name: str) -> None:
    machine = get_machine(name)
    assert machine.name == name
    assert machine.description
    assert machine.source
    assert all(row.source for row in machine.rates)
    assert machine.energy.source
    for weight in (None, INT4, INT8, QuantSpec.parse("nf4/group64"), QuantSpec.parse("fp16")):
        for input in (None, UINT8):
            assert machine.rate(weight, input).peak > 0
    assert machine.rate(INT8, UINT8).peak >= machine.rate(INT8, None).peak >= machine.rate(None, None).peak


def test_the_machines_that_were_asked_for_are_there() -> None:
    wanted = {"h100", "h200", "a100", "rtx4090", "apple-m1", "raspberry-pi-4", "raspberry-pi-5", "hexagon-npu"}
    assert wanted | {"jetson-agx-orin", "x86-avx512-vnni", "arm-dotprod"} == set(machine_names())


def test_a_layer_takes_as_long_as_the_slower_of_its_parts(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(FILE)
    machine, layer = get_machine(tmp_path / "mine.toml"), nn.Linear(64, 32)
    specs = {"weight": INT8, "input": UINT8}
    one, many = Work(64 * 32, 64, 32), Work(1000 * 64 * 32, 1000 * 64, 1000 * 32)
    moved = 64 * 32 + 4 * 32 + 8 + 64 + 32 * 4  # codes, scales, the input's range, input, output
    assert machine.roofline(layer, one, specs).latency == moved / 1e9
    assert machine.roofline(layer, many, specs).latency == 2 * 1000 * 64 * 32 / 4e9
    joules = 64 * 32 * 0.3e-12 + moved * 160e-12
    assert machine.roofline(layer, one, specs).energy == pytest.approx(joules)


def test_a_format_without_a_kernel_runs_as_another() -> None:
    assert [get_machine(name).rate(INT4, UINT8).runs_as for name in ("h100", "a100", "raspberry-pi-4")] == ["int8"] * 3
    int4 = QuantSpec.parse("uint4/asym")
    assert [get_machine(name).rate(INT4, int4).runs_as for name in ("h100", "a100", "rtx4090")] == [
        "int8",
        "int4",
        "int4",
    ]
    assert get_machine("a100").rate(QuantSpec.parse("nf4/group64"), None).runs_as == "fp16"
    assert get_machine("arm-dotprod").rate(QuantSpec.parse("nf4/group64"), None).runs_as == "fp32"


@pytest.mark.parametrize("name", machine_names())
def test_fewer_bits_take_no_longer_and_no_more_energy(name: str) -> None:
    layer, work = nn.Linear(512, 512), Work(512 * 512, 512, 512)
    costs = [
        get_machine(name).roofline(layer, work, {"weight": QuantSpec.parse(f"int{b}/channel"), "input": UINT8})
        for b in (2, 3, 4, 6, 8)
    ]
    assert [c.latency for c in costs] == sorted(c.latency for c in costs)
    assert [c.energy for c in costs] == sorted(c.energy for c in costs)


def test_decoding_70b_at_four_bits_is_bound_by_the_bandwidth_of_the_card() -> None:
    """52 GB of weights at 1,008 GB/s are 19 tokens per second, whatever the rate of products."""
    features, rows = 16384, 32768
    layer = nn.Linear(features, rows, bias=False, device="meta")
    cost = get_machine("rtx4090").roofline(
        layer, Work(features * rows, features, rows), {"weight": INT4, "input": None}
    )
    stored = layer_cost(layer, Work(0, 0, 0), {"weight": INT4}).bytes
    assert 1 / (cost.latency * 52e9 / stored) == pytest.approx(19.4, rel=0.01)


def test_an_embedding_reads_the_rows_that_are_asked_for() -> None:
    table, machine = nn.Embedding(50_000, 64), get_machine("raspberry-pi-5")
    found = machine.roofline(table, Work(0, 4, 4 * 64), {"weight": INT8})
    assert found.latency == pytest.approx((4 * 64 + 4 * 4 + 4 * 64 * 4) / machine.bandwidth)


def test_a_mixture_on_a_described_machine_has_latency_and_energy() -> None:
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)).eval()
    example = torch.randn(1, 64)
    plan, machine = bw.Plan.preset("w8a8", net, example), get_machine("raspberry-pi-5")
    rows = [Harm(f"{at}.weight", f"int{bits}/channel", 1 / bits, 0.0) for at in (0, 2) for bits in (4, 8)]
    made = mixture(net, plan, example, Sensitivity("kl", "nats", "", "", 2, tuple(rows)), latency=machine)
    everything = made.allocate(bw.Budget())
    whole = {at: {s.slot: spec for s, spec in plan.sites.items() if s.path == at} for at in ("0", "2", "4")}
    works = {"0": Work(4096, 64, 64), "2": Work(4096, 64, 64), "4": Work(512, 64, 8)}
    costs = [machine.roofline(net.get_submodule(at), works[at], specs) for at, specs in whole.items()]
    assert everything.cost.latency == pytest.approx(sum(cost.latency for cost in costs))
    assert everything.cost.energy == pytest.approx(sum(cost.energy for cost in costs))
    less = made.allocate(bw.Budget(energy=everything.cost.energy * 0.9))
    assert sorted(less.sites.values()) == ["int4/channel", "int8/channel"]
    assert less.cost.latency < everything.cost.latency


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("bandwidth = 1e9", ""), "'bandwidth' is missing"),
        (("bandwidth = 1e9", "bandwidth = -1"), "bandwidth must be a positive number, got -1"),
        (("peak = 4e9", 'peak = "fast"'), "peak must be a positive number, got 'fast'"),
        (('energy = "45nm"', 'energy = "7nm"'), "unknown energy model '7nm'; known: 45nm"),
        (('runs_as = "int8"', 'runs_as = "int5"'), "says nothing of int5"),
        (("[[rates]]", "[[rates"), "cannot be read"),
        (('source = "made up"', ""), "'source' is missing"),
    ],
)
def test_a_damaged_description_is_refused(change: tuple[str, str], message: str, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(FILE.replace(*change))
    with pytest.raises(SearchError, match=message):
        get_machine(tmp_path / "mine.toml")


def test_unknown_machines_and_formats_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SearchError, match="unknown machine 'abacus'; known machines: a100, "):
        get_machine("abacus")
    with pytest.raises(SearchError, match="cannot be read"):
        get_machine(tmp_path / "none.toml")
    (tmp_path / "mine.toml").write_text(FILE)
    with pytest.raises(SearchError, match="machine mine has no rate for weight nf4 with input float"):
        get_machine(tmp_path / "mine.toml").rate(QuantSpec.parse("nf4/group64"), None)

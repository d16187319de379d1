"""Targets as data: what the two shipped ones cover, and the error for unknown names."""

from __future__ import annotations

import pytest

from bitwright.errors import PlanError
from bitwright.numerics.formats import FORMATS
from bitwright.numerics.spec import QuantSpec
from bitwright.plan.target import get_target, spelled, target_names


def spec(text: str) -> QuantSpec | None:
    return None if text == "float" else QuantSpec.parse(text)


def test_the_shipped_targets_carry_the_name_of_their_file():
    assert target_names() == ["cpu", "onnxruntime"]
    for name in target_names():
        target = get_target(name)
        assert target.name == name
        assert target.description
        assert {"linear", "conv", "embedding", "add"} <= {row.op for row in target.supports}


def test_an_unknown_target_is_named_with_the_known_ones():
    with pytest.raises(PlanError, match="unknown target 'tpu'; known targets: cpu, onnxruntime"):
        get_target("tpu")
    with pytest.raises(PlanError, match=r"unknown target '\.\./plan'"):
        get_target("../plan")


CPU = {
    ("linear", "int8/channel", "uint8/asym"): True,
    ("linear", "int4/channel", "int8/token/dynamic"): True,
    ("linear", "ternary", "uint2/token/asym/dynamic"): True,
    ("linear", "int4/group128", "float"): True,
    ("linear", "uint4/group32/asym", "float"): True,
    ("linear", "nf4/group64", "float"): True,
    ("linear", "fp16", "float"): True,
    ("linear", "int4/group128", "uint8/asym"): True,
    ("linear", "int4/group32", "int8/token/dynamic"): True,
    ("linear", "ternary/group64", "int8"): True,
    ("linear", "int4/group32/asym", "int8/token/dynamic"): False,
    ("linear", "int4/group32/scale(int8/group32)", "int8/token/dynamic"): False,
    ("linear", "uint8/channel/asym", "uint8/asym"): False,
    ("linear", "int8/channel", "uint8/channel"): False,
    ("linear", "int8/channel", "int8/channel/dynamic"): False,
    ("linear", "int8/channel", "int8/group32/dynamic"): False,
    ("linear", "float", "uint8/asym"): False,
    ("linear", "int8/channel", "fp16"): False,
    ("conv", "int8/channel", "uint8/asym"): True,
    ("conv", "int8/channel", "int8/asym/dynamic"): True,
    ("conv", "int8/channel", "int8/token/dynamic"): False,
    ("conv", "int4/group32", "float"): False,
    ("embedding", "int8/channel", "float"): True,
    ("embedding", "int8/channel", "uint8"): False,
    ("add", "float", "uint8/asym"): True,
    ("add", "float", "uint8/asym/dynamic"): False,
}
ONNXRUNTIME = {
    ("linear", "int8/channel", "uint8/asym"): True,
    ("linear", "int8/channel", "int8"): False,
    ("linear", "int8/channel", "int8/token/dynamic"): False,
    ("linear", "int4/group32", "float"): True,
    ("linear", "int4/group24", "float"): False,
    ("linear", "nf4/group64", "float"): False,
    ("conv", "int8/channel", "uint8/asym"): True,
    ("embedding", "int8/channel", "float"): True,
    ("add", "float", "uint8/asym"): True,
    ("add", "float", "uint4/asym"): False,
}


@pytest.mark.parametrize(("name", "table"), [("cpu", CPU), ("onnxruntime", ONNXRUNTIME)])
def test_what_a_target_covers(name, table):
    target = get_target(name)
    assert {row: target.covers(row[0], spec(row[1]), spec(row[2])) for row in table} == table


@pytest.mark.parametrize("name", ["cpu", "onnxruntime"])
def test_the_message_about_choices_lists_the_rows_of_one_operator(name):
    choices = get_target(name).choices("embedding")
    assert choices.startswith("weight int[2-8]")
    assert choices.endswith("with input float")
    assert get_target(name).choices("linear").count(" with input ") == 2


def test_every_format_can_be_stored_by_the_cpu_target():
    assert all(
        get_target("cpu").covers("linear", spec(f"{name}/channel" if fmt.is_integer else name), None)
        for name, fmt in FORMATS.items()
        if name != "uint1"  # a weight of 0 and 1 only
        and name != "e8m0"  # a format of scales
    )


def test_float_is_spelled_out():
    assert spelled(None) == "float"
    assert spelled(spec("int4/group128")) == "int4/group128"

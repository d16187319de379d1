"""Every check of a plan against model and target, with the words that the user reads."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from bitwright.errors import ModelError, PlanError
from bitwright.plan.plan import Plan, read_spec
from bitwright.plan.site import Site
from bitwright.plan.validate import validate
from models import EmbeddingNet, Mlp, ResidualCnn, image


class Scaled(nn.Linear):
    pass


class Everything(nn.Module):
    """One layer of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.linear = nn.Embedding(10, 96), nn.Linear(96, 96)
        self.conv, self.bn = nn.Conv1d(96, 96, 3, padding=1), nn.BatchNorm1d(96)
        self.scaled, self.norm, self.head = Scaled(96, 96), nn.LayerNorm(96), nn.Linear(96, 2)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.linear(self.embedding(ids))
        x = x + self.bn(self.conv(x.transpose(1, 2))).transpose(1, 2)
        return self.head(self.scaled(self.norm(x)).mean(1))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return Everything()


def hand_made(sites: dict[str, str], *, target: str = "cpu", **rest: object) -> Plan:
    return Plan(target, {Site.parse(site): read_spec(text) for site, text in sites.items()}, **rest)


GOOD = {"linear.weight": "int8/channel", "linear.input": "uint8/asym"}


@pytest.mark.parametrize(
    "sites",
    [
        GOOD,
        {"linear.weight": "int4/group32", "linear.input": "float"},
        {"linear.weight": "int4/group32", "linear.input": "int8/token/dynamic"},
        {"linear.weight": "int4/group32"},  # a site that is not mentioned stays float
        {"embedding.weight": "int8/channel"},
        {"linear.weight": "nf4/group32/scale(int8/group32)"},
        {"embedding.weight": "mxfp4"},
        {"linear.weight": "kmeans4/group32", "conv.weight": "quantile3/channel"},
        {"conv.weight": "ternary", "conv.input": "int8/dynamic"},
        {"add_0.input.0": "uint8/asym", "add_0.input.1": "int8"},
        {**GOOD, "scaled.weight": "float", "scaled.input": "float"},
        {**GOOD, "norm.weight": "float"},
    ],
)
def test_plans_that_can_run_pass(model, sites):
    validate(hand_made(sites), model)


REFUSED = {
    "no such module": (
        {"liner.weight": "int8"},
        r"the plan names liner\.weight, but the model has no module 'liner': .*near names: .*linear\.weight",
    ),
    "no such owner of an add": (
        {"block.add_0.input.0": "uint8", "block.add_0.input.1": "uint8"},
        r"the plan names block\.add_0\.input\.0, but the model has no module 'block'",
    ),
    "an add without a number": (
        {"add_x.input.0": "uint8", "add_x.input.1": "uint8"},
        r"the plan names add_x\.input\.0, but the model has no module 'add_x'",
    ),
    "wrong slot": (
        {**GOOD, "linear.input.0": "uint8"},
        r"linear\.input\.0: linear layers have the sites weight, input; remove this line",
    ),
    "input of an embedding": (
        {"embedding.weight": "int8", "embedding.input": "uint8"},
        r"embedding\.input: embedding layers have the sites weight; remove this line",
    ),
    "half an add": (
        {**GOOD, "add_0.input.0": "uint8/asym"},
        r"add_0: add is quantized on input\.0 and input\.1 or on neither; set them to one of both",
    ),
    "unknown subclass": (
        {"scaled.weight": "int8/channel"},
        r"scaled is Scaled, an unknown subclass of nn\.Linear; register it with bitwright\.register_module or set its",
    ),
    "no quantized form": (
        {"norm.weight": "int8"},
        "norm is LayerNorm, which has no quantized form; remove its sites or set them to 'float'",
    ),
    "dynamic weight": (
        {"linear.weight": "int8/dynamic", "linear.input": "uint8"},
        r"linear\.weight: int8/dynamic is dynamic, but weights are stored; remove /dynamic",
    ),
    "groups of scales that do not divide": (
        {"linear.weight": "nf4/group32/scale(int8/group256)"},
        r"linear\.weight: nf4/group32/scale\(int8/group256\) stores its scales as a row of 288: group256 needs a last "
        r"axis divisible by 256, found shape \[1, 288\]; use channel or one of \[48, 32, 24, 16, 8\] as the group size",
    ),
    "scales of scales": (
        {"linear.weight": "nf4/group32/scale(int8/group32/scale(e8m0))"},
        r"linear\.weight: .* needs scales of scales or a table for them; use e\.g\. scale\(int8/group256\)",
    ),
    "a table for scales": (
        {"linear.weight": "nf4/group32/scale(kmeans4)"},
        r"linear\.weight: .* needs scales of scales or a table for them; use e\.g\. scale\(int8/group256\)",
    ),
    "integers with quantized scales": (
        {"linear.weight": "int4/channel/scale(int8)", "linear.input": "uint8/asym"},
        r"linear: products of integers need float32 scales, found weight int4/channel/scale\(int8\); remove "
        r"/scale\(\.\.\.\) or set linear\.input to 'float'",
    ),
    "integers of 16 bits": (
        {"linear.weight": "int16/channel", "linear.input": "uint8/asym"},
        "target cpu has no linear kernel for weight int16/channel with input uint8/asym",
    ),
    "a fitted table with integer inputs": (
        {"linear.weight": "kmeans4/channel", "linear.input": "uint8/asym"},
        "target cpu has no linear kernel for weight kmeans4/channel with input uint8/asym",
    ),
    "groups of a convolution": (
        {"conv.weight": "int4/group32"},
        r"conv\.weight: int4/group32 groups need a 2-d weight, found \[96, 96, 3\]; use int4/channel",
    ),
    "group that does not divide": (
        {"linear.weight": "int4/group128"},
        r"linear\.weight: group128 needs a last axis divisible by 128, found shape \[96, 96\]; use channel or "
        r"one of \[48, 32, 24, 16, 8\] as the group size, or set the site to 'float'",
    ),
    "pair without a kernel": (
        {"linear.weight": "int4/group32/asym", "linear.input": "uint8/asym"},
        r"linear: target cpu has no linear kernel for weight int4/group32/asym with input uint8/asym; it has weight "
        r"int\[2-8\].* with input int\[2-8\].*; weight int\[2-8\]\*.* with input float",
    ),
    "input alone": (
        {"linear.input": "uint8/asym"},
        "target cpu has no linear kernel for weight float with input uint8/asym; it has",
    ),
    "group inputs": (
        {"linear.weight": "int8/channel", "linear.input": "int8/group32/dynamic"},
        "target cpu has no linear kernel for weight int8/channel with input int8/group32/dynamic",
    ),
    "dynamic add": (
        {"add_0.input.0": "uint8/dynamic", "add_0.input.1": "uint8/dynamic"},
        r"add_0: target cpu has no add kernel for weight float with input uint8/dynamic; it has weight float with",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_run_is_refused_with_the_site_what_was_asked_and_what_to_do(model, name):
    sites, message = REFUSED[name]
    with pytest.raises(PlanError, match=message):
        validate(hand_made(sites), model)


def test_the_target_decides_which_pairs_run(model):
    dynamic = {"linear.weight": "int8/channel", "linear.input": "int8/token/dynamic"}
    validate(hand_made(dynamic), model)
    with pytest.raises(
        PlanError, match="target onnxruntime has no linear kernel for weight int8/channel with input int8/tok"
    ):
        validate(hand_made(dynamic, target="onnxruntime"), model)
    with pytest.raises(PlanError, match="unknown target 'gpu'"):
        validate(hand_made(dynamic, target="gpu"), model)


@pytest.mark.parametrize(("folds", "missing"), [({"linear": "bm"}, "bm"), ({"lin": "bn"}, "lin")])
def test_folds_must_exist(model, folds, missing):
    with pytest.raises(PlanError, match=rf"the plan names \[folds\] .* but the model has no module '{missing}'"):
        validate(hand_made(GOOD, folds=folds), model)


@pytest.mark.parametrize(
    ("observers", "message"),
    [
        (
            {"weight": "mse", "input": "percentil"},
            r"\[observers\] input = 'percentil': unknown observer 'percentil'; known observers: ema, ",
        ),
        ({"weight": "mse", "input": "percentile:7"}, "input = .*: cannot read observer 'percentile:7'"),
        ({"weight": "ema", "input": "mse"}, "unknown weight observer 'ema'; weights know minmax, mse, absmean"),
        (
            {"weight": "mse", "input": "mse", "linear.inputs": "mse"},
            r"'linear.inputs' matches none of the 2 sites; near names: linear.input",
        ),
        (
            {"weight": "mse", "input": "mse", "linear.*": "kl"},
            r"\[observers\] linear.\* = 'kl': unknown weight observer 'kl'; weights know minmax, mse, absmean",
        ),
        (
            {"weight": "mse", "input": "mse", "*.input": "mse:low=1"},
            r"\[observers\] \*.input = 'mse:low=1': cannot read observer 'mse:low=1': the lower end must be finite",
        ),
        ({"weight": "mse", "inputs": "mse"}, "observers are chosen for weight and input, found weight, inputs"),
        ({}, "observers are chosen for weight and input, found none"),
    ],
)
def test_observers_must_be_known_before_anything_is_calibrated(model, observers, message):
    with pytest.raises(PlanError, match=message):
        validate(hand_made(GOOD, observers=observers), model)


def test_an_unknown_observer_is_refused_by_the_preset_already():
    with pytest.raises(PlanError, match="unknown observer 'entropy'"):
        Plan.preset("w8a8", Mlp(), torch.randn(1, 16), observers={"input": "entropy"})
    with pytest.raises(PlanError, match="'activation' matches none of the 6 sites"):
        Plan.preset("w8a8", Mlp(), torch.randn(1, 16), observers={"activation": "mse"})


def test_a_plan_that_quantizes_nothing_is_refused_with_its_reasons():
    with pytest.raises(PlanError, match="nothing was quantized: all 2 sites stay in float") as error:
        Plan.preset("w8a8", nn.Sequential(nn.Linear(4, 4)), torch.randn(1, 4))
    assert "(the classifier stays in float by default)" in str(error.value)
    assert "sites={'*.weight': 'int8/channel', '*.input': 'uint8/asym'}" in str(error.value)
    with pytest.raises(PlanError, match=r"nothing was quantized: all 6 sites .*\(rule '\*'\)"):
        Plan.preset("w8a8", Mlp(), torch.randn(1, 16), sites={"*": "float"})


def test_a_model_without_supported_layers_is_refused_with_what_it_is_made_of():
    model = nn.Sequential(nn.LayerNorm(4), nn.Tanh(), nn.RNN(4, 4))
    with pytest.raises(ModelError, match="nothing to quantize: Sequential has no Linear, Conv1d, Conv2d") as error:
        Plan.preset("w8a8", model, torch.randn(1, 4))
    assert "it is made of LayerNorm, RNN, Tanh" in str(error.value)


def test_a_plan_of_another_model_is_refused():
    plan = Plan.preset("w8a8", ResidualCnn(), image())
    with pytest.raises(PlanError, match=r"the plan names stem\.weight, but the model has no module 'stem'"):
        validate(plan, Mlp())
    with pytest.raises(PlanError, match="the plan names"):
        validate(Plan.preset("w8a8", EmbeddingNet(), torch.zeros(1, 4, dtype=torch.long)), ResidualCnn())


def test_a_plan_still_fits_after_a_round_trip_through_its_file():
    model = ResidualCnn()
    plan = Plan.preset("w4a8", model, image())
    validate(Plan.from_toml(plan.to_toml()), model)
    validate(replace(plan, target="onnxruntime"), model)


def test_a_shared_quantizer_has_one_observer():
    sites = {"linear.weight": "int8/channel", "linear.input": "uint8/asym", "scaled.input": "uint8/asym"}
    shared = {Site("scaled", "input"): Site("linear", "input")}
    plan = hand_made(sites, shared=shared, observers={"weight": "mse", "input": "mse", "scaled.input": "minmax"})
    with pytest.raises(PlanError, match=r"scaled\.input has 'minmax', but it shares the quantizer of linear\.input"):
        validate(plan, Everything())

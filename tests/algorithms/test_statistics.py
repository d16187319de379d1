"""Means and spreads of channels after the steps that repair them; codes that stay; what ships."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bitwright as bw
from bitwright.algorithms.bias import expected_clipped
from bitwright.algorithms.pipeline import outcomes
from bitwright.numerics.affine import encode
from nets import layers_of, one_thread  # noqa: F401

FAST = {"weight": "minmax", "input": "minmax"}  # a search for the range is slow
CODES = {"*.weight": "int4/channel", "*.input": "uint8/asym"}
FLOAT_INPUTS = {"*.weight": "int3/channel", "*.input": "float"}
DYNAMIC = {"*.weight": "int3/channel", "*.input": "uint8/asym/dynamic"}


def net(act: nn.Module | None = None, **norm: Any) -> nn.Sequential:
    """Convolution with norm, depthwise convolution with norm, a plain one, and a linear layer; trained statistics."""
    torch.manual_seed(5)
    act = act or nn.ReLU()
    model = nn.Sequential(
        *(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, **norm), act),
        *(nn.Conv2d(8, 8, 3, groups=8, bias=False), nn.BatchNorm2d(8, **norm), act),
        *(nn.Conv2d(8, 6, 1), act, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)),
    )
    for part in model:
        if isinstance(part, nn.BatchNorm2d):
            part.momentum = None
            if part.affine:
                with torch.no_grad():
                    part.weight.copy_(torch.randn(8))
                    part.bias.copy_(torch.randn(8))
    model.train()(images())
    return model.eval()


def images() -> Tensor:
    return torch.randn(24, 3, 12, 12, generator=torch.Generator().manual_seed(2))


def calibrated(model: nn.Module, steps: tuple[Any, ...], sites: dict[str, str]) -> Any:
    plan = bw.Plan.preset("w8a8", model, images()[:1], sites=sites, steps=steps, observers=FAST)
    prepared = bw.prepare(model, plan)
    bw.calibrate(prepared, images().split(8))
    return prepared.eval()


@torch.no_grad()
def seen(model: nn.Module, path: str) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each output channel of a layer over the calibration images, float64."""
    outs: list[Tensor] = []
    handle = model.get_submodule(path).register_forward_hook(lambda _m, _a, out: outs.append(out.double()))
    for batch in images().split(8):
        model(batch)
    handle.remove()
    rows = torch.cat([out.movedim(1, -1).reshape(-1, out.shape[1]) for out in outs])
    return rows.mean(0), rows.std(0, unbiased=False)


def float_model(model: nn.Module) -> nn.Module:
    """Norms answer for the layers before them, as folded ones do."""
    for i in (0, 3):
        model[i] = nn.Sequential(model[i], model[i + 1])  # type: ignore[index, operator]
        model[i + 1] = nn.Identity()  # type: ignore[index, operator]
    return model


PATHS = ("0", "3", "6", "10")


@pytest.mark.parametrize("sites", [FLOAT_INPUTS, DYNAMIC], ids=["float inputs", "dynamic"])
def test_bias_correction_makes_the_means_of_all_channels_equal(sites: dict[str, str]) -> None:
    model, wanted = calibrated(net(), ("bias_correction",), sites), float_model(net())
    for path in PATHS:
        assert torch.allclose(seen(model, path)[0], seen(wanted, path)[0], rtol=0, atol=1e-6), path


def half_a_step(layer: Any) -> Tensor:
    """What rounding to the grid of the accumulator may move a bias by."""
    return 0.5001 * (layer.input_quantizer.qparams.scale * layer.weight_quantizer.qparams.scale.view(-1)).double()


def test_biases_on_the_grid_leave_less_than_half_a_step_of_the_accumulator() -> None:
    model, wanted = calibrated(net(), ("bias_correction",), CODES), float_model(net())
    for path, layer in layers_of(model).items():
        off = (seen(model, path)[0] - seen(wanted, path)[0]).abs()
        assert (off <= half_a_step(layer) + 1e-6).all(), path
        assert off.max() > 0


def test_reestimated_norms_give_beta_and_gamma_again() -> None:
    plain, model = calibrated(net(), (), CODES), calibrated(net(), ("bn_reestimation",), CODES)
    for path, norm in (("0", model[1]), ("3", model[4])):
        mean, deviation = seen(model, path)
        share = (norm.running_var / (norm.running_var + norm.eps)).sqrt()  # eps stays below the root
        assert ((mean - norm.bias).abs() <= half_a_step(layers_of(model)[path]) + 1e-5).all()
        assert torch.allclose(deviation, (norm.weight.abs() * share).double(), rtol=2e-3)
    before, after = ((seen(one, "3")[0] - one[4].bias).abs().median() for one in (plain, model))
    assert before > 10 * after
    reasons = {outcome.path: outcome.skipped for outcome in outcomes(model)}
    assert reasons == {
        "0": "",
        "3": "",
        "6": "no batch norm is folded into it",
        "10": "no batch norm is folded into it",
    }


def test_repaired_channels_have_the_mean_and_spread_of_the_float_model() -> None:
    model, wanted = calibrated(net(), ("affine_repair",), CODES), float_model(net())
    for path, layer in layers_of(model).items():
        (mean, deviation), (other_mean, other) = seen(model, path), seen(wanted, path)
        assert ((mean - other_mean).abs() <= half_a_step(layer) + 1e-5).all(), path
        assert torch.allclose(deviation, other, rtol=1e-3), path


@pytest.mark.parametrize("step", ["bn_reestimation", "affine_repair"])
def test_codes_stay_and_only_scales_and_biases_move(step: str) -> None:
    plain, model = calibrated(net(), (), CODES), calibrated(net(), (step,), CODES)
    for path, layer in layers_of(model).items():
        before, after = layers_of(plain)[path], layer
        quantizers = before.weight_quantizer, after.weight_quantizer
        codes = [encode(one.folded()[0], q.spec, q.qparams) for one, q in zip((before, after), quantizers, strict=True)]
        if path == "0":  # later layers see other inputs, but weight scales come from weights alone
            assert not torch.equal(before.weight_quantizer.scale, after.weight_quantizer.scale)
        assert torch.equal(*codes), path


def test_dead_and_constant_channels_stay_finite() -> None:
    model = net()
    with torch.no_grad():
        model[1].weight[0] = 0.0
        model[0].weight[1] = 0.0
        model[4].running_var[2] = 1e-12
    for step in ("bn_reestimation", "affine_repair"):
        found = calibrated(model, (step,), CODES)
        assert all(value.isfinite().all() for value in found.state_dict().values())
        before, after = calibrated(model, (), CODES)[0].weight_quantizer.scale, found[0].weight_quantizer.scale
        assert (after / before)[0] == 1.0
        assert 0.499 < (after / before).min() <= (after / before).max() < 2.001


def test_scales_that_cannot_move_are_refused() -> None:
    for step in ("bn_reestimation", "affine_repair"):
        found = outcomes(calibrated(net(), (step,), {"*.weight": "int8", "*.input": "uint8/asym"}))
        assert {outcome.skipped for outcome in found} == {"one scale serves all channels of its weight"}
    grouped = nn.Sequential(nn.Flatten(), nn.Linear(432, 8))
    found = outcomes(calibrated(grouped, ("affine_repair",), {"*.weight": "int4/group16", "*.input": "float"}))
    assert [outcome.skipped for outcome in found] == [""]
    found = outcomes(calibrated(grouped, ("affine_repair",), {"*.weight": "nvfp4", "*.input": "float"}))
    assert "cannot take any value" in found[0].skipped
    found = outcomes(calibrated(net(affine=False), ("affine_repair",), CODES))
    assert {outcome.skipped for outcome in found if outcome.path in "03"} == {"its batch norm has no gamma and beta"}


def test_layers_without_any_bias_keep_none() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(432, 8, bias=False))
    for step in ("bias_correction", "affine_repair"):
        assert outcomes(calibrated(model, (step,), CODES))[0].skipped == "it has no bias"


def test_ranges_follow_the_inputs_that_the_quantized_prefix_makes() -> None:
    sites = {"*.weight": "int2/channel", "*.input": "uint8/asym"}
    plan = bw.Plan.preset("w8a8", net(), images()[:1], sites=sites, steps=["ranges"], observers=FAST)
    model = bw.prepare(net(), plan)
    bw.calibrate(model, images().split(8))
    largest: dict[str, float] = {}
    for path, layer in layers_of(model).items():
        layer.register_forward_pre_hook(lambda _m, args, path=path: largest.update({path: args[0].max().item()}))
    with torch.no_grad():
        model.eval()(images())
    for path in ("3", "6", "10"):
        q = layers_of(model)[path].input_quantizer.qparams
        assert (255 * q.scale).item() == pytest.approx(largest[path], rel=1e-4), path
    assert not any(outcome.skipped for outcome in outcomes(model))
    assert (
        outcomes(calibrated(net(), ("ranges",), DYNAMIC))[0].skipped
        == "its input takes its range from each live tensor"
    )
    assert outcomes(calibrated(net(), ("ranges",), FLOAT_INPUTS))[0].skipped == "its input stays float"


BY_OUTPUT = {"name": "ranges", "by_output": True}


def test_ranges_by_output_end_where_neither_a_narrower_nor_a_wider_one_is_better() -> None:
    coarse = {"*.weight": "int4/channel", "*.input": "uint3/asym"}
    model, wanted = calibrated(net(), (BY_OUTPUT,), coarse), net()(images())
    assert not any(outcome.skipped for outcome in outcomes(model))
    assert all(outcome.after <= outcome.before for outcome in outcomes(model))
    assert any(outcome.after < outcome.before for outcome in outcomes(model))
    quantizer = layers_of(model)["10"].input_quantizer
    found, errors = quantizer.qparams, []
    for factor in (0.95, 1.0, 1 / 0.95):
        quantizer.set_qparams(replace(found, scale=found.scale * factor))
        with torch.no_grad():
            errors.append((model(images()) - wanted).square().sum().item())
    assert errors[1] <= min(errors)


def test_ranges_by_output_leave_shared_ranges_alone() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(12, 4), nn.Linear(12, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.one(x) * self.two(x)

    found = outcomes(calibrated(Twice(), (BY_OUTPUT,), CODES))
    assert [outcome.skipped for outcome in found] == ["2 readers share the range of its input"] * 2


STEPS = ("ranges", "bn_reestimation", "affine_repair", "analytic_bias_correction", "bias_correction")


@pytest.mark.parametrize("step", STEPS)
def test_repaired_models_ship_and_load_as_they_are(step: str, tmp_path: Path) -> None:
    model = calibrated(net(), ("cle", step), CODES)
    shipped = bw.convert(model)
    with torch.no_grad():
        expected = model(images())
        assert torch.equal(shipped(images()), expected)
        for kind in (model, shipped):
            bw.save(kind, tmp_path / "saved")
            assert torch.equal(bw.load(tmp_path / "saved", net()).eval()(images()), expected)


def test_expected_values_behind_activations() -> None:
    assert expected_clipped(torch.tensor(0.3), torch.tensor(0.7)).item() == pytest.approx(0.45452, abs=5e-6)
    assert expected_clipped(torch.tensor([2.0, -2.0, 9.0]), torch.zeros(3), 6.0).tolist() == [2.0, 0.0, 6.0]
    mean, deviation = torch.tensor([0.3, 5.0, 8.0, -1.0]).double(), torch.tensor([0.7, 2.0, 1.5, 3.0]).double()
    drawn = mean + deviation * torch.randn(400_000, 4, dtype=torch.float64)
    for most in (torch.inf, 6.0):
        found = expected_clipped(mean, deviation, most)
        assert torch.allclose(found, drawn.clamp(0, most).mean(0), atol=0.02), most


def normal_net(act: nn.Module) -> nn.Sequential:
    """One norm whose outputs are normal, an activation, and a layer that reads it."""
    torch.manual_seed(7)
    model = nn.Sequential(nn.Linear(40, 16), nn.BatchNorm1d(16), act, nn.Linear(16, 8))
    with torch.no_grad():
        model[1].weight.copy_(torch.rand(16) + 0.5)
        model[1].bias.copy_(torch.randn(16))
        raw = model[0](data())
        model[1].running_mean.copy_(raw.mean(0))
        model[1].running_var.copy_(raw.var(0))
    return model.eval()


def data() -> Tensor:
    return torch.randn(4000, 40, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("act", [nn.ReLU(), nn.ReLU6(), nn.Identity()], ids=["relu", "relu6", "none"])
def test_analytic_correction_removes_most_of_the_mean_error_without_data(act: nn.Module) -> None:
    sites = {"*.weight": "int3/channel", "*.input": "float", "0.weight": "int8/channel"}
    errors = []
    with torch.no_grad():
        for steps in ((), ("analytic_bias_correction",)):
            plan = bw.Plan.preset("w8a8", normal_net(act), data()[:1], sites=sites, steps=steps)
            model = bw.prepare(normal_net(act), plan)
            bw.calibrate(model, [data()[:1]])  # one row: all it shows is the dataflow
            errors.append((model.eval()(data()) - normal_net(act)(data())).mean(0).abs().max().item())
    assert errors[1] < 0.15 * errors[0]
    assert [outcome.skipped for outcome in outcomes(model)] == ["it reads the model's input", ""]


def test_analytic_correction_says_where_the_mean_is_unknown() -> None:
    def reasons(model: nn.Module) -> list[str]:
        return [outcome.skipped for outcome in outcomes(calibrated(model, ("analytic_bias_correction",), CODES))]

    assert "gelu" in reasons(net(nn.GELU()))[1].lower()
    assert reasons(net())[1] == ""
    assert "6 has no batch norm" in reasons(net())[3]
    found = calibrated(net(), ("gptq", "analytic_bias_correction"), CODES)
    assert any("lies on the grid" in outcome.skipped for outcome in outcomes(found))

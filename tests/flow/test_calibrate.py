"""`calibrate` chooses every scale or none."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from bitwright.errors import BitwrightError, CalibrationError
from bitwright.flow.calibrate import calibrate
from bitwright.flow.convert import convert
from bitwright.flow.prepare import prepare
from bitwright.nn.quantizer import Quantizer, Stage
from bitwright.plan.plan import Plan
from models import ControlFlow, EmbeddingNet, Mlp, ResidualCnn, image, with_statistics
from nets import layers_of, one_thread  # noqa: F401


def prepared(net: nn.Module | None = None, preset: str = "w8a8", x: Tensor | None = None, **rules: str) -> nn.Module:
    net = Mlp() if net is None else net
    x = torch.randn(4, 16) if x is None else x
    return prepare(net, Plan.preset(preset, net, x, **rules))  # type: ignore[arg-type]


def stages(model: nn.Module) -> set[Stage]:
    return {module.stage for module in model.modules() if isinstance(module, Quantizer)}


def test_every_scale_is_chosen_and_every_mode_restored() -> None:
    net = with_statistics(ResidualCnn())
    model = prepared(net, x=image())
    model.layers[1].train()
    model.bn.eval()
    modes = [module.training for module in model.modules()]
    statistics = model.bn.running_mean.clone()
    calibrate(model, [image(4), image(3)])
    assert stages(model) == {Stage.SIMULATE}
    assert all((q.scale != 1).all() for q in model.modules() if isinstance(q, Quantizer))
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(model.bn.running_mean, statistics)
    assert not any(len(module._forward_hooks) for module in model.modules())
    assert not any(q.scale.requires_grad for q in model.modules() if isinstance(q, Quantizer))


def test_ranges_cover_all_batches_whatever_their_order() -> None:
    batches = [torch.randn(4, 16) * scale for scale in (1, 5, 0.1)]
    scales = []
    for order in (batches, batches[::-1]):
        torch.manual_seed(1)
        model = prepared(observers={"input": "minmax"})
        calibrate(model, order)
        scales.append(model[0].input_quantizer.scale.item())
    assert scales[0] == scales[1]
    joined = torch.cat(batches)
    assert scales[0] == pytest.approx((joined.max() - joined.min()).item() / 255)


def test_every_site_may_have_its_own_observer() -> None:
    net = nn.Sequential(nn.Linear(16, 8), nn.Sigmoid(), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8), nn.Linear(8, 2))
    observers = {"input": "minmax", "2.input": "fixed:0,1", "4.input": "mse:low=-0.169971", "2.weight": "minmax"}
    model, x = prepared(net, observers=observers), torch.randn(64, 16)
    calibrate(model, [x])
    scales = [model[i].input_quantizer.scale.item() for i in (0, 2)]
    assert scales == pytest.approx([(x.max() - x.min()).item() / 255, 1 / 255])
    low = model[4].input_quantizer.qparams
    assert (-low.zero_point * low.scale).item() == pytest.approx(-0.169971, abs=low.scale.item())
    widest = net[2].weight.abs().amax(1, keepdim=True) / 127
    assert torch.equal(model[2].weight_quantizer.scale, widest)
    assert not torch.equal(model[0].weight_quantizer.scale, net[0].weight.abs().amax(1, keepdim=True) / 127)
    wrong = prepared(net, observers={"0.input": "fixed:0,1"})
    with pytest.raises(CalibrationError, match=r"^0\.input: observer fixed:0,1 fixes an end that the data passes"):
        calibrate(wrong, [x])


def test_batches_may_be_tensors_tuples_dicts_or_anything_with_a_forward() -> None:
    x = torch.randn(4, 16)
    results = []
    for batches, forward in (
        ([x], None),
        (iter([x]), None),
        ([(x,)], None),
        ([{"input": x}], None),
        ([(x, torch.zeros(4))], lambda model, batch: model(batch[0])),
    ):
        torch.manual_seed(1)
        model = prepared(x=torch.zeros(1, 16))
        calibrate(model, batches, **({} if forward is None else {"forward": forward}))
        results.append(model[2].input_quantizer.scale.item())
    assert len(set(results)) == 1


def test_plans_without_static_inputs_need_no_batches() -> None:
    for preset in ("w8a8-dynamic", "w4a16"):
        model = prepared(preset=preset)
        calibrate(model)
        assert stages(model) == {Stage.SIMULATE}
        convert(model)


class Stop(Exception):
    pass


def failing(error: BaseException) -> Iterator[Tensor]:
    yield torch.randn(4, 16)
    raise error


@pytest.mark.parametrize("error", [Stop("no more"), KeyboardInterrupt()], ids=["exception", "interrupt"])
@pytest.mark.parametrize("first", [True, False])
def test_a_failure_between_batches_leaves_the_model_in_float(error: BaseException, first: bool) -> None:
    net, x = Mlp(), torch.randn(3, 16)
    model = prepared(net)
    if not first:
        calibrate(model, [x])
    with pytest.raises(type(error)):
        calibrate(model, failing(error))
    assert stages(model) == {Stage.FLOAT}
    assert torch.equal(model(x), net(x))
    assert all(q.observer is None for q in model.modules() if isinstance(q, Quantizer))
    assert not any(len(module._forward_hooks) for module in model.modules())
    calibrate(model, [x])
    assert stages(model) == {Stage.SIMULATE}


@pytest.mark.parametrize("error", [Stop("no more"), KeyboardInterrupt()], ids=["exception", "interrupt"])
def test_a_failure_inside_the_model_leaves_it_in_float(error: BaseException) -> None:
    class Fragile(nn.Module):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            if self.calls == 3:  # the first call records
                raise error
            return x.relu()

    net = nn.Sequential(nn.Linear(16, 8), Fragile(), nn.Linear(8, 8), nn.Linear(8, 2))
    model = prepared(net)
    model.train()
    with pytest.raises(type(error)):
        calibrate(model, [torch.randn(4, 16)] * 3)
    assert stages(model) == {Stage.FLOAT}
    assert model.training
    assert torch.is_grad_enabled()


BAD_BATCHES = {
    "no batch": ([], r"got no batches, but 2 activations have static ranges \(0\.input first\); pass at least one"),
    "nan": (
        [torch.randn(4, 16), torch.full((4, 16), torch.nan)],
        r"batch 1: 0\.input: 64 of 64 .* clean the calibration",
    ),
    "inf": ([torch.full((1, 16), torch.inf)], r"batch 0: 0\.input: 16 of 16 calibration values are NaN or infinite"),
    "shape": ([torch.randn(4, 15)], r"batch 0 with shapes \[\[4, 15\]\] does not fit the model: mat1 and mat2"),
    "label": (
        [(torch.randn(4, 16), torch.zeros(4))],
        r"batch 0 with shapes \[\[4, 16\], \[4\]\] .* pass forward=lambda",
    ),
    "keyword": (
        [{"images": torch.randn(4, 16)}],
        r"batch 0 with shapes \[\[4, 16\]\] does not fit .* unexpected keyword",
    ),
    "type": ([["a", "b"]], r"batch 0 with shapes \[\] does not fit the model"),
    "empty": ([torch.zeros(0, 16)], r"0\.input: this observer saw no values; give calibration at least one"),
}


@pytest.mark.parametrize("kind", BAD_BATCHES)
def test_bad_calibration_data_is_explained(kind: str) -> None:
    batches, message = BAD_BATCHES[kind]
    model = prepared()
    with pytest.raises(CalibrationError, match=message):
        calibrate(model, batches)
    assert stages(model) == {Stage.FLOAT}


def test_an_overflow_inside_the_model_names_the_site_that_saw_it() -> None:
    net = Mlp()
    with torch.no_grad():
        net[0].bias[0] = torch.inf
    with pytest.raises(
        CalibrationError, match=r"batch 0: 2\.input: 4 of 128 .* find the layer before it that overflows"
    ):
        calibrate(prepared(net), [torch.randn(4, 16)])


def test_indices_out_of_range_are_explained() -> None:
    net = EmbeddingNet()
    with pytest.raises(CalibrationError, match=r"batch 0 with shapes \[\[1, 2\]\] does not fit the model: index out"):
        calibrate(prepared(net, x=torch.randint(20, (2, 6))), [torch.tensor([[1, 20]])])


def test_a_branch_that_no_batch_reached_is_named() -> None:
    net = ControlFlow()
    up, down = torch.rand(4, 8), -torch.rand(4, 8)
    model = prepared(net, x=up)
    with pytest.raises(CalibrationError, match=r"1 of 3 quantized modules never ran during calibration: negative; add"):
        calibrate(model, [up])
    assert stages(model) == {Stage.FLOAT}
    calibrate(model, [up, down])
    shipped = convert(model)
    for x in (up, down):
        assert torch.equal(shipped(x), model.eval()(x))
        assert (shipped(x) - net(x)).abs().max() < 0.05
    dynamic = prepared(net, "w8a8-dynamic", up)
    calibrate(dynamic)
    assert (convert(dynamic)(down) - net(down)).abs().max() < 0.05


def test_calibrating_again_replaces_the_ranges() -> None:
    x = torch.randn(4, 16)
    model = prepared(observers={"input": "minmax"})
    calibrate(model, [x])
    before = model[0].input_quantizer.scale.item()
    calibrate(model, [10 * x])
    assert model[0].input_quantizer.scale.item() == pytest.approx(10 * before)
    assert layers_of(model)["0"].weight_quantizer.stage is Stage.SIMULATE


def test_what_is_not_a_prepared_model_is_refused() -> None:
    x = torch.randn(4, 16)
    with pytest.raises(
        BitwrightError, match=r"Mlp was not prepared by bitwright; call bitwright\.prepare\(model, plan\)"
    ):
        calibrate(Mlp(), [x])
    model = prepared()
    calibrate(model, [x])
    with pytest.raises(CalibrationError, match="no simulated layers: it was converted already"):
        calibrate(convert(model), [x])

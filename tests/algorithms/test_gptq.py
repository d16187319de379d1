"""GPTQ: the sweep against its definition, what it stores, and that it is never worse than rounding to nearest."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import bitwright as bw
from bitwright.algorithms.gptq import factor, solve
from bitwright.algorithms.grid import Grid
from bitwright.algorithms.layers import Layer, NotApplicableError, rows_of
from bitwright.algorithms.lockstep import Call, Visit
from bitwright.algorithms.moments import Moments, errors, moments
from bitwright.algorithms.pipeline import LAYER, outcomes
from bitwright.errors import PlanError
from bitwright.nn.layer import QLayer
from bitwright.nn.quantizer import Quantizer
from bitwright.numerics.affine import encode
from bitwright.numerics.spec import QParams, QuantSpec
from bitwright.plan.step import METHODS, Step
from nets import layer_plan, one_thread  # noqa: F401

SPECS = (
    "int4/channel",
    "int3",
    "uint4/channel/asym",
    "uint3/group4/asym",
    "int4/group8",
    "nf4/group4/scale(int8/group4)",
    "mxfp4",
    "kmeans3/channel",
    "kmeans2/group8",
    "ternary/channel",
    "binary/channel",
    "fp8_e4m3/channel",
)
DEFAULTS = METHODS["gptq"].options


def quantizer_of(weight: Tensor, spec: str) -> Quantizer:
    quantizer = Quantizer("weight", QuantSpec.parse(spec), tuple(weight.shape), "minmax")
    quantizer.fit(weight)
    return quantizer


def qparams_of(layer: Layer) -> QParams:
    qparams = layer.quantizer.qparams
    assert qparams is not None
    return qparams


def rounded(weight: Tensor, spec: str, moment: Tensor, damping: float = 0.01, *, act_order: bool = False) -> Tensor:
    """What the sweep makes of ``weight [o, k]`` for ``E[x x^T]`` ``[k, k]``."""
    grid = Grid.of(quantizer_of(weight, spec), weight, 1)
    return solve(Moments(moment.double()[None].clone()), weight[None], grid, damping, act_order=act_order)[0]


def correlated(count: int) -> Tensor:
    """The moment of rows whose singular values lie between 1 and 1e-2, evenly in their logarithm."""
    basis = torch.linalg.qr(torch.randn(count, count, dtype=torch.float64)).Q
    return (basis * torch.logspace(0, -4, count, dtype=torch.float64)) @ basis.T


def visited(layer: nn.Module, weight: str, inputs: list[Tensor], input: str | None = "uint8/asym") -> Layer:
    """A calibrated layer with a call per input, alike in the float model."""
    model = bw.prepare(layer, layer_plan(layer, weight, input))
    with torch.no_grad():
        outputs = [model(x) for x in inputs]
    bw.calibrate(model, inputs)
    assert isinstance(model, QLayer)
    calls = [Call((x,), {}, (x,), {}, out) for x, out in zip(inputs, outputs, strict=True)]
    return Layer(Visit("", model.eval(), calls, 0, 1), model)


def mixed(*shape: int) -> Tensor:
    """Activations whose features depend on each other, as behind a layer and a ReLU."""
    x = torch.randn(shape)
    mixer = torch.randn(shape[1], shape[1]) * torch.linspace(1.0, 0.1, shape[1])
    return torch.einsum("nc...,dc->nd...", x, mixer).relu()


@pytest.mark.parametrize("spec", [spec for spec in SPECS if spec != "mxfp4"])
@pytest.mark.parametrize("act_order", [False, True])
def test_independent_inputs_are_rounded_to_nearest(spec: str, act_order: bool) -> None:
    weight = torch.randn(6, 16)
    found = rounded(weight, spec, torch.rand(16).diag(), act_order=act_order)
    assert torch.equal(found, quantizer_of(weight, spec).simulate(weight))


def test_correlated_inputs_trade_the_weights_error_for_the_outputs() -> None:
    weight, moment = torch.randn(32, 64), correlated(64)
    nearest = quantizer_of(weight, "int4/channel").simulate(weight)
    found = rounded(weight, "int4/channel", moment)
    error = [((change := found - weight).double() @ moment * change).sum() for found in (found, nearest)]
    assert error[0] < 0.3 * error[1]
    assert (found - weight).square().sum() > 1.8 * (nearest - weight).square().sum()


def test_the_first_column_is_rounded_to_nearest() -> None:
    weight, moment = torch.randn(8, 20), correlated(20)
    nearest = quantizer_of(weight, "int3/channel").simulate(weight)
    assert torch.equal(rounded(weight, "int3/channel", moment)[:, 0], nearest[:, 0])
    first = int(moment.diagonal().argmax())
    assert torch.equal(rounded(weight, "int3/channel", moment, act_order=True)[:, first], nearest[:, first])


def test_two_columns_by_hand() -> None:
    weight, moment = torch.tensor([[0.4, 7.0]]), torch.tensor([[1.0, 0.6], [0.6, 1.0]])
    # the first becomes 0, and the second makes up for 0.4 * 0.6 / 1.0 of it: 7.24 stays 7, 6.8 + 0.24 becomes 7
    assert rounded(weight, "int4/channel", moment, 0.0).tolist() == [[0.0, 7.0]]
    grid = Grid.of(quantizer_of(weight, "int4/channel"), weight, 1)
    found = solve(Moments(moment.double()[None].clone()), torch.tensor([[[0.4, 6.3]]]), grid, 0.0)
    assert found.tolist() == [[[0.0, 7.0]]]


@pytest.mark.parametrize("count", [130, 300])
def test_blocks_of_columns_change_nothing(count: int) -> None:
    weight, moment = torch.randn(3, count), correlated(count)
    damped = moment + 0.01 * moment.diagonal().mean() * torch.eye(count)
    upper = torch.linalg.cholesky(damped.inverse()).mT
    left, grid = weight.double(), Grid.of(quantizer_of(weight, "int4/channel"), weight, 1)
    expected = torch.empty_like(weight)
    for i in range(count):  # Frantar 2023, section 3.3, without blocks
        expected[:, i] = grid.nearest(left[None, :, i].float(), i)[0]
        error = (left[:, i] - expected[:, i]) / upper[i, i]
        left[:, i:] -= error[:, None] * upper[i, i:]
    found = rounded(weight, "int4/channel", moment)
    assert (found == expected).float().mean() > 0.99  # float32 against float64: an error near a tie moves all behind it


def test_falling_diagonals_make_the_order_that_of_the_columns() -> None:
    root = torch.linspace(2.0, 1.0, 24).diag()
    moment = root @ (torch.eye(24) + 0.3) @ root
    weight = torch.randn(5, 24)
    assert torch.equal(*(rounded(weight, "int4/group8", moment, act_order=order) for order in (False, True)))


@pytest.mark.parametrize("count", [12, 300])
def test_the_factor_is_that_of_the_damped_moment(count: int) -> None:
    moment = torch.stack([correlated(count), 7 * correlated(count)])
    damped = torch.stack([m + 0.1 * m.diagonal().mean() * torch.eye(count) for m in moment])
    lower = factor(moment, 0.1)
    assert lower is moment
    assert torch.equal(lower, lower.tril())
    torch.testing.assert_close(lower @ lower.mT, damped)


def test_damping_grows_until_the_factor_exists() -> None:
    x = torch.randn(3, 300, dtype=torch.float64)
    moment = torch.stack([x.T @ x / 3, torch.eye(300).double(), torch.zeros(300, 300).double()])
    lower = factor(moment.clone(), 0.0)
    share = (lower[0] @ lower[0].mT - moment[0]).diagonal().mean() / moment[0].diagonal().mean()
    assert 0.99e-8 <= share <= 1e-5  # the first share that is tried, as rounded here
    torch.testing.assert_close(lower[0] @ lower[0].mT, moment[0] + share * moment[0].diagonal().mean() * torch.eye(300))
    assert torch.equal(lower[1], torch.eye(300))
    assert torch.equal(lower[2], torch.eye(300))


def test_columns_that_no_row_uses_are_rounded_to_nearest_and_change_no_other() -> None:
    weight, moment = torch.randn(4, 12), correlated(12)
    moment[5], moment[:, 5] = 0.0, 0.0
    alive = torch.arange(12) != 5
    found = rounded(weight, "int4", moment)
    nearest = quantizer_of(weight, "int4").simulate(weight)
    assert torch.equal(found[:, 5], nearest[:, 5])
    damping = 0.01 * 11 / 12  # of the mean without that column, the same amount
    grid = Grid.of(quantizer_of(weight, "int4"), weight[:, alive], 1)
    alone = solve(Moments(moment[alive][:, alive][None].clone()), weight[:, alive][None], grid, damping)[0]
    assert torch.equal(found[:, alive], alone)


@pytest.mark.parametrize("drift", [False, True])
def test_errors_are_those_of_the_examples_kept_apart(drift: bool) -> None:
    conv = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2)
    x, wanted = torch.randn(12, 4, 9, 7), torch.randn(12, 4, 9, 7)
    module = visited(conv, "int4/channel", [x], None).module
    layer = Layer(Visit("", module, [Call((x,), {}, (wanted,), {}, conv(wanted).detach())], 0, 1), module)
    found = [conv.weight.detach() + 0.1 * torch.randn(6, 2, 3, 3) for _ in range(2)]
    for weight, error in zip(found, errors(layer, found, drift=drift), strict=True):
        target = nn.functional.conv2d(wanted if drift else x, conv.weight, None, 2, 1, 1, 2)
        noise = (target - nn.functional.conv2d(x, weight, None, 2, 1, 1, 2))[[4, 9]]
        torch.testing.assert_close(error.float(), noise.square().sum((0, 2, 3)))


def test_the_shift_of_the_target_is_the_product_with_the_drift_of_the_inputs() -> None:
    x, wanted = torch.randn(10, 7), torch.randn(10, 7)
    module = visited(nn.Linear(7, 3), "int4/channel", [x], None).module
    layer = Layer(Visit("", module, [Call((x,), {}, (wanted,), {}, torch.zeros(10, 3))], 0, 1), module)
    fit = torch.arange(10) % 5 != 4
    found = moments(layer, drift=True)
    assert found.shift is not None
    drift = (wanted - x)[fit].T.double() @ x[fit].double() / 8
    torch.testing.assert_close(found.shift[0], layer.weight.double() @ drift, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.inputs[0], x[fit].T.double() @ x[fit].double() / 8)


def test_large_moments_are_summed_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    x = mixed(1200, 300)
    layer = visited(nn.Linear(300, 4), "int4/channel", [x], None)
    exact = moments(layer, drift=True).inputs
    monkeypatch.setattr("bitwright.algorithms.moments._LARGE", 0)
    found = moments(layer, drift=True)
    assert found.shift is not None
    assert (exact.dtype, found.inputs.dtype, found.shift.dtype) == (torch.float64, torch.float32, torch.float32)
    assert torch.equal(exact, exact.mT)
    assert torch.equal(found.inputs, found.inputs.mT)
    torch.testing.assert_close(found.inputs.double(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("few", [False, True])
def test_every_fifth_example_is_kept_apart(few: bool) -> None:
    inputs = [mixed(2, 3, 6, 6)] if few else [mixed(4, 3, 6, 6), mixed(9, 3, 6, 6)]
    conv = nn.Conv2d(3, 2, 3, stride=2, padding=1, bias=False)
    layer = visited(conv, "int4/channel", inputs, None)
    rows = torch.cat([nn.functional.unfold(x, 3, 1, 1, 2).mT for x in inputs]).double()
    apart = torch.arange(rows.shape[1] * len(rows) if few else len(rows)) % 5 == 4
    rows = rows.flatten(0, 1) if few else rows
    part = rows[~apart].reshape(-1, 27)
    torch.testing.assert_close(moments(layer, drift=False).inputs[0], part.T @ part / len(part))
    [found] = errors(layer, [torch.zeros_like(layer.weight)], drift=False)
    outputs = rows[apart].reshape(-1, 27) @ layer.weight.double().flatten(1).T
    torch.testing.assert_close(found, outputs.square().sum(0), rtol=1e-5, atol=0.0)


def test_rows_beyond_the_limit_are_thinned_out(monkeypatch: pytest.MonkeyPatch) -> None:
    x = mixed(400, 6)
    layer = visited(nn.Linear(6, 4), "int4/channel", [x], None)
    monkeypatch.setattr("bitwright.algorithms.moments.ROWS", 150)
    part = x[torch.arange(400) % 5 != 4][::3]
    torch.testing.assert_close(moments(layer, drift=False).inputs[0].float(), part.T @ part / len(part))


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(4, 8, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2), groups=2),
        nn.Conv2d(4, 4, 3, padding="same", padding_mode="reflect", groups=4),
        nn.Conv1d(4, 6, 3, stride=2, padding=2, groups=2),
    ],
)
def test_rows_times_weights_is_what_a_convolution_computes(conv: nn.Conv1d | nn.Conv2d) -> None:
    x = torch.randn(3, 4, 9, 7) if isinstance(conv, nn.Conv2d) else torch.randn(3, 4, 9)
    layer = visited(conv, "int4/channel", [x], None)
    rows = rows_of(layer.module, x)
    weight = conv.weight.view(conv.groups, -1, rows.shape[2])
    assert conv.bias is not None
    out = (rows @ weight.mT).transpose(0, 1).flatten(1) + conv.bias
    expected = conv(x).movedim(1, -1).flatten(0, -2)
    torch.testing.assert_close(out, expected)
    at = torch.tensor([0, 7, 3])
    assert torch.equal(rows_of(layer.module, x, at), rows[:, at])


def test_a_grouped_convolution_is_a_linear_layer_per_group() -> None:
    x = mixed(300, 24, 1, 1)
    conv = nn.Conv2d(24, 8, 1, groups=2, bias=False)
    grouped = visited(conv, "int3/channel", [x], None)
    LAYER["gptq"](grouped, DEFAULTS)
    for part in range(2):
        linear = nn.Linear(12, 4, bias=False)
        linear.weight = nn.Parameter(conv.weight[4 * part : 4 * part + 4, :, 0, 0].detach().clone())
        alone = visited(linear, "int3/channel", [x[:, 12 * part : 12 * part + 12, 0, 0].contiguous()], None)
        LAYER["gptq"](alone, DEFAULTS)
        assert torch.equal(grouped.weight[4 * part : 4 * part + 4, :, 0, 0], alone.weight)


def test_a_weight_stored_as_in_times_out_is_treated_as_its_transpose() -> None:
    x = mixed(200, 12)
    linear = nn.Linear(12, 6)
    plain = visited(linear, "int3/channel", [x], None)
    turned = pytest.importorskip("transformers.pytorch_utils").Conv1D(6, 12)
    turned.load_state_dict({"weight": linear.weight.detach().t().contiguous(), "bias": linear.bias.detach()})
    layer = visited(turned, "int3/channel", [x], None)
    for either in (plain, layer):
        LAYER["gptq"](either, DEFAULTS)
    assert torch.equal(layer.weight, plain.weight)
    assert torch.equal(layer.module.weight.t(), plain.weight)


class Net(nn.Module):
    """Convolutions of every kind whose rows are built, two of them with a batch norm, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = nn.Conv2d(3, 8, 3, padding=1)
        self.grouped = nn.Conv2d(8, 12, 3, stride=2, padding=1, groups=2, bias=False)
        self.norm = nn.BatchNorm2d(12)
        self.depthwise = nn.Conv2d(12, 12, 3, padding=1, groups=12, bias=False)
        self.norm2 = nn.BatchNorm2d(12)
        self.flat = nn.Conv1d(12, 8, 2)
        self.linear = nn.Linear(8, 32)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.grouped(self.plain(x).relu())).relu()
        x = self.norm2(self.depthwise(x)).relu()
        return self.linear(self.flat(x.flatten(2)).relu().mean(2))


def net() -> Net:
    out = Net()
    for norm in (out.norm, out.norm2):
        norm.load_state_dict(
            {**norm.state_dict(), "running_mean": torch.randn(12), "running_var": torch.rand(12) + 0.5}
        )
        nn.init.normal_(norm.weight)
    with torch.no_grad():
        out.norm.weight[3] = 0.0
    return out.eval()


@pytest.mark.parametrize("weight", ["int4/channel", "int3", "uint4/channel/asym", "kmeans2/channel", "binary/channel"])
def test_every_layer_improves_and_ships_the_codes_that_were_chosen(weight: str) -> None:
    model, batches = net(), [mixed(8, 3, 8, 8) for _ in range(3)]
    integer = weight.startswith("int")  # the products of others are computed in float
    sites = {"*.weight": weight, "*.input": "uint8/asym" if integer else "float", "linear.*": "float"}
    plan = bw.Plan.preset("w4a8", model, batches[0], sites=sites, steps=["gptq"])
    prepared = bw.prepare(model, plan)
    bw.calibrate(prepared, batches)
    found = {outcome.path: outcome for outcome in outcomes(prepared)}
    assert set(found) == {"plain", "grouped", "depthwise", "flat"}
    assert all(o.skipped or (o.after or 0.0) < (o.before or 0.0) for o in found.values())
    assert not found["grouped"].skipped
    shipped, simulated = bw.convert(prepared)(batches[0]), prepared(batches[0])
    assert torch.equal(shipped, simulated) if integer else torch.allclose(shipped, simulated, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("spec", [*SPECS[:-1], "fp16"])
def test_the_codes_of_a_layer_are_those_that_the_sweep_chose(spec: str) -> None:
    torch.manual_seed(1)
    linear, x = nn.Linear(32, 12), mixed(600, 32)
    layer = visited(linear, spec, [x], "uint8/asym" if spec in ("int4/channel", "int3") else None)
    weight, qparams = layer.weight.clone(), qparams_of(layer)
    fit = moments(layer, drift=False)
    options = {**DEFAULTS, "match_float": False}
    found = solve(fit, weight[None], Grid.of(layer.quantizer, weight, 1), 0.01, act_order=bool(options["act_order"]))
    nearest = layer.quantizer.simulate(weight)
    wrong = errors(layer, [found[0], nearest], drift=False)
    better = wrong[0] < wrong[1]
    assert better.any()
    before = layer.error()
    LAYER["gptq"](layer, options)
    assert layer.error() < before
    chosen = torch.where(better.view(-1, 1), found[0], nearest)
    codes = encode(layer.weight, layer.quantizer.spec, qparams)
    assert torch.equal(codes, encode(chosen, layer.quantizer.spec, qparams))
    assert torch.equal(layer.quantizer.simulate(layer.weight), chosen)


def test_matching_the_float_model_makes_up_for_what_the_prefix_does_to_the_inputs() -> None:
    wanted = mixed(500, 16)
    x = 0.8 * wanted
    errors = []
    for match_float in (False, True):
        torch.manual_seed(5)
        layer = visited(nn.Linear(16, 8), "int4/channel", [x], None)
        module = layer.module
        call = Call((x,), {}, (wanted,), {}, nn.functional.linear(wanted, module.weight, module.bias).detach())
        layer = Layer(Visit("", module, [call], 0, 1), module)
        LAYER["gptq"](layer, {**DEFAULTS, "match_float": match_float})
        errors.append(layer.error())
    assert errors[1] < 0.5 * errors[0]


def test_scales_of_groups_follow_the_weights_that_are_left() -> None:
    x = mixed(400, 48)
    layer = visited(nn.Linear(48, 8), "uint3/group16/asym", [x], None)
    scale = qparams_of(layer).scale.clone()
    weight = layer.weight.clone()
    before = layer.error()
    LAYER["gptq"](layer, {**DEFAULTS, "act_order": False, "rescale": True, "match_float": False})
    assert layer.error() < before
    found = qparams_of(layer).scale
    assert torch.equal(found[:, 0], scale[:, 0])  # nothing has changed these columns yet
    assert not torch.equal(found[:, 1:], scale[:, 1:])
    assert torch.equal(layer.quantizer.simulate(layer.weight), layer.weight)
    assert not torch.equal(layer.weight, weight)


@pytest.mark.parametrize(
    ("options", "spec", "reason"),
    [
        ({"rescale": True, "act_order": True}, "int4/group8", "set act_order to false"),
        ({"rescale": True, "act_order": False}, "int4/channel", "found int4/channel"),
        ({"rescale": True, "act_order": False}, "mxfp4", "groups with float scales"),
    ],
)
def test_options_that_do_not_fit_say_so(options: dict[str, bool], spec: str, reason: str) -> None:
    layer = visited(nn.Linear(32, 4), spec, [mixed(50, 32)], None)
    with pytest.raises(NotApplicableError, match=reason):
        LAYER["gptq"](layer, {**DEFAULTS, **options})


@pytest.mark.parametrize("damping", [-0.1, float("nan"), float("inf")])
def test_a_damping_below_nothing_is_an_error(damping: float) -> None:
    layer = visited(nn.Linear(8, 4), "int4/channel", [mixed(50, 8)], None)
    with pytest.raises(PlanError, match="damping must be a number of at least 0"):
        LAYER["gptq"](layer, Step("gptq", {"damping": damping}).settings)


@pytest.mark.parametrize("layer", [nn.Conv3d(2, 2, 2), nn.ConvTranspose2d(2, 2, 2)])
def test_layers_whose_rows_are_not_built_are_reported(layer: nn.Conv3d | nn.ConvTranspose2d) -> None:
    x = torch.rand(6, 2, *[4] * (layer.weight.dim() - 2))
    model = nn.Sequential(layer)
    plan = bw.Plan.preset("w8a8", model, x, steps=["gptq"])
    prepared = bw.prepare(model, plan)
    bw.calibrate(prepared, [x])
    (outcome,) = outcomes(prepared)
    assert "are not built" in outcome.skipped


def test_inputs_that_are_not_finite_are_reported() -> None:
    x = mixed(50, 8)
    layer = visited(nn.Linear(8, 4), "int4/channel", [x], None)
    x[3, 2] = torch.inf
    with pytest.raises(NotApplicableError, match="not finite"):
        LAYER["gptq"](layer, DEFAULTS)


@pytest.mark.parametrize("rescale", [False, True])
def test_output_channels_are_swept_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch, rescale: bool) -> None:
    x = mixed(400, 48)
    weights = []
    for part in (2**22, 3 * 48):
        monkeypatch.setattr("bitwright.algorithms.gptq._PART", part)
        torch.manual_seed(3)
        layer = visited(nn.Linear(48, 8), "uint3/group16/asym", [x], None)
        LAYER["gptq"](layer, {**DEFAULTS, "act_order": not rescale, "rescale": rescale})
        weights.append(layer.weight.clone())
    torch.testing.assert_close(*weights)


@pytest.mark.parametrize(("most", "inputs", "shift"), [(100, "float32", "float64"), (1200, "float64", "float32")])
def test_sums_of_two_precisions_go_together(
    monkeypatch: pytest.MonkeyPatch, most: int, inputs: str, shift: str
) -> None:
    wanted, linear = mixed(400, 30), nn.Linear(30, 3 if inputs == "float32" else 60)
    weights = []
    for limit in (2**22, most):
        monkeypatch.setattr("bitwright.algorithms.moments._LARGE", limit)
        model = visited(linear, "int4/channel", [wanted], None).module
        call = Call((0.9 * wanted,), {}, (wanted,), {}, model(wanted).detach())
        layer = Layer(Visit("", model, [call], 0, 1), model)
        found = moments(layer, drift=True)
        LAYER["gptq"](layer, DEFAULTS)
        weights.append(layer.weight.clone())
    assert found.shift is not None
    assert (str(found.inputs.dtype), str(found.shift.dtype)) == (f"torch.{inputs}", f"torch.{shift}")
    assert not torch.equal(weights[1], linear.weight)
    assert (weights[0] == weights[1]).float().mean() > 0.95


@pytest.mark.parametrize("rows", [1, 4, 30])
@pytest.mark.parametrize("constant", [False, True])
def test_little_data_does_no_harm(rows: int, constant: bool) -> None:
    x = torch.ones(rows, 40) if constant else mixed(rows, 40)
    layer = visited(nn.Linear(40, 16), "int3/channel", [x], None)
    weight, nearest = layer.weight.clone(), layer.quantizer.simulate(layer.weight)
    LAYER["gptq"](layer, {**DEFAULTS, "match_float": False})
    written = layer.weight.clone()
    layer.module.weight.data = weight  # errors are judged against the float weight
    wrong = errors(layer, [written, nearest], drift=False)
    assert (wrong[0] <= wrong[1]).all()
    assert wrong[0].sum() < 0.9 * wrong[1].sum()


def test_inputs_that_tell_nothing_change_nothing() -> None:
    layer = visited(nn.Linear(8, 4), "int4/channel", [torch.zeros(20, 8)], None)
    weight = layer.weight.clone()
    with pytest.raises(NotApplicableError, match="rounding to nearest is as good"):
        LAYER["gptq"](layer, DEFAULTS)
    assert torch.equal(layer.weight, weight)

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils._pytree import tree_leaves

from bitwright.errors import CalibrationError, KernelError, ModelError
from bitwright.flow.calibrate import calibrate
from bitwright.flow.prepare import prepare
from bitwright.nn.quantizer import Quantizer, Stage
from bitwright.nn.recurrent import QGRU, QLSTM
from bitwright.plan.plan import Plan
from nets import calibrated, layer_plan

CLASSES = {"LSTM": nn.LSTM, "GRU": nn.GRU}
VARIANTS: dict[str, dict[str, Any]] = {
    "one layer": {},
    "two layers": {"num_layers": 2},
    "bidirectional": {"bidirectional": True},
    "two layers, bidirectional, batch first": {"num_layers": 2, "bidirectional": True, "batch_first": True},
    "no bias": {"bias": False, "num_layers": 2},
}


def ragged() -> PackedSequence:
    """Four sequences of 6, 3, 3 and 1 steps, in an order that packing has to sort."""
    return pack_sequence([torch.randn(n, 5) for n in (3, 6, 1, 3)], enforce_sorted=False)


def set_stage(model: nn.Module, stage: Stage) -> None:
    for module in model.modules():
        if isinstance(module, Quantizer):
            module.stage = stage


def close(found: Any, expected: Any) -> None:
    pairs = list(zip(tree_leaves(found), tree_leaves(expected), strict=True))
    assert pairs
    for left, right in pairs:
        assert left.shape == right.shape
        torch.testing.assert_close(left, right, rtol=0, atol=1e-6)


def simulated(layer: nn.Module, weight: str, input: str, *batches: Any) -> Any:
    return calibrated(layer, layer_plan(layer, weight, input), list(batches))


@pytest.mark.parametrize("stage", [Stage.FLOAT, Stage.OBSERVE])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", CLASSES)
def test_without_quantizers_it_is_the_float_layer(kind: str, variant: str, stage: Stage) -> None:
    layer = CLASSES[kind](5, 7, **VARIANTS[variant])
    quantized = prepare(layer, layer_plan(layer, "int8/channel", "uint8/asym"))
    assert type(quantized) is {"LSTM": QLSTM, "GRU": QGRU}[kind]
    set_stage(quantized, stage)
    x, packed = torch.randn(4, 4, 5), ragged()
    count = layer.num_layers * (2 if layer.bidirectional else 1)
    h = torch.randn(count, 4, 7)
    state = (h, torch.randn(count, 4, 7)) if kind == "LSTM" else h
    one = (h[:, 0], state[1][:, 0]) if kind == "LSTM" else h[:, 0]
    for args in ((x,), (x, state), (packed,), (packed, state), (x[0],), (x[0], one), (x[:1, :1],)):
        if stage is Stage.OBSERVE or len(args[0]) != 1:
            close(quantized(*args), layer(*args))


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")  # the float layer's own
@pytest.mark.parametrize("extra", [{}, {"num_layers": 2, "bidirectional": True}])
def test_projections_are_products_too(extra: dict[str, Any]) -> None:
    layer = nn.LSTM(5, 7, proj_size=3, **extra)
    quantized = prepare(layer, layer_plan(layer, "int8/channel", "uint8/asym"))
    set_stage(quantized, Stage.OBSERVE)
    count = layer.num_layers * (2 if layer.bidirectional else 1)
    state = torch.randn(count, 4, 3), torch.randn(count, 4, 7)
    for args in ((torch.randn(6, 4, 5), state), (ragged(), state)):
        close(quantized(*args), layer(*args))
    assert isinstance(quantized.weight_hr_l0_quantizer, Quantizer)
    assert isinstance(quantized.projected_l0_quantizer, Quantizer)


def test_dropout_lies_between_layers_in_training_only() -> None:
    layer = nn.LSTM(5, 7, num_layers=2, dropout=1.0)
    x = torch.randn(6, 4, 5)
    quantized = prepare(layer, layer_plan(layer, "int8/channel", "uint8/asym"))
    set_stage(quantized, Stage.OBSERVE)
    close(quantized.train()(x), layer.train()(x))  # a dropout of 1 is no random number
    close(quantized.eval()(x), layer.eval()(x))
    assert not torch.equal(layer.eval()(x)[0], layer.train()(x)[0])


def test_parameters_and_keys_stay() -> None:
    layer = nn.GRU(5, 7, num_layers=2, bidirectional=True)
    names = list(layer.state_dict())
    quantized = prepare(layer, layer_plan(layer, "int4/channel", "uint8/asym"), inplace=True)
    assert quantized is layer
    assert [name for name in quantized.state_dict() if "quantizer" not in name] == names
    assert isinstance(quantized, nn.GRU)
    sites = [f"{kind}_l{n}{end}" for n in (0, 1) for end in ("", "_reverse") for kind in ("input", "hidden")]
    assert {site for site in sites if isinstance(getattr(quantized, f"{site}_quantizer"), Quantizer)} == set(sites)


@pytest.mark.parametrize("start", [0.01, 2.0])
@pytest.mark.parametrize("kind", CLASSES)
def test_calibration_sees_every_hidden_state_that_is_multiplied(kind: str, start: float) -> None:
    layer = CLASSES[kind](5, 7, bidirectional=True)
    packed, h = ragged(), start * torch.randn(2, 4, 7)
    state = (h, torch.randn(2, 4, 7)) if kind == "LSTM" else h
    quantized = simulated(layer, "int8/channel", "int8", (packed, state))
    out, last = layer(packed, state)
    data = out.data[:, :7]
    assert len(data) > len(h[0])
    ends = {tuple(row.tolist()) for row in (last[0] if kind == "LSTM" else last)[0]}
    multiplied = [row for row in data if tuple(row.tolist()) not in ends] + [*h[0]]  # the last ones feed nothing
    expected = torch.stack(multiplied).abs().max() / 127
    torch.testing.assert_close(quantized.hidden_l0_quantizer.scale, expected.view(1), rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", CLASSES)
def test_a_state_that_is_passed_on_continues_the_sequence(kind: str) -> None:
    x = torch.randn(9, 4, 5)
    quantized = simulated(CLASSES[kind](5, 7, num_layers=2), "int4/channel", "uint8/asym", x)
    whole, last = quantized(x)
    first, state = quantized(x[:4])
    second, end = quantized(x[4:], state)
    assert torch.equal(torch.cat([first, second]), whole)
    assert all(torch.equal(a, b) for a, b in zip(tree_leaves(end), tree_leaves(last), strict=True))


@pytest.mark.parametrize("input", ["uint8/asym", "int8/token/dynamic"])
@pytest.mark.parametrize("kind", CLASSES)
def test_constant_input_reaches_the_fixed_point_of_the_float_layer(kind: str, input: str) -> None:
    layer = CLASSES[kind](5, 16)
    x = torch.randn(1, 3, 5).expand(300, 3, 5).contiguous()
    quantized = simulated(layer, "int8/channel", input, x)
    state = 0.5 * torch.randn(1, 3, 16)
    start = (state, state) if kind == "LSTM" else state
    with torch.no_grad():
        out, other, expected = quantized(x)[0], quantized(x, start)[0], layer(x)[0]
    step = 2 / 255  # of a hidden state in (-1, 1): codes may go on toggling between neighbours
    assert (out[-1] - out[-20:]).abs().max() < step / 4
    assert (out[-1] - other[-1]).abs().max() < step / 4
    assert (out[-1] - expected[-1]).abs().max() < 2 * step


@pytest.mark.parametrize("kind", CLASSES)
def test_the_error_does_not_grow_with_the_length(kind: str) -> None:
    layer = CLASSES[kind](5, 16)
    x = torch.randn(800, 8, 5)
    quantized = simulated(layer, "int8/channel", "uint8/asym", x)
    with torch.no_grad():
        error = (quantized(x)[0] - layer(x)[0]).abs().amax((1, 2))
    assert 0 < error[:100].max() < 0.05
    assert error[700:].max() < 2 * error[:100].max()


class Unrolled:
    """Two steps of a recurrent layer in float64, with the formulas of LSQ written out."""

    def __init__(self, layer: Any) -> None:
        self.leaves = {name: p.detach().double().requires_grad_() for name, p in layer.named_parameters()}
        self.layer = layer

    def encoded(self, slot: str, x: Tensor, count: int) -> Tensor:
        """``s * rint(clip(x / s))``; gradient to s: ``rint(v) - v`` inside, the bound outside, times the gain."""
        quantizer: Quantizer = getattr(self.layer, f"{slot}_quantizer")
        fmt, scale = quantizer.spec.format, self.leaves[f"{slot}_quantizer.scale"]
        gain = (count * fmt.qmax) ** -0.5
        scale = scale * gain + (scale - scale * gain).detach()
        shift = torch.zeros(1).double() if quantizer.zero_point is None else quantizer.zero_point.double()
        clipped = torch.clamp(x / scale, fmt.qmin - shift, fmt.qmax - shift)
        return (clipped + (clipped.round() - clipped).detach()) * scale

    def forward(self, x: Tensor) -> Tensor:
        p, size, (steps, batch, features) = self.leaves, self.layer.hidden_size, x.shape
        w_ih = self.encoded("weight_ih_l0", p["weight_ih_l0"], features)
        w_hh = self.encoded("weight_hh_l0", p["weight_hh_l0"], size)
        h = c = torch.zeros(batch, size, dtype=torch.float64)
        outs = []
        for step in x:
            inner = self.encoded("input_l0", step, steps * features) @ w_ih.T + p["bias_ih_l0"]
            outer = self.encoded("hidden_l0", h, steps * size) @ w_hh.T + p["bias_hh_l0"]
            if isinstance(self.layer, nn.LSTM):
                i, f, g, o = (inner + outer).chunk(4, 1)
                c = f.sigmoid() * c + i.sigmoid() * g.tanh()
                h = o.sigmoid() * c.tanh()
            else:
                r, z = (inner + outer)[:, : 2 * size].sigmoid().chunk(2, 1)
                n = (inner[:, 2 * size :] + r * outer[:, 2 * size :]).tanh()
                h = (1 - z) * n + z * h
            outs.append(h)
        return torch.stack(outs)


@pytest.mark.parametrize("input", ["int8", "uint4/asym"])
@pytest.mark.parametrize("kind", CLASSES)
def test_gradients_through_two_steps_are_those_of_the_unrolled_formulas(kind: str, input: str) -> None:
    torch.manual_seed(3)
    x, goal = torch.randn(2, 3, 5), torch.randn(2, 3, 4)
    quantized = simulated(CLASSES[kind](5, 4), "int4/channel", input, x)
    for name, parameter in quantized.named_parameters():
        parameter.requires_grad_()
        if name.endswith("scale"):
            parameter.data *= 0.9  # some values are clipped
    given = x.clone().requires_grad_()
    (quantized(given)[0] * goal).sum().backward()
    unrolled, expected = Unrolled(quantized), x.double().requires_grad_()
    out = unrolled.forward(expected)
    (out * goal).sum().backward()
    torch.testing.assert_close(quantized(x)[0].double(), out, rtol=0, atol=1e-6)
    torch.testing.assert_close(given.grad, expected.grad.float(), rtol=1e-4, atol=1e-6)  # type: ignore[union-attr]
    for name, parameter in quantized.named_parameters():
        found, wanted = parameter.grad, unrolled.leaves[name].grad
        assert found is not None, name
        assert wanted is not None, name
        assert found.abs().max() > 0, name
        torch.testing.assert_close(found, wanted.float(), rtol=1e-4, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")


def test_the_biases_of_the_new_gate_are_not_merged() -> None:
    layer, x = nn.GRU(5, 7), torch.randn(6, 4, 5)
    quantized = simulated(layer, "int8/channel", "uint8/asym", x)
    before = quantized(x)[0]
    with torch.no_grad():
        layer_bias = quantized.bias_hh_l0
        layer_bias[14:] += 1.0
        quantized.bias_ih_l0[14:] -= 1.0
    assert (quantized(x)[0] - before).abs().max() > 0.05


def test_a_range_that_follows_the_data_stays_one_range_within_a_sequence() -> None:
    layer, x = nn.LSTM(5, 7, num_layers=2), torch.randn(6, 4, 5)
    plan = replace(layer_plan(layer, "int8/channel", "uint8/asym"), ranges={"weight": "lsq", "input": "ema"})
    quantized = calibrated(layer, plan, [x])
    with torch.no_grad():
        expected = quantized.eval()(3 * x)[0]
        before = {site: getattr(quantized, f"{site}_quantizer").scale.clone() for site in ("input_l0", "hidden_l1")}
        assert torch.equal(quantized.train()(3 * x)[0], expected)
    assert all(not torch.equal(getattr(quantized, f"{site}_quantizer").scale, old) for site, old in before.items())


def test_each_weight_is_encoded_once_per_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(6, 4, 5)
    quantized = simulated(nn.LSTM(5, 7, num_layers=2), "int8/channel", "uint8/asym", x)
    sites: list[str] = []
    forward: Callable[..., Any] = Quantizer.forward

    def counted(self: Quantizer, x: Tensor) -> Any:
        sites.append(self.site)
        return forward(self, x)

    monkeypatch.setattr(Quantizer, "forward", counted)
    quantized(x)
    assert sorted(site for site in sites if "weight" in site) == [
        "weight_hh_l0", "weight_hh_l1", "weight_ih_l0", "weight_ih_l1",
    ]  # fmt: skip


def test_autocast_leaves_integer_products_and_states_in_float32() -> None:
    x = torch.randn(6, 4, 5)
    quantized = simulated(nn.LSTM(5, 7), "int8/channel", "uint8/asym", x)
    expected = quantized(x)
    with torch.autocast("cpu", torch.bfloat16):
        found = quantized(x)
        assert quantized(x.bfloat16())[0].dtype is torch.float32
    for a, b in zip(tree_leaves(found), tree_leaves(expected), strict=True):
        assert torch.equal(a, b)


def test_shapes_that_do_not_fit_are_named() -> None:
    x = torch.randn(6, 4, 5)
    quantized = simulated(nn.LSTM(5, 7), "int8/channel", "uint8/asym", x)
    with pytest.raises(KernelError, match=r"this LSTM takes sequences .* with 5 features, got \[6, 4, 9\]"):
        quantized(torch.randn(6, 4, 9))
    with pytest.raises(KernelError, match=r"takes 2-d \(unbatched\) or 3-d inputs, got a tensor of \[5\]"):
        quantized(torch.randn(5))
    with pytest.raises(KernelError, match=r"at least one step"):
        quantized(torch.randn(0, 4, 5))
    with pytest.raises(KernelError, match=r"takes states of \[\[1, 4, 7\], \[1, 4, 7\]\], got \[\[1, 3, 7\], "):
        quantized(x, (torch.zeros(1, 3, 7), torch.zeros(1, 4, 7)))
    with pytest.raises(KernelError, match=r"takes states of .*, got \[\[1, 4, 7\]\]"):
        quantized(x, torch.zeros(1, 4, 7))


def test_bad_calibration_data_names_the_site() -> None:
    layer, x = nn.LSTM(5, 7), torch.randn(6, 4, 5)
    x[2, 1, 0] = torch.nan
    prepared = prepare(layer, layer_plan(layer, "int8/channel", "uint8/asym"))
    with pytest.raises(CalibrationError, match=r"input_l0: 1 of 120 calibration values are NaN"):
        calibrate(prepared, [x])


def test_a_subclass_is_not_quantized_by_guessing() -> None:
    class Peephole(nn.LSTM):
        pass

    model = nn.ModuleDict({"rnn": Peephole(5, 7)})
    model.forward = lambda x: model["rnn"](x)[0]  # type: ignore[method-assign]
    with pytest.raises(ModelError, match=r"rnn is Peephole, a subclass of nn.LSTM"):
        Plan.preset("w8a8", model, torch.randn(6, 4, 5))

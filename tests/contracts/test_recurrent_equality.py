"""Contracts C1 and C2 for recurrent layers: the codes of training are the stored ones, whole sequences bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils._pytree import tree_leaves

from bitwright.errors import PlanError
from bitwright.flow.checkpoint import load, save
from bitwright.flow.convert import convert
from bitwright.flow.coverage import coverage
from bitwright.lowbit.layer import LowbitLayer
from bitwright.lowbit.recurrent import LowbitGRU, LowbitLSTM
from bitwright.nn.recurrent import QRecurrent
from bitwright.numerics.affine import encode
from bitwright.numerics.spec import QuantSpec
from bitwright.plan.plan import Plan
from bitwright.plan.site import Site
from bitwright.train.schedule import Schedule
from nets import FEATURES, calibrated, layer_plan

CLASSES = {"LSTM": nn.LSTM, "GRU": nn.GRU}
SHAPES: dict[str, dict[str, Any]] = {
    "one layer": {},
    "no bias, batch first": {"bias": False, "batch_first": True},
    "two layers, bidirectional, dropout": {"num_layers": 2, "bidirectional": True, "dropout": 0.3},
}
SPECS = [
    ("int8/channel", "uint8/asym"),
    ("int8", "int8/token/dynamic"),
    ("int4/channel", "int8"),
    ("int4/channel", "int8/dynamic"),
    ("int4/channel", "uint4/asym"),
    ("ternary/channel", "uint8/asym/dynamic"),
    ("int4/group4", None),
    ("nf4/channel", None),
]


def ragged(features: int = 8) -> PackedSequence:
    return pack_sequence([torch.randn(n, features) for n in (3, 6, 1, 3)], enforce_sorted=False)


def stepped(simulated: nn.Module, batches: list[Any], steps: int = 6) -> nn.Module:
    """The model after a few optimizer steps through all phases, in eval mode."""
    schedule = Schedule(steps=steps, lr=1.0)
    optimizer = schedule.optimizer(simulated)
    for step in range(steps):
        simulated.train()
        schedule.apply(simulated, step, optimizer)
        optimizer.zero_grad()
        outs = [leaf for leaf in tree_leaves(simulated(batches[step % len(batches)])) if leaf.is_floating_point()]
        sum((out - 0.1).square().mean() for out in outs).backward()  # type: ignore[union-attr]
        optimizer.step()
    return simulated.eval()


def state_of(layer: Any, batch: int) -> Any:
    count, hidden = layer.num_layers * (2 if layer.bidirectional else 1), layer.proj_size or layer.hidden_size
    h = torch.randn(count, batch, hidden)
    return (h, torch.randn(count, batch, layer.hidden_size)) if layer.mode == "LSTM" else h


@torch.no_grad()
def unequal(simulated: nn.Module, inputs: list[tuple[Any, ...]]) -> list[tuple[str, int]]:
    """Kernels and inputs for which the shipped outputs or final states are not those of the simulation, bit for bit."""
    found = []
    for name, features in FEATURES.items():
        shipped = convert(simulated, features=features)
        assert isinstance(shipped, (LowbitLSTM, LowbitGRU))
        for number, args in enumerate(inputs):
            pairs = list(zip(tree_leaves(simulated(*args)), tree_leaves(shipped(*args)), strict=True))
            assert len(pairs) >= 2
            assert all(a.isfinite().all() for a, _ in pairs)
            if not all(torch.equal(a, b) for a, b in pairs):
                found.append((name, number))
    return found


@pytest.mark.parametrize(("weight", "input"), SPECS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", CLASSES)
def test_trained_layer_equals_shipped(kind: str, shape: str, weight: str, input: str | None) -> None:
    layer = CLASSES[kind](8, 12, **SHAPES[shape])
    x, packed = torch.randn(6, 4, 8), ragged()
    simulated = stepped(calibrated(layer, layer_plan(layer, weight, input), [x, packed]), [x, packed])
    state = state_of(layer, 4)
    start = state_of(layer, 6 if layer.batch_first else 4)
    inputs = [(x,), (3 * x, start), (packed,), (packed, state), (x[0],), (x[:1, :1],), (x.double(),)]
    assert unequal(simulated, inputs) == []


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
def test_trained_projections_equal_shipped() -> None:
    layer, x = nn.LSTM(8, 12, 2, proj_size=5, bidirectional=True), torch.randn(6, 4, 8)
    simulated = stepped(calibrated(layer, layer_plan(layer, "int4/channel", "uint8/asym"), [x]), [x])
    assert unequal(simulated, [(x,), (ragged(), state_of(layer, 4))]) == []


def test_sums_beyond_float32_integers_equal_shipped() -> None:
    layer, x = nn.LSTM(700, 600), torch.randn(3, 2, 700)
    simulated = calibrated(layer, layer_plan(layer, "int8/channel", "uint8/asym"), [x])
    assert unequal(simulated, [(x,), (3 * x,)]) == []


class Tagger(nn.Module):
    """Word tags from a packed bidirectional LSTM and a GRU."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.lstm = nn.LSTM(8, 12, batch_first=True, bidirectional=True)
        self.gru = nn.GRU(24, 16, batch_first=True)
        self.head = nn.Linear(16, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.gru(self.lstm(self.embed(ids))[0])[0])


@pytest.mark.parametrize("preset", ["w8a8", "w8a8-dynamic", "w4a8", "w4a4", "w4a16"])
def test_trained_model_equals_shipped_saved_and_loaded(preset: str, tmp_path: Path) -> None:
    net, ids = Tagger(), torch.randint(0, 20, (4, 7))
    simulated = stepped(calibrated(net, Plan.preset(preset, net, ids), [ids]), [ids])
    shipped = convert(simulated)
    with torch.no_grad():
        expected = simulated(ids)
        assert torch.equal(shipped(ids), expected)
        for name, model in (("prepared", simulated), ("converted", shipped)):
            save(model, tmp_path / name)
            assert torch.equal(load(tmp_path / name, Tagger()).eval()(ids), expected), name


def test_stored_codes_are_those_of_training() -> None:
    net, ids = Tagger(), torch.randint(0, 20, (4, 7))
    simulated = stepped(calibrated(net, Plan.preset("w4a8", net, ids), [ids]), [ids])
    shipped, compared = convert(simulated), 0
    for path, layer in simulated.named_modules():
        if isinstance(layer, QRecurrent):
            for slot, weight in layer.quantized_weights().items():
                part, quantizer = shipped.get_submodule(f"{path}.{slot}"), layer.quantizer(slot)
                assert isinstance(part, LowbitLayer)
                assert quantizer is not None
                codes = encode(weight, quantizer.spec, quantizer.qparams)  # type: ignore[arg-type]
                assert torch.equal(part.weight.codes.float(), codes)
                compared += 1
    assert compared == 6


def test_every_weight_and_bias_is_covered_and_no_float_weight_is_left() -> None:
    net, ids = Tagger(), torch.randint(0, 20, (4, 7))
    rules = {"gru.weight_hh_l0": "float", "gru.hidden_l0": "float"}
    plan = Plan.preset("w8a8", net, ids, sites=rules)
    shipped = convert(calibrated(net, plan, [ids]))
    rows = {row.path: row for row in coverage(shipped)}
    assert set(rows) == set(net.state_dict())
    assert {path for path, row in rows.items() if row.format == "int8/channel"} == {
        "embed.weight", "gru.weight_ih_l0",
        *(f"lstm.weight_{kind}_l0{end}" for kind in ("ih", "hh") for end in ("", "_reverse")),
    }  # fmt: skip
    assert rows["gru.weight_hh_l0"].format == "float"
    assert rows["gru.weight_hh_l0"].why == "rule 'gru.weight_hh_l0'"
    assert rows["lstm.weight_hh_l0_reverse"].why == "preset w8a8"
    assert rows["lstm.weight_hh_l0_reverse"].input == "uint8/asym"
    assert rows["lstm.weight_hh_l0_reverse"].elements == 48 * 12
    assert rows["lstm.bias_ih_l0_reverse"].why == "biases stay float"
    assert rows["lstm.bias_ih_l0_reverse"].bytes == 4 * 48
    stored = {id(t): t for _, t in (*shipped.named_parameters(), *shipped.named_buffers())}.values()
    wide = [t for t in stored if t.is_floating_point() and t.dim() == 2 and min(t.shape) > 1]
    assert {tuple(t.shape) for t in wide} == {(48, 16), (4, 16)}  # what the rule and the classifier keep in float
    with torch.no_grad():
        assert torch.equal(shipped(ids), calibrated(net, plan, [ids])(ids))


def test_modules_without_a_quantized_form_say_so() -> None:
    class Cells(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.lstm, self.gru = nn.Linear(8, 8), nn.LSTMCell(8, 8), nn.GRUCell(8, 8)
            self.rnn, self.head = nn.RNN(8, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.gru(self.lstm(self.first(x))[0])
            return self.head(self.rnn(hidden)[0])

    net, x = Cells(), torch.randn(3, 8)
    rows = {row.path: row.why for row in coverage(convert(calibrated(net, "w8a8", [x])))}
    for path, kind in (("lstm.weight_hh", "LSTMCell"), ("gru.bias_ih", "GRUCell"), ("rnn.weight_hh_l0", "RNN")):
        assert rows[path] == f"{kind} has no quantized form"


def test_first_layer_keeps_eight_bits_only_where_it_sees_the_input() -> None:
    net, x = nn.LSTM(8, 12, 2), torch.randn(6, 4, 8)
    plan = Plan.preset("w4a4", net, x)
    specs = {str(site): str(spec) for site, spec in plan.sites.items()}
    assert specs == {
        "weight_ih_l0": "int8/channel", "input_l0": "uint8/asym",
        "weight_hh_l0": "int4/channel", "hidden_l0": "uint4/asym",
        "weight_ih_l1": "int4/channel", "input_l1": "uint4/asym",
        "weight_hh_l1": "int4/channel", "hidden_l1": "uint4/asym",
    }  # fmt: skip
    assert "raw input" in plan.why[Site("", "weight_ih_l0")]


def test_layers_behind_a_recurrent_one_do_not_see_the_raw_input() -> None:
    class Stack(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.fc, self.head = nn.RNN(8, 8), nn.Linear(8, 8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.fc(self.rnn(x)[0]).relu())

    net = Stack()
    assert Plan.preset("w4a4", net, torch.randn(6, 4, 8)).sites[Site("fc", "weight")] == QuantSpec.parse("int4/channel")


def test_a_weight_that_the_model_reads_itself_keeps_the_layer_in_float() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.lstm = nn.Linear(8, 8), nn.LSTM(8, 12)

        def forward(self, x: Tensor) -> Tensor:
            return self.lstm(self.first(x))[0] @ self.lstm.get_parameter("weight_ih_l0")[:12]

    plan = Plan.preset("w8a8", Tied(), torch.randn(6, 4, 8))
    assert plan.sites[Site("lstm", "weight_hh_l0")] is None
    assert "behind the module's back" in plan.why[Site("lstm", "weight_hh_l0")]


def test_a_target_without_a_form_for_recurrent_layers_keeps_them_in_float() -> None:
    net, ids = Tagger(), torch.randint(0, 20, (4, 7))
    plan = Plan.preset("w8a8", net, ids, target="onnxruntime", sites={"head.weight": "int8/channel"})
    assert plan.sites[Site("lstm", "weight_hh_l0")] is None
    assert plan.why[Site("gru", "hidden_l0")] == "target onnxruntime has no form for recurrent layers"
    with pytest.raises(PlanError, match=r"gru: target onnxruntime has no form for recurrent layers; set the sites of"):
        Plan.preset("w8a8", net, ids, target="onnxruntime", sites={"gru.weight_hh_l0": "int8/channel"})

"""What is timed is what runs: by the plan's target, our kernels in PyTorch or the exported layer in ONNX Runtime."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from latency_nets import SPECS, example, net, plan_of
from torch import nn

import bitwright as bw
from bitwright.costs.latencies import measure_machine
from bitwright.costs.runtimes import layer_runs, runtime_of, whole_run
from bitwright.costs.workload import Workload
from bitwright.errors import SearchError
from bitwright.search.speeds import speeds

pytestmark = pytest.mark.filterwarnings(  # tests share a machine, and their models are tiny
    "ignore:this process had the processor", "ignore:the layers with choices take"
)
INPUTS = {"blocks.*.input": ["uint8/asym", "float"]}


def for_onnxruntime(model: nn.Module) -> bw.Plan:
    sites = {"*.weight": "int8/channel", "out.input": "uint8/asym"}
    return bw.Plan.preset("w8a8", model, example(), sites=sites, target="onnxruntime")


@pytest.mark.parametrize("path", ["stem", "blocks.0.0", "add_0", "out"])
def test_a_layer_in_onnx_runtime_computes_what_ships(path: str) -> None:
    model = net()
    plan = for_onnxruntime(model)
    work = Workload(model, plan, example(), [path])
    [made] = work.calls[path]
    for specs in (work.decided(path), dict.fromkeys(work.decided(path))):
        layer = work.alone(path, specs, made)
        ours, *theirs = [layer_runs(layer, made.args, made.kwargs, target, 2) for target in ("cpu", "onnxruntime")]
        [wanted, again], [found, other] = [run() for run in ours], [run()[0] for run in theirs[0]]
        assert torch.equal(wanted, again)
        torch.testing.assert_close(torch.from_numpy(found), wanted, atol=1e-2, rtol=1e-2)
        assert (found == other).all()


def test_the_whole_model_runs_there_too() -> None:
    model = net()
    plan = for_onnxruntime(model)
    shipped = Workload(model, plan, example(), []).shipped
    [found] = whole_run(shipped, example(), plan.target)()
    torch.testing.assert_close(torch.from_numpy(found), whole_run(shipped, example(), "cpu")(), atol=1e-2, rtol=1e-2)


def test_times_of_two_runtimes_have_rows_of_their_own(tmp_path: Path) -> None:
    model = net()
    plan, keys = for_onnxruntime(model), []
    specs = {"blocks.*.weight": ["int4/channel", "int8/channel", "float"], **INPUTS}
    measure_machine(model, plan_of(model), example(), SPECS, cache=tmp_path, seconds=0.0)
    told = lambda key, row, done, total: keys.append(key)  # noqa: E731
    table = measure_machine(model, plan, example(), specs, cache=tmp_path, seconds=0.0, on_row=told)
    assert all(key.endswith(f" in {runtime_of('onnxruntime')}") for key in keys)
    assert sum(key.endswith(" in bitwright") for key in table.rows) == len(table.rows) - len(keys) > 0
    layers = speeds(table, model, plan, example(), specs)
    convolutions = [layer for layer in layers if len(layer.sites) == 2 and layer.sites[0].endswith("weight")]
    assert [len(layer.choices) for layer in convolutions] == [5, 5]  # float weights do not run on quantized inputs
    prices = table.prices(model, plan, example(), ["blocks.0.0", "blocks.1.0"])
    work = Workload(model, plan, example(), ["blocks.0.0", "blocks.1.0"])
    whole = prices.rest().latency + sum(prices.layer(path, work.decided(path)).latency for path in work.calls)
    assert whole == pytest.approx(table.rows[work.whole].seconds)


def test_layers_of_many_tensors_are_refused_there() -> None:
    x = torch.zeros(1, 2, 8)
    heads = nn.MultiheadAttention(8, 2, batch_first=True)
    with pytest.raises(SearchError, match="takes 3 tensors; with target onnxruntime only layers of one or two"):
        layer_runs(heads, (x, x, x), {}, "onnxruntime", 1)


def test_the_runtime_is_part_of_the_key() -> None:
    model = net()
    plan = for_onnxruntime(model)
    here, there = (Workload(model, replace(plan, target=name), example(), ["out"]) for name in ("cpu", "onnxruntime"))
    [made], specs = here.calls["out"], here.decided("out")
    assert here.key("out", specs, made) != there.key("out", specs, made)
    assert here.whole != there.whole
    assert here.load("out", specs, made).kind != there.load("out", specs, made).kind

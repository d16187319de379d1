"""Latencies of shapes that were not measured: exact on synthetic machines, honest about what is unknown."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from latency_nets import SPECS, example, net, plan_of
from torch import nn

import bitwright as bw
from bitwright.costs.latencies import LatencyTable, measure_machine, table_path
from bitwright.costs.learned import FEWEST, learn
from bitwright.costs.stopwatch import Timing
from bitwright.costs.workload import Load, Workload
from bitwright.errors import SearchError

pytestmark = pytest.mark.filterwarnings(  # tests share a machine, and their models are tiny
    "ignore:this process had the processor", "ignore:the layers with choices take"
)
SHAPES = st.lists(
    st.tuples(st.integers(1, 10**9), st.integers(1, 10**7), st.integers(1, 10**6)), min_size=8, max_size=20, unique=True
)
PARTS = st.tuples(*[st.floats(1e-7, 1e-5), st.floats(1e-12, 1e-10), st.floats(0.0, 1e-9), st.floats(0.0, 1e-9)])


def table_of(loads: list[Load], seconds: list[float]) -> LatencyTable:
    keys = [str(at) for at in range(len(loads))]
    rows = {key: Timing(value, 0.0, 9) for key, value in zip(keys, seconds, strict=True)}
    return LatencyTable(rows, loads=dict(zip(keys, loads, strict=True)))


def on(parts: tuple[float, ...], load: Load) -> float:
    return parts[0] + parts[1] * load.macs + parts[2] * load.stored + parts[3] * load.moved


@given(SHAPES, PARTS)
def test_a_machine_that_follows_the_formula_is_learned(
    shapes: list[tuple[int, int, int]], parts: tuple[float, ...]
) -> None:
    loads = [Load("Linear", *shape) for shape in shapes]
    learned = learn(table_of(loads, [on(parts, load) for load in loads]))
    for load in loads:
        assert learned.seconds(load) == pytest.approx(on(parts, load), rel=1e-6)


def test_kinds_do_not_mix_and_the_error_is_that_of_rows_left_out() -> None:
    fast = [Load("Linear, int8", 1000 * n, n, n) for n in range(1, 8)]
    slow = [Load("Linear, int4", 1000 * n, n, n) for n in range(1, 8)]
    learned = learn(table_of([*fast, *slow], [1e-6 * n for n in range(1, 8)] + [3e-6 * n for n in range(1, 8)]))
    assert learned.seconds(Load("Linear, int8", 20_000, 20, 20)) == pytest.approx(2e-5)
    assert learned.seconds(Load("Linear, int4", 20_000, 20, 20)) == pytest.approx(6e-5)
    assert max(learned.errors.values()) < 1e-9
    odd = learn(table_of(fast, [1e-6, 5e-6, 1e-6, 5e-6, 1e-6, 5e-6, 1e-6]))
    assert odd.errors["Linear, int8"] > 0.3


def test_too_few_shapes_are_an_error_that_says_what_to_do() -> None:
    loads = [Load("Conv2d", n, n, n) for n in range(1, FEWEST)]
    learned = learn(table_of(loads, [1e-6] * len(loads)))
    with pytest.raises(SearchError, match=r"fewer than 5 shapes of Conv2d were measured.*known: none.*measure_machine"):
        learned.seconds(Load("Conv2d", 7, 7, 7))


def deep(width: int, count: int) -> nn.Sequential:
    torch.manual_seed(0)
    sizes = [width + 4 * at for at in range(count)]
    pairs = [nn.Linear(a, b) for a, b in itertools.pairwise(sizes)]
    return nn.Sequential(*pairs).eval()


def test_another_model_is_priced_from_what_was_measured(tmp_path: Path) -> None:
    specs = {"*.weight": ["int8/channel", "int4/channel"]}
    ranges = {"weight": "minmax", "input": "minmax"}
    known, new = deep(8, 10), deep(10, 5)
    x, y = torch.randn(1, 8), torch.randn(1, 10)
    plans = [bw.Plan.preset("w8a8", known, x, observers=ranges), bw.Plan.preset("w8a8", new, y, observers=ranges)]
    inner = {f"{at}.weight": specs["*.weight"] for at in range(1, 8)}
    measure_machine(known, plans[0], x, inner, cache=tmp_path, seconds=0.0)
    table = measure_machine(new, plans[1], y, {}, cache=tmp_path, seconds=0.0)  # only the whole
    learned = learn(LatencyTable.load(table_path(tmp_path)))
    assert set(learned.coefficients) == {load.kind for load in table.loads.values()}
    choices = {f"{at}.weight": specs["*.weight"] for at in range(1, 3)}
    rows = [bw.harm.sensitivity.Harm(site, spec, 1.0, 0.0) for site, texts in choices.items() for spec in texts]
    harm = bw.harm.sensitivity.Sensitivity("kl", "nats", "", "", 2, tuple(rows))
    with pytest.raises(SearchError, match="was not measured"):
        bw.mixture(new, plans[1], y, harm, latency=table)
    made = bw.mixture(new, plans[1], y, harm, latency=learned)
    assert made.allocate(bw.Budget()).cost.latency > 0


def test_measured_rows_are_not_predicted(tmp_path: Path) -> None:
    model = net()
    plan = plan_of(model)
    table = measure_machine(model, plan, example(), SPECS, cache=tmp_path, seconds=0.0)
    paths = ["blocks.0.0", "out"]
    ours, theirs = learn(table).prices(model, plan, example(), paths), table.prices(model, plan, example(), paths)
    for path in paths:
        own = theirs.work.decided(path)
        assert ours.layer(path, own) == theirs.layer(path, own)
    assert ours.rest() == theirs.rest()


def test_what_a_call_does_is_counted() -> None:
    model = net()
    work = Workload(model, plan_of(model), example(), ["blocks.0.0", "out"])
    [made] = work.calls["blocks.0.0"]
    load = work.load("blocks.0.0", work.decided("blocks.0.0"), made)
    assert load.kind == "Conv2d (3, 3) weight=int8/channel, input=uint8/asym from cache in bitwright"
    assert (load.macs, load.moved) == (4 * 4 * 9 * 36, 2 * 4 * 36)
    assert 4 * 4 * 9 <= load.stored <= 2000

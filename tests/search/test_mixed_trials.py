"""Plans are judged by what they do as a whole: the planned one is among them, and a wrong table of harm cannot win."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn import functional as F

import bitwright as bw
from bitwright.costs.cost import plan_bytes
from bitwright.errors import CheckpointError, NumericsError, SearchError
from bitwright.harm.sensitivity import Sensitivity, harm_of_whole, sensitivity
from bitwright.nn.quantizer import Quantizer
from bitwright.search.mixed import Mixture
from bitwright.search.mixed_trials import ALLOCATED, PLANNED, mixed, split
from bitwright.search.tried import Mixed

FAST = {"weight": "minmax", "input": "minmax"}
SPECS = {"*.weight": [f"int{bits}/channel" for bits in (2, 3, 4, 5, 6, 8)]}


def net() -> nn.Module:
    """The first layers matter more than the last ones, which are larger."""
    torch.manual_seed(0)
    sizes = (6, 8, 8, 24, 24, 5)
    layers = [m for a, b in pairwise(sizes) for m in (nn.Linear(a, b), nn.Tanh())]
    return nn.Sequential(*layers[:-1]).eval()


def data(count: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(16, 6, generator=generator) for _ in range(count)]


def plan_of(model: nn.Module, bits: int = 4) -> bw.Plan:
    sites = {"*.weight": f"int{bits}/channel"}
    return bw.Plan.preset("w4a16", model, data(1, 0)[0], sites=sites, observers=FAST, steps=["gptq"])


def choices_of(model: nn.Module, plan: bw.Plan, found: Sensitivity | None = None) -> Mixture:
    return bw.mixture(model, plan, data(1, 0)[0][:1], found or sensitivity(model, plan, data(4, 1), SPECS))


def test_the_best_one_is_within_the_budget_and_no_worse_than_the_planned_one() -> None:
    model = net()
    plan = plan_of(model, 3)
    limit = plan_bytes(model, plan)
    found = mixed(model, plan, data(4, 1), choices_of(model, plan), bw.Budget(bytes=limit), judge=data(4, 2))
    named = {one.name: one for one in found.tried}
    assert found.best is min((one for one in found.tried if one.fits), key=lambda one: one.harm)
    assert found.best.bytes <= limit
    assert found.best.harm < named[PLANNED].harm
    assert len({tuple(one.plan.sites.items()) for one in found.tried}) == len(found.tried)
    again = bw.prepare(model, found.best.plan)
    bw.calibrate(again, data(4, 1))
    for one in (found.model, again):
        values = harm_of_whole(model, data(4, 2))[0](one)
        assert values.mean().item() == pytest.approx(found.best.harm, rel=1e-9)
    expected = [
        F.kl_div(
            F.log_softmax(again.eval()(x).double(), -1),
            F.log_softmax(model(x).double(), -1),
            log_target=True,
            reduction="batchmean",
        ).item()
        for x in data(4, 2)
    ]
    assert found.best.harm == pytest.approx(sum(expected) / 4, rel=1e-6)


def test_a_table_of_harm_that_is_wrong_cannot_make_it_worse() -> None:
    model = net()
    plan = plan_of(model)
    truth = sensitivity(model, plan, data(4, 1), SPECS)
    largest = max(row.harm for row in truth.rows)
    wrong = replace(truth, rows=tuple(replace(row, harm=largest - row.harm) for row in truth.rows))
    limit = bw.Budget(bytes=plan_bytes(model, plan))
    found = mixed(model, plan, data(4, 1), choices_of(model, plan, wrong), limit, judge=data(4, 2), points=0)
    named = {one.name: one for one in found.tried}
    assert named[ALLOCATED].harm > 2 * named[PLANNED].harm
    assert found.best is named[PLANNED]


def test_what_is_over_the_budget_is_shown_and_not_taken() -> None:
    model = net()
    plan = plan_of(model, 8)
    limit, seen = bw.Budget(bytes=plan_bytes(model, plan_of(model))), []
    choices = choices_of(model, plan)
    found = mixed(model, plan, data(4, 1), choices, limit, judge=data(4, 2), points=3, say=seen.append)
    assert sorted(seen, key=lambda one: one.bytes) == list(found.tried)
    assert {one.name: one.fits for one in found.tried}[PLANNED] is False
    assert found.best.bytes <= limit.bytes
    assert [one.bytes for one in (found.tried[0], found.tried[-1])] == [
        choices.front()[at].cost.bytes for at in (0, -1)
    ]
    for one in found.front:
        assert not any(other.bytes <= one.bytes and other.harm < one.harm for other in found.tried if other is not one)
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(found.table())
    text = console.export_text()
    assert text.count("over the budget") == sum(not one.fits for one in found.tried)
    assert f"{found.best.name} (best)" in text
    assert f"{found.best.bytes:,}" in text
    rows = [line.split() for line in text.splitlines()]
    assert sum(row[-1:] == ["yes"] for row in rows) == len(found.front)


def test_a_plan_is_an_allocation_of_its_own_bytes() -> None:
    model = net()
    plan = plan_of(model)
    choices = choices_of(model, plan)
    assert choices.of(plan).cost.bytes == plan_bytes(model, plan)
    assert set(choices.of(plan).sites.values()) == {"int4/channel"}
    with pytest.raises(SearchError, match=r"0\.weight: the plan has int7/channel, of which no harm is known"):
        choices.of(plan.with_sites({"0.weight": "int7/channel"}))


def test_what_cannot_be_judged() -> None:
    model = net()
    plan = plan_of(model)
    choices, limit = choices_of(model, plan), bw.Budget(bytes=plan_bytes(model, plan))
    with pytest.raises(SearchError, match="at least 2 batches, got 1"):
        mixed(model, plan, data(4, 1), choices, limit, judge=data(1, 2))
    with pytest.raises(SearchError, match="fisher is no harm of a whole model"):
        mixed(model, plan, data(4, 1), choices, limit, judge=data(2, 2), method="fisher")
    with pytest.raises(SearchError, match="needs loss"):
        mixed(model, plan, data(4, 1), choices, limit, judge=data(2, 2), method="loss")
    nan = lambda m, b: m(b).sum() * float("nan")  # noqa: E731
    with pytest.raises(SearchError, match="the harm of no plan is finite"):
        mixed(model, plan, data(4, 1), choices, limit, judge=data(2, 2), method="loss", loss=nan)


def test_a_plan_without_finite_harm_is_not_taken() -> None:
    model = net()
    plan = plan_of(model)
    choices, limit = choices_of(model, plan), bw.Budget(bytes=plan_bytes(model, plan))

    def loss(changed: nn.Module, batch: Tensor) -> Tensor:
        widths = {str(m.spec) for m in changed.modules() if isinstance(m, Quantizer)}
        error = F.mse_loss(changed(batch), model(batch))
        return error * float("nan") if widths == {"int4/channel"} else error

    found = mixed(model, plan, data(4, 1), choices, limit, judge=data(2, 2), method="loss", loss=loss, points=0)
    assert found.best.name != PLANNED
    assert {one.name: one.harm for one in found.tried}[PLANNED] == float("inf")


@cache
def task() -> tuple[nn.Module, bw.Plan, Mixture, Sensitivity]:
    """Codes by rounding to nearest: a trial takes no time."""
    model = net()
    plan = replace(plan_of(model), steps=())
    found = sensitivity(model, plan, data(4, 1), SPECS)
    return model, plan, choices_of(model, plan, found), found


def tried(budget: bw.Budget, **changes: Any) -> Mixed:
    model, plan, choices, _ = task()
    given = {"model": model, "plan": plan, "batches": data(4, 1), "choices": choices, "judge": data(4, 2)} | changes
    return mixed(given.pop("model"), given.pop("plan"), given.pop("batches"), given.pop("choices"), budget, **given)


def labelled(model: nn.Module, count: int = 60) -> list[tuple[Tensor, Tensor]]:
    with torch.no_grad():
        return [(x, model(x).argmax(1)) for x in data(count, 3)]


def right(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (model(batch[0]).argmax(1) == batch[1]).float()


@pytest.mark.parametrize("limit", [1e-6, 1e-5, 4e-5])
def test_a_limit_on_the_drop_is_one_on_what_was_measured(limit: float) -> None:
    found = tried(bw.Budget(drop=limit))
    assert found.best.harm <= limit
    holding = [one for one in found.tried if one.harm <= limit]
    assert found.best.bytes == min(one.bytes for one in holding)
    assert {one.holds for one in found.tried} == {True, False}
    start = tried(bw.Budget(drop=limit), rounds=0)
    assert found.best.bytes < start.best.bytes
    assert len(found.tried) <= len(start.tried) + 4
    assert found.curve.at(found.best.summed) <= 2 * limit


@pytest.mark.parametrize("factor", [1e-3, 1e3])
def test_the_summed_limit_follows_from_measurement(factor: float) -> None:
    model, plan, _, harm = task()
    other = replace(harm, rows=tuple(replace(row, harm=row.harm * factor) for row in harm.rows))
    found, same = tried(bw.Budget(drop=1e-5)), tried(bw.Budget(drop=1e-5), choices=choices_of(model, plan, other))
    assert same.best.plan == found.best.plan
    assert same.best.harm == found.best.harm
    assert same.best.summed == pytest.approx(factor * found.best.summed)


def test_other_limits_and_goals_hold_beside_the_drop() -> None:
    found = tried(bw.Budget(drop=1e-5))
    tight = bw.Budget(drop=1e-5, bops=0.9 * task()[2].of(found.best.plan).cost.bops)
    with pytest.raises(SearchError, match=r"no plan that was tried within bops .* keeps to a drop of 1e-05 \(nats\)"):
        tried(tight)
    fewest = tried(bw.Budget(drop=1e-5), minimize="bops")
    assert task()[2].of(fewest.best.plan).cost.bops <= task()[2].of(found.best.plan).cost.bops
    least = tried(bw.Budget(drop=1e-5), minimize="harm")
    assert least.best.harm == min(one.harm for one in least.tried)
    with pytest.raises(SearchError, match=r"the least bytes without a limit on the drop is the worst plan"):
        tried(bw.Budget(), minimize="bytes")


def test_a_drop_that_nothing_keeps_to_names_the_smallest() -> None:
    smallest = min(one.harm for one in tried(bw.Budget(drop=1.0)).tried)
    with pytest.raises(SearchError, match=rf"keeps to a drop of 1e-12 \(nats\); the smallest is {smallest:.4g}: least"):
        tried(bw.Budget(drop=1e-12))


def test_a_cost_that_nothing_meets_is_refused_before_anything_is_tried() -> None:
    seen: list[Any] = []
    with pytest.raises(SearchError, match="nothing meets the budget of bytes 10; the smallest"):
        tried(bw.Budget(bytes=10), say=seen.append)
    assert seen == []


def test_with_a_score_the_drop_is_in_its_points() -> None:
    model = task()[0]
    found = tried(bw.Budget(drop=0.05), judge=labelled(model), score=right)
    assert found.best.high is not None
    assert found.best.harm <= found.best.high <= 0.05
    for one in found.tried:
        changed = bw.prepare(model, one.plan)
        bw.calibrate(changed, data(4, 1))
        before, after = (torch.cat([right(m, batch) for batch in labelled(model)]) for m in (model, changed.eval()))
        expected = bw.paired_drop(before, after)
        assert one.harm == pytest.approx(expected.drop, abs=1e-9)
        assert one.items == expected.items == 960
        assert one.high is not None
        assert one.high >= expected.high - 1e-3  # all plans together are right with 95 %: wider than one alone
        assert one.holds == (one.high <= 0.05)
        assert not (one.holds and one.bytes < found.best.bytes)
    assert len({one.holds for one in found.tried}) == 2
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(found.table())
    text = console.export_text()
    assert text.count("drops too much") == sum(not one.holds for one in found.tried)
    assert f"{found.best.high:+.4f}" in text


def test_without_a_limit_the_least_drop_of_the_score_is_taken() -> None:
    model, plan, _, _ = task()
    limit = bw.Budget(bytes=plan_bytes(model, plan))
    found = tried(limit, judge=labelled(model), score=right)
    assert found.best.harm == min(one.harm for one in found.tried if one.fits)
    assert found.best.bytes <= limit.bytes


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"judge": labelled(net(), 3)}, SearchError, r"needs at least [\d,]+ items to be shown .*; judge has 48"),
        ({"score": lambda m, b: right(m, b) * math.nan}, NumericsError, "NaN"),
        ({"score": lambda m, b: right(m, b).mean()}, NumericsError, "one score per item"),
        ({"score": lambda m, b: right(m, b) * 3}, NumericsError, "out of score_range"),
        ({"judge": []}, NumericsError, "no batches"),
    ],
)
def test_scores_that_cannot_judge(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        tried(bw.Budget(drop=0.02), **({"judge": labelled(net(), 3), "score": right} | changes))
    with pytest.raises(SearchError, match="cannot be shown by items"):
        tried(bw.Budget(drop=0.0), judge=labelled(net(), 3), score=right)


class _Counting:
    """A loss that counts how often it is asked."""

    def __init__(self, model: nn.Module, stop: int = 10**9) -> None:
        self.model, self.calls, self.stop = model, 0, stop

    def __call__(self, changed: nn.Module, batch: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == self.stop:
            raise KeyboardInterrupt
        return F.mse_loss(changed(batch), self.model(batch))


def test_a_stopped_search_goes_on_after_its_last_trial(tmp_path: Path) -> None:
    model, limit = task()[0], bw.Budget(drop=1e-4)
    first, second = _Counting(model, stop=15), _Counting(model)
    whole = tried(limit, method="loss", loss=_Counting(model))
    with pytest.raises(KeyboardInterrupt):
        tried(limit, method="loss", loss=first, work=tmp_path)  # 4 calls for float, 8 for two trials
    assert sorted(path.name for path in tmp_path.glob("*.toml")) == [
        "as-planned.toml", "front-1-of-25.toml", "least-summed-harm.toml",
    ]  # fmt: skip
    found = tried(limit, method="loss", loss=second, work=tmp_path)
    assert second.calls == 4 + 4 * (len(whole.tried) - 2)
    for again in (found, tried(limit, method="loss", loss=_Counting(model), work=tmp_path)):
        assert [(one.name, one.harm, one.plan) for one in again.tried] == [
            (one.name, one.harm, one.plan) for one in whole.tried
        ]
        assert again.best == whole.best
        for name, value in whole.model.state_dict().items():
            assert torch.equal(again.model.state_dict()[name], value)
    assert [bw.Plan.load(path).sites for path in tmp_path.glob("least-summed-harm.toml")] == [
        one.plan.sites for one in whole.tried if one.name == ALLOCATED
    ]
    state = json.loads((tmp_path / "state.json").read_text())
    assert len(state["trials"]) == len(whole.tried) == len(list(tmp_path.glob("*.toml")))
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == [f"best-{found.best.name.replace(' ', '-')}"]


def _other_model(given: dict[str, Any]) -> None:
    given["model"] = net()
    with torch.no_grad():
        next(given["model"].parameters())[0, 0] += 1


def _other_harm(given: dict[str, Any]) -> None:
    model, plan, _, harm = task()
    rows = (replace(harm.rows[0], harm=0.5), *harm.rows[1:])
    given["choices"] = choices_of(model, plan, replace(harm, rows=rows))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_other_model, "written with model: Sequential"),
        (_other_harm, r"choices: 0\.weight: Choice\(specs=\('int2/channel',\), .*; now it is: 0\.weight: .*harm=0.5"),
        (lambda given: given.update(judge=data(4, 5)), "judging data: 4 batches"),
        (lambda given: given.update(batches=data(4, 5)), "calibration data: 4 batches"),
        (lambda given: given.update(method="sqnr"), "judged by: kl; now it is: sqnr"),
        (lambda given: given.update(budget=bw.Budget(bytes=910)), "budget: bytes 900; now it is: bytes 910"),
        (lambda given: given.update(plan=task()[1].with_sites({"2.weight": "int5/channel"})), "plan: .*int4/channel"),
        (lambda given: given.update(points=2), "goal: least harm, 1 points"),
    ],
)
def test_a_folder_of_another_search_is_refused(
    change: Callable[[dict[str, Any]], None], message: str, tmp_path: Path
) -> None:
    given: dict[str, Any] = {"budget": bw.Budget(bytes=900), "points": 1, "work": tmp_path}
    tried(**given)
    change(given)
    with pytest.raises(CheckpointError, match=message):
        tried(**given)


def test_plan_files_of_trials(tmp_path: Path) -> None:
    given: dict[str, Any] = {"budget": bw.Budget(bytes=900), "points": 1, "work": tmp_path}
    first, path = tried(**given), tmp_path / "as-planned.toml"
    text = path.read_text()
    path.write_text(text.replace("int4/channel", "int5/channel", 1))
    with pytest.raises(
        CheckpointError, match=r"as-planned\.toml is not the plan that the search tries as 'as planned'"
    ):
        tried(**given)
    path.unlink()
    assert tried(**given).best == first.best
    assert path.read_text() == text
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"state\.json is damaged"):
        tried(**given)


def test_the_last_third_judges() -> None:
    assert split(range(9)) == ([0, 1, 2, 3, 4, 5], [6, 7, 8])
    assert split("abcd") == (["a", "b"], ["c", "d"])
    with pytest.raises(SearchError, match="at least 4 calibration batches, got 3"):
        split(range(3))

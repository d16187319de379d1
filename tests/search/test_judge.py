"""Scores are compared as the user means them, and bad ones are refused with the reason."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bitwright.errors import NumericsError
from bitwright.search.judge import FEWEST, PairedJudge, PointJudge, alike
from bitwright.search.sequential import items_needed
from ladders import data, labelled, made, paired, right


def judge(net: nn.Module, max_drop: float | None = 0.1, **changes: Any) -> PairedJudge:
    settings = {"score": right, "evaluation": labelled(net), "score_range": (0.0, 1.0), "candidates": 5, **changes}
    return PairedJudge(net, max_drop=max_drop, **settings)


def quiet() -> None:
    pass


def test_equal_models_are_decided_with_as_few_items_as_can_be() -> None:
    net = made()
    found = judge(net, 0.008, evaluation=labelled(net, 60))(made(), quiet)
    needed = items_needed(torch.zeros(1), torch.ones(1), 0.008, 0.05 / 5, 1.0)
    assert found.holds
    assert found.drop == 0
    assert needed is not None
    assert FEWEST * 100 < needed <= found.items < needed + 100
    assert judge(net)(made(), quiet).items == FEWEST * 100


def test_another_model_is_turned_down_early() -> None:
    found = judge(made())(made(1), quiet)
    assert not found.holds
    assert found.items < 1000
    assert found.low > 0.1
    assert found.drop == pytest.approx(1 - found.score)


def test_what_the_items_do_not_decide_is_said_to_be_open() -> None:
    net = made()
    other = made()
    with torch.no_grad():
        other[0].weight += 0.02 * torch.randn(other[0].weight.shape, generator=torch.Generator().manual_seed(0))
    true = judge(net, None)(other, quiet).drop
    found = judge(net, true)(other, quiet)
    assert not found.holds
    assert found.items == 4000
    assert found.low <= true <= found.high
    assert "not decided by all 4,000 items" in found.note


def test_without_a_limit_all_items_are_scored() -> None:
    found = judge(made(), None)(made(1), quiet)
    assert found.holds
    assert found.items == 4000


def test_sorted_data_does_not_deceive() -> None:
    net, other = made(), made(1)
    easy, hard = [], []
    for x, y in labelled(net, 60):
        agree = other(x).argmax(1) == y
        easy.append((x[agree], y[agree])), hard.append((x[~agree], y[~agree]))
    found = judge(net, 0.2, evaluation=easy + hard)(other, quiet)
    assert not found.holds


def test_random_batches_are_alike_mostly_and_sorted_ones_are_not() -> None:
    generator = torch.Generator().manual_seed(0)
    items = (torch.rand(400, 12, 100, generator=generator) < 0.1).double()
    assert sum(alike(list(one)) for one in items) > 0.97 * 400
    assert not any(alike(list(one.flatten().sort().values.view(12, 100))) for one in items)
    assert alike([torch.zeros(3), torch.zeros(5)])


def test_the_float_model_scores_each_batch_once() -> None:
    net, calls = made(), []

    def counted(model: nn.Module, batch: Any) -> Tensor:
        calls.append(model is net)
        return right(model, batch)

    this = judge(net, None, score=counted)
    for seed in (1, 2, 3):
        this(made(seed), quiet)
    assert sum(calls) == 40 + 1  # the first batch twice, to see whether scores repeat
    assert len(calls) - sum(calls) == 3 * 40


def test_scores_need_no_labels() -> None:
    net = made()

    def agreement(model: nn.Module, x: Tensor) -> Tensor:
        return (model(x).argmax(1) == net(x).argmax(1)).float()

    assert paired(net, 0.3, score=agreement, evaluation=data(10, 3, 100)).best.holds


def test_models_are_scored_in_eval_mode_without_gradients() -> None:
    net = made().train()
    seen = []

    def looks(model: nn.Module, batch: Any) -> Tensor:
        seen.append(model.training or torch.is_grad_enabled())
        return right(model, batch)

    judge(net, score=looks)
    assert not any(seen)
    assert net.training


@pytest.mark.parametrize(
    ("score", "message"),
    [
        (lambda m, b: torch.rand(len(b[0])), "two answers for one model and one batch"),
        (lambda m, b: torch.full((5,), math.nan), "NaN on batch 0"),
        (lambda m, b: torch.full((5,), 1.5), r"returned 1\.5 to 1\.5 on batch 0, out of score_range=\(0, 1\)"),
        (lambda m, b: 0.5, "one score per item, got type float"),
        (lambda m, b: torch.tensor(0.5), r"one score per item, got shape \[\]"),
        (lambda m, b: torch.zeros(0), r"one score per item, got shape \[0\]"),
        (lambda m, b: torch.zeros(3, 2), r"one score per item, got shape \[3, 2\]"),
    ],
)
def test_bad_scores_are_refused(score: Any, message: str) -> None:
    with pytest.raises(NumericsError, match=message):
        judge(made(), score=score)


def test_nan_of_a_candidate_is_an_error() -> None:
    net = made()
    this = judge(net, score=lambda m, b: right(m, b) if m is net else torch.full((100,), math.nan))
    with pytest.raises(NumericsError, match="NaN on batch"):
        this(made(1), quiet)


def test_another_number_of_scores_than_the_float_model_has_is_an_error() -> None:
    net = made()
    this = judge(net, score=lambda m, b: right(m, b)[: None if m is net else -1])
    with pytest.raises(NumericsError, match=r"99 scores for batch \d+, and 100 for the float model"):
        this(made(1), quiet)


def test_too_few_items_are_refused_with_the_number_that_is_needed() -> None:
    net = made()
    needed = items_needed(torch.zeros(1), torch.ones(1), 0.01, 0.01, 1.0)
    with pytest.raises(NumericsError, match=rf"at least {needed:,} items .* evaluation has 300"):
        judge(net, 0.01, evaluation=labelled(net, 3))
    judge(net, 0.01, evaluation=labelled(net, -(-needed // 100)))


def test_where_later_batches_turn_out_short_the_answer_says_how_many_items_it_takes() -> None:
    net = made()
    batches = [(x[:n], y[:n]) for (x, y), n in zip(labelled(net, 8), (100, *[1] * 7), strict=True)]
    needed = items_needed(torch.zeros(1), torch.ones(1), 0.02, 0.01, 1.0)
    found = judge(net, 0.02, evaluation=batches)(made(), quiet)
    assert not found.holds
    assert found.note == f"not decided by all 107 items; about {needed:,} such items would"


def test_goals_and_data_that_cannot_be_are_refused() -> None:
    with pytest.raises(NumericsError, match="cannot be shown by sampling"):
        judge(made(), 0.0)
    with pytest.raises(NumericsError, match="no batches"):
        judge(made(), evaluation=[])
    with pytest.raises(NumericsError, match=r"score_range is \(lowest, highest\)"):
        judge(made(), score_range=(1.0, 0.0))


def test_a_wider_range_of_scores_serves_other_metrics() -> None:
    net = made()

    def likelihood(model: nn.Module, batch: Any) -> Tensor:
        return model(batch[0]).log_softmax(1).gather(1, batch[1][:, None])[:, 0].clamp(-4, 0)

    found = judge(net, 0.5, score=likelihood, score_range=(-4.0, 0.0))(made(), quiet)
    assert found.holds


def test_one_number_per_model_is_compared_as_it_is() -> None:
    net, other = made(), made(1)
    values = {id(net): 0.9, id(other): 0.85}
    this = PointJudge(net, lambda m: torch.tensor(values[id(m)]), 0.05 + 1e-6)
    found = this(other, quiet)
    assert found.holds
    assert found.drop == pytest.approx(0.05)
    assert (found.low, found.high, found.items) == (None, None, None)
    assert not PointJudge(net, lambda m: values[id(m)], 0.04)(other, quiet).holds
    assert PointJudge(net, lambda m: values[id(m)], None)(other, quiet).holds


def test_one_number_must_be_a_number() -> None:
    with pytest.raises(NumericsError, match="NaN"):
        PointJudge(made(), lambda m: math.nan, 0.1)
    with pytest.raises(NumericsError, match="must return one number, or pass evaluation"):
        PointJudge(made(), lambda m: torch.zeros(4), 0.1)

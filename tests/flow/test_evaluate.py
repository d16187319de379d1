"""Scores, paired differences with honest intervals, and layer-by-layer comparison."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from bitwright.errors import NumericsError
from bitwright.flow.convert import convert
from bitwright.flow.evaluate import Drop, compare, difference, evaluate, item_scores, outputs_of, paired_drop, top1
from models import Mlp
from nets import calibrated, one_thread  # noqa: F401


def outcomes(both: int, first: int, second: int, neither: int) -> tuple[Tensor, Tensor]:
    """Right-or-wrong scores of two models with the given counts of agreement."""
    before = torch.tensor([1.0] * (both + first) + [0.0] * (second + neither))
    after = torch.tensor([1.0] * both + [0.0] * first + [1.0] * second + [0.0] * neither)
    return before, after


def test_top1_is_right_where_the_largest_logit_is_the_class() -> None:
    assert top1(torch.tensor([[1.0, 2.0], [3.0, 0.0], [0.0, 1.0]]), torch.tensor([1, 1, 1])).tolist() == [1.0, 0.0, 1.0]


def test_evaluate_averages_over_items_and_not_over_batches() -> None:
    net = nn.Identity()
    batches = [
        (torch.eye(3), torch.tensor([0, 1, 2])),
        (torch.eye(3)[:1], torch.tensor([2])),
    ]
    assert evaluate(net, batches) == 0.75
    assert item_scores(net, batches).tolist() == [1.0, 1.0, 1.0, 0.0]
    assert evaluate(net, batches, lambda out, target: (out.sum(-1) + target).float()) == pytest.approx((3 + 4 + 2) / 4)


def test_evaluate_runs_in_eval_mode_without_gradients_and_restores_the_mode() -> None:
    class Watching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append((self.training, torch.is_grad_enabled()))
            return x

    seen: list[tuple[bool, bool]] = []
    net = Watching().train()
    evaluate(net, [(torch.eye(2), torch.tensor([0, 1]))])
    assert seen == [(False, False)]
    assert net.training


def test_a_score_of_nothing_does_not_exist() -> None:
    with pytest.raises(NumericsError, match="evaluation got no batches"):
        evaluate(nn.Identity(), [])
    with pytest.raises(NumericsError, match="found 0 and 0"):
        paired_drop(torch.zeros(0), torch.zeros(0))
    with pytest.raises(NumericsError, match="paired scores need the same items, found 3 and 4"):
        paired_drop(torch.zeros(3), torch.zeros(4))


def test_the_drop_is_the_share_of_items_that_only_one_model_gets_right() -> None:
    found = paired_drop(*outcomes(80, 12, 5, 3))
    assert found.drop == pytest.approx(0.07)
    assert found.items == 100
    assert found.low < found.drop < found.high
    assert str(Drop(0.07, -0.01, 0.15, 100)) == "+0.0700 [-0.0100, +0.1500] on 100 items"


def test_equal_scores_leave_no_doubt() -> None:
    scores = torch.rand(50)
    assert paired_drop(scores, scores) == Drop(0.0, 0.0, 0.0, 50)
    assert paired_drop(torch.ones(20), torch.zeros(20)) == Drop(1.0, 1.0, 1.0, 20)


@pytest.mark.parametrize("kind", ["right or wrong", "real"])
def test_exchanging_the_models_flips_the_sign(kind: str) -> None:
    before, after = outcomes(700, 60, 40, 200) if kind == "right or wrong" else (torch.rand(300), torch.rand(300))
    one, other = paired_drop(before, after), paired_drop(after, before)
    width = one.high - one.low
    assert one.drop == pytest.approx(-other.drop, abs=1e-12)
    assert one.low == pytest.approx(-other.high, abs=0.05 * width)
    assert one.high == pytest.approx(-other.low, abs=0.05 * width)


def test_the_same_seed_gives_the_same_interval() -> None:
    before, after = outcomes(80, 12, 5, 3)
    assert paired_drop(before, after) == paired_drop(before, after)
    assert paired_drop(before, after, seed=1).low == pytest.approx(paired_drop(before, after).low, abs=0.02)


@pytest.mark.parametrize("kind", ["right or wrong", "real"])
def test_the_interval_agrees_with_the_analytic_standard_error(kind: str) -> None:
    if kind == "right or wrong":
        first, second, items = 300, 180, 6000
        before, after = outcomes(5000, first, second, items - 5000 - first - second)
        error = math.sqrt(first + second - (first - second) ** 2 / items) / items
    else:
        before = torch.randn(3000)
        after = before + torch.randn(3000) * 0.5
        error = (before - after).double().std(correction=0).item() / math.sqrt(3000)
    found = paired_drop(before, after)
    assert (found.high - found.low) / (2 * 1.959964) == pytest.approx(error, rel=0.05)


def test_the_interval_covers_the_true_drop_in_95_of_100_experiments() -> None:
    generator = torch.Generator().manual_seed(0)
    chances, trials, items = torch.tensor([0.80, 0.09, 0.05, 0.06]), 600, 800
    covered = 0
    for _ in range(trials):
        counts = torch.multinomial(chances, items, replacement=True, generator=generator).bincount(minlength=4).tolist()
        found = paired_drop(*outcomes(*counts), resamples=2000)
        covered += found.low <= 0.04 <= found.high
    assert covered / trials == pytest.approx(0.95, abs=0.03)


def test_layer_differences_have_known_values() -> None:
    found = difference("fc", torch.tensor([3.0, 4.0]), torch.tensor([3.0, 3.5]))
    assert (found.path, found.max_abs) == ("fc", 0.5)
    assert found.sqnr == pytest.approx(20.0)
    assert difference("fc", torch.ones(2), torch.ones(2)).sqnr == math.inf
    assert difference("fc", torch.zeros(0), torch.zeros(0)).max_abs == 0.0


def test_comparing_models_goes_layer_by_layer_in_order() -> None:
    net, x = Mlp(), torch.randn(8, 16)
    simulated = calibrated(net, "w4a4", [x])
    found = compare(net, simulated, x, ["0", "2", "4"])
    assert [row.path for row in found] == ["0", "2", "4"]
    assert all(5 < row.sqnr < 60 for row in found)
    assert found[0].sqnr > found[1].sqnr
    assert all(
        row.sqnr == math.inf and row.max_abs == 0 for row in compare(simulated, convert(simulated), x, ["0", "2"])
    )
    assert torch.equal(outputs_of(net, x, ["4"])["4"], net(x).detach())
    assert not any(module._forward_hooks for module in (*net.modules(), *simulated.modules()))

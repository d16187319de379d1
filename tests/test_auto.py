import pytest
import torch
from torch import nn

from bitwright.auto import quantize_model
from bitwright.errors import CalibrationError, NumericsError

CHEAP = ("nearest", "bias correction")


@pytest.fixture
def setting():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4)
    ).eval()
    x = torch.randn(512, 16)
    answers = model(x).argmax(1)

    def score(m):
        with torch.no_grad():
            return (m(x).argmax(1) == answers).float().mean().item()

    return model, list(x.split(128)), score


def test_goal_on_drop_is_met_and_fewer_layers_are_raised_than_exist(setting):
    model, batches, score = setting
    result = quantize_model(model, batches, score, max_drop=0.05, recipes=CHEAP)
    assert result.met
    assert score(result.model) == result.score >= 1.0 - 0.05
    assert result.bytes < sum(p.nbytes for p in model.parameters()) / 3


def test_byte_budget_takes_the_largest_model_that_fits(setting):
    model, batches, score = setting
    small = quantize_model(model, batches, score, max_drop=1.0, recipes=CHEAP)
    large = quantize_model(model, batches, score, max_drop=0.0, recipes=CHEAP)
    budget = (small.bytes + large.bytes) // 2
    result = quantize_model(model, batches, score, max_bytes=budget, recipes=CHEAP)
    assert result.met
    assert small.bytes <= result.bytes <= budget


def test_impossible_goal_returns_the_best_and_says_so(setting):
    model, batches, score = setting
    result = quantize_model(model, batches, score, max_drop=0.0, max_bytes=10, recipes=CHEAP)
    assert not result.met
    assert result.model is not None


def test_missing_goal_data_and_bad_score_are_errors(setting):
    model, batches, score = setting
    with pytest.raises(NumericsError, match="max_drop"):
        quantize_model(model, batches, score)
    with pytest.raises(CalibrationError, match="no calibration batches"):
        quantize_model(model, [], score, max_drop=0.1)
    with pytest.raises(NumericsError, match="NaN"):
        quantize_model(model, batches, lambda m: float("nan"), max_drop=0.1)

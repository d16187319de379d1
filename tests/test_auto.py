import pytest
import torch
from torch import nn

from bitwright.auto import quantize_model
from bitwright.errors import CalibrationError, NumericsError, PlanError
from models import Conv1dNet, EmbeddingNet, ResidualCnn

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


def items(model, x):
    answers = model(x).argmax(1)
    return [(part, answer) for part, answer in zip(x.split(100), answers.split(100), strict=True)]


def right(model, batch):
    return (model(batch[0]).argmax(1) == batch[1]).float()


def test_scores_of_items_give_a_confidence(setting):
    model, batches, _ = setting
    evaluation = items(model, torch.randn(3000, 16, generator=torch.Generator().manual_seed(5)))
    result = quantize_model(model, batches, right, evaluation=evaluation, max_drop=0.08, recipes=CHEAP)
    assert result.met
    assert result.confidence == 0.95
    assert [trial.name for trial in result.trials][-1] == result.best
    assert "95% confidence" in str(result.report)
    lines = str(result).splitlines()
    assert any(line.startswith(f"{result.best} (best)") for line in lines)
    assert str(result).endswith(str(result.report))
    assert result.float_score == pytest.approx(1.0)
    assert result.report.rows[1].drop.high <= 0.08


def test_one_score_per_model_gives_no_confidence(setting):
    model, batches, score = setting
    result = quantize_model(model, batches, score, max_drop=0.5, recipes=CHEAP)
    assert result.met
    assert result.confidence is None
    assert "was not measured" in str(result.report)


def test_a_goal_that_was_not_met_has_no_confidence(setting):
    model, batches, _ = setting
    evaluation = items(model, torch.randn(500, 16))
    result = quantize_model(model, batches, right, evaluation=evaluation, max_drop=0.1, max_bytes=10, recipes=CHEAP)
    assert not result.met
    assert result.confidence is None
    assert "The goal was not met" in str(result.report)


@pytest.mark.parametrize(
    ("level", "data", "bits"),
    [
        ("fp16", True, {(16, 32)}),
        ("int8", True, {(8, 8)}),
        ("int8", False, {(8, 8)}),
        ("int4", True, {(8, 8), (4, 8)}),
        ("int4", False, {(4, 32)}),
    ],
)
def test_levels_are_presets_by_their_usual_names(setting, level, data, bits):
    model, batches, score = setting
    result = quantize_model(model, batches if data else [], score, level=level, example=batches[0])
    found = {(b.weight, b.input) for b in result.report.bits["shipped"] if b.path != "6"}
    assert found == bits
    assert result.met
    assert [trial.name for trial in result.trials] == ["nearest"]
    dynamic = [spec for spec in result.plan.sites.values() if spec is not None and spec.dynamic]
    assert bool(dynamic) == (level == "int8" and not data)


def test_level_fp32_is_the_model_itself(setting):
    model, batches, score = setting
    result = quantize_model(model, batches, score, level="fp32", max_drop=0.0)
    assert result.model is model
    assert result.met
    assert result.score == result.float_score == score(model)
    assert all(spec is None for spec in result.plan.sites.values())
    assert not quantize_model(model, batches, score, level="fp32", max_bytes=10).met


class Lstm(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm, self.out = nn.LSTM(5, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.out(self.lstm(x)[0].mean(0))


@pytest.mark.parametrize("level", ["fp16", "int8", "int4"])
@pytest.mark.parametrize("data", [True, False])
@pytest.mark.parametrize("kind", [ResidualCnn, Conv1dNet, EmbeddingNet, Lstm])
def test_levels_fit_models_of_every_kind(kind, data, level):
    torch.manual_seed(0)
    model = kind().eval()
    x = {ResidualCnn: torch.randn(4, 3, 16, 16), Conv1dNet: torch.randn(4, 2, 12), Lstm: torch.randn(4, 3, 5)}
    batch = x.get(kind, torch.randint(0, 20, (4, 6)))
    result = quantize_model(model, [batch] if data else [], lambda m: 1.0, level=level, example=batch)
    assert result.met
    assert result.bytes < result.report.rows[0].bytes


def test_bad_input_is_refused_with_what_to_do(setting):
    model, batches, score = setting
    with pytest.raises(PlanError, match="unknown level 'int5'; known levels: fp32, fp16, int8, int4"):
        quantize_model(model, batches, score, level="int5")
    with pytest.raises(PlanError, match="pass one of them"):
        quantize_model(model, batches, score, level="int8", preset="w4a8")
    with pytest.raises(CalibrationError, match=r"must be a list of batches, got one tensor \[128, 16\]"):
        quantize_model(model, batches[0], score, max_drop=0.1)
    with pytest.raises(CalibrationError, match="drop_last=True"):
        quantize_model(model, iter([]), score, max_drop=0.1)
    with pytest.raises(CalibrationError, match="no batches"):
        quantize_model(model, [], score, max_drop=0.1, example=batches[0])
    with pytest.raises(PlanError, match="unknown recipe 'best'"):
        quantize_model(model, batches, score, max_drop=0.1, recipes=("best",))


def test_a_calibration_set_smaller_than_a_batch_is_enough(setting):
    model, batches, score = setting
    result = quantize_model(model, [batches[0][:3]], score, max_drop=1.0, recipes=CHEAP)
    assert result.met


def test_evaluation_may_be_any_iterable(setting):
    model, batches, _ = setting
    evaluation = items(model, torch.randn(300, 16))
    found = [
        quantize_model(model, batches, right, evaluation=given, max_drop=0.5, recipes=CHEAP).trials
        for given in (evaluation, iter(evaluation))
    ]
    assert [trial.score for trial in found[0]] == [trial.score for trial in found[1]]

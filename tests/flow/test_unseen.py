"""Branches and modules that calibration never reached: reported, refused, or quantized from live tensors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from bitwright.errors import CalibrationError
from bitwright.flow.calibrate import calibrate
from bitwright.flow.checkpoint import load, save
from bitwright.flow.convert import convert
from bitwright.flow.prepare import prepare
from bitwright.plan.plan import Plan
from bitwright.plan.site import Site
from nets import one_thread  # noqa: F401


class Branches(nn.Module):
    """Takes another way for inputs with a positive sum: no trace shows both."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.warm, self.cold = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem(x))
        x = self.warm(x) if x.sum() > 30 else self.cold(x)
        return self.head(torch.relu(x))


@pytest.fixture
def prepared() -> nn.Module:
    net = Branches()
    with torch.no_grad():
        net.stem.weight.copy_(torch.eye(8))
        net.stem.bias.zero_()
    return prepare(
        net, Plan.preset("w8a8", net, WARM, sites={"cold.weight": "int8/channel", "cold.input": "uint8/asym"})
    )


WARM, COLD = torch.full((4, 8), 5.0), torch.full((4, 8), 0.5)


def test_a_branch_without_data_is_refused_by_name(prepared: nn.Module) -> None:
    with pytest.raises(CalibrationError, match=r"1 of 3 quantized modules never ran .*: cold; .*unseen='dynamic'"):
        calibrate(prepared, [WARM])


def test_a_branch_without_data_is_reported_and_still_gives_close_answers(prepared: nn.Module) -> None:
    exact = prepared(COLD).detach()
    assert calibrate(prepared, [WARM], unseen="dynamic") == ["cold"]
    prepared.eval()
    with torch.no_grad():
        out = prepared(COLD)
        assert out.isfinite().all()
        assert (out - exact).abs().max() <= 0.05 * exact.abs().max()
        shipped = convert(prepared)
        assert torch.equal(shipped(COLD), out)
        assert torch.equal(shipped(WARM), prepared(WARM))
    plan: Plan = prepared.bitwright_plan  # type: ignore[assignment]
    assert str(plan.sites[Site("cold", "input")]) == "uint8/asym/dynamic"
    assert "no calibration batch reached it" in plan.explain("cold.input")
    assert str(plan.sites[Site("warm", "input")]) == "uint8/asym"


def test_data_for_every_branch_reports_nothing(prepared: nn.Module) -> None:
    assert calibrate(prepared, [WARM, COLD], unseen="dynamic") == []


def test_a_model_with_a_fallen_back_branch_is_saved_and_loaded(prepared: nn.Module, tmp_path: object) -> None:
    calibrate(prepared, [WARM], unseen="dynamic")
    shipped = convert(prepared)
    save(shipped, tmp_path)  # type: ignore[arg-type]
    again = load(tmp_path, Branches())  # type: ignore[arg-type]
    with torch.no_grad():
        assert torch.equal(again(COLD), shipped(COLD))


def test_another_word_for_unseen_is_refused(prepared: nn.Module) -> None:
    with pytest.raises(CalibrationError, match="unseen must be 'raise' or 'dynamic', got 'skip'"):
        calibrate(prepared, [WARM], unseen="skip")  # type: ignore[arg-type]

"""Checking a certificate again: what holds, what no longer holds, and what could not be checked."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import bitwright as bw
from bitwright.claims.certificate import Certificate
from bitwright.claims.verify import Verification
from bitwright.errors import CertificateError
from ladders import data, labelled, made, right

CALIBRATION = data()


class Line:
    """A model, simulated and shipped, with its test and its certificate."""

    def __init__(self) -> None:
        self.model = made()
        plan = bw.Plan.preset("w8a8", self.model, CALIBRATION[0], observers={"weight": "minmax", "input": "minmax"})
        self.simulated = bw.prepare(self.model, plan)
        bw.calibrate(self.simulated, CALIBRATION)
        self.simulated.eval()
        self.shipped = bw.convert(self.simulated)
        self.test = labelled(self.model, 10)
        self.seen = {"calibration": CALIBRATION}
        self.issued = bw.certify(
            self.model, self.shipped, self.test, right, max_drop=0.1, seen=self.seen, simulated=self.simulated, rounds=1
        )

    def verify(self, certificate: Certificate | Path | None = None, **changes: Any) -> Verification:
        given = {"model": self.model, "shipped": self.shipped, "test": self.test, "score": right, "seen": self.seen}
        given |= {"simulated": self.simulated} | changes
        return bw.verify(certificate or self.issued, **given)


@pytest.fixture
def line() -> Line:
    return Line()


def states(found: Verification) -> dict[str, str]:
    return {line.what: line.state for line in found.lines}


def failed(found: Verification) -> list[str]:
    return [line.what for line in found.lines if line.state == "no longer holds"]


def unchecked(found: Verification) -> list[str]:
    return [line.what for line in found.lines if line.state == "not checked"]


def test_everything_holds_for_what_was_certified(line: Line, tmp_path: Path) -> None:
    line.issued.save(tmp_path / "c.json")
    found = line.verify(tmp_path / "c.json")
    assert found.holds
    assert failed(found) == []
    assert unchecked(found) == ["latency"]
    assert states(found)["the drop is below 0.1 with 95% confidence"] == "holds"


def test_in_another_order_everything_holds(line: Line) -> None:
    x, y = (torch.cat(parts) for parts in zip(*line.test, strict=True))
    order = torch.randperm(len(x))
    found = line.verify(test=list(zip(x[order].split(64), y[order].split(64), strict=True)))
    assert failed(found) == []


def test_nothing_given_nothing_checked_but_the_content(line: Line) -> None:
    found = bw.verify(line.issued)
    assert found.holds
    assert states(found)["content"] == "holds"
    assert len(unchecked(found)) == 6


def test_an_edited_file_is_refused(line: Line, tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    path.write_text(line.issued.to_json().replace('"max_drop": 0.1', '"max_drop": 0.01'))
    with pytest.raises(CertificateError, match=r"c\.json: it was edited after it was issued"):
        line.verify(path)
    with pytest.raises(CertificateError, match=r"missing\.json"):
        line.verify(tmp_path / "missing.json")


def test_other_shipped_weights_are_told_from_all_else(line: Line) -> None:
    layer = line.shipped[4]
    packed = layer.packed.clone()
    packed[3] += 1
    layer.load_state_dict({"packed": packed}, strict=False)
    found = line.verify()
    assert not found.holds
    gone = failed(found)
    assert gone[0] == "shipped weights"
    assert "trained = shipped, bit for bit" in gone
    assert set(gone) <= {"shipped weights", "trained = shipped, bit for bit", "score of the shipped model", "drop"}
    assert "the first that differs is 4" in str(found)


def test_other_float_weights_are_told_from_all_else(line: Line) -> None:
    with torch.no_grad():
        line.model[8].bias += 1e-7
    assert failed(line.verify()) == ["float weights"]


def test_a_worse_model_no_longer_keeps_the_claim(line: Line) -> None:
    for index in (2, 4, 6):
        line.shipped[index].load_state_dict({"packed": line.shipped[index].packed.flip(0)}, strict=False)
    found = line.verify()
    assert "the drop is below 0.1 with 95% confidence" in failed(found)


def test_another_plan_names_the_site(line: Line) -> None:
    plan = bw.Plan.preset("w8a8", line.model, CALIBRATION[0], sites={"2.weight": "int4/channel"})
    other = bw.prepare(line.model, plan)
    bw.calibrate(other, CALIBRATION)
    found = line.verify(shipped=bw.convert(other), simulated=other.eval())
    assert "2.weight was int8/channel, it is int4/channel" in str(found)
    assert "bytes of the shipped model" in failed(found)


def test_other_items_and_items_seen_since(line: Line) -> None:
    fewer = line.verify(test=line.test[:9])
    assert "items of 'test'" in failed(fewer)
    assert "drop" in failed(fewer)
    mixed = line.verify(seen={"calibration": [*CALIBRATION, line.test[0][0]]})
    assert failed(mixed) == ["test items, and that they are new"]
    assert failed(line.verify(seen={"calibration": CALIBRATION[:2]})) == ["items of 'calibration'"]
    assert "items of 'calibration'" in unchecked(line.verify(seen={}))


def test_a_claim_about_other_items_needs_enough_of_them(line: Line) -> None:
    found = line.verify(test=[(line.test[0][0][:10], line.test[0][1][:10])])
    assert any(text.startswith("the drop is below") for text in failed(found))


def test_latency_of_another_machine_cannot_be_checked(line: Line) -> None:
    elsewhere = replace(line.issued, environment=replace(line.issued.environment, processor="another one"))
    found = line.verify(elsewhere, rounds=1)
    assert found.holds
    assert "latency" in unchecked(found)
    assert "it holds on another one" in str(found)
    assert "processor was another one" in str(found)


def test_latency_of_this_machine_is_measured_again(line: Line) -> None:
    assert line.issued.latency is not None
    wide = replace(line.issued.latency, low=0.0, high=1e6)
    assert states(line.verify(replace(line.issued, latency=wide), rounds=1))["latency"] == "holds"
    fast = replace(line.issued.latency, low=1e5, high=1e6)
    assert failed(line.verify(replace(line.issued, latency=fast), rounds=1)) == ["latency"]


def test_a_changed_onnx_file_no_longer_holds(line: Line, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    path = tmp_path / "model.onnx"
    bw.export(line.shipped, path, line.test[0][0])
    issued = bw.certify(line.model, line.shipped, line.test, right, onnx=path)
    assert failed(bw.verify(issued, line.model, line.shipped, line.test, right, onnx=path)) == []
    assert "ONNX file" in unchecked(bw.verify(issued, line.model))
    other = nn.Sequential(*line.shipped)
    other[0].bias += 0.5
    other.bitwright_plan = line.shipped.bitwright_plan
    bw.export(other, path, line.test[0][0])
    assert "ONNX file" in failed(bw.verify(issued, line.model, line.shipped, line.test, right, onnx=path))

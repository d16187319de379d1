import pytest
import torch
from rich.console import Console

from bitwright.demo import DigitNet, load_digits, run_demo

pytest.importorskip("sklearn")
pytest.importorskip("onnxruntime")


def test_splits_are_disjoint():
    data = load_digits()
    parts = [data.train[0], data.validation[0][0], data.test[0][0]]
    assert [len(part) for part in parts] == [900, 297, 600]
    rows = [set(map(tuple, part.flatten(1).tolist())) for part in parts]
    together = len(rows[0] | rows[1] | rows[2])
    assert together >= 1797 - 1  # scikit-learn's digits hold next to no duplicates


@pytest.mark.slow
def test_demo_shows_five_versions_that_ship_what_was_trained(tmp_path):
    report = run_demo(tmp_path, console=Console(quiet=True))
    assert [row.name for row in report.rows] == ["float", "w8a8 PTQ", "w4a4 PTQ", "w4a4 QAT", "mixed PTQ"]
    assert report.rows[0].score > 0.95
    assert all(row.parity == "exact" for row in report.rows[1:])
    assert report.rows[3].score >= report.rows[2].score - 0.01
    sizes = {row.name: row.bytes for row in report.rows}
    assert sizes["mixed PTQ"] <= sizes["w4a4 PTQ"] < sizes["w8a8 PTQ"] < sizes["float"]
    assert {row.weight for row in report.bits["mixed PTQ"]} - {0, 4, 8, 32}  # W4A4 has these alone
    assert "<svg" in (tmp_path / "report.html").read_text()
    assert (tmp_path / "mixed" / "model.safetensors").exists()


def test_network_takes_digits():
    assert DigitNet()(torch.zeros(2, 1, 8, 8)).shape == (2, 10)

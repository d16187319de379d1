"""The benchmark of real character LSTMs, in a version that takes seconds."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest


@pytest.mark.shared_data
def test_published_character_lstm_is_trained_and_shipped(shared_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "benchmarks"))
    benchmark = importlib.import_module("char_lstm")
    argv = "--steps 3 --batch 4 --characters 4000 --models shakespeare".split()
    found: Any = benchmark.run(argv, shared_data / "lm_char_lstm")["shakespeare"]
    assert 1.9 < found["float"] < 2.3  # a state of zeros costs something in 80 characters
    assert abs(found["w8a8"]["ptq"] - found["float"]) < 0.02
    assert 0.05 < found["w4a8"]["ptq"] - found["float"] < 0.4
    for preset, size in (("w8a8", 1.0), ("w4a8", 0.5)):
        row = found[preset]
        assert row["codes of training == stored codes"]
        assert row["trained == shipped"]
        assert row["recurrent weights"] == row["recurrent weights held as codes"] == 4
        assert size < row["recurrent bytes per weight"] < size + 0.05
        assert row["qat"] < row["ptq"] + 0.05

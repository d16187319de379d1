import importlib.util
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def compare(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(FOLDER), *sys.path])
    spec = importlib.util.spec_from_file_location("compare", FOLDER / "compare.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def row(speed: float, spread: float = 0.1) -> dict[str, float]:
    return {"speed": speed, "speed 10 %": speed - spread, "speed 90 %": speed + spread}


def test_only_ratios_beyond_both_spreads_count(compare):
    then = {"same": row(2.0), "near": row(2.0), "slower": row(2.0), "faster": row(2.0), "gone": row(1.0)}
    now = {"same": row(2.0), "near": row(1.85), "slower": row(1.7), "faster": row(2.3), "new": row(1.0)}
    assert compare.compared(now, then) == {
        "faster": "faster: 2.00x -> 2.30x",
        "gone": "not measured now",
        "new": "not in the baseline",
        "slower": "slower: 2.00x -> 1.70x",
    }


def test_rows_are_found_in_nested_tables(compare):
    results = {"machine": {"threads": 2}, "float": 0.5, "a": row(1.5), "b": {"c": row(2.5) | {"ms": 3.0}}}
    assert compare.ratios(results, "x") == {"x: a": row(1.5), "x: b: c": row(2.5)}
